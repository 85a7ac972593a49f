import csv
import hashlib

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medssl.data.io import measure_displacement, read_geometry
from medssl.data.layouts import read_dataset
from medssl.data.phantoms import LABEL_NAMES, make_phantom, write_phantoms

SHAPE = (48, 56, 40)
FAMILIES = ("organs", "vessels")


def hash_folder(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_voxels_and_another_gives_others(family):
    image, label = make_phantom(0, 3, SHAPE, family)
    again, label_again = make_phantom(0, 3, SHAPE, family)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    for other in (make_phantom(0, 4, SHAPE, family), make_phantom(1, 3, SHAPE, family)):
        assert not np.array_equal(image, other[0])
        assert not np.array_equal(label, other[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_has_all_classes_and_room_around_them(family):
    for index in range(12):
        image, label = make_phantom(0, index, SHAPE, family)
        assert image.shape == label.shape == SHAPE
        assert (image.dtype, label.dtype) == (np.int16, np.uint8)
        volumes = np.bincount(label.ravel(), minlength=4)
        assert len(volumes) == 4
        assert volumes.min() >= 50
        assert volumes[0] / label.size > 0.85


def test_organ_lesion_and_vessel_are_related_as_anatomy_is():
    for index in range(8):
        _, label = make_phantom(0, index, SHAPE, "organs")
        _, num_organs = ndimage.label(label > 0)
        assert num_organs <= 4
        around_lesion = ndimage.binary_dilation(label == 2, iterations=2) & (label != 2)
        assert (label[around_lesion] > 0).mean() > 0.5


def test_gray_values_alone_do_not_tell_the_classes():
    """The best threshold per class leaves most of what it catches in the background."""
    image, label = make_phantom(0, 0, SHAPE, "organs")
    for index in (1, 2, 3):
        low, high = np.percentile(image[label == index], (10, 90))
        caught = label[(image >= low) & (image <= high)]
        assert (caught == index).mean() < 0.6


def test_contrast_varies_between_cases():
    ratios = []
    for index in range(12):
        image, label = make_phantom(0, index, SHAPE, "organs")
        ratios.append(np.median(image[label == 2]) / np.median(image[label == 1]))
    assert max(ratios) < 1
    assert max(ratios) / min(ratios) > 1.15


def test_a_data_set_is_written_that_the_program_reads(tmp_path):
    write_phantoms(tmp_path / "phantoms", 2, 3, 1, shape=(24, 28, 20))
    dataset = read_dataset(tmp_path / "phantoms")
    assert [case.split for case in dataset.cases] == ["labeled"] * 2 + ["unlabeled"] * 3 + ["test"]
    assert [case.label is None for case in dataset.cases] == [False] * 2 + [True] * 3 + [False]
    for case in dataset.cases:
        shape, affine = read_geometry(case.images[0])
        assert shape == (24, 28, 20)
        if case.label is not None:
            label_shape, label_affine = read_geometry(case.label)
            assert label_shape == shape
            assert measure_displacement(affine, label_affine, shape) == pytest.approx(0)
            assert set(np.unique(nib.load(case.label).dataobj)) <= {0, 1, 2, 3}


def test_unlabeled_cases_have_no_label_file(tmp_path):
    write_phantoms(tmp_path, 1, 2, 1, shape=(24, 28, 20))
    with (tmp_path / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["label"]) for row in rows] == [True, False, False, True]
    assert len(list((tmp_path / "labels").iterdir())) == 2
    assert len(list((tmp_path / "images").iterdir())) == 4


def test_scans_come_in_two_orientations_with_the_anatomy_in_one(tmp_path):
    write_phantoms(tmp_path, 3, 0, 0, shape=(24, 28, 20))
    for index, axes in enumerate(["RAS", "RAS", "LPS"]):
        scan = nib.load(tmp_path / "images" / f"organs_{index:03d}.nii.gz")
        assert "".join(nib.aff2axcodes(scan.affine)) == axes
        expected, classes = make_phantom(0, index, (24, 28, 20), "organs")
        canonical = nib.as_closest_canonical(scan)
        np.testing.assert_array_equal(canonical.dataobj, expected)
        label = nib.load(tmp_path / "labels" / f"organs_{index:03d}.nii.gz")
        np.testing.assert_array_equal(nib.as_closest_canonical(label).dataobj, classes)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_phantoms(tmp_path / name, 1, 1, 1, seed=4, shape=(24, 28, 20), family="vessels")
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")


def test_each_family_names_its_classes():
    for family in FAMILIES:
        assert list(LABEL_NAMES[family]) == [1, 2, 3]
