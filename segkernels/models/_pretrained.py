"""Models in folders: config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from segkernels._version import __version__
from segkernels.models._base import SegmentationModel
from segkernels.models._registry import create_model
from segkernels.nn import DenseCRF

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_INSTALL = "pip install safetensors, or pip install 'segkernels[models]'"


def save(model: SegmentationModel, folder: str | Path) -> None:
    """See `SegmentationModel.save_pretrained`."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"save_pretrained needs safetensors: {_INSTALL}") from error
    arguments = dict(model.arguments)
    if isinstance(arguments.get("crf"), DenseCRF):
        arguments["crf"] = _crf_config(arguments["crf"])
    config = {"model": model.name, "arguments": arguments, "segkernels": __version__}
    text = json.dumps(config, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(text, encoding="utf-8")


def from_pretrained(folder: str | Path, **arguments: Any) -> SegmentationModel:
    """The model that `save_pretrained` wrote to a local folder, in eval mode, on the CPU.

    Args:
        folder: with config.json and model.safetensors.
        arguments: take the place of those that it was built with, such as ``backend="torch"``.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        ValueError: a config.json that is none of ours, or an unknown model.
        RuntimeError: weights that do not fit: the message lists the keys.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"from_pretrained needs safetensors: {_INSTALL}") from error
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"from_pretrained: {folder} has no {name}; it must be a folder that "
                "save_pretrained wrote"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name, given = config["model"], {**config["arguments"], **arguments}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"from_pretrained: {folder / CONFIG} must hold a model and its arguments, as "
            f"save_pretrained writes them ({error!r})"
        ) from error
    if isinstance(given.get("crf"), dict):
        given["crf"] = _crf_from(given["crf"])
    model = create_model(name, **given)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


_SIGMAS = ("sxy_gaussian", "sxy_bilateral", "srgb")
_COMPATS = ("compat_gaussian", "compat_bilateral")


def _crf_config(crf: DenseCRF) -> dict[str, Any]:
    """The constructor's arguments, with the shapes of compatibilities: values are in the state."""
    compats = {name: getattr(crf, name) for name in _COMPATS}
    return {
        "num_classes": crf.num_classes,
        "iterations": crf.iterations,
        "normalization": crf.normalization,
        "learn_compat": any(isinstance(c, torch.nn.Parameter) for c in compats.values()),
        "learn_sigmas": crf.srgb_log_scale is not None,
        **{name: getattr(crf, f"{name}_start").tolist() for name in _SIGMAS},
        **{name: None if c is None else list(c.shape) for name, c in compats.items()},
    }


def _crf_from(config: dict[str, Any]) -> DenseCRF:
    arguments = dict(config)
    for name in _COMPATS:
        shape = arguments[name]
        arguments[name] = None if shape is None else torch.zeros(shape)
    return DenseCRF(arguments.pop("num_classes"), **arguments)
