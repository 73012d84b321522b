"""Argument checks shared by the operators.

In every check `function` is the name of the public function, for the error message.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy.typing as npt
import torch

from segkernels import _native
from segkernels.ops import _dtypes
from segkernels.ops._operator import is_eager

Int2 = tuple[int, int]


def check_tensor(value: Any, name: str, function: str) -> None:
    """Raise TypeError, with torch's message, unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value)}")


def check_floating(tensor: torch.Tensor, name: str, function: str) -> None:
    """Raise TypeError unless native functions support the dtype of `tensor`."""
    if tensor.dtype not in _dtypes.FLOATING:
        raise TypeError(
            f"{function}: {name} must be one of {', '.join(_dtypes.names())}, got {tensor.dtype}"
        )


def is_supported(tensor: torch.Tensor) -> bool:
    """Whether the operators support the dtype and device of `tensor`.

    Drop-in functions call torch's own function for other tensors.
    """
    return tensor.dtype in _dtypes.FLOATING and (tensor.is_cpu or tensor.is_cuda or tensor.is_meta)


def check_device(tensor: torch.Tensor) -> None:
    """Raise RuntimeError if a kernel would read `tensor` and no kernel runs on its device.

    Call it before any torch operator: in a forked child it limits torch to one thread.
    """
    if is_eager(tensor) and not tensor.is_meta:
        _native.where(tensor)


def check_choice(value: Any, name: str, choices: Collection[Any], function: str) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"{function}: {name} must be one of {names}, got {value!r}")


def check_same_device(
    tensor: torch.Tensor, name: str, device: torch.device, owner: str, function: str
) -> None:
    """Raise ValueError unless `tensor` is on `device`.

    `owner` names in the message what else is on that device, with its verb, such as "input is".
    """
    if tensor.device != device:
        raise ValueError(f"{function}: {name} must be on {device}, as {owner}, got {tensor.device}")


def check_vector(
    vector: torch.Tensor | None, name: str, size: int, like: torch.Tensor, function: str
) -> None:
    """Raise ValueError unless `vector` is None or [size] on the device of the input `like`.

    Its dtype must be that of `like` or the dtype that `like` is computed in.
    """
    if vector is not None:
        dtypes = {like.dtype, _dtypes.compute_dtype(like.dtype)}
        check_like(vector, name, (size,), dtypes, like, function)


def check_like(
    tensor: torch.Tensor,
    name: str,
    shape: Sequence[int],
    dtypes: set[torch.dtype],
    like: torch.Tensor,
    function: str,
) -> None:
    """Raise ValueError unless `tensor` has `shape`, one of `dtypes` and the device of `like`."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{function}: {name} must have shape {list(shape)}, got {list(tensor.shape)}"
        )
    check_dtype_and_device(tensor, name, dtypes, like, function)


def check_dtype_and_device(
    tensor: torch.Tensor,
    name: str,
    dtypes: set[torch.dtype],
    like: torch.Tensor,
    function: str,
) -> None:
    """Raise ValueError unless `tensor` has one of `dtypes` and the device of the input `like`."""
    if tensor.dtype not in dtypes:
        names = " or ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{function}: {name} must be {names}, got {tensor.dtype}")
    check_same_device(tensor, name, like.device, "input is", function)


def from_numpy(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor: of its memory, or of a copy where torch cannot share it.

    torch takes native byte order, strides that are positive multiples of the element (also along
    axes of length 1), and writeable memory (without a warning).
    """
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    strides = all(s >= 0 and s % native.itemsize == 0 for s in native.strides)
    if not (strides and native.flags.writeable):
        native = native.copy()
    return torch.from_numpy(native)


def matches(tensor: torch.Tensor | npt.NDArray[Any], shape: Sequence[int]) -> bool:
    """Whether `tensor` has the sizes of `shape` [B, C, *spatial], except for the channels C."""
    sizes = (tensor.shape[0], *tensor.shape[2:]) if tensor.ndim else ()
    return tensor.ndim == len(shape) and sizes == (shape[0], *shape[2:])


def check_matches(
    tensor: torch.Tensor, name: str, shape: Sequence[int], other: str, function: str
) -> None:
    """Raise ValueError unless `tensor` matches `shape`, that of the argument named `other`.

    The numbers of channels (dimension 1) may differ.
    """
    if not matches(tensor, shape):
        raise ValueError(
            f"{function}: {name} must match the {other} {tuple(shape)} in all dimensions but the "
            f"second, got shape {tuple(tensor.shape)}"
        )


def is_int(value: Any) -> bool:
    """Whether `value` is an int or a torch.SymInt; False for a bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def pair_or_none(
    value: Any, is_element: Callable[[Any], bool] = is_int, lengths: tuple[int, ...] = (1, 2)
) -> Any:
    """Return `value` as a pair (rows, columns), or None if it is not a number or sequence of them.

    Args:
        value: a number for both, or a sequence of numbers.
        is_element: whether its argument is a number of the right type.
        lengths: allowed lengths of a sequence.
    """
    if is_element(value):
        return value, value
    if isinstance(value, Sequence) and len(value) in lengths and all(map(is_element, value)):
        return value[0], value[-1]
    return None


def pair(value: Any, name: str, function: str) -> Int2:
    """Return `value` as a pair of ints (rows, columns).

    Args:
        value: one int for both, or a tuple or list of one or two ints.
        name: name of the argument, for messages.
        function: name of the public function, for messages.

    Raises:
        TypeError: an element is not an int.
        RuntimeError: `value` has neither one nor two elements (the exception type of torch).
    """
    if type(value) is int:
        return value, value
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(values) <= 2:
        raise RuntimeError(
            f"{function}: {name} must either be a single int, or a tuple of two ints, got {value}"
        )
    ints = []
    for element in values:
        try:
            if isinstance(element, bool):
                raise TypeError
            ints.append(operator.index(element))
        except TypeError:
            raise TypeError(
                f"{function}(): argument '{name}' must be an int or a tuple of two ints, "
                f"got {value!r}"
            ) from None
    return ints[0], ints[-1]


def autocast(*tensors: Any) -> list[Any]:
    """Cast the arguments of a convolution as autocast does; unchanged when autocast is off.

    Floating tensors other than float64 are cast to autocast's dtype for the device of the first
    argument. Other values are returned unchanged.
    """
    first = tensors[0]
    device = first.device.type if isinstance(first, torch.Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    ]
