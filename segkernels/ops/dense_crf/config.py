"""What is no tensor of a mean field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from segkernels.ops.permutohedral import native as permutohedral
from segkernels.ops.permutohedral.native import Lattice, Normalization


class Config(NamedTuple):
    """How to run a mean field; see `segkernels.dense_crf`.

    Attributes:
        kind: what the scores are.
        normalization: of each term.
        iterations, log: as there.
        spatial: sizes of the grid that the points lie on.
        max_vertices: as there; not used through the dispatcher.
        lattices: of the terms, where they were built before; else each pass builds them.
    """

    kind: str
    normalization: tuple[Normalization, ...]
    iterations: int
    log: bool
    spatial: tuple[int, ...]
    max_vertices: int | None = None
    lattices: tuple[Lattice, ...] | None = None

    def on(self, features: Sequence[torch.Tensor]) -> Sequence[Lattice]:
        """The lattices of the terms."""
        if self.lattices is not None or not features:
            return self.lattices or ()
        plain = [f.detach().contiguous() for f in features]
        bound = self.max_vertices
        return permutohedral.build(plain, self.spatial, max_vertices=bound, op="dense_crf")


class Wanted(NamedTuple):
    """Which gradients of scores, features and compatibilities, in that order, are wanted."""

    needs: tuple[bool, ...]
    config: Config
