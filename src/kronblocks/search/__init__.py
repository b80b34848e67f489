"""Which block size: candidates, a shortlist, and criteria that judge them by what they are for."""
