"""Workers: results in the order of the items, one at a time, errors that stop everyone, callers that take turns."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from mergesolve.pools.workers import Workers


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_are_taken_in_the_order_of_the_items(threads):
    delays = random.Random(0)
    taken = []

    def work(item, scratch):
        time.sleep(delays.random() / 1000)
        return item * item

    Workers(64, threads).run(range(60), work, then=lambda item, result: taken.append((item, result)))
    assert taken == [(i, i * i) for i in range(60)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("where", ["work", "then"])
def test_an_error_reaches_the_caller_and_releases_those_who_wait(threads, where):
    taken = []

    def work(item, scratch):
        if item == 7 and where == "work":
            time.sleep(0.02)  # the others finish the items after it and wait for their turn
            raise OSError("disk")
        return item

    def then(item, result):
        if item == 7:
            raise OSError("disk")
        taken.append(item)

    with pytest.raises(OSError, match="disk"):
        Workers(64, threads).run(range(50), work, then=then)
    assert taken == list(range(7))


def test_callers_on_several_threads_do_not_share_buffers():
    workers, spoilt = Workers(64, 2), []

    def work(item, scratch):
        mine = scratch.sum.floats(64).fill_(item)
        time.sleep(0.001)
        spoilt.append(not bool((mine == item).all()))

    with ThreadPoolExecutor(3) as executor:
        list(executor.map(lambda k: workers.run(range(100 * k, 100 * k + 20), work), range(3)))
    assert len(spoilt) == 60
    assert not any(spoilt)
