"""Reading the files of image tools: keys are grouped into modules, and a family says what the modules are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any

from loratool import native, strictjson
from loratool.adapter import Adapter, Finding, Origin, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta
from loratool.errors import FormatError, LoratoolError, MismatchError
from loratool.formats import keys, lycoris
from loratool.formats.naming import error, of_these_sizes, resolve
from loratool.formats.peft_config import EMBEDDED, Scaling
from loratool.layers import Excluded
from loratool.native import DENOISER
from loratool.patterns import outline
from loratool.readings import Known
from loratool.tensors import TensorRef, TensorSource

XLABS_ONLY = "single_blocks.0.qkv_lora"  # a name that only the family knows which XLabs trained
_FLAT = ("lora_", "oft_unet_", "lycoris_")  # how flat names begin, and no module of a model
Sizes = Mapping[str, tuple[int, int]]  # module -> (out, in) of the weight it updates, where the factors show them


@dataclass
class File:
    """The tensors of a file by module and part; alphas by module; names that belong to no part."""

    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    consumed: list[str] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    alpha: float | None = None  # the user's word where the file has none

    @property
    def sizes(self) -> Sizes:
        """The sizes of weights under plain factors."""
        pairs = {m: (p.get("lora_up"), p.get("lora_down")) for m, p in self.modules.items()}
        return {
            m: (up.shape[0], down.shape[1])
            for m, (up, down) in pairs.items()
            if up is not None and down is not None and len(up.shape) > 1 and len(down.shape) > 1
        }


def read(source: TensorSource, architectures: Sequence[Architecture], format: str) -> Adapter:
    """Read the adapter in a file of any image tool."""
    file = _grouped(source)
    known_by = _Remembered()
    candidates = _narrowed(file, architectures, source, format, known_by)
    found = resolve(file.modules, candidates, known_by, source.path)
    families, known = found.families, dict(found.known)
    if not families and file.modules:
        families, known = _best(file.modules, candidates)
        only = families or tuple(a.name for a in architectures if len(architectures) == 1)
        what = f"the {only[0]} family has no such module" if only else "no family has such a module"
        hint = "loratool arch lists the families, --arch chooses, -p FILE adds one"
        strange = [m for m in file.modules if m not in known]
        file.findings += [error(m, what, hint) for m in strange]
        file.unmapped += strange
    scalings = _configured(source, file.findings)
    deltas, modules = _deltas(file, known, scalings, rs_lora=_was_trained_with("rs_lora", source.metadata))
    file.findings += _of_split_qkv(source, deltas)
    of_tools = any(a.named for a in candidates if a.name in families) or not any(".lora_A" in n for n in source.tensors)
    if not (of_tools or scalings or file.alphas or file.alpha):
        what = "no alpha is in this file: it is taken as the rank, as image tools do, so that the strength is 1"
        file.findings.append(Finding("warning", source.path, what, "--alpha (scaling * rank) where the layers differ"))
    return Adapter(
        deltas=deltas,
        origin=Origin(format, source.path, modules),
        families=families,
        rivals=found.rivals,
        tensors=source.tensors,
        consumed=tuple(file.consumed),
        unmapped=tuple(file.unmapped),
        metadata=dict(source.metadata),
        base_model=source.metadata.get("ss_sd_model_name", ""),
        findings=tuple(file.findings),
    )


def readings(architecture: Architecture, module: str) -> list[Known]:
    """Return what a module's name can be in a family: flat, or dotted with or without the component in front."""
    if "." not in module and ((flat := architecture.unflatten(module)) or module.startswith(_FLAT)):
        return flat
    for component in architecture.components:
        if component and module.startswith(f"{component}."):
            known = architecture.find(module[len(component) + 1 :], component)
            return [known] if known else []
    found = architecture.readings(module)
    denoiser = [k for k in found if (named := architecture.named.get(k.component)) and named.comfy == DENOISER]
    return denoiser or found  # which is what names with no component in front are of in these files


class _Remembered:
    """`readings`, asked once for each name."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[Known]] = {}

    def __call__(self, architecture: Architecture, module: str) -> list[Known]:
        key = architecture.name, module
        if key not in self._found:
            self._found[key] = readings(architecture, module)
        return self._found[key]


def _grouped(source: TensorSource) -> File:
    file = File(alpha=source.alpha)
    alphas: dict[str, str] = {}  # module -> the first name of its alpha
    for name, ref in source.tensors.items():
        key = keys.split(name)
        if key is None:
            file.unmapped.append(name)
            file.findings.append(error(name, "a tensor of an unknown kind", "convert --drop-unmapped leaves it out"))
        elif key.part == "alpha" and prod(ref.shape) != 1:
            file.findings.append(error(name, f"alpha has the shape {list(ref.shape)}: it must be one number"))
        elif key.part == "alpha":
            file.consumed.append(name)
            alpha, other = _alpha(source, name, file.findings), alphas.setdefault(key.module, name)
            if file.alphas.setdefault(key.module, alpha) != alpha:
                what = f"{other} is {file.alphas[key.module]:g} and this {alpha:g}: both are the alpha of one module"
                file.findings.append(error(name, what, "delete the one that is wrong"))
        elif key.part in file.modules.setdefault(key.module, {}):
            other = file.modules[key.module][key.part].name
            file.findings.append(error(name, f"{other} is the same part of this module"))
        else:
            file.modules[key.module][key.part] = ref
    stray = [m for m in file.alphas if m not in file.modules]
    file.findings += [error(m, "an alpha without factors") for m in stray]
    if not file.modules:
        file.findings.append(error("names", "no lora_down and lora_up tensors are in this file"))
    return file


def _alpha(source: TensorSource, name: str, findings: list[Finding]) -> float:
    try:
        alpha = source.small(name)
    except ValueError as problem:
        findings.append(error(name, str(problem)))
        return 0.0
    if not isfinite(alpha):
        findings.append(error(name, f"alpha is {alpha}: it must be a number"))
        return 0.0  # reports are JSON, which has no NaN
    return alpha


def _narrowed(
    file: File, architectures: Sequence[Architecture], source: TensorSource, format: str, known_by: _Remembered
) -> list[Architecture]:
    """Return the families that may be meant: those that nothing but their names speaks for, too, if there is no more.

    Sizes of weights and numbers of blocks speak against families, the trainer's metadata and exact numbers for them.
    """
    some: dict[str, list[str]] = {}
    for module in file.modules:
        some.setdefault(outline(module), []).append(module)
    samples = [m for alike in some.values() for m in {alike[0], alike[-1]}]
    found = [a for a in architectures if all(known_by(a, m) for m in samples)] or list(architectures)
    found = of_these_sizes(found, file.sizes, known_by)
    if format == "xlabs":  # trained for one model only
        found = [a for a in found if a.find(XLABS_ONLY)]
    told = [source.metadata.get(name, "") for name in ("ss_base_model_version", "modelspec.architecture")]
    named = [a for a in found if any(text.startswith(a.match.metadata) for text in told if a.match.metadata)]
    found = named or found
    paths = {a.name: {p for m in file.modules for k in known_by(a, m)[:1] for p in k.parts} for a in found}
    blocks = {a.name: {e: _count(e, paths[a.name]) for e, _ in a.match.counts} for a in found}
    found = [a for a in found if all(blocks[a.name][e] <= n for e, n in a.match.counts)] or found
    exact = [
        a for a in found if any(blocks[a.name].values()) and all(blocks[a.name][e] in (0, n) for e, n in a.match.counts)
    ]
    return exact or found


def _count(element: str, paths: Iterable[str]) -> int:
    """Return one more than the largest index that stands behind an element of these paths."""
    start = f"{element}."
    numbers = (path[len(start) :].partition(".")[0] for path in paths if path.startswith(start))
    return max((int(n) + 1 for n in numbers if n.isdecimal()), default=0)


def _best(
    modules: Mapping[str, object], architectures: Sequence[Architecture]
) -> tuple[tuple[str, ...], dict[str, Known]]:
    """Return the family that explains most modules, and what it explains."""
    best: tuple[tuple[str, ...], dict[str, Known]] = ((), {})
    for architecture in architectures:
        known = {m: found[0] for m in modules if (found := readings(architecture, m))}
        if len(known) > len(best[1]):
            best = (architecture.name,), known
    return best


def _configured(source: TensorSource, findings: list[Finding]) -> dict[str, Scaling]:
    """Return what the header's config says of scalings, by component: diffusers puts `unet.` before every field."""
    try:
        config = strictjson.parse(source.metadata[EMBEDDED], EMBEDDED) if EMBEDDED in source.metadata else {}
    except FormatError as problem:
        findings.append(error(EMBEDDED, f"the config in the file's header is {problem.what}"))
        return {}
    components: dict[str, dict[str, Any]] = {}
    for name, value in config.items():
        component, _, own = name.rpartition(".")
        components.setdefault(component, {})[own] = value
    strange = next(
        (n for n in source.tensors if components and not n.startswith(tuple(f"{c}." for c in components))), ""
    )
    if strange and "" not in components:
        told = ", ".join(f"{c}.*" for c in components)
        findings.append(error(EMBEDDED, f"the config in the file's header is for {told}, not for {strange!r}"))
    return {component: Scaling(fields, findings) for component, fields in components.items()}


def _configured_alpha(module: str, rank: int, scalings: Mapping[str, Scaling]) -> float | None:
    component, _, path = module.partition(".")
    if component not in scalings:
        component, path = "", module
    return scalings[component](path, rank) * rank if component in scalings else None


def _was_trained_with(argument: str, metadata: Mapping[str, str]) -> bool:
    """Whether an argument of the network was true in training: sd-scripts keeps them in the header.

    rs_lora: LyCORIS trained with alpha / sqrt(rank). split_qkv: see _of_split_qkv.
    """
    try:
        arguments = strictjson.parse(metadata.get("ss_network_args") or "{}", "ss_network_args")
    except FormatError:
        return False
    return str(arguments.get(argument, "")).lower() == "true"


def _of_split_qkv(source: TensorSource, deltas: Mapping[Target, object]) -> list[Finding]:
    """Say what strength a file has that was trained on q, k and v apart and saved as one module of n times the rank.

    sd-scripts (networks/lora_flux.py, LoRANetwork.state_dict) leaves alpha as it was for the rank of one.
    """
    fused = sum(len(t.parts) > 1 for t in deltas)
    if not fused or not _was_trained_with("split_qkv", source.metadata):
        return []
    what = (
        f"trained with split_qkv: its trainer applied alpha / r to the parts of {fused} fused weights, and all readers "
        "of the file, sd-scripts included, apply alpha / (n r) to the n parts: that is the strength here"
    )
    return [
        Finding("warning", "ss_network_args", what, "as strong as in training: n times the weight on these modules")
    ]


def _deltas(
    file: File, known: Mapping[str, Known], scalings: Mapping[str, Scaling], *, rs_lora: bool
) -> tuple[dict[Target, tuple[Delta, ...]], dict[Target, str]]:
    deltas: dict[Target, tuple[Delta, ...]] = {}
    modules: dict[Target, str] = {}
    sizes = file.sizes
    sizes_alike = {outline(m): size for m, size in sizes.items()}  # of the same layer in other blocks
    for module, parts in file.modules.items():
        what = known.get(module)
        alpha = file.alphas.get(module)
        down = parts.get("lora_down")
        if alpha is None and down is not None:
            alpha = _configured_alpha(module, down.shape[0], scalings) or file.alpha
        try:
            read = lycoris.read(parts, alpha, sd_scripts=module.startswith("oft_unet"), rs_lora=rs_lora)
            file.consumed += [parts[part].name for part in read.consumed]
            size = sizes.get(module) or (None if read.weight else sizes_alike.get(outline(module)))
            placed = _placed(what, read, size) if what else {}
        except ValueError as problem:
            file.findings.append(error(module, str(problem), _HINT))
            continue
        except LoratoolError as problem:
            file.findings.append(error(module, problem.what, problem.hint))
            continue
        for target, found in placed.items():
            if target in deltas:
                file.findings.append(error(module, f"two modules of the file update {target}"))
            deltas[target] = found
            modules[target] = module
    return deltas, modules


_HINT = "the module cannot be used as it is; was the file cut short or edited?"


def _placed(known: Known, read: lycoris.Module, size: tuple[int, int] | None) -> dict[Target, tuple[Delta, ...]]:
    """Return the targets of a module's deltas, their rows in the order of the canonical weights."""
    weights = tuple(d for d in (read.weight, read.remainder) if d is not None)
    whole = weights[0] if weights else read.bias
    assert whole is not None
    out = whole.shape[0]
    if weights:
        inp = size[1] if size else prod(whole.shape[1:])
    else:  # a bias alone does not show it
        inp = native.input_of(known.heights, out) or (size[1] if size else 0)
    if isinstance(known.layer, Excluded) and not whole.as_stored:
        raise MismatchError(f"{known.path} ({known.layer.group}) carries no factors", where=known.path)
    found: dict[Target, tuple[Delta, ...]] = {}
    heights = native.heights(known.heights, out, inp, known.parts, {}) if known.heights else ()
    if weights:
        target = Target(known.component, known.parts, heights)
        found[target] = tuple(d.take(known.rows(out, inp, {})[0]) if known.swap else d for d in weights)
    if read.bias is not None:
        for part, own in zip(known.parts, known.rows(out, inp, {}), strict=True):
            found[Target(known.component, (f"{part}.bias",))] = (read.bias.take(own),)
    return found
