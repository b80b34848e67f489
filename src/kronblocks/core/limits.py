"""Limits for what a file may make the library build: files may come from anyone.

Models on the meta device have no limit here: they cost no memory, and have to fit the header of the weights' file.
"""

MOST_LAYERS = 10_000
"""Most layers of any kind in a config of transformers, which are built one by one."""

MOST_FACTORS = 64
"""Most numbers in the factors of a layer in a structure record, as a multiple of its weights."""

MOST_SIDE = 2**16
"""Largest size in the folder of a training: of images or layers, or the number of classes."""
