"""Tiny models of the built-in families, each built once from its config, saved, and described by names and shapes.

The parts of the zoo are in zoo_*.py, each with a list TINY. `record(tiny)` is what the tests look at: names, shapes and
module classes in memory, names and shapes on disk, and the config that was saved.
"""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

PARTS = ("zoo_classic", "zoo_dense", "zoo_experts", "zoo_encoders", "zoo_images", "zoo_videos")


class Tiny(NamedTuple):
    """A model to build: `library.cls(library.config(**settings))`; diffusers models take the settings themselves.

    `alone` is the family that a component is of where nothing but its own folder is given: T5, as a part of Flux.
    """

    family: str
    cls: str
    config: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    component: str = ""
    library: str = "transformers"
    alone: str = ""

    def __str__(self) -> str:
        extra = ",".join(f"{n}={v}" for n, v in self.settings if isinstance(v, (bool, str)))
        return f"{self.family}-{self.cls}" + (f"-{extra}" if extra else "")


def tiny(
    family: str,
    cls: str,
    config: str = "",
    *,
    component: str = "",
    library: str = "transformers",
    alone: str = "",
    **settings: Any,
) -> Tiny:
    """Return a Tiny; nested configs are given as dicts."""
    return Tiny(family, cls, config, tuple(settings.items()), component, library, alone or family)


class Record(NamedTuple):
    """What the tests look at. Shapes by full tensor name; classes by module path."""

    config: dict[str, Any]
    memory: dict[str, tuple[int, ...]]
    disk: dict[str, tuple[int, ...]]
    classes: dict[str, str]  # module path -> names of the classes of the module and its bases
    folder: Path


def every() -> list[Tiny]:
    """All tiny models of the zoo."""
    return [one for part in PARTS for one in import_module(part).TINY]


def build(one: Tiny) -> Any:
    """Return the model, in eval mode, equal in every call."""
    import torch

    library = import_module(one.library)
    torch.manual_seed(0)
    settings = dict(one.settings)
    cls = getattr(library, one.cls)
    return (cls(getattr(library, one.config)(**settings)) if one.config else cls(**settings)).eval()


def record(one: Tiny) -> Record:
    """Build and save the model once, and say what is in memory and on disk."""
    if repr(one) not in _RECORDS:
        _RECORDS[repr(one)] = _record(one)
    return _RECORDS[repr(one)]


_RECORDS: dict[str, Record] = {}


def _record(one: Tiny) -> Record:
    from safetensors import safe_open

    model = build(one)
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    model.save_pretrained(folder)
    disk = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            disk |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return Record(
        json.loads((folder / "config.json").read_text()),
        {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)},
        disk,
        {n: " ".join(c.__name__ for c in type(m).__mro__) for n, m in model.named_modules()},
        folder,
    )
