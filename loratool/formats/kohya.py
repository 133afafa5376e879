"""The kohya format (sd-scripts and everything that reads it): one file, flat module names, an alpha tensor a module.

`<prefix>_<module path with . as _>.lora_down.weight | .lora_up.weight | .alpha`; an absent alpha means alpha = rank.
Flat names are resolved through the family's list of layers, never by guessing at underscores.
Source: sd-scripts, networks/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Origin, Target
from loratool.architecture import Architecture
from loratool.deltas import LowRank
from loratool.errors import MismatchError
from loratool.formats.naming import Parts, build, error, lasting, resolve
from loratool.hookspecs import Written
from loratool.patterns import flatten
from loratool.plan import TensorFile
from loratool.tensors import TensorRef, TensorSource, inline_scalar

_KEY = re.compile(r"(?P<module>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|.+)")
_FOREIGN = (
    ("dora_scale", "a DoRA scale"),
    ("lora_mid", "a Tucker core"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("diff", "a full difference"),
)


class Kohya:
    """sd-scripts' .safetensors files."""

    name = "kohya"
    summary = "kohya sd-scripts file (lora_unet_... lora_down / lora_up / alpha)"
    single_file = True

    def detect(self, source: TensorSource) -> bool:
        """Whether any key is a flat module name with a kohya part."""
        return any(
            re.fullmatch(r"[^.]+\.(lora_down\.weight|lora_up\.weight|hada_.+|lokr_.+|dora_scale)", n)
            for n in source.tensors
        )

    def read(self, source: TensorSource, architectures: tuple[Architecture, ...]) -> Adapter:
        """Read the adapter; names that no family explains become error findings."""
        modules, alphas, findings = _modules(source)
        read = resolve(modules, architectures, lambda a, m: a.unflatten(m), source.path)
        families, targets = read.families, {m: Target(k.component, k.parts) for m, k in read.known.items()}
        if not families and modules:
            families, targets, unknown = _best(modules, architectures)
            findings += unknown
        deltas, broken = build(
            modules, targets, ("lora_down", "lora_up"), lambda m, rank: (alphas.get(m) or source.alpha or rank) / rank
        )
        return Adapter(
            deltas=deltas,
            origin=Origin(self.name, source.path, {t: m for m, t in targets.items()}),
            families=families,
            rivals=read.rivals,
            tensors=source.tensors,
            consumed=tuple(n for n in source.tensors if n.endswith(".alpha")),
            metadata=dict(source.metadata),
            base_model=source.metadata.get("ss_sd_model_name", ""),
            findings=(*findings, *broken),
        )

    def write(self, adapter: Adapter, architecture: Architecture | None, options: Mapping[str, Any]) -> Written:
        """Spell the adapter for sd-scripts: flat names, one alpha a module, the factors' bytes untouched."""
        if architecture is None:
            raise MismatchError(
                "kohya names need the model family, and no family explains these modules",
                where=adapter.origin.path,
                hint="loratool arch lists the families; choose with --arch, or add one with -p",
            )
        plain = adapter.low_rank(self.name)
        nameless = [t for t in plain if "[" in t.path]
        every = [(t, delta) for t, deltas in plain.items() if t not in nameless for delta in deltas]
        # An absent alpha means alpha = rank to every reader. diffusers (0.42) applies the commonest alpha of a file to
        # all of it, so where alphas would differ only because ranks do, leaving them out is what survives everywhere.
        differ = len({delta.alpha for _, delta in every}) > 1
        left_out = differ and all(delta.scaling == 1 for _, delta in every)
        tensors: list[TensorRef] = []
        for target, delta in every:
            module = f"{architecture.kohya_prefix(target.component)}_{flatten(target.parts[0])}"
            tensors += [delta.down.renamed(f"{module}.lora_down.weight"), delta.up.renamed(f"{module}.lora_up.weight")]
            if not left_out:
                tensors.append(inline_scalar(f"{module}.alpha", delta.alpha))
        losses = [f"{t}: the copy of the base weight that PEFT saved along" for t in adapter.base_copies]
        losses += [f"{t}: kohya has no name for a part of a weight" for t in nameless]
        notes = []
        rounded = [t for t, d in every if dtypes.decode_scalar("F32", dtypes.encode_scalar(d.alpha)) != d.alpha]
        if rounded:
            notes.append(f"alpha is rounded to float32 in {len(rounded)} modules, such as {rounded[0]}")
        if differ and not left_out:
            notes.append("modules have different alphas, which diffusers ignores: `loratool resize` folds them in")
        if not any(prefix.startswith("lora_unet") for prefix in architecture.kohya_prefixes.values()):
            notes.append(f"no known tool loads a kohya file for {architecture.name}: loratool alone reads it back")
        metadata = _metadata(adapter, [delta for _, delta in every])
        return Written((TensorFile.new(options["file"], tensors, metadata),), tuple(losses), tuple(notes))


def _modules(source: TensorSource) -> tuple[dict[str, Parts], dict[str, float], list[Finding]]:
    modules: dict[str, Parts] = {}
    alphas: dict[str, float] = {}
    findings: list[Finding] = []
    for name, ref in source.tensors.items():
        match = _KEY.fullmatch(name)
        part = match["part"] if match else ""
        module = match["module"] if match else name
        if part == "lora_down.weight":
            modules.setdefault(module, Parts()).down = ref
        elif part == "lora_up.weight":
            modules.setdefault(module, Parts()).up = ref
        elif part == "alpha" and all(n == 1 for n in ref.shape):
            try:
                alphas[module] = source.small(name)
            except ValueError as problem:
                alphas[module] = 0.0
                findings.append(error(name, str(problem)))
            if not 0 <= alphas[module] < float("inf"):
                findings.append(error(name, f"alpha is {alphas[module]}: it must be a positive number"))
                alphas[module] = 0.0  # reports are JSON, which has no NaN
        else:
            kind = next((what for piece, what in _FOREIGN if part.startswith(piece)), "a tensor of an unknown kind")
            hint = "it is refused so that it cannot be lost"
            findings.append(error(name, f"{kind} is not supported yet", hint))
    stray = [m for m in alphas if m not in modules]
    findings += [error(m, "an alpha without factors") for m in stray]
    if not modules:
        findings.append(error("names", "no lora_down and lora_up tensors are in this file"))
    return modules, alphas, findings


def _best(
    modules: Mapping[str, Parts], architectures: tuple[Architecture, ...]
) -> tuple[tuple[str, ...], dict[str, Target], list[Finding]]:
    """Return the family that explains most names, what it explains, and an error for each of the others."""
    best: tuple[Architecture | None, dict[str, Target]] = (None, {})
    for architecture in architectures:
        known = {m: architecture.unflatten(m) for m in modules}
        targets = {m: Target(k[0].component, k[0].parts) for m, k in known.items() if k}
        if len(targets) > len(best[1]):
            best = architecture, targets
    family = (best[0].name,) if best[0] else ()
    only = family or tuple(a.name for a in architectures if len(architectures) == 1)
    what = f"the {only[0]} family has no such module" if only else "no family has such a module"
    hint = "loratool arch lists the families; -p FILE adds one"
    return family, best[1], [error(m, what, hint) for m in modules if m not in best[1]]


def _metadata(adapter: Adapter, deltas: Sequence[LowRank]) -> dict[str, str]:
    """Training metadata as it came, with dim and alpha brought up to date."""
    metadata = lasting(adapter.metadata)
    for field, values in (
        ("ss_network_dim", {str(d.rank) for d in deltas}),
        ("ss_network_alpha", {f"{d.alpha:g}" for d in deltas}),
    ):
        metadata[field] = values.pop() if len(values) == 1 else "Dynamic"
    metadata.setdefault("ss_network_module", "networks.lora")
    if adapter.base_model:
        metadata.setdefault("ss_sd_model_name", adapter.base_model)
    return metadata
