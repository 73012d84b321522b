"""Operators in torch.export with dynamic sizes, and in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx_runs
import pytest
import torch
from torch import nn
from torch.export import Dim

import segkernels
from segkernels.ops._windows import Windows, codes_of, indices_of

Sizes = tuple[int, int, int]  # batch, height, width


def values(channels: int = 4, scale: int = 1) -> Callable[[Sizes], torch.Tensor]:
    return lambda s: torch.randn(s[0], channels, scale * s[1] - scale // 2, scale * s[2])


def codes(s: Sizes) -> torch.Tensor:
    return torch.randint(0, 4, (s[0], 4, *s[1:])).to(torch.uint8)


def indices(s: Sizes) -> torch.Tensor:
    x = torch.randn(s[0], 4, 2 * s[1], 2 * s[2])
    return segkernels.max_pool2d(x, 2, return_indices=True)[1]


def labels(s: Sizes) -> torch.Tensor:
    return torch.randint(0, 4, (s[0], 2 * s[1] - 1, 2 * s[2]))


def masks(s: Sizes) -> torch.Tensor:
    return torch.randint(0, 3, (s[0], 1, 2 * s[1] - 1, 2 * s[2]))


class Call(NamedTuple):
    """A call of an operator: its name, the function, and what makes its tensors."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Callable[[Sizes], torch.Tensor], ...] = (values(),)


_random = torch.Generator().manual_seed(0)
WEIGHT, POINTWISE = (torch.randn(5, 4, k, k, generator=_random) for k in (3, 1))
SCALE, SHIFT = (torch.randn(10, generator=_random) for _ in range(2))
TWO = (values(), values(scale=2))


def resized(mode: str) -> Any:
    return lambda x, like: segkernels.interpolate(x, like.shape[-2:], mode=mode)


def argmax(**options: Any) -> Any:
    return lambda x, like: segkernels.upsample_argmax(x, like.shape[-2:], **options)


def pool(*arguments: Any, **options: Any) -> Any:
    return lambda x: segkernels.max_pool2d(x, *arguments, **options)


def round_trip(*arguments: Any, **options: Any) -> Any:
    def of(x: torch.Tensor) -> torch.Tensor:
        pooled, positions = segkernels.max_pool2d(x, *arguments, **options)
        return segkernels.max_unpool2d(pooled, positions, *arguments, output_size=x.shape[-2:])

    return of


def conv(**options: Any) -> Any:
    return lambda x: segkernels.dilated_conv2d(x, WEIGHT, SHIFT[:5], **options)


CALLS = [
    *(Call(f"interpolate-{m}", resized(m), TWO) for m in ("bilinear", "bicubic", "nearest")),
    Call("interpolate-nearest-exact", resized("nearest-exact"), TWO),
    Call("interpolate-x2", lambda x: segkernels.interpolate(x, scale_factor=2, mode="bilinear")),
    Call("interpolate-x1.5", lambda x: segkernels.interpolate(x, scale_factor=(1.5, 2.25))),
    Call("interpolate-crop", lambda x: segkernels.interpolate(x[..., 1:, 1:], scale_factor=2.0)),
    Call("argmax", argmax(), TWO),
    Call("argmax-nearest", argmax(mode="nearest", dtype=torch.uint8), TWO),
    Call("argmax-confidence", argmax(align_corners=True, return_confidence=True), TWO),
    Call("cross_entropy", segkernels.upsample_cross_entropy, (values(), labels)),
    Call(
        "cross_entropy-options",
        lambda x, t: segkernels.upsample_cross_entropy(
            x, t, SCALE[:4].abs(), ignore_index=1, label_smoothing=0.1, mode="nearest"
        ),
        (values(), labels),
    ),
    Call(
        "binary-labels",
        lambda x, t: segkernels.upsample_binary_cross_entropy(x, t, ignore_index=2),
        (values(1), masks),
    ),
    Call(
        "binary-soft",
        lambda x, t: segkernels.upsample_binary_cross_entropy(
            x, t.sigmoid(), t.exp(), "sum", SCALE[:1].abs(), align_corners=True
        ),
        (values(1), values(1, 2)),
    ),
    Call("pool", pool(2)),
    Call("pool-ceil", pool(2, 3, 1, ceil_mode=True)),
    Call("pool-indices", pool(3, 2, 1, return_indices=True)),
    Call("pool-codes", pool((3, 2), 2, (1, 0), (2, 3), return_codes=True)),
    Call("unpool-codes", lambda x, c: segkernels.max_unpool2d(x, c, 2), (values(), codes)),
    Call("unpool-indices", lambda x, i: segkernels.max_unpool2d(x, i, 2), (values(), indices)),
    Call("round-trip-codes", round_trip(2, return_codes=True)),
    Call("round-trip-overlap", round_trip(3, 2, 1, return_codes=True)),
    Call("round-trip-indices", round_trip(2, return_indices=True)),
    Call("nearest", lambda x: segkernels.unpool_nearest(x, (2, 3))),
    Call("bed-of-nails", lambda x: segkernels.unpool_bed_of_nails(x, (2, 3), (1, 2))),
    Call("conv", conv(padding=2, dilation=2, scale=SCALE[:5], shift=SHIFT[5:], activation="relu")),
    Call("conv-stride", conv(stride=2)),
    Call("conv-same", conv(padding="same")),
    Call(
        "conv-residual",
        lambda x: segkernels.dilated_conv2d(
            x, WEIGHT, padding=1, residual=segkernels.dilated_conv2d(x, POINTWISE)
        ),
    ),
    Call(
        "aspp-v2",
        lambda x: segkernels.aspp(x, [WEIGHT, WEIGHT], [1, 6], form="v2", shift=SHIFT[:5]),
    ),
    Call(
        "aspp-v3",
        lambda x: segkernels.aspp(
            x,
            [POINTWISE, WEIGHT],
            [1, 6],
            scale=SCALE,
            shift=SHIFT,
            pooled=x.mean((2, 3), keepdim=True),
            activation="relu",
        ),
    ),
]
FILTERS = [
    Call("dense_crf", lambda x, img: segkernels.dense_crf(img, logits=x), (values(), values(3))),
    Call("permutohedral_filter", segkernels.permutohedral_filter, (values(), values(3))),
    Call(
        "PermutohedralLattice",
        lambda x, f: segkernels.PermutohedralLattice(f).filter(x),
        (values(), values(3)),
    ),
    Call("gaussian_filter", segkernels.gaussian_filter, (values(), values(3))),
]
QUICK = ("interpolate-bilinear", "argmax", "round-trip-codes", "aspp-v3")


def calls(of: list[Call], quick: tuple[str, ...] = QUICK, others: Any = pytest.mark.slow) -> Any:
    """Parametrise over calls; those that are not `quick` have the mark `others`."""
    return pytest.mark.parametrize(
        "call",
        [pytest.param(c, marks=[] if c.name in quick else [others]) for c in of],
        ids=lambda call: call.name,
    )


class Module(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.function = call.function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def tensors(call: Call, sizes: Sizes) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [make(sizes) for make in call.inputs]


def dynamic(call: Call) -> Any:
    """Every size is dynamic, except the number of channels."""
    dims = [range(3) if make is labels else (0, 2, 3) for make in call.inputs]
    return {"tensors": tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in dims)}


def same(found: Any, expected: Any, tolerance: float) -> None:
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


EXAMPLE = (2, 7, 11)
OTHERS = [EXAMPLE, (3, 11, 7), (1, 9, 9), (2, 40, 100)]


@calls([*CALLS, *FILTERS])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_exports_for_every_size(call: Call, layout: torch.memory_format) -> None:
    def given(sizes: Sizes) -> list[torch.Tensor]:
        return [
            x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in tensors(call, sizes)
        ]

    module = Module(call)
    program = torch.export.export(module, tuple(given(EXAMPLE)), dynamic_shapes=dynamic(call))
    for sizes in OTHERS:
        out = program.module()(*given(sizes))
        same(out if isinstance(out, tuple) else (out,), module(*given(sizes)), 1e-6)


@pytest.mark.onnx
@calls(CALLS, ("round-trip-codes",), pytest.mark.nightly)
def test_exports_to_onnx_for_every_size(call: Call) -> None:
    module = Module(call)
    session = onnx_runs.export(module, tensors(call, EXAMPLE), shapes=dynamic(call))
    for sizes in OTHERS:
        found = onnx_runs.run(session, tensors(call, sizes))
        same(found, module(*tensors(call, sizes)), 1e-4)


@pytest.mark.onnx
@calls([call for call in CALLS if call.name != "interpolate-nearest-exact"])  # torch has none
def test_torchscript_exports_to_onnx(call: Call) -> None:
    module, given = Module(call), tensors(call, EXAMPLE)
    session = onnx_runs.export(module, given, dynamo=False)
    same(onnx_runs.run(session, given), module(*given), 1e-4)


@pytest.mark.onnx
@calls(FILTERS, ("dense_crf", "gaussian_filter"))
@pytest.mark.parametrize("dynamo", [True, False])
def test_filters_say_that_they_have_no_onnx_form(call: Call, dynamo: bool) -> None:
    with pytest.raises(Exception, match=rf"{call.name}: this call has no ONNX form; export the "):
        onnx_runs.export(Module(call), tensors(call, EXAMPLE), dynamo=dynamo)


@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), ((3, 2), 2, (1, 0), (2, 3)), (4, 5, 2)])
def test_codes_of_indices(arguments: tuple[Any, ...]) -> None:
    """With torch's functions; `segkernels.max_pool2d` computes both."""
    x = torch.randn(2, 3, 13, 17)
    _, codes = segkernels.max_pool2d(x, *arguments, return_codes=True)
    _, indices = segkernels.max_pool2d(x, *arguments, return_indices=True)
    given = [(n, n) if isinstance(n, int) else n for n in arguments]
    kernel, stride, padding, dilation = [*given, *[given[0], (0, 0), (1, 1)][len(given) - 1 :]]
    w = Windows((13, 17), (0, 0), kernel, stride, padding, dilation, False)
    assert torch.equal(codes_of(indices, w), codes)
    assert torch.equal(indices_of(codes, w), indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_traced_convolution_keeps_the_dtype(dtype: torch.dtype) -> None:
    """With a float32 scale too."""
    x, weight = torch.randn(1, 4, 5, 5).to(dtype), WEIGHT.to(dtype)
    traced = torch.jit.trace(
        lambda x: segkernels.dilated_conv2d(x, weight, scale=SCALE[:5], activation="relu"), x
    )
    assert traced(x).dtype == dtype
