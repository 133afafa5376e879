"""The whole extension surface: four hooks, each returning a list (register_commands: nothing). Order never matters.

Write a plugin with `from loratool import hookimpl`; see docs/plugins.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pluggy

from loratool.adapter import Adapter
from loratool.architecture import Architecture
from loratool.combining import Method
from loratool.plan import OutFile
from loratool.tensors import TensorSource

if TYPE_CHECKING:
    import click

hookspec = pluggy.HookspecMarker("loratool")
hookimpl = pluggy.HookimplMarker("loratool")


class Written(NamedTuple):
    """What a format makes of an adapter: files, and the losses that writing them would mean (none: exact)."""

    files: tuple[OutFile, ...]
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """An adapter file format: names and metadata to and from the one Adapter. It never opens a file.

    `single_file` says that the format is one .safetensors file rather than a folder.
    """

    name: str
    summary: str
    single_file: bool

    def detect(self, source: TensorSource) -> bool:
        """Whether the source is in this format, by its tensor names and config."""

    def read(self, source: TensorSource, architectures: tuple[Architecture, ...]) -> Adapter:
        """Read the adapter; what cannot be used becomes error findings, never a silence."""

    def write(self, adapter: Adapter, architecture: Architecture | None, options: Mapping[str, Any]) -> Written:
        """Spell the adapter in this format.

        `options`: `file` (name of the weights); `model_class` and `config` of the base, where it is at hand.
        """


@hookspec
def register_architectures() -> list[Architecture]:  # type: ignore[empty-body]
    """Return the model families that this plugin adds."""


@hookspec
def register_formats() -> list[Format]:  # type: ignore[empty-body]
    """Return the adapter file formats that this plugin adds."""


@hookspec
def register_methods() -> list[Method]:  # type: ignore[empty-body]
    """Return the methods of combining adapters that this plugin adds."""


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add commands to the command line."""
