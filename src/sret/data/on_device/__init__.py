"""Augments training images on the device, in batches."""
