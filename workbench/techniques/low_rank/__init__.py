"""Low rank: write one large weight as the product, or the sum of products, of small ones."""

from workbench.techniques.low_rank.cp import CPDecomposition
from workbench.techniques.low_rank.lora import LoRA, adapters, attach
from workbench.techniques.low_rank.svd import LowRank, truncated_svd
from workbench.techniques.low_rank.tucker import Tucker

__all__ = ["CPDecomposition", "LoRA", "LowRank", "Tucker", "adapters", "attach", "truncated_svd"]
