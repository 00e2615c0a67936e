"""Package in which Django finds management commands."""
