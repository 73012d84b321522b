"""Kernels for semantic segmentation in PyTorch: CUDA, Triton and CPU."""

from segkernels._version import __version__ as __version__
