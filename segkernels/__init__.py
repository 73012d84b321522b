"""Kernels for semantic segmentation in PyTorch: CUDA, Triton and CPU."""

from segkernels._status import check as check
from segkernels._version import __version__ as __version__
from segkernels.nn import ASPP as ASPP
from segkernels.nn import ContextModule as ContextModule
from segkernels.nn import ConvBNAct as ConvBNAct
from segkernels.nn import DenseCRF as DenseCRF
from segkernels.nn import DilatedConv2d as DilatedConv2d
from segkernels.nn import MaxPool2d as MaxPool2d
from segkernels.nn import MaxUnpool2d as MaxUnpool2d
from segkernels.nn import ResizeConv as ResizeConv
from segkernels.nn import Upsample as Upsample
from segkernels.nn import bilinear_kernel_ as bilinear_kernel_
from segkernels.nn import conv_bn_act as conv_bn_act
from segkernels.nn import fold_batch_norm as fold_batch_norm
from segkernels.ops.aspp import aspp as aspp
from segkernels.ops.dense_crf import PairwiseTerm as PairwiseTerm
from segkernels.ops.dense_crf import dense_crf as dense_crf
from segkernels.ops.dense_crf import probs_from_labels as probs_from_labels
from segkernels.ops.dilated_conv2d import dilated_conv2d as dilated_conv2d
from segkernels.ops.gaussian_filter import gaussian_filter as gaussian_filter
from segkernels.ops.interpolate import interpolate as interpolate
from segkernels.ops.max_pool2d import max_pool2d as max_pool2d
from segkernels.ops.max_unpool2d import max_unpool2d as max_unpool2d
from segkernels.ops.permutohedral import PermutohedralLattice as PermutohedralLattice
from segkernels.ops.permutohedral import permutohedral_filter as permutohedral_filter
from segkernels.ops.unpool2d import unpool_bed_of_nails as unpool_bed_of_nails
from segkernels.ops.unpool2d import unpool_nearest as unpool_nearest
from segkernels.ops.upsample_argmax import upsample_argmax as upsample_argmax
from segkernels.ops.upsample_cross_entropy import (
    upsample_binary_cross_entropy as upsample_binary_cross_entropy,
)
from segkernels.ops.upsample_cross_entropy import upsample_cross_entropy as upsample_cross_entropy
