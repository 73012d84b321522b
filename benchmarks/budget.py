"""How much time a run spends on each case, and what quick mode leaves out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, Protocol

import pytest

_LIMIT = 400.0  # seconds: a whole run on a GPU takes less than eight minutes
_QUICK_LIMIT = 420.0
_HEAD_START = 30.0  # what compiles or is slow may stand at the beginning
_LONG = 2.0  # seconds: of rounds that take longer there are fewer
_FEWEST = 3


class Shape(Protocol):
    """What `grid` asks of a shape."""

    @property
    def name(self) -> str: ...

    @property
    def quick(self) -> bool: ...


class Budget:
    """The limits of this run; conftest.py sets them from the options and the device.

    Attributes:
        quick: smaller pictures, few cases, few rounds.
        seconds: what the rounds of a case may take, its peers' included.
        rounds: the fewest and the most.
        slow: a peer whose call takes longer is timed once, not every round.
        limit: seconds that the whole run should take; where it is late, cases get few rounds.
        late: whether it is.
        patience: seconds left to spend on rounds that are thrown away because others ran.
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
        """Set all of them for a run."""
        self.quick, self.patience = quick, patience
        self.slow = 1.0 if cuda else 3.0 if quick else 10.0
        self.limit = (_LIMIT if cuda else math.inf) if not quick else _QUICK_LIMIT
        if cuda:
            self.seconds, self.rounds = (0.1, (3, 10)) if quick else (0.2, (5, 20))
        else:
            self.seconds, self.rounds = (0.5, (5, 30)) if quick else (15.0, (5, 30))

    def count(self, once: float) -> int:
        """How many rounds of `once` seconds each are taken."""
        least, most = self.rounds
        if self.late or once > _LONG:
            least = min(least, _FEWEST)
        seconds = 0.0 if self.late else self.seconds
        return min(most, max(least, int(seconds / max(once, 1e-9))))

    def start(self) -> None:
        """The run begins."""
        self._started = time.monotonic()

    def reached(self, share: float) -> None:
        """That share of the cases is done: notice when it took more than its share of the limit."""
        self.late = time.monotonic() - self._started > self.limit * share + _HEAD_START


budget = Budget()

#: Left out by quick mode.
full_only = pytest.mark.full


def each(shapes: Iterable[Shape]) -> pytest.MarkDecorator:
    """Parametrises `shape`; quick mode keeps those that say so."""
    return pytest.mark.parametrize("shape", [param(s, s.name, s.quick) for s in shapes])


def param(value: Any, name: str, quick: bool) -> Any:
    """A value, or a tuple of them, to parametrise by; quick mode keeps it only where told to."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, id=name, marks=() if quick else (full_only,))
