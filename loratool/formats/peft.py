r"""The PEFT format: `adapter_model.safetensors` with `adapter_config.json`, or one file alone.

Keys: `base_model.model.<module>.lora_A[.<adapter name>].weight`; embeddings `lora_embedding_A` without `.weight`.
Scaling: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; r and alpha per module by the first key of
rank_pattern and alpha_pattern for which `re.match(rf"(.*\.)?({key})$", module)` holds.
Source: peft/utils/save_and_load.py, tuners/lora/layer.py and utils/other.py: get_pattern_key (0.21.2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from loratool.adapter import Adapter, Finding, LowRank, Origin, Target
from loratool.architecture import Architecture, Known
from loratool.errors import MismatchError, UsageError
from loratool.formats import peft_stacks
from loratool.formats.naming import Parts, build, error, lasting, resolve
from loratool.formats.peft_config import EMBEDDED, WAY_OUT, Module, Scaling, make_config, read_config
from loratool.hookspecs import Written
from loratool.layers import Layer
from loratool.plan import JsonFile, TensorFile
from loratool.tensors import TensorRef, TensorSource

_WRAPPER = "base_model.model."
_DIFFUSERS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
_FACTORS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
_BASE_COPY = ".base_layer.weight"  # PEFT saves the untouched embedding beside its adapter
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
# What a tensor is when it is not a factor, by a piece of its name: the first that occurs decides.
_FOREIGN = (
    ("lora_magnitude_vector", "a DoRA magnitude"),
    ("trainable_tokens_delta", "trainable tokens"),
    ("lora_E", "AdaLoRA"),
    ("lora_diag", "KaSA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("vera_", "VeRA"),
    ("oft_R", "OFT"),
    ("boft_", "BOFT"),
    ("ia3_l", "IA3"),
)


class Peft:
    """PEFT's LoRA folders and files."""

    name = "peft"
    summary = "PEFT folder (adapter_config.json + adapter_model.safetensors), or that file alone"
    single_file = False

    def detect(self, source: TensorSource) -> bool:
        """Whether there is an adapter config, or any key in PEFT's spelling."""
        config = source.config or {}
        return "peft_type" in config or any(_FACTOR.fullmatch(name) for name in source.tensors)

    def read(self, source: TensorSource, architectures: tuple[Architecture, ...]) -> Adapter:
        """Read the adapter. Without a config, alpha must be in the file's header or is an error finding."""
        config, prefix, findings = read_config(source)
        modules, copies, odd = _modules({name.removeprefix(prefix): ref for name, ref in source.tensors.items()})
        findings += odd
        raw = {m: _bare(m) for m in modules}
        if len({m.count(_WRAPPER) for m in modules}) > 1:
            findings.append(error("names", f"some start with {_WRAPPER} and some do not"))
        found_parameters = peft_stacks.parameters(
            list(modules), config, findings, lambda m: any(a.find(_bare(m)) for a in architectures)
        )
        stacks = {m: _bare(p) for m, p in found_parameters.items()}
        raw |= stacks
        families, found, rivals = resolve(raw.values(), architectures, _readings, source.path)
        if not families and raw and all(m.startswith(_DIFFUSERS) for m in raw.values()):
            findings.append(error("names", "this is a diffusers LoRA file; that format is not supported yet", WAY_OUT))
        if not families:
            found = {m: Known("", (m,), Layer(m), "") for m in raw.values()}
        known = {m: found[raw[m]] for m in modules}
        scaler = Scaling(config, findings)
        plain = {m: parts for m, parts in modules.items() if m not in stacks}
        by_module = {m: Target(known[m].component, known[m].parts) for m in plain}
        told = {m: peft_stacks.told_as(raw[m], config) for m in plain}
        deltas, broken = build(plain, by_module, ("lora_A", "lora_B"), lambda m, rank: scaler(told[m], rank))
        many = peft_stacks.read(modules, stacks, known, config, scaler, certain=not rivals)
        return Adapter(
            deltas={**deltas, **many.deltas},
            origin=Origin(
                self.name,
                source.path,
                {t: m for m, t in by_module.items()},
                many.stacks,
                frozenset(t for m, t in by_module.items() if modules[m].embedding),
                config,
            ),
            families=families,
            rivals=rivals,
            base_copies={by_module[m]: ref for m, ref in copies.items() if m in by_module},
            tensors=source.tensors,
            metadata=dict(source.metadata),
            base_model=str(config.get("base_model_name_or_path") or ""),
            findings=(*findings, *broken, *many.findings),
        )

    def write(self, adapter: Adapter, architecture: Architecture | None, options: Mapping[str, str]) -> Written:
        """Spell the adapter for PEFT: its own names where it came from PEFT, in-memory names otherwise."""
        components = {t.component for t in adapter.deltas}
        if len(components) > 1:
            raise UsageError(
                f"a PEFT adapter is for one model, and this one updates {', '.join(sorted(components))}",
                where=adapter.origin.path,
                hint=f"convert them one by one, for example --target '{min(components)}:**'",
            )
        plain, stacks = _live(adapter, architecture, options.get("model_class", ""))
        notes = _naming_notes(adapter, architecture, options)
        embeddings = _embeddings(adapter, architecture)
        tensors: list[TensorRef] = []
        told: list[Module] = []
        for target, name, delta in plain:
            a, b = _EMBEDDING_FACTORS if target in embeddings else _FACTORS
            tensors += [delta.down.renamed(f"{name}.{a}"), delta.up.renamed(f"{name}.{b}")]
            path = _told_as(target, name, adapter, architecture)
            told.append(Module(path, delta.rank, delta.alpha, delta.scaling, is_parameter=path.endswith(".weight")))
        for module, parameter, each in stacks:
            whole, rank = peft_stacks.stacked(parameter, each)
            tensors += [whole.down.renamed(f"{module}.{_FACTORS[0]}"), whole.up.renamed(f"{module}.{_FACTORS[1]}")]
            told.append(Module(parameter, rank, whole.scaling * rank, whole.scaling, is_parameter=True))
        if stacks and not adapter.origin.stacks:
            what = (
                "experts are written as the parameters that transformers 5 has in memory: PEFT 0.19 or later reads them"
            )
            notes = (*notes, what)
        modules = {target: name for target, name, _ in plain}
        tensors += [ref.renamed(f"{modules[t]}{_BASE_COPY}") for t, ref in adapter.base_copies.items()]
        config = make_config(adapter, told)
        if architecture is not None:  # PEFT warns where this field is not as the layers are
            config.setdefault("fan_in_fan_out", _all_conv1d(adapter, architecture))
        metadata = {**lasting(adapter.metadata), "format": "pt"}
        name = options.get("file", "")
        if name:
            metadata[EMBEDDED] = json.dumps(dict(sorted(config.items())))  # the order inside patterns has a meaning
            return Written((TensorFile.new(name, tensors, metadata),), notes=notes)
        files = TensorFile.new("adapter_model.safetensors", tensors, metadata), JsonFile("adapter_config.json", config)
        return Written(files, notes=notes)


def _readings(architecture: Architecture, module: str) -> list[Known]:
    """What a module name may be: in every component whose layers include it."""
    found = (architecture.find(module, component) for component in architecture.components)
    # a stack has its name in memory from transformers: that some family's file has it too makes it no nearer
    return [k._replace(distance=0) if k.axis else k for k in found if k is not None]


def _bare(module: str) -> str:
    """The module path without PEFT's wrappers, which occur zero, one or two times."""
    while module.startswith(_WRAPPER):
        module = module[len(_WRAPPER) :]
    return module


def _modules(tensors: Mapping[str, TensorRef]) -> tuple[dict[str, Parts], dict[str, TensorRef], list[Finding]]:
    """Group the tensors by module; what is no factor is a base weight saved along, or a finding."""
    modules: dict[str, Parts] = {}
    copies: dict[str, TensorRef] = {}
    findings: list[Finding] = []
    names: set[str] = set()
    foreign: dict[str, list[str]] = {}
    for key, ref in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match and match["leaf"] == "bias":
            foreign.setdefault("a bias on lora_B", []).append(key)
        elif match and ("embedding" in match["factor"]) != (match["leaf"] == "weight"):
            names.add(match["adapter"] or "")
            parts = modules.setdefault(match["module"], Parts())
            parts.embedding = "embedding" in match["factor"]
            if match["factor"].endswith("_A"):
                parts.down = ref
            else:
                parts.up = ref
        elif key.endswith(_BASE_COPY):
            copies[key[: -len(_BASE_COPY)]] = ref
        else:
            kind = next((what for piece, what in _FOREIGN if piece in key), "a full tensor (modules_to_save or bias)")
            foreign.setdefault(kind, []).append(key)
    for kind, keys in foreign.items():
        findings += [error(key, f"{kind} is not supported yet", WAY_OUT) for key in keys]
    if len(names) > 1:
        findings.append(error("names", f"several adapters in one file: {', '.join(sorted(map(repr, names)))}"))
    if not modules:
        findings.append(error("names", "no lora_A and lora_B tensors are in this file"))
    findings += [error(m + _BASE_COPY, "a base weight without an adapter") for m in copies if m not in modules]
    return modules, copies, findings


Plain = list[tuple[Target, str, LowRank]]  # with the module's name in the file
Stacked = list[tuple[str, str, list[LowRank | None]]]  # the module's name in the file, its parameter, a delta each


def _live(adapter: Adapter, architecture: Architecture | None, model_class: str) -> tuple[Plain, Stacked]:
    """Return what to write, by the names of the live model; what came from PEFT keeps the names it had."""
    from_peft = adapter.origin.format == "peft"
    plain: Plain = []
    stacks: Stacked = []
    done: set[Target] = set()
    for module, stack in adapter.origin.stacks.items() if from_peft else ():
        each = [adapter.deltas[t][0] if t in adapter.deltas else None for t in stack.targets]
        if any(each):
            known = architecture.slot(stack.targets[0].component, stack.targets[0].parts[0]) if architecture else None
            stacks.append((module, stack.parameter, _ordered(each, unmarked=bool(known and known.unmarked))))
            done |= set(stack.targets)
    placed: dict[str, peft_stacks.Placed] = {}
    for target in (t for t in adapter.targets if t not in done):
        (delta,) = adapter.deltas[target]
        if from_peft and target in adapter.origin.modules:
            plain.append((target, adapter.origin.modules[target], delta))
            continue
        path = target.parts[0]
        slot = architecture.slot(target.component, path, model_class) if architecture else None
        if slot and len(target.parts) == 1:
            into = placed.setdefault(slot.parameter, peft_stacks.Placed(target.component, slot.unmarked))
            into.parts[slot.number], into.deltas[path] = slot.parts, delta
        else:
            pieces = _pieces(target, delta, architecture, model_class, adapter.origin.path)
            plain += [(target, _WRAPPER + name, piece) for name, piece in pieces]
    for parameter, module in peft_stacks.nested(placed).items():
        each = placed[parameter].each(parameter)
        stacks.append((_WRAPPER + module, parameter, _ordered(each, unmarked=placed[parameter].unmarked)))
    return plain, stacks


def _ordered(each: list[LowRank | None], *, unmarked: bool) -> list[LowRank | None]:
    """Return deltas in the order in which PEFT takes a stack: (experts, in, out) that nothing marks it swaps."""
    return [d and LowRank(d.up.transposed(), d.down.transposed(), d.scaling) if unmarked else d for d in each]


def _pieces(
    target: Target, delta: LowRank, architecture: Architecture | None, model_class: str, where: str
) -> list[tuple[str, LowRank]]:
    """Return the modules of the live model that a target is: one, or the parts of what only the file has fused."""
    known = architecture.find(target.parts[0], target.component) if architecture and len(target.parts) == 1 else None
    if architecture is None or known is None:
        raise MismatchError(
            "no family explains this name, so its PEFT spelling is unknown",
            where=f"{where}: {target}",
            hint="loratool arch list shows the families; -p FILE adds one",
        )
    path = target.parts[0]
    parts = architecture.parts_of(path, target.component)
    names = [architecture.in_memory(target.component, part, model_class) for part in parts]
    if names and not any("[" in name for name in names):
        layout = architecture.layout(path, target.component, delta.up.shape[0], {})
        cuts = (LowRank(delta.down, delta.up.take(layout[part]), delta.scaling) for part in parts)
        return list(zip(names, cuts, strict=True))
    name = architecture.in_memory(target.component, path, model_class)
    if "[" in name:
        raise MismatchError(
            f"{architecture.name} models have no module of their own for this, so PEFT has no name for it",
            where=f"{where}: {target}",
        )
    return [(name, delta)]


def _told_as(target: Target, name: str, adapter: Adapter, architecture: Architecture | None) -> str:
    """Return the path under which the config speaks of a module.

    PEFT 0.21 takes target modules that end like the experts of a stack for these experts, and loses the module; and it
    knows no router that is a class of its own. Both are given as their parameters, `mlp.gate_proj.weight`.
    """
    bare = _bare(name)
    if adapter.origin.format == "peft" and target in adapter.origin.modules:
        return peft_stacks.told_as(bare, adapter.origin.config)
    known = architecture.find(target.parts[0], target.component) if architecture else None
    is_router = known is not None and known.layer.group == "router"
    leaves = architecture.stacked_leaves if architecture else frozenset()
    return f"{bare}.weight" if is_router or bare.rpartition(".")[2] in leaves else bare


def _naming_notes(adapter: Adapter, architecture: Architecture | None, options: Mapping[str, str]) -> tuple[str, ...]:
    """What PEFT's names depend on and the source does not say: the class of the live model."""
    prefixed = (
        architecture
        and architecture.headless
        and any(t.parts[0].startswith(architecture.prefixes.get(t.component, ("\0",))) for t in adapter.deltas)
    )
    if adapter.origin.format == "peft" or options.get("model_class") or not prefixed or not architecture:
        return ()
    return (f"the names are those of a model with a head; a bare {architecture.headless[0]} has no such prefix",)


def _embeddings(adapter: Adapter, architecture: Architecture | None) -> set[Target]:
    """The targets that PEFT spells with lora_embedding_A: by the family, else as the file had them."""
    if architecture is None:
        return set(adapter.origin.embeddings)
    known = {t: architecture.find(t.parts[0], t.component) for t in adapter.deltas}
    return {t for t, k in known.items() if (k.layer.kind == "embedding" if k else t in adapter.origin.embeddings)}


def _all_conv1d(adapter: Adapter, architecture: Architecture) -> bool:
    """Whether every matrix that the adapter updates is stored as (in, out), embeddings aside."""
    known = [architecture.find(t.parts[0], t.component) for t in adapter.deltas]
    kinds = {k.layer.kind for k in known if k} - {"embedding"}
    return kinds == {"Conv1D"}
