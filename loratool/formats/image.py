"""The adapter files of image tools: one reader for all of them, and one writer that a row of styles.py describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, LowRank
from loratool.formats import image_reading, image_writing, lycoris
from loratool.formats.styles import STYLES, classify
from loratool.hookspecs import Written
from loratool.tensors import TensorSource


class ImageFormat:
    """One style of adapter files, a .safetensors file each."""

    single_file = True

    def __init__(self, name: str) -> None:
        self.style = STYLES[name]
        self.differences = self.style.alpha == "tensor"  # `.diff`, `.diff_b`, where PEFT saves the module itself
        self.name = name
        self.summary = self.style.summary

    def detect(self, source: TensorSource) -> bool:
        """Whether most keys are in this style; a config beside them is PEFT's."""
        return "peft_type" not in (source.config or {}) and classify(source.tensors) == self.name

    def read(self, source: TensorSource, architectures: tuple[Architecture, ...]) -> Adapter:
        """Read a file of any style, or of a mixture; what no family explains becomes error findings."""
        return image_reading.read(source, architectures, self.name)

    def names(self, target: Target, architecture: Architecture | None) -> str:
        """Return the one module in which all that a target covers lies, or nothing where there is none."""
        return image_writing.name_of(target, architecture, self.style) if architecture else ""

    def carries(self, target: Target, delta: Delta, architecture: Architecture | None) -> bool:
        """Whether a delta is written as it is: plain LoRA everywhere, LyCORIS' kinds where alpha is a tensor."""
        if len(target.parts) > 1 and not self.names(target, architecture):
            return isinstance(delta, LowRank) and delta.mid is None  # which alone is cut into its parts
        inner = delta.inner if isinstance(delta, Dora) else delta
        if isinstance(inner, LowRank):
            return inner.mid is None or self.style.alpha == "tensor"
        return self.style.alpha == "tensor" and lycoris.parts_of(delta) is not None

    def write(self, adapter: Adapter, architecture: Architecture | None, options: Mapping[str, Any]) -> Written:
        """Spell the adapter in this style; what it cannot hold is listed in `losses`."""
        return image_writing.write(adapter, architecture, self.style, options)
