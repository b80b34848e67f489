"""The laboratory: the paper's tasks as recipes, benchmarks and the pages that they fill. Needs `kronblocks[experiments]`."""
