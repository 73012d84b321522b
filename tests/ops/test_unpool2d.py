"""unpool_nearest and unpool_bed_of_nails: the shared suite, and comparisons with torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import suite
from ops.suite import Error, Float, Sample

import segkernels
from segkernels.ops.unpool2d import reference

SHAPES = [
    Sample("2x2", (Float(2, 8, 3, 8), 2), grad=True, compile=True),
    Sample("3x2", (Float(1, 5, 3, 5), (3, 2)), grad=True),
    Sample("2x3", (Float(1, 5, 3, 5), (2, 3)), grad=True),
    Sample("1x1", (Float(1, 5, 1, 1), 1), grad=True),
    Sample("1x1 plane", (Float(2, 3, 1, 1), 4), grad=True),
    Sample("many channels", (Float(1, 133, 2, 3), 2), grad=True),
    Sample("wide", (Float(1, 1, 2, 150), (1, 2)), grad=True),
]


def common_errors(function: Any) -> list[Error]:
    def call(*args: Any, shape: tuple[int, ...] = (1, 1, 2, 2), **kwargs: Any) -> Any:
        return lambda device: function(torch.zeros(shape, device=device, **kwargs), *args)

    return [
        Error("dims", call(2, shape=(2, 2)), RuntimeError, r"input must be \[N, C, H, W\]"),
        Error("dtype", call(2, dtype=torch.int32), TypeError, "input must be.*torch.int32"),
        Error("kernel 0", call(0), RuntimeError, "kernel size should be greater than zero"),
        Error("kernel float", call(2.0), TypeError, "argument 'kernel_size'"),
        Error("kernel 3-tuple", call((2, 2, 2)), RuntimeError, "kernel_size must either be"),
        Error("large", call(2**30), ValueError, "2\\^31"),
        Error("no tensor", lambda device: function([1], 2), TypeError, "must be Tensor"),
    ]


class TestUnpoolNearest(suite.OpSuite):
    function = staticmethod(segkernels.unpool_nearest)
    reference = staticmethod(reference.unpool_nearest)
    same_bits_as_cpu = True
    double_backward = True
    samples = SHAPES
    errors = common_errors(segkernels.unpool_nearest)


class TestUnpoolBedOfNails(suite.OpSuite):
    function = staticmethod(segkernels.unpool_bed_of_nails)
    reference = staticmethod(reference.unpool_bed_of_nails)
    same_bits_as_cpu = True
    double_backward = True
    samples = [
        *SHAPES,
        Sample("a cell", (Float(1, 5, 3, 4), (3, 2), (2, 1)), grad=True, compile=True),
    ]
    errors = [
        *common_errors(segkernels.unpool_bed_of_nails),
        Error(
            "cell",
            lambda device: segkernels.unpool_bed_of_nails(
                torch.zeros(1, 1, 2, 2, device=device), 2, (0, 2)
            ),
            ValueError,
            r"cell must be inside the block.*\(0, 2\)",
        ),
    ]


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("kernel", [2, 3, (1, 4)], ids=str)
def test_nearest_equals_interpolate(kernel: Any, device: str) -> None:
    x = torch.randn(2, 3, 5, 6, device=device)
    assert torch.equal(
        segkernels.unpool_nearest(x, kernel), F.interpolate(x, scale_factor=kernel, mode="nearest")
    )


@pytest.mark.parametrize(
    "function",
    [segkernels.unpool_nearest, segkernels.unpool_bed_of_nails],
    ids=lambda f: f.__name__,
)
def test_unbatched_equals_a_batch_of_one(function: Any) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    assert torch.equal(function(x, 2), function(x[None], 2)[0])
    (grad,) = torch.autograd.grad((function(x, 2) ** 2).sum(), x)
    (wanted,) = torch.autograd.grad((function(x[None], 2) ** 2).sum(), x)
    assert torch.equal(grad, wanted)


def test_bed_of_nails_equals_unpooling_with_code_0() -> None:
    x = torch.randn(2, 3, 4, 5)
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    assert torch.equal(segkernels.unpool_bed_of_nails(x, 2), segkernels.max_unpool2d(x, codes, 2))
