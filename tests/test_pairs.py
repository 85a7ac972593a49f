import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from itk_scans import change, read, read_all, read_by_itk, turn

from medssl.config import InputError
from medssl.formats import nifti, pairs
from medssl.formats.scan import guard

COUNT = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def save_analyze(folder, array=COUNT, affine=None, name="a"):
    """Write an Analyze pair; without an affine, without a .mat too."""
    image = nib.Spm99AnalyzeImage(array, affine)
    if affine is None:
        image.header.set_zooms((2, 3, 4, 1)[: array.ndim])
    nib.save(image, folder / f"{name}.img")
    return folder / f"{name}.hdr"


def overwrite(path, place, value):
    """Put other bytes at a place of a file."""
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("suffix", [".hdr", ".img"])
def test_a_pair_of_nifti_is_read_where_itk_and_nibabel_have_it(tmp_path, kind, suffix):
    for is_left_handed in (False, True):
        affine = turn(np.random.default_rng(1), is_left_handed)
        image = kind(COUNT, affine)
        image.set_qform(affine)
        image.header.set_slope_inter(0.5, -3)
        nib.save(image, tmp_path / "a.img")
        scan = pairs.open_image(tmp_path / f"a{suffix}", 1)
        expected = nib.load(tmp_path / "a.img")
        np.testing.assert_array_equal(scan.affine, expected.affine)
        np.testing.assert_array_equal(read(scan)[..., 0], expected.get_fdata())
        assert nifti.find_contradictions(scan.header) == {}
        mask = np.ones(COUNT.shape, np.uint8)
        nifti.write(tmp_path / "b.nii.gz", mask, scan.affine, scan.header, "", {})
        np.testing.assert_array_equal(nib.load(tmp_path / "b.nii.gz").affine, expected.affine)
        if kind is nib.Nifti1Pair:  # ITK reads no NIfTI-2
            array, place = read_by_itk(tmp_path / "a.hdr")
            np.testing.assert_allclose(scan.affine, place, atol=1e-4)
            np.testing.assert_allclose(read(scan), array)


def test_a_pair_of_nifti_without_codes_and_in_another_unit_is_named(tmp_path):
    image = nib.Nifti1Pair(COUNT, None)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.img")
    scan = pairs.open_image(tmp_path / "a.hdr", 1)
    np.testing.assert_array_equal(np.abs(np.diag(scan.affine)), [1000, 1000, 1000, 1])
    assert nifti.find_contradictions(scan.header) == {"code": "", "unit": "meter"}


@pytest.mark.parametrize("keys", [("mat", "M"), ("M",)])
@pytest.mark.parametrize("is_left_handed", [False, True])
def test_analyze_with_the_place_that_spm_keeps_is_as_certain_as_nifti(
    tmp_path, keys, is_left_handed
):
    affine = turn(np.random.default_rng(2), is_left_handed)
    path = save_analyze(tmp_path, affine=affine)
    mats = scipy.io.loadmat(tmp_path / "a.mat")
    scipy.io.savemat(tmp_path / "a.mat", {key: mats[key] for key in keys}, format="4")
    scan = pairs.open_image(path, 1)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-9)
    np.testing.assert_allclose(scan.affine, nib.load(tmp_path / "a.img").affine, atol=1e-12)
    np.testing.assert_array_equal(read(scan)[..., 0], COUNT)
    assert scan.header["contradictions"] == {}


def test_analyze_alone_is_read_with_a_warning_of_its_sides(tmp_path):
    array = np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2)
    scan = pairs.open_image(save_analyze(tmp_path, array), 2)
    np.testing.assert_array_equal(read(scan), array)
    expected = [[-2, 0, 0, 1], [0, 3, 0, -3], [0, 0, 4, -6], [0, 0, 0, 1]]
    np.testing.assert_array_equal(scan.affine, expected)
    assert scan.header["contradictions"] == {"code": "Analyze without a .mat"}
    with pytest.raises(InputError, match=r"a label is \(I, J, K\)"):
        pairs.open_label(tmp_path / "a.hdr")


@pytest.mark.parametrize("orient", [1, 2, 3])
def test_analyze_that_programs_turn_differently_is_refused(tmp_path, orient):
    path = save_analyze(tmp_path)
    overwrite(path, 252, bytes([orient]))
    with pytest.raises(InputError, match=f"of the orientation {orient}, which"):
        pairs.open_image(path, 1)


@pytest.mark.parametrize("content", [b"1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", b"", b"x" * 70_000])
def test_a_mat_that_is_no_place_is_refused(tmp_path, content):
    path = save_analyze(tmp_path)
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.mat: (cannot be read as the place|is too large)"):
        pairs.open_image(path, 1)


@pytest.mark.parametrize("lost", [".hdr", ".img"])
def test_half_a_pair_is_refused(tmp_path, lost):
    save_analyze(tmp_path)
    (tmp_path / f"a{lost}").unlink()
    left = ".img" if lost == ".hdr" else ".hdr"
    with pytest.raises(InputError, match=f"a{left}: one half of a scan.*a{lost} is missing"):
        pairs.open_image(tmp_path / f"a{left}", 1)
    with pytest.raises(InputError, match="there is no such file"):
        pairs.open_image(tmp_path / f"a{lost}", 1)


def test_names_in_capitals_are_a_pair_too(tmp_path):
    save_analyze(tmp_path)
    for suffix in (".hdr", ".img"):
        (tmp_path / f"a{suffix}").rename(tmp_path / f"A{suffix.upper()}")
    np.testing.assert_array_equal(read(pairs.open_image(tmp_path / "A.HDR", 1))[..., 0], COUNT)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"ENVI", "it is no header of Analyze or NIfTI"),
        (42, b"\xff\x7f", "the header declares 393204"),
        (70, b"\x00\x04", "voxels of the type 1024 are not read"),
        (70, b"\x20\x00", "voxels are complex64, not numbers"),
        (80, b"\0\0\0\0", r"\(pixdim\) is 0 x 3 x 4"),
        (80, b"\0\0\0\xc0", r"\(pixdim\) is -2 x 3 x 4"),
        (108, b"\0\0\xc0\xc0", "begin at byte -6"),
    ],
)
def test_what_is_no_scan_is_refused(tmp_path, place, value, message):
    path = save_analyze(tmp_path)
    overwrite(path, place, value)
    with (tmp_path / "a.img").open("ab") as file:
        file.write(bytes(999))
    with pytest.raises(InputError, match=message):
        pairs.open_image(path, None)


def test_a_whole_nifti_by_the_name_of_a_header_and_a_cut_image_are_refused(tmp_path):
    path = save_analyze(tmp_path)
    data = (tmp_path / "a.img").read_bytes()
    (tmp_path / "a.img").write_bytes(data[:-2])
    with pytest.raises(InputError, match="damaged or incomplete"):
        pairs.open_image(path, 1)
    nib.save(nib.Nifti1Image(COUNT, np.eye(4)), tmp_path / "b.nii")
    path.write_bytes((tmp_path / "b.nii").read_bytes())
    with pytest.raises(InputError, match=r"is a whole NIfTI file: rename it to \.nii"):
        pairs.open_image(path, 1)


def test_only_errors_of_the_input_come_of_damaged_files(tmp_path):
    save_analyze(tmp_path)
    save_analyze(tmp_path, affine=np.diag([2.0, 3, 4, 1]), name="b")
    nib.save(nib.Nifti1Pair(COUNT, np.diag([2.0, 3, 4, 1])), tmp_path / "c.img")
    files = [(name, suffix) for name in "abc" for suffix in (".hdr", ".img")] + [("b", ".mat")]
    samples = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    @seed(4)
    @settings(max_examples=200, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(files), st.data())
    def try_one(file, data):
        name, suffix = file
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(data.draw(change(samples[path.name])))
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                read_all(pairs, tmp_path / f"{name}.hdr")
        finally:
            path.write_bytes(samples[path.name])

    try_one()


@pytest.mark.real
def test_the_real_pair_is_read_as_nibabel_reads_it_and_half_a_pair_refused():
    folder = Path(os.environ["MEDSSL_DATA"]) / "oddities/nifti"
    path = folder / "derived/pair_uncompressed.hdr"
    expected = nib.load(path)
    scan = guard(path, lambda: pairs.open_image(path, None))
    np.testing.assert_array_equal(read(scan)[..., 0], expected.get_fdata())
    np.testing.assert_array_equal(scan.affine, expected.affine)
    np.testing.assert_allclose(scan.affine, read_by_itk(path)[1], atol=1e-4)
    with pytest.raises(InputError, match=r"nifti1\.img is missing beside it"):
        pairs.open_image(folder / "nifti1.hdr", None)
