"""Benchmarks: `kronblocks bench ops|step|infer|train` measure into JSON, `kronblocks bench tables` writes the page from it."""
