import csv
import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medssl.config import DataSection, InputError
from medssl.data import layouts
from medssl.data.cases import (
    PARTS,
    Case,
    Dataset,
    Splits,
    select_cases,
    select_test_with_labels,
    split_cases,
)
from medssl.data.files import explain_files, note_crossed_labels, walk_files, write_draft
from medssl.data.layouts import list_files, read_dataset
from medssl.data.predictions import find_scans


def touch(root: Path, *names: str) -> Path:
    """Make empty files: reading a layout opens no scan."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def ids(dataset: Dataset, *, labeled: bool) -> list[str]:
    return [case.case_id for case in dataset.cases if (case.label is not None) == labeled]


def refuse(root: Path, format: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        read_dataset(root, format)
    return str(caught.value)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A current folder of its own, in which drafts are written."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# Medical Segmentation Decathlon


def write_decathlon(root: Path, **changes: object) -> Path:
    touch(root, *(f"imagesTr/s_{i}.nii.gz" for i in range(3)), "imagesTs/s_9.nii.gz")
    touch(root, "labelsTr/s_0.nii.gz", "labelsTr/s_1.nii.gz")
    training = [
        {"image": f"./imagesTr/s_{i}.nii.gz", "label": f"./labelsTr/s_{i}.nii.gz"} for i in range(2)
    ]
    content = {
        "name": "Spleen",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "training": [*training, {"image": "./imagesTr/s_2.nii.gz"}],
        "test": ["./imagesTs/s_9.nii.gz"],
    }
    write_json(root / "dataset.json", {**content, **changes})
    return root


def test_decathlon_gives_labeled_and_unlabeled_cases(tmp_path):
    dataset = read_dataset(write_decathlon(tmp_path))
    assert (dataset.format, dataset.name, dataset.channels) == ("decathlon", "Spleen", ("CT",))
    assert dataset.labels == {0: "background", 1: "spleen"}
    assert ids(dataset, labeled=True) == ["s_0", "s_1"]
    assert ids(dataset, labeled=False) == ["s_2", "s_9"]
    assert dataset.notes == ()
    assert read_dataset(tmp_path / "dataset.json") == dataset


def test_decathlon_label_file_that_is_gone_makes_an_unlabeled_case_and_a_note(tmp_path):
    write_decathlon(tmp_path)
    (tmp_path / "labelsTr/s_1.nii.gz").unlink()
    dataset = read_dataset(tmp_path)
    assert ids(dataset, labeled=True) == ["s_0"]
    assert "1 label files" in dataset.notes[0]


def test_decathlon_channel_files_are_found(tmp_path):
    write_decathlon(tmp_path, modality={"0": "T1", "1": "T2"}, test=[])
    (tmp_path / "imagesTr/s_0.nii.gz").unlink()
    touch(tmp_path, "imagesTr/s_0_0000.nii.gz", "imagesTr/s_0_0001.nii.gz")
    case = read_dataset(tmp_path).cases[0]
    assert [path.name for path in case.images] == ["s_0_0000.nii.gz", "s_0_0001.nii.gz"]
    assert case.case_id == "s_0"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": {"one": "spleen"}}, "labels: expected"),
        ({"labels": {"1": "spleen", "-1": "x"}}, "labels: the value -1 of x is below 0"),
        ({"labels": {"1": "spleen", "2": "spleen"}}, "labels: several values are named spleen"),
        ({"modality": {"1": "CT"}}, "channels: expected the keys"),
        ({"modality": "CT"}, "channels: expected names"),
        ({"training": [{"label": "x.nii.gz"}, 3]}, "training[1]: expected an image, got 3"),
        ({"training": {"image": "x"}}, "training: expected a list"),
        ({"training": [{"image": "imagesTr/gone.nii.gz"}]}, "gone.nii.gz does not exist"),
        ({"test": ["imagesTr/s_0.nii.gz"]}, "case_id s_0 stands 2 times"),
    ],
)
def test_faults_of_a_decathlon_list_are_named(tmp_path, changes, expected):
    assert expected in refuse(write_decathlon(tmp_path, **changes))


# nnU-Net v2


def write_nnunet(root: Path, **changes: object) -> Path:
    names = [f"a_{i}_000{c}.nii.gz" for i in range(3) for c in range(2)]
    touch(root, *(f"imagesTr/{name}" for name in names), "labelsTr/a_0.nii.gz")
    touch(root, "imagesTs/b_0000.nii.gz", "imagesTs/b_0001.nii.gz", "labelsTs/b.nii.gz")
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "tumor": 2, "ignore": 3},
        "file_ending": ".nii.gz",
        "numTraining": 3,
    }
    write_json(root / "dataset.json", {**content, **changes})
    return root


def test_nnunet_folder_gives_channels_ignore_and_unlabeled_cases(tmp_path):
    dataset = read_dataset(write_nnunet(tmp_path))
    assert (dataset.format, dataset.channels) == ("nnunet", ("T1", "FLAIR"))
    assert (dataset.labels, dataset.ignore) == ({0: "background", 2: "tumor"}, 3)
    assert ids(dataset, labeled=True) == ["a_0"]
    assert ids(dataset, labeled=False) == ["a_1", "a_2", "b"]
    assert [path.name for path in dataset.cases[0].images] == ["a_0_0000.nii.gz", "a_0_0001.nii.gz"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "whole are regions"),
        ({"file_ending": ".png"}, "got '.png'"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "the value 1 has several names"),
        ({"labels": {"background": 0, "ignore": "x"}}, "ignore: expected a label value"),
        ({"channel_names": {"0": "T1"}}, "a_0: expected 1 channels"),
    ],
)
def test_faults_of_an_nnunet_folder_are_named(tmp_path, changes, expected):
    assert expected in refuse(write_nnunet(tmp_path, **changes))


def test_all_misnamed_files_of_an_nnunet_folder_are_named_at_once(tmp_path):
    write_nnunet(tmp_path)
    touch(tmp_path, "imagesTr/lone.nii.gz", "labelsTr/a_9.nii.gz", "imagesTr/c_0001.nii.gz")
    message = refuse(tmp_path)
    assert message.count("\n") == 3
    assert "lone.nii.gz: has no channel number" in message
    assert "imagesTr/c: expected 2 channels" in message
    assert "label a_9: no image" in message


# images/ labels/ [unlabeled/]


def test_folders_give_labeled_and_unlabeled_cases_and_hidden_files_are_ignored(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii", "labels/a.nii", "unlabeled/c.nii.gz")
    touch(tmp_path, "images/._a.nii.gz", "labels/._b.nii.gz", "images/.DS_Store", "images/x.txt")
    dataset = read_dataset(tmp_path)
    assert (dataset.format, dataset.labels, dataset.channels) == ("folders", None, ("",))
    assert ids(dataset, labeled=True) == ["a"]
    assert ids(dataset, labeled=False) == ["b", "c"]


def test_folders_with_channel_numbers_are_grouped_by_their_labels(tmp_path):
    touch(tmp_path, *(f"images/{name}_000{c}.nii.gz" for name in "ab" for c in range(2)))
    touch(tmp_path, "labels/a.nii.gz", "unlabeled/u_0000.nii.gz", "unlabeled/u_0001.nii.gz")
    dataset = read_dataset(tmp_path)
    assert {case.case_id: len(case.images) for case in dataset.cases} == {"a": 2, "b": 2, "u": 2}


def test_numbered_cases_are_not_taken_for_channels(tmp_path):
    touch(tmp_path, "images/case_0000.nii.gz", "images/case_0001.nii.gz", "labels/case_0001.nii.gz")
    dataset = read_dataset(tmp_path)
    assert ids(dataset, labeled=True) == ["case_0001"]
    assert dataset.channels == ("",)


def test_near_names_are_looked_for_of_a_few_lone_labels_however_many_there_are(
    tmp_path, monkeypatch
):
    labels = [f"labels/mask_{number}.nii.gz" for number in range(60)]
    touch(tmp_path, "images/scan_01.nii.gz", *labels)
    asked, find = [], layouts.difflib.get_close_matches
    monkeypatch.setattr(
        layouts.difflib, "get_close_matches", lambda *a, **k: asked.append(a) or find(*a, **k)
    )
    assert "60 problems" in refuse(tmp_path)
    assert len(asked) <= 20


def test_a_label_of_another_name_is_an_error_with_the_nearest_image(tmp_path):
    touch(tmp_path, "images/scan_01.nii.gz", "labels/scan_1.nii.gz", "labels/other.nii.gz")
    message = refuse(tmp_path)
    assert "2 problems" in message
    assert "the nearest name there is scan_01" in message


def test_two_files_of_one_name_are_refused(tmp_path):
    touch(tmp_path, "images/a.nii", "images/a.nii.gz", "labels/a.nii")
    assert "a.nii and a.nii.gz both" in refuse(tmp_path)


def test_masks_beside_images_in_another_folder_are_not_overlooked(tmp_path, here):
    touch(tmp_path / "set", "images/a.nii.gz", "images/b.nii.gz", "masks/a.nii.gz")
    assert "2 cases, 1 with a mask" in refuse(tmp_path / "set")


# lists


def write_list(root: Path, text: str, name: str = "cases.csv") -> Path:
    touch(root, "a.nii.gz", "b.nii.gz", "a2.nii.gz", "b2.nii.gz", "m.nii.gz")
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_files_of_a_list_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_list(tmp_path, "case_id,image,label\nx,~/a.nii.gz,~/m.nii.gz\n")
    (case,) = read_dataset(path).cases
    assert (case.images, case.label) == ((tmp_path / "a.nii.gz",), tmp_path / "m.nii.gz")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_list_is_read_with_any_delimiter_and_a_byte_order_mark(tmp_path, delimiter):
    text = (
        "\ufeffcase_id,image,image_1,label,patient_id,split,#note\n"
        "x,a.nii.gz,a2.nii.gz,m.nii.gz,p1,Labeled,fine\n\n"
        "y,b.nii.gz,b2.nii.gz,,,,\n"
    )
    path = write_list(tmp_path, text.replace(",", delimiter))
    dataset = read_dataset(tmp_path)
    assert dataset == read_dataset(path)
    assert dataset.channels == ("", "")
    x, y = dataset.cases
    assert x == Case(
        "x", (tmp_path / "a.nii.gz", tmp_path / "a2.nii.gz"), tmp_path / "m.nii.gz", "p1", "labeled"
    )
    assert (y.label, y.patient_id, y.split) == (None, "y", "")


def test_json_list_declares_channels_labels_and_ignore(tmp_path):
    touch(tmp_path, "a.nii.gz", "m.nii.gz")
    rows = [{"case_id": "x", "image": "a.nii.gz", "label": "m.nii.gz", "split": None}]
    plain = read_dataset(write_json(tmp_path / "list.json", rows))
    assert (plain.format, plain.name, plain.labels) == ("list", "list", None)
    content = {"cases": rows, "channels": ["T1", "T2"], "labels": {"4": "cyst"}, "ignore": 9}
    dataset = read_dataset(write_json(tmp_path / "list.json", content))
    assert dataset.channels == ("T1", "T2")
    assert (dataset.labels, dataset.ignore) == ({0: "background", 4: "cyst"}, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "case_id,image,mask\nx,a.nii.gz,m.nii.gz\n",
            "'mask'; did you mean 'label'?",
        ),
        ("case_id,image,lable\nx,a.nii.gz,m.nii.gz\n", "did you mean 'label'?"),
        ("case_id,image,patientID\nx,a.nii.gz,p\n", "did you mean 'patient_id'?"),
        ("case_id,image,subject\nx,a.nii.gz,p\n", "did you mean 'patient_id'?"),
        ("case_id,image,mask_file\nx,a.nii.gz,gone.nii.gz\n", "did you mean 'label'?"),
        ("case_id,image,image2\nx,a.nii.gz,b.nii.gz\n", "did you mean 'image_2'?"),
        ("case_id,image,partition\nx,a.nii.gz,Test\n", "did you mean 'split'?"),
        ("case_id,scan\nx,a.nii.gz\n", "did you mean 'image'?"),
        ("id,image\nx,a.nii.gz\n", "there is no column 'case_id'"),
        ("case_id,image,image_2\nx,a.nii.gz,b.nii.gz\n", "without a gap"),
        ("case_id,image,image\nx,a.nii.gz,b.nii.gz\n", "column 'image' stands twice"),
        ("case_id,image\nx,a.nii.gz,b.nii.gz\n", "line 2: 3 values for 2 columns"),
        ("case_id,image,split\nx,a.nii.gz,train\n", "did you mean 'labeled'?"),
        ("case_id,image,split\nx,a.nii.gz,test\n", "split is test, but there is no label"),
        ("case_id,image,image_1\nx,a.nii.gz,\n", "image_1 is empty"),
        ("case_id,image\n,a.nii.gz\n", "line 2: case_id is empty"),
        ("case_id,image\nx/y,a.nii.gz\n", "slash"),
        ("case_id,image\nx,a.txt\n", "a.txt does not exist"),
        ("case_id,image\nx,cases.csv\n", "no scan that is read"),
        ("case_id,image,label\nx,a.nii.gz,mm.nii.gz\n", "did you mean"),
        ('case_id,image,label\nx,a.nii.gz,"john\ny,a.nii.gz,\n', "not closed"),
        ('case_id,image,label\nx,a.nii.gz,"jo\nhn"\ny,a.nii.gz,\n', "line 3: a value goes over"),
        ("case_id,image\n", "lists no case"),
        ("", "lists no case"),
    ],
)
def test_faults_of_a_list_are_named(tmp_path, text, expected):
    assert expected in refuse(write_list(tmp_path, text))


def test_all_faults_of_a_list_are_named_at_once(tmp_path):
    rows = "".join(f"c{i},gone{i}.nii.gz\n" for i in range(30))
    message = refuse(write_list(tmp_path, f"case_id,image\n{rows}c0,a.nii.gz\n"))
    assert "31 problems" in message
    assert all(f"gone{i}.nii.gz does not exist" in message for i in range(30))
    assert "c0 stands 2 times" in message


def test_wrong_words_and_missing_files_of_a_list_stand_in_one_message(tmp_path):
    message = refuse(write_list(tmp_path, "case_id,image,split\nx,gone.nii.gz,trian\n../y,a,\n"))
    assert "4 problems" in message
    for part in ("'trian'", "gone.nii.gz does not exist", "may not start with a dot", "a does not"):
        assert part in message


@pytest.mark.parametrize("name", ["labels/p1.mnc", "images/p9.GIPL", "unlabeled/p8.vtk"])
def test_scans_of_other_formats_are_not_passed_over(tmp_path, name):
    touch(tmp_path, "images/p1.nii.gz", "labels/p1.nii.gz", "images/notes.txt", name)
    assert f"{name}: a scan of another kind" in refuse(tmp_path)


def test_a_link_to_nothing_is_not_passed_over(tmp_path):
    touch(tmp_path, "images/p1.nii.gz", "images/p2.nii.gz", "labels/p1.nii.gz")
    (tmp_path / "labels" / "p2.nii.gz").symlink_to("/archive/p2.nii.gz")
    assert "labels/p2.nii.gz: a link to /archive/p2.nii.gz" in refuse(tmp_path)


def test_a_list_that_is_not_utf8_or_not_json_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"case_id,image\n\xff\xfe,x\n")
    assert "UTF-8" in refuse(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text("{")
    assert "cannot be read as JSON" in refuse(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"cases": [], "cases": []}')
    assert "stands twice" in refuse(tmp_path / "a.json")
    assert "no `training`" in refuse(write_json(tmp_path / "a.json", {"foo": 1}))


def test_labels_given_by_the_user_replace_the_declared_ones(tmp_path):
    dataset = read_dataset(write_decathlon(tmp_path), labels={255: "organ"})
    assert dataset.labels == {0: "background", 255: "organ"}


def test_patients_are_recognized_by_file_names(tmp_path):
    touch(tmp_path, *(f"images/sub-01_ses-{i}.nii.gz" for i in (1, 2)))
    touch(tmp_path, "images/patient007_frame01.nii.gz", "images/patient0071.nii.gz", "labels/.x")
    patients = {case.case_id: case.patient_id for case in read_dataset(tmp_path).cases}
    assert patients["sub-01_ses-1"] == patients["sub-01_ses-2"] == "sub-01"
    assert patients["patient007_frame01"] == "patient007"
    assert patients["patient0071"] == "patient0071"


@pytest.mark.parametrize("column", ["P1,P2,", ",,"])
def test_an_empty_patient_among_others_is_noted(tmp_path, column):
    rows = [
        f"{name},{name}.nii,{patient}"
        for name, patient in zip("abc", column.split(","), strict=True)
    ]
    touch(tmp_path, *(f"{name}.nii" for name in "abc"))
    (tmp_path / "cases.csv").write_text("\n".join(("case_id,image,patient_id", *rows)))
    dataset = read_dataset(tmp_path)
    assert dataset.cases[2].patient_id == "c"
    assert ["patient_id is empty for c:" in note for note in dataset.notes] == [True] * (
        "P" in column
    )


@pytest.mark.parametrize(
    ("patients", "words"),
    [
        (("nan", "nan"), "patient_id is 'nan' (2 cases)"),
        (("1.23457E+12", "1.23457E+12"), "patient_id is '1.23457E+12' (2 cases)"),
        (("unknown", "P1"), ""),
        (("0", "0"), ""),
    ],
)
def test_a_patient_id_that_stands_for_none_is_noted_where_cases_share_it(tmp_path, patients, words):
    rows = "x,a.nii.gz,{}\ny,b.nii.gz,{}\n".format(*patients)
    notes = read_dataset(write_list(tmp_path, f"case_id,image,patient_id\n{rows}")).notes
    assert words in "".join(notes) if words else not notes


def test_an_empty_patient_of_a_dataset_json_is_noted_and_0_is_a_patient(tmp_path):
    touch(tmp_path, *(f"{name}.nii.gz" for name in "ab"))
    entries = [{"image": "a.nii.gz", "patient_id": 0}, {"image": "b.nii.gz"}]
    write_json(tmp_path / "dataset.json", {"modality": {"0": "CT"}, "training": entries})
    dataset = read_dataset(tmp_path)
    assert [case.patient_id for case in dataset.cases] == ["0", "b"]
    assert any("patient_id is empty for b" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["a,1,1,3", "b,4,5,6"], "a: {}/1.nii is two of its channels"),
        (["a,1,2,3", "b,./1,2,6"], "a, b: the same image {}/1.nii: keep one"),
        (["a,1,2,3", "b,4,3,6"], "a: the label {}/3.nii is an image too"),
    ],
)
def test_files_that_stand_where_they_cannot_be_right_are_refused(tmp_path, rows, expected):
    write_rows(tmp_path, rows)
    assert expected.format(tmp_path) in refuse(tmp_path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["a,1,2,3", "b,4,5,3"], "a, b: have one label, {}/3.nii"),
        (["a,1,2,3", "b,4,2,6"], "a, b: have one file for a channel, {}/2.nii"),
    ],
)
def test_files_that_cases_share_are_noted(tmp_path, rows, expected):
    write_rows(tmp_path, rows)
    (note,) = read_dataset(tmp_path).notes
    assert note.startswith(expected.format(tmp_path))


def test_labels_that_are_called_as_the_image_of_another_case_are_noted(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "m/b.nii", "m/a_seg.nii")
    rows = "case_id,image,label\nx,a.nii,m/b.nii\ny,b.nii,m/a_seg.nii\n"
    (tmp_path / "cases.csv").write_text(rows)
    text = " ".join(read_dataset(tmp_path).notes).replace(f"{tmp_path}/", "")
    expected = "x (m/b.nii, as y), y (m/a_seg.nii, as x);"
    assert text.startswith(f"labels that are called as the image of another case: {expected}")


@pytest.mark.parametrize(
    "labels",
    [
        ("a_seg.nii", "b_mask.nii"),
        ("1.nii", "2.nii"),
        ("a_seg.nii", "a_seg.nii"),
        ("1/a_seg.nii", "2/a_seg.nii"),  # two sites that number their labels alike
    ],
)
def test_labels_of_other_names_or_that_two_images_share_are_not_called_as_anothers(
    tmp_path, labels
):
    images = (tmp_path / "a.nii", tmp_path / "b.nii")
    cases = [
        Case(name, (image,), tmp_path / label, name)
        for name, image, label in zip("xy", images, labels, strict=True)
    ]
    assert note_crossed_labels(cases) == []


def test_images_and_labels_of_one_name_in_a_folder_for_each_case_are_not_crossed(tmp_path):
    cases = [
        Case(name, (tmp_path / name / image,), tmp_path / name / "label.nii", name)
        for name, image in (("x", "image.nii"), ("y", "ct.nii"))
    ]
    assert note_crossed_labels(cases) == []


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"0": "background", "1": "liver"}, ""),
        ({"1": "liver"}, ""),
        ({"0": "Clear Label", "1": "liver"}, ""),
        ({"0": "Unknown", "1": "healthy", "2": "other"}, ""),
        ({"0": "No tumor", "1": "tumor"}, ""),
        ({"0": "non-vessel", "1": "vessel"}, ""),
        ({"0": "0", "1": "1"}, ""),
        ({"0": "liver", "1": "Background"}, "value 1 is called Background"),
        ({"0": "liver", "1": "tumor"}, "value 0 is called liver"),
    ],
)
def test_a_background_that_is_not_0_is_noted(tmp_path, labels, words):
    touch(tmp_path, "a.nii")
    content = {"labels": labels, "cases": [{"case_id": "a", "image": "a.nii"}]}
    write_json(tmp_path / "cases.json", content)
    text = " ".join(read_dataset(tmp_path).notes)
    assert words in text if words else not text


def write_rows(root: Path, rows: list[str]) -> None:
    """Write a list of (case_id, image, image_1, label), whose files are called by numbers."""
    touch(root, *(f"{number}.nii" for number in range(1, 7)))
    lines = (f"{row.replace(',', '.nii,').replace('.nii', '', 1)}.nii" for row in rows)
    (root / "cases.csv").write_text("\n".join(("case_id,image,image_1,label", *lines)))


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["p1", "p2", "p1_seg", "p2_seg", "p1_mask2", "p1-GT"], "p1-GT, p1_seg, p2_seg"),
        (["p1", "p2", "p3", "lesion_mask"], "lesion_mask"),
        (["p1", "p2", "segovia_1", "masked", "gtv", "labeler"], ""),
        (["p1", "seg_1", "seg_2", "seg_3"], ""),
        (["p1", "p2", "q", "roi_1=labels/roi_1"], ""),
    ],
)
def test_masks_among_scans_are_named(tmp_path, images, masks):
    rows = [(name.partition("=")[0], name.partition("=")[2]) for name in images]
    touch(tmp_path, "labels/.x", *(f"images/{name}.nii" for name, _ in rows))
    touch(tmp_path, *(f"{label}.nii" for _, label in rows if label))
    notes, said = [], "read as scans, though by their names they are masks: "
    find_scans([tmp_path], 1, [], notes)
    assert notes == list(read_dataset(tmp_path).notes)
    assert [note.split("; ")[0] for note in notes] == [said + masks] * bool(masks)
    if "=" not in images[-1]:
        find_scans([tmp_path / "images"], 1, [], notes)
        assert len(notes) == 2 * bool(masks), "without a list or layout too"


# wrong paths and unknown trees


def test_a_missing_path_gets_its_nearest_sibling(tmp_path):
    (tmp_path / "Task04_Hippocampus" / "imagesTr").mkdir(parents=True)
    assert "did you mean" in refuse(tmp_path / "Task4_Hipocampus")
    assert str(tmp_path / "Task04_Hippocampus") in refuse(tmp_path / "Task04_Hippocampu" / "x")


def test_a_named_format_that_is_not_there_says_what_it_needs(tmp_path):
    assert "needs dataset.json" in refuse(tmp_path, "decathlon")
    assert "needs cases.csv or cases.json" in refuse(tmp_path, "list")


def test_an_empty_folder_and_other_files_are_named(tmp_path, here):
    (tmp_path / "set").mkdir()
    assert "empty" in refuse(tmp_path / "set")
    touch(tmp_path / "set", "a.bmp", "b.bmp")
    message = refuse(tmp_path / "set")
    assert "holds no scan that is read" in message
    assert "2 x scans of a kind that is not read, save it as PNG: a.bmp and 1 more" in message
    assert list(here.iterdir()) == []


def draft(root: Path, here: Path) -> Path:
    """Have a draft written as the message of the refused folder says."""
    name = f"{root.name}_cases.csv"
    assert f"medssl check {root} --draft {name}" in refuse(root)
    assert list(here.iterdir()) == [], "reading writes nothing"
    assert f"medssl check {here / name}" in write_draft(root, here / name)
    return here / name


def read_draft(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def test_patient_folders_give_a_draft_that_reads_as_a_list(tmp_path, here):
    root = tmp_path / "mine"
    touch(root, "patient01/t1.nii.gz", "patient01/t2.nii.gz", "patient01/mask.nii.gz")
    touch(root, "patient02/t1.nii.gz", "patient02/t2.nii.gz", "patient02/._t1.nii.gz")
    message = refuse(root)
    assert "2 patients, 2 cases, 1 with a mask" in message
    assert "patient01: patient01/t1.nii.gz + patient01/t2.nii.gz  mask patient01/mask" in message
    dataset = read_dataset(draft(root, here))
    assert dataset.name == "mine"
    assert ids(dataset, labeled=True) == ["patient01"]
    assert [path.name for path in dataset.cases[1].images] == ["t1.nii.gz", "t2.nii.gz"]


@pytest.mark.parametrize(
    ("image", "mask", "case_id"),
    [
        ("p1.nii.gz", "p1_seg.nii.gz", "p1"),
        ("p1.nii.gz", "p1_label.nii", "p1"),
        ("p1_image.nii.gz", "p1-mask.nii.gz", "p1_image"),
        ("scans/p1.nii.gz", "segmentations/p1.nii.gz", "p1"),
        ("imagesTr/p1_0000.nii.gz", "labelsTr/p1.nii.gz", "p1_0000"),
        ("BraTS_1/BraTS_1_t1.nii.gz", "BraTS_1/BraTS_1_seg.nii.gz", "BraTS_1"),
        ("p1/scan.nii.gz", "p1/segmentation.nii.gz", "p1"),
        ("site/p1/t1.nii.gz", "site/p1/lesion_mask.nii.gz", "site_p1"),
        ("sub-1/anat/sub-1_T1w.nii", "derivatives/a/sub-1/anat/sub-1_dseg.nii", "sub-1_anat"),
        ("sub-1/anat/sub-1_T1w.nii", "derivatives/a/sub-1/anat/sub-1_mask.nii", "sub-1_anat"),
    ],
)
def test_masks_are_recognized_by_their_names(tmp_path, here, image, mask, case_id):
    root = touch(tmp_path / "set", image, mask)
    row = read_draft(draft(root, here))[case_id]
    assert Path(row["label"]) == root / mask
    assert Path(row["image"]) == root / image


def test_a_processed_copy_of_a_scan_is_one_of_the_same_patient(tmp_path, here):
    names = ["sub-1/anat/sub-1_T1w.nii", "derivatives/prep/sub-1/anat/sub-1_desc-prep_T1w.nii"]
    rows = read_draft(draft(touch(tmp_path / "set", *names), here))
    assert {case_id: row["patient_id"] for case_id, row in rows.items()} == {
        "sub-1_anat": "sub-1",
        "derivatives_prep_sub-1_anat": "sub-1",
    }


def test_folders_of_two_visits_are_of_one_patient(tmp_path, here):
    names = [f"{place}sub-1_ses-{n}/anat/T1w.nii" for place in ("", "site/") for n in (1, 2)]
    names += [f"site/sub-2_ses-{n}/scans/t{k}.nii" for n in (1, 2) for k in range(9)]
    rows = read_draft(draft(touch(tmp_path / "set", *names), here))
    assert len(rows) == 22
    for case_id, row in rows.items():
        assert row["patient_id"] == ("sub-2" if "sub-2" in case_id else "sub-1"), case_id


def test_of_two_masks_of_a_scan_a_person_chooses(tmp_path, here):
    places = ["derivatives/a/sub-1/anat/sub-1_mask.nii", "derivatives/b/sub-1/anat/sub-1_mask.nii"]
    root = touch(tmp_path / "set", "sub-1/anat/sub-1_T1w.nii", "sub-2/anat/sub-2_T1w.nii", *places)
    assert f"Masks that fit to no scan: {', '.join(places)}" in refuse(root)
    assert [row["label"] for row in read_draft(draft(root, here)).values()] == ["", ""]


def test_scans_of_one_name_in_many_folders_keep_apart(tmp_path, here):
    names = [
        f"site{s}/{kind}/t{i}.nii.gz" for s in "AB" for kind in ("scans", "masks") for i in "12"
    ]
    rows = read_draft(draft(touch(tmp_path / "set", *names), here))
    assert len(rows) == 4
    assert all(
        Path(row["image"]).parts[-3] == Path(row["label"]).parts[-3] for row in rows.values()
    )


def test_a_mask_without_a_scan_and_an_odd_number_of_images_are_told(tmp_path, here):
    root = touch(tmp_path / "set", "p1/t1.nii.gz", "p1/t2.nii.gz", "p2/t1.nii.gz", "x_seg.nii.gz")
    touch(root, "p3/t1.nii.gz", "p3/t2.nii.gz")
    message = refuse(root)
    assert "Masks that fit to no scan: x_seg.nii.gz" in message
    assert "Most cases have 2 images, but not: p2 (1)" in message


def test_a_column_that_holds_another_contrast_in_some_case_is_told(tmp_path, here):
    names = [f"P{i}/P{i}_{kind}.nii.gz" for i in (1, 3, 4) for kind in ("flair", "t1")]
    root = touch(tmp_path / "set", *names, "P2/P2_flair.nii.gz", "P2/P2_t1ce.nii.gz")
    message = refuse(root)
    assert "Column image_1 is t1 in most cases, but t1ce in P2" in message
    assert "Column image is" not in message


def test_a_draft_never_overwrites_a_file_and_lies_beside_its_scans_by_relative_paths(tmp_path):
    root = touch(tmp_path / "set", "p1.nii.gz", "p1_seg.nii.gz")
    (tmp_path / "mine.csv").write_text("mine")
    for name, problem in (
        *[("mine.csv", "is there already"), ("mine.txt", "does not end in .csv")],
        ("none/mine.csv", "there is no folder"),
    ):
        with pytest.raises(InputError, match=problem):
            write_draft(root, tmp_path / name)
    assert (tmp_path / "mine.csv").read_text() == "mine"
    write_draft(root, tmp_path / "other.csv")
    assert read_draft(tmp_path / "other.csv")["p1"]["label"] == "set/p1_seg.nii.gz"


def test_the_folder_of_several_data_sets_is_no_data_set(tmp_path, here):
    for name in ("Dataset001_A", "Dataset002_B"):
        write_nnunet(tmp_path / "nnUNet_raw" / name)
    for root in (tmp_path / "nnUNet_raw", tmp_path):
        message = refuse(root)
        assert "holds 2 data sets" in message
        assert f"medssl check {tmp_path / 'nnUNet_raw' / 'Dataset001_A'}" in message
        assert "patient" not in message


def test_a_draft_takes_numbered_files_of_a_scan_for_its_channels(tmp_path, here):
    root = write_nnunet(tmp_path / "set")
    (root / "dataset.json").unlink()
    rows = read_draft(draft(root, here))
    assert rows["a_1"]["image_1"].endswith("a_1_0001.nii.gz")
    assert rows["a_0"]["label"].endswith("labelsTr/a_0.nii.gz")


def test_a_damaged_dicom_file_of_a_tree_is_named(tmp_path, here):
    root = tmp_path / "my study"
    root.mkdir()
    (root / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(10))
    assert "IM0001" in refuse(root)


# splits


def make_dataset(rows: list[tuple[str, str, bool, str]]) -> Dataset:
    """Make cases of (case_id, patient_id, has a label, split)."""
    cases = [
        Case(name, (Path(f"{name}.nii.gz"),), Path(f"{name}_m.nii.gz") if has else None, who, split)
        for name, who, has, split in rows
    ]
    return Dataset("d", Path("d"), "list", tuple(cases), None, ("",))


def make_labeled(number: int) -> Dataset:
    return make_dataset([(f"c{i:03d}", f"c{i:03d}", True, "") for i in range(number)])


@pytest.mark.parametrize(("labeled", "test", "missing"), [(4, 40, 34), (12, 0, 2), (6, 6, 2)])
def test_a_split_that_asks_for_too_much_says_by_how_many(labeled, test, missing):
    with pytest.raises(InputError, match=f"for {missing} more than the 10 labeled cases"):
        split_cases(make_labeled(10), DataSection(labeled=labeled, test=test), "auto")


def test_splits_of_many_labeled_cases_compare_no_case_with_all_others(monkeypatch):
    dataset = make_labeled(400)
    compared = []

    def count(self, other):
        compared.append(other)
        return self is other

    monkeypatch.setattr(Case, "__eq__", count)
    splits = split_cases(dataset, DataSection(labeled=100, test=40), 0)
    assert len(splits.unlabeled) == 260
    assert len(compared) < 400


def test_labeled_and_test_cases_are_drawn_and_the_rest_is_unlabeled():
    splits = split_cases(make_labeled(200), DataSection(labeled=4, test=40), "auto")
    assert [len(getattr(splits, part)) for part in PARTS] == [4, 156, 0, 40]


def test_the_draw_moves_the_labeled_cases_only_and_split_seed_all():
    dataset = make_labeled(60)
    first = split_cases(dataset, DataSection(labeled=10, test=10), "auto")
    draw = split_cases(dataset, DataSection(labeled=10, test=10, draw=1), "auto")
    seed = split_cases(dataset, DataSection(labeled=10, test=10, split_seed=1), "auto")
    assert (first.test, first.val) == (draw.test, draw.val)
    assert first.labeled != draw.labeled
    assert first.test != seed.test
    assert first == split_cases(dataset, DataSection(labeled=10, test=10), "auto")


def test_as_many_unlabeled_cases_as_asked_for_are_drawn_as_whole_patients():
    rows = [(f"p{i // 2}_{i % 2}", f"p{i // 2}", i < 4, "") for i in range(40)]
    whole = split_cases(make_dataset(rows), DataSection(), "auto")
    few = split_cases(make_dataset(rows), DataSection(unlabeled=11), "auto")
    other = split_cases(make_dataset(rows), DataSection(unlabeled=11, draw=1), "auto")
    assert (few.labeled, few.test, few.val) == (whole.labeled, whole.test, whole.val)
    assert len(few.unlabeled) == 10
    assert len({case.rpartition("_")[0] for case in few.unlabeled}) == 5
    assert set(few.unlabeled) <= set(whole.unlabeled)
    assert few.unlabeled != other.unlabeled
    assert split_cases(make_dataset(rows), DataSection(unlabeled=36), "auto") == whole


def test_more_unlabeled_cases_than_there_are_are_refused():
    with pytest.raises(InputError, match="unlabeled=7 asks for more than the 6 unlabeled"):
        split_cases(make_labeled(10), DataSection(labeled=4, unlabeled=7), "auto")


@pytest.mark.parametrize(
    ("labeled", "validation", "expected"),
    [
        *[(4, "auto", 0), (15, "auto", 0), (16, "auto", 3), (20, "auto", 4), ("all", "auto", 6)],
        *[(4, 1, 1), (20, 0, 0), (4, "fifth", 0), (5, "fifth", 2), (20, "fifth", 4)],
    ],
)
def test_validation_cases_are_taken_out_of_the_labeled_ones(labeled, validation, expected):
    splits = split_cases(make_labeled(30), DataSection(labeled=labeled), validation)
    assert len(splits.val) == expected
    assert len(splits.labeled) + expected == (30 if labeled == "all" else labeled)


@pytest.mark.parametrize(("num_patients", "expected"), [(5, 0), (6, 4), (10, 4)])
def test_all_scans_of_few_patients_train(num_patients, expected):
    rows = [(f"c{i:03}", f"p{i % num_patients}", True, "") for i in range(20)]
    splits = split_cases(make_dataset(rows), DataSection(), "auto")
    assert len(splits.val) in (expected, expected - 1)  # whole patients
    assert len(splits.labeled) + len(splits.val) == 20


def test_what_a_list_says_stands():
    rows = [(f"l{i}", f"l{i}", True, "labeled") for i in range(6)]
    rows += [("t", "t", True, "test"), ("u", "u", True, "unlabeled"), ("v", "v", True, "val")]
    splits = split_cases(make_dataset(rows), DataSection(), "auto")
    assert splits.labeled == tuple(f"l{i}" for i in range(6))
    assert (splits.unlabeled, splits.val, splits.test) == (("u",), ("v",), ("t",))
    fewer = split_cases(make_dataset(rows), DataSection(labeled=2), "auto")
    assert len(fewer.labeled) == 2
    assert len(fewer.unlabeled) == 5
    with pytest.raises(InputError, match=r"data\.test=3"):
        split_cases(make_dataset(rows), DataSection(test=3), "auto")


def test_unlabeled_scans_of_a_test_patient_are_left_out():
    rows = [("a1", "a", True, "test"), ("a2", "a", False, ""), ("b", "b", True, "")]
    splits = split_cases(make_dataset(rows), DataSection(), "auto")
    assert (splits.labeled, splits.unlabeled, splits.test) == (("b",), (), ("a1",))


def test_draws_that_are_too_large_say_so():
    for data in (DataSection(labeled=9, test=2), DataSection(test=10), DataSection(test=11)):
        with pytest.raises(InputError, match="labeled case"):
            split_cases(make_labeled(10), data, "auto")
    with pytest.raises(InputError, match="none of 1 cases has a label"):
        split_cases(make_dataset([("a", "a", False, "")]), DataSection(), "auto")
    with pytest.raises(InputError, match="validation=4"):
        split_cases(make_labeled(4), DataSection(), 4)


cases_of_patients = st.lists(
    st.tuples(st.integers(0, 15), st.sampled_from([True, True, False])), min_size=15, max_size=40
).map(
    lambda rows: make_dataset(
        [(f"c{i:02d}", f"p{who}", has, "") for i, (who, has) in enumerate(rows)]
    )
)


@given(
    dataset=cases_of_patients,
    labeled=st.sampled_from(["all", 2, 3, 5]),
    test=st.integers(0, 4),
    validation=st.sampled_from(["auto", 0, 1]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_splits_are_disjoint_keep_patients_together_and_ignore_file_order(
    dataset, labeled, test, validation, seed, data
):
    section = DataSection(labeled=labeled, test=test, split_seed=seed, draw=seed)
    try:
        splits = split_cases(dataset, section, validation)
    except InputError:
        assume(False)
    parts = [set(getattr(splits, part)) for part in PARTS]
    assert sum(map(len, parts)) == len(set.union(*parts))
    patient = {case.case_id: case.patient_id for case in dataset.cases}
    has_label = {case.case_id: case.label is not None for case in dataset.cases}
    training, val, held = ({patient[c] for c in p} for p in (parts[0] | parts[1], *parts[2:]))
    assert training.isdisjoint(val | held)
    assert val.isdisjoint(held)
    assert parts[0]
    assert all(has_label[c] for c in parts[0] | parts[2] | parts[3])
    shuffled = data.draw(st.permutations(dataset.cases))
    again = Dataset("d", Path("d"), "list", tuple(shuffled), None, ("",))
    assert split_cases(again, section, validation) == splits
    assert Splits.from_json(json.loads(json.dumps({**splits.to_json(), "more": 1}))) == splits


@given(number=st.integers(10, 40), seed=st.integers(0, 99))
def test_a_larger_draw_of_single_patients_holds_the_smaller_one(number, seed):
    dataset = make_labeled(number)
    small, large = (
        split_cases(dataset, DataSection(labeled=n, test=3, draw=seed), 0) for n in (3, 6)
    )
    assert set(small.labeled) < set(large.labeled)


def test_labels_of_unlabeled_and_test_cases_cannot_be_taken():
    dataset = make_labeled(20)
    splits = split_cases(dataset, DataSection(labeled=5, test=4), "auto")
    for part in ("unlabeled", "test"):
        cases = select_cases(dataset, splits, part)
        assert cases
        assert all(case.label is None for case in cases)
        assert "_m.nii.gz" not in repr(cases)
    assert all(
        case.label
        for case in select_cases(dataset, splits, "labeled") + select_cases(dataset, splits, "val")
    )
    assert all(case.label for case in select_test_with_labels(dataset, splits))


def test_splits_of_another_data_set_are_refused():
    with pytest.raises(InputError, match="gone: is in the splits"):
        select_cases(make_labeled(2), Splits(("gone",), (), (), ()), "labeled")


# nothing vanishes


def write_names(root: Path, *names: str) -> list[str]:
    touch(root, *names)
    return explain_files(root, list_files(read_dataset(root)))


def test_every_file_of_a_folder_is_used_or_named_with_the_reason_in_groups(tmp_path):
    lines = write_names(
        tmp_path,
        *("images/a.nii.gz", "labels/a.nii.gz", "images/.DS_Store", "labels/._a.nii.gz"),
        *(f"previews/{i}.png" for i in range(300)),
        *("__MACOSX/x.txt", "Thumbs.db", ".cache/deep/file", "old/b.nii", "old/c.nii"),
        *("mr/IM1.dcm", "mr/IM2.dcm", "others/t.gipl", "notes.txt", "README"),
    )
    assert lines[0] == f"files below {tmp_path}: 314, of them 2 used"
    groups = {line.split(":")[1].split(" x ")[1]: line for line in lines[1:]}
    assert sum(int(line.split()[2]) for line in lines[1:]) == 312
    assert len(lines) < 10
    assert max(map(len, lines)) < 300
    assert "not used: 5 x hidden or of the system" in groups["hidden or of the system"]
    assert (
        "previews/0.png and 299 more there" in groups["pictures beside scans, taken for previews"]
    )
    assert "old/b.nii and 1 more there" in groups["scans that the layout or the list does not name"]
    text = "\n".join(lines)
    for part in ("mr/IM1.dcm and 1 more", "others/t.gipl", "3D Slicer", "(.txt)"):
        assert part in text


@pytest.mark.parametrize("name", ["images/site/b.nii.gz", "imagesVal/b.nii.gz", "b.nii.gz"])
def test_scans_that_a_layout_does_not_name_are_noted_with_their_folder(tmp_path, name):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", name, "previews/a.png")
    (note,) = read_dataset(tmp_path).notes
    assert note.startswith("1 scans are not read")
    assert f"in the folders {Path(name).parent} (1)" in note
    assert "--draft" in note


def test_scans_that_a_dataset_json_does_not_name_are_noted(tmp_path):
    touch(write_decathlon(tmp_path), "imagesTr/s_7.nii.gz", "imagesTr/s_8.nii.gz")
    assert "2 scans are not read" in read_dataset(tmp_path).notes[0]


def test_a_folder_that_is_called_like_a_scan_stands_for_the_scan_in_it(tmp_path):
    touch(tmp_path, "images/a.nii/a.nii", "images/b.nii.gz/other.nii.gz", "labels/a.nii/x.nii")
    dataset = read_dataset(tmp_path)
    assert dataset.notes == ()
    assert [case.case_id for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[0].label == tmp_path / "labels/a.nii/x.nii"
    (tmp_path / "cases.csv").write_text("case_id,image\nx,images/a.nii\n")
    assert read_dataset(tmp_path).cases[0].images == (tmp_path / "images/a.nii/a.nii",)
    touch(tmp_path, "images/a.nii/second.nii")
    assert "a folder that holds no scan or several" in refuse(tmp_path)
    (tmp_path / "cases.csv").unlink()
    assert "images/a.nii: a folder that holds no scan or several" in refuse(tmp_path)


def test_validation_and_labeled_test_entries_of_a_dataset_json_are_parts(tmp_path):
    touch(tmp_path, "imagesTr/v.nii.gz", "labelsTr/v.nii.gz", "imagesTr/u.nii.gz")
    entry = {"image": "imagesTr/v.nii.gz", "label": "labelsTr/v.nii.gz", "fold": 1}
    root = write_decathlon(tmp_path, validation=[entry], unlabeled=["imagesTr/u.nii.gz"])
    dataset = read_dataset(root)
    splits = split_cases(dataset, DataSection(), "auto")
    assert splits.val == ("v",)
    assert splits.unlabeled == ("s_2", "s_9", "u")
    assert "columns that are not read: fold" in dataset.notes[0]
    tested = read_dataset(write_decathlon(tmp_path, test=[entry]))
    assert split_cases(tested, DataSection(), "auto").test == ("v",)


@pytest.mark.parametrize(
    ("key", "value", "count"),
    [
        ("fold", [["imagesTr/s_7.nii.gz"], ["imagesTr/s_8.nii.gz"]], 2),
        ("fold_0", {"val": [{"image": "imagesTr/s_7.nii.gz"}]}, 1),
        ("pseudo", [{"image": "imagesTr/s_7.nii.gz", "label": "x/s_7.nii.gz"}], 2),
    ],
)
def test_keys_of_cases_that_are_not_read_are_noted(tmp_path, key, value, count):
    notes = read_dataset(write_decathlon(tmp_path / "a", **{key: value})).notes
    assert f"the key {key!r} names {count} scans and is not read" in notes[0]
    notes = read_dataset(write_nnunet(tmp_path / "b", **{key: value})).notes
    assert f"the key {key!r} names {count} scans and is not read" in notes[0]


def test_a_label_of_another_name_in_a_dataset_json_is_not_passed_over(tmp_path):
    entry = {"image": "imagesTr/s_0.nii.gz", "mask": "labelsTr/s_0.nii.gz"}
    message = refuse(write_decathlon(tmp_path, training=[entry]))
    assert "'mask'; did you mean 'label'?" in message


@pytest.mark.parametrize("text", ["../out/s.nii.gz", "imagesTr/../../s.nii.gz", "/etc/s.nii.gz"])
def test_a_dataset_json_names_nothing_outside_of_its_folder_and_a_csv_may(tmp_path, text):
    root = write_decathlon(tmp_path / "set", training=[{"image": text}])
    touch(tmp_path, "out/s.nii.gz", "s.nii.gz")
    assert f"training[0]: the path {text} leads out of {root}" in refuse(root)
    place = tmp_path / "out/s.nii.gz"
    for path in (place, "../out/s.nii.gz"):
        file = write_list(root, f"case_id,image\nx,{path}\n")
        assert read_dataset(file).cases[0].images[0].samefile(place)


# columns of metadata


def test_a_table_of_metadata_beside_the_scans_is_no_list(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz")
    text = "case_id,age,sex,scan,volume,images,file\na,61,f,2019,33.1,1,a.nii.gz\n"
    (tmp_path / "cases.csv").write_text(text)
    (tmp_path / "cases.json").write_text('[{"case_id": "a", "age": 61}]')
    (tmp_path / "dataset.json").write_text('{"name": "a set", "license": "CC"}')
    dataset = read_dataset(tmp_path)
    assert dataset.format == "folders"
    assert ids(dataset, labeled=True) == ["a"]
    assert "cases.csv has no column of images" in dataset.notes[0]
    assert "no column 'image'" in refuse(tmp_path / "cases.csv")
    (tmp_path / "cases.csv").write_text("case_id,imgae\na,images/a.nii.gz\n")
    assert "'imgae'; did you mean 'image'?" in refuse(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"a": {"alter": 61}}', '{"patients": [{"id": "a", "sexe": "F"}]}', '{"a": 61}']
)
def test_an_object_of_metadata_beside_the_scans_is_no_list(tmp_path, content):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz")
    (tmp_path / "cases.json").write_text(content)
    dataset = read_dataset(tmp_path)
    assert (dataset.format, ids(dataset, labeled=True)) == ("folders", ["a"])
    assert "cases.json has no column of images" in dataset.notes[0]
    (tmp_path / "cases.json").write_text('{"scans": [{"case_id": "a", "image": "a.nii.gz"}]}')
    assert "expected [{" in refuse(tmp_path)


def test_columns_of_metadata_are_noted_and_not_read(tmp_path):
    text = "case_id,image,label,age,site,volume,id,fold,labels,subject,patient_id,set\n"
    path = write_list(tmp_path, f"{text}x,a.nii.gz,m.nii.gz,4,Lab,3.5,7,2,3,s,p,A\n")
    dataset = read_dataset(path)
    assert dataset.notes == (
        "cases.csv: columns that are not read: age, site, volume, id, fold, labels, subject, set",
    )
    assert dataset.cases[0].patient_id == "p"


# names


def test_names_in_both_unicode_forms_are_one_name(tmp_path):
    name = "größe_é"
    composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    touch(tmp_path, f"images/{composed}.nii.gz", f"labels/{apart}.nii.gz")
    (case,) = read_dataset(tmp_path).cases
    assert case.label is not None
    assert case.case_id == composed
    (tmp_path / "cases.csv").write_text(f"case_id,image,label\n{apart},images/{apart}.nii.gz,\n")
    (case,) = read_dataset(tmp_path).cases
    assert (case.case_id, case.images[0].is_file()) == (composed, True)
    (tmp_path / "cases.csv").unlink()
    touch(tmp_path, f"unlabeled/{apart}.nii.gz")
    assert f"case_id {composed} stands 2 times" in refuse(tmp_path)


def test_a_name_that_is_not_utf8_is_refused_in_words_that_can_be_printed(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz")
    path = os.path.join(os.fsencode(tmp_path), b"images", b"gr\xf6\xdfe.nii.gz")
    with open(path, "wb"):
        pass
    message = refuse(tmp_path)
    assert "is not UTF-8: rename it" in message
    assert message.encode()
    assert explain_files(tmp_path, [])[0].encode()


def test_a_case_id_leaves_room_for_the_names_of_its_files(tmp_path):
    fits, long = "é" * 100, "é" * 101
    touch(tmp_path, f"images/{fits}.nii.gz", "labels/.x")
    assert read_dataset(tmp_path).cases[0].case_id == fits
    touch(tmp_path, f"images/{long}.nii.gz")
    assert f"case_id {long}: has 202 bytes" in refuse(tmp_path)
    text = f"case_id,image\n{'x' * 252},a.nii.gz\ny,{'y' * 300}.nii.gz\n"
    message = refuse(write_list(tmp_path, text))
    assert "has 252 bytes" in message
    assert "y: " in message


def test_links_back_to_the_tree_are_not_followed_in_circles(tmp_path):
    root = touch(tmp_path / "set", "p1.nii.gz", "sub/p2.nii.gz")
    touch(tmp_path / "archive", "p3.nii.gz")
    (tmp_path / "archive" / "again").symlink_to(tmp_path / "archive")
    for name, target in (("top", root), ("up", tmp_path), ("sub2", root / "sub")):
        (root / "sub" / name).symlink_to(target)
    for name in ("more", "same"):
        (root / name).symlink_to(tmp_path / "archive")
    found = [str(path.relative_to(root)) for path in walk_files(root)]
    assert found == ["p1.nii.gz", "more/p3.nii.gz", "sub/p2.nii.gz"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[("a.gipl", "3D Slicer"), ("a.vtk", "3D Slicer"), ("a.mnc", "mnc2nii")],
        *[("a.BRIK", "3dAFNItoNIFTI"), ("a.nii.bz2", "unpack"), ("a.npy", "as NIfTI")],
    ],
)
def test_scans_of_other_formats_get_the_way_to_convert_them(tmp_path, here, name, how):
    touch(tmp_path / "set", name)
    assert how in refuse(tmp_path / "set")
    touch(tmp_path / "two", "images/b.nii.gz", "labels/b.nii.gz", f"images/{name}")
    assert f"images/{name}: a scan of another kind" in refuse(tmp_path / "two")
    assert how in refuse(tmp_path / "two")
    file = write_list(tmp_path / "list", f"case_id,image\nx,{name}\n")
    touch(tmp_path / "list", name)
    assert how in refuse(file)
