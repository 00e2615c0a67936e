"""Command line of the package, and the demo."""
