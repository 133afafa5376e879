"""Mixtures of experts (see zoo.py)."""

from zoo import tiny
from zoo_dense import SIZES

TINY = [
    tiny("mixtral", "MixtralForCausalLM", "MixtralConfig", **SIZES, num_local_experts=4),
]
