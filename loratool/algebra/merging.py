"""The merged rows of a panel: weight plus every delta, tile by tile, in the dtype of the arithmetic.

Plain factors of all adapters are joined, so that a tile takes one product. Other kinds give blocks of dW, each from the
original weight, which is then kept beside the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any

import torch

from loratool import dtypes
from loratool.algebra import lowrank, quantisation
from loratool.algebra.deltas import is_finite, spread
from loratool.algebra.dense import Dense
from loratool.algebra.kinds import dense, lora_factors
from loratool.deltas import LowRank, Replace, Term, Tokens
from loratool.errors import InputError
from loratool.plan import Load
from loratool.tensors import TensorRef

_BLOCK = 64  # elements that share a scale in bitsandbytes' nf4


class Sums:
    """Iterate once: (row within the panel, tile (rows, columns)), in a buffer that is used again. `moved` follows."""

    def __init__(
        self,
        weight: TensorRef,
        terms: Sequence[Term],
        load: Load,
        *,
        tiles: Sequence[tuple[int, int]],
        survey: Sequence[tuple[int, int]],
        wide: torch.dtype,
        transposed: bool,
        as_trained: str = "",
    ) -> None:
        """Load the deltas.

        `tiles` are the (start, stop) of rows of `weight` to merge, one behind the other; `survey` those of all of it,
        for what has to be seen first. `wide` is the dtype of the arithmetic, `as_trained` see loratool.operations.
        """
        self.weight, self.terms, self.load = weight, terms, load
        self.tiles, self.wide, self.transposed, self.as_trained = tiles, wide, transposed, as_trained
        self.start, self.stop = tiles[0][0], tiles[-1][1]
        self.left, self.right = self._factors(load)  # (rows, r), (r, columns)
        self.absmax = self._absmax(survey) if as_trained == "nf4-double" else None
        self.others = self._others(load, survey)
        self._moved = 0.0

    @property
    def moved(self) -> float:
        """The squared norm of the deltas of all tiles that were yielded."""
        if self.others:
            return self._moved
        return lowrank.squared_norm(self.left, self.right) if self.left.shape[1] else 0.0

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        height = max(stop - start for start, stop in self.tiles)
        raw = torch.empty(height, *self.weight.shape[1:], dtype=getattr(torch, dtypes.torch_name(self.weight.dtype)))
        sums: torch.Tensor | None = None  # where the rows are
        for start, stop in self.tiles:
            rows = self._rows(start, stop, raw[: stop - start])
            sums = torch.empty(height, rows.shape[1], dtype=self.wide, device=rows.device) if sums is None else sums
            tile = sums[: stop - start]
            tile.copy_(rows)
            original = tile.clone() if self.others else tile
            for other in self.others:
                other.add_to(tile, original, start)
            if self.left.shape[1]:
                tile.addmm_(self.left[start - self.start : stop - self.start], self.right)
            if self.others:
                self._moved += squared(original.sub_(tile))
            yield start, tile

    def _rows(self, start: int, stop: int, raw: torch.Tensor | None = None) -> torch.Tensor:
        """Read rows of the weight, in its dtype: what was quantised while it was trained on is what it was then."""
        ref = self.weight.rows(start, stop)
        weight = (self.load(ref) if raw is None else self.load(ref, raw)).flatten(1)
        if not self.as_trained:
            return weight
        block = start * weight.shape[1] // _BLOCK
        share = None if self.absmax is None else self.absmax[block : block - (-weight.numel() // _BLOCK)]
        return quantisation.quantise_nf4(weight, _BLOCK, absmax=share)

    def _absmax(self, survey: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return what double quantisation makes of the scales of all blocks: it looks at the whole weight."""
        tiles = (self.load(self.weight.rows(a, b)) for a, b in survey)
        return quantisation.double_quantised(torch.cat([quantisation.block_absmax(t, _BLOCK) for t in tiles]))

    def _factors(self, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (left (rows, r), right (r, columns)) with left @ right the sum of all plain deltas of these rows.

        Terms are joined in the order of their bytes, so that the order of adapters cannot change a bit of the result.
        """
        loaded = []
        for delta, weight, into in self.terms:
            if not isinstance(delta, LowRank):
                continue
            tensors = [load(ref).to(self.wide) for ref in delta.refs]
            for ref in (ref for ref, tensor in zip(delta.refs, tensors, strict=True) if not is_finite(tensor)):
                raise InputError("the adapter's factors hold NaN or infinity", where=ref.name)
            up, down = lora_factors(delta, tensors)
            if into is not None:
                up = spread(up, into, self.weight.shape[1 if self.transposed else 0])
            pair = (down.T, up.T) if self.transposed else (up, down)
            loaded.append((pair[0][self.start : self.stop], pair[1], weight * delta.scaling))
        if len(loaded) > 1:
            loaded.sort(key=lambda t: (digest(t[1]), digest(t[0]), t[2]))
        if not loaded:
            return torch.zeros(self.stop - self.start, 0, dtype=self.wide), torch.zeros(0, 1, dtype=self.wide)
        return lowrank.add(loaded)

    def _others(self, load: Load, survey: Sequence[tuple[int, int]]) -> list[Part]:
        """Return the deltas that are no plain factors, in the order of their bytes; replacements come first."""
        parts = []
        for term in (t for t in self.terms if not isinstance(t.delta, LowRank)):
            part = Part(term, dense(term.delta, load, self.wide, transposed=self.transposed), self.weight.shape)
            parts.append(part)
            part.survey((self._rows(a, b).to(self.wide), a) for a, b in survey)
        order = {id(p): (not p.replaces, *map(digest, p.dense.tensors), p.term.weight) for p in parts}
        return sorted(parts, key=lambda p: order[id(p)])


class Part:
    """A loaded delta of some rows of a weight, applied to tiles of the stored matrix."""

    def __init__(self, term: Term, loaded: Dense, stored: tuple[int, ...]) -> None:
        self.term, self.dense, self.transposed = term, loaded, loaded.transposed
        self.replaces = isinstance(term.delta, (Replace, Tokens)) and term.weight == 1
        self.place: torch.Tensor | None = None  # of an output row of the weight: its row in the delta, or -1
        if term.into is not None:
            out = stored[1 if self.transposed else 0]
            self.place = torch.full((out,), -1)
            at = 0
            for run in term.into:
                self.place[run.start : run.stop : run.step] = torch.arange(at, at + len(run))
                at += len(run)

    def survey(self, tiles: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Show the whole weight to a delta for which tiles, some rows of what is stored, are not enough."""
        if self.term.delta.mixes(outputs=not self.transposed):
            self.dense.survey(block for tile, start in tiles for block in self._blocks(tile, start))

    def add_to(self, tile: torch.Tensor, original: torch.Tensor, start: int) -> None:
        """Add weight * dW to the rows of `tile`, which are those of `original` from `start` on of the stored matrix."""
        for W, rows, columns in self._blocks(original, start):
            target = tile.T if self.transposed else tile
            picked = self._rows(start, len(tile))
            every = slice(None) if picked is None else picked
            if self.replaces:  # before all others: W + (value - W) would not be exactly the value
                self.dense.put(target, every, rows, columns)
            else:
                target[every] += self.term.weight * self.dense.block(W, rows, columns)

    def _picked(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        whole = tile.T if self.transposed else tile
        picked = self._rows(start, len(tile))
        return whole if picked is None else whole[picked]

    def _rows(self, start: int, count: int) -> torch.Tensor | None:
        """Return which rows of the (out, in) block the delta is for; None for all."""
        if self.place is None:
            return None
        here = self.place if self.transposed else self.place[start : start + count]
        return (here >= 0).nonzero().flatten()

    def _blocks(self, tile: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, Any, slice]]:
        """Yield the part of a stored tile that the delta is for as (out, in), and its rows and inputs in the delta."""
        W = self._picked(tile, start)
        if not len(W):
            return
        if self.place is None:
            rows: Any = slice(None) if self.transposed else slice(start, start + len(tile))
        else:
            here = self.place if self.transposed else self.place[start : start + len(tile)]
            rows = here[here >= 0]
        yield W, rows, slice(start, start + len(tile)) if self.transposed else slice(None)


def squared(tensor: torch.Tensor) -> float:
    """Return the squared Frobenius norm; it is not finite where an element is not."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


def digest(tensor: torch.Tensor) -> bytes:
    """Return what tells tensors apart, to sort them by."""
    return sha256(tensor.contiguous().numpy(force=True).tobytes()).digest()


def what_overflows(lost: torch.Tensor, narrow: torch.dtype) -> str:
    """Say what is not finite, from what rounding lost: infinite where it made a number infinite, else NaN."""
    if not bool(torch.isnan(lost).any()):
        name = str(narrow).removeprefix("torch.")
        count = int(torch.isinf(lost).sum())
        return f"{count} merged values overflow {name}: choose --dtype bfloat16 or float32"
    return "the merged weight would hold NaN or infinity (so does the base, or the adapter is damaged)"
