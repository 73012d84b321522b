"""The list of models: what `create_model` builds and `segkernels models` prints."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

from segkernels.models._base import SegmentationModel

P = ParamSpec("P")


@dataclass(frozen=True)
class Spec:
    """One model.

    Attributes:
        name: of the model, and of the function that builds it.
        build: that function.
        paper: authors and year.
        output_stride: pixels of the input to one of the encoder's last map.
        ops: segkernels' operators that it runs through, labels and loss included.
    """

    name: str
    build: Callable[..., SegmentationModel]
    paper: str
    output_stride: int
    ops: tuple[str, ...]


_specs: dict[str, Spec] = {}


def register(
    paper: str, output_stride: int, ops: tuple[str, ...]
) -> Callable[[Callable[P, SegmentationModel]], Callable[P, SegmentationModel]]:
    """List the function below as a model; what it builds knows its name and arguments."""

    def wrap(build: Callable[P, SegmentationModel]) -> Callable[P, SegmentationModel]:
        name = build.__name__

        @functools.wraps(build)
        def named(*args: P.args, **kwargs: P.kwargs) -> SegmentationModel:
            model = build(*args, **kwargs)
            given = inspect.signature(build).bind(*args, **kwargs)
            given.apply_defaults()
            model.name = name
            model.arguments = dict(given.arguments)
            return model

        tail = ("upsample_argmax", "upsample_cross_entropy")
        _specs[name] = Spec(name, named, paper, output_stride, tuple(sorted({*ops, *tail})))
        return named

    return wrap


def specs() -> list[Spec]:
    """Every model, in the order of the papers."""
    return list(_specs.values())


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(_specs)


def create_model(name: str, *args: Any, **kwargs: Any) -> SegmentationModel:
    """Build a model by its name: ``create_model("fcn8s", num_classes=11)`` is ``fcn8s(11)``.

    Raises:
        ValueError: an unknown name (with the nearest ones), and what the model itself raises.
    """
    spec = _specs.get(name)
    if spec is None:
        near = difflib.get_close_matches(str(name), _specs, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_specs)}"
        raise ValueError(f"create_model: there is no model named {name!r}; {hint}")
    return spec.build(*args, **kwargs)
