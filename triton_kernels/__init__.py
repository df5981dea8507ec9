"""Triton kernels and their launchers. A launcher takes a plan's config and tensors; it chooses nothing."""
