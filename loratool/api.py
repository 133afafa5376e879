"""The verbs as functions: open, look up, plan, run, write, report. The command line calls these and nothing else.

Sources and outputs are paths. Every verb returns a Report; with `dry_run` it is the preview, and nothing is written.
What the verbs share is in groups of keyword arguments (loratool.settings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, Unpack

from loratool import engine, ledger
from loratool.adapter import Adapter, Finding, Weighted
from loratool.architecture import Architecture
from loratool.detection import as_model, by_names_of, of_config, read_as, recognise
from loratool.engine import EVERYTHING, Progress, Resources
from loratool.errors import FormatError, LoratoolError, MismatchError, UsageError
from loratool.hookspecs import Format
from loratool.operations.initial import without_initial
from loratool.operations.ranks import ranking
from loratool.plan import Plan, Report
from loratool.plugins import Plugins, installed
from loratool.settings import Applied, Extracting, Resizing, Settings, StrPath, split
from loratool.storage import checkpoint
from loratool.storage.target import check_target


def inspect(
    adapter: StrPath,
    *,
    spectrum: bool = False,
    check: bool = False,
    curve: bool = False,
    base: StrPath = "",
    **settings: Unpack[Settings],
) -> Report:
    """Describe an adapter, from its header alone unless `spectrum` asks for singular values or `check` for defects.

    `curve` adds the trade of size against error that `resize` can choose from.

    With a `base` it is a merged model that is described, by which of its tensors differ from those of the base.
    """
    from loratool.operations import inspect as operation

    reading, running = split(settings)
    if base:
        return _inspect_merged(adapter, base, reading, running)
    try:
        opened = open_adapter(adapter, **reading)
    except LoratoolError as problem:
        raise _as_a_model(adapter, problem, reading, running) from None
    plan = operation.plan(opened, _architecture(opened, running), spectrum=spectrum, check=check, curve=curve)
    plan.preview.sources["adapter"] = str(adapter)
    plan.preview.totals["file_bytes"] = sum(p.stat().st_size for p in _files(Path(adapter)))
    return _finish(plan, [], None, **running)


def _inspect_merged(model: StrPath, base: StrPath, reading: Mapping[str, Any], running: Mapping[str, Any]) -> Report:
    """Compare a merged model with its base."""
    from loratool.operations import unchanged as operation

    allow_pickle = reading.get("allow_pickle", False)
    opened, opened_base = (checkpoint.open_base(str(path), allow_pickle=allow_pickle) for path in (model, base))
    architecture, notes = _family(opened_base, reading.get("arch", ""), running)
    if any(f.detect(opened) for f in _plugins(running).formats()):
        raise UsageError("--base is for a merged model, and this is an adapter", where=model, hint="leave --base out")
    plan = operation.plan(opened, opened_base, architecture)
    plan.preview.findings += notes
    plan.preview.sources |= {"model": str(model), "base": str(base)}
    return _finish(plan, [], None, **running)


def _as_a_model(
    path: StrPath, problem: LoratoolError, reading: Mapping[str, Any], running: Mapping[str, Any]
) -> LoratoolError:
    """Return why a source was not opened as an adapter: where it is a model, with what can be asked of one."""
    if checkpoint.is_adapter_folder(str(path)):
        return problem
    try:
        opened = checkpoint.open_base(str(path), allow_pickle=reading.get("allow_pickle", False))
        return as_model(opened, _plugins(running)) or problem
    except LoratoolError:
        return problem


def merge(
    base: StrPath,
    adapters: Sequence[StrPath | Adapter | Applied],
    out: StrPath,
    *,
    weights: Sequence[float] = (),
    scales: Mapping[str, float] | None = None,
    dtype: str = "keep",
    compute_dtype: str = "float32",
    base_as_trained: str = "",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    init_adapter: StrPath | Adapter = "",
    allow_noop: bool = False,
    verify: bool = False,
    **settings: Unpack[Settings],
) -> Report:
    """Merge adapters into a base checkpoint; write the merged checkpoint to `out`.

    `adapters` are paths or `Adapter`s, or `Applied` where each has weights and modules of its own. `weights` has one
    number an adapter, `scales` a further one for modules by pattern. `init_adapter` is what a PiSSA-like one began as.
    `verify` computes samples of the output anew, in fp64, and compares the logits of base + adapter and merged model.
    `base_as_trained` ("nf4", "nf4-double") merges into what a QLoRA adapter was trained on: dequant(quant(W)).
    """
    from loratool.operations import merge as operation

    reading, running = split(settings)
    if isinstance(adapters, (str, Path, Mapping, Adapter)):
        raise UsageError("adapters must be a list of paths", hint="merge(base, [one, two], out, weights=[0.7, 0.4])")
    weights = list(weights) or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise UsageError(f"{len(adapters)} adapters and {len(weights)} weights", hint="give one weight an adapter")
    if verify and base_as_trained:
        raise UsageError("--verify compares with the base, which --base-as-trained changes", hint="use one of them")
    opened = checkpoint.open_base(str(base), allow_pickle=reading.get("allow_pickle", False))
    architecture, notes = _family(opened, reading.pop("arch", ""), running)
    common = Applied("", 1.0, scales or {}, _patterns(target), _patterns(exclude), init_adapter)
    weighted = [_applied(a, weight, common, architecture, reading) for a, weight in zip(adapters, weights, strict=True)]
    try:
        plan = operation.plan(
            opened,
            architecture,
            weighted,
            out_name=Path(out).name,
            dtype=dtype,
            compute=compute_dtype,
            as_trained=base_as_trained,
            allow_noop=allow_noop,
        )
    except MismatchError as problem:
        raise by_names_of([w.adapter for w in weighted], problem, opened, architecture, _plugins(running)) from None
    plan.preview.findings += notes
    given = [a.path if isinstance(a, Applied) else a for a in adapters]
    paths = [a.origin.path if isinstance(a, Adapter) else a for a in given]
    plan.preview.sources |= {"base": str(base), **{f"adapter {n + 1}": str(p) for n, p in enumerate(paths)}}
    report = _finish(plan, [base, *paths], out, **running)
    if verify and not report.dry_run:
        _verify(report, opened, architecture, weighted, running)
    return report


def _verify(
    report: Report,
    base: checkpoint.Checkpoint,
    architecture: Architecture,
    adapters: Sequence[Weighted],
    running: Mapping[str, Any],
) -> None:
    """Open the output again and compute samples of it anew; compare what the models say where that is possible."""
    from loratool import logits
    from loratool.operations import merge as operation
    from loratool.operations import verify as verification

    merged = checkpoint.open_base(report.out)
    units = operation.samples(merged, base, architecture, adapters)
    resources = running.get("resources", EVERYTHING)
    done = engine.measure(verification.plan(units, report.out), resources, running.get("progress"))
    report.totals |= done.totals
    difference, why_not = logits.compare(base.path, adapters, report.out, resources.memory)
    if why_not:
        report.findings.append(Finding("info", "--verify", f"the models' outputs were not compared: {why_not}"))
        return
    report.totals["logits_difference"] = difference
    if not difference <= logits.TOLERANCE:
        what = f"base with adapter and merged model differ by {difference:.2g} of the logits' spread"
        raise LoratoolError(what, where=report.out, hint="do not use the output, and please report this bug")


def _applied(
    given: StrPath | Adapter | Applied,
    weight: float,
    common: Applied,
    architecture: Architecture,
    reading: Mapping[str, Any],
) -> Weighted:
    """Open an adapter and say how strongly each of its modules is applied: by its own words and those for all."""
    own = given if isinstance(given, Applied) else Applied(given)
    factors = (weight * own.weight, *own.scales.values(), *common.scales.values())
    if not all(isinstance(f, (int, float)) and isfinite(f) for f in factors):
        raise UsageError(f"the weights {factors} are not all numbers", hint="an adapter's weight is such as 0.7")
    adapter = _opened(own.path, architecture, reading)
    initial = own.init_adapter or common.init_adapter
    if initial:
        adapter = without_initial(adapter, _opened(initial, architecture, reading))
    adapter = adapter.require_sound()
    target, exclude = (*own.target, *common.target), (*own.exclude, *common.exclude)
    weighted = Weighted(
        adapter.selected(target, exclude), weight * own.weight, (*own.scales.items(), *common.scales.items())
    )
    weighted.require_scales_used()
    return weighted


def _opened(given: StrPath | Adapter, architecture: Architecture, reading: Mapping[str, Any]) -> Adapter:
    """Open an adapter as one for this family, if it is not open already."""
    if isinstance(given, Adapter):
        return read_as(given, architecture, _plugins(reading))
    return open_adapter(given, arch=architecture, **reading)


def extract(
    tuned: StrPath,
    base: StrPath,
    out: StrPath,
    *,
    to: str = "peft",
    dtype: str = "float32",
    rest: str = "error",
    quality: str = "balanced",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    arch: str = "",
    allow_pickle: bool = False,
    allow_noop: bool = False,
    **settings: Unpack[Extracting],
) -> Report:
    """Extract the low-rank delta of `tuned` against `base` into an adapter in the format `to`.

    `rest` ("error", "skip", "save"): what to do with changes that are no low-rank deltas. `quality` ("fast",
    "balanced", "exact"): how near to the best possible factors.
    """
    from loratool.operations import extract as operation

    rule, pad_rank, running = ranking(settings)
    opened, opened_base = (checkpoint.open_base(str(path), allow_pickle=allow_pickle) for path in (tuned, base))
    architecture, notes = _family(opened, arch, running)
    notes += _unread(opened_base)
    format = _plugins(running).format(to)
    plan = operation.plan(
        opened,
        opened_base,
        architecture,
        rule,
        format,
        dtype=dtype,
        rest=rest,
        quality=quality,
        pad_rank=pad_rank,
        allow_noop=allow_noop,
        target=_patterns(target),
        exclude=_patterns(exclude),
        memory=running.get("resources", EVERYTHING).memory,
        options=_spelling(format, Path(out), opened.config),
    )
    plan.preview.findings += notes
    plan.preview.sources |= {"tuned": str(tuned), "base": str(base)}
    return _finish(plan, [tuned, base], out, **running)


def resize(
    adapter: StrPath,
    out: StrPath,
    *,
    dtype: str = "keep",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    init_adapter: StrPath = "",
    curve: bool = False,
    **settings: Unpack[Resizing],
) -> Report:
    """Change the rank of an adapter, in its own format; modules that the globs leave out are dropped and named.

    `drop` is another word for `exclude`. `curve` reports the whole trade of size against error.
    """
    from loratool.operations import resize as operation

    rule, pad_rank, rest = ranking(settings)
    reading, running = split(rest)
    opened = _to_rewrite(adapter, init_adapter, reading, target, (*_patterns(exclude), *_patterns(drop)))
    format = _plugins(running).format(opened.origin.format)
    options = _spelling(format, Path(out), None)
    more: dict[str, Any] = {"pad_rank": pad_rank, "curve": curve, "dtype": dtype, "options": options}
    plan = operation.plan(opened, _architecture(opened, running), rule, format, **more)
    plan.preview.sources["adapter"] = str(adapter)
    return _finish(plan, [adapter, *([init_adapter] if init_adapter else [])], out, **running)


def convert(
    adapter: StrPath,
    out: StrPath,
    *,
    to: str,
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    drop_unmapped: bool = False,
    base: StrPath = "",
    init_adapter: StrPath = "",
    **settings: Unpack[Settings],
) -> Report:
    """Write an adapter in the format `to`; the factors' bytes do not change.

    What is no plain pair of factors (AdaLoRA, LoHa, LoKr, an adapter less its `init_adapter`) is made one, exactly.
    Of `base`, the model that the adapter is for, config.json is read: where the sizes of its layers matter.
    """
    from loratool.operations import convert as operation

    reading, running = split(settings)
    config = _told_by(base, reading, running)
    opened = _to_rewrite(adapter, init_adapter, reading, target, exclude)
    format = _plugins(running).format(to)
    options = _spelling(format, Path(out), config)
    plan = operation.plan(opened, _architecture(opened, running), format, options=options, drop_unmapped=drop_unmapped)
    plan.preview.sources["adapter"] = str(adapter)
    return _finish(plan, [adapter, *([init_adapter] if init_adapter else [])], out, **running)


def compare(first: StrPath, second: StrPath, *, base: StrPath = "", **settings: Unpack[Settings]) -> Report:
    """Compare the updates of two adapters, whatever their formats and ranks; `base` is as for `convert`."""
    from loratool.operations import compare as operation

    reading, running = split(settings)
    config = _told_by(base, reading, running)
    one, two = (open_adapter(a, **reading).require_sound() for a in (first, second))
    plan = operation.plan(one, two, _architecture(one, running), config)
    plan.preview.sources |= {"first": str(first), "second": str(second)}
    return _finish(plan, [], None, **running)


def open_adapter(
    path: StrPath,
    *,
    arch: str | Architecture = "",
    format: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    plugins: Plugins | None = None,
) -> Adapter:
    """Open an adapter in whatever format it is. Headers only; `findings` says what is wrong with it."""
    plugins = plugins or installed()
    source = replace(checkpoint.open_adapter(str(path), allow_pickle=allow_pickle), alpha=alpha)
    formats = [plugins.format(format)] if format else [f for f in plugins.formats() if f.detect(source)]
    if len(formats) != 1:
        names = ", ".join(f.name for f in formats)
        raise FormatError(
            f"this can be {names}" if names else "this is no adapter in a format that loratool knows",
            where=path,
            hint="choose with --format" if names else "loratool formats lists them; is it a base model?",
        )
    families = plugins.architectures()
    if arch:
        families = (plugins.architecture(arch) if isinstance(arch, str) else arch,)
    return formats[0].read(source, families)


def _to_rewrite(
    path: StrPath,
    init_adapter: StrPath,
    reading: Mapping[str, Any],
    target: str | Sequence[str],
    exclude: str | Sequence[str],
) -> Adapter:
    """Open an adapter that is to be written anew: sound, less what it started from, and only the chosen modules."""
    opened = open_adapter(path, **reading)
    if init_adapter:
        opened = without_initial(opened, open_adapter(init_adapter, **reading))
    return opened.require_sound().selected(_patterns(target), _patterns(exclude))


def _told_by(base: StrPath, reading: dict[str, Any], running: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the model that adapters are for; it names their family where nothing else does."""
    if not base:
        return {}
    config = checkpoint.config_of(str(base))
    reading["arch"] = of_config(str(base), config, _plugins(running), reading.get("arch", "")) or ""
    return config


def _patterns(given: str | Sequence[str]) -> Sequence[str]:
    return (given,) if isinstance(given, str) else given


def _plugins(running: Mapping[str, Any]) -> Plugins:
    return running.get("plugins") or installed()


def _architecture(adapter: Adapter, running: Mapping[str, Any]) -> Architecture | None:
    """Return the family of an adapter; where several agree on every name, the first."""
    return _plugins(running).architecture(adapter.families[0]) if adapter.families else None


def _family(base: checkpoint.Checkpoint, arch: str, running: Mapping[str, Any]) -> tuple[Architecture, list[Finding]]:
    """Return the family of a base, and what to say about how it was found."""
    plugins = _plugins(running)
    if any(f.detect(base) for f in plugins.formats()):
        raise UsageError("this is an adapter, and a model is needed here", where=base.path)
    family = recognise(base, plugins, arch)
    return family.architecture, [*family.findings, *_unread(base)]


def _unread(base: checkpoint.Checkpoint) -> list[Finding]:
    """Say which weights beside a base's own were not read."""
    return [Finding("info", base.path, note) for note in base.notes]


def _spelling(format: Format, out: Path, config: Mapping[str, object] | None) -> dict[str, Any]:
    """Return the options for writing a format: the file's name where the output is one file, what the base is."""
    options: dict[str, Any] = {"config": config or {}}
    is_file = out.suffix == ".safetensors"
    if out.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"):
        raise UsageError(f"{out.suffix} files are not written", where=out, hint=f"-o {out.with_suffix('.safetensors')}")
    if format.single_file and not is_file:
        raise UsageError(f"{format.name} is one file", hint=f"-o {out}.safetensors")
    if is_file:
        options["file"] = out.name
    classes = (config or {}).get("architectures")
    if isinstance(classes, list) and classes:
        options["model_class"] = str(classes[0])
    return options


def _finish(
    plan: Plan,
    inputs: Sequence[StrPath],
    out: StrPath | None,
    *,
    dry_run: bool = False,
    force: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Run the plan and publish what it writes, or return its preview."""
    report = plan.preview
    report.findings += (plugins or installed()).findings
    if plan.inputs:
        report.ledger = ledger.close(plan.inputs, plan.units, plan.files, plan.later)
    if out is not None:
        report.out = str(out)
        names = [file.name for file in plan.files]
        check_target(Path(out), map(str, inputs), single_file=plan.single_file, force=force, names=names)
    if dry_run:
        report.dry_run = True
        return report
    if out is None:
        return engine.measure(plan, resources, progress)
    return engine.execute(plan, Path(out), resources, force=force, progress=progress)


def _files(path: Path) -> list[Path]:
    return [p for p in path.glob("*") if p.is_file()] if path.is_dir() else [path]
