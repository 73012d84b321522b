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
