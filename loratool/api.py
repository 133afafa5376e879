"""The verbs as functions: open, look up, plan, run, write, report. The command line calls these and nothing else.

Sources and outputs are paths. Every verb returns a Report; with `dry_run` it is the preview, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

from loratool import engine
from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.engine import EVERYTHING, Progress, Resources
from loratool.errors import FormatError, MismatchError, UsageError
from loratool.hookspecs import Format
from loratool.operations.resize import Rule
from loratool.plan import Plan, Report
from loratool.plugins import Plugins, family_of, installed
from loratool.storage import checkpoint, writer

StrPath = str | Path


def inspect(
    adapter: StrPath,
    *,
    spectrum: bool = False,
    arch: str = "",
    format: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Describe an adapter, from its header alone unless `spectrum` asks for singular values."""
    from loratool.operations import inspect as operation

    plugins = plugins or installed()
    opened = open_adapter(adapter, arch=arch, format=format, alpha=alpha, allow_pickle=allow_pickle, plugins=plugins)
    plan = operation.plan(opened, _architecture(opened, plugins), spectrum=spectrum)
    plan.preview.sources["adapter"] = str(adapter)
    plan.preview.totals["file_bytes"] = sum(p.stat().st_size for p in _files(Path(adapter)))
    plan.preview.findings += plugins.findings
    return engine.measure(plan, resources, progress)


def merge(
    base: StrPath,
    adapters: Sequence[StrPath],
    out: StrPath,
    *,
    weights: Sequence[float] = (),
    dtype: str = "keep",
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    arch: str = "",
    format: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    allow_noop: bool = False,
    dry_run: bool = False,
    force: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Merge adapters, each times its weight, into a base checkpoint; write the merged checkpoint to `out`."""
    from loratool.operations import merge as operation

    plugins = plugins or installed()
    if not all(map(isfinite, weights)):
        raise UsageError(f"the weights {list(weights)} are not all numbers", hint="an adapter's weight is such as 0.7")
    if weights and len(weights) != len(adapters):
        raise UsageError(f"{len(adapters)} adapters and {len(weights)} weights", hint="give one weight an adapter")
    opened = checkpoint.open_base(str(base))
    architecture = _family(opened, plugins, arch)
    pairs, skipped = [], {}
    for path, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        adapter = open_adapter(
            path, arch=architecture.name, format=format, alpha=alpha, allow_pickle=allow_pickle, plugins=plugins
        ).require_sound()
        selected, left_out = adapter.selected(target, exclude)
        skipped[adapter.origin.path] = _tensor_names(adapter, left_out)
        pairs.append((selected, weight))
    plan = operation.plan(
        opened, architecture, pairs, out_name=Path(out).name, dtype=dtype, skipped=skipped, allow_noop=allow_noop
    )
    plan.preview.sources |= {"base": str(base), **{f"adapter {n + 1}": str(a) for n, a in enumerate(adapters)}}
    return _finish(
        plan,
        [base, *adapters],
        out,
        resources=resources,
        dry_run=dry_run,
        force=force,
        progress=progress,
        plugins=plugins,
    )


def extract(
    tuned: StrPath,
    base: StrPath,
    out: StrPath,
    *,
    rank: int,
    to: str = "peft",
    dtype: str = "float32",
    rest: str = "error",
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    arch: str = "",
    dry_run: bool = False,
    force: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Extract the rank-`rank` delta of `tuned` against `base` into an adapter in the format `to`."""
    from loratool.operations import extract as operation

    plugins = plugins or installed()
    opened, opened_base = checkpoint.open_base(str(tuned)), checkpoint.open_base(str(base))
    architecture = _family(opened, plugins, arch)
    format = plugins.format(to)
    plan = operation.plan(
        opened,
        opened_base,
        architecture,
        Rule(rank=rank),
        format,
        dtype=dtype,
        rest=rest,
        target=target,
        exclude=exclude,
        memory=resources.memory,
        options=_spelling(format, Path(out), opened.config),
    )
    plan.preview.sources |= {"tuned": str(tuned), "base": str(base)}
    return _finish(
        plan, [tuned, base], out, resources=resources, dry_run=dry_run, force=force, progress=progress, plugins=plugins
    )


def resize(
    adapter: StrPath,
    out: StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "keep",
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    arch: str = "",
    format: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    dry_run: bool = False,
    force: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Change the rank of an adapter, in its own format; modules that the globs leave out are dropped and named."""
    from loratool.operations import resize as operation

    plugins = plugins or installed()
    rule = Rule(rank, energy)
    opened = open_adapter(
        adapter, arch=arch, format=format, alpha=alpha, allow_pickle=allow_pickle, plugins=plugins
    ).require_sound()
    selected, left_out = opened.selected(target, exclude)
    spelled = plugins.format(opened.origin.format)
    plan = operation.plan(
        selected,
        _architecture(selected, plugins),
        rule,
        spelled,
        dtype=dtype,
        options=_spelling(spelled, Path(out), None),
        skipped=_tensor_names(opened, left_out),
    )
    plan.preview.sources["adapter"] = str(adapter)
    return _finish(
        plan, [adapter], out, resources=resources, dry_run=dry_run, force=force, progress=progress, plugins=plugins
    )


def convert(
    adapter: StrPath,
    out: StrPath,
    *,
    to: str,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    arch: str = "",
    format: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    drop_unmapped: bool = False,
    dry_run: bool = False,
    force: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Write an adapter in the format `to`; the factors' bytes do not change."""
    from loratool.operations import convert as operation

    plugins = plugins or installed()
    opened = open_adapter(
        adapter, arch=arch, format=format, alpha=alpha, allow_pickle=allow_pickle, plugins=plugins
    ).require_sound()
    selected, left_out = opened.selected(target, exclude)
    spelled = plugins.format(to)
    plan = operation.plan(
        selected,
        _architecture(selected, plugins),
        spelled,
        options=_spelling(spelled, Path(out), None),
        skipped=_tensor_names(opened, left_out),
        drop_unmapped=drop_unmapped,
    )
    plan.preview.sources["adapter"] = str(adapter)
    return _finish(
        plan, [adapter], out, resources=resources, dry_run=dry_run, force=force, progress=progress, plugins=plugins
    )


def compare(
    first: StrPath,
    second: StrPath,
    *,
    arch: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    dry_run: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Compare the updates of two adapters, whatever their formats and ranks."""
    from loratool.operations import compare as operation

    plugins = plugins or installed()
    one, two = (
        open_adapter(a, arch=arch, alpha=alpha, allow_pickle=allow_pickle, plugins=plugins).require_sound()
        for a in (first, second)
    )
    plan = operation.plan(one, two)
    plan.preview.sources |= {"first": str(first), "second": str(second)}
    if dry_run:
        return _preview(plan)
    return engine.measure(plan, resources, progress)


def open_adapter(
    path: StrPath,
    *,
    arch: str = "",
    format: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    plugins: Plugins | None = None,
) -> Adapter:
    """Open an adapter in whatever format it is. Headers only; `findings` says what is wrong with it."""
    plugins = plugins or installed()
    source = checkpoint.open_adapter(str(path), allow_pickle=allow_pickle)
    if alpha is not None:
        source = replace(source, config={"peft_type": "LORA", **(source.config or {}), "lora_alpha": alpha})
    formats = [plugins.format(format)] if format else [f for f in plugins.formats() if f.detect(source)]
    if len(formats) != 1:
        names = ", ".join(f.name for f in formats)
        raise FormatError(
            f"this can be {names}" if names else "this is no adapter in a format that loratool knows",
            where=path,
            hint="choose with --format" if names else "loratool formats lists them",
        )
    families = (plugins.architecture(arch),) if arch else plugins.architectures()
    return formats[0].read(source, families)


def _tensor_names(adapter: Adapter, targets: Sequence[Target]) -> list[str]:
    """Return the tensors of some targets, for the ledger."""
    names = [ref.name for t in targets for delta in adapter.deltas[t] for ref in delta.refs]
    return names + [adapter.base_copies[t].name for t in targets if t in adapter.base_copies]


def _architecture(adapter: Adapter, plugins: Plugins) -> Architecture | None:
    """Return the family of an adapter; where several agree on every name, the first."""
    return plugins.architecture(adapter.families[0]) if adapter.families else None


def _family(base: checkpoint.Checkpoint, plugins: Plugins, arch: str) -> Architecture:
    family = family_of(base, plugins, arch)
    if family is None:
        kind = (base.config or {}).get("model_type") or (base.config or {}).get("_class_name") or "no config"
        names = ", ".join(a.name for a in plugins.architectures())
        raise MismatchError(
            f"no installed family fits this model ({kind})",
            where=base.path,
            hint=f"choose one with --arch ({names}), or add one with -p FILE (docs/plugins.md)",
        )
    return family.architecture


def _spelling(format: Format, out: Path, config: Mapping[str, object] | None) -> dict[str, str]:
    """Return the options for writing a format: the file's name where the output is one file, the base's class."""
    options = {}
    is_file = out.suffix == ".safetensors"
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
    out: StrPath,
    *,
    resources: Resources,
    dry_run: bool,
    force: bool,
    progress: Progress | None,
    plugins: Plugins,
) -> Report:
    """Run the plan, or return its preview."""
    plan.preview.out = str(out)
    plan.preview.findings += plugins.findings
    writer.check_target(Path(out), map(str, inputs), single_file=plan.single_file, force=force)
    if dry_run:
        return _preview(plan)
    return engine.execute(plan, Path(out), resources, force=force, progress=progress)


def _preview(plan: Plan) -> Report:
    plan.preview.dry_run = True
    return plan.preview


def _files(path: Path) -> list[Path]:
    return [p for p in path.glob("*") if p.is_file()] if path.is_dir() else [path]
