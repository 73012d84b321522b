"""The sizes that are measured, and where each comes from.

A shape says whether quick mode keeps it. Of batch, dtype and layout not every combination is
measured, but those of `kinds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Kind:
    """How a shape is laid out: its whole batch or one picture, its dtype and its layout."""

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
    """Those of a run: on the CPU one picture, for there a batch is one after the other."""
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
    """One dense CRF: pictures of H x W with C classes, and iterations of mean field."""

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
    CrfShape(240, 320, 2, 5, "pydensecrf's example: its picture's size, 5 iterations, two labels"),
    CrfShape(512, 512, 21, 10, "PASCAL VOC: 20 classes and background; DeepLab's 10 iterations"),
    CrfShape(1024, 1024, 21, 10, "the same at four times the pixels, for scaling"),
)

# Only where there is a GPU: on the CPU a batch is the images one after the other.
CRF_BATCHED = (
    CrfShape(240, 320, 2, 5, "pydensecrf's example, eight pictures in one call", batch=8),
    CrfShape(512, 512, 21, 10, "the PASCAL VOC case, eight pictures in one call", batch=8),
)

CRF_TRAINING = (
    CrfShape(240, 320, 21, 5, "CRF-as-RNN: 21 classes, 5 iterations in training, a small crop"),
)


@dataclass(frozen=True)
class FilterShape:
    """One filter: a picture of H x W, its kind of features, and channels of values."""

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
    FilterShape(512, 512, "bilateral", 3, "bilateral filtering of a colour picture"),
)

# The exact filter takes the square of the pixels.
EXACT = (
    FilterShape(120, 160, "bilateral", 2, "a quarter of the picture below, for a CPU"),
    FilterShape(
        240, 320, "bilateral", 2, "the dense CRF's colour term, pydensecrf's example", quick=False
    ),
    FilterShape(
        240, 320, "bilateral", 16, "the same with 16 labels, as the H100 probe had it", quick=False
    ),
    FilterShape(
        512, 512, "bilateral", 21, "the dense CRF's colour term at 512 x 512 x 21", quick=False
    ),
)
EXACT_CRF = (
    CrfShape(120, 160, 2, 5, "a quarter of the picture below, for a CPU"),
    CrfShape(240, 320, 2, 10, "pydensecrf's example, 10 iterations", quick=False),
    CrfShape(512, 512, 21, 10, "the PASCAL VOC case", quick=False),
)


@dataclass(frozen=True)
class PoolShape:
    """One pooling of planes of H x W: its window and stride."""

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
        """Elements of the plane's side."""
        return self.batch * self.channels * self.height * self.width


POOL = (
    PoolShape(8, 64, 360, 480, 2, 2, 0, "SegNet's and DeconvNet's first pooling at CamVid's size"),
    PoolShape(8, 256, 128, 128, 2, 2, 0, "a U-Net's pooling", quick=False),
    PoolShape(8, 512, 45, 61, 2, 2, 0, "an odd size, as SegNet's fourth pooling has it"),
    PoolShape(8, 64, 257, 257, 3, 2, 1, "ResNet's overlapping pooling at a crop of 513"),
)


@dataclass(frozen=True)
class UpShape:
    """N maps of C channels (classes), from (h, w) to (H, W)."""

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
    UpShape(8, 256, (33, 33), (129, 129), "DeepLabv3+'s decoder: features by 4"),
    UpShape(8, 256, (65, 65), (130, 130), "a U-Net's or FPN's step by 2", quick=False),
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
    """One dilated convolution that keeps the size: its padding is dilation * (kernel - 1) / 2."""

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
        """Multiplications and additions whose input lies inside the picture."""
        pairs = 1
        for size in (self.height, self.width):
            shifts = [k * self.dilation - self.padding for k in range(self.kernel)]
            pairs *= sum(max(0, size - abs(shift)) for shift in shifts)
        return 2 * self.batch * pairs * self.channels * self.out_channels


_ASPP = "DeepLabv3's ASPP on ResNet's 2048 channels"
CONV = (
    ConvShape(8, 2048, 256, 65, 65, 6, f"{_ASPP}: 513 at output stride 8, rate of stride 16"),
    ConvShape(8, 2048, 256, 65, 65, 12, f"{_ASPP}: 513 at output stride 8"),
    ConvShape(8, 2048, 256, 65, 65, 24, f"{_ASPP}: 513 at output stride 8", quick=False),
    ConvShape(8, 2048, 256, 65, 65, 36, f"{_ASPP}: 513 at output stride 8", quick=False),
    ConvShape(8, 2048, 256, 33, 33, 18, f"{_ASPP}: 513 at output stride 16", quick=False),
    ConvShape(8, 512, 512, 65, 65, 4, "ResNet's last stage, dilated by 4"),
    ConvShape(8, 256, 256, 65, 65, 2, "ResNet's third stage, dilated by 2", quick=False),
    ConvShape(8, 512, 1024, 41, 41, 12, "DeepLab-LargeFOV's fc6 on VGG's 512 channels, crop 321"),
    ConvShape(8, 2048, 21, 65, 65, 24, "DeepLabv2's ASPP: 21 classes a branch", quick=False),
    ConvShape(8, 21, 21, 64, 64, 8, "DilatedNet's context module, Basic, 21 classes"),
    ConvShape(4, 19, 19, 128, 256, 8, "DilatedNet's context module, Cityscapes", quick=False),
    ConvShape(1, 2048, 256, 65, 65, 12, f"{_ASPP}: one picture", quick=False),
    ConvShape(1, 2048, 256, 128, 256, 12, f"{_ASPP}: one picture of Cityscapes", quick=False),
)


def convs(cuda: bool) -> tuple[ConvShape, ...]:
    """The convolutions of a run.

    On CUDA each in 16-bit channels_last, those of quick mode in the other kinds too. On the CPU one
    picture: in full mode as they are, in quick mode with an eighth of the channels of wide ones.
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
    """DeepLabv3's branch over its dilation; on the CPU one picture, an eighth of the channels."""
    batch, channels, out = (8, 2048, 256) if cuda else (1, 256, 32)
    kind = _MAIN if cuda else Kind(False, "float32", "NHWC")
    source = f"{batch} x {channels} x 65 x 65 to {out}, {kind.name}"
    return tuple(
        ConvShape(batch, channels, out, 65, 65, d, source, quick=d in (1, 4, 12, 36), kind=kind)
        for d in (1, 2, 4, 6, 9, 12, 18, 24, 36)
    )


def _eighth(channels: int) -> int:
    return channels // 8 if channels >= 256 else channels


_Laid = TypeVar("_Laid", PoolShape, UpShape, ConvShape, "AsppShape", "ContextShape")


def of_kinds(shapes: Iterable[_Laid], cuda: bool) -> Iterator[_Laid]:
    """Every shape in every kind of the run's device, without doubles."""
    seen = set()
    for shape in shapes:
        for kind in kinds(cuda):
            batch = shape.batch if kind.batched else 1
            quick = shape.quick and kind.quick
            laid = replace(shape, batch=batch, kind=kind, quick=quick)
            if laid.name not in seen:
                seen.add(laid.name)
                yield laid


@dataclass(frozen=True)
class AsppShape:
    """One ASPP of a map of H x W: its form and rates."""

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
        """Of the 3x3 branches and v3's 1x1 ones, the image pooling's left out."""
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
    """The pyramids of a run; on the CPU with an eighth of the wide channels in quick mode."""
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
    """DilatedNet's context module on scores of H x W."""

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


_SCORES = "DilatedNet's context module, Basic, on scores of an eighth of"
CONTEXT = (
    ContextShape(8, 21, 64, 64, f"{_SCORES} crops of 512, PASCAL VOC"),
    ContextShape(4, 19, 128, 256, f"{_SCORES} Cityscapes' pictures", quick=False),
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
    """The models of a run: on CUDA in bfloat16, whole batches and, of two, single images.

    On the CPU narrow ones on small images, in float32.
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
