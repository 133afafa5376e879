"""dtype names and sizes against torch, scalars against torch's own reading of the bytes."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from loratool import dtypes

KNOWN = [
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64",
    "I64", "F64", "C64",
]  # fmt: skip
SCALARS = [d for d in KNOWN if not d.startswith("F8") and d != "C64"]


def from_bytes(dtype, data):
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtypes.torch_name(dtype)))[0]


@pytest.mark.parametrize("dtype", KNOWN)
def test_names_and_sizes_are_those_of_torch(dtype):
    torch_dtype = getattr(torch, dtypes.torch_name(dtype))
    assert dtypes.is_known(dtype)
    assert dtypes.itemsize(dtype) == torch_dtype.itemsize
    assert dtypes.from_torch_name(str(torch_dtype).removeprefix("torch.")) == dtype


@pytest.mark.parametrize("dtype", KNOWN)
def test_the_safetensors_library_spells_the_dtype_so(dtype):
    data = save({"x": torch.zeros(1, dtype=getattr(torch, dtypes.torch_name(dtype)))})
    (length,) = struct.unpack("<Q", data[:8])
    assert f'"dtype":"{dtype}"' in data[8 : 8 + length].decode().replace(" ", "")


@given(st.sampled_from([d for d in SCALARS if d != "BOOL"]), st.binary(min_size=8, max_size=8))
def test_any_scalar_is_decoded_as_torch_decodes_it(dtype, data):
    data = data[: dtypes.itemsize(dtype)]
    wanted = float(from_bytes(dtype, data))
    got = dtypes.decode_scalar(dtype, data)
    assert got == wanted or (math.isnan(got) and math.isnan(wanted))


@pytest.mark.parametrize("value", [False, True])
def test_a_bool_is_a_number(value):
    assert dtypes.decode_scalar("BOOL", bytes([value])) == float(value)


@pytest.mark.parametrize("dtype", [d for d in KNOWN if d not in SCALARS])
def test_a_scalar_that_is_no_plain_number_is_refused(dtype):
    with pytest.raises(ValueError, match=dtype):
        dtypes.decode_scalar(dtype, b"\0" * dtypes.itemsize(dtype))


@given(st.floats(width=32, allow_nan=False))
def test_encoding_a_float32_loses_nothing(value):
    assert float(from_bytes("F32", dtypes.encode_scalar(value))) == value


@pytest.mark.parametrize("dtype", KNOWN)
def test_only_plain_floats_can_be_added_to(dtype):
    torch_dtype = getattr(torch, dtypes.torch_name(dtype))
    assert dtypes.is_float(dtype) == (torch_dtype.is_floating_point and torch_dtype.itemsize > 1)


def test_unknown_dtypes_are_not_known():
    assert not dtypes.is_known("F4")
