"""Weights files: reading, writing, converting and adapting them to other models."""
