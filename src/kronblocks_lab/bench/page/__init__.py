"""docs/benchmarks.md."""
