"""What every tensor of a checkpoint is, whichever file it lies in: norms, biases and buffers as well as matrices.

A tensor means one canonical name, or several where a file holds them as rows of one; two components of an image model
may have layers of the same name, so that the component belongs to it. By this two files of different spellings are
compared, and what is no matrix of the family is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

from loratool.architecture import Architecture
from loratool.layers import Layer
from loratool.layouts import Rows
from loratool.native import Original
from loratool.readings import Known
from loratool.tensors import TensorRef, TensorSource, module_of


class Meaning(NamedTuple):
    """The canonical paths of a tensor, as a Target has them, in their component, and how their rows lie in it."""

    component: str
    paths: tuple[str, ...]
    heights: tuple[str, ...] = ()
    swap: bool = False
    turned: bool = False

    def rows(self, ref: TensorRef, inputs: int) -> list[Rows]:
        """Return which rows of a tensor each path is; `inputs` are the features of the weight."""
        if len(self.paths) == 1 and not self.swap:
            return [(range(ref.shape[0] if ref.shape else 1),)]
        known = Known(self.component, self.paths, Layer(""), "", heights=self.heights, swap=self.swap)
        return known.rows(ref.shape[0], inputs, {})


@dataclass(frozen=True)
class Meanings:
    """The meanings of the tensors of one source."""

    source: TensorSource
    architecture: Architecture

    @cached_property
    def of(self) -> dict[str, Meaning]:
        """Every tensor's meaning by its name."""
        return {name: self._meaning(name) for name in self.source.tensors}

    @cached_property
    def whole(self) -> dict[Meaning, str]:
        """The tensors by what they mean as a whole, optional leading elements left out."""
        return {self._bare(meaning): name for name, meaning in self.of.items()}

    @cached_property
    def by_name(self) -> dict[str, tuple[str, Rows | None]]:
        """The tensors by the bare names of what they hold, with its rows: None where it is all of a tensor."""
        found: dict[str, tuple[str, Rows | None]] = {}
        for name, meaning in self.of.items():
            whole = len(meaning.paths) == 1 and not meaning.swap
            rows = [None] if whole else meaning.rows(self.source.tensors[name], self._inputs(name))
            for path, own in zip(meaning.paths, rows, strict=True):
                found[bare_name(path, meaning.component, self.architecture)] = name, own
        return found

    def parts(self, name: str, instead: TensorRef | None = None) -> list[tuple[str, TensorRef]]:
        """Return the bare names of what a tensor holds, and each as a tensor of its own, as it is on disk.

        Or as it is in another tensor of the same layout.
        """
        meaning, ref = self.of[name], instead or self.source.tensors[name]
        bare = [bare_name(path, meaning.component, self.architecture) for path in meaning.paths]
        return [(one, self._held(ref, self.by_name[one][1])) for one in bare]

    def find(self, component: str, path: str) -> tuple[TensorRef, Rows | None] | None:
        """Return the tensor that holds what a canonical path names, and the rows that are it.

        A path without a component is looked for in all of them.
        """
        every = self.architecture.components
        places = [bare_name(path, c, self.architecture) for c in ((component,) if component in every else every)]
        found = next((self.by_name[p] for p in places if p in self.by_name), None)
        return (self.source.tensors[found[0]], found[1]) if found else None

    def counterparts(self, name: str, other: Meanings) -> list[tuple[TensorRef, TensorRef]]:
        """Return pairs of equal meaning that a tensor and another source have: one, or those of its parts; or none."""
        same = other.whole.get(self._bare(self.of[name]))
        if same is not None:
            return [(self.source.tensors[name], other.source.tensors[same])]
        pairs = []
        for bare, ref in self.parts(name):
            theirs = other.by_name.get(bare)
            if theirs is None:
                return []
            pairs.append((ref, other._held(other.source.tensors[theirs[0]], theirs[1])))
        return pairs

    def _held(self, ref: TensorRef, rows: Rows | None) -> TensorRef:
        part = ref if rows is None else ref.take(rows)
        return part.transposed() if self.of[ref.name].turned else part

    def _inputs(self, name: str) -> int:
        """The features of the weight that a bias stands beside."""
        beside = self.source.tensors.get(f"{name.rpartition('.')[0]}.weight") or self.source.tensors[name]
        return prod(beside.shape[1:])

    def _bare(self, meaning: Meaning) -> Meaning:
        paths = tuple(bare_name(path, meaning.component, self.architecture) for path in meaning.paths)
        return meaning._replace(paths=paths)

    @cached_property
    def _native(self) -> frozenset[str]:
        """The components that this source spells as the model's authors did, though nothing stands before the names.

        One that both spellings have is the other's, if another matrix is in the original spelling alone.
        """
        found: set[str] = set()
        if not any(named.native for named in self.architecture.named.values()):
            return frozenset()
        for name in (n for n, ref in self.source.tensors.items() if len(ref.shape) > 1 and n.endswith(".weight")):
            known = self.architecture.find(module_of(name)) if ":" not in name else None
            names = self.architecture.natives.get(known.component) if known else None
            if known and names and known.parts != (module_of(name),) and names.find(module_of(name)):
                found.add(known.component)
        return frozenset(found)

    def _meaning(self, name: str) -> Meaning:
        component, path, native = self._located(name)
        original = self._original(component, path) if native else None
        if original is None:
            return Meaning(component, (module_of(path),))
        turned = original.turned and not name.endswith(".weight")
        return Meaning(component, original.parts, original.heights, original.swap, turned)

    def _original(self, component: str, path: str) -> Original | None:
        """Return what the rules say of a tensor: of its name, or of its module's."""
        names = self.architecture.natives.get(component)
        if names is None:
            return None
        module, _, leaf = path.rpartition(".")
        found = names.find(module) if leaf in ("weight", "bias") else None
        if found is not None:
            ending = ".bias" if leaf == "bias" else ""
            return found._replace(parts=tuple(part + ending for part in found.parts))
        own = names.find(path)
        return own and own._replace(parts=tuple(map(module_of, own.parts)))

    def _located(self, name: str) -> tuple[str, str, bool]:
        """Return the component of a tensor, its name there, and whether it is in the original spelling."""
        component, colon, path = name.partition(":")
        if colon:
            return component, path, False
        starts = {c: s for c in self.architecture.named if (s := self.architecture.start_of(c, name))}
        if starts:
            component = max(starts, key=lambda c: len(starts[c]))
            return component, name.removeprefix(starts[component]), True
        component = self._home(name)
        return component, name, component in self._native

    def _home(self, name: str) -> str:
        """Return the component of a tensor whose name does not say it."""
        architecture = self.architecture
        if len(architecture.components) == 1:
            return architecture.components[0]
        known = architecture.find(module_of(name)) or architecture.find(name.rpartition(".")[0])
        if known:
            return known.component
        return architecture.at_hand or next(iter(self._native), architecture.components[0])


def bare_name(path: str, component: str, architecture: Architecture) -> str:
    """Return a canonical path as it is on disk, less the leading element that may be absent: to compare two files.

    The component stands in front, if the family has several.
    """
    path = architecture.on_disk(path)
    start = next((p for p in architecture.prefixes.get(component, ()) if path.startswith(p)), "")
    return f"{component}:{path[len(start) :]}" if component else path[len(start) :]
