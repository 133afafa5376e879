"""What the verbs that touch a base share: which tensor of it a target means, and whether the shapes agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loratool.adapter import Delta, Target
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.layers import Layer
from loratool.tensors import TensorRef, TensorSource

_WEIGHT = ".weight"
# transformers classes without a language-model head: their configs say tie_word_embeddings, yet there is nothing to tie
_UNTIED_CLASSES = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)


class Place(NamedTuple):
    """The weight of a base that a target means."""

    ref: TensorRef
    layer: Layer
    role: str


def places(base: TensorSource, architecture: Architecture) -> dict[Target, Place]:
    """Return the weights of a base that its family knows, by target; the base's own spelling is in `ref.name`."""
    found: dict[Target, Place] = {}
    for name, ref in base.tensors.items():
        known = architecture.find(name[: -len(_WEIGHT)]) if name.endswith(_WEIGHT) else None
        if known:
            target = Target(known.component, (known.path,))
            if target in found:
                raise MismatchError(
                    f"{found[target].ref.name} and {name} are the same layer to the {architecture.name} family",
                    where=base.path,
                )
            found[target] = Place(ref, known.layer, known.role)
    return found


def bare_name(name: str, architecture: Architecture) -> str:
    """Return a tensor name less the leading element that files may omit, to compare two checkpoints."""
    for prefixes in architecture.prefixes.values():
        for prefix in prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :]
    return name


def misfit(delta: Delta, place: Place) -> str:
    """Say how a delta does not fit a weight, or nothing. A 1x1 convolution and a linear layer fit each other."""
    wanted, shape = place.ref.shape, delta.weight_shape(transposed=place.layer.transposed)
    if _squeezed(wanted) == _squeezed(shape):
        return ""
    return f"the base's weight is {list(wanted)}, the adapter updates {list(shape)}"


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def tied_partner(target: Target, base: TensorSource, architecture: Architecture, known: Mapping[Target, Place]) -> str:
    """Return the weight that shares its values with this one when the model is loaded, or nothing."""
    config = base.config or {}
    classes = config.get("architectures")
    if isinstance(classes, list) and any(
        c in architecture.headless or str(c).endswith(_UNTIED_CLASSES) for c in classes
    ):
        return ""
    for group in architecture.tied:
        if target.parts[0] not in group:
            continue
        others = [p for p in group if p != target.parts[0]]
        present = [p for p in others if Target(target.component, (p,)) in known]
        flag = config.get("tie_word_embeddings", architecture.tied_by_default)
        if flag is not False or (not present and "tie_word_embeddings" not in config):
            return others[0]
    return ""
