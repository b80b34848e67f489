"""Tensors in, tensors out: Kronecker and block-sparse products, and what they cost. No modules, no state."""
