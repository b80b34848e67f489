"""The paper's tasks as recipes, on Lightning: data, models, training, comparison, reports. Needs `kronblocks[experiments]`."""
