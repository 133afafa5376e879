"""Tensor dtypes by their safetensors name; torch is not imported here.

Sizes are in bytes. Source: the safetensors format page and torch's dtype names.
"""

from __future__ import annotations

import struct

# safetensors name -> (torch name, bytes per element, struct code where struct knows the type), in the order of the
# safetensors library, which puts the data of a file behind each other from the last to the first of these
_TABLE: dict[str, tuple[str, int, str]] = {
    "BOOL": ("bool", 1, "?"),
    "U8": ("uint8", 1, "B"),
    "I8": ("int8", 1, "b"),
    "F8_E5M2": ("float8_e5m2", 1, ""),
    "F8_E4M3": ("float8_e4m3fn", 1, ""),
    "F8_E8M0": ("float8_e8m0fnu", 1, ""),
    "I16": ("int16", 2, "h"),
    "U16": ("uint16", 2, "H"),
    "F16": ("float16", 2, "e"),
    "BF16": ("bfloat16", 2, ""),
    "I32": ("int32", 4, "i"),
    "U32": ("uint32", 4, "I"),
    "F32": ("float32", 4, "f"),
    "C64": ("complex64", 8, ""),
    "F64": ("float64", 8, "d"),
    "I64": ("int64", 8, "q"),
    "U64": ("uint64", 8, "Q"),
}
_ORDER = {name: n for n, name in enumerate(_TABLE)}
_FROM_TORCH = {torch_name: name for name, (torch_name, _, _) in _TABLE.items()}

#: The dtypes that a user can ask for as output.
OUTPUT_DTYPES = ("float32", "bfloat16", "float16")


def is_known(dtype: str) -> bool:
    """Whether `dtype` is a safetensors dtype that loratool can size."""
    return dtype in _TABLE


def itemsize(dtype: str) -> int:
    """Bytes per element of a safetensors dtype."""
    return _TABLE[dtype][1]


def order(dtype: str) -> int:
    """The place of a dtype among all: larger elements have higher places."""
    return _ORDER[dtype]


def torch_name(dtype: str) -> str:
    """Return the torch attribute of a safetensors dtype: `BF16` -> `bfloat16`."""
    return _TABLE[dtype][0]


def from_torch_name(name: str) -> str:
    """Return the safetensors dtype of a torch name: `bfloat16` -> `BF16`."""
    return _FROM_TORCH[name]


def is_float(dtype: str) -> bool:
    """Whether a delta can be added to a weight of this dtype directly (16 bits or more, no scales)."""
    return dtype in ("F16", "BF16", "F32", "F64")


def wider(one: str, other: str) -> str:
    """Return the float dtype that holds both without loss: float32 for the two 16-bit ones together."""
    if one == other:
        return one
    return "F64" if "F64" in (one, other) else "F32"


def decode_scalar(dtype: str, data: bytes) -> float:
    """The number in a 0-d (or one-element) tensor, from its raw little-endian bytes."""
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    code = _TABLE[dtype][2]
    if not code:
        raise ValueError(f"a scalar of dtype {dtype} cannot be decoded")
    return float(struct.unpack("<" + code, data)[0])


def encode_scalar(value: float) -> bytes:
    """Return the raw bytes of a 0-d F32 tensor holding `value`."""
    return struct.pack("<f", value)
