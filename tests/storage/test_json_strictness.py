"""JSON from strangers: whatever two parsers could read differently is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import FormatError, StorageError
from loratool.storage import jsonfile

REFUSED = {
    "a duplicate key": b'{"lora_alpha": 8, "lora_alpha": 800}',
    "a nested duplicate key": b'{"a": {"b": 1, "b": 1}}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "a number that overflows": b'{"a": 1e999}',
    "an integer of 5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "bottomless nesting": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an array": b"[1, 2]",
    "a bare number": b"3",
    "nothing": b"",
    "a torn file": b'{"a": 1',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "Latin-1": '{"é": 1}'.encode("latin-1"),
    "half a surrogate pair in a key": b'{"\\ud800": 1}',
    "half a surrogate pair in a value": b'{"a": ["\\uDfff"]}',
    "an encoded surrogate": b'{"a": "\xed\xa0\x80"}',
    "a raw control character": b'{"a": "\x1b[31m"}',
    "trailing text": b'{"a": 1} x',
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED.keys())
def test_ambiguous_or_damaged_json_is_refused_with_the_file_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        jsonfile.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert jsonfile.read(path) == {"a": "\U0001f600"}


def test_a_file_beyond_the_cap_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(jsonfile.CONFIG_CAP + 1)
    with pytest.raises(FormatError, match="beyond the cap"):
        jsonfile.read(path)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        jsonfile.read(tmp_path / "none.json")


text = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(text, values, max_size=4), st.booleans())
def test_ordinary_json_reads_as_the_standard_library_reads_it(content: dict[str, Any], ascii_only: bool) -> None:
    raw = json.dumps(content, ensure_ascii=ascii_only).encode()
    assert jsonfile.parse(raw, "x") == json.loads(raw)


@given(st.dictionaries(text, values, max_size=4))
def test_what_is_written_is_plain_json_and_the_same_in_every_order(content: dict[str, Any]) -> None:
    raw = jsonfile.dump(content)
    assert json.loads(raw) == content
    assert raw == jsonfile.dump(dict(reversed(content.items())))


def test_not_a_number_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        jsonfile.dump({"a": float("nan")})


def test_a_duplicate_among_very_many_keys_is_found_at_once() -> None:
    raw = "{" + ",".join(f'"k{n}": 0' for n in range(20_000)) + ',"k19999": 1}'
    start = time.process_time()
    with pytest.raises(FormatError, match="duplicate key 'k19999'"):
        jsonfile.parse(raw, "x")
    assert time.process_time() - start < 1
