"""`kronblocks reproduce`: the paper's tables and our own, every method tuned alike, run for real and resumable."""
