"""docs/experiments.md."""
