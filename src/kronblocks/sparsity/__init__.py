"""Algorithms on grids of block scores: targets, schedule, rules, and the `Sparsifier` that ties them to an optimiser."""
