"""The truncated SVD of a dense update against torch.linalg.svd: at most 1 % above the best residual."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra import svd


def orthogonal(n, k, seed):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def with_spectrum(m, n, sigma):
    k = min(m, n)
    values = torch.zeros(k, dtype=torch.float64)
    values[: len(sigma)] = sigma[:k]
    return ((orthogonal(m, k, 1) * values) @ orthogonal(n, k, 2).T).float()


def power_law(m, n, decay):
    return with_spectrum(m, n, torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -decay)


def lora_in_bf16(m, n):
    """What a fine-tune by LoRA leaves: W + B A rounded to bfloat16, less W in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    W = (torch.randn(m, n, generator=generator) * 0.02).bfloat16()
    update = torch.randn(m, 8, generator=generator) @ torch.randn(8, n, generator=generator) * 0.002
    return (W.float() + update).bfloat16().float() - W.float()


MATRICES = {
    "power law 0.3": lambda m, n: power_law(m, n, 0.3),
    "power law 1": lambda m, n: power_law(m, n, 1.0),
    "power law 2": lambda m, n: power_law(m, n, 2.0),
    "flat": lambda m, n: torch.randn(m, n, generator=torch.Generator().manual_seed(4)),
    "exact rank 8": lambda m, n: with_spectrum(m, n, torch.linspace(3, 1, 8, dtype=torch.float64)),
    "step after 16": lambda m, n: with_spectrum(m, n, torch.tensor([10.0] * 16 + [1.0] * 500, dtype=torch.float64)),
    "lora and bf16 rounding": lora_in_bf16,
    "tiny values": lambda m, n: power_law(m, n, 1.0) * 1e-12,
}
SHAPES = [(400, 300), (300, 400), (64, 512), (512, 64), (30, 20)]


def in_panels(matrix, cuts):
    edges = sorted({0, matrix.shape[0], *cuts})
    return lambda: [(a, b, matrix[a:b]) for a, b in pairwise(edges)]


def best_residual(matrix, rank):
    sigma = torch.linalg.svdvals(matrix.double())
    return float(sigma.square().sum()), float(sigma[rank:].square().sum())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_residual_is_within_one_percent_of_the_best(name, shape, rank):
    D = MATRICES[name](*shape)
    panels = svd.Panels.of(D)
    found = svd.truncated(panels, rank, seed=1)
    up, down = found.balanced(rank)
    total, best = best_residual(D, rank)
    measured = float((D.double() - up @ down).square().sum())
    floor = total * 1e-12  # where nothing is left but what fp32 products cannot resolve
    assert measured <= best * 1.02 + floor  # 1 % of the residual norm is 2 % of its square
    assert panels.squared_norm() == pytest.approx(total, rel=1e-9)
    assert panels.residual(up, down) == pytest.approx(measured, rel=1e-5, abs=floor)
    k = min(rank, *shape)
    assert len(found.sigma) == k
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.right @ found.right.T, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("name", ["power law 1", "exact rank 8", "lora and bf16 rounding"])
def test_a_streamed_or_transposed_matrix_gives_the_same_answer(name, shape, transposed):
    stored = MATRICES[name](*shape)
    D = stored.T if transposed else stored
    cuts = (7, 16, stored.shape[0] // 2)
    panels = svd.Panels(in_panels(stored, cuts), tuple(stored.shape), transposed=transposed)
    assert panels.shape == tuple(D.shape)
    for rank in (4, 16):
        found = svd.truncated(panels, rank, seed=5)
        up, down = found.balanced(rank)
        total, best = best_residual(D, rank)
        measured = float((D.double() - up @ down).square().sum())
        assert measured <= best * 1.02 + total * 1e-12
        assert panels.residual(up, down) == pytest.approx(measured, rel=1e-5, abs=total * 1e-12)
    sigma = torch.linalg.svdvals(D.double())[:8]
    torch.testing.assert_close(svd.truncated(panels, 8, 1).sigma, sigma, rtol=1e-2, atol=1e-5 * float(sigma[0]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 39), max_size=4), st.booleans())
def test_products_by_panels_are_the_products(m, n, cuts, transposed):
    generator = torch.Generator().manual_seed(m * 100 + n)
    stored = torch.randn(m, n, generator=generator)
    D = (stored.T if transposed else stored).double()
    panels = svd.Panels(in_panels(stored, [c for c in cuts if c < m]), (m, n), transposed=transposed)
    X, Y = torch.randn(D.shape[1], 3, generator=generator), torch.randn(D.shape[0], 3, generator=generator)
    torch.testing.assert_close(panels.times(X).double(), D @ X.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(panels.transposed_times(Y).double(), D.T @ Y.double(), rtol=1e-5, atol=1e-5)
    gram, rows = panels.gram()
    torch.testing.assert_close(gram, D @ D.T if rows else D.T @ D, rtol=1e-10, atol=1e-10)
    assert gram.shape[0] == min(m, n)


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
def test_a_residual_formed_in_many_tiles_is_the_residual(transposed, monkeypatch):
    monkeypatch.setattr(svd, "_TILE", 1)  # 64 rows at once, the least there is
    stored = MATRICES["power law 0.3"](300, 200)
    D = stored.T if transposed else stored
    panels = svd.Panels(in_panels(stored, (70, 250)), (300, 200), transposed=transposed)
    up, down = svd.truncated(panels, 5, seed=1).balanced(5)
    assert panels.residual(up, down) == pytest.approx(float((D.double() - up @ down).square().sum()), rel=1e-12)


def test_the_seed_makes_the_result_the_same_in_every_run():
    D = MATRICES["power law 0.3"](300, 280)
    one, two, other = (svd.truncated(svd.Panels.of(D), 8, seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert not torch.equal(one.left, other.left)


def test_a_rank_beyond_the_matrix_is_capped_and_exact():
    D = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    found = svd.truncated(svd.Panels.of(D), 50, seed=0)
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(D.double()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.left * found.sigma @ found.right, D.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 280), (30, 20), (1, 5), (5, 1)], ids=str)
def test_a_zero_matrix_has_zero_singular_values(shape):
    found = svd.truncated(svd.Panels.of(torch.zeros(shape)), 4, seed=0)
    assert not bool(found.sigma.any())
    assert all(bool(torch.isfinite(t).all()) for t in found)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 100), st.sampled_from([1.0, 1e-20, 1e12]))
def test_orthonormal_spans_the_columns(m, k, seed, scale):
    k = min(k, m)
    Y = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * scale
    Q = svd.orthonormal(Y).double()
    torch.testing.assert_close(Q.T @ Q, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
    rest = Y.double() - Q @ (Q.T @ Y.double())
    assert float(rest.norm()) <= 1e-4 * float(Y.double().norm())
