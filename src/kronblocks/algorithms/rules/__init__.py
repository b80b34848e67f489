"""The algorithms, one final class per file. `base.py` says what a rule is."""
