"""The threads that multiply: a team that shares rows among its members, and sleeps when there is nothing to do.

A model asks for some hundred products per token, each of which takes a tenth of a millisecond, so that handing work
over must take microseconds. Waking a thread, or passing Python's lock on, takes tens. A member of the team therefore
stays in compiled code, without Python's lock, watches a counter for new work, and only after it has found none for half
a millisecond goes back to Python and sleeps, until the next product wakes it. Nobody waits for one to wake: the thread
that asks works, too, and whoever comes late finds less to do, or nothing.

Rows are taken in chunks, each member's from a share of its own, then from the others' (chunks.py). Which thread
computes a chunk makes no difference to the result.
"""

from __future__ import annotations

import atexit
import os
from array import array
from collections.abc import Sequence
from functools import cache
from threading import Event, Lock, Thread

import numpy as np

from llamatools.dtypes.compiled import Kernel

from .job import N_FIELDS

# The state that chunks.py works on, int64. Each number has a cache line of its own, from SHARES on one for each member.
UNFINISHED, TOTAL, JOBS, N_MEMBERS, SHARES = 0, 8, 16, 24, 32


@cache
def kernel(name: str) -> Kernel:
    """The kernel "module.function" of this package, whose arguments are integers."""
    module, function = name.split(".")
    return Kernel(f"{__package__}.{module}", function)


class Team:
    """n_threads that work at the same time, the calling one among them."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._state = np.zeros(SHARES + 8 * n_threads, np.int64)
        self._state[N_MEMBERS] = n_threads
        self._address = int(self._state.ctypes.data)
        self._one_at_a_time = Lock()
        self._do_stages = kernel("chunks.do_stages").of_integers(4)
        self._closed = False
        self._awake = [Event() for _ in range(n_threads - 1)]
        self._threads = [
            Thread(target=self._serve, args=(event, member), daemon=True)
            for member, event in enumerate(self._awake, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, jobs: Sequence[int], n_first: int = 0) -> None:
        """Does all rows of all jobs, each N_FIELDS integers; the first n_first jobs before the others begin."""
        self.run_stages(array("q", jobs), array("q", [n_first, len(jobs) // N_FIELDS - n_first]))

    def run_stages(self, jobs: array[int], stages: array[int]) -> None:
        """As many jobs as each stage says, all of them before those of the next stage begin."""
        with self._one_at_a_time:
            for event in self._awake:
                if not event.is_set():
                    event.set()
            self._do_stages(self._address, jobs.buffer_info()[0], stages.buffer_info()[0], len(stages))

    def close(self) -> None:
        """Ends the threads."""
        self._closed = True
        for event in self._awake:
            event.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, awake: Event, member: int) -> None:
        while not self._closed:
            awake.wait()
            kernel("chunks.work_until_idle")(self._address, member)
            awake.clear()


_team: Team | None = None


def team(n_threads: int | None = None) -> Team:
    """The process's team: of n_threads if that is given, else what it was, at first a thread per processor."""
    global _team
    if _team is None or n_threads not in (None, _team.n_threads):
        close()
        _team = Team(n_threads or _n_processors())
    return _team


@atexit.register
def close() -> None:
    """Ends the process's team; the next product makes a new one."""
    global _team
    if _team is not None:
        _team.close()
        _team = None


def _n_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
