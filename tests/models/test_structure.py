"""Tests of what the papers state: alignment, receptive fields, sizes, weights, CRF, FLOPs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.cases import as_if_trained
from models.counted import flops, parameters
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from segkernels import DenseCRF, models
from segkernels.cli import app
from segkernels.cli.models import render
from segkernels.models import _registry, _vgg
from segkernels.models._resnet import LAYERS, ResNet
from segkernels.models.dilatednet import MARGIN, _mirror
from segkernels.nn import bilinear_kernel_


@pytest.mark.parametrize(("name", "offset"), [("fcn32s", 19), ("fcn16s", 27), ("fcn8s", 31)])
@pytest.mark.parametrize("size", [(32, 47), (65, 96), (1, 130)])
def test_fcn_is_the_papers_transposed_convolution_cropped(
    name: str, offset: int, size: tuple[int, int]
) -> None:
    model = as_if_trained(models.create_model(name, 3, width=1 / 64)).eval().double()
    x = image = torch.randn(1, 3, *size, dtype=torch.float64)
    pools = []
    for stage in model.vgg:
        for layer in stage:
            pad = 100 if x is image else 1
            x = F.relu(F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=pad))
        x = F.max_pool2d(x, 2, ceil_mode=True)
        pools.append(x)
    for fc in (model.fc6, model.fc7):
        x = F.relu(F.conv2d(x, fc.conv.weight, fc.conv.bias))
    x = model.score_fr(x)
    if name != "fcn32s":
        x = model.upscore2(x)
        x = x + model.score_pool4(pools[3])[..., 5 : 5 + x.size(2), 5 : 5 + x.size(3)]
    if name == "fcn8s":
        x = model.upscore_pool4(x)
        x = x + model.score_pool3(pools[2])[..., 9 : 9 + x.size(2), 9 : 9 + x.size(3)]
    s = model.stride
    last = bilinear_kernel_(nn.ConvTranspose2d(3, 3, 2 * s, s, bias=False, groups=3).double())
    full = last(x)
    expected = full[..., offset : offset + size[0], offset : offset + size[1]]
    assert expected.shape[2:] == size
    torch.testing.assert_close(model(image), expected)
    labels = model.predict(image)
    torch.testing.assert_close(expected.gather(1, labels.unsqueeze(1))[:, 0], expected.amax(1))


def test_fcn_starts_bilinear_and_at_zero() -> None:
    model = models.fcn8s(4, width=1 / 64)
    expected = bilinear_kernel_(nn.ConvTranspose2d(4, 4, 4, 2, bias=False)).weight
    assert torch.equal(model.upscore2.weight, expected)
    assert not model(torch.randn(1, 3, 16, 16)).any()
    model.loss(torch.randn(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.int64)).backward()
    for score in (model.score_fr, model.score_pool4, model.score_pool3):
        assert score.weight.grad.any()


def test_unet_without_padding_is_the_papers() -> None:
    with torch.device("meta"):
        model = models.unet(2, 1, padding="valid")
        assert model(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        assert model(torch.empty(1, 1, 188, 588)).shape == (1, 2, 4, 404)
    model = models.unet(3, padding="valid", width=1 / 64).eval()
    image, labels = torch.randn(1, 3, 204, 188), torch.randint(0, 3, (1, 204, 188))
    expected = model.loss(image, labels[:, 92:112, 92:96])
    torch.testing.assert_close(model.loss(image, labels), expected)


def test_unets_output_is_the_centre_of_the_image() -> None:
    model = models.unet(1, 1, padding="valid", width=1 / 64, dropout=0.0).double().eval()
    for p in model.parameters():
        p.data.abs_()
    image = torch.ones(1, 1, 220, 220, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(image)[0, 0, 18, 18], image)
    rows, columns = grad[0, 0].sum(1), grad[0, 0].sum(0)
    place = torch.arange(220.0, dtype=torch.float64)
    assert (rows * place).sum() / rows.sum() == pytest.approx(92 + 18, abs=8)
    assert (columns * place).sum() / columns.sum() == pytest.approx(92 + 18, abs=8)


def receptive_field(layers: list[nn.Module]) -> int:
    """The receptive field of a sequence of layers, by arithmetic."""
    field, step = 1, 1
    for layer in layers:
        kernel, dilation, stride = (
            v if isinstance(v, int) else v[0]
            for v in (layer.kernel_size, layer.dilation, layer.stride)
        )
        field += (kernel - 1) * dilation * step
        step *= stride
    return field


def reach(model: nn.Module, size: int, place: tuple[int, int]) -> torch.Tensor:
    """First and last row, and first and last column, where the gradient of one output is not zero.

    The weights must be positive, so that they do not cancel.
    """
    image = torch.ones(1, 4, size, size, dtype=torch.float64, requires_grad=True)
    out = model(image)
    (grad,) = torch.autograd.grad(out[0, 0, place[0], place[1]], image)
    rows, columns = (grad[0].abs().sum(dim=(0, d)).nonzero() for d in (2, 1))
    return torch.cat([rows[0], rows[-1], columns[0], columns[-1]])


@pytest.mark.parametrize("large", [False, True])
def test_context_module_sees_67_pixels(large: bool) -> None:
    build = models.dilatednet_large if large else models.dilatednet
    context = build(4, width=1 / 64).context
    assert context is not None
    convs = [part for part in context.modules() if isinstance(part, nn.Conv2d)]
    assert [conv.dilation[0] for conv in convs] == [1, 1, 2, 4, 8, 16, 1, 1]
    assert receptive_field(convs) == 67
    for conv in convs:
        nn.init.constant_(conv.weight, 0.1)
    found = reach(context.double(), 101, (50, 50))
    assert found.tolist() == [50 - 33, 50 + 33, 50 - 33, 50 + 33]
    # The context module starts as the identity.
    x = torch.rand(1, 4, 9, 12)
    if not large:
        torch.testing.assert_close(build(4, width=1 / 64).context(x), x)


def test_front_end_sees_380_pixels_and_its_cells_lie_on_the_image() -> None:
    model = models.dilatednet_frontend(2, 1, width=1 / 64, dropout=0.0).double().eval()
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    pool = nn.MaxPool2d(2)
    layers: list[nn.Module] = []
    for number, stage in enumerate(model.vgg):
        layers += [layer.conv for layer in stage] + [pool] * (number < 3)
    field = receptive_field([*layers, model.fc6.conv, model.fc7.conv, model.final])
    assert field == 380 == 2 * MARGIN + 8
    # A larger pixel just inside or just outside the field: max pooling passes it on.
    image = torch.zeros(1, 1, field + 16, field + 16, dtype=torch.float64)

    def front_end(x: torch.Tensor) -> torch.Tensor:
        for number, stage in enumerate(model.vgg):
            x = stage(x)
            x = F.max_pool2d(x, 2) if number < 3 else x
        return model.final(model.fc7(model.fc6(x)))

    for place, seen in [(7, False), (8, True), (8 + field - 1, True), (8 + field, False)]:
        for axis in (0, 1):
            at = (place, 150) if axis == 0 else (150, place)
            bumped = image.clone()
            bumped[0, 0, at[0], at[1]] = 1.0
            bumped.requires_grad_()
            out = front_end(bumped)
            assert out.shape[2:] == (3, 3)
            (grad,) = torch.autograd.grad(out[0, 0, 1, 1], bumped)
            assert bool(grad[0, 0, at[0], at[1]] != 0) == seen
    image = torch.rand(1, 1, 200, 208, dtype=torch.float64)
    padded = F.pad(image, (MARGIN,) * 4, mode="reflect")
    torch.testing.assert_close(model.scores(image).low, front_end(padded))
    assert model.scores(image).low.shape[2:] == (25, 26)


@pytest.mark.parametrize("size", [1, 2, 3, 250])
def test_mirroring_goes_on_beyond_the_image(size: int) -> None:
    x = torch.rand(1, 1, 5, size)
    found = _mirror(x, -1, 186, 190)
    index, step, expected = 0, 1, []
    for _ in range(size + 190):
        expected.append(index)
        if size > 1:
            step = 1 if index == 0 else -1 if index == size - 1 else step
            index += step
    assert torch.equal(found[..., 186:], x[..., torch.tensor(expected)])
    assert torch.equal(found[..., :187].flip(-1)[..., :size], x[..., :187])


def vgg_state(norm: bool, width: int, fc: int) -> dict[str, torch.Tensor]:
    """A state dict like torchvision's vgg16 or vgg16_bn, with fewer channels."""
    state, before, index = {}, 3, 0
    for channels, depth in _vgg.STAGES:
        for _ in range(depth):
            state[f"features.{index}.weight"] = torch.randn(channels // width, before, 3, 3)
            state[f"features.{index}.bias"] = torch.randn(channels // width)
            before = channels // width
            if norm:
                for kind in ("weight", "bias", "running_mean", "running_var"):
                    state[f"features.{index + 1}.{kind}"] = torch.rand(before)
                state[f"features.{index + 1}.num_batches_tracked"] = torch.tensor(7)
            index += 3 if norm else 2
        index += 1
    for number, (inputs, outputs) in {0: (49 * before, fc), 3: (fc, fc), 6: (fc, 1000)}.items():
        state[f"classifier.{number}.weight"] = torch.randn(outputs, inputs)
        state[f"classifier.{number}.bias"] = torch.randn(outputs)
    return state


def test_vgg16_becomes_fully_convolutional() -> None:
    state = vgg_state(False, 16, 256)
    for name in ("fcn8s", "dilatednet", "deeplab_v1"):
        more = {"field": "7x7"} if name == "deeplab_v1" else {}
        model = models.create_model(name, width=1 / 16, **more)
        model.load_backbone(state)
        convs = [key for key in model.vgg.state_dict() if key.endswith(".weight")]
        theirs = [key for key in state if key.startswith("features") and key.endswith(".weight")]
        for mine, other in zip(convs, theirs, strict=True):
            assert torch.equal(model.vgg.state_dict()[mine], state[other])
        x = torch.randn(2, 32, 7, 7)
        fc6 = F.conv2d(x, model.fc6.conv.weight, model.fc6.conv.bias)
        linear = F.linear(x.flatten(1), state["classifier.0.weight"], state["classifier.0.bias"])
        torch.testing.assert_close(fc6.flatten(1), linear, rtol=1e-4, atol=1e-3)
        fc7 = F.conv2d(fc6, model.fc7.conv.weight, model.fc7.conv.bias)
        linear = F.linear(linear, state["classifier.3.weight"], state["classifier.3.bias"])
        torch.testing.assert_close(fc7.flatten(1), linear, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "more", "cells", "every"),
    [
        ("deeplab_v1", {}, [0, 3, 6], 4),
        ("deeplab_v1", {"field": "4x4"}, [0, 2, 4, 6], 1),
        ("deeplab_v2_vgg16", {}, [0, 3, 6], 4),
    ],
)
def test_deeplab_subsamples_the_fully_connected_layers(
    name: str, more: dict[str, Any], cells: list[int], every: int
) -> None:
    state = vgg_state(False, 16, 256)
    model = models.create_model(name, width=1 / 16, **more)
    model.load_backbone(state)
    layers = model.branches if name == "deeplab_v2_vgg16" else [model]
    assert len(layers) == (4 if name == "deeplab_v2_vgg16" else 1)
    for part in layers:
        whole = state["classifier.0.weight"].view(256, 32, 7, 7)
        for i, filter_ in enumerate(part.fc6.conv.weight):
            assert torch.equal(filter_, whole[every * i][:, cells][:, :, cells])
        assert torch.equal(part.fc6.conv.bias, state["classifier.0.bias"][::every])
        assert torch.equal(
            part.fc7.conv.weight[1, 2, 0, 0], state["classifier.3.weight"][every, 2 * every]
        )


@pytest.mark.parametrize("backend", ["segkernels", "torch"])
@pytest.mark.parametrize(
    ("name", "more", "rates"),
    [
        # conv5 has a dilation of 2.
        ("deeplab_v1", {}, [2, 2, 2, 12]),
        ("deeplab_v1", {"field": "4x4"}, [2, 2, 2, 4]),
        ("deeplab_v2_vgg16", {}, [2, 2, 2, 6, 12, 18, 24]),
        ("dilatednet", {}, [2, 2, 2, 4, 2, 4, 8, 16]),
        # One block of layer3 has a dilation of 2; layer4 has blocks with 2 and 4.
        ("deeplab_v2_resnet101", {"layers": (1, 1, 2, 2)}, [2, 2, 4, 6, 12, 18, 24]),
        ("deeplab_v3_resnet50", {"layers": (1, 1, 2, 2)}, [2, 2, 4, 12, 24, 36]),
        ("deeplab_v3plus_resnet101", {"layers": (1, 1, 2, 2)}, [2, 6, 12, 18]),
    ],
    ids=str,
)
def test_rates_are_those_of_the_paper(
    name: str, more: dict[str, Any], rates: list[int], backend: str
) -> None:
    with torch.device("meta"):
        model = models.create_model(name, backend=backend, **more)
    convs = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
    assert [conv.dilation[0] for conv in convs if conv.dilation != (1, 1)] == rates
    assert all(conv.dilation[0] == conv.dilation[1] for conv in convs)


@pytest.mark.parametrize("name", ["segnet", "deconvnet"])
def test_vgg16_bn_loads(name: str) -> None:
    state, model = vgg_state(True, 16, 256), models.create_model(name, width=1 / 16)
    model.load_backbone(state)
    assert torch.equal(model.vgg.stage5.conv5_3.bn.running_var, state["features.41.running_var"])
    assert torch.equal(model.vgg.stage3.conv3_1.conv.bias, state["features.14.bias"])
    assert int(model.vgg.stage1.conv1_1.bn.num_batches_tracked) == 7


def test_state_dicts_that_do_not_fit_are_named() -> None:
    state = vgg_state(False, 16, 256)
    model = models.fcn8s(width=1 / 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for change, message in [
        (
            {"features.0.weight": torch.zeros(4, 1, 3, 3)},
            r"conv1_1.conv.weight is \(4, 1, 3, 3\), not",
        ),
        ({"features.0.bias": None}, r"fcn8s: .* missing vgg\.stage1\.conv1_1\.conv\.bias"),
        ({"features.30.weight": torch.zeros(4, 4, 3, 3)}, r"unknown vgg\.features\.30\.weight"),
        ({"classifier.3.bias": None}, r"the state dict lacks classifier\.3\.bias"),
        ({"classifier.0.weight": torch.zeros(255, 32 * 49)}, "must be"),
    ]:
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            model.load_backbone(changed)
    with pytest.raises(ValueError, match=r"missing .*conv1_1\.bn\.weight"):
        models.segnet(width=1 / 16).load_backbone(state)
    with pytest.raises(ValueError, match=r"unknown .*conv1_1\.bn\.weight"):
        model.load_backbone(vgg_state(True, 16, 256))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for name in ("unet", "fc_densenet56"):
        with pytest.raises(ValueError, match=f"{name}: torchvision has no classifier"):
            models.create_model(name, width=1 / 16).load_backbone(state)
    resnet = models.fcn_resnet50(width=1 / 16)
    wrong = {key.removeprefix("backbone."): v for key, v in resnet.state_dict().items()}
    with pytest.raises(ValueError, match=r"unknown backbone\.classifier\.0\.weight"):
        resnet.load_backbone(wrong)
    with pytest.raises(RuntimeError, match=r"Missing key.*score_pool3\.weight"):
        model.load_state_dict(models.fcn16s(width=1 / 16).state_dict())


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplab_v2_resnet101", "pspnet50", "deeplab_v3plus_resnet101"]
)
def test_resnets_load(name: str) -> None:
    source = models.create_model(name, width=1 / 16).backbone.state_dict()
    state = {key: torch.rand(value.shape).to(value) for key, value in source.items()}
    state["fc.weight"], state["fc.bias"] = torch.rand(9, 9), torch.rand(9)
    model = models.create_model(name, width=1 / 16)
    model.load_backbone(state)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize(
    ("stride", "rates"), [(8, (1, 1, 2, 4)), (16, (1, 1, 1, 2)), (32, (1,) * 4)]
)
def test_resnet_trades_stride_for_dilation(stride: int, rates: tuple[int, ...]) -> None:
    net = ResNet(LAYERS[50], 3, width=1 / 16, output_stride=stride, backend="torch")
    for i, rate in enumerate(rates):
        blocks = list(getattr(net, f"layer{i + 1}"))
        first = rates[i - 1] if i else 1
        expected = [first if net_stride(blocks[0]) == 1 else 1] + [rate] * (len(blocks) - 1)
        assert [block.conv2.dilation[0] for block in blocks] == expected
    assert net(torch.rand(1, 3, 65, 65))[3].shape[2] == -(-65 // stride)


def net_stride(block: Any) -> int:
    return int(block.conv2.stride[0])


@pytest.mark.parametrize("name", ["deeplab_v1", "deeplab_v2_vgg16", "deeplab_v2_resnet101"])
def test_crf_refines_and_learns(name: str) -> None:
    crf = DenseCRF(3, iterations=2, compat_gaussian=torch.full((3,), -3.0), srgb=0.2)
    model = as_if_trained(models.create_model(name, 3, width=1 / 16, crf=crf)).train()
    plain = models.create_model(name, 3, width=1 / 16)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("crf.")})
    image = torch.rand(2, 3, 33, 41)
    target = torch.randint(0, 3, (2, 33, 41))
    plain.eval()
    model.eval()
    # In evaluation the output is the CRF's log-probabilities for the full-size scores.
    expected = crf(image, logits=plain(image), log=True)
    torch.testing.assert_close(model(image), expected)
    torch.testing.assert_close(model(image).exp().sum(1), torch.ones(2, 33, 41))
    assert torch.equal(model.predict(image), expected.argmax(1))
    torch.testing.assert_close(
        model.loss(image, target, ignore_index=1), F.nll_loss(expected, target, ignore_index=1)
    )
    # The CRF can compare another image than the network reads.
    other = torch.rand(2, 5, 33, 41)
    torch.testing.assert_close(model(image, other), crf(other, logits=plain(image), log=True))
    # Training without the CRF, and end to end.
    model.train()
    assert model.loss(image, target).grad_fn is not None
    model.loss(image, target).backward()
    assert crf.compat_gaussian.grad is None
    model.train_crf = True
    model.zero_grad()
    model.loss(image, target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert crf.compat_bilateral.grad.any()
    assert next(iter(model.parameters())).grad.any()


def test_flops_are_those_of_a_hand_count() -> None:
    # U-Net at 32 x 48; a multiply-add counts as two.
    found, h, w = 0, 32, 48

    def conv(k: int, a: int, b: int, h: int, w: int) -> int:
        return 2 * k * k * a * b * h * w

    sizes = [64, 128, 256, 512, 1024]
    for level, (a, b) in enumerate(zip([3, *sizes], sizes, strict=False)):
        s = 2**level
        found += conv(3, a, b, h // s, w // s) + conv(3, b, b, h // s, w // s)
    for level in (3, 2, 1, 0):
        s, b = 2**level, sizes[level]
        # Each input pixel of the transposed convolution gives 2 x 2 outputs.
        found += conv(2, 2 * b, b, h // s // 2, w // s // 2)
        found += conv(3, 2 * b, b, h // s, w // s) + conv(3, b, b, h // s, w // s)
    found += conv(1, 64, 21, h, w)
    with torch.device("meta"):
        model = models.unet(backend="torch")
    assert flops(model, 32, 48) == found


@pytest.mark.slow
@pytest.mark.parametrize("spec", _registry.specs(), ids=lambda spec: spec.name)
def test_stored_figures_are_those_of_the_model(spec: _registry.Spec) -> None:
    with torch.device("meta"):
        model = models.create_model(spec.name, backend="torch").eval()
    assert spec.parameters == parameters(model)
    # 513, or the next smaller size that fits.
    assert spec.size == 513 - (513 - model.min_size) % model.size_step
    assert spec.flops == flops(model, spec.size, spec.size)


def test_command_prints_every_model() -> None:
    ran = CliRunner().invoke(app, ["models", "--json"])
    assert ran.exit_code == 0, ran.output
    rows = {row["name"]: row for row in json.loads(ran.output)}
    assert list(rows) == models.list_models()
    assert rows["deeplab_v3_resnet101"]["parameters"] == 58_630_997
    assert rows["unet"]["size"] == 512
    assert all(row["size"] == 513 for name, row in rows.items() if name != "unet")
    assert rows["deconvnet"]["ops"] == [
        *("dilated_conv2d", "max_pool2d", "max_unpool2d"),
        *("upsample_argmax", "upsample_cross_entropy"),
    ]
    # torchvision states 178.722e9 multiplications at 520 x 520, with an auxiliary head of 2,365,184
    # weights. The feature maps have the same size at 513 x 513.
    expected = 2 * (178.722e9 - 2_365_184 * 65 * 65)
    assert rows["deeplab_v3_resnet50"]["flops"] == pytest.approx(expected, rel=1e-2)
    readme = Path(__file__).parents[2] / "README.md"
    table = readme.read_text(encoding="utf-8").split("<!-- models_table:begin -->")[1]
    listed = re.findall(r"^\| `(\w+)` \| (.*?) \| ([\d,]+) \| ([\d,.]+) \| (\d+) \|$", table, re.M)
    assert listed == [
        (
            name,
            row["paper"],
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e9:,.1f}",
            str(row["output_stride"]),
        )
        for name, row in rows.items()
    ]
    console = Console(width=200, file=io.StringIO())
    render(console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue().splitlines()
    for row in rows.values():
        (line,) = [text for text in printed if text.split()[:1] == [row["name"]]]
        assert f"{row['parameters']:,}" in line
        assert f"{row['flops'] / 1e9:,.1f}" in line
