"""Masks out as DICOM: segmentation objects (SEG) and structure sets (RTSTRUCT).

Legend: I J K voxel axes of the series that the mask belongs to, as `medssl.formats.dicom` has them.
Both kinds are written on the slices of that series, which is opened again for its identifiers, and
refer to every image of it. Of the patient they carry the number and the sex, by which an archive
files them; the name, the date of birth, physicians and all other fields stay behind.

Source: DICOM PS3.3, A.51 (segmentation), A.19 (RT structure set), and the SNOMED CT codes of PS3.16
as pydicom has them.
"""

import colorsys
import datetime
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl import __version__
from medssl.config import InputError
from medssl.formats.dicom import Plane, load_package, read_dataset, read_planes
from medssl.formats.scan import keep_quiet
from medssl.runs import write_file
from medssl.transforms.geometry import Header

MAX_NOTE = 64
"""Characters of a note that a SEG holds."""

_ORGANS = {  # the keywords of pydicom, which knows their codes
    *("AdrenalGland", "Aorta", "Bladder", "Bone", "Brain", "BrainStem", "Breast"),
    *("Cerebellum", "Clavicle", "Colon", "Duodenum", "Esophagus", "Eye", "Femur"),
    *("Gallbladder", "Heart", "Hippocampus", "Humerus", "InferiorVenaCava", "Kidney"),
    *("L1Vertebra", "L2Vertebra", "L3Vertebra", "L4Vertebra", "L5Vertebra"),
    *("LateralVentricle", "LeftAtrium", "LeftVentricle", "Liver", "Lung", "Mandible"),
    *("Myocardium", "OpticChiasm", "OpticNerve", "Pancreas", "ParotidGland", "PortalVein"),
    *("Prostate", "PulmonaryArtery", "Rectum", "Rib", "RightAtrium", "RightVentricle"),
    *("Sacrum", "Scapula", "Skin", "Skull", "SmallIntestine", "SpinalCord", "Spleen"),
    *("Sternum", "Stomach", "SubmandibularGland", "SuperiorVenaCava", "Thalamus"),
    *("Thyroid", "Trachea", "Uterus", "Vertebra"),
}
_TISSUES = {"Fat", "Muscle"}
_CHANGES = {"Cyst", "Edema", "Hemorrhage", "Lesion", "Necrosis", "Neoplasm", "Nodule"}
_OTHER_WORDS = {
    "adrenal": "AdrenalGland",
    "brainstem": "BrainStem",
    "gall bladder": "Gallbladder",
    "haemorrhage": "Hemorrhage",
    "ivc": "InferiorVenaCava",
    **{f"l{number}": f"L{number}Vertebra" for number in range(1, 6)},
    "oedema": "Edema",
    "oesophagus": "Esophagus",
    "parotid": "ParotidGland",
    "postcava": "InferiorVenaCava",
    "thyroid gland": "Thyroid",
    "tumor": "Neoplasm",
    "tumour": "Neoplasm",
    "urinary bladder": "Bladder",
    "vertebrae": "Vertebra",
}
_NOT_IN_PYDICOM = {"Myocardium": ("74281007", "Myocardium")}
_SIDES = ("left", "right")
_SINGLE = {"LeftAtrium", "LeftVentricle", "RightAtrium", "RightVentricle"}  # no side of an organ
_SCHEME = "99MEDSSL"  # private ones begin with 99
_KEPT = ("PatientID", "PatientSex")  # the only fields of a patient that are kept
_GROUPS_OF_PEOPLE = (0x0010, 0x0012, 0x0032, 0x0038, 0x0040)  # patient, trial, orders, visit, steps
_IDENTIFIERS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
_TELLING = "Description|Comment|Physician|Operator|Requesting"  # fields where names stand
_FILLED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "ReferringPhysicianName"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
)  # which may be empty, and must be there


@keep_quiet()
def write_seg(
    path: Path,
    array: NDArray[Any],
    header: Header,
    names: Mapping[int, str],
    note: str = "",
    as_labelmap: bool = False,
) -> None:
    """Write a mask as a DICOM segmentation object, one segment a class, atomically.

    Args:
        path: Where the file goes.
        array: Label values (I, J, K), 0 = background.
        header: Of the scan, see `medssl.formats.dicom.open_scan`.
        names: Name of each label value but 0; the segments are numbered in the order of the values.
            Values without a name are called by their number.
        note: What `medssl.formats.segmentation.read_note` is to return.
        as_labelmap: Write a label map with run-length compression, a seventh of the size, which few
            other programs read yet.

    Raises:
        InputError: The series is not there any more, or is another.
        ValueError: The mask has another shape than the scan, or the note is too long.
    """
    hd = load_package("highdicom")
    if len(note) > MAX_NOTE:
        raise ValueError(f"a note of at most {MAX_NOTE} characters, got {len(note)}: {note}")
    planes, sources = _open_sources(array, header)
    if len(sources) > 1 and "NumberOfFrames" in sources[0]:
        raise InputError(
            f"{header['path']}: {len(sources)} files of several frames each, of which no SEG can "
            "be made: write NIfTI or RTSTRUCT"
        )
    values = _find_values(array, names)
    dtype = np.min_scalar_type(len(values))
    numbers = np.zeros(max(values, default=0) + 1, dtype=dtype)
    numbers[values] = np.arange(1, len(values) + 1)
    # in the order of the files, or of the frames of one
    order = np.argsort([plane.frame for plane in planes], kind="stable")
    pixels = np.ascontiguousarray(numbers[array].transpose(2, 1, 0)[order])
    algorithm = hd.AlgorithmIdentificationSequence(
        name="medssl",
        version=__version__,
        family=load_package("pydicom.sr.codedict").codes.cid7162.ArtificialIntelligence,
    )
    uid = load_package("pydicom.uid").generate_uid
    make = partial(
        hd.seg.Segmentation,
        source_images=sources,
        pixel_array=pixels,
        segmentation_type="LABELMAP" if as_labelmap else "BINARY",
        segment_descriptions=[
            _describe_segment(number, value, names.get(value), algorithm)
            for number, value in enumerate(values, 1)
        ],
        series_instance_uid=uid(),
        series_number=_number_series(sources[0]),
        sop_instance_uid=uid(),
        instance_number=1,
        manufacturer="medssl",
        manufacturer_model_name="medssl",
        software_versions=__version__,
        device_serial_number="0",
        content_description=note or None,
        content_label="MASK",
        transfer_syntax_uid="1.2.840.10008.1.2.5" if as_labelmap else "1.2.840.10008.1.2.1",
    )
    try:
        seg = make()
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # odd headers
        raise InputError(
            f"{header['path']}: no SEG can be made of these images ({error}): write "
            "NIfTI or RTSTRUCT"
        ) from error
    seg.SeriesDescription = "Segmentation by a model"
    write_file(path, lambda temporary: seg.save_as(temporary))


@keep_quiet()
def write_rtstruct(
    path: Path,
    array: NDArray[Any],
    header: Header,
    names: Mapping[int, str],
    note: str = "",
) -> None:
    """Write a mask as an RT structure set, one region of interest a class, atomically.

    The contours of a slice run between the voxels of a class and the others (level 0.5); holes and
    islands have contours of their own. Voxels inside an odd number of contours are those of the
    class (the XOR rule), exactly; programs that unite contours fill the holes.

    Args: as `write_seg`.

    Raises:
        InputError: The series is not there any more, or is another.
        ValueError: The mask has another shape than the scan.
    """
    planes, sources = _open_sources(array, header)
    pydicom, uid = load_package("pydicom"), load_package("pydicom.uid")
    source, by_instance = sources[0], {str(image.SOPInstanceUID): image for image in sources}
    images = [_refer(image) for image in sources]
    values = _find_values(array, names)

    made = pydicom.Dataset()
    for field in (*_FILLED, "StudyInstanceUID"):
        setattr(made, field, source.get(field, ""))
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SOPClassUID, made.SOPInstanceUID = uid.RTStructureSetStorage, uid.generate_uid()
    made.SeriesInstanceUID, made.SeriesNumber = uid.generate_uid(), _number_series(source)
    made.SeriesDescription, made.Modality = "Segmentation by a model", "RTSTRUCT"
    made.OperatorsName, made.InstanceNumber = "", 1
    made.Manufacturer = made.ManufacturerModelName = "medssl"
    made.DeviceSerialNumber, made.SoftwareVersions = "0", __version__
    made.StructureSetLabel = "MASK"
    made.StructureSetDescription = note
    now = datetime.datetime.now()
    made.StructureSetDate, made.StructureSetTime = f"{now:%Y%m%d}", f"{now:%H%M%S}"
    made.InstanceCreationDate, made.InstanceCreationTime = f"{now:%Y%m%d}", f"{now:%H%M%S}"
    series = _item(SeriesInstanceUID=source.SeriesInstanceUID, ContourImageSequence=images)
    study = _item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # detached study, as the standard has it
        ReferencedSOPInstanceUID=source.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = source.FrameOfReferenceUID, ""
    made.ReferencedFrameOfReferenceSequence = [
        _item(
            FrameOfReferenceUID=source.FrameOfReferenceUID,
            RTReferencedStudySequence=[study],
        )
    ]
    made.StructureSetROISequence = [
        _item(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=source.FrameOfReferenceUID,
            ROIName=_name(value, names.get(value)),
            ROIGenerationAlgorithm="AUTOMATIC",
            ROIGenerationDescription=f"medssl {__version__}",
        )
        for number, value in enumerate(values, 1)
    ]
    made.ROIContourSequence = [
        _item(
            ReferencedROINumber=number,
            ROIDisplayColor=_pick_color(number),
            ContourSequence=[
                _item(
                    ContourImageSequence=[_refer(by_instance[plane.instance], plane)],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[f"{coordinate:.10g}" for coordinate in points.ravel()],
                )
                for plane, mask in zip(planes, np.moveaxis(array == value, 2, 0), strict=True)
                for points in _trace(mask, plane)
            ],
        )
        for number, value in enumerate(values, 1)
    ]
    for item in made.ROIContourSequence:
        if not item.ContourSequence:
            del item.ContourSequence  # a class that is nowhere
    made.RTROIObservationsSequence = [
        _item(
            ObservationNumber=number,
            ReferencedROINumber=number,
            RTROIInterpretedType="",
            ROIInterpreter="",
        )
        for number in range(1, len(values) + 1)
    ]
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    write_file(path, lambda temporary: made.save_as(temporary, enforce_file_format=True))


# ---------------------------------------------------------------- the series


def _open_sources(array: NDArray[Any], header: Header) -> tuple[list[Plane], list[Any]]:
    """Return the slices of a scan, and its files in their order, without pixels and people."""
    if list(array.shape) != header["shape"]:
        raise ValueError(f"a mask of shape {array.shape} for a scan of {header['shape']}")
    path = Path(header["path"])
    planes, affine = read_planes(path)
    if list(dict.fromkeys(plane.instance for plane in planes)) != header["instances"]:
        raise InputError(
            f"{path}: holds other images than when it was read: predict again from the files that "
            "are there now"
        )
    places = {plane.instance: plane.place for plane in planes}
    sources = []
    for place in places.values():
        source = read_dataset(place, with_pixels=False)
        lacking = [name for name in _IDENTIFIERS if not source.get(name)]
        if lacking:
            raise InputError(
                f"{place}: its header has no {', '.join(lacking)}, so nothing can refer to it: "
                "write NIfTI"
            )
        sources.append(_strip(source))
        if "NumberOfFrames" in source:
            _share_measures(source)
        elif not source.get("SliceThickness"):
            source.SliceThickness = f"{np.linalg.norm(affine[:3, 2]):.8g}"
    return planes, sources


def _share_measures(source: Any) -> None:
    """Put what all frames have in common where highdicom looks for it."""
    if not source.get("SharedFunctionalGroupsSequence"):
        source.SharedFunctionalGroupsSequence = [_item()]
    shared, first = (
        source.SharedFunctionalGroupsSequence[0],
        source.PerFrameFunctionalGroupsSequence[0],
    )
    for name in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if name not in shared and name in first:
            shared[name] = first[name]


def _strip(source: Any) -> Any:
    """Return a header with what identifies the images, and of people the number and sex alone."""
    source.remove_private_tags()
    source.decode()  # before its character set changes
    source.SpecificCharacterSet = "ISO_IR 192"
    words = re.split(r"[\W_]+", str(source.get("PatientName", "")).lower())
    number = str(source.get("PatientID") or "")
    if any(len(word) > 2 and word in number.lower() for word in words):
        source.PatientID = ""  # it is the name
    for element in list(source):
        is_personal = element.tag.group in _GROUPS_OF_PEOPLE and element.keyword not in _KEPT
        if element.VR == "PN" or is_personal or re.search(_TELLING, element.keyword):
            del source[element.tag]
    for field in _FILLED:
        if field not in source:
            setattr(source, field, "")
    generate = load_package("pydicom.uid").generate_uid
    if not source.get("FrameOfReferenceUID"):  # the same for all images of a series
        source.FrameOfReferenceUID = generate(entropy_srcs=[str(source.SeriesInstanceUID)])
    if "StudyInstanceUID" not in source:
        source.StudyInstanceUID = generate(entropy_srcs=["study", str(source.SeriesInstanceUID)])
    return source


def _number_series(source: Any) -> int:
    """Return a number for a series that is made of another."""
    return 1000 + int(source.get("SeriesNumber") or 0) % 1000


def _find_values(array: NDArray[Any], names: Mapping[int, str]) -> list[int]:
    """Return the values of all classes, whether they have voxels or not."""
    return sorted({*names, *np.unique(array).tolist()} - {0})


def _clean(text: str) -> str:
    """Return a text as a short field of DICOM holds it."""
    return re.sub(r"[\\\x00-\x1f]+", " ", text)[:64]


def _name(value: int, name: str | None) -> str:
    """Return the name of a class."""
    return _clean(name or f"class {value}")


# ---------------------------------------------------------------- segments


def _describe_segment(number: int, value: int, name: str | None, algorithm: Any) -> Any:
    """Return what a SEG says of a class."""
    hd = load_package("highdicom")
    label = _name(value, name)
    category, kind, side = find_code(label)
    codes = load_package("pydicom.sr.codedict").codes
    if kind:
        known = _NOT_IN_PYDICOM.get(kind)
        code = hd.sr.CodedConcept(known[0], "SCT", known[1]) if known else getattr(codes.SCT, kind)
    else:
        code = hd.sr.CodedConcept(str(value), _SCHEME, label)
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=getattr(codes.cid7150, category),
        segmented_property_type=code,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
    )
    if side:
        modifier = hd.sr.CodedConcept.from_code(getattr(codes.SCT, side))
        coded = described.SegmentedPropertyTypeCodeSequence[0]
        coded.SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return described


def find_code(name: str) -> tuple[str, str, str]:
    """Return what a name of a class means in SNOMED CT, in the keywords of pydicom.

    Args:
        name: Such as `liver`, `kidney_left` or `Left Atrium`.

    Returns:
        Category, kind (empty if it is not in the table) and side (empty if it has none).

    Example:
        >>> find_code("kidney_left")
        ('AnatomicalStructure', 'Kidney', 'Left')
        >>> find_code("thing")
        ('AnatomicalStructure', '', '')
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", name).lower().split()
    kind = _find_kind(words)
    side = ""
    if kind not in _SINGLE:
        side = next((word.title() for word in words if word in _SIDES), "")
        kind = _find_kind([word for word in words if word not in _SIDES])
    if kind in _CHANGES:
        return "MorphologicallyAbnormalStructure", kind, side
    if kind in _TISSUES:
        return "Tissue", kind, side
    return "AnatomicalStructure", kind, side if kind else ""


def _find_kind(words: list[str]) -> str:
    """Return the keyword of a name without its side; empty if it is not in the table."""
    text = " ".join(words)
    for candidate in (text, text.removesuffix("s")):
        keyword = _OTHER_WORDS.get(candidate) or candidate.title().replace(" ", "")
        if keyword in _ORGANS | _TISSUES | _CHANGES:
            return keyword
    return ""


# ---------------------------------------------------------------- contours


def _trace(mask: NDArray[np.bool_], plane: Plane) -> Iterator[NDArray[np.float64]]:
    """Yield the closed contours (n, 3) of a mask (I, J) at level 0.5, LPS in mm."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return
    low = np.array([rows[0], columns[0]])
    part = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    # of an array z[y, x], so of the transpose of (I, J)
    lines = load_package("contourpy").contour_generator(z=part.T.astype(np.float64)).lines(0.5)
    for line in lines:
        pixels = line[:-1] + low - 1  # the last point is the first
        yield plane.position + pixels * plane.spacing @ plane.directions


def _refer(image: Any, plane: Plane | None = None) -> Any:
    """Return a reference to an image, or to the frame of it that a slice is."""
    item = _item(
        ReferencedSOPClassUID=image.SOPClassUID, ReferencedSOPInstanceUID=image.SOPInstanceUID
    )
    if plane is not None and "NumberOfFrames" in image:
        item.ReferencedFrameNumber = plane.frame + 1
    return item


def _item(**fields: Any) -> Any:
    """Return an item of a sequence."""
    item = load_package("pydicom").Dataset()
    for name, value in fields.items():
        setattr(item, name, value)
    return item


def _pick_color(number: int) -> list[int]:
    """Return red, green and blue that are unlike those of the numbers beside it."""
    return [round(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618 % 1, 0.8, 1.0)]
