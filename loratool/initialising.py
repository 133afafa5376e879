"""init as a function: a new adapter for training, made from what the family says of a base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from loratool.adapter import Adapter, Finding, Weighted
from loratool.architecture import Architecture
from loratool.engine import EVERYTHING
from loratool.errors import LoratoolError, UsageError
from loratool.hookspecs import Format
from loratool.opening import family_of, globs, open_adapter, plugins_of
from loratool.operations.card import residual_card
from loratool.operations.init import INITIAL, INITS, Start
from loratool.operations.residual import CHANGING, Residual, residual_in
from loratool.operations.survey import PRESETS
from loratool.operations.trainable import Wish
from loratool.plan import Facts, Plan, Report, Settled, Spooled, TensorFile
from loratool.publishing import finish
from loratool.settings import Running, StrPath
from loratool.storage import checkpoint
from loratool.storage.hub_names import is_address
from loratool.storage.location import name_in_configs
from loratool.storage.runs import PICKLES
from loratool.storage.target import check_target

_OF_PEFT = ("olora", "eva", "loraga", "corda", "orthogonal")  # starts that need data, or the model loaded
_OF_LIKE = "it has modules, ranks and alphas of its own"


def init(
    base: StrPath,
    out: StrPath,
    *,
    preset: str = "",
    rank: int | None = None,
    alpha: float | None = None,
    rank_for: Mapping[str, int] | None = None,
    alpha_for: Mapping[str, float] | None = None,
    rslora: bool = False,
    like: StrPath = "",
    init: str = "kaiming",
    residual: StrPath = "",
    loftq_iterations: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    arch: str = "",
    allow_pickle: bool = False,
    **running: Unpack[Running],
) -> Report:
    """Write a new adapter for `base`, ready to be trained in PEFT, to the folder `out`.

    `preset` ("default", "attention", "mlp", "all-linear"), `target` and `exclude` choose the modules; `rank` is 8 and
    `alpha` 16, but for the modules of the patterns in `rank_for` and `alpha_for`. `like` is an adapter that has all of
    this already. `init`: "kaiming" or "gaussian"; or "pissa" or "loftq", which also write the base that they leave to
    `residual`; LoftQ quantises and factorises `loftq_iterations` times.
    """
    from loratool.operations import init as operation

    _check(init, preset, str(out), str(residual))
    _check_iterations(init, loftq_iterations)
    given = (rank, alpha, rank_for, alpha_for, rslora, preset)
    if like and any(given):
        names = "--preset, --rank, --rank-for, --alpha, --alpha-for or --rslora"
        raise UsageError(f"--like goes without {names}: {_OF_LIKE}", hint="leave one of them out")
    opened = checkpoint.open_base(str(base), allow_pickle=allow_pickle)
    architecture, notes = family_of(opened, arch, running)
    wish = Wish(
        preset,
        globs(target),
        globs(exclude),
        8 if rank is None else rank,
        16.0 if alpha is None else alpha,
        tuple((rank_for or {}).items()),
        tuple((alpha_for or {}).items()),
        rslora,
        _opened_like(like, architecture, running, allow_pickle=allow_pickle) if like else None,
    )
    memory = running.get("resources", EVERYTHING).memory
    start = Start(init, seed, dtype, str(Path(residual).resolve()) if residual else "", memory, loftq_iterations)
    format = plugins_of(running).format("peft")
    plan, adapter = operation.plan(opened, architecture, wish, start, format)
    plan.preview.findings += [*notes, *_of_residual(str(base))]
    plan.preview.sources |= {"base": str(base), **({"like": str(like)} if like else {})}
    inputs = [base, *([like] if like else [])]
    if not residual:
        return finish(plan, inputs, out, **running)
    less = _Residual(opened, architecture, format, str(base), start, adapter, Path(out), Path(residual))
    return _with_residual(plan, less, inputs, running)


def _check(init: str, preset: str, out: str, residual: str) -> None:
    """Raise UsageError where the arguments cannot be meant together."""
    if init not in INITS:
        hint = f"--init {', '.join(INITS)}"
        hint += f"; PEFT makes {init}: LoraConfig(init_lora_weights=...)" if _plain(init) in _OF_PEFT else ""
        raise UsageError(f"{init!r} is no start that loratool can make", hint=hint)
    if preset and preset not in PRESETS:
        raise UsageError(f"{preset!r} is no preset", hint=f"--preset {', '.join(PRESETS)}")
    if out.endswith(".safetensors"):
        raise UsageError("a new adapter is a folder", where=out, hint=f"-o {out.removesuffix('.safetensors')}")
    if (init in CHANGING) != bool(residual):
        what = (
            f"{CHANGING[init]} takes the adapter's start out of the base"
            if not residual
            else f"--init {init} leaves the base as it is"
        )
        hint = "--residual DIR is where the rest is written" if not residual else "leave --residual out"
        raise UsageError(what, hint=hint)
    if residual and (is_address(out) or is_address(residual)):
        raise UsageError(
            f"{CHANGING[init]}'s two outputs belong together", hint="write both here, then loratool push each"
        )
    one, two = Path(out).resolve(), Path(residual).resolve()
    if residual and (one == two or one.is_relative_to(two) or two.is_relative_to(one)):
        hint = f"-o {out} --residual {out.rstrip('/')}-base"
        raise UsageError("--residual and -o must be two folders, neither in the other", where=residual, hint=hint)


def _plain(init: str) -> str:
    return init.lower().replace("-", "").replace("_", "")


def _check_iterations(init: str, iterations: int) -> None:
    """Raise UsageError where LoftQ is not meant, or less than one iteration of it."""
    if iterations < 1:
        raise UsageError(f"{iterations} iterations of LoftQ are impossible", hint="1 quantises once, 5 is the paper's")
    if iterations > 1 and init != "loftq":
        raise UsageError(f"--init {init} has no iterations", hint="--init loftq, or leave --loftq-iterations out")


def _opened_like(
    like: StrPath, architecture: Architecture, running: Mapping[str, Any], *, allow_pickle: bool
) -> Adapter:
    """Open the adapter whose modules are taken; what it did to its base does not matter here."""
    opened = open_adapter(like, arch=architecture, allow_pickle=allow_pickle, plugins=plugins_of(running))
    return replace(opened, changed_base="").require_sound()


def _of_residual(base: str) -> list[Finding]:
    """Warn where a new adapter is for the rest of a base that another one starts from."""
    found = residual_in(base)
    if found is None:
        return []
    what = f"{base} is {found}: a new adapter does without the part of the weights that {found.adapter} starts from"
    return [Finding("warning", base, what, f"loratool init {found.of}, unless that is meant")]


class _Residual(NamedTuple):
    """What is left of a base when the start of `adapter`, which goes to `of`, is taken out of it; written to `out`."""

    base: checkpoint.Checkpoint
    architecture: Architecture
    format: Format
    called: str
    start: Start
    adapter: Adapter
    of: Path
    out: Path

    def plan(self, spooled: Spooled | None = None) -> Plan:
        """Plan it: a merge with weight -1, of which LoftQ's ends in nf4. Without `spooled` it cannot be run."""
        from loratool.operations import init
        from loratool.operations import merge as operation

        started, initial, loftq = self.adapter, (self.of / INITIAL).resolve(), self.start.init == "loftq"
        if spooled:
            where = f"{initial}, an iteration earlier" if loftq else str(initial)
            started = init.taken(self.adapter, spooled, self.architecture, self.format, where)
            started = replace(started, base_model=name_in_configs(self.base.path))
        terms = [Weighted(started, -1.0)]
        made = operation.plan(
            self.base, self.architecture, terms, out_name=self.out.name, as_nf4=loftq, allow_noop=loftq
        )
        residual = Residual.new(self.start.init, self.base.path, self.adapter, self.of)
        made.preview.totals |= {"residual_of": self.base.path, "initial": str(initial), "init": self.start.init}
        made.preview.verb, made.preview.sources["base"] = "init", self.called
        if made.single_file:
            return replace(made, files=tuple(residual.marked(f) for f in made.files if isinstance(f, TensorFile)))
        beside = (residual.file, residual_card(self.base, residual))
        made.preview.files = list(dict.fromkeys([*made.preview.files, *(file.name for file in beside)]))
        names = [file.name for file in beside]
        return replace(made, files=(*(file for file in made.files if file.name not in names), *beside))

    @property
    def next_step(self) -> Finding:
        """What to do with the two outputs."""
        what = f"train on {self.out}, which the adapter names; {self.of / INITIAL} is kept for the way back"
        back = f"loratool merge {self.called} TRAINED --init-adapter {self.of / INITIAL}"
        return Finding("info", str(self.out), what, f"then loratool merge {self.out} TRAINED; or {back}")


def _with_residual(plan: Plan, less: _Residual, inputs: Sequence[StrPath], running: Running) -> Report:
    """Write the base less what the adapter starts from, while the adapter is staged: it appears last, or nothing does.

    An adapter without its base says so when it is loaded; a base without its adapter would be taken for a model.
    """
    first = less.plan()  # every mismatch is found before anything is written
    locally = [str(path) for path in inputs if Path(path).exists()]
    names = [file.name for file in first.files]
    try:
        check_target(less.out, locally, single_file=first.single_file, force=running.get("force", False), names=names)
    except LoratoolError as problem:
        problem.hint = problem.hint.replace("another -o", "another --residual")
        raise
    if first.single_file and less.out.suffix != ".safetensors":
        name = less.out.with_suffix("") if less.out.suffix in PICKLES else less.out
        what = "of a base that is one file, the residual is a file of safetensors"
        raise UsageError(what, where=less.out, hint=f"--residual {name}.safetensors")
    plan.preview.totals["residual"] = str(less.out)
    before, replaced = _identity(less.of), _identity(less.out)
    written: list[tuple[int, int] | None] = []

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        settled = plan.settle(facts, spooled)
        done, report = finish(less.plan(spooled), inputs, less.out, **running), settled.report
        written.append(_identity(less.out))
        if less.start.init == "pissa":
            report.totals["residual_rounding"] = done.totals["rounding"]
        report.findings += [f for f in done.findings if f not in report.findings and f.level != "info"]
        report.findings.append(less.next_step)
        return settled

    try:
        return finish(replace(plan, settle=settle), inputs, less.of, **running)
    except BaseException as problem:
        is_alone = written and _identity(less.of) == before and written[0] == _identity(less.out)
        if is_alone and replaced is None:
            shutil.rmtree(less.out) if less.out.is_dir() else less.out.unlink()
        elif is_alone and isinstance(problem, LoratoolError):  # the old one is gone: the new one is better than none
            problem.hint += f"; {less.out} is new, and {less.of} is not of it: make both again"
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another at the same place."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
