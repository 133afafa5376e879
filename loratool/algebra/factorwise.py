"""Rules that PEFT applies to the two factors one by one (tuners/lora/model.py: add_weighted_adapter, 0.21.2).

Of n adapters with strengths s_i = weight_i * scaling_i the new A is a rule of the A_i with weights sign(s_i) sqrt|s_i|,
the new B one of the B_i with weights sqrt|s_i|. The product of two sums has cross terms B_i A_j, so the result is no
function of the deltas: it depends on how each is written as a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import copysign, sqrt

import torch

from loratool.combining import Pair, require_one_rank

Rule = Callable[[list[torch.Tensor], list[float]], torch.Tensor]


def by_factor(pairs: Sequence[Pair], rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up, down) of `rule(tensors, weights)` of the downs and then of the ups; all must have one rank."""
    present = [p for p in pairs if p.up.shape[1]]
    require_one_rank([p.up.shape[1] for p in present])
    strengths = [p.weight * p.scaling for p in present]
    down = rule([p.down for p in present], [copysign(sqrt(abs(s)), s) for s in strengths])
    up = rule([p.up for p in present], [sqrt(abs(s)) for s in strengths])
    return up, down
