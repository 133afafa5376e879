"""The pattern language: what matches, what is malformed, and flat names that come back."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import UsageError
from loratool.patterns import Lexicon, flatten, natural, parse, selects

NAME = st.from_regex(r"[a-z][a-z0-9]{0,4}(_[a-z][a-z0-9]{0,3})?", fullmatch=True)
ELEMENT = st.one_of(NAME, st.just("{i}"))
INDEX = st.integers(0, 10**6)


def test_choices_multiply_and_remember_their_last_alternative():
    found = {(s.text, s.alternative) for s in parse("(a|b).{i}.(q|k|v)")}
    assert found == {(f"{x}.{{i}}.{y}", n) for x in "ab" for n, y in enumerate("qkv")}


@pytest.mark.parametrize(
    "pattern", ["", "a..b", "a.**.b", "(a|b", "a.{i", "a b", "a.{}", "a.{1}", "a.***", "(a|)", "a/b"]
)
def test_malformed_patterns_are_refused_with_their_text(pattern):
    with pytest.raises(UsageError) as caught:
        parse(pattern)
    assert repr(pattern) in str(caught.value)


def test_what_to_write_instead_of_a_malformed_pattern_is_itself_well_formed():
    with pytest.raises(UsageError) as of_a_list:
        parse("q_proj, v_proj")
    assert "--target q_proj --target v_proj" in of_a_list.value.hint
    for habit in ("layers.{0}.**", "layers.[0-2].*"):
        with pytest.raises(UsageError) as caught:
            parse(habit)
        (example,) = re.findall(r"layers\S*(?=;)", caught.value.hint)
        assert selects(example, "model.layers.5.mlp.up_proj")
        assert not selects(example, "model.layers.6.mlp.up_proj")


@pytest.mark.parametrize("page", [Path(__file__).parents[2] / "docs/init.md"])
def test_the_patterns_of_the_page_are_well_formed(page):
    table = page.read_text().partition("## Patterns")[2].partition("## ")[0]
    rows = [line.replace("\\|", "/").split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    patterns = [text.replace("/", "|") for row in rows for text in re.findall("`(.*?)`", row)]
    assert len(patterns) > 6
    for pattern in patterns:
        assert parse(pattern.rpartition(":")[2])


@given(st.lists(ELEMENT, min_size=1, max_size=6), st.data())
def test_filling_and_matching_are_inverse(elements, data):
    (skeleton,) = parse(".".join(elements))
    indices = tuple(data.draw(INDEX) for e in elements if e == "{i}")
    assert skeleton.match(skeleton.fill(indices)) == indices


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),  # elements are whole
        ("layers.{i}.self_attn.*", "model.layers.11.self_attn.v_proj", True),
        ("layers.0.**", "model.layers.0.mlp.up_proj", True),
        ("layers.0.**", "model.layers.01.mlp.up_proj", False),
        ("layers.1.**", "model.layers.11.mlp.up_proj", False),
        ("layers.**", "model.layers", False),  # a subtree is below its root
        ("(q|k)_proj", "a.k_proj", True),
        ("(q|k)_proj", "a.v_proj", False),
        ("model.layers", "model.layers.0", False),  # whole name or its end, not its start
        ("**", "anything.at.all", True),
        ("*", "anything.at.all", True),  # the last element is an end
    ],
)
def test_a_target_pattern_selects_whole_names_or_their_ends(pattern, path, wanted):
    assert selects(pattern, path) is wanted


def test_a_component_in_front_of_a_pattern_restricts_it():
    assert selects("unet:**", "a.b", "unet")
    assert not selects("unet:**", "a.b", "text_encoder")
    assert selects("**", "a.b", "unet")


@given(st.lists(st.one_of(NAME, st.integers(0, 999).map(str)), min_size=1, max_size=5))
def test_a_path_selects_itself_by_its_name_and_by_any_of_its_ends(elements):
    path = ".".join(elements)
    for start in range(len(elements)):
        assert selects(".".join(elements[start:]), path)


def test_natural_order_counts():
    paths = [f"layers.{i}.q" for i in range(12)]
    assert sorted(sorted(paths), key=natural) == paths


@given(st.lists(st.one_of(NAME, INDEX.map(str)), min_size=1, max_size=5))
def test_natural_keys_tell_paths_apart(elements):
    path = ".".join(elements)
    other = path + ".x"
    assert natural(path) != natural(other)
    assert (natural(path) < natural(other)) != (natural(other) < natural(path))


LAYERS = [
    "down.{i}.attn.{j}.to_(q|k|v)",
    "down.{i}.attn.{j}.to_out.0",
    "mid_block.net_2.{i}",
    "head",
    "conv1.{i}.conv2",
]


@given(st.sampled_from([s for p in LAYERS for s in parse(p)]), st.data())
def test_flat_names_resolve_to_the_path_they_came_from(skeleton, data):
    path = skeleton.fill(tuple(data.draw(INDEX) for e in skeleton.elements if e.startswith("{")))
    lexicon = Lexicon((p, p) for p in LAYERS)
    assert lexicon.find(path).path == path
    assert [f.path for f in lexicon.unflatten(flatten(path))] == [path]


@given(st.from_regex(r"[a-z0-9_]{0,30}", fullmatch=True))
def test_a_reading_of_any_flat_name_flattens_back_to_it(text):
    lexicon = Lexicon((p, p) for p in LAYERS)
    for found in lexicon.unflatten(text):
        assert re.sub(r"\.", "_", found.path) == text


def test_flat_names_with_two_readings_give_both():
    lexicon = Lexicon([("a.b_c", 1), ("a_b.c", 2)])
    assert {f.path for f in lexicon.unflatten("a_b_c")} == {"a.b_c", "a_b.c"}


def test_a_literal_number_is_not_an_index():
    lexicon = Lexicon([("to_out.0", 1)])
    assert lexicon.find("to_out.0") is not None
    assert lexicon.find("to_out.1") is None
    assert lexicon.unflatten("to_out_1") == []


def test_layers_name_every_element():
    with pytest.raises(UsageError, match="wildcard"):
        Lexicon([("a.**", 1)])


@given(
    st.lists(st.sampled_from(["a", "b", "{i}", "*"]), max_size=4),
    st.sampled_from(["a", "{i}", "*", "**"]),
    st.lists(st.sampled_from(["a", "b", "0", "12"]), min_size=1, max_size=6),
)
def test_selecting_is_matching_some_end_of_the_path_and_a_subtree_goes_on(elements, last, names):
    spelled = {"{i}": r"\d+", "*": r"[^.]+", "**": r".+"}
    wanted = r"(.+\.)?" + r"\.".join(spelled.get(e, e) for e in [*elements, last])
    path = ".".join(names)
    assert selects(".".join([*elements, last]), path) == bool(re.fullmatch(wanted, path))


@pytest.mark.parametrize("pattern", ["b.q_proj", "b.**", "(a|b|c).{i}.*"])
def test_a_path_of_very_many_elements_costs_little(pattern):
    start = time.monotonic()
    assert not selects(pattern, "a." * 50_000 + "x")
    assert time.monotonic() - start < 0.5
