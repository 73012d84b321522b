"""State dicts: read them from files, check them, load them into a model, and report."""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from segkernels.models._base import SegmentationModel

State = Mapping[str, torch.Tensor]
SAFETENSORS = "model.safetensors"  # the weights in a folder that `save_pretrained` wrote
_INSTALL = "pip install safetensors, or pip install 'segkernels[models]'"
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Entries of a checkpoint that hold the state dict.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
# What DistributedDataParallel, Lightning and torch.compile put before the names.
_PREFIXES = ("module.", "model.", "_orig_mod.")


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were loaded into a model.

    Attributes:
        model: name of the model.
        path: the file or folder; "" if `load_backbone` got a state dict.
        kind: "model" if the names were those of the model, "backbone" if `load_backbone` loaded
            them.
        loaded: names in the model of the tensors that were loaded.
        missing: names in the model of the others, which keep their initial values. BatchNorm's
            counters are left out: old files lack them, and only a BatchNorm without momentum reads
            them.
        left_over: names in the file of the tensors that were not used.
    """

    model: str
    path: str
    kind: Literal["model", "backbone"]
    loaded: list[str]
    missing: list[str]
    left_over: list[str]

    def __str__(self) -> str:
        """The numbers of tensors, and a few names."""
        text = f"{self.model}: loaded {len(self.loaded)} tensors"
        text += " of the backbone" if self.kind == "backbone" else ""
        text += f" from {self.path}" if self.path else ""
        for what, names in (("missing", self.missing), ("left over", self.left_over)):
            if names:
                text += f"; {what}: {len(names)} ({some(names, 4, ', ')})"
        return text


def some(items: Collection[str], most: int = 8, separator: str = "; ") -> str:
    """The first items, and how many more there are."""
    shown = separator.join(list(items)[:most])
    more = len(items) - most
    return f"{shown}{separator}and {more} more" if more > 0 else shown


def misfits(own: State, given: State) -> list[str]:
    """The tensors that both have, with another shape, or with integers in place of floats."""
    problems = []
    for key, mine in own.items():
        theirs = given.get(key)
        if theirs is None:
            continue
        if theirs.shape != mine.shape:
            problems.append(f"{key} is {tuple(theirs.shape)}, not {tuple(mine.shape)}")
        elif theirs.dtype != mine.dtype and not {theirs.dtype, mine.dtype} <= _FLOATS:
            problems.append(f"{key} is {theirs.dtype}, not {mine.dtype}")
    return problems


def differences(own: State, given: State) -> list[str]:
    """`misfits`, and the tensors that only one of both has."""
    return [
        *(f"missing {key}" for key in own if key not in given),
        *(f"unknown {key}" for key in given if key not in own),
        *misfits(own, given),
    ]


def is_counter(key: str) -> bool:
    """Whether this is a counter that only a BatchNorm without momentum needs."""
    return key.endswith("num_batches_tracked")


def load_parts(
    model: SegmentationModel, state: State, parts: Iterable[str], left_over: Iterable[str] = ()
) -> None:
    """Load `state` into some submodules of a model; after an error the model is unchanged.

    Args:
        model: to load into; its ``weights_report`` says what was loaded.
        state: with the keys of the model.
        parts: names of the submodules.
        left_over: names of tensors that the caller has left out of `state`, for the report.

    Raises:
        ValueError: keys are missing or unknown, or tensors have another shape or integers.
    """
    prefixes, own = tuple(f"{part}." for part in parts), model.state_dict()
    inside = {key: value for key, value in own.items() if key.startswith(prefixes)}
    needed = {key: v for key, v in inside.items() if key in state or not is_counter(key)}
    problems = differences(needed, state)
    if problems:
        raise ValueError(f"{model.name}: the state dict does not fit: {some(problems)}")
    _load(model, "", "backbone", own, state, list(left_over))


def load_file(model: SegmentationModel, path: Path) -> LoadReport:
    """Load a file into a model; see `create_model`."""
    from segkernels.models._base import SegmentationModel  # which imports this file

    what = f"{model.name}: {path}"
    state, own = plain(_read(path), what), model.state_dict()
    has_loader = type(model).load_backbone is not SegmentationModel.load_backbone
    if has_loader and any(key.startswith(("features.", "layer1.")) for key in state):
        try:
            model.load_backbone(state)
        except ValueError as error:
            raise ValueError(f"{error} ({path})") from error
        found = model.weights_report
        assert found is not None
        return _keep(model, str(path), "backbone", found.loaded, found.missing, found.left_over)
    fitting = {key: value for key, value in state.items() if key in own}
    if not fitting:
        raise ValueError(
            f"{what} has no tensor of the model; it has {some(state, 4, ', ')}, and the model "
            f"{some(own, 4, ', ')}"
        )
    problems = misfits(own, fitting)
    if problems:
        classes = _classes(model, own, fitting)
        if classes is None:
            raise ValueError(f"{what} does not fit: {some(problems)}")
        message = (
            f"{what} has {classes} classes, got num_classes={model.num_classes}; pass "
            f"num_classes={classes}"
        )
        if has_loader:
            file = str(_weights_file(path))
            read = f"torch.load({file!r}, 'cpu', weights_only=True)"
            if file.endswith(".safetensors"):
                read = f"safetensors.torch.load_file({file!r})"
            message += f", or build the model without weights and call model.load_backbone({read})"
        raise ValueError(message)
    return _load(model, str(path), "model", own, fitting, [k for k in state if k not in own])


def _load(
    model: SegmentationModel,
    path: str,
    kind: Literal["model", "backbone"],
    own: State,
    state: State,
    left_over: list[str],
) -> LoadReport:
    """Load checked tensors and keep the report."""
    model.load_state_dict(dict(state), strict=False)
    missing = [key for key in own if key not in state and not is_counter(key)]
    return _keep(model, path, kind, [key for key in own if key in state], missing, left_over)


def _keep(model: SegmentationModel, *fields: Any) -> LoadReport:
    report = LoadReport(model.name, *fields)
    model.weights_report = report
    return report


def _classes(model: SegmentationModel, own: State, state: State) -> int | None:
    """The number of classes with which `state` would fit, or None."""
    from segkernels.models._registry import create_model  # which imports this file

    # A number of classes in place of the model's, in any of the shapes that differ.
    candidates = {
        theirs
        for key, value in state.items()
        for mine, theirs in zip(own[key].shape, value.shape, strict=False)
        if mine == model.num_classes != theirs
    }
    for classes in sorted(candidates):
        arguments = {**model.arguments, "num_classes": classes}
        if "crf" in arguments:
            arguments["crf"] = None
        with contextlib.suppress(ValueError), torch.device("meta"):
            if not misfits(create_model(model.name, **arguments).state_dict(), state):
                return classes
    return None


def plain(given: Any, what: str) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, without the prefixes of wrappers.

    Args:
        given: a state dict, or a dict that has one as "model", "state_dict", "model_state" or
            "model_state_dict".
        what: begins the error message.

    Raises:
        ValueError: there is no state dict of tensors on the CPU or a GPU.
    """
    if isinstance(given, Mapping):
        inner = (given[key] for key in _WRAPPERS if isinstance(given.get(key), Mapping))
        given = next(inner, given)
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must hold a state dict, got {type(given).__name__}")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{what} must map names to tensors, got {type(value).__name__} for {key!r}"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{what} must hold plain tensors, got {key} without plain values")
    state = dict(given)
    if not state:
        raise ValueError(f"{what} must hold a state dict, got an empty one")
    while True:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items()}


def _weights_file(path: Path) -> Path:
    return path / SAFETENSORS if path.is_dir() else path


def _read(path: Path) -> Any:
    """What is in a file of weights, or in the file of weights of a folder."""
    file = _weights_file(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"create_model: weights must be a file, or a folder that save_pretrained wrote; there "
            f"is no {file}"
        )
    if file.suffix == ".safetensors":
        return read_safetensors(file, "create_model")
    try:
        # Files that torch wrote before version 1.6 are no zip files and cannot be mapped.
        mmap = zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = re.search("(?:WeightsUnpickler error:|Trying to load) (.*)", str(error))
        raise ValueError(
            f"create_model: {file} must hold a state dict of tensors: torch.load with "
            f"weights_only=True refuses it ({reason[1] if reason else error})"
        ) from error
    except Exception as error:  # damaged files raise many types
        raise RuntimeError(f"create_model: torch.load cannot read {file}: {error}") from error


def read_header(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes in a safetensors file, as meta tensors; reads no values.

    Raises:
        ImportError: safetensors is not installed.
        RuntimeError: the file is damaged, or has a dtype that torch's layers do not take.
    """
    found = {}
    with _opened(path, what) as file:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            entry = file.get_slice(key)
            dtype = entry.get_dtype()
            if dtype not in _DTYPES:
                raise RuntimeError(f"{key} has the unsupported dtype {dtype}")
            found[key] = torch.empty(entry.get_shape(), dtype=_DTYPES[dtype], device="meta")
    return found


def read_safetensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file; errors as in `read_header`."""
    with _opened(path, what) as file:
        # clone: in the file, tensors are not aligned for vector instructions.
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise needs_safetensors(what) from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except Exception as error:  # damaged files raise many types
        raise RuntimeError(f"{what}: {path} cannot be read as safetensors: {error}") from error


def needs_safetensors(what: str) -> ImportError:
    """The error without the package."""
    return ImportError(f"{what} needs safetensors: {_INSTALL}")
