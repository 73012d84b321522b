"""Reports invalid values found inside kernels: NaN, labels or indices out of range.

There is one status word per kind of error. A native function sets `status[code] = 1` when it meets
such a value. On the CPU the words are read after each call, which raises at once. On CUDA they stay
in device memory, so that no call synchronises: `check()` reads them. With `SEGKERNELS_CHECK=1` in
the environment they are read after every call.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from segkernels import _native

FEATURES_NOT_FINITE, FEATURES_TOO_LARGE = 0, 1
SCORES_NOT_FINITE, PROBS_OUT_OF_RANGE = 3, 4
LABEL_OUT_OF_RANGE = 5
PROBS_CLIPPED = 8  # a warning
# In the order of enum StatusCode in csrc/common/status.h. A message begins "<function>: ".
_MESSAGES = (
    "features must be finite, got NaN or infinity (in the image or a sigma)",
    "features must have exact lattice coordinates in {dtype}, got values too large{largest} (a "
    "sigma too small for the image's size or intensities); use a larger sigma{wider}",
    "max_vertices must be at least the number of lattice vertices, got fewer; raise it or leave it "
    "out",
    "probs, logits or unary must be finite, got NaN or infinity",
    "probs must be from 0 to 1, got values outside",
    "labels or target must be from 0 to num_classes - 1 or ignore_index, got values outside",
    "indices must be inside the output plane, got values outside",
    "codes must be cells of the pooling window inside the output plane, got values outside",
    "probs must be from 0 to 1, got values outside, which are clipped",
)
# Frames that a warning skips.
_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__)

# Returns a message for the status codes that are set, or "" for the general one.
Describe = Callable[[Collection[int]], str]

_words: dict[torch.device, torch.Tensor] = {}
_local = threading.local()


class _DeviceMemory:
    """The status words at an address in CUDA memory, in a form that torch.as_tensor accepts."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (len(_MESSAGES),),
            "typestr": "<i4",
            "data": (address, False),
            "version": 3,
        }


def _device_words(device: torch.device) -> torch.Tensor:
    """Return the status words of a CUDA device, which are never freed.

    The native module allocates them. Words from torch's allocator would belong to a graph's memory
    pool if the first call is captured, and could not be cleared outside inference mode if the first
    call is made inside it.
    """
    if device not in _words:
        with torch.inference_mode(False):
            if _native.has_cuda():
                memory = _DeviceMemory(_native.C().status_words(device.index))
                _words[device] = torch.as_tensor(memory, device=device)
            else:
                _words[device] = torch.zeros(len(_MESSAGES), dtype=torch.int32, device=device)
    return _words[device]


class StatusError(ValueError):
    """An argument has an invalid value, found by a kernel."""


def _raise(
    words: list[int], op: str, dtype: torch.dtype | None, describe: Describe | None = None
) -> None:
    """Raise StatusError for the words that are set, at least one; warn if only warnings are."""
    codes = [code for code, word in enumerate(words) if word]
    errors = [code for code in codes if code != PROBS_CLIPPED]
    described = describe(errors or codes) if describe is not None else ""
    parts = [described] if described else [_text(code, dtype) for code in errors or codes]
    message = "; ".join(f"{op}: {part}" for part in parts)
    if errors:
        raise StatusError(message)
    warn(message)


def _text(code: int, dtype: torch.dtype | None, largest: str = "") -> str:
    name = str(dtype).removeprefix("torch.") if dtype is not None else "this dtype"
    wider = ", or float64 features" if dtype != torch.float64 else ""
    return _MESSAGES[code].format(dtype=name, wider=wider, largest=largest)


def describe_features(
    codes: Collection[int], features: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> str:
    """Say which of the features is not finite or too large, and where; "" if none is.

    Args:
        codes: status codes.
        features: by the names of the arguments.
        dtype: that they are converted to; None: they have it.
    """
    tensors = {name: t.detach().to(dtype or t.dtype) for name, t in features.items()}
    for name, tensor in tensors.items():
        invalid = ~torch.isfinite(tensor)
        if FEATURES_NOT_FINITE in codes and bool(invalid.any()):
            return f"{name} must be finite, got {first_invalid(tensor, invalid)}"
    if FEATURES_TOO_LARGE not in codes:
        return ""
    tensor = max(tensors.values(), key=lambda t: float(t.abs().amax()))
    largest = first_invalid(tensor, tensor.abs() == tensor.abs().amax()).partition(" (")[0]
    return _text(FEATURES_TOO_LARGE, tensor.dtype, f", up to {largest}")


def warn(message: str) -> None:
    """Warn at the line outside this package and torch that made the call."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextmanager
def describing(describe: Describe) -> Iterator[None]:
    """Let `describe` word what CPU calls of this thread find within the block.

    It reads the arguments again, so enter the block only if their values can be read.
    """
    outer, _local.describe = getattr(_local, "describe", None), describe
    try:
        yield
    finally:
        _local.describe = outer


def first_invalid(values: torch.Tensor, invalid: torch.Tensor) -> str:
    """Say which element of `values` is invalid: "1.2 at [0, 3, 17, 4] (and 211 more)"."""
    count = int(invalid.sum())
    index = np.unravel_index(int(invalid.flatten().to(torch.uint8).argmax()), invalid.shape)
    position = [int(i) for i in index]
    value = values[tuple(position)].item()
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if values.dim() == 0:
        return text
    return f"{text} at {position}" + (f" (and {count - 1} more)" if count > 1 else "")


@contextmanager
def watch(
    tensor: torch.Tensor,
    op: str,
    dtype: torch.dtype | None = None,
    describe: Describe | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the status words for one native call, then raise if the call has set one.

    Args:
        tensor: any tensor of the call; selects the device.
        op: name of the public function, with which the message begins.
        dtype: dtype that the native code computes in, for the messages that name it.
        describe: words the message, after the function's name: which value is invalid, and where.
            Called only to raise, because it reads the argument again. None: of `describing`.

    Raises:
        StatusError: an argument has an invalid value. Raised on the CPU, and on CUDA with
            SEGKERNELS_CHECK=1 outside graph capture.
    """
    if not _native.on_cuda(tensor.device):
        words = torch.zeros(len(_MESSAGES), dtype=torch.int32, device=tensor.device)
        yield words
        values = words.tolist()
        if any(values):
            _raise(values, op, dtype, describe or getattr(_local, "describe", None))
        return
    yield _device_words(tensor.device)
    if os.environ.get("SEGKERNELS_CHECK") == "1" and not _native.capturing(tensor.device):
        _raise_and_clear(tensor.device, op, dtype, describe)


def raise_if_set(words: list[int], op: str) -> None:
    """Raise StatusError for the status words that a native CPU call returned; [] if none is set."""
    if words:
        _raise(words, op, None)


def _raise_and_clear(
    device: torch.device,
    op: str,
    dtype: torch.dtype | None = None,
    describe: Describe | None = None,
) -> None:
    words = _words[device]
    values = words.tolist()
    if any(values):
        words.zero_()
        _raise(values, op, dtype, describe)


def check(device: torch.device | str | int | None = None) -> None:
    """Raise if a kernel has found invalid values in its arguments on CUDA since the last check.

    On CUDA an invalid value (NaN or infinity where values must be finite, a label or an index out
    of range) does not raise and costs no synchronisation: the element is treated as the function's
    documentation states, and a status word is set in device memory. This function reads the words,
    so it synchronises. `SEGKERNELS_CHECK=1` in the environment checks after every call, to find the
    call with the invalid value. On the CPU every function raises at once.

    Args:
        device: a CUDA device; default every device that has been used.

    Raises:
        ValueError: invalid values were found. The words of that device are cleared.
    """
    if device is None:
        devices = list(_words)
    else:
        requested = (
            torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        )
        if requested.type != "cuda":
            return
        index = requested.index if requested.index is not None else torch.cuda.current_device()
        requested = torch.device("cuda", index)
        devices = [requested] if requested in _words else []
    for used in devices:
        torch.cuda.synchronize(used)
        _raise_and_clear(used, "segkernels")
