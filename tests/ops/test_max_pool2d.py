"""max_pool2d: the shared suite, torch's results bit for bit, codes, and torch's errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops import suite
from ops.suite import Error, Float, Sample, same_bits

import segkernels
from segkernels.ops.max_pool2d import reference

CODES = {"return_codes": True}
INDICES = {"return_indices": True}


def pool_error(*args: Any, shape: tuple[int, ...] = (2, 3, 8, 8), **kwargs: Any) -> Any:
    return lambda device: segkernels.max_pool2d(torch.zeros(shape, device=device), *args, **kwargs)


class TestMaxPool2d(suite.OpSuite):
    function = staticmethod(segkernels.max_pool2d)
    reference = staticmethod(reference.max_pool2d)
    same_bits_as_cpu = True
    double_backward = True
    samples = [
        Sample("2x2 codes", (Float(2, 8, 6, 16), 2), CODES, grad=True, compile=True),
        Sample("2x2 values", (Float(2, 3, 6, 8), 2), grad=True),
        Sample("2x2 indices", (Float(2, 3, 6, 8), 2), INDICES, grad=True, compile=True),
        Sample("odd codes", (Float(2, 5, 7, 9), 2), CODES, grad=True),
        Sample("odd, ceil", (Float(2, 5, 7, 9), 2), CODES | {"ceil_mode": True}, grad=True),
        Sample("overlap codes", (Float(1, 6, 9, 8), 3, 2, 1), CODES, grad=True, compile=True),
        Sample("overlap indices", (Float(1, 6, 9, 8), 3, 2, 1), INDICES, grad=True),
        Sample("stride 1", (Float(1, 2, 6, 7), 3, 1, 1), CODES, grad=True),
        Sample("gaps", (Float(1, 2, 9, 11), 2, 3), CODES, grad=True),
        Sample("dilated", (Float(1, 4, 9, 8), (3, 2), (2, 1), (1, 0), (2, 3)), CODES, grad=True),
        Sample("oblong 1x3", (Float(1, 3, 4, 13), (1, 3)), CODES, grad=True),
        Sample("1x1 plane", (Float(2, 3, 1, 1), 1), CODES, grad=True),
        Sample("16x16 window", (Float(1, 2, 33, 32), 16, 8), CODES, grad=False),
        Sample("17x17 window", (Float(1, 2, 35, 40), 17, 5, 8), INDICES),
        Sample("17x17 window, values", (Float(1, 1, 19, 19), 17, 2, 8), grad=True),
        Sample("17x17 windows, side by side", (Float(1, 2, 17, 34), 17), grad=True),
        Sample("many channels", (Float(1, 133, 5, 6), 2), CODES),
        Sample("wide plane", (Float(1, 1, 4, 300), (2, 3), (2, 1), (0, 1)), CODES),
    ]
    errors = [
        Error("dims", pool_error(2, shape=(8, 8)), RuntimeError, "non-empty 3D or 4D"),
        Error("empty", pool_error(2, shape=(2, 0, 8, 8)), RuntimeError, r"got:\[2, 0, 8, 8\]"),
        Error("kernel 3-tuple", pool_error((2, 2, 2)), RuntimeError, "kernel_size must either be"),
        Error("stride 3-tuple", pool_error(2, (2, 2, 2)), RuntimeError, "stride must either be"),
        Error("kernel float", pool_error(2.0), TypeError, "argument 'kernel_size'"),
        Error("kernel bool", pool_error(True), TypeError, "argument 'kernel_size'"),
        Error("kernel 0", pool_error(0, 1), RuntimeError, "kernel size should be greater than"),
        Error("stride 0", pool_error(2, 0), RuntimeError, "stride should not be zero"),
        Error("stride < 0", pool_error(2, -2), RuntimeError, "stride should be greater than zero"),
        Error("dilation 0", pool_error(2, dilation=0), RuntimeError, "dilation should be greater"),
        Error("padding < 0", pool_error(2, padding=-1), RuntimeError, "pad must be non-negative"),
        Error(
            "padding", pool_error(2, padding=2), RuntimeError, "at most half of effective kernel"
        ),
        Error(
            "padding, dilated",
            pool_error(2, padding=2, dilation=4),
            RuntimeError,
            "smaller than or equal to half of kernel size, but got padW = 2",
        ),
        Error("too small", pool_error(9), RuntimeError, r"output size: \(3x0x0\)"),
        Error(
            "both",
            pool_error(2, **CODES, **INDICES),
            ValueError,
            "return_codes must be False with return_indices",
        ),
        Error(
            "codes of 257 cells",
            pool_error((257, 1), shape=(1, 1, 257, 1), **CODES),
            ValueError,
            r"at most 256 cells.*got \(257, 1\)",
        ),
        Error(
            "codes of integers",
            lambda device: segkernels.max_pool2d(
                torch.zeros(1, 1, 4, 4, dtype=torch.int64, device=device), 2, **CODES
            ),
            TypeError,
            "input must be one of float16.* with return_codes, got torch.int64",
        ),
        Error(
            "no tensor", lambda device: segkernels.max_pool2d([1.0], 2), TypeError, "must be Tensor"
        ),
    ]


def special_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Few distinct values, to have ties, including both zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    return values[torch.randint(0, 8, shape, generator=generator)].to(dtype)


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are equal, except those of NaNs: the sign of zero counts."""
    signs = torch.signbit(a) == torch.signbit(b) if a.is_floating_point() else a == b
    return same_bits(a, b) and bool((signs | (a != a)).all())


CASES = [
    (2, None, 0, 1, False),
    (2, None, 0, 1, True),
    (3, 2, 1, 1, False),
    (3, 2, 1, 1, True),
    ((2, 3), (1, 2), (1, 0), (2, 1), True),
    (5, 1, 2, 1, False),
    ((3, 1), (2, 4), (1, 0), (1, 3), True),
    (2, 3, 1, 3, True),
    (17, 3, 8, 1, False),
]


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", suite.OpSuite.dtypes, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch_bit_for_bit(case: Any, dtype: torch.dtype, layout: str, device: str) -> None:
    for seed, shape in enumerate([(2, 3, 12, 16), (1, 70, 9, 11), (2, 1, 18, 135), (1, 5, 1, 2)]):
        x = suite.with_layout(special_values(shape, dtype, seed), layout).to(device)
        try:
            values, indices = F.max_pool2d(x, *case, return_indices=True)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=suite.message(str(error))):
                segkernels.max_pool2d(x, *case)
            continue
        ours, our_indices = segkernels.max_pool2d(x, *case, return_indices=True)
        assert identical(ours, values)
        assert ours.stride() == values.stride()
        assert our_indices.stride() == indices.stride()
        if device == "cuda" and layout == "channels_last":
            # torch's channels_last kernel, unlike its others, gives index 0 for windows of -inf.
            indices = F.max_pool2d(x.contiguous(), *case, return_indices=True)[1]
        assert torch.equal(our_indices, indices)
        assert identical(segkernels.max_pool2d(x, *case), values)


@pytest.mark.parametrize("device", suite.DEVICES)
def test_unbatched_equals_a_batch_of_one(device: str) -> None:
    x = torch.randn(3, 7, 8, device=device, requires_grad=True)
    for kind in ("return_codes", "return_indices"):
        values, positions = segkernels.max_pool2d(x, 2, **{kind: True})
        batched = segkernels.max_pool2d(x[None], 2, **{kind: True})
        assert torch.equal(values, batched[0][0])
        assert torch.equal(positions, batched[1][0])
        restored = segkernels.max_unpool2d(values, positions, 2, output_size=(7, 8))
        expected = segkernels.max_unpool2d(*batched, 2, output_size=(7, 8))
        assert torch.equal(restored, expected[0])
        (grad,) = torch.autograd.grad((restored**2).sum(), x)
        (wanted,) = torch.autograd.grad((expected**2).sum(), x)
        assert torch.equal(grad, wanted)


def test_window_positions_must_be_below_2_31() -> None:
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(segkernels.max_pool2d(x, 2, 2**31 - 3), x[:, :, :2, :2].amax((2, 3), True))
    with pytest.raises(ValueError, match="must be below 2\\^31"):
        segkernels.max_pool2d(x, 2, 2**31 - 2)


def test_window_outside_the_image() -> None:
    x = torch.ones(1, 1, 1)
    values, indices = segkernels.max_pool2d(x, 2, 2, 1, 3, True, True)
    assert values.item() == -torch.inf
    assert indices.item() == F.max_pool2d(x, 2, 2, 1, 3, True, True)[1].item() == 4
    x = x.requires_grad_()
    segkernels.max_pool2d(x, 2, 2, 1, 3, True).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_gradients_equal_torchs(case: Any, layout: str) -> None:
    x = suite.with_layout(torch.randn(2, 5, 13, 16), layout)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    values = segkernels.max_pool2d(ours, *case)
    grad = torch.randn_like(values)
    values.backward(grad)
    F.max_pool2d(theirs, *case).backward(grad)
    # The sums run in row order, as torch's on the CPU.
    assert torch.equal(ours.grad, theirs.grad)


# More and fewer windows per row, and channels, than the CPU's inner loops handle at once.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 701), (1, 19, 40, 23), (2, 70, 9, 130)], ids=str)
@pytest.mark.parametrize("case", [(2,), (3, 2), (3, 2, 1), (3, 1, 1), (2, 2, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", suite.OpSuite.dtypes, ids=str)
def test_long_rows_and_many_channels(
    case: Any, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x = suite.with_layout(torch.randn(shape).to(dtype), layout)
    ours = x.clone().requires_grad_()
    wide = x.double() if dtype == torch.float64 else x.float()
    theirs = wide.clone().requires_grad_()
    values, codes = segkernels.max_pool2d(ours, *case, return_codes=True)
    expected, indices = F.max_pool2d(theirs, *case, return_indices=True)
    assert same_bits(values, expected.to(dtype))
    grad = torch.randn_like(values)
    values.backward(grad)
    expected.backward(grad.to(wide.dtype))
    assert same_bits(ours.grad, theirs.grad.to(dtype))
    if len(case) < 4:
        plain = values.detach()
        restored = segkernels.max_unpool2d(plain, codes, *case, output_size=shape)
        assert same_bits(
            restored, F.max_unpool2d(plain, indices, *case, output_size=shape).to(dtype)
        )
        plane = torch.randn_like(x)
        pooled = plain.requires_grad_()
        segkernels.max_unpool2d(pooled, codes, *case, output_size=shape).backward(plane)
        assert same_bits(pooled.grad, plane.flatten(2).gather(2, indices.flatten(2)).view_as(plain))


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [2, 3, 5])
def test_lines_in_one_dilated_window_of_many(
    dilation: int, stride: int, layout: str, device: str
) -> None:
    # Near the edges a line is covered by several windows, of which only one has a cell there.
    x = suite.with_layout(torch.randn(1, 6, 13, 4), layout)
    ours, theirs = (x.detach().to(place).requires_grad_() for place in (device, "cpu"))
    options = ((3, 2), (stride, 1), (1, 0), (dilation, 1))
    values, codes = segkernels.max_pool2d(ours, *options, return_codes=True)
    expected, indices = F.max_pool2d(theirs, *options, return_indices=True)
    grad = torch.randn_like(expected)
    values.backward(grad.to(device))
    expected.backward(grad)
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
    restored = segkernels.max_unpool2d(
        values.detach(), codes, *options[:3], x.shape, dilation=(dilation, 1)
    )
    wanted = torch.zeros_like(x).flatten(2).scatter_(2, indices.flatten(2), expected.flatten(2))
    assert torch.equal(restored.cpu(), wanted.view_as(x))


def test_gradients_of_tall_windows() -> None:
    x = torch.randn(1, 20, 400, 3).contiguous(memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    segkernels.max_pool2d(ours, (300, 1), 1).square().sum().backward()
    F.max_pool2d(theirs, (300, 1), 1).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("return_kind", ["return_indices", "return_codes"])
def test_half_precision_gradients_accumulate_in_float32(return_kind: str, device: str) -> None:
    # 225 windows share one maximum.
    x = torch.zeros(1, 1, 33, 65, dtype=torch.bfloat16, device=device)
    x[..., 16, 32] = 1
    for layout in ("contiguous", "channels_last"):
        plane = suite.with_layout(x.expand(1, 2, -1, -1), layout).requires_grad_()
        values, _ = segkernels.max_pool2d(plane, 15, 1, 7, **{return_kind: True})
        values.backward(torch.full_like(values, 3))
        # 3 * 225 = 675 rounds to 676; accumulated in bfloat16 it would be 812.
        assert plane.grad[0, 0, 16, 32] == 676


@given(
    sizes=st.tuples(*[st.integers(1, 12)] * 2),
    channels=st.integers(1, 5),
    kernel=st.tuples(*[st.integers(1, 4)] * 2),
    stride=st.tuples(*[st.integers(1, 4)] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 2),
    dilation=st.tuples(*[st.integers(1, 3)] * 2),
    ceil_mode=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_arguments_equal_torch(
    sizes: Any,
    channels: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    channels_last: bool,
    seed: int,
) -> None:
    x = special_values((2, channels, *sizes), torch.float32, seed)
    x = suite.with_layout(x, "channels_last" if channels_last else "contiguous")
    args = (kernel, stride, padding, dilation, ceil_mode)
    try:
        values, indices = F.max_pool2d(x, *args, return_indices=True)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=suite.message(str(error))):
            segkernels.max_pool2d(x, *args)
        return
    ours, our_indices = segkernels.max_pool2d(x, *args, return_indices=True)
    assert identical(ours, values)
    assert torch.equal(our_indices, indices)
    _, codes = segkernels.max_pool2d(x, *args, return_codes=True)
    assert torch.equal(codes, reference.max_pool2d(x, *args, return_codes=True)[1])


def test_integers_are_passed_to_torch() -> None:
    x = torch.randint(0, 9, (1, 2, 6, 6))
    for mine, theirs in zip(
        segkernels.max_pool2d(x, 2, return_indices=True),
        F.max_pool2d(x, 2, return_indices=True),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_saves_one_byte_per_window() -> None:
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        segkernels.max_pool2d(x, 2)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, (1, 2, 4, 4))]


@pytest.mark.huge
@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    x = torch.empty(3, 1, 32768, 32768, dtype=torch.float16, device="cuda").uniform_()
    values, codes = segkernels.max_pool2d(x, 2, return_codes=True)
    assert torch.equal(values[-1], F.max_pool2d(x[-1], 2))
    restored = segkernels.max_unpool2d(values, codes, 2)
    assert torch.equal(restored[-1], torch.where(restored[-1] != 0, x[-1], 0))
    assert torch.equal(segkernels.max_pool2d(restored[-1], 2), values[-1])
