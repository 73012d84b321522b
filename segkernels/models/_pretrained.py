"""The files of `save_pretrained`: config.json and model.safetensors."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from segkernels._version import __version__
from segkernels.models import _weights
from segkernels.nn import DenseCRF

if TYPE_CHECKING:
    from segkernels.models._base import SegmentationModel

CONFIG, WEIGHTS = "config.json", _weights.SAFETENSORS
# Format 1 has no "format", no "changed", and no "method" of the CRF.
FORMAT = 2
_CONFIG_BYTES = 2**20
_SIGMAS = ("sxy_gaussian", "sxy_bilateral", "srgb")
_COMPATS = ("compat_gaussian", "compat_bilateral")
_LARGEST = sys.float_info.max
# Attributes of layers that are saved if they were changed, with their largest values.
_OPTIONS = {"aux_weight": _LARGEST, "eps": _LARGEST, "momentum": 1.0, "p": 1.0}
# Attributes that do not decide the result in a new process.
_IGNORED = {"arguments", "backend", "inplace", "op_backend", "training", "weights_report"}


def save(model: SegmentationModel, folder: Path) -> None:
    """Write config.json and model.safetensors; see `SegmentationModel.save_pretrained`."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise _weights.needs_safetensors("save_pretrained") from error
    try:
        state = model.state_dict()
        config = _config(model, state)
    except ValueError as error:
        raise ValueError(
            f"save_pretrained: {model.name} cannot be saved: {error}; save its state_dict() instead"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".save-") as name:
        new = Path(name)
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        (new / CONFIG).write_text(text, encoding="utf-8")
        save_file(_separate(state), new / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(new / CONFIG, new / WEIGHTS)  # safetensors' file is for the owner only
        # An interruption must not leave the old configuration beside new weights.
        (folder / CONFIG).unlink(missing_ok=True)
        os.replace(new / WEIGHTS, folder / WEIGHTS)
        os.replace(new / CONFIG, folder / CONFIG)


def load(folder: Path, replaced: Mapping[str, Any]) -> SegmentationModel:
    """Build a model from a folder; see `segkernels.models.from_pretrained`."""
    what = "from_pretrained"
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{what}: {folder} has no {name}; it must be a folder that save_pretrained wrote"
            )
    path = folder / CONFIG
    try:
        config = _read_config(path)
        builder = _builder(config.get("model"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{what}: {path} must be a config.json that save_pretrained wrote: {error}"
        ) from error
    try:
        inspect.signature(builder).bind_partial(**replaced)
    except TypeError as error:
        raise TypeError(f"{what}: {config['model']}() {error}") from None
    found = _weights.read_header(folder / WEIGHTS, what)
    try:
        model = _build(config, replaced, len(found))
    except Exception as error:  # torch's layers raise many types for wrong numbers
        with_replaced = f" and {', '.join(replaced)}" if replaced else ""
        raise ValueError(f"{what}: {path}{with_replaced}: {error}") from error
    own = model.state_dict()
    if "crf" in replaced:  # it keeps its values
        own, found = (
            {key: value for key, value in state.items() if not key.startswith("crf.")}
            for state in (own, found)
        )
    problems = _weights.differences(own, found)
    if problems:
        raise RuntimeError(
            f"{what}: {folder / WEIGHTS} does not fit {model.name}: {_weights.some(problems)}"
        )
    state = _weights.read_safetensors(folder / WEIGHTS, what)
    model.load_state_dict({key: state[key] for key in found}, strict=False, assign=True)
    return model.eval()


def _builder(name: Any) -> Callable[..., SegmentationModel]:
    from segkernels.models._registry import builder  # which imports this file

    if not isinstance(name, str):
        raise ValueError(f"model must be a string, got {name!r:.60}")
    return builder(name)


def _config(model: SegmentationModel, state: _weights.State) -> dict[str, Any]:
    """The arguments with which the model is built again, and what was changed since.

    Raises:
        ValueError: the model is not what `_build` makes of this.
    """
    if not model.arguments:
        raise ValueError("it was not built by create_model or a function of segkernels.models")
    arguments = dict(model.arguments)
    if "crf" in arguments:
        arguments |= {"crf": model.crf, "train_crf": bool(model.train_crf)}
    if "aux_loss" in arguments:
        arguments["aux_loss"] = model.aux_classifier is not None
    rates = {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)}
    if "dropout" in arguments and len(rates) == 1:
        arguments["dropout"] = rates.pop()
    config = {
        "format": FORMAT,
        "model": model.name,
        "arguments": {
            key: _crf_config(value) if isinstance(value, DenseCRF) else _plain(value, key)
            for key, value in arguments.items()
        },
        "segkernels": __version__,
    }
    try:
        twin = _build(config, {}, len(state))
    except (TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    changed = _changes(model, twin)
    problems = _weights.differences(twin.state_dict(), state)
    if problems:
        raise ValueError(
            f"its tensors are not those of {model.name} with its arguments: "
            f"{_weights.some(problems)}"
        )
    not_there = [key for key, value in state.items() if value.is_meta]
    if not_there:
        raise ValueError(f"it has tensors without values, on the meta device: {not_there[0]}")
    _change(twin, changed)
    return {**config, "changed": changed}


def _separate(state: _weights.State) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous, and without shared memory, as safetensors needs them."""
    tensors, used = {}, set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in used:
            tensor = tensor.clone()
        used.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _plain(value: Any, name: str) -> Any:
    """A value as JSON can hold it: numbers of numpy and torch as Python's, tuples as lists."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name} must be a number, a string or a sequence, got {type(value).__name__}")


def _read_config(path: Path) -> dict[str, Any]:
    """Parse config.json and check its format, without the arguments."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    if path.stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"it must have at most {_CONFIG_BYTES} bytes")
    config = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    if not isinstance(config, dict):
        raise ValueError(f"it must hold a model and its arguments, got {config!r:.60}")
    version = config.get("format", 1)
    if not _is(version, int) or version < 1:
        raise ValueError(f"format must be a positive int, got {version!r:.60}")
    if version > FORMAT:
        raise ValueError(
            f"its format is {version}, and segkernels {__version__} reads up to {FORMAT}: update "
            "segkernels"
        )
    return config


def _build(config: Mapping[str, Any], replaced: Mapping[str, Any], tensors: int) -> Any:
    """Build the model of a config on the meta device, with `replaced` in place of some arguments.

    `tensors` is the number of saved tensors. A model cannot have more blocks.
    """
    builder = _builder(config.get("model"))
    defaults = {key: p.default for key, p in inspect.signature(builder).parameters.items()}
    kinds = {key: "crf" if default is None else type(default) for key, default in defaults.items()}
    arguments = _checked(config.get("arguments"), "arguments", kinds)
    for key, value in arguments.items():
        if isinstance(value, list) and key not in replaced and sum(value) > tensors:
            raise ValueError(f"{key} is {value!r:.60}, more than the {tensors} saved tensors")
    with torch.device("meta"):
        if isinstance(arguments.get("crf"), dict):
            old = {"method": "lattice"} if config.get("format", 1) == 1 else {}
            arguments["crf"] = _crf_from({**old, **arguments["crf"]})
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        model = builder(**{**tuples, **replaced})
    _change(model, config.get("changed", {}))
    return model


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "an int",
    float: "a number",
    str: "a string",
    tuple: "a list of positive ints",
    "crf": "null, or the arguments of a DenseCRF",
    "shape": "null, or a shape as a list",
    "numbers": "a list of numbers",
    "option": "null, or a number",
}


def _is(value: Any, kind: Any) -> bool:
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind == "crf":
        return value is None or isinstance(value, dict)
    if value is None and kind in ("shape", "option"):
        return True
    if kind == "numbers":
        return isinstance(value, list) and bool(value) and all(_is(item, float) for item in value)
    if kind in (tuple, "shape"):
        return isinstance(value, list) and all(_is(item, int) and item > 0 for item in value)
    numbers = int if kind is int else (int, float)
    return isinstance(value, numbers) and not isinstance(value, bool)


def _checked(given: Any, what: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A dict whose keys and types of values are those of `kinds`."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be an object, got {given!r:.60}")
    for key, value in given.items():
        if key not in kinds:
            raise ValueError(f"{what} must be among {', '.join(kinds)}, got {key!r:.60}")
        if not _is(value, kinds[key]):
            raise ValueError(f"{key} must be {_KINDS[kinds[key]]}, got {value!r:.60}")
    return dict(given)


def _crf_config(crf: DenseCRF) -> dict[str, Any]:
    """The arguments of a `DenseCRF`, with the shapes of the compatibilities.

    The state dict has the values of the compatibilities.
    """
    compats = {name: getattr(crf, name) for name in _COMPATS}
    return {
        "num_classes": crf.num_classes,
        "iterations": _plain(crf.iterations, "iterations"),
        "normalization": crf.normalization,
        "method": crf.method,
        "learn_compat": any(isinstance(c, torch.nn.Parameter) for c in compats.values()),
        "learn_sigmas": crf.srgb_log_scale is not None,
        **{name: getattr(crf, f"{name}_start").tolist() for name in _SIGMAS},
        **{name: None if c is None else list(c.shape) for name, c in compats.items()},
    }


_CRF_KINDS: dict[str, Any] = {
    "num_classes": int,
    "iterations": int,
    "normalization": str,
    "method": str,
    "learn_compat": bool,
    "learn_sigmas": bool,
    **dict.fromkeys(_SIGMAS, "numbers"),
    **dict.fromkeys(_COMPATS, "shape"),
}


def _crf_from(config: Any) -> DenseCRF:
    arguments = _checked(config, "crf", _CRF_KINDS)
    missing = [name for name in _CRF_KINDS if name not in arguments]
    if missing:
        raise ValueError(f"crf must have {', '.join(missing)}")
    for name in _COMPATS:
        shape = arguments[name]
        arguments[name] = None if shape is None else torch.empty(shape)
    return DenseCRF(arguments.pop("num_classes"), **arguments)


def _changes(model: SegmentationModel, twin: SegmentationModel) -> dict[str, dict[str, Any]]:
    """The attributes of each submodule that differ from those of a new model.

    Raises:
        ValueError: a difference that `_change` cannot make.
    """
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, twin))
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            raise ValueError(f"the module {name} was {'added' if name in ours else 'removed'}")
    changes: dict[str, dict[str, Any]] = {}
    for name, module in ours.items():
        other = theirs[name]
        synced = type(module) is torch.nn.SyncBatchNorm and type(other) is torch.nn.BatchNorm2d
        if type(module) is not type(other) and not synced:
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, not a {type(other).__name__}"
            )
        for key, value in vars(module).items():
            expected = getattr(other, key, NotImplemented)
            if (
                key.startswith("_")
                or key in _IGNORED
                or not isinstance(expected, (bool, int, float, str, tuple, list, type(None)))
                or _plain(value, f"{name}.{key}") == _plain(expected, key)
            ):
                continue
            if key not in _OPTIONS:
                raise ValueError(f"{name}.{key} is {value!r}, not {expected!r}")
            changes.setdefault(name, {})[key] = _plain(value, key)
    return changes


def _change(model: SegmentationModel, changes: Any) -> None:
    """Set the attributes that `_changes` has found."""
    if not isinstance(changes, dict):
        raise ValueError(f"changed must be an object, got {changes!r:.60}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, options in changes.items():
        if name not in modules:
            raise ValueError(f"changed must have modules of {model.name}, got {name!r:.60}")
        kinds = {key: "option" for key in _OPTIONS if hasattr(modules[name], key)}
        for key, value in _checked(options, f"changed {name}", kinds).items():
            # Without a momentum, BatchNorm averages over all batches.
            if key != "momentum" if value is None else not 0 <= value <= _OPTIONS[key]:
                raise ValueError(f"{name}.{key} must be from 0 to {_OPTIONS[key]}, got {value!r}")
            setattr(modules[name], key, value)
