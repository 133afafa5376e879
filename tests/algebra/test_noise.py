"""The noise of rounding against rounding itself, and its edge against matrices of noise."""

from math import sqrt

import pytest
import torch

from loratool.algebra import noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, 3e-6])
def test_the_rounding_variance_is_that_of_rounding(dtype, scale):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(300, 400, generator=generator, dtype=torch.float64) * scale
    found = noise.rounding_variance(W.to(dtype), dtype)
    if dtype != torch.float64:  # of which there is nothing finer to compare with
        measured = float((W.to(dtype).double() - W).square().mean())
        assert float(found.mean()) == pytest.approx(measured, rel=0.03)
    exponents = torch.floor(torch.log2(W.to(dtype).abs().double()))
    ulps = (
        2.0 ** exponents.clamp_min(torch.log2(torch.tensor(torch.finfo(dtype).tiny).double())) * torch.finfo(dtype).eps
    )
    torch.testing.assert_close(found, ulps.square() / 12, rtol=1e-6, atol=0)


def test_zeros_and_subnormal_numbers_have_the_step_of_subnormal_numbers():
    step = 2.0**-24  # of float16 below 2^-14
    for value in (0.0, step, 5 * step, 2.0**-14):
        W = torch.full((3, 3), value, dtype=torch.float16)
        assert noise.rounding_variance(W, torch.float16).flatten().tolist() == [pytest.approx(step**2 / 12)] * 9


def rough(m, n, how):
    """Variances (m, n) that are one, or differ by rows, columns, or both."""
    generator = torch.Generator().manual_seed(8)
    rows, columns = (torch.exp(0.5 * torch.randn(k, generator=generator, dtype=torch.float64)) for k in (m, n))
    ones = torch.ones(m, n, dtype=torch.float64)
    return {"even": ones, "rows": ones * rows[:, None], "columns": ones * columns, "both": rows[:, None] * columns}[how]


@pytest.mark.parametrize(("m", "n"), [(300, 300), (150, 600), (600, 200)])
@pytest.mark.parametrize("how", ["even", "rows", "columns", "both"])
def test_pure_noise_ends_at_the_edge(m, n, how):
    variances = rough(m, n, how) * 0.09
    drawn = torch.randn(m, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * variances.sqrt()
    top, edge = float(torch.linalg.svdvals(drawn)[0]), noise.edge(variances.sum(1), variances.sum(0))
    assert top == pytest.approx(edge, rel=0.04 if how == "even" else 0.1)
    if how == "even":  # Marchenko and Pastur
        assert edge == pytest.approx(0.3 * (sqrt(m) + sqrt(n)), rel=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_what_is_worth_keeping_is_where_a_singular_value_costs_as_much_as_it_gives(beta):
    """Of a signal x in noise one sees y, and vectors at angles to the true ones (Benaych-Georges 2012)."""

    def seen(x):
        return sqrt((x + 1 / x) * (x + beta / x))

    def gain(x):  # of keeping y over leaving it out: x^2 - |x u v^T - y u' v'^T|^2
        cosines = (x**4 - beta) / sqrt((x**4 + beta * x**2) * (x**4 + x**2))
        return 2 * x * seen(x) * cosines - seen(x) ** 2

    low, high = beta**0.25 * 1.0001, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) < 0 else (low, middle)
    m, n = int(1000 * beta), 1000
    assert noise.worth(m, n) * (1 + sqrt(beta)) == pytest.approx(seen(high), rel=1e-6)
    assert noise.worth(n, m) == noise.worth(m, n)


def weights(m, n, kind):
    """Weights of several shapes: heavy-tailed ones, and such as differ by rows and columns, are what models have."""
    generator = torch.Generator().manual_seed(3)
    normal = 0.02 * torch.randn(m, n, generator=generator)
    if kind == "normal":
        return normal
    if kind == "heavy":  # Student's t with 5 degrees of freedom
        chi = torch.randn(5, m, n, generator=generator).square().mean(0)
        return normal / chi.sqrt()
    scales = (torch.exp(0.4 * torch.randn(k, generator=generator)) for k in (m, n))
    rows, columns = scales
    return normal * rows[:, None] * columns


@pytest.mark.parametrize("kind", ["normal", "heavy", "rough"])
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 0.03), ("bfloat16", 0.006), ("float16", 0.01)])
@pytest.mark.parametrize("roundings", ["the fine-tune's", "both"])
def test_the_rank_of_an_update_shows_in_rounded_checkpoints(dtype, size, roundings, kind):
    narrow = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(3)
    m, n = 300, 400
    W = weights(m, n, kind)
    update = torch.randn(m, 7, generator=generator) @ torch.randn(7, n, generator=generator)
    update *= size * W.norm() / update.norm()
    base = W.to(narrow)
    tuned = ((W if roundings == "both" else base.float()) + update).to(narrow)
    sigma = torch.linalg.svdvals(tuned.double() - base.double())
    variances = sum(noise.rounding_variance(X, narrow) for X in (tuned, base))
    profile = variances.sum(1), variances.sum(0)
    found = noise.outstanding(sigma, *profile)
    assert found == 7 if kind == "normal" else 7 <= found <= 9  # single large weights are not in a product profile
    # and from its leading part
    assert noise.outstanding(sigma[:20], *profile, float(sigma[20:].square().sum())) == found
    assert noise.outstanding(sigma[:5], *profile, float(sigma[5:].square().sum())) == 6


def test_noise_alone_keeps_one_rank():
    W = weights(300, 400, "normal")
    D = W.bfloat16().double() - W.double()
    variances = noise.rounding_variance(W, torch.bfloat16)
    assert noise.outstanding(torch.linalg.svdvals(D), variances.sum(1), variances.sum(0)) == 1
