"""Engines, which execute intents on a circuit: in memory, by Lua, or by transactions."""
