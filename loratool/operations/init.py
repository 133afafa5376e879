"""init: a new adapter for PEFT, ready to be trained, of the modules of a live model that a base on disk stands for.

The tensors are named and shaped as PEFT has them in memory, the config selects exactly their modules. What is written
is read back in the plan, so that nothing is made that the other verbs could not use. PiSSA and LoftQ change the base:
the adapter is for what they leave of it, and is kept in `initial/` as it began, for the way back to the original.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Origin
from loratool.architecture import Architecture
from loratool.errors import InputError, UnsupportedError
from loratool.formats.peft_config import STACKED_SINCE, make_config
from loratool.hookspecs import Format
from loratool.operations.matching import assembled, places, resolve
from loratool.operations.residual import CHANGING
from loratool.operations.starts import LoftqStart, PrincipalStart, random_start
from loratool.operations.survey import Survey, survey_of
from loratool.operations.targets import shared, targets_of
from loratool.operations.trainable import Trained, Wish, trained
from loratool.plan import Facts, Input, JsonFile, Out, Plan, Report, Settled, Spooled, TensorFile, Unit
from loratool.storage.checkpoint import Checkpoint
from loratool.storage.location import name_in_configs
from loratool.tensors import TensorRef, TensorSource

INITS = ("kaiming", "gaussian", *CHANGING)
INITIAL = "initial"  # the folder in the adapter's that holds what it was before training
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TAKEN = "taken "  # before the names of spooled factors: what a start takes out of the base
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Start:
    """How the factors begin. `residual` is where the base goes that PiSSA or LoftQ leave; `memory` is in bytes.

    `iterations` are LoftQ's.
    """

    init: str = "kaiming"
    seed: int = 0
    dtype: str = "float32"
    residual: str = ""
    memory: int = 2 << 30
    iterations: int = 1

    @property
    def told(self) -> dict[str, Any]:
        """What a config says of a start that changed the base, in PEFT's words."""
        more = {"loftq_config": {"loftq_bits": 4, "loftq_iter": self.iterations}} if self.init == "loftq" else {}
        return {"init_lora_weights": self.init, **more}


def plan(
    base: Checkpoint, architecture: Architecture, wish: Wish, start: Start, format: Format
) -> tuple[Plan, Adapter]:
    """Plan a new adapter for `base`, in PEFT's format; beside the plan, the adapter as it will be read."""
    survey = survey_of(base, architecture)
    modules = trained(survey, wish, base.path)
    dtype = dtypes.from_torch_name(start.dtype)
    refs = [TensorRef(name, shape, dtype) for m in modules for name, shape in zip(m.names, (m.down, m.up), strict=True)]
    named = _named(base.path)
    config = _config(survey, modules, start.residual or named)
    names = [_WEIGHTS]
    files: list[TensorFile | JsonFile] = [TensorFile.new(_WEIGHTS, refs, {"format": "pt"}), JsonFile(_CONFIG, config)]
    read = _read_back(refs, config, architecture, format, base.path)
    if start.init in CHANGING:
        before = {**config, **start.told, "base_model_name_or_path": named}
        names.append(f"{INITIAL}/{_WEIGHTS}")
        files += [TensorFile.new(names[1], refs, {"format": "pt"}), JsonFile(f"{INITIAL}/{_CONFIG}", before)]
        units: Sequence[Unit] = _changing(modules, read, (base, architecture), start, names)
    else:
        units = [random_start(m, _outs(m, _WEIGHTS, dtype), start.init, start.seed) for m in modules]
    report = Report(verb="init", findings=[*_findings(survey, wish), *_above_full(modules)])
    report.totals = _totals(survey, modules, start, refs)
    report.totals |= {name: config[name] for name in ("target_modules", "target_parameters") if config.get(name)}
    report.rows = [_row(m) for m in modules]
    report.files = [file.name for file in files]

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        measured = [facts[unit.key] for unit in units]
        for row, found in zip(report.rows, measured, strict=True):
            row.update(_shares(found))
        if start.init in CHANGING:
            report.totals |= _shares({name: sum(found[name] for found in measured) for name in measured[0]})
        return Settled(report)

    inputs = (Input(base.path, base.tensors, {}, otherwise="not read"),)
    return Plan(tuple(units), report, settle, tuple(files), inputs=inputs), read


def _named(base: str) -> str:
    """Return what the config says of the base: of a local folder the whole path, for it is read from anywhere."""
    name = name_in_configs(base)
    return str(Path(name).resolve()) if Path(name).exists() else name


def _outs(module: Trained, file: str, dtype: str) -> tuple[Out, Out]:
    down, up = module.names
    return Out(file, down, module.down, dtype), Out(file, up, module.up, dtype)


def _config(survey: Survey, modules: Sequence[Trained], base: str) -> dict[str, Any]:
    """Return the config under which PEFT adapts these modules, no others, and gives them these ranks and scalings.

    r and lora_alpha are those of parameters, where there are any: PEFT warns of patterns that match no module.
    """
    leading = [m.told for m in modules if m.module.is_parameter] or [m.told for m in modules]
    told = [m.told for m in modules]
    config = make_config(Adapter({}, Origin("", base), base_model=base), told)
    rank, alpha = (Counter(of).most_common(1)[0][0] for of in ([m.rank for m in leading], [m.alpha for m in leading]))
    config |= {"r": rank, "rank_pattern": _pattern({m.path: m.rank for m in told}, rank)}
    config |= {"lora_alpha": _tidy(alpha), "alpha_pattern": _pattern({m.path: _tidy(m.alpha) for m in told}, alpha)}
    found = targets_of(survey, [m.module for m in modules])
    config |= {"target_modules": found["target_modules"], "inference_mode": False, "use_rslora": modules[0].rslora}
    if found["target_parameters"]:
        version = ".".join(map(str, (*STACKED_SINCE, 0)))
        config |= {"target_parameters": found["target_parameters"], "peft_version": version}
    else:
        config.pop("target_parameters", None)
    config["fan_in_fan_out"] = {m.kind for m in modules} - {"embedding"} == {"Conv1D"}
    config["task_type"] = _task(survey)
    return config


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Return what differs from the usual, by regular expressions that match one module each."""
    return {"^" + re.escape(path): value for path, value in values.items() if value != usual}


def _tidy(number: float) -> float:
    return int(number) if number == int(number) else number


def _task(survey: Survey) -> str | None:
    """Return PEFT's word for a model that generates; for others it has none, or trains a head beside."""
    name = survey.model_class
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    encodes = survey.config.get("is_encoder_decoder") and name.endswith("ForConditionalGeneration")
    return "SEQ_2_SEQ_LM" if encodes else None


def _read_back(
    refs: Sequence[TensorRef], config: Mapping[str, Any], architecture: Architecture, format: Format, where: str
) -> Adapter:
    """Return the adapter as it will be read; raise where it cannot be: such modules cannot be merged after training."""
    source = TensorSource(where, {ref.name: ref for ref in refs}, {"format": "pt"}, config)
    adapter = format.read(source, (architecture,))
    errors = [f"{f.where}: {f.what}" for f in adapter.findings if f.level == "error"]
    if errors:
        what = ["PEFT could train these modules, and loratool could not use the result", *errors[:8]]
        raise UnsupportedError("\n  ".join(what), where=where, hint="leave them out with --exclude")
    return adapter


def _findings(survey: Survey, wish: Wish) -> list[Finding]:
    findings = shared(survey, wish.preset or "default") if wish.is_preset else []
    if survey.model_class.endswith(_HEADS):
        what = "its head is no part of the adapter: modules_to_save in a LoraConfig of your own trains it along"
        findings.append(Finding("info", survey.model_class, what))
    return findings


def _above_full(modules: Sequence[Trained]) -> Iterator[Finding]:
    """Warn of ranks above the full one, at which every update is possible."""
    for one in (m for m in modules if m.rank > m.full_rank):
        what = f"rank {one.rank} is above {one.full_rank}, its smaller side, at which any update is possible"
        hint = f"{_lower([m for m in modules if m.rank > m.full_rank])}: more is parameters for nothing"
        yield Finding("warning", one.module.name, what, hint)


def _lower(modules: Sequence[Trained]) -> str:
    """Return options that give no module more than its full rank."""
    least: dict[str, int] = {}
    for one in modules:
        name = one.module.name.removesuffix(".weight").rpartition(".")[2]
        least[name] = min(least.get(name, one.full_rank), one.full_rank)
    each = " ".join(f"--rank-for {name}={rank}" for name, rank in list(least.items())[:4])
    return f"--rank {min(least.values())} or less, or {each}"


def _totals(survey: Survey, modules: Sequence[Trained], start: Start, refs: Sequence[TensorRef]) -> dict[str, Any]:
    return {
        "family": survey.architecture.name,
        "init": start.init,
        "modules": len(modules),
        "ranks": sorted({m.rank for m in modules}),
        "alphas": sorted({m.alpha for m in modules}),
        "scalings": sorted({float(f"{m.scaling:.6g}") for m in modules}),
        "parameters": sum(prod(ref.shape) for ref in refs),
        "bytes": sum(ref.nbytes for ref in refs),
    }


def _row(module: Trained) -> dict[str, Any]:
    one = module.module
    kind = "parameter" if one.is_parameter else module.kind
    shape = [*([one.copies] if one.copies > 1 else []), one.out, one.inputs]
    row = {"module": one.name, "kind": kind, "of": shape, "rank": module.rank, "alpha": module.alpha}
    return {**row, "parameters": prod(module.down) + prod(module.up)}


def _shares(facts: Facts) -> dict[str, float]:
    """Return what was measured of a weight, or of several, as shares of the Frobenius norm."""
    names = {"kept": "share_of_norm", "nf4": "nf4_error", "left": "loftq_error"}
    return {names[name]: sqrt(facts[name] / (facts["total"] or 1.0)) for name in names if name in facts}


# -- Starts that change the base: PiSSA, LoftQ ------------------------------------------------------------------------


def taken(adapter: Adapter, spooled: Spooled, architecture: Architecture, format: Format, where: str) -> Adapter:
    """Return what a start takes out of the base, from what its units spooled, as an adapter at `where`.

    It has the modules and scalings of `adapter`, the new one.
    """
    refs = {name: spooled(_TAKEN + name, ref.shape).renamed(name) for name, ref in adapter.tensors.items()}
    return format.read(TensorSource(where, refs, {"format": "pt"}, adapter.origin.config), (architecture,))


def _changing(
    modules: Sequence[Trained],
    adapter: Adapter,
    model: tuple[Checkpoint, Architecture],
    start: Start,
    files: Sequence[str],
) -> list[PrincipalStart]:
    """Return the units that factorise the weights of linear layers; raise, by name, where one is something else."""
    base, architecture = model
    called = CHANGING[start.init]
    if base.quantised:
        what = f"{called} starts from the weights themselves, and these are quantised"
        raise InputError(what, where=base.path, hint="begin with the model in 16 bits; or --init kaiming")
    odd = [m for m in modules if m.module.is_parameter or m.kind not in ("linear", "Conv1D") or len(m.down) > 2]
    small = [m for m in modules if m.rank > m.full_rank]
    _refuse(f"{called} is for linear layers", odd, base)
    _refuse("the rank is above the smaller side of", small, base, _lower(small) if small else "")
    weights = _weights(adapter, base, architecture, called)
    if start.init == "loftq":
        what = "LoftQ quantises weights as they lie in the file, whole and (out, in); not so lie those of"
        _refuse(what, [m for m in modules if not weights[m.name].as_stored], base)
    dtype = dtypes.from_torch_name(start.dtype)
    units = []
    for module in modules:
        weight, transposed, _ = weights[module.name]
        copies = tuple(_outs(module, file, dtype) for file in files)
        out = _spooled(_outs(module, "", "F32" if start.init == "loftq" else dtype))
        of = (module.module.name, weight, transposed, module.rank, module.scaling, start.seed, False)
        unit = (
            LoftqStart(*of, copies, start.iterations, out)
            if start.init == "loftq"
            else PrincipalStart(*of, (*copies, out))
        )
        units.append(unit if unit.scratch <= start.memory else replace(unit, streamed=True))
    return units


def _spooled(outs: tuple[Out, Out]) -> tuple[Out, Out]:
    down, up = outs
    return down._replace(name=_TAKEN + down.name), up._replace(name=_TAKEN + up.name)


def _refuse(
    what: str, modules: Sequence[Trained], base: Checkpoint, hint: str = "--exclude leaves modules out"
) -> None:
    """Raise UnsupportedError that names the modules, if there are any."""
    if modules:
        more = f" and {len(modules) - 4} more" if modules[4:] else ""
        told = ", ".join(m.module.name for m in modules[:4]) + more
        raise UnsupportedError(f"{what}: {told}", where=base.path, hint=hint)


class _Weight(NamedTuple):
    """The weight of a module, put together where the base has it in parts."""

    ref: TensorRef
    transposed: bool  # (in, out)
    as_stored: bool  # it is one whole tensor of the base, (out, in)


def _weights(adapter: Adapter, base: Checkpoint, architecture: Architecture, called: str) -> dict[str, _Weight]:
    """Return the weight of each module, by its name in the file."""
    known, config = places(base, architecture), base.config or {}
    found: dict[str, _Weight] = {}
    for target, name in adapter.origin.modules.items():
        slices = resolve(target, known, architecture, config)
        if not slices:
            raise InputError("the base has no such weight", where=str(target), hint="loratool arch check looks closer")
        if any(not dtypes.is_float(s.place.stored.dtype) for s in slices):
            raise InputError(f"{called} needs weights of floating point", where=str(target))
        if len(slices) == 1:
            place = slices[0].place
            as_stored = not place.transposed and place.ref.pieces == base.tensors[place.tensor].pieces
            found[name] = _Weight(place.ref, place.transposed, as_stored)
            continue
        parts = [s.place.ref.transposed() if s.place.transposed else s.place.ref for s in slices]
        found[name] = _Weight(assembled(parts, [s.rows or () for s in slices]), transposed=False, as_stored=False)
    return found
