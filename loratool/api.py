"""The verbs as functions: open, look up, plan, run, write, report. The command line calls these and nothing else.

Sources and outputs are paths. Every verb returns a Report; with `dry_run` it is the preview, and nothing is written.
What the verbs share is in groups of keyword arguments (loratool.settings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

from loratool import engine
from loratool.adapter import Adapter, Finding, Weighted
from loratool.architecture import Architecture
from loratool.detection import by_names_of
from loratool.engine import EVERYTHING
from loratool.errors import LoratoolError, MismatchError, UsageError
from loratool.opening import (
    applied_to_base,
    applied_together,
    architecture_of,
    family_of,
    globs,
    hashed,
    incomplete,
    open_adapter,
    path_of,
    plugins_of,
    several,
    spelling,
    to_compare,
    to_rewrite,
    told_by,
    unread,
    weights_for,
    with_shared_downs,
)
from loratool.operations.ranks import optional_ranking, ranking
from loratool.operations.residual import into_residual
from loratool.plan import Plan, Report
from loratool.publishing import finish
from loratool.settings import Applied, Extracting, Publishing, Resizing, Settings, StrPath, split
from loratool.storage import checkpoint, location


def inspect(
    adapter: StrPath,
    *,
    spectrum: bool = False,
    check: bool = False,
    curve: bool = False,
    hashes: bool = False,
    base: StrPath = "",
    **settings: Unpack[Settings],
) -> Report:
    """Describe an adapter, from its header alone unless `spectrum` asks for singular values or `check` for defects.

    `curve` adds the trade of size against error that `resize` can choose from. `hashes` reads the whole file.

    With a `base` it is a merged model that is described, by which of its tensors differ from those of the base.
    """
    from loratool.operations import inspect as operation

    reading, running = split(settings)
    if base:
        return _inspect_merged(adapter, base, reading, running)
    opened = open_adapter(adapter, **reading)
    plan = operation.plan(opened, architecture_of(opened, running), spectrum=spectrum, check=check, curve=curve)
    plan.preview.sources["adapter"] = str(adapter)
    if check:
        plan.preview.findings += incomplete(opened, "", running)
    plan.preview.totals["file_bytes"] = location.nbytes(str(adapter))
    if hashes:
        told, findings = hashed(opened)
        plan.preview.totals |= told
        plan.preview.findings += findings
    return finish(plan, [], None, **running)


def _inspect_merged(model: StrPath, base: StrPath, reading: Mapping[str, Any], running: Mapping[str, Any]) -> Report:
    """Compare a merged model with its base."""
    from loratool.operations import unchanged as operation

    allow_pickle = reading.get("allow_pickle", False)
    opened, opened_base = (checkpoint.open_base(str(path), allow_pickle=allow_pickle) for path in (model, base))
    architecture, notes = family_of(opened_base, reading.get("arch", ""), running)
    if any(f.detect(opened) for f in plugins_of(running).formats()):
        raise UsageError("--base is for a merged model, and this is an adapter", where=model, hint="leave --base out")
    plan = operation.plan(opened, opened_base, architecture)
    plan.preview.findings += notes
    plan.preview.sources |= {"model": str(model), "base": str(base)}
    return finish(plan, [], None, **running)


def merge(
    base: StrPath,
    adapters: StrPath | Adapter | Applied | Sequence[StrPath | Adapter | Applied],
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

    `adapters` is one or a list: paths or `Adapter`s, or `Applied` where each has weights and modules of its own.
    `weights` has one number an adapter, `scales` a further one for modules by pattern. `init_adapter` is what a
    PiSSA-like one began as.
    `verify` computes samples of the output anew, in fp64, and compares the logits of base + adapter and merged model.
    `base_as_trained` ("nf4", "nf4-double") merges into what a QLoRA adapter was trained on: dequant(quant(W)).
    """
    from loratool.operations import merge as operation

    reading, running = split(settings)
    adapters = several(adapters)
    weights = weights_for(adapters, weights)
    if verify and base_as_trained:
        raise UsageError("--verify compares with the base, which --base-as-trained changes", hint="use one of them")
    opened = checkpoint.open_base(str(base), allow_pickle=reading.get("allow_pickle", False))
    architecture, notes = family_of(opened, reading.pop("arch", ""), running)
    common = Applied("", 1.0, scales or {}, globs(target), globs(exclude), init_adapter)
    weighted, of_base = applied_to_base(adapters, weights, common, architecture, {**reading, "base": str(base)})
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
        raise by_names_of([w.adapter for w in weighted], problem, opened, architecture, plugins_of(running)) from None
    plan.preview.findings += [*of_base, *notes]
    given = [a.path if isinstance(a, Applied) else a for a in adapters]
    paths = [path_of(a) for a in given]
    plan.preview.sources |= {"base": str(base), **{f"adapter {n + 1}": str(p) for n, p in enumerate(paths)}}
    report = finish(plan, [base, *paths], out, **running)
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

    merged = checkpoint.open_base(location.spelled(report.out))
    units = operation.samples(merged, base, architecture, adapters)
    resources = running.get("resources", EVERYTHING)
    done = engine.measure(verification.plan(units, report.out), resources, running.get("progress"))
    report.totals |= done.totals
    difference, why_not = logits.compare(base.folder or base.path, adapters, report.out, resources.memory)
    if why_not:
        report.findings.append(Finding("info", "--verify", f"the models' outputs were not compared: {why_not}"))
        return
    report.totals["logits_difference"] = difference
    if not difference <= logits.TOLERANCE:
        what = f"base with adapter and merged model differ by {difference:.2g} of the logits' spread"
        raise LoratoolError(what, where=report.out, hint="do not use the output, and please report this bug")


def extract(
    tuned: StrPath,
    base: StrPath,
    out: StrPath,
    *,
    to: str = "peft",
    dtype: str = "float32",
    rest: str = "error",
    split: bool = False,
    quality: str = "balanced",
    relative_to: StrPath = "",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    arch: str = "",
    allow_pickle: bool = False,
    allow_noop: bool = False,
    **settings: Unpack[Extracting],
) -> Report:
    """Extract the low-rank delta of `tuned` against `base` into an adapter in the format `to`.

    `rest` ("error", "skip", "save"): what to do with changes that are no low-rank deltas. `split`: a delta for each
    part of a fused weight. `quality` ("fast", "balanced", "exact"): how near to the best possible factors.
    `relative_to`, a model: as for `resize`.
    """
    from loratool.operations import extract as operation

    rule, pad_rank, running = ranking(settings)
    opened, opened_base = (checkpoint.open_base(str(path), allow_pickle=allow_pickle) for path in (tuned, base))
    architecture, notes = family_of(opened, arch, running)
    notes += unread(opened_base)
    yardstick = checkpoint.open_base(str(relative_to), allow_pickle=allow_pickle) if relative_to else None
    format = plugins_of(running).format(to)
    plan = operation.plan(
        opened,
        opened_base,
        architecture,
        rule,
        format,
        dtype=dtype,
        rest=rest,
        split=split,
        quality=quality,
        pad_rank=pad_rank,
        relative_to=yardstick,
        allow_noop=allow_noop,
        target=globs(target),
        exclude=globs(exclude),
        memory=running.get("resources", EVERYTHING).memory,
        options=spelling(format, Path(out), opened.config),
    )
    plan.preview.findings += notes
    plan.preview.sources |= {"tuned": str(tuned), "base": str(base)}
    return finish(plan, [tuned, base, *([relative_to] if relative_to else [])], out, **running)


def resize(
    adapter: StrPath | Adapter,
    out: StrPath,
    *,
    dtype: str = "keep",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    init_adapter: StrPath = "",
    curve: bool = False,
    relative_to: StrPath = "",
    strip_metadata: bool = False,
    **settings: Unpack[Resizing],
) -> Report:
    """Change the rank of an adapter, in its own format; modules that the globs leave out are dropped and named.

    `drop` is another word for `exclude`. `curve` reports the whole trade of size against error. With a model as
    `relative_to`, `error`, `ratio`, `budget` and `curve` measure updates against the weights of it that they change.
    """
    from loratool.operations import resize as operation

    rule, pad_rank, rest = ranking(settings)
    reading, running = split(rest)
    yardstick, family = None, None
    if relative_to:
        yardstick = checkpoint.open_base(str(relative_to), allow_pickle=reading.get("allow_pickle", False))
        family, _ = family_of(yardstick, reading.pop("arch", ""), running)
        reading["arch"] = family
    less = (*globs(exclude), *globs(drop))
    keeps_base = not str(out).endswith(".safetensors")  # in a folder the config names it
    opened = to_rewrite(adapter, init_adapter, reading, target, less, keeps_base=keeps_base)
    format = plugins_of(running).format(opened.origin.format)
    plan = operation.plan(
        opened,
        family or architecture_of(opened, running),
        rule,
        format,
        dtype=dtype,
        pad_rank=pad_rank,
        curve=curve,
        relative_to=yardstick,
        options=spelling(format, Path(out), None, private=strip_metadata),
    )
    plan.preview.findings += incomplete(opened, relative_to, running)
    plan.preview.sources["adapter"] = str(path_of(adapter))
    return finish(plan, [path_of(adapter), *(path for path in (init_adapter, relative_to) if path)], out, **running)


def combine(
    adapters: StrPath | Adapter | Applied | Sequence[StrPath | Adapter | Applied],
    out: StrPath,
    *,
    weights: Sequence[float] = (),
    scales: Mapping[str, float] | None = None,
    normalize: bool = False,
    method: str = "cat",
    options: Mapping[str, object] | None = None,
    to: str = "",
    dtype: str = "keep",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    init_adapter: StrPath | Adapter = "",
    base: StrPath = "",
    allow_different_bases: bool = False,
    allow_disjoint: bool = False,
    strip_metadata: bool = False,
    **settings: Unpack[Resizing],
) -> Report:
    """Combine adapters into one, by a method (`loratool methods`) with its `options`; no base model is needed.

    `adapters`, `weights`, `scales` and `init_adapter` are as for `merge`; `normalize` makes the weights add up to 1.
    Ranks are chosen as in `resize`; without a rule they are the method's own. The format is that of the adapters, or
    `to`; of `base` config.json is read, where the sizes of fused layers matter.
    """
    from loratool.operations import combine as operation

    chosen = plugins_of(settings).method(method)
    given = chosen.bind(options or {})
    rule, pad_rank, rest = optional_ranking(settings)
    reading, running = split(rest)
    config = told_by(base, reading, running)
    adapters = several(adapters)
    weights = weights_for(adapters, weights)
    common = Applied("", 1.0, scales or {}, globs(target), globs(exclude), init_adapter)
    weighted, architecture = applied_together(adapters, weights, common, reading)
    weighted = operation.normalised(weighted) if normalize else weighted
    of_base = into_residual(str(base), weighted) if base else []
    formats = sorted({w.adapter.origin.format for w in weighted})
    if len(formats) > 1 and not to:
        raise UsageError(f"the adapters are in the formats {' and '.join(formats)}", hint=f"--to {formats[0]}")
    format = plugins_of(running).format(to or formats[0])
    plan = operation.plan(
        weighted,
        operation.steps_of(weighted),
        operation.Choice(chosen, given, rule, pad_rank, dtype),
        architecture,
        format,
        options=spelling(format, Path(out), config, private=strip_metadata),
        allow_different_bases=allow_different_bases,
        allow_disjoint=allow_disjoint,
    )
    plan.preview.findings += of_base
    paths = [w.adapter.origin.path for w in weighted]
    plan.preview.sources |= {f"adapter {n + 1}": path for n, path in enumerate(paths)}
    return finish(plan, paths, out, **running)


def convert(
    adapter: StrPath | Adapter,
    out: StrPath,
    *,
    to: str,
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    drop_unmapped: bool = False,
    base: StrPath = "",
    init_adapter: StrPath = "",
    strip_metadata: bool = False,
    verify: bool = False,
    rank: int | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Write an adapter, of a path or open already, in the format `to`; the factors' bytes do not change.

    `strip_metadata`: less what the file's header says of the training. `verify` opens the result again and compares.
    With `rank`, modules of a higher one are resized to it as the format has them: fused layers have the sum of ranks.

    What is no plain pair of factors (AdaLoRA, LoHa, LoKr, an adapter less its `init_adapter`) is made one, exactly.
    Of `base`, the model that the adapter is for, config.json is read where the sizes of its layers matter, and the
    names of its tensors, which show what the adapter lacks.
    """
    from loratool.operations import convert as operation
    from loratool.operations import proven

    if verify and rank is not None:
        hint = "loratool compare measures the two files; the report has the error of every module"
        raise UsageError("--verify proves that the update is the same, and --rank changes it", hint=hint)
    reading, running = split(settings)
    config = told_by(base, reading, running)
    opened = to_rewrite(adapter, init_adapter, reading, target, exclude, drop_unmapped=drop_unmapped)
    format = plugins_of(running).format(to)
    architecture = architecture_of(opened, running)
    opened = with_shared_downs(opened, format, architecture)
    options = spelling(format, Path(out), config, private=strip_metadata)
    options["families"] = [plugins_of(running).architecture(name) for name in opened.families]
    plan = operation.plan(opened, architecture, format, options=options, drop_unmapped=drop_unmapped)
    plan.preview.findings += incomplete(opened, base, running)
    plan.preview.sources["adapter"] = str(path_of(adapter))
    inputs = [path_of(adapter), *([init_adapter] if init_adapter else [])]
    if rank is not None:
        return _at_rank(rank, plan, out, {"arch": architecture or "", "format": to}, running, private=strip_metadata)
    report = finish(plan, inputs, out, **running)
    if verify and not report.dry_run:
        place = location.spelled(report.out)
        result = open_adapter(place, arch=architecture or "", format=to, plugins=plugins_of(running))
        proof = proven.plan(opened, result, architecture, config, dropping=drop_unmapped)
        report.totals |= engine.measure(proof, running.get("resources", EVERYTHING), running.get("progress")).totals
    return report


def _at_rank(
    rank: int, plan: Plan, out: StrPath, reading: dict[str, Any], running: dict[str, Any], *, private: bool
) -> Report:
    """Run a conversion into a temporary place, and resize what came out: fused layers are one there."""
    with TemporaryDirectory() as folder:
        joined = Path(folder) / (Path(out).name or "adapter")
        first = finish(plan, [], joined, **{**running, "dry_run": False, "publish": Publishing()})
        converted = open_adapter(joined, **reading, plugins=plugins_of(running))
        report = resize(converted, out, rank=rank, strip_metadata=private, **running)
    report.verb, report.sources = "convert", first.sources
    report.totals = {**first.totals, **report.totals}
    report.findings = [*dict.fromkeys((*first.findings, *report.findings))]
    if report.dry_run:
        report.findings.append(Finding("info", "--rank", "the error that it makes is known after the run"))
    return report


def compare(
    *adapters: StrPath,
    base: StrPath = "",
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    init_adapter: StrPath = "",
    **settings: Unpack[Settings],
) -> Report:
    """Compare the updates of two adapters or more, whatever their formats and ranks; `base` is as for `convert`.

    Of several the totals hold matrices. `init_adapter` is what those that are PiSSA-like started from.
    """
    from loratool.operations import compare as operation

    reading, running = split(settings)
    config = told_by(base, reading, running)
    opened = to_compare(adapters, init_adapter, reading, target, exclude)
    family = next((a for a in opened if a.families), opened[0])
    plan = operation.plan(opened, architecture_of(family, running), config)
    two = len(adapters) == 2
    names = ("first", "second") if two else tuple(f"adapter {n + 1}" for n in range(len(adapters)))
    plan.preview.sources |= dict(zip(names, map(str, adapters), strict=True))
    return finish(plan, [], None, **running)
