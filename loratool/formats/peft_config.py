r"""adapter_config.json: what it says, whether it can be used, and how to write one under which PEFT does the same.

The patterns in it are regular expressions from strangers. Source: peft/tuners/lora/config.py and
utils/other.py: get_pattern_key (0.21.2).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from time import monotonic
from typing import Any, NamedTuple

from loratool import strictjson
from loratool.adapter import Adapter, Finding
from loratool.errors import FormatError
from loratool.formats.naming import error
from loratool.tensors import TensorSource

#: The header key for a single file's config, as diffusers spells it: a model's save_lora_adapter writes bare fields, a
#: pipeline's save_lora_weights puts the component before every field and tensor (`unet.r`). Loading a pipeline, or a
#: model with a prefix, diffusers reads only what has that prefix; load_lora_adapter(prefix=None) reads bare fields.
EMBEDDED = "lora_adapter_metadata"
# Config fields that are refused when they are set, and why.
_REASONS = {
    "use_qalora": "QA-LoRA pools groups of inputs: its update is for a GPTQ model and has no dense weight to go into",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts only after its invocation tokens: no weight can do that",
    "arrow_config": "arrow routes every token to other adapters: no weight can do that",
    "kasa_config": "KaSA truncates the base before it adds to it, which is not supported yet",
    "use_bdlora": "block-diagonal LoRA is not supported yet",
    "coft": "constrained OFT projects its blocks while it merges, which is not supported yet",
}
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora", "velora_config",
    "merge_weights", "tuner_type", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices",
    "layer_replication", "megatron_config", "enable_lora",
}  # fmt: skip
# Fields of the other types that are read, or are of training only.
_OF_TYPES = {
    "ADALORA": {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    "LOHA": {"alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"},
    "LOKR": {"alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", "decompose_both",
             "decompose_factor", "rank_dropout_scale"},
    "VERA": {"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"},
    "OFT": {"oft_block_size", "module_dropout", "init_weights", "eps", "block_share", "use_cayley_neumann",
            "num_cayley_neumann_terms"},
    "BOFT": {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights"},
    "IA3": {"feedforward_modules", "init_ia3_weights"},
    "TRAINABLE_TOKENS": {"token_indices", "init_weights"},
    "LORA": set(),
}  # fmt: skip
_MOST_LAYERS = 10_000
_SCALELESS = ("VERA", "OFT", "BOFT", "IA3", "TRAINABLE_TOKENS")
_REPEAT = re.compile(r"\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\}")
STACKED_SINCE = (0, 19)  # the version of PEFT since which factors of 3-D parameters lie as they do (peft_stacks)
WAY_OUT = "this part of the PEFT format is not carried yet; it is refused so that it cannot be lost"


def read_config(source: TensorSource) -> tuple[dict[str, Any], str, list[Finding]]:
    """Return the config, the component's prefix on the names of the tensors, and what is wrong with the config."""
    config, prefix = dict(source.config or {}), ""
    findings: list[Finding] = []
    if not config and EMBEDDED in source.metadata:
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
    if not isinstance(kind, str) or kind not in _OF_TYPES:
        known = ", ".join(_OF_TYPES)
        findings.append(
            error("peft_type", f"{_short(kind)} adapters are not supported yet (these are: {known})", WAY_OUT)
        )
        return config, prefix, findings
    for name, value in config.items():
        if name in _REASONS and (value or value == {}):  # an empty sub-config is one at its defaults
            findings.append(error(f"adapter_config.json: {name}", _REASONS[name], WAY_OUT))
        elif name not in _HARMLESS and name not in _OF_TYPES[kind] and value:
            hint = "loratool does not know this field, and it may change what the adapter means"
            findings.append(error(f"adapter_config.json: {name}", f"unknown field, set to {_short(value)}", hint))
    for name in _malformed(config):  # nothing that reads the config may meet it
        findings.append(error(f"adapter_config.json: {name}", f"malformed: {_short(config.pop(name))}"))
    return config, prefix, findings


def _embedded(source: TensorSource, findings: list[Finding]) -> tuple[dict[str, Any], str]:
    """Return the config in the file's header, and the component's prefix where diffusers put one on every name."""
    try:
        config = strictjson.parse(source.metadata[EMBEDDED], EMBEDDED)
    except FormatError as problem:
        findings.append(error(EMBEDDED, f"the config in the file's header is {problem.what}"))
        return {}, ""
    components = sorted({name.rpartition(".")[0] for name in config})
    if len(components) > 1:
        told = ", ".join(repr(c[:40]) for c in components[:4])
        findings.append(error(EMBEDDED, f"the config in the file's header is for several models: {told}", WAY_OUT))
        return {}, ""
    prefix = components[0] + "." if components and components[0] else ""
    strange = next((name for name in source.tensors if not name.startswith(prefix)), None)
    if strange is not None:
        findings.append(error(EMBEDDED, f"the config in the file's header is for {prefix}*, not for {strange!r}"))
        return {}, ""
    return {name.removeprefix(prefix): value for name, value in config.items()}, prefix


def _malformed(config: Mapping[str, Any]) -> list[str]:
    """Return the fields that have another form than they must have."""
    wrong = [name for name in ("modules_to_save", "target_parameters") if not _is_texts(config.get(name) or [])]
    feedforward = config.get("feedforward_modules") or []
    if not isinstance(feedforward, str) and not _is_texts(feedforward):
        wrong.append("feedforward_modules")
    ranges = config.get("layer_replication") or []
    pairs = isinstance(ranges, list) and all(isinstance(r, list) and list(map(type, r)) == [int, int] for r in ranges)
    if not pairs or any(not 0 <= a < b for a, b in ranges) or sum(b - a for a, b in ranges) > _MOST_LAYERS:
        wrong.append("layer_replication")
    if config.get("bias", "none") not in (None, "none", "all", "lora_only", "boft_only", "oft_only", "vera_only"):
        wrong.append("bias")
    return wrong


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Scaling:
    """The scaling of a module, by PEFT's rule; conflicts become findings."""

    def __init__(self, config: Mapping[str, Any], findings: list[Finding]) -> None:
        self.findings = findings
        kind = str(config.get("peft_type", "LORA"))
        patterns = {} if kind == "ADALORA" else config  # whose rank_pattern is the record of its allocator
        self.ranks = _Pattern(patterns, "rank_pattern", findings)
        self.alphas = _Pattern(patterns, "alpha_pattern", findings)
        self.rank = None if kind in ("ADALORA", *_SCALELESS) else config.get("r")
        self.rslora = bool(config.get("use_rslora"))  # as PEFT takes it
        self.alpha = config.get("alpha" if kind in ("LOHA", "LOKR") else "lora_alpha")
        self.fixed = _adalora(config, findings) if kind == "ADALORA" else None
        if kind in _SCALELESS or self.fixed is not None:
            return
        if config and not _is_number(self.alpha):
            what = f"lora_alpha is {_short(self.alpha)}: the strength is unknown"
            findings.append(error("adapter_config.json", what, "set it, or give --alpha"))
        elif config and float(self.alpha) <= 0:  # type: ignore[arg-type]
            findings.append(error("adapter_config.json", f"lora_alpha is {self.alpha}: it must be positive"))

    def __call__(self, module: str, rank: int) -> float:
        """Return the factor that PEFT gives a module of this rank."""
        if self.fixed is not None:
            return self.fixed
        told = self.told(module)
        if told is not None and told != rank and rank not in self.ranks.every(module):
            self.findings.append(error(module, f"the config says rank {told}, the tensors have rank {rank}"))
        alpha = self.alphas.first(module, self.alpha)
        if not _is_number(rank) or rank <= 0:
            self.findings.append(error(module, "the config says no rank (r), so the strength is unknown"))
            return 1.0
        if not _is_number(alpha):
            return 1.0
        return float(alpha) / (sqrt(rank) if self.rslora else rank)

    def told(self, module: str) -> Any:
        """Return the rank that the config says a module has."""
        return self.ranks.first(module, self.rank)


def _adalora(config: Mapping[str, Any], findings: list[Finding]) -> float:
    """Return AdaLoRA's scaling: by the rank that every module began with, whatever is left of it."""
    alpha, start = config.get("lora_alpha"), config.get("init_r")
    if not _is_number(alpha) or not _is_number(start) or start <= 0:  # type: ignore[operator]
        findings.append(error("adapter_config.json", "AdaLoRA needs lora_alpha and init_r: the strength is unknown"))
        return 1.0
    return float(alpha if alpha > 0 else start) / (start + 1e-5)  # type: ignore[operator, arg-type]


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
        values = self.every(module)
        if len(set(values)) > 1:
            what = f"several keys of {self.field} match with different values; PEFT takes the first, {values[0]}"
            self.findings.append(Finding("warning", module, what))
        return values[0] if values else default

    def every(self, module: str) -> list[Any]:
        """Return the values of all keys that match. Configs are saved sorted: which was first in training is lost."""
        literals = (self.whole.get(module), self.last.get(module.rpartition(".")[2]))
        found = [hit for hit in literals if hit is not None]
        found += [(place, value) for place, value, key, match in self.regexes if self._matches(key, match, module)]
        return [value for _, value in sorted(found)]

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


def version_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the version of PEFT that wrote a config, or None where it does not say (before 0.18)."""
    text = str(config.get("peft_version") or "")
    found = re.match(r"v?([0-9]{1,4})\.([0-9]{1,4})", text)
    version = (int(found[1]), int(found[2])) if found else None
    return None if version == (0, 18) and "dev" in text else version  # the order changed during that development


class Module(NamedTuple):
    """A module or parameter as the config speaks of it: its path, and the rank and alpha that it must get."""

    path: str
    rank: int
    alpha: float
    scaling: float
    is_parameter: bool = False


def class_of(config: Mapping[str, Any]) -> str:
    """Return the class of the model that was trained, where PEFT wrote it down: without a task type it does."""
    mapping = config.get("auto_mapping")
    return str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""


def make_config(adapter: Adapter, modules: Sequence[Module]) -> dict[str, Any]:
    """Return an adapter_config.json under which PEFT gives every module exactly the delta's rank and scaling."""
    config = dict(adapter.origin.config) if adapter.origin.format == "peft" else {}
    if config and _unchanged(adapter, config, modules):
        return config
    ranks = {m.path: m.rank for m in modules}
    alphas = {m.path: _tidy(m.alpha) for m in modules}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    parameters = sorted(m.path for m in modules if m.is_parameter)
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
        target_modules=sorted(m.path for m in modules if not m.is_parameter),
    )
    if parameters:
        config["target_parameters"] = parameters
        config["peft_version"] = "0.19.0"  # the order in which a stack's factors are written
    else:
        config.pop("target_parameters", None)
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        config.pop(name, None)  # the list of names says it all
    config.setdefault("lora_dropout", 0.0)
    config.setdefault("task_type", None)
    return config


def _unchanged(adapter: Adapter, config: Mapping[str, Any], modules: Sequence[Module]) -> bool:
    """Whether the original config still gives every module its rank and scaling, over the same set of modules."""
    stacked = {t for stack in adapter.origin.stacks.values() for t in stack.targets}
    parameters = {m.path for m in modules if m.is_parameter and not m.path.endswith(".weight")}
    if parameters != {stack.parameter for stack in adapter.origin.stacks.values()}:
        return False
    if set(adapter.deltas) != {*adapter.origin.modules, *stacked}:
        return False
    if stacked and (version_of(config) or (0, 0)) < STACKED_SINCE:
        return False
    noise: list[Finding] = []
    scale = Scaling(config, noise)
    same = all(scale(m.path, m.rank) == m.scaling for m in modules)
    return same and not any(f.level == "error" for f in noise)


def _tidy(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _commonest(values: Iterable[Any]) -> Any:
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda v: (counts[v], -v))
