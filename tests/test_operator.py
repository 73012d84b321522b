"""Tests of ops/_operator.py that the shared suite (ops/suite.py) does not cover."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import segkernels
from segkernels import _native
from segkernels.ops import _operator
from segkernels.ops._operator import Operator
from segkernels.ops.max_pool2d.operator import pool

PACKAGE = Path(segkernels.__file__).parent


def test_only_tests_import_references() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "reference.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                names.append(getattr(node, "module", None) or "")
                assert "reference" not in ".".join(names).split("."), path


def test_schema_from_record() -> None:
    schema = str(torch.ops.segkernels.max_pool2d.default._schema)
    assert schema == (
        "segkernels::max_pool2d(Tensor input, SymInt[2] full, SymInt[2] pooled, "
        "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
        "bool channels_last, bool return_codes, bool return_indices) -> "
        "(Tensor values, Tensor codes, Tensor indices)"
    )
    # Fields with a default are left out: the dispatcher cannot carry a lattice.
    assert "lattice" not in str(torch.ops.segkernels.permutohedral_filter.default._schema)


# --- tensors passed to native code ---


def test_native_functions_accept_tensors_only() -> None:
    C, x = _native.C(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(TypeError):
        C.rows_invert_norm(_native.where(x), 4, x.data_ptr(), x.data_ptr(), False, False)
    lattice = C.Lattice()
    with pytest.raises(TypeError):
        lattice.weights = x.data_ptr()


def test_native_struct_keeps_its_tensors_alive() -> None:
    lattice, tensor = _native.C().Lattice(), torch.zeros(3)
    lattice.weights = tensor
    kept = weakref.ref(tensor)
    term = _native.C().MeanFieldTerm()
    term.lattice = lattice
    del tensor, lattice
    gc.collect()
    assert kept() is not None
    del term
    gc.collect()
    assert kept() is None


# --- higher derivatives ---


def smooth(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A scalar through several operators."""
    y = segkernels.dilated_conv2d(x, weight, padding=2, dilation=2).tanh()
    values, codes = segkernels.max_pool2d(y, 2, return_codes=True)
    z = segkernels.max_unpool2d(values**2, codes, 2)
    z = z + segkernels.unpool_nearest(values, 2)
    return segkernels.interpolate(z, (5, 7), mode="bicubic").sin().sum()


def same_smooth(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = F.conv2d(x, weight, padding=2, dilation=2).tanh()
    values, indices = F.max_pool2d(y, 2, return_indices=True)
    z = F.max_unpool2d(values**2, indices, 2)
    z = z + F.interpolate(values, scale_factor=2, mode="nearest")
    return F.interpolate(z, (5, 7), mode="bicubic").sin().sum()


def test_hessians() -> None:
    """Forward over reverse and reverse over reverse equal torch's reverse over reverse."""
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    expected = torch.func.jacrev(torch.func.jacrev(same_smooth, (0, 1)), (0, 1))(x, w)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        found = outer(torch.func.jacrev(smooth, (0, 1)), (0, 1))(x, w)
        for row, wanted in zip(found, expected, strict=True):
            for mine, theirs in zip(row, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_hessians_with_respect_to_one_argument() -> None:
    """A gradient that is not needed is None, in eager mode and under vmap."""
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    for i in (0, 1):
        expected = torch.func.hessian(same_smooth, i)(x, w)
        torch.testing.assert_close(torch.func.hessian(smooth, i)(x, w), expected)

    def tap(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return segkernels.dilated_conv2d(x, w, padding=1).sin().sum()

    several = torch.randn(2, 3, 1, 2, 4, 4, dtype=torch.float64)
    over = torch.func.vmap(torch.func.vmap(torch.func.grad(tap), (None, 0)), (None, 0))
    found = over(w, several)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], torch.func.grad(tap)(w, several[i, j]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_vmap_of_a_convolution_in_channels_last(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 6, 5).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(4, 2, 3, 3, 3).to(dtype)

    def call(w: torch.Tensor) -> torch.Tensor:
        return segkernels.dilated_conv2d(x, w, activation="relu")

    for one, weight in zip(torch.func.vmap(call)(w), w, strict=True):
        torch.testing.assert_close(one, call(weight))

    def joined(w: torch.Tensor) -> torch.Tensor:
        last = w.contiguous(memory_format=torch.channels_last)
        return segkernels.aspp(x, [last], [2]).float().square().sum()

    plain = torch.stack([torch.func.grad(joined)(weight) for weight in w])
    batched = torch.func.vmap(torch.func.grad(joined))
    with pytest.raises(RuntimeError, match="vmap"):  # from torch's .contiguous(memory_format=...)
        batched(w)
    over_x = torch.func.vmap(torch.func.grad(lambda x: segkernels.aspp(x, [w[0]], [2]).sum()))
    expected = torch.func.grad(lambda x: segkernels.aspp(x, [w[0]], [2]).sum())(x)
    torch.testing.assert_close(over_x(torch.stack([x, x]))[1], expected)
    assert plain.shape == w.shape


def test_batched_gradients() -> None:
    """`is_grads_batched`, which uses torch's legacy batched tensors."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for call in (
        lambda: segkernels.interpolate(x, (7, 6), mode="bicubic"),
        lambda: segkernels.max_pool2d(x, 2),
        lambda: segkernels.dilated_conv2d(x, w, scale=torch.ones(3).double(), activation="relu"),
    ):
        out = call()
        grads = torch.randn(3, *out.shape, dtype=torch.float64)
        (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
        for one, grad in zip(found, grads, strict=True):
            torch.testing.assert_close(one, torch.autograd.grad(out, x, grad, retain_graph=True)[0])


def test_default_device_does_not_affect_workspaces() -> None:
    x, target = torch.randn(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 8, 8, dtype=torch.long)
    with torch.device("meta"):
        assert segkernels.upsample_argmax(x, 8).device.type == "cpu"
        segkernels.upsample_cross_entropy(x, target).backward()
    assert x.grad is not None


def test_transform_inside_torch_compile() -> None:
    """The tangent is correct; the graph breaks, unlike for torch's own operators."""
    x = torch.arange(4.0).view(1, 1, 2, 2)

    def tangent(x: torch.Tensor) -> torch.Tensor:
        def up(t: torch.Tensor) -> torch.Tensor:
            return segkernels.interpolate(t, size=(4, 4), mode="bilinear")

        found: torch.Tensor = torch.func.jvp(up, (x,), (torch.ones_like(x),))[1]
        return found

    assert tangent(x).sum() == 16
    torch.compiler.reset()
    assert torch.compile(tangent, backend="aot_eager")(x).sum() == 16


def test_tensors_from_a_closed_transform() -> None:
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 1)
        return x.sum()

    x = torch.randn(1, 2, 4, 4)
    torch.func.grad(keep)(x)
    torch.testing.assert_close(
        segkernels.unpool_nearest(kept[0], 2), F.interpolate(x, scale_factor=2)
    )


def test_efficient_zero_gradients() -> None:
    """Zero tensors without storage, which torch's autograd may pass as gradients."""
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    nothing = torch._efficientzerotensor((1, 2, 4, 4))
    for out in (
        segkernels.unpool_nearest(x, 2),
        segkernels.interpolate(x, (4, 4), mode="bilinear"),
    ):
        (grad,) = torch.autograd.grad(out, x, nothing)
        assert torch.equal(grad, torch.zeros_like(x))


def test_positions_are_computed_only_if_needed() -> None:
    x = torch.randn(1, 2, 4, 4)
    windows = segkernels.ops.max_pool2d._pooling(
        x.shape, False, (2, 2), (2, 2), (0, 0), (1, 1), False, False, False
    )
    values, codes, indices = pool(x, windows)
    assert codes is None
    assert indices is None
    recorded = pool(x.requires_grad_(), windows)
    assert torch.equal(recorded[0], values)
    assert recorded[1].shape == values.shape


# --- an operator defined by a test ---


class Factor(NamedTuple):
    factor: float


def doubled(x: torch.Tensor, others: list[torch.Tensor], record: Factor) -> list[torch.Tensor]:
    return [record.factor * t for t in (x, *others)]


def test_tensor_lists_and_missing_derivatives() -> None:
    def backward(ctx: Any, *grads: Any) -> list[Any]:
        return [None if g is None else ctx.record.factor * g for g in grads]

    test = Operator(
        "test_only_scaled",
        "Tensor x, Tensor[] others",
        Factor,
        kernel=doubled,
        fake=doubled,
        returns="Tensor[]",
        differentiable=3,
        backward=backward,
    )
    leaves = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    found = test(leaves[0], leaves[1:], Factor(3.0))
    assert isinstance(found, list)
    grads = torch.autograd.grad(found[1].sum(), leaves, allow_unused=True)
    assert grads[0] is grads[2] is None
    assert torch.equal(grads[1], torch.full((2, 3), 3.0))
    torch.library.opcheck(torch.ops.segkernels.test_only_scaled, (leaves[0], leaves[1:], 3.0))
    with pytest.raises(NotImplementedError, match=r"test_only_scaled: forward-mode.*reverse mode"):
        torch.func.jvp(lambda x: test(x, leaves[1:], Factor(3.0)), (leaves[0],), (leaves[1],))
    batched = torch.func.vmap(lambda x: test(x, leaves[1:], Factor(3.0))[0])(torch.ones(4, 2, 3))
    assert torch.equal(batched, torch.full((4, 2, 3), 3.0))
    assert _operator.needs_dispatcher(torch.empty(1, device="meta"))


# --- FLOP counts ---


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_flops_equal_torchs(groups: int) -> None:
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    w = torch.randn(6, 4 // groups, 3, 3, requires_grad=True)
    scale = torch.ones(6)

    def ours(**epilogue: Any) -> torch.Tensor:
        return segkernels.dilated_conv2d(x, w, None, 1, 2, 2, groups, **epilogue)

    def theirs() -> torch.Tensor:
        return F.conv2d(x, w, None, 1, 2, 2, groups)

    assert flops(lambda: ours(scale=scale, activation="relu")) == flops(theirs) > 0
    if groups == 1:  # torch counts a grouped convolution's gradient as an ungrouped one's
        both = flops(lambda: ours(scale=scale).sum().backward())
        assert both == flops(lambda: theirs().sum().backward()) == 3 * flops(theirs)


def test_aspp_flops_equal_its_branches() -> None:
    x, w = torch.randn(1, 3, 6, 7), [torch.randn(2, 3, 1, 1), torch.randn(4, 3, 3, 3)]
    branches = sum(flops(lambda k=k: F.conv2d(x, k, padding="same")) for k in w)
    assert flops(lambda: segkernels.aspp(x, w, (1, 2))) == branches


@pytest.mark.slow
def test_flops_do_not_depend_on_import_order() -> None:
    code = (
        "{}\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    x, w, one = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 1, 1), torch.ones(1)\n"
        "    segkernels.dilated_conv2d(x, w, scale=one)\n"
        "print(counter.get_total_flops())\n"
    )
    imports = [
        "import torch",
        # find_spec only looks the module up, as some packages do.
        "import segkernels, importlib.util; importlib.util.find_spec('torch.utils.flop_counter')",
        "from torch.utils.flop_counter import FlopCounterMode",
    ]
    for order in (imports, [imports[0], imports[2], imports[1]]):
        run = [sys.executable, "-c", code.format("\n".join(order))]
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "32\n"


@pytest.mark.slow
def test_importing_does_not_import_triton() -> None:
    code = "import segkernels, sys; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
