"""What the factors of a new adapter are: random on one side and zero on the other, or a principal part of the weight.

PEFT's defaults (peft/tuners/lora/layer.py, reset_lora_parameters, 0.21.2): down is uniform in +-1/sqrt(fan in), which
is kaiming_uniform(a=sqrt(5)), or normal with a standard deviation of 1/rank, and up zero; of embeddings down is zero
and up normal. PiSSA (Meng et al. 2024, arXiv 2404.02948): scaling * up @ down is the truncated SVD of the weight
itself, the roots of the singular values in both factors. LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1): the
truncated SVD of W - Q, where Q is what nf4 makes of W, or of W less the factors of the iteration before.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING

from loratool import dtypes
from loratool.deltas import LowRank, Term
from loratool.errors import InputError
from loratool.operations.panels import PANEL, TILE, MergePanel
from loratool.operations.trainable import Trained
from loratool.plan import Emit, Facts, Load, Out, seed_of
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratool.algebra import svd


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
        held = PANEL // dtypes.itemsize(self.weight.dtype) + 64 * columns if self.streamed else rows * columns
        block = self.rank + self.rank // 2 + 72
        return 8 * held + 64 * TILE + 48 * (rows + columns) * block + 16 * min(rows, columns, 3 * block) ** 2

    def run(self, load: Load, emit: Emit) -> Facts:
        """Factorise and write."""
        from loratool.algebra import svd

        D = self._matrix(load)
        total = self._energy(D)
        found = svd.truncated(D, self.rank, seed_of(self.seed, self.module), quality="balanced")
        up, down = (factor / sqrt(self.scaling) for factor in found.balanced(self.rank))
        self._write(up, down, emit)
        return {"total": total, "kept": float(found.sigma.square().sum())}

    def _energy(self, W: svd.Panels) -> float:
        """Return the squared norm of the weight."""
        total = W.squared_norm()
        if not isfinite(total):
            raise InputError("the weight holds NaN or infinity", where=self.weight.name)
        return total

    def _write(self, up: torch.Tensor, down: torch.Tensor, emit: Emit) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the factors into every copy; return them as they were rounded."""
        import torch

        from loratool.algebra.deltas import is_finite

        dtype = getattr(torch, dtypes.torch_name(self.copies[0][0].dtype))
        up, down = up.to(dtype).contiguous(), down.to(dtype).contiguous()
        if not (is_finite(up) and is_finite(down)):
            raise InputError(f"the factors overflow {dtype}", where=self.module, hint="--dtype float32")
        for into_down, into_up in self.copies:
            emit(into_down, 0, down)
            emit(into_up, 0, up)
        return up, down

    def _matrix(self, load: Load) -> svd.Panels:
        """Return the weight in fp32: held in memory, or read anew in panels for every product."""
        import torch

        from loratool.algebra import svd

        def panel(start: int, stop: int) -> torch.Tensor:
            return load(self.weight.rows(start, stop)).to(torch.float32)

        stored = self.weight.shape[0], self.weight.shape[1]
        cuts = self.weight.panels(PANEL) if self.streamed else ()
        return svd.Panels.read(panel, stored, cuts, transposed=self.transposed)


@dataclass(frozen=True)
class LoftqStart(PrincipalStart):
    """The `rank` leading singular triplets of W - Q; W (out, in) lies so in the file, for blocks run along its rows.

    Q is what nf4 makes of W less the factors of the iteration before, those at first zero. These go to `taken`: a merge
    with weight -1 that ends in nf4 writes the same Q again, tile by tile, as it is computed here.
    """

    iterations: int
    taken: tuple[Out, Out]

    @property
    def outs(self) -> tuple[Out, ...]:
        """Down and up of each copy, and those of the iteration before."""
        return *super().outs, *self.taken

    def run(self, load: Load, emit: Emit) -> Facts:
        """Quantise and factorise in turns, and write; the squared errors are of nf4 alone and of what is written."""
        import torch

        from loratool.algebra import svd

        total = self._energy(self._matrix(load))
        device = load(self.weight.rows(0, 1)).device
        rows, columns = self.weight.shape
        up, down = torch.zeros(rows, self.rank, device=device), torch.zeros(self.rank, columns, device=device)
        errors: list[float] = []
        for _ in range(self.iterations):
            before = down, up
            D = self._left(load, *before)
            errors.append(D.squared_norm())
            found = svd.truncated(D, self.rank, seed_of(self.seed, self.module), quality="balanced")
            up, down = ((f / sqrt(self.scaling)).float().contiguous().to(device) for f in found.balanced(self.rank))
        for out, factor in zip(self.taken, before, strict=True):
            emit(out, 0, factor)
        up, down = (factor.float() for factor in self._write(up, down, emit))
        return {"total": total, "nf4": errors[0], "left": D.residual(up * self.scaling, down)}

    def _left(self, load: Load, down: torch.Tensor, up: torch.Tensor) -> svd.Panels:
        """Return W - Q in fp32: held in memory, or read and quantised anew in panels for every product."""
        import torch

        from loratool.algebra import svd

        held = {out.name: factor for out, factor in zip(self.taken, (down, up), strict=True)}
        refs = [TensorRef(out.name, out.shape, out.dtype) for out in self.taken]
        terms = (Term(LowRank(refs[0], refs[1], self.scaling), -1.0),)
        out = Out("", self.weight.name, self.weight.shape, self.weight.dtype)

        def given(ref: TensorRef, into: torch.Tensor | None = None) -> torch.Tensor:
            return held[ref.name] if ref.name in held else load(ref, into)

        def panel(start: int, stop: int) -> torch.Tensor:
            rest = load(self.weight.rows(start, stop)).to(torch.float32, copy=True)
            for low, high in self.weight.panels(PANEL):
                if start <= low and high <= stop:
                    part = MergePanel(
                        self.weight, out, terms, transposed=False, row=0, start=low, stop=high, as_nf4=True
                    )
                    for row, tile, _ in part.rounded(part.sums(given)):
                        rest[row - start : row - start + len(tile)] -= tile
            return rest

        cuts = self.weight.panels(PANEL) if self.streamed else ()
        return svd.Panels.read(panel, (self.weight.shape[0], self.weight.shape[1]), cuts)
