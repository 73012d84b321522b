"""What is no tensor of a mean field."""

from __future__ import annotations

from dataclasses import dataclass

from segkernels.ops.permutohedral.lattice import Normalization


@dataclass(frozen=True)
class Config:
    """The kind of scores, and of each term its normalisation; see `segkernels.dense_crf`."""

    kind: str
    normalization: tuple[Normalization, ...]
    iterations: int
    log: bool
    spatial: tuple[int, ...]
    max_vertices: int | None = None
