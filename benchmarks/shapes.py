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
