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
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter, Origin, Target
from loratool.architecture import Architecture
from loratool.deltas import LowRank
from loratool.errors import UsageError
from loratool.formats import peft_deltas, peft_stacks, peft_whole
from loratool.formats.metadata import carried
from loratool.formats.naming import error, of_these_sizes, resolve
from loratool.formats.peft_config import EMBEDDED, WAY_OUT, Module, Scaling, class_of, make_config, read_config
from loratool.formats.peft_live import all_conv1d, embeddings, live, naming_notes, told_as
from loratool.formats.peft_names import BASE_COPY, WRAPPER, bare, parse
from loratool.formats.styles import classify
from loratool.hookspecs import Written
from loratool.layers import Layer
from loratool.plan import JsonFile, TensorFile
from loratool.readings import Known
from loratool.tensors import TensorRef, TensorSource

_DIFFUSERS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
_FACTORS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
_LORA = re.compile(r".+\.lora_(?:embedding_)?[AB](?:\.[^.]+){0,2}")  # without a config nothing else is recognised


class Peft:
    """PEFT's folders and files."""

    name = "peft"
    summary = "PEFT folder (adapter_config.json + adapter_model.safetensors), or that file alone"
    single_file = False

    def detect(self, source: TensorSource) -> bool:
        """Whether there is an adapter config, or any key in PEFT's spelling."""
        config = source.config or {}
        if "peft_type" in config:
            return True
        return not classify(source.tensors) and any(_LORA.fullmatch(name) for name in source.tensors)

    def read(self, source: TensorSource, architectures: tuple[Architecture, ...]) -> Adapter:
        """Read the adapter. Without a config, alpha must be in the file's header or is an error finding."""
        config, prefix, findings = read_config(source)
        kind = str(config.get("peft_type", "LORA"))
        named = parse({name.removeprefix(prefix): ref for name, ref in source.tensors.items()}, kind)
        modules = named.modules
        findings += named.findings
        if len({m.count(WRAPPER) for m in modules}) > 1:
            findings.append(error("names", f"some start with {WRAPPER} and some do not"))
        found_parameters = peft_stacks.parameters(
            [m for m in modules if modules[m].down],
            config,
            findings,
            lambda m: any(a.find(bare(m)) for a in architectures),
        )
        stacks = {m: bare(p) for m, p in found_parameters.items()}
        raw = {**peft_deltas.paths(modules), **stacks}
        trained = class_of(config)  # tells two text encoders apart
        architectures = tuple(a if a.at_hand else a.holding(trained) for a in architectures)
        sizes = {raw[m]: parts.size for m, parts in modules.items() if parts.size}
        architectures = tuple(of_these_sizes(architectures, sizes, _readings))
        families, found, rivals = resolve(raw.values(), architectures, _readings, source.path)
        if not families and raw and not source.config and all(m.startswith(_DIFFUSERS) for m in modules):
            findings.append(error("names", "this is a diffusers LoRA file; that format is not supported yet", WAY_OUT))
        if not families:
            found = {m: Known("", (m,), Layer(m), "") for m in raw.values()}
        known = {m: found[raw[m]] for m in modules}
        family = next((a for a in architectures if a.name in families[:1]), None)
        scaler = Scaling(config, findings)
        plain = {m: parts for m, parts in modules.items() if m not in stacks}
        by_module = {m: Target(known[m].component, known[m].parts) for m in plain}
        told = {m: peft_stacks.told_as(raw[m], config) for m in plain}
        deltas, broken = peft_deltas.build(plain, by_module, told, config, scaler=scaler, shared=named.shared)
        whole, strange = peft_deltas.trained_whole(named.whole, config, family)
        many = peft_stacks.read(modules, stacks, known, config, scaler, certain=not rivals)
        return Adapter(
            deltas={**peft_deltas.together(deltas, whole), **many.deltas},
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
            base_copies={by_module[m]: ref for m, ref in named.copies.items() if m in by_module},
            tensors=source.tensors,
            consumed=tuple(prefix + name for name in named.ignored),
            metadata=dict(source.metadata),
            base_model=str(config.get("base_model_name_or_path") or ""),
            findings=(*findings, *broken, *strange, *many.findings),
            replication=peft_deltas.replication(config),
            changed_base=peft_deltas.changed_base(config),
            shares_ties=bool(config.get("ensure_weight_tying")),
            head_class=peft_deltas.head_class(config),
        )

    def write(self, adapter: Adapter, architecture: Architecture | None, options: Mapping[str, Any]) -> Written:
        """Spell the adapter for PEFT: its own names where it came from PEFT, in-memory names otherwise."""
        components = {t.component for t in adapter.deltas}
        if len(components) > 1:
            raise UsageError(
                f"a PEFT adapter is for one model, and this one updates {', '.join(sorted(components))}",
                where=adapter.origin.path,
                hint=f"convert them one by one, for example --target '{min(components)}:**'",
            )
        positive = {
            t: tuple(d.positive if isinstance(d, LowRank) else d for d in ds) for t, ds in adapter.deltas.items()
        }
        adapter, beside = peft_whole.apart(replace(adapter, deltas=positive))
        plain, stacks = live(adapter, architecture, options.get("model_class", ""), options.get("config") or {})
        notes = naming_notes(adapter, architecture, options)
        spelled_so = embeddings(adapter, architecture)
        tensors: list[TensorRef] = []
        told: list[Module] = []
        for target, name, delta in plain:
            a, b = _EMBEDDING_FACTORS if target in spelled_so else _FACTORS
            tensors += [delta.down.renamed(f"{name}.{a}"), delta.up.renamed(f"{name}.{b}")]
            path = told_as(target, name, adapter, architecture)
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
        tensors += [ref.renamed(f"{modules[t]}{BASE_COPY}") for t, ref in adapter.base_copies.items()]
        config = make_config(adapter, told)
        more, fields = peft_whole.written(adapter, beside, modules, architecture, options.get("model_class", ""))
        tensors += more
        config |= {name: value for name, value in fields.items() if value or config.get(name)}
        if architecture is not None:  # PEFT warns where this field is not as the layers are
            config.setdefault("fan_in_fan_out", all_conv1d(adapter, architecture))
        metadata = {**carried(adapter), "format": "pt"}
        name = options.get("file", "")
        if name:
            metadata[EMBEDDED] = json.dumps(dict(sorted(config.items())))  # the order inside patterns has a meaning
            return Written((TensorFile.new(name, tensors, metadata),), notes=notes)
        files = TensorFile.new("adapter_model.safetensors", tensors, metadata), JsonFile("adapter_config.json", config)
        return Written(files, notes=notes)


def _readings(architecture: Architecture, module: str) -> list[Known]:
    """What a module name may be: in every component whose layers include it."""
    # a stack has its name in memory from transformers: that some family's file has it too makes it no nearer
    return [k._replace(distance=0) if k.axis else k for k in architecture.readings(module)]
