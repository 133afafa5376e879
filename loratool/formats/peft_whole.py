"""What a PEFT adapter holds beside factors: DoRA's magnitudes, modules to save, trained biases and tokens.

What came from PEFT keeps the names that it had. What did not (the rest of an extraction) gets those of the live model:
a module to save is `<module>.weight` and `.bias`, all of its tensors; the bias of a module that has an adapter is
`<module>.base_layer.bias`. Source: peft/utils/save_and_load.py and utils/other.py: ModulesToSaveWrapper (0.21.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, Full, LowRank, Replace, Tokens
from loratool.errors import InputError, MismatchError
from loratool.formats.peft_names import WRAPPER, bare
from loratool.tensors import TensorRef

_MAGNITUDE = "lora_magnitude_vector"
# Fields that have a meaning for LoRA too where an adapter was of another type.
_COMMON = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_version", "revision",
    "target_modules", "task_type", "trainable_token_indices",
}  # fmt: skip


class Beside(NamedTuple):
    """The deltas of an adapter that are no factors, by what they are."""

    magnitudes: Mapping[Target, TensorRef]
    whole: Mapping[Target, tuple[Delta, ...]]


def apart(adapter: Adapter) -> tuple[Adapter, Beside]:
    """Return the adapter of plain factors, one pair a target, and what stands beside them; raise for other kinds."""
    plain: dict[Target, tuple[Delta, ...]] = {}
    magnitudes: dict[Target, TensorRef] = {}
    whole: dict[Target, tuple[Delta, ...]] = {}
    others: dict[str, list[Target]] = {}
    for target, deltas in adapter.deltas.items():
        kept = tuple(d for d in deltas if isinstance(d, (Full, Tokens)))
        factors = [d for d in deltas if d not in kept]
        if kept:
            whole[target] = kept
        if len(factors) > 1:
            others.setdefault("several at once", []).append(target)
        for delta in factors:
            inner = delta.inner if isinstance(delta, Dora) else delta
            if isinstance(delta, Dora) and delta.of_inputs:
                others.setdefault("dora, with a magnitude for each input", []).append(target)
                continue
            if not isinstance(inner, LowRank) or inner.mid is not None:
                others.setdefault(delta.kind, []).append(target)
                continue
            plain[target] = (inner,)
            if isinstance(delta, Dora):
                magnitudes[target] = delta.magnitude
    if others:
        told = [f"{kind}: {len(targets)} modules, such as {targets[0]}" for kind, targets in others.items()]
        what = "PEFT's LoRA format, as it is written, does not hold these kinds of updates"
        hint = "loratool resize --energy 1 writes what has factors as LoRA; merge takes every kind"
        raise InputError("\n  ".join([what, *told]), where=adapter.origin.path, hint=hint)
    if not plain:
        raise InputError("no module of this adapter has factors: it would be no LoRA", where=adapter.origin.path)
    if magnitudes and len(magnitudes) < len(plain):
        odd = next(t for t in plain if t not in magnitudes)
        what = f"{len(magnitudes)} modules are DoRA and {odd} is not: a PEFT config has one use_dora for all"
        raise InputError(what, where=adapter.origin.path, hint="--exclude one kind, and write two adapters")
    origin = replace(adapter.origin, config=_of_lora(adapter.origin.config))
    return replace(adapter, deltas=plain, origin=origin), Beside(magnitudes, whole)


def _of_lora(config: Mapping[str, object]) -> dict[str, object]:
    """Return a config without what is only true of another type, or of a base that was changed before training."""
    if config.get("peft_type", "LORA") != "LORA":
        config = {name: value for name, value in config.items() if name in _COMMON}
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start != "gaussian":
        config = {**config, "init_lora_weights": True}
    return dict(config)


def written(
    adapter: Adapter,
    beside: Beside,
    modules: Mapping[Target, str],
    architecture: Architecture | None,
    model_class: str,
) -> tuple[list[TensorRef], dict[str, Any]]:
    """Return the tensors beside the factors, and the fields of the config that speak of them.

    `modules` are the names in the file of the modules that have factors.
    """
    config = adapter.origin.config if adapter.origin.format == "peft" else {}
    tensors: list[TensorRef] = []
    fields: dict[str, Any] = {"bias": "none"}
    for target, ref in beside.magnitudes.items():
        if target not in modules:
            raise MismatchError("DoRA on a stack of experts: PEFT has no such thing", where=str(target))
        shape = adapter.tensors[ref.name].shape if ref.name in adapter.tensors else ref.shape
        tensors.append(replace(ref, name=f"{modules[target]}.{_MAGNITUDE}", shape=shape))
    names = _Names(modules, architecture, model_class, replace(adapter, deltas=beside.whole))
    for target, deltas in beside.whole.items():
        for delta in deltas:
            tensors += names.named(target, delta)
    has_factor_bias = any(name.endswith(".lora_B.bias") for name in (t.name for t in tensors))
    if has_factor_bias and sum(t.name.endswith(".lora_B.bias") for t in tensors) < len(modules):
        raise InputError("some modules have a bias on lora_B and some have none", where=adapter.origin.path)
    if config:
        fields |= {name: config[name] for name in ("bias",) if name in config}
    fields["modules_to_save"] = _saved(config, names, tensors)
    if names.biases:
        fields["bias"] = "all" if any(not of_module for of_module in names.biases) else "lora_only"
    if "use_dora" in config or beside.magnitudes:
        fields["use_dora"] = bool(beside.magnitudes)
    if "lora_bias" in config or has_factor_bias:
        fields["lora_bias"] = has_factor_bias
    if config.get("trainable_token_indices") and not any(
        isinstance(d, Tokens) for ds in beside.whole.values() for d in ds
    ):
        fields["trainable_token_indices"] = None
    if names.tied:
        fields["ensure_weight_tying"] = True
    return tensors, fields


class _Names:
    """Names for whole tensors; `saved` are the modules to save that were named, `biases` whether a LoRA module's."""

    def __init__(
        self, modules: Mapping[Target, str], architecture: Architecture | None, model_class: str, adapter: Adapter
    ) -> None:
        self.modules = {bare(name) for name in modules.values()}
        self.architecture, self.model_class, self.adapter = architecture, model_class, adapter
        self.saved: list[str] = []
        self.biases: list[bool] = []
        self.tied = False

    def named(self, target: Target, delta: Delta) -> list[TensorRef]:
        """Return the tensor under its name in the file; under two, where two layers share it."""
        ref = delta.refs[0]
        if self.adapter.origin.format == "peft":
            return [ref]
        if self.architecture is None or not isinstance(delta, Replace) or len(target.parts) != 1:
            raise MismatchError(f"a {delta.kind} delta that PEFT has no name for", where=str(target))
        path = target.parts[0]
        module, _, leaf = path.rpartition(".")
        if leaf not in ("bias", "weight") or not _is_bias(path, ref):
            module, leaf = path, "weight"
        live = self.architecture.in_memory(target.component, module, self.model_class)
        if leaf == "bias" and live in self.modules:
            self.biases.append(True)
            return [ref.renamed(f"{WRAPPER}{live}.base_layer.bias")]
        inside = [m for m in self.modules if m == live or m.startswith(f"{live}.")]
        if inside:
            what = "has an adapter too" if live in inside else f"holds {inside[0]}, which has an adapter"
            raise MismatchError(
                f"PEFT saves whole modules, and {live} {what}", where=str(target), hint="--rest skip leaves it out"
            )
        module_weight = Target(target.component, (module,))
        if leaf == "bias" and module_weight not in self.adapter.deltas:
            self.biases.append(False)
            return [ref.renamed(f"{WRAPPER}{live}.bias")]
        others = self._tied(path, target.component) if leaf == "weight" else []
        self.tied |= bool(others)
        self.saved += [name for name in (live, *others) if name not in self.saved]
        return [ref.renamed(f"{WRAPPER}{name}.{leaf}") for name in (live, *others)]

    def _tied(self, path: str, component: str) -> list[str]:
        """Return the layers that share a weight and have none of their own in the adapter.

        PEFT saves and loads a tied weight once a layer, and ties them where a module to save is called embed_tokens or
        lm_head (tuners_utils.py: _check_tied_modules).
        """
        assert self.architecture is not None
        if not self.adapter.shares_ties:
            return []
        paths = [p for group in self.architecture.tied if path in group for p in group if p != path]
        if any(Target(component, (p,)) in self.adapter.deltas for p in paths):
            return []
        live = [self.architecture.in_memory(component, p, self.model_class) for p in paths]
        return [] if self.modules & set(live) else live


def _is_bias(path: str, ref: TensorRef) -> bool:
    return path.endswith(".bias") and len(ref.shape) == 1


def _saved(config: Mapping[str, object], names: _Names, tensors: Iterable[TensorRef]) -> list[str] | None:
    """Return modules_to_save: those of the origin that are still there, by their own names where only some are."""
    told = config.get("modules_to_save")
    if not isinstance(told, list):
        return sorted(names.saved) or None
    present = {bare(t.name).rpartition(".")[0].partition(".modules_to_save")[0] for t in tensors}
    kept = [name for name in told if any(f".{name}." in f".{module}." for module in present)]
    return kept or None
