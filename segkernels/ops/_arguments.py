"""Checks of arguments that operators share. `function` is the public function, for messages."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch

from segkernels import _native
from segkernels.ops import _dtypes
from segkernels.ops._operator import is_eager

Int2 = tuple[int, int]


def check_tensor(value: Any, name: str, function: str) -> None:
    """Raise TypeError, in torch's words, unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value)}")


def check_floating(tensor: torch.Tensor, name: str, function: str) -> None:
    """Raise TypeError unless `tensor` has a dtype that native functions take."""
    if tensor.dtype not in _dtypes.FLOATING:
        raise TypeError(
            f"{function}: {name} must be one of {', '.join(_dtypes.names())}, got {tensor.dtype}"
        )


def is_taken(tensor: torch.Tensor) -> bool:
    """Whether the operators take a tensor's dtype and device; torch's take the others."""
    return tensor.dtype in _dtypes.FLOATING and (tensor.is_cpu or tensor.is_cuda or tensor.is_meta)


def check_device(tensor: torch.Tensor) -> None:
    """Raise RuntimeError when a kernel is to read `tensor` and cannot run on its device.

    A forked child is limited to one thread by this: it comes before torch's operators.
    """
    if is_eager(tensor) and not tensor.is_meta:
        _native.where(tensor)


def check_choice(value: Any, name: str, choices: Collection[Any], function: str) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"{function}: {name} must be one of {names}, got {value!r}")


def check_same_device(
    tensor: torch.Tensor, name: str, device: torch.device, of: str, function: str
) -> None:
    """Raise ValueError unless `tensor` is on the device that `of` tells of ("input is")."""
    if tensor.device != device:
        raise ValueError(f"{function}: {name} must be on {device}, as {of}, got {tensor.device}")


def check_vector(
    vector: torch.Tensor | None, name: str, size: int, like: torch.Tensor, function: str
) -> None:
    """Raise ValueError unless `vector`, where there is one, is a [size] of the input `like`."""
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
    """Raise ValueError unless `tensor` has the shape, a dtype and the device of the input."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{function}: {name} must have shape {list(shape)}, got {list(tensor.shape)}"
        )
    check_kind(tensor, name, dtypes, like, function)


def check_kind(
    tensor: torch.Tensor,
    name: str,
    dtypes: set[torch.dtype],
    like: torch.Tensor,
    function: str,
) -> None:
    """Raise ValueError unless `tensor` has one of the dtypes and the device of the input."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{function}: {name} must be {wanted}, got {tensor.dtype}")
    check_same_device(tensor, name, like.device, "input is", function)


def matches(tensor: torch.Tensor, shape: Sequence[int]) -> bool:
    """Whether `tensor` has the sizes of a [B, n, *spatial], but for the channels n."""
    sizes = (tensor.shape[0], *tensor.shape[2:]) if tensor.dim() else ()
    return tensor.dim() == len(shape) and sizes == (shape[0], *shape[2:])


def check_matches(
    tensor: torch.Tensor, name: str, shape: Sequence[int], of: str, function: str
) -> None:
    """Raise ValueError unless `tensor` has the sizes of what is named `of`, but for channels."""
    if not matches(tensor, shape):
        raise ValueError(
            f"{function}: {name} must match the {of} {tuple(shape)} in all dimensions but the "
            f"second, got shape {tuple(tensor.shape)}"
        )


def is_int(value: Any) -> bool:
    """Whether `value` is an int, or one of tracing."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def pair_of(value: Any, kinds: Any = is_int, lengths: tuple[int, ...] = (1, 2)) -> Any:
    """`value` for rows and columns: one number for both, or a sequence; else None."""
    if kinds(value):
        return value, value
    if isinstance(value, Sequence) and len(value) in lengths and all(map(kinds, value)):
        return value[0], value[-1]
    return None


def pair(value: Any, name: str, function: str) -> Int2:
    """`value` for rows and columns: one int for both, or one or two in a sequence.

    Raises:
        TypeError: not ints.
        RuntimeError: another number of them (torch's kind of error).
    """
    if type(value) is int:
        return value, value
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(values) <= 2:
        raise RuntimeError(
            f"{function}: {name} must either be a single int, or a tuple of two ints, got {value}"
        )
    found = []
    for one in values:
        try:
            if isinstance(one, bool):
                raise TypeError
            found.append(operator.index(one))
        except TypeError:
            raise TypeError(
                f"{function}(): argument '{name}' must be an int or a tuple of two ints, "
                f"got {value!r}"
            ) from None
    return found[0], found[-1]


def autocast(*tensors: Any) -> list[Any]:
    """What autocast hands to a convolution: floating tensors in its dtype, but for float64."""
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
