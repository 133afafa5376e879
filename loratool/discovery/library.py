"""Ask transformers or diffusers what a config.json describes: they build the model on the meta device, we look at it.

No weights, no remote code, no network, no prompt, and a deadline. What comes out is plain data (conversions.Live).
"""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from loratool.discovery.conversions import Conversion, Live, Parameter, Step
from loratool.discovery.names import Shape, role_of
from loratool.layers import Conv1D, Conv1d, Conv2d, Conv3d, Embedding, Excluded, Experts, Linear
from loratool.patterns import natural

SECONDS = 20  # the slowest of transformers' own default configs takes 5
MOST_LAYERS = 10_000
MOST_EXPERTS = 100_000
MOST_LABELS = 1_000_000
MOST_ENTRIES = 1_000_000  # of one list in a config
_COUNT = re.compile(r"(?:^|_)(?:layers?|blocks?|depths?|heads?|stages?|groups?)$")
# The library would act on these: code and weights from the Hub, kernels, quantisers. Names with _ are private to it.
_ACTIVE = re.compile(
    "_.*|auto_map|.*_implementation|quantization_config|compression_config|.*dtype|name_or_path|use_kernels|kernel_config"
)


class UnknownError(Exception):
    """A config that no library can build, with the reason."""


class TooLongError(BaseException):
    """The deadline; no `except Exception` of a library may swallow it."""


def ask(kind: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Live:
    """Build the model that a config describes and describe it; any exception may come out of here."""
    if not kind:
        raise UnknownError("it names neither a model_type nor a _class_name")
    _refuse_absurd(config, "")
    clean = _passive(config)
    if not isinstance(config.get("model_type"), str):
        return _ask_diffusers(kind, {**clean, "_class_name": kind})
    return _ask_transformers(kind, config, clean, shapes)


def _refuse_absurd(value: Any, key: str) -> None:
    """Stop before a library multiplies what a config claims: counts that no model has, endless lists."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_absurd(inner, str(name))
    elif isinstance(value, (list, tuple)):
        if len(value) > (MOST_LAYERS if _COUNT.search(key) else MOST_ENTRIES):
            raise UnknownError(f"{key} has {len(value)} entries")
        for inner in value:
            _refuse_absurd(inner, key)
    elif isinstance(value, (int, float)):
        most = {"num_labels": MOST_LABELS}.get(key, MOST_EXPERTS if key.endswith("experts") else 0)
        most = MOST_LAYERS if _COUNT.search(key) else most
        if most and value > most:
            raise UnknownError(f"{key} is {value}, and more than {most} is refused")


def _passive(value: Any) -> Any:
    """Return a config less what a library would act on, nested configs too; infinities as transformers reads them."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        kept = {str(k): _passive(v) for k, v in value.items() if not _ACTIVE.fullmatch(str(k))}
        return {k: False if k == "use_pretrained_backbone" else v for k, v in kept.items()}
    return [_passive(v) for v in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def _apart() -> Iterator[None]:
    """Let a library work on the meta device, quietly, and without the Hub."""
    import torch

    constants: Any = None
    with suppress(ImportError):
        from huggingface_hub import constants
    disabled, offline = logging.root.manager.disable, getattr(constants, "HF_HUB_OFFLINE", None)
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        if offline is not None:
            constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            logging.disable(disabled)
            if offline is not None:
                constants.HF_HUB_OFFLINE = offline


@contextmanager
def _deadline() -> Iterator[None]:
    """Raise TooLongError in this thread after SECONDS, at the next call of a function."""
    end = time.monotonic() + SECONDS

    def check(*_: object) -> None:
        if time.monotonic() > end:
            raise TooLongError

    profile = sys.getprofile()
    sys.setprofile(check)
    try:
        yield
    finally:
        sys.setprofile(profile)


def _ask_diffusers(kind: str, config: dict[str, Any]) -> Live:
    try:
        import diffusers
    except ImportError:
        raise UnknownError("diffusers is not installed") from None
    cls = _public_class(diffusers, kind, diffusers.ModelMixin)
    if cls is None:
        raise UnknownError(f"diffusers has no model {kind}")
    with _apart():
        with _deadline():
            model = cls.from_config(config)
        return _described(kind, model, "diffusers", {})


def _ask_transformers(kind: str, config: Mapping[str, Any], clean: dict[str, Any], shapes: Mapping[str, Shape]) -> Live:
    try:
        import transformers
    except ImportError:
        raise UnknownError("transformers is not installed") from None
    if kind not in transformers.CONFIG_MAPPING:
        remote = ", and the model's own code is never run" if config.get("auto_map") else ""
        raise UnknownError(f"transformers {transformers.__version__} does not know this model_type{remote}")
    config_class = transformers.CONFIG_MAPPING[kind]
    cls, note = _model_class(transformers, config_class, config.get("architectures"))
    with _apart():
        with _deadline():
            model = cls(config_class.from_dict(clean))
        live = _described(kind, model, "transformers", getattr(model, "all_tied_weights_keys", None) or {})
        live.notes += note
        _forward(model, live, shapes)
    return live


def _public_class(library: Any, name: object, parent: type) -> Any:
    found = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() and name[0] != "_" else None
    return found if isinstance(found, type) and issubclass(found, parent) else None


def _model_class(transformers: Any, config_class: type, classes: object) -> tuple[Any, list[str]]:
    """Return the class that a config names if it is one of transformers for this config, else a usual one."""
    for name in classes if isinstance(classes, list) else ():
        cls = _public_class(transformers, name, transformers.PreTrainedModel)
        if cls is not None and cls.config_class in config_class.__mro__:
            return cls, []
    auto = transformers.models.auto.modeling_auto
    for task in ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "PRETRAINING"):
        mapping = getattr(auto, f"MODEL_FOR_{task}_MAPPING", {})
        if config_class in mapping:
            return _first(mapping[config_class])
    if config_class in auto.MODEL_MAPPING:
        return _first(auto.MODEL_MAPPING[config_class])
    raise UnknownError("transformers has no model class for it")


def _first(classes: Any) -> tuple[Any, list[str]]:
    cls = classes[0] if isinstance(classes, tuple) else classes
    return cls, [f"the config names no class that transformers has; {cls.__name__} is assumed"]


def _described(kind: str, model: Any, library: str, tied: Mapping[str, str]) -> Live:
    """Describe a model on the meta device: its parameters, ties, and prefixes."""
    sizes = _Sizes.of(model.config)
    parameters = {}
    others = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if value is None or value.dim() < 2:
                others.add(full)
            else:
                parameters[full] = _parameter(path, module, name, tuple(value.shape), sizes)
    prefix = getattr(model, "base_model_prefix", "") or ""
    base = getattr(model, prefix, None) if prefix else None
    live = Live(kind, type(model).__name__, library, parameters, frozenset(others), [])
    live.conversions = [Conversion(((n,),), (n,)) for n in parameters]
    live.tied = [(a, b) for a, b in tied.items() if a in parameters and b in parameters]
    live.prefix, live.base = prefix, type(base).__name__ if base is not None else ""
    live.experts = sizes.experts
    live.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    return live


class _Sizes(NamedTuple):
    """The sizes in a config that tell axes apart."""

    hidden: frozenset[int]
    experts: frozenset[int]

    @classmethod
    def of(cls, config: Any) -> _Sizes:
        """Collect them from a config and the configs nested in it."""
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        found = list(_integers(values))
        hidden = {n for k, n in found if k in ("hidden_size", "d_model", "n_embd", "dim")}
        return cls(frozenset(hidden), frozenset(n for k, n in found if k.endswith("experts") and "per_tok" not in k))


def _integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _integers({str(k): v for k, v in value.items()})
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def _parameter(path: str, module: Any, name: str, shape: Shape, sizes: _Sizes) -> Parameter:
    """Say what one parameter of a live module is."""
    from torch import nn

    holder = type(module).__name__
    known = {nn.Linear: Linear, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d, nn.Embedding: Embedding}
    if name == "weight":
        if any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__):
            return Parameter(shape, Conv1D, holder)
        for theirs, kind in known.items():
            if isinstance(module, theirs):
                return Parameter(shape, kind, holder)
        if shape == (getattr(module, "out_features", None), getattr(module, "in_features", None)):
            return Parameter(shape, Linear, holder)  # NormHead, BitLinear
        if len(shape) == 2 and re.search("Router|Gat(e|ing)|TopK", holder):
            if shape[0] in sizes.experts or shape[1] in sizes.hidden:
                return Parameter(shape, Linear, holder)
            if shape[1] in sizes.experts and shape[0] in sizes.hidden:
                return Parameter(shape, Conv1D, holder)
    if len(shape) == 3 and (hasattr(module, "is_transposed") or re.search("expert|moe", f"{holder}.{path}", re.I)):
        gated = getattr(module, "has_gate", False) and name == "gate_up_proj"
        layout = "" if not gated else "concat" if getattr(module, "is_concatenated", False) else "stride"
        return Parameter(shape, Experts, holder, _in_out(path, module, name, shape, sizes), layout)
    return Parameter(shape, Excluded, holder)


def _in_out(path: str, module: Any, name: str, shape: Shape, sizes: _Sizes) -> bool:
    """Whether the experts of a stack are stored (in, out): as the class declares, else as the hidden size tells."""
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    leaf = path.rpartition(".")[2] if name == "weight" else name
    inputs, outputs = (1, 2) if role_of(leaf) != "down" else (2, 1)
    return shape[inputs] in sizes.hidden and shape[outputs] not in sizes.hidden


def _forward(model: Any, live: Live, shapes: Mapping[str, Shape]) -> None:
    """Map the names on disk forward to those in memory, as transformers does when it loads a checkpoint."""
    if not shapes:
        live.notes.append("there is no base at hand: its names are taken to be those in memory")
        return
    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4 loads names as they are
        _place_names(live, {n: (n, None) for n in shapes}, {})
        return
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    state = model.state_dict()
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            continue
        renamed = loading.rename_source_key(name, renamings, converters, live.prefix, state)
        if renamed[0] not in state and name in state:
            renamed = loading.rename_source_key(name, [], [], live.prefix, state)
        found[name] = renamed
    _place_names(live, found, {pattern: c for c in converters for pattern in c.source_patterns})


def _place_names(live: Live, found: Mapping[str, tuple[str, str | None]], converters: Mapping[str, Any]) -> None:
    """Gather the names that one converter makes into one tensor, in the order in which it takes them."""
    live.conversions = []
    gathered: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(found, key=natural):
        target, pattern = found[name]
        if pattern is None and (target in live.parameters or target in live.others):
            live.conversions.append(Conversion(((name,),), (target,)))
        elif pattern is None:
            live.strangers.append(name)
        else:
            gathered[target][pattern].append(name)
    for target, sources in gathered.items():
        converter = converters[next(iter(sources))]
        first = converter.target_patterns[0]
        targets = tuple(target.replace(first, other, 1) for other in converter.target_patterns)
        if targets[0] not in live.parameters:
            live.strangers += [n for names in sources.values() for n in names]
            continue
        ordered = tuple(tuple(sources[p]) for p in converter.source_patterns if p in sources)
        live.conversions.append(Conversion(ordered, targets, tuple(_step(op) for op in converter.operations)))


def _step(op: Any) -> Step:
    options = vars(op)
    dims = tuple(options[k] for k in ("dim", "dim0", "dim1") if k in options)
    plain = not options.get("num_shards_attribute") and not options.get("inverse")
    return Step(type(op).__name__, dims, plain, bool(options.get("check_dims")))
