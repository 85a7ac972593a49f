"""The processes of one command: what each takes, and how they meet."""

import time

import pytest
from crew import Crew

from medssl import ranks
from medssl.config import InputError

MEET = """
import sys, time
from medssl import ranks
with ranks.join_others():
    place, count = ranks.find_rank()
    made = ranks.share(lambda: {"by": place, "list": [1.5, None]})
    time.sleep(0.2 * place)
    came = time.monotonic()
    ranks.meet()
    print(made, came, time.monotonic(), flush=True)
"""
FAIL = """
import pathlib, time
from medssl import ranks
with ranks.join_others(whatever_comes=True):
    if not ranks.is_first():
        print("failing", flush=True)
        raise SystemExit(1)
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
print("done")
"""


@pytest.fixture
def become(monkeypatch):
    """Return a function that makes of this process one of several."""

    def become(place, count):
        monkeypatch.setenv("RANK", str(place))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    return become


@pytest.mark.parametrize(("count", "num_items"), [(1, 3), (3, 8), (4, 2)])
def test_every_item_is_dealt_to_one_process_and_evenly(become, count, num_items):
    hands = []
    for place in range(count):
        become(place, count)
        hands.append(ranks.deal(range(num_items)))
    assert sorted(item for hand in hands for item in hand) == list(range(num_items))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


@pytest.mark.parametrize(("place", "count"), [("4", "4"), ("-1", "2"), ("0", "none")])
def test_a_place_that_is_none_is_refused(become, place, count):
    become(place, count)
    with pytest.raises(InputError, match=f"RANK={place} WORLD_SIZE={count}"):
        ranks.deal([1, 2])


def test_the_tasks_of_an_array_never_meet_and_each_has_what_it_makes(become):
    become(1, 2)
    with ranks.join_others(whatever_comes=True):
        ranks.meet()
        assert ranks.share(lambda: 7) == 7
        assert ranks.may_merge()


def test_processes_meet_and_what_the_first_one_makes_all_have(tmp_path):
    with Crew(3, "-c", MEET, cwd=tmp_path) as crew:
        assert crew.wait() == [0, 0, 0], crew.read()
        told = [line.rsplit(" ", 2) for line in crew.read()]
    assert {made for made, _, _ in told} == {"{'by': 0, 'list': [1.5, None]}"}
    assert max(float(came) for _, came, _ in told) < min(float(met) for _, _, met in told)


def test_one_that_failed_ends_with_the_others(tmp_path):
    with Crew(2, "-c", FAIL, cwd=tmp_path) as crew:
        while not crew.read()[1]:
            time.sleep(0.05)
        time.sleep(0.3)
        assert crew.members[1].poll() is None
        (tmp_path / "go").touch()
        assert crew.wait() == [0, 1], crew.read()
        assert crew.read()[0] == "done\n"
