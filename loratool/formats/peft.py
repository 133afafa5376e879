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

from loratool.adapter import Adapter, Finding, LowRank, Origin, Stack, Target
from loratool.architecture import Architecture, Known
from loratool.errors import MismatchError, UsageError
from loratool.formats import peft_stacks
from loratool.formats.naming import Parts, build, error, lasting, resolve
from loratool.formats.peft_config import EMBEDDED, WAY_OUT, Module, Scaling, make_config, read_config
from loratool.hookspecs import Written
from loratool.layers import Experts, Layer
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
        stacks = {m: _bare(p) for m, p in peft_stacks.parameters(list(modules), config, findings).items()}
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
        deltas, broken = build(plain, by_module, ("lora_A", "lora_B"), lambda m, rank: scaler(raw[m], rank))
        many = peft_stacks.read(modules, stacks, known, config, scaler)
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
        model_class = options.get("model_class", "")
        stacks = _stacks(adapter, architecture, model_class)
        stacked = {t for stack in stacks.values() for t in stack.targets}
        modules = _module_names(adapter, architecture, model_class, stacked)
        notes = _naming_notes(adapter, architecture, options)
        embeddings = _embeddings(adapter, architecture)
        tensors: list[TensorRef] = []
        told: list[Module] = []
        for target in (t for t in adapter.deltas if t not in stacked):
            for delta in adapter.deltas[target]:
                a, b = _EMBEDDING_FACTORS if target in embeddings else _FACTORS
                tensors += [delta.down.renamed(f"{modules[target]}.{a}"), delta.up.renamed(f"{modules[target]}.{b}")]
                told.append(Module(_bare(modules[target]), delta.rank, delta.alpha, delta.scaling))
        for module, stack in stacks.items():
            each = [adapter.deltas.get(t, (None,))[0] for t in stack.targets]
            if _is_swapped(stack, architecture):
                each = [d and LowRank(d.up.transposed(), d.down.transposed(), d.scaling) for d in each]
            whole, rank = peft_stacks.stacked(stack.parameter, each)
            tensors += [whole.down.renamed(f"{module}.{_FACTORS[0]}"), whole.up.renamed(f"{module}.{_FACTORS[1]}")]
            told.append(Module(stack.parameter, rank, whole.scaling * rank, whole.scaling, is_parameter=True))
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


def _is_swapped(stack: Stack, architecture: Architecture | None) -> bool:
    """Whether PEFT takes a stack of (experts, in, out) for (experts, out, in)."""
    known = architecture.find(stack.targets[0].parts[0], stack.targets[0].component) if architecture else None
    return known is not None and isinstance(known.layer, Experts) and known.layer.unmarked


def _readings(architecture: Architecture, module: str) -> list[Known]:
    """What a module name may be: in every component whose layers include it."""
    found = (architecture.find(module, component) for component in architecture.components)
    return [k for k in found if k is not None]


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
            parts = modules.setdefault(match["module"], Parts())
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


def _stacks(adapter: Adapter, architecture: Architecture | None, model_class: str) -> dict[str, Stack]:
    """The stacked modules to write: those of the file, and those of a family's 3-D parameters."""
    kept = {
        m: s
        for m, s in (adapter.origin.stacks if adapter.origin.format == "peft" else {}).items()
        if any(t in adapter.deltas for t in s.targets)
    }
    done = {t for s in kept.values() for t in s.targets}
    if adapter.origin.format == "peft":
        done |= adapter.origin.modules.keys()
    loose = []
    for target in (t for t in adapter.deltas if t not in done and "[" in t.parts[0] and architecture):
        assert architecture is not None
        known = architecture.find(target.parts[0], target.component)
        if known and isinstance(known.layer, Experts) and target.parts[0].count("[") == 1:
            loose.append(target)
    if not loose or architecture is None:
        return kept
    weights = {t.parts[0].partition("[")[0]: t.component for t in loose}
    in_memory = {w: architecture.in_memory(component, w, model_class) for w, component in weights.items()}
    made = peft_stacks.stack_of(loose, in_memory)
    return kept | {_WRAPPER + module: stack for module, stack in made.items()}


def _module_names(
    adapter: Adapter, architecture: Architecture | None, model_class: str, stacked: set[Target]
) -> dict[Target, str]:
    """The name of each module in a PEFT file, wrapper included."""
    names = {}
    for target in adapter.targets:
        if target in stacked:
            continue
        if adapter.origin.format == "peft" and target in adapter.origin.modules:
            names[target] = adapter.origin.modules[target]
        elif (
            architecture is not None
            and len(target.parts) == 1
            and architecture.find(target.parts[0], target.component)
            and "[" not in (name := architecture.in_memory(target.component, target.parts[0], model_class))
        ):
            names[target] = _WRAPPER + name
        else:
            raise MismatchError(
                "no family says how PEFT spells this"
                if architecture is None
                else f"{architecture.name} models have no module of their own for this, so PEFT has no name for it",
                where=f"{adapter.origin.path}: {target}",
                hint="loratool arch list shows the families; -p FILE adds one",
            )
    return names


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
