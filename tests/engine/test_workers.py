"""Threads that share work: results in the order of what was given, and the first error."""

from __future__ import annotations

import threading
import time

import pytest
from hangs import HANGS

from streamshard.engine.workers import collect
from streamshard.errors import InputError


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    def slower_at_first(number, _work):
        time.sleep((20 - number) / 10_000)
        return number * number

    assert collect(iter(range(20)), slower_at_first, workers) == [n * n for n in range(20)]
    assert collect([], slower_at_first, workers) == []


def test_every_thread_has_a_workspace_of_its_own():
    meet = threading.Barrier(2, timeout=HANGS)

    def both_at_once(_number, work):
        meet.wait()
        return work

    one, other = collect(range(2), both_at_once, 2)
    assert one is not other
    assert one.files is other.files


def test_an_error_ends_it_and_little_more_is_begun():
    begun = []

    def fails(number, _work):
        begun.append(number)
        if number == 3:
            raise InputError("x: is broken.")

    with pytest.raises(InputError, match="broken"):
        collect(range(10_000), fails, 1)
    assert begun == [0, 1, 2, 3]
