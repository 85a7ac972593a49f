"""Scans by ITK, the reader that ours is measured by; and damage."""

from contextlib import suppress

import numpy as np
import pytest
import SimpleITK
from hypothesis import strategies as st

from medssl.config import InputError
from medssl.formats.scan import guard

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(scan):
    """All numbers of an opened scan as (I, J, K, C)."""
    flat = np.concatenate(list(scan.iterate_values()))
    return flat.reshape((*scan.shape, scan.num_channels), order="F")


def read_by_itk(path):
    """Voxels (I, J, K, C) and RAS+ affine as ITK reads them."""
    image = SimpleITK.ReadImage(str(path))
    array = SimpleITK.GetArrayFromImage(image)
    array = array if image.GetNumberOfComponentsPerPixel() > 1 else array[..., None]
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.transpose(array, (2, 1, 0, 3)), LPS @ affine


def turn(rng, is_left_handed=False):
    """A random oblique affine of unequal spacings."""
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    if (np.linalg.det(rotation) < 0) != is_left_handed:
        rotation[:, 0] *= -1
    affine = np.eye(4)
    affine[:3, :3] = rotation * [0.7, 1.3, 2.5]
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine


def save_by_itk(path, array, affine, compressed=True):
    """Write voxels (I, J, K[, C]) on a RAS+ affine by ITK."""
    order = (2, 1, 0, 3)[: array.ndim]
    image = SimpleITK.GetImageFromArray(np.transpose(array, order), isVector=array.ndim == 4)
    moved = LPS @ affine
    spacing = np.linalg.norm(moved[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(moved[:3, 3].tolist())
    image.SetDirection((moved[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, str(path), useCompression=compressed)


def check_writing(module, path, num_channels, is_left_handed, note, expected_note, tolerance):
    """What a module writes opens in ITK, and in the module, on the same voxels."""
    rng = np.random.default_rng(5)
    shape = (4, 5, 3, num_channels) if num_channels else (4, 5, 3)
    for dtype in ("uint8", "int16", "int32", "float32"):
        array = rng.integers(0, 100, shape).astype(dtype)
        affine = turn(rng, is_left_handed)
        module.write(path, array, affine, None, note, {})
        voxels, place = read_by_itk(path)
        np.testing.assert_array_equal(voxels.reshape(shape), array)
        assert voxels.dtype == dtype
        np.testing.assert_allclose(place, affine, atol=1e-9)
        scan = module.open_image(path, None)
        np.testing.assert_array_equal(read(scan).reshape(shape), array)
        np.testing.assert_allclose(scan.affine, affine, atol=tolerance)
        assert scan.read_note() == expected_note
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def check_mask_of(module, image, path, lines):
    """The mask of an image has these lines of its header, its place, and no name."""
    scan = module.open_image(image, 1)
    module.write(path, np.ones((2, 3, 4), np.uint8), scan.affine, scan.header, "", {})
    text = path.read_bytes()
    for line in lines:
        assert line.encode() in text
    assert b"Mustermann" not in text
    again = module.open_label(path)
    np.testing.assert_array_equal(again.affine, scan.affine)
    assert again.header["contradictions"] == scan.header["contradictions"]
    np.testing.assert_array_equal(read_by_itk(path)[1], read_by_itk(image)[1])
    with pytest.raises(ValueError, match="is not the grid"):
        module.write(path, np.ones((2, 3, 3), np.uint8), scan.affine, scan.header, "", {})
    with pytest.raises(ValueError, match="is not the grid"):
        module.write(path, np.ones((2, 3, 4), np.uint8), 2 * scan.affine, scan.header, "", {})


ODD = [b"0", b"-1", b"nan", b"inf", b"1e999", b"99999999999", b"none", b"(", b"", b"x", b"\xff"]


@st.composite
def change(draw, content, end=b"\n\n"):
    """Damage a file: cut, flip bits, or put an odd word in the place of one of its header."""
    place = draw(st.integers(0, len(content) - 1))
    kind = draw(st.sampled_from(["cut", "flip", "word", "insert", "word"]))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(max_size=9)) + content[place:]
    head, mark, data = content.partition(end)
    words = head.split(b" ")
    words[place % len(words)] = draw(st.sampled_from(ODD)) + draw(st.sampled_from([b"", b"\n"]))
    return b" ".join(words) + mark + data


def read_all(module, path):
    """Read a file in all ways; only refusals may come out."""
    for open_scan in (lambda: module.open_image(path, None), lambda: module.open_label(path)):
        with suppress(InputError):
            scan = open_scan()
            assert np.isfinite(scan.affine).all()
            guard(path, lambda scan=scan: read(scan))
