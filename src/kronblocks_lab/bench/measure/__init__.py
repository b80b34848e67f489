"""Clock, memory, correctness before timing, and results files."""
