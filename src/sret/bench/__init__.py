"""Benchmarks of models side by side."""
