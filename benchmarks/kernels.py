"""The arithmetic alone, one module at a time, in one thread: resize and extract against full SVDs."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import measure
from loratool.algebra import lowrank, svd


def main(work: Path, runs: int) -> None:
    del work
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for n, rank in ((2048, 64), (2048, 16)):
        resize(n, rank, runs)
    extract(2048, 64, runs)


def resize(n: int, rank: int, runs: int) -> None:
    """Rank `rank` to half of it: our core SVD against the full SVD of the product, as most tools do it."""
    up, down = torch.randn(n, rank), torch.randn(rank, n)
    ours = measure.function(lambda: lowrank.compress(up, down).balanced(rank // 2), max(runs, 5))
    economy = measure.function(lambda: torch.linalg.svd(up @ down, full_matrices=False), 1)
    full = measure.function(lambda: torch.linalg.svd(up @ down, full_matrices=True), 1)
    print(f"\nresize kernel, {n} x {n}, rank {rank} -> {rank // 2}: loratool {1e3 * ours:.2f} ms")
    print(f"  economy SVD of the product {1e3 * economy:8.0f} ms, {economy / ours:6.0f} x")
    print(f"  full SVD of the product    {1e3 * full:8.0f} ms, {full / ours:6.0f} x")


def extract(n: int, rank: int, runs: int) -> None:
    """Rank `rank` of dense deltas with different spectra: time, and residual against the optimum."""
    print(f"\nextract kernel, {n} x {n}, rank {rank}")
    Q1, Q2 = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(n, n))[0]
    index = torch.arange(1, n + 1, dtype=torch.float32)
    lora = torch.randn(n, rank // 2) @ torch.randn(rank // 2, n)
    weight = torch.randn(n, n) * 0.02
    lora *= 0.03 * weight.norm() / lora.norm()
    rounded = (weight + lora).bfloat16().float() - weight.bfloat16().float()
    spectra = {
        "power law 0.5": (Q1 * index**-0.5) @ Q2,
        "power law 1.0": (Q1 / index) @ Q2,
        "LoRA of 3 % in a bf16 checkpoint": rounded,
        "flat (Gaussian)": torch.randn(n, n),
    }
    for name, D in spectra.items():
        matrix = svd.Panels.of(D)
        ours = measure.function(lambda m=matrix: svd.truncated(m, rank, 0), max(runs, 3))  # type: ignore[misc]
        full = measure.function(lambda d=D: torch.linalg.svd(d, full_matrices=False), 1)  # type: ignore[misc]
        optimum = torch.linalg.svdvals(D.double())[rank:].norm()
        residual = matrix.residual(*svd.truncated(matrix, rank, 0).balanced(rank)) ** 0.5
        excess = 100 * (residual / float(optimum) - 1)
        print(f"  {name:<34}{1e3 * ours:7.0f} ms, full fp32 SVD {1e3 * full:7.0f} ms, {full / ours:5.0f} x", end="")
        print(f", residual {excess:.2f} % over the optimum")
