"""Low rank: write one large weight as the product of two small ones."""

from workbench.techniques.low_rank.svd import LowRank, truncated_svd

__all__ = ["LowRank", "truncated_svd"]
