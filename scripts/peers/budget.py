"""Minutes of the processor in place of steps: how long a peer trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from medssl.runs import write_json


class Budget:
    """Minutes of this process's processor, from now on.

    What runs beside takes none of them. For a process of one thread on a core of its own they are
    minutes of the clock.

    Args:
        minutes: How many there are.
        clock: Returns the seconds of the processor so far.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.process_time) -> None:
        self.minutes = minutes
        self._clock = clock
        self._started = clock()

    @property
    def spent(self) -> float:
        """The minutes so far."""
        return (self._clock() - self._started) / 60

    @property
    def progress(self) -> float:
        """The fraction of the minutes that is spent; 1 is the end."""
        return min(1.0, self.spent / self.minutes)


def write_spent(folder: Path, steps: int, minutes: float) -> None:
    """Write steps and minutes, which says that a training is finished."""
    write_json(folder / "spent.json", {"steps": steps, "minutes": round(minutes, 2)})
