"""The whole way on small phantoms: resume to the same bits, locked labels, delivery."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import processes
import pytest
from commands import run_command
from safetensors.numpy import load_file

from medssl.data.phantoms import write_phantoms
from medssl.runs import hash_file, hold_lock

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brief")]

SETTINGS = [
    "labeled=3",
    "test=3",
    "steps=[60,12]",
    "network.width=0.5",
    "rounds=2",
    "plan.patch_size=[24,24,24]",
    "train.checkpoint_every=10",
    "train.log_every=10",
    "filter.uncertainty.passes=3",
    "network.depth=3",
    "train.lr=4e-3",
    "plan.flips=[0]",
    "tracking.uri=none",
]


def medssl(*arguments: object, code: int = 0) -> str:
    """Run the command line in this process and return what it printed."""
    ended, told = run_command(*arguments)
    assert ended == code, told
    return told


def read_journal(run: Path) -> list[tuple[object, ...]]:
    """Return the journal without what depends on the clock."""
    clocked = ("monitors/steps_per_second", "monitors/data_wait")
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (e["round"], e["step"], sorted((k, v) for k, v in e["metrics"].items() if k not in clocked))
        for e in entries
    ]


def hash_models(run: Path) -> dict[str, str]:
    """Return the hash of every model of a run."""
    found = sorted(run.glob("**/weights.safetensors"))
    return {str(path.relative_to(run)): hash_file(path) for path in found}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labeled phantoms, of which the settings keep three labels."""
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder, num_labeled=12, num_unlabeled=0, num_test=0, shape=(28, 24, 24))
    with (folder / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["case_id", "image", "label"])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: row[key] for key in ("case_id", "image", "label")})
    for path in (folder / "labels").iterdir():  # the organ: the rest is too small for few steps
        image = nib.load(path)
        values = np.asarray(image.dataobj)
        organ = np.isin(values, (1, 2)).astype(np.uint8)
        nib.save(nib.Nifti1Image(organ, image.affine), path)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    medssl("train", data, *SETTINGS, "--run", run)
    return run


@pytest.fixture(scope="module")
def evaluated(finished: Path) -> Path:
    """The same run, measured on its test cases."""
    medssl("evaluate", finished)
    return finished


def test_a_run_delivers_a_model_that_predicts_on_the_native_grid(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    scan = sorted((data / "images").glob("*.nii.gz"))[0]
    medssl("predict", finished, scan, "--out", tmp_path, "--probs", "--uncertainty")
    mask, image = nib.load(tmp_path / scan.name), nib.load(scan)
    assert mask.shape == image.shape
    assert np.allclose(mask.affine, image.affine)
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}
    stem = scan.name.removesuffix(".nii.gz")
    probs = nib.load(tmp_path / f"{stem}_probs.nii.gz").get_fdata()
    assert np.allclose(probs.sum(-1), 1, atol=1e-3)
    assert nib.load(tmp_path / f"{stem}_uncertainty.nii.gz").get_fdata().max() > 0


def test_each_student_learned_from_accepted_pseudo_labels(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2]
    assert all(entry["num_unlabeled"] > 0 for entry in summary["rounds"][1:])
    hashes = hash_models(finished)
    assert len({hashes[f"round_{r}/model/weights.safetensors"] for r in range(3)}) == 3


def test_evaluation_measures_the_own_test_cases_and_states_that_they_are_few(
    evaluated: Path,
) -> None:
    summary = json.loads((evaluated / "evaluation" / "summary.json").read_text())
    assert summary["num_cases"] == 3
    assert summary["verdict"] == "no verdict"
    assert "No verdict: too few patients" in (evaluated / "report.html").read_text()


def test_one_round_is_measured_on_the_test_cases_of_its_run(evaluated: Path) -> None:
    tables = {path: path.read_bytes() for path in evaluated.glob("evaluation/**/per_case.csv")}
    (evaluated / "evaluation" / "round_1" / "per_case.csv").unlink()
    assert "3 cases" in medssl("evaluate", evaluated, "--round", "1")
    assert "3 cases" in medssl("evaluate", evaluated / "round_0")
    assert {p: p.read_bytes() for p in evaluated.glob("evaluation/**/per_case.csv")} == tables
    assert all(
        f"round_{r}: 3 cases" in medssl("evaluate", evaluated, "--round", "all") for r in "02"
    )
    assert "done are: 0, 1, 2" in medssl("evaluate", evaluated, "--round", "7", code=2)
    assert "give a number" in medssl("evaluate", evaluated, "--round", "last", code=2)
    given = (evaluated, evaluated, "--round", "1", "--out", evaluated.parent / "x")
    assert f"{evaluated}/round_1" in medssl("evaluate", *given, code=2)


def test_a_dry_run_plans_anew_whatever_lies_in_the_run_folder(data: Path, finished: Path) -> None:
    before = (finished / "plan.json").read_bytes()
    given = ("labeled=3", "test=3", "plan.patch_size=[16,24,16]", "steps=7", "network.depth=3")
    text = medssl("train", data, *given, "--dry-run", "--run", finished)
    assert "patch 16x24x16" in text
    assert "train.steps: 7" in text
    assert len(text.splitlines()) < 40
    assert "7 steps" in text
    assert (finished / "plan.json").read_bytes() == before
    copied = shutil.copytree(data, finished.parent / "cohort v1.2")
    assert "run folder: runs/cohort v1.2\n" in medssl("train", copied, *given, "--dry-run")


def test_data_are_evaluated_as_their_settings_say(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    label = sorted((data / "labels").iterdir())[0]
    image = nib.load(label)
    values = np.asarray(image.dataobj).copy()
    values[:, :, :5] = 9
    scan = np.asarray(nib.load(data / "images" / label.name).dataobj) * np.float32(1.01)
    for kind, array in (("labels", values), ("images", scan)):  # of the training it would be known
        (tmp_path / "new" / kind).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "new" / kind / "new_1.nii.gz")
    given = ("evaluate", finished, tmp_path / "new", "--out", tmp_path / "out")
    assert "data.ignore=9" in medssl(*given, code=2)
    assert "only data.KEY=VALUE" in medssl(*given, "steps=3", code=2)
    medssl(*given, "data.ignore=9")
    assert (tmp_path / "out" / "per_case.csv").is_file()


def test_tables_of_other_scans_do_not_replace_those_of_a_run(data: Path, finished: Path) -> None:
    before = (finished / "summary.json").read_bytes()
    for out in (finished, finished / "evaluation", finished / "evaluation" / "other"):
        assert "name a new folder" in medssl("evaluate", finished, data, "--out", out, code=2)
    assert "RUN/evaluation" in medssl("evaluate", finished, "--out", data, code=2)
    assert (finished / "summary.json").read_bytes() == before


def test_an_output_folder_that_is_a_file_is_an_error_and_no_traceback(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = medssl("evaluate", finished, data, "--out", tmp_path / "file", code=2)
    assert "name another folder" in out
    assert "Traceback" not in out


def test_one_process_at_a_time_trains_a_run(data: Path, finished: Path) -> None:
    with hold_lock(finished.parent / f".{finished.name}.lock"):
        for command in (["train", data, *SETTINGS, "--run", finished], ["evaluate", finished]):
            assert "another process works on this run" in medssl(*command, code=2)
    assert json.loads((finished / "state.json").read_text())["status"] == "delivered"


def test_a_path_that_is_no_run_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    for command in ("evaluate", "report", "sync"):
        medssl(command, tmp_path / "typo" / "run", code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("amount", ["-1", "nan", "inf", "many"])
def test_amounts_are_numbers_from_0_on(data: Path, finished: Path, amount: str) -> None:
    for command in (("evaluate", finished, "--tolerance"), ("train", data, "--max-hours")):
        assert "no number from 0 on" in medssl(*command, amount, code=2)


def test_the_finished_run_is_not_trained_again(data: Path, evaluated: Path) -> None:
    before = hash_models(evaluated)
    times = {p: p.stat().st_mtime_ns for p in evaluated.glob("round_*/checkpoint.pt")}
    medssl("train", data, *SETTINGS, "--run", evaluated)
    assert hash_models(evaluated) == before
    assert times == {p: p.stat().st_mtime_ns for p in evaluated.glob("round_*/checkpoint.pt")}
    assert (evaluated / "evaluation" / "summary.json").is_file()


def test_another_configuration_in_the_same_folder_is_refused(data: Path, finished: Path) -> None:
    text = medssl("train", data, *SETTINGS, "seed=5", "--run", finished, code=2)
    assert "--restart" in text


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "killed"
    command = ["-m", "medssl", "train", data, *SETTINGS, "--run", run]
    for mark in ("round_0/checkpoint.pt", "round_1/checkpoint.pt", "round_2/checkpoint.pt"):
        process = processes.Process(*command)
        while process.poll() is None and not (run / mark).exists():
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with hold_lock(run.parent / f".{run.name}.lock"):
            pass  # its loaders have noticed too
    medssl("train", data, *SETTINGS, "--run", run)
    assert hash_models(run) == hash_models(finished)
    assert read_journal(run) == read_journal(finished)


def test_ctrl_c_leaves_a_usable_model_and_the_same_command_goes_on(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "stopped"
    command = ["-m", "medssl", "train", data, *SETTINGS, "tracking.uri=auto", "--run", run]
    process = processes.Process(*command)
    while process.poll() is None and not (run / "round_0" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert json.loads((run / "state.json").read_text())["status"] == "interrupted"
    scan = sorted((data / "images").glob("*.nii.gz"))[0]
    medssl("predict", run, scan, "--out", tmp_path / "masks")
    assert "the run is not finished" in medssl("evaluate", run)
    assert (run / "evaluation" / "summary.json").is_file()
    medssl("train", data, *SETTINGS, "--run", run)
    assert not (run / "evaluation").exists()  # it was of a model that is no longer delivered
    assert hash_models(run) == hash_models(finished)


@pytest.fixture(scope="module")
def mixed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Return what a model of labels alone says of six scans of its kind and four of other kinds."""
    folder = tmp_path_factory.mktemp("mixed")
    scans = folder / "scans"
    shutil.copytree(data, scans)
    others = folder / "others"
    write_phantoms(others, 0, 2, 0, shape=(28, 24, 24), family="vessels")
    rng = np.random.default_rng(0)
    with (scans / "cases.csv").open("a", newline="") as file:
        for index, path in enumerate(sorted((scans / "images").iterdir())[:2]):
            scan = nib.load(path)
            values = rng.permutation(np.asarray(scan.dataobj).ravel()).reshape(scan.shape)
            nib.save(nib.Nifti1Image(values, scan.affine), scans / f"images/noise_{index}.nii.gz")
        for index, path in enumerate(sorted((others / "images").iterdir())):
            shutil.copy(path, scans / f"images/anatomy_{index}.nii.gz")
        for name in ("noise_0", "noise_1", "anatomy_0", "anatomy_1"):
            csv.writer(file).writerow([name, f"images/{name}.nii.gz", ""])
    run = folder / "runs" / "mixed"
    one = ("method=classic", "rounds=1", "steps=[120,1]", "network.width=1.0")
    settings = [*SETTINGS, *one, "filter.case.confidence=0.57"]  # after 120 steps
    assert run_command("train", scans, *settings, "--run", run)[0] in (0, 3)
    with (run / "round_0" / "review.csv").open(newline="") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def list_accepted(rows: dict[str, dict[str, str]], kind: str) -> list[str]:
    return [row["accepted"] for name, row in rows.items() if name.startswith(kind)]


def test_scans_without_anatomy_fall_out_by_their_confidence(mixed) -> None:
    assert list_accepted(mixed, "noise") == ["0", "0"]
    assert all(r["reason"].startswith("confidence") for n, r in mixed.items() if "noise" in n)
    assert list_accepted(mixed, "organs") == ["1"] * 6


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="a teacher is as sure of another anatomy"
)
def test_scans_of_another_anatomy_fall_out_by_their_confidence(mixed) -> None:
    assert "1" not in list_accepted(mixed, "anatomy")


AUDITED = """
import os, sys
opened = []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(args[0]))
sys.addaudithook(hook)
from medssl.cli import main
try:
    main()
finally:
    with open(os.environ["OPENED"], "w") as file:
        file.write("\\n".join(opened))
"""


def train_audited(data: Path, run: Path, until: str = "") -> tuple[int, set[str]]:
    """Train, until a file is there; return the exit code and the names of labels that were read."""
    listing = run.parent / f"{run.name}_opened.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    command = ["-c", AUDITED, "train", data, *SETTINGS, "--run", run]
    process = processes.Process(*command, env={**os.environ, "OPENED": str(listing)})
    while process.poll() is None and not (until and (run / until).exists()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code = process.wait()
    paths = [Path(line) for line in listing.read_text().splitlines()]
    return code, {p.name for p in paths if p.parent == data / "labels"}


def test_labels_of_unlabeled_and_test_cases_change_no_bit_and_are_never_opened(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    splits = json.loads((finished / "splits.json").read_text())
    labeled = {f"{case_id}.nii.gz" for case_id in splits["labeled"]}
    poisoned = tmp_path / "poisoned"
    shutil.copytree(data, poisoned)
    names = {path.name for path in (poisoned / "labels").iterdir()}
    assert labeled < names
    for name in names - labeled:
        (poisoned / "labels" / name).write_bytes(b"garbage")
    code, opened = train_audited(poisoned, tmp_path / "runs" / "poisoned")
    assert code == 0
    assert opened == labeled
    assert hash_models(tmp_path / "runs" / "poisoned") == hash_models(finished)


def test_the_poison_test_goes_red_for_a_label_that_is_used(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    splits = json.loads((finished / "splits.json").read_text())
    poisoned = tmp_path / "poisoned"
    shutil.copytree(data, poisoned)
    path = poisoned / "labels" / f"{splits['labeled'][0]}.nii.gz"
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    nib.save(nib.Nifti1Image(np.roll(values, 2, axis=0), image.affine), path)
    weights = "round_0/model/weights.safetensors"
    code, opened = train_audited(poisoned, tmp_path / "runs" / "control", until=weights)
    assert code == 130
    assert path.name in opened
    ours = load_file(tmp_path / "runs" / "control" / weights)
    theirs = load_file(finished / weights)
    assert any(not np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.gpu
def test_a_model_of_a_gpu_segments_alike_on_a_processor(data: Path, tmp_path: Path) -> None:
    run, scan = tmp_path / "run", sorted((data / "images").iterdir())[0]
    medssl("train", data, *SETTINGS, "rounds=1", "device=cuda", "--run", run)
    assert json.loads((run / "plan.json").read_text())["device"].startswith("cuda")
    masks = []
    for device in ("cuda", "cpu"):
        medssl("predict", run, scan, "--out", tmp_path / device, "--device", device)
        (path,) = (tmp_path / device).glob("*.nii.gz")
        masks.append(np.asarray(nib.load(path).dataobj))
    assert masks[0].any()
    assert (masks[0] != masks[1]).mean() < 0.001
