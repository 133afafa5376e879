"""Convolution factors are matrices and back; the finite check misses nothing."""

import pytest
import torch

from loratool.algebra.deltas import as_factors, as_matrices, is_finite


def test_the_matrix_of_convolution_factors_is_the_update_that_two_convolutions_make():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 5, 3, 3, generator=generator), torch.randn(7, 3, 1, 1, generator=generator)
    image = torch.randn(2, 5, 9, 9, generator=generator)
    wanted = torch.nn.functional.conv2d(torch.nn.functional.conv2d(image, down, padding=1), up)
    left, right = as_matrices(up, down)
    weight = (left @ right).reshape(7, 5, 3, 3)
    torch.testing.assert_close(torch.nn.functional.conv2d(image, weight, padding=1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3, 3), (3, 5, 1, 1), (3, 5, 2)], ids=str)
def test_factors_come_back_in_the_shapes_of_the_layer(shape):
    down = torch.randn(*shape)
    up = torch.randn(7, 3, *(1 for _ in shape[2:]))
    again_up, again_down = as_factors(*as_matrices(up, down), shape, torch.float32)
    assert torch.equal(again_up, up)
    assert torch.equal(again_down, down)
    less_up, less_down = as_factors(up.flatten(1)[:, :2], down.flatten(1)[:2], shape, torch.bfloat16)
    assert less_up.shape == (7, 2, *up.shape[2:])
    assert less_down.shape == (2, *shape[1:])
    assert less_down.dtype == less_up.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_is_found_wherever_it_is(dtype, bad):
    for place in (0, 500, 999):
        tensor = torch.ones(1000, dtype=dtype)
        tensor[place] = bad
        assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_sum_that_overflows_is_not_mistaken_for_a_bad_element(dtype):
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_infinities_of_both_signs_do_not_cancel():
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
