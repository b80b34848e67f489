"""Benchmarks: `kronblocks bench ops|step|infer|train|...` write JSON, and `kronblocks bench tables` writes the page from it."""
