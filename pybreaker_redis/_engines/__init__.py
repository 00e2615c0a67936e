"""Engines: each carries out intents on a circuit, in memory, by Lua or by transaction."""
