"""Deltas: the updates that adapters make to weights, one kind a class, as references; the arithmetic is in algebra.

Every kind is a map from a weight W to dW(W), a matrix (out, in x kernel), of the *original* W. What several adapters
do to one weight is the sum of their dW, each times the adapter's weight, so their order never matters.

`take(rows)` is the delta of some output rows, for weights that are fused on one side and split on the other.
"""

from loratool.deltas.base import Delta, Taken, Term, alpha_of
from loratool.deltas.of_weight import Boft, Dora, Glora, Ia3, Oft, OutputOft
from loratool.deltas.products import LoHa, LoKr, LowRank, Vera
from loratool.deltas.whole import Full, Replace, Sparse, Tokens

__all__ = [
    "Boft",
    "Delta",
    "Dora",
    "Full",
    "Glora",
    "Ia3",
    "LoHa",
    "LoKr",
    "LowRank",
    "Oft",
    "OutputOft",
    "Replace",
    "Sparse",
    "Taken",
    "Term",
    "Tokens",
    "Vera",
    "alpha_of",
]
