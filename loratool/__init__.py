"""loratool: everything that happens to a LoRA adapter after training.

The nouns that plugins need are here; the verbs load their machinery when they are first used, so that importing
loratool loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, Finding, Origin, Target
from loratool.architecture import Architecture, Match
from loratool.combining import Bounds, Matrix, Method, Pair, Share, method
from loratool.deltas import LowRank
from loratool.errors import LoratoolError
from loratool.hookspecs import Format, Written, hookimpl
from loratool.layers import Conv1D, Conv1d, Conv2d, Conv3d, Embedding, Excluded, Experts, Fused, Linear
from loratool.layouts import blocks, concat, interleave_heads, stack, stride
from loratool.native import Labels, Named
from loratool.plan import JsonFile, Report, TensorFile
from loratool.tensors import TensorRef, TensorSource

if TYPE_CHECKING:
    from loratool.api import combine, compare, convert, extract, inspect, merge, resize
    from loratool.initialising import init
    from loratool.live import from_factors, from_peft, to_peft
    from loratool.publishing import pull, push
    from loratool.settings import Publishing
    from loratool.storage.remote import streaming

__all__ = [
    "Adapter",
    "Architecture",
    "Bounds",
    "Conv1D",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Excluded",
    "Experts",
    "Finding",
    "Format",
    "Fused",
    "JsonFile",
    "Labels",
    "Linear",
    "LoratoolError",
    "LowRank",
    "Match",
    "Matrix",
    "Method",
    "Named",
    "Origin",
    "Pair",
    "Publishing",
    "Report",
    "Share",
    "Target",
    "TensorFile",
    "TensorRef",
    "TensorSource",
    "Written",
    "__version__",
    "blocks",
    "combine",
    "compare",
    "concat",
    "convert",
    "extract",
    "from_factors",
    "from_peft",
    "hookimpl",
    "init",
    "inspect",
    "interleave_heads",
    "merge",
    "method",
    "pull",
    "push",
    "resize",
    "stack",
    "streaming",
    "stride",
    "to_peft",
]

__version__ = "0.1.0"

_LAZY = {
    "init": "loratool.initialising",
    **dict.fromkeys(("combine", "compare", "convert", "extract", "inspect", "merge", "resize"), "loratool.api"),
    **dict.fromkeys(("from_factors", "from_peft", "to_peft"), "loratool.live"),
    **dict.fromkeys(("pull", "push"), "loratool.publishing"),
    "Publishing": "loratool.settings",
    "streaming": "loratool.storage.remote",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'loratool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
