"""Limits for what a file may make the library build: files may come from anyone.

Models on the meta device have no limit here: they cost no memory, and have to fit the header of the weights' file.
"""

MOST_LAYERS = 10_000
"""Most layers of any kind in a config of transformers, which are built one by one."""

MOST_LABELS = 1_000_000
"""Most labels in a config of transformers, for each of which it makes a name."""

MOST_MISSING = 4
"""Most bytes of tensors that a folder of transformers lacks, as a multiple of those that it has, above `FREE`."""

FREE = 2**26
"""Bytes that any model may need beside the tensors in its files."""

MOST_FACTORS = 64
"""Most numbers in the factors of a layer in a structure record, as a multiple of its weights."""

MOST_SIDE = 2**16
"""Largest size in the folder of a training: of images or layers, or the number of classes."""
