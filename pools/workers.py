"""Pieces of work on threads, with results that do not depend on how many there are.

What is summed over pieces is added in the order of the pieces, by whichever thread has done one when its turn comes.
Reading and arithmetic on a piece release the interpreter lock, so plain threads scale. PyTorch's own threads are
switched off meanwhile: pieces are small, and splitting each of them again costs more than it saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, RLock
from typing import TypeVar

import torch

from .sources import Scratch, scratch_nbytes

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_THREADS = 8  # memory bandwidth, not arithmetic, is the limit


class Workers:
    """Runs items on threads, each with its own scratch buffers, which are kept for the next call."""

    def __init__(self, limit: int, threads: int | None = None, family: dict[int, Workers] | None = None) -> None:
        self.limit = limit
        self._threads = threads
        self._family = {} if family is None else family
        self._family[limit] = self
        self._scratch: list[Scratch] = []
        self._lock = RLock()

    @property
    def threads(self) -> int:
        """How many threads a call uses: what PyTorch was told, at most `MAX_THREADS`."""
        return self._threads or min(torch.get_num_threads(), MAX_THREADS)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers that every call takes; `Scratch.stack` comes on top where it is used."""
        return self.threads * scratch_nbytes(self.limit)

    @property
    def bytes_read(self) -> int:
        """Bytes read in all calls so far, with pieces of any length."""
        return sum(scratch.bytes_read for workers in self._family.values() for scratch in workers._scratch)

    def of(self, limit: int) -> Workers:
        """Return workers for pieces of another length, whose reading is counted together with this."""
        return self._family.get(limit) or Workers(limit, self._threads, self._family)

    def scratch(self, index: int = 0) -> Scratch:
        """Return one worker's buffers."""
        while len(self._scratch) <= index:
            self._scratch.append(Scratch(self.limit))
        return self._scratch[index]

    def run(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Scratch], Result],
        *,
        then: Callable[[Item, Result], None] | None = None,
        serial: bool = False,
    ) -> None:
        """Do all items; the first error is raised after the others have stopped.

        `then` takes the results one at a time, in the order of the items. A thread keeps its result, which may lie in
        its scratch buffers, until then: at most one waits on each thread. Callers on several threads take turns, as
        they share the buffers.
        """
        with self._lock:
            self._run(items, work, then, serial)

    def _run(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Scratch], Result],
        then: Callable[[Item, Result], None] | None,
        serial: bool,
    ) -> None:
        queue = deque(enumerate(items))
        turns = _Turns()

        def drain(scratch: Scratch) -> None:
            with torch.no_grad():
                while True:
                    try:
                        index, item = queue.popleft()
                    except IndexError:
                        return
                    try:
                        result = work(item, scratch)
                        if then is not None and turns.wait(index):
                            then(item, result)
                            turns.advance()
                    except BaseException:
                        queue.clear()
                        turns.stop()
                        raise

        count = 1 if serial else min(self.threads, len(queue))
        if count <= 1:
            drain(self.scratch())
            return
        buffers = [self.scratch(i) for i in range(count)]
        with _one_torch_thread(), ThreadPoolExecutor(count, thread_name_prefix="pool") as executor:
            try:
                for future in [executor.submit(drain, scratch) for scratch in buffers]:
                    future.result()
            finally:
                queue.clear()  # an interrupt stops the threads after the pieces that they have begun


class _Turns:
    """Whose turn it is, by number; items are started in order, so the one whose turn it is has always been started."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._next = 0
        self._stopped = False

    def wait(self, index: int) -> bool:
        """Return True when the turn of `index` has come, or False once turns have stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._next == index)
            return not self._stopped

    def advance(self) -> None:
        """Pass the turn on."""
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Release all who wait: an item failed, so its turn never ends."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
