"""The models by name: their builders, `create_model`, `from_pretrained` and their figures."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec

from segkernels.models import _pretrained
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


def create_model(name: str, *args: Any, **kwargs: Any) -> SegmentationModel:
    """Build a model by its name: ``create_model("fcn8s", num_classes=11)`` is ``fcn8s(11)``.

    Raises:
        ValueError: an unknown name; the message has the nearest ones. Also what the model raises.
    """
    if name not in _models:
        near = difflib.get_close_matches(str(name), _models, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_models)}"
        raise ValueError(f"create_model: there is no model named {name!r}; {hint}")
    return _models[name][1](*args, **kwargs)


def from_pretrained(folder: str | Path, **arguments: Any) -> SegmentationModel:
    """Load a model that `save_pretrained` wrote: in eval mode, on the CPU.

    Args:
        folder: a local folder with config.json and model.safetensors.
        arguments: replace the saved arguments of the model, for example ``backend="torch"``.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        ValueError: config.json has another format, or names an unknown model.
        RuntimeError: the weights do not fit; the message lists the keys.
    """
    name, saved, state = _pretrained.load(Path(folder))
    model = create_model(name, **{**saved, **arguments})
    model.load_state_dict(state)
    return model.eval()
