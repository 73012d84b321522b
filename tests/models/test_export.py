"""Models in torch.export, in torch.compile with dynamic sizes, and in ONNX."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_runs
import pytest
import torch
from models.cases import CASES, CLASSES, Case, as_if_trained, outputs
from torch import nn
from torch.export import Dim

from segkernels import DenseCRF, models

QUICK = ("segnet", "deeplab_v3_resnet50")
# With layouts that depend on a crop, and with an image that is padded to a multiple of 8.
SLOW = ("fcn32s", "dilatednet_frontend")


def cases(chosen: Iterable[Case] = CASES, quick: tuple[str, ...] = QUICK) -> Any:
    """Parametrise over cases: `quick` ones unmarked, then slow ones, then nightly ones."""
    parameters = []
    for case in chosen:
        mark = pytest.mark.slow if str(case) in SLOW + QUICK else pytest.mark.nightly
        parameters.append(pytest.param(case, marks=[] if str(case) in quick else [mark]))
    return pytest.mark.parametrize("case", parameters, ids=str)


def sizes(case: Case) -> list[tuple[int, int, int]]:
    """Batch, height and width: of the example, of a tall, a square and a wider image.

    torch.export takes a size of 1 for a constant, so no feature map of the example has that.
    """
    small = {"deconvnet": 257, "unet": 64}.get(case.name, 65)
    small = 188 if case.label == "unet-valid" else small
    high, wide = small, small + 32
    return [(2, high, wide), (3, wide, high), (1, wide, wide), (1, high + 16, high + 80)]


def dynamic(case: Case) -> dict[int, Any]:
    """Dynamic batch size, height and width of the images."""
    if case.label == "unet-valid":  # 188 + 16 k, which torch.export finds
        return {0: Dim.DYNAMIC, 2: Dim.AUTO, 3: Dim.AUTO}
    if case.name == "unet":
        return {0: Dim.DYNAMIC, 2: 16 * Dim("height"), 3: 16 * Dim("width")}
    return {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def ranges(case: Case) -> dict[int, Any]:
    """As `dynamic`, with ranges: torch.export then refuses a program that may not fit them all."""
    if case.name == "unet":
        return dynamic(case)
    least = 256 if case.name == "deconvnet" else 64
    height, width = (Dim(name, min=least, max=4096) for name in ("height", "width"))
    return {0: Dim.DYNAMIC, 2: height, 3: width}


def images(size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))


class Predict(nn.Module):
    def __init__(self, model: models.SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.model.predict(input)


def same(found: Any, expected: Any, tolerance: float) -> None:
    found, expected = outputs(found), outputs(expected)
    assert found.keys() == expected.keys()
    for key, scores in expected.items():
        assert found[key].shape == scores.shape
        assert (found[key] - scores).abs().max() <= tolerance * scores.abs().max()


@cases()
@torch.no_grad()
def test_exports(case: Case) -> None:
    model = as_if_trained(case.build()).eval()
    program = torch.export.export(model, (case.images(),))
    same(program.module()(case.images()), model(case.images()), 1e-5)


@cases()
@pytest.mark.parametrize(
    "backend", ["segkernels", pytest.param("torch", marks=pytest.mark.nightly)]
)
@torch.no_grad()
def test_exports_for_every_size(case: Case, backend: str) -> None:
    model = as_if_trained(case.build(backend)).eval()
    # torch's own max pooling with ceil_mode does not take ranges.
    shapes = dynamic(case) if backend == "torch" else ranges(case)
    program = torch.export.export(
        model, (images(sizes(case)[0]),), dynamic_shapes={"input": shapes}
    )
    called = {str(node.target).split(".")[0] for node in program.graph.nodes}
    assert ("segkernels" in called) == (backend == "segkernels")
    for size in sizes(case):
        same(program.module()(images(size)), model(images(size)), 1e-5)


@cases(quick=())
@torch.no_grad()
def test_predict_exports_for_every_size(case: Case) -> None:
    model = Predict(as_if_trained(case.build()).eval())
    program = torch.export.export(
        model, (images(sizes(case)[0]),), dynamic_shapes={"input": dynamic(case)}
    )
    for size in sizes(case):
        assert torch.equal(program.module()(images(size)), model(images(size)))


@cases(quick=())
@torch.no_grad()
def test_compiles_once_for_every_size(case: Case) -> None:
    model = as_if_trained(case.build()).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    # A batch of one is another program.
    first, *others = [size for size in sizes(case) if size[0] > 1]
    same(compiled(images(first)), model(images(first)), 1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in others:
            same(compiled(images(size)), model(images(size)), 1e-5)


def small(name: str, **more: Any) -> models.SegmentationModel:
    """A model of an eighth of the width, and of few layers."""
    options: dict[str, Any] = {}
    if name in ("fcn_resnet50", "deeplab_v3_resnet50"):
        options |= {"aux_loss": True}
    if "resnet" in name or "pspnet" in name:
        options |= {"layers": (1, 1, 2, 1)}
    if "densenet" in name:
        options |= {"depths": (2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2)}
    model = models.create_model(name, num_classes=CLASSES, width=1 / 8, **options, **more)
    return as_if_trained(model).eval()


def named(quick: tuple[str, ...], slow: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                marks=[]
                if name in quick
                else [pytest.mark.slow if name in slow else pytest.mark.nightly],
            )
            for name in models.list_models()
        ],
    )


@pytest.mark.onnx
@named(quick=("segnet", "pspnet50", "dilatednet"), slow=tuple(models.list_models()))
@torch.no_grad()
def test_torchscript_exports_to_onnx(name: str) -> None:
    model, x = small(name), images(sizes(Case(name))[0])
    session = onnx_runs.export(model, [x], dynamo=False)
    found = onnx_runs.run(session, [x])
    same(dict(enumerate(found)), dict(enumerate(outputs(model(x)).values())), 1e-4)


@pytest.mark.onnx
@named(quick=(), slow=("segnet",))
@torch.no_grad()
def test_exports_to_onnx_for_every_size(name: str) -> None:
    model, case = small(name), Case(name)
    session = onnx_runs.export(model, [images(sizes(case)[0])], shapes=(dynamic(case),))
    for size in sizes(case):
        found = onnx_runs.run(session, [images(size)])
        expected = outputs(model(images(size))).values()
        same(dict(enumerate(found)), dict(enumerate(expected)), 1e-4)


@pytest.mark.onnx
@pytest.mark.parametrize("name", ["segnet", "pspnet50"])
@pytest.mark.slow
@torch.no_grad()
def test_torch_backend_exports_to_onnx(name: str) -> None:
    model, x = small(name, backend="torch"), images(sizes(Case(name))[0])
    found = onnx_runs.run(onnx_runs.export(model, [x], dynamo=False), [x])
    same(dict(enumerate(found)), dict(enumerate(outputs(model(x)).values())), 1e-4)


@pytest.mark.onnx
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
def test_models_with_a_crf_say_how_to_export_to_onnx(dynamo: bool) -> None:
    model = small("deeplab_v1", crf=DenseCRF(CLASSES, iterations=1))
    with pytest.raises(
        Exception,
        match=r"dense_crf: this call has no ONNX form; export the model without its CRF "
        r"\(model\.crf = None\) and apply segkernels\.dense_crf to the output",
    ):
        onnx_runs.export(model, [images((1, 33, 45))], dynamo=dynamo)
    model.crf = None
    session = onnx_runs.export(model, [images((1, 33, 45))], dynamo=dynamo)
    assert onnx_runs.run(session, [images((1, 33, 45))])[0].shape == (1, CLASSES, 33, 45)


@pytest.mark.onnx
@pytest.mark.slow
def test_programs_of_torch_export_have_no_onnx_form() -> None:
    x = images((1, 33, 45))
    program = torch.export.export(small("deeplab_v1"), (x,))
    with pytest.raises(Exception, match=r"no ONNX form; give torch\.onnx\.export the model itself"):
        onnx_runs.export(program, [x])  # type: ignore[arg-type]
