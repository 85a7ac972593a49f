import bz2
import gzip
import struct
from contextlib import suppress
from functools import partial
from itertools import chain

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
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
from medssl.formats import nrrd
from medssl.formats.scan import guard

PLAIN = "spacings: 1 2 3\n"


def save(path, fields, data, sizes=(2, 3, 4), kind="uint8", encoding="raw", end="\n"):
    """Write a file by hand."""
    text = f"NRRD0004\ntype: {kind}\ndimension: {len(sizes)}\nsizes: {' '.join(map(str, sizes))}\n"
    text += f"encoding: {encoding}\nendian: little\n{fields}{end}"
    path.write_bytes(text.encode() + data)
    return path


COUNT = bytes(range(24))
TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32")
DIRECTIONS = "space directions: (1,0,0) (0,2,0) (0,0,3)\n"


@pytest.mark.parametrize("dtype", [*TYPES, "float64"])
@pytest.mark.parametrize("is_left_handed", [False, True])
def test_what_itk_writes_is_read_where_and_as_itk_reads_it(tmp_path, dtype, is_left_handed):
    rng = np.random.default_rng(len(dtype) + is_left_handed)
    array = rng.integers(0, 100, (4, 5, 3)).astype(dtype)
    path, affine = tmp_path / "a.nrrd", turn(rng, is_left_handed)
    save_by_itk(path, array, affine, compressed=is_left_handed)
    scan = nrrd.open_image(path, 1)
    assert scan.shape == (4, 5, 3)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-9)
    np.testing.assert_allclose(scan.affine, read_by_itk(path)[1], atol=1e-9)
    np.testing.assert_array_equal(read(scan)[..., 0], array)
    assert scan.header["contradictions"] == {}


@pytest.mark.parametrize(
    "fields",
    [
        PLAIN,
        "spacings: 1 -2 3\n",
        "spacings: 1 2 3\naxis mins: 10 20 30\n",
        "spacings: 1 2 3\naxis mins: 10 20 30\ncenters: node cell node\n",
        *(
            f"space: {space}\n{DIRECTIONS}space origin: (5,6,7)\n"
            for space in ("RAS", "LAS", "left-posterior-superior", "scanner-xyz", "3D-left-handed")
        ),
        f"space dimension: 3\n{DIRECTIONS}",
        "space: RAS\nspace directions: (0.6,0.8,0) (-1.6,1.2,0) (0,0,-3)\nspace origin: (5,6,7)\n",
    ],
)
def test_any_way_to_say_a_place_is_that_of_itk(tmp_path, fields):
    path = save(tmp_path / "a.nrrd", fields, COUNT)
    scan = nrrd.open_image(path, None)
    array, affine = read_by_itk(path)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-12)
    np.testing.assert_array_equal(read(scan), array)
    is_known = "RAS" in fields or "LAS" in fields or "left-post" in fields
    assert ("code" in scan.header["contradictions"]) is not is_known


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("raw", bytes),
        ("gzip", gzip.compress),
        ("gz", gzip.compress),
        ("bzip2", bz2.compress),
        ("hex", lambda data: b"\n".join(b"%02x" % byte for byte in data)),
        ("ascii", lambda data: b", ".join(b"%d" % n for (n,) in struct.iter_unpack("<h", data))),
    ],
)
def test_each_encoding_gives_the_same_numbers_and_no_more_or_less(tmp_path, encoding, encode):
    numbers = np.arange(-40_000, 40_000, dtype="<i4").astype("<i2")
    path = tmp_path / "a.nrrd"
    write = partial(save, path, PLAIN, sizes=(200, 200, 2), kind="short", encoding=encoding)
    write(encode(numbers.tobytes()))
    np.testing.assert_array_equal(read(nrrd.open_image(path, 1)).ravel(order="F"), numbers)
    if encoding != "bzip2":
        (
            np.testing.assert_array_equal(read_by_itk(path)[0], read(nrrd.open_image(path, 1))),
            "ITK has no bzip2",
        )
    for wrong in (numbers[:-1], np.append(numbers, numbers[:1])):
        write(encode(wrong.tobytes()))
        with pytest.raises(InputError, match="damaged or incomplete"):
            guard(path, lambda: read(nrrd.open_image(path, 1)))
    write(encode(numbers.tobytes())[:-40])
    with pytest.raises(InputError, match="damaged or incomplete"):
        guard(path, lambda: read(nrrd.open_image(path, 1)))


def test_floats_in_text_may_be_no_numbers(tmp_path):
    path = save(
        tmp_path / "a.nrrd", PLAIN, b"1.5 nan -inf 1e3", (2, 2, 1), "float", "txt", end="\n"
    )
    expected = [1.5, np.nan, -np.inf, 1000]
    np.testing.assert_array_equal(read(nrrd.open_image(path, 1)).ravel(order="F"), expected)


@pytest.mark.parametrize("first", [True, False])
def test_channels_are_split_wherever_their_axis_stands(tmp_path, first):
    array = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    place = "space: LPS\nspace origin: (1,2,3)\n"
    vectors, kinds = "(1,0,0) (0,2,0) (0,0,3)", "domain domain domain"
    if first:
        fields = f"{place}space directions: none {vectors}\nkinds: vector {kinds}\n"
        stored, sizes = np.moveaxis(array, -1, 0), (3, 2, 3, 4)
    else:
        fields = f"{place}space directions: {vectors} none\nkinds: {kinds} list\n"
        stored, sizes = array, array.shape
    path = save(tmp_path / "a.nrrd", fields, stored.tobytes(order="F"), sizes)
    scan = nrrd.open_image(path, 3)
    np.testing.assert_array_equal(read(scan), array)
    expected, affine = read_by_itk(path)
    np.testing.assert_array_equal(read(scan), expected)
    np.testing.assert_allclose(scan.affine, affine)
    with pytest.raises(InputError, match="holds 3 channels, declared are 2"):
        nrrd.open_image(path, 2)
    with pytest.raises(InputError, match=r"a label is \(I, J, K\)"):
        nrrd.open_label(path)


def test_a_channel_axis_between_those_of_space_is_split_too(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1).repeat(2, -1)
    array[..., 1] += 100
    fields = "kinds: domain list domain domain\nspacings: 1 nan 2 3\n"
    stored = np.moveaxis(array, -1, 1).tobytes(order="F")
    path = save(tmp_path / "a.nrrd", fields, stored, (2, 2, 3, 4))
    np.testing.assert_array_equal(read(nrrd.open_image(path, 2)), array)


@pytest.mark.parametrize("skips", ["line skip: 2\n", "byte skip: 11\n", "byte skip: -1\n", "gzip"])
def test_a_detached_file_is_read_past_what_it_begins_with(tmp_path, skips):
    begin = b"hello\nyou!\n"
    data, encoding, fields = begin + COUNT, "raw", skips
    if skips == "gzip":
        data, encoding, fields = gzip.compress(data), "gzip", "byte skip: 11\n"
    (tmp_path / "data.raw").write_bytes(data)
    path = tmp_path / "a.nhdr"
    save(path, f"{PLAIN}{fields}data file: data.raw\n", b"", encoding=encoding, end="")
    array = read(nrrd.open_image(path, 1))
    assert array.ravel(order="F").tolist() == list(COUNT)
    np.testing.assert_array_equal(array, read_by_itk(path)[0])


def test_itk_and_the_reader_agree_on_a_detached_header(tmp_path):
    array, affine = np.arange(60, dtype=np.int16).reshape(4, 5, 3), turn(np.random.default_rng(2))
    save_by_itk(tmp_path / "a.nhdr", array, affine)
    scan = nrrd.open_image(tmp_path / "a.nhdr", 1)
    np.testing.assert_array_equal(read(scan)[..., 0], array)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-9)


def test_lengths_in_another_unit_become_mm_and_are_named(tmp_path):
    fields = f'space: RAS\nspace units: "cm" "cm" "cm"\n{DIRECTIONS}space origin: (1,2,3)\n'
    scan = nrrd.open_image(save(tmp_path / "a.nrrd", fields, COUNT), 1)
    assert scan.affine[:3].tolist() == [[10, 0, 0, 10], [0, 20, 0, 20], [0, 0, 30, 30]]
    assert scan.header["contradictions"] == {"unit": "cm"}


def test_a_single_slice_lies_in_space(tmp_path):
    fields = "space: RAS\nspace directions: (0,2,0) (0,0,3)\nspace origin: (5,6,7)\n"
    scan = nrrd.open_image(save(tmp_path / "a.nrrd", fields, COUNT, (4, 6)), 1)
    assert scan.shape == (4, 6, 1)
    expected = [[0, 0, 1, 5], [2, 0, 0, 6], [0, 3, 0, 7], [0, 0, 0, 1]]
    np.testing.assert_array_equal(scan.affine, expected)
    mask = np.arange(24, dtype=np.uint8).reshape(4, 6, 1)
    nrrd.write(tmp_path / "b.nrrd", mask, scan.affine, scan.header, "", {})
    again = nrrd.open_label(tmp_path / "b.nrrd")
    assert again.header["nrrd sizes"] == [4, 6]
    np.testing.assert_array_equal(read(again)[..., 0], mask)


REFUSED = {
    "no voxel size": ("", "gives no voxel size: add `spacings`"),
    "unknown field": (PLAIN + "spacing: 1\n", "line 8 of the header is no field"),
    "no blank": ("spacings:1 2 3\n", "line 7 of the header is no field"),
    "twice": (PLAIN + PLAIN, "`spacings` twice"),
    "too few": ("spacings: 1 2\n", "said of 2 axes"),
    "infinite": ("spacings: 1 2 inf\n", "finite"),
    "too large": ('spacings: 1 2 1e308\nunits: "m" "m" "m"\n', "finite"),
    "not finite": ("spacings: 1 2 nan\n", "finite"),
    "flat": ("space: RAS\nspace directions: (1,0,0) (1,0,0) (0,0,1)\n", "flattens"),
    "text": ("space: RAS\nspace directions: (a,0,0) (1,0,0) (0,0,1)\n", "is no vector"),
    "short": ("space: RAS\nspace directions: (1,0) (0,1) (0,0)\n", "not all of 3 numbers"),
    "origin": (f"space: RAS\n{DIRECTIONS}space origin: (1,2)\n", "not all of 3 numbers"),
    "time": ("space: left-posterior-superior-time\n" + DIRECTIONS, "each time as a file"),
    "unit": (PLAIN + 'units: "mm" "mm" "inch"\n', "inch and mm.*convert them to mm"),
    "elsewhere": (PLAIN + "data file: ../a.raw\n", "is elsewhere"),
    "absolute": (PLAIN + "data file: /etc/passwd\n", "is elsewhere"),
    "drive": (PLAIN + "data file: C:\\a.raw\n", "is elsewhere"),
    "lost": (PLAIN + "data file: lost.raw\n", "lost.raw is not there"),
    "list": (PLAIN + "data file: LIST\na.raw\n", "in several files"),
    "pattern": (PLAIN + "data file: a%03d.raw 0 3 1\n", "in several files"),
    "complex": (PLAIN + "kinds: complex domain domain\n", "complex numbers"),
    "vector in space": (
        f"space: RAS\n{DIRECTIONS}kinds: vector domain domain\n",
        "has a direction in space",
    ),
    "skip": (PLAIN + "byte skip: -2\n", "byte skip -2 are not understood"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_by_name(tmp_path, name):
    fields, message = REFUSED[name]
    path = save(tmp_path / "a.nrrd", fields, COUNT)
    with pytest.raises(InputError, match=message) as caught:
        nrrd.open_image(path, None)
    assert str(path) in str(caught.value)


def test_four_axes_need_kinds(tmp_path):
    path = save(tmp_path / "a.nrrd", "spacings: 1 2 3 1\n", COUNT, (2, 3, 2, 2))
    with pytest.raises(InputError, match="add `kinds`"):
        nrrd.open_image(path, None)


@pytest.mark.parametrize("change", ["kind", "endian", "encoding"])
def test_a_header_that_lacks_what_the_numbers_are_is_refused(tmp_path, change):
    path = save(tmp_path / "a.nrrd", PLAIN, COUNT * 2, kind="short")
    old, new, message = {
        "kind": (b"type: short", b"type: block", "'block' in encoding"),
        "endian": (b"endian: little\n", b"", "no `endian`"),
        "encoding": (b"encoding: raw", b"encoding: zrl", "in encoding 'zrl'"),
    }[change]
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(InputError, match=message):
        nrrd.open_image(path, None)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "hex", "ascii"])
def test_a_header_that_declares_more_than_the_file_can_hold_is_refused_at_once(tmp_path, encoding):
    path = save(tmp_path / "a.nrrd", PLAIN, COUNT, (99999, 99999, 999), encoding=encoding)
    with pytest.raises(InputError, match="the header declares 9989800"):
        nrrd.open_image(path, None)


@pytest.mark.parametrize("num_channels", [0, 2])
@pytest.mark.parametrize("is_left_handed", [False, True])
def test_what_is_written_opens_in_itk_on_the_same_voxels(tmp_path, num_channels, is_left_handed):
    path, note = tmp_path / "a.nrrd", "a \\ note\nof two lines"
    check_writing(nrrd, path, num_channels, is_left_handed, note, "a \\ note\nof two lines", 1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        f"space: scanner-xyz\n{DIRECTIONS}space origin: (5,6,7)\n",
        'spacings: 1 2 3\naxis mins: 10 20 30\ncenters: node cell node\nunits: "m" "m" "m"\n',
        f'space: RAS\nspace units: "cm" "cm" "cm"\n{DIRECTIONS}space origin: (0.1,0.30000001,7)\n',
    ],
)
def test_a_mask_says_of_its_place_what_its_image_says_and_nothing_else(tmp_path, fields):
    named = fields + "content: Erika Mustermann\nPatientName:=Mustermann\n"
    image = save(tmp_path / "a.nrrd", named, COUNT)
    check_mask_of(nrrd, image, tmp_path / "b.nrrd", fields.splitlines())


def save_segments(path, layers, segments):
    """Write layers (L, I, J, K) as 3D Slicer does; segments are (name, layer, value) or a name."""
    vectors = "(-1,0,0) (0,2,0) (0,0,3)"
    fields = f"space: LPS\nspace directions: none {vectors}\nkinds: list domain domain domain\n"
    sizes = layers.shape
    if len(layers) == 1:
        fields, sizes = f"space: LPS\nspace directions: {vectors}\n", sizes[1:]
    for index, segment in enumerate(segments):
        name, *others = segment
        fields += f"Segment{index}_ID:=Segment_{index}\nSegment{index}_Name:={name}\n"
        for key, value in zip(("Layer", "LabelValue"), others, strict=False):
            fields += f"Segment{index}_{key}:={value}\n"
    return save(path, fields + "\n", layers.astype("u1").tobytes(order="F"), sizes, end="")


def test_a_segmentation_names_its_segments_and_any_other_file_does_not(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 3 * 2
    names = {0: "background", 2: "liver", 4: "a\\b tumor"}
    for name in ("a.seg.nrrd", "b.nrrd"):
        nrrd.write(tmp_path / name, array, np.diag([2.0, 1.5, 3, 1]), None, "made", names)
    path = tmp_path / "a.seg.nrrd"
    assert nrrd.read_names(path) == {2: "liver", 4: "a\\b tumor"}
    assert nrrd.read_names(tmp_path / "b.nrrd") == {}
    label = nrrd.open_label(path)
    assert label.read_note() == "made"
    assert np.array_equal(read(label)[..., 0], array)
    image = SimpleITK.ReadImage(str(path))
    said = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    assert (said["Segment0_Name"], said["Segment0_LabelValue"]) == ("liver", "2")
    assert (said["Segment1_LabelValue"], said["Segment1_Layer"]) == ("4", "0")
    assert said["Segment1_Extent"] == "0 1 0 2 0 3"
    assert said["Segmentation_MasterRepresentation"] == "Binary labelmap"
    assert "Segment2_Name" not in said, "the background is no segment"
    assert np.array_equal(SimpleITK.GetArrayFromImage(image).T, array)


def make_layers(*boxes):
    """Layers (L, 4, 4, 4): boxes of (layer, value, slice along I)."""
    layers = np.zeros((max(box[0] for box in boxes) + 1, 4, 4, 4), np.uint8)
    for layer, value, where in boxes:
        layers[layer, where] = value
    return layers


@pytest.mark.parametrize(
    ("boxes", "segments", "names", "rows"),
    [
        (
            [(0, 1, slice(0, 1)), (0, 7, slice(2, 3))],
            [("liver", 0, 1), ("spleen", 0, 7)],
            {1: "liver", 7: "spleen"},
            [1, 0, 7, 0],
        ),
        (
            [(0, 1, slice(0, 1)), (1, 5, slice(2, 4))],
            [("liver", 0, 1), ("spleen", 1, 5)],
            {1: "liver", 5: "spleen"},
            [1, 0, 5, 5],
        ),
        (
            [(0, 1, slice(0, 1)), (0, 2, slice(1, 2)), (1, 1, slice(2, 4))],
            [("spleen", 1, 1), ("liver", 0, 1), ("vein", 0, 2)],
            {1: "spleen", 2: "liver", 3: "vein"},
            [2, 3, 1, 1],
        ),
        (
            [(0, 1, slice(0, 1)), (1, 1, slice(3, 4))],
            [("liver",), ("spleen",)],  # before Slicer 4.11
            {1: "liver", 2: "spleen"},
            [1, 0, 0, 2],
        ),
    ],
)
def test_the_layers_of_slicer_become_one_label(tmp_path, boxes, segments, names, rows):
    path = save_segments(tmp_path / "a.seg.nrrd", make_layers(*boxes), segments)
    scan = nrrd.open_label(path)
    assert nrrd.read_names(path) == names
    assert read(scan)[:, 0, 0, 0].tolist() == rows
    assert (read(scan) == np.array(rows).reshape(4, 1, 1, 1)).all()
    assert scan.affine[0, 0] == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((1, 1, slice(1, 3)), "'liver' and 'tumor' overlap"),
        ((1, 9, slice(3, 4)), "values that no segment has"),
    ],
)
def test_segments_that_overlap_and_values_of_none_are_refused(tmp_path, second, message):
    layers = make_layers((0, 1, slice(0, 2)), second)
    path = save_segments(tmp_path / "a.seg.nrrd", layers, [("liver", 0, 1), ("tumor", 1, 1)])
    with pytest.raises(InputError, match=message):
        read(nrrd.open_label(path))


def make_samples(folder):
    """Small files of all ways to store, to damage."""
    full = f"space: RAS\n{DIRECTIONS}space origin: (5,6,7)\n"
    for name, fields, data, encoding in (
        ("raw", full, COUNT, "raw"),
        ("gzip", PLAIN, gzip.compress(COUNT, mtime=0), "gzip"),
        ("bzip2", PLAIN, bz2.compress(COUNT), "bzip2"),
        ("text", full, b" ".join(b"%d" % n for n in COUNT), "text"),
        ("hex", full, COUNT.hex().encode(), "hex"),
    ):
        yield save(folder / f"{name}.nrrd", fields, data, encoding=encoding).read_bytes()
    layers = make_layers((0, 1, slice(0, 1)), (1, 1, slice(2, 4)))
    segments = [("liver", 0, 1), ("tumor", 1, 1)]
    yield save_segments(folder / "layers.nrrd", layers, segments).read_bytes()


def test_only_errors_of_the_input_come_of_damaged_files(tmp_path):
    samples = list(make_samples(tmp_path))
    path = tmp_path / "damaged.nrrd"

    @seed(1)
    @settings(max_examples=200, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(samples).flatmap(change))
    def try_one(content):
        path.write_bytes(content)
        read_all(nrrd, path)
        with suppress(InputError):
            nrrd.read_names(path)

    try_one()


@pytest.mark.real
def test_real_files_are_read_where_and_as_itk_reads_them():
    import os
    from pathlib import Path

    root = Path(os.environ["MEDSSL_DATA"]) / "oddities"
    paths = sorted(chain(root.glob("nrrd_mha/*.nrrd"), root.glob("dicom_seg/**/*.nrrd")))
    assert len(paths) == 13
    for path in paths:
        is_label = "label" in path.name or "seg" in path.name
        scan = nrrd.open_label(path) if is_label else nrrd.open_image(path, 1)
        array, affine = read_by_itk(path)
        np.testing.assert_array_equal(read(scan), array)
        np.testing.assert_allclose(scan.affine, affine, atol=1e-9)
        assert scan.header["contradictions"] == {}
    assert nib.aff2axcodes(nrrd.open_image(root / "nrrd_mha/brain1_image.nrrd", 1).affine) == (
        *"LAS",
    )
