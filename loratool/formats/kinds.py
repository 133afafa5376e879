"""From the tensors of one module to its delta, for the kinds beyond plain LoRA; their shapes are judged here.

The parts are named as LyCORIS and PEFT name them (hada_w1_a, lokr_w2, oft_R ...). Each function returns the delta, or
raises ValueError that says what is wrong with the parts.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool import dtypes
from loratool.deltas import Boft, Ia3, LoHa, LoKr, Oft, Vera
from loratool.tensors import TensorRef

Tensors = Mapping[str, TensorRef]


def loha(parts: Tensors, scaling: float) -> LoHa:
    """hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, and for kernels hada_t1 and hada_t2."""
    w1_a, w1_b, w2_a, w2_b = take(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    t1, t2 = parts.get("hada_t1"), parts.get("hada_t2")
    if (t1 is None) != (t2 is None):
        raise ValueError("one of hada_t1 and hada_t2 is missing")
    for a, b, core in ((w1_a, w1_b, t1), (w2_a, w2_b, t2)):
        _require_matrices(a, b)
        inner = (a.shape[0], b.shape[0]) if core is not None else (a.shape[1], b.shape[0])
        if (inner[0] != inner[1]) if core is None else (core.shape[:2] != inner or len(core.shape) < 3):
            raise ValueError(f"the factors do not fit: {shapes(parts)}")
    delta = LoHa(w1_a, w1_b, w2_a, w2_b, scaling, t1, t2)
    if delta.shape != LoHa(w2_a, w2_b, w1_a, w1_b, scaling, t2, t1).shape:
        raise ValueError(f"the two products have different shapes: {shapes(parts)}")
    return delta


def lokr(parts: Tensors, scaling: float) -> LoKr:
    """lokr_w1 or lokr_w1_a and lokr_w1_b; lokr_w2 or lokr_w2_a and lokr_w2_b; for kernels lokr_t2."""
    w1, w2 = _one_or_product(parts, "lokr_w1"), _one_or_product(parts, "lokr_w2")
    t2 = parts.get("lokr_t2")
    if t2 is not None and (len(w2) != 2 or len(t2.shape) < 3 or t2.shape[:2] != (w2[0].shape[0], w2[1].shape[0])):
        raise ValueError(f"the factors do not fit: {shapes(parts)}")
    products = [pair for pair in (w1, w2) if len(pair) == 2 and not (pair is w2 and t2 is not None)]
    if any(a.shape[1] != b.shape[0] for a, b in products) or len(w1[0].shape) != 2:
        raise ValueError(f"the factors do not fit: {shapes(parts)}")
    return LoKr(w1, w2, scaling, t2)


def vera(parts: Tensors, shared_a: TensorRef | None, shared_b: TensorRef | None) -> Vera:
    """vera_lambda_b and vera_lambda_d of a module, and the vera_A and vera_B that all modules share."""
    lambda_b, lambda_d = take(parts, "vera_lambda_b", "vera_lambda_d")
    if shared_a is None or shared_b is None:
        raise ValueError("vera_A and vera_B are not in the file: it was saved with save_projection=False")
    _require_matrices(shared_a, shared_b)
    if len(lambda_b.shape) != 1 or len(lambda_d.shape) != 1:
        raise ValueError(f"the lambdas must be vectors: {shapes(parts)}")
    rank = lambda_d.shape[0]
    if (shared_a.shape[0], shared_b.shape[1]) != (rank, rank) or shared_b.shape[0] < lambda_b.shape[0]:
        raise ValueError(f"the shared matrices do not fit: {shapes(parts)}")
    return Vera(lambda_b, lambda_d, shared_a, shared_b)


def oft(parts: Tensors, *, size: int, terms: int, shared: bool) -> Oft:
    """oft_R, (blocks, size (size - 1) / 2)."""
    (blocks,) = take(parts, "oft_R")
    if len(blocks.shape) != 2 or blocks.shape[1] != size * (size - 1) // 2 or (shared and blocks.shape[0] != 1):
        raise ValueError(f"{list(blocks.shape)} are no triangles of blocks of size {size}")
    return Oft(blocks, size, terms, shared)


def boft(parts: Tensors) -> Boft:
    """boft_R (factors, blocks, size, size) and boft_s (out, 1)."""
    blocks_of, scale = take(parts, "boft_R", "boft_s")
    if len(blocks_of.shape) != 4 or blocks_of.shape[2] != blocks_of.shape[3]:
        raise ValueError(f"boft_R must be (factors, blocks, size, size): {shapes(parts)}")
    factors, blocks, size = blocks_of.shape[:3]
    if factors > 1 and (size % 2 or blocks % (1 << (factors - 1))):
        raise ValueError(f"{blocks} blocks of size {size} have no {factors} butterfly factors")
    return Boft(blocks_of, scale)


def ia3(parts: Tensors, *, of_inputs: bool) -> Ia3:
    """ia3_l, with one entry for each output or each input."""
    (factors,) = take(parts, "ia3_l")
    if sum(n > 1 for n in factors.shape) > 1:
        raise ValueError(f"ia3_l must be a vector: {shapes(parts)}")
    return Ia3(factors, of_inputs)


def _one_or_product(parts: Tensors, name: str) -> tuple[TensorRef, ...]:
    whole = parts.get(name)
    if whole is not None:
        if f"{name}_a" in parts or f"{name}_b" in parts:
            raise ValueError(f"{name} is there whole and as a product")
        if len(whole.shape) < 2:
            raise ValueError(f"the factors do not fit: {shapes(parts)}")
        return (whole,)
    product = tuple(take(parts, f"{name}_a", f"{name}_b"))
    _require_matrices(*product)
    return product


def take(parts: Tensors, *names: str) -> list[TensorRef]:
    """Return some parts; ValueError says which are missing, or no floating-point numbers of 16 bits or more."""
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    found = [parts[name] for name in names]
    for name, ref in zip(names, found, strict=True):
        if not dtypes.is_float(ref.dtype) or 0 in ref.shape or not ref.shape:
            raise ValueError(f"{name} is {ref.dtype} {list(ref.shape)}")
    return found


def _require_matrices(*refs: TensorRef) -> None:
    if any(len(ref.shape) != 2 for ref in refs):
        raise ValueError(f"matrices are wanted: {', '.join(str(list(ref.shape)) for ref in refs)}")


def shapes(parts: Tensors) -> str:
    """Name parts and their shapes, for messages."""
    return ", ".join(f"{name} {list(ref.shape)}" for name, ref in parts.items())
