import errno
import json
import math
import os
import signal
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl import runs
from medssl.config import InputError
from medssl.runs import (
    CaseCounter,
    Journal,
    StopFlag,
    describe_provenance,
    hash_file,
    hash_json,
    is_done,
    make_pseudonyms,
    read_json,
    seed_from,
    write_file,
    write_json,
    write_state,
    write_text,
)


def die_while_writing(path):
    """Write half a file in a child process that is then killed."""

    def write(temporary):
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        write_file(path, write)
        os._exit(0)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_kill_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "some.txt"
    write_text(path, "old and whole")
    die_while_writing(path)
    assert path.read_text() == "old and whole"


def test_a_kill_while_writing_a_new_file_leaves_none(tmp_path):
    die_while_writing(tmp_path / "some.txt")
    assert not (tmp_path / "some.txt").exists()


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "some.txt"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["some.txt"]


def test_a_full_disk_is_named_with_what_is_free(tmp_path):
    path = tmp_path / "some.txt"
    write_text(path, "old")

    def fill(temporary):
        temporary.write_bytes(bytes(2**20))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"disk is full: \d.* MiB free after 1\.0 MiB") as caught:
        write_file(path, fill)
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(tmp_path):
    def fail(temporary):
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        write_file(tmp_path / "some.txt", fail)


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5], 3: (-math.inf,)})
    assert read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5], "3": [None]}


@pytest.mark.parametrize("content", ["", "{", '{"a": 1} b', "\ufeff"])
def test_a_damaged_json_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_a_missing_json_file_asks_for_a_run_folder(tmp_path):
    with pytest.raises(InputError, match="run or model folder"):
        read_json(tmp_path / "a.json")


def test_the_hash_of_a_file_is_sha_256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_the_hash_of_a_value_does_not_depend_on_the_order_of_its_keys():
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json([1, 2]) != hash_json([2, 1])


parts = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4)


@given(parts, parts)
def test_a_seed_is_a_pure_function_of_its_parts(first, second):
    seed = seed_from(*first)
    assert seed == seed_from(*first)
    assert 0 <= seed < 2**63
    assert (seed == seed_from(*second)) == (first == second)


def test_seeds_are_the_same_on_every_machine():
    assert seed_from(0, 1, "labeled") == 9011448525855052058


def test_a_stage_is_done_only_with_its_own_hash(tmp_path):
    assert not is_done(tmp_path, "h")
    write_json(tmp_path / "done.json", {"hash": "h"})
    assert is_done(tmp_path, "h")
    with pytest.raises(InputError, match="--restart"):
        is_done(tmp_path, "other")


def test_the_journal_gives_back_what_was_appended(tmp_path):
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    assert journal.read() == []
    journal.append(0, 5, {"losses/total": 1.5, "x": math.nan})
    (entry,) = journal.read()
    assert (entry["round"], entry["step"]) == (0, 5)
    assert entry["metrics"] == {"losses/total": 1.5, "x": None}
    assert isinstance(entry["time"], float)


def test_the_journal_is_cut_back_to_the_checkpoint(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    places = [(0, 5), (0, 10), (1, 5), (1, 10), (2, 5)]
    for round_index, step in places:
        journal.append(round_index, step, {})
    journal.cut(1, 7)
    assert [(e["round"], e["step"]) for e in journal.read()] == [(0, 5), (0, 10), (1, 5)]


def test_a_line_that_a_kill_cut_short_is_left_out_and_later_ones_are_kept(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(0, 1, {})
    with journal.path.open("a") as file:
        file.write('{"round": 0, "st')
    journal.append(0, 2, {})
    journal.append(0, 3, {})
    assert [e["step"] for e in journal.read()] == [1, 2, 3]
    journal.cut(0, 3)
    journal.append(0, 4, {})
    assert [json.loads(line)["step"] for line in journal.path.read_text().splitlines()][-1] == 4


def test_a_file_named_stop_stops_once(tmp_path):
    flag = StopFlag(tmp_path)
    assert not flag.is_set()
    (tmp_path / "STOP").touch()
    assert flag.is_set()
    assert "STOP" in flag.reason
    assert not (tmp_path / "STOP").exists()
    assert flag.is_set()
    assert not StopFlag(tmp_path).is_set()


def test_a_time_limit_stops(tmp_path):
    assert StopFlag(tmp_path, max_hours=-1.0).is_set()
    assert not StopFlag(tmp_path, max_hours=1.0).is_set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag_and_the_second_interrupts(tmp_path, number, capsys):
    before = signal.getsignal(number)
    flag = StopFlag(tmp_path)
    with flag.catch_signals():
        signal.raise_signal(number)
        assert flag.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    told = capsys.readouterr().out
    assert "stopping after this step" in told
    assert "goes on from the last checkpoint" in told


def test_the_state_names_the_last_checkpoint(tmp_path):
    write_state(tmp_path, "running", 1, 40)
    assert read_json(tmp_path / "state.json") == {"status": "running", "round": 1, "step": 40}


def test_pseudonyms_are_the_same_for_two_runs_on_one_data_set_and_differ_between_sets(tmp_path):
    names = [
        make_pseudonyms(tmp_path / "runs" / run, tmp_path / data, ["anna", "bert"])
        for run, data in (("a", "one"), ("b", "one"), ("c", "two"))
    ]
    assert names[0] == names[1]
    assert names[0]["anna"] != names[2]["anna"]
    assert len(set(names[0].values())) == 2
    assert all(len(name) == len("case_12345678") for name in names[0].values())


def test_what_leads_back_from_pseudonyms_is_for_the_owner_alone(tmp_path):
    make_pseudonyms(tmp_path / "run", tmp_path / "data", ["anna"])
    for path in (tmp_path / ".pseudonym_salts.json", tmp_path / "run" / "pseudonyms.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_provenance_names_versions_and_machine():
    found = describe_provenance("cpu", 1)
    assert found["versions"]["torch"] != "unknown"
    assert found["device"] == "cpu"
    assert found["revision"] is None or Path(__file__).exists()


def test_a_long_look_at_cases_says_now_and_then_how_far_it_is(capsys, monkeypatch):
    clock = iter([0.0, 9.9, 10.0, 10.0, 11.0, 20.0, 20.0])
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    count = CaseCounter("check")
    for done in (1, 2, 3, 4):
        count(done, 200)
    assert capsys.readouterr().err.splitlines() == [
        f"check: {done} of 200 cases" for done in (2, 4)
    ]
