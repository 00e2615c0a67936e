"""Inference of what an unmodified pybreaker breaker asks for."""
