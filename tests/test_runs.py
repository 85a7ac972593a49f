import errno
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from medssl import runs
from medssl.config import InputError
from medssl.runs import (
    CaseCounter,
    Journal,
    State,
    StopFlag,
    delete_run,
    describe_provenance,
    find_changed,
    hash_file,
    hash_files,
    hash_json,
    is_begun,
    is_done,
    is_half_deleted,
    is_remnant,
    list_rounds,
    make_pseudonyms,
    read_json,
    remove_leftovers,
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


def test_a_name_of_a_file_that_is_not_utf_8_stands_in_a_text_as_a_code(tmp_path):
    write_text(tmp_path / "some.txt", "r\udce4n, räum")
    assert (tmp_path / "some.txt").read_text(encoding="utf-8") == "r\\udce4n, räum"


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


@pytest.fixture
def small_files():
    """Let no file of this process become larger than 128 KiB: as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(2**20)),
        lambda path: np.save(path.open("wb"), np.zeros(2**20)),
        lambda path: np.savez(path.open("wb"), a=np.zeros(2**20)),
        lambda path: torch.save(torch.zeros(2**20), path),
        lambda path: save_file({"a": torch.zeros(2**20)}, path),
    ],
    ids=["bytes", "npy", "npz", "torch", "safetensors"],
)
def test_a_full_disk_is_one_sentence_whichever_library_runs_into_it(tmp_path, small_files, write):
    path = tmp_path / "some.bin"
    path.write_text("old")
    with pytest.raises(InputError, match=r"some\.bin: files may not become so large here: .* MiB"):
        write_file(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["some.bin"]


def test_a_full_disk_is_told_by_the_journal_too(tmp_path, small_files):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(0, 1, {"a": 1.0})
    with pytest.raises(InputError, match=r"metrics\.jsonl: .*start the same command again"):
        journal.append(0, 2, {str(index): 0.5 for index in range(20_000)})
    assert [entry["step"] for entry in journal.read()] == [1]


def test_an_error_of_the_writer_itself_stays_what_it_is(tmp_path):
    def fail(temporary):
        raise RuntimeError("not of the disk")

    with pytest.raises(RuntimeError, match="not of the disk"):
        write_file(tmp_path / "some.txt", fail)


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "round_0").mkdir()
    die_while_writing(tmp_path / "round_0" / "checkpoint.pt")
    (left,) = (tmp_path / "round_0").iterdir()
    others = [f".{os.getpid()}.0123abcd.plan.json", ".hidden", ".123.x.y", "plan.json"]
    for name in others:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, is_shared=True)
    assert left.exists(), "another machine may be writing it"
    os.utime(left, (time.time() - 7200,) * 2)
    remove_leftovers(tmp_path, is_shared=True)
    assert not left.exists()
    die_while_writing(tmp_path / "round_0" / "checkpoint.pt")
    remove_leftovers(tmp_path)
    assert not list((tmp_path / "round_0").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {*others, "round_0"}


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5], 3: (-math.inf,)})
    assert read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5], "3": [None]}


@pytest.mark.parametrize("content", ["", "{", '{"a": 1} b', "\ufeff"])
def test_a_damaged_json_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"', "[" * 100_000])
def test_a_json_file_that_holds_no_object_is_damaged(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json: damaged.*delete it and start the command"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "change", [{"round": "1"}, {"step": None}, {"status": 3}, {"step": True}], ids=str
)
def test_a_json_file_of_another_shape_names_the_key(tmp_path, change):
    content = {"status": "running", "round": 1, "step": 2, "more": []}
    write_json(tmp_path / "state.json", content)
    assert read_json(tmp_path / "state.json", State) == content
    write_json(tmp_path / "state.json", {**content, **change})
    with pytest.raises(InputError, match=rf"state\.json: damaged.* {next(iter(change))}: "):
        read_json(tmp_path / "state.json", State)
    del content[next(iter(change))]
    write_json(tmp_path / "state.json", content)
    with pytest.raises(InputError, match=next(iter(change))):
        read_json(tmp_path / "state.json", State)


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


@pytest.mark.parametrize(
    "line",
    [
        b"5",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"round": 0, "step": [], "time": 1.0, "metrics": {}}',
        b"[",
    ],
)
def test_a_damaged_line_of_the_journal_is_left_out_and_the_others_stay(tmp_path, line):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(0, 1, {"a": 1.0})
    with journal.path.open("ab") as file:
        file.write(line + b"\n")
    journal.append(0, 2, {"a": 2.0})
    assert [entry["step"] for entry in journal.read()] == [1, 2]
    journal.cut(0, 2)
    assert [entry["step"] for entry in journal.read()] == [1, 2]


def test_rounds_are_the_folders_of_exactly_their_names(tmp_path):
    for name in ("round_10", "round_2", "round_2_old", "round_2 copy", "round_02", "round_²"):
        (tmp_path / name).mkdir()
    assert list_rounds(tmp_path) == {2: tmp_path / "round_2", 10: tmp_path / "round_10"}


def test_a_file_that_has_changed_since_its_mark_is_found(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    mark = {"files": hash_files(tmp_path, *"abc")}
    assert find_changed(tmp_path, mark) == []
    (tmp_path / "b").write_text("B")
    (tmp_path / "c").unlink()
    assert find_changed(tmp_path, mark) == [tmp_path / "b", tmp_path / "c"]
    assert find_changed(tmp_path, {}) == []


@pytest.mark.parametrize("is_link", [False, True])
def test_a_run_is_deleted_also_through_a_link(tmp_path, is_link):
    home = tmp_path / "home"
    write_json(home / "round_0" / "done.json", {})
    write_json(home / "run.json", {})
    (home / "data").symlink_to(tmp_path)
    run = tmp_path / "run" if is_link else home
    if is_link:
        run.symlink_to(home)
    delete_run(run)
    assert list(home.iterdir()) == []
    assert run.is_symlink() == is_link


def test_a_kill_while_a_run_is_deleted_is_seen_and_made_up_for(tmp_path, monkeypatch):
    for name in ("run.json", "plan.json", "round_0/done.json"):
        write_json(tmp_path / name, {})
    assert is_begun(tmp_path)

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        delete_run(tmp_path)
    monkeypatch.undo()
    assert is_half_deleted(tmp_path)
    assert is_remnant(tmp_path)
    assert not is_begun(tmp_path)
    delete_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], True),
        (["plan.json"], True),
        (["trained_on.json", ".deleting"], True),
        (["round_0", "model", "metrics.jsonl"], True),
        (["model"], False),
        (["plan.json", "thesis.docx"], False),
        (["images", "labels"], False),
    ],
)
def test_only_what_a_run_writes_is_taken_for_the_rest_of_one(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).mkdir()
    assert is_remnant(tmp_path) is expected


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


def test_no_two_cases_have_one_pseudonym(tmp_path):
    data = tmp_path / "data"
    write_json(tmp_path / ".pseudonym_salts.json", {str(data.resolve()): "0" * 32})
    alike = ["scan_62658", "scan_116294"]  # with this salt both digests begin with 4bd1acfc
    names = make_pseudonyms(tmp_path / "run", data, [*alike, "scan_1"])
    assert len(set(names.values())) == 3
    assert all(names[case_id].startswith("case_4bd1acfc") for case_id in alike)
    assert len(names["scan_1"]) == len("case_12345678")


def test_what_leads_back_from_pseudonyms_is_for_the_owner_alone(tmp_path):
    make_pseudonyms(tmp_path / "run", tmp_path / "data", ["anna"])
    for path in (tmp_path / ".pseudonym_salts.json", tmp_path / "run" / "pseudonyms.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def run_as_other_user(code, folder):
    """Run code as a user who may write in a folder but owns none of its files."""
    if os.getuid():
        pytest.skip("only root can become another user")
    head = (
        "import os\nfrom pathlib import Path\nfrom medssl.runs import make_pseudonyms, read_json\n"
    )
    code = f"{head}os.setuid(54321)\nhome = Path({str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_second_user_of_a_folder_keeps_salts_of_their_own():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        make_pseudonyms(folder / "run", folder / "data", ["anna"])
        before = (folder / ".pseudonym_salts.json").read_bytes()
        code = "print(make_pseudonyms(home / 'theirs', home / 'data', ['anna'])['anna'])\n"
        found = [run_as_other_user(code, folder) for _ in range(2)]
        assert found[0].returncode == 0, found[0].stderr
        assert found[0].stdout == found[1].stdout
        assert "for them alone" in found[0].stderr
        assert "delete" not in found[0].stderr
        assert (folder / ".pseudonym_salts.json").read_bytes() == before
        told = run_as_other_user("read_json(home / 'run' / 'pseudonyms.json')", folder)
        assert "you may not read it; it belongs to" in told.stderr


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
