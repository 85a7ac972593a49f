"""Bad and odd inputs by the hundred, through check, train and predict as a user calls them.

Each ends in the right result, or in a sentence with case, file, value and repair at exit code 2;
the good cases beside it and all files of the user stay as they are. Scans of one kind share a data
set: one command names all of them.
"""

import gzip
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from commands import run_command
from PIL import Image

pytestmark = pytest.mark.usefixtures("brief")

SHAPE = (12, 11, 10)
AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])
TINY = [
    "rounds=0",
    "steps=2",
    "plan.patch_size=[8,8,8]",
    "network.depth=3",
    "network.width=0.5",
    "train.batch=2",
    "tracking.uri=none",
    "train.device=cpu",
    "train.workers=0",
]
TINY_2D = [*TINY[:2], "plan.patch_size=[32,32]", *TINY[3:]]
MOST_SECONDS = 20.0  # of processor time; most commands take a tenth
MOST_BYTES = 2**30


def medssl(*arguments: object) -> tuple[int, str]:
    """Run a command within the bounds of time and memory."""
    started, before = time.process_time(), psutil.Process().memory_info().rss
    result = run_command(*arguments)
    assert time.process_time() - started < MOST_SECONDS, f"{arguments} took too long"
    assert psutil.Process().memory_info().rss - before < MOST_BYTES
    return result


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its label."""
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(2, size - 3) if size > 5 else slice(None) for size in shape)] = 1
    noise = np.random.default_rng(seed).normal(0, 5, shape)
    return (40 + 50 * label + noise).astype(np.float32), label


def save(
    path: Path, array: np.ndarray, affine: np.ndarray | None = AFFINE, **header: object
) -> Path:
    """Write a NIfTI file, with fields of the header as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    for name, value in header.items():
        image.header[name] = value
    image.header["vox_offset"] = 352
    if header:  # nibabel writes the affine over the fields otherwise
        content = image.header.binaryblock + b"\0" * 4 + array.tobytes(order="F")
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    else:
        nib.save(image, path)
    return path


def snapshot(root: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def make_set(root: Path, labeled: int = 3, unlabeled: int = 1) -> Path:
    """Write a sound data set of images/ and labels/."""
    for index in range(labeled + unlabeled):
        image, label = draw(index)
        save(root / "images" / f"good{index}.nii.gz", image)
        if index < labeled:
            save(root / "labels" / f"good{index}.nii.gz", label)
    return root


@dataclass(frozen=True)
class Row:
    """An input: its name, how it is written, and what has to be said of it, if anything."""

    name: str
    write: Callable[[Path], object]
    words: str = ""


def say_of(row: Row, text: str) -> str:
    """Return the lines that name a row; one that says the same as the line before, with that."""
    lines = ["", *text.splitlines()]
    return "\n".join(
        f"{before} {line}" if "the same in" in line else line
        for before, line in itertools.pairwise(lines)
        if row.name.partition(".")[0] in line
    )


def tilt(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turned @ AFFINE


def with_forms(
    sform: np.ndarray | None, qform: np.ndarray | None, units: str = "mm", scale: float = 1
) -> Callable[[Path], object]:
    """Return what writes a scan with two forms; None has code 0."""

    def write(path: Path) -> None:
        image = nib.Nifti1Image(draw(7)[0], None)
        image.header.set_zooms([z * scale for z in (1.5, 1.5, 2.0)])
        grow = np.diag([scale, scale, scale, 1])
        image.set_sform(None if sform is None else grow @ sform, code=0 if sform is None else 1)
        image.set_qform(None if qform is None else grow @ qform, code=0 if qform is None else 1)
        image.header.set_xyzt_units(units)
        nib.save(image, path)

    return write


def in_type(dtype: str) -> Callable[[Path], object]:
    return lambda path: save(path, draw(8)[0].astype(dtype))


def shifted(distance: float) -> np.ndarray:
    moved = AFFINE.copy()
    moved[0, 3] += distance
    return moved


def skewed(amount: float) -> np.ndarray:
    moved = AFFINE.copy()
    moved[0, 1] += amount
    return moved


def scaled(path: Path) -> None:
    image = nib.Nifti1Image((draw(9)[0] * 4).astype(np.int16), AFFINE)
    image.header.set_slope_inter(0.25, -100)
    nib.save(image, path)


def big_endian(path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    nib.save(nib.Nifti1Image(draw(10)[0].astype(">i2"), AFFINE, header), path)


def two_members(path: Path) -> None:
    content = nib.Nifti1Image(draw(11)[0], AFFINE).to_bytes()
    path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))


def save_extension(path: Path) -> None:
    image = nib.Nifti1Image(draw(18)[0], AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    image.header["descrip"] = b"Doe^Jane"
    nib.save(image, path)


GOOD_SCANS = [
    *(
        Row(f"type_{dtype}", in_type(dtype))
        for dtype in ("uint8", "int8", "int16", "uint16", "int32", "uint32", "float64")
    ),
    Row("big_endian", big_endian),
    Row("second_nifti", lambda p: nib.save(nib.Nifti2Image(draw(12)[0], AFFINE), p)),
    Row("scaled", scaled),
    Row("two_members", two_members),
    Row("sform_only", with_forms(AFFINE, None)),
    Row("qform_only", with_forms(None, AFFINE)),
    Row("no_forms", with_forms(None, None)),
    Row("metre", with_forms(AFFINE, AFFINE, "meter", 1e-3), "meter"),
    Row("micron", with_forms(AFFINE, AFFINE, "micron", 1e3), "micron"),
    Row("no_unit", with_forms(AFFINE, AFFINE, "unknown")),
    Row("oblique", lambda p: save(p, draw(13)[0], tilt(25))),
    Row("flipped", lambda p: save(p, draw(14)[0], np.diag([-1.5, -1.5, 2.0, 1]))),
    Row("turned_axes", lambda p: save(p, draw(15)[0], AFFINE[[2, 0, 1, 3]])),
    Row("forms_disagree", with_forms(AFFINE, shifted(30)), r"qform"),
    Row("forms_mirrored", with_forms(AFFINE, np.diag([-1.5, 1.5, 2.0, 1])), r"qform"),
    Row("skewed", with_forms(skewed(0.002), AFFINE)),
    Row("one_volume", lambda p: save(p, draw(16)[0][..., None])),
    Row("blank", lambda p: save(p, np.full(SHAPE, 7, np.float32)), r"blank|constant|same value"),
    Row("thin", lambda p: save(p, draw(17, (12, 11, 2))[0])),
    Row("with_extension", save_extension),
]


def cut(path: Path, share: float = 0.6) -> None:
    content = gzip.compress(nib.Nifti1Image(draw(20)[0], AFFINE).to_bytes())
    path.write_bytes(content[: int(share * len(content))])


def flip_bit(path: Path) -> None:
    content = bytearray(gzip.compress(nib.Nifti1Image(draw(21)[0], AFFINE).to_bytes(), 0))
    content[-200] ^= 4  # stored, not deflated: the voxels change, nothing else does
    path.write_bytes(bytes(content))


def declare_more(path: Path) -> None:
    save(path, draw(22)[0], dim=[3, 1200, 1200, 1200, 1, 1, 1, 1])


def with_sform(value: float, *place: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        rows = AFFINE.copy()
        rows[place or (0, 0)] = value
        save(path, draw(23)[0], None, sform_code=1, srow_x=rows[0], srow_y=rows[1], srow_z=rows[2])

    return write


def with_voxel(value: float) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        image = draw(24)[0]
        image[3, 3, 3] = value
        save(path, image)

    return write


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD_SCANS = [
    Row("cut_short", cut, "damaged|incomplete"),
    Row("cut_in_header", lambda p: cut(p, 0.02), "damaged|incomplete|cannot be read"),
    Row("bit_flipped", flip_bit, "damaged|checksum|CRC"),
    Row("empty", lambda p: p.write_bytes(b""), "empty|cannot be read"),
    Row("text", lambda p: p.write_text("<html>404</html>" * 50), "web page"),
    Row(
        "plain", lambda p: p.write_bytes(nib.Nifti1Image(draw(25)[0], AFFINE).to_bytes()), "rename"
    ),
    Row("declares_more", declare_more, "declares|holds"),
    Row("sform_nan", with_sform(np.nan), "affine|nan"),
    Row("sform_zero", with_sform(0.0), "affine|flat"),
    Row("sform_1e30", with_sform(1e30), "mm"),
    Row("sform_1e5", with_sform(1e5), "mm"),
    Row("sform_1e-30", with_sform(1e-30), "mm|flat|affine"),
    Row("sform_0.001", with_sform(0.001), "mm"),
    Row("origin_inf", with_sform(np.inf, 1, 3), "affine|inf"),
    Row(
        "rgb",
        lambda p: nib.save(nib.Nifti1Image(np.zeros(SHAPE, RGB), AFFINE), p),
        "numbers|gr[ae]y",
    ),
    Row("complex", lambda p: save(p, draw(26)[0].astype(np.complex64)), "numbers|complex"),
    Row("not_a_number", with_voxel(np.nan), "NaN|not finite|nan"),
    Row("infinite", with_voxel(np.inf), "inf|not finite"),
    Row(
        "four_volumes", lambda p: save(p, np.stack([draw(i)[0] for i in range(4)], -1)), "channels"
    ),
    Row(
        "five_axes", lambda p: save(p, draw(27)[0][..., None, None].repeat(3, -1)), "channels|shape"
    ),
]


def label_with(value: float, dtype: str = "float32") -> Callable[[Path], object]:
    def write(path: Path) -> None:
        label = draw(0)[1].astype(dtype)
        label[5, 5, 5] = value
        save(path, label)

    return write


GOOD_LABELS = [
    *(
        Row(f"label_{d}", lambda p, d=d: save(p, draw(0)[1].astype(d)))
        for d in ("int16", "int32", "float32", "float64", "uint16")
    ),
    Row("label_of_a_hair", lambda p: save(p, draw(0)[1], AFFINE + 1e-5)),
    Row("label_one_volume", lambda p: save(p, draw(0)[1][..., None])),
    Row("label_empty", lambda p: save(p, np.zeros(SHAPE, np.uint8))),
    Row("label_nearly_integer", label_with(1.0004)),
]
BAD_LABELS = [
    Row("label_of_halves", label_with(0.5), "not integers"),
    Row("label_not_a_number", label_with(np.nan), "not integers|NaN|nan"),
    Row("label_negative", label_with(-1, "int16"), "-1"),
    Row("label_of_another_shape", lambda p: save(p, draw(0, (11, 11, 10))[1]), "shape"),
    Row("label_beside", lambda p: save(p, draw(0)[1], shifted(3)), "voxels beside"),
    Row(
        "label_mirrored", lambda p: save(p, draw(0)[1], np.diag([-1.5, 1.5, 2, 1])), "voxels beside"
    ),
    Row("label_is_an_image", lambda p: save(p, (20 * draw(0)[0]).astype(np.int16)), "image"),
    Row("label_of_two_volumes", lambda p: save(p, np.stack([draw(0)[1]] * 2, -1)), "label is"),
    Row("label_cut", cut, "damaged|incomplete"),
]


def fill(root: Path, scans: list[Row], labels: list[Row]) -> None:
    """Write a sound set with odd scans, which are unlabeled, and odd labels of sound scans."""
    make_set(root)
    for row in scans:
        row.write(root / "images" / f"{row.name}.nii.gz")
    for number, row in enumerate(labels):
        save(root / "images" / f"{row.name}.nii.gz", draw(100 + number)[0])
        row.write(root / "labels" / f"{row.name}.nii.gz")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run of two steps on a sound set."""
    root = tmp_path_factory.mktemp("sound")
    code, said = medssl("train", make_set(root / "data"), *TINY, "--run", root / "run")
    assert code in (0, 3), said
    return root / "run"


def run_commands(root, settings, model=None):
    """What check, train and predict said of root/data, which none may change."""
    data, run, out = root / "data", root / "run", root / "masks"
    before = snapshot(data)
    said = {
        "check": medssl("check", data),
        "train": medssl("train", data, *settings, "--run", run),
        "predict": medssl("predict", model or run, data / "images", "--out", out),
    }
    assert snapshot(data) == before
    return {**said, "data": data, "run": run, "out": out}


@pytest.fixture(scope="module")
def good(tmp_path_factory, model):
    """What the three commands said of odd but good scans, and where the masks are."""
    root = tmp_path_factory.mktemp("good")
    fill(root / "data", GOOD_SCANS, GOOD_LABELS)
    return run_commands(root, TINY, model)


def test_odd_but_good_scans_pass_check_train_and_predict(good):
    assert good["check"][0] == 0, good["check"][1]
    assert good["train"][0] in (0, 3), good["train"][1]
    assert good["predict"][0] == 0, good["predict"][1]


@pytest.mark.parametrize("row", GOOD_SCANS, ids=lambda row: row.name)
def test_a_mask_lies_on_its_scan_and_what_is_odd_is_said(good, row):
    scan = nib.load(good["data"] / "images" / f"{row.name}.nii.gz")
    mask = nib.load(good["out"] / f"{row.name}.nii.gz")
    assert mask.shape == scan.shape[:3]
    np.testing.assert_allclose(mask.affine, scan.affine, rtol=1e-5, atol=1e-6)
    assert mask.header.get_xyzt_units()[0] == scan.header.get_xyzt_units()[0]
    assert b"Doe" not in gzip.decompress((good["out"] / f"{row.name}.nii.gz").read_bytes())
    assert re.search(row.words, say_of(row, good["check"][1])), good["check"][1]


@pytest.fixture(scope="module")
def bad(tmp_path_factory, model):
    """What the three commands said of bad scans and labels among good ones."""
    root = tmp_path_factory.mktemp("bad")
    fill(root / "data", BAD_SCANS, BAD_LABELS)
    return run_commands(root, TINY, model)


def test_bad_scans_stop_check_and_train_and_not_the_others_in_predict(bad):
    assert bad["check"][0] == bad["train"][0] == 2
    assert not (bad["run"] / "model").exists()
    assert bad["predict"][0] == 1, bad["predict"][1]
    written = {path.name[:-7] for path in bad["out"].glob("*.nii.gz")}
    assert {"good0", "good1", "good2", "good3"} | {row.name for row in BAD_LABELS} <= written
    assert not written & {row.name for row in BAD_SCANS}


@pytest.mark.parametrize("command", ["check", "train", "predict"])
@pytest.mark.parametrize("row", BAD_SCANS, ids=lambda row: row.name)
def test_a_bad_scan_is_named_with_what_is_wrong(bad, row, command):
    assert re.search(row.words, say_of(row, bad[command][1])), bad[command][1]


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("row", BAD_LABELS, ids=lambda row: row.name)
def test_a_bad_label_is_named_with_what_is_wrong(bad, row, command):
    assert re.search(row.words, say_of(row, bad[command][1])), bad[command][1]


def draw_picture(seed: int, size: tuple[int, int] = (40, 36)) -> tuple[np.ndarray, np.ndarray]:
    """Return a gray picture and its label."""
    label = np.zeros(size, np.uint8)
    label[8:30, 10:28] = 1
    noise = np.random.default_rng(seed).normal(0, 8, size)
    return (60 + 100 * label + noise).clip(0, 255).astype(np.uint8), label


def in_mode(mode: str, **options: object) -> Callable[[Path], object]:
    """Return what writes a gray picture in a mode of Pillow."""

    def write(path: Path) -> None:
        gray = draw_picture(3)[0]
        array = gray.astype({"I;16": "u2", "I": "i4", "F": "f4"}.get(mode, "u1"))
        picture = Image.fromarray(array)
        picture = picture if mode in ("I;16", "I", "F") else picture.convert(mode)
        picture.save(path, **options)

    return write


def turned_picture(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw_picture(4)[0]).save(path, exif=exif)


def transparent(path: Path) -> None:
    gray = draw_picture(5)[0]
    Image.fromarray(np.dstack([gray, gray, gray, gray])).save(path)


def hyperstack(path: Path) -> None:
    """Ten slices behind one page, as ImageJ writes stacks."""
    pages = np.stack([draw_picture(i)[0] for i in range(10)])
    about = "ImageJ=1.53\nimages=10\nslices=10\n"
    Image.fromarray(pages[0]).save(path, description=about)
    with path.open("ab") as file:
        file.write(pages[1:].tobytes())


def cut_picture(path: Path) -> None:
    Image.fromarray(draw_picture(6)[0]).save(path)
    path.write_bytes(path.read_bytes()[:300])


GOOD_PICTURES = [
    *(
        Row(f"png_{mode.replace(';', '')}.png", in_mode(mode))
        for mode in ("L", "LA", "I;16", "RGB", "RGBA")
    ),
    *(
        Row(f"tif_{mode.replace(';', '')}.tif", in_mode(mode))
        for mode in ("L", "I;16", "F", "RGB", "I")
    ),
    Row("picture_deflated.tiff", in_mode("L", compression="tiff_adobe_deflate")),
    Row("picture_jpeg.jpg", in_mode("L")),
    Row("picture_in_color.jpeg", in_mode("RGB")),
]
BAD_PICTURES = [
    Row("turned.jpg", turned_picture, "orientation"),
    Row("transparent.png", transparent, "transparen"),
    Row("cmyk.tif", in_mode("CMYK"), "CMYK"),
    Row("hyperstack.tif", hyperstack, "ImageJ|slices|images"),
    Row("cut.png", cut_picture, "damaged"),
    Row("empty.png", lambda p: p.write_bytes(b""), "damaged|empty|cannot be read"),
    Row("no_picture.png", lambda p: p.write_text("nothing"), "damaged|cannot be read"),
    Row(
        "in_color.png",
        lambda p: Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (40, 36, 3), np.uint8)
        ).save(p),
        "channels",
    ),
]
PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0]


def in_palette(path: Path, colors: list[int] = PALETTE) -> None:
    label = Image.fromarray(draw_picture(0)[1], "P")
    label.putpalette(colors)
    label.save(path)


BAD_PICTURE_LABELS = [
    Row(
        "label_in_color.png",
        lambda p: Image.fromarray(np.dstack([draw_picture(0)[1] * 255] * 3)).save(p),
        "colou?r",
    ),
    Row("label_jpeg.jpg", lambda p: Image.fromarray(draw_picture(0)[1] * 255).save(p), "JPEG"),
    Row(
        "label_of_another_size.png",
        lambda p: Image.fromarray(draw_picture(0, (30, 36))[1]).save(p),
        "shape",
    ),
    Row(
        "label_of_another_palette.png",
        lambda p: in_palette(p, [0, 0, 0, 0, 255, 0, 255, 0, 0]),
        "palette|colou?r",
    ),
]


def fill_pictures(root: Path, pictures: list[Row], labels: list[Row]) -> None:
    """Write a sound set of pictures with odd ones among them."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for index in range(4):
        picture, _ = draw_picture(40 + index)
        Image.fromarray(picture).save(root / "images" / f"good{index}.png")
        if index < 3:
            in_palette(root / "labels" / f"good{index}.png")
    for row in pictures:
        row.write(root / "images" / row.name)
    for number, row in enumerate(labels):
        stem = row.name.split(".")[0]
        size = draw_picture(70 + number)[0]
        Image.fromarray(size).save(root / "images" / f"{stem}.png")
        row.write(root / "labels" / row.name)


@pytest.fixture(scope="module")
def good_pictures(tmp_path_factory):
    """What the three commands said of odd but good pictures."""
    root = tmp_path_factory.mktemp("good_pictures")
    fill_pictures(root / "data", GOOD_PICTURES, [])
    return run_commands(root, TINY_2D)


def test_odd_but_good_pictures_pass_check_train_and_predict(good_pictures):
    assert good_pictures["check"][0] == 0, good_pictures["check"][1]
    assert good_pictures["train"][0] in (0, 3), good_pictures["train"][1]
    assert good_pictures["predict"][0] == 0, good_pictures["predict"][1]


@pytest.mark.parametrize("row", GOOD_PICTURES, ids=lambda row: row.name)
def test_a_mask_has_the_size_of_its_picture(good_pictures, row):
    stem, _, suffix = row.name.partition(".")
    mask = good_pictures["out"] / f"{stem}.{'png' if suffix[0] == 'j' else suffix}"
    assert np.asarray(Image.open(mask)).shape == (40, 36)


@pytest.fixture(scope="module")
def bad_pictures(tmp_path_factory, good_pictures):
    """What the three commands said of bad pictures among good ones."""
    root = tmp_path_factory.mktemp("bad_pictures")
    fill_pictures(root / "data", BAD_PICTURES, BAD_PICTURE_LABELS)
    return run_commands(root, TINY_2D, good_pictures["run"])


def test_bad_pictures_stop_check_and_train_and_not_the_others_in_predict(bad_pictures):
    assert bad_pictures["check"][0] == bad_pictures["train"][0] == 2
    assert bad_pictures["predict"][0] == 1, bad_pictures["predict"][1]
    written = {path.name for path in bad_pictures["out"].glob("*.png")}
    assert {"good0.png", "good3.png"} <= written
    assert not written & {f"{row.name.split('.')[0]}.png" for row in BAD_PICTURES}


@pytest.mark.parametrize("command", ["check", "train", "predict"])
@pytest.mark.parametrize("row", BAD_PICTURES, ids=lambda row: row.name)
def test_a_bad_picture_is_named_with_what_is_wrong(bad_pictures, row, command):
    assert re.search(row.words, say_of(row, bad_pictures[command][1])), bad_pictures[command][1]


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("row", BAD_PICTURE_LABELS, ids=lambda row: row.name)
def test_a_bad_label_picture_is_named_with_what_is_wrong(bad_pictures, row, command):
    assert re.search(row.words, say_of(row, bad_pictures[command][1])), bad_pictures[command][1]


def write_list(root: Path, text: str, name: str = "cases.csv", encoding: str = "utf-8") -> None:
    (root / name).write_bytes(text.encode(encoding))


HEAD = "case_id,image,label,patient_id,split\n"
LINES = "".join(
    f"g{i},images/good{i}.nii.gz,{f'labels/good{i}.nii.gz' if i < 3 else ''},,\n" for i in range(4)
)


def write_decathlon(root: Path, **changes: object) -> None:
    content = {
        "name": "toy",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "organ"},
        "training": [
            {"image": f"./images/good{i}.nii.gz", "label": f"./labels/good{i}.nii.gz"}
            for i in range(3)
        ],
        "test": ["./images/good3.nii.gz"],
        **changes,
    }
    write_list(root, json.dumps(content), "dataset.json")


def link(root: Path, name: str, target: Path | str) -> None:
    (root / name).symlink_to(target)


def rename(root: Path, old: str, new: str) -> None:
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)


def many_classes(root: Path, number: int) -> None:
    label = (np.arange(np.prod(SHAPE)) % number).reshape(SHAPE).astype(np.int16)
    for index in range(3):
        save(root / "labels" / f"good{index}.nii.gz", label)
    write_decathlon(root, labels={str(v): f"c{v}" for v in range(number)})


SETS = [
    Row("list", lambda r: write_list(r, HEAD + LINES)),
    Row("list_with_semicolons", lambda r: write_list(r, (HEAD + LINES).replace(",", ";"))),
    Row("list_with_tabs", lambda r: write_list(r, (HEAD + LINES).replace(",", "\t"))),
    Row(
        "list_of_a_spreadsheet",
        lambda r: write_list(r, "\ufeff" + (HEAD + LINES).replace("\n", "\r\n")),
    ),
    Row("list_in_utf_16", lambda r: write_list(r, HEAD + LINES, encoding="utf-16"), "UTF-8"),
    Row("list_with_open_quote", lambda r: write_list(r, HEAD + '"' + LINES), "quotation"),
    Row("list_without_rows", lambda r: write_list(r, HEAD), "no case"),
    Row("list_without_a_byte", lambda r: write_list(r, ""), "no case|empty|column"),
    Row(
        "list_names_twice",
        lambda r: write_list(r, HEAD + LINES + LINES[: LINES.index("\n") + 1]),
        "g0",
    ),
    Row(
        "list_misspells_a_column",
        lambda r: write_list(r, HEAD.replace("label", "lable") + LINES),
        "label",
    ),
    Row(
        "list_misspells_a_split",
        lambda r: write_list(r, HEAD + LINES.replace(",,\n", ",,tset\n")),
        "test",
    ),
    Row(
        "list_names_what_is_not_there",
        lambda r: write_list(r, HEAD + LINES.replace("good2", "god2")),
        "god2.*good2",
    ),
    Row(
        "list_with_a_row_too_long",
        lambda r: write_list(r, HEAD + LINES + "a,b,c,d,e,f,g\n"),
        "values for",
    ),
    Row(
        "list_climbs_with_a_case_id",
        lambda r: write_list(r, HEAD + LINES.replace("g1", "../g1")),
        "case_id",
    ),
    Row(
        "list_without_a_label",
        lambda r: write_list(
            r, "case_id,image\n" + "".join(f"g{i},images/good{i}.nii.gz\n" for i in range(3))
        ),
        "label",
    ),
    Row(
        "list_beside_folders_is_metadata", lambda r: write_list(r, "case_id,age,sex\ngood0,50,F\n")
    ),
    Row(
        "list_with_columns_of_people",
        lambda r: write_list(
            r, HEAD.replace("\n", ",age,scanner_model\n") + LINES.replace("\n", ",50,X\n")
        ),
    ),
    Row(
        "list_with_case_of_252_letters",
        lambda r: write_list(r, HEAD + LINES.replace("g1,", "g" * 252 + ",")),
        "letters|long|bytes",
    ),
    Row(
        "list_as_json",
        lambda r: write_list(
            r,
            json.dumps(
                [
                    {
                        "case_id": f"g{i}",
                        "image": f"images/good{i}.nii.gz",
                        "label": f"labels/good{i}.nii.gz",
                    }
                    for i in range(3)
                ]
            ),
            "cases.json",
        ),
    ),
    Row(
        "two_lists",
        lambda r: (write_list(r, HEAD + LINES), write_list(r, "[]", "cases.json")),
        "cases.csv and cases.json",
    ),
    Row("json_cut", lambda r: write_list(r, '{"training": [', "dataset.json"), "JSON"),
    Row(
        "json_with_a_key_twice",
        lambda r: write_list(r, '{"training": [], "training": []}', "dataset.json"),
        "twice",
    ),
    Row("json_of_brackets", lambda r: write_list(r, "[" * 100_000, "cases.json"), "JSON"),
    Row("json_is_a_number", lambda r: write_list(r, "5", "dataset.json"), "dataset.json"),
    Row("decathlon", write_decathlon),
    Row(
        "decathlon_with_validation",
        lambda r: write_decathlon(
            r,
            training=[
                {"image": "images/good0.nii.gz", "label": "labels/good0.nii.gz"},
                {"image": "images/good1.nii.gz", "label": "labels/good1.nii.gz"},
            ],
            validation=[{"image": "images/good2.nii.gz", "label": "labels/good2.nii.gz"}],
        ),
    ),
    Row(
        "decathlon_climbs_out",
        lambda r: write_decathlon(r, test=["../../../etc/good3.nii.gz"]),
        r"\.\./",
    ),
    Row("decathlon_of_numbers", lambda r: write_decathlon(r, training=[1, 2, 3]), "training"),
    Row(
        "decathlon_without_labels_named",
        lambda r: write_decathlon(r, labels={"1": "organ", "2": "organ"}),
        "organ",
    ),
    Row("classes_255", lambda r: many_classes(r, 255)),
    Row("classes_256", lambda r: many_classes(r, 256), "25[456]"),
    Row("no_labels_at_all", lambda r: [p.unlink() for p in (r / "labels").iterdir()], "label"),
    Row(
        "one_label_fits_no_scan",
        lambda r: rename(r, "labels/good1.nii.gz", "labels/god1.nii.gz"),
        "god1.*good1",
    ),
    Row(
        "link_to_nothing",
        lambda r: link(r, "images/gone.nii.gz", "/nowhere/gone.nii.gz"),
        "gone.nii.gz",
    ),
    Row("link_to_the_top", lambda r: link(r, "images/again", r)),
    Row(
        "link_to_the_top_of_a_tree",
        lambda r: (rename(r, "images", "scans"), link(r, "again", r)),
        "layouts",
    ),
    Row(
        "scans_in_subfolders",
        lambda r: rename(r, "images/good3.nii.gz", "images/more/good3.nii.gz"),
        "more",
    ),
    Row(
        "folder_named_as_a_scan",
        lambda r: rename(r, "images/good3.nii.gz", "images/good3.nii/good3.nii.gz"),
        "7 used",
    ),
    Row("another_format_beside", lambda r: write_list(r / "images", "x", "other.mha"), "other.mha"),
    Row(
        "volume_of_nrrd_beside", lambda r: write_list(r / "images", "x", "other.nrrd"), "other.nrrd"
    ),
    Row(
        "dicom_only",
        lambda r: [
            p.rename(p.with_suffix("").with_suffix(".dcm")) for p in (r / "images").iterdir()
        ],
        "DICOM|dcm",
    ),
    Row("both_suffixes", lambda r: save(r / "images" / "good1.nii", draw(1)[0]), "good1.nii"),
    Row("a_duplicate", lambda r: save(r / "images" / "twin.nii.gz", draw(0)[0]), "the same scan"),
    Row(
        "hidden_files",
        lambda r: [
            write_list(r / "images", "x", n) for n in (".DS_Store", "._good0.nii.gz", "Thumbs.db")
        ],
    ),
    Row(
        "names_composed_otherwise",
        lambda r: (
            save(r / "images" / "cœur_é.nii.gz", draw(50)[0]),
            save(r / "labels" / "cœur_e\u0301.nii.gz", draw(50)[1]),
        ),
    ),
    Row(
        "name_with_spaces_and_signs",
        lambda r: save(r / "images" / "a b (1) #2 100%.nii.gz", draw(51)[0]),
    ),
    Row(
        "name_of_240_bytes",
        lambda r: save(r / "images" / f"{'n' * 233}.nii.gz", draw(52)[0]),
        "long|bytes|letters",
    ),
    Row(
        "name_not_in_utf_8",
        lambda r: os.rename(
            os.fsencode(r / "images" / "good3.nii.gz"),
            os.fsencode(r / "images") + b"/k\xf6rper.nii.gz",
        ),
        "UTF-8|name",
    ),
    Row(
        "no_scan_in_images",
        lambda r: [p.rename(p.with_suffix(".txt")) for p in (r / "images").iterdir()],
        "no scan|layouts|scans",
    ),
    Row(
        "pictures_and_volumes",
        lambda r: (
            write_list(r, HEAD + LINES + "p,images/p.png,,,\n")
            or Image.fromarray(draw_picture(0)[0]).save(r / "images" / "p.png")
        ),
        "mixed",
    ),
]


@pytest.mark.parametrize("row", SETS, ids=lambda row: row.name)
def test_an_odd_set_is_read_or_refused_with_a_sentence(tmp_path, monkeypatch, row):
    data = make_set(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    row.write(data)
    before = snapshot(tmp_path)
    code, said = medssl("check", data)
    is_refused = code == 2
    assert code in (0, 2), said
    if row.words:
        assert re.search(row.words, said), said
    else:
        assert code == 0, said
    assert snapshot(tmp_path) == before
    code, said = medssl("train", data, *TINY, "--run", tmp_path / "run", "--dry-run")
    assert (code == 2) == is_refused, said
    assert not is_refused or re.search(row.words, said), said
    assert snapshot(tmp_path) == before


def test_a_path_that_is_not_there_gets_the_nearest_one(tmp_path):
    make_set(tmp_path / "data")
    for command in (["check"], ["train", "--dry-run"]):
        code, said = medssl(*command, tmp_path / "dta")
        assert (code, "did you mean" in said) == (2, True), said


def test_the_corpus_has_more_than_a_hundred_and_twenty_inputs():
    tables = (
        GOOD_SCANS,
        BAD_SCANS,
        GOOD_LABELS,
        BAD_LABELS,
        GOOD_PICTURES,
        BAD_PICTURES,
        BAD_PICTURE_LABELS,
        SETS,
    )
    names = [row.name for table in tables for row in table]
    assert len(set(names)) == len(names) >= 120
