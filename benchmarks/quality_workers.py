"""Runs the cases of `bench_quality.py` here, or in several processes that may share a GPU.

    jobs (model, case) --queue--> worker: its own copy of the model --queue--> records, as they come

A worker whose case fails says so and goes on. At the deadline the workers are ended; whatever was
given back by then is kept.
"""

from __future__ import annotations

import multiprocessing
import queue
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Record = dict[str, Any]
Job = tuple[str, Any]
"""A model's folder, and a case of it; None is the dense model."""
_POLL = 0.5
"""Seconds after which the deadline, and whether the workers live, are looked at again."""


def measure(benches: dict[str, Any], job: Job) -> list[Record]:
    """Return the records of a job; ``benches`` holds makers until they are used."""
    path, case = job
    if callable(benches[path]):
        benches[path] = benches[path]()
    bench = benches[path]
    return list(bench.dense_records() if case is None else bench.records(case))


def run_here(
    benches: Mapping[str, Callable[[], Any]], jobs: Sequence[Job], *, deadline: float | None
) -> Iterator[tuple[Job, list[Record]]]:
    """Yield each job with its records, one after the other, until the deadline.

    Args:
        benches: model's folder -> what makes its `quality_measure.Bench`.
        jobs: what to measure.
        deadline: by `time.perf_counter`; no job is begun after it.
    """
    made = dict(benches)
    for job in jobs:
        if deadline is not None and time.perf_counter() >= deadline:
            return
        yield job, measure(made, job)


def run_in_workers(
    benches: Mapping[str, Callable[[], Any]],
    jobs: Sequence[Job],
    *,
    deadline: float | None,
    workers: int,
) -> Iterator[tuple[Job, list[Record]]]:
    """Yield each job with its records, in the order in which they are done, until the deadline.

    Args:
        benches: as of `run_here`; they are pickled.
        jobs: what to measure, most wanted first.
        deadline: by `time.perf_counter`; jobs that are not done then are given up.
        workers: processes, with one thread each.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, and no CUDA is inherited
    context.set_forkserver_preload(["quality_measure", "quality_workers", "transformers"])
    todo, done = context.Queue(), context.Queue()
    for job in jobs:
        todo.put(job)
    for _ in range(workers):
        todo.put(None)
    processes = [
        context.Process(target=_work, args=(dict(benches), todo, done), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    left = len(jobs)
    try:
        while left and (deadline is None or time.perf_counter() < deadline):
            try:
                job, records, error = done.get(timeout=_POLL)
            except queue.Empty:
                if not any(process.is_alive() for process in processes):
                    return
                continue
            left -= 1
            if error:
                print(f"{job[1]} failed:\n{error}", file=sys.stderr)
            else:
                yield job, records
    finally:
        for process in processes:
            process.kill()


def _work(benches: dict[str, Any], todo: Any, done: Any) -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    while (job := todo.get()) is not None:
        if parent is None or not parent.is_alive():  # killed: nobody waits for what is left
            return
        try:
            done.put((job, measure(benches, job), ""))
        except (RuntimeError, ValueError, OSError, ArithmeticError):  # the others are worth having
            done.put((job, [], traceback.format_exc(limit=-6)))
