"""The local replica of circuits: views and the listener that keeps them current."""
