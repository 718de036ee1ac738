"""Pieces of work on threads, with results that do not depend on how many there are.

Reading and arithmetic on a piece release the interpreter lock, so plain threads scale. PyTorch's own threads are
switched off meanwhile: pieces are small, and splitting each of them again costs more than it saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from .sources import Scratch

Item = TypeVar("Item")
MAX_THREADS = 8  # memory bandwidth, not arithmetic, is the limit


class Workers:
    """Runs items on threads, each with its own scratch buffers, which are kept for the next call."""

    def __init__(self, limit: int, threads: int | None = None) -> None:
        self.limit = limit
        self._threads = threads
        self._scratch: list[Scratch] = []

    @property
    def threads(self) -> int:
        """How many threads a call uses: what PyTorch was told, at most `MAX_THREADS`."""
        return self._threads or min(torch.get_num_threads(), MAX_THREADS)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return self.threads * 20 * self.limit

    @property
    def bytes_read(self) -> int:
        """Bytes read in all calls so far."""
        return sum(scratch.bytes_read for scratch in self._scratch)

    def scratch(self, index: int = 0) -> Scratch:
        """Return one worker's buffers."""
        while len(self._scratch) <= index:
            self._scratch.append(Scratch(self.limit))
        return self._scratch[index]

    def run(self, items: Sequence[Item], work: Callable[[Item, Scratch], None], *, serial: bool = False) -> None:
        """Do all items; the first error is raised after the others have stopped."""
        queue = deque(items)

        def drain(scratch: Scratch) -> None:
            with torch.no_grad():
                while True:
                    try:
                        item = queue.popleft()
                    except IndexError:
                        return
                    try:
                        work(item, scratch)
                    except BaseException:
                        queue.clear()
                        raise

        count = 1 if serial else min(self.threads, len(items))
        if count <= 1:
            drain(self.scratch())
            return
        buffers = [self.scratch(i) for i in range(count)]
        with _one_torch_thread(), ThreadPoolExecutor(count, thread_name_prefix="pool") as executor:
            for future in [executor.submit(drain, scratch) for scratch in buffers]:
                future.result()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
