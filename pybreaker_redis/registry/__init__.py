"""Registry of an application's breakers: names, settings, decorator."""
