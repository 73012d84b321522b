"""Tests that every operator must pass. A test file subclasses `OpSuite` and describes its operator.

    class TestThing(suite.OpSuite):
        function = staticmethod(segkernels.thing)
        reference = staticmethod(reference.thing)
        samples = [Sample("odd", (Float(2, 3, 5, 7),), {"mode": "x"}, grad=True)]

Every test runs on the CPU, on CUDA (marker `gpu`) and with the CUDA code emulated on the CPU
(marker `emulated`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from emulation import DEVICES, emulated
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from segkernels import _native

Make = Callable[[torch.Generator], torch.Tensor]

LAYOUTS = ("channels_last", "strided", "offset", "expanded")


class Float:
    """A floating-point argument of a sample; the suite chooses dtype, device, layout and gradient.

    `make` replaces the standard normal values; it returns a float64 tensor.
    """

    def __init__(self, *shape: int, make: Make | None = None, grad: bool = True) -> None:
        self.shape, self.make, self.grad = shape, make, grad

    def build(self, generator: torch.Generator) -> torch.Tensor:
        if self.make is not None:
            return self.make(generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of an operator.

    Attributes:
        id: part of the test's name.
        args: `Float`s, functions of a generator that return other tensors, and plain values.
        kwargs: the same for keyword arguments.
        grad: the sample is differentiable, and small enough for gradcheck.
        compile: the sample is used for torch.compile (slow: one or two per operator).
        only_gpu: skip the CPU, where the call is one torch call.
    """

    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    grad: bool = False
    compile: bool = False
    only_gpu: bool = False


@dataclass(frozen=True)
class Error:
    """A call that must raise: the exception type and a pattern for the message."""

    id: str
    call: Callable[[str], Any]  # called with the device
    kind: type[Exception]
    match: str


@dataclass
class Call:
    """The tensors and values built from a sample."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    floats: list[torch.Tensor]  # the arguments that require a gradient

    def run(self, function: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        return as_tuple(function(*self.args, **self.kwargs))


def as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def with_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`x` in another layout; all layouts but "contiguous" and "channels_last" are views."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        shape = [size + 1 for size in x.shape]
        larger = x.new_full(shape, float("nan"))
        inside = tuple(slice(1, None) for _ in shape)
        larger[inside] = x
        return larger[inside]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


def build(
    sample: Sample,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    layout: str = "contiguous",
    grad: bool = False,
    empty: bool = False,
) -> Call:
    """Build `sample`'s arguments: the same values for all options, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)
    floats: list[torch.Tensor] = []

    def one(value: Any) -> Any:
        if isinstance(value, Float):
            x = value.build(generator).to(dtype).to(device)
            x = with_layout(x[:0] if empty and x.dim() > 2 else x, layout)
            if grad and value.grad:
                x = x.detach().requires_grad_()
                floats.append(x)
            return x
        if callable(value) and not isinstance(value, (type, torch.dtype)):
            x = value(generator).to(device)
            return x[:0] if empty and x.dim() > 2 else x
        return value

    args = tuple(one(value) for value in sample.args)
    kwargs = {name: one(value) for name, value in sample.kwargs.items()}
    return Call(args, kwargs, floats)


def cotangents(
    outputs: tuple[torch.Tensor, ...], rounded: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Fixed, non-constant gradients with respect to the differentiable outputs."""
    found = []
    for out in outputs:
        if out.requires_grad:
            steps = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
            values = torch.sin(steps + 1).reshape(out.shape).to(rounded).to(out.dtype)
            # In the output's layout, like the gradients in a channels_last network.
            found.append(torch.empty_like(out).copy_(values))
    return found


def gradients(
    call: Call, function: Callable[..., Any], rounded: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Gradients with respect to `call.floats`, for output gradients rounded to `rounded`."""
    outputs = call.run(function)
    wanted = tuple(out for out in outputs if out.requires_grad)
    return torch.autograd.grad(wanted, call.floats, cotangents(outputs, rounded))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shapes, dtypes and values are equal; NaNs count as equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


# Bounds of `relative_error` for convolutions.
CONVOLUTION_ERROR = {
    torch.float16: 6e-4,
    torch.bfloat16: 4e-3,
    torch.float32: 2e-6,
    torch.float64: 1e-13,
}


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """||ours - exact|| / ||exact|| in float64."""
    assert ours.shape == exact.shape
    ours, exact = ours.detach().double(), exact.detach().double()
    error, size = (ours - exact).norm(), exact.norm()
    return float(error / size) if size else float(error)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic mode, which fills uninitialised memory with NaN or the largest int."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_nan_as_expected(
    ours: torch.Tensor, expected: torch.Tensor, spreads: bool = False
) -> None:
    """Assert NaN exactly where expected; with `spreads`, at least there.

    cuDNN's Winograd and FFT algorithms (without dilation) spread NaN over their tiles.
    """
    if spreads:
        assert bool((ours.isnan() | ~expected.isnan()).all())
    else:
        assert torch.equal(ours.isnan(), expected.isnan())


def layouts_of(sample: Sample, layouts: tuple[str, ...]) -> list[str]:
    """Those of `layouts` that change the strides or the offset of a tensor of `sample`."""
    plain = [(x.stride(), x.storage_offset()) for x in build(sample, grad=True).floats]
    return [
        layout
        for layout in layouts
        if plain
        != [
            (x.stride(), x.storage_offset()) for x in build(sample, layout=layout, grad=True).floats
        ]
    ]


class _Record(TorchDispatchMode):
    """Records the calls of segkernels' operators in the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "segkernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class OpSuite:
    """Base class of ``Test<Op>``; the subclass sets at least the attributes without a default."""

    function: ClassVar[Callable[..., Any]]
    # The same function in plain torch.
    reference: ClassVar[Callable[..., Any]]
    samples: ClassVar[list[Sample]]
    errors: ClassVar[list[Error]] = []
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
    layouts: ClassVar[tuple[str, ...]] = LAYOUTS
    # A channels_last input gives channels_last 4-D outputs.
    keeps_layout: ClassVar[bool] = True
    double_backward: ClassVar[bool] = False
    # Our operators, such as gradients, that cannot be differentiated again.
    not_differentiable: ClassVar[tuple[str, ...]] = ()
    # The backward pass accumulates in the same order in all layouts.
    same_sums: ClassVar[bool] = True
    same_sums_on_cuda: ClassVar[bool] = True
    # CUDA gives the same bits as the CPU, forward and backward.
    same_bits_as_cpu: ClassVar[bool] = False
    forward_mode: ClassVar[bool] = True
    # torch.jit.trace supports the calls, because torch's own operators compute them.
    traces: ClassVar[bool] = True
    # (rtol, atol) against the float64 reference rounded to the dtype; None requires equal bits.
    tolerance: ClassVar[dict[torch.dtype, tuple[float, float] | None]] = {
        torch.float16: (1e-3, 1e-6),
        torch.bfloat16: (8e-3, 1e-6),
        torch.float32: (1e-5, 1e-6),
        torch.float64: (1e-12, 1e-12),
    }

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = metafunc.fixturenames
        cls = metafunc.cls
        assert cls is not None
        samples = [
            pytest.param(s, id=s.id, marks=[pytest.mark.gpu] if s.only_gpu else [])
            for s in cls.samples
        ]
        with_grad, compiled = (
            [p for p in samples if getattr(p.values[0], name)] for name in ("grad", "compile")
        )
        # A gradient cannot be expanded like its leaf.
        leaf_layouts = tuple(layout for layout in cls.layouts if layout != "expanded")
        for name, wanted, layouts in (
            ("sample", samples, cls.layouts),
            ("grad_sample", with_grad, leaf_layouts),
            ("compile_sample", compiled, ()),
        ):
            if name in names and "layout" in names:
                pairs = [
                    pytest.param(p.values[0], layout, id=f"{p.id}-{layout}", marks=p.marks)
                    for p in wanted
                    for layout in layouts_of(p.values[0], layouts)
                ]
                metafunc.parametrize((name, "layout"), pairs)
            elif name in names:
                metafunc.parametrize(name, wanted)
        if "error" in names:
            metafunc.parametrize("error", cls.errors, ids=[error.id for error in cls.errors])
        if "dtype" in names:
            ids = [str(dtype).removeprefix("torch.") for dtype in cls.dtypes]
            metafunc.parametrize("dtype", cls.dtypes, ids=ids)
        if "device" in names:
            metafunc.parametrize("device", cls.devices(metafunc.function.__name__))
        if "on_cuda" in names:
            metafunc.parametrize("on_cuda", cls.devices(metafunc.function.__name__)[1:])

    @classmethod
    def devices(cls, check: str) -> list[Any]:
        """Devices for the test method `check`, the CPU first."""
        # torch records the same call for the emulated CUDA code as for the CPU.
        recorded = any(word in check for word in ("compile", "opcheck", "jit_trace"))
        return DEVICES[:2] if recorded else DEVICES

    # A subclass overrides these where the expected result is not the float64 reference's.

    def expected(self, sample: Sample, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        """The reference's outputs in float64, for inputs rounded to `dtype`."""
        return self._widened(sample, dtype, device).run(type(self).reference)

    def expected_gradients(
        self, sample: Sample, dtype: torch.dtype, device: str
    ) -> tuple[torch.Tensor, ...]:
        call = self._widened(sample, dtype, device, grad=True)
        return gradients(call, type(self).reference, dtype)

    @staticmethod
    def _widened(sample: Sample, dtype: torch.dtype, device: str, grad: bool = False) -> Call:
        return widened(sample, dtype, torch.float64, device, grad)

    def assert_close(self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
        assert ours.shape == expected.shape
        if not ours.is_floating_point():
            assert torch.equal(ours, expected.to(ours.dtype))
            return
        tolerance = self.tolerance[dtype]
        if tolerance is None:
            assert same_bits(ours, expected.to(ours.dtype))
            return
        rtol, atol = tolerance
        torch.testing.assert_close(
            ours.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True
        )

    # --- tests ---

    def test_equals_the_reference(self, sample: Sample, dtype: torch.dtype, device: str) -> None:
        ours = build(sample, dtype, device).run(type(self).function)
        expected = self.expected(sample, dtype, device)
        assert len(ours) == len(expected)
        for mine, theirs in zip(ours, expected, strict=True):
            self.assert_close(mine, theirs, dtype)

    def test_gradients_equal_the_reference(
        self, grad_sample: Sample, dtype: torch.dtype, device: str
    ) -> None:
        ours = gradients(build(grad_sample, dtype, device, grad=True), type(self).function)
        for mine, theirs in zip(
            ours, self.expected_gradients(grad_sample, dtype, device), strict=True
        ):
            assert mine.dtype == dtype
            self.assert_close(mine, theirs, dtype)

    def test_gradcheck(self, grad_sample: Sample, device: str) -> None:
        call = build(grad_sample, torch.float64, device, grad=True)
        check = with_floats(call, type(self).function)
        # The full Jacobian for small samples, random projections of it for larger ones.
        fast = sum(x.numel() for x in call.floats) > 100
        assert torch.autograd.gradcheck(check, tuple(call.floats), fast_mode=fast)
        if self.double_backward:
            assert torch.autograd.gradgradcheck(check, tuple(call.floats), fast_mode=fast)

    def test_layouts_give_the_same_values(self, sample: Sample, layout: str, device: str) -> None:
        for dtype in {self.dtypes[0], torch.float32}:
            call = build(sample, dtype, device, layout)
            plain = Call(
                tuple(map(_contiguous, call.args)),
                {name: _contiguous(value) for name, value in call.kwargs.items()},
                [],
            )
            for mine, theirs in zip(
                call.run(type(self).function), plain.run(type(self).function), strict=True
            ):
                self.assert_same_layouts(mine, theirs, dtype)
                kept = layout == "channels_last" and not _all_contiguous(call)
                if self.keeps_layout and kept and mine.dim() == 4:
                    assert mine.is_contiguous(memory_format=torch.channels_last)

    def assert_same_layouts(
        self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
    ) -> None:
        assert same_bits(ours, expected)

    def test_layouts_give_the_same_gradients(
        self, grad_sample: Sample, layout: str, device: str
    ) -> None:
        call = build(grad_sample, torch.float32, device, layout, grad=True)
        plain = build(grad_sample, torch.float32, device, grad=True)
        for mine, theirs in zip(
            gradients(call, type(self).function),
            gradients(plain, type(self).function),
            strict=True,
        ):
            on_cuda = _native.on_cuda(torch.device(device))
            if self.same_sums and (not on_cuda or self.same_sums_on_cuda):
                self.assert_same_layouts(mine, theirs, torch.float32)
            else:
                self.assert_close(mine, theirs, torch.float32)

    def test_empty_batch(self, sample: Sample, device: str) -> None:
        ours = build(sample, torch.float32, device, empty=True).run(type(self).function)
        expected = build(sample, torch.float32, device, empty=True).run(type(self).reference)
        for mine, theirs in zip(ours, expected, strict=True):
            assert mine.shape == theirs.shape
            assert same_bits(mine, theirs.to(mine.dtype))

    def test_nan_propagation(self, sample: Sample, device: str) -> None:
        call = build(sample, torch.float32, device)
        for x in (*call.args, *call.kwargs.values()):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 4:
                for place in (0, x.numel() // 2, x.numel() - 1):
                    before = x.view(-1)[place].item()
                    x.view(-1)[place] = float("nan")
                    ours, expected = call.run(type(self).function), call.run(type(self).reference)
                    for mine, theirs in zip(ours, expected, strict=True):
                        assert_nan_as_expected(mine, theirs)
                    x.view(-1)[place] = before

    def test_deterministic(self, sample: Sample, device: str) -> None:
        """Equal bits for other numbers of threads, and with uninitialised memory full of NaN."""
        for dtype in {self.dtypes[0], torch.float32}:
            torch.set_num_threads(1)
            first = self._outputs_and_gradients(sample, dtype, device)
            for threads in (2, 5):
                torch.set_num_threads(threads)
                with deterministic():
                    again = self._outputs_and_gradients(sample, dtype, device)
                self.assert_same_again(again, first, dtype)

    def _outputs_and_gradients(
        self, sample: Sample, dtype: torch.dtype, device: str
    ) -> tuple[torch.Tensor, ...]:
        out = build(sample, dtype, device).run(type(self).function)
        if not sample.grad:
            return out
        return (*out, *gradients(build(sample, dtype, device, grad=True), type(self).function))

    def assert_same_again(
        self, again: tuple[torch.Tensor, ...], first: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> None:
        assert all(same_bits(a, b) for a, b in zip(again, first, strict=True))

    def test_arguments_are_not_modified(self, sample: Sample, device: str) -> None:
        call, untouched = build(sample, torch.float32, device), build(sample, torch.float32, device)
        call.run(type(self).function)
        for a, b in zip(
            (*call.args, *call.kwargs.values()),
            (*untouched.args, *untouched.kwargs.values()),
            strict=True,
        ):
            assert not isinstance(a, torch.Tensor) or same_bits(a, b)

    def test_opcheck(self, compile_sample: Sample, device: str) -> None:
        for grad in (False, True) if compile_sample.grad else (False,):
            call = build(compile_sample, torch.float32, device, grad=grad)
            recorder = _Record()
            with recorder:
                outputs = call.run(type(self).function)
            assert recorder.calls, "the call reached none of segkernels' operators"
            with recorder:
                if grad:
                    torch.autograd.grad(
                        [out for out in outputs if out.requires_grad],
                        call.floats,
                        cotangents(outputs),
                    )
            for op, args, kwargs in recorder.calls:
                differentiable = grad and op._opname not in self.not_differentiable
                leaves = tuple(_leaf(arg, differentiable) for arg in args)
                torch.library.opcheck(op, leaves, kwargs)

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compile(self, compile_sample: Sample, dynamic: bool, device: str) -> None:
        torch.compiler.reset()
        compiled = torch.compile(
            type(self).function, fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        self._compare_compiled(compiled, compile_sample, device)

    @pytest.mark.compiles
    def test_compile_with_inductor(self, device: str) -> None:
        torch.compiler.reset()
        compiled = torch.compile(type(self).function, fullgraph=True)
        sample = next(s for s in self.samples if s.compile)
        self._compare_compiled(compiled, sample, device)

    def _compare_compiled(self, compiled: Callable[..., Any], sample: Sample, device: str) -> None:
        eager = build(sample, torch.float32, device, grad=sample.grad)
        other = build(sample, torch.float32, device, grad=sample.grad)
        for mine, theirs in zip(other.run(compiled), eager.run(type(self).function), strict=True):
            assert same_bits(mine, theirs)
            assert mine.stride() == theirs.stride()
        if sample.grad:
            for mine, theirs in zip(
                gradients(other, compiled), gradients(eager, type(self).function), strict=True
            ):
                assert same_bits(mine, theirs)

    def test_forward_mode(self, grad_sample: Sample, device: str) -> None:
        call = build(grad_sample, torch.float64, device, grad=True)
        function = with_floats(call, type(self).function)
        tangents = tuple(torch.ones_like(x) for x in call.floats)
        plain = tuple(x.detach() for x in call.floats)
        if not self.forward_mode:
            with pytest.raises(NotImplementedError, match=r"forward-mode.*not implemented"):
                torch.func.jvp(function, plain, tangents)
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
                function(*map(forward_ad.make_dual, plain, tangents))
            return
        fast = sum(x.numel() for x in call.floats) > 100
        assert torch.autograd.gradcheck(
            function,
            tuple(call.floats),
            fast_mode=fast,
            check_forward_ad=True,
            check_backward_ad=False,
            check_undefined_grad=False,
        )
        outputs, found = torch.func.jvp(function, plain, tangents)
        with forward_ad.dual_level():
            duals = function(*map(forward_ad.make_dual, plain, tangents))
            expected = [forward_ad.unpack_dual(out) for out in duals]
        for out, tangent, (primal, other) in zip(outputs, found, expected, strict=True):
            assert same_bits(out, primal)
            assert same_bits(tangent, other)

    def test_functional_gradients(self, grad_sample: Sample, device: str) -> None:
        call = build(grad_sample, torch.float64, device, grad=True)
        function = with_floats(call, type(self).function)
        outputs, pull = torch.func.vjp(function, *(x.detach() for x in call.floats))
        given = cotangents(call.run(type(self).function))
        assert len(outputs) == len(given)
        for mine, theirs in zip(
            pull(tuple(given)), gradients(call, type(self).function), strict=True
        ):
            assert same_bits(mine, theirs)

    def test_vmap(self, sample: Sample, device: str) -> None:
        """Over all floats, over the first or the last alone: equal to separate calls."""
        call = build(sample, torch.float64, device, grad=True)
        function = with_floats(call, type(self).function, differentiable=False)
        plain = [x.detach() for x in call.floats]
        several = [torch.stack([x, x.flip(-1), x.roll(1, -1)]) for x in plain]
        others = [None] * (len(plain) - 1)
        cases: list[Any] = [(several, [0] * len(plain))]
        if others:
            cases.append(([several[0], *plain[1:]], [0, *others]))
            cases.append(([*plain[:-1], several[-1].movedim(0, -1)], [*others, -1]))
        for batched, dims in cases:
            found = torch.func.vmap(function, tuple(dims))(*batched)
            for i in range(3):
                one = [
                    x if dim is None else x.select(dim, i)
                    for x, dim in zip(batched, dims, strict=True)
                ]
                for mine, theirs in zip(found, function(*one), strict=True):
                    assert mine[i].dtype == theirs.dtype
                    torch.testing.assert_close(mine[i], theirs, rtol=1e-12, atol=1e-12)

    def test_per_sample_gradients(self, grad_sample: Sample, device: str) -> None:
        """`torch.func.vmap` of the vjp, over a batch of the first float."""
        call = build(grad_sample, torch.float64, device, grad=True)
        function = with_floats(call, type(self).function)
        first, *rest = (x.detach() for x in call.floats)
        given = cotangents(call.run(type(self).function))

        def pulled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            _, pull = torch.func.vjp(function, x, *rest)
            return pull(tuple(given))

        several = torch.stack([first, first.flip(-1)])
        found = torch.func.vmap(pulled)(several)
        for i in range(2):
            for mine, theirs in zip(found, pulled(several[i]), strict=True):
                torch.testing.assert_close(mine[i], theirs, rtol=1e-11, atol=1e-11)
        for mine, batch in zip(torch.func.vmap(pulled)(several[:0]), found, strict=True):
            assert mine.shape == (0, *batch.shape[1:])

    def test_negated_views(self, sample: Sample, device: str) -> None:
        """Views with torch's negative bit set, such as the imaginary part of a conjugate."""
        for grad in (False, True) if sample.grad else (False,):
            plain = build(sample, torch.float32, device, grad=True)
            function = with_floats(plain, type(self).function, differentiable=False)
            leaves = [x.detach().requires_grad_(grad) for x in plain.floats]
            views = [torch._neg_view(-x) for x in leaves]
            assert all(view.is_neg() for view in views)
            results = [function(*views), function(*leaves)]
            for mine, theirs in zip(*results, strict=True):
                assert same_bits(mine.resolve_neg(), theirs)
            if grad:
                found = [
                    torch.autograd.grad(
                        [o for o in outs if o.requires_grad], leaves, cotangents(outs)
                    )
                    for outs in results
                ]
                for mine, theirs in zip(*found, strict=True):
                    assert same_bits(mine.resolve_neg(), theirs)

    def test_meta_tensors(self, sample: Sample, dtype: torch.dtype) -> None:
        for layout in ("contiguous", "channels_last"):
            expected = build(sample, dtype, layout=layout).run(type(self).function)
            found = build(sample, dtype, "meta", layout).run(type(self).function)
            for mine, theirs in zip(found, expected, strict=True):
                assert mine.device.type == "meta"
                assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
                assert mine.stride() == theirs.stride()

    def test_jit_trace(self, compile_sample: Sample, device: str) -> None:
        """torch.jit.trace records torch's own operators, or raises and names torch.export."""
        call = build(compile_sample, torch.float32, device, grad=True)
        function = with_floats(call, type(self).function, differentiable=False)
        plain = tuple(x.detach() for x in call.floats)
        if not self.traces:
            with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace.*torch\.export"):
                torch.jit.trace(function, plain)
            return
        traced = torch.jit.trace(function, plain)
        for values in (plain, tuple(x.flip(-1).contiguous() for x in plain)):
            for mine, theirs in zip(traced(*values), function(*values), strict=True):
                self.assert_close(mine, theirs, torch.float32)

    def test_errors(self, error: Error, device: str) -> None:
        with pytest.raises(error.kind, match=error.match):
            error.call(device)

    def test_cuda_equals_cpu(self, sample: Sample, dtype: torch.dtype, on_cuda: str) -> None:
        for layout in ("contiguous", *layouts_of(sample, ("channels_last",))):
            ours = self._for_both(sample, dtype, on_cuda, layout)
            with emulated(False):
                expected = self._for_both(sample, dtype, "cpu", layout)
            for mine, theirs in zip(ours, expected, strict=True):
                if self.same_bits_as_cpu:
                    assert same_bits(mine.cpu(), theirs)
                else:
                    self.assert_close(mine.cpu(), theirs, dtype)

    def _for_both(
        self, sample: Sample, dtype: torch.dtype, device: str, layout: str
    ) -> tuple[torch.Tensor, ...]:
        call = build(sample, dtype, device, layout, grad=self.same_bits_as_cpu)
        out = call.run(type(self).function)
        return (*out, *gradients(call, type(self).function)) if self.same_bits_as_cpu else out

    @pytest.mark.gpu
    def test_side_stream_and_graph_capture(self, sample: Sample) -> None:
        call = build(sample, torch.float32, "cuda")
        expected = call.run(type(self).function)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                other = call.run(type(self).function)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call.run(type(self).function)
        graph.replay()
        torch.cuda.synchronize()
        for a, b, c in zip(expected, other, captured, strict=True):
            assert same_bits(a, b)
            assert same_bits(a, c)


class ConvolutionSuite(OpSuite):
    """Tests of convolutions, which are compared by `relative_error`.

    torch's convolutions on the CPU sum in an order that depends on layout and threads, and inductor
    compiles the other operations of the backward differently.
    """

    # Keyword argument whose first axis is the input's batch.
    batched: ClassVar[str]
    # Samples with convolutions for which cuDNN may spread NaN.
    undilated: ClassVar[tuple[str, ...]]

    @classmethod
    def devices(cls, check: str) -> list[Any]:
        return DEVICES[:2]  # emulated, torch's kernels would run again

    def assert_same_layouts(
        self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
    ) -> None:
        assert relative_error(ours, expected) <= CONVOLUTION_ERROR[dtype]

    def assert_same_again(
        self, again: tuple[torch.Tensor, ...], first: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> None:
        if first[0].is_cuda:
            return super().assert_same_again(again, first, dtype)
        for a, b in zip(again, first, strict=True):
            assert relative_error(a, b) <= CONVOLUTION_ERROR[dtype]

    def _compare_compiled(self, compiled: Callable[..., Any], sample: Sample, device: str) -> None:
        found = []
        for function in (compiled, type(self).function):
            call = build(sample, torch.float32, device, grad=sample.grad)
            found.append((*call.run(function), *gradients(call, function)))
        for mine, theirs in zip(*found, strict=True):
            assert mine.stride() == theirs.stride()
            assert relative_error(mine, theirs) <= CONVOLUTION_ERROR[torch.float32]

    @pytest.mark.compiles
    def test_compile_with_inductor(self, device: str) -> None:
        from torch._inductor import config

        # Inductor accepts only a program's name, while CXX may be "ccache g++".
        with config.patch({"cpp.cxx": (None, os.environ.get("CXX", "g++").split()[-1])}):
            super().test_compile_with_inductor(device)

    # The next two tests leave the weights unchanged. OpSuite's would empty them, or put NaN into
    # them, which the reference multiplies by the padding and the kernels do not.

    def test_empty_batch(self, sample: Sample, device: str) -> None:
        found = []
        for function in (type(self).function, type(self).reference):
            call = build(sample, torch.float32, device, grad=True)
            inputs = [call.args[0], call.kwargs.get(self.batched)]
            empty = {id(t): t.detach()[:0].requires_grad_() for t in inputs if t is not None}
            call.args = tuple(empty.get(id(a), a) for a in call.args)
            call.kwargs = {name: empty.get(id(a), a) for name, a in call.kwargs.items()}
            call.floats = [empty.get(id(a), a) for a in call.floats]
            found.append([*call.run(function), *gradients(call, function)])
        for mine, expected in zip(*found, strict=True):
            assert torch.equal(mine, expected)

    def test_nan_propagation(self, sample: Sample, device: str) -> None:
        call = build(sample, torch.float32, device)
        spreads = device == "cuda" and sample.id in self.undilated
        for x in (call.args[0], call.kwargs.get(self.batched)):
            for place in (0, x.numel() // 2, x.numel() - 1) if x is not None else ():
                before = x.view(-1)[place].item()
                x.view(-1)[place] = float("nan")
                ours, expected = call.run(type(self).function), call.run(type(self).reference)
                assert_nan_as_expected(ours[0], expected[0], spreads)
                x.view(-1)[place] = before


def widened(
    sample: Sample, rounded: torch.dtype, dtype: torch.dtype, device: str, grad: bool = False
) -> Call:
    """`sample`'s values rounded to `rounded`, then converted to `dtype`."""
    narrow = build(sample, rounded, device, grad=True)
    reached = {id(x) for x in narrow.floats}
    floats: list[torch.Tensor] = []

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            x = value.detach().to(dtype)
            if grad and id(value) in reached:
                floats.append(x.requires_grad_())
            return x
        return value

    args = tuple(map(one, narrow.args))
    kwargs = {name: one(value) for name, value in narrow.kwargs.items()}
    return Call(args, kwargs, floats)


def with_floats(
    call: Call, function: Callable[..., Any], differentiable: bool = True
) -> Callable[..., Any]:
    """`function` of `call.floats` only; returns the floating-point outputs, or all."""
    places = {id(x): i for i, x in enumerate(call.floats)}

    def of(*floats: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args = [floats[places[id(a)]] if id(a) in places else a for a in call.args]
        kwargs = {
            name: floats[places[id(a)]] if id(a) in places else a for name, a in call.kwargs.items()
        }
        found = as_tuple(function(*args, **kwargs))
        return tuple(out for out in found if out.is_floating_point() or not differentiable)

    return of


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def _all_contiguous(call: Call) -> bool:
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)]
    return all(x.is_contiguous() for x in tensors)


def _leaf(value: Any, grad: bool) -> Any:
    if isinstance(value, list):
        return [_leaf(element, grad) for element in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        leaf = value.detach().clone(memory_format=torch.preserve_format)
        return leaf.requires_grad_(grad)
    return value


def message(*parts: str) -> str:
    """A pattern that matches the parts in this order, with any text between them."""
    return ".*".join(re.escape(part) for part in parts)
