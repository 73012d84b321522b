"""One small call or two of every CUDA kernel family beside the CPU's: few enough for sanitizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import segkernels
from emulation import emulated

pytestmark = pytest.mark.emulated
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def check(function: Callable[[], Any], tolerance: float = 1e-5) -> None:
    ours = function()
    with emulated(False):
        expected = function()
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def with_gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out.double().square().sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("dims", "points", "channels"),
    [
        (1, 300, 3),
        (3, 300, 1),
        (5, 600, 3),
        *((2, 40, c) for c in (6, 10, 14, 20, 29, 40, 60, 100, 150)),
    ]
    + [(dims, 40, 3) for dims in (4, *range(6, 17))],
)
def test_permutohedral_filter(dims: int, points: int, channels: int, dtype: torch.dtype) -> None:
    features = 4 * torch.rand(1, dims, points, dtype=dtype)
    values = torch.randn(1, channels, points, dtype=dtype)

    def run() -> Any:
        f, v = features.clone().requires_grad_(), values.clone().requires_grad_()
        out = segkernels.permutohedral_filter(v, f)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (v, f))

    check(run, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("classes", "cooperative"),
    [(c, True) for c in (1, 3, 7, 10, 15, 21, 29, 40, 60, 100, 200, 300)]
    + [(c, False) for c in (1, 10, 21, 300)],
)
def test_dense_crf(classes: int, cooperative: bool, dtype: torch.dtype) -> None:
    img = torch.rand(1, 3, 5, 6, dtype=dtype) * 255
    logits, mu = (torch.randn(s, dtype=dtype) for s in ((1, classes, 5, 6), (classes, classes)))
    how: dict[str, Any] = {"compat_gaussian": mu, "log": True, "iterations": 2}
    if classes in (3, 10):
        how["normalization"] = "before"
    with emulated(cooperative=cooperative):
        ours = segkernels.dense_crf(img, logits=logits, **how)
    with emulated(False):
        theirs = segkernels.dense_crf(img, logits=logits, **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("size", "out"), [((3, 5), (7, 9)), ((1, 1), (1, 900)), ((9, 9), (4, 4))], ids=str
)
@pytest.mark.parametrize("classes", [1, 5])
def test_upsample_cross_entropy(classes: int, size: Any, out: Any, dtype: torch.dtype) -> None:
    logits, target = torch.randn(2, classes, *size).to(dtype), torch.randint(classes, (2, *out))
    target[0, 0, 0] = 255
    loss = segkernels.upsample_cross_entropy
    for reduction in ("mean", "none"):
        how: dict[str, Any] = {"ignore_index": 255, "reduction": reduction}
        check(lambda: with_gradient(lambda x: loss(x, target, **how), logits), 2e-3)  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_losses(mode: str, dtype: torch.dtype) -> None:
    logits, target = torch.randn(2, 3, 4, 5).to(dtype), torch.randint(3, (2, 9, 7))
    softmax = lambda x: segkernels.upsample_cross_entropy(x, target, mode=mode)  # noqa: E731
    check(lambda: with_gradient(softmax, logits), 2e-2 if dtype.itemsize == 2 else 1e-4)
    answer = torch.rand(2, 1, 9, 7)
    binary = lambda x: segkernels.upsample_binary_cross_entropy(x, answer, mode=mode)  # noqa: E731
    check(lambda: with_gradient(binary, logits[:, :1]), 2e-2 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 20])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_interpolate(mode: str, channels: int, dtype: torch.dtype) -> None:
    tolerance = 4e-2 if dtype.itemsize == 2 else 1e-3
    for size, out, layout in itertools.product(((5, 7), (9, 4)), ((13, 11), (3, 4)), LAYOUTS):
        x = torch.randn(1, channels, *size).to(dtype).contiguous(memory_format=layout)
        resize = lambda t: segkernels.interpolate(t, out, mode=mode)  # noqa: B023, E731
        check(lambda: with_gradient(resize, x), tolerance)  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_interpolate_beyond_what_a_tile_holds(mode: str, dtype: torch.dtype) -> None:
    x, g = torch.ones(1, 1, 1, 1, dtype=dtype), torch.full((1, 1, 1, 13000), 0.25, dtype=dtype)

    def run() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        out = segkernels.interpolate(leaf, (1, 13000), mode=mode)
        return torch.autograd.grad(out, leaf, g)[0]

    check(run, 1e-2 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_max_pool2d_of_windows_too_large_for_codes(
    channels: int, dtype: torch.dtype, layout: Any
) -> None:
    x = torch.randn(1, channels, 18, 19).to(dtype).contiguous(memory_format=layout)
    check(lambda: with_gradient(lambda t: segkernels.max_pool2d(t, (17, 16)), x), 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 8), (1, 16, 6, 8), (1, 3, 7, 5), (1, 8, 4, 16)], ids=str
)
def test_pooling(shape: Any, dtype: torch.dtype, layout: Any) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)

    def run() -> Any:
        found = []
        for case in ((2, 2, 0), (3, 2, 1), (3, 3, 0)):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            values, codes = segkernels.max_pool2d(leaf, *case, return_codes=True)
            indices = segkernels.max_pool2d(x, *case, return_indices=True)[1]
            for positions in (codes, indices):
                up = segkernels.max_unpool2d(values, positions, *case, output_size=x.shape[2:])
                grad = torch.autograd.grad(up.double().square().sum(), leaf, retain_graph=True)
                found += [up.detach(), *grad]
            found += [values.detach(), codes, indices]
        for unpool in (segkernels.unpool_nearest, segkernels.unpool_bed_of_nails):
            for factor in (2, (2, 3)):
                found += with_gradient(lambda t: unpool(t, factor), x)  # noqa: B023
        return found

    check(run, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_upsample_argmax(mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 4, 6).to(dtype)
    for confidence in (False, True):
        how: dict[str, Any] = {"mode": mode, "return_confidence": confidence}
        check(lambda: segkernels.upsample_argmax(x, (9, 13), **how))  # noqa: B023


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_views_that_begin_anywhere(dtype: torch.dtype, offset: int) -> None:
    """What is read in vectors must be aligned."""
    storage = torch.randn(2 * 8 * 8 * 8 + 16).to(dtype)
    x = storage[offset : offset + 2 * 8 * 8 * 8].view(2, 8, 8, 8)
    bytes_ = torch.randint(4, (2 * 8 * 8 * 8 + 16,), dtype=torch.uint8)
    codes = bytes_[offset : offset + 2 * 8 * 8 * 8].view(2, 8, 8, 8)
    for a, c in ((x, codes), (x.permute(0, 3, 1, 2), codes.permute(0, 3, 1, 2))):
        pool, unpool = segkernels.max_pool2d, segkernels.max_unpool2d
        check(lambda: (*pool(a, 2, return_codes=True), unpool(a, c, 2)), 0)  # noqa: B023
        check(lambda: pool(a, 3, 2, 1, return_indices=True), 0)  # noqa: B023
        check(lambda: segkernels.unpool_nearest(a, 2), 0)  # noqa: B023
        check(lambda: segkernels.unpool_bed_of_nails(a, 3), 0)  # noqa: B023
        check(lambda: segkernels.interpolate(a, (11, 5), mode="bilinear"), 2e-3)  # noqa: B023
        check(lambda: segkernels.upsample_argmax(a, (16, 24)))  # noqa: B023
        target = torch.ones(2, 16, 24, dtype=torch.int64)
        check(lambda: segkernels.upsample_cross_entropy(a, target), 1e-4)  # noqa: B023


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_dense_crf_of_views_that_begin_anywhere(offset: int) -> None:
    def moved(t: torch.Tensor) -> torch.Tensor:
        held = torch.empty(t.numel() + 8)[offset : offset + t.numel()]
        return held.view(t.shape).copy_(t)

    img, probs = torch.rand(1, 3, 9, 12) * 255, torch.rand(1, 4, 9, 12).softmax(1)
    check(lambda: segkernels.dense_crf(moved(img), moved(probs), iterations=2), 1e-4)
