"""Search for a block size: candidates, a shortlist, and criteria that judge them."""

from kronblocks.search.config import MixtureConfig, SearchConfig
from kronblocks.search.halving import find_block_size
from kronblocks.search.mixture import find_block_size_in_mixture_
from kronblocks.search.report import SearchReport
from kronblocks.search.task import SearchTask

__all__ = [
    "MixtureConfig",
    "SearchConfig",
    "SearchReport",
    "SearchTask",
    "find_block_size",
    "find_block_size_in_mixture_",
]
