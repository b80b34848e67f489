"""What fills the generated tables of README and docs from `benchmarks/results`; run from a clone."""

from pathlib import Path

ROOT = Path(__file__).parents[3]
"""The clone's folder."""
