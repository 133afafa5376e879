"""Subspaces and distances of products of factors, against scipy and dense fp64 arithmetic."""

import math

import pytest
import torch

from loratool.algebra import subspaces


def factors(seed, out=30, into=20, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, into)))


def dense(pair):
    return pair[0] @ pair[1]


def projection(matrix):
    """The orthogonal projection onto the column space, by the pseudoinverse."""
    return matrix @ torch.linalg.pinv(matrix)


@pytest.mark.parametrize("ranks", [(1, 1), (4, 4), (3, 7), (7, 3), (20, 5)])
def test_angles_are_those_of_scipy(ranks):
    linalg = pytest.importorskip("scipy.linalg")
    one, two = factors(1, rank=ranks[0]), factors(2, rank=ranks[1])
    found = subspaces.likeness(one, two)
    for name, turned in (("columns", lambda m: m), ("rows", lambda m: m.T)):
        basis = [linalg.orth(turned(dense(pair)).numpy(), rcond=1e-9) for pair in (one, two)]
        expected = sorted(math.degrees(a) for a in linalg.subspace_angles(*basis))
        assert found[name] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("degrees", [1e-9, 1e-3, 10.0, 44.9, 45.1, 80.0, 90.0])
def test_a_known_angle_is_found_however_small(degrees):
    up = torch.zeros(9, 1, dtype=torch.float64)
    up[0] = 3.0
    turned = torch.zeros(9, 1, dtype=torch.float64)
    turned[0], turned[5] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    down = torch.ones(1, 4, dtype=torch.float64)
    found = subspaces.likeness((up, down), (turned, down))
    assert found["columns"] == [pytest.approx(degrees, rel=1e-6, abs=1e-13)]
    assert found["rows"] == [pytest.approx(0.0, abs=1e-6)]


@pytest.mark.parametrize("ranks", [(2, 2), (5, 3), (1, 15), (20, 20)])
def test_numbers_are_those_of_the_dense_matrices(ranks):
    one, two = factors(3, rank=ranks[0]), factors(4, rank=ranks[1])
    A, B = dense(one), dense(two)
    found = subspaces.likeness(one, two)
    assert found["norms"] == pytest.approx([float(A.norm()), float(B.norm())], rel=1e-13)
    assert found["inner"] == pytest.approx(float((A * B).sum()), rel=1e-11)
    assert found["distance"] == pytest.approx(float((A - B).norm()), rel=1e-13)
    shared = [float((projection(onto) @ of @ projection(onto.T)).square().sum()) for of, onto in ((A, B), (B, A))]
    assert found["shared"] == pytest.approx(shared, rel=1e-9)
    assert found["chance"] == [pytest.approx(min(r, 20) ** 2 / 600) for r in reversed(ranks)]


def test_a_distance_far_below_the_norms_keeps_its_digits():
    """A difference of squared norms would be rounding alone from 1e-8 on."""
    up, down = factors(5)
    nudge = torch.zeros_like(up)
    nudge[3, 2] = 1e-12
    found = subspaces.likeness((up, down), (up + nudge, down))
    expected = float(((up + nudge) - up).norm() * down[2].norm())  # as the nudge was rounded
    assert found["distance"] == pytest.approx(expected, rel=1e-2)


def test_one_update_in_other_factors_is_at_a_distance_of_rounding_and_bits_are_at_none():
    up, down = factors(6)
    mixed = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64))[0]
    found = subspaces.likeness((up, down), (torch.cat([up @ mixed, up], 1), torch.cat([mixed.T @ down, 0 * down])))
    assert found["distance"] < 1e-14 * found["scale"]
    assert len(found["columns"]) == len(found["rows"]) == 4
    assert max(found["columns"]) < 1e-6
    assert subspaces.likeness((up, down), (up.clone(), down.clone()))["distance"] == 0.0


def test_directions_of_rounding_are_no_directions():
    up, down = factors(8, rank=3)
    noise = factors(9, rank=2)
    noisy = torch.cat([up, 1e-9 * noise[0]], dim=1), torch.cat([down, noise[1]])
    assert len(subspaces.likeness(noisy, noisy)["columns"]) == 3


def test_nothing_beside_something():
    one = factors(1)
    nothing = torch.zeros(30, 0, dtype=torch.float64), torch.zeros(0, 20, dtype=torch.float64)
    for pair, order in (((one, nothing), 1), ((nothing, one), -1)):
        found = subspaces.likeness(*pair)
        norm = float(dense(one).norm())
        assert found["norms"][::order] == [pytest.approx(norm), 0.0]
        assert found["distance"] == pytest.approx(norm)
        assert found["shared"] == [0.0, 0.0]
        assert found["columns"] == found["rows"] == []


def test_sums_over_blocks_are_those_of_the_whole():
    A, B = dense(factors(1)), dense(factors(2))
    sums = subspaces.Sums()
    for one, two in zip(A.split(7), B.split(7), strict=True):
        sums.add(one, two)
    sums.add(A[:3], None)
    extra = float(A[:3].square().sum())
    assert sums.facts["norms"][0] ** 2 == pytest.approx(float(A.square().sum()) + extra)
    assert sums.facts["inner"] == pytest.approx(float((A * B).sum()))
    assert sums.facts["distance"] ** 2 == pytest.approx(float((A - B).square().sum()) + extra)
