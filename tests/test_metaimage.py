import gzip
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from itk_scans import (
    change,
    check_mask_of,
    check_writing,
    read,
    read_all,
    read_by_itk,
    save_by_itk,
    turn,
)

from medssl.config import InputError
from medssl.formats import metaimage
from medssl.formats.scan import guard

TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32")
COUNT = bytes(range(24))
PLAIN = "ElementSpacing = 1 2 3\n"
TURN = "0 1 0 -0.6 0 0.8 0.8 0 0.6"


def save(path, fields, data, sizes=(2, 3, 4), kind="MET_UCHAR", file="LOCAL"):
    """Write a file by hand."""
    text = f"ObjectType = Image\nNDims = {len(sizes)}\nDimSize = {' '.join(map(str, sizes))}\n"
    text += f"ElementType = {kind}\n{fields}ElementDataFile = {file}\n"
    path.write_bytes(text.encode() + data)
    return path


@pytest.mark.parametrize("dtype", [*TYPES, "float64"])
@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
def test_what_itk_writes_is_read_where_and_as_itk_reads_it(tmp_path, dtype, name):
    rng = np.random.default_rng(len(dtype))
    for is_left_handed in (False, True):
        array = rng.integers(0, 100, (4, 5, 3)).astype(dtype)
        path, affine = tmp_path / name, turn(rng, is_left_handed)
        save_by_itk(path, array, affine, compressed=is_left_handed)
        scan = metaimage.open_image(path, 1)
        assert scan.shape == (4, 5, 3)
        np.testing.assert_allclose(scan.affine, affine, atol=1e-9)
        np.testing.assert_allclose(scan.affine, read_by_itk(path)[1], atol=1e-9)
        np.testing.assert_array_equal(read(scan)[..., 0], array)
        assert scan.header["contradictions"] == {}


@pytest.mark.parametrize(
    "fields",
    [
        PLAIN,
        "ElementSize = 1 2 3\n",
        "ElementSize = 9 9 9\n" + PLAIN,
        "ElementSpacing = 1 -2 3\n",
        f"{PLAIN}TransformMatrix = {TURN}\nOffset = 5 6 7\n",
        f"{PLAIN}Orientation = {TURN}\nOrigin = 5 6 7\n",
        f"{PLAIN}Rotation = {TURN}\nPosition = 5 6 7\n",
        f"{PLAIN}TransformMatrix = {TURN}\nCenterOfRotation = 1 1 1\nAnatomicalOrientation = LPI\n",
    ],
)
def test_any_way_to_say_a_place_is_that_of_itk(tmp_path, fields):
    path = save(tmp_path / "a.mha", fields, COUNT)
    scan = metaimage.open_image(path, None)
    array, affine = read_by_itk(path)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-12)
    np.testing.assert_array_equal(read(scan), array)
    assert ("code" in scan.header["contradictions"]) is (TURN not in fields)


@pytest.mark.parametrize(
    ("fields", "encode"),
    [
        ("", bytes),
        ("BinaryData = True\nBinaryDataByteOrderMSB = True\n", None),
        ("ElementByteOrderMSB = True\n", None),
        ("CompressedData = True\n", zlib.compress),
        ("CompressedData = True\n", gzip.compress),
        (
            "BinaryData = False\n",
            lambda data: b"".join(b"%d\n" % n for (n,) in struct.iter_unpack("<h", data)),
        ),
    ],
)
def test_each_encoding_gives_the_same_numbers_and_no_more_or_less(tmp_path, fields, encode):
    numbers = np.arange(-30_000, 30_000, dtype="<i2")
    encode = encode or (lambda data: np.frombuffer(data, "<i2").byteswap().tobytes())
    path = tmp_path / "a.mha"

    def write(data):
        size = f"CompressedDataSize = {len(data)}\n" if "Compressed" in fields else ""
        save(path, PLAIN + fields + size, data, (200, 150, 2), "MET_SHORT")

    write(encode(numbers.tobytes()))
    scan = metaimage.open_image(path, 1)
    np.testing.assert_array_equal(read(scan).ravel(order="F"), numbers)
    np.testing.assert_array_equal(read_by_itk(path)[0], read(scan))
    damaged = [encode(numbers[:-1].tobytes()), encode(np.append(numbers, numbers[:1]).tobytes())]
    for data in (*damaged, encode(numbers.tobytes())[:-40]):
        write(data)
        with pytest.raises(InputError, match="damaged or incomplete"):
            guard(path, lambda: read(metaimage.open_image(path, 1)))


def test_a_changed_bit_of_compressed_data_is_found(tmp_path):
    packed = bytearray(zlib.compress(np.random.default_rng(0).bytes(24)))
    packed[12] ^= 1
    path = save(tmp_path / "a.mha", PLAIN + "CompressedData = True\n", bytes(packed))
    with pytest.raises(InputError, match="damaged or incomplete"):
        guard(path, lambda: read(metaimage.open_image(path, 1)))


@pytest.mark.parametrize("compress", [zlib.compress, gzip.compress])
def test_what_stands_behind_compressed_data_is_refused(tmp_path, compress):
    data = compress(COUNT) + b"more"
    path = save(tmp_path / "a.mha", PLAIN + "CompressedData = True\n", data)
    with pytest.raises(InputError, match="behind the compressed data stands what"):
        guard(path, lambda: read(metaimage.open_image(path, 1)))


@pytest.mark.parametrize("size", [-1, 11])
def test_a_detached_file_is_read_past_what_it_begins_with(tmp_path, size):
    (tmp_path / "data.raw").write_bytes(b"hello\nyou!\n" + COUNT)
    fields = f"{PLAIN}HeaderSize = {size}\n"
    path = save(tmp_path / "a.mhd", fields, b"", file="data.raw")
    array = read(metaimage.open_image(path, 1))
    assert array.ravel(order="F").tolist() == list(COUNT)
    np.testing.assert_array_equal(array, read_by_itk(path)[0])


def test_channels_of_an_element_are_split(tmp_path):
    array = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    path, affine = tmp_path / "a.mha", turn(np.random.default_rng(3))
    save_by_itk(path, array, affine)
    scan = metaimage.open_image(path, 3)
    np.testing.assert_array_equal(read(scan), array)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-9)
    with pytest.raises(InputError, match="holds 3 channels, declared are 2"):
        metaimage.open_image(path, 2)
    with pytest.raises(InputError, match=r"a label is \(I, J, K\)"):
        metaimage.open_label(path)


def test_a_fourth_axis_is_the_channels_and_masks_have_three(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    turned = "0 1 0 0 -1 0 0 0 0 0 1 0 0 0 0 1"
    fields = f"ElementSpacing = 1 2 3 4\nTransformMatrix = {turned}\nOffset = 5 6 7 8\n"
    path = save(tmp_path / "a.mha", fields, array.tobytes(order="F"), array.shape)
    scan = metaimage.open_image(path, 2)
    np.testing.assert_array_equal(read(scan), array)
    expected = [[0, 2, 0, -5], [-1, 0, 0, -6], [0, 0, 3, 7], [0, 0, 0, 1]]
    np.testing.assert_array_equal(scan.affine, expected)
    metaimage.write(tmp_path / "b.mha", array[..., 0], scan.affine, scan.header, "", {})
    np.testing.assert_array_equal(read_by_itk(tmp_path / "b.mha")[1], expected)


def test_a_single_slice_is_read_and_its_mask_is_one(tmp_path):
    fields = "ElementSpacing = 2 3\nTransformMatrix = 0 1 -1 0\nOffset = 5 6\n"
    scan = metaimage.open_image(save(tmp_path / "a.mha", fields, COUNT, (4, 6)), 1)
    assert scan.shape == (4, 6, 1)
    np.testing.assert_array_equal(scan.affine[:2], [[0, 3, 0, -5], [-2, 0, 0, -6]])
    mask = np.arange(24, dtype=np.uint8).reshape(4, 6, 1)
    metaimage.write(tmp_path / "b.mha", mask, scan.affine, scan.header, "", {})
    again = metaimage.open_label(tmp_path / "b.mha")
    assert again.header == scan.header
    np.testing.assert_array_equal(read(again)[..., 0], mask)


REFUSED = {
    "no voxel size": ("", "gives no voxel size: add it"),
    "twice": (PLAIN + PLAIN, "ElementSpacing twice"),
    "two names": (PLAIN + "Origin = 1 2 3\nOffset = 1 2 3\n", "Offset twice"),
    "too few": ("ElementSpacing = 1 2\n", "not 3 numbers"),
    "not finite": ("ElementSpacing = 1 2 nan\n", "not 3 numbers"),
    "text": (PLAIN + "Offset = a b c\n", "not 3 numbers"),
    "flat": (PLAIN + "TransformMatrix = 1 0 0 1 0 0 0 0 1\n", "flattens"),
    "not of length 1": (PLAIN + "TransformMatrix = 2 0 0 0 1 0 0 0 1\n", "not of length 1"),
    "unit": (PLAIN + "DistanceUnits = inch\n", "DistanceUnits is 'inch'"),
    "slope": (PLAIN + "ElementToIntensityFunctionSlope = 2\n", "apply it and delete it"),
    "size": (PLAIN + "CompressedData = True\nCompressedDataSize = 9\n", "24 bytes are there, and"),
    "header": (PLAIN + "HeaderSize = 4\n", "HeaderSize is 4"),
    "no boolean": (PLAIN + "CompressedData = maybe\n", "correct it to True or False"),
    "channels": (PLAIN + "ElementNumberOfChannels = 0\n", "are not those of a scan"),
    "no field": (PLAIN + "hello\n", "line 6 is no field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_by_name(tmp_path, name):
    fields, message = REFUSED[name]
    path = save(tmp_path / "a.mha", fields, COUNT)
    with pytest.raises(InputError, match=message) as caught:
        metaimage.open_image(path, None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../a.raw", "is elsewhere"),
        ("/etc/passwd", "is elsewhere"),
        ("lost.raw", "lost.raw is not there"),
        ("LIST", "in several files"),
        ("a%03d.raw 1 4 1", "in several files"),
    ],
)
def test_data_that_are_elsewhere_are_refused(tmp_path, file, message):
    path = save(tmp_path / "a.mhd", PLAIN, b"", file=file)
    with pytest.raises(InputError, match=message):
        metaimage.open_image(path, None)


@pytest.mark.parametrize("kind", ["MET_LONG", "MET_ASCII_CHAR", "MET_OTHER"])
def test_types_whose_size_is_not_certain_are_refused(tmp_path, kind):
    path = save(tmp_path / "a.mha", PLAIN, COUNT * 8, kind=kind)
    with pytest.raises(InputError, match=f"Image of {kind}, which is not read"):
        metaimage.open_image(path, None)


def test_a_mesh_is_refused(tmp_path):
    path = save(tmp_path / "a.mha", PLAIN, COUNT)
    path.write_bytes(path.read_bytes().replace(b"= Image", b"= Mesh"))
    with pytest.raises(InputError, match="is Mesh of MET_UCHAR"):
        metaimage.open_image(path, None)


@pytest.mark.parametrize("fields", ["", "CompressedData = True\n", "BinaryData = False\n"])
def test_a_header_that_declares_more_than_the_file_can_hold_is_refused_at_once(tmp_path, fields):
    path = save(tmp_path / "a.mha", PLAIN + fields, COUNT, (99999, 99999, 999))
    with pytest.raises(InputError, match="the header declares 9989800"):
        metaimage.open_image(path, None)


@pytest.mark.parametrize("num_channels", [0, 2])
@pytest.mark.parametrize("is_left_handed", [False, True])
def test_what_is_written_opens_in_itk_on_the_same_voxels(tmp_path, num_channels, is_left_handed):
    path, note = tmp_path / "a.mha", "a note\nof two lines"
    check_writing(metaimage, path, num_channels, is_left_handed, note, "a note of two lines", 1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        f"{PLAIN}Offset = 0.1 0.30000001 7\nOrientation = {TURN}\nAnatomicalOrientation = LPI\n",
        "DistanceUnits = cm\nElementSize = 1 2 3\n",
    ],
)
def test_a_mask_says_of_its_place_what_its_image_says_and_nothing_else(tmp_path, fields):
    named = fields + "Name = Mustermann\nComment = Mustermann\n"
    image = save(tmp_path / "a.mha", named, COUNT)
    check_mask_of(
        metaimage,
        image,
        tmp_path / "b.mha",
        fields.replace("Orientation = 0", "TransformMatrix = 0").splitlines(),
    )


def test_lengths_in_another_unit_become_mm_and_are_named(tmp_path):
    scan = metaimage.open_image(save(tmp_path / "a.mha", "DistanceUnits = cm\n" + PLAIN, COUNT), 1)
    np.testing.assert_array_equal(scan.affine, np.diag([-10, -20, 30, 1]))
    found = scan.header["contradictions"]
    assert found == {"unit": "cm", "code": "no TransformMatrix"}


def test_only_errors_of_the_input_come_of_damaged_files(tmp_path):
    place = f"{PLAIN}TransformMatrix = {TURN}\nOffset = 5 6 7\n"
    path = tmp_path / "damaged.mha"
    samples = [
        save(path, fields, data, sizes).read_bytes()
        for fields, data, sizes in (
            (place, COUNT, (2, 3, 4)),
            (place + "CompressedData = True\n", zlib.compress(COUNT), (2, 3, 4)),
            (PLAIN + "BinaryData = False\n", b" ".join(b"%d" % n for n in COUNT), (2, 3, 4)),
            (PLAIN + "ElementNumberOfChannels = 2\n", COUNT, (2, 3, 2)),
            ("ElementSpacing = 1 2 3 4\n", COUNT, (2, 3, 2, 2)),
        )
    ]

    @seed(2)
    @settings(max_examples=200, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(samples).flatmap(lambda content: change(content, b"LOCAL\n")))
    def try_one(content):
        path.write_bytes(content)
        read_all(metaimage, path)

    try_one()
