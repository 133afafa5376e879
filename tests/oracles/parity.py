"""What the parity tests share: plain torch models, PEFT adapters whose every tensor matters, and the comparison.

The oracle is PEFT's own merge, done in fp64 on a copy of the live model. Base and adapter are fp32, so what loratool
writes must be that value rounded once.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.engine import Resources

ALONE = Resources(workers=1)
State = dict[str, torch.Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Parameter(nn.Module):
    """A layer of no class that PEFT knows, its weight (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def _then_linear(inputs: int, **layer: nn.Module) -> nn.Module:
    return _chain(**layer, flat=nn.Flatten(), lin0=nn.Linear(inputs, 3))


def _chain(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


MODELS = {
    "mlp": lambda: _chain(lin0=nn.Linear(10, 20), act=nn.ReLU(), lin1=nn.Linear(20, 6)),
    "wide": lambda: _chain(lin0=nn.Linear(10, 32), act=nn.ReLU(), lin1=nn.Linear(32, 6)),
    "embedding": lambda: _then_linear(14, emb=nn.Embedding(30, 5), conv1d=Conv1D(7, 5), act=nn.ReLU()),
    "conv1d": lambda: _then_linear(64, conv1d=nn.Conv1d(6, 8, 3)),
    "conv1d-1": lambda: _then_linear(80, conv1d=nn.Conv1d(6, 8, 1)),
    "conv1d-wide": lambda: _then_linear(64, conv1d=nn.Conv1d(64, 16, 2)),
    "conv1d-groups": lambda: _then_linear(48, conv1d=nn.Conv1d(8, 6, 3, groups=2)),
    "conv2d": lambda: _then_linear(40, conv2d=nn.Conv2d(5, 10, 3)),
    "conv2d-patch": lambda: _then_linear(10, conv2d=nn.Conv2d(5, 10, 3)),
    "conv2d-1": lambda: _then_linear(160, conv2d=nn.Conv2d(5, 10, 1)),
    "conv2d-wide": lambda: _then_linear(128, conv2d=nn.Conv2d(8, 32, 3)),
    "conv2d-groups": lambda: _then_linear(128, conv2d=nn.Conv2d(16, 32, 3, groups=2)),
    "conv3d": lambda: _then_linear(80, conv3d=nn.Conv3d(5, 10, (3, 2, 2))),
    "conv3d-1": lambda: _then_linear(120, conv3d=nn.Conv3d(5, 10, (1, 1, 2))),
    "attention": Attention,
    "parameters": lambda: _chain(lin0=Parameter(10, 20), act=nn.ReLU(), lin1=Parameter(20, 6)),
}
INPUTS = {
    "mlp": (4, 10), "wide": (4, 10), "conv1d": (2, 6, 10), "conv1d-1": (2, 6, 10), "conv1d-wide": (2, 64, 5),
    "conv1d-groups": (2, 8, 10), "conv2d": (2, 5, 4, 4), "conv2d-1": (2, 5, 4, 4), "conv2d-patch": (2, 5, 3, 3),
    "conv2d-wide": (2, 8, 4, 4),
    "conv2d-groups": (2, 16, 4, 4), "conv3d": (2, 5, 4, 3, 3), "conv3d-1": (2, 5, 3, 2, 3), "attention": (4, 3, 10),
    "parameters": (4, 10),
}  # fmt: skip


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def inputs(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "embedding":
        return torch.randint(0, 30, (4, 2), generator=generator)
    return torch.randn(INPUTS[kind], generator=generator, dtype=torch.float64)


def adapted(model: nn.Module, config: Any, seed: int = 1, size: float = 0.1) -> Any:
    """A PeftModel on `model`, all of whose trained tensors have moved."""
    with quiet():
        live = peft.get_peft_model(model, config).eval()
    return stirred(live, seed, size)


def stirred(live: Any, seed: int = 1, size: float = 0.1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # which is no part of what is trained or saved
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return live


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that is meant here: fan_in_fan_out, saved embeddings, adjusted block sizes, ties."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_plain(model: nn.Module, folder: Path) -> Path:
    """A checkpoint without a config: no family knows it."""
    folder.mkdir()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def save_adapter(live: Any, folder: Path, **changes: Any) -> Path:
    """What PEFT saves; `changes` are made to its config."""
    with quiet():
        live.save_pretrained(folder)
    if changes:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def merged_by_peft(live: Any) -> State:
    """PEFT's merge, in fp64."""
    with quiet():
        return copy.deepcopy(live).double().merge_and_unload().state_dict()


def merge(base: Path, adapters: Any, out: Path, **options: Any) -> State:
    """Loratool's merge of a checkpoint of one file."""
    loratool.merge(base, adapters, out, resources=ALONE, **options)
    return load_file(out / "model.safetensors")


def half_ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    digits, least = {torch.float32: (24, -125), torch.bfloat16: (8, -125), torch.float16: (11, -13)}[dtype]
    _, exponent = torch.frexp(exact)
    return torch.ldexp(torch.ones_like(exact), exponent.clamp(min=least) - digits) / 2


def assert_rounded_once(got: State, exact: State, dtype: torch.dtype = torch.float32, noise: float = 1e-13) -> None:
    """Every tensor is the exact one rounded to `dtype`; `noise` is what the arithmetic may be off, relatively."""
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert got[name].dtype == dtype, name
        wanted = value.detach().double()
        error = (got[name].double() - wanted).abs()
        slack = noise * (float(wanted.abs().max()) if wanted.numel() else 0.0)
        if dtype is not torch.float32:  # torch goes from fp64 to 16 bits by way of fp32
            slack = slack + half_ulp(wanted, torch.float32)
        assert bool((error <= half_ulp(wanted, dtype) + slack).all()), (name, float(error.max()))


def changed(before: State, after: State) -> set[str]:
    return {n for n, t in before.items() if not torch.equal(t.double(), after[n].double())}


def assert_merges_alike(base: Path, adapters: Any, exact: State, place: Path, **options: Any) -> State:
    """Merge in fp64 and in fp32; return the first."""
    got = merge(base, adapters, place / "fp64", compute_dtype="float64", **options)
    assert_rounded_once(got, exact)
    assert_rounded_once(merge(base, adapters, place / "fp32", **options), exact, noise=2**-21)
    return got
