"""The compiled half of the team (team.py): how work is handed over, and how chunks of it are taken.

REMAINING counts the chunks that nobody has taken yet, and whoever counts it down has one, UNFINISHED those that are not
computed. Only when that is zero are new jobs put there, so a thread that has a chunk may rely on all of the state; one
that comes late finds nothing to take.
"""

from __future__ import annotations

from typing import Any

from llamatools.dtypes.simd import I64x16, array_at, inlined, kernel
from llamatools.dtypes.simd.atomics import atomic_add, atomic_load, atomic_store, call_kernel, give_way, pause

from .job import FUNCTION, GRAIN, N_CHUNKS, N_FIELDS, N_ROWS

# The state, int64. Each number has a cache line of its own.
REMAINING, UNFINISHED, TOTAL, JOBS = 0, 8, 16, 24  # STATE_SIZE in team.py has room for them

IDLE = 40_000  # looks at the state before a thread that finds nothing to do gives up: about half a millisecond
PATIENCE = 2_000  # looks before a thread that waits for others lets them have its processor


@kernel
def do_stages(state: int, jobs: int, stages: int, n_stages: int) -> None:
    """Does the jobs at the address `jobs`, together with whoever works on the state at that address.

    As many of them as the first of n_stages says are done before those of the next begin, which need their results.
    """
    shared, n_jobs = array_at(I64x16, state), array_at(I64x16, stages)
    for stage in range(n_stages):
        if n_jobs[stage] > 0:
            _do_together(shared, jobs, n_jobs[stage])
            jobs += 8 * N_FIELDS * n_jobs[stage]


@inlined
def _do_together(shared: Any, jobs: int, n_jobs: int) -> None:
    all_fields, total = array_at(I64x16, jobs), 0
    for job in range(0, n_jobs * N_FIELDS, N_FIELDS):
        n_chunks = (all_fields[job + N_ROWS] + all_fields[job + GRAIN] - 1) // all_fields[job + GRAIN]
        all_fields[job + N_CHUNKS] = n_chunks
        total += n_chunks
    shared[JOBS] = jobs
    shared[TOTAL] = total
    shared[UNFINISHED] = total
    atomic_store(shared, REMAINING, total)
    _take_chunks(shared)
    looks = 0
    while atomic_load(shared, UNFINISHED) > 0:
        looks += 1
        if looks < PATIENCE:
            pause()
        else:
            give_way()


@kernel
def work_until_idle(state: int) -> None:
    """Takes part in all jobs until there is none for a while."""
    shared = array_at(I64x16, state)
    looks = 0
    while looks < IDLE:
        if atomic_load(shared, REMAINING) > 0:
            _take_chunks(shared)
            looks = 0
        looks += 1
        pause()


@inlined
def _take_chunks(shared: Any) -> None:
    """Computes chunks until there are no more to take."""
    while True:
        remaining = atomic_add(shared, REMAINING, -1)
        if remaining <= 0:
            return
        chunk, job = shared[TOTAL] - remaining, shared[JOBS]
        fields = array_at(I64x16, job)
        while chunk >= fields[N_CHUNKS]:
            chunk -= fields[N_CHUNKS]
            job += 8 * N_FIELDS
            fields = array_at(I64x16, job)
        start = chunk * fields[GRAIN]
        call_kernel(fields[FUNCTION], job, start, min(start + fields[GRAIN], fields[N_ROWS]))
        atomic_add(shared, UNFINISHED, -1)
