"""Workers: results in the order of the items, one at a time, and errors that stop everyone."""

import random
import time

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
