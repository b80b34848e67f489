"""The algorithms, one final class a file; `base.py` says what a rule is."""
