"""The files of `save_pretrained`: config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from segkernels._version import __version__
from segkernels.nn import DenseCRF

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_INSTALL = "pip install safetensors, or pip install 'segkernels[models]'"
_SIGMAS = ("sxy_gaussian", "sxy_bilateral", "srgb")
_COMPATS = ("compat_gaussian", "compat_bilateral")


def save(
    folder: Path, name: str, arguments: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    """Write the name and the arguments of a model to config.json, `state` to model.safetensors.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"save_pretrained needs safetensors: {_INSTALL}") from error
    written = {k: _crf_config(v) if isinstance(v, DenseCRF) else v for k, v in arguments.items()}
    config = {"model": name, "arguments": written, "segkernels": __version__}
    text = json.dumps(config, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(text, encoding="utf-8")


def load(folder: Path) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """Read what `save` wrote: name, arguments and state dict.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `from_pretrained`.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"from_pretrained needs safetensors: {_INSTALL}") from error
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"from_pretrained: {folder} has no {name}; it must be a folder that "
                "save_pretrained wrote"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model, arguments = config["model"], {**config["arguments"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"from_pretrained: {folder / CONFIG} must hold a model and its arguments, as "
            f"save_pretrained writes them ({error!r})"
        ) from error
    if isinstance(arguments.get("crf"), dict):
        arguments["crf"] = _crf_from(arguments["crf"])
    return model, arguments, load_file(folder / WEIGHTS)


def _crf_config(crf: DenseCRF) -> dict[str, Any]:
    """The arguments of a `DenseCRF`, with the shapes of the compatibilities.

    The state dict has the values of the compatibilities.
    """
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


def _crf_from(config: Mapping[str, Any]) -> DenseCRF:
    arguments = dict(config)
    for name in _COMPATS:
        shape = arguments[name]
        arguments[name] = None if shape is None else torch.zeros(shape)
    return DenseCRF(arguments.pop("num_classes"), **arguments)
