"""What a call of `predict` reads, and what it never replaces; no network is needed for it."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from series import make_slices, save

from medssl.config import InputError
from medssl.data import predictions
from medssl.data.io import write_mask
from medssl.data.predictions import (
    Record,
    find_scans,
    plan_predictions,
    protect_files,
    record_predictions,
)
from medssl.runs import read_json, write_json


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"made by hand")
    return list(paths)


@pytest.fixture
def scans(tmp_path):
    return touch(*(tmp_path / "images" / f"case{i}.nii.gz" for i in range(7)))


def write_masks(out, *names):
    """Write files as a prediction does."""
    paths = touch(*(out / name for name in names))
    record_predictions(out, paths, labels={"0": "background"}, model={"round": 1})


@pytest.mark.parametrize(
    "name", ["case0.nii.gz", "case0.nii", "case0.png", "CASE0.nii.gz", "case0_probs.nii.gz"]
)
def test_a_mask_made_by_hand_is_never_replaced_unasked(scans, tmp_path, name):
    touch(tmp_path / "labels" / name)
    with pytest.raises(InputError, match=rf"1 file that .*{name}.*--overwrite"):
        plan_predictions(scans, tmp_path / "labels", 1, maps=["probs"])
    plan_predictions(scans, tmp_path / "labels", 1, maps=["probs"], overwrite=True)
    plan_predictions(scans, tmp_path / "masks", 1, maps=["probs"])


def test_the_first_of_many_files_that_would_be_replaced_are_named(scans, tmp_path):
    touch(*(tmp_path / "labels" / path.name for path in scans))
    with pytest.raises(InputError, match=r"7 files .*case0\.nii\.gz, .*case4\.nii\.gz and 2 more"):
        plan_predictions(scans, tmp_path / "labels", 1)


def test_only_what_a_prediction_wrote_and_nobody_changed_is_replaced(scans, tmp_path):
    out = tmp_path / "masks"
    write_masks(out, "case0.nii.gz", "case1.nii.gz")
    plan_predictions(scans, out, 1)
    (out / "case1.nii.gz").write_bytes(b"corrected by a person")
    with pytest.raises(InputError, match=r"1 file .*changed after it: case1\.nii\.gz"):
        plan_predictions(scans, out, 1)


def test_a_link_to_a_file_of_somebody_is_not_replaced(scans, tmp_path):
    out = tmp_path / "masks"
    write_masks(out, "case0.nii.gz")
    (out / "case0.nii.gz").rename(tmp_path / "kept.nii.gz")
    (out / "case0.nii.gz").symlink_to(tmp_path / "kept.nii.gz")
    with pytest.raises(InputError, match=r"case0\.nii\.gz"):
        plan_predictions(scans, out, 1)


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"images": []}', '{"labels": '])
def test_a_file_of_somebody_called_predictions_json_is_not_replaced(scans, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json").write_text(content)
    with pytest.raises(InputError, match=r"predictions\.json"):
        plan_predictions(scans, tmp_path / "out", 1)


def test_the_record_keeps_what_earlier_calls_wrote(tmp_path):
    write_masks(tmp_path, "a.nii.gz")
    paths = touch(tmp_path / "b.nii.gz")
    record_predictions(tmp_path, paths, labels={"0": "x"}, model={}, flags={"b": ("far",)})
    record = read_json(tmp_path / "predictions.json")
    assert list(record["files"]) == ["a.nii.gz", "b.nii.gz"]
    assert record["flags"] == {"b": ["far"]}
    protect_files(tmp_path, ["a.nii.gz", "b.nii.gz"])


def test_the_record_takes_a_twentieth_of_the_time_whatever_its_length(tmp_path, monkeypatch):
    now, written = 0.0, []

    def write_slowly(path, content):
        nonlocal now
        now += 0.001 * (len(content["files"]) + 1)
        written.append(len(content["files"]))
        write_json(path, content)

    monkeypatch.setattr(predictions, "write_json", write_slowly)
    monkeypatch.setattr(predictions, "time", SimpleNamespace(monotonic=lambda: now))
    record = Record(tmp_path)
    for index in range(300):
        now += 0.05  # a fast prediction
        record.add_files(
            touch(tmp_path / f"{index}.png"), labels={"0": "x"}, flags={str(index): ()}
        )
    assert written[:2] == [1, 2]
    assert now < 1.08 * 300 * 0.05
    record.write()
    content = read_json(tmp_path / "predictions.json")
    assert len(content["files"]) == len(content["flags"]) == 300
    length = len(written)
    record.write()
    assert len(written) == length, "nothing is new"


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".png", ".jpg"])
def test_masks_never_go_where_their_scans_lie_whatever_the_flag(tmp_path, suffix):
    (scan,) = touch(tmp_path / "images" / f"a{suffix}")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "images")
    for out in (scan.parent, link, scan.parent / ".." / "images"):
        with pytest.raises(InputError, match="overwrite its own scan"):
            plan_predictions([scan], out, 1, overwrite=True)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_scan_is_not_replaced_through_a_link_to_it(scans, tmp_path, link):
    (tmp_path / "out").mkdir()
    link(scans[0], tmp_path / "out" / "case0.nii.gz")
    with pytest.raises(InputError, match=r"is a scan or a folder: case0\.nii\.gz"):
        plan_predictions(scans, tmp_path / "out", 1, overwrite=True)


def test_scans_given_by_links_are_not_replaced_where_they_lie(scans, tmp_path):
    (tmp_path / "links").mkdir()
    for path in scans:
        (tmp_path / "links" / path.name).symlink_to(path)
    with pytest.raises(InputError, match="is a scan or a folder"):
        plan_predictions([tmp_path / "links"], tmp_path / "images", 1, overwrite=True)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["x/a.nii", "y/a.nii", "x/b.nii"], ["b"]),
        (["x/a.nii", "x/a_probs.nii"], ["a"]),
        (["x/Ö.nii", "y/O\u0308.nii"], ["Ö"]),
        (["x/Case.nii", "y/case.nii"], ["Case"]),
    ],
)
def test_two_scans_never_share_a_mask_and_the_others_go_on(tmp_path, names, kept):
    paths = touch(*(tmp_path / name for name in names))
    plan = plan_predictions(paths, tmp_path / "out", 1, maps=["probs"])
    assert list(plan.scans) == kept
    (problem,) = plan.problems
    assert names[1].split("/")[1] in problem


def test_what_is_wrong_with_one_input_does_not_stop_the_others(scans, tmp_path):
    (tmp_path / "images" / "gone.nii.gz").symlink_to(tmp_path / "nothing")
    touch(tmp_path / "images" / "old.gipl", tmp_path / "images" / "more" / "case9.nii.gz")
    inputs = [tmp_path / "images", tmp_path / "absent.nii", *touch(tmp_path / "notes.txt")]
    plan = plan_predictions(inputs, tmp_path / "out", 1)
    assert list(plan.scans) == [f"case{i}" for i in range(7)]
    named = "\n".join(plan.problems)
    assert all(name in named for name in ("gone.nii.gz", "old.gipl", "absent.nii", "notes.txt"))
    assert "more" in "\n".join(plan.notes)


def test_dicom_among_other_scans_hides_none_of_them(scans, tmp_path):
    folder = tmp_path / "images"
    os.mkfifo(folder / "pipe")
    touch(folder / "other.dcm")
    plan = plan_predictions([folder], tmp_path / "out", 1)
    assert list(plan.scans) == [*(f"case{i}" for i in range(7)), "other"]
    (folder / "other.dcm").unlink()
    save(folder, make_slices(np.zeros((4, 4, 3), np.int16), np.diag([1.0, 1, 2, 1])))
    touch(folder / "preview.png")
    plan = plan_predictions([folder], tmp_path / "out", 1)
    assert list(plan.scans) == [f"case{i}" for i in range(7)]
    assert "put the slices of each scan into a folder of its own" in plan.problems[0]
    for path in folder.glob("*.nii*"):
        path.unlink()
    assert list(plan_predictions([folder], tmp_path / "out", 1).scans) == ["images"]


def test_a_case_without_one_of_its_channels_does_not_stop_the_others(tmp_path):
    names = ["a_0000.nii", "a_0001.nii", "b_0000.nii"]
    touch(*(tmp_path / "images" / name for name in names))
    plan = plan_predictions([tmp_path / "images"], tmp_path / "out", 2)
    assert list(plan.scans) == ["a"]
    assert "b: the model wants 2 channels" in plan.problems[0]


def write_list(path, folder):
    rows = [f"p{i},{folder}/p{i}_t1.nii.gz,{folder}/p{i}_t2.nii.gz" for i in range(2)]
    path.write_text("\n".join(["case_id,image,image_1", *rows]) + "\n")


def test_a_model_of_two_channels_takes_the_list_and_the_tree_that_it_was_trained_on(tmp_path):
    data = tmp_path / "data"
    touch(*(data / "mr" / f"p{i}_t{n}.nii.gz" for i in range(2) for n in (1, 2)))
    write_list(data / "my scans.csv", "mr")
    write_list(data / "cases.csv", "mr")
    expected = {f"p{i}": tuple(data / "mr" / f"p{i}_t{n}.nii.gz" for n in (1, 2)) for i in range(2)}
    for given in (data / "my scans.csv", data):
        assert find_scans([given], 2, [], []) == expected
    with pytest.raises(InputError, match=r"p0: the model wants 1 channels, the data set has 2"):
        find_scans([data], 1, [], [])


def test_the_images_of_a_data_set_are_scans_and_its_labels_are_none(tmp_path):
    data = tmp_path / "data"
    touch(data / "images" / "a.nii.gz", data / "images" / "b.nii.gz", data / "labels" / "a.nii.gz")
    scans = find_scans([data], 1, [], [])
    assert [path.parent.name for (path,) in scans.values()] == ["images", "images"]
    shutil.rmtree(data / "labels")
    assert list(find_scans([data / "images"], 1, [], [])) == ["a", "b"]


def test_a_folder_that_is_called_like_a_scan_and_the_other_form_of_a_name_are_read(tmp_path):
    folder = tmp_path / "images"
    touch(folder / "a.nii.gz" / "a.nii.gz", folder / "cœur é.nii.gz", folder / "b.nii.gz")
    problems, notes = [], []
    found = find_scans([folder], 1, problems, notes)
    assert (sorted(found), problems, notes) == (["a", "b", "cœur é"], [], [])
    assert list(find_scans([folder / "cœur e\u0301.nii.gz"], 1, [], [])) == ["cœur é"]
    assert list(find_scans([folder / "a.nii.gz"], 1, [], [])) == ["a"]


def test_a_mask_that_a_kill_left_unrecorded_is_known_by_its_own_mark(scans, tmp_path):
    path = tmp_path / "masks" / "case0.nii.gz"
    classes = np.ones((3, 4, 5), np.uint8)
    write_mask(path, classes, np.eye(4), (0, 1), origin="prediction")
    plan_predictions(scans, tmp_path / "masks", 1)
    write_mask(path, classes, np.eye(4), (0, 1))
    with pytest.raises(InputError, match=r"1 file .*case0\.nii\.gz"):
        plan_predictions(scans, tmp_path / "masks", 1)


def test_a_folder_that_is_called_like_a_scan_without_suffix_is_not_in_the_way(scans, tmp_path):
    (tmp_path / "masks" / "case0").mkdir(parents=True)
    plan_predictions(scans, tmp_path / "masks", 1)
