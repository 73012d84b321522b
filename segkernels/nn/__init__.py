"""Modules that use the operators, with the arguments of their torch.nn counterparts."""

from segkernels.nn.aspp import ASPP as ASPP
from segkernels.nn.context import ContextModule as ContextModule
from segkernels.nn.convolution import ConvBNAct as ConvBNAct
from segkernels.nn.convolution import DilatedConv2d as DilatedConv2d
from segkernels.nn.convolution import conv_bn_act as conv_bn_act
from segkernels.nn.dense_crf import DenseCRF as DenseCRF
from segkernels.nn.folding import fold_batch_norm as fold_batch_norm
from segkernels.nn.pooling import MaxPool2d as MaxPool2d
from segkernels.nn.pooling import MaxUnpool2d as MaxUnpool2d
from segkernels.nn.upsampling import ResizeConv as ResizeConv
from segkernels.nn.upsampling import Upsample as Upsample
from segkernels.nn.upsampling import bilinear_kernel_ as bilinear_kernel_
