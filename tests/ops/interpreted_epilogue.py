"""dilated_conv2d's epilogue kernel interpreted; test_dilated_conv2d_epilogue.py runs this.

Triton reads TRITON_INTERPRET when it is imported, so these tests need a process of their own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from segkernels.ops.dilated_conv2d.call import Epilogue
from segkernels.ops.dilated_conv2d.triton_kernels import apply

assert os.environ["TRITON_INTERPRET"] == "1"
torch.set_num_threads(1)

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
# The interpreter cuts bfloat16 off where a GPU rounds.
ACCURACY = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}
NAMES = ("bias", "scale", "shift", "residual")


def exact(y: torch.Tensor, e: Epilogue) -> torch.Tensor:
    y = y.double()
    if e.bias is not None:
        y = y + e.bias.double()[:, None, None]
    if e.scale is not None:
        y = y * e.scale.double()[:, None, None]
    if e.shift is not None:
        y = y + e.shift.double()[:, None, None]
    if e.residual is not None:
        y = y + e.residual.double()
    return F.relu(y) if e.activation else y


def check(y: torch.Tensor, e: Epilogue) -> None:
    wanted, limit = exact(y, e), ACCURACY[y.dtype]
    ours = apply(y, e)
    assert ours is y
    torch.testing.assert_close(ours.double(), wanted, rtol=limit, atol=limit)


@LAYOUTS
@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (1, 33, 2, 2), (3, 16, 1, 1)], ids=str)
def test_all_of_it(shape: Any, dtype: torch.dtype, layout: Any) -> None:
    y = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    bias, residual = torch.randn(shape[1]).to(dtype), torch.randn(shape).to(dtype)
    scale, shift = torch.randn(shape[1]), torch.randn(shape[1])
    check(y, Epilogue(bias, scale, shift, residual, "relu"))


@LAYOUTS
@pytest.mark.parametrize("name", NAMES)
def test_each_part_alone(name: str, layout: Any) -> None:
    y = torch.randn(2, 5, 3, 4).contiguous(memory_format=layout)
    check(y, Epilogue(**{name: torch.randn(y.shape if name == "residual" else 5)}))


@LAYOUTS
def test_several_blocks_of_rows_and_columns(layout: Any) -> None:
    y = torch.randn(2, 1100, 3, 4).contiguous(memory_format=layout)
    check(y, Epilogue(shift=torch.randn(1100), residual=torch.randn(y.shape)))
    y = torch.randn(2, 5, 41, 43).contiguous(memory_format=layout)
    check(y, Epilogue(torch.randn(5), residual=torch.randn(y.shape), activation="relu"))


def test_vectors_may_be_strided() -> None:
    bias, scale, shift = torch.randn(32)[::2], torch.rand(16, 3)[:, 1], torch.tensor(2.0).expand(16)
    check(torch.randn(1, 16, 6, 7), Epilogue(bias, scale, shift))


@LAYOUTS
def test_nan_passes_relu(layout: Any) -> None:
    y = torch.randn(1, 16, 4, 4).contiguous(memory_format=layout)
    y[0, 3, 1, 2] = float("nan")
    wanted = y.isnan()
    assert torch.equal(apply(y, Epilogue(torch.randn(16), activation="relu")).isnan(), wanted)


def test_nothing_to_do() -> None:
    y = torch.randn(2, 5, 3, 4)
    before = y.clone()
    assert torch.equal(apply(y, Epilogue()), before)
    assert apply(y[:0], Epilogue(torch.randn(5))).shape == (0, 5, 3, 4)
