"""Modules of kohya and LyCORIS files: what is read, what is refused and how it is named, and what is written back."""

from math import prod

import pytest
import torch
from lycoris_parts import (
    CASES,
    IN,
    LAYERS,
    OUT,
    RANK,
    close,
    glora,
    loha,
    lokr,
    lora,
    lora_tucker,
    merge,
    random,
    ref,
    refs,
)

from loratool.deltas import Boft, Dora, Full, Ia3, LoKr, LowRank, Oft, Replace
from loratool.formats import lycoris

# ---- biases, norms, whole weights


def test_differences_of_biases_and_norms_and_new_weights():
    weight, bias = random(OUT, IN), random(OUT)
    for names in (("diff", "diff_b"), ("w_norm", "b_norm")):
        read = lycoris.read(refs(dict(zip(names, (weight, bias), strict=True))), None)
        assert isinstance(read.weight, Full)
        assert isinstance(read.bias, Full)
        assert (read.weight.scaling, read.bias.scaling) == (1, 1)
        assert (read.weight.value.name, read.bias.value.name) == names
    assert lycoris.read(refs({"diff_b": bias}), None).weight is None
    new = lycoris.read(refs({"set_weight": weight}), None).weight
    assert isinstance(new, Replace)
    close(merge(random(OUT, IN, seed=9), new), weight)


def test_the_bias_of_lora_b_is_scaled_and_a_difference_is_not():
    parts, _, _ = lora("linear")
    scaled = lycoris.read(refs({**parts, "lora_B.bias": random(OUT)}), 6.0).bias
    plain = lycoris.read(refs({**parts, "diff_b": random(OUT)}), 6.0).bias
    assert (scaled.scaling, plain.scaling) == (6.0 / RANK, 1.0)


# ---- what is refused, and how it is named

_DOWN, _UP = random(4, IN), random(OUT, 4)
REFUSED = {
    "half a pair: lora_up": {"lora_down": _DOWN},
    "different ranks": {"lora_down": _DOWN, "lora_up": random(OUT, 3)},
    "must be 1x1": {"lora_down": random(4, IN, 3, 3), "lora_up": random(OUT, 4, 3, 3)},
    "no matching dimensions": {"lora_down": random(4, IN, 1, 1), "lora_up": _UP},
    "core does not fit": {
        "lora_down": random(4, IN, 1, 1), "lora_up": random(OUT, 4, 1, 1), "lora_mid": random(4, 3, 3, 3)
    },
    "hada_w2_b is missing": {"hada_w1_a": _UP, "hada_w1_b": _DOWN, "hada_w2_a": _UP},
    "factors have different ranks": {
        "hada_w1_a": _UP, "hada_w1_b": _DOWN, "hada_w2_a": random(OUT, 3), "hada_w2_b": random(3, IN)
    },
    "lokr_w2_a and lokr_w2_b are missing": {"lokr_w1": random(3, 2)},
    "whole and as a product": {
        "lokr_w1": random(3, 2), "lokr_w1_a": random(3, 1), "lokr_w1_b": random(1, 2), "lokr_w2": _UP
    },
    "LoRA and a full difference in one module": {"lora_down": _DOWN, "lora_up": _UP, "diff": random(OUT, IN)},
    "magnitude_w: no kind": {"lora_down": _DOWN, "lora_up": _UP, "magnitude_w": random(OUT)},
    r"dora_scale is \[7, 1\]": {"lora_down": _DOWN, "lora_up": _UP, "dora_scale": random(7, 1)},
    "dora_scale beside full": {"diff": random(OUT, IN), "dora_scale": random(OUT, 1)},
    "dora_scale beside no factors": {"dora_scale": random(OUT, 1)},
    "square matrices": {"oft_blocks": random(4, 3, 5)},
    "rescale has not": {"oft_blocks": random(4, 3, 3), "rescale": random(5, 1)},
    "butterfly factors": {"oft_blocks": random(3, 6, 4, 4)},
    "factors do not fit: a1": {"a1": random(IN, 4), "a2": random(4, IN), "b1": random(OUT, 3), "b2": random(4, IN)},
    "on_input is missing": {"weight": random(OUT)},
    "must be one number": {"weight": random(OUT), "on_input": torch.tensor([1, 0])},
    "bias_values without the rest of the three": {"lora_down": _DOWN, "lora_up": _UP, "bias_values": random(3)},
    "without plain factors": {
        "diff": random(OUT, IN), "bias_indices": torch.ones(2, 3, dtype=torch.int16), "bias_values": random(3),
        "bias_size": torch.ones(2, dtype=torch.int16),
    },
    r"diff_b is \[5\], the layer has 144 outputs": {"lora_down": _DOWN, "lora_up": _UP, "diff_b": random(5)},
    "diff_b and b_norm": {"diff_b": random(5), "b_norm": random(5)},
    "lora_B.bias without": {"lora_B.bias": random(5)},
    "lora_mid is I8": {
        "lora_down": random(4, IN, 1, 1),
        "lora_up": random(OUT, 4, 1, 1),
        "lora_mid": torch.ones(4, 4, 3, 3, dtype=torch.int8),
    },
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_broken_module_is_refused_by_name(what):
    with pytest.raises(ValueError, match=what):
        lycoris.read(refs(REFUSED[what]), 4.0)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        lycoris.read(refs(lora("linear")[0]), alpha)


def test_an_alpha_alone_and_nothing():
    for alpha, what in ((1.0, "an alpha without factors"), (None, "no tensors")):
        with pytest.raises(ValueError, match=what):
            lycoris.read({}, alpha)


# ---- axes of DoRA


@pytest.mark.parametrize(
    ("weight", "shape", "of_inputs"),
    [
        ((6, 6), (6, 1), False),
        ((6, 6), (1, 6), True),
        ((1, 6), (1, 1), False),
        ((1, 6), (1, 6), True),
        ((6, 1), (1, 1), True),
        ((6, 1), (6, 1), False),
        ((6, 6, 3, 3), (1, 6, 1, 1), True),
        ((6, 6, 3, 3), (6, 1, 1, 1), False),
        ((6, 4), (6,), False),
    ],
)
def test_the_axis_of_a_magnitude(weight, shape, of_inputs):
    k = weight[2:]
    parts = {"lora_down": random(2, weight[1], *k), "lora_up": random(weight[0], 2, *(1 for _ in k))}
    read = lycoris.read(refs({**parts, "dora_scale": random(*shape)}), None).weight
    assert (read.of_inputs, read.magnitude.shape) == (of_inputs, (prod(shape),))


def test_pefts_magnitude_of_a_convolution_is_of_outputs():
    parts = {
        "lora_down": random(2, 6, 3, 3),
        "lora_up": random(6, 2, 1, 1),
        "lora_magnitude_vector": random(1, 6, 1, 1),
    }
    assert not lycoris.read(refs(parts), None).weight.of_inputs


# ---- written back


@pytest.mark.parametrize("layer", ["linear", "3x3"])
@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_byte_for_byte(case, layer):
    parts, alpha, _ = CASES[case](layer)
    given = refs(parts)
    spelled = lycoris.parts_of(lycoris.read(given, alpha).weight)
    if case == "old glora":
        given = dict(zip(("a2", "a1", "b2", "b1"), (given[n] for n in ("a1", "a2", "b1", "b2")), strict=True))
    assert spelled.tensors.keys() == given.keys()
    for name, tensor in spelled.tensors.items():
        assert (tensor.shape, tensor.dtype, tensor.pieces) == (given[name].shape, given[name].dtype, given[name].pieces)
    again = lycoris.read(spelled.tensors, spelled.alpha).weight
    base = random(*LAYERS[layer], seed=9)
    assert torch.equal(merge(base, again), merge(base, lycoris.read(given, alpha).weight))


@pytest.mark.parametrize("alpha", [8.0, 1.0, 0.7, 6.0])
def test_alpha_comes_back(alpha):
    for parts, _, _ in (lora("3x3"), loha("3x3"), lokr("3x3"), glora("3x3"), lora_tucker("3x3")):
        assert lycoris.parts_of(lycoris.read(refs(parts), alpha).weight).alpha == alpha


def test_pefts_dora_gets_the_shape_of_lycoris():
    factors = LowRank(ref("d", random(4, IN, 3, 3)), ref("u", random(OUT, 4, 1, 1)), 1.0)
    spelled = lycoris.parts_of(Dora(factors, ref("m", random(OUT))))
    assert spelled.tensors["dora_scale"].shape == (OUT, 1, 1, 1)


def test_what_such_files_cannot_hold():
    two, three = ref("x", random(4, 4)), ref("x", random(2, 4, 4))
    adalora = LowRank(two, two, 1.0, ref("e", random(4, 1)))
    whole = LoKr((two,), (two,), 0.5)
    conv1d = LoKr((two,), (three,), 1.0, on_last=True)
    peft = (Oft(two, 3, 5), Boft(ref("R", random(1, 2, 3, 3)), two), Ia3(two, False), Dora(adalora, two))
    for delta in (adalora, whole, conv1d, *peft, Full(two, 0.5)):
        assert lycoris.parts_of(delta) is None
    assert lycoris.parts_of(Replace(two), bias=True) is None
    assert lycoris.parts_of(Full(two), bias=True, norm=True).tensors.keys() == {"b_norm"}
