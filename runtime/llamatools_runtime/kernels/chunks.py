"""The compiled half of the team (team.py): how work is handed over, and how chunks of it are taken.

Each member has a share of the chunks, one after the other, so that what it asks memory for ahead of a chunk's end is
the next that it takes; when it is through it takes from the others' shares. A share counts the chunks in it that nobody
has taken yet, and whoever counts it down has one; UNFINISHED counts those that are not computed. Only when that is zero
are new jobs put there, so a thread that has a chunk may rely on all of the state; one that comes late finds nothing to
take.
"""

from __future__ import annotations

from typing import Any

from llamatools.dtypes.simd import I64x16, array_at, inlined, kernel
from llamatools.dtypes.simd.atomics import atomic_add, atomic_load, atomic_store, call_kernel, give_way, pause

from .job import FUNCTION, GRAIN, N_CHUNKS, N_FIELDS, N_ROWS
from .team import JOBS, N_MEMBERS, SHARES, TOTAL, UNFINISHED

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
    for member in range(shared[N_MEMBERS]):
        atomic_store(shared, SHARES + 8 * member, _first(shared, member + 1) - _first(shared, member))
    _take_chunks(shared, 0)
    looks = 0
    while atomic_load(shared, UNFINISHED) > 0:
        looks += 1
        if looks < PATIENCE:
            pause()
        else:
            give_way()


@kernel
def work_until_idle(state: int, member: int) -> None:
    """Takes part in all jobs until there is none for a while."""
    shared = array_at(I64x16, state)
    looks = 0
    while looks < IDLE:
        if atomic_load(shared, UNFINISHED) > 0 and _take_chunks(shared, member) > 0:
            looks = 0
        looks += 1
        pause()


@inlined
def _take_chunks(shared: Any, me: int) -> Any:
    """Computes chunks until there are no more to take, its own first. How many it computed."""
    n_taken, n_members = 0, shared[N_MEMBERS]
    for k in range(n_members):
        member = (me + k) % n_members
        while atomic_load(shared, SHARES + 8 * member) > 0:
            remaining = atomic_add(shared, SHARES + 8 * member, -1)
            if remaining > 0:
                _compute(shared, _first(shared, member + 1) - remaining)
                n_taken += 1
    if n_taken > 0:
        atomic_add(shared, UNFINISHED, -n_taken)
    return n_taken


@inlined
def _first(shared: Any, member: int) -> Any:
    """The first chunk of the member's share, which begins where that of the one before ends."""
    return shared[TOTAL] * member // shared[N_MEMBERS]


@inlined
def _compute(shared: Any, chunk: int) -> None:
    job = shared[JOBS]
    fields = array_at(I64x16, job)
    while chunk >= fields[N_CHUNKS]:
        chunk -= fields[N_CHUNKS]
        job += 8 * N_FIELDS
        fields = array_at(I64x16, job)
    start = chunk * fields[GRAIN]
    call_kernel(fields[FUNCTION], job, start, min(start + fields[GRAIN], fields[N_ROWS]))
