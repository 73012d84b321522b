"""The models by name: their builders, `create_model`, `from_pretrained` and their figures."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec

from segkernels.models import _pretrained, _weights
from segkernels.models._base import SegmentationModel

P = ParamSpec("P")
Builder = Callable[..., SegmentationModel]


@dataclass(frozen=True)
class Spec:
    """The figures of one model with 21 classes and 3 channels: a row of `segkernels models`.

    Attributes:
        name: the name that `create_model` takes.
        paper: authors and year.
        parameters: the number of learned parameters.
        output_stride: height of the input over height of the encoder's last feature map.
        size: height and width of the image that `flops` is counted for.
        flops: operations of the convolutions for one image; a multiply-add counts as two.
        ops: the segkernels operators that the model calls, including those of `predict` and `loss`.
    """

    name: str
    paper: str
    parameters: int
    output_stride: int
    size: int
    flops: int
    ops: tuple[str, ...]


# The order is that of the papers and of the imports in __init__.py.
_models: dict[str, tuple[Spec, Builder]] = {}


class Architecture(Generic[P]):
    """A model class, and what its variants have in common.

    Args:
        model: the class.
        paper: authors and year.
        output_stride: see `Spec`.
        ops: the segkernels operators that the class calls, without those of the base class.
    """

    def __init__(
        self,
        model: Callable[P, SegmentationModel],
        paper: str,
        output_stride: int,
        ops: tuple[str, ...],
    ) -> None:
        self.model: Builder = model
        self.paper = paper
        self.output_stride = output_stride
        self.ops = tuple(sorted({*ops, "upsample_argmax", "upsample_cross_entropy"}))

    def variant(
        self,
        *,
        parameters: int,
        flops: int,
        size: int = 513,
        defaults: Mapping[str, Any] | None = None,
        **fixed: Any,
    ) -> Callable[[Callable[[], None]], Callable[P, SegmentationModel]]:
        """Turn the decorated function, a name and a docstring, into the builder of a model.

        The builder takes the arguments of the class without `fixed`.

        Args:
            parameters: see `Spec`.
            flops: see `Spec`.
            size: see `Spec`.
            defaults: arguments of the class that have another default in this variant.
            fixed: arguments of the class that this variant sets.
        """

        def decorate(described: Callable[[], None]) -> Callable[P, SegmentationModel]:
            name, signature = described.__name__, _signature(self.model, fixed, defaults or {})

            @functools.wraps(described)
            def build(*args: P.args, **kwargs: P.kwargs) -> SegmentationModel:
                try:
                    given = signature.bind(*args, **kwargs)
                except TypeError as error:
                    raise TypeError(f"{name}() {error}") from None
                given.apply_defaults()
                width = given.arguments.get("width", 1.0)
                if not 0 < width < float("inf"):
                    raise ValueError(f"{name}: width must be positive and finite, got {width!r}")
                model = self.model(*given.args, **given.kwargs, **fixed)
                model.name = name
                model.arguments = dict(given.arguments)
                return model

            annotations = {key: p.annotation for key, p in signature.parameters.items()}
            build.__annotations__ = {**annotations, "return": SegmentationModel}
            build.__dict__["__signature__"] = signature
            build.__doc__ = (
                f"{described.__doc__} {parameters:,} parameters.\n\n"
                f"See `{self.model.__name__}` for the arguments and the sizes that fit."
            )
            spec = Spec(name, self.paper, parameters, self.output_stride, size, flops, self.ops)
            _models[name] = (spec, build)
            return build

        return decorate


def _signature(
    model: Builder, fixed: Mapping[str, Any], defaults: Mapping[str, Any]
) -> inspect.Signature:
    """The signature of the class without `fixed`, and with `defaults`."""
    signature = inspect.signature(model)
    parameters = dict(signature.parameters)
    for name in fixed:
        del parameters[name]
    for name, value in defaults.items():
        parameters[name] = parameters[name].replace(default=value)
    return signature.replace(
        parameters=list(parameters.values()), return_annotation=SegmentationModel.__name__
    )


def specs() -> list[Spec]:
    """The figures of every model, in the order of the papers."""
    return [spec for spec, _ in _models.values()]


def list_models() -> list[str]:
    """The names that `create_model` takes, in the order of the papers."""
    return list(_models)


def builder(name: str) -> Builder:
    """The function that builds the model with this name.

    Raises:
        ValueError: an unknown name; the message has the nearest ones.
    """
    if name not in _models:
        near = difflib.get_close_matches(str(name), _models, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_models)}"
        raise ValueError(f"there is no model named {name!r}; {hint}")
    return _models[name][1]


def create_model(
    name: str, *args: Any, weights: str | Path | None = None, **kwargs: Any
) -> SegmentationModel:
    """Build a model by its name: ``create_model("fcn8s", num_classes=11)`` is ``fcn8s(11)``.

    The model is in training mode, also with `weights`.

    Args:
        name: see `list_models`.
        args, kwargs: the arguments of the model.
        weights: a file to load: ``.safetensors``, a folder that `save_pretrained` wrote (only its
            weights are read), or a file of `torch.save` (read with ``weights_only=True``). It holds
            a state dict with the names of the model, which for `fcn_resnet*` and
            `deeplab_v3_resnet*` are those of torchvision's segmentation models, or one that
            `load_backbone` takes. It may be the entry "model", "state_dict", "model_state" or
            "model_state_dict" of a checkpoint, and all names may begin with "module.", "model." or
            "_orig_mod.". Values are converted to the dtypes of the model.

    Returns:
        The model. Its ``weights_report`` says what was loaded, which tensors the file lacks and
        which are left over (None without weights). The logger "segkernels" gets it at level INFO,
        and it is a UserWarning if anything is missing or left over.

    Raises:
        ValueError: an unknown name; the message has the nearest ones. The weights are no state dict
            of tensors, none fits, or one has another shape, or integers in place of floats. Also
            what the model raises.
        FileNotFoundError: there are no such weights.
        RuntimeError: the file is damaged.
        ImportError: safetensors is needed and not installed.
    """
    try:
        build = builder(name)
    except ValueError as error:
        raise ValueError(f"create_model: {error}") from None
    if weights is not None and not isinstance(weights, (str, Path)):
        raise TypeError(f"create_model: weights must be a path, got {type(weights).__name__}")
    model = build(*args, **kwargs)
    if weights is not None:
        report = _weights.load_file(model, Path(weights))
        logging.getLogger("segkernels").info("%s", report)
        if report.missing or report.left_over:
            warnings.warn(str(report), stacklevel=2)
    return model


def from_pretrained(folder: str | Path, **arguments: Any) -> SegmentationModel:
    """Load a model that `save_pretrained` wrote: in eval mode, on the CPU, in the saved dtypes.

    Folders of others are safe to load: nothing in them is executed, and no tensor is allocated
    before names, shapes and dtypes are checked.

    Args:
        folder: a local folder with config.json and model.safetensors.
        arguments: replace the saved arguments of the model, for example ``backend="torch"``. A
            ``crf`` keeps its own values.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        ValueError: config.json is not what `save_pretrained` writes, or needs a newer segkernels;
            or the model refuses its arguments.
        TypeError: the model does not have one of `arguments`.
        RuntimeError: model.safetensors is damaged, or the weights do not fit: names, shapes, or
            integers in place of floats.
    """
    return _pretrained.load(Path(folder), arguments)
