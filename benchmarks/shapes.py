"""The sizes that are measured, with their sources.

`quick` marks the shapes that quick mode runs. Of all combinations of batch, dtype and layout, those
of `kinds` are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Kind:
    """Batch (the shape's or a single image), dtype and layout of a case."""

    batched: bool
    dtype: str  # torch's name
    layout: str  # "NCHW" or "NHWC"
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.layout}"

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "NHWC" else torch.contiguous_format


_MAIN = Kind(True, "bfloat16", "NHWC", quick=True)


def kinds(cuda: bool) -> tuple[Kind, ...]:
    """The kinds of a run; on the CPU mostly single images, since a batch runs image by image."""
    if cuda:
        return (
            _MAIN,
            Kind(True, "float32", "NCHW", quick=True),
            Kind(True, "bfloat16", "NCHW"),
            Kind(True, "float16", "NHWC"),
            Kind(False, "bfloat16", "NHWC"),
        )
    return (
        Kind(False, "float32", "NCHW", quick=True),
        Kind(False, "bfloat16", "NHWC", quick=True),
        Kind(False, "float32", "NHWC"),
        Kind(False, "bfloat16", "NCHW"),
        Kind(False, "float16", "NHWC"),
        Kind(True, "float32", "NCHW"),
    )


@dataclass(frozen=True)
class CrfShape:
    """One dense CRF: images of H x W, C classes, and the number of mean-field iterations."""

    height: int
    width: int
    classes: int
    iterations: int
    source: str
    batch: int = 1
    quick: bool = True

    @property
    def name(self) -> str:
        batch = f"{self.batch}x" if self.batch > 1 else ""
        return f"{batch}{self.height}x{self.width}x{self.classes}-{self.iterations}it"

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width


CRF = (
    CrfShape(240, 320, 2, 5, "pydensecrf's example: its image size, 5 iterations, two labels"),
    CrfShape(512, 512, 21, 10, "PASCAL VOC: 20 classes and background; DeepLab's 10 iterations"),
    CrfShape(1024, 1024, 21, 10, "the PASCAL VOC case with four times the pixels, for scaling"),
)

# Only on a GPU: on the CPU a batch is computed image by image.
CRF_BATCHED = (
    CrfShape(240, 320, 2, 5, "pydensecrf's example, eight images in one call", batch=8),
    CrfShape(512, 512, 21, 10, "the PASCAL VOC case, eight images in one call", batch=8),
)

CRF_TRAINING = (
    CrfShape(240, 320, 21, 5, "CRF-as-RNN: 21 classes, 5 iterations in training, a small crop"),
)


@dataclass(frozen=True)
class FilterShape:
    """One filter: an image of H x W, the kind of features, and the channels of the values."""

    height: int
    width: int
    features: str  # "spatial" (d = 2) or "bilateral" (d = 5)
    channels: int
    source: str
    quick: bool = True

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}-{self.features}"

    @property
    def dims(self) -> int:
        return {"spatial": 2, "bilateral": 5}[self.features]


FILTER = (
    FilterShape(512, 512, "spatial", 21, "the dense CRF's smoothing term at 512 x 512 x 21"),
    FilterShape(512, 512, "bilateral", 21, "the dense CRF's colour term at 512 x 512 x 21"),
    FilterShape(512, 512, "bilateral", 3, "bilateral filtering of a colour image"),
)

# The exact filter takes time quadratic in the pixels.
EXACT = (
    FilterShape(
        120, 160, "bilateral", 2, "pydensecrf's example at a quarter of the pixels, for a CPU"
    ),
    FilterShape(
        240, 320, "bilateral", 2, "the dense CRF's colour term, pydensecrf's example", quick=False
    ),
    FilterShape(
        240, 320, "bilateral", 16, "the dense CRF's colour term with 16 labels", quick=False
    ),
    FilterShape(
        512, 512, "bilateral", 21, "the dense CRF's colour term at 512 x 512 x 21", quick=False
    ),
)
EXACT_CRF = (
    CrfShape(120, 160, 2, 5, "pydensecrf's example at a quarter of the pixels, for a CPU"),
    CrfShape(240, 320, 2, 10, "pydensecrf's example, 10 iterations", quick=False),
    CrfShape(512, 512, 21, 10, "the PASCAL VOC case", quick=False),
)


@dataclass(frozen=True)
class PoolShape:
    """One pooling of maps of H x W: window, stride and padding."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    source: str
    quick: bool = True
    kind: Kind = Kind(True, "float32", "NCHW")

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        return f"{size}-k{self.kernel}s{self.stride}-{self.kind.name}"

    @property
    def values(self) -> int:
        """Number of input elements."""
        return self.batch * self.channels * self.height * self.width


POOL = (
    PoolShape(8, 64, 360, 480, 2, 2, 0, "SegNet's and DeconvNet's first pooling at CamVid's size"),
    PoolShape(8, 256, 128, 128, 2, 2, 0, "a U-Net's pooling", quick=False),
    PoolShape(8, 512, 45, 61, 2, 2, 0, "an odd size, as in SegNet's fourth pooling"),
    PoolShape(8, 64, 257, 257, 3, 2, 1, "ResNet's overlapping pooling at a crop of 513"),
)


@dataclass(frozen=True)
class UpShape:
    """Resampling of [N, C, h, w] to [N, C, H, W]."""

    batch: int
    channels: int
    low: tuple[int, int]
    high: tuple[int, int]
    source: str
    quick: bool = True
    kind: Kind = Kind(True, "float32", "NCHW")

    @property
    def name(self) -> str:
        low, high = ("x".join(map(str, size)) for size in (self.low, self.high))
        return f"N{self.batch}C{self.channels}-{low}-{high}-{self.kind.name}"


_VOC = "PASCAL VOC crops of 513 at output stride 8: DeepLab's last layer"
_CITY = "Cityscapes, 19 classes, DeepLabv3+ and DilatedNet at full size"
UPSAMPLE = (
    UpShape(8, 21, (65, 65), (513, 513), _VOC),
    UpShape(8, 256, (33, 33), (129, 129), "DeepLabv3+'s decoder: features upsampled by 4"),
    UpShape(8, 256, (65, 65), (130, 130), "upsampling by 2 in a U-Net or FPN", quick=False),
    UpShape(4, 19, (256, 512), (1024, 2048), _CITY, quick=False),
    UpShape(8, 21, (513, 513), (129, 129), "downsampling"),
)
TAIL = (
    UpShape(8, 21, (65, 65), (513, 513), _VOC),
    UpShape(4, 19, (128, 256), (1024, 2048), _CITY, quick=False),
    UpShape(2, 150, (128, 128), (512, 512), "ADE20K, 150 classes", quick=False),
)


@dataclass(frozen=True)
class ConvShape:
    """One dilated convolution with padding dilation * (kernel - 1) / 2, which keeps the size."""

    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    dilation: int
    source: str
    kernel: int = 3
    quick: bool = True
    kind: Kind = _MAIN

    @property
    def name(self) -> str:
        sizes = f"N{self.batch}-{self.channels}-{self.out_channels}-{self.height}x{self.width}"
        return f"{sizes}-k{self.kernel}d{self.dilation}-{self.kind.name}"

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel - 1) // 2

    def useful_flops(self) -> int:
        """FLOPs without those on padding; a multiply-add counts as two."""
        pairs = 1
        for size in (self.height, self.width):
            shifts = [k * self.dilation - self.padding for k in range(self.kernel)]
            pairs *= sum(max(0, size - abs(shift)) for shift in shifts)
        return 2 * self.batch * pairs * self.channels * self.out_channels


_ASPP = "DeepLabv3's ASPP on ResNet's 2048 channels"
CONV = (
    ConvShape(
        8, 2048, 256, 65, 65, 6, f"{_ASPP}: 513 at output stride 8, with a rate of output stride 16"
    ),
    ConvShape(8, 2048, 256, 65, 65, 12, f"{_ASPP}: 513 at output stride 8"),
    ConvShape(8, 2048, 256, 65, 65, 24, f"{_ASPP}: 513 at output stride 8", quick=False),
    ConvShape(8, 2048, 256, 65, 65, 36, f"{_ASPP}: 513 at output stride 8", quick=False),
    ConvShape(8, 2048, 256, 33, 33, 18, f"{_ASPP}: 513 at output stride 16", quick=False),
    ConvShape(8, 512, 512, 65, 65, 4, "ResNet's last stage, dilated by 4"),
    ConvShape(8, 256, 256, 65, 65, 2, "ResNet's third stage, dilated by 2", quick=False),
    ConvShape(8, 512, 1024, 41, 41, 12, "DeepLab-LargeFOV's fc6 on VGG's 512 channels, crop 321"),
    ConvShape(8, 2048, 21, 65, 65, 24, "DeepLabv2's ASPP: 21 classes per branch", quick=False),
    ConvShape(8, 21, 21, 64, 64, 8, "DilatedNet's context module, Basic, 21 classes"),
    ConvShape(4, 19, 19, 128, 256, 8, "DilatedNet's context module, Cityscapes", quick=False),
    ConvShape(1, 2048, 256, 65, 65, 12, f"{_ASPP}: one image", quick=False),
    ConvShape(1, 2048, 256, 128, 256, 12, f"{_ASPP}: one image of Cityscapes", quick=False),
)


def convs(cuda: bool) -> tuple[ConvShape, ...]:
    """The convolutions of a run.

    On CUDA: all in bfloat16 channels_last, and those of quick mode in the other kinds too. On the
    CPU: single images; in quick mode, 256 or more channels are reduced to an eighth.
    """
    if cuda:
        others = [shape for shape in CONV if shape.quick]
        main = [replace(shape, kind=_MAIN) for shape in CONV]
        return tuple({s.name: s for s in (*main, *of_kinds(others, cuda))}.values())
    single = [replace(shape, batch=1, quick=False) for shape in CONV if shape.batch > 1]
    narrow = [
        replace(s, channels=_eighth(s.channels), out_channels=_eighth(s.out_channels), quick=True)
        for s in single
        if s.dilation > 2
    ]
    kept = [kind for kind in kinds(cuda) if not kind.batched]
    full = [replace(s, kind=kind) for s in single for kind in kept[:2]]
    quick = [replace(s, kind=kind, quick=kind.quick) for s in narrow[::3] for kind in kept]
    found = {shape.name: shape for shape in (*full, *quick)}
    return tuple(found.values())


def dilations(cuda: bool) -> tuple[ConvShape, ...]:
    """DeepLabv3's ASPP branch with varying dilation; on the CPU one image, 1/8 of the channels."""
    batch, channels, out = (8, 2048, 256) if cuda else (1, 256, 32)
    kind = _MAIN if cuda else Kind(False, "float32", "NHWC")
    source = f"{batch} x {channels} x 65 x 65 to {out}, {kind.name}"
    return tuple(
        ConvShape(batch, channels, out, 65, 65, d, source, quick=d in (1, 4, 12, 36), kind=kind)
        for d in (1, 2, 4, 6, 9, 12, 18, 24, 36)
    )


def _eighth(channels: int) -> int:
    return channels // 8 if channels >= 256 else channels


_Shape = TypeVar("_Shape", PoolShape, UpShape, ConvShape, "AsppShape", "ContextShape")


def of_kinds(shapes: Iterable[_Shape], cuda: bool) -> Iterator[_Shape]:
    """Each shape in each kind of the run's device, without duplicates."""
    seen = set()
    for shape in shapes:
        for kind in kinds(cuda):
            batch = shape.batch if kind.batched else 1
            quick = shape.quick and kind.quick
            variant = replace(shape, batch=batch, kind=kind, quick=quick)
            if variant.name not in seen:
                seen.add(variant.name)
                yield variant


@dataclass(frozen=True)
class AsppShape:
    """One ASPP on maps of H x W: form and rates."""

    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    form: str
    rates: tuple[int, ...]
    source: str
    quick: bool = True
    kind: Kind = _MAIN

    @property
    def name(self) -> str:
        sizes = f"N{self.batch}-{self.channels}-{self.out_channels}-{self.height}x{self.width}"
        return f"{self.form}-{sizes}-r{'.'.join(map(str, self.rates))}-{self.kind.name}"

    def useful_flops(self) -> int:
        """FLOPs of the 3x3 branches and v3's 1x1 convolutions, without the image pooling."""
        size = (self.channels, self.out_channels, self.height, self.width)
        flops = sum(ConvShape(self.batch, *size, rate, "").useful_flops() for rate in self.rates)
        if self.form == "v3":
            joined = (len(self.rates) + 2) * self.out_channels
            ones = self.channels + joined
            flops += 2 * self.batch * self.height * self.width * self.out_channels * ones
        return flops


_V3 = "DeepLabv3's ASPP on ResNet's 2048 channels, crops of 513"
_V2 = "DeepLabv2 on ResNet, crops of 321, 21 classes"
ASPP = (
    AsppShape(8, 2048, 256, 65, 65, "v3", (12, 24, 36), f"{_V3}, output stride 8"),
    AsppShape(8, 2048, 256, 33, 33, "v3", (6, 12, 18), f"{_V3}, output stride 16", quick=False),
    AsppShape(8, 2048, 21, 41, 41, "v2", (6, 12, 18, 24), _V2),
)


def aspps(cuda: bool) -> tuple[AsppShape, ...]:
    """The ASPP cases of a run; on the CPU in quick mode, with 1/8 of 256 or more channels."""
    if cuda:
        return tuple(of_kinds(ASPP, cuda))
    narrow = [
        replace(s, channels=_eighth(s.channels), out_channels=_eighth(s.out_channels)) for s in ASPP
    ]
    full = [replace(s, quick=False) for s in ASPP]
    kept = [kind for kind in kinds(cuda) if not kind.batched][:3]
    return tuple(
        replace(s, batch=1, kind=kind, quick=s.quick and kind.quick)
        for s in (*narrow, *full)
        for kind in kept
    )


@dataclass(frozen=True)
class ContextShape:
    """DilatedNet's context module on class scores of H x W."""

    batch: int
    classes: int
    height: int
    width: int
    source: str
    quick: bool = True
    kind: Kind = _MAIN

    @property
    def name(self) -> str:
        size = f"N{self.batch}C{self.classes}-{self.height}x{self.width}"
        return f"{size}-{self.kind.name}"


_SCORES = "DilatedNet's context module, Basic, on scores at 1/8 of"
CONTEXT = (
    ContextShape(8, 21, 64, 64, f"{_SCORES} crops of 512, PASCAL VOC"),
    ContextShape(4, 19, 128, 256, f"{_SCORES} Cityscapes' images", quick=False),
)


@dataclass(frozen=True)
class ModelShape:
    """A model of `segkernels.models` on images of H x W."""

    model: str
    batch: int
    classes: int
    height: int
    columns: int
    source: str
    channels: int = 3
    width: float = 1.0
    quick: bool = False
    kind: Kind = _MAIN

    @property
    def name(self) -> str:
        narrow = f"-width{self.width:g}" if self.width != 1 else ""
        size = f"N{self.batch}-{self.height}x{self.columns}"
        return f"{self.model}{narrow}-{size}-{self.kind.name}"


_CAMVID = "the paper's size, CamVid's 11 classes"
MODELS = (
    ModelShape("deeplab_v3_resnet50", 8, 21, 513, 513, "the paper's crop, VOC", quick=True),
    ModelShape("deeplab_v2_resnet101", 8, 21, 321, 321, "the paper's crop, VOC"),
    ModelShape("deeplab_v1", 8, 21, 321, 321, "the paper's crop, VOC"),
    ModelShape("pspnet50", 8, 21, 473, 473, "the paper's crop, VOC"),
    ModelShape("segnet", 8, 11, 360, 480, _CAMVID, quick=True),
    ModelShape("fc_densenet56", 8, 11, 224, 224, "the paper's crop, CamVid's 11 classes"),
    ModelShape("unet", 8, 2, 576, 576, "the paper's tile of 572, padded to fit", channels=1),
)


def model_shapes(cuda: bool) -> tuple[ModelShape, ...]:
    """The models of a run.

    On CUDA: in bfloat16, with the papers' batches, and two of them also with single images. On the
    CPU: in float32, with a quarter of the channels, on small images.
    """
    if cuda:
        return (*MODELS, *(replace(shape, batch=1) for shape in MODELS if shape.quick))
    kind = Kind(False, "float32", "NHWC")
    source = "a quarter of the paper's channels, for a CPU"
    return (
        ModelShape("segnet", 2, 11, 96, 128, source, width=0.25, quick=True, kind=kind),
        ModelShape(
            "deeplab_v3_resnet50", 2, 21, 129, 129, source, width=0.25, quick=True, kind=kind
        ),
        ModelShape("deeplab_v1", 2, 21, 129, 129, source, width=0.25, kind=kind),
        ModelShape("fc_densenet56", 2, 11, 96, 96, source, width=0.25, kind=kind),
    )
