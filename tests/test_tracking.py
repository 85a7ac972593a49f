import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import yaml
from PIL import Image

from medssl.config import InputError
from medssl.runs import read_json, write_json
from medssl.tracking import Mirror, find_default_uri, send, serve_runs, server, store, sync_run
from medssl.tracking import mirror as mirror_module

CLASSES = ("anterior", "posterior")
SECRETS = ("anna", "schmidt", "hospital", "ward7", "swordfish")
"""Parts of case ids, patient names, folders and passwords that must not reach MLflow."""


def write_run(
    path: Path, *, draw: int = 0, rounds: int = 3, steps: int = 600, gain: float = 0.02
) -> Path:
    """Fabricate the run folder of a finished training with plausible curves."""
    generator = np.random.default_rng(draw)
    path.mkdir(parents=True)
    labeled = [f"anna_schmidt_{index:03}" for index in range(4)]
    unlabeled = [f"ward7_{index:03}" for index in range(20)]
    test = [f"schmidt{index}-b" for index in range(12)]
    root = "/data/hospital/ward7/Task04_Hippocampus"
    config = {
        "data": {"root": root, "labeled": 4, "test": 12, "split_seed": 0, "draw": draw},
        "plan": {"spacing": "auto", "patch_size": "auto"},
        "network": {"name": "dynunet", "width": 1.0, "dropout": 0.1},
        "method": "default" if gain else "labels_only",
        "losses": {"entropy": {"weight": 0.01}, "consistency": {"name": "mse", "weight": 0.1}},
        "train": {"rounds": rounds - 1, "steps": steps, "lr": 1e-3, "seed": 0},
        "tracking": {"uri": "auto", "experiment": "auto"},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    reasons = [
        "spacing 1 x 1 x 1 mm: the median of the labeled cases",
        f"patch 40 x 56 x 40 voxels: it covers {root}/imagesTr/anna_schmidt_001.nii.gz whole",
    ]
    write_json(
        path / "plan.json",
        {"spacing": [1.0, 1.0, 1.0], "patch_size": [40, 56, 40], "batch": 2, "reasons": reasons},
    )
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2 - 0.7 * draw)
    write_json(
        path / "provenance.json",
        {"started": started.isoformat(), "revision": "abc1234", "command": f"train {root}"},
    )
    write_json(
        path / "splits.json",
        {
            "labeled": labeled,
            "unlabeled": unlabeled,
            "val": [],
            "test": test,
            "dataset": {"name": "Task04_Hippocampus", "root": root, "num_cases": 36},
        },
    )
    ids = [*labeled, *unlabeled, *test]
    write_json(path / "pseudonyms.json", {name: f"case_{i:08x}" for i, name in enumerate(ids)})
    (path / "review.csv").write_text("case_id\nward7_000\n")
    lines = []
    summaries = []
    for round_index in range(rounds):
        plateau = 0.81 + 0.004 * draw + gain * (1 - 0.5**round_index)
        for step in range(50, steps + 1, 50):
            progress = step / steps
            metrics = {
                "losses/total": 1.4 * math.exp(-4 * progress) + 0.15 + 0.02 * generator.normal(),
                "losses/supervised": 1.2 * math.exp(-4 * progress) + 0.1,
                "monitors/lr": 1e-3 * (1 - progress) ** 0.9,
                "monitors/data_wait": 0.03,
                "val/dice": plateau * (1 - math.exp(-6 * progress)) + 0.004 * generator.normal(),
            }
            if round_index:
                metrics |= {
                    "losses/pseudo_label": 0.4 * math.exp(-3 * progress) + 0.05,
                    **{f"monitors/coverage/{name}": 0.5 + 0.4 * progress for name in CLASSES},
                    **{f"monitors/threshold/{name}": 0.95 - 0.2 * progress for name in CLASSES},
                }
            seconds = started.timestamp() + 700 * round_index + step
            lines.append({"round": round_index, "step": step, "time": seconds, "metrics": metrics})
        folder = path / f"round_{round_index}"
        final = {"val/dice": plateau, **{f"val/dice/{name}": plateau for name in CLASSES}}
        reason = ["agreement with the last round is 0.91", "empty for ward7_003 only"]
        done = {
            "round": round_index,
            "steps": steps,
            "seconds": 650.0,
            "gate": {"passed": True, "reasons": reason},
            "final": final,
        }
        write_json(folder / "done.json", done)
        extra = {"agreement": 0.9 + 0.02 * round_index, "kept_cases": 17 + round_index}
        summaries.append({**done, **(extra if round_index else {})})
        for case_id in unlabeled[:2]:
            picture = np.full((60, 180, 3), 60 + 50 * round_index, np.uint8)
            (folder / "overlays").mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / "overlays" / f"{case_id}.png")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "model").mkdir()
    (path / "model" / "weights.safetensors").write_bytes(b"\0" * 1000)
    write_json(path / "model" / "model.json", {"labels": {"1": "anterior"}, "spacing": [1, 1, 1]})
    write_json(
        path / "summary.json",
        {
            "delivered": f"round_{rounds - 1}",
            "rounds": summaries,
            "total_steps": rounds * steps,
            "baseline": {"round": 0, "steps": steps},
            "exit": "delivered",
            "labeled_cases": 4,
            "unlabeled_cases": 20,
        },
    )
    set_state(path, "delivered", rounds - 1, steps)
    return path


def write_evaluation(run: Path, gain: float = 0.02) -> None:
    rounds = {f"round_{r}": 0.81 + gain * (1 - 0.5**r) for r in range(3)}
    paired = {"mean": gain, "low": gain - 0.01, "high": gain + 0.01, "n": 12, "p": 0.01}
    write_json(
        run / "evaluation" / "summary.json",
        {
            "delivered": "round_2",
            "rounds": rounds,
            "paired": paired,
            "verdict": "gain",
            "statement": f"gain: dice of round_2 minus round_0: {gain:+.3f} on 12 test cases",
            "flags": {"schmidt3-b": ["spacing outside the training range"]},
        },
    )


def set_state(run: Path, status: str, round_index: int, step: int) -> None:
    write_json(run / "state.json", {"status": status, "round": round_index, "step": step})


def ask(runs: Path, query: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(runs / "mlflow.db")) as store:
        return store.execute(query).fetchall()


def count_points(runs: Path) -> int:
    """Count the points that came from journals: those of child runs."""
    return int(
        ask(
            runs,
            "select count(*) from metrics where run_uuid in "
            "(select run_uuid from tags where key = 'mlflow.parentRunId')",
        )[0][0]
    )


def count_journal(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return sum(len(json.loads(line)["metrics"]) for line in lines)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs: making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("store")
    os.environ.update(store.ENVIRONMENT)
    store.open_store(find_default_uri(folder))
    return folder / "mlflow.db"


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs"


def test_a_run_is_a_parent_with_a_child_per_round(runs: Path) -> None:
    run = write_run(runs / "mine")
    write_evaluation(run)
    sync_run(run)
    assert sorted(ask(runs, "select name, status from runs")) == [
        ("mine", "FINISHED"),
        ("overlays", "FINISHED"),
        *((f"round {r}", "FINISHED") for r in range(3)),
    ]
    assert count_points(runs) == count_journal(run)
    params = dict(ask(runs, "select key, value from params"))
    assert params["plan.patch_size"] == "40 x 56 x 40"
    assert params["data.root"] == "Task04_Hippocampus"
    assert all(len(value) < 250 for value in params.values())
    curve = ask(runs, "select step, value from metrics where key = 'test/dice' order by step")
    assert [step for step, _ in curve] == [0, 1, 2]
    tags = dict(ask(runs, "select key, value from tags where key in ('verdict', 'draw', 'method')"))
    assert tags == {"verdict": "gain", "draw": "0", "method": "default"}
    note = ask(runs, "select value from tags where key = 'mlflow.note.content'")[0][0]
    assert "minus round_0: +0.020 on 12 test cases" in note
    names = {path.name for path in (runs / "mlartifacts").rglob("*") if path.is_file()}
    assert {"config.yaml", "plan.json", "summary.json", "model.json"} <= names
    assert len([name for name in names if name.startswith("overlay~case_")]) == 3 * 2 * 2
    assert ask(runs, "select name, version from model_versions") == [("Task04_Hippocampus", 1)]
    assert ask(runs, "select alias from registered_model_aliases") == [("champion",)]


def read_columns(runs: Path) -> dict[str, float]:
    """Return the latest values of the parent's metrics that an evaluation gives; NaN as such."""
    rows = ask(runs, "select key, value, is_nan from latest_metrics where key like '%/%'")
    picked = ("test/", "cross_check/")
    return {k: math.nan if nan else v for k, v, nan in rows if k.startswith(picked)}


def test_no_figure_stands_of_an_evaluation_that_is_gone(runs: Path) -> None:
    run = write_run(runs / "mine")
    write_evaluation(run)
    sync_run(run)
    assert read_columns(runs)["test/gain"] == pytest.approx(0.02)
    shutil.rmtree(run / "evaluation")  # as a run does that goes on to another model
    sync_run(run)
    columns = read_columns(runs)
    assert len(columns) == 6
    assert all(math.isnan(value) for value in columns.values())
    (path,) = (runs / "mlartifacts").rglob("evaluation.json")
    assert json.loads(path.read_text()) == {}
    write_evaluation(run, 0.03)
    sync_run(run)
    assert read_columns(runs)["test/gain"] == pytest.approx(0.03)
    assert not any(math.isnan(value) for value in read_columns(runs).values())


def test_what_was_measured_out_of_fold_is_said(runs: Path) -> None:
    run = write_run(runs / "mine")
    paired = {"mean": 0.054, "low": 0.052, "high": 0.055, "n": 12, "p": 0.01}
    statement = "gain: 3 of 3 folds delivered a student; minus labels only +0.054"
    folds = {"verdict": "gain", "paired": paired, "statement": statement, "dice": {"mean": 0.8}}
    write_json(run / "cross_check" / "summary.json", folds)
    sync_run(run)
    tags = dict(ask(runs, "select key, value from tags where key in ('verdict')"))
    assert tags == {"verdict": "gain"}
    note = ask(runs, "select value from tags where key = 'mlflow.note.content'")[0][0]
    assert f"Out of fold: {statement}." in note
    assert "has not been measured" not in note
    assert read_columns(runs) == pytest.approx(
        {"cross_check/gain": 0.054, "cross_check/gain_low": 0.052, "cross_check/gain_high": 0.055,
         "cross_check/dice": 0.8}
    )  # fmt: skip
    write_evaluation(run)  # what the delivered model itself reached says more
    sync_run(run)
    note = ask(runs, "select value from tags where key = 'mlflow.note.content'")[0][0]
    assert "On the test cases: gain" in note


def test_syncing_twice_doubles_nothing(runs: Path) -> None:
    run = write_run(runs / "mine")
    write_evaluation(run)
    sync_run(run)

    def look() -> tuple[Any, ...]:
        tables = ("runs", "metrics", "params", "tags", "model_versions")
        counts = [ask(runs, f"select count(*) from {table}")[0][0] for table in tables]
        return *counts, sorted(path.name for path in (runs / "mlartifacts").rglob("*"))

    before = look()
    sync_run(run)
    assert look() == before
    record = read_json(run / "tracking.json")
    record["own store"]["offset"] = 0  # as if killed between sending and taking note
    write_json(run / "tracking.json", record)
    sync_run(run)
    assert look() == before


def test_points_beyond_the_checkpoint_wait_for_it(runs: Path) -> None:
    run = write_run(runs / "mine")
    set_state(run, "running", 1, 100)
    sync_run(run)
    found = ask(
        runs,
        "select r.name, max(m.step) from metrics m join runs r on r.run_uuid = m.run_uuid "
        "where m.key = 'losses/total' group by r.name order by r.name",
    )
    assert found == [("round 0", 600), ("round 1", 100)]
    assert ask(runs, "select count(*) from model_versions") == [(0,)]
    set_state(run, "delivered", 2, 600)
    sync_run(run)
    assert count_points(runs) == count_journal(run)


def test_a_resumed_run_goes_on_under_the_same_ids(runs: Path) -> None:
    run = write_run(runs / "mine")
    set_state(run, "interrupted", 1, 300)
    sync_run(run)
    ids = read_json(run / "tracking.json")["own store"]
    assert ask(runs, "select status from runs where name = 'mine'") == [("KILLED",)]
    assert ask(runs, "select status from runs where name = 'round 0'") == [("FINISHED",)]
    set_state(run, "running", 1, 400)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["workers"] = 7  # no part of the hash, so a resumed run may bring another one
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    sync_run(run)
    assert ask(runs, "select status from runs where name = 'mine'") == [("RUNNING",)]
    set_state(run, "delivered", 2, 600)
    sync_run(run)
    assert ask(runs, "select status from runs where name = 'mine'") == [("FINISHED",)]
    again = read_json(run / "tracking.json")["own store"]
    assert again["parent"] == ids["parent"]
    assert ids["children"].items() <= again["children"].items()
    assert ask(runs, "select count(*) from runs") == [(5,)]


def test_what_is_not_finite_is_dropped_and_counted(runs: Path) -> None:
    run = write_run(runs / "mine", rounds=1)
    metrics = {"losses/total": math.nan, "val/dice": math.inf, "val/hd95_mm": None, "val/a": 1.0}
    line = {"round": 0, "step": 700, "time": time.time(), "metrics": metrics}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + '{"round": 0, "st')
    sync_run(run)
    found = ask(runs, "select key, value from metrics where step = 700 order by key")
    assert found == [("monitors/nonfinite", 3.0), ("val/a", 1.0)]


@pytest.mark.parametrize("name", ["moved", "what? 100%20 #1 ärzte"])
def test_a_folder_of_runs_that_is_renamed_keeps_the_artifacts_of_all_its_runs(
    runs: Path, name: str
) -> None:
    sync_run(write_run(runs / "first"))
    moved = runs.with_name(name)
    runs.rename(moved)
    sync_run(write_run(moved / "second", draw=1))
    assert not runs.exists()
    assert [path.name for path in moved.parent.iterdir()] == [name], "a stray folder or database"
    client = store.open_store(find_default_uri(moved))
    for run in ("first", "second"):
        parent = read_json(moved / run / "tracking.json")["own store"]["parent"]
        assert {"config.yaml", "model"} <= {file.path for file in client.list_artifacts(parent)}
        path = client.download_artifacts(parent, "plan.json", str(moved.parent))
        assert json.loads(Path(path).read_text())["batch"] == 2
    assert str(runs) not in str(ask(moved, "select artifact_uri from runs"))
    assert str(runs) not in str(ask(moved, "select source, storage_location from model_versions"))


def test_files_that_mlflow_has_lost_are_sent_again(runs: Path) -> None:
    run = write_run(runs / "mine")
    sync_run(run)
    before = sorted(path.name.split("%")[0] for path in (runs / "mlartifacts").rglob("*"))
    counts = ask(runs, "select count(*) from metrics")
    shutil.rmtree(runs / "mlartifacts")
    sync_run(run)
    names = {path.name for path in (runs / "mlartifacts").rglob("*")}
    assert {"config.yaml", "model.json", "plan.json"} <= names
    assert before
    assert ask(runs, "select count(*) from metrics") == counts
    assert ask(runs, "select count(*) from model_versions") == [(1,)]


def make_half(path: Path, statement: str) -> None:
    """Leave a store as a kill of its first start leaves it, or as a disk does."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(statement)


@pytest.mark.parametrize(
    "statement", ["drop table model_versions", "delete from alembic_version", "drop table runs"]
)
def test_a_store_that_was_half_made_is_made_anew(
    runs: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    def make(path: Path) -> None:
        shutil.copy(empty_store, runs / "new.db").replace(path)

    monkeypatch.setattr(store, "_make_store", make)  # which takes seconds
    make_half(runs / "mlflow.db", f"pragma foreign_keys = off; {statement}")
    run = write_run(runs / "mine", rounds=1)
    sync_run(run)
    assert count_points(runs) == count_journal(run)


def test_a_store_with_runs_that_mlflow_does_not_take_is_named_and_kept(runs: Path) -> None:
    run = write_run(runs / "mine", rounds=1)
    sync_run(run)
    make_half(runs / "mlflow.db", "update alembic_version set version_num = '0'")
    before = (runs / "mlflow.db").read_bytes()
    with pytest.raises(InputError, match=r"mlflow\.db: MLflow cannot use this store.*medssl sync"):
        sync_run(run)
    assert (runs / "mlflow.db").read_bytes() == before
    (runs / "mlflow.db").write_bytes(b"no database at all" * 100)
    for read in (lambda: sync_run(run), lambda: serve_runs(runs, port=find_port())):
        with pytest.raises(InputError, match=r"mlflow\.db: MLflow cannot use this store"):
            read()


@pytest.mark.parametrize(
    "statement",
    ["create table patients (name text)", "create table runs (a); insert into runs values (1)"],
)
def test_a_database_of_another_program_is_never_replaced(tmp_path: Path, statement: str) -> None:
    run = write_run(tmp_path / "runs" / "mine", rounds=1)
    make_half(tmp_path / "other.db", statement)
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(InputError, match=r"other\.db: MLflow cannot use this store"):
        sync_run(run, f"sqlite:///{tmp_path / 'other.db'}")
    assert (tmp_path / "other.db").read_bytes() == before


def test_a_kill_while_a_store_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "delete_experiment", die)
        with pytest.raises(KeyboardInterrupt):
            store.open_store(find_default_uri(tmp_path))
    assert not (tmp_path / "mlflow.db").exists()


def test_a_tracking_uri_of_the_environment_is_said_and_not_followed(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert store.choose_store(runs, "auto") == find_default_uri(runs)
    told = capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI is set and not followed" in told
    assert "tracking.uri=$MLFLOW_TRACKING_URI" in told
    assert store.choose_store(runs, "http://server:5000") == "http://server:5000"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "uri", ["~/mlflow.db", "file:///x/mlruns", "runs/mlflow.db", "sqlite:x.db"]
)
def test_what_is_no_store_is_refused_with_what_is_one(uri: str) -> None:
    with pytest.raises(InputError, match=r"no MLflow store; give auto .*sqlite:////FOLDER/"):
        store.check_uri(uri)


def test_the_home_folder_of_an_address_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/" + "home/anna")
    assert store._find_file("sqlite:///~/a/mlflow.db") == Path("/" + "home/anna/a/mlflow.db")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tracking.json", "[]"),
        ("tracking.json", '{"own store": {"parent": 5}}'),
        ("splits.json", '{"dataset": []}'),
        ("summary.json", '{"delivered": "round_0", "rounds": [5]}'),
        ("evaluation/summary.json", '{"rounds": []}'),
        ("round_1/done.json", "[]"),
        ("pseudonyms.json", '{"a": 1}'),
        ("state.json", "null"),
        ("config.yaml", "data: [1"),
        ("config.yaml", "- 1"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_with_its_repair(
    runs: Path, name: str, content: str
) -> None:
    run = write_run(runs / "mine", rounds=2)
    (run / "evaluation").mkdir()
    (run / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: .*(delete it|medssl sync)"):
        sync_run(run)


def test_a_run_that_was_deleted_in_mlflow_comes_back_whole(runs: Path) -> None:
    run = write_run(runs / "mine")
    sync_run(run)
    parent = read_json(run / "tracking.json")["own store"]["parent"]
    store.open_store(find_default_uri(runs)).delete_run(parent)
    sync_run(run)
    active = "(select run_uuid from runs where lifecycle_stage = 'active')"
    assert ask(runs, f"select count(*) from params where run_uuid in {active}")[0][0] > 5


def test_no_case_id_path_or_password_reaches_the_store(runs: Path) -> None:
    run = write_run(runs / "mine")
    write_evaluation(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["tracking"]["uri"] = f"sqlite:///{runs}/mlflow.db"
    config["tracking"]["server"] = "https://anna:swordfish@mlflow.example.org"
    config["network"]["weights"] = "/" + "home/anna/pretrained.safetensors"
    config["network"]["note"] = "starts from ~/ward7/x/best.pt, see ../a/anna_schmidt_002_0000.nii"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = read_json(run / "summary.json")
    summary["rounds"][1]["gate"] = {"passed": False, "reasons": ["ward7_003 is empty"]}
    summary["worst"] = {"schmidt3-b": 0.2}
    write_json(run / "summary.json", summary)
    (run / "report_share.html").write_text("<p>case_00000001: 0.9 </p><a href='/x'>")
    sync_run(run)
    sent = [(runs / "mlflow.db").read_bytes()]
    sent += [path.read_bytes() for path in (runs / "mlartifacts").rglob("*") if path.is_file()]
    names = [str(path.relative_to(runs)).encode() for path in (runs / "mlartifacts").rglob("*")]
    everything = b"\n".join([*sent, *names]).lower()
    for secret in SECRETS:
        assert secret.encode() not in everything
    assert b"case_00000001" in everything  # the reason in plan.json, under its pseudonym


def test_a_model_or_report_that_names_a_case_is_refused(runs: Path) -> None:
    run = write_run(runs / "mine")
    write_json(run / "model" / "model.json", {"provenance": {"trained_on": ["anna_schmidt_001"]}})
    with pytest.raises(InputError, match=r"model\.json holds a case_id or a path"):
        sync_run(run)
    assert ask(runs, "select count(*) from model_versions") == [(0,)]
    assert ask(runs, "select status from runs where name = 'mine'") == [("FINISHED",)]
    (run / "report_share.html").write_text("<td>anna_schmidt_001</td>")
    with pytest.raises(InputError, match=r"report_share\.html holds"):
        sync_run(run)


def test_numbers_of_a_model_are_no_case_ids(runs: Path) -> None:
    run = write_run(runs / "mine")
    names = json.loads((run / "pseudonyms.json").read_text())
    write_json(run / "pseudonyms.json", {**names, "1": "case_a", "128": "case_b"})
    model = {"labels": {"1": "anterior"}, "network": {"filters": [16, 32, 128]}, "cases": 128}
    model["provenance"] = {"weights.safetensors": "0a1b", "steps": 128}
    write_json(run / "model" / "model.json", model)
    sync_run(run)
    assert ask(runs, "select count(*) from model_versions") == [(1,)]


def test_a_large_model_stays_in_the_run_folder(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send, "_MODEL_LIMIT", 500)
    sync_run(write_run(runs / "mine"))
    names = {path.name for path in (runs / "mlartifacts").rglob("*")}
    assert "model.json" in names
    assert "weights.safetensors" not in names


@pytest.mark.slow
def test_no_connection_is_attempted_with_the_folders_own_store(runs: Path) -> None:
    run = write_run(runs / "mine")
    code = (
        "import sys\nfrom pathlib import Path\nseen = []\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        seen.append((event, args[1:]))\n"
        "        raise OSError('no network')\n"
        "sys.addaudithook(hook)\n"
        "from medssl.tracking import sync_run\n"
        "sync_run(Path(sys.argv[1]))\nimport time; time.sleep(1)\nassert not seen, seen\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in store.ENVIRONMENT}
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, env=environment)
    assert count_points(runs) == count_journal(run)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        sync_run(tmp_path)
    with pytest.raises(InputError, match="no MLflow store"):
        serve_runs(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        serve_runs(tmp_path / "missing")


def test_a_port_in_use_is_answered_with_a_free_one(runs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} .* in use; --port \d+ is free"):
            serve_runs(runs, port=port)


@pytest.mark.slow
def test_the_training_process_never_imports_mlflow_and_notify_costs_nothing(runs: Path) -> None:
    run = write_run(runs / "mine")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom medssl.tracking import Mirror\n"
        "mirror = Mirror(Path(sys.argv[1]))\n"
        "start = time.perf_counter()\n"
        "for _ in range(1000): mirror.notify()\n"
        "assert time.perf_counter() - start < 0.5\n"
        "mirror.close(60)\nassert 'mlflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], check=True, capture_output=True, text=True
    )
    assert done.stdout == ""
    assert count_points(runs) == count_journal(run)


def test_a_dead_server_costs_bounded_time_and_sync_makes_up_for_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(runs / "mine")
    port = find_port()
    start = time.monotonic()
    mirror = Mirror(run, f"http://127.0.0.1:{port}", pause_s=0.1)
    mirror.notify()
    mirror.close(timeout_s=8)
    assert time.monotonic() - start < 12
    assert f"`medssl sync {run}` uploads it later" in capsys.readouterr().out
    with pytest.raises(InputError, match="did not take mine"):
        sync_run(run, f"http://127.0.0.1:{port}")
    sync_run(run, find_default_uri(runs))
    assert count_points(runs) == count_journal(run)


@pytest.mark.slow
def test_a_process_that_dies_is_started_again(runs: Path) -> None:
    run = write_run(runs / "mine")
    set_state(run, "running", 0, 300)
    mirror = Mirror(run, pause_s=0.1)
    mirror.notify()
    wait_for(lambda: mirror._process is not None and count_points(runs) > 0)
    assert mirror._process is not None
    mirror._process.kill()
    set_state(run, "delivered", 2, 600)
    mirror.notify()
    mirror.close(60)
    sync_run(run)
    assert count_points(runs) == count_journal(run)


def test_a_process_that_takes_too_long_is_said_to_be_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its end says to the thread that waits for it is no reason."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    monkeypatch.setattr(mirror_module, "_start_process", lambda _: subprocess.Popen(sleep, **pipes))
    for _ in range(5):
        Mirror(tmp_path).close(timeout_s=0.3)
        assert "no answer within 0.3 s" in capsys.readouterr().out


@pytest.mark.slow
def test_four_simultaneous_first_starts_all_succeed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folders = [write_run(runs / f"run_{index}", draw=index) for index in range(4)]
    code = "import sys; from pathlib import Path; from medssl.tracking import sync_run\n"
    code += "sync_run(Path(sys.argv[1]))"
    started = [processes.Process("-c", code, run) for run in folders]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0, 0]
    assert ask(runs, "select count(*) from runs") == [(20,)]
    assert ask(runs, "select name from experiments where lifecycle_stage = 'active'") == [
        ("Task04_Hippocampus",)
    ]
    assert str(Path.cwd()) not in str(ask(runs, "select * from experiments"))
    assert not list(runs.glob(".mlflow.db.new*"))


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Any, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def heed_interrupts() -> None:
    """Take SIGINT as a terminal gives it: a job in the background inherits it as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def run_server(runs: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Run `serve_runs` in a process of its own, and end it as a person would."""
    code = "import sys; from pathlib import Path; from medssl.tracking import serve_runs\n"
    code += "sys.exit(serve_runs(Path(sys.argv[1]), port=int(sys.argv[2])))"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(runs), str(port)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        assert process.stdout is not None
        lines = []
        while "Ctrl-C stops it\n" not in lines:
            lines.append(process.stdout.readline())
            assert lines[-1], "the server ended"
        assert f"  ssh -L {port}:localhost:{port} user@server\n" in lines
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_server_that_dies_midway_gets_every_point_once_it_is_back(runs: Path) -> None:
    run = write_run(runs / "mine")
    uri = f"http://127.0.0.1:{(port := find_port())}"
    set_state(run, "running", 0, 300)
    with run_server(runs, port):
        mirror = Mirror(run, uri, pause_s=0.2)
        mirror.notify()
        wait_for(lambda: count_points(runs) > 0)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(f"{uri}/health").status == 200
    assert server._is_free("127.0.0.1", port), "a worker of the server is still there"
    set_state(run, "running", 1, 300)
    for _ in range(20):
        mirror.notify()
        time.sleep(0.1)
    set_state(run, "delivered", 2, 600)
    with run_server(runs, port):
        mirror.close(120)
        assert count_points(runs) == count_journal(run)
        assert ask(runs, "select status from runs where name = 'mine'") == [("FINISHED",)]
        assert ask(runs, "select name from model_versions") == [("Task04_Hippocampus",)]
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(uri) as page:
            assert b"MLflow" in page.read()
    files = {path.name for path in (runs / "mlartifacts").rglob("*")}
    assert {"config.yaml", "model.json"} <= files
