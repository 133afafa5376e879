"""Opening what the verbs work on: adapters, bases, families, and how outputs are spelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Finding, Target, Weighted
from loratool.architecture import Architecture
from loratool.deltas import LowRank
from loratool.detection import as_model, of_config, read_as, recognise
from loratool.detection import family_of as detected
from loratool.errors import FormatError, HubError, InputError, LoratoolError, MismatchError, UsageError
from loratool.formats.metadata import DIGESTS
from loratool.hookspecs import Format
from loratool.operations import complete
from loratool.operations.initial import without_initial
from loratool.operations.refinement import selected_together
from loratool.operations.residual import into_residual, of_residual, refuse_start, residual_in
from loratool.plugins import Plugins, installed
from loratool.settings import Applied, StrPath
from loratool.storage import checkpoint, digests, location
from loratool.storage.sharing import first_alike
from loratool.tensors import Span


def open_adapter(
    path: StrPath,
    *,
    arch: str | Architecture = "",
    format: str = "",
    alpha: float | None = None,
    allow_pickle: bool = False,
    plugins: Plugins | None = None,
    base: str = "",
) -> Adapter:
    """Open an adapter in whatever format it is. Headers only; `findings` says what is wrong with it.

    `base` is the model that it is used with: one that was trained on a residual of init's fits that alone.
    """
    plugins = plugins or installed()
    try:
        opened = _read(path, arch, format, plugins, alpha=alpha, allow_pickle=allow_pickle)
    except LoratoolError as problem:
        raise _as_a_model(path, problem, plugins, allow_pickle=allow_pickle) from None
    return of_residual(opened if arch else _as_its_base(opened, plugins), base)


def _read(
    path: StrPath,
    arch: str | Architecture,
    format: str,
    plugins: Plugins,
    *,
    alpha: float | None,
    allow_pickle: bool,
) -> Adapter:
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


def _as_a_model(path: StrPath, problem: LoratoolError, plugins: Plugins, *, allow_pickle: bool) -> LoratoolError:
    """Return why a source was not opened as an adapter: where it is a model, with what can be asked of one."""
    if isinstance(problem, HubError) or checkpoint.is_adapter_folder(str(path)):
        return problem
    try:
        return as_model(checkpoint.open_base(str(path), allow_pickle=allow_pickle), plugins) or problem
    except LoratoolError:
        return problem


def _as_its_base(adapter: Adapter, plugins: Plugins) -> Adapter:
    """Return an adapter that fits several families as one for that of the model it names, by the model's config.

    The model is one that is here, or, of an adapter on the Hub, one there.
    """
    possible, base = (*adapter.families, *adapter.rivals), adapter.base_model
    if len(possible) < 2 or not base:
        return adapter
    try:
        here = checkpoint.exists(base)
        config = checkpoint.config_of(base) if here else location.config_of_base(base, adapter.origin.path)
        family = of_config(base, config, plugins) if config else None
    except LoratoolError:  # only a name in a config
        return adapter
    if family is None or family.name not in possible:
        return adapter
    return read_as(adapter, family, plugins) if adapter.rivals else replace(adapter, families=(family.name,))


def to_rewrite(
    given: StrPath | Adapter,
    init_adapter: StrPath,
    reading: Mapping[str, Any],
    target: str | Sequence[str],
    exclude: str | Sequence[str],
    *,
    drop_unmapped: bool = False,
    keeps_base: bool = False,
) -> Adapter:
    """Open an adapter that is to be written anew: sound, less what it started from, and only the chosen modules.

    `keeps_base`: what is written goes on naming the base, so that one of a residual stays one.
    """
    arch = reading.get("arch", "") if isinstance(given, Adapter) else ""
    family = plugins_of(reading).architecture(arch) if arch and isinstance(arch, str) else arch or None
    opened = of_residual(_opened(given, family, reading), str(reading.get("base") or ""), ask=True)
    if drop_unmapped:
        opened = opened.without_unmapped()
    if init_adapter:
        opened = without_initial(opened, open_adapter(init_adapter, **reading))
    elif keeps_base and opened.residual:
        opened = replace(opened, changed_base="", residual="")
    return opened.require_sound().selected(globs(target), globs(exclude))


def with_shared_downs(adapter: Adapter, format: Format, architecture: Architecture | None) -> Adapter:
    """Return an adapter in which deltas that a format keeps in one module share `down` where its bytes are equal."""
    names = getattr(format, "names", None)
    modules: dict[str, dict[Target, LowRank]] = {}
    for target, found in adapter.deltas.items() if names and format.name != adapter.origin.format else ():
        delta = found[0]
        if names and len(found) == 1 and isinstance(delta, LowRank) and len(target.parts) == 1:
            modules.setdefault(names(target, architecture), {})[target] = delta
    modules.pop("", None)
    deltas, again = dict(adapter.deltas), list[str]()
    for alike in (of for of in modules.values() if len(of) > 1):
        downs = first_alike(d.down for d in alike.values())
        again += [d.down.name for d, down in zip(alike.values(), downs, strict=True) if d.down is not down]
        for (target, delta), down in zip(alike.items(), downs, strict=True):
            deltas[target] = (replace(delta, down=down),)
    return replace(adapter, deltas=deltas, consumed=(*adapter.consumed, *again))


def to_compare(
    paths: Sequence[StrPath],
    init_adapter: StrPath,
    reading: Mapping[str, Any],
    target: str | Sequence[str],
    exclude: str | Sequence[str],
) -> list[Adapter]:
    """Open adapters to compare, those of a changed base less `init_adapter`; a glob need not match in all of them."""
    if len(paths) < 2:
        raise UsageError("compare is about two adapters or more", hint="loratool inspect describes one")
    opened = [open_adapter(path, **reading) for path in paths]
    if init_adapter:
        initial, changed = open_adapter(init_adapter, **reading), any(a.changed_base for a in opened)
        opened = [without_initial(a, initial) if a.changed_base or not changed else a for a in opened]
    elif opened[0].residual and len({a.residual for a in opened}) == 1:  # what they did to one base can be compared
        opened = [replace(a, changed_base="", residual="") for a in opened]
    return selected_together([a.require_sound() for a in opened], globs(target), globs(exclude))


def applied(
    given: Sequence[StrPath | Adapter | Applied],
    weights: Sequence[float],
    common: Applied,
    architecture: Architecture | None,
    reading: Mapping[str, Any],
) -> list[Weighted]:
    """Open adapters and say how strongly each of their modules is applied: by their own words and those for all.

    A pattern of an adapter's own has to match in it, one for all in any.
    """
    opened = [_applied(a, w, common, architecture, reading) for a, w in zip(given, weights, strict=True)]
    chosen = selected_together([w.adapter for w in opened], common.target, common.exclude)
    for pattern in common.scales:
        if opened and not any(a.has(pattern) for a in chosen):
            opened[0].require_used([pattern])
    every = [(w._replace(adapter=a), (*w.scales, *common.scales.items())) for w, a in zip(opened, chosen, strict=True)]
    return [w._replace(scales=scales).cut() for w, scales in every]


def _applied(
    given: StrPath | Adapter | Applied,
    weight: float,
    common: Applied,
    architecture: Architecture | None,
    reading: Mapping[str, Any],
) -> Weighted:
    """Open one adapter, less what it began as, with the weights and modules of its own."""
    own = given if isinstance(given, Applied) else Applied(given)
    factors = (weight * own.weight, *own.scales.values(), *common.scales.values())
    if not all(isinstance(f, (int, float)) and isfinite(f) for f in factors):
        raise UsageError(f"the weights {factors} are not all numbers", hint="an adapter's weight is such as 0.7")
    adapter = of_residual(_opened(own.path, architecture, reading), str(reading.get("base") or ""), ask=True)
    initial = own.init_adapter or common.init_adapter
    if initial:
        adapter = without_initial(adapter, _opened(initial, architecture, reading))
    adapter = adapter.require_sound().selected(globs(own.target), globs(own.exclude))
    weighted = Weighted(adapter, weight * own.weight, tuple(own.scales.items()))
    weighted.require_used(own.scales)
    return weighted


def applied_to_base(
    given: Sequence[StrPath | Adapter | Applied],
    weights: Sequence[float],
    common: Applied,
    architecture: Architecture,
    reading: Mapping[str, Any],
) -> tuple[list[Weighted], list[Finding]]:
    """Open adapters for a merge into a base, which `reading` names, and say what is wrong where it is a residual."""
    base = str(reading["base"])
    every = [one if isinstance(one, Applied) else Applied(one) for one in given]
    if residual_in(base) and all(own.init_adapter or common.init_adapter for own in every):
        for own in every:
            refuse_start(base, _opened(own.path, architecture, reading))
    opened = applied(given, weights, common, architecture, reading)
    return opened, into_residual(base, opened)


def several(given: StrPath | Adapter | Applied | Sequence[StrPath | Adapter | Applied]) -> list[Any]:
    """Return a list of adapters, of which one alone may have been given without the list."""
    if isinstance(given, (str, PathLike, Adapter, Applied)):
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise UsageError("adapters must be a path or a list of paths", hint="merge(base, [one, two], out)")
    return list(given)


def weights_for(adapters: Sequence[object], weights: Sequence[float]) -> list[float]:
    """Return one weight for each of a list of adapters; UsageError where there are more or fewer."""
    weights = list(weights) or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise UsageError(
            f"{len(adapters)} adapters and {len(weights)} weights", hint="weights=[0.7, 0.4]: one an adapter"
        )
    return weights


def applied_together(
    given: Sequence[StrPath | Adapter | Applied], weights: Sequence[float], common: Applied, reading: Mapping[str, Any]
) -> tuple[list[Weighted], Architecture | None]:
    """Open adapters under one family, if any is known: the first that explains the names of all.

    One that fits several families is read as what the others are.
    """
    if not given:
        raise UsageError("no adapters", hint="loratool combine ONE TWO -o OUT")
    known = plugins_of(reading)
    arch = reading.get("arch", "")
    family = arch if isinstance(arch, Architecture) else known.architecture(arch) if arch else None
    rest = {name: value for name, value in reading.items() if name != "arch"}
    opened = applied(given, weights, common, family, rest)
    adapters = [w.adapter for w in opened]
    if family is not None or not any(a.families for a in adapters):
        return opened, family
    explain = [(*a.families, *a.rivals) for a in adapters]
    agreed = [n for n in adapters[0].families if all(n in a.families for a in adapters)]
    every = [n for n in dict.fromkeys(explain[0]) if all(n in names for names in explain)]
    if agreed:
        return opened, known.architecture(agreed[0])
    if not every:
        told = [f"{a.origin.path}: {', '.join(a.families[:4]) or 'no family that is known'}" for a in adapters]
        raise MismatchError(
            "\n  ".join(["the adapters are for different families", *told]),
            hint="adapters are combined within one family; --arch NAME reads all as that one",
        )
    family = known.architecture(every[0])
    return applied(given, weights, common, family, rest), family


def path_of(given: StrPath | Adapter) -> StrPath:
    """Return where an adapter is, or what it says of itself where it is open already."""
    return given.origin.path if isinstance(given, Adapter) else given


def _opened(given: StrPath | Adapter, architecture: Architecture | None, reading: Mapping[str, Any]) -> Adapter:
    """Open an adapter as one for this family, if one is known, and if it is not open already."""
    if isinstance(given, Adapter):
        again = read_as(given, architecture, plugins_of(reading)) if architecture else given
        return of_residual(again, str(reading.get("base") or ""))
    return open_adapter(given, **reading) if architecture is None else open_adapter(given, arch=architecture, **reading)


def incomplete(adapter: Adapter, base: StrPath, running: Mapping[str, Any]) -> list[Finding]:
    """Warn of what an adapter lacks of what its config names, by the base if that is here: given, or named by it."""
    opened, family = None, architecture_of(adapter, running)
    where = str(base or adapter.base_model)
    if where and (base or checkpoint.exists(where)) and not checkpoint.is_adapter_folder(where):
        try:
            opened = checkpoint.open_base(where)
            known = detected(opened, plugins_of(running))
        except LoratoolError:  # only a name in a config
            opened, known = None, None
        if known is not None and known.architecture.name in (*adapter.families, *adapter.rivals):
            return complete.incomplete(adapter, opened, known.architecture)
    return complete.incomplete(adapter, None, family)


def told_by(base: StrPath, reading: dict[str, Any], running: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the model that adapters are for; it names their family where nothing else does."""
    if not base:
        return {}
    reading["base"] = str(base)
    config = checkpoint.config_of(str(base))
    reading["arch"] = of_config(str(base), config, plugins_of(running), reading.get("arch", "")) or ""
    return config


def hashed(adapter: Adapter) -> tuple[dict[str, str], list[Finding]]:
    """Return the hashes by which image tools know an adapter's file, and which of those in its header are wrong."""
    pieces = [piece for ref in adapter.tensors.values() for piece in ref.pieces]
    paths = sorted({piece.path for piece in pieces if isinstance(piece, Span)})
    if len(paths) != 1 or not paths[0].endswith(".safetensors"):
        raise UsageError("--hashes is for one .safetensors file", where=adapter.origin.path)
    whole, found = digests.of_file(Path(paths[0]), DIGESTS)
    said = {field: adapter.metadata[field] for field in found if field in adapter.metadata}
    wrong = [field for field, text in said.items() if text != found[field]]
    what = "says {!r}, which is not this file: its tensors were changed since, or the tool hashed them before a cast"
    findings = [Finding("warning", field, what.format(said[field][:80])) for field in wrong]
    told = f"wrong: {', '.join(wrong)}" if wrong else "right" if said else "none"
    return {"sha256": whole, **found, "hashes_in_header": told}, findings


def plugins_of(running: Mapping[str, Any]) -> Plugins:
    """Return the plugins that a verb was given, or those of this installation."""
    return running.get("plugins") or installed()


def architecture_of(adapter: Adapter, running: Mapping[str, Any]) -> Architecture | None:
    """Return the family of an adapter; where several agree on every name, the first."""
    return plugins_of(running).architecture(adapter.families[0]) if adapter.families else None


def family_of(base: checkpoint.Checkpoint, arch: str, running: Mapping[str, Any]) -> tuple[Architecture, list[Finding]]:
    """Return the family of a base, and what to say about how it was found."""
    plugins = plugins_of(running)
    if any(f.detect(base) for f in plugins.formats()):
        hint = f"loratool inspect {base.path} describes it; its base comes first here"
        raise InputError("this is an adapter, and a model is needed here", where=base.path, hint=hint)
    family = recognise(base, plugins, arch)
    return family.architecture, [*family.findings, *unread(base)]


def unread(base: checkpoint.Checkpoint) -> list[Finding]:
    """Say which weights beside a base's own were not read."""
    return [Finding("info", base.path, note) for note in base.notes]


def spelling(
    format: Format, out: Path, config: Mapping[str, object] | None, *, private: bool = False
) -> dict[str, Any]:
    """Return the options for writing a format: the file's name where the output is one file, what the base is.

    `private` leaves out the metadata of the training.
    """
    options: dict[str, Any] = {"config": config or {}, "private": private}
    is_file = out.suffix == ".safetensors"
    if out.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"):
        raise UsageError(f"{out.suffix} files are not written", where=out, hint=f"-o {out.with_suffix('.safetensors')}")
    if format.single_file and not is_file:
        name = "hf://org/name/FILE" if str(out).startswith("hf:/") else str(out)
        raise UsageError(f"{format.name} is one file", hint=f"-o {name}.safetensors")
    if is_file:
        options["file"] = out.name
    classes = (config or {}).get("architectures")
    if isinstance(classes, list) and classes:
        options["model_class"] = str(classes[0])
    return options


def globs(given: str | Sequence[str]) -> Sequence[str]:
    """Return patterns, of which one may be a text."""
    return (given,) if isinstance(given, str) else given
