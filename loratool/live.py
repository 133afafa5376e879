"""Live models: the adapter of a PeftModel or of layers written by hand as an Adapter, and an Adapter put onto a model.

All go through the PEFT format, on what save_pretrained would write and from_pretrained would read; no file is made.
What PEFT would leave aside with a warning, or without one, is an error here.
Source: peft/utils/save_and_load.py and peft_model.py (0.21.2).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratool import dtypes, strictjson
from loratool.adapter import Adapter, Origin
from loratool.deltas import LowRank
from loratool.detection import named_by
from loratool.errors import MismatchError, UsageError
from loratool.formats.peft_config import Module, make_config
from loratool.plan import JsonFile, TensorFile
from loratool.plugins import installed
from loratool.tensors import Inline, TensorRef, TensorSource

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def from_peft(model: torch.nn.Module, adapter_name: str = "default") -> Adapter:
    """Return an adapter of a live PeftModel, or of a transformers or diffusers model that has it by `add_adapter`.

    The numbers are copied: training on does not change them. Like an opened file, the adapter may have error findings.
    Raises UsageError where the model has no such adapter.
    """
    peft = _peft()
    live: Any = model
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        names = ", ".join(map(repr, configs)) or "none"
        what = f"the model has no adapter {adapter_name!r}; it has {names}"
        raise UsageError(what, where=type(model).__name__, hint="from_peft(model, adapter_name)" if configs else "")
    base = live.get_base_model() if isinstance(model, peft.PeftModel) else model
    with warnings.catch_warnings():
        # the untouched embedding is saved along with an adapter on it; shapes are judged by the format's reader
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`|Adapter .* have invalid shape", UserWarning)
        state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    where = f"adapter {adapter_name!r} of a live {type(base).__name__}"
    tensors = {name: _inline(name, t, where) for name, t in state.items()}
    source = TensorSource(where, tensors, {"format": "pt"}, _config(configs[adapter_name], base))
    plugins = installed()
    format, every = plugins.format("peft"), plugins.architectures()
    named = tuple(a.holding(type(base).__name__) for a in named_by(_told(base), plugins)[0])
    adapter = format.read(source, named) if named else None
    return adapter if adapter and adapter.families else format.read(source, every)


def from_factors(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, scaling: float, base_model: str = ""
) -> Adapter:
    """Return an adapter of LoRA layers written by hand: for the path of each linear module its two factors.

    They are down (rank, in) and up (out, rank), as the paper has them, or (in, rank) and (rank, out), where a layer
    computes x @ A @ B. The shapes tell, all modules alike; a rank is never above the module's own size. `scaling` is
    what the layers multiply by: alpha / rank in most code, alpha itself in some. The numbers are copied.
    Raises UsageError where the shapes fit neither way, or do not tell which.
    """
    from loratool.deltas.base import alpha_of

    where, tensors, told = "LoRA layers in memory", dict[str, TensorRef](), list[Module]()
    if not factors:
        raise UsageError("no factors", where=where, hint='from_factors({"layers.0": (A, B)}, scaling=alpha / rank)')
    turned = _turned({name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in factors.items()}, where)
    for module, pair in factors.items():
        down, up = (tensor.T if turned else tensor for tensor in pair)
        for part, tensor in (("lora_A", down), ("lora_B", up)):
            name = f"base_model.model.{module}.{part}.weight"
            tensors[name] = _inline(name, tensor, where)
        told.append(Module(module, down.shape[0], alpha_of(scaling, down.shape[0]), scaling))
    config = make_config(Adapter({}, Origin("", where), base_model=base_model), told)
    plugins = installed()
    return plugins.format("peft").read(TensorSource(where, tensors, {"format": "pt"}, config), plugins.architectures())


def _turned(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], where: str) -> bool:
    """Whether pairs of factors are (in, rank) and (rank, out)."""
    pairs = list(shapes.values())
    flat = [name for name, pair in shapes.items() if any(len(shape) != 2 for shape in pair)]
    paper = not flat and all(a[0] == b[1] for a, b in pairs)
    turned = not flat and all(a[1] == b[0] for a, b in pairs)
    if not paper and not turned:
        one = next(iter(flat), min(shapes))
        what = f"the factors of {one} are {list(shapes[one][0])} and {list(shapes[one][1])}"
        raise UsageError(what, where=where, hint="(rank, in) and (out, rank) are wanted, in all modules alike")
    if paper and turned:  # all modules are square: the rank is the smaller side
        longer = {a[0] > a[1] for a, _ in pairs if a[0] != a[1]}
        if len(longer) != 1:
            what = "the shapes do not tell which side of the factors is the rank"
            raise UsageError(what, where=where, hint="use a rank below the size of the modules")
        return longer.pop()
    return turned


def to_peft(
    adapter: Adapter, model: torch.nn.Module, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Put an adapter onto a live base model, which changes in place, and return the PeftModel.

    Onto a PeftModel it goes as one more adapter, which is not made the active one. With `is_trainable` the factors can
    be trained on. Raises MismatchError where the model has no place for some tensor of the adapter, or lacks some; the
    model is then as it was.
    """
    peft = _peft()
    adapter = adapter.require_sound()
    known: Any = model
    is_live = isinstance(model, peft.PeftModel)
    _require_room(peft, known, adapter_name)
    refs, content = _written(adapter, type(known.get_base_model() if is_live else model).__name__)
    state = _loaded(refs)
    if not any(name.startswith("base_model.") for name in state):  # add_adapter's names are those of the bare model
        state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    live: Any = None
    try:
        config = peft.PeftConfig.from_peft_type(**{**content, "inference_mode": not is_trainable})
        config.base_model_name_or_path = None  # PEFT warns where this is not the model's own name
        live = _injected(peft, known, config, adapter_name)
        config.base_model_name_or_path = adapter.base_model or config.base_model_name_or_path
        result = peft.set_peft_model_state_dict(live, state, adapter_name=adapter_name)
        what = [f"the model has no place for {name}" for name in result.unexpected_keys]
        what += [f"the adapter has no {name}" for name in result.missing_keys if adapter_name in name.split(".")]
        if what:
            raise ValueError("\n  ".join([f"{len(what)} tensors do not fit", *what[:12]]))
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as problem:
        if live is not None:
            _ = live.delete_adapter(adapter_name) if is_live else live.unload()
        where = f"{adapter.origin.path} onto {type(model).__name__}"
        hint = f"the adapter names {adapter.base_model or 'no base model'}"
        raise MismatchError(str(problem), where=where, hint=hint) from problem
    finished: PeftModel = live if is_trainable else live.eval()
    return finished


def _require_room(peft: Any, model: Any, adapter_name: str) -> None:
    """Raise UsageError where an adapter of that name, or of any, is there already."""
    if isinstance(model, peft.PeftModel):
        if adapter_name in model.peft_config:
            raise UsageError(f"the model has an adapter {adapter_name!r} already", hint="to_peft(adapter, model, NAME)")
    elif any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()):
        hint = "give the model without adapters, or the PeftModel"
        raise UsageError("the model has adapters that no PeftModel manages", where=type(model).__name__, hint=hint)


def _peft() -> Any:
    """Import PEFT, or raise UsageError."""
    try:
        import peft
    except ImportError as problem:
        raise UsageError(f"live models need PEFT: {problem}", hint="pip install peft") from problem
    return peft


def _inline(name: str, tensor: torch.Tensor, where: str) -> TensorRef:
    """Copy a tensor's bytes."""
    from loratool.storage.load import as_bytes

    if tensor.device.type == "meta":
        raise UsageError(f"{name} is offloaded: it has no numbers here", where=where, hint="save the adapter instead")
    dtype = dtypes.from_torch_name(str(tensor.dtype).removeprefix("torch."))
    return TensorRef(name, tuple(tensor.shape), dtype, (Inline(bytes(as_bytes(tensor.detach()))),))


def _config(config: Any, base: torch.nn.Module) -> dict[str, object]:
    """Return an adapter_config.json as PeftModel.save_pretrained writes it."""
    content = {**config.to_dict(), "inference_mode": True}
    content["base_model_name_or_path"] = config.base_model_name_or_path or base.__dict__.get("name_or_path") or None
    return strictjson.parse(json.dumps(content, sort_keys=True, default=_listed), "peft_config")


def _listed(value: object) -> list[str]:
    """Return a set as JSON has it, in an order that does not change."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise UsageError(f"{value!r} cannot be saved in an adapter_config.json")


def _told(base: torch.nn.Module) -> Mapping[str, Any]:
    """Return what the model's own config says."""
    config: Any = getattr(base, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return config if isinstance(config, Mapping) else {}


def _written(adapter: Adapter, model_class: str) -> tuple[tuple[TensorRef, ...], dict[str, Any]]:
    """Return the tensors and the config of an adapter in the PEFT format.

    What is still as it was read goes as it was read where the writer has no words for it.
    """
    plugins = installed()
    format = plugins.format("peft")
    families = tuple(a for a in plugins.architectures() if a.name in adapter.families)
    plain = all(isinstance(d, LowRank) and d.mid is None for ds in adapter.deltas.values() for d in ds)
    if not plain and adapter.origin.format == "peft":
        config = dict(adapter.origin.config)
        source = TensorSource(adapter.origin.path, adapter.tensors, adapter.metadata, config)
        if format.read(source, families or plugins.architectures()).deltas == adapter.deltas:
            return tuple(ref.renamed(name) for name, ref in adapter.tensors.items()), config
    written = format.write(adapter, families[0] if families else None, {"model_class": model_class})
    if written.losses:
        raise MismatchError("; ".join(written.losses), where=adapter.origin.path)
    refs = tuple(ref for file in written.files if isinstance(file, TensorFile) for ref in file.tensors)
    content = next(file.content for file in written.files if isinstance(file, JsonFile))
    return refs, dict(content)


def _loaded(refs: tuple[TensorRef, ...]) -> dict[str, torch.Tensor]:
    from loratool.storage.load import Loader

    with Loader() as load:
        return {ref.name: load(ref) for ref in refs}


def _injected(peft: Any, model: Any, config: Any, adapter_name: str) -> Any:
    """Return the PeftModel with the modules of one more adapter, whose numbers are still to come."""
    if isinstance(model, peft.PeftModel):
        model.add_adapter(adapter_name, config)
        return model
    return peft.get_peft_model(model, config, adapter_name=adapter_name)
