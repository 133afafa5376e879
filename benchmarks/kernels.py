"""The arithmetic alone, one module at a time, CPU seconds of one thread: resize and extract against full SVDs.

`python -m benchmarks kernels` takes about six minutes: every full SVD of a 4096 x 4096 matrix takes 20 seconds or more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure
from loratool.algebra import lowrank, svd


def main(work: Path, runs: int) -> None:
    del work
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resize(4096, 64, runs)
    resize(2048, 16, runs)
    extract(4096, 64, runs)


def resize(n: int, rank: int, runs: int) -> None:
    """Rank `rank` to half of it: our core SVD against the full SVD of the product, as most tools do it."""
    up, down = torch.randn(n, rank), torch.randn(rank, n)
    keep = rank // 2
    ours = measure.function(lambda: lowrank.compress(up, down, keep).balanced(keep), max(runs, 9))
    peers: dict[str, Callable[[], object]] = {
        "full SVD of the product (sd-scripts, PEFT)": lambda: torch.linalg.svd(up @ down, full_matrices=True),
        "economy SVD of the product": lambda: torch.linalg.svd(up @ down, full_matrices=False),
        "svd_lowrank of the product (newer sd-scripts)": lambda: torch.svd_lowrank(up @ down, q=2 * keep),
    }
    left, right = lowrank.compress(up, down, keep).balanced(keep)
    optimum = lowrank.singular_values(up, down)[keep:].norm()
    excess = float((up.double() @ down.double() - left @ right).norm() / optimum) - 1
    print(f"\nresize kernel, {n} x {n}, rank {rank} -> {keep}: loratool {1e3 * ours:.2f} ms", end="")
    print(f", error {excess:.1e} over the optimum")
    for name, call in peers.items():
        theirs = measure.function(call, 1)
        print(f"  {name:<48}{1e3 * theirs:9.0f} ms, {theirs / ours:7.0f} x")


def extract(n: int, rank: int, runs: int) -> None:
    """Rank `rank` of dense deltas with different spectra: time, and residual against the optimum in fp64."""
    print(f"\nextract kernel, {n} x {n}, rank {rank}: CPU time, and residual over the optimum (what is said of it)")
    for name, D in deltas(n, rank).items():
        matrix = svd.Panels.of(D)
        total = matrix.squared_norm()  # comes with the subtraction; one pass of 20 ms
        full = measure.function(partial(torch.linalg.svd, D, full_matrices=False), 1)
        squares = torch.linalg.eigvalsh(D.double().T @ D.double()).flip(0)
        print(f"  {name}: full fp32 SVD {1e3 * full:.0f} ms")
        for quality in ("fast", "balanced"):
            run = partial(svd.truncate, matrix, rank, 0, quality=quality, total=total)
            ours = measure.function(run, max(runs, 5))
            found = run()
            residual = matrix.residual(*found.factors.balanced(rank))
            excess = 100 * ((residual / float(squares[rank:].sum())) ** 0.5 - 1)
            print(f"    {quality:<10}{1e3 * ours:7.0f} ms, {full / ours:5.0f} x", end="")
            print(f", {excess:.3f} % (at most {100 * found.excess:.2f} %)")
        theirs = measure.function(partial(torch.svd_lowrank, D, q=rank), max(runs, 3))
        U, S, V = torch.svd_lowrank(D, q=rank)
        residual = matrix.residual(U.double() * S.double(), V.T.double())
        excess = 100 * ((residual / float(squares[rank:].sum())) ** 0.5 - 1)
        print(f"    svd_lowrank{1e3 * theirs:6.0f} ms, {full / theirs:5.0f} x, {excess:.3f} %")


def deltas(n: int, rank: int) -> dict[str, torch.Tensor]:
    """Return deltas (n, n) with the spectra that updates have, and the flat one that is hardest."""
    Q1, Q2 = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(n, n))[0]
    index = torch.arange(1, n + 1, dtype=torch.float32)
    lora = torch.randn(n, rank // 2) @ torch.randn(rank // 2, n)
    weight = torch.randn(n, n) * 0.02
    lora *= 0.03 * weight.norm() / lora.norm()
    return {
        "power law 0.5": (Q1 * index**-0.5) @ Q2,
        "power law 1.0": (Q1 / index) @ Q2,
        "LoRA of 3 % in a bf16 checkpoint": (weight + lora).bfloat16().float() - weight.bfloat16().float(),
        "flat (Gaussian)": torch.randn(n, n),
    }
