"""dilated_conv2d: the shared suite, torch's results and errors, autocast, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops import suite
from ops.suite import CONVOLUTION_ERROR, Error, Float, Sample, message, relative_error

import segkernels
from segkernels.ops.dilated_conv2d import reference

pytestmark = pytest.mark.usefixtures("exact_cudnn")

EPILOGUE = {
    "scale": Float(4),
    "shift": Float(4),
    "residual": Float(2, 4, 5, 7),
    "activation": "relu",
}


def call(**kw: Any) -> Any:
    return lambda device: segkernels.dilated_conv2d(
        torch.zeros(1, 2, 5, 5, device=device), torch.zeros(3, 2, 3, 3, device=device), **kw
    )


class TestDilatedConv2d(suite.ConvolutionSuite):
    function = staticmethod(segkernels.dilated_conv2d)
    reference = staticmethod(reference.dilated_conv2d)
    double_backward = True
    batched = "residual"
    undilated = ("plain", "7x7")
    # On the CPU torch's kernels compute the convolution; samples not marked only_gpu also test our
    # epilogue or strides.
    samples = [
        Sample(
            "all",
            (Float(2, 3, 5, 7), Float(4, 3, 3, 3), Float(4), 1, (2, 3), (2, 3)),
            EPILOGUE,
            grad=True,
            compile=True,
        ),
        Sample(
            "plain", (Float(2, 3, 6, 5), Float(4, 3, 3, 3), None, 1, 1), grad=True, only_gpu=True
        ),
        Sample(
            "bias",
            (Float(1, 3, 4, 5), Float(2, 3, 1, 1), Float(2)),
            grad=True,
            compile=True,
        ),
        Sample(
            "scaled",
            (Float(2, 2, 4, 5), Float(3, 2, 3, 3), None, 1, "same", 2),
            {"scale": Float(3)},
            grad=True,
        ),
        Sample(
            "same, one side",
            (Float(2, 2, 4, 5), Float(3, 2, 2, 4), None, 1, "same", (3, 1)),
            {"shift": Float(3), "activation": "relu"},
            grad=True,
        ),
        Sample(
            "groups and stride",
            (Float(2, 4, 7, 6), Float(6, 2, 3, 2), Float(6), (2, 1), (1, 0), (1, 2), 2),
            {"scale": Float(6), "shift": Float(6)},
            grad=True,
        ),
        Sample("far taps", (Float(1, 3, 5, 5), Float(2, 3, 3, 3), None, 1, 24, 24), only_gpu=True),
        Sample(
            "21 channels",
            (Float(1, 21, 9, 9), Float(21, 21, 3, 3), Float(21), 1, 4, 4),
            only_gpu=True,
        ),
        Sample("7x7", (Float(1, 2, 9, 8), Float(3, 2, 7, 7), None, 1, "same"), only_gpu=True),
    ]
    errors = [
        Error("activation", call(activation="gelu"), ValueError, "activation.*'gelu'"),
        Error("backend", call(backend="cudnn"), ValueError, "backend.*'cudnn'"),
        Error(
            "scale shape",
            call(scale=torch.zeros(2)),
            ValueError,
            message("scale must have shape [3], got [2]"),
        ),
        Error(
            "shift dtype",
            lambda device: call(shift=torch.zeros(3, dtype=torch.int64, device=device))(device),
            ValueError,
            "shift must be torch.float32, got torch.int64",
        ),
        Error(
            "residual shape",
            call(residual=torch.zeros(1, 3, 5, 5)),
            ValueError,
            message("residual must have shape [1, 3, 3, 3], got [1, 3, 5, 5]"),
        ),
        Error(
            "residual dtype",
            call(residual=torch.zeros(1, 3, 3, 3).half()),
            ValueError,
            "residual must be torch.float32, got torch.float16",
        ),
        Error(
            "scale device",
            call(scale=torch.zeros(3, device="meta")),
            ValueError,
            "scale must be on.*meta",
        ),
        Error("scale type", call(scale=2.0), TypeError, "'scale' must be Tensor"),
    ]

    def assert_close(self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
        # torch's float16 gradients exceed the bound slightly.
        loose = 2 if dtype == torch.float16 else 1
        assert relative_error(ours, expected) <= loose * CONVOLUTION_ERROR[dtype]


TORCH_RAISES: dict[str, Any] = {
    "input dims": (torch.zeros(5, 5), torch.zeros(3, 2, 3, 3)),
    "weight dims": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3)),
    "channels": (torch.zeros(1, 3, 5, 5), torch.zeros(3, 2, 3, 3)),
    "bias size": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), torch.zeros(2)),
    "bias dtype": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), torch.zeros(3).double()),
    "weight dtype": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3).double()),
    "bias type": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), 1.0),
    "input type": ([1], torch.zeros(3, 2, 3, 3)),
    "stride": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 0),
    "stride of 3": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, (1, 1, 1)),
    "stride float": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 1.5),
    "padding": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 1, -1),
    "padding name": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 1, "full"),
    "same, stride": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 2, "same"),
    "dilation": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 1, 0, 0),
    "groups": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 1, 0, 1, 2),
    "groups 0": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 1, 0, 1, 0),
    "too small": (torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), None, 1, 0, 3),
    "no columns": (torch.zeros(1, 2, 5, 0), torch.zeros(3, 2, 3, 3), None, 1, 2),
    "no outputs": (torch.zeros(1, 2, 5, 5), torch.zeros(0, 2, 3, 3)),
}


@pytest.mark.parametrize("name", TORCH_RAISES)
def test_raises_the_same_errors_as_torch(name: str) -> None:
    args = TORCH_RAISES[name]
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.conv2d(*args)
    with pytest.raises(theirs.type) as ours:
        segkernels.dilated_conv2d(*args)
    # A TypeError of torch's ends with the types of all arguments passed.
    first = [str(error.value).partition(" - got")[0] for error in (ours, theirs)]
    assert first[0] == first[1]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    same = draw(st.booleans())
    padding: Any = "same" if same else draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    least = [
        1 if same else max(1, 1 + dilation[i] * (kernel[i] - 1) - 2 * padding[i]) for i in (0, 1)
    ]
    size = [least[i] + draw(st.integers(0, 6)) for i in (0, 1)]
    groups = draw(st.sampled_from([1, 1, 2]))
    return {
        "x": (draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), *size),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel": kernel,
        "args": (1 if same else draw(st.integers(1, 2)), padding, dilation, groups),
        "with": draw(st.sets(st.sampled_from(["bias", "scale", "shift", "residual", "relu"]))),
        "channels_last": draw(st.booleans()),
    }


@given(problem=problems(), dtype=st.sampled_from(list(CONVOLUTION_ERROR)))
def test_any_call_agrees_with_float64(problem: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)  # per example
    x = torch.randn(problem["x"])
    groups = problem["args"][3]
    w = torch.randn(problem["out_channels"], x.size(1) // groups, *problem["kernel"])
    shape = F.conv2d(x, w, None, *problem["args"]).shape
    made = {"x": x, "w": w}
    for name in ("bias", "scale", "shift"):
        if name in problem["with"]:
            made[name] = torch.randn(shape[1])
    if "residual" in problem["with"]:
        made["residual"] = torch.randn(shape)
    if problem["channels_last"]:
        made["x"] = x.contiguous(memory_format=torch.channels_last)
    ours = {name: value.to(dtype).requires_grad_() for name, value in made.items()}
    wide = {name: value.detach().double().requires_grad_() for name, value in ours.items()}
    relu = "relu" in problem["with"]

    def run(t: dict[str, torch.Tensor], function: Any) -> torch.Tensor:
        t = dict(t)
        args = (t.pop("x"), t.pop("w"), t.pop("bias", None), *problem["args"])
        return function(*args, **t, activation="relu" if relu else None)

    out, exact = run(ours, segkernels.dilated_conv2d), run(wide, reference.dilated_conv2d)
    # Sums may nearly cancel, and half precision also rounds before the epilogue, so errors are
    # relative to the sums of the terms' magnitudes.
    terms = {name: value.detach().abs().requires_grad_() for name, value in wide.items()}
    size = run(terms, reference.dilated_conv2d)
    assert (out.double() - exact).norm() <= CONVOLUTION_ERROR[dtype] * size.norm()
    plain = F.conv2d(wide["x"], wide["w"], wide.get("bias"), *problem["args"])
    if "scale" in wide:
        plain = plain * wide["scale"][:, None, None]
    if "shift" in wide:
        plain = plain + wide["shift"][:, None, None]
    plain = plain + wide["residual"] if "residual" in wide else plain
    torch.testing.assert_close(exact, F.relu(plain) if relu else plain)

    grad = torch.randn_like(out)
    # Mask by the rounded output: the exact one may differ in sign near zero.
    masked = grad.double() * (out > 0) if relu else grad.double()
    mine = torch.autograd.grad(out, list(ours.values()), grad)
    theirs = torch.autograd.grad(plain, list(wide.values()), masked)
    # All terms are non-negative, so relu passes every gradient.
    sizes = torch.autograd.grad(size, list(terms.values()), masked.abs())
    for name, a, b, size in zip(ours, mine, theirs, sizes, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 2 * CONVOLUTION_ERROR[dtype] * size.norm(), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", CONVOLUTION_ERROR)
def test_taps_that_skip_the_only_column(dtype: torch.dtype, layout: torch.memory_format) -> None:
    # torch crashes if input or weight are channels_last (in float32 only with a bias).
    x, w = torch.randn(2, 16, 6, 1).to(dtype), torch.randn(8, 16, 2, 1).to(dtype)
    x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=torch.channels_last)
    bias = torch.arange(8.0).to(dtype)
    args = (2, (0, 1), 2)  # the taps read columns -1 and 1
    expected = bias[:, None, None].expand(2, 8, 2, 2)
    layer = segkernels.nn.DilatedConv2d(16, 8, (2, 1), *args).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(bias)
        assert torch.equal(segkernels.dilated_conv2d(x, w, bias, *args), expected)
        assert torch.equal(layer(x), expected)
        assert torch.equal(segkernels.nn.conv_bn_act(x, layer, None), expected)
    x, w = x.requires_grad_(), w.requires_grad_()
    out = segkernels.dilated_conv2d(x, w, bias, *args)
    assert torch.equal(out, expected)
    for grad in torch.autograd.grad(out.sum(), (x, w)):
        assert grad.eq(0).all()


# Size, kernel size, stride, padding, dilation.
FAULTS_OF_TORCH = [
    ((4, 2), (1, 1), (2, 3), (0, 1), 1),  # no tap reads a column
    ((3, 4), (2, 2), (3, 1), (1, 3), 4),  # no tap reads a row
    ((1, 5), (2, 2), 1, (3, 0), (4, 2)),
    ((5, 3), (1, 2), (1, 3), (0, 1), 2),  # strides that differ
    ((9, 8), (1, 3), (3, 1), (0, 3), (2, 3)),
    ((9, 3), (1, 2), 2, 0, (3, 2)),  # one column in the output
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("problem", FAULTS_OF_TORCH)
@pytest.mark.parametrize("dtype", CONVOLUTION_ERROR)
def test_where_torch_crashes_or_is_wrong(
    problem: Any, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """On some processors: on those with AMX all of these, in one dtype or another."""
    size, kernel, *options = problem
    x = torch.randn(2, 64, *size).to(dtype).contiguous(memory_format=layout)
    w = torch.randn(16, 64, *kernel).to(dtype).contiguous(memory_format=layout)
    ours = [x.requires_grad_(), w.requires_grad_()]
    wide = [t.detach().double().contiguous().requires_grad_() for t in ours]
    with torch.no_grad():
        plain = segkernels.dilated_conv2d(*ours, None, *options)
    out, expected = (
        segkernels.dilated_conv2d(*ours, None, *options),
        F.conv2d(*wide, None, *options),
    )
    grad = torch.randn_like(expected)
    mine = torch.autograd.grad(out, ours, grad.to(dtype))
    theirs = torch.autograd.grad(expected, wide, grad.to(dtype).double())
    terms = segkernels.dilated_conv2d(*(t.abs() for t in wide), None, *options)
    sizes = [terms, *torch.autograd.grad(terms, wide, grad.abs())]
    for a, b, scale in zip((out, *mine), (expected, *theirs), sizes, strict=True):
        error = (a.double() - b).abs().max()
        assert error <= 8 * CONVOLUTION_ERROR[dtype] * scale.abs().max(), (error, scale.max())
    assert torch.equal(plain, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_calls_that_torch_computes_keep_the_dtype(dtype: torch.dtype) -> None:
    """As in a batch of 0 with dilation 0, which torch accepts, and under torch.jit.trace."""
    weight, vector = torch.randn(2, 3, 1, 1).to(dtype), torch.tensor([0.5, 2.0])

    def call(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return segkernels.dilated_conv2d(x, weight, scale=vector, shift=vector, **options)

    empty = call(torch.zeros(0, 3, 4, 4, dtype=dtype), dilation=0)
    assert (empty.shape, empty.dtype) == ((0, 2, 4, 4), dtype)
    x = torch.randn(1, 3, 4, 4).to(dtype)
    traced = torch.jit.trace(call, (x,), check_trace=False)(x)
    assert traced.dtype == dtype
    torch.testing.assert_close(traced, call(x))


def test_unbatched_input() -> None:
    x, w, r = torch.randn(3, 6, 7), torch.randn(4, 3, 3, 3), torch.randn(4, 6, 7)
    ours = segkernels.dilated_conv2d(x, w, padding=2, dilation=2, residual=r, activation="relu")
    torch.testing.assert_close(ours, F.relu(F.conv2d(x, w, padding=2, dilation=2) + r))


@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_equal_torchs(input_format: Any, weight_format: Any) -> None:
    x = torch.randn(2, 4, 6, 7).contiguous(memory_format=input_format).requires_grad_()
    w = torch.randn(5, 4, 3, 3).contiguous(memory_format=weight_format).requires_grad_()
    scale = torch.rand(5)
    ours = segkernels.dilated_conv2d(x, w, padding=1, scale=scale, activation="relu")
    assert ours.stride() == F.conv2d(x, w, padding=1).stride()
    ours.sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.stride() == x.stride()
    assert w.grad.stride() == w.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_agrees_with_torchs_convolution(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    w, b = torch.randn(5, 4, 3, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    found = []
    for function in (segkernels.dilated_conv2d, F.conv2d):
        with torch.autocast("cpu", dtype):
            out = function(x, w, b, padding=1)
            assert out.dtype == dtype
            wide = function(x.double(), w.double(), b.double(), padding=1)
            assert wide.dtype == torch.float64
        found.append((out, *torch.autograd.grad(out.float().sin().sum(), (x, w, b))))
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, theirs) <= 2 * CONVOLUTION_ERROR[dtype]
    with torch.autocast("cpu", dtype):
        ours = segkernels.dilated_conv2d(
            x,
            w,
            b,
            padding=1,
            scale=torch.rand(5),
            shift=torch.rand(5),
            residual=x.new_zeros(2, 5, 6, 7),
        )
    assert ours.dtype == dtype


def test_backward_under_autocast_keeps_dtypes() -> None:
    leaves = [torch.randn(1, 3, 7, 8), torch.randn(4, 3, 3, 3), torch.rand(4)]
    x, w, scale = (t.requires_grad_() for t in leaves)
    found = []
    for enabled in (False, True):
        out = segkernels.dilated_conv2d(x, w, padding=2, dilation=2, scale=scale)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            once = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            twice = torch.autograd.grad(torch.stack([t.square().sum() for t in once]).sum(), leaves)
        found.append((*once, *twice))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_saves_only_inputs_and_output() -> None:
    x, w = torch.randn(1, 2, 8, 8, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    scale = torch.rand(3, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = segkernels.dilated_conv2d(x, w, scale=scale, activation="relu")
    places = {t.data_ptr() for t in kept}
    assert places == {x.data_ptr(), w.data_ptr(), scale.data_ptr(), out.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1, 8, 41, 41, dtype=dtype, requires_grad=True)
    w = torch.randn(63, 8, 5, 5, dtype=dtype, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    out = segkernels.dilated_conv2d(x, w, padding=4, dilation=2)
    expected = F.conv2d(*exact, padding=4, dilation=2)
    grad = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, (x, w), grad))
    theirs = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for mine, their in zip(ours, theirs, strict=True):
        # Rounding partial sums to float16 would give 8e-4.
        assert relative_error(mine, their) <= CONVOLUTION_ERROR[dtype] / 2


def surrounded_by_nan(x: torch.Tensor) -> torch.Tensor:
    """`x` in channels_last, in memory that holds NaN before and after it."""
    memory = torch.full((x.numel() + 2**16,), float("nan"), dtype=x.dtype)
    n, c, h, w = x.shape
    return memory[2**15 : -(2**15)].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [20, 21, 24, 33, 40, 64, 96])
def test_weight_gradient_where_onednn_reads_out_of_bounds(channels: int, stride: int) -> None:
    x = surrounded_by_nan(torch.randn(1, channels, 64, 65).bfloat16())
    w = surrounded_by_nan(torch.randn(24, channels, 3, 3).bfloat16()).requires_grad_()
    exact = w.detach().double().requires_grad_()
    for dilation in (2, 8):
        options = {"padding": dilation, "dilation": dilation, "stride": stride}
        out = segkernels.dilated_conv2d(x, w, **options)
        grad = surrounded_by_nan(torch.randn_like(out))
        ours = torch.autograd.grad(out, w, grad)[0]
        wide = F.conv2d(x.double(), exact, **options)
        assert relative_error(ours, torch.autograd.grad(wide, exact, grad.double())[0]) <= 4e-3


def test_gradient_with_respect_to_one_input() -> None:
    x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    scale, shift = torch.rand(3), torch.rand(3)
    for wanted in ("x", "w", "scale", "shift"):
        t = {"x": x, "w": w, "scale": scale, "shift": shift}
        t[wanted] = t[wanted].clone().requires_grad_()
        out = segkernels.dilated_conv2d(t["x"], t["w"], scale=t["scale"], shift=t["shift"])
        expected = F.conv2d(t["x"], t["w"]) * t["scale"][:, None, None] + t["shift"][:, None, None]
        weights = torch.randn_like(out)
        mine = torch.autograd.grad((out * weights).sum(), t[wanted])
        theirs = torch.autograd.grad((expected * weights).sum(), t[wanted])
        torch.testing.assert_close(mine, theirs)


def test_arguments_are_unchanged_after_an_error() -> None:
    x, residual = torch.ones(1, 2, 5, 5), torch.ones(1, 3, 5, 5)
    with pytest.raises(ValueError, match="scale"):
        segkernels.dilated_conv2d(
            x, torch.ones(3, 2, 3, 3), padding=1, scale=torch.ones(4), residual=residual
        )
    assert bool((residual == 1).all())
