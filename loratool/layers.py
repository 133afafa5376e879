"""The vocabulary in which a family's layers are written: kinds of layers, and fused weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratool.layouts import Layout
from loratool.patterns import Skeleton


@dataclass(frozen=True)
class Layer:
    """Layers of one kind: a pattern of module paths, a group to select them by, and the role of each alternative.

    `group` is attention, mlp, experts, router, embedding, head, projection, conv ...; `roles` names the alternatives
    of the pattern's last choice, or is one role for all; without it the role is the last element of the path that is
    not a number. `tower` is empty for the main model, else vision, audio, projector ... `parameter`: the weight is a
    parameter of its own, which the pattern names, and not the `weight` of a module: PEFT must be told so.
    """

    pattern: str
    group: str = "other"
    roles: tuple[str, ...] = ()
    component: str = ""
    tower: str = ""
    parameter: bool = False

    kind: ClassVar[str] = "layer"
    #: The stored weight is the transpose of the (out, in) matrix that an adapter's up @ down forms.
    transposed: ClassVar[bool] = False

    def role(self, skeleton: Skeleton) -> str:
        """Return the role that this layer plays at one alternative of its pattern."""
        if self.roles:
            return self.roles[skeleton.alternative if len(self.roles) > 1 else 0]
        return next(e for e in reversed(skeleton.elements) if not e.isdigit() and not e.startswith("{"))


class Linear(Layer):
    """`torch.nn.Linear`: weight (out, in)."""

    kind = "linear"


class Conv1D(Layer):
    """`transformers.pytorch_utils.Conv1D` (GPT-2): weight (in, out), the transpose of a linear layer's."""

    kind = "Conv1D"
    transposed = True


class Conv1d(Layer):
    """`torch.nn.Conv1d`: weight (out, in / groups, k)."""

    kind = "conv1d"


class Conv2d(Layer):
    """`torch.nn.Conv2d`: weight (out, in / groups, kh, kw)."""

    kind = "conv2d"


class Conv3d(Layer):
    """`torch.nn.Conv3d`: weight (out, in / groups, kd, kh, kw)."""

    kind = "conv3d"


class Embedding(Layer):
    """`torch.nn.Embedding`: weight (entries, dim), the transpose of the linear map from one-hot entries to dim."""

    kind = "embedding"
    transposed = True


@dataclass(frozen=True)
class Experts(Layer):
    """A stack of expert matrices in one 3-D parameter: (experts, out, in), or (experts, in, out) where transposed.

    The pattern is the parameter's name; `name[3]` is expert 3. `flipped_in_memory` says that transformers holds the
    other order in memory than the file has; `inputs`, an expression over config keys, is then the number of input
    features, by which files that were saved in the memory's order are recognised.
    """

    in_out: bool = False
    flipped_in_memory: bool = False
    inputs: str = ""
    unmarked: bool = False  # (in, out), and transformers' class has no is_transposed: PEFT since 0.19 swaps the two

    kind: ClassVar[str] = "experts"

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        """Whether each expert's matrix is stored (in, out)."""
        return self.in_out


class Excluded(Layer):
    """A parameter of two or more dimensions that carries no adapter; `group` says what it is."""

    kind = "excluded"


class Matrix(Layer):
    """A weight of unknown orientation, of a model that no family describes."""

    kind = "matrix"


@dataclass(frozen=True)
class Fused:
    """A weight that holds several projections: `pattern[q]` is one of its parts.

    `layout` says which rows are whose, in a config for which `when` holds (loratool.expressions); the first that holds
    is taken. For a stack of experts the layout is that of one expert's matrix.
    """

    pattern: str
    parts: tuple[str, ...]
    layout: Layout
    when: str = ""
    component: str = ""
