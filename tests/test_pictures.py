import re
import struct
import zlib

import numpy as np
import pytest
from pictures import write_pictures
from PIL import Image

from medssl.config import DataSection, InputError
from medssl.data.cache import build_cache
from medssl.data.cases import Case, split_cases
from medssl.data.check import check_dataset
from medssl.data.io import read_geometry, read_image, read_label, write_map, write_mask
from medssl.data.layouts import read_dataset
from medssl.data.predictions import find_scans
from medssl.formats.pictures import count_channels
from medssl.transforms.preprocess import Normalization, Preprocessing

RECIPE = Preprocessing(spacing=(1.0, 1.0, None), normalization=(Normalization(kind="zscore"),))


def draw(shape=(5, 7), dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def save_pages(path, pages):
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_rows_are_i_and_columns_are_j_from_the_upper_left(tmp_path, suffix, dtype):
    array = draw(dtype=dtype)
    path = save(tmp_path / f"a{suffix}", array)
    volume = read_image([path], 1)
    assert volume.array.shape == (1, 5, 7, 1)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0, ..., 0], array)
    np.testing.assert_array_equal(volume.affine, np.eye(4))
    assert not volume.has_spacing
    assert read_geometry(path)[0] == (5, 7, 1)


def test_the_pages_of_a_tiff_are_slices(tmp_path):
    pages = [draw(seed=seed) for seed in range(3)]
    volume = read_image([save_pages(tmp_path / "a.tiff", pages)], 1)
    np.testing.assert_array_equal(volume.array[0], np.stack(pages, -1))
    assert read_geometry(tmp_path / "a.tiff")[0] == (5, 7, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colors_are_channels(tmp_path, suffix):
    array = draw((5, 7, 3))
    path = save(tmp_path / f"a{suffix}", array)
    assert count_channels(path) == 3
    np.testing.assert_array_equal(read_image([path], 3).array[..., 0], np.moveaxis(array, -1, 0))
    with pytest.raises(InputError, match=r"\(5, 7, 3\).*declared are 1 channels"):
        read_image([path], 1)


def test_a_gray_picture_saved_in_color_is_gray_where_one_channel_is_declared(tmp_path):
    array = draw()
    for name, mode in (("rgb", "RGB"), ("rgba", "RGBA"), ("la", "LA"), ("p", "P")):
        found = read_image([save(tmp_path / f"{name}.png", array, mode)], 1).array
        np.testing.assert_array_equal(found[0, ..., 0], array)


def test_a_jpeg_is_read_and_one_that_viewers_turn_is_refused(tmp_path):
    path = save(tmp_path / "a.jpg", np.full((16, 24), 77, np.uint8))
    assert abs(read_image([path], 1).array - 77).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "b.jpg", draw(), exif=exif)
    with pytest.raises(InputError, match=r"b\.jpg: its orientation tag \(6\).*upright"):
        read_image([turned], 1)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    whole = save(tmp_path / "b.png", draw((60, 60)))
    whole.write_bytes(whole.read_bytes()[:800])
    clear = np.dstack([draw((5, 7, 3)), draw()])
    save(tmp_path / "c.png", clear)
    for name, words in (("a", "cannot be read"), ("b", "cannot be read"), ("c", "transparent")):
        with pytest.raises(InputError, match=rf"{name}\.png: .*{words}"):
            read_image([tmp_path / f"{name}.png"], 3 if name == "c" else 1)
    with pytest.raises(InputError, match="no such file"):
        read_image([tmp_path / "none.png"], 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "raw.tif", "deflate.tif", "lzw.tif"])
def test_more_pixels_than_a_file_can_hold_are_refused_before_it_is_decoded(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    options = {"raw.tif": {}, "deflate.tif": {"compression": "tiff_adobe_deflate"}}
    options |= {"lzw.tif": {"compression": "tiff_lzw"}}
    Image.fromarray(draw((16, 16))).save(path, **options.get(suffix, {}))
    content = bytearray(path.read_bytes())
    size = 12_000
    if suffix == "jpg":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", size, size)
    elif suffix == "png":
        content[16:24] = struct.pack(">II", size, size)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        (start,) = struct.unpack("<I", content[4:8])
        for place in range(start + 2, start + 2 + 12 * content[start], 12):
            if content[place : place + 2] in (b"\x00\x01", b"\x01\x01", b"\x16\x01"):
                content[place + 8 : place + 10] = struct.pack("<H", size)
    path.write_bytes(content)
    for read in (lambda: read_image([path], 1), lambda: read_geometry(path)):
        with pytest.raises(InputError, match=r"12000 x 12000 pixels, .* bytes can hold"):
            read()


def test_label_values_are_gray_values_or_indices_of_a_palette(tmp_path):
    array = np.array([[0, 255, 7]], np.uint8)
    for path in (save(tmp_path / "a.png", array), save(tmp_path / "a.tif", array)):
        classes, _ = read_label(path, (0, 255), 7)
        assert classes.ravel().tolist() == [0, 1, 255]
    palette = Image.fromarray(np.array([[0, 2, 1]], np.uint8), mode="P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "p.png")
    assert read_label(tmp_path / "p.png", (0, 1, 2), None)[0].ravel().tolist() == [0, 2, 1]
    with pytest.raises(InputError, match=r"label values \[255\]"):
        read_label(tmp_path / "a.png", (0, 7), None)


def test_labels_in_color_and_as_jpeg_are_refused(tmp_path):
    with pytest.raises(InputError, match="one class value a pixel"):
        read_label(save(tmp_path / "a.png", draw((5, 7, 3))), (0, 1), None)
    with pytest.raises(InputError, match="save labels as PNG or TIFF"):
        read_label(save(tmp_path / "a.jpg", draw()), (0, 1), None)


@pytest.mark.parametrize("label_values", [(0, 1, 2), (0, 255, 128), (0, 300, 4)])
@pytest.mark.parametrize(("suffix", "pages"), [(".png", 1), (".tif", 1), (".tiff", 3)])
def test_a_mask_round_trips_with_its_values_shape_and_orientation(
    tmp_path, suffix, pages, label_values
):
    classes = np.random.default_rng(0).integers(0, 3, (4, 6, pages)).astype(np.uint8)
    path = tmp_path / f"mask{suffix}"
    write_mask(path, classes, np.eye(4), label_values)
    np.testing.assert_array_equal(read_label(path, label_values, None)[0], classes)
    first = np.asarray(Image.open(path))  # as any other program sees it
    np.testing.assert_array_equal(first, np.array(label_values)[classes[..., 0]])
    assert list(tmp_path.iterdir()) == [path]


def test_a_map_of_classes_is_a_tiff_of_a_page_for_each_class_and_slice(tmp_path):
    array = np.random.default_rng(0).random((4, 5, 2, 3)).astype(np.float32)
    write_map(tmp_path / "map.tiff", array, np.eye(4))
    found = read_image([tmp_path / "map.tiff"], 1).array[0]
    np.testing.assert_array_equal(found.reshape(4, 5, 3, 2), np.moveaxis(array, -1, 2))


def test_what_a_format_cannot_hold_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot hold"):
        write_mask(tmp_path / "a.png", np.zeros((3, 3, 2), np.uint8), np.eye(4), (0, 1))
    with pytest.raises(InputError, match=r"no mask in PNG holds the label values .*65535"):
        write_mask(tmp_path / "a.png", np.ones((3, 3, 1), np.uint8), np.eye(4), (0, 70_000))


def test_label_values_that_no_mask_can_hold_are_refused_before_a_training(tmp_path):
    for suffix, is_refused in (("png", True), ("jpg", True), ("tif", False)):
        root = tmp_path / suffix
        for index in range(3):
            save(root / "images" / f"a{index}.{suffix}", draw((8, 8)) + index)
            label = (draw((8, 8)) % 2).astype(np.int32) * 70_000
            save(root / "labels" / f"a{index}.tif", label)
        dataset = read_dataset(root)
        problems = check_dataset(dataset, split_cases(dataset, DataSection(), "auto")).problems
        assert [("70000" in text and "65535" in text) for text in problems] == [True] * is_refused


def test_a_folder_of_pictures_is_read_with_its_colors_and_nifti_wins_over_previews(tmp_path):
    save(tmp_path / "images" / "a.jpg", draw((8, 8, 3)))
    save(tmp_path / "images" / "b.png", draw((8, 8, 3)))
    save(tmp_path / "labels" / "a.png", draw((8, 8)) % 2)
    save(tmp_path / "unlabeled" / "c.tif", draw((8, 8, 3)))
    dataset = read_dataset(tmp_path)
    assert dataset.channels == ("red", "green", "blue")
    assert [c.case_id for c in dataset.cases] == ["a", "b", "c"]
    assert [c.label is not None for c in dataset.cases] == [True, False, False]
    (tmp_path / "images" / "a.nii.gz").touch()
    (tmp_path / "labels" / "a.nii.gz").touch()
    (tmp_path / "unlabeled" / "c.tif").unlink()
    scan = read_dataset(tmp_path)
    assert [c.images[0].name for c in scan.cases] == ["a.nii.gz"]
    assert scan.channels == ("",)


def test_nifti_and_pictures_in_one_list_are_refused(tmp_path):
    save(tmp_path / "a.png", draw())
    (tmp_path / "b.nii.gz").touch()
    (tmp_path / "cases.csv").write_text("case_id,image\na,a.png\nb,b.nii.gz\n")
    with pytest.raises(InputError, match="are mixed"):
        read_dataset(tmp_path)


def test_the_check_counts_in_pixels_and_offers_to_name_255(tmp_path):
    write_pictures(tmp_path, 2, 1, 0, shape=(24, 28), label_values=(0, 255, 255, 255))
    dataset = read_dataset(tmp_path)
    result = check_dataset(dataset, split_cases(dataset, DataSection(), "auto"))
    (problem,) = result.problems
    assert "label value 255 is not declared" in problem
    assert "data.labels.255=name" in problem
    named = read_dataset(tmp_path, labels={255: "organ"})
    text = check_dataset(named, split_cases(named, DataSection(), "auto")).render()
    assert "median px" in text
    assert "rows (I), pixels" in text
    assert not re.search(r"\bmm\b|\bml\b|spacing", text)
    assert text.endswith("OK")


def test_a_label_of_another_size_is_a_problem_of_the_check(tmp_path):
    write_pictures(tmp_path, 1, 0, 0, shape=(24, 28))
    save(tmp_path / "labels" / "organs_000.png", np.zeros((28, 24), np.uint8))
    dataset = read_dataset(tmp_path)
    result = check_dataset(dataset, split_cases(dataset, DataSection(), "auto"))
    assert "shape (28, 24, 1) differs from (24, 28, 1) of the image" in result.problems[0]


def test_a_picture_is_cached_as_one_slice_on_the_identity_with_no_spacing(tmp_path):
    path = save(tmp_path / "a.jpg", draw((16, 24)))
    label = save(tmp_path / "a.png", (draw((16, 24)) > 120).astype(np.uint8))
    case = Case("a", (path,), label, "a")
    found = build_cache([case], RECIPE, tmp_path / "cache", (0, 1), None, 1)["a"]
    assert found.shape == found.native_shape == (16, 24, 1)
    np.testing.assert_array_equal(found.affine, np.eye(4))
    assert (found.has_spacing, found.mask_suffix) == (False, ".png")
    np.testing.assert_array_equal(found.label()[..., 0], np.asarray(Image.open(label)))


def test_numbered_pictures_in_color_are_scans_of_their_own(tmp_path):
    for name in ("frame_0000", "frame_0001"):
        save(tmp_path / f"{name}.png", draw((8, 8, 3)))
    assert sorted(find_scans([tmp_path], 3, [], [])) == ["frame_0000", "frame_0001"]


# What Pillow would change or leave out without a word


def write_tiff(path, pages, order="<", compress=False, photometric=1, planar=1, bits=0, tags=()):
    """Write a TIFF byte by byte: pages (rows, columns[, samples]), tags (number, type, values)."""
    out, link = bytearray({"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 0)), 4
    for page in pages:
        samples = page.shape[2] if page.ndim == 3 else 1
        array = page.astype(page.dtype.newbyteorder(order))
        planes = [array[..., i] for i in range(samples)] if planar == 2 and samples > 1 else [array]
        strips = [plane.tobytes() for plane in planes]
        strips = [zlib.compress(strip) for strip in strips] if compress else strips
        offsets = []
        for strip in strips:
            offsets.append(len(out))
            out += strip + bytes(len(strip) % 2)
        own = {
            **{256: (4, [page.shape[1]]), 257: (4, [page.shape[0]]), 278: (4, [page.shape[0]])},
            **{258: (3, [bits or 8 * page.itemsize] * samples), 277: (3, [samples])},
            **{259: (3, [8 if compress else 1]), 262: (3, [photometric]), 284: (3, [planar])},
            **{339: (3, ["uif".index(page.dtype.kind) + 1] * samples), 273: (4, offsets)},
            **{279: (4, [len(strip) for strip in strips])},
        }
        own |= {number: (kind, values) for number, kind, values in tags}
        entries = b""
        for number, (kind, values) in sorted(own.items()):
            code = {3: "H", 4: "I"}.get(kind)
            raw = struct.pack(order + code * len(values), *values) if code else bytes(values)
            if len(raw) > 4:
                place = len(out)
                out += raw + bytes(len(raw) % 2)
                raw = struct.pack(order + "I", place)
            entries += struct.pack(order + "HHI", number, kind, len(values)) + raw.ljust(4, b"\0")
        out[link : link + 4] = struct.pack(order + "I", len(out))
        out += struct.pack(order + "H", len(entries) // 12) + entries
        link = len(out)
        out += bytes(4)
    path.write_bytes(out)
    return path


def describe(text):
    return [(270, 2, text.encode() + b"\0")]


OME = '<?xml version="1.0"?><OME><Pixels SizeC="%d" SizeT="%d" SizeX="8" SizeY="6" SizeZ="%d"/>'


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
)
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("planar", [1, 2])
def test_a_tiff_of_any_numbers_is_read_exactly_or_refused(
    tmp_path, order, compress, dtype, samples, planar
):
    values = np.random.default_rng(0).integers(-(2**31), 2**31, (6, 8, samples))
    page = values.astype(dtype) if dtype[0] in "ui" else values.astype(dtype) / 1000
    page = page[..., 0] if samples == 1 else page
    photometric = 2 if samples > 2 else 1
    path = write_tiff(tmp_path / "a.tif", [page], order, compress, photometric, planar)
    num_channels = 3 if samples > 2 else 1
    usual = samples == planar == 1 and dtype in ("uint8", "uint16")
    try:
        found = read_image([path], num_channels).array[..., 0]
    except InputError:
        assert not usual
        return
    wanted = np.moveaxis(page.reshape(6, 8, samples), -1, 0).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("text", "num_pages", "problem"),
    [
        ("ImageJ=1.53t\nimages=10\nslices=10\n", 1, "10 slices"),
        ("ImageJ=1.53t\nimages=6\nchannels=2\nslices=3\nhyperstack=true\n", 6, "2 channels"),
        ("ImageJ=1.53t\nimages=6\nframes=6\nhyperstack=true\n", 6, "6 times"),
        ("ImageJ=1.53t\nimages=3\nslices=3\nloop=false\n", 3, ""),
        ("ImageJ=1.53t\nimages=3\nloop=false\n", 3, ""),
        ("ImageJ=1.53t\nmin=0.0\nmax=255.0\n", 1, ""),
        (OME % (2, 1, 3), 6, "2 channels"),
        (OME % (1, 6, 1), 6, "6 times"),
        (OME % (1, 1, 9), 3, "9 slices"),
        (OME % (1, 1, 3), 3, ""),
        ('{"shape": [2, 3, 6, 8]}', 6, "2 channels"),
        ('{"shape": [3, 6, 8], "truncated": true}', 1, "3 slices"),
        ('{"shape": [3, 6, 8]}', 3, ""),
        ('{"shape": "of the liver"', 3, ""),
        ("a scan of the liver, slices=9", 3, ""),
    ],
)
def test_slices_without_a_page_and_other_axes_than_slices_are_refused(
    tmp_path, text, num_pages, problem
):
    pages = [draw((6, 8), seed=seed) for seed in range(num_pages)]
    path = write_tiff(tmp_path / "a.tif", pages, tags=describe(text))
    if problem:
        with pytest.raises(InputError, match=problem):
            read_image([path], 1)
        with pytest.raises(InputError, match=problem):
            read_label(path, (0, 1), None)
    else:
        np.testing.assert_array_equal(read_image([path], 1).array[0], np.stack(pages, -1))


def test_pages_in_color_with_a_description_of_slices_are_read(tmp_path):
    pages = [draw((6, 8, 3), seed=seed) for seed in range(2)]
    for text in ("ImageJ=1.53t\nimages=2\nslices=2\n", OME % (3, 1, 2), '{"shape": [2, 6, 8, 3]}'):
        path = write_tiff(tmp_path / "a.tif", pages, photometric=2, tags=describe(text))
        assert read_image([path], 3).array.shape == (3, 6, 8, 2)


def test_other_oddities_of_pictures_are_refused_with_a_repair(tmp_path):
    page = draw((6, 8))
    write_tiff(tmp_path / "white.tif", [page], photometric=0)
    write_tiff(tmp_path / "mask.tif", [page, page], tags=[(254, 4, [4])])
    write_tiff(tmp_path / "stk.tif", [page], tags=[(33629, 4, [3])])
    write_tiff(tmp_path / "large.tif", [page.astype(np.uint32) + 2**31])
    write_tiff(tmp_path / "sizes.tif", [page, page[:3]])
    write_tiff(tmp_path / "cmyk.tif", [draw((6, 8, 4))], photometric=5)
    Image.fromarray(page).save(
        tmp_path / "moves.png", save_all=True, append_images=[Image.fromarray(page + 1)]
    )
    problems = {
        **{"white.tif": "MinIsWhite", "mask.tif": "page 2 is a smaller copy or a mask"},
        **{"stk.tif": "MetaMorph", "large.tif": "above 2147483647", "cmyk.tif": "CMYK"},
        **{"sizes.tif": "one kind", "moves.png": "animation"},
    }
    for name, words in problems.items():
        with pytest.raises(InputError, match=rf"{re.escape(name)}.*{words}"):
            read_image([tmp_path / name], 3 if name == "cmyk.tif" else 1)


def write_png(path, array, bits, kind):
    def chunk(name, body):
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    rows = b"".join(b"\0" + row.tobytes() for row in array)
    width = array.shape[1] * (8 // bits if bits < 8 else 1)
    head = struct.pack(">IIBBBBB", width, len(array), bits, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_a_png_of_16_bits_is_read_in_gray_and_refused_in_color(tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (4, 5, 3)).astype(">u2")
    gray = write_png(tmp_path / "gray.png", array[..., 0], 16, 0)
    np.testing.assert_array_equal(read_image([gray], 1).array[0, ..., 0], array[..., 0])
    with pytest.raises(InputError, match=r"rgb\.png: has 16 bits a color"):
        read_image([write_png(tmp_path / "rgb.png", array, 16, 2)], 3)


def test_a_label_of_few_bits_that_programs_stretch_is_refused(tmp_path):
    path = write_png(tmp_path / "a.png", np.array([[0b00011011]], np.uint8), 2, 0)
    with pytest.raises(InputError, match=r"a\.png: has 2 or 4 bits a pixel"):
        read_label(path, (0, 85, 170, 255), None)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_the_last_bytes_of_a_compressed_picture_are_compared_too(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_mask(path, (draw((64, 60, 1)) % 2).astype(np.uint8), np.eye(4), (0, 1))
    whole = path.read_bytes()
    if suffix == ".png":
        end = whole.index(b"IEND") - 4
    else:
        with Image.open(path) as image:
            end = image.tag_v2[273][0] + image.tag_v2[279][0]
    for place in range(end - 8, end):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        for read in (lambda: read_label(path, (0, 1), None), lambda: read_image([path], 1)):
            with pytest.raises(InputError, match=path.name):
                read()


# Palettes


RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def save_palette(path, array, colors):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8), mode="P")
    image.putpalette([value for color in colors for value in color])
    image.save(path)
    return path


def check_labels(tmp_path, suffix=".png", **labels):
    """Check a folder of pictures with these labels, (array, palette) or a gray array."""
    for seed, (name, label) in enumerate(labels.items()):
        save(tmp_path / "images" / f"{name}.png", draw((2, 2), seed=seed))
        path = tmp_path / "labels" / f"{name}{suffix}"
        save_palette(path, *label) if isinstance(label, tuple) else save(path, label)
    dataset = read_dataset(tmp_path)
    return check_dataset(dataset, split_cases(dataset, DataSection(), "auto"))


TWO = [[0, 1], [2, 1]]
BLACK = (0, 0, 0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_palettes_that_number_the_same_color_otherwise_are_refused(tmp_path, suffix):
    first, second = [BLACK, RED, GREEN], [BLACK, GREEN, RED]
    result = check_labels(tmp_path, suffix, a=(TWO, first), b=(TWO, second))
    (problem,) = result.problems
    assert "value 1 is RGB (200, 0, 0) in" in problem
    assert f"a{suffix} and RGB (0, 200, 0) in" in problem
    assert "one palette" in problem


def test_a_color_that_has_another_index_is_found_where_no_index_is_shared(tmp_path):
    one, two = [[0, 1], [0, 1]], [[0, 2], [0, 2]]
    result = check_labels(tmp_path, a=(one, [BLACK, RED]), b=(two, [BLACK, BLUE, RED]))
    assert "the color RGB (200, 0, 0) is 1 in" in result.problems[0]


def test_palettes_that_differ_where_no_pixel_is_are_the_same(tmp_path):
    short, long = [BLACK, RED, GREEN], [BLACK, RED, GREEN, BLUE, RED]
    gray = np.array(TWO, np.uint8)  # the same indices, saved without the palette
    result = check_labels(tmp_path, a=(TWO, short), b=(TWO, long), c=gray)
    assert result.problems == ()
    assert result.palette[1] == RED


def test_black_and_white_of_other_values_are_refused(tmp_path):
    white = np.array([[0, 255], [255, 0]], np.uint8)
    result = check_labels(tmp_path, a=white, b=(white // 255, [BLACK, (255,) * 3]))
    assert "RGB (255, 255, 255) is 255 in" in " ".join(result.problems)


def test_a_palette_of_one_color_leaves_the_index_to_decide(tmp_path):
    blank = [BLACK] * 3
    assert check_labels(tmp_path, a=(TWO, blank), b=(TWO, blank)).problems == ()


def test_pages_of_a_label_have_one_palette(tmp_path):
    pages = []
    for colors in ([BLACK, RED, GREEN], [BLACK, GREEN, RED]):
        path = save_palette(tmp_path / "page.png", TWO, colors)
        pages.append(Image.open(path))
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=r"a\.tif: .* in page 1 and .* in page 2"):
        read_label(tmp_path / "a.tif", (0, 1, 2), None)


def test_most_pictures_say_whether_a_set_is_in_color_and_a_damaged_one_nothing(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    save(folder / "b.png", draw((5, 7, 3)))
    for name in "cde":
        save(folder / f"{name}.png", draw())
    (tmp_path / "labels").mkdir()
    save(tmp_path / "labels" / "c.png", draw())
    assert read_dataset(tmp_path).channels == ("",)
    for name in "cd":
        save(folder / f"{name}.png", draw((5, 7, 3)))
    assert read_dataset(tmp_path).channels == ("red", "green", "blue")
