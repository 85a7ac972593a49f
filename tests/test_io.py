import bz2
import gzip
import os
import re
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medssl.config import IGNORE, InputError
from medssl.data import io
from medssl.data.io import (
    find_contradictions,
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
        read_image([tmp_path / "scan.gipl"], 1)


def test_colors_are_refused(tmp_path):
    array = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(InputError, match="gray values"):
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
    values, affine, shape, has_rounded, *_ = read_label_values(path)
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
    image = nib.Nifti1Image(np.zeros((3, 4, 5), dtype=np.float32), AFFINE)
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = name
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", name))
    scan = tmp_path / "scan.nii"
    nib.save(image, scan)
    assert scan.read_bytes().count(name) == 5
    volume = read_image([scan], 1)
    classes = np.zeros((3, 4, 5), np.uint8)
    write_mask(tmp_path / "mask.nii", classes, volume.affine, (0, 1), header=volume.header)
    write_map(tmp_path / "map.nii", volume.array[0], volume.affine, volume.header)
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


UPRIGHT = np.array([[-1.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 2.0, 5], [0, 0, 0, 1]])


def change(affine, **cells):
    """Return an affine with other cells, named by row and column: r0c3=1."""
    changed = affine.copy()
    for cell, value in cells.items():
        changed[int(cell[1]), int(cell[3])] = value
    return changed


def turn(affine):
    return nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.5)) @ affine


def make_scan(
    sform=UPRIGHT, qform=UPRIGHT, unit=2, shape=(5, 6, 7), kind=nib.Nifti1Image, **header
):
    """Return a scan; a form of None has no code."""
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    image = kind(array, UPRIGHT)
    image.header["xyzt_units"] = unit
    image.set_qform(UPRIGHT if qform is None else qform, 0 if qform is None else 1)
    image.set_sform(UPRIGHT if sform is None else sform, 0 if sform is None else 2)
    for key, value in header.items():
        image.header[key] = value
    return kind(array, None, image.header)


def swap_bytes(image):
    return nib.Nifti1Image(np.asarray(image.dataobj), None, image.header.as_byteswapped(">"))


SKEWED = change(UPRIGHT, r0c1=0.002)
ODD_HEADERS = {
    "both forms": make_scan(),
    "only sform": make_scan(qform=None),
    "only qform": make_scan(sform=None),
    "no codes": make_scan(None, None),
    "shift": make_scan(qform=change(UPRIGHT, r0c3=43)),
    "shift, other codes": make_scan(qform=change(UPRIGHT, r0c3=43), sform_code=4, qform_code=3),
    "left-right flip": make_scan(qform=change(UPRIGHT, r0c0=1)),
    "skew": make_scan(SKEWED),
    "skew, only sform": make_scan(SKEWED, None),
    "sheared": make_scan(change(UPRIGHT, r1c2=1, r2c2=3**0.5), None),
    "sform is not pixdim": make_scan(change(UPRIGHT, r2c2=2.667)),
    "meter": make_scan(unit=1),
    "micron": make_scan(unit=3),
    "micron and seconds": make_scan(unit=3 + 8),
    "unknown unit": make_scan(unit=0),
    "oblique": make_scan(turn(UPRIGHT), turn(UPRIGHT)),
    "oblique, only qform": make_scan(None, turn(UPRIGHT)),
    "oblique against straight": make_scan(turn(UPRIGHT)),
    "big endian": swap_bytes(make_scan(qform=change(UPRIGHT, r0c3=43))),
    "NIfTI-2": make_scan(qform=change(UPRIGHT, r0c3=43), kind=nib.Nifti2Image),
    "scaled": make_scan(scl_slope=0.25, scl_inter=-100),
    "2D": make_scan(shape=(5, 6)),
    "2D of micron": make_scan(None, unit=3, shape=(5, 6)),
    "one slice": make_scan(shape=(5, 6, 1)),
    "4D of one channel": make_scan(shape=(5, 6, 7, 1)),
    "4D of two channels": make_scan(shape=(5, 6, 7, 2)),
    "damaged qform without a code": make_scan(qform=None, quatern_b=np.nan, qoffset_x=np.inf),
}
REFUSED_BY_ITK = {"skew, only sform", "sheared", "NIfTI-2"}


def place_in_itk(path, num_axes):
    """Return origin, spacing and directions of the first axes as ITK reads them, or None."""
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError:
        return None
    direction = np.reshape(image.GetDirection(), (image.GetDimension(), -1))
    place = np.column_stack([image.GetOrigin(), image.GetSpacing(), direction])
    return place[:num_axes, : 2 + num_axes]


def write_all(scan, folder):
    """Write a mask, a map and a map of two classes of a scan; return their paths."""
    shape = nib.load(scan).shape
    volume = read_image([scan], shape[3] if len(shape) > 3 else 1)
    grid = (volume.affine, volume.header)
    paths = [folder / f"{name}.nii.gz" for name in ("mask", "map", "probs")]
    write_mask(paths[0], np.ones(volume.shape, np.uint8), grid[0], (0, 3), header=grid[1])
    write_map(paths[1], volume.array[0], *grid)
    write_map(paths[2], np.zeros((*volume.shape, 2)), *grid)
    return paths


def assert_on_the_voxels_of(scan, written):
    expected, found = nib.load(scan), nib.load(written)
    np.testing.assert_array_equal(found.affine, expected.affine)
    assert (*found.shape, 1)[:3] == (*expected.shape, 1)[:3]
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z"):
        np.testing.assert_array_equal(found.header[field], expected.header[field], field)
    np.testing.assert_array_equal(found.header["pixdim"][:4], expected.header["pixdim"][:4])
    assert found.header.get_xyzt_units()[0] == expected.header.get_xyzt_units()[0]
    num_axes = min(3, len(expected.shape))
    np.testing.assert_equal(place_in_itk(written, num_axes), place_in_itk(scan, num_axes))


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_a_mask_opens_on_the_voxels_of_its_scan_in_itk_and_nibabel(tmp_path, name):
    scan = tmp_path / "scan.nii.gz"
    nib.save(ODD_HEADERS[name], scan)
    assert (place_in_itk(scan, 2) is None) == (name in REFUSED_BY_ITK)
    for path in write_all(scan, tmp_path):
        assert_on_the_voxels_of(scan, path)


@pytest.mark.real
def test_masks_of_real_odd_scans_open_on_their_voxels(tmp_path):
    folder = Path(os.environ["MEDSSL_DATA"]) / "oddities" / "nifti"
    scans = sorted(path for path in folder.rglob("*.nii*") if "rgb" not in path.name)
    assert len(scans) > 10
    for scan in scans:
        for path in write_all(scan, tmp_path):
            assert_on_the_voxels_of(scan, path)
    for name, text in (("nifti1.hdr", "nifti1.img is missing"), ("derived/rgb24.nii.gz", "gray")):
        with pytest.raises(InputError, match=text):
            read_image([folder / name], 1)


def test_a_mask_is_refused_the_header_of_another_grid(tmp_path):
    scan = tmp_path / "scan.nii"
    nib.save(ODD_HEADERS["both forms"], scan)
    volume = read_image([scan], 1)
    for shape, affine in (((5, 6, 7), np.eye(4)), ((5, 6, 8), volume.affine)):
        with pytest.raises(ValueError, match="is not the grid of"):
            write_mask(
                tmp_path / "m.nii", np.ones(shape, np.uint8), affine, (0, 1), header=volume.header
            )


@pytest.mark.parametrize(("unit", "mm"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (7, 1)])
def test_lengths_are_in_mm_whatever_the_unit_of_the_header(tmp_path, unit, mm):
    nib.save(make_scan(unit=unit), tmp_path / "scan.nii")
    nib.save(make_scan(None, None, unit=unit), tmp_path / "no_code.nii")
    volume = read_image([tmp_path / "scan.nii"], 1)
    np.testing.assert_allclose(volume.spacing, np.array([1, 1.5, 2]) * mm)
    np.testing.assert_allclose(volume.affine[:3, 3], np.array([10, -20, 5]) * mm)
    np.testing.assert_allclose(
        np.diag(read_geometry(tmp_path / "no_code.nii")[1])[:3], np.array([-1, 1.5, 2]) * mm
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("both forms", {}),
        ("only sform", {}),
        ("only qform", {}),
        ("skew", {}),
        ("sheared", {"shear": "30.0 degrees off"}),
        ("2D", {}),
        ("no codes", {"code": ""}),
        ("shift", {"place": "by 33 voxels"}),
        ("left-right flip", {"place": "by 8 voxels"}),
        ("sform is not pixdim", {"size": "1 x 1.5 x 2.667 mm against 1 x 1.5 x 2 mm"}),
        ("micron", {"unit": "micron"}),
        ("damaged qform without a code", {}),
    ],
)
def test_what_a_header_says_twice_is_compared(tmp_path, name, expected):
    nib.save(ODD_HEADERS[name], tmp_path / "scan.nii")
    assert find_contradictions(read_image([tmp_path / "scan.nii"], 1)) == expected


def store_sizes(image, path, sizes):
    """Write a scan with voxel sizes in its header that nibabel would mend."""
    nib.save(image, path)
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    header["pixdim"][1:4] = sizes
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])


@pytest.mark.parametrize("sizes", [(1, 1.5, 0), (-1, 1.5, 2)])
@pytest.mark.parametrize("name", ["only qform", "no codes"])
def test_a_voxel_size_that_is_not_above_zero_is_refused(tmp_path, name, sizes):
    path = tmp_path / "scan.nii"
    store_sizes(ODD_HEADERS[name], path, sizes)
    shown = re.escape(" x ".join(f"{size:g}" for size in sizes))
    for read in (lambda: read_geometry(path), lambda: read_label_values(path)):
        with pytest.raises(InputError, match=rf"scan\.nii: .*\(pixdim\) is {shown}, .*correct it"):
            read()


def test_a_voxel_size_of_zero_beside_a_sform_is_named(tmp_path):
    path = tmp_path / "scan.nii"
    store_sizes(ODD_HEADERS["both forms"], path, (1, 1.5, 0))
    scan = read_image([path], 1)
    assert find_contradictions(scan) == {"size": "1 x 1.5 x 2 mm against 1 x 1.5 x 0 mm"}


def test_the_size_of_a_single_slice_may_be_zero(tmp_path):
    flat = make_scan(None, shape=(5, 6, 1))
    store_sizes(flat, tmp_path / "scan.nii", (1, 1.5, 0))
    assert read_image([tmp_path / "scan.nii"], 1).spacing == (1, 1.5, 1)
    store_sizes(make_scan(shape=(5, 6, 7)), tmp_path / "scan.nii", (-1, 1.5, 2))  # with a sform
    assert find_contradictions(read_image([tmp_path / "scan.nii"], 1)) == {}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_that_the_header_does_not_declare_are_refused_and_padding_is_not(tmp_path, suffix):
    plain = save(tmp_path / "a.nii", np.ones((3, 4, 5), np.uint8)).read_bytes()
    path = tmp_path / f"b{suffix}"
    pack = gzip.compress if suffix == ".nii.gz" else bytes
    path.write_bytes(pack(plain + bytes(60)))
    assert read_image([path], 1).array.sum() == 60
    path.write_bytes(pack(plain + bytes(59) + b"\1"))
    with pytest.raises(InputError, match=r"goes on behind the \(3, 4, 5\) voxels.*correct dim"):
        read_image([path], 1)
    with pytest.raises(InputError, match="goes on behind"):
        read_label_values(path)


IMPOSSIBLE = [(0, 0, 1e30), (0, 0, 1e5), (2, 2, -1e5), (0, 0, 1e-30), (0, 0, 0.001), (1, 1, 900)]


@pytest.mark.parametrize(("row", "column", "value"), [*IMPOSSIBLE, (1, 3, 1e9), (0, 0, np.nan)])
def test_a_grid_that_no_scanner_makes_is_refused_with_its_value(tmp_path, row, column, value):
    path = tmp_path / "scan.nii"
    nib.save(make_scan(change(UPRIGHT, **{f"r{row}c{column}": value})), path)
    for read in (lambda: read_geometry(path), lambda: read_image([path], 1)):
        with pytest.raises(InputError, match=r"scan\.nii: .*header is mm.*repair") as raised:
            read()
        assert f"{abs(value):.4g}" in str(raised.value)
    with pytest.raises(InputError, match="repair"):
        read_label_values(path)


@pytest.mark.filterwarnings("error")
def test_a_place_beyond_all_numbers_is_refused_without_a_warning(tmp_path):
    scan = make_scan(change(UPRIGHT, r0c0=1e200), kind=nib.Nifti2Image)
    nib.save(scan, tmp_path / "scan.nii")
    with pytest.raises(InputError, match=r"1e\+200"):
        read_geometry(tmp_path / "scan.nii")


def test_fine_and_coarse_scans_are_taken(tmp_path):
    for sizes, unit in (((0.5, 0.5, 60), 3), ((4, 4, 4e-2), 3), ((1.5e-3, 1e-3, 0.2), 2)):
        affine = np.diag([*sizes, 1])
        nib.save(make_scan(affine, affine, unit=unit), tmp_path / "scan.nii")
        assert read_image([tmp_path / "scan.nii"], 1).shape == (5, 6, 7)
    thin = np.diag([0.2, 0.2, 100, 1])
    nib.save(make_scan(thin, thin, shape=(5, 6, 1)), tmp_path / "scan.nii")
    assert read_image([tmp_path / "scan.nii"], 1).shape == (5, 6, 1)


def read_voxels(path):
    return read_image([path], 1)


def read_two_classes(path):
    return read_label(path, (0, 1), None)


def refuse(read, path):
    """Return why a file is refused, or None."""
    try:
        read(path)
    except InputError as error:
        return str(error)
    return None


def test_no_bit_of_a_compressed_file_changes_unseen(tmp_path):
    rng = np.random.default_rng(0)
    label = save(tmp_path / "a.nii.gz", (rng.random((16, 16, 16)) < 0.1).astype(np.uint8))
    whole = label.read_bytes()
    content = gzip.decompress(whole)
    harmless = 0
    for bit in rng.choice(8 * len(whole), 60, replace=False):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        label.write_bytes(changed)
        for read in (read_voxels, read_two_classes, read_label_values):
            message = refuse(read, label)
            if message is None:
                assert gzip.decompress(bytes(changed)) == content, bit
                harmless += 1
            else:
                assert "a.nii.gz" in message
    assert harmless < 20


def test_the_last_bits_of_a_compressed_file_are_compared_too(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.ones((16, 16, 16), np.uint8))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be read \(CRC"):
        read_image([path], 1)


def test_members_and_padding_of_a_compressed_file_are_read_and_other_bytes_are_not(tmp_path):
    array = np.random.default_rng(0).integers(0, 99, (9, 9, 9)).astype(np.int16)
    plain = save(tmp_path / "a.nii", array).read_bytes()
    path = tmp_path / "a.nii.gz"
    members = b"".join(gzip.compress(part) for part in (plain[:100], plain[100:900], plain[900:]))
    for content in (members, members + bytes(512)):
        path.write_bytes(content)
        np.testing.assert_array_equal(read_image([path], 1).array[0], array)
    path.write_bytes(members + b"something else")
    with pytest.raises(InputError, match="behind the compressed data"):
        read_image([path], 1)
    path.write_bytes(gzip.compress(plain[:900]))
    with pytest.raises(InputError, match="voxels that the header declares are missing"):
        read_image([path], 1)


def test_a_name_that_does_not_fit_is_named(tmp_path):
    plain = save(tmp_path / "a.nii", np.ones((3, 4, 5), np.uint8)).read_bytes()
    names = {
        "b.nii.gz": (plain, r"is not compressed: rename it to b\.nii$"),
        "b.nii": (gzip.compress(plain), r"is compressed: rename it to b\.nii\.gz$"),
        "empty.nii": (b"", "it is empty"),
        "pair.nii": (plain[:344] + b"ni1\0" + plain[348:], "header alone of a scan in two files"),
        "old.nii": (plain[:344] + bytes(4) + plain[348:], "is an Analyze file"),
        "c.hdr": (plain[:348], "one half .* and c.img is missing"),
        "zip.nii.gz": (b"PK\x03\x04" + plain, "is a ZIP archive: unpack it"),
        "lfs.nii.gz": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "bz2.nii.gz": (bz2.compress(plain), "compressed by bzip2"),
        "dicom.nii": (bytes(128) + b"DICM" + plain, "is a DICOM file"),
        "text.nii.gz": (gzip.compress(b"some text"), "it starts with b'some text'"),
        "zero.nii": (plain[:108] + bytes(4) + plain[112:], "voxels begin at byte 0"),
    }
    for name, (content, text) in names.items():
        (tmp_path / name).write_bytes(content)
        for read in (read_geometry, read_label_values):
            with pytest.raises(InputError, match=text) as raised:
                read(tmp_path / name)
            assert str(raised.value).startswith(str(tmp_path / name))


def measure_peak(read):
    """Return what a read gives, and the most bytes that it held at once."""
    tracemalloc.start()
    try:
        return read(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("slope", [1, 0.5])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_reading_a_label_takes_little_more_than_its_classes(tmp_path, dtype, slope, suffix):
    values = np.zeros((120, 110, 100), dtype)
    values[30:60, 20:50] = 6
    path = tmp_path / f"a{suffix}"
    content = bytearray(save(tmp_path / "plain.nii", values).read_bytes())
    content[112:116] = np.float32(slope).tobytes()
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    class_value = int(6 * slope)
    (classes, _), peak = measure_peak(lambda: read_label(path, (0, class_value), None))
    np.testing.assert_array_equal(classes, values > 0)
    assert peak < 6 * values.size + classes.nbytes
    (counts, *_), peak = measure_peak(lambda: read_label_values(path))
    assert counts == {0: values.size - 90_000, class_value: 90_000}
    assert peak < 6 * values.size


@pytest.mark.parametrize("size", [1, 7, 20, 33, 1000])
def test_pieces_of_any_size_make_the_same_array(size):
    array = np.random.default_rng(0).integers(0, 99, (2, 5, 4, 3))
    values = np.moveaxis(array, 0, -1).ravel(order="F")
    filled = np.zeros(array.shape, np.float32)
    io._fill(filled, lambda: np.split(values, range(size, values.size, size)))
    np.testing.assert_array_equal(filled, array)


def test_reading_an_image_takes_little_more_than_its_voxels(tmp_path):
    array = np.ones((100, 90, 80, 2), np.int16)
    one = save(tmp_path / "a.nii.gz", array)
    two = [save(tmp_path / f"{index}.nii.gz", array[..., index]) for index in range(2)]
    for paths in ([one], two):
        volume, peak = measure_peak(lambda paths=paths: read_image(paths, 2))
        assert peak < 1.5 * volume.array.nbytes


def test_more_than_a_file_can_hold_is_refused_before_memory_is_taken(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((1200, 1200, 1200))
    header.set_data_dtype(np.int16)
    header["vox_offset"] = 352
    rest = np.random.default_rng(0).bytes(28_000)
    (tmp_path / "a.nii").write_bytes(header.binaryblock + rest)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header.binaryblock + rest))
    for path in (tmp_path / "a.nii", tmp_path / "a.nii.gz"):
        for read in (read_voxels, read_two_classes, read_label_values):
            message, peak = measure_peak(lambda read=read, path=path: refuse(read, path))
            assert f"{path.name}: cannot be read (the header declares (1200, 1200, 1200)" in message
            assert "3456000352 bytes" in message
            assert peak < 2e6


def test_a_blank_scan_that_is_compressed_a_thousandfold_is_read(tmp_path):
    plain = save(tmp_path / "a.nii", np.zeros((200, 200, 60), np.int16))
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert path.stat().st_size * 900 < 200 * 200 * 60 * 2
    assert not read_image([path], 1).array.any()


def test_an_image_in_the_place_of_a_label_does_not_list_all_of_its_values(tmp_path):
    array = np.arange(80_000, dtype=np.int32).reshape(80, 50, 20)
    path = save(tmp_path / "a.nii", array)
    with pytest.raises(InputError, match=r"and \d+ more are not declared") as raised:
        read_label(path, (0, 1), None)
    assert len(str(raised.value)) < 600
    with pytest.raises(InputError, match="is this an image"):
        read_label_values(path)


def test_values_that_no_integer_holds_are_no_label(tmp_path):
    path = save(tmp_path / "a.nii", np.array([0, 1, 1e30]).reshape(3, 1, 1))
    with pytest.raises(InputError, match=r"not integers, e\.g\. \[1e\+30\]"):
        read_label(path, (0, 1), None)


def test_rounded_values_are_told_of(tmp_path):
    path = save(tmp_path / "a.nii", np.array([0, 1, 0.9999999]).reshape(3, 1, 1))
    assert read_label_values(path)[0] == {0: 1, 1: 2}
    assert read_label_values(path)[3]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".png", ".tif", ".tiff"])
def test_a_mask_of_a_model_says_so_until_somebody_changes_a_voxel(tmp_path, suffix):
    path = tmp_path / f"mask{suffix}"
    classes = np.random.default_rng(0).integers(0, 2, (5, 4, 1), dtype=np.uint8)
    write_mask(path, classes, AFFINE, (0, 300), origin="pseudo-mask")
    assert read_label_values(path).origin == "pseudo-mask"
    np.testing.assert_array_equal(read_label(path, (0, 300), None)[0], classes)
    changed = classes[::-1]  # as many voxels of each value
    if "nii" in suffix:
        image = nib.load(path)
        values = np.asanyarray(image.dataobj).copy()
        nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
        assert read_label_values(path).origin == "pseudo-mask"
        nib.save(nib.Nifti1Image(values[::-1], image.affine, image.header), path)
        assert b"medssl" in (gzip.decompress if suffix == ".nii.gz" else bytes)(path.read_bytes())
    else:
        write_mask(path, changed, AFFINE, (0, 300))
    assert read_label_values(path).origin == ""
    write_mask(path, classes, AFFINE, (0, 300))
    assert read_label_values(path).origin == ""
