import gzip

import nibabel as nib
import numpy as np
import pytest

from medssl.config import IGNORE, InputError
from medssl.data.io import (
    read_geometry,
    read_image,
    read_label,
    read_label_values,
    write_map,
    write_mask,
)

AFFINE = np.array([[-0.7, 0.1, 0, 12.5], [0.1, -0.7, 0.2, -3], [0, 0.2, 3.0, 40], [0, 0, 0, 1]])


def save(path, array, affine=AFFINE, **header):
    image = nib.Nifti1Image(array, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_an_image_is_read_channels_first(tmp_path, dtype, suffix):
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    volume = read_image([save(tmp_path / f"a{suffix}", array)], 1)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array[None])
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(np.array([0.0, 0.5, 100.25]).reshape(3, 1, 1), AFFINE)
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "a.nii.gz")
    found = read_image([tmp_path / "a.nii.gz"], 1).array.ravel()
    np.testing.assert_allclose(found, [0, 0.5, 100.25], atol=0.01)


def test_channels_come_from_the_last_axis_or_from_files(tmp_path):
    array = np.random.default_rng(0).random((3, 4, 5, 2), dtype=np.float32)
    one = read_image([save(tmp_path / "a.nii.gz", array)], 2)
    files = [save(tmp_path / f"a_{index}.nii.gz", array[..., index]) for index in range(2)]
    several = read_image(files, 2)
    np.testing.assert_array_equal(one.array, several.array)
    np.testing.assert_array_equal(one.array, np.moveaxis(array, -1, 0))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (1, 5, 6), (5, 6, 1, 1)])
def test_thin_scans_have_three_axes(tmp_path, shape):
    path = save(tmp_path / "a.nii.gz", np.ones(shape, dtype=np.float32))
    assert read_image([path], 1).array.ndim == 4
    assert read_geometry(path)[0] == (*shape, 1)[:3]


def test_a_wrong_number_of_channels_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros((3, 4, 5, 2), dtype=np.float32))
    for number in (1, 3):
        with pytest.raises(InputError, match="holds 2 channels"):
            read_image([path], number)
    with pytest.raises(InputError, match="2 image files for 3 channels"):
        read_image([path, path], 3)


def test_channels_on_different_grids_are_refused(tmp_path):
    first = save(tmp_path / "a.nii.gz", np.zeros((3, 4, 5), dtype=np.float32))
    longer = save(tmp_path / "b.nii.gz", np.zeros((3, 4, 6), dtype=np.float32))
    beside = save(tmp_path / "c.nii.gz", np.zeros((3, 4, 5), dtype=np.float32), np.eye(4))
    hair = AFFINE.copy()
    hair[0, 3] += 1e-3
    close = save(tmp_path / "d.nii.gz", np.zeros((3, 4, 5), dtype=np.float32), hair)
    with pytest.raises(InputError, match=r"b\.nii\.gz: shape \(3, 4, 6\) differs"):
        read_image([first, longer], 2)
    with pytest.raises(InputError, match=r"c\.nii\.gz: lies up to .* voxels beside"):
        read_image([first, beside], 2)
    assert read_image([first, close], 2).array.shape == (2, 3, 4, 5)


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = save(tmp_path / "whole.nii.gz", np.random.default_rng(0).random((9, 9, 9)))
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(whole.read_bytes()[:2000])
    plain = tmp_path / "plain.nii"
    plain.write_bytes(gzip.decompress(whole.read_bytes())[:2000])
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"not a scan")
    for path in (cut, plain, broken):
        with pytest.raises(InputError, match=f"{path.name}: cannot be read"):
            read_image([path], 1)
    with pytest.raises(InputError, match="there is no such file"):
        read_image([tmp_path / "missing.nii.gz"], 1)
    with pytest.raises(InputError, match="not a scan that is read"):
        read_image([tmp_path / "scan.dcm"], 1)


def test_colours_are_refused(tmp_path):
    array = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(InputError, match="grey values"):
        read_image([save(tmp_path / "a.nii.gz", array)], 1)


def test_an_affine_that_places_nothing_is_refused(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), dtype=np.uint8), None)
    image.set_sform(np.diag([1, 1, 0, 1]), code=1)
    nib.save(image, tmp_path / "flat.nii.gz")
    with pytest.raises(InputError, match=r"flat\.nii\.gz: the affine flattens"):
        read_geometry(tmp_path / "flat.nii.gz")


def test_label_values_become_class_indices(tmp_path):
    array = np.array([0, 600, 205, 7], dtype=np.int16).reshape(4, 1, 1)
    classes, affine = read_label(save(tmp_path / "a.nii.gz", array), (0, 205, 600), 7)
    assert classes.dtype == np.uint8
    assert classes.ravel().tolist() == [0, 2, 1, IGNORE]
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)


def test_undeclared_label_values_are_named(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.array([0, 1, 205, 255], np.uint8).reshape(4, 1, 1))
    with pytest.raises(InputError, match=r"a\.nii\.gz: label values \[205, 255\]"):
        read_label(path, (0, 1), None)


def test_labels_that_a_slope_moved_by_a_hair_are_rounded(tmp_path):
    array = np.array([0, 0.9999999, 1.00000002, 2.0005]).reshape(4, 1, 1)
    classes, _ = read_label(save(tmp_path / "a.nii.gz", array), (0, 1, 2), None)
    assert classes.ravel().tolist() == [0, 1, 1, 2]
    image = nib.Nifti1Image(np.array([0, 1, 3.0]).reshape(3, 1, 1), AFFINE)
    image.set_data_dtype(np.uint8)  # stores a slope of 3/255
    nib.save(image, tmp_path / "slope.nii.gz")
    assert nib.load(tmp_path / "slope.nii.gz").dataobj.slope != 1
    classes, _ = read_label(tmp_path / "slope.nii.gz", (0, 1, 3), None)
    assert classes.ravel().tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_label_values_between_integers_are_refused(tmp_path, value):
    path = save(tmp_path / "a.nii.gz", np.array([0, 1, value]).reshape(3, 1, 1))
    for read in (lambda: read_label(path, (0, 1), None), lambda: read_label_values(path)):
        with pytest.raises(InputError, match=r"a\.nii\.gz: label voxels are not integers"):
            read()


def test_a_label_with_channels_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros((2, 2, 2, 2), dtype=np.uint8))
    with pytest.raises(InputError, match=r"a label is \(I, J, K\)"):
        read_label(path, (0, 1), None)


def test_label_values_are_counted(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.array([0, 3, 3, -1], np.int16).reshape(4, 1, 1))
    values, affine, shape, has_rounded = read_label_values(path)
    assert not has_rounded
    assert values == {-1: 1, 0: 1, 3: 2}
    assert shape == (4, 1, 1)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(
    ("label_values", "dtype"),
    [((0, 1, 2), np.uint8), ((0, 600, 2), np.int16), ((0, -4, 3), np.int16), ((0, 70000, 1), "i4")],
)
def test_a_mask_round_trips_with_original_values(tmp_path, label_values, dtype):
    classes = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    path = tmp_path / "mask.nii.gz"
    write_mask(path, classes, AFFINE, label_values)
    stored = nib.load(path)
    assert stored.get_data_dtype() == dtype
    assert (stored.dataobj.slope, stored.dataobj.inter) == (1, 0)
    found, affine = read_label(path, label_values, None)
    np.testing.assert_array_equal(found, classes)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_mask_has_the_affine_of_the_scan_to_the_bit(tmp_path):
    scan = save(tmp_path / "scan.nii.gz", np.zeros((3, 4, 5), dtype=np.uint8))
    _, affine = read_geometry(scan)
    write_mask(tmp_path / "mask.nii.gz", np.zeros((3, 4, 5), np.uint8), affine, (0, 1))
    np.testing.assert_array_equal(read_geometry(tmp_path / "mask.nii.gz")[1], affine)


def test_both_transforms_are_set_unless_the_grid_is_sheared(tmp_path):
    turned = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([1, -2, 3]), [5, 6, 7]
    )
    for affine, code in ((turned, 1), (AFFINE, 0)):
        write_mask(tmp_path / "mask.nii.gz", np.zeros((3, 4, 5), np.uint8), affine, (0, 1))
        header = nib.load(tmp_path / "mask.nii.gz").header
        np.testing.assert_allclose(header.get_sform(), affine, atol=1e-5)
        assert int(header["sform_code"]) == 1
        assert int(header["qform_code"]) == code
    np.testing.assert_allclose(
        nib.load(save(tmp_path / "again.nii.gz", np.zeros((3, 4, 5)), turned)).affine, turned
    )


def test_ignored_voxels_are_written_as_255(tmp_path):
    classes = np.array([0, 1, IGNORE], np.uint8).reshape(3, 1, 1)
    write_mask(tmp_path / "mask.nii.gz", classes, AFFINE, (0, 9))
    assert read_label_values(tmp_path / "mask.nii.gz")[0] == {0: 1, 9: 1, 255: 1}
    write_mask(tmp_path / "mask.nii.gz", classes, AFFINE, (0, 255), ignore=7)
    assert read_label_values(tmp_path / "mask.nii.gz")[0] == {0: 1, 255: 1, 7: 1}
    with pytest.raises(ValueError, match="means ignored and is a label value"):
        write_mask(tmp_path / "mask.nii.gz", classes, AFFINE, (0, 255))
    with pytest.raises(ValueError, match=r"classes \[1\] have no value"):
        write_mask(tmp_path / "mask.nii.gz", classes, AFFINE, (0,))


def test_nothing_of_a_header_is_passed_on(tmp_path):
    name = b"Doe^Jane"
    scan = save(
        tmp_path / "scan.nii",
        np.zeros((3, 4, 5), dtype=np.float32),
        descrip=name,
        aux_file=name,
        db_name=name,
        intent_name=name,
    )
    assert scan.read_bytes().count(name) == 4
    volume = read_image([scan], 1)
    write_mask(tmp_path / "mask.nii", np.zeros((3, 4, 5), np.uint8), volume.affine, (0, 1))
    write_map(tmp_path / "map.nii", volume.array[0], volume.affine)
    for written in ("mask.nii", "map.nii"):
        assert name not in (tmp_path / written).read_bytes()


def test_a_compressed_mask_holds_neither_time_nor_name(tmp_path):
    for name in ("jane", "doe"):
        write_mask(tmp_path / f"{name}.nii.gz", np.zeros((3, 4, 5), np.uint8), AFFINE, (0, 1))
    jane, doe = ((tmp_path / f"{name}.nii.gz").read_bytes() for name in ("jane", "doe"))
    assert jane == doe
    assert b"jane" not in jane


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2)])
def test_a_map_round_trips(tmp_path, shape):
    array = np.random.default_rng(0).random(shape)
    write_map(tmp_path / "map.nii.gz", array, AFFINE)
    found = read_image([tmp_path / "map.nii.gz"], array[0, 0, 0].size).array
    np.testing.assert_allclose(np.moveaxis(found, 0, -1).reshape(shape), array, atol=1e-6)
    assert nib.load(tmp_path / "map.nii.gz").get_data_dtype() == np.float32


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mask.nii.gz"
    write_mask(path, np.zeros((3, 4, 5), np.uint8), AFFINE, (0, 1))
    before = path.read_bytes()

    def fail(image, target):
        target.write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(RuntimeError):
        write_mask(path, np.ones((3, 4, 5), np.uint8), AFFINE, (0, 1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
