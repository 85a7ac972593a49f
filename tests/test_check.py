import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from medssl.cli import app
from medssl.config import IGNORE, DataSection, InputError
from medssl.data.cases import Case, Dataset, Splits, split_cases
from medssl.data.check import CheckResult, check_dataset, describe_origins
from medssl.data.io import read_label, write_mask
from medssl.data.layouts import read_dataset

SHAPE = (6, 7, 5)
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
LABELS = {0: "background", 1: "liver"}


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def make_image(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def make_label(value: int = 1, dtype: type = np.uint8) -> np.ndarray:
    label = np.zeros(SHAPE, dtype)
    label[2:4, 2:4, 2:4] = value
    return label


class Scans:
    """A data set that a test fills case by case."""

    def __init__(self, root: Path) -> None:
        self.root, self.cases = root, []

    def add(self, part: str, image=None, label=None, patient="", channels=1, **where) -> str:
        name = f"{part}_{len(self.cases)}"
        images = [image] if channels == 1 else image
        if image is None:
            images = [make_image(len(self.cases))]
        paths = [
            write(self.root / f"{name}_{i}.nii.gz", array, where.get("affine", AFFINE))
            for i, array in enumerate(images)
        ]
        mask = None
        if part != "unlabeled":
            array = make_label() if label is None else label
            mask = write(self.root / f"{name}_m.nii.gz", array, where.get("label_affine", AFFINE))
        self.cases.append(Case(name, tuple(paths), mask, patient or name, part))
        return name

    def check(self, labels=LABELS, channels=("MRI",), ignore=None) -> CheckResult:
        dataset = Dataset("set", self.root, "list", tuple(self.cases), labels, channels)
        return check_dataset(dataset, self.splits(), ignore)

    def splits(self) -> Splits:
        parts = ("labeled", "unlabeled", "val", "test")
        return Splits(*(tuple(c.case_id for c in self.cases if c.split == p) for p in parts))


@pytest.fixture
def scans(tmp_path) -> Scans:
    return Scans(tmp_path)


def only(texts: Sequence[str]) -> str:
    assert len(texts) == 1, texts
    return texts[0]


def test_a_sound_set_is_ok_and_shows_its_table(scans):
    for part in ("labeled", "labeled", "unlabeled", "val", "test"):
        scans.add(part)
    result = scans.check()
    assert (result.problems, result.warnings, result.notes) == ((), (), ())
    result.raise_problems()
    text = result.render()
    assert text.splitlines()[-1] == "OK"
    rows = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert rows["spacing I, mm"] == ["2", "2", "2"]
    assert rows["spacing K, mm"] == ["3", "3", "3"]
    assert rows["shape J, voxels"] == ["7", "7", "7"]
    assert rows["over 4 cases"] == ["min", "median", "max"]
    assert rows["liver"] == ["1", "3", "0.072", "0.072", "0.072"]  # 8 voxels of 2 x 1.5 x 3 mm
    assert "MRI, 99.5 % of voxels below" in rows


def test_percentiles_are_those_of_the_voxels(scans):
    image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    scans.add("labeled", image)
    (facts,) = scans.check().facts
    np.testing.assert_allclose(facts.percentiles, [np.percentile(image, (0.5, 50, 99.5))])


def test_header_noise_passes_and_a_tenth_of_a_voxel_does_not(scans):
    scans.add("labeled", label_affine=AFFINE + 1e-6)
    assert scans.check().problems == ()
    moved = AFFINE.copy()
    moved[2, 3] += 0.33  # 0.11 voxels of 3 mm
    name = scans.add("labeled", label_affine=moved)
    problem = only(scans.check().problems)
    assert problem.startswith(f"{name}: ")
    assert "0.11 voxels" in problem
    assert "0, 0, 3, 5]" in problem
    assert "0, 0, 3, 5.33]" in problem


def test_a_small_turn_that_moves_only_the_far_corners_is_found(scans):
    turned = AFFINE.copy()
    turned[0, 1] = 0.08
    scans.add("labeled", label_affine=turned)
    assert "voxels beside the image" in only(scans.check().problems)


def test_shape_mismatch_names_both_shapes(scans):
    name = scans.add("labeled", label=np.ones((6, 7, 4), np.uint8))
    problem = only(scans.check().problems)
    assert name in problem
    assert "(6, 7, 5)" in problem
    assert "(6, 7, 4)" in problem


def test_undeclared_values_are_named_by_value_and_case(scans):
    first, second = (scans.add("labeled", label=make_label(205)) for _ in range(2))
    third = scans.add("val", label=make_label(7))
    problems = scans.check().problems
    assert len(problems) == 2
    assert f"label value 7 is not declared: {third} (8 voxels)" in problems[0]
    assert f"{first} (8 voxels), {second} (8 voxels)" in problems[1]
    assert "data.labels.205=name" in problems[1]


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_value_below_0_is_no_class(scans, labels):
    scans.add("labeled", label=make_label(-1, np.int16))
    problem = only([text for text in scans.check(labels).problems if "-1" in text])
    assert "data.ignore=-1" in problem
    assert "data.labels" not in problem


def test_test_labels_may_have_values_that_no_opened_label_has(scans):
    scans.add("labeled")
    assert not [text for text in scans.check(None).warnings if "data.labels" in text]
    scans.add("test")
    assert [text for text in scans.check(None).warnings if "name all by data.labels" in text]
    assert not [text for text in scans.check().warnings if "name all by data.labels" in text]


@pytest.mark.parametrize("labels", [LABELS, None])
def test_masks_of_0_and_255_get_the_offer(scans, labels):
    scans.add("labeled", label=make_label(255))
    assert "data.labels.255=name" in only(scans.check(labels).problems)
    assert scans.check({0: "background", 255: "liver"}).problems == ()
    assert scans.check(ignore=255).problems == ()


def test_an_undeclared_255_beside_classes_may_mean_ignore(scans):
    label = make_label()
    label[0, 0, 0] = 255
    scans.add("labeled", label=label)
    assert "data.ignore=255" in only(scans.check(None).problems)
    result = scans.check(None, ignore=255)
    assert result.problems == ()
    assert result.labels == {0: "background", 1: "class_1"}


def test_fractions_are_problems_and_rounding_is_noted(scans):
    rounded = scans.add("labeled", label=make_label(1, np.float64) * 0.9999999)
    result = scans.check()
    assert result.problems == ()
    assert only(result.notes) == f"almost-integer label values were rounded: {rounded}"
    name = scans.add("labeled", label=make_label(1, np.float32) * 0.5)
    problem = only(scans.check().problems)
    assert problem.startswith(name)
    assert "0.5" in problem


def test_an_image_in_place_of_a_label_is_recognized(scans):
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    scans.add("labeled", label=values)
    scans.add("labeled")
    result = scans.check(None)
    assert "is it an image?" in only(result.problems)
    assert not result.warnings, "of values that are no classes"
    assert len(result.labels) < 5
    assert "in the 1 label opened" in result.render()


def test_non_finite_voxels_are_counted(scans):
    image = make_image(0)
    image[0, 0, :2] = np.nan, np.inf
    name = scans.add("unlabeled", image)
    assert f"{name}: 2 of 210 voxels are NaN or infinite" in only(scans.check().problems)


def test_all_bad_cases_are_collected_and_named(scans):
    names = [scans.add(part) for part in ("labeled", "unlabeled", "test", "labeled", "unlabeled")]
    truncated, corrupt, empty, header = (scans.cases[i].images[0] for i in range(4))
    truncated.write_bytes(truncated.read_bytes()[:-100])
    content = bytearray(corrupt.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    corrupt.write_bytes(content)
    empty.write_bytes(b"")
    header.write_bytes(b"not a scan at all")
    result = scans.check()
    assert [problem.split(":")[0] for problem in result.problems] == [
        names[0], names[3], names[1], names[2]
    ]  # fmt: skip
    assert result.render().splitlines()[-1] == "4 problems"
    with pytest.raises(InputError) as caught:
        result.raise_problems()
    assert all(name in str(caught.value) for name in names[:4])


def test_a_bad_label_is_named_beside_a_bad_image(scans):
    name = scans.add("labeled")
    for path in (*scans.cases[0].images, scans.cases[0].label):
        path.write_bytes(b"")
    assert [problem.split(":")[0] for problem in scans.check().problems] == [name, name]


def test_channels_must_agree_and_be_as_many_as_declared(scans):
    scans.add("labeled", [make_image(0), make_image(1)], channels=2)
    assert scans.check(channels=("T1", "T2")).problems == ()
    scans.add("labeled", make_image(2, (*SHAPE, 2)))
    assert scans.check(channels=("T1", "T2")).problems == ()
    scans.add("labeled", make_image(3, (*SHAPE, 3)))
    scans.add("labeled", [make_image(4), make_image(5, (6, 7, 4))], channels=2)
    problems = scans.check(channels=("T1", "T2")).problems
    assert len(problems) == 2
    assert "3" in problems[0]
    assert "(6, 7, 4)" in problems[1]


def test_4d_scans_without_declared_channels_get_a_hint(scans):
    scans.add("labeled", make_image(0, (*SHAPE, 2)))
    assert '{"channels": ["T1", "T2"]' in only(scans.check(channels=("",)).notes)


def test_one_scan_in_two_parts_is_a_problem_and_twice_in_one_a_warning(scans):
    image = make_image(0)
    first, second = scans.add("unlabeled", image), scans.add("unlabeled", image)
    result = scans.check()
    assert result.problems == ()
    assert f"{first} (unlabeled), {second} (unlabeled)" in only(result.warnings)
    other = AFFINE.copy()
    other[0, 3] = 99  # another header does not hide it
    third = scans.add("test", image, affine=other, label_affine=other)
    assert f"{third} (test)" in only(scans.check().problems)


def test_a_patient_on_two_sides_is_a_problem_but_not_within_training(scans):
    scans.add("labeled", patient="p1")
    scans.add("unlabeled", patient="p1")
    assert scans.check().problems == ()
    name = scans.add("test", patient="p1")
    problem = only(scans.check().problems)
    assert problem.startswith("patient p1 stands on two sides")
    assert f"{name} (test)" in problem


def test_empty_labels_and_lost_classes_are_warned_of(scans):
    empty = scans.add("labeled", label=np.zeros(SHAPE, np.uint8))
    scans.add("labeled")
    first, second = scans.check({0: "background", 1: "liver", 2: "cyst"}).warnings
    assert first == f"labels without any foreground: {empty}"
    assert "cyst (2)" in second


def test_headers_that_say_nothing_and_flat_images_are_warned_of(scans):
    scans.add("unlabeled", affine=np.eye(4))
    scans.add("unlabeled", affine=np.diag([1000.0, 1000, 1000, 1]))
    scans.add("unlabeled", np.full(SHAPE, 5, np.float32))
    texts = scans.check().warnings
    assert [text.split(":")[0] for text in texts] == [
        "the header places no voxels (identity affine), 1 mm is assumed",
        "spacing outside of 0.02 to 20 mm",
        "images of a single value (99 % of the voxels at least)",
    ]


def set_header(path: Path, sform=AFFINE, qform=AFFINE, unit="mm") -> None:
    """Give a scan other forms (None has no code), and a unit."""
    image = nib.load(path)
    for form, place in ((qform, image.set_qform), (sform, image.set_sform)):
        place(AFFINE if form is None else form, 0 if form is None else 1, update_affine=False)
    image.header.set_xyzt_units(unit)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)


def test_headers_that_place_voxels_twice_are_named_with_what_is_used(scans):
    shifted, thick = AFFINE.copy(), AFFINE.copy()
    shifted[0, 3] += 33
    thick[2, 2] = 4
    names = [scans.add(part) for part in ("test", *["unlabeled"] * 4)]
    forms = ((shifted, AFFINE), (thick, AFFINE), (None, None), (AFFINE, AFFINE), (None, AFFINE))
    for case, (sform, qform) in zip(scans.cases, forms, strict=True):
        set_header(case.images[0], sform, qform)
    result = scans.check()
    assert result.problems == ()
    size, place, code = result.warnings
    assert "sform, which is used here, is not the one in pixdim" in size
    assert size.endswith(f": {names[1]} (2 x 1.5 x 4 mm against 2 x 1.5 x 3 mm)")
    assert "the sform is used here" in place
    assert place.endswith(f": {names[0]} (by 16.5 voxels)")
    assert "does not say where left and right are" in code
    assert code.endswith(f": {names[2]}")


@pytest.mark.parametrize("part", ["labeled", "val"])
def test_a_label_whose_header_contradicts_itself_is_named_beside_a_sound_scan(scans, part):
    flipped, shifted = AFFINE @ np.diag([-1, 1, 1, 1]), AFFINE.copy()
    shifted[0, 3] += 33
    names = [scans.add(part, label=make_label()) for _ in range(3)]
    alike, sound, flat = scans.cases
    set_header(flat.label, qform=flipped)
    for path in (*alike.images, alike.label, *sound.images):
        set_header(path, qform=shifted)
    result = scans.check()
    assert result.problems == ()
    place = only(result.warnings)
    assert "the sform is used here" in place
    by_scan = f"{names[0]} (by 16.5 voxels), {names[1]} (by 16.5 voxels)"
    assert place.endswith(f": {by_scan}, {names[2]} (label: by 10 voxels)")


def test_headers_of_later_channels_are_looked_at_as_the_first(scans):
    shifted, thick, middle = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    shifted[0, 3] += 33
    thick[2, 2] = 4
    middle[:3, 3] = 5, -4.5, -6  # where a header without a code has the first voxel
    micron = np.diag([1e3, 1e3, 1e3, 1]) @ AFFINE
    cases = (
        ((AFFINE, AFFINE), (AFFINE, shifted), (AFFINE, AFFINE)),
        ((thick, AFFINE), (thick, AFFINE), (thick, AFFINE)),
        ((AFFINE, AFFINE), (AFFINE, AFFINE), (micron, micron, "micron")),
        ((middle, middle), (None, None), (None, None)),
        ((AFFINE, shifted), (AFFINE, AFFINE), (AFFINE, shifted + (shifted - AFFINE))),
    )
    names = []
    for number, channels in enumerate(cases):
        images = [make_image(9 * number + channel) for channel in range(3)]
        names.append(scans.add(["unlabeled", "test"][number % 2], images, channels=3))
        for path, forms in zip(scans.cases[-1].images, channels, strict=True):
            set_header(path, *forms)
    result = scans.check(channels=("T1", "T2", "FLAIR"))
    assert result.problems == ()
    size, place, code = [text for text in result.warnings if "classes" not in text]
    assert size.endswith(f": {names[1]} (2 x 1.5 x 4 mm against 2 x 1.5 x 3 mm)")
    both = "by 16.5 voxels; channel 2: by 33 voxels"
    assert f"{names[0]} (channel 1: by 16.5 voxels), {names[4]} ({both})" in place
    assert code.endswith(f": {names[3]} (channel 1; channel 2)")
    assert only(result.notes).endswith(f"converted to mm: {names[2]} (channel 2: micron)")


def test_another_unit_is_converted_and_noted(scans):
    name = scans.add("labeled")
    for path in (*scans.cases[0].images, scans.cases[0].label):
        micron = np.diag([1e3, 1e3, 1e3, 1]) @ AFFINE
        set_header(path, micron, micron, "micron")
    result = scans.check()
    np.testing.assert_allclose(result.facts[0].spacing, (2, 1.5, 3))
    np.testing.assert_allclose(result.facts[0].volumes_ml[1], 8 * 9e-3)
    assert f"converted to mm: {name} (micron)" in only(result.notes)


@pytest.mark.parametrize("value", [1e30, 1e5, 1e-30, 0.001])
def test_a_header_with_an_impossible_spacing_is_a_problem_of_its_case(scans, value):
    for _ in range(3):
        scans.add("unlabeled")
    affine = AFFINE.copy()
    affine[0, 0] = value
    set_header(scans.cases[1].images[0], affine)
    problem = only(scans.check().problems)
    assert problem.startswith(f"{scans.cases[1].case_id}: {scans.cases[1].images[0]}: the spacing")
    assert f"{value:.4g} x 1.5 x 3 mm" in problem


def test_scans_too_large_for_the_spacing_of_the_others_are_problems(scans):
    for _ in range(3):
        scans.add("unlabeled")
    scans.add("unlabeled", affine=np.diag([9000.0, 9000, 9000, 1]))
    assert only(scans.check().problems).startswith(f"{scans.cases[3].case_id}: 6 x 7 x 5 voxels of")


def test_a_spacing_far_from_that_of_the_others_is_warned_of(scans):
    for _ in range(3):
        scans.add("unlabeled")
    name = scans.add("unlabeled", affine=np.diag([0.05, 1, 1, 1]))
    text = only(scans.check().warnings)
    assert text == f"spacing off that of most scans by over 10 times: {name} (0.05 x 1 x 1)"


def test_labels_are_found_in_files_where_none_are_declared(scans):
    scans.add("labeled", label=make_label(3))
    scans.add("val", label=make_label(5))
    scans.add("test", label=make_label(9))
    dataset = Dataset("set", scans.root, "folders", tuple(scans.cases), None, ("",))
    expected = {0: "background", 3: "class_3", 5: "class_5"}
    assert scans.check(None).labels == expected
    ignoring = check_dataset(dataset, scans.splits(), ignore=5)
    assert ignoring.labels == {0: "background", 3: "class_3"}


def test_more_classes_than_a_byte_tells_apart_are_refused_and_the_most_are_kept_apart(scans):
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    scans.add("labeled", label=values)
    scans.add("labeled", label=values + 210)
    names = {value: f"c{value}" for value in range(420)}
    problem = only(scans.check(names).problems)
    assert problem.startswith("there are 420 classes with the background, from 0 to 419")
    assert "at most 255" in problem
    most = {value: f"c{value}" for value in (*range(254), 1000)}
    scans.cases, one = [], np.where(values == 5, 1000, values % 254).astype(np.int16)
    scans.add("labeled", label=one)
    assert scans.check(most).problems == ()
    path, kept = scans.cases[0].label, tuple(most)
    classes, affine = read_label(path, kept, None)
    assert IGNORE not in classes
    write_mask(path, classes, affine, kept)
    np.testing.assert_array_equal(nib.load(path).get_fdata(), one)


def test_a_label_value_that_no_mask_can_hold_is_refused_before_a_training(scans):
    for value in (2**31 - 1, 2**31):
        scans.add("labeled", label=make_label(value, np.float64))
    problem = only(scans.check(labels=None).problems)
    assert f"label value {2**31} (class_{2**31}) is larger than a mask of NIfTI" in problem
    assert f"can hold ({2**31 - 1})" in problem


def test_blank_scans_are_no_copies_of_each_other_and_are_named(scans):
    flat = np.full(SHAPE, 7, np.float32)
    names = [scans.add(part, flat) for part in ("labeled", "unlabeled", "test")]
    result = scans.check()
    assert result.problems == ()
    assert only(result.warnings).endswith(f": {', '.join(names)}")


@pytest.mark.parametrize("part", ["labeled", "unlabeled", "test"])
def test_an_image_of_as_few_values_as_a_mask_is_named_unless_most_are_so(scans, part):
    other = scans.add("labeled")
    mask = scans.add(part, image=3.0 * make_label())
    text = only([t for t in scans.check().warnings if "as masks have" in t])
    assert f"{mask} (2 values, " in text
    assert other not in text
    scans.add("unlabeled", image=1.0 * make_label())
    assert not [t for t in scans.check().warnings if "as masks have" in t]


def make_ct(rise: float, has_air: bool = True) -> np.ndarray:
    """Return air, soft tissue and bone, in HU and so much above."""
    image = np.full(SHAPE, -1000.0 if has_air else -80.0)
    image[:, 2:] = 40
    image[2:4, 3:] = 900
    return image.astype(np.float32) + rise


@pytest.mark.parametrize("rises", [(0, 0, 0, 1024), (1024, 1024, 1024, 0)])
def test_a_ct_whose_values_are_1024_off_those_of_the_others_is_named(scans, rises):
    names = [scans.add("labeled", make_ct(rise + 3 * i)) for i, rise in enumerate(rises)]
    warning = only([text for text in scans.check().warnings if "Hounsfield" in text])
    assert [name for name in names if f"{name} (" in warning] == names[-1:]


def test_a_ct_that_shows_no_air_is_not_off(scans):
    for i in range(4):
        scans.add("labeled", make_ct(3 * i, has_air=i < 3))
    assert not [text for text in scans.check().warnings if "Hounsfield" in text]


@pytest.mark.parametrize("factor", [80, 1 / 80])
def test_a_label_of_quite_another_volume_is_named_with_its_file(scans, factor):
    for size in (20, 22, 24):
        scans.add("labeled", label=(np.arange(210).reshape(SHAPE) < size).astype(np.uint8))
    odd = round(22 * factor) if factor > 1 else 1
    shape = (40, 10, 10) if factor > 1 else SHAPE
    label = (np.arange(np.prod(shape)).reshape(shape) < odd).astype(np.uint8)
    assert scans.check().warnings == (), "three do not tell what is usual"
    scans.add("labeled", make_image(9, shape), label=label)
    warning = only(scans.check().warnings)
    assert warning.startswith("unusual volume of liver (1)")
    assert f"labeled_3 ({odd * 9 / 1000:.4g} ml" in warning
    assert str(scans.cases[3].label) in warning
    assert "labeled_2" not in warning


def test_lesions_of_all_sizes_are_not_unusual(scans):
    for size in (1, 4, 16, 64, 200):
        scans.add("labeled", label=(np.arange(210).reshape(SHAPE) < size).astype(np.uint8))
    assert scans.check().warnings == ()


def test_what_is_wrong_with_many_cases_is_said_once_and_names_them_all(scans):
    names = [scans.add("unlabeled", make_image(i, (*SHAPE, 2))) for i in range(30)]
    other = scans.add("unlabeled", make_image(99, (*SHAPE, 3)))
    result = scans.check()
    assert len(result.problems) == 31
    lines = result.render().splitlines()
    assert lines[-1] == "31 problems"
    assert sum("holds 2 channels" in line for line in lines) == 1
    assert f"    the same in {', '.join(names[1:])}" in lines
    with pytest.raises(InputError) as caught:
        result.raise_problems()
    assert all(name in str(caught.value) for name in (*names, other))
    assert len(str(caught.value).splitlines()) == 4


def test_case_ids_that_some_disks_do_not_tell_apart_or_take_are_warned_of(scans):
    for patient, name in zip("1234", ("scan_A", "scan_a", "NUL", "b."), strict=True):
        scans.add("unlabeled", patient=patient)
        scans.cases[-1] = replace(scans.cases[-1], case_id=name)
    alike, reserved = scans.check().warnings
    assert alike.endswith(": scan_A and scan_a")
    assert reserved.endswith(": NUL, b.")


_opened: list[str] | None = None


def _record(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(args[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that are opened during a test (an audit hook cannot be removed: it is muted)."""
    global _opened
    if not getattr(sys, "_medssl_audit", False):
        sys.addaudithook(_record)
        sys._medssl_audit = True
    _opened = []
    yield _opened
    _opened = None


def test_no_label_of_an_unlabeled_or_test_case_is_opened(scans, opened):
    for part in ("labeled", "val", "test", "labeled"):
        scans.add(part)
    scans.cases[3] = replace(scans.cases[3], split="unlabeled")  # simulated: it has a label
    for case in scans.cases[2:]:
        case.label.write_bytes(b"poison")
    opened.clear()
    assert scans.check(None).problems == ()
    assert [str(case.label) in opened for case in scans.cases] == [True, True, False, False]


def test_non_finite_voxels_of_a_test_scan_are_found_before_the_training(scans):
    image = make_image(0)
    image[3] = np.nan
    scans.add("labeled")
    name = scans.add("test", image)
    assert f"{name}: 35 of 210 voxels" in only(scans.check().problems)


@pytest.mark.parametrize(("ignore", "name"), [(1, "liver"), (0, "background")])
def test_the_value_of_a_class_cannot_mean_not_annotated(scans, ignore, name):
    scans.add("labeled")
    problem = only(scans.check(ignore=ignore).problems)
    assert problem.startswith(f"data.ignore={ignore} is the value of {name}")


def test_a_set_without_any_class_is_refused(scans):
    scans.add("labeled", label=np.zeros(SHAPE, np.uint8))
    assert "nothing to learn" in only(scans.check(labels=None).problems)
    assert scans.check().problems == (), "a declared class may be in the other labels"


def test_a_value_that_one_label_has_is_not_made_a_class_without_a_word(scans):
    for _ in range(3):
        scans.add("labeled")
    assert scans.check(labels=None).warnings == ()
    stray = make_label()
    stray[0, 0, 0] = 205
    scans.add("labeled", label=stray)
    assert "205 in 1 of 4 labels" in only(scans.check(labels=None).warnings)
    assert scans.check(labels={**LABELS, 205: "cyst"}).warnings == ()


def test_values_that_never_stand_in_one_label_may_be_those_of_two_sites(scans):
    both = make_label()
    both[0, 0, 0] = 2
    for label in (both, both, 127 * both, 127 * both):
        scans.add("labeled", label=label)
    text = only(scans.check(labels=None).warnings)
    assert "either the values 1, 2 (2 labels) or 127, 254 (2 labels)" in text
    named = {**LABELS, 2: "cyst", 127: "kidney", 254: "stone"}
    assert scans.check(labels=named).warnings == ()
    both[0, 0, 1] = 127
    scans.add("labeled", label=both)
    assert scans.check(labels=None).warnings == ()


def test_scans_that_may_be_of_one_patient_are_asked_about(scans):
    names = ("P01_pre", "P01_post", "P02_pre")
    for _ in names:
        scans.add("labeled")
    scans.cases = [
        replace(c, case_id=n, patient_id=n) for c, n in zip(scans.cases, names, strict=True)
    ]
    assert "P01_post, P01_pre" in only(scans.check().warnings)
    assert "3 cases of 3 patients" in scans.check().render()
    scans.cases = [replace(case, patient_id=case.case_id[:3]) for case in scans.cases]
    assert scans.check().warnings == ()
    assert "3 cases of 2 patients" in scans.check().render()


@pytest.mark.parametrize(
    ("case_ids", "patient_ids", "alike"),
    [
        (("1001_20190101_ct", "1001_20200301_ct", "1002_20190101_ct"), None, True),
        (("1001_2019-01-01_ct", "1001_2020-03-01_ct", "1002_2019-01-01_ct"), None, True),
        (("P03-t0-ct", "P03-t1-ct", "P04-t0-ct"), None, True),
        (("sub-01_a", "Sub-01_b", "sub-02_a"), ("sub-01", "Sub-01", "sub-02"), True),
        (("patient1", "patient01", "patient3"), None, True),
        ("abc", ("P07", "p07", "P08"), True),
        ("abc", ("P08", "P08 (follow-up)", "P09"), True),
        ("abc", ("site1_001", "site1_002", "site2_001"), False),
        (("ct_20190101", "ct_20190202", "ct_20190303"), None, False),
        (("case_1", "case_11", "case_111"), None, False),
        (("a_TCIA01_131_1", "a_TCIA01_147_1", "a_TCIA02_117_1"), None, False),
    ],
)
def test_patients_whose_names_are_nearly_one_are_asked_about(scans, case_ids, patient_ids, alike):
    for _ in case_ids:
        scans.add("labeled")
    names = zip(scans.cases, case_ids, patient_ids or case_ids, strict=True)
    scans.cases = [replace(case, case_id=name, patient_id=patient) for case, name, patient in names]
    warnings = [text for text in scans.check().warnings if "of one patient" in text]
    assert len(warnings) == alike


def test_cases_that_are_in_no_part_are_noted(scans):
    scans.add("labeled")
    scans.add("")
    assert "left out" in only(scans.check().notes)


def test_progress_is_reported_for_each_case(scans):
    for _ in range(3):
        scans.add("labeled")
    seen = []
    dataset = Dataset("set", scans.root, "list", tuple(scans.cases), LABELS, ("",))
    check_dataset(dataset, scans.splits(), report=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_command_names_every_file_and_writes_only_the_draft_that_is_asked_for(
    tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("images/a", "images/b", "labels/a", "test/c"):
        array = make_label() if name[0] == "l" else make_image(len(name) + ord(name[-1]))
        write(tmp_path / "set" / f"{name}.nii.gz", array)
    (tmp_path / "set" / "notes.txt").touch()
    result = CliRunner().invoke(app, ["check", "../set"])
    assert result.exit_code == 0, result.output
    assert "files below ../set: 5, of them 3 used" in result.output
    assert "1 x scans that the layout or the list does not name: test/c.nii.gz" in result.output
    assert "1 x no scans (.txt): notes.txt" in result.output
    (tmp_path / "set" / "images").rename(tmp_path / "set" / "scans")
    assert isinstance(CliRunner().invoke(app, ["check", "../set"]).exception, InputError)
    assert list((tmp_path / "here").iterdir()) == []
    result = CliRunner().invoke(app, ["check", "../set", "--draft", "mine.csv"])
    assert "medssl check mine.csv" in result.output
    result = CliRunner().invoke(app, ["check", "mine.csv"])
    assert "3 cases of 3 patients" in result.output
    assert "files below" not in result.output, "a list may stand in any folder"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(position=st.integers(0, 351), value=st.integers(0, 255))
def test_a_damaged_header_never_ends_in_a_traceback(tmp_path, position, value):
    scans = Scans(tmp_path)
    name = scans.add("unlabeled")
    path = write(tmp_path / "damaged.nii", make_image(0))
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    scans.cases[0] = replace(scans.cases[0], images=(path,))
    assert all(problem.startswith(f"{name}: ") for problem in scans.check().problems)


@pytest.mark.real
def test_the_hippocampus_set_is_ok():
    dataset = read_dataset(Path(os.environ["MEDSSL_DATA"]) / "Task04_Hippocampus")
    splits = split_cases(dataset, DataSection(labeled=4, test=40), "auto")
    result = check_dataset(dataset, splits)
    assert result.problems == ()
    assert [seen.part for seen in result.facts].count("unlabeled") == 156
    text = result.render()
    assert "anterior" in text
    assert "posterior" in text


@pytest.mark.real
@pytest.mark.parametrize("name", ["Task04_Hippocampus", "acdc_half", "spine_vb"])
def test_no_label_of_a_real_set_has_an_unusual_volume(name):
    dataset = read_dataset(Path(os.environ["MEDSSL_DATA"]) / name)
    warnings = check_dataset(dataset, split_cases(dataset, DataSection(), "auto")).warnings
    assert not [text for text in warnings if "unusual volume" in text]


@pytest.mark.real
def test_a_tree_of_dicom_is_listed_by_series():
    with pytest.raises(InputError, match="512 x 512 x 78 in ct_liver") as caught:
        read_dataset(Path(os.environ["MEDSSL_DATA"]) / "dicom")
    assert "t2_oblique_study1" in str(caught.value)


@pytest.mark.parametrize("part", ["labeled", "val"])
def test_a_label_that_a_model_made_is_named_and_does_not_validate(scans, part):
    name = scans.add(part)
    path = scans.cases[0].label
    write_mask(path, make_label().astype(np.uint8), AFFINE, (0, 1), origin="prediction")
    result = scans.check()
    assert (
        f"1 of 1 labels were made by a model of medssl and nobody has changed a voxel: {name}"
        in (only([text for text in result.warnings if "model" in text]))
    )
    problems = [text for text in result.problems if "a prediction of a model" in text]
    assert len(problems) == (part == "val")
    write_mask(path, make_label()[::-1], AFFINE, (0, 1))
    assert not [
        text for text in (*scans.check().warnings, *scans.check().problems) if "model" in text
    ]


@pytest.mark.parametrize("labels", [None, LABELS])
def test_a_label_that_is_an_image_is_named_and_hides_no_other_fault(scans, labels):
    scans.add("labeled")
    name = scans.add("labeled", label=(20 * make_image(0)).astype(np.int16))
    other = scans.add("labeled", label=make_label(-1, np.int16))
    problems = scans.check(labels).problems
    assert len(problems) == 2, problems
    assert problems[0].startswith(f"{name}: its label holds ")
    assert "is it an image?" in problems[0]
    assert f"-1 is not declared: {other}" in problems[1]


def test_a_copy_whose_axes_were_turned_is_known_as_the_same_scan(scans):
    image = make_image(0)
    scans.add("labeled", image)
    flipped = AFFINE.copy()
    flipped[:3, 3] += AFFINE[:3, 0] * (SHAPE[0] - 1)
    flipped[:3, 0] *= -1
    scans.add("test", image[::-1], affine=flipped, label=make_label(), label_affine=flipped)
    problem = only(scans.check().problems)
    assert problem.startswith("the same scan, voxel by voxel, is in different parts")


def test_what_stands_in_a_plan_of_labels_that_a_model_made_names_no_case(scans):
    name = scans.add("labeled")
    write_mask(scans.cases[0].label, make_label(), AFFINE, (0, 1), origin="prediction")
    facts = scans.check().facts
    assert name in describe_origins(facts)
    assert name not in describe_origins(facts, with_names=False)
