"""Work on threads: every item once, errors surface, threads are given back, callers do not disturb one another."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.pools.workers import Workers


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("serial", [False, True])
def test_every_item_is_done_once(threads, serial):
    done = []
    Workers(16, threads).run(range(50), lambda item, scratch: done.append(item), serial=serial)
    assert sorted(done) == list(range(50))
    if serial:
        assert done == list(range(50))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_surfaces_and_stops_the_rest(threads):
    done = []

    def work(item, scratch):
        if item == 5:
            raise OSError("disk")
        done.append(item)

    before = torch.get_num_threads()
    with pytest.raises(OSError, match="disk"):
        Workers(16, threads).run(range(100_000), work)
    assert len(done) < 100_000
    assert torch.get_num_threads() == before


def test_bytes_are_counted_over_all_threads():
    def work(item, scratch):
        scratch.bytes_read += item

    workers = Workers(16, 4)
    workers.run(range(100), work)
    workers.run(range(100), work)
    assert workers.bytes_read == 2 * sum(range(100))


def test_calls_from_several_threads_give_the_same_as_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 1000, generator=generator)}
    experts = {f"e{i}": {"w": base["w"] + torch.randn(300, 1000, generator=generator)} for i in range(3)}
    pool = Pool.from_state_dicts(base, experts, backend="streaming")
    blocks = pool.blocks("row")
    gradients = [{"w": torch.randn(300, 1000, generator=generator)} for _ in range(6)]
    expected = [pool.correlate(gradient, blocks) for gradient in gradients]
    with ThreadPoolExecutor(3) as executor:
        found = list(executor.map(lambda gradient: pool.correlate(gradient, blocks), gradients))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
