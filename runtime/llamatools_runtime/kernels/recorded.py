"""One token after the other does the same to other numbers: what the first made the team do is done again at once.

Between two products of matrices Python needs as long as the products of a small matrix, while the other threads wait.
A token's jobs, the order they are done in and the memory they use are therefore kept, and for the next token all of
them are done by a single call of compiled code. Only what differs is put in place before: the inputs, and the position,
which kernels look up in the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from numpy.typing import NDArray

from llamatools.dtypes import Floats

from .job import N_FIELDS
from .team import team


class Recorded:
    """What function(*inputs) made the team do. It may do nothing with numbers that it does not have done by the team.

    result: what it returned. is_whole: whether all that it did was recorded, so that it can be done again.
    """

    def __init__(self, function: Callable[..., Floats], *inputs: NDArray[Any]) -> None:
        self.is_whole = True
        self._jobs, self._stages = array("q"), array("q")
        self._inputs = [x.copy() for x in inputs]
        self._memory: list[object] = []
        token = _recording.set(self)
        try:
            self.result = function(*self._inputs)
        finally:
            _recording.reset(token)

    def again(self, *inputs: NDArray[Any]) -> Floats:
        """The function of other inputs, of the same shapes."""
        for own, x in zip(self._inputs, inputs, strict=True):
            own[...] = x
        team().run_stages(self._jobs, self._stages)
        return self.result.copy()

    def give_up(self) -> None:
        self.is_whole = False
        self._memory.clear()

    def add(self, jobs: Sequence[int], n_first: int, memory: tuple[object, ...]) -> None:
        if not self.is_whole:
            return
        self._jobs.extend(jobs)
        self._stages.extend((n_first, len(jobs) // N_FIELDS - n_first))
        self._memory.append(memory)


_recording: ContextVar[Recorded | None] = ContextVar("recording", default=None)


def record(jobs: Sequence[int], memory: tuple[object, ...], n_first: int = 0) -> None:
    """Says what the team is about to do, each job N_FIELDS integers, and which memory it does it in.

    The first n_first jobs are done before the others begin.
    """
    recorded = _recording.get()
    if recorded is not None:
        recorded.add(jobs, n_first, memory)


def cannot_record() -> None:
    """Says that something is done which is not the team's work, or in memory that will not be the same again."""
    recorded = _recording.get()
    if recorded is not None:
        recorded.give_up()
