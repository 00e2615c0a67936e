"""The commands; each is a module of that name."""
