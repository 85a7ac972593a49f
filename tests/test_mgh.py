import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from itk_scans import change, read, read_all, turn

from medssl.config import InputError
from medssl.formats import mgh
from medssl.formats.scan import guard


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint16", "float32"])
@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
def test_what_nibabel_writes_is_read_where_and_as_it_is(tmp_path, dtype, name):
    rng = np.random.default_rng(len(dtype))
    for shape, is_left_handed in (((4, 5, 3), False), ((4, 5, 3, 2), True)):
        array, affine = rng.integers(0, 200, shape).astype(dtype), turn(rng, is_left_handed)
        path = tmp_path / name
        nib.save(nib.MGHImage(array, affine), path)
        scan = mgh.open_image(path, None)
        np.testing.assert_array_equal(read(scan).reshape(shape), array)
        np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
        np.testing.assert_array_equal(scan.affine, nib.load(path).affine)


def make_file(path, **fields):
    """Write a small file, with other bytes at some places."""
    nib.save(nib.MGHImage(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    for place, value in fields.values():
        content[place : place + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": (0, b"\0\0\0\2")}, "it is no MGH file"),
        ({"size": (4, b"\0\0\0\0")}, "are not those of a scan"),
        ({"size": (4, b"\x7f\0\0\0")}, "the header declares 25568477"),
        ({"flag": (28, b"\0\0")}, "gives no place"),
        ({"type": (20, b"\0\0\0\7")}, "of type 7 are not"),
        ({"spacing": (30, b"\0\0\0\0")}, "flattens"),
        ({"spacing": (30, b"\x7f\xc0\0\0")}, "finite"),
    ],
)
def test_what_is_no_scan_is_refused(tmp_path, fields, message):
    path = make_file(tmp_path / "a.mgh", **fields)
    with pytest.raises(InputError, match=message):
        mgh.open_image(path, None)


def test_a_file_of_the_other_name_and_a_cut_one_are_refused(tmp_path):
    path = make_file(tmp_path / "a.mgh")
    content = path.read_bytes()
    (tmp_path / "a.mgz").write_bytes(content)
    with pytest.raises(InputError, match=r"is not compressed: rename it to \.mgh"):
        mgh.open_image(tmp_path / "a.mgz", 1)
    path.write_bytes(content[: 284 + 40])
    with pytest.raises(InputError, match="the header declares 24 values"):
        mgh.open_image(path, 1)
    path = make_file(tmp_path / "b.mgh").rename(tmp_path / "c.mgh")
    nib.save(nib.load(path), tmp_path / "c.mgz")
    packed = (tmp_path / "c.mgz").read_bytes()
    (tmp_path / "c.mgz").write_bytes(packed[:-9])
    with pytest.raises(InputError, match="damaged or incomplete"):
        guard(path, lambda: read(mgh.open_image(tmp_path / "c.mgz", 1)))
    (tmp_path / "d.mgh").write_bytes(packed)
    with pytest.raises(InputError, match=r"is compressed: rename it to \.mgz"):
        mgh.open_image(tmp_path / "d.mgh", 1)


def test_only_errors_of_the_input_come_of_damaged_files(tmp_path):
    make_file(tmp_path / "a.mgh")
    nib.save(nib.load(tmp_path / "a.mgh"), tmp_path / "a.mgz")
    samples = [(name, (tmp_path / name).read_bytes()) for name in ("a.mgh", "a.mgz")]

    @seed(3)
    @settings(max_examples=200, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(samples), st.data())
    def try_one(sample, data):
        name, content = sample
        start = content[:90] if name == "a.mgh" and data.draw(st.booleans()) else content
        path = tmp_path / f"damaged_{name}"
        path.write_bytes(data.draw(change(start)) + content[len(start) :])
        read_all(mgh, path)

    try_one()


@pytest.mark.real
def test_the_real_file_is_read_as_nibabel_reads_it():
    path = Path(os.environ["MEDSSL_DATA"]) / "oddities/nifti/test.mgz"
    expected = nib.load(path)
    scan = mgh.open_image(path, None)
    array = np.asarray(expected.dataobj)
    np.testing.assert_array_equal(read(scan).reshape(array.shape), array)
    np.testing.assert_array_equal(scan.affine, expected.affine)
