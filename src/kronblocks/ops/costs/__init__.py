"""Costs of a product: counts and estimates, timings of this machine, and the choice of a plan by them."""
