"""What `scripts/compare_peers.py` does with its CSV, and the peers on scans of seconds."""

import importlib.util
import itertools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medssl import metrics
from medssl.config import InputError
from medssl.data.cases import Case
from medssl.data.io import read_image, read_label
from medssl.data.layouts import read_dataset
from medssl.data.phantoms import write_phantoms
from medssl.runs import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["validation=0"]
LIKE = [("round_0", 30, 10.0, 0.4), ("recipe", 70, 40.0, 0.8), ("labels", 130, 50.0, 0.6)]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import compare_peers

    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 100)
    return compare_peers


@pytest.fixture
def like(tmp_path):
    """The CSV of a study: three arms of draws 0 and 1, the second of which is twice as slow."""
    return write_rows(
        tmp_path / "like.csv",
        [(d, arm, n, t * (1 + d), dice) for arm, n, t, dice in LIKE for d in (0, 1)],
    )


def write_rows(path, arms):
    lines = ["draw,arm,steps,minutes,revision,precision,case_id,patient_id,dice/organ,dice"]
    for (draw, arm, steps, minutes, dice), i in itertools.product(arms, range(3)):
        value = dice + 0.01 * (i - 1)
        lines.append(f"{draw},{arm},{steps},{minutes},abc,float32,c{i},p{i},{value},{value}")
    path.write_text("\n".join(lines) + "\n")
    return path


def make_study(peers, tmp_path, data="DATA"):
    work = tmp_path / "work"
    return peers.Study(str(data), tuple(SETTINGS), tmp_path / "peers.csv", work, 0)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Two labeled and two test scans, of which the third is stored left-posterior-superior."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, num_labeled=2, num_unlabeled=0, num_test=2, shape=(20, 24, 16))
    return folder


# the budget


def test_a_budget_is_spent_by_its_clock_and_not_beyond_its_end(peers):
    from peers.budget import Budget

    now = iter([100.0, 100.0, 115.0, 115.0, 190.0, 190.0])
    budget = Budget(0.5, clock=lambda: next(now))
    assert [budget.progress, budget.spent, budget.progress] == [0.0, 0.25, 0.5]
    assert [budget.progress, budget.spent] == [1.0, 1.5]


def test_a_budget_counts_work_and_not_waiting(peers):
    from peers.budget import Budget

    budget = Budget(1)
    time.sleep(0.3)
    waited = budget.spent
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert waited < 0.1 / 60
    assert budget.spent >= 0.3 / 60


def test_peers_have_the_median_minutes_of_the_recipe_and_multiples(peers, like):
    arms = peers.list_arms(["recipe", "monai"], [1, 3], [7.5], like)
    assert arms == [
        peers.Arm("recipe@7.5", "recipe", 7.5),
        peers.Arm("monai@7.5", "monai", 7.5),
        peers.Arm("monai", "monai", 60.0),
        peers.Arm("monai_3", "monai", 180.0),
    ]
    assert [peers.name_family(arm.name) for arm in arms] == [arm.family for arm in arms]
    with pytest.raises(InputError, match="has no arm recipe"):
        peers.list_arms(["monai"], [1], [], like.with_name("other.csv"))


def test_our_rounds_are_shortened_in_proportion_to_the_minutes(peers, like):
    recipe, labels = (peers.Arm("", family, 15.0) for family in ("recipe", "labels"))
    assert peers.fit_steps(like, recipe, rounds=2) == ["steps=[8, 5, 5]"]  # a quarter of 60 minutes
    assert peers.fit_steps(like, labels, rounds=2) == ["rounds=0", "steps=26"]  # a fifth of 75


# the cases, and what masks are worth


def test_a_data_set_for_nnunet_holds_the_same_voxels_in_the_same_places(peers, phantoms, tmp_path):
    from peers import nnunet

    cases = read_dataset(phantoms).cases
    scan = read_image(cases[2].images, 1)  # left-posterior-superior
    second = tmp_path / "second.nii.gz"
    nib.save(nib.Nifti1Image(-scan.array[0], scan.affine), second)
    label = tmp_path / "label.nii.gz"
    classes, _ = read_label(cases[2].label, (0, 1, 2, 3), None)
    values = np.array([0, 2, 7, 9], np.uint8)[classes]
    nib.save(nib.Nifti1Image(values, scan.affine), label)
    case = Case("a", (cases[2].images[0], second), label, "a")
    names = {0: "nothing", 2: "organ", 7: "lesion", 9: "vessel"}
    nnunet.write_raw(tmp_path / "raw", names, ("CT", ""), [case], [replace(case, case_id="b")])
    raw = read_dataset(tmp_path / "raw")
    assert raw.format == "nnunet"
    assert raw.channels == ("CT", "image")
    assert raw.labels == {0: "background", 1: "organ", 2: "lesion", 3: "vessel"}
    (copy,) = (case for case in raw.cases if case.label)
    volume = read_image(copy.images, 2)
    assert np.array_equal(volume.array, np.stack([scan.array[0], -scan.array[0]]))
    assert np.allclose(volume.affine, scan.affine)
    found, affine = read_label(copy.label, (0, 1, 2, 3), None)
    assert np.array_equal(found, classes)
    assert np.allclose(affine, scan.affine)
    assert len(list((tmp_path / "raw" / "imagesTs").iterdir())) == 2
    assert read_json(tmp_path / "raw" / "dataset.json")["numTraining"] == 1


def test_only_labels_that_train_are_written(peers, phantoms, tmp_path):
    draw = peers.prepare_draw(make_study(peers, tmp_path, phantoms), 0)
    labels = sorted(path.name for path in (draw.raw / "labelsTr").iterdir())
    test = sorted(path.name for path in (draw.raw / "imagesTs").iterdir())
    assert labels == ["organs_000.nii.gz", "organs_001.nii.gz"]
    assert test == ["organs_002_0000.nii.gz", "organs_003_0000.nii.gz"]
    assert [case.case_id for case in draw.test] == ["organs_002", "organs_003"]
    written = (draw.raw / "dataset.json").stat().st_mtime_ns
    assert peers.prepare_draw(make_study(peers, tmp_path, phantoms), 0) == draw
    assert (draw.raw / "dataset.json").stat().st_mtime_ns == written


def write_masks(folder, cases, change=lambda classes: classes, moved=0.0):
    folder.mkdir(exist_ok=True)
    for case in cases:
        classes, affine = read_label(case.label, (0, 1, 2, 3), None)
        affine = affine + moved * np.eye(4, k=3)
        mask = nib.Nifti1Image(change(classes), affine)
        nib.save(mask, folder / f"{case.case_id}.nii.gz")


def test_masks_are_measured_class_by_class(peers, phantoms, tmp_path):
    draw = peers.prepare_draw(make_study(peers, tmp_path, phantoms), 0)
    write_masks(tmp_path / "masks", draw.test, lambda c: np.where(c == 1, 0, c).astype(np.uint8))
    rows = peers.measure_masks(tmp_path / "masks", draw.test, draw.labels)
    assert [row["case_id"] for row in rows] == ["organs_002", "organs_003"]
    for row in rows:
        assert (row["dice/class_1"], row["dice/class_2"], row["dice/class_3"]) == (0, 1, 1)
        assert row["dice"] == pytest.approx(2 / 3)


def test_masks_on_another_grid_are_refused(peers, phantoms, tmp_path):
    draw = peers.prepare_draw(make_study(peers, tmp_path, phantoms), 0)
    write_masks(tmp_path / "masks", draw.test, moved=3.0)
    with pytest.raises(InputError, match=r"organs_002\.nii\.gz: lies on another grid"):
        peers.measure_masks(tmp_path / "masks", draw.test, draw.labels)
    write_masks(tmp_path / "masks", draw.test, lambda classes: classes[1:])
    with pytest.raises(InputError, match="lies on another grid"):
        peers.measure_masks(tmp_path / "masks", draw.test, draw.labels)


@pytest.mark.parametrize(("spacing", "dimension"), [((1, 1, 3), 2), ((1, 1, 2.9), 3)])
def test_thick_slices_are_segmented_in_2d(peers, tmp_path, spacing, dimension):
    (tmp_path / "imagesTr").mkdir()
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.diag([*spacing, 1]))
    nib.save(image, tmp_path / "imagesTr" / "a_0000.nii.gz")
    assert peers.choose_dimension(tmp_path) == dimension


# the study


@pytest.fixture
def trained(peers, monkeypatch):
    """The trainings that a study asks for; a peer's masks are the labels."""
    calls = []

    def train(data, folder, configuration, minutes):
        calls.append(("train", folder.name, configuration, minutes))
        folder.mkdir(parents=True)
        write_json(folder / "spent.json", {"steps": 5, "minutes": minutes})

    def predict(data, folder, configuration):
        calls.append(("predict", folder.name, configuration))
        cases = [case for case in read_dataset(peers.test_data).cases if case.split == "test"]
        write_masks(folder / "masks", cases)

    monkeypatch.setattr(peers.nnunet, "train", train)
    monkeypatch.setattr(peers.nnunet, "predict", predict)
    monkeypatch.setattr(peers.nnunet, "plan_data", lambda data, configuration: None)
    return calls


def test_an_arm_of_the_csv_is_not_run_again(peers, phantoms, trained, tmp_path, like, monkeypatch):
    monkeypatch.setattr(peers, "test_data", phantoms, raising=False)
    arm = peers.Arm("nnunet@2", "nnunet", 2.0)
    for name in ("work", "elsewhere"):
        study = peers.Study(str(phantoms), (), tmp_path / "peers.csv", tmp_path / name, 0)
        peers.run_arm(study, like, 0, arm)
    assert [call[2:] for call in trained] == [("3d_fullres", 2.0), ("3d_fullres",)]
    rows = peers.read_rows(tmp_path / "peers.csv")
    assert list(rows[0]) == [
        *("draw", "arm", "steps", "minutes", "revision", "precision", "case_id", "patient_id"),
        *("dice/class_1", "dice/class_2", "dice/class_3", "dice"),
    ]
    assert [(row["arm"], row["steps"], row["minutes"], float(row["dice"])) for row in rows] == [
        ("nnunet@2", "5", "2.0", 1.0)
    ] * 2


def test_what_was_killed_in_its_training_is_begun_anew_and_later_goes_on(
    peers, phantoms, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(peers, "test_data", phantoms, raising=False)
    draw = peers.prepare_draw(make_study(peers, tmp_path, phantoms), 0)
    folder, arm = tmp_path / "arm", peers.Arm("nnunet", "nnunet", 1.0)
    (folder / "masks").mkdir(parents=True)
    (folder / "masks" / "stale").touch()
    for _ in range(2):
        peers.run_peer(draw, folder, arm)
        assert not (folder / "masks" / "stale").exists()
        (folder / "masks" / "stale").touch()
    assert [call[0] for call in trained] == ["train", "predict", "predict"]


def test_minutes_of_ours_are_those_of_the_command(peers, tmp_path, like, tiny_plan, monkeypatch):
    commands = []

    def run_command(*arguments):
        commands.append(arguments)
        folder = Path(arguments[-1])
        if arguments[0] == "train":
            code = "import time\nwhile time.process_time() < 0.7: pass"
            subprocess.run([sys.executable, "-c", code], check=True)
            write_json(folder / "summary.json", {"total_steps": 18})
            write_json(folder / "plan.json", tiny_plan.model_dump(mode="json"))
        else:
            (folder / "evaluation").mkdir()
            table = "case_id,patient_id,dice/organ,dice\nc0,p0,0.5,0.5\n"
            (folder / "evaluation" / "per_case.csv").write_text(table)

    monkeypatch.setattr(peers, "run_command", run_command)
    study = make_study(peers, tmp_path, tmp_path)
    peers.run_arm(study, like, 1, peers.Arm("recipe@15", "recipe", 15.0))
    assert "steps=[8, 5, 5]" in commands[0]
    assert "draw=1" in commands[0]
    (row,) = peers.read_rows(study.csv)
    assert (row["arm"], row["steps"], row["precision"]) == ("recipe@15", "18", "float32")
    assert 0.01 <= float(row["minutes"]) < 0.2


# the tables


def test_the_table_has_minutes_and_differences_to_the_recipe(peers, tmp_path, like):
    arms = [(0, "monai_3", 9, 120.0, 0.7), (1, "monai_3", 9, 120.0, 0.5)]
    path = write_rows(tmp_path / "peers.csv", [*arms, (0, "monai", 3, 40.0, 0.3)])
    rows = peers.tabulate(path, like)
    assert [row["arm"] for row in rows] == ["labels", "recipe", "monai", "monai_3"]
    last = rows[-1]
    assert (last["draws"], last["minutes"], last["dice"]) == ("0, 1", "120.0", "0.6000")
    assert last["per draw"] == "0.700, 0.500"
    assert last["minus recipe"].startswith("-0.2000")
    assert rows[2]["minus recipe"].startswith("-0.5000")
    assert rows[1]["minus recipe"] == ""


def test_the_least_minutes_are_those_of_all_draws(peers, tmp_path, like):
    arms = [(0, "monai@5", 9, 5.0, 0.9), (1, "monai@5", 9, 5.0, 0.5)]
    arms += [(d, "monai@9", 9, 9.0 + d, 0.75) for d in (0, 1)]
    path = write_rows(tmp_path / "peers.csv", [*arms, (0, "monai@1", 9, 1.0, 0.9)])
    rows = peers.tabulate_reach(path, like, [0.4, 0.7, 0.85])
    assert [list(row.values()) for row in rows] == [
        ["labels", "0, 1", "15.0", "not in 75.0", "not in 75.0"],
        ["recipe", "0, 1", "60.0", "60.0", "not in 60.0"],
        ["monai", "0, 1", "5.0", "5.0", "not in 9.5"],
    ]


def test_the_command_prints_the_tables(peers, tmp_path, like, phantoms, monkeypatch, capsys):
    path = write_rows(tmp_path / "peers.csv", [(d, "monai", 3, 60.0, 0.7) for d in (0, 1)])
    options = [str(phantoms), "--csv", str(path), "--like", str(like), "--table"]
    monkeypatch.setattr("sys.argv", ["compare_peers.py", *options, "--reach", "0.65"])
    peers.main()
    printed = capsys.readouterr().out
    assert "| monai | 0, 1 | 60.0 |" in printed
    assert "| monai | 0, 1 | 60.0 | 0.7000 |" in printed
    with pytest.raises(peers.argparse.ArgumentTypeError, match="no arm; there are labels"):
        peers.split_families("monay")


# the peers themselves


def test_the_plain_script_brings_classes_back_to_the_scans_own_grids(peers, phantoms, tmp_path):
    from peers import plain_monai

    draw = peers.prepare_draw(make_study(peers, tmp_path, phantoms), 0)
    test = plain_monai.list_cases(draw.raw, "Ts")
    spacing, _ = plain_monai.choose_grid(test, 3)
    before = plain_monai.Compose(plain_monai.prepare(["image"], spacing))

    def infer(image, network):
        return torch.cat([-image, image], 1)  # what is brighter than the mean

    plain_monai.predict(torch.nn.Identity(), test, before, infer, tmp_path / "masks")
    for case in draw.test:  # the first of them is stored left-posterior-superior
        volume = read_image(case.images, 1)
        bright = volume.array[0] > volume.array[volume.array != 0].mean()
        mask, affine = read_label(tmp_path / "masks" / f"{case.case_id}.nii.gz", (0, 1), None)
        assert np.mean(mask == bright) > 0.999
        assert np.allclose(affine, volume.affine)


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [2, 3])
def test_the_plain_script_trains_once_for_its_minutes(
    peers, phantoms, tmp_path, monkeypatch, dimension
):
    from peers import plain_monai

    draw = peers.prepare_draw(make_study(peers, tmp_path, phantoms), 0)
    options = ["--minutes", "0.1", "--dimension", str(dimension)]
    monkeypatch.setattr("sys.argv", ["plain_monai", str(draw.raw), str(tmp_path / "o"), *options])
    for _ in range(2):
        plain_monai.main()
        spent = read_json(tmp_path / "o" / "spent.json")
        assert spent["steps"] >= 2
        assert 0.1 <= spent["minutes"] < 0.3
        assert len(peers.measure_masks(tmp_path / "o" / "masks", draw.test, draw.labels)) == 2
        monkeypatch.setattr(plain_monai, "train", None)  # it is not called again


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("nnunetv2") is None, reason="needs the extra peers: nnU-Net"
)
def test_nnunet_trains_for_its_minutes_and_segments(peers, phantoms, tmp_path, like):
    study = make_study(peers, tmp_path, phantoms)
    peers.run_arm(study, like, 0, peers.Arm("nnunet@0.3", "nnunet", 0.3))
    rows = peers.read_rows(study.csv)
    assert [row["arm"] for row in rows] == ["nnunet@0.3"] * 2
    assert all(0.3 <= float(row["minutes"]) < 0.6 for row in rows)
    assert all(int(row["steps"]) >= 2 and row["dice"] for row in rows)
