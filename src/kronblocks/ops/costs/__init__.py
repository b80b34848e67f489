"""What a product costs: counts and estimates, timings of this machine, and the plan that is chosen by them."""
