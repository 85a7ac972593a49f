"""What goes on in a thread beside the computation: the next scan is read, a result is written.

Reading, unpacking, statistics, resampling, packing and hashing let other threads work. Nothing is
done beside the computation where memory is short.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from medssl.machine import count_free_memory

WRITE_BYTES = 16  # a voxel, of a mask, of its uncertainty and of what they are packed from
RESERVE = 6 * 2**30  # bytes that stay free for the computation: twice the slabs of a scan at most

Item = TypeVar("Item")
Result = TypeVar("Result")


def has_room(size: float) -> bool:
    """Return whether so many bytes are free beside what the computation may take."""
    return size + RESERVE <= count_free_memory()


def begin(act: Callable[[], Result]) -> Future[Result]:
    """Do something in a thread, which ends with the process; return what will have its result."""
    future: Future[Result] = Future()
    threading.Thread(target=_settle, args=(future, act), daemon=True).start()
    return future


def _settle(future: Future[Result], act: Callable[[], Result]) -> None:
    """Do something, and tell what has its result, or its error."""
    try:
        future.set_result(act())
    except BaseException as error:  # whoever asks for the result gets it
        future.set_exception(error)
    finally:
        del future, act  # the frames of an error hold what they have read


def read_ahead(
    items: Sequence[Item], read: Callable[[Item], Result], may_begin: Callable[[Item], bool]
) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """Yield items, and what returns, once, what is read of them: of the next one beforehand.

    An error of reading comes when its item is asked for. What is read is held by nobody else.

    Args:
        items: In the order in which they are asked for.
        read: Reads an item.
        may_begin: Whether the memory suffices to read an item while the one before is worked on;
            else it is read when it is asked for.
    """
    begun: dict[int, Future[Result]] = {}

    def get(number: int) -> Result:
        try:
            return begun.pop(number).result() if number in begun else read(items[number])
        finally:
            for following in items[number + 1 : number + 2]:
                if may_begin(following):
                    begun[number + 1] = begin(partial(read, following))

    for number, item in enumerate(items):
        yield item, partial(get, number)
