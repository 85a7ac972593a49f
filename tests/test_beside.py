import threading
import weakref

import pytest

from medssl import beside

LONG = 30  # seconds, within which a thread comes to its turn


class Scan:
    """Something that can be lost sight of."""


def test_the_next_item_is_read_while_one_is_worked_on_and_no_further_one():
    read = [threading.Event() for _ in range(3)]
    names = []

    def mark(number):
        read[number].set()
        return -number

    for number, get in beside.read_ahead(range(3), mark, lambda _: True):
        assert get() == -number
        names.append([event.wait(LONG) for event in read[: number + 2]])
        assert not any(event.is_set() for event in read[number + 2 :])
    assert names == [[True] * 2, [True] * 3, [True] * 3]


def test_what_finds_no_room_is_read_when_it_is_asked_for():
    threads = []

    def read(number):
        threads.append((number, threading.current_thread() is threading.main_thread()))

    for _, get in beside.read_ahead(range(4), read, lambda number: number == 2):
        get()
    assert threads == [(0, True), (1, True), (2, False), (3, True)]


def test_an_error_of_reading_comes_with_its_item_and_the_others_are_read():
    came = []
    for number, get in beside.read_ahead([2, 1, 0, 4], lambda n: 12 // n, lambda _: True):
        try:
            came.append(get())
        except ZeroDivisionError:
            came.append(f"{number} failed")
    assert came == [6, 12, "0 failed", 3]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_what_was_read_is_held_by_nobody_but_who_asked_for_it(is_ahead):
    gone = []
    for _, get in beside.read_ahead(range(3), lambda _: Scan(), lambda _: is_ahead):
        scan = get()
        reference = weakref.ref(scan)
        del scan
        gone.append(reference() is None)
    assert gone == [True] * 3


def test_there_is_room_for_what_fits_beside_the_computation(monkeypatch):
    monkeypatch.setattr(beside, "count_free_memory", lambda: 10e9)
    assert beside.has_room(10e9 - beside.RESERVE)
    assert not beside.has_room(10e9 - beside.RESERVE + 1)
