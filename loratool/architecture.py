"""Architectures: which layers of a model family can carry an adapter. Data, not code.

A family author writes `Architecture(...)` with the layers' patterns (see loratool.patterns); everything else follows
from it: names on disk and in memory, kohya's flat names, default targets, whether a weight is stored transposed.

Layer paths are *canonical*: the Hugging Face checkpoint's spelling, with the leading element that some files omit
(`transformer.`, `bert.`, `model.`) spelled out and listed in `prefixes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

from loratool.errors import PluginError
from loratool.patterns import Lexicon, Skeleton


@dataclass(frozen=True)
class Layer:
    """Layers of one kind: a pattern of module paths, a group to select them by, and the role of each alternative.

    `roles` names the alternatives of the pattern's last choice, or is one role for all; without it the role is the last
    element of the path that is not a number.
    """

    pattern: str
    group: str = "other"
    roles: tuple[str, ...] = ()
    component: str = ""

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

    kind = "conv1d"
    transposed = True


class Conv2d(Layer):
    """`torch.nn.Conv2d`: weight (out, in, kh, kw)."""

    kind = "conv2d"


class Embedding(Layer):
    """`torch.nn.Embedding`: weight (entries, dim), the transpose of the linear map from one-hot entries to dim."""

    kind = "embedding"
    transposed = True


@dataclass(frozen=True)
class Match:
    """What identifies a family in a config: transformers' `model_type`, or diffusers' `_class_name`."""

    model_types: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


class Known(NamedTuple):
    """A module path that an architecture explains, in canonical spelling."""

    component: str
    path: str
    layer: Layer
    role: str


@dataclass(frozen=True)
class Architecture:
    """One model family.

    prefixes         leading elements that files may omit, per component: {"": ("transformer.",)}
    headless         transformers class names whose modules carry no prefix in memory (GPT2Model, BertModel)
    bare_in_memory   components whose modules never carry the prefix in memory (CLIPTextModel in transformers 5)
    tied             groups of paths that may share one tensor
    tied_by_default  whether they do where config.json has no tie_word_embeddings
    kohya_prefixes   component -> the first element of kohya's flat names
    """

    name: str
    match: Match
    layers: tuple[Layer, ...]
    default_targets: tuple[str, ...]
    prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    headless: tuple[str, ...] = ()
    bare_in_memory: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    tied_by_default: bool = False
    kohya_prefixes: Mapping[str, str] = field(default_factory=lambda: {"": "lora_te"})

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The components in the order of the layers; `("",)` for a model of one piece."""
        return tuple(dict.fromkeys(layer.component for layer in self.layers))

    @cached_property
    def _lexicons(self) -> dict[str, Lexicon[Layer]]:
        return {c: Lexicon([(y.pattern, y) for y in self.layers if y.component == c]) for c in self.components}

    def find(self, path: str, component: str | None = None) -> Known | None:
        """Return what this family knows of a dotted path, in any spelling it may have on disk or in memory."""
        for name in self.components if component is None else (component,):
            for prefix in ("", *self.prefixes.get(name, ())):
                found = self._lexicons[name].find(prefix + path) if name in self._lexicons else None
                if found:
                    return Known(name, found.path, found.value, found.value.role(found.skeleton))
        return None

    def unflatten(self, flat: str) -> list[Known]:
        """Return every reading of a kohya module name (`lora_unet_down_blocks_0_...`); more than one is ambiguous."""
        known = []
        for component, start in self.kohya_prefixes.items():
            if flat.startswith(start + "_"):
                found = self._lexicons[component].unflatten(flat[len(start) + 1 :])
                known += [Known(component, f.path, f.value, f.value.role(f.skeleton)) for f in found]
        return known

    def explains(self, paths: Iterable[str]) -> bool:
        """Whether every module path belongs to this family."""
        return all(self.find(path) is not None for path in paths)

    def in_memory(self, component: str, path: str, model_class: str = "") -> str:
        """Return the module path of the live transformers or diffusers model, where PEFT counts its names from."""
        if component in self.bare_in_memory or model_class in self.headless:
            for prefix in self.prefixes.get(component, ()):
                if path.startswith(prefix):
                    return path[len(prefix) :]
        return path

    def skeletons(self) -> Iterable[tuple[Skeleton, Layer]]:
        """Every layer, one choice-free skeleton at a time."""
        for lexicon in self._lexicons.values():
            yield from lexicon

    def validate(self) -> None:
        """Raise PluginError where the data contradicts itself."""
        seen: dict[tuple[str, str], Layer] = {}
        for skeleton, layer in self.skeletons():
            if len(layer.roles) > 1 and skeleton.alternative >= len(layer.roles):
                raise PluginError(f"layer {layer.pattern!r} has fewer roles than alternatives", where=self.name)
            if seen.setdefault((layer.component, skeleton.text), layer) is not layer:
                raise PluginError(f"two layers claim {skeleton.text!r}", where=self.name)
        for component in (*self.prefixes, *self.bare_in_memory):
            if component not in self.components:
                raise PluginError(f"prefixes of an unknown component {component!r}", where=self.name)
