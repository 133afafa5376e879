"""What the scenes of the demo share: telling what happens, running verbs, noting promises, training, the folder."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loratool import api
from loratool.errors import InputError, StorageError
from loratool.plan import Report

if TYPE_CHECKING:
    import torch

#: Says that the demo made a folder, so that the demo may replace what it left there.
MARKER = ".loratool-demo"
#: Everything that the demo leaves in its folder.
LEFT = (
    "base", "lora", "merged", "tuned", "delta", "lora-rank4", "lora-energy95",
    "unet", "unet-lora", "style.safetensors", "style-peft",
)  # fmt: skip

Advance = Callable[[int, int], None]


class Narrator(Protocol):
    """Who tells the story. `loratool.cli.render` does; with --json it is `Silent`."""

    def heading(self, text: str) -> None:
        """Begin a scene."""

    def prose(self, text: str) -> None:
        """Say what happens and why."""

    def command_line(self, line: str) -> None:
        """Show a command that a reader can repeat."""

    def excerpt(self, report: Report) -> None:
        """Show what a command found or did."""

    def refusal(self, problem: InputError) -> None:
        """Show an error that is part of the story."""

    def fact(self, name: str, value: object, at_most: float | None = None) -> None:
        """Show something measured, and the bound that was promised."""

    def working(self, what: str) -> AbstractContextManager[Advance]:
        """Show that something takes a while; call with (done, total)."""


class Silent:
    """Tells nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None

    def working(self, what: str) -> AbstractContextManager[Advance]:
        """Show nothing."""
        return nullcontext(lambda *_: None)


class Promise(NamedTuple):
    """What was promised, what was measured, and the bound that it must not exceed."""

    what: str
    measured: float
    bound: float

    @property
    def kept(self) -> bool:
        """Whether the measurement is within the bound (NaN is not)."""
        return self.measured <= self.bound


@dataclass
class Stage:
    """The run of a demo: tells each step, and keeps what the summary needs."""

    narrator: Narrator
    commands: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)

    def run(self, verb: str, *sources: str, **options: Any) -> Report:
        """Show a loratool command, do it, and show its report."""
        self._announce(verb, *sources, **options)
        report = self._do(verb, *sources, **options)
        self.narrator.excerpt(report)
        return report

    def refused(self, what: str, verb: str, *sources: str, **options: Any) -> None:
        """Show a loratool command that must fail, and its error; promise that it did."""
        self._announce(verb, *sources, **options)
        try:
            self._do(verb, *sources, **options)
        except InputError as problem:
            self.narrator.refusal(problem)
            self.promises.append(Promise(what, 0, 0))
        else:
            self.promises.append(Promise(what, 1, 0))

    def fact(self, name: str, value: Any) -> None:
        """Show and keep something measured."""
        self.facts[name] = value
        self.narrator.fact(name, value)

    def promise(self, what: str, measured: float, bound: float) -> None:
        """Show a measurement and its bound, and keep both for the summary."""
        self.promises.append(Promise(what, measured, bound))
        self.narrator.fact(what, measured, bound)

    def _announce(self, verb: str, *sources: str, **options: Any) -> None:
        words = ["loratool", verb, *sources]
        for name, value in options.items():
            words += ["-o" if name == "out" else f"--{name}", *([] if value is True else [str(value)])]
        self.commands.append(shlex.join(words))
        self.narrator.command_line(self.commands[-1])

    def _do(self, verb: str, *sources: str, **options: Any) -> Report:
        """Call the function of `loratool.api` that the command line would call."""
        base, adapters = sources[:1], sources[1:]
        arguments = (*base, adapters) if verb == "merge" else sources
        with self.narrator.working(verb) as advance:
            if verb != "inspect" or options.get("spectrum"):
                options["progress"] = advance
            report: Report = getattr(api, verb)(*arguments, **options)
        return report


def fit(
    parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor], *, steps: int, rate: float, advance: Advance
) -> list[float]:
    """Train: AdamW without weight decay, `steps` steps of `rate`. Return the losses."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        advance(step, steps)
        optimizer.zero_grad()
        now = loss()
        now.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(now.detach()))
    advance(steps, steps)
    return losses


def furthest(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return float((one - two).abs().max())


def size(path: str) -> int:
    """Return the bytes of the tensors' file of an adapter folder or of a file."""
    place = Path(path)
    return sum(p.stat().st_size for p in place.glob("*.safetensors")) if place.is_dir() else place.stat().st_size


def prepare(out: Path) -> None:
    """Make the demo's folder. What an earlier demo left is removed; a folder that no demo made is refused."""
    if out.is_dir() and (out / MARKER).is_file():
        for name in LEFT:  # and nothing else: a reader's own files beside them stay
            left = out / name
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError("exists, and no demo made it", where=out, hint="loratool demo -o another-folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(json.dumps({"made by": "loratool demo", "replaced by the next": LEFT}, indent=2) + "\n")
