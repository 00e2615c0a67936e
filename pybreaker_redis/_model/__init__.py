"""Circuits, intents and the format of a record: values and pure functions."""
