"""Faults that only the values show (NaN, an index out of range), told by status words.

A native function sets `status[code] = 1` where it meets such a value. On the CPU the words are read
after the call and raise at once. On CUDA they stay on the device, so that nothing synchronises:
`check()` reads them, and `SEGKERNELS_CHECK=1` in the environment reads them after every call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from segkernels import _native

# In the order of enum StatusCode in csrc/common/status.h.
_MESSAGES = (
    "features: expected finite numbers, got NaN or infinity (in the image or a sigma)",
    "features: too large for exact lattice coordinates in {dtype} (a sigma too small for the "
    "image's size or intensities); use a larger sigma{wider}",
    "max_vertices: the lattice has more vertices than that; raise it or leave it out",
    "probs, logits or unary: expected finite numbers, got NaN or infinity",
    "probs: expected values from 0 to 1, got some outside",
    "labels or target: expected 0 to num_classes - 1 or ignore_index, got some outside",
    "indices: expected indices inside the output plane, got some outside",
    "codes: expected codes inside the pooling window, got some outside",
)

_words: dict[torch.device, torch.Tensor] = {}


class _DeviceMemory:
    """Words at an address of a CUDA device, as torch.as_tensor takes them."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (len(_MESSAGES),),
            "typestr": "<i4",
            "data": (address, False),
            "version": 3,
        }


def _device_words(device: torch.device) -> torch.Tensor:
    """The status words of a CUDA device, which live as long as the process.

    They are the native module's: words from torch's allocator would, where the first call is
    captured, be a graph's, and where it is in inference mode, could not be cleared outside.
    """
    if device not in _words:
        with torch.inference_mode(False):
            if _native.has_cuda():
                _words[device] = _words_at(_native.C().status_words(device.index), device)
            else:
                _words[device] = torch.zeros(len(_MESSAGES), dtype=torch.int32, device=device)
    return _words[device]


def _words_at(address: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_DeviceMemory(address), device=device)


class StatusError(ValueError):
    """A fault in the values of an argument, found by a kernel."""


def _text(words: list[int], op: str, dtype: torch.dtype | None) -> str:
    name = str(dtype).removeprefix("torch.") if dtype is not None else "this dtype"
    wider = ", or float64 features" if dtype != torch.float64 else ""
    found = [m.format(dtype=name, wider=wider) for m, w in zip(_MESSAGES, words, strict=True) if w]
    return "; ".join(f"{op}: {message}" for message in found)


@contextmanager
def watch(
    tensor: torch.Tensor, op: str, dtype: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """Status words for one native call on `tensor`'s device; raises at the end what it reported.

    Args:
        tensor: any tensor of the call, for its device.
        op: the public function's name, which begins the message.
        dtype: the dtype that the native code computes in, where a message names it.

    Raises:
        StatusError: on the CPU, or on CUDA under SEGKERNELS_CHECK=1: a value was at fault.
    """
    if not _native.on_cuda(tensor.device):
        words = torch.zeros(len(_MESSAGES), dtype=torch.int32, device=tensor.device)
        yield words
        found = words.tolist()
        if any(found):
            raise StatusError(_text(found, op, dtype))
        return
    yield _device_words(tensor.device)
    if os.environ.get("SEGKERNELS_CHECK") == "1" and not _native.capturing(tensor.device):
        _raise(tensor.device, op, dtype)


def raise_found(words: list[int], op: str) -> None:
    """Raise what a native call on the CPU returned as its status words; none if all is well."""
    if words:
        raise StatusError(_text(words, op, None))


def _raise(device: torch.device, op: str, dtype: torch.dtype | None = None) -> None:
    words = _words[device]
    found = words.tolist()
    if any(found):
        words.zero_()
        raise StatusError(_text(found, op, dtype))


def check(device: torch.device | str | int | None = None) -> None:
    """Raise what kernels found wrong in the values of their arguments on CUDA since the last check.

    On CUDA a bad value (NaN where numbers must be finite, a label or an index out of range) stops
    nothing and costs no synchronisation: the element is treated as its function documents and a
    word on the device is set. This reads the words, so it synchronises. `SEGKERNELS_CHECK=1` in the
    environment does it after every call, to find the one at fault. On the CPU functions raise at
    once.

    Args:
        device: one CUDA device; default all that were used.

    Raises:
        ValueError: what was found; the words are cleared.
    """
    if device is None:
        devices = list(_words)
    else:
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if wanted.type != "cuda":
            return
        index = wanted.index if wanted.index is not None else torch.cuda.current_device()
        wanted = torch.device("cuda", index)
        devices = [wanted] if wanted in _words else []
    for found in devices:
        torch.cuda.synchronize(found)
        _raise(found, "segkernels")
