"""What every command has in common: home folders, terminals, disks that are full."""

import errno
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer

from medssl import cli
from medssl.settings import load_config


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/runs/a", "HOME/runs/a"),
        ("--run=~/runs/a", "--run=HOME/runs/a"),
        ("data.root=~/scans", "data.root=HOME/scans"),
        ("tracking.uri=sqlite:///~/mlflow.db", "tracking.uri=sqlite:///HOME/mlflow.db"),
        ("arm=~/a,~/b", "arm=HOME/a,HOME/b"),
        ("~", "HOME"),
        ("--out=~", "--out=HOME"),
        ("data.root=~", "data.root=~"),
        ("a~/b", "a~/b"),
        ("train.lr=1e-3", "train.lr=1e-3"),
    ],
)
def test_a_home_folder_is_found_where_no_shell_sees_to_it(given, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/" + "home/anna")
    assert cli._expand_home(given) == expected.replace("HOME", "/" + "home/anna")


def test_every_command_gets_its_arguments_with_the_home_folder(monkeypatch):
    given = []
    monkeypatch.setenv("HOME", "/" + "home/anna")
    monkeypatch.setattr(cli, "app", lambda arguments, **_: given.extend(arguments))
    monkeypatch.setattr(sys, "argv", ["medssl", "train", "~/scans", "--run", "~/a", "--out=~/b"])
    cli.main()
    home = "/" + "home/anna"
    assert given == ["train", f"{home}/scans", "--run", f"{home}/a", f"--out={home}/b"]


def test_the_root_in_a_yaml_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("data: {root: ~/scans}")
    assert load_config(tmp_path / "a.yaml").config.data.root == tmp_path / "scans"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_name_is_too_much_for_a_terminal(tmp_path, encoding):
    scans = tmp_path / "médecine_左肾_łódź"
    scans.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "medssl", "check", str(scans)],
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"decine_" in done.stderr
    code = "import sys; from medssl import cli\n"
    code += "cli.app = lambda *_, **__: print('\\u5de6 \\udce9')\ncli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\\u5de6 \\udce9\n"


def test_a_full_disk_is_told_by_the_command_line_too(monkeypatch, capsys, tmp_path):
    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a" / "b"))

    monkeypatch.setattr(cli, "app", fill)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert f"free space on {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(typer.main.get_command(cli.app).commands))
def test_a_usage_line_marks_what_may_be_left_out_or_repeated_once(name):
    command = typer.main.get_command(cli.app).commands[name]
    usage = " ".join(command.collect_usage_pieces(typer.Context(command)))
    assert not re.search(r"\[\[|\]\]|\.\.\.\W*\.\.\.", usage), usage


@pytest.mark.parametrize(
    ("rounds", "hours", "words"),
    [
        (1, 0.02, "1 round of students, 9 steps a round: about 1 minute, "),
        (2, 0.5, "2 rounds of students, 9 steps a round: about 30 minutes, "),
    ],
)
def test_one_round_and_one_minute_are_not_several(tmp_path, rounds, hours, words):
    splits = SimpleNamespace(labeled=("a",), unlabeled=("b",), val=(), test=())
    estimate = {"hours": hours, "disk_mb": 1.0}
    plan = SimpleNamespace(estimate=estimate, labels={1: "organ"}, reasons=(), steps=9)
    config = SimpleNamespace(train=SimpleNamespace(rounds=rounds))
    resolved, dataset = SimpleNamespace(config=config), SimpleNamespace(name="scans")
    prepared = SimpleNamespace(dataset=dataset, splits=splits, plan=plan, resolved=resolved)
    assert words in cli._describe_plan(prepared, tmp_path, 0)
