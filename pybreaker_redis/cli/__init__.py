"""The command line of pybreaker_redis."""
