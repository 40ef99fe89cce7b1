"""Distillation from a teacher, online or from stored soft labels."""
