"""Damaged and odd inputs for every reader: only the project's own errors may come out.

    python scripts/fuzz.py --count 20000                       # an hour on one core
    python scripts/fuzz.py --count 500 --only nifti,pictures --seed 3

The same seed gives the same inputs. What fails is made smaller and printed with its draws. A reader
must answer every input with a result or an `InputError`; anything else is a failure, and so is more
memory than 2 GB.
"""

from __future__ import annotations

import argparse
import atexit
import bz2
import functools
import gzip
import io
import logging
import re
import resource
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from medssl.compare import compare
from medssl.config import Config, InputError
from medssl.data.cases import Case
from medssl.data.io import (
    read_geometry,
    read_image,
    read_label,
    read_label_values,
    read_origin,
    write_mask,
)
from medssl.data.phantoms import write_phantoms
from medssl.evaluate import evaluate_run
from medssl.formats import dicom
from medssl.formats.dicom import load_package
from medssl.formats.readers import get_reader
from medssl.names import choose_names
from medssl.predict import load_model
from medssl.pseudo.gates import Gate
from medssl.report import write_report
from medssl.rounds import loop, student, teacher
from medssl.run_folder import read_folder, read_points
from medssl.runs import StopFlag
from medssl.settings import dump, load_config
from medssl.tracking.note import describe_training, write_note

pydicom = load_package("pydicom")

MOST_BYTES = 2 * 2**30  # more than there are before the first input
ODD_NUMBERS = (0.0, -1.0, 1e-30, 1e30, 3e38, float("nan"), float("inf"), 7.0, 32767.0, 1e9)
ODD_JSON = ("[]", "5", "null", "{}", '""', "[[]]", '{"a": {}}', "true", "1e999", "-1", "nul", "")
ODD_WORDS = (
    *(b"", b"0", b"-1", b"1e999", b"nan", b"inf", b"99999999999", b"0.5", b"1\\2", b"none", b"("),
    *(b"x", b"\xff", b"1e30", b"2000 2000 2000", b"2", b"(1,0)", b"LOCAL", b"raw", b"gzip"),
)
ODD_YAML = (
    *ODD_JSON, "yes", "~", "2026-02-30", "!!int x", "!!python/object:os.system x", "&a [*a]",
    "9" * 30,
    "1_000", "0x10", ".nan", "-.inf", "auto", "[auto]", "[1, 2", "{a: 1, a: 2}", "a: b: c",
    "\u202e", "\x00", "[" * 3000, "{1: {2: {3: 4}}}", "none", "2", "0.5", "[1,1,1]", "[0,0]",
)  # fmt: skip
RUN_SETTINGS = [
    "labeled=2",
    "test=1",
    "steps=2",
    "rounds=1",
    "network.width=0.5",
    "network.depth=3",
    "plan.patch_size=[16,16,16]",
    "train.batch=2",
    "filter.uncertainty.passes=2",
    "tracking.uri=none",
    "method=classic",
]

Draw = Callable[[st.SearchStrategy], object]


def damage_bytes(draw: Draw, content: bytes) -> bytes:
    """Cut bytes, flip bits, overwrite, repeat or replace a part of them."""
    place = draw(st.integers(0, max(0, len(content) - 1)))
    kind = draw(st.sampled_from(("cut", "flip", "overwrite", "insert", "repeat", "replace")))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        changed = bytearray(content or b"\0")
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(changed) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if kind == "replace":
        return draw(st.one_of(st.binary(max_size=64), st.sampled_from(ODD_JSON).map(str.encode)))
    more = draw(st.binary(min_size=1, max_size=16))
    if kind == "insert":
        return content[:place] + more + content[place:]
    if kind == "overwrite":
        return content[:place] + more + content[place + len(more) :]
    return content[:place] + content[place : place + 64] * 3 + content[place:]


def save_nifti(dtype: str, shape: tuple[int, ...], kind: type = nib.Nifti1Image) -> bytes:
    """Return the bytes of a small NIfTI file."""
    array = (np.arange(np.prod(shape)).reshape(shape) % 3).astype(dtype)
    image = kind(array, np.diag([2.0, 1.5, 3.0, 1.0]))
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


NIFTI = {
    f"{kind.__name__} {dtype} {shape}": save_nifti(dtype, shape, kind)
    for kind in (nib.Nifti1Image, nib.Nifti2Image)
    for dtype in ("uint8", "int16", "float32", "float64")
    for shape in ((5, 4), (4, 5, 6), (4, 5, 6, 2))
}


def change_header(draw: Draw, content: bytes) -> bytes:
    """Set a field of a NIfTI header to an odd number."""
    is_second = content[:4] == struct.pack("<i", 540)
    header = (nib.Nifti2Header if is_second else nib.Nifti1Header).template_dtype
    name = draw(st.sampled_from([n for n in header.names if header[n].base.kind in "iuf"]))
    kind, offset = header.fields[name][0], header.fields[name][1]
    place = offset + kind.base.itemsize * draw(st.integers(0, max(0, int(np.prod(kind.shape)) - 1)))
    value = draw(st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(-(2**15), 2**15 - 1)))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = np.array(value, "f8").astype(kind.base).tobytes()
    return content[:place] + packed + content[place + len(packed) :]


def fuzz_nifti(data: st.DataObject, folder: Path) -> None:
    """Read a damaged NIfTI file in all ways."""
    content = NIFTI[data.draw(st.sampled_from(sorted(NIFTI)), "file")]
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        change = data.draw(st.sampled_from((damage_bytes, change_header)), "kind")
        content = change(data.draw, content)
    suffix = data.draw(st.sampled_from((".nii", ".nii.gz", ".nii.gz, damaged")), "suffix")
    if suffix != ".nii":
        content = gzip.compress(content, 1)
    if suffix.endswith("damaged"):
        content = damage_bytes(data.draw, content)
    path = folder / f"scan{suffix.split(',')[0]}"
    path.write_bytes(content)
    read_all(path, data.draw(st.integers(1, 2), "channels"))


def read_all(path: Path, num_channels: int, label: Path | None = None) -> None:
    """Read a scan as image, as label, and its header; only refusals may come out.

    Args:
        path: The scan.
        num_channels: Declared of it.
        label: Of the scan, where it is another file.
    """
    case = Case("scan", (path,), label, "") if label else None
    label = label or path
    for read in (
        lambda: read_geometry(path),
        lambda: read_image([path], num_channels),
        lambda: read_label(label, (0, 1, 2), 255, case),
        lambda: read_label_values(label, case),
        lambda: read_origin(label, case),
        lambda: get_reader(label).format.read_names(label) if get_reader(label).has_names else {},
    ):
        with suppress(InputError):
            read()


def save_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their names."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def collect_formats() -> dict[str, dict[str, bytes]]:
    """Return the files of a small scan of each kind, by the kind; the first one is opened."""
    count = bytes(range(24))
    text = b" ".join(b"%d" % number for number in count)
    nrrd = (
        "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 3 4\nspace: RAS\nencoding: {}\n"
        "space directions: (0,2,0) (1,0,0) (0,0,3)\nspace origin: (5,6,7)\n{}\n"
    )
    packed = {
        "raw": count,
        "gzip": gzip.compress(count, mtime=0),
        "bzip2": bz2.compress(count),
        "text": text,
        "hex": count.hex().encode(),
    }
    scans = {
        f"nrrd {name}": {"scan.nrrd": nrrd.format(name, "").encode() + content}
        for name, content in packed.items()
    }
    detached = nrrd.format("gzip", "data file: scan.raw.gz\n").encode()
    scans["nrrd beside"] = {"scan.nhdr": detached, "scan.raw.gz": packed["gzip"]}
    layers = (
        nrrd.replace("dimension: 3", "dimension: 4")
        .replace("2 3 4", "2 1 3 4")
        .replace("directions: ", "directions: none ")
    )
    named = "kinds: list domain domain domain\n" + "".join(
        f"Segment{n}_Name:=part {n}\nSegment{n}_Layer:={n}\nSegment{n}_LabelValue:=1\n"
        for n in (0, 1)
    )
    scans["nrrd segments"] = {
        "scan.seg.nrrd": layers.format("raw", named).encode() + bytes([1, 0, 0, 1] * 6)
    }
    mha = (
        "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\n"
        "ElementSpacing = 1 2 3\nTransformMatrix = 0 1 0 1 0 0 0 0 1\nOffset = 5 6 7\n{}"
        "ElementDataFile = {}\n"
    )
    for name, more, content in (
        ("raw", "", count),
        ("zlib", "CompressedData = True\n", zlib.compress(count)),
        ("text", "BinaryData = False\n", text),
        ("channels", "ElementNumberOfChannels = 2\n", count * 2),
    ):
        scans[f"mha {name}"] = {"scan.mha": mha.format(more, "LOCAL").encode() + content}
    scans["mha beside"] = {
        "scan.mhd": mha.format("HeaderSize = 2\n", "scan.raw").encode(),
        "scan.raw": b"ab" + count,
    }
    array = (np.arange(24).reshape(2, 3, 4) % 3).astype(np.int16)
    mgh = nib.MGHImage(array, np.diag([2.0, 1.5, 3.0, 1.0])).to_bytes()
    scans["mgh"] = {"scan.mgh": mgh}
    scans["mgz"] = {"scan.mgz": gzip.compress(mgh, mtime=0)}
    for kind in (nib.Nifti1Pair, nib.Nifti2Pair, nib.Spm99AnalyzeImage, nib.Spm2AnalyzeImage):
        image = kind(array, np.diag([2.0, 1.5, 3.0, 1.0]))
        files = image.make_file_map({key: io.BytesIO() for key, _ in image.files_types})
        image.to_file_map(files)
        suffixes = {key: suffix for key, suffix in image.files_types}
        scans[kind.__name__] = {
            f"scan{suffixes[key]}": files[key].fileobj.getvalue() for key in sorted(files)
        }
    return scans


def change_word(draw: Draw, content: bytes) -> bytes:
    """Put an odd word in the place of one of a header in text."""
    words = list(re.finditer(rb"[^\s:=(),]+", content[:600]))
    if not words:
        return content
    word = words[draw(st.integers(0, len(words) - 1))]
    return content[: word.start()] + draw(st.sampled_from(ODD_WORDS)) + content[word.end() :]


FORMATS = collect_formats()


def fuzz_formats(data: st.DataObject, folder: Path) -> None:
    """Read damaged NRRD, MetaImage and MGH files and pairs in all ways."""
    files = dict(FORMATS[data.draw(st.sampled_from(sorted(FORMATS)), "kind")])
    first = next(iter(files))
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        name = data.draw(st.sampled_from([first, *files]), "file")
        changes = [damage_bytes, change_word]
        changes += [change_header] if name.endswith(".hdr") and len(files[name]) >= 540 else []
        files[name] = data.draw(st.sampled_from(changes), "how")(data.draw, files[name])
    save_files(folder, files)
    read_all(folder / first, data.draw(st.integers(1, 2), "channels"))


@functools.cache
def make_series() -> dict[str, dict[str, bytes]]:
    """Return three slices, alone and as the frames of one file, and masks of them by their form."""
    slices = {}
    image = pydicom.dcmread(load_package("pydicom.data").get_testdata_file("CT_small.dcm"))
    image.Rows, image.Columns, image.PixelData = 4, 5, bytes(range(40))
    for k in range(3):
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        image.ImagePositionPatient = [0, 0, 5 * k]
        slices[f"series/{k + 1}.dcm"] = save_dicom(image)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_files(folder, slices)
        scan = read_image([folder / "series"], 1)
        masks = {}
        for suffix in (".dcm", ".labelmap.dcm", ".rtstruct.dcm"):
            path = folder / f"mask{suffix}"
            classes = np.zeros(scan.array.shape[1:], np.uint8)
            classes[1:4, 1:3, :2] = 1
            write_mask(
                path,
                classes,
                scan.affine,
                (0, 1),
                header=scan.header,
                names=("background", "organ"),
            )
            masks[path.name] = path.read_bytes()
    image.NumberOfFrames, image.PixelData = 3, bytes(120)
    shared, frames = pydicom.Dataset(), [pydicom.Dataset() for _ in range(3)]
    move_fields(image, shared, "PlaneOrientationSequence", "ImageOrientationPatient")
    move_fields(image, shared, "PixelMeasuresSequence", "PixelSpacing", "SliceThickness")
    for k, frame in enumerate(frames):
        image.ImagePositionPatient = [0, 0, 5 * k]
        move_fields(image, frame, "PlanePositionSequence", "ImagePositionPatient")
    image.SharedFunctionalGroupsSequence = [shared]
    image.PerFrameFunctionalGroupsSequence = frames
    return {"slices": slices, "frames": {"series/1.dcm": save_dicom(image)}, "masks": masks}


def save_dicom(image: pydicom.Dataset) -> bytes:
    """Return the bytes of a DICOM file."""
    file = io.BytesIO()
    image.save_as(file)
    return file.getvalue()


def move_fields(image: pydicom.Dataset, group: pydicom.Dataset, sequence: str, *names: str) -> None:
    """Move fields of an image to a functional group."""
    item = pydicom.Dataset()
    for name in names:
        setattr(item, name, image[name].value)
        delattr(image, name)
    setattr(group, sequence, [item])


def change_field(draw: Draw, content: bytes) -> bytes:
    """Set a field of a DICOM header, or of an item in it, to an odd value of the same length."""
    fields = [
        (field.end(), struct.unpack("<H", field[2])[0], field[1])
        for field in re.finditer(rb"(?s)(DS|IS|US|UI|CS|LO|FD)(..)", content)
    ]
    fields = [field for field in fields if 0 < field[1] <= 64]
    if not fields:
        return content
    place, size, kind = fields[draw(st.integers(0, len(fields) - 1))]
    is_number = kind in (b"US", b"FD")
    odd = st.binary(min_size=size, max_size=size) if is_number else st.sampled_from(ODD_WORDS)
    value = (draw(odd) + b" " * size)[:size]
    return content[:place] + value + content[place + size :]


def fuzz_dicom(data: st.DataObject, folder: Path) -> None:
    """Read a damaged series in all ways, in a folder or an archive, and damaged masks of it."""
    parts = make_series()
    files = dict(parts[data.draw(st.sampled_from(("slices", "slices", "frames")), "series")])
    mask = data.draw(st.sampled_from(sorted(parts["masks"])), "mask")
    files[mask] = parts["masks"][mask]
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        name = data.draw(st.sampled_from(sorted(files)), "file")
        how = data.draw(st.sampled_from((damage_bytes, change_field, change_field)), "how")
        files[name] = how(data.draw, files[name])
    save_files(folder, files)
    scan = folder / "series"
    if data.draw(st.integers(0, 3), "archive") == 0:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(scan.iterdir()):
                archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())
        scan = folder / "series.zip"
        content = file.getvalue()
        is_whole = data.draw(st.booleans(), "whole")
        scan.write_bytes(content if is_whole else damage_bytes(data.draw, content))
    for read in (dicom.list_series, dicom.read_modality):
        with suppress(InputError):
            read(scan)
    read_all(scan, 1, folder / mask)


def save_picture(mode: str, suffix: str, pages: int = 1) -> bytes:
    """Return the bytes of a small picture."""
    rng = np.random.default_rng(0)
    many = []
    for _ in range(pages):
        array = rng.integers(0, 255, (9, 7, 4), dtype=np.uint8)
        gray = array[..., 0].astype(
            {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, "u1")
        )
        is_gray = mode in ("I;16", "I", "F")
        many.append(Image.fromarray(gray) if is_gray else Image.fromarray(array).convert(mode))
    file = io.BytesIO()
    more = {"save_all": True, "append_images": many[1:]} if pages > 1 else {}
    many[0].save(file, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[suffix], **more)
    return file.getvalue()


PICTURES = {
    (f"{mode} {suffix} {pages}", suffix): save_picture(mode, suffix, pages)
    for suffix, modes in {
        "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "jpg": ("L", "RGB", "CMYK"),
        "tif": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    }.items()
    for mode in modes
    for pages in ((1, 3) if suffix == "tif" else (1,))
}


def fuzz_pictures(data: st.DataObject, folder: Path) -> None:
    """Read a damaged picture in all ways."""
    name, suffix = data.draw(st.sampled_from(sorted(PICTURES)), "file")
    content = PICTURES[name, suffix]
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        content = damage_bytes(data.draw, content)
    suffix = data.draw(st.sampled_from((suffix, suffix, suffix, "png", "tif", "jpg")), "suffix")
    path = folder / f"scan.{suffix}"
    path.write_bytes(content)
    read_all(path, data.draw(st.sampled_from((1, 3)), "channels"))


def list_keys(section: dict[str, object], prefix: str = "") -> list[str]:
    """Return all keys of a configuration with their paths, sections too."""
    keys = []
    for key, value in section.items():
        keys.append(f"{prefix}{key}")
        keys += list_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys


DEFAULTS = dump(Config())
KEYS = [*list_keys(DEFAULTS), "labeled", "test", "draw", "seed", "rounds", "steps", "method"]


def fuzz_settings(data: st.DataObject, folder: Path) -> None:
    """Load odd overrides, and an odd or damaged YAML file."""
    odd = st.one_of(st.sampled_from(ODD_YAML), st.text(max_size=12), st.floats().map(str))
    keys = st.one_of(
        st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda k: k[:-1]), st.text(max_size=6)
    )
    pairs = data.draw(st.lists(st.tuples(keys, odd), max_size=3), "overrides")
    kind = data.draw(st.sampled_from(("none", "damaged", "odd", "tree")), "file")
    source: Path | None = None
    if kind != "none":
        source = folder / "config.yaml"
        tree = st.recursive(
            odd, lambda x: st.dictionaries(keys, x, max_size=3) | st.lists(x, max_size=3)
        )
        if kind == "damaged":
            source.write_bytes(damage_bytes(data.draw, yaml.safe_dump(DEFAULTS).encode()))
        elif kind == "odd":
            source.write_bytes(data.draw(odd, "text").encode("utf-8", "surrogatepass"))
        else:
            text = yaml.safe_dump(data.draw(tree, "tree"), allow_unicode=True)
            source.write_text(text, encoding="utf-8", errors="surrogateescape")
    with suppress(InputError):
        load_config(
            None if source is None else str(source), [f"{key}={value}" for key, value in pairs]
        )


RUN_FILES = (
    *("run.json", "plan.json", "splits.json", "state.json", "summary.json", "provenance.json"),
    *(
        "pseudonyms.json",
        "trained_on.json",
        "config.yaml",
        "metrics.jsonl",
        "round_1/checkpoint.pt",
    ),
    *("round_0/done.json", "round_1/done.json", "round_0/model/done.json", "round_0/review.csv"),
    *("round_1/model/model.json", "model/model.json", "model/weights.safetensors"),
    *("round_0/model/weights.safetensors", "evaluation/summary.json", "evaluation/per_case.csv"),
    *("evaluation/predictions.json", "round_0/pseudo_labels/*/probs.npy"),
    *("round_0/pseudo_labels/*/uncertainty.npy", "round_0/pseudo_labels/*/class_voxels.npz"),
    *("round_0/pseudo_labels/*/meta.json", "../cache/**/meta.json", "../cache/**/image.npy"),
)


@functools.cache
def make_run() -> tuple[Path, Path]:
    """Train and evaluate a tiny run; return its folder and the file of its data."""
    folder = Path(tempfile.mkdtemp(prefix="medssl_fuzz_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_phantoms(folder / "data", 2, 2, 1, shape=(24, 24, 24))
    go_on(folder / "data", folder / "runs" / "run")
    evaluate_run(folder / "runs" / "run", report=lambda text: None)
    return folder / "runs", folder / "data"


def go_on(data: Path, run: Path) -> None:
    """Train a run, or take it up again; of two steps no gate is asked."""
    accept = student.read_review
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "judge_model", lambda *_: Gate(True, ()))
        patch.setattr(
            student, "read_review", lambda home: [{**r, "accepted": "1"} for r in accept(home)]
        )
        resolved = load_config(data, RUN_SETTINGS)
        prepared = loop.prepare_run(
            resolved, lambda plan: load_config(data, RUN_SETTINGS, plan), run
        )
        loop.run_training(prepared, run, StopFlag(run))


def tell(run: Path) -> None:
    """Read what MLflow gets."""
    folder = read_folder(run)
    describe_training(folder)
    write_note(folder, choose_names(folder))
    list(read_points(folder, 0))


def fuzz_run(data: st.DataObject, folder: Path) -> None:
    """Damage a file of a run folder and give it to the commands that read it."""
    whole, source = make_run()
    runs = Path(shutil.copytree(whole, folder / "runs"))
    run = runs / "run"
    pattern = data.draw(st.sampled_from(RUN_FILES), "file")
    path = next(iter(sorted(run.glob(pattern) if pattern[0] != "." else runs.glob(pattern[3:]))))
    path.write_bytes(damage_bytes(data.draw, path.read_bytes()))
    commands: dict[str, Callable[[], object]] = {
        "tell": lambda: tell(run),
        "compare": lambda: compare([f"a={run}", f"b={run}/round_0"]),
        "predict": lambda: load_model(run),
        "report": lambda: write_report(run),
        "train": lambda: go_on(source, run),
        "evaluate": lambda: evaluate_run(run, report=lambda text: None),
    }
    for name in (
        *("tell", "compare", "predict"),
        data.draw(st.sampled_from(sorted(commands)), "command"),
    ):
        with suppress(InputError), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            commands[name]()


TARGETS: dict[str, Callable[[st.DataObject, Path], None]] = {
    "nifti": fuzz_nifti,
    "pictures": fuzz_pictures,
    "formats": fuzz_formats,
    "dicom": fuzz_dicom,
    "settings": fuzz_settings,
    "run": fuzz_run,
}
SHARES = {
    **{"nifti": 0.25, "pictures": 0.2, "formats": 0.25, "dicom": 0.1},
    **{"settings": 0.15, "run": 0.05},
}
"""Of all inputs; those of a run folder take a second each."""


def fuzz_reader(target: str, count: int, start: int) -> None:
    """Feed a reader with so many inputs.

    Raises:
        Exception: What came out of it, with the smallest input found that does so.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        @seed(start)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run(data: st.DataObject) -> None:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            TARGETS[target](data, folder)

        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()


def main() -> None:
    """Feed all readers, and say how many inputs each took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="inputs of all readers together")
    parser.add_argument("--only", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    limit = psutil.Process().memory_info().vms + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    names = options.only.split(",")
    total = sum(SHARES[name] for name in names)
    for name in names:
        count = max(1, round(options.count * SHARES[name] / total))
        fuzz_reader(name, count, options.seed)
        print(f"{name}: {count} inputs", flush=True)


if __name__ == "__main__":
    main()
