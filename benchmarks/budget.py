"""The time budget of each case, and the selection of cases for quick mode."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, Protocol

import pytest

_LIMIT = 400.0  # seconds: a full run on a GPU takes less than eight minutes
_QUICK_LIMIT = 420.0
_HEAD_START = 30.0  # seconds: the first cases may be slow or compile
_LONG = 2.0  # seconds: if a round takes longer, fewer rounds run
_FEWEST = 3


class Shape(Protocol):
    """The attributes of a shape that `each` uses."""

    @property
    def name(self) -> str: ...

    @property
    def quick(self) -> bool: ...


class Budget:
    """The limits of this run. conftest.py sets them from the options and the device.

    Attributes:
        quick: whether the run is in quick mode: smaller images, fewer cases, fewer rounds.
        seconds: time for the rounds of a case, peers included.
        rounds: minimum and maximum number of rounds.
        slow: seconds; a peer whose call takes longer is timed once instead of in every round.
        limit: target of the total time in seconds; a late run measures few rounds per case.
        late: whether the run is late.
        patience: seconds left for repeating rounds that other processes disturbed.
    """

    def __init__(self) -> None:
        self.quick = False
        self.seconds = 15.0
        self.rounds = (3, 30)
        self.patience = 0.0
        self.slow = 10.0
        self.limit = math.inf
        self.late = False
        self._started = time.monotonic()

    def choose(self, quick: bool, cuda: bool, patience: float) -> None:
        """Set the limits of a run."""
        self.quick, self.patience = quick, patience
        self.slow = 1.0 if cuda else 3.0 if quick else 10.0
        self.limit = (_LIMIT if cuda else math.inf) if not quick else _QUICK_LIMIT
        if cuda:
            self.seconds, self.rounds = (0.1, (3, 10)) if quick else (0.2, (5, 20))
        else:
            self.seconds, self.rounds = (0.5, (5, 30)) if quick else (15.0, (5, 30))

    def count(self, once: float) -> int:
        """Number of rounds, if one round takes `once` seconds."""
        least, most = self.rounds
        if self.late or once > _LONG:
            least = min(least, _FEWEST)
        seconds = 0.0 if self.late else self.seconds
        return min(most, max(least, int(seconds / max(once, 1e-9))))

    def start(self) -> None:
        """Start the clock of the run."""
        self._started = time.monotonic()

    def reached(self, share: float) -> None:
        """Update `late` when a share of the cases is done, from its share of the time limit."""
        self.late = time.monotonic() - self._started > self.limit * share + _HEAD_START


budget = Budget()

#: Mark of a case that quick mode skips.
full_only = pytest.mark.full


def each(shapes: Iterable[Shape]) -> pytest.MarkDecorator:
    """Parametrise `shape`; quick mode runs the shapes with `quick` set."""
    return pytest.mark.parametrize("shape", [param(s, s.name, s.quick) for s in shapes])


def param(value: Any, name: str, quick: bool) -> Any:
    """`pytest.param` of a value, or of a tuple of values; quick mode runs it only if `quick`."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, id=name, marks=() if quick else (full_only,))
