"""The processes that share one command: which of them this is, what it takes, how they meet.

`torchrun` starts a command several times and tells each process its RANK and the WORLD_SIZE; the
scripts of scripts/slurm do so in the tasks of an array. All of them go the same way: cases are
dealt by their place, files are merged by whoever comes last, and what only one may do the first
process does. A process on its own is first and takes everything; nothing here costs it anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from medssl.config import InputError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed has it, but not for mypy

T = TypeVar("T")

POLL_SECONDS = 0.05  # between two looks at whether the others have come


def find_rank() -> tuple[int, int]:
    """Return the place of this process among those of its command, from 0 on, and their number.

    Raises:
        InputError: RANK and WORLD_SIZE are no place and number.
    """
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise InputError(
            f"RANK={texts[0]} WORLD_SIZE={texts[1]}: torchrun counts processes from 0 on; unset "
            "both for one process"
        )
    return int(texts[0]), int(texts[1])


def is_first() -> bool:
    """Return whether this process does what only one may do."""
    return find_rank()[0] == 0


def count_neighbors() -> int:
    """Return how many processes of the command share this machine."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def find_neighbor() -> int:
    """Return the place of this process among those on this machine, from 0 on."""
    text = os.environ.get("LOCAL_RANK", "0")
    return int(text) if text.isdecimal() else 0


def is_started_again() -> bool:
    """Return whether torchrun has started this process in place of one that was ended."""
    return _count_starts() != "0"


def _count_starts() -> str:
    """Return how often torchrun has started processes in place of others."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def deal(items: Sequence[T]) -> list[T]:
    """Return the items that are this process's, every one of which is somebody's."""
    place, count = find_rank()
    return list(items[place::count])


class _Crew:
    """The processes that torchrun started, which meet at a store of its agent or the first one."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.place, self.count = find_rank()
        self._number = 0  # of the meeting: all processes hold the same ones in the same order

    def meet(self, text: str | None = None) -> str:
        """Wait for all others, or with a text of the first process only for that; return it."""
        self._number += 1
        name = f"medssl/{self._number}"
        with explain_lost():
            if text is None:
                self.store.add(name, 1)
                self._wait(lambda: self.store.add(name, 0) >= self.count)
                return ""
            if self.place == 0:
                self.store.set(name, text)
            self._wait(lambda: self.store.check([name]))
            return bytes(self.store.get(name)).decode()

    def pool(self, text: str) -> list[str]:
        """Return the texts of all processes, in the order of their places."""
        self._number += 1
        names = [f"medssl/{self._number}/{place}" for place in range(self.count)]
        with explain_lost():
            self.store.set(names[self.place], text)
            self._wait(lambda: self.store.check(names))
            return [bytes(self.store.get(name)).decode() for name in names]

    def leave(self) -> None:
        """Wait for all others; the first process, which may hold the store, goes last."""
        self.meet()
        with explain_lost():
            gone = self.store.add("medssl/gone", 1)
            if self.place == 0 and gone < self.count:
                self._wait(lambda: self.store.add("medssl/gone", 0) >= self.count)

    def _wait(self, is_over: Callable[[], bool]) -> None:
        """Look now and then, so that signals are heard; whoever is killed, torchrun ends all."""
        while not is_over():
            time.sleep(POLL_SECONDS)


_crew: _Crew | None = None


@contextlib.contextmanager
def join_others(whatever_comes: bool = False) -> Iterator[None]:
    """Let processes that torchrun started meet, and end together.

    Those of an array, and one on its own, never meet.

    Args:
        whatever_comes: Whether one that fails waits for the others too: else torchrun ends them.
    """
    global _crew
    if find_rank()[1] == 1 or "MASTER_ADDR" not in os.environ:
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # heavy

    with explain_lost():
        store, _, _ = next(rendezvous("env://"))
    _crew = _Crew(_open_anew(store))
    try:
        yield
    except BaseException:
        if whatever_comes:
            _crew.leave()
        raise
    else:
        _crew.leave()
    finally:
        _crew = None


def _open_anew(store: Store) -> Store:
    """Return a part of a store that processes which were ended have left nothing in."""
    from torch import distributed  # heavy

    kind: Any = distributed.PrefixStore  # type: ignore[attr-defined]  # it is there
    part: Store = kind(f"start {_count_starts()}", store)
    return part


@contextlib.contextmanager
def let_first_speak() -> Iterator[None]:
    """Keep what processes but the first print from the terminal; what goes to stderr is said."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def can_meet() -> bool:
    """Return whether this process meets others: those of an array never do."""
    return _crew is not None


def find_store() -> Store | None:
    """Return where the processes of this command meet; None for one that meets nobody."""
    return None if _crew is None else _crew.store


def meet() -> None:
    """Wait until all processes are here, however long that takes."""
    if _crew is not None:
        _crew.meet()


def may_merge() -> bool:
    """Return whether this process merges what all have written, once it is all there.

    Where processes meet that is the first one; else anyone may, and the last one will.
    """
    return _crew is None or is_first()


def share(make: Callable[[], T]) -> T:
    """Return what the first process makes, of JSON's types, to all of them."""
    if _crew is None:
        return make()
    made: Any = json.loads(_crew.meet(json.dumps(make()) if is_first() else ""))
    return made  # type: ignore[no-any-return]  # JSON gives back what was made


def pool(items: list[T]) -> list[T]:
    """Return the items of all processes, of JSON's types, in all of them."""
    if _crew is None:
        return items
    return [item for text in _crew.pool(json.dumps(items)) for item in json.loads(text)]


def call_off(reason: str) -> None:
    """Tell the others to stop."""
    if _crew is not None:
        _crew.store.set("medssl/stop", reason)


def hear_call() -> str | None:
    """Return why another process says to stop; None if none does."""
    if _crew is None or not _crew.store.check(["medssl/stop"]):
        return None
    return bytes(_crew.store.get("medssl/stop")).decode()


@contextlib.contextmanager
def explain_lost() -> Iterator[None]:
    """Turn what torch says where another process is gone into one sentence.

    Raises:
        InputError: Another process has ended, or has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"process {find_rank()[0]} waits in vain for another one of this command, which has "
            f"ended or hangs ({reason}); the same command goes on from what is on disk"
        ) from error
