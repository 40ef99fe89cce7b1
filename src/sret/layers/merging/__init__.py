"""Token merging inside slices: the most similar tokens of each slice become one, and are copied back afterwards."""

from sret.layers.merging.matching import Merge, find_merge
from sret.layers.merging.passes import MergedTokens, merging_pass, merging_passes

__all__ = ["Merge", "MergedTokens", "find_merge", "merging_pass", "merging_passes"]
