"""Tests of save_pretrained and from_pretrained: what comes back, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.cases import CASES, Case, as_if_trained, outputs
from safetensors.torch import load_file, save_file
from torch import nn

from segkernels import DenseCRF, models
from segkernels.models import _pretrained, _registry

every = pytest.mark.parametrize("case", CASES, ids=str)


def small(**options: Any) -> models.SegmentationModel:
    return models.deeplab_v1(3, **{"width": 1 / 64, **options})


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def same(found: models.SegmentationModel, expected: models.SegmentationModel) -> None:
    """Assert that all that decides the result is the same, except for hooks."""
    assert type(found) is type(expected)
    # A CRF that was assigned later comes last.
    lines = [
        sorted(line for line in repr(model).splitlines() if not line.endswith(": None"))
        for model in (found, expected)
    ]
    assert lines[0] == lines[1]
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert found.state_dict()[key].dtype == value.dtype, key
        assert torch.equal(found.state_dict()[key], value), key
    learned = [
        {k for k, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        for model in (found, expected)
    ]
    assert learned[0] == learned[1]
    assert found.aux_weight == expected.aux_weight


@every
def test_round_trip(case: Case, tmp_path: Path) -> None:
    model, images = as_if_trained(case.build()).eval(), case.images(1)
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "model")
    assert (config["model"], config["format"], config["changed"]) == (case.name, 2, {})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    for options in ({}, {"backend": "torch"}):
        again = models.from_pretrained(tmp_path / "model", **options)
        assert again.name == case.name
        assert not any(part.training for part in again.modules())
        assert again.backend == options.get("backend", "segkernels")
        if not options:
            same(again, model)
        with torch.no_grad():
            found, expected = outputs(again(images))["out"], outputs(model(images))["out"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max())


# Another value than the default of each argument of the builders.
OTHER: dict[str, list[Any]] = {
    "num_classes": [5],
    "in_channels": [2],
    "backend": ["torch"],
    "width": [1 / 40, np.float32(1 / 40)],
    "dropout": [0.25, np.float64(0.25)],
    "padding": ["valid", "zeros"],
    "layers": [(1, 2, 1, 1), [1, 2, 1, 1], np.array([1, 2, 1, 1]), torch.tensor([1, 2, 1, 1])],
    "depths": [(1, 1, 2) + (1,) * 8],
    "aux_loss": [True],
    "output_stride": [8, 16],
    "stem": ["deep"],
    "field": ["4x4", "7x7"],
    "train_crf": [True],
    "crf": [DenseCRF(4, iterations=3)],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("unet", "deeplab_v1") else [pytest.mark.slow])
        for n in models.list_models()
    ],
)
def test_every_argument_comes_back(name: str, tmp_path: Path) -> None:
    build = getattr(models, name)
    parameters = inspect.signature(build).parameters
    # A new argument needs values in OTHER.
    assert parameters.keys() <= OTHER.keys()
    basis: dict[str, Any] = {"num_classes": 4, "width": 1 / 64}
    if "layers" in parameters:
        basis["layers"] = (1, 1, 1, 1)
    if "depths" in parameters:
        basis["depths"] = (1,) * 11
    for key in parameters:
        values = OTHER[key]
        if key == "padding":
            values = ["valid" if name == "unet" else "zeros"]
        for value in values:
            model = build(**{**basis, key: value})
            model.save_pretrained(tmp_path)
            again = models.from_pretrained(tmp_path)
            same(again, model.eval())
            found, given = again.arguments[key], value
            if isinstance(given, (list, np.ndarray, torch.Tensor)) and key in ("layers", "depths"):
                given = tuple(int(item) for item in given)
            if key != "crf":
                assert found == given
            assert type(found) in (bool, int, float, str, tuple, DenseCRF)


CRF_OPTIONS: list[dict[str, Any]] = [
    {},
    {"method": "exact"},
    {"method": "lattice"},
    {"iterations": 0},
    {"iterations": np.int64(3)},
    *({"normalization": n} for n in ("symmetric", "before", "after", "none")),
    {"sxy_gaussian": 2.5},
    {"sxy_gaussian": (2, 4.5), "learn_sigmas": True},
    {"sxy_bilateral": np.array([30.0, 40.0])},
    {"srgb": (9, 8, 7)},
    {"srgb": 0.1},
    *(
        {key: value}
        for key in ("compat_gaussian", "compat_bilateral")
        for value in (None, 0.1, [1.0, 2.0, 3.0], np.eye(3) * 5, torch.randn(3, 3))
    ),
    {"compat_gaussian": None, "compat_bilateral": None},
    {"learn_compat": False},
    {"learn_compat": False, "compat_bilateral": np.eye(3)},
    {"learn_sigmas": True},
    {"learn_sigmas": True, "learn_compat": False, "method": "exact", "srgb": [1, 2, 3]},
]


@pytest.mark.parametrize("options", CRF_OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("assigned", [False, True], ids=["given", "assigned"])
def test_every_option_of_the_crf_comes_back(
    options: dict[str, Any], assigned: bool, tmp_path: Path
) -> None:
    crf = DenseCRF(3, **options)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.add_(0.3)  # as if trained
    model = small(crf=None if assigned else crf, train_crf=True).eval()
    if assigned:
        model.crf = crf
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    same(again, model)
    found = again.crf
    assert isinstance(found, DenseCRF)
    for key in ("num_classes", "iterations", "normalization", "method"):
        assert getattr(found, key) == getattr(crf, key)
    assert [k for k, _ in found.named_parameters()] == [k for k, _ in crf.named_parameters()]
    assert again.train_crf is True
    assert not any(tensor.is_meta for tensor in found.state_dict().values())
    image = torch.rand(1, 3, 9, 12) * 255
    with torch.no_grad():
        assert torch.equal(again(image), model(image))


def test_the_sweep_has_every_option_of_the_crf() -> None:
    swept = {key for options in CRF_OPTIONS for key in options}
    assert swept == inspect.signature(DenseCRF).parameters.keys() - {"num_classes"}
    assert set(_pretrained._CRF_KINDS) == inspect.signature(DenseCRF).parameters.keys()


def test_what_was_changed_after_construction_comes_back(tmp_path: Path) -> None:
    model = small(crf=DenseCRF(3), dropout=0.5)
    model.crf.iterations, model.crf.method, model.crf.normalization = 5, "exact", "after"
    model.crf.compat_gaussian = None
    model.train_crf = True
    model.dropout.p = 0.125
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    same(again, model.eval())
    assert (again.crf.iterations, again.crf.method, again.train_crf) == (5, "exact", True)
    assert again.arguments["dropout"] == again.dropout.p == 0.125
    assert models.from_pretrained(tmp_path, dropout=0.75).dropout.p == 0.75
    model.crf = None
    model.save_pretrained(tmp_path)
    assert models.from_pretrained(tmp_path).crf is None

    model = models.pspnet50(3, width=1 / 64, layers=(1, 1, 1, 1), aux_loss=True)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps, part.momentum = 1e-3, 0.01
    model.backbone.bn1.momentum = None
    model.aux_weight = 0.2
    model.classifier[2].p = 0.25
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    same(again, model.eval())
    assert again.backbone.layer1[0].bn1.eps == 1e-3
    assert (again.aux_weight, again.backbone.bn1.momentum) == (0.2, None)
    model.aux_classifier = None
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    assert again.aux_classifier is None
    same(again, model)


def test_a_saved_model_can_be_saved_again(tmp_path: Path) -> None:
    model = small(crf=DenseCRF(3, method="exact"))
    model.dropout.p = 0.2
    model.save_pretrained(tmp_path / "a")
    models.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    copy.deepcopy(model).save_pretrained(tmp_path / "c")
    for other in "bc":
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / other / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.segnet(3, width=1 / 64).to(dtype).eval()
    model.vgg.stage1.conv1_1.bn.float()  # one layer in another dtype
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    same(again, model)
    assert again.decoder[0][0].conv.weight.dtype == dtype
    assert again.vgg.stage1.conv1_1.bn.weight.dtype == torch.float32
    assert again.vgg.stage1.conv1_1.bn.num_batches_tracked.dtype == torch.int64


def test_shared_and_strided_tensors_come_back(tmp_path: Path) -> None:
    model = models.segnet(3, width=1 / 64).eval()
    first, second = model.vgg.stage4.conv4_2.conv, model.vgg.stage4.conv4_3.conv
    second.weight = first.weight
    flat = torch.randn(1000)
    bias = model.vgg.stage1.conv1_1.conv.bias
    bias.data = flat[5 : 5 + len(bias)]
    model.vgg.stage1.conv1_2.conv.weight.data = (
        torch.randn(3, 3, 1, 1).permute(3, 2, 1, 0).expand(1, 1, 3, 3)
    )
    model.save_pretrained(tmp_path)
    same(models.from_pretrained(tmp_path), model)


def test_synchronised_batch_norm_is_saved(tmp_path: Path) -> None:
    model = models.segnet(3, width=1 / 64).eval()
    expected = copy.deepcopy(model)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).save_pretrained(tmp_path)
    same(models.from_pretrained(tmp_path), expected)


class Lora(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def replace_by_group_norm(model: Any) -> None:
    model.backbone.bn1 = nn.GroupNorm(1, 1)


def replace_head(model: Any) -> None:
    model.classifier[4] = nn.Conv2d(model.classifier[4].in_channels, 9, 1)


def replace_by_subclass(model: Any) -> None:
    old = model.classifier[4]
    model.classifier[4] = Lora(old.in_channels, old.out_channels, 1)


def change_stride(model: Any) -> None:
    model.backbone.layer2[0].conv2.stride = (1, 1)


def add_adapter(model: Any) -> None:
    model.backbone.conv1.adapter = nn.Conv2d(3, 1, 1)


def align_corners(model: Any) -> None:
    model.align_corners = True


def prune(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.backbone.conv1)


def rename(model: Any) -> None:
    model.name = "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_by_group_norm, r"backbone\.bn1 is a GroupNorm, not a BatchNorm2d"),
        (replace_head, r"classifier\.4\.out_channels is 9, not 3"),
        (replace_by_subclass, r"classifier\.4 is a Lora, not a Conv2d"),
        (change_stride, r"backbone\.layer2\.0\.conv2\.stride is \(1, 1\), not \(2, 2\)"),
        (add_adapter, r"module backbone\.conv1\.adapter was added"),
        (align_corners, r"align_corners is True, not False"),
        (prune, r"backbone\.conv1\.parametrizations was added"),
        (rename, "no model named 'mine'"),
        (lambda m: m.to("meta"), "on the meta device"),
        (lambda m: m.register_buffer("mean", torch.zeros(3)), "unknown mean"),
        (lambda m: setattr(m.backbone.conv1, "bias", nn.Parameter(torch.zeros(1))), "unknown back"),
        (lambda m: setattr(m.backbone.bn1, "eps", -1.0), r"backbone\.bn1\.eps must be from 0"),
    ],
)
def test_what_would_not_come_back_is_not_saved(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    model = models.fcn_resnet50(3, width=1 / 64, layers=(1, 1, 1, 1))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises(ValueError, match=rf"save_pretrained: \w+ cannot be saved: .*{message}"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.crf, "iterations", -1), "iterations must be an int of 0 or more"),
        (lambda m: setattr(m.crf, "method", "fast"), "method"),
        (lambda m: setattr(m, "crf", DenseCRF(4)), "crf must be a DenseCRF of 3 classes, got 4"),
        (lambda m: setattr(m, "crf", nn.Identity()), "crf must be"),
        (lambda m: setattr(m, "crf", type("My", (DenseCRF,), {})(3)), "crf is a My, not a Dens"),
    ],
)
def test_a_wrong_crf_is_not_saved(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    model = small(crf=DenseCRF(3))
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_without_a_builder_is_not_saved(tmp_path: Path) -> None:
    kind = type(models.segnet(3, width=1 / 64))
    with pytest.raises(ValueError, match="was not built by create_model"):
        kind(3, width=1 / 64).save_pretrained(tmp_path)


def test_an_interrupted_save_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    old = small().eval()
    old.save_pretrained(tmp_path)

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(dropout=0.1).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    same(models.from_pretrained(tmp_path), old)


def test_a_save_interrupted_between_both_files_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small().save_pretrained(tmp_path)
    replace, calls = os.replace, []

    def once(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        small(dropout=0.1).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.from_pretrained(tmp_path)
    monkeypatch.undo()
    small(dropout=0.1).save_pretrained(tmp_path)
    assert models.from_pretrained(tmp_path).dropout.p == 0.1


def test_both_files_have_the_same_permissions(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_given_crf_replaces_the_saved_one(tmp_path: Path) -> None:
    small(crf=DenseCRF(3)).save_pretrained(tmp_path)
    crf = DenseCRF(3, compat_bilateral=[1.0, 2.0, 4.0])
    again = models.from_pretrained(tmp_path, crf=crf)
    assert again.crf is crf
    assert crf.compat_bilateral.tolist() == [1.0, 2.0, 4.0]
    assert models.from_pretrained(tmp_path, crf=None).crf is None
    small().save_pretrained(tmp_path)
    assert models.from_pretrained(tmp_path, crf=crf).crf is crf


def test_loading_draws_no_random_numbers_and_leaves_no_meta_tensor(tmp_path: Path) -> None:
    small(crf=DenseCRF(3, learn_sigmas=True)).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    with torch.device("meta"):  # must not matter
        again = models.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [*again.parameters(), *again.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    again.train().loss(torch.rand(1, 3, 9, 9), torch.zeros(1, 9, 9, dtype=torch.int64)).backward()


def test_folders_of_format_1_load(tmp_path: Path) -> None:
    """config.json as it was written before it had a format."""
    crf = DenseCRF(3, iterations=2, srgb=(9, 8, 7), learn_sigmas=True, compat_gaussian=None)
    model = small(crf=crf).eval()
    model.save_pretrained(tmp_path)
    entry = {
        "num_classes": 3,
        "iterations": 2,
        "normalization": "symmetric",
        "learn_compat": True,
        "learn_sigmas": True,
        "sxy_gaussian": [3.0],
        "sxy_bilateral": [80.0],
        "srgb": [9.0, 8.0, 7.0],
        "compat_gaussian": None,
        "compat_bilateral": [],
    }
    arguments = {
        "num_classes": 3,
        "in_channels": 3,
        "field": "large_fov",
        "crf": entry,
        "train_crf": False,
        "width": 0.015625,
        "dropout": 0.5,
        "backend": "segkernels",
    }
    old = {"model": "deeplab_v1", "arguments": arguments, "segkernels": "0.1.0.dev0"}
    (tmp_path / "config.json").write_text(json.dumps(old, indent=2))
    again = models.from_pretrained(tmp_path)
    same(again, model)
    assert again.crf.method == "lattice"


def test_a_higher_format_asks_for_an_update(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config_of(tmp_path), "format": 3}))
    with pytest.raises(ValueError, match=r"config\.json .*format is 3.*: update segkernels"):
        models.from_pretrained(tmp_path)


def test_missing_files_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; it must be"):
        models.from_pretrained(tmp_path)
    model = models.segnet(3, width=1 / 64)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"decoder\.4\.1\.weight is \(3, .*, not \(5, "):
        models.from_pretrained(tmp_path, num_classes=5)
    with pytest.raises(TypeError, match=r"segnet\(\) got an unexpected keyword argument 'field'"):
        models.from_pretrained(tmp_path, field="7x7")
    with pytest.raises(ValueError, match="backend must be one of"):
        models.from_pretrained(tmp_path, backend="cuda")
    with monkeypatch.context() as patch:
        for name in ("safetensors", "safetensors.torch"):
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'segkernels\[models\]'"):
            models.from_pretrained(tmp_path)
        with pytest.raises(ImportError, match=r"pip install 'segkernels\[models\]'"):
            model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; it must be"):
        models.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; it must be"):
        models.from_pretrained(tmp_path)


HUGE = 10**9
CONFIGS: dict[str, Any] = {
    "list": [],
    "empty": {},
    "null": None,
    "no arguments": {"arguments": ...},
    "no model": {"model": ...},
    "model unknown": {"model": "resnet"},
    "model a list": {"model": ["fcn8s"]},
    "model null": {"model": None},
    "arguments a list": {"arguments": []},
    "arguments null": {"arguments": None},
    "format a string": {"format": "2"},
    "format 0": {"format": 0},
    "format true": {"format": True},
    "format null": {"format": None},
    "changed a list": {"changed": []},
    "changed unknown module": {"changed": {"layer9": {"eps": 1}}},
    "changed forward": {"changed": {"": {"forward": 1}}},
    "changed no such option": {"changed": {"fc8": {"eps": 1}}},
    "changed p": {"changed": {"dropout": {"p": 2}}},
    "changed p null": {"changed": {"dropout": {"p": None}}},
    "changed p a string": {"changed": {"dropout": {"p": "0"}}},
    "changed a number": {"changed": {"dropout": 1}},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "classes a string": {"num_classes": "3"},
    "classes true": {"num_classes": True},
    "classes a float": {"num_classes": 3.0},
    "classes null": {"num_classes": None},
    "classes 0": {"num_classes": 0},
    "classes beyond int64": {"num_classes": 10**30},
    "channels a list": {"in_channels": [3]},
    "width -1": {"width": -1},
    "width 0": {"width": 0},
    "width 1e308": {"width": 1e308},
    "width beyond floats": {"width": 10**400},
    "width a string": {"width": "1"},
    "dropout 2": {"dropout": 2},
    "dropout null": {"dropout": None},
    "backend unknown": {"backend": "cuda"},
    "backend a dict": {"backend": {}},
    "field a list": {"field": ["4x4"]},
    "field unknown": {"field": "9x9"},
    "train_crf a string": {"train_crf": "no"},
    "unknown": {"stride": 8},
    "self": {"self": 1},
    "weights": {"weights": "file.pth"},
    "crf a list": {"crf": []},
    "crf a number": {"crf": 1},
}
CRFS: dict[str, dict[str, Any]] = {
    "empty": {},
    "unknown key": {"device": "cuda"},
    "no classes": {"num_classes": ...},
    "no sigma": {"srgb": ...},
    "no compat": {"compat_gaussian": ...},
    "no method": {"method": ...},
    "classes 4": {"num_classes": 4},
    "classes a string": {"num_classes": "3"},
    "iterations -1": {"iterations": -1},
    "iterations a float": {"iterations": 1.5},
    "method": {"method": "fast"},
    "method a list": {"method": ["exact"]},
    "normalization": {"normalization": 1},
    "learn_compat": {"learn_compat": "yes"},
    "sigma 0": {"srgb": [0]},
    "sigma a string": {"srgb": "123"},
    "sigma true": {"srgb": [True]},
    "sigma a number": {"srgb": 3},
    "sigma empty": {"srgb": []},
    "compat 80 TB": {"compat_gaussian": [10_000_000, 1_000_000]},
    "compat a number": {"compat_gaussian": 3},
    "compat negative": {"compat_gaussian": [-3]},
    "compat of 5": {"compat_gaussian": [5]},
    "compat a string": {"compat_gaussian": "[]"},
    "compat a float": {"compat_gaussian": [3.0]},
}


def edited(entry: dict[str, Any], changes: Any) -> Any:
    """`entry` with other values; ``...`` removes one."""
    if not isinstance(changes, dict):
        return changes
    if not changes:
        return {}
    both = {**entry, **changes}
    return {key: value for key, value in both.items() if value is not ...}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    small(crf=DenseCRF(3)).save_pretrained(path)
    return path


def refused(folder: Path, tmp_path: Path, text: str | bytes, message: str = "") -> None:
    """The folder with `text` as config.json is refused as documented, in a short time."""
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.json").write_bytes(content)
    start = time.perf_counter()
    for options in ({}, {"backend": "torch"}):
        if "cuda" in str(text) and options:
            continue  # the argument replaces the wrong one
        with pytest.raises(ValueError, match=rf"from_pretrained: .*config\.json.*{message}"):
            models.from_pretrained(tmp_path, **options)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configs(case: str, folder: Path, tmp_path: Path) -> None:
    refused(folder, tmp_path, json.dumps(edited(config_of(folder), CONFIGS[case])))


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments(case: str, folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    config["arguments"] |= ARGUMENTS[case]
    refused(folder, tmp_path, json.dumps(config))


@pytest.mark.parametrize("case", CRFS)
def test_wrong_crfs(case: str, folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    config["arguments"]["crf"] = edited(config["arguments"]["crf"], CRFS[case])
    refused(folder, tmp_path, json.dumps(config))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"model": NaN}',
        '{"model": ' + "9" * 5000 + "}",
    ],
    ids=["empty", "cut", "utf16", "lists", "dicts", "nan", "digits"],
)
def test_wrong_json(text: str | bytes, folder: Path, tmp_path: Path) -> None:
    refused(folder, tmp_path, text)


def test_a_config_that_is_too_long(folder: Path, tmp_path: Path) -> None:
    text = (folder / "config.json").read_text()
    refused(folder, tmp_path, text + " " * 2**20, "at most 1048576 bytes")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_values_that_are_no_numbers(value: str, folder: Path, tmp_path: Path) -> None:
    text = (folder / "config.json").read_text()
    assert '"width": 0.015625' in text
    refused(folder, tmp_path, text.replace('"width": 0.015625', f'"width": {value}'))


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("pspnet50", "layers", [HUGE, 1, 1, 1]),
        ("pspnet50", "layers", [1, 1, 10**30, 1]),
        ("pspnet50", "layers", [1] * 5000),
        ("pspnet50", "layers", [1, 1, 1]),
        ("pspnet50", "layers", [1, 1, 0, 1]),
        ("pspnet50", "layers", [1, 1, -5, 9]),
        ("pspnet50", "layers", [1, 1, 1.0, 1]),
        ("pspnet50", "layers", "abcd"),
        ("pspnet50", "layers", {"0": 1}),
        ("pspnet50", "layers", 4),
        ("pspnet50", "layers", None),
        ("pspnet50", "stem", ["deep"]),
        ("pspnet50", "aux_loss", "no"),
        ("pspnet50", "aux_loss", 0),
        ("deeplab_v3_resnet50", "output_stride", [8]),
        ("deeplab_v3_resnet50", "output_stride", 4),
        ("fc_densenet56", "depths", [HUGE] + [1] * 10),
        ("fc_densenet56", "depths", [1] * 10),
        ("fc_densenet56", "depths", []),
        ("unet", "padding", 0),
    ],
)
def test_wrong_arguments_of_other_models(
    name: str, argument: str, value: Any, tmp_path: Path
) -> None:
    config = {"format": 2, "model": name, "arguments": {"width": 1 / 64, argument: value}}
    (tmp_path / "saved").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "saved" / "model.safetensors")
    (tmp_path / "bad").mkdir()
    refused(tmp_path / "saved", tmp_path / "bad", json.dumps(config), argument)


def test_large_shapes_are_compared_without_memory(folder: Path, tmp_path: Path) -> None:
    """A million channels and classes would need petabytes."""
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    for change in ({"width": 2e5}, {"num_classes": HUGE, "crf": None}, {"in_channels": HUGE}):
        config = config_of(folder)
        config["arguments"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match=r"model\.safetensors does not fit deeplab_v1: "):
            models.from_pretrained(tmp_path)


def header(entries: dict[str, Any], size: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        bytes(8),
        b"\xff" * 100,
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 5) + b"{{{{{",
        header({"a": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 4 * 10**13]}}),
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 8),
        header({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, 4),
        header({"a": {"dtype": "X7", "shape": [4], "data_offsets": [0, 4]}}, 4),
        header({"a": 3}),
        header({}),
    ],
    ids=lambda content: f"{len(content)}-{content[:12].hex()}",
)
def test_damaged_weights(content: bytes, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"from_pretrained: .*model\.safetensors"):
        models.from_pretrained(tmp_path)


def test_truncated_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(RuntimeError, match=r"model\.safetensors cannot be read as safetensors"):
            models.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("fc8.weight", lambda t: t.int(), r"fc8\.weight is torch\.int32, not torch\.float32"),
        ("fc8.weight", lambda t: t.bool(), r"fc8\.weight is torch\.bool, not torch\.float32"),
        ("fc8.weight", lambda t: t[:2], r"fc8\.weight is \(2, .*, not \(3, "),
        ("fc8.weight", lambda t: None, r"missing fc8\.weight"),
        ("fc9.weight", lambda t: torch.zeros(1), r"unknown fc9\.weight"),
        ("crf.compat_gaussian", lambda t: torch.zeros(3), r"crf\.compat_gaussian is \(3,\), not"),
    ],
)
def test_weights_that_do_not_fit(
    key: str, change: Callable[[Any], Any], message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.get(key))
    tensors = {**tensors, key: changed} if changed is not None else tensors
    if changed is None:
        del tensors[key]
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=rf"model\.safetensors does not fit .*{message}"):
        models.from_pretrained(tmp_path)


def test_counters_stay_int64(tmp_path: Path) -> None:
    models.segnet(3, width=1 / 64).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "vgg.stage1.conv1_1.bn.num_batches_tracked"
    for wrong in (torch.int32, torch.float32):
        save_file({**tensors, key: tensors[key].to(wrong)}, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=rf"{key} is {wrong}, not torch\.int64"):
            models.from_pretrained(tmp_path)


def test_the_builders_refuse_such_arguments_too() -> None:
    for width in (-1, 0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fcn8s: width must be positive and finite, got"):
            models.fcn8s(width=width)
    for layers in ((1, 1, 1), (1, 1, 1, 0)):
        with pytest.raises(ValueError, match="layers must be four positive ints, got"):
            models.pspnet50(layers=layers)
    assert len(_registry.specs()) == len(models.list_models())
