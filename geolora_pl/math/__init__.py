"""Tensors in, tensors out: the math of the method."""
