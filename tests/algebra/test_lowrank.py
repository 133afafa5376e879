"""Factor algebra against torch.linalg on the dense product, in fp64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra import lowrank, rank


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def zero_columns(up, down):
    up[:, ::2] = 0
    down[1::3] = 0


def duplicates(up, down):
    up[:, 1:] = up[:, :1]
    down[-1] = down[0]


def graded(up, down):
    up *= torch.logspace(0, -9, up.shape[1], dtype=up.dtype)
    down *= torch.logspace(6, 0, down.shape[0], dtype=down.dtype)[:, None]


def opposite_scales(up, down):
    up *= 1e12
    down *= 1e-12


def nearly_dependent(up, down):
    up[:, -1] = up[:, 0] + 1e-9 * up[:, -1]


def zero_up(up, down):
    up.zero_()


CASES = {
    "plain": lambda up, down: None,
    "zero columns": zero_columns,
    "duplicate columns": duplicates,
    "graded over 15 decades": graded,
    "opposite scales": opposite_scales,
    "nearly dependent": nearly_dependent,
    "up is zero": zero_up,
}
SHAPES = [(40, 30, 4), (30, 40, 4), (16, 200, 8), (5, 7, 5), (6, 9, 12), (9, 6, 40), (1, 8, 3), (8, 1, 3), (12, 10, 1)]


def check(up, down, tolerance):
    """Everything that the SVD of up @ down must be, against the dense product."""
    M = up.double() @ down.double()
    sigma = torch.linalg.svdvals(M)
    scale = float(sigma[0]) or 1.0
    svd = lowrank.compress(up, down)
    k = len(svd.sigma)
    assert k <= min(up.shape[1], *M.shape)
    wanted = torch.zeros(k, dtype=torch.float64)
    wanted[: min(k, len(sigma))] = sigma[:k]
    assert bool((svd.sigma[:-1] >= svd.sigma[1:]).all())
    assert bool((svd.sigma >= 0).all())
    torch.testing.assert_close(svd.sigma, wanted, rtol=0, atol=tolerance * scale)
    assert float((svd.left * svd.sigma @ svd.right - M).norm()) <= tolerance * scale * k**0.5
    tail = torch.cat([sigma, torch.zeros(1)])
    for keep in {1, (k + 1) // 2, k}:  # Eckart and Young: no rank-k matrix is nearer
        best = float(tail[keep:].norm())
        left, right = svd.balanced(keep)
        assert left.shape == (M.shape[0], keep)
        assert right.shape == (keep, M.shape[1])
        assert float((left @ right - M).norm()) <= best + tolerance * scale * k**0.5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compress_is_the_svd_of_the_dense_product(shape, case):
    m, n, r = shape
    up, down = random(m, r, seed=1), random(r, n, seed=2)
    CASES[case](up, down)
    check(up, down, 1e-11 if case != "nearly dependent" else 1e-10)


SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 30))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=100, deadline=None)
@given(SIZES, DTYPES, st.integers(0, 10**6), st.integers(1, 30))
def test_compress_holds_for_any_shape_rank_and_dtype(sizes, dtype, seed, independent):
    m, n, r = sizes
    up, down = random(m, r, seed=seed), random(r, n, seed=seed + 1)
    if independent < r:
        up[:, independent:] = up[:, :1]  # the other columns repeat the first
    check(up.to(dtype), down.to(dtype), 1e-11)


@pytest.mark.parametrize("case", CASES)
def test_fewer_triplets_are_the_leading_ones_and_all_singular_values_come_along(case):
    up, down = random(40, 6), random(6, 30, seed=1)
    CASES[case](up, down)
    U, S, Vh = torch.linalg.svd(up @ down, full_matrices=False)
    svd = lowrank.compress(up, down, 2)
    assert (svd.left.shape, svd.right.shape, svd.sigma.shape) == ((40, 2), (2, 30), (6,))
    torch.testing.assert_close(svd.sigma, S[:6], rtol=0, atol=1e-9 * float(S[0]))
    left, right = svd.balanced(2)
    torch.testing.assert_close(left @ right, U[:, :2] * S[:2] @ Vh[:2], rtol=0, atol=1e-7 * float(S[0]))


def test_orthonormal_sides_for_well_conditioned_factors():
    svd = lowrank.compress(random(50, 6), random(6, 40, seed=1))
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(svd.left.T @ svd.left, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(svd.right @ svd.right.T, eye, rtol=0, atol=1e-12)


def test_balanced_factors_share_every_singular_value_equally():
    svd = lowrank.compress(1e6 * random(50, 6), 1e-3 * random(6, 40, seed=1))
    up, down = svd.balanced(6)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-10, atol=0)
    torch.testing.assert_close(up.norm(dim=0) ** 2, svd.sigma, rtol=1e-10, atol=0)


def test_signs_are_fixed_so_that_other_factors_of_one_update_give_the_same_result():
    up, down = random(50, 6), random(6, 40, seed=1)
    mix = random(6, 6, seed=3)
    one, two = lowrank.compress(up, down), lowrank.compress(up @ mix, torch.linalg.inv(mix) @ down)
    torch.testing.assert_close(one.left, two.left, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.right, two.right, rtol=0, atol=1e-9)
    pivots = one.left.gather(0, one.left.abs().argmax(0, keepdim=True))
    assert bool((pivots > 0).all())


def test_compress_gives_the_same_bits_again():
    up, down = random(50, 6), random(6, 40, seed=1)
    one, two = lowrank.compress(up, down), lowrank.compress(up.clone(), down.clone())
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_are_those_of_the_dense_product(shape, case):
    m, n, r = shape
    up, down = random(m, r, seed=1), random(r, n, seed=2)
    CASES[case](up, down)
    got = lowrank.singular_values(up, down)
    wanted = torch.linalg.svdvals(up @ down)
    k = min(len(got), len(wanted))
    scale = max(float(wanted[0]), 1e-300)
    torch.testing.assert_close(got[:k], wanted[:k], rtol=0, atol=1e-12 * scale)
    assert not bool((got[k:] > 1e-12 * scale).any())
    assert not bool((wanted[k:] > 1e-12 * scale).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_inner_products_and_norms_are_those_of_the_dense_products(dtype):
    up1, down1 = random(20, 3, seed=1).to(dtype), random(3, 15, seed=2).to(dtype)
    up2, down2 = random(20, 5, seed=3).to(dtype), random(5, 15, seed=4).to(dtype)
    A, B = up1.double() @ down1.double(), up2.double() @ down2.double()
    assert lowrank.inner(up1, down1, up2, down2) == pytest.approx(float((A * B).sum()), rel=1e-12)
    assert lowrank.squared_norm(up1, down1) == pytest.approx(float(A.square().sum()), rel=1e-12)
    assert lowrank.squared_norm(up1 * 0, down1) == 0.0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-7])
def test_the_distance_of_two_products_keeps_its_digits_however_near_they_are(step, case):
    up, down = random(40, 6), random(6, 30, seed=1)
    CASES[case](up, down)
    change = step * up * random(40, 6, seed=2)
    wanted = float((change @ down).square().sum())  # the difference itself, formed without cancelling
    found = lowrank.squared_distance((up, down), (up + change, down))
    scale = float(up.norm() * down.norm()) ** 2
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-28 * scale)


def test_adding_concatenates_exactly():
    terms = [(random(9, r, seed=r), random(r, 7, seed=-r), w) for r, w in ((1, 1.0), (3, -0.5), (5, 2.0))]
    up, down = lowrank.add(terms)
    assert up.shape == (9, 9)
    torch.testing.assert_close(up @ down, sum(w * u @ d for u, d, w in terms), rtol=1e-13, atol=1e-13)
    assert torch.equal(down, torch.cat([d for _, d, _ in terms]))


SPECTRA = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=20).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@given(SPECTRA, st.integers(1, 50))
def test_a_fixed_rank_is_kept_within_what_exists(sigma, wanted):
    got = rank.fixed(sigma, wanted)
    assert got == min(wanted, len(sigma))
    assert rank.fixed(sigma, 0) == 1


@given(SPECTRA, st.floats(1e-6, 1.0))
def test_energy_keeps_the_least_rank_that_is_enough(sigma, share):
    got = rank.energy(sigma, share)
    squares = (sigma**2).tolist()
    sums = list(itertools.accumulate(squares))
    assert 1 <= got <= len(sigma)
    assert sums[got - 1] >= share * sums[-1] * (1 - 1e-14)
    if got > 1:
        assert sums[got - 2] < share * sums[-1] * (1 + 1e-14)


@given(SPECTRA, st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_more_energy_never_needs_a_smaller_rank(sigma, one, two):
    low, high = sorted((one, two))
    assert rank.energy(sigma, low) <= rank.energy(sigma, high)


@pytest.mark.parametrize(("sigma", "wanted"), [([0.0, 0.0], 1), ([1.0, 0.0, 0.0], 1), ([1.0, 1.0, 0.0], 2)])
def test_all_energy_stops_where_the_spectrum_ends(sigma, wanted):
    assert rank.energy(torch.tensor(sigma), 1.0) == wanted


def conditioned(m, r, condition, seed):
    U, V = torch.linalg.qr(random(m, r, seed=seed))[0], torch.linalg.qr(random(r, r, seed=seed + 1))[0]
    return U * torch.logspace(0, -float(torch.log10(torch.tensor(condition))), r, dtype=torch.float64) @ V


@pytest.mark.parametrize("condition", [1e2, 1e4, 3e4, 1e6, 1e9])
@pytest.mark.parametrize("cancel", [False, True], ids=["plain", "one side undoes the other"])
def test_at_every_rank_the_error_is_within_a_millionth_of_the_optimum(condition, cancel):
    up = conditioned(60, 12, condition, seed=1)
    down = torch.linalg.pinv(up) @ conditioned(60, 50, 1e3, seed=5) if cancel else conditioned(50, 12, condition, 3).T
    M = up @ down
    sigma = torch.linalg.svdvals(M)
    svd = lowrank.compress(up, down)
    for keep in range(1, 12):
        best = float(sigma[keep:].norm())
        if best > 1e-9 * float(sigma[0]):  # nearer than that the product in fp64 is no reference
            left, right = svd.balanced(keep)
            assert float((left @ right - M).norm()) <= best * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(*(st.integers(1, 9) for _ in range(4)), st.integers(0, 10**6))
def test_a_hadamard_product_of_products_is_one_product(m, n, r1, r2, seed):
    up1, down1 = random(m, r1, seed=seed), random(r1, n, seed=seed + 1)
    up2, down2 = random(m, r2, seed=seed + 2), random(r2, n, seed=seed + 3)
    up, down = lowrank.hadamard_factors(up1, down1, up2, down2)
    assert up.shape == (m, r1 * r2)
    assert down.shape == (r1 * r2, n)
    torch.testing.assert_close(up @ down, (up1 @ down1) * (up2 @ down2), rtol=1e-12, atol=1e-12)


KRON = [((3, 4), (5, 2)), ((4, 4), (8, 6)), ((1, 3), (2, 2)), ((5, 1), (1, 7)), ((3, 2), (4, 5, 3, 3))]


@pytest.mark.parametrize("shapes", KRON, ids=str)
@pytest.mark.parametrize("independent", [1, 2, 9])
def test_a_kronecker_product_is_factorised_by_its_small_parts(shapes, independent):
    one = random(shapes[0][0], independent, seed=1) @ random(independent, shapes[0][1], seed=2)
    two = random(*shapes[1], seed=3)
    dense = torch.kron(one, two.flatten(1))
    sigma = torch.linalg.svdvals(dense)
    found = lowrank.kronecker(one, two)
    torch.testing.assert_close(
        found.sigma[: len(sigma)], sigma[: len(found.sigma)], rtol=0, atol=1e-11 * float(sigma[0])
    )
    torch.testing.assert_close(found.left * found.sigma @ found.right, dense, rtol=0, atol=1e-11)
    up, down = lowrank.kronecker_factors(one, two)
    assert up.shape[1] == torch.linalg.matrix_rank(dense, rtol=1e-12)
    torch.testing.assert_close(up @ down, dense, rtol=0, atol=1e-11)
    left, right = lowrank.kronecker_factors(one, two, rank=2)  # Eckart and Young
    assert float((left @ right - dense).norm()) <= float(sigma[2:].norm()) + 1e-11
    if len(shapes[1]) == 4:  # a kernel behind the columns: LoKr of a convolution
        whole = torch.einsum("pq,stkl->psqtkl", one, two)
        torch.testing.assert_close(dense.flatten(), whole.flatten(), rtol=1e-12, atol=1e-12)


def test_a_kronecker_product_of_products_needs_neither():
    up, down, one = random(30, 3, seed=1), random(3, 20, seed=2), random(4, 4, seed=3)
    found = lowrank.kronecker(one, lowrank.compress(up, down))
    torch.testing.assert_close(found.left * found.sigma @ found.right, torch.kron(one, up @ down), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (2, 3, 3)], ids=str)
def test_a_tucker_core_folds_into_two_factors(kernel):
    up, mid, down = random(7, 3, seed=1), random(3, 4, *kernel, seed=2), random(4, 6, seed=3)
    whole = torch.einsum("ia,ab...,bj->ij...", up, mid, down)
    ones = (1,) * len(kernel)
    for shaped in (lambda f: f, lambda f: f.reshape(*f.shape, *ones)):
        left, right = lowrank.tucker_factors(shaped(up), mid, shaped(down))
        assert left.shape == (7, 3)
        torch.testing.assert_close(left @ right, whole.flatten(1), rtol=1e-12, atol=1e-12)
