"""Modules over the operators, with the arguments of torch.nn's."""

from segkernels.nn.pooling import MaxPool2d as MaxPool2d
from segkernels.nn.pooling import MaxUnpool2d as MaxUnpool2d
from segkernels.nn.upsampling import ResizeConv as ResizeConv
from segkernels.nn.upsampling import Upsample as Upsample
from segkernels.nn.upsampling import bilinear_kernel_ as bilinear_kernel_
