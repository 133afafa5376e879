r"""The PEFT format: `adapter_model.safetensors` with `adapter_config.json`, or one file alone.

Keys: `base_model.model.<module>.lora_A[.<adapter name>].weight`; embeddings `lora_embedding_A` without `.weight`.
Scaling: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; r and alpha per module by the first key of
rank_pattern and alpha_pattern for which `re.match(rf"(.*\.)?({key})$", module)` holds.
Source: peft/utils/save_and_load.py, tuners/lora/layer.py and utils/other.py: get_pattern_key (0.21.2).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from time import monotonic
from typing import Any

from loratool import strictjson
from loratool.adapter import Adapter, Finding, Origin, Target
from loratool.architecture import Architecture, Known
from loratool.errors import FormatError, UsageError
from loratool.formats.naming import Parts, build, error, resolve
from loratool.hookspecs import Written
from loratool.plan import JsonFile, TensorFile
from loratool.tensors import TensorRef, TensorSource

_WRAPPER = "base_model.model."
_BASE_COPY = ".base_layer.weight"  # PEFT saves the untouched embedding beside its adapter
#: The header key for a single file's config, as diffusers spells it: a model's save_lora_adapter writes bare fields, a
#: pipeline's save_lora_weights puts the component before every field and tensor (`unet.r`). Loading a pipeline, or a
#: model with a prefix, diffusers reads only what has that prefix; load_lora_adapter(prefix=None) reads bare fields.
_EMBEDDED = "lora_adapter_metadata"
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
# Config fields that change the mathematics when they are set; refused by name until they are carried.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "modules_to_save",
    "lora_bias",
    "megatron_config",
)
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config", "merge_weights",
    "tuner_type",
}  # fmt: skip
_REPEAT = re.compile(r"\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\}")
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_WAY_OUT = "this part of the PEFT format is not carried yet; it is refused so that it cannot be lost"


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
        config, prefix, findings = _config(source)
        modules, copies, odd = _modules({name.removeprefix(prefix): ref for name, ref in source.tensors.items()})
        findings += odd
        raw = {m: _bare(m) for m in modules}
        if len({m.count(_WRAPPER) for m in modules}) > 1:
            findings.append(error("names", f"some start with {_WRAPPER} and some do not"))
        families, targets = resolve(raw.values(), architectures, _readings, source.path)
        if not families:
            targets = {m: Target("", (m,)) for m in raw.values()}
        scaler = _Scaling(config, findings)
        by_module = {m: targets[raw[m]] for m in modules}
        deltas, broken = build(modules, by_module, ("lora_A", "lora_B"), lambda m, rank: scaler(raw[m], rank))
        return Adapter(
            deltas=deltas,
            origin=Origin(self.name, source.path, {t: m for m, t in by_module.items()}, config),
            families=families,
            base_copies={by_module[m]: ref for m, ref in copies.items() if m in by_module},
            names=tuple(source.tensors),
            metadata=dict(source.metadata),
            base_model=str(config.get("base_model_name_or_path") or ""),
            findings=(*findings, *broken),
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
        modules = _module_names(adapter, architecture, options.get("model_class", ""))
        kinds = _embeddings(adapter, architecture)
        tensors: list[TensorRef] = []
        for target, deltas in adapter.deltas.items():
            for delta in deltas:
                a, b = (
                    ("lora_embedding_A", "lora_embedding_B") if target in kinds else ("lora_A.weight", "lora_B.weight")
                )
                tensors += [delta.down.renamed(f"{modules[target]}.{a}"), delta.up.renamed(f"{modules[target]}.{b}")]
        tensors += [ref.renamed(f"{modules[t]}{_BASE_COPY}") for t, ref in adapter.base_copies.items()]
        config = _make_config(adapter, {t: _bare(m) for t, m in modules.items()})
        if architecture is not None:  # PEFT warns where this field is not as the layers are
            config.setdefault("fan_in_fan_out", _all_conv1d(adapter, architecture))
        metadata = {"format": "pt"}
        name = options.get("file", "")
        if name:
            metadata[_EMBEDDED] = json.dumps(dict(sorted(config.items())))  # the order inside patterns has a meaning
            return Written((TensorFile.new(name, tensors, metadata),))
        return Written(
            (
                TensorFile.new("adapter_model.safetensors", tensors, metadata),
                JsonFile("adapter_config.json", config),
            )
        )


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
        findings += [error(key, f"{kind} is not supported yet", _WAY_OUT) for key in keys]
    if len(names) > 1:
        findings.append(error("names", f"several adapters in one file: {', '.join(sorted(map(repr, names)))}"))
    if not modules:
        findings.append(error("names", "no lora_A and lora_B tensors are in this file"))
    findings += [error(m + _BASE_COPY, "a base weight without an adapter") for m in copies if m not in modules]
    return modules, copies, findings


def _config(source: TensorSource) -> tuple[dict[str, Any], str, list[Finding]]:
    """Return the config, the component's prefix on the names of the tensors, and what is wrong with the config."""
    config, prefix = dict(source.config or {}), ""
    findings: list[Finding] = []
    if not config and _EMBEDDED in source.metadata:
        config, prefix = _embedded(source, findings)
        if findings:
            return {}, "", findings
    if source.alpha is not None:
        told = config.get("lora_alpha", source.alpha)
        if told != source.alpha:
            findings.append(error("--alpha", f"{source.alpha:g} was given, the config says {_short(told)}"))
        config = {"peft_type": "LORA", **config, "lora_alpha": source.alpha}
    if not config:
        hint = "put adapter_config.json beside it, or give --alpha"
        what = "there is no config, so the strength (lora_alpha) is unknown"
        return {}, "", [error("adapter_config.json", what, hint)]
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        findings.append(error("peft_type", f"{kind} adapters are not supported yet", _WAY_OUT))
    for name, value in config.items():
        if (name in _UNSUPPORTED and value) or (name == "bias" and value not in ("none", None)):
            findings.append(error(f"adapter_config.json: {name}", f"{_short(value)} is not supported yet", _WAY_OUT))
        elif name not in _HARMLESS and name not in _UNSUPPORTED and value:
            hint = "loratool does not know this field, and it may change what the adapter means"
            findings.append(error(f"adapter_config.json: {name}", f"unknown field, set to {_short(value)}", hint))
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        what = f"{start} changed the base model before training; this adapter fits that changed base only"
        findings.append(error("adapter_config.json: init_lora_weights", what, _WAY_OUT))
    return config, prefix, findings


def _embedded(source: TensorSource, findings: list[Finding]) -> tuple[dict[str, Any], str]:
    """Return the config in the file's header, and the component's prefix where diffusers put one on every name."""
    try:
        config = strictjson.parse(source.metadata[_EMBEDDED], _EMBEDDED)
    except FormatError as problem:
        findings.append(error(_EMBEDDED, f"the config in the file's header is {problem.what}"))
        return {}, ""
    components = sorted({name.rpartition(".")[0] for name in config})
    if len(components) > 1:
        told = ", ".join(repr(c[:40]) for c in components[:4])
        findings.append(error(_EMBEDDED, f"the config in the file's header is for several models: {told}", _WAY_OUT))
        return {}, ""
    prefix = components[0] + "." if components and components[0] else ""
    strange = next((name for name in source.tensors if not name.startswith(prefix)), None)
    if strange is not None:
        findings.append(error(_EMBEDDED, f"the config in the file's header is for {prefix}*, not for {strange!r}"))
        return {}, ""
    return {name.removeprefix(prefix): value for name, value in config.items()}, prefix


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Scaling:
    """The scaling of a module, by PEFT's rule; conflicts become findings."""

    def __init__(self, config: Mapping[str, Any], findings: list[Finding]) -> None:
        self.findings = findings
        self.ranks = _Pattern(config, "rank_pattern", findings)
        self.alphas = _Pattern(config, "alpha_pattern", findings)
        self.rank = config.get("r")
        self.rslora = bool(config.get("use_rslora"))  # as PEFT takes it
        self.alpha = config.get("lora_alpha")
        if config and not _is_number(self.alpha):
            what = f"lora_alpha is {_short(self.alpha)}: the strength is unknown"
            findings.append(error("adapter_config.json", what, "set it, or give --alpha"))
        elif config and float(self.alpha) <= 0:  # type: ignore[arg-type]
            findings.append(error("adapter_config.json", f"lora_alpha is {self.alpha}: it must be positive"))

    def __call__(self, module: str, rank: int) -> float:
        told = self.ranks.first(module, self.rank)
        if told is not None and told != rank:
            self.findings.append(error(module, f"the config says rank {told}, the tensors have rank {rank}"))
        alpha = self.alphas.first(module, self.alpha)
        if not _is_number(alpha):
            return 1.0
        return float(alpha) / (sqrt(rank) if self.rslora else rank)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30  # and no NaN


class _Pattern:
    """rank_pattern or alpha_pattern: literal keys are looked up; the rest are untrusted regular expressions, timed."""

    patience, budget = 1.0, 5.0  # seconds: shared by slow matches, and by all that regular expressions take

    def __init__(self, config: Mapping[str, Any], field: str, findings: list[Finding]) -> None:
        self.where, self.field, self.findings = f"adapter_config.json: {field}", field, findings
        table = config.get(field) or {}
        if not isinstance(table, dict):
            findings.append(error(self.where, "must be an object"))
            table = {}
        self.whole: dict[str, tuple[int, Any]] = {}  # module -> place of its key in the table, and value
        self.last: dict[str, tuple[int, Any]] = {}  # the same by the last element of the path
        self.regexes: list[tuple[int, Any, str, Callable[..., Any]]] = []
        for place, (key, value) in enumerate(table.items()):
            literal = key[1:].replace("\\", "")
            if not self._usable(key, value):
                continue
            if key == "^" + re.escape(literal):  # the spelling of most writers
                self.whole[literal] = place, value
            elif re.fullmatch(r"\w+", key):
                self.last[key] = place, value
            elif compiled := self._timed(key, self._compile, key):
                self.regexes.append((place, value, key, compiled.match))

    def first(self, module: str, default: Any) -> Any:
        """Return the value of the first key that matches, as PEFT's get_pattern_key does."""
        literals = (self.whole.get(module), self.last.get(module.rpartition(".")[2]))
        found = [hit for hit in literals if hit is not None]
        found += [(place, value) for place, value, key, match in self.regexes if self._matches(key, match, module)]
        values = [value for _, value in sorted(found)]
        if len(set(values)) > 1:
            what = f"several keys of {self.field} match with different values; PEFT takes the first, {values[0]}"
            self.findings.append(Finding("warning", module, what))
        return values[0] if values else default

    def _usable(self, key: str, value: object) -> bool:
        if _is_number(value) and float(value) > 0 and len(key) <= 4096:  # type: ignore[arg-type]
            return True
        what = f"{key[:80]!r}: {_short(value)} is not a pattern with a positive number"
        self.findings.append(error(self.where, what))
        return False

    def _compile(self, key: str) -> Any:
        """Compile the key as PEFT does, for the module that knows timeouts; None where PEFT would read it otherwise."""
        import regex

        pattern = rf"(.*\.)?({key})$"
        # regex reads (x){e<=1} as "with one error" and [[:alpha:]] as a class; the rest of its own syntax re refuses
        odd = "{" in _REPEAT.sub("", key) or "[[" in key or "[:" in key
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)  # PEFT's own module: regex knows more, such as recursion that eats all memory
            if not odd:
                return regex.compile(pattern, regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError):
            pass
        self.findings.append(error(self.where, f"{key[:80]!r} is not a usable pattern"))
        return None

    def _matches(self, key: str, match: Callable[..., Any], module: str) -> bool:
        return self._timed(key, match, module, timeout=max(min(self.patience, self.budget), 0.001)) is not None

    def _timed(self, key: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start = monotonic()
        try:
            if self.budget <= 0:
                raise TimeoutError
            return work(*arguments, **options)
        except (TimeoutError, MemoryError):
            raise FormatError(f"the pattern {key[:80]!r} takes forever", where=self.where) from None
        finally:
            spent = monotonic() - start
            self.budget -= spent
            if spent > 0.01:  # slow ones share one second; thousands of quick ones are normal
                self.patience = max(self.patience - spent, 0.001)


def _module_names(adapter: Adapter, architecture: Architecture | None, model_class: str) -> dict[Target, str]:
    """The name of each module in a PEFT file, wrapper included."""
    names = {}
    for target in adapter.targets:
        if adapter.origin.format == "peft" and target in adapter.origin.modules:
            names[target] = adapter.origin.modules[target]
        elif architecture is not None:
            names[target] = _WRAPPER + architecture.in_memory(target.component, target.parts[0], model_class)
        else:
            names[target] = _WRAPPER + target.parts[0]
    return names


def _embeddings(adapter: Adapter, architecture: Architecture | None) -> set[Target]:
    """The targets that PEFT spells with lora_embedding_A."""
    found = set()
    for target, deltas in adapter.deltas.items():
        if adapter.origin.format == "peft" and deltas[0].down.name:
            if "lora_embedding" in deltas[0].down.name:
                found.add(target)
            continue
        known = architecture.find(target.parts[0], target.component) if architecture else None
        if known and known.layer.kind == "embedding":
            found.add(target)
    return found


def _all_conv1d(adapter: Adapter, architecture: Architecture) -> bool:
    """Whether every matrix that the adapter updates is stored as (in, out), embeddings aside."""
    known = [architecture.find(t.parts[0], t.component) for t in adapter.deltas]
    kinds = {k.layer.kind for k in known if k} - {"embedding"}
    return kinds == {"conv1d"}


def _make_config(adapter: Adapter, modules: Mapping[Target, str]) -> dict[str, Any]:
    """Return an adapter_config.json under which PEFT gives every module exactly the delta's rank and scaling."""
    config = dict(adapter.origin.config) if adapter.origin.format == "peft" else {}
    ranks = {modules[t]: d[0].rank for t, d in adapter.deltas.items()}
    if config and _unchanged(adapter, config):
        return config
    alphas = {modules[t]: _tidy(d[0].alpha) for t, d in adapter.deltas.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config.update(
        peft_type="LORA",
        base_model_name_or_path=adapter.base_model or None,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={"^" + re.escape(m): r for m, r in sorted(ranks.items()) if r != rank},
        alpha_pattern={"^" + re.escape(m): a for m, a in sorted(alphas.items()) if a != alpha},
        use_rslora=False,
        bias="none",
        inference_mode=True,
        # a start value such as "gaussian" is history; a full list of names has one meaning
        init_lora_weights=True,
        target_modules=sorted(ranks),
    )
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        config.pop(name, None)  # the list of names says it all
    config.setdefault("lora_dropout", 0.0)
    config.setdefault("task_type", None)
    return config


def _unchanged(adapter: Adapter, config: Mapping[str, Any]) -> bool:
    """Whether the original config still gives every module its rank and scaling, over the same set of modules."""
    if set(adapter.deltas) != set(adapter.origin.modules):
        return False
    noise: list[Finding] = []
    scale = _Scaling(config, noise)
    same = all(scale(_bare(adapter.origin.modules[t]), d[0].rank) == d[0].scaling for t, d in adapter.deltas.items())
    return same and not any(f.level == "error" for f in noise)


def _tidy(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _commonest(values: Iterable[Any]) -> Any:
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda v: (counts[v], -v))
