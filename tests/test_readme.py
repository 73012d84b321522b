"""README.md: Python blocks, commands, list of operators, signatures and links."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_runs
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import segkernels
from segkernels.cli import app
from segkernels.ops import _registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CUDA = ROOT / "docs" / "cuda.md"
# A fenced block with its optional `<!-- test: ... -->` marker.
BLOCK = re.compile(r"(?:<!-- test: (\w+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str, needs: str = "") -> list[str]:
    found = [(n, text) for n, lang, text in BLOCK.findall(README) if lang == language]
    assert all(n in ("", "pydensecrf", "gpu", "onnx") for n, _ in found)
    return [text for n, text in found if n == needs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `segkernels demo` was run."""
    path = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        ran = CliRunner().invoke(app, ["demo"])
    assert ran.exit_code == 0, ran.output
    return path


def run(code: str, names: dict[str, Any], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message="dense_crf")
        patch.chdir(folder)
        exec(compile(code, "README.md", "exec"), names)


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """The namespace after all Python blocks ran in order."""
    names: dict[str, Any] = {}
    for code in blocks("python"):
        run(code, names, folder)
    return names


def test_python_blocks_give_the_documented_results(folder: Path, names: dict[str, Any]) -> None:
    assert len(blocks("python")) >= 8
    assert names["image"].shape == (360, 480, 3)
    assert names["probs"].shape == names["refined"].shape == (7, 360, 480)
    truth = np.asarray(Image.open(folder / "segkernels-demo" / "truth.png"))
    assert (names["labels"] == truth).mean() == pytest.approx(0.870, abs=0.0005)
    assert (names["labels"] == 7).mean() == pytest.approx(0.105, abs=0.0005)
    assert (names["new_labels"] == truth).mean() == pytest.approx(0.991, abs=0.001)
    for text in ("87.0% of the pixels right, 10.5% unknown", "99.1% right"):
        assert text in README
    assert names["out"].shape == names["log_out"].shape == (2, 21, 64, 96)
    assert names["log_out"].exp().sum(dim=1).sub(1).abs().max() < 1e-5
    assert names["out3d"].shape == names["probs3d"].shape
    assert names["features"].shape == (2, 5, 64, 96)
    assert len(names["lattice"].num_vertices) == 2
    assert names["smooth"].equal(names["lattice"].filter(names["images"].float()))
    assert names["crf"].compat_bilateral.grad.abs().sum() > 0


def test_pydensecrf_block_agrees(names: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("pydensecrf.densecrf", reason="pip install pydensecrf2 to compare with it")
    (text,) = blocks("python", "pydensecrf")
    theirs = dict(names)
    run(text, theirs, folder)
    worst = np.abs(theirs["Q"] - names["q"]).max(axis=0)
    assert (worst > 1e-4).mean() < 0.005
    assert (theirs["Q"].argmax(axis=0) == names["q"].argmax(axis=0)).mean() > 0.9999


def test_pydensecrf_pairwise_features_agree(names: dict[str, Any]) -> None:
    crf = pytest.importorskip(
        "pydensecrf.densecrf", reason="pip install pydensecrf2 to compare with it"
    )
    utils = importlib.import_module("pydensecrf.utils")
    image, probs = names["image"], names["probs"]
    size = image.shape[:2]
    field = crf.DenseCRF(size[0] * size[1], 7)
    field.setUnaryEnergy(utils.unary_from_softmax(probs))
    place = utils.create_pairwise_gaussian(sdims=(8, 2), shape=size)
    colour = utils.create_pairwise_bilateral((80, 60), (13, 13, 13), np.array(image), chdim=2)
    field.addPairwiseEnergy(place, compat=3)
    field.addPairwiseEnergy(colour, compat=10)
    expected = np.array(field.inference(5)).reshape(probs.shape)
    worst = np.abs(names["by_rows"] - expected).max(axis=0)
    assert (worst > 1e-4).mean() < 0.005
    other = segkernels.dense_crf(
        image, probs, iterations=5, sxy_gaussian=(2, 8), sxy_bilateral=(60, 80)
    )
    assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize(
    "options", [{"scale": 0.7}, {"clip": 1e-2}, {"clip": 1e-8}, {"clip": None}]
)
def test_pydensecrf_unaries_agree(options: dict[str, Any]) -> None:
    crf = pytest.importorskip(
        "pydensecrf.densecrf", reason="pip install pydensecrf2 to compare with it"
    )
    utils = importlib.import_module("pydensecrf.utils")
    probs = np.random.default_rng(0).random((4, 40, 56), dtype=np.float32) ** 2
    probs[0, :4] = 0
    probs /= probs.sum(axis=0)
    field = crf.DenseCRF2D(56, 40, 4)
    with np.errstate(divide="ignore"):  # impossible classes
        field.setUnaryEnergy(utils.unary_from_softmax(probs, **options))
        if "scale" in options:
            scores = {"probs": options["scale"] * probs + (1 - options["scale"]) / 4}
        else:
            clip = options["clip"]
            scores = {"unary": -np.log(probs if clip is None else probs.clip(clip, 1))}
    field.addPairwiseGaussian(sxy=3, compat=3)
    expected = np.array(field.inference(5)).reshape(probs.shape)
    found = segkernels.dense_crf(None, **scores, iterations=5, compat_bilateral=None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pydensecrf_labels_and_terms_agree(names: dict[str, Any]) -> None:
    crf = pytest.importorskip(
        "pydensecrf.densecrf", reason="pip install pydensecrf2 to compare with it"
    )
    utils = importlib.import_module("pydensecrf.utils")
    rng = np.random.default_rng(0)
    labels, depth = rng.integers(0, 4, (40, 56)), rng.normal(0, 2, (1, 40, 56)).astype(np.float32)
    theirs = utils.unary_from_labels(labels, 3, 0.6, zero_unsure=True)
    ours = segkernels.probs_from_labels(labels - 1, 3, 0.6, ignore_index=-1)
    np.testing.assert_allclose(-np.log(ours).reshape(3, -1), theirs, atol=1e-6)

    field = crf.DenseCRF(40 * 56, 3)
    field.setUnaryEnergy(theirs.astype(np.float32))
    field.addPairwiseEnergy(depth.reshape(1, -1), compat=4, normalization=crf.NORMALIZE_BEFORE)
    expected = np.array(field.inference(5)).reshape(3, 40, 56)
    term = segkernels.PairwiseTerm(torch.from_numpy(depth), compat=4)
    found = segkernels.dense_crf(
        None,
        unary=theirs.reshape(3, 40, 56).astype(np.float32),
        iterations=5,
        compat_gaussian=None,
        compat_bilateral=None,
        pairwise=[term],
        normalization="before",
    )
    assert (np.abs(found - expected).max(axis=0) > 1e-4).mean() < 0.005


@pytest.mark.onnx
@pytest.mark.slow
def test_onnx_block(names: dict[str, Any], folder: Path) -> None:
    for package in onnx_runs.PACKAGES:
        pytest.importorskip(package, reason="pip install '.[onnx]'")
    (text,) = blocks("python", "onnx")
    run(text, dict(names), folder)
    session = onnx_runs.load(str(folder / "deeplab.onnx"))
    for photos in (names["photos"], names["photos"][:1].transpose(2, 3)):
        with torch.no_grad():
            expected = names["model"](photos)
        (found,) = onnx_runs.run(session, [photos])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_cuda_block(names: dict[str, Any], folder: Path) -> None:
    (text,) = blocks("python", "gpu")
    there = dict(names)
    run(text, there, folder)
    assert there["out"].is_cuda
    assert (there["out"].sum(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA.is_file(), reason="an sdist has no docs/")
def test_blocks_of_the_cuda_page() -> None:
    names: dict[str, Any] = {}
    for need, language, text in BLOCK.findall(CUDA.read_text(encoding="utf-8")):
        if language == "python":
            assert need == "gpu"
            exec(compile(text, "docs/cuda.md", "exec"), names)
    assert (names["refined"].sum(dim=1) - 1).abs().max() < 1e-5
    expected = segkernels.dense_crf(names["images"], logits=names["logits"])
    torch.testing.assert_close(names["refined"], expected)
    assert names["wider"].isfinite().all()


def test_commands_run(folder: Path) -> None:
    for name, into in (("image", "photos"), ("labels", "labels"), ("truth", "truth")):
        photos = folder / into
        photos.mkdir()
        shutil.copy(folder / "segkernels-demo" / f"{name}.png", photos / "scene.png")
    lines = [line for text in blocks("sh") for line in text.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("segkernels ")]
    assert {command[1] for command in commands} == {"refine", "evaluate", "info"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for _, *arguments in commands:
            ran = CliRunner().invoke(app, arguments)
            assert ran.exit_code == 0, (arguments, ran.output)
    demo = Image.open(folder / "segkernels-demo" / "refined.png")
    for written in ("refined.png", "refined/scene.png"):
        assert np.array_equal(np.asarray(Image.open(folder / written)), np.asarray(demo))
    assert (folder / "overlay.png").is_file()
    assert [path.stem for path in (folder / "overlays").iterdir()] == ["scene"]


@pytest.mark.parametrize("op", _registry.ops(), ids=lambda op: op.name)
def test_operators_are_listed(op: _registry.Op) -> None:
    section = README.split("\n## Operators\n")[1].split("\n## ")[0]
    (row,) = [line for line in section.splitlines() if f"`{op.name}` |" in line]
    for name in op.functions:
        assert f"`{name}`" in row, f"README.md, Operators: {op.name} also has {name}"


def test_signatures_match_the_code() -> None:
    headings = re.findall(r"^### (.*)", README, re.MULTILINE)
    signatures = [s for h in headings for s in re.findall(r"`(\w+)\((.*?)\)`", h)]
    assert len(signatures) >= 7
    for function, arguments in signatures:
        parameters = inspect.signature(getattr(segkernels, function)).parameters
        for argument in filter(None, (a.strip() for a in arguments.split(","))):
            name, _, default = argument.partition("=")
            if name not in ("*", "..."):
                assert name in parameters
                assert default in ("", repr(parameters[name].default))
    table = README.split("### `dense_crf(")[1].split("\n###")[0]
    defaults = inspect.signature(segkernels.dense_crf).parameters
    for row in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", table, re.MULTILINE):
        named = re.findall(r"`(\w+)`", row[0])
        for name, value in zip(named, row[1].replace("`", "").split(", "), strict=True):
            assert ast.literal_eval(value) == defaults[name].default, name


def test_links_and_anchors_exist() -> None:
    anchors = {h.lower() for h in re.findall(r"^#+ (\w+)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]*)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif (ROOT / "docs").is_dir() or not target.startswith("docs/"):  # an sdist has no docs/
            assert (ROOT / target).is_file(), target
