"""The sizes that are measured, and where each comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CrfShape:
    """One dense CRF: pictures of H x W with C classes, and iterations of mean field."""

    height: int
    width: int
    classes: int
    iterations: int
    source: str
    batch: int = 1
    slow: bool = False

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
    CrfShape(1024, 1024, 21, 10, "the same at four times the pixels, for scaling", slow=True),
)

# Only where there is a GPU: on the CPU a batch is the images one after the other.
CRF_BATCHED = (
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
    FilterShape(240, 320, "bilateral", 2, "the dense CRF's colour term, pydensecrf's example"),
    FilterShape(240, 320, "bilateral", 16, "the same with 16 labels, as the H100 probe had it"),
    FilterShape(512, 512, "bilateral", 21, "the dense CRF's colour term at 512 x 512 x 21"),
)
EXACT_CRF = (
    CrfShape(120, 160, 2, 5, "a quarter of the picture below, for a CPU"),
    CrfShape(240, 320, 2, 10, "pydensecrf's example, 10 iterations"),
    CrfShape(512, 512, 21, 10, "the PASCAL VOC case"),
)


@dataclass(frozen=True)
class PoolShape:
    """One pooling of planes of H x W: its window and stride, its layout and dtype."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    dtype: str
    layout: str  # "nchw" or "nhwc"
    source: str

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        return f"{size}-k{self.kernel}s{self.stride}-{self.dtype}-{self.layout}"

    @property
    def values(self) -> int:
        """Elements of the plane's side."""
        return self.batch * self.channels * self.height * self.width


# (batch on CUDA, batch on the CPU, channels, height, width, kernel, stride, padding, source)
_POOLED = (
    (8, 1, 64, 360, 480, 2, 2, 0, "SegNet's first pooling at CamVid's size"),
    (8, 2, 256, 128, 128, 2, 2, 0, "a U-Net's pooling"),
    (8, 1, 512, 45, 61, 2, 2, 0, "an odd size, as SegNet's fourth pooling has it"),
    (8, 1, 64, 257, 257, 3, 2, 1, "ResNet's overlapping pooling"),
)


def pools(cuda: bool) -> tuple[PoolShape, ...]:
    """The poolings of a run: the batches of a GPU, or those that a CPU takes."""
    return tuple(
        PoolShape(on_cuda if cuda else on_cpu, *sizes, dtype, layout, source)
        for on_cuda, on_cpu, *sizes, source in _POOLED
        for dtype in ("float32", "bfloat16")
        for layout in ("nchw", "nhwc")
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

    @property
    def name(self) -> str:
        sizes = f"N{self.batch}-{self.channels}-{self.out_channels}-{self.height}x{self.width}"
        return f"{sizes}-k{self.kernel}d{self.dilation}"

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
# (batch, channels, out_channels, height, width, dilation, source)
_CONVS = (
    (8, 2048, 256, 65, 65, 6, f"{_ASPP}: 513 at output stride 8, rate of stride 16"),
    (8, 2048, 256, 65, 65, 12, f"{_ASPP}: 513 at output stride 8"),
    (8, 2048, 256, 65, 65, 24, f"{_ASPP}: 513 at output stride 8"),
    (8, 2048, 256, 65, 65, 36, f"{_ASPP}: 513 at output stride 8"),
    (8, 2048, 256, 33, 33, 18, f"{_ASPP}: 513 at output stride 16"),
    (8, 512, 512, 65, 65, 4, "ResNet's last stage, dilated by 4"),
    (8, 256, 256, 65, 65, 2, "ResNet's third stage, dilated by 2"),
    (8, 512, 1024, 41, 41, 12, "DeepLab-LargeFOV's fc6 on VGG's 512 channels, crops of 321"),
    (8, 2048, 21, 65, 65, 24, "DeepLabv2's ASPP: 21 classes from each branch"),
    (8, 21, 21, 64, 64, 8, "DilatedNet's context module, Basic, 21 classes"),
    (4, 19, 19, 128, 256, 8, "DilatedNet's context module on Cityscapes"),
    (1, 2048, 256, 65, 65, 12, f"{_ASPP}: one picture"),
    (1, 2048, 256, 128, 256, 12, f"{_ASPP}: one picture of Cityscapes"),
)


def convs(cuda: bool) -> tuple[ConvShape, ...]:
    """The convolutions of a run; on the CPU one picture, an eighth of the channels of wide ones."""
    if cuda:
        return tuple(ConvShape(*sizes) for sizes in _CONVS)
    small = []
    for batch, c, co, height, width, dilation, source in _CONVS:
        if batch > 1:
            narrow = [size // 8 if size >= 256 else size for size in (c, co)]
            small.append(ConvShape(1, *narrow, height, width, dilation, source))
    return tuple(small)
