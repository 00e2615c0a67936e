"""The circuit as a value, and what may be done with it: pure."""
