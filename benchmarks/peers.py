"""Other implementations to compare with, each optional."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from budget import budget
from shapes import CrfShape
from timing import Call, clock

Result = npt.NDArray[np.float32]
_HERE = "the same device"
_LARGE = 2**20


@dataclass(frozen=True)
class Peer:
    """Another implementation of a case.

    Attributes:
        name: name in reports; its version is in `setting.versions`.
        where: where it runs.
        run: runs the case once, with prepared inputs; None if the peer is not available.
        missing: why the peer is not available.
        on_device: whether it runs on the device of this run and is timed as segkernels is.
        note: how its work differs, for the report.
        peak: returns its peak memory beyond the inputs on the CPU; on CUDA it is measured from
            `run`.
    """

    name: str
    where: str
    run: Callable[[], Any] | None = field(repr=False, default=None)
    missing: str = ""
    on_device: bool = False
    note: str = ""
    peak: Callable[[], int | None] | None = field(repr=False, default=None)


def eager(run: Call, peak: Callable[[], int | None] | None = None) -> Peer:
    """torch's eager operators; cuDNN searches for the fastest algorithm."""
    return Peer("torch", _HERE, run, on_device=True, peak=peak)


def torch_layers(module: Any) -> Any:
    """Copy of a segkernels module that uses torch's layers."""
    other = copy.deepcopy(module)
    other.backend = "torch"
    return other


def inductor(function: Callable[..., Any], prepare: Callable[[Callable[..., Any]], Call]) -> Peer:
    """`function` compiled by torch.compile.

    Args:
        function: the function to compile.
        prepare: makes the timed call from the compiled function.
    """
    name = "torch.compile"
    if budget.quick:
        return Peer(name, _HERE, missing="compilation takes seconds per case; not in quick mode")
    torch.compiler.reset()  # otherwise the ninth shape exceeds the recompile limit and runs eagerly
    run = prepare(torch.compile(function, dynamic=False))
    try:
        run()
    except Exception as error:  # such as no compiler, or an unsupported operator
        return Peer(name, _HERE, missing=_first_line(error))
    return Peer(name, _HERE, run, on_device=True)


def deterministic(run: Call) -> Peer:
    """torch's eager operators in deterministic mode. segkernels is always deterministic."""
    name = "torch, deterministic"
    if clock.device.type == "cpu":
        return Peer(name, _HERE, missing="on the CPU torch is always deterministic")

    def strict() -> Any:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(before)

    try:
        strict()
    except RuntimeError as error:
        return Peer(name, _HERE, missing=_first_line(error))
    return Peer(name, _HERE, strict, on_device=True)


def cudnn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int = 1,
) -> Peer:
    """torch.cudnn_convolution_relu: cuDNN's convolution with bias and ReLU in one kernel."""
    name = "cudnn_convolution_relu"
    if clock.device.type == "cpu":
        return Peer(name, _HERE, missing="needs a CUDA device")

    def run() -> torch.Tensor:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)

    try:
        run()
    except RuntimeError as error:
        return Peer(name, _HERE, missing=_first_line(error))
    return Peer(name, _HERE, run, on_device=True)


def pydensecrf(shape: CrfShape, image: npt.NDArray[np.uint8], probs: Result) -> Peer:
    """pydensecrf2, a fork of pydensecrf, with the parameters that `dense_crf` has by default.

    Its energies are computed here and not timed, because pydensecrf expects them from the caller.
    `dense_crf` computes them from probabilities, and its time includes that.

    Args:
        shape: the case; one image.
        image: (H, W, 3) uint8.
        probs: (C, H, W) float32.
    """
    name, where = "pydensecrf2", "CPU, one thread"
    try:
        crf: Any = importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        return Peer(name, where, missing=f"{error}; pip install pydensecrf2")
    if shape.batch > 1:
        return Peer(name, where, missing="processes one image per call")
    energy = np.ascontiguousarray(-np.log(np.clip(probs, 1e-5, 1)).reshape(shape.classes, -1))
    image = np.ascontiguousarray(image)

    def run() -> Result:
        field_ = crf.DenseCRF2D(shape.width, shape.height, shape.classes)
        field_.setUnaryEnergy(energy)
        field_.addPairwiseGaussian(sxy=3, compat=3)
        field_.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
        return np.array(field_.inference(shape.iterations), np.float32).reshape(probs.shape)

    return Peer(name, where, run)


def pydensecrf_term(features: Result, probs: Result, iterations: int) -> Peer:
    """pydensecrf2 with one term of weight 4 over `features` and symmetric normalisation.

    Args:
        features: (d, H, W) float32.
        probs: (C, H, W) float32.
        iterations: number of mean-field iterations.
    """
    name, where = "pydensecrf2", "CPU, one thread"
    try:
        crf: Any = importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        return Peer(name, where, missing=f"{error}; pip install pydensecrf2")
    classes = len(probs)
    energy = np.ascontiguousarray(-np.log(np.clip(probs, 1e-5, 1)).reshape(classes, -1))
    planes = np.ascontiguousarray(features.reshape(len(features), -1))

    def run() -> Result:
        field_ = crf.DenseCRF(energy.shape[1], classes)
        field_.setUnaryEnergy(energy)
        field_.addPairwiseEnergy(planes, compat=4)
        return np.array(field_.inference(iterations), np.float32).reshape(probs.shape)

    return Peer(name, where, run)


def monai(shape: CrfShape, images: torch.Tensor, probs: torch.Tensor) -> Peer:
    """MONAI's CRF block, which builds its permutohedral lattices again in every iteration.

    Args:
        shape: the case.
        images: (B, 3, H, W) uint8.
        probs: (B, C, H, W) float32.
    """
    name = "MONAI CRF"
    try:
        block: Any = importlib.import_module("monai.networks.blocks.crf").CRF
        importlib.import_module("monai._C")
    except ImportError as error:
        how = "the pip package has no compiled code; build MONAI with BUILD_MONAI=1"
        return Peer(name, _HERE, missing=f"{_first_line(error)}; {how}")
    if images.is_cuda and shape.classes > 16:
        return Peer(name, _HERE, missing="supports at most 16 classes on CUDA")
    layer = block(
        iterations=shape.iterations,
        bilateral_weight=10.0,
        gaussian_weight=3.0,
        bilateral_spatial_sigma=80.0,
        bilateral_color_sigma=13.0,
        gaussian_spatial_sigma=3.0,
        update_factor=1.0,
    )
    logits, reference = probs.clamp_min(1e-5).log(), images.float()

    def run() -> Any:
        with torch.no_grad():
            return layer(logits, reference)

    note = "normalises its filters differently; builds both lattices in every iteration"
    return Peer(name, _HERE, run, on_device=True, note=note)


def crfseg(shape: CrfShape, probs: torch.Tensor) -> Peer:
    """crfseg's convolutional CRF: only the smoothing term, in a window of 11 x 11 pixels.

    Args:
        shape: the case.
        probs: (B, C, H, W) float32.
    """
    name = "crfseg"
    if budget.quick and probs.device.type == "cpu" and probs.numel() > _LARGE:
        return Peer(name, _HERE, missing="ten seconds per call at this size; not in quick mode")
    try:
        layer: Any = importlib.import_module("crfseg").CRF
    except ImportError as error:
        how = "pip install --no-deps crfseg tqdm"
        return Peer(name, _HERE, missing=f"{_first_line(error)}; {how}")
    crf = layer(
        n_spatial_dims=2,
        n_iter=shape.iterations,
        requires_grad=False,
        returns="proba",
        smoothness_weight=3.0,
        smoothness_theta=3.0,
    ).to(probs.device)
    logits = probs.clamp_min(1e-5).log()

    def run() -> Any:
        with torch.no_grad():
            return crf(logits)

    note = "less work: only the smoothing term, no colours, a window of 11 x 11"
    return Peer(name, _HERE, run, on_device=True, note=note)


def brute_force(values: torch.Tensor, features: torch.Tensor) -> Peer:
    """The exact filter in torch: 1024 rows of weights at a time, distances by matrix product.

    Args:
        values: (1, C, H, W) float32.
        features: (1, d, H, W) float32.
    """
    v, f = values[0].flatten(1).T.contiguous(), features[0].flatten(1).T.contiguous()
    squares = f.square().sum(dim=1)

    def run() -> torch.Tensor:
        out = []
        for x, square in zip(f.split(1024), squares.split(1024), strict=True):
            q = torch.addmm(squares, x, f.T, alpha=-2).add_(square.unsqueeze(1))
            weights = q.mul_(-0.5).exp_()
            out.append((weights @ v) / weights.sum(dim=1, keepdim=True))
        return torch.cat(out)

    return Peer("torch, 1024 rows at a time", _HERE, run, on_device=True)


def pykeops(values: torch.Tensor, features: torch.Tensor) -> Peer:
    """The exact filter with KeOps' symbolic matrices, which compile a kernel at the first call.

    Args:
        values: (1, C, H, W) float32.
        features: (1, d, H, W) float32.
    """
    name = "pykeops"
    if budget.quick:
        return Peer(
            name, _HERE, missing="compilation takes half a minute per case; not in quick mode"
        )
    try:
        keops: Any = importlib.import_module("pykeops.torch")
    except Exception as error:  # the import searches for compilers and a CUDA toolkit
        return Peer(name, _HERE, missing=f"{_first_line(error)}; pip install pykeops")
    v, f = values[0].flatten(1).T.contiguous(), features[0].flatten(1).T.contiguous()

    def run() -> torch.Tensor:
        x, y = keops.LazyTensor(f[:, None, :]), keops.LazyTensor(f[None, :, :])
        weights = (-((x - y) ** 2).sum(-1) / 2).exp()
        result: torch.Tensor = (weights @ v) / weights.sum(dim=1)
        return result

    try:
        run()
    except Exception as error:
        return Peer(name, _HERE, missing=_first_line(error))
    return Peer(name, _HERE, run, on_device=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
