"""Sizes and conditions in families: arithmetic, fallbacks, nested configs; nothing else is an expression."""

import operator
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import LoratoolError, MismatchError, UsageError
from loratool.expressions import AbsentError, check, evaluate, holds, size

VALUES = {"a": 6, "b": 4, "zero": 0, "on": True, "off": False, "word": "x", "none": None, "many": [1], "half": 2.5}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
COMPARISONS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
#: (text, value); the value is None where some division does not come out even
LEAF = st.one_of(
    st.integers(0, 99).map(lambda n: (str(n), n)), st.sampled_from("ab").map(lambda name: (name, VALUES[name]))
)


def _joined(left, sign, right):
    text = f"({left[0]} {sign} {right[0]})"
    if left[1] is None or right[1] is None:
        return text, None
    if sign == "/":
        return text, left[1] // right[1] if right[1] and left[1] % right[1] == 0 else None
    return text, OPERATORS[sign](left[1], right[1])


TREE = st.recursive(LEAF, lambda inner: st.builds(_joined, inner, st.sampled_from("+-*/"), inner), max_leaves=12)


@given(TREE)
def test_arithmetic_is_pythons_and_division_comes_out_even_or_is_refused(tree):
    text, expected = tree
    if expected is None:
        with pytest.raises(MismatchError, match="does not divide by"):
            size(text, VALUES)
    else:
        assert size(text, VALUES) == expected


@given(st.lists(LEAF, min_size=2, max_size=6), st.data())
def test_products_bind_before_sums_and_both_from_left_to_right(leaves, data):
    signs = [data.draw(st.sampled_from("+-*")) for _ in leaves[1:]]
    sums, current, plus = 0, leaves[0][1], 1
    for sign, (_, value) in zip(signs, leaves[1:], strict=True):
        if sign == "*":
            current *= value
        else:
            sums, current, plus = sums + plus * current, value, 1 if sign == "+" else -1
    text = leaves[0][0] + "".join(f"{sign}{leaf}" for sign, (leaf, _) in zip(signs, leaves[1:], strict=True))
    assert size(text, VALUES) == sums + plus * current


def test_division_binds_like_a_product_from_the_left():
    assert size("12/2*3", {}) == 18
    assert size("12/(2*3)", {}) == 2
    assert size("2+12/3/2", {}) == 4


@given(LEAF, st.sampled_from(sorted(COMPARISONS)), LEAF)
def test_comparisons_are_pythons(left, sign, right):
    assert holds(f"{left[0]} {sign} {right[0]}", VALUES) is COMPARISONS[sign](left[1], right[1])


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", True),
        ("on", True),
        ("off", False),
        ("absent", False),
        ("none", False),
        ("not absent", True),
        ("not on", False),
        ("a and on", True),
        ("a and absent", False),
        ("absent or on", True),
        ("absent or off", False),
        ("not (on and off)", True),
        ("not off and on", True),
        ("on or off and off", True),  # and binds before or
        ("word == 'x'", True),
        ("word != 'x'", False),
        ("absent == 'x'", False),
        ("absent != 'x'", True),
        ("absent | on", True),
        ("off | on", False),  # the config has it, and it is off
        ("absent | a == 6", True),  # a | b binds before a comparison
    ],
)
def test_conditions_take_absent_keys_as_false(expression, expected):
    assert holds(expression, VALUES) is expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a|b", 6),
        ("absent|b", 4),
        ("none|b", 4),  # null in config.json is absent
        ("zero|b", 0),  # zero is not
        ("absent|none|b", 4),
        ("absent|7", 7),
        ("a*(absent|b)", 24),
        ("(absent/b|a)*2", 12),  # any absence on the left
        ("a|absent", 6),
        ("a|b/0", 6),  # the right is not looked at
    ],
)
def test_the_first_that_the_config_has_is_taken(expression, expected):
    assert size(expression, VALUES) == expected


def test_a_size_that_does_not_work_out_is_no_absence():
    with pytest.raises(MismatchError, match="6 does not divide by 4"):
        size("a/b|b", VALUES)


def test_names_are_looked_for_in_nested_configs():
    config = {"out": 2, "text_config": {"hidden": 3, "out": 5, "deep": {"er": 7}, "text_config": {"inner": 11}}}
    assert size("hidden", config) == size("text_config.hidden", config) == 3
    assert size("out", config) == 2  # the outer one is nearer
    assert size("text_config.out", config) == 5
    assert size("deep.er", config) == 7
    assert size("inner", config) == 11
    assert not holds("hidden", {"text_config": [("hidden", 1)]})
    assert not holds("deep.er.still", config)


@pytest.mark.parametrize(
    ("expression", "name"),
    [("absent", "absent"), ("a*absent", "absent"), ("absent|other", "other"), ("a.b", "a.b"), ("none+1", "none")],
)
def test_a_key_that_is_absent_is_named(expression, name):
    with pytest.raises(AbsentError, match=f"the config has no {name}"):
        size(expression, VALUES)
    assert issubclass(AbsentError, MismatchError)


@pytest.mark.parametrize("expression", ["on", "word", "many", "half", "'x'", "a == 6", "not a", "True"])
def test_what_is_no_whole_number_is_no_size(expression):
    with pytest.raises(MismatchError, match="is no size"):
        size(expression, VALUES)


@pytest.mark.parametrize("expression", ["half*2", "many*2", "word*2", "a+word", "half/b", "a-many"])
def test_arithmetic_takes_whole_numbers_only(expression):
    with pytest.raises(MismatchError, match="are no numbers"):
        size(expression, VALUES)


@pytest.mark.parametrize("expression", ["word < 3", "3 >= many", "a < word", "many > a"])
def test_values_that_have_no_order_are_refused_and_named(expression):
    with pytest.raises(MismatchError, match=expression):
        holds(expression, VALUES)


def test_numbers_are_expressions():
    assert size(7, {}) == evaluate(7, {}) == 7
    check(7)
    check("")


MALFORMED = [
    "a +", "(a", "a)", "a b", "a, b", "a; b", "a\nb", "a = 1", "a := 1", "(a := 1)", "*a", "1.5", "1e3", "b'x'", "...",
    "None", "1j", "a // b", "a % b", "a @ b", "a << b", "a & b", "a ^ b", "-a", "+a", "~a", "a is b", "a in b",
    "a not in b", "a < b < 3", "a == b == 3", "a if b else 3", "[a]", "(a, b)", "{a}", "{a: b}", "a[0]", "a[b:]",
    "lambda: a", "lambda a: a", "f'{a}'", "[x for x in a]", "(x for x in a)", "yield a", "await a", "import os",
]  # fmt: skip
HOSTILE = [
    "__import__('os').system('true')", "().__class__", "a()", "a.b()", "exec('1')", "eval('1')", "open('x')",
    "9**9**9", "a**b", "2**999999999", "'x'*999999999 if a else b", "9" * 5000, "1" + "*10" * 100_000,
    "(" * 50_000 + "a" + ")" * 50_000, "not " * 50_000 + "a", "not " * 500 + "a", "|".join("a" * 1000),
    "+".join("a" * 1000), "a" + ".a" * 1000, "\0", "a\0", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("expression", MALFORMED + HOSTILE, ids=lambda text: repr(text[:40]))
def test_anything_else_is_malformed_when_it_is_checked_and_when_it_is_used(expression):
    start = time.monotonic()
    for use in (check, lambda text: evaluate(text, VALUES), lambda text: holds(text, VALUES)):
        with pytest.raises(UsageError, match="is malformed"):
            use(expression)
    assert time.monotonic() - start < 5  # nothing grows with the numbers in it


@pytest.mark.parametrize(
    "expression", ["a.__class__", "a.real", "__builtins__", "__name__", "a.__init__.__globals__", "many.append", "self"]
)
def test_attributes_are_config_keys_and_never_pythons(expression):
    with pytest.raises(AbsentError):
        evaluate(expression, VALUES)
    assert holds(expression, VALUES) is False


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_an_error_of_ours(text):
    for use in (check, lambda t: evaluate(t, VALUES), lambda t: holds(t, VALUES)):
        try:
            use(text)
        except LoratoolError:
            continue


def test_configs_that_are_nested_without_end_or_hold_huge_numbers_are_refused_or_read():
    config: dict[str, object] = {}
    for _ in range(5000):
        config = {"text_config": config}
    assert not holds("a", config)
    with pytest.raises(MismatchError):
        size("a*a/7", {"a": 10**4000})
    with pytest.raises(MismatchError):
        size("a", {"a": 10**5000})
