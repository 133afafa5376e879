"""What the verbs of the API share: groups of keyword arguments, and how an adapter is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from loratool.adapter import Adapter
from loratool.engine import Progress, Resources
from loratool.operations.ranks import Ranking
from loratool.plugins import Plugins

StrPath = str | Path


class Reading(TypedDict, total=False):
    """How adapters are read: family and format instead of detecting them, a lost alpha, and whether to open pickles."""

    arch: str
    format: str
    alpha: float | None
    allow_pickle: bool


class Publishing(NamedTuple):
    """How something appears on the Hub: in which branch, as a pull request, as a new repository that only you can see.

    `command` is what was typed, for the card; `licence` what the card says, whatever other cards do.
    """

    revision: str = ""
    private: bool = False
    create_pr: bool = False
    message: str = ""
    licence: str = ""
    command: str = ""
    dry_run: bool = False


class Running(TypedDict, total=False):
    """How a verb runs: only plan, replace an existing output, with which workers, device and memory.

    `publish` says how an output that is a repository on the Hub appears there.
    """

    dry_run: bool
    force: bool
    resources: Resources
    progress: Progress | None
    plugins: Plugins | None
    publish: Publishing


class Applied(NamedTuple):
    """An adapter as `merge` applies it: its weight, further ones of modules by pattern, and the modules it is used for.

    `path` may be an adapter that is open already, such as `from_peft` gives. `init_adapter` is the adapter that the
    training of a PiSSA-like one started from.
    """

    path: StrPath | Adapter
    weight: float = 1.0
    scales: Mapping[str, float] = {}
    target: Sequence[str] = ()
    exclude: Sequence[str] = ()
    init_adapter: StrPath | Adapter = ""


class Settings(Reading, Running):
    """Both."""


class Extracting(Ranking, Running):
    """What `extract` takes beside its own."""


class Resizing(Ranking, Settings):
    """What `resize` and `combine` take beside their own."""


def split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what opening adapters takes, and what running takes."""
    for name in settings.keys() - Settings.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {name!r}; there are {', '.join(Settings.__annotations__)}")
    reading = {n: v for n, v in settings.items() if n in Reading.__annotations__ or n == "plugins"}
    return reading, {n: v for n, v in settings.items() if n not in Reading.__annotations__}
