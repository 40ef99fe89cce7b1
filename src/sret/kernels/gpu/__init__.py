"""Triton kernels for GPUs: a pass of a recursion in three kernels (five in training), forward and backward."""
