"""Modules of kohya and LyCORIS files: their tensors by part, and in fp64 the formula that their trainer applies.

Sources of the formulas: LyCORIS, lycoris/modules/*.py; sd-scripts, networks/lora.py and networks/oft.py. Each maker
returns (parts, alpha, W -> W').
"""

from math import prod

import torch

from loratool import dtypes
from loratool.deltas import Term
from loratool.operations import panels
from loratool.plan import Out
from loratool.storage.load import Loader, as_bytes
from loratool.tensors import Inline, TensorRef

OUT, IN, RANK = 144, 12, 4
LAYERS = {
    "linear": (OUT, IN),
    "1x1": (OUT, IN, 1, 1),
    "3x3": (OUT, IN, 3, 3),
    "1x3": (OUT, IN, 1, 3),
    "3d": (OUT, IN, 2, 1, 3),
}


def ref(name, tensor):
    """A tensor whose bytes are in the reference."""
    dtype = dtypes.from_torch_name(str(tensor.dtype).removeprefix("torch."))
    return TensorRef(name, tuple(tensor.shape), dtype, (Inline(bytes(as_bytes(tensor.detach()))),))


def refs(tensors):
    return {name: ref(name, tensor) for name, tensor in tensors.items()}


def random(*shape, seed=0, size=0.5):
    generator = torch.Generator().manual_seed(seed + 100 * len(shape) + sum(shape))
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def merge(base, *deltas, transposed=False, strength=1.0):
    """What the merge makes of a stored weight, panel by panel and tile by tile."""
    weight = ref("base", base)
    out = Out("", "base", weight.shape, "F64")
    terms = tuple(Term(delta, strength) for delta in deltas)
    merged = torch.full_like(base, torch.nan)

    def emit(_, row, tile):
        merged[row : row + len(tile)] = tile.reshape(len(tile), *base.shape[1:])

    with Loader() as load:
        for start, stop in panels.panels_of(weight, terms, transposed=transposed):
            panels.MergePanel(weight, out, terms, transposed, 0, start, stop).run(load, emit)
    return merged


def kernel_of(layer):
    return LAYERS[layer][2:]


# ---- parts of modules, and the formulas that the trainers apply to them: each returns (parts, alpha, W -> W')


def lora(layer, alpha=6.0):
    k = kernel_of(layer)
    down, up = random(RANK, IN, *k), random(OUT, RANK, *(1 for _ in k))
    scale = (alpha or RANK) / RANK
    change = scale * (up.flatten(1) @ down.flatten(1))
    return {"lora_down": down, "lora_up": up}, alpha, lambda base: base + change.view(base.shape)


def lora_tucker(layer, alpha=6.0):
    k = kernel_of(layer)
    ones = [1 for _ in k]
    down, up, mid = random(RANK, IN, *ones), random(OUT, RANK, *ones), random(RANK, RANK, *k)
    change = torch.einsum("mn...,om,ni->oi...", mid, up.flatten(1), down.flatten(1)) * alpha / RANK
    return {"lora_down": down, "lora_up": up, "lora_mid": mid}, alpha, lambda base: base + change


def loha(layer, alpha=3.0):
    k = prod(kernel_of(layer))
    a1, b1, a2, b2 = (random(*s, seed=n) for n, s in enumerate([(OUT, RANK), (RANK, IN * k)] * 2))
    change = (a1 @ b1) * (a2 @ b2) * alpha / RANK
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return parts, alpha, lambda base: base + change.view(base.shape)


def loha_tucker(layer, alpha=3.0):
    k = kernel_of(layer)
    shapes = [(RANK, OUT), (RANK, IN), (RANK, RANK, *k)] * 2
    a1, b1, t1, a2, b2, t2 = (random(*s, seed=n) for n, s in enumerate(shapes))
    one, two = (torch.einsum("rs...,ro,si->oi...", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2}
    return parts, alpha, lambda base: base + one * two * alpha / RANK


def _kron(w1, w2, shape):
    """Entry (a out2 + b, c in2 + d, k) is w1[a, c] w2[b, d, k]."""
    return torch.einsum("ac,bdk->abcdk", w1, w2.reshape(*w2.shape[:2], -1)).reshape(shape)


def lokr(layer, alpha=3.0, first="whole", second="product"):
    k, shape = kernel_of(layer), LAYERS[layer]
    (o1, i1), (o2, i2) = (9, 3), (OUT // 9, IN // 3)
    parts = {"lokr_w1": random(o1, i1)}
    if first == "product":
        parts = {"lokr_w1_a": random(o1, 2), "lokr_w1_b": random(2, i1)}
    w1 = parts.get("lokr_w1") if first == "whole" else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    rank = 2 if first == "product" else 0
    if second == "whole":
        w2 = parts["lokr_w2"] = random(o2, i2, *k)
    elif second == "tucker":
        rank, a, b, t = 3, random(3, o2), random(3, i2), random(3, 3, *k)
        w2 = torch.einsum("rs...,ro,si->oi...", t, a, b)
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    else:
        rank, a, b = 3, random(o2, 3), random(3, i2 * prod(k))
        w2 = (a @ b).view(o2, i2, -1)
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b}
    scale = alpha / rank if rank else 1
    return parts, alpha, lambda base: base + scale * _kron(w1, w2, shape)


def dora(layer, of_inputs=False, inner=lora):
    parts, alpha, moved = inner(layer)
    shape = [IN if of_inputs and n == 1 else OUT if not of_inputs and n == 0 else 1 for n in range(len(LAYERS[layer]))]
    magnitude = random(*shape).abs() + 0.5
    others = [n for n in range(len(shape)) if n != (1 if of_inputs else 0)]

    def formula(base):
        whole = moved(base)
        return whole * magnitude / whole.square().sum(dim=others, keepdim=True).sqrt()

    return {**parts, "dora_scale": magnitude}, alpha, formula


def oft(layer, alpha=0.0, rescaled=False, factors=0, tool="lycoris"):
    size = 8
    count = OUT // size if not factors else 16
    out = count * size
    blocks = random(*((factors,) if factors else ()), count, size, size, size=0.2)
    parts = {"oft_blocks": blocks}
    Q = blocks - blocks.mT
    limit = alpha * out
    if (alpha > 0 or tool == "sd-scripts") and Q.norm() > limit:
        Q = Q * limit / (Q.norm() + 1e-8)
    R = (torch.eye(size) + Q) @ torch.linalg.inv(torch.eye(size) - Q)
    scale = 1
    if rescaled:
        scale = parts["rescale"] = random(out, *(1 for _ in LAYERS[layer][1:])) + 1

    def formula(base):
        X = base.flatten(1)
        if not factors:
            X = torch.einsum("knm,knc->kmc", R, X.view(count, size, -1)).reshape(X.shape)
        for n in range(factors):
            group = 2**n * size // 2
            places = [
                (2 * block + half) * group + j
                for block in range(out // group // 2)
                for j in range(group)
                for half in (0, 1)
            ]
            X[places] = torch.einsum("bij,bjc->bic", R[n], X[places].view(count, size, -1)).reshape(X.shape)
        return X.reshape(base.shape) * scale

    return parts, alpha, lambda base: formula(base.clone())


def glora(layer, alpha=3.0, old=False):
    k = kernel_of(layer)
    ones = [1 for _ in k]
    a1, a2 = random(IN, RANK, *ones), random(RANK, IN, *ones)
    b1, b2 = random(OUT, RANK, *ones), random(RANK, IN, *k)
    through = (a1.flatten(1) @ a2.flatten(1)) * alpha / RANK  # (in, in)
    change = (b1.flatten(1) @ b2.flatten(1)) * alpha / RANK
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    parts = dict(zip(names, (a1, a2, b1, b2), strict=True))
    return parts, alpha, lambda base: base + torch.einsum("oi...,ij->oj...", base, through) + change.view(base.shape)


def ia3(layer, on_input):
    n, axis = (IN, 1) if on_input else (OUT, 0)
    k = kernel_of(layer)
    factors = random(1, n, *(1 for _ in k)) if k else random(n)
    shape = [n if d == axis else 1 for d in range(len(LAYERS[layer]))]
    return (
        {"weight": factors, "on_input": torch.tensor(int(on_input))},
        None,
        lambda base: base * (1 + factors.view(shape)),
    )


def full(layer):
    value = random(*LAYERS[layer])
    return {"diff": value}, None, lambda base: base + value


CASES = {
    "lora": lora,
    "lora without alpha": lambda layer: lora(layer, None),
    "lora with alpha 0": lambda layer: lora(layer, 0.0),
    "lora with a negative alpha": lambda layer: lora(layer, -2.0),
    "loha": loha,
    "lokr": lokr,
    "lokr of products": lambda layer: lokr(layer, first="product"),
    "lokr of a product first": lambda layer: lokr(layer, first="product", second="whole"),
    "lokr whole": lambda layer: lokr(layer, second="whole"),
    "dora": dora,
    "dora of inputs": lambda layer: dora(layer, True),
    "dora around loha": lambda layer: dora(layer, False, loha),
    "dora of inputs around loha": lambda layer: dora(layer, True, loha),
    "dora of inputs around lokr": lambda layer: dora(layer, True, lokr),
    "oft": oft,
    "oft limited": lambda layer: oft(layer, 0.002),
    "oft within its limit": lambda layer: oft(layer, 1.0),
    "oft rescaled": lambda layer: oft(layer, rescaled=True),
    "glora": glora,
    "old glora": lambda layer: glora(layer, old=True),
    "ia3 of outputs": lambda layer: ia3(layer, False),
    "ia3 of inputs": lambda layer: ia3(layer, True),
    "full": full,
}
TUCKER = {
    "lora": lora_tucker,
    "loha": loha_tucker,
    "lokr": lambda layer: lokr(layer, second="tucker"),
    "lokr of products": lambda layer: lokr(layer, first="product", second="tucker"),
    "dora of inputs": lambda layer: dora(layer, True, lora_tucker),
}


def close(got, wanted, tolerance=1e-11):
    effect = float((wanted - wanted.mean()).abs().max())
    assert float((got - wanted).abs().max()) <= tolerance * max(effect, 1.0)
