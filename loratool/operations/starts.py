"""What the factors of a new adapter are: random on one side and zero on the other, or the principal part of the weight.

PEFT's defaults (peft/tuners/lora/layer.py, reset_lora_parameters, 0.21.2): down is uniform in +-1/sqrt(fan in), which
is kaiming_uniform(a=sqrt(5)), or normal with a standard deviation of 1/rank, and up zero; of embeddings down is zero
and up normal. PiSSA (Meng et al. 2024, arXiv 2404.02948): scaling * up @ down is the truncated SVD of the weight
itself, the roots of the singular values in both factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING

from loratool import dtypes
from loratool.errors import InputError
from loratool.operations.panels import TILE
from loratool.operations.trainable import Trained
from loratool.plan import Emit, Facts, Load, Out, seed_of
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratool.algebra import svd

_PANEL = 64 << 20


@dataclass(frozen=True)
class RandomStart:
    """The factors of a module: `zero`, and `random`, uniform in +-`width` or normal with that standard deviation."""

    module: str
    random: Out
    zero: Out
    uniform: bool
    width: float
    seed: int
    reads: tuple[TensorRef, ...] = ()

    @property
    def key(self) -> str:
        """The module."""
        return self.module

    @property
    def outs(self) -> tuple[Out, ...]:
        """Both factors."""
        return self.random, self.zero

    @property
    def scratch(self) -> int:
        """Two tiles in fp32, and in the output's dtype."""
        return 16 * max(TILE, *(64 * prod(out.shape[1:]) for out in self.outs))

    def run(self, load: Load, emit: Emit) -> Facts:
        """Draw and write, tile by tile; the numbers depend on the seed and the module's name alone."""
        import torch

        generator = torch.Generator().manual_seed(seed_of(self.seed, self.module))
        for out in self.outs:
            dtype = getattr(torch, dtypes.torch_name(out.dtype))
            for start, stop in TensorRef("", out.shape, "F32").panels(TILE):
                tile = torch.zeros(stop - start, *out.shape[1:])
                if out is self.random and self.uniform:
                    tile.uniform_(-self.width, self.width, generator=generator)
                elif out is self.random:
                    tile.normal_(0.0, self.width, generator=generator)
                emit(out, start, tile.to(dtype))
        return {}


def random_start(module: Trained, outs: tuple[Out, Out], init: str, seed: int) -> RandomStart:
    """Return the factors of a module as PEFT begins with them: `init` is "kaiming" or "gaussian"."""
    down, up = outs
    if module.is_embedding:
        return RandomStart(module.module.name, up, down, uniform=False, width=1.0, seed=seed)
    if init == "gaussian":
        return RandomStart(module.module.name, down, up, uniform=False, width=1 / module.rank, seed=seed)
    width = 1 / sqrt(prod(module.down[1:]))
    return RandomStart(module.module.name, down, up, uniform=True, width=width, seed=seed)


@dataclass(frozen=True)
class PrincipalStart:
    """The `rank` leading singular triplets of a weight (out, in), the scaling divided out; in several copies."""

    module: str
    weight: TensorRef
    transposed: bool
    rank: int
    scaling: float
    seed: int
    streamed: bool
    copies: tuple[tuple[Out, Out], ...]

    @property
    def key(self) -> str:
        """The module."""
        return self.module

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The weight."""
        return (self.weight,)

    @property
    def outs(self) -> tuple[Out, ...]:
        """Down and up of each copy."""
        return tuple(out for pair in self.copies for out in pair)

    @property
    def scratch(self) -> int:
        """The weight in fp32 (or one panel of it), the blocks, and a Gram where the block is near the whole."""
        rows, columns = self.weight.shape
        held = _PANEL // dtypes.itemsize(self.weight.dtype) + 64 * columns if self.streamed else rows * columns
        block = self.rank + self.rank // 2 + 72
        return 8 * held + 64 * TILE + 48 * (rows + columns) * block + 16 * min(rows, columns, 3 * block) ** 2

    def run(self, load: Load, emit: Emit) -> Facts:
        """Factorise and write."""
        import torch

        from loratool.algebra import svd
        from loratool.algebra.deltas import is_finite

        D = self._matrix(load)
        total = D.squared_norm()
        if not isfinite(total):
            raise InputError("the weight holds NaN or infinity", where=self.weight.name)
        found = svd.truncated(D, self.rank, seed_of(self.seed, self.module), quality="balanced")
        up, down = (factor / sqrt(self.scaling) for factor in found.balanced(self.rank))
        dtype = getattr(torch, dtypes.torch_name(self.copies[0][0].dtype))
        up, down = up.to(dtype).contiguous(), down.to(dtype).contiguous()
        if not (is_finite(up) and is_finite(down)):
            raise InputError(f"the factors overflow {dtype}", where=self.module, hint="--dtype float32")
        for into_down, into_up in self.copies:
            emit(into_down, 0, down)
            emit(into_up, 0, up)
        return {"total": total, "kept": float(found.sigma.square().sum())}

    def _matrix(self, load: Load) -> svd.Panels:
        """Return the weight in fp32: held in memory, or read anew in panels for every product."""
        import torch

        from loratool.algebra import svd

        def panel(start: int, stop: int) -> torch.Tensor:
            return load(self.weight.rows(start, stop)).to(torch.float32)

        stored = self.weight.shape[0], self.weight.shape[1]
        cuts = self.weight.panels(_PANEL) if self.streamed else ()
        return svd.Panels.read(panel, stored, cuts, transposed=self.transposed)
