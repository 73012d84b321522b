"""The modules MaxPool2d, MaxUnpool2d and ResizeConv, and bilinear_kernel_."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import segkernels


def checkerboard(out: torch.Tensor, period: int) -> float:
    """Variance between the means of the `period`^2 phases of `out`, without its borders."""
    inside = out[..., period * 2 : -period * 2, period * 2 : -period * 2]
    means = [inside[..., i::period, j::period].mean() for i in range(period) for j in range(period)]
    return torch.stack(means).var().item()


def test_resize_conv_has_no_checkerboard() -> None:
    constant = torch.ones(1, 8, 12, 12)
    transposed = torch.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
    for mode in ("nearest", "bilinear"):
        resized = segkernels.ResizeConv(8, 4, mode=mode)
        assert resized(constant).shape == (1, 4, 24, 24)
        assert checkerboard(transposed(constant), 2) > 1e-4
        assert checkerboard(resized(constant), 2) < 1e-12


def test_resize_conv_equals_resize_and_convolution() -> None:
    x = torch.randn(2, 3, 5, 7)
    layer = segkernels.ResizeConv(3, 6, 5, 3, "bilinear", bias=False, padding_mode="replicate")
    assert list(layer.state_dict()) == ["conv.weight"]
    larger = F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(x), layer.conv(larger))
    assert "scale_factor=3, mode='bilinear'" in repr(layer)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"mode": "area"}, "mode must be.*'area'"),
        ({"scale_factor": 0}, "scale_factor must be at least 1, got 0"),
    ],
)
def test_resize_conv_invalid_arguments(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        segkernels.ResizeConv(3, 3, **kwargs)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("scale", [2, 3, 4, 8, 32])
def test_bilinear_kernel_upsamples_bilinearly(scale: int, groups: int) -> None:
    odd = scale % 2
    conv = torch.nn.ConvTranspose2d(
        6, 6, 2 * scale - odd, stride=scale, padding=(scale - odd) // 2, groups=groups
    )
    assert segkernels.bilinear_kernel_(conv) is conv
    x = torch.randn(1, 6, 5, 4)
    expected = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    torch.testing.assert_close(conv(x)[inside], expected[inside], rtol=1e-5, atol=1e-5)
    assert conv.weight.requires_grad


def test_bilinear_kernel_equals_fcns_weights() -> None:
    conv = torch.nn.ConvTranspose2d(1, 1, (4, 3), bias=False)
    segkernels.bilinear_kernel_(conv)
    rows, columns = torch.tensor([0.25, 0.75, 0.75, 0.25]), torch.tensor([0.5, 1.0, 0.5])
    assert torch.equal(conv.weight[0, 0], torch.outer(rows, columns))


def test_bilinear_kernel_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="in_channels=2, out_channels=3"):
        segkernels.bilinear_kernel_(torch.nn.ConvTranspose2d(2, 3, 4))
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        segkernels.bilinear_kernel_(torch.nn.Conv2d(2, 2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["return_indices", "return_codes"])
def test_modules_restore_the_maxima(kind: str) -> None:
    x = torch.randn(2, 3, 11, 12)
    pool = segkernels.MaxPool2d(2, **{kind: True})
    unpool = segkernels.MaxUnpool2d(2)
    values, positions = pool(x)
    restored = unpool(values, positions, output_size=x.shape)
    assert torch.equal(restored, torch.where(restored != 0, x, 0))
    assert (restored != 0).sum() == values.numel()


def test_modules_accept_torchs_arguments() -> None:
    x = torch.randn(2, 3, 12, 13)
    args: tuple[Any, ...] = (3, 2, 1, 1, True, True)
    for mine, theirs in zip(
        segkernels.MaxPool2d(*args)(x), torch.nn.MaxPool2d(*args)(x), strict=True
    ):
        assert torch.equal(mine, theirs)
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(
        segkernels.MaxUnpool2d((2, 2), 2, 0)(values, indices, (12, 13)),
        torch.nn.MaxUnpool2d((2, 2), 2, 0)(values, indices, (12, 13)),
    )
    assert isinstance(segkernels.MaxPool2d(2), torch.nn.MaxPool2d)
    with pytest.raises(ValueError, match="not both"):
        segkernels.MaxPool2d(2, return_indices=True, return_codes=True)


def test_dilated_module_round_trip() -> None:
    x = torch.randn(1, 2, 9, 9)
    values, codes = segkernels.MaxPool2d(2, 3, dilation=2, return_codes=True)(x)
    restored = segkernels.MaxUnpool2d(2, 3, dilation=2)(values, codes, (9, 9))
    assert torch.equal(restored, torch.where(restored != 0, x, 0))
    assert (restored != 0).sum() == values.numel()
