"""Rank rules against their definitions, spelled out; kohya's against cases worked out by hand."""

from functools import partial
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.algebra import rank

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def least(sigma, holds):
    """The definition of every rule: the smallest rank k >= 1 for which `holds(kept, lost)`."""
    values = sigma.tolist()
    return next(k for k in range(1, len(values) + 1) if holds(values[:k], values[k:]) or k == len(values))


def squares(values):
    return sum(v * v for v in values)


@given(SPECTRA, st.floats(0.01, 0.9999))
def test_error_keeps_the_least_rank_that_is_near_enough(sigma, limit):
    exact = [sqrt(squares(sigma[k:].tolist()) / squares(sigma.tolist())) for k in range(1, len(sigma) + 1)]
    got = rank.error(sigma, limit)
    assert exact[got - 1] <= limit * (1 + 1e-9)
    assert got == 1 or exact[got - 2] > limit * (1 - 1e-9)


def test_error_resolves_what_the_total_cannot():
    sigma = torch.tensor([1.0, 1e-9, 1e-10], dtype=torch.float64)  # squares 1, 1e-18, 1e-20: lost in a sum with 1
    assert rank.error(sigma, 2e-9) == 1
    assert rank.error(sigma, 5e-10) == 2
    assert rank.error(sigma, 5e-11) == 3


@given(SPECTRA, st.floats(1e-4, 1e4))
def test_within_keeps_the_least_rank_that_is_near_enough(sigma, distance):
    wanted = least(sigma, lambda kept, lost: sqrt(squares(lost)) <= distance)
    exact = [sqrt(squares(sigma[k:].tolist())) for k in range(1, len(sigma) + 1)]
    assert rank.within(sigma, distance) == wanted or exact[wanted - 1] == pytest.approx(distance)


@given(SPECTRA, st.floats(1.0, 1e4))
def test_ratio_keeps_what_is_not_too_far_below_the_first(sigma, limit):
    got = rank.ratio(sigma, limit)
    assert got == sum(s * limit >= float(sigma[0]) for s in sigma.tolist())


@given(SPECTRA, st.floats(0.01, 1.0))
def test_cumulative_keeps_a_share_of_the_plain_sum(sigma, share):
    got = rank.cumulative(sigma, share)
    sums = sigma.cumsum(0).tolist()
    assert sums[got - 1] >= share * sums[-1] * (1 - 1e-12)
    assert got == 1 or sums[got - 2] < share * sums[-1] * (1 + 1e-12)


@given(SPECTRA, st.floats(0, 1e3))
def test_above_keeps_what_is_above(sigma, floor):
    assert rank.above(sigma, floor) == max(1, sum(s > floor for s in sigma.tolist()))


RULES = {
    "fixed": partial(rank.fixed, rank=4),
    "energy": partial(rank.energy, share=0.8),
    "error": partial(rank.error, limit=0.3),
    "ratio": partial(rank.ratio, limit=5),
    "above": partial(rank.above, floor=2.0),
    "resolved": partial(rank.resolved, eps=0.01),
    "cumulative": partial(rank.cumulative, share=0.7),
    "knee": rank.knee,
    "sv_ratio": partial(rank.sv_ratio, target=5, size=100),
    "sv_fro": partial(rank.sv_fro, target=0.9, size=100),
    "sv_cumulative": partial(rank.sv_cumulative, target=0.7, size=100),
}


@pytest.mark.parametrize("name", RULES)
@given(SPECTRA, st.data())
def test_part_of_a_spectrum_gives_the_answer_of_the_whole_or_asks_for_more(name, sigma, data):
    rule = RULES[name]
    whole = rule(sigma)
    assert 1 <= whole <= len(sigma)
    known = data.draw(st.integers(1, len(sigma)))
    beyond = float(sigma[known:].square().sum())
    got = rule(sigma[:known], beyond=beyond)
    assert got in (whole, known + 1)
    if got == whole <= known:
        return
    # what asks for more may not have had the answer
    assert whole >= known or name in ("cumulative", "sv_cumulative", "knee") or abs(whole - known) <= 1


@pytest.mark.parametrize("name", RULES)
def test_a_zero_spectrum_keeps_rank_one(name):
    assert RULES[name](torch.zeros(5, dtype=torch.float64)) == 1 or name == "fixed"


@given(SPECTRA)
def test_several_rules_are_upper_bounds_together(sigma):
    chosen = [RULES["fixed"], RULES["energy"], RULES["ratio"]]
    rules = [lambda s, b, r=rule: r(s, beyond=b) for rule in chosen]
    assert rank.smallest(rules, sigma) == min(rule(sigma) for rule in chosen)
    assert rank.smallest([], sigma) == len(sigma)
    # one rule that is sure decides, though another has to see more
    assert rank.smallest([*rules, lambda s, b: len(s) + 1], sigma, 1e9) <= 4


# kohya, worked out by hand: sum 16, squares 64 + 16 + 4 + 1 + 1 = 86
HAND = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "target", "wanted"),
    [
        (rank.sv_ratio, 4, 3),  # above 8 / 4 = 2: 8 and 4 (2 is not above), and one more
        (rank.sv_ratio, 3, 3),  # above 2.67: 8 and 4, and one more
        (rank.sv_ratio, 1, 2),  # above 8: none, counted as one, and one more
        (rank.sv_ratio, 100, 5),  # all five; the index stops at len - 1 = 4, and one more
        (rank.sv_cumulative, 0.75, 3),  # 8 + 4 is 0.75 exactly: two, and one more
        (rank.sv_cumulative, 0.8, 4),  # 8 + 4 + 2 is 0.875: three, and one more
        (rank.sv_cumulative, 0.4, 2),  # 8 is 0.5: one, and one more
        (rank.sv_cumulative, 1.0, 5),  # all five; the index stops at 4, and one more
        (rank.sv_fro, 0.9, 3),  # 0.81 of 86 is 69.66, 64 + 16 is enough: two, and one more
        (rank.sv_fro, 0.5, 2),  # 0.25 of 86: one, and one more
        (rank.sv_fro, 1.0, 5),
    ],
)
def test_kohyas_rules_keep_one_more_than_they_say(rule, target, wanted):
    assert rule(HAND, target) == wanted
    assert rule(HAND * 1e-8, target) == 1  # a first singular value of 8e-8 is a zero matrix to sd-scripts
    assert rule(HAND[:1], target) == 1


def test_kohyas_rules_see_the_zeros_of_the_product_of_the_factors():
    # sd-scripts takes the SVD of the 100 x 100 product: two values, then zeros; the third rank would hold nothing
    assert rank.sv_ratio(HAND[:2], 4, size=100) == 2
    assert rank.sv_ratio(HAND, 100, size=100) == 5
    assert rank.sv_fro(HAND[:3], 0.5, size=100) == 2


@pytest.mark.parametrize("head", [1, 3, 8])
def test_the_knee_is_where_a_head_meets_a_tail(head):
    tail = torch.logspace(-2, -2.3, 32 - head, dtype=torch.float64)
    sigma = torch.cat([torch.linspace(1.2, 1, head, dtype=torch.float64), tail])
    assert rank.knee(sigma) == head
    assert rank.auto(sigma, 1e-7) == head


def test_the_knee_of_a_high_head_is_its_last_value():
    sigma = torch.cat([torch.linspace(1.2, 1, 20), torch.logspace(-0.5, -4, 8)]).double()
    assert rank.knee(sigma) in (20, 21)


def test_a_straight_line_has_no_knee():
    sigma = torch.logspace(0, -3, 30, dtype=torch.float64)
    assert rank.knee(sigma) == 30
    assert rank.knee(torch.ones(9, dtype=torch.float64)) == 9
    assert rank.knee(sigma[:2]) == 2
    assert rank.knee(sigma[:1]) == 1


def test_auto_stops_at_what_the_dtype_resolves():
    sigma = torch.logspace(0, -6, 61, dtype=torch.float64)  # a tenth of a decade each, no knee
    assert rank.auto(sigma, 2.0**-8) == 25  # 10^-2.4 is the last above 2^-8 = 10^-2.41
    assert rank.auto(sigma, 1e-12) == 61
