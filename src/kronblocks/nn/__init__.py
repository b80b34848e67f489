"""Layers: parameters and one call into `kronblocks.ops`."""
