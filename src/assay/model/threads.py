"""How many threads a piece of work is worth, and compiled loops spread over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from assay.model.alike import alike

WORTH_SHARING = 1 << 20
MOST_TOGETHER = 8
"""Items of `in_turn` that are at work together, each with tensors of its own."""
Item = TypeVar("Item")
Result = TypeVar("Result")
Begin = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Starts a function; returns what waits for its result."""
_due: ContextVar[list[Callable[[], None]] | None] = ContextVar("due", default=None)


@contextmanager
def threads_for(weights: int) -> Iterator[None]:
    """One thread while matrices of so few weights are treated: waking others would cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if weights >= WORTH_SHARING else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], weights: int) -> list[Result]:
    """`function` of each item: one after another where matrices of `weights` use all threads, else a thread for each.

    That pays where an item is mostly compiled loops and products; many small operations only wait for one another.
    Either way every item is treated alone, so the number of threads doesn't change the results.
    """
    threads = torch.get_num_threads()
    if weights >= WORTH_SHARING or threads == 1 or len(items) < 2:
        with threads_for(weights), alike():
            return [function(item) for item in items]
    return started(function, items)()


def in_turn(function: Callable[[Item], Result], items: Sequence[Item], together: bool) -> Iterator[Result]:
    """`function` of each item, in their order. together: a thread for each of `at_once`, and no more ahead of what is taken.

    As in `side_by_side`, every item is treated alone.
    """
    if not together:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        for item in items:
            with threads_for(0):
                result = function(item)
            yield result
        return

    alone = _alone(function)
    try:
        with ThreadPoolExecutor(at_once(), "assay-items") as pool:
            jobs: deque[Future[Result]] = deque()
            for item in items:
                jobs.append(pool.submit(alone, item))
                if len(jobs) > at_once():
                    yield jobs.popleft().result()
            while jobs:
                yield jobs.popleft().result()
    finally:
        torch.set_num_threads(threads)


def at_once() -> int:
    """How many items `in_turn` works at together."""
    return min(torch.get_num_threads(), MOST_TOGETHER)


def started(function: Callable[[Item], Result], items: Sequence[Item]) -> Callable[[], list[Result]]:
    """Starts `function` of each item on a thread for each, if torch has several; returns what waits for the results, once."""
    threads = torch.get_num_threads()
    if threads == 1:
        return lambda: [function(item) for item in items]

    def results() -> list[Result]:
        try:
            return [jobs.pop(0).result() for _ in items]
        finally:
            torch.set_num_threads(threads)

    pool = ThreadPoolExecutor(min(threads, len(items)), "assay-items")
    jobs = [pool.submit(_alone(function), item) for item in items]
    pool.shutdown(wait=False)
    return results


def now(function: Callable[[], Result]) -> Callable[[], Result]:
    """Calls a function; returns what gives its result."""
    result = function()
    return lambda: result


def ahead(begun: Iterable[Callable[[], Result]], most: int) -> Iterator[Result]:
    """Results, in order, of what an iterable begins one after another, `most` of them before the first is waited for."""
    due: deque[Callable[[], Result]] = deque()
    for result in begun:
        due.append(result)
        if len(due) > most:
            yield due.popleft()()
    while due:
        yield due.popleft()()


@contextmanager
def background() -> Iterator[Begin]:
    """Gives what starts a function on one of as many threads as torch has, and returns what waits for its result.

    For compiled loops: functions that hold the GIL only wait for one another.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield now
        return
    with ThreadPoolExecutor(threads, "assay-loops") as pool:
        yield lambda function: pool.submit(_alone(lambda _: function()), None).result


def _alone(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """`function` for a thread of its own: one of torch's threads, and gradients as they are recorded here."""
    gradients = torch.is_grad_enabled()

    def alone(item: Item) -> Result:
        torch.get_num_threads()  # when first asked in a thread, torch takes what any thread set last, and forgets this one's
        torch.set_num_threads(1)
        with torch.set_grad_enabled(gradients):
            return function(item)

    return alone


@contextmanager
def meanwhile(begin: Callable[[], None]) -> Iterator[None]:
    """`begin` starts something in the background: when the work inside says `spare`, or at its end."""
    due = [begin]
    outer = _due.set(due)
    try:
        yield
    finally:
        _due.reset(outer)
    if due:
        begin()


def spare() -> None:
    """Said by work that leaves threads idle from here on."""
    if due := _due.get():
        due.pop()()


def spread(
    kernel: Callable[..., None], count: int, shared: tuple[Any, ...], split: tuple[Tensor, ...], worth: bool = True
) -> None:
    """Run `kernel(*shared, *split)` with `split` cut along its first axis over torch's threads, if the work is worth it.

    The kernel is compiled without the GIL and treats every entry of that axis alone, so the number of threads
    doesn't change the result.
    """
    arrays = [t.numpy() for t in split]
    parts = max(1, min(torch.get_num_threads(), count)) if worth else 1
    edges = [count * i // parts for i in range(parts + 1)]
    if parts == 1:
        kernel(*shared, *arrays)
        return
    pieces = [tuple(a[low:high] for a in arrays) for low, high in pairwise(edges)]
    jobs = [_pool(parts).submit(kernel, *shared, *piece) for piece in pieces[1:]]
    kernel(*shared, *pieces[0])
    for job in jobs:
        job.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "assay")
