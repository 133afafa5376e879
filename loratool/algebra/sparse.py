"""Elementwise rules of merging: trim (TIES), drop and rescale (DARE), elect signs, mean of those that agree.

TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099. As PEFT has them
(peft/utils/merge_utils.py, 0.21.2): signs are elected by the trimmed tensors without their weights, 0 counts as plus,
and the mean is over those that agree, with their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def trimmed(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Return the tensor with the share `density` of its entries that are largest, and zeros elsewhere."""
    if density >= 1:
        return tensor
    flat = tensor.flatten()
    kept = torch.topk(flat.abs(), int(density * flat.numel())).indices
    result = torch.zeros_like(flat)
    result[kept] = flat[kept]
    return result.view(tensor.shape)


def dropped(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Return the tensor with each entry kept with probability `density`, and divided by it."""
    if density >= 1:
        return tensor
    chances = torch.full(tensor.shape, density, dtype=tensor.dtype)  # on the CPU: the same masks on every device
    mask = torch.bernoulli(chances, generator=generator).to(tensor.device)
    return tensor * mask / density


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the sum of weight * tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight * tensor
    return total


def disjoint_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float], sign: str = "total") -> torch.Tensor:
    """Return for each entry the mean of weight * tensor over the tensors that have the elected sign there.

    `sign`: "total" elects by the sum of the entries, "frequency" by the number of each sign.
    """
    votes = tensors[0].sign() if sign == "frequency" else tensors[0].clone()
    for tensor in tensors[1:]:
        votes += tensor.sign() if sign == "frequency" else tensor
    plus = votes >= 0
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = torch.where(plus, tensor > 0, tensor < 0)
        total += torch.where(agrees, weight * tensor, 0)
        count += agrees
    return total / count.clamp_(min=1)
