"""The modules of kohya and LyCORIS files, whatever they are called: from the tensors of one module to its deltas, back.

Parts are named by what follows the module's name, less a final `.weight`: lora_down, hada_w1_a, lokr_t2, dora_scale ...
Sources: LyCORIS 3.4 and 4.1, lycoris/modules/*.py; sd-scripts, networks/lora.py and networks/oft.py. Strengths are
those of the trainers' forward passes: get_diff_weight of LyCORIS' LoHa and LoKr, which merges, has the scale twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite, prod, sqrt
from typing import NamedTuple

from loratool import dtypes
from loratool.deltas import Delta, Dora, Full, Glora, Ia3, LoHa, LoKr, LowRank, OutputOft, Replace, Sparse
from loratool.formats import kinds
from loratool.formats.kinds import Tensors, shapes, take
from loratool.formats.naming import shape_problem
from loratool.tensors import Inline, TensorRef

_ALGORITHMS = {
    "LoRA": ("lora_down", "lora_up", "lora_mid"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "OFT": ("oft_blocks", "rescale"),
    "GLoRA": ("a1", "a2", "b1", "b2", "bm"),
    "IA3": ("weight", "on_input"),
    "a full difference": ("diff",),
    "a norm's difference": ("w_norm",),
    "a new weight": ("set_weight",),
}
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
_SPARSE = ("bias_indices", "bias_values", "bias_size")
_BIASES = ("diff_b", "b_norm", "lora_B.bias")

#: The parts that `read` knows.
PARTS = frozenset((*(part for of in _ALGORITHMS.values() for part in of), *_MAGNITUDES, *_SPARSE, *_BIASES))


class Module(NamedTuple):
    """What the tensors of one module say.

    `weight`: the delta of its weight; `bias`: that of its bias, a target of its own. `remainder`: a second delta of the
    weight, to be added to the first. `consumed`: the parts that were read for their value, and are in no delta.
    """

    weight: Delta | None
    bias: Full | None
    remainder: Sparse | None = None
    consumed: tuple[str, ...] = ()


def read(parts: Tensors, alpha: float | None, *, sd_scripts: bool = False, rs_lora: bool = False) -> Module:
    """Return the deltas of one module, or raise ValueError that says what is wrong with its parts.

    An `alpha` that is absent or 0 is the rank. What a file means by `oft_blocks` depends on its tool: `sd_scripts` (its
    prefix is oft_unet) or LyCORIS. `rs_lora`: LyCORIS trained with that argument (ss_network_args), which is in the
    alphas of all algorithms but GLoRA's.
    """
    unknown = sorted(set(parts) - PARTS)
    if unknown:
        raise ValueError(f"{' and '.join(unknown)}: no kind of update that loratool knows has such a tensor")
    if alpha is not None and not isfinite(alpha):
        raise ValueError(f"alpha is {alpha}: it must be a number")
    found = [name for name, of in _ALGORITHMS.items() if any(part in parts for part in of)]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} in one module")
    algorithm = found[0] if found else ""
    delta = _delta(algorithm, parts, alpha, sd_scripts=sd_scripts, rs_lora=rs_lora) if algorithm else None
    magnitude = [part for part in _MAGNITUDES if part in parts]
    if magnitude:
        delta = _dora(delta, magnitude, parts)
    remainder, bias = _sparse(delta, parts), _bias(delta, parts)
    if delta is None and bias is None:
        raise ValueError("an alpha without factors" if alpha is not None else "no tensors")
    return Module(delta, bias, remainder, ("on_input",) if algorithm == "IA3" else ())


def _delta(algorithm: str, parts: Tensors, alpha: float | None, *, sd_scripts: bool, rs_lora: bool) -> Delta:
    """Return what one algorithm makes of its parts."""
    mine = {name: parts[name] for name in _ALGORITHMS[algorithm] if name in parts}
    match algorithm:
        case "LoRA":
            return _lora(mine, alpha)
        case "LoHa":
            ranks = {ref.shape[0] for name, ref in mine.items() if name.endswith("_b") and ref.shape}
            if len(ranks) > 1:
                raise ValueError(f"the factors have different ranks: {shapes(mine)}")
            loha = kinds.loha(mine, 1.0)
            return replace(loha, scaling=_scaling(alpha, loha.rank))
        case "LoKr":
            lokr = kinds.lokr(mine, 1.0)
            return replace(lokr, scaling=_scaling(alpha, lokr.dim) if lokr.dim else 1.0)
        case "OFT":
            return _oft(mine, alpha, sd_scripts=sd_scripts)
        case "GLoRA":
            return _glora(mine, alpha, rs_lora=rs_lora)
        case "IA3":
            return _ia3(mine)
    (value,) = take(mine, *mine)
    return Replace(value) if algorithm == "a new weight" else Full(value)


def _scaling(alpha: float | None, rank: int) -> float:
    return alpha / rank if alpha else 1.0


def _lora(parts: Tensors, alpha: float | None) -> LowRank:
    """lora_down (rank, in, *kernel) and lora_up (out, rank, 1, ...); or both 1x1 and lora_mid (rank, rank, *kernel)."""
    missing = [name for name in ("lora_down", "lora_up") if name not in parts]
    if missing:
        raise ValueError(f"half a pair: {' and '.join(missing)} is missing")
    down, up, mid = parts["lora_down"], parts["lora_up"], parts.get("lora_mid")
    problem = shape_problem(down, up)
    if problem:
        raise ValueError(problem)
    rank = down.shape[0]
    if mid is not None:
        take(parts, "lora_mid")
        of_kernel = len(mid.shape) == len(down.shape) > 2 and all(n == 1 for n in down.shape[2:])
        if mid.shape[:2] != (rank, rank) or not of_kernel:
            raise ValueError(f"the core does not fit its factors: {shapes(parts)}")
    return LowRank(down, up, _scaling(alpha, rank), mid)


def _oft(parts: Tensors, alpha: float | None, *, sd_scripts: bool) -> OutputOft:
    """oft_blocks (n, size, size), or (factors, n, size, size), and rescale (out, 1, ...); alpha limits the rotation."""
    (blocks,) = take(parts, "oft_blocks")
    (rescale,) = take(parts, "rescale") if "rescale" in parts else (None,)
    if len(blocks.shape) not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or blocks.shape[-1] < 2:
        raise ValueError(f"oft_blocks must be square matrices: {shapes(parts)}")
    if sd_scripts:
        if alpha is None:
            raise ValueError("alpha is missing, which limits the rotation")
        if len(blocks.shape) == 4 or rescale is not None:
            raise ValueError(f"sd-scripts has no such OFT: {shapes(parts)}")
    delta = OutputOft(blocks, alpha if sd_scripts or (alpha or 0) > 0 else None, rescale)
    if rescale is not None and not (rescale.shape[0] == prod(rescale.shape) == delta.shape[0]):
        raise ValueError(f"rescale has not one entry for each output: {shapes(parts)}")
    if delta.is_butterfly:
        factors, count, size = blocks.shape[:3]
        if size % 2 or factors > 64 or count % (1 << (factors - 1)):
            raise ValueError(f"{count} blocks of size {size} have no {factors} butterfly factors")
    return delta


def _glora(parts: Tensors, alpha: float | None, *, rs_lora: bool) -> Glora:
    """a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in, *kernel), bm.

    LyCORIS 1.8 had 1 and 2 the other way round.
    """
    a1, a2, b1, b2 = take(parts, "a1", "a2", "b1", "b2")
    bm = parts.get("bm")
    if bm is None and not _is_glora(a1, a2, b1, b2):
        a1, a2, b1, b2 = a2, a1, b2, b1
    if not _is_glora(a1, a2, b1, b2):
        raise ValueError(f"the factors do not fit: {shapes(parts)}")
    core = {} if bm is None else {"lora_mid": bm}
    b = _lora({"lora_down": b2, "lora_up": b1, **core}, alpha)
    return Glora(a1, a2, replace(b, scaling=b.scaling * sqrt(b.rank)) if rs_lora else b)


def _is_glora(a1: TensorRef, a2: TensorRef, b1: TensorRef, b2: TensorRef) -> bool:
    if any(len(ref.shape) < 2 or len(ref.shape) != len(a1.shape) for ref in (a1, a2, b1, b2)):
        return False
    rank, inputs = b2.shape[:2]
    one_by_one = all(n == 1 for ref in (a1, a2) for n in ref.shape[2:])
    return one_by_one and a1.shape[:2] == (inputs, rank) and a2.shape[:2] == (rank, inputs) and b1.shape[1] == rank


def _ia3(parts: Tensors) -> Ia3:
    """The `weight` (n,) or (1, n, 1, ...), and on_input, which says whether n is the inputs."""
    (factors,) = take(parts, "weight")
    if "on_input" not in parts:
        raise ValueError("on_input is missing, without which `weight` means nothing")
    if sum(n > 1 for n in factors.shape) > 1:
        raise ValueError(f"weight must be a vector: {shapes(parts)}")
    return Ia3(factors, of_inputs=bool(_number(parts["on_input"])), less_one=True)


def _number(ref: TensorRef) -> float:
    """The number in a one-element tensor, whose bytes storage has put into the reference."""
    data = b"".join(piece.data for piece in ref.pieces if isinstance(piece, Inline))
    if prod(ref.shape) != 1 or len(data) != ref.nbytes:
        raise ValueError(f"{ref.name} must be one number, it is {ref.dtype} {list(ref.shape)}")
    return dtypes.decode_scalar(ref.dtype, data)


def _dora(inner: Delta | None, names: list[str], parts: Tensors) -> Dora:
    """Return DoRA around a delta: dora_scale (out, 1, ...) or (1, in, 1, ...), PEFT's vector has an entry an output."""
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} in one module")
    if not isinstance(inner, (LowRank, LoHa, LoKr)):
        raise ValueError(f"{names[0]} beside {inner.kind if inner else 'no factors'}: no trainer has that")
    (magnitude,) = take(parts, names[0])
    of_inputs = names[0] == "dora_scale" and _is_of_inputs(magnitude.shape, inner.shape)
    entries = prod(magnitude.shape)
    if not of_inputs and (entries != inner.shape[0] or sum(n > 1 for n in magnitude.shape) > 1):
        raise ValueError(f"{names[0]} is {list(magnitude.shape)}, the update is {list(inner.shape)}")
    return Dora(inner, replace(magnitude, shape=(entries,)), of_inputs, len(magnitude.shape))


def _is_of_inputs(magnitude: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether magnitudes (1, n, 1, ...) are those of inputs. (1, 1) is of the one output, if there is but one."""
    if len(magnitude) < 2 or magnitude[0] != 1 or prod(magnitude) != magnitude[1]:
        return False
    if prod(magnitude) == 1 == weight[0]:
        return False
    hidden = len(weight) == 2 < len(magnitude)  # LoHa and LoKr have the kernel in one with the inputs
    return weight[1] % magnitude[1] == 0 if hidden else weight[1] == magnitude[1]


def _sparse(delta: Delta | None, parts: Tensors) -> Sparse | None:
    """bias_indices (2, n), bias_values (n,), bias_size (2,): entries of the weight's update that the factors lack."""
    present = [name for name in _SPARSE if name in parts]
    if not present:
        return None
    if len(present) < len(_SPARSE) or not isinstance(delta, LowRank):
        lacking = "plain factors" if len(present) == len(_SPARSE) else "the rest of the three"
        raise ValueError(f"{' and '.join(present)} without {lacking}")
    indices, values, size = (parts[name] for name in _SPARSE)
    integers = all(ref.dtype in ("I16", "I32", "I64") for ref in (indices, size))
    if not integers or indices.shape != (2, *values.shape) or len(values.shape) != 1 or size.shape != (2,):
        raise ValueError(f"the sparse remainder does not fit: {shapes({name: parts[name] for name in _SPARSE})}")
    if not dtypes.is_float(values.dtype):
        raise ValueError(f"bias_values is {values.dtype} {list(values.shape)}")
    return Sparse(indices, values, size, delta.scaling, delta.shape)


def _bias(delta: Delta | None, parts: Tensors) -> Full | None:
    """Return the difference of the bias: diff_b, b_norm, or the bias of lora_B, which the scaling multiplies."""
    names = [name for name in _BIASES if name in parts]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} in one module")
    (value,) = take(parts, names[0])
    outputs = delta.shape[0] if delta is not None else 0
    if len(value.shape) != 1 or (outputs and value.shape[0] != outputs):
        told = f", the layer has {outputs} outputs" if outputs else ""
        raise ValueError(f"{names[0]} is {list(value.shape)}{told}")
    if names[0] != "lora_B.bias":
        return Full(value)
    inner = delta.inner if isinstance(delta, Dora) else delta
    if not isinstance(inner, LowRank):
        raise ValueError("lora_B.bias without the factors that it belongs to")
    return Full(value, inner.scaling)


# ---- back


class Spelled(NamedTuple):
    """The tensors of a module by part, their bytes untouched, and its alpha (None: such modules have none)."""

    tensors: Mapping[str, TensorRef]
    alpha: float | None = None


def parts_of(delta: Delta, *, bias: bool = False, norm: bool = False) -> Spelled | None:
    """Return the parts that say what a delta says, or None where no such parts do without arithmetic.

    `bias`: it is the delta of a bias; `norm`: of a norm.
    """
    match delta:
        case Replace():
            return None if bias else Spelled({"set_weight": delta.value})
        case Full():
            name = ("b_norm" if norm else "diff_b") if bias else ("w_norm" if norm else "diff")
            return Spelled({name: delta.value}) if delta.scaling == 1 else None
        case Dora():
            inner = parts_of(delta.inner)
            return inner and inner._replace(tensors={**inner.tensors, "dora_scale": _spread(delta)})
        case LowRank():
            return _factors_of(delta)
        case LoHa():
            cores = {"hada_t1": delta.t1, "hada_t2": delta.t2}
            factors = {
                "hada_w1_a": delta.w1_a,
                "hada_w1_b": delta.w1_b,
                "hada_w2_a": delta.w2_a,
                "hada_w2_b": delta.w2_b,
            }
            return Spelled({**factors, **{name: ref for name, ref in cores.items() if ref is not None}}, delta.alpha)
        case LoKr():
            return _kronecker_of(delta)
        case OutputOft():
            rescale = {} if delta.rescale is None else {"rescale": delta.rescale}
            return Spelled({"oft_blocks": delta.blocks, **rescale}, delta.alpha or 0.0)
        case Glora():
            core = {} if delta.b.mid is None else {"bm": delta.b.mid}
            factors = {"a1": delta.a1, "a2": delta.a2, "b1": delta.b.up, "b2": delta.b.down}
            return Spelled({**factors, **core}, delta.alpha)
        case Ia3() if delta.less_one:
            on_input = TensorRef("on_input", (), "I64", (Inline(int(delta.of_inputs).to_bytes(8, "little")),))
            return Spelled({"weight": delta.factors, "on_input": on_input})
        case Sparse():
            return Spelled(dict(zip(_SPARSE, delta.refs, strict=True)))
    return None


def _factors_of(delta: LowRank) -> Spelled | None:
    if delta.mid is not None and not delta.has_core:
        return None  # AdaLoRA's diagonal
    core = {} if delta.mid is None else {"lora_mid": delta.mid}
    return Spelled({"lora_down": delta.down, "lora_up": delta.up, **core}, delta.alpha)


def _kronecker_of(delta: LoKr) -> Spelled | None:
    if delta.on_last or (not delta.dim and delta.scaling != 1):
        return None  # where both are whole, readers ignore alpha
    parts: dict[str, TensorRef] = {}
    for name, refs in (("lokr_w1", delta.w1), ("lokr_w2", delta.w2)):
        names = (name,) if len(refs) == 1 else (f"{name}_a", f"{name}_b")
        parts |= dict(zip(names, refs, strict=True))
    if delta.t2 is not None:
        parts["lokr_t2"] = delta.t2
    return Spelled(parts, delta.alpha)


def _spread(delta: Dora) -> TensorRef:
    """Return the magnitude as LyCORIS has it: (out, 1, ...) or (1, in, 1, ...)."""
    entries = prod(delta.magnitude.shape)
    dims = max(delta.dims, len(delta.inner.shape))
    shape = (1, entries, *(1,) * (dims - 2)) if delta.of_inputs else (entries, *(1,) * (dims - 1))
    return replace(delta.magnitude, shape=shape)
