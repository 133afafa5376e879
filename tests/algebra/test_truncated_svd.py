"""The truncated SVD of a dense update against torch.linalg.svd in fp64: near the best, and not farther than it says."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra import noise, svd
from loratool.algebra import panels as panels_module
from loratool.algebra import rank as rank_rules


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
    monkeypatch.setattr(panels_module, "_TILE", 1)  # 64 rows at once, the least there is
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


# ---- qualities, adaptive ranks: matrices large enough that a basis is cheaper than the Gram

LARGE = [(700, 560), (560, 700)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
DIGITS = 4e-8  # of the total energy, that sums of fp32 products do not resolve


def cluster(m, n):
    """24 equal singular values, then noise: the subspace inside the cluster is found slowly."""
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(6)) / m**0.5
    return noise + 3 * orthogonal(m, 24, 7).float() @ orthogonal(n, 24, 8).float().T


SPECTRA = MATRICES | {
    "power law 0.5": lambda m, n: power_law(m, n, 0.5),
    "exponential": lambda m, n: with_spectrum(m, n, 0.9 ** torch.arange(400, dtype=torch.float64)),
    "cluster": cluster,
    "exact rank 100": lambda m, n: with_spectrum(m, n, torch.linspace(3, 1, 100, dtype=torch.float64)),
}


def error_of(matrix, factors):
    return float((matrix.double().cpu() - (factors.left * factors.sigma @ factors.right).cpu()).square().sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_each_quality_keeps_its_promise_and_its_estimate_bounds_the_excess(name, shape, device):
    D = SPECTRA[name](*shape)
    sigma = torch.linalg.svdvals(D.double())
    total = float(sigma.square().sum())
    for rank in (3, 24, 60):
        best = float(sigma[rank:].square().sum())
        for quality, tolerance in svd.QUALITIES.items():
            out = svd.truncate(svd.Panels.of(D.to(device)), rank, seed=1, quality=quality)
            measured = error_of(D, out.factors)
            assert out.total == pytest.approx(total, rel=1e-9)
            assert out.residual == pytest.approx(measured, rel=1e-3, abs=1e-12 * total)
            assert out.excess <= tolerance
            assert measured <= best * (1 + out.excess) ** 2 + DIGITS * total
            assert len(out.sigma) >= len(out.factors.sigma)


RULES = {
    "energy 0.5": partial(rank_rules.energy, share=0.5),
    "energy 0.9": partial(rank_rules.energy, share=0.9),
    "error 0.2": partial(rank_rules.error, limit=0.2),
    "ratio 4.5": partial(rank_rules.ratio, limit=4.5),
    "sv_fro 0.8": partial(rank_rules.sv_fro, target=0.8, size=560),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_rank_found_on_the_way_is_that_of_the_whole_spectrum(name, rule):
    D = SPECTRA[name](*LARGE[0])
    sigma = torch.linalg.svdvals(D.double())
    wanted = RULES[rule](sigma)

    def choose(known, beyond):
        return RULES[rule](known, beyond=beyond)

    out = svd.truncate(svd.Panels.of(D), choose, seed=2)
    assert len(out.factors.sigma) == pytest.approx(wanted, abs=max(1, wanted // 50))
    measured = error_of(D, out.factors)
    assert out.residual == pytest.approx(measured, rel=1e-3, abs=1e-11 * out.total)
    if rule.startswith(("energy", "error")):  # what was asked for is so of the factors, not of an estimate
        share = 0.04 if rule.startswith("error") else 1 - float(rule.split()[1])
        assert measured <= share * out.total * (1 + 1e-6)
    capped = svd.truncate(svd.Panels.of(D), choose, seed=2, cap=5)
    assert len(capped.factors.sigma) == min(5, wanted)


def test_nothing_is_computed_twice_while_the_basis_grows():
    passes = 0

    def panels():
        nonlocal passes
        passes += 1
        return [(0, 700, D)]

    D = SPECTRA["power law 0.5"](*LARGE[0])
    matrix = svd.Panels(panels, (700, 560))
    out = svd.truncate(matrix, lambda s, b: rank_rules.energy(s, 0.6, b), seed=0, total=matrix.squared_norm())
    assert passes == 1 + 2 * -(-len(out.sigma) // 64)  # the norm, and two for each block


def test_a_delta_of_less_rank_than_asked_for_comes_out_as_it_is():
    update = torch.randn(700, 5, generator=torch.Generator().manual_seed(1)) @ orthogonal(560, 5, 2).float().T
    for quality in svd.QUALITIES:
        out = svd.truncate(svd.Panels.of(update), 40, seed=0, quality=quality)
        assert len(out.factors.sigma) == 5
        assert out.residual <= 1e-10 * out.total
        assert error_of(update, out.factors) <= 1e-10 * out.total
        assert not bool(svd.truncated(svd.Panels.of(update), 40, 0, quality=quality).sigma[5:].any())
    # the slight noise of a subtraction in fp32 is not taken for signal
    weight = torch.randn(700, 560, generator=torch.Generator().manual_seed(3))
    D = (weight + update) - weight
    variances = 2 * noise.rounding_variance(weight, torch.float32)
    profile = variances.sum(1), variances.sum(0)
    out = svd.truncate(svd.Panels.of(D), lambda s, b: noise.outstanding(s, *profile, b), seed=0)
    assert len(out.factors.sigma) == 5


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("quality", svd.QUALITIES)
def test_large_matrices_may_be_streamed_and_transposed(quality, transposed):
    stored = SPECTRA["power law 0.5"](*LARGE[0])
    D = stored.T if transposed else stored
    panels = svd.Panels(in_panels(stored, (100, 350, 690)), (700, 560), transposed=transposed)
    out = svd.truncate(panels, 20, seed=3, quality=quality)
    whole = svd.truncate(svd.Panels.of(D.contiguous()), 20, seed=3, quality=quality)
    torch.testing.assert_close(out.factors.sigma, whole.factors.sigma, rtol=1e-3, atol=0)
    assert out.residual == pytest.approx(error_of(D, out.factors), rel=1e-6)
    again = svd.truncate(panels, 20, seed=3, quality=quality)
    assert all(torch.equal(x, y) for x, y in zip(out.factors, again.factors, strict=True))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["power law 1", "exact rank 8", "flat", "tiny values"])
def test_the_error_of_rounded_factors_costs_one_pass(name, shape, dtype):
    D = MATRICES[name](*shape)
    panels = svd.Panels.of(D)
    up, down = (f.to(dtype) for f in svd.truncated(panels, 10, seed=0).balanced(10))
    measured = float((D.double() - up.double() @ down.double()).square().sum())
    total = panels.squared_norm()
    assert svd.squared_error(panels, up, down, total) == pytest.approx(measured, rel=1e-3, abs=1e-13 * total)


def test_a_matrix_of_zeros_has_rank_one_and_no_error():
    out = svd.truncate(svd.Panels.of(torch.zeros(700, 560)), 7, seed=0)
    assert (out.total, out.residual, out.excess) == (0.0, 0.0, 0.0)
    assert out.factors.left.shape == (700, 1)
    assert out.factors.right.shape == (1, 560)


def test_matrices_in_double_precision_are_multiplied_in_it():
    D = orthogonal(600, 300, 1) * (0.8 ** torch.arange(300, dtype=torch.float64)) @ orthogonal(500, 300, 2).T
    out = svd.truncate(svd.Panels.of(D), 30, seed=0)
    torch.testing.assert_close(out.factors.sigma[:10], torch.linalg.svdvals(D)[:10], rtol=1e-12, atol=0)


def test_an_orthonormal_basis_leaves_out_what_is_not_new():
    generator = torch.Generator().manual_seed(1)
    old = svd.orthonormal(torch.randn(200, 10, generator=generator))
    Y = torch.cat([old[:, :4], torch.randn(200, 3, generator=generator), torch.zeros(200, 2)], dim=1)
    Q = svd.orthonormal(Y, old, floor=1e-5)
    assert Q.shape == (200, 3)
    eye = torch.eye(13, dtype=torch.float64)
    both = torch.cat([old, Q], dim=1).double()
    torch.testing.assert_close(both.T @ both, eye, rtol=0, atol=1e-6)
    assert svd.orthonormal(torch.zeros(20, 3)).shape == (20, 0)
