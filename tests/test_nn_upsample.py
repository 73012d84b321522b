"""The module Upsample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import segkernels.nn


@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": (7, 9)},
        {"scale_factor": 2.5, "mode": "bilinear", "align_corners": True},
        {"scale_factor": (2.0, 1.5), "mode": "bicubic", "recompute_scale_factor": True},
        {"size": 6, "mode": "nearest-exact"},
    ],
    ids=["nearest", "corners", "bicubic", "exact"],
)
def test_upsample_equals_torchs(kwargs: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 4, 5)
    ours, theirs = segkernels.nn.Upsample(**kwargs), torch.nn.Upsample(**kwargs)
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-6)


def test_upsample_trains_and_compiles_in_a_model() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 1), segkernels.nn.Upsample(scale_factor=2, mode="bilinear")
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 4, 4)
    model(x).sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    compiled(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, expected)
