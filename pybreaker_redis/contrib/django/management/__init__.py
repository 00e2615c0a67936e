"""What ``manage.py`` can do; Django looks here."""
