"""Writing the files of image tools: deltas are gathered into the modules that a style names, and spelled there.

A module of the original spelling may hold several canonical weights: their deltas are joined, with one `down` if they
share it, else as blocks. A module is always written whole or named as a loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import frexp
from types import MappingProxyType
from typing import Any, NamedTuple

from loratool import dtypes, native
from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, Full, LowRank, Replace, Taken
from loratool.errors import AmbiguityError, MismatchError
from loratool.factors import below_each_other
from loratool.formats import keys, lycoris, metadata
from loratool.formats.image_reading import XLABS_ONLY, readings
from loratool.formats.peft_config import EMBEDDED, Module, make_config
from loratool.formats.styles import Style
from loratool.hookspecs import Written
from loratool.layouts import Rows
from loratool.native import Original
from loratool.patterns import flatten
from loratool.plan import TensorFile
from loratool.tensors import TensorRef, inline_scalar, joined, zeros

_XLABS = re.compile(r"(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)")


@dataclass
class Gathered:
    """What is known of one module of the file: the deltas of its parts, and those of their biases."""

    component: str
    original: Original
    weights: dict[str, Delta] = field(default_factory=dict)
    biases: dict[str, Delta] = field(default_factory=dict)
    whole: tuple[Delta | None, Delta | None] = (None, None)  # of several parts at once, or spelled as the file had it

    def add(self, target: Target, delta: Delta, *, spelled_so: bool) -> None:
        """Take the delta of a weight or bias, or of several at once; `spelled_so`: as the file had it."""
        paths, is_bias = _weights_of(target), target.parts[0].endswith(".bias")
        if paths == self.original.parts and (len(paths) > 1 or spelled_so):
            weight, bias = self.whole
            self.whole = (weight, delta) if is_bias else (delta, bias)
        else:
            (self.biases if is_bias else self.weights)[paths[0]] = delta


@dataclass
class Spelled:
    """A module as it is written."""

    name: str
    component: str
    weight: Delta | None
    bias: Delta | None
    is_norm: bool = False


class Told(NamedTuple):
    """What the user has to know: what is lost, and the rest."""

    losses: list[str]
    notes: list[str]


def write(adapter: Adapter, architecture: Architecture | None, style: Style, options: Mapping[str, Any]) -> Written:
    """Spell the adapter in one style; the factors' bytes stay as they are where the style can say their strength."""
    if architecture is None:
        raise MismatchError(
            f"{style.name} names need the model family, and no family explains these modules",
            where=adapter.origin.path,
            hint="loratool arch lists the families; choose with --arch, or add one with -p",
        )
    _require_one_spelling(adapter, architecture, style, options.get("families", ()))
    told = Told([f"{t}: the copy of the base weight that PEFT saved along" for t in adapter.base_copies], [])
    losses, notes = told
    modules = list(_modules(adapter, architecture, style, options.get("config") or {}, told))
    if style.alpha == "folded":
        modules = [_folded(m, notes) for m in modules]
    if style.alpha == "metadata":
        modules = [_positive(m) for m in _all_or_none_dora(modules, style, losses)]
    plain = [d for m in modules for d in (m.weight, m.weight.inner if isinstance(m.weight, Dora) else None)]
    alphas = style.alpha == "tensor" and not _left_out(style, architecture, [d for d in plain if d], notes)
    tensors = [ref for m in modules for ref in _tensors(m, style, told, alphas=alphas)]
    if style.name == "kohya" and not any(n.kohya.startswith("lora_unet") for n in architecture.named.values()):
        notes.append(f"no known tool loads a kohya file for {architecture.name}: loratool alone reads it back")
    header = metadata.updated(adapter, architecture, [m.weight for m in modules if m.weight], options, notes)
    if style.alpha == "metadata":
        header |= {"format": "pt", **_configs(modules, adapter, architecture)}
    digests = metadata.digests(adapter.metadata, *(m for _, m in options.get("sources", ()))) if style.flat else ()
    file = TensorFile.new(options["file"], tensors, header, digests)
    return Written((file,), tuple(losses), tuple(dict.fromkeys(notes)))


def name_of(target: Target, architecture: Architecture, style: Style) -> str:
    """Return a style's name of the module in which all that a target covers lies, or nothing where it has none."""
    return _module_of(target, {}, architecture, style)[0]


def _require_one_spelling(
    adapter: Adapter, architecture: Architecture, style: Style, families: Sequence[Architecture]
) -> None:
    """Raise AmbiguityError where other families that explain the adapter too would spell it differently."""
    families = [f for f in families if f.name != architecture.name]
    own = adapter.origin.modules if adapter.origin.format == style.name else {}

    def names(family: Architecture) -> list[str]:
        return [_module_of(t, own, family, style)[0] for t in adapter.targets]

    mine = names(architecture) if families else []
    others = [f.name for f in families if (theirs := names(f)) != mine and any(theirs)]
    if others:
        raise AmbiguityError(
            f"the names fit {' and '.join([architecture.name, *others])}, which {style.name} spells differently",
            where=adapter.origin.path,
            hint=f"choose: --arch {architecture.name}",
        )


def _modules(
    adapter: Adapter,
    architecture: Architecture,
    style: Style,
    config: Mapping[str, Any],
    told: Told,
) -> Iterator[Spelled]:
    for name, gathered in _gathered(adapter, architecture, style, told.losses).items():
        parts = gathered.original.parts
        weight, bias = gathered.whole
        try:
            if gathered.weights:
                weight = _of_the_whole(gathered.weights, gathered.original, config, told.notes)
            if gathered.biases:
                beside = gathered.weights or ({name: weight} if weight else {})
                bias = _of_the_whole(gathered.biases, gathered.original, config, told.notes, beside)
        except MismatchError as problem:
            told.losses.append(f"{name}: {problem.what}" + (f" ({problem.hint})" if problem.hint else ""))
            continue
        if gathered.original.swap and len(parts) == 1:
            weight, bias = (d and _swapped(d) for d in (weight, bias))
        known = architecture.find(parts[0], gathered.component)
        yield Spelled(name, gathered.component, weight, bias, known is not None and known.layer.group == "norm")


def _gathered(adapter: Adapter, architecture: Architecture, style: Style, losses: list[str]) -> dict[str, Gathered]:
    """Return what belongs to each module of the file, by the name that the style gives it."""
    own = adapter.origin.modules if adapter.origin.format == style.name else {}
    found: dict[str, Gathered] = {}
    for target in adapter.targets:
        deltas = adapter.deltas[target]
        name, original = _module_of(target, own, architecture, style)
        if len(deltas) > 1:
            losses.append(f"{target}: {len(deltas)} updates of one weight")
        elif not name:
            losses.append(f"{target}: {style.name} has no name for it")
        else:
            module = found.setdefault(name, Gathered(target.component, original))
            module.add(target, deltas[0], spelled_so=target in own)
    return found


def _weights_of(target: Target) -> tuple[str, ...]:
    """Return the paths of the weights that a target updates, or of those beside the biases that it updates."""
    return tuple(part.removesuffix(".bias") for part in target.parts)


def _module_of(
    target: Target, own: Mapping[Target, str], architecture: Architecture, style: Style
) -> tuple[str, Original]:
    """Return the module of the file in which a target lies, no name where there is none, and what that module holds.

    What was read from a file of the style (its modules are `own`) is called as there.
    """
    paths, prefix = _weights_of(target), style.prefix(architecture, target.component)
    if target in own and style.suffix != "xlabs" and (style.flat or own[target].startswith(prefix or "")):
        known = readings(architecture, own[target])
        return own[target], Original(own[target], paths, (), swap=bool(known) and known[0].swap)
    here = Original(paths[0], paths[:1])
    if style.is_native(architecture, target.component):
        last = style.is_last(architecture, target.component)
        here = architecture.original(target.component, paths[0], last=last)
    in_parts = "[" in "".join(paths) or (len(paths) > 1 and paths != here.parts)
    name = _xlabs_name(here.name, architecture) if style.suffix == "xlabs" else here.name
    if prefix is None or in_parts or not name:
        return "", here
    return prefix + (flatten(name) if style.flat else name), here


def _xlabs_name(name: str, architecture: Architecture) -> str:
    """Return what XLabs calls the adapter of a module, or nothing where it trains none."""
    match = _XLABS.fullmatch(name)
    if match is None or not architecture.find(XLABS_ONLY):
        return ""
    return f"{match[1]}.processor.{match[3]}_lora{'1' if match[2] == 'img' else '2'}"


def _of_the_whole(
    pieces: Mapping[str, Delta],
    original: Original,
    config: Mapping[str, Any],
    notes: list[str],
    beside: Mapping[str, Delta] = MappingProxyType({}),
) -> Delta:
    """Return one delta of a weight that holds several; MismatchError where it would not be the same update.

    `beside` are the deltas of weights, where those of their biases are joined: they show sizes.
    """
    if len(original.parts) == 1:
        return next(iter(pieces.values()))
    present = list(pieces.values())
    heights = _heights(pieces, original, config, beside)
    if len({type(d) for d in present}) == 1 and isinstance(first := present[0], Full):
        if isinstance(first, Replace) and len(present) < len(original.parts):
            raise MismatchError(f"new weights of {', '.join(pieces)} alone do not make one of {original.name}")
        refs = [
            d.value.scaled(d.scaling / first.scaling)
            if isinstance(d := pieces.get(p), Full)
            else zeros("", (n, *first.shape[1:]), first.value.dtype)
            for p, n in zip(original.parts, heights, strict=True)
        ]
        return replace(first, value=joined("", refs))
    if all(isinstance(d, Dora) and not d.of_inputs for d in present) and len(present) == len(original.parts):
        inner = _of_the_whole({p: d.inner for p, d in pieces.items() if isinstance(d, Dora)}, original, config, notes)
        magnitudes = [d.magnitude for p in original.parts if isinstance(d := pieces[p], Dora)]
        assert isinstance(inner, LowRank)
        return Dora(inner, joined("", magnitudes))
    if not all(isinstance(d, LowRank) and d.mid is None for d in present):
        kinds = ", ".join(sorted({d.kind for d in present}))
        raise MismatchError(f"{kinds} updates of {', '.join(pieces)} do not make one of {original.name}")
    plain = _of_one_scaling({p: d for p, d in pieces.items() if isinstance(d, LowRank)}, original.name, notes)
    return below_each_other(plain, dict(zip(original.parts, heights, strict=True)), original.name)


def _of_one_scaling(pieces: Mapping[str, LowRank], name: str, notes: list[str]) -> dict[str, LowRank]:
    """Return deltas of one scaling: the one that the others differ from by powers of two, as far as there is one."""
    scalings = dict.fromkeys(d.scaling for d in pieces.values())
    common = max(scalings, key=lambda s: sum(_is_power_of_two(other / s) for other in scalings))
    rounded = [s for s in scalings if not _is_power_of_two(s / common)]
    if rounded:
        notes.append(
            f"parts of a fused weight have different strengths, such as alpha / rank = {rounded[0]:g} and {common:g} "
            f"in {name}: the ratio is folded into the factors, which rounds them once more"
        )
    return {p: LowRank(d.down, d.up.scaled(d.scaling / common), common) for p, d in pieces.items()}


def _is_power_of_two(number: float) -> bool:
    return abs(frexp(number)[0]) == 0.5


def _heights(
    pieces: Mapping[str, Delta], original: Original, config: Mapping[str, Any], beside: Mapping[str, Delta]
) -> list[int]:
    """Return the rows of every part: of those that are there their own, of the others what the rule says."""
    known = {**beside, **pieces}
    inp = next((d.matrix_shape[1] for d in known.values() if len(d.shape) > 1), 0)  # a bias does not show it
    said = original.heights or ("*",) * len(original.parts)
    equal = {known[p].shape[0] for p, s in zip(original.parts, said, strict=True) if s == "*" and p in known}
    found = []
    for part, height in zip(original.parts, said, strict=True):
        alone = native.height_alone(height, inp, config) if inp else None
        rows = known[part].shape[0] if part in known else alone
        if rows is None and len(equal) == 1:
            rows = next(iter(equal))
        if rows is None:
            raise MismatchError(
                f"{part} is not in the adapter, and nothing says how many rows of {original.name} it has",
                hint="--base MODEL: its config.json has the sizes",
            )
        found.append(rows)
    return found


def _swapped(delta: Delta) -> Delta:
    """Exchange the two halves of the output rows."""
    out = delta.shape[0]
    rows: Rows = (range(out // 2, out), range(out // 2))
    return delta.of if isinstance(delta, Taken) and delta.rows == rows else delta.take(rows)


def _folded(module: Spelled, notes: list[str]) -> Spelled:
    """Return a module whose scaling is in its factors, for readers that know no alpha.

    A power of two near the root of it goes into `down`: half precision holds few small numbers.
    """
    whole = module.weight
    delta = whole.inner if isinstance(whole, Dora) else whole
    if not isinstance(delta, LowRank) or delta.scaling == 1:
        return module
    if _is_power_of_two(delta.scaling):
        notes.append("alpha is folded into the factors, by a power of two: exact but for the smallest numbers")
    else:
        notes.append(
            f"alpha / rank = {delta.scaling:g} is folded into the factors, which rounds them once more to "
            f"{dtypes.torch_name(delta.up.dtype)}"
        )
    root = 2.0 ** int((frexp(delta.scaling)[1] - 1) / 2)
    folded = LowRank(delta.down.scaled(root), delta.up.scaled(delta.scaling / root), 1.0, delta.mid)
    return replace(module, weight=replace(whole, inner=folded) if isinstance(whole, Dora) else folded)


def _tensors(module: Spelled, style: Style, told: Told, *, alphas: bool) -> list[TensorRef]:
    """Return the tensors of one module under the style's names, with its alpha if the file has `alphas`."""
    parts: dict[str, TensorRef] = {}
    alpha: float | None = None
    if module.weight is not None:
        spelled = lycoris.parts_of(module.weight, norm=module.is_norm)
        no_magnitude = style.suffix == "xlabs" and isinstance(module.weight, Dora)
        if spelled is None or no_magnitude or (style.alpha != "tensor" and not _is_plain(module.weight)):
            told.losses.append(f"{module.name}: {style.name} cannot hold {module.weight.kind}")
            return []
        parts, alpha = dict(spelled.tensors), spelled.alpha
        if style.alpha == "metadata" and isinstance(module.weight, Dora):
            parts["lora_magnitude_vector"] = _as_peft_has_it(parts.pop("dora_scale"))
    if module.bias is not None:
        spelled = lycoris.parts_of(_folded_bias(module.bias), bias=True, norm=module.is_norm)
        if spelled is None or style.alpha != "tensor":
            told.losses.append(f"{module.name}: {style.name} cannot hold the update of a bias ({module.bias.kind})")
        else:
            parts |= spelled.tensors
    if alphas and alpha is not None:
        parts["alpha"] = inline_scalar("", alpha)
        if dtypes.decode_scalar("F32", dtypes.encode_scalar(alpha)) != alpha:
            told.notes.append(f"alpha is rounded to float32, as in {module.name}")
    suffix = "down/up" if "lora_mid" in parts else style.suffix
    return [ref.renamed(_key(module.name, part, suffix, style)) for part, ref in parts.items()]


def _folded_bias(delta: Delta) -> Delta:
    return replace(delta, value=delta.value.scaled(delta.scaling), scaling=1.0) if type(delta) is Full else delta


def _positive(module: Spelled) -> Spelled:
    """Return a module with an alpha that a config may hold."""
    delta = module.weight
    if isinstance(delta, Dora) and isinstance(delta.inner, LowRank):
        return replace(module, weight=replace(delta, inner=delta.inner.positive))
    return replace(module, weight=delta.positive) if isinstance(delta, LowRank) else module


def _all_or_none_dora(modules: Sequence[Spelled], style: Style, losses: list[str]) -> list[Spelled]:
    """Return the modules less plain ones beside DoRA: a config has DoRA for all modules of a component or for none."""
    doras = {m.component for m in modules if isinstance(m.weight, Dora)}
    lost = [m for m in modules if m.component in doras and m.weight is not None and not isinstance(m.weight, Dora)]
    losses += [f"{m.name}: {style.name} cannot hold a plain update beside DoRA in other modules" for m in lost]
    return [m for m in modules if m not in lost] if lost else list(modules)


def _as_peft_has_it(magnitude: TensorRef) -> TensorRef:
    """Return a magnitude (out, 1, ...) as (out,), that of a convolution as (1, out, 1, ...)."""
    out, *rest = magnitude.shape
    return replace(magnitude, shape=(out,) if len(rest) < 2 else (1, out, *rest[1:]))


def _is_plain(delta: Delta) -> bool:
    inner = delta.inner if isinstance(delta, Dora) and not delta.of_inputs else delta
    return isinstance(inner, LowRank) and inner.mid is None


def _left_out(style: Style, architecture: Architecture, every: Sequence[Delta], notes: list[str]) -> bool:
    """Whether a kohya file has no alphas at all.

    An absent alpha means alpha = rank to every reader. diffusers (0.42) applies the commonest alpha of a UNet's file to
    all of it, so where alphas would differ only because ranks do, leaving them out is what survives everywhere.
    """
    of_unet = style.name == "kohya" and "unet" in architecture.components
    low = [d for d in every if isinstance(d, LowRank)]
    if not of_unet or len({d.alpha for d in low}) < 2:
        return False
    if all(isinstance(d, (LowRank, Full, Dora)) for d in every) and all(d.scaling == 1 for d in low):
        return True
    notes.append("modules have different alphas, which diffusers ignores: `loratool resize` folds them in")
    return False


def _key(module: str, part: str, suffix: str, style: Style) -> str:
    if part in ("lora_down", "lora_up"):
        ending = keys.FACTORS[suffix][part == "lora_up"]
        return module + ending if ending.startswith((".", "_")) else f"{module}.{ending}"
    return (
        f"{module}.{part}{'.weight' if part in ('lora_mid', 'a1', 'a2', 'b1', 'b2', 'lora_magnitude_vector') else ''}"
    )


def _configs(modules: Sequence[Spelled], adapter: Adapter, architecture: Architecture) -> dict[str, str]:
    """Return diffusers' header field, where the factors alone do not say the strength: a config a component.

    Its paths match whole modules or their ends; without the elements that some versions of transformers have in memory
    and others have not (`text_model.`) they are right for both.
    """
    plain = [(m, m.weight.inner if isinstance(m.weight, Dora) else m.weight) for m in modules]
    told = [(m, d) for m, d in plain if isinstance(d, LowRank)]
    doras = {m.component for m in modules if isinstance(m.weight, Dora)}
    if all(d.scaling == 1 for _, d in told) and not doras:
        return {}
    fields: dict[str, Any] = {}
    for component in dict.fromkeys(m.component for m, _ in told):
        prefix = f"{component or 'transformer'}."
        starts = (prefix, *architecture.prefixes.get(component, ()))
        names = {m.name: reduce(str.removeprefix, starts, m.name) for m, _ in told if m.component == component}
        of_it = [Module(names[m.name], d.rank, d.alpha, d.scaling) for m, d in told if m.name in names]
        config = make_config(adapter, of_it) | ({"use_dora": True} if component in doras else {})
        fields |= {f"{prefix}{name}": value for name, value in config.items() if value is not None}
    return {EMBEDDED: json.dumps(dict(sorted(fields.items())))}
