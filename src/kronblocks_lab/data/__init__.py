"""Data sets: find their files, and read them."""
