"""Kernels for semantic segmentation in PyTorch: CUDA, Triton and CPU."""

from segkernels._status import check as check
from segkernels._version import __version__ as __version__
from segkernels.crf import DenseCRF as DenseCRF
from segkernels.crf import PairwiseTerm as PairwiseTerm
from segkernels.crf import dense_crf as dense_crf
from segkernels.labels import probs_from_labels as probs_from_labels
from segkernels.ops.permutohedral import PermutohedralLattice as PermutohedralLattice
from segkernels.ops.permutohedral import permutohedral_filter as permutohedral_filter
