"""Dealing batches to threads of one core each: small matrices and elementwise work keep two cores busy better as two passes than as one.

How many threads compute a batch may decide its last bits, so what must agree bit for bit is computed with the same share of threads.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import torch

MOST = 8  # workers: each holds the values of a pass on its way; what threads there are besides are shared out among them

T = TypeVar("T")
R = TypeVar("R")


def workers_for(batches: int, device: torch.device) -> int:
    """How many workers share so many batches: one a core, where the arithmetic is the processor's."""
    return max(1, min(torch.get_num_threads(), batches, MOST)) if device.type == "cpu" else 1


def share_of_threads(workers: int) -> int:
    """Threads with which torch works on a batch where so many workers share them."""
    return max(1, torch.get_num_threads() // workers)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While the `with` lasts, torch computes with so many threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """`count` workers, of which the first is the caller's own thread; a lone one does its items there one by one, as `map` does. Use in a `with`.

    each: threads with which torch works on an item, None: an equal share of those there are.
    """

    def __init__(self, count: int, each: int | None = None) -> None:
        self.count, self.each = count, each or share_of_threads(count)
        self._helpers = [ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(self.each,)) for _ in range(count - 1)]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for helper in self._helpers:
            helper.shutdown()

    def map(self, work: Callable[[T], R], items: Sequence[T], *, ahead: bool = True) -> Iterator[R]:
        """work(item) for each item, in order; item i is always worker i modulo count's, in its thread.

        ahead: several workers do all items before the first result comes; else one item each at a time.
        After an error the others end the item that they are at, then it is raised here.
        """
        size = max(len(items), 1) if ahead and self.count > 1 else self.count
        for start in range(0, len(items), size):
            yield from self._deal(work, items[start : start + size])

    def _deal(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        stop, gradients = threading.Event(), torch.is_grad_enabled()

        def share(worker: int) -> list[R]:
            done: list[R] = []
            with torch.set_grad_enabled(gradients):  # each thread has its own
                try:
                    for item in items[worker :: self.count]:
                        if stop.is_set():
                            break
                        done.append(work(item))
                except BaseException:
                    stop.set()
                    raise
            return done

        futures: list[Future[list[R]]] = []
        with threads(self.each):
            try:
                futures += [helper.submit(share, worker) for worker, helper in enumerate(self._helpers, 1)]
                done = [share(0)]
                wait(futures)
            finally:
                stop.set()
                wait(futures)
        done += [future.result() for future in futures]
        return [done[i % self.count][i // self.count] for i in range(len(items))]
