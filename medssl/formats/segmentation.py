"""Labels in from DICOM: segmentation objects (SEG) by segment, structure sets (RTSTRUCT) by region.

Legend: I J K voxel axes of the scan that the label belongs to. Each frame of a SEG and each contour
of an RTSTRUCT is put where its own header says that it lies; slices that a file leaves out, as
empty ones mostly are, stay background. Nothing is resampled: what lies on another grid is refused,
and so is what overlaps, since a voxel has one class.

Source: DICOM PS3.3, C.8.20 (segmentation), C.8.8.6 (ROI contour).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.formats.dicom import (
    LPS_TO_RAS,
    Plane,
    decode_frames,
    find_planes,
    get_shared,
    open_scan,
    read_dataset,
    read_fields,
    refuse_damaged,
)
from medssl.formats.scan import Scan
from medssl.transforms.geometry import Shape, grid_spacing, show_sizes

_OFF = 0.1  # voxels that a voxel of a SEG may lie off one of the scan
_BETWEEN = 0.2  # slices that a contour may lie off one

Region = tuple[int, str, Iterator[NDArray[np.intp]]]
"""Number and name of a segment, and the indices (3, n) of its voxels, piece by piece."""


@refuse_damaged
def read_segments(
    path: Path, source: Scan, values: Mapping[str, int] | None = None
) -> tuple[NDArray[Any], dict[int, str]]:
    """Read a SEG or an RTSTRUCT as a label on the grid of a scan.

    Args:
        path: The file.
        source: The scan. If it was read from DICOM, the file must refer to its images or have its
            frame of reference.
        values: Label value of each name to read; others are skipped. None takes all, by their
            own numbers. A voxel inside an odd number of contours of a region is part of it; a
            contour that is stored twice counts once.

    Returns:
        Label values (I, J, K), 0 = background, and the name of each value, with voxels or not.

    Raises:
        InputError: It is neither, or fractional, belongs to another scan, lies on another grid, two
            of its segments overlap, a wanted one is not there, frames are those of a segment that
            is not, or a region was drawn on some of its slices alone: two of them or more have
            neither neighbor drawn, and lie before or behind another slice of it across a gap.
            Between pieces of two slices or more a gap may be real, and stays background.
    """
    dataset = read_dataset(path, with_pixels=True)
    modality = _check_modality(path, dataset)
    _refuse_strangers(path, dataset, source)
    find = _find_segments if modality == "SEG" else _find_regions
    return _fill(path, source, find(path, dataset, source), values)


@refuse_damaged
def list_segments(path: Path) -> dict[int, str]:
    """Return the names of the segments of a SEG, or of the regions of an RTSTRUCT, by number.

    Raises:
        InputError: It is neither.
    """
    dataset = read_fields(path, "Modality", "SegmentSequence", "StructureSetROISequence")
    if _check_modality(path, dataset) == "SEG":
        segments = [(int(one.SegmentNumber), one) for one in dataset.SegmentSequence]
        return {number: _name_segment(one) for number, one in segments if number}
    return {int(roi.ROINumber): _name_region(roi) for roi in _list_regions(dataset)}


def _name_segment(segment: Any) -> str:
    """Return the name of a segment of a SEG."""
    return str(segment.get("SegmentLabel") or f"segment {int(segment.SegmentNumber)}")


def _name_region(region: Any) -> str:
    """Return the name of a region of an RTSTRUCT."""
    return str(region.get("ROIName") or f"region {region.ROINumber}")


def _list_regions(dataset: Any) -> Iterable[Any]:
    """Return the descriptions of the regions of an RTSTRUCT."""
    regions: Iterable[Any] = dataset.get("StructureSetROISequence", ())
    return regions


def _check_modality(path: Path, dataset: Any) -> str:
    """Return SEG or RTSTRUCT, or refuse a file that is neither."""
    modality = str(dataset.get("Modality") or "")
    if modality not in ("SEG", "RTSTRUCT"):
        raise InputError(
            f"{path}: a label in DICOM is a segmentation (SEG) or a structure set (RTSTRUCT), this "
            f"is {modality or 'no DICOM file'}"
        )
    return modality


@refuse_damaged
def read_note(path: Path) -> str:
    """Return the note that `medssl.formats.segmentation_out` left in a file; empty if none."""
    dataset = read_dataset(path, with_pixels=False)
    is_seg = dataset.get("Modality") == "SEG"
    note = dataset.get("ContentDescription" if is_seg else "StructureSetDescription")
    return str(note or "")


def _fill(
    path: Path, source: Scan, regions: list[Region], values: Mapping[str, int] | None
) -> tuple[NDArray[Any], dict[int, str]]:
    """Return the label of all wanted regions, and their names."""
    names = [name for _, name, _ in regions]
    selection = set(names if values is None else values)
    lacking = sorted(selection - set(names))
    doubled = sorted(name for name in selection if names.count(name) > 1)
    if lacking or (doubled and values is not None):
        problem = f"no segment is called {lacking}" if lacking else f"several are called {doubled}"
        raise InputError(f"{path}: {problem}; it holds {names}")
    taken = {
        number if values is None else values[name]: (name, pieces)
        for number, name, pieces in regions
        if name in selection
    }
    label = np.zeros(source.shape, dtype=np.min_scalar_type(max(taken, default=0)))
    for value, (name, pieces) in taken.items():
        for i, j, k in pieces:
            others = set(np.unique(label[i, j, k]).tolist()) - {0, value}
            if others:
                other = taken[others.pop()][0]
                raise InputError(
                    f"{path}: {name!r} and {other!r} overlap, as on slice {k[0] + 1}, and a voxel "
                    "has one class: name those that are wanted, or take the overlap out of one"
                )
            label[i, j, k] = value
    return label, {value: name for value, (name, _) in taken.items()}


@refuse_damaged
def list_references(path: Path) -> set[str]:
    """Return the UIDs of the images and the frame of reference of a series, or of a mask's scan.

    Empty for a series that is refused when it is read.
    """
    if path.is_file() and path.suffix.lower() != ".zip":
        dataset = read_dataset(path, with_pixels=False)
        if dataset.get("Modality") in ("SEG", "RTSTRUCT"):
            return _find_references(dataset)
    try:
        header = open_scan(path).header or {}
    except InputError:
        return set()
    return {header["frame_of_reference"], *header["instances"]} - {""}


def _find_references(dataset: Any) -> set[str]:
    """Return the UIDs of the images and the frame of reference that a file refers to."""
    keywords = (
        *("FrameOfReferenceUID", "ReferencedFrameOfReferenceUID"),
        "ReferencedSOPInstanceUID",
    )
    return {str(element.value) for element in dataset.iterall() if element.keyword in keywords}


def _refuse_strangers(path: Path, dataset: Any, source: Scan) -> None:
    """Refuse a label that refers to other images than those of a scan from DICOM."""
    header = source.header or {}
    if header.get("format") != "dicom":
        return
    uids = {header["frame_of_reference"], *header["instances"]} - {""}
    if uids & _find_references(dataset):
        return
    raise InputError(
        f"{path}: belongs to other images than {header['path']}: it refers to none of them, "
        "and has another frame of reference"
    )


# ---------------------------------------------------------------- segmentation objects


def _find_segments(path: Path, dataset: Any, source: Scan) -> list[Region]:
    """Return the segments of a SEG."""
    kind = dataset.get("SegmentationType")
    if kind not in ("BINARY", "LABELMAP"):
        raise InputError(
            f"{path}: a segmentation of the type {kind}, of which only BINARY and LABELMAP say for "
            "each voxel what it is: save it as BINARY"
        )
    _refuse_other_slices(path, dataset, source)
    planes = find_planes(path, dataset)
    shared = get_shared(dataset)
    numbers = [
        _read_number(frame) or _read_number(shared)
        for frame in dataset.PerFrameFunctionalGroupsSequence
    ]
    frames = list(decode_frames(path, dataset, planes)) if kind == "LABELMAP" else []
    stored = {int(number) for number in {*numbers}.union(*map(np.unique, frames))}
    _refuse_unlisted(path, dataset, stored, kind)
    regions: list[Region] = []
    for segment in dataset.SegmentSequence:
        number = int(segment.SegmentNumber)
        name = _name_segment(segment)
        segment_planes = [
            plane
            for plane, frame_number in zip(planes, numbers, strict=True)
            if frame_number == number
        ]
        if kind == "BINARY":
            voxels = _find_voxels(
                path, name, segment_planes, decode_frames(path, dataset, segment_planes), 1, source
            )
        elif number:  # 0 is the background
            voxels = _find_voxels(path, name, planes, frames, number, source)
        else:
            continue
        regions.append((number, name, voxels))
    return regions


def _refuse_unlisted(path: Path, dataset: Any, stored: set[int], kind: str) -> None:
    """Refuse voxels of segments that are not listed; in a labelmap 0 and padding are background.

    Args:
        path: For the message.
        dataset: The file.
        stored: Numbers of the segments that have voxels, or frames; 0 where a frame names none.
        kind: Its SegmentationType.
    """
    listed = {int(segment.SegmentNumber) for segment in dataset.SegmentSequence}
    if kind == "LABELMAP":
        listed |= {0, int(dataset.get("PixelPaddingValue") or 0)}
    unlisted = sorted(stored - listed)
    if unlisted:
        others = f"segments that it does not list, {unlisted[:12]}"
        raise InputError(
            f"{path}: holds voxels of {others if any(unlisted) else 'no segment'}: save it again "
            "with a segment for each, or erase them"
        )


def _find_voxels(
    path: Path,
    name: str,
    planes: list[Plane],
    frames: Iterable[NDArray[Any]],
    stored: int,
    source: Scan,
) -> Iterator[NDArray[np.intp]]:
    """Yield the indices (3, n) in the scan of the pixels of a segment, frame by frame."""
    for plane, frame in zip(planes, frames, strict=True):
        yield _place(path, name, plane, np.isin(frame.T, stored), source)


def _read_number(groups: Any) -> int:
    """Return the number of the segment of a frame, or of all frames; 0 if none is given."""
    identified = groups.get("SegmentIdentificationSequence")
    return int(identified[0].ReferencedSegmentNumber) if identified else 0


def _refuse_other_slices(path: Path, dataset: Any, source: Scan) -> None:
    """Refuse a SEG whose slices lie at another distance than those of the scan."""
    measures = get_shared(dataset).get("PixelMeasuresSequence")
    step = measures[0].get("SpacingBetweenSlices") if measures else None
    spacing = grid_spacing(source.affine)
    if step and source.shape[2] > 1 and np.abs(np.array(spacing) / float(step) - 1).min() > _OFF:
        raise InputError(
            f"{path}: its slices are {float(step):.4g} mm apart, the voxels of the scan are "
            f"{show_sizes(spacing)} mm: save it on the grid of the scan"
        )


def _place(
    path: Path, name: str, plane: Plane, mask: NDArray[np.bool_], source: Scan
) -> NDArray[np.intp]:
    """Return the indices (3, n) in the scan of the pixels of a mask (I, J) of a frame."""
    to_scan = np.linalg.inv(source.affine) @ LPS_TO_RAS
    steps = to_scan[:3, :3] @ (plane.directions.T * plane.spacing)  # voxels of a step along I, J
    start = (to_scan @ [*plane.position, 1.0])[:3]
    exact = start[:, None] + steps @ np.array(np.nonzero(mask))
    voxels: NDArray[np.intp] = np.rint(exact).astype(np.intp)
    beside = np.abs(exact - voxels).max(initial=np.abs(np.abs(steps).max(0) - 1).max())
    if beside > _OFF:
        raise InputError(
            f"{path}: {name!r} lies on another grid than the scan, {beside:.2f} voxels beside it: "
            "save it on the grid of the scan"
        )
    outside = (voxels < 0) | (voxels >= np.array(source.shape)[:, None])
    if outside.any():
        raise InputError(
            f"{path}: {name!r} reaches beyond the scan, to voxel "
            f"{tuple(voxels[:, outside.any(0).argmax()].tolist())} of {source.shape}: it belongs "
            "to another one"
        )
    return voxels


# ---------------------------------------------------------------- structure sets


def _find_regions(path: Path, dataset: Any, source: Scan) -> list[Region]:
    """Return the regions of interest of an RTSTRUCT that have an inside."""
    names = {int(roi.ROINumber): _name_region(roi) for roi in _list_regions(dataset)}
    contours: dict[int, list[Any]] = {number: [] for number in names}
    for roi in dataset.get("ROIContourSequence", ()):
        contours[int(roi.ReferencedROINumber)] += roi.get("ContourSequence") or ()
    regions: list[Region] = []
    for number, drawn in contours.items():
        areas = [one for one in drawn if str(one.ContourGeometricType).startswith("CLOSED")]
        if areas or not drawn:  # else points or lines, such as an isocenter
            voxels = _rasterize(path, names[number], areas, source)
            regions.append((number, names[number], voxels))
    return regions


def _rasterize(
    path: Path, name: str, contours: list[Any], source: Scan
) -> Iterator[NDArray[np.intp]]:
    """Yield the indices (3, n) of the voxels whose center lies inside an odd number of contours."""
    polygons: dict[int, dict[bytes, NDArray[np.float64]]] = {}
    to_scan = np.linalg.inv(source.affine) @ LPS_TO_RAS
    for contour in contours:
        k, polygon = _read_polygon(path, name, contour, to_scan, source.shape)
        points = np.unique(polygon.round(3) + 0.0, axis=0)  # from whichever point it begins
        polygons.setdefault(k, {})[points.tobytes()] = polygon
    slices = sorted(polygons)
    faces = []  # whether the contours before and behind a gap overlap
    last = np.zeros(source.shape[:2], dtype=bool)
    for before, k in zip([*slices[:1], *slices], slices, strict=False):
        mask = fill_polygons(list(polygons[k].values()), source.shape[:2])
        faces.append(k - before > 1 and bool((last & mask).any()))
        last = mask
        i, j = np.nonzero(mask)
        yield np.array([i, j, np.full_like(i, k)])
    _refuse_gaps(path, name, slices, faces)


def _refuse_gaps(path: Path, name: str, slices: list[int], faces: list[bool]) -> None:
    """Refuse a region of which slices were left out, see `read_segments`.

    Args:
        path: For the message.
        name: For the message.
        slices: The drawn ones, in order.
        faces: Whether there is a gap before each, and the contours on both sides of it overlap.
    """
    steps = np.diff(slices)
    step = int(np.gcd.reduce(steps)) if len(slices) > 3 else 1
    if step > 1 and np.median(steps) == step:
        where = f"one of {step} slices of the scan"
    else:
        lone = [
            k + 1
            for k, faces_last, faces_next in zip(slices, faces, [*faces, False][1:], strict=True)
            if (faces_last or faces_next) and not {k - 1, k + 1} & set(slices)
        ]
        if len(lone) < 2:
            return
        more = ", ..." if len(lone) > 5 else ""
        where = f"single slices of the scan ({', '.join(map(str, lone[:5]))}{more})"
    raise InputError(
        f"{path}: {name!r} is drawn on {where}, which would leave the others empty: interpolate "
        "between its contours where it was drawn"
    )


def _read_polygon(
    path: Path, name: str, contour: Any, to_scan: NDArray[Any], shape: Shape
) -> tuple[int, NDArray[np.float64]]:
    """Return the slice of a contour, and its points (n, 2) in pixels along I and J."""
    points = np.array([float(number) for number in contour.ContourData]).reshape(-1, 3)
    i, j, k = to_scan[:3, :3] @ points.T + to_scan[:3, 3:]
    nearest = round(float(np.median(k)))
    x, y, z = points[0]
    where = ""
    if not 0 <= nearest < shape[2]:
        where = "beyond the slices"
    elif np.abs(k - nearest).max() > _BETWEEN:
        where = "between or across the slices"
    if where:
        raise InputError(
            f"{path}: a contour of {name!r} at ({x:.2f}, {y:.2f}, {z:.2f}) lies {where} of the "
            f"scan (at {k.min():.2f} to {k.max():.2f} of 0 to {shape[2] - 1}): it was drawn on "
            "another one"
        )
    for axis, places, size in (("I", i, shape[0]), ("J", j, shape[1])):
        if places.max() < -0.5 or places.min() > size - 0.5:
            raise InputError(
                f"{path}: a contour of {name!r} at ({x:.2f}, {y:.2f}, {z:.2f}) lies beside the "
                f"scan (at {places.min():.2f} to {places.max():.2f} of 0 to {size - 1} along "
                f"{axis}): it was drawn on another one"
            )
    return nearest, np.stack([i, j], 1)


def fill_polygons(polygons: list[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels have their center inside an odd number of polygons.

    Args:
        polygons: Closed ones, of points (n, 2) along I and J; the first pixel has its center at 0.
        shape: Shape (I, J) of the mask.

    Returns:
        A mask (I, J).

    Example:
        A square with a smaller one in it is a frame.

        >>> square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]]) + 0.5
        >>> int(fill_polygons([square, square / 2 + 0.8], (6, 6)).sum())
        12
    """
    starts = np.concatenate(polygons)
    ends = np.concatenate([np.roll(polygon, -1, 0) for polygon in polygons])
    rises = (starts[:, 1] < ends[:, 1])[:, None]
    (i0, j0), (i1, j1) = np.where(rises, starts, ends).T, np.where(rises, ends, starts).T
    # the columns of pixel centers that each edge crosses, its lower end included
    first, last = (np.clip(np.ceil(j), 0, shape[1]).astype(np.intp) for j in (j0, j1))
    edges = np.repeat(np.arange(len(starts)), last - first)
    order = np.arange(len(edges)) - np.repeat(
        np.cumsum(last - first) - (last - first), last - first
    )
    columns = first[edges] + order
    slope = (i1 - i0)[edges] / (j1 - j0)[edges]
    crossed = np.ceil(i0[edges] + (columns - j0[edges]) * slope)
    turns = np.zeros((shape[0] + 1, shape[1]), dtype=np.int32)
    # from the crossing on, one more edge lies behind
    np.add.at(turns, (np.clip(crossed, 0, shape[0]).astype(np.intp), columns), 1)
    inside: NDArray[np.bool_] = turns[:-1].cumsum(0) % 2 == 1
    return inside
