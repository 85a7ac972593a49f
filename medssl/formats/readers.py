"""Which kind of file a path is, by its name; what reads and writes it is imported later."""

import importlib
import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from medssl.config import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from medssl.formats.scan import Scan
    from medssl.transforms.geometry import Affine, Header


class Format(Protocol):
    """What the module of a kind offers."""

    def open_image(self, path: Path, num_channels: int | None) -> "Scan":
        """Open an image of so many channels; None: of as many as it has."""

    def open_label(self, path: Path) -> "Scan":
        """Open a label: one number a voxel."""

    def write(
        self,
        path: Path,
        array: "NDArray[Any]",
        affine: "Affine",
        header: "Header | None",
        note: str,
        names: "Mapping[int, str]",
    ) -> None:
        """Write an array, atomically.

        Args:
            path: Its suffix is one of this kind.
            array: (I, J, K) or (I, J, K, C), integers or floats.
            affine: Of the grid.
            header: Of the scan (`Scan.header`), if it is on this grid: the new file repeats its
                geometry, field by field, if it is of this kind.
            note: A text for `Scan.read_note`.
            names: Of label values, in kinds that keep them.
        """

    def read_names(self, path: Path) -> dict[int, str]:
        """Return the names of the values of a label, where its kind has names."""


START = 132  # bytes that tell whether a file is DICOM
_MOST_OPENED = 20  # files that tell whether a folder holds DICOM
_PICTURE_TYPES = ("uint8", "uint16")


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        name: In messages.
        suffixes: Of its files, in lower case.
        module: In this package, see `Format`.
        has_spacing: Whether its files say how large a voxel is; pictures do not.
        mask_suffix: Of a mask of an image of this kind; empty: that of the image.
        map_suffix: Of a map of floats.
        label_types: Types that a mask may have, the smallest first.
        has_names: Whether its labels may name their values (`Format.read_names`).
        output_suffix: Of the masks that `medssl predict` writes, if not the mask_suffix.
    """

    name: str
    suffixes: tuple[str, ...]
    module: str
    has_spacing: bool = True
    mask_suffix: str = ".nii.gz"
    map_suffix: str = ".nii.gz"
    label_types: tuple[str, ...] = ("uint8", "int16", "int32")
    has_names: bool = False
    output_suffix: str = ""

    @property
    def format(self) -> Format:
        """The module that reads and writes this kind."""
        module = importlib.import_module(f"medssl.formats.{self.module}")
        return cast(Format, module)


NIFTI = Reader("NIfTI (.nii, .nii.gz)", (".nii.gz", ".nii"), "nifti")
DICOM = Reader(
    *("DICOM", (".rtstruct.dcm", ".labelmap.dcm", ".dcm", ".dicom", ".ima"), "dicom_files"),
    has_names=True,
    output_suffix=".dcm",
)
READERS = (
    NIFTI,
    DICOM,
    Reader("NRRD", (".seg.nrrd", ".nrrd", ".nhdr"), "nrrd", True, ".nrrd", ".nrrd", has_names=True),
    Reader("MetaImage (.mha, .mhd)", (".mha", ".mhd"), "metaimage", True, ".mha", ".mha"),
    Reader("MGH (.mgz, .mgh)", (".mgz", ".mgh"), "mgh"),
    Reader("Analyze (.hdr with .img)", (".hdr", ".img"), "pairs"),
    Reader("PNG", (".png",), "pictures", False, ".png", ".tiff", _PICTURE_TYPES),
    Reader("JPEG", (".jpg", ".jpeg"), "pictures", False, ".png", ".tiff", _PICTURE_TYPES),
    Reader("TIFF", (".tif", ".tiff"), "pictures", False, "", ".tiff", (*_PICTURE_TYPES, "int32")),
)
FORMATS = {
    "nifti": ".nii.gz",
    "nrrd": ".nrrd",
    "seg-nrrd": ".seg.nrrd",
    "mha": ".mha",
    "dicom-seg": ".dcm",
    "dicom-labelmap": ".labelmap.dcm",
    "dicom-rtstruct": ".rtstruct.dcm",
}
"""Suffixes of masks by the name of a format."""

KINDS = f"{', '.join(reader.name for reader in READERS[:-1])} or {READERS[-1].name}"
"""The kinds that are read, in words."""

PLACEHOLDER = re.compile(
    r"an+on(?:ymi[sz]ed|ymous|ym)?|de-?identified|unknown|none|null|nan|n/?a|removed|patient|"
    r"[0x*?_.-]+|\d[.,]\d+e\+\d+"
)
"""What stands, in lower case, in place of the number of a patient: after anonymization, or where a
spreadsheet has rounded it (1.23E+12)."""

_SLICER = "convert it by 3D Slicer or ITK-SNAP (save as .nii.gz)"
_OTHER_SCANS = {
    **dict.fromkeys((".gipl", ".gipl.gz", ".vtk"), _SLICER),
    ".mnc": "convert it: mnc2nii IN OUT.nii (MINC), or nib-convert IN OUT.nii.gz (nibabel)",
    **dict.fromkeys((".head", ".brik", ".brik.gz"), "convert it: 3dAFNItoNIFTI IN (AFNI)"),
    **dict.fromkeys(
        (".npy", ".npz", ".mat", ".h5", ".hdf5"), "write it as NIfTI with its spacing and position"
    ),
    **dict.fromkeys(
        (".nii.zip", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.7z"), "unpack it to .nii or .nii.gz"
    ),
    **dict.fromkeys((".bmp", ".gif", ".webp", ".jp2", ".pgm"), "save it as PNG"),
}


def strip_suffix(name: str) -> str | None:
    """Return a file name without the suffix of a kind that is read, or None for other files."""
    for reader in READERS:
        for suffix in reader.suffixes:
            if name.lower().endswith(suffix) and len(name) > len(suffix):
                return name[: -len(suffix)]
    return None


def name_scan(path: Path) -> str:
    """Return the name of a scan: that of its file without the suffix, or of its folder."""
    bare = strip_suffix(path.name)
    return bare or (path.stem if path.suffix.lower() == ".zip" else path.name)


def find_reader(path: Path) -> Reader | None:
    """Return the kind of a file by its name, or None for one that is not read.

    A folder that holds DICOM, an archive of it, and one series of it (`FOLDER#UID`) are DICOM.
    """
    name = path.name.lower()
    reader = next((reader for reader in READERS if name.endswith(reader.suffixes)), None)
    return DICOM if reader is None and is_series(path) else reader


def is_series(path: Path) -> bool:
    """Tell whether a path is a folder or ZIP archive that holds DICOM, or names a series of one."""
    path, _ = split_series(path)
    if os.path.isdir(path):
        files = (Path(where, name) for where, _, names in os.walk(path) for name in sorted(names))
        visible = (file for file in files if file.name[0] != ".")
        return any(is_dicom(file) for file in itertools.islice(visible, _MOST_OPENED))
    if path.suffix.lower() != ".zip" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if not name.endswith("/")][:_MOST_OPENED]
        return any(_is_dicom_member(archive, name) for name in members)


def split_series(path: Path) -> tuple[Path, str]:
    """Return the path and the beginning of the UID of `PATH#UID`; empty if none is named."""
    before, sign, uid = str(path).rpartition("#")
    is_choice = bool(sign and uid) and set(uid) <= set("0123456789.") and not os.path.lexists(path)
    return (Path(before), uid) if is_choice else (path, "")


def _is_dicom_member(archive: zipfile.ZipFile, name: str) -> bool:
    """Tell whether a member of an archive is DICOM."""
    try:
        with archive.open(name) as file:
            return starts_dicom(file.read(START))
    except (OSError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile):
        return False  # it is named when it is read


def starts_dicom(start: bytes) -> bool:
    """Tell whether a file begins as DICOM: by the word at byte 128, or an element of group 0008."""
    is_bare = start[:2] == b"\x08\x00" and start[3:4] == b"\x00"  # without the preamble
    return start[128:START] == b"DICM" or is_bare


def is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM, by `.dcm` or by its first bytes."""
    if path.suffix.lower() in DICOM.suffixes:
        return True
    if not os.path.isfile(path):
        return False  # a pipe has no end
    try:
        with path.open("rb") as file:
            return starts_dicom(file.read(START))
    except OSError:
        return False


def get_reader(path: Path) -> Reader:
    """Return the kind of a file by its name.

    Raises:
        InputError: It is none that is read.
    """
    reader = find_reader(path)
    if reader is None:
        how = explain_kind(path) or "convert it first"
        raise InputError(f"{path}: not a scan that is read, {KINDS}: {how}")
    return reader


def explain_kind(path: Path) -> str:
    """Say how a scan of a kind that is not read is converted; empty for what is no such scan."""
    name = path.name.lower()
    return next((how for suffix, how in _OTHER_SCANS.items() if name.endswith(suffix)), "")


def has_spacing(path: Path) -> bool:
    """Tell whether a file says how large its voxels are: all but pictures do."""
    reader = find_reader(path)
    return reader is None or reader.has_spacing


def name_mask_suffix(image: Path) -> str:
    """Return the suffix of a mask of an image; a JPEG would change its values, so it is a PNG."""
    return get_reader(image).mask_suffix or image.suffix.lower()
