"""Integrations with frameworks; each needs its extra, and the rest of the package does not know that they exist."""
