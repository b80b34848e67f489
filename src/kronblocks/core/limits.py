"""The most that a file may ask for: it may come from anywhere, and what it asks for is built before its weights are read.

What is built on the meta device is not limited here: it costs nothing, and has to fit the header of the weights' file.
"""

MOST_LAYERS = 10_000
"""Layers of any kind in a config of transformers, which are built one by one."""

MOST_FACTORS = 64
"""Factors of a layer in a structure record, as a multiple of its weights."""

MOST_SIDE = 2**16
"""Any size in the folder of a training: of images, of layers, or the number of classes."""
