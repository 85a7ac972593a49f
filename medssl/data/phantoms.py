"""Seeded phantoms: data sets for anywhere, hard in the way of real ones.

Legend: I J K voxel axes. A phantom is a list of structures, painted one over the other; each is
a field of signed distances (mm inside of a reference box, positive inside the structure), so
that borders have partial volume. Pose, shape, contrast, bias field, blur and noise are drawn per
case. Structures of the background look like those of the classes: what tells them apart is
shape and place, not intensity.

The family `organs` (trunk with organ, lesion, vessel) is the demo's. `vessels` (head with
ventricle, vessel tree, aneurysm) is for tests alone: nothing is ever tuned on it.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import make_interp_spline
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from medssl.data.io import write_mask
from medssl.runs import write_file, write_text

Family = Literal["organs", "vessels"]
Field = NDArray[np.float64]  # (I, J, K), mm, positive inside
Place = Sequence[float] | NDArray[np.float64]  # (3,), mm
Points = NDArray[np.float64]  # (I, J, K, 3), mm right, anterior, superior of the center

LABEL_NAMES: dict[Family, dict[int, str]] = {
    "organs": {1: "organ", 2: "lesion", 3: "vessel"},
    "vessels": {1: "ventricle", 2: "vessel", 3: "aneurysm"},
}
_BOX = np.array([48.0, 56.0, 40.0])  # mm, the reference box that every shape is scaled to


@dataclass(frozen=True, eq=False)
class Structure:
    """One thing in the body: its signed distance field, gray value and class (0: background)."""

    field: Field
    intensity: float
    label: int = 0


def write_phantoms(
    folder: Path,
    num_labeled: int = 4,
    num_unlabeled: int = 16,
    num_test: int = 12,
    seed: int = 0,
    shape: tuple[int, int, int] = (48, 56, 40),
    family: Family = "organs",
) -> None:
    """Write a data set of phantoms: images/, labels/ and, last, the list cases.csv.

    Unlabeled cases have no label file. Every third scan is stored left-posterior-superior.

    Args:
        folder: Folder of the data set.
        num_labeled: Number of labeled cases.
        num_unlabeled: Number of unlabeled cases.
        num_test: Number of test cases, with labels.
        seed: Seed of all draws: the same seed gives the same voxels.
        shape: Shape (I, J, K) of each scan.
        family: Which anatomy.
    """
    rows = []
    parts = ["labeled"] * num_labeled + ["unlabeled"] * num_unlabeled + ["test"] * num_test
    for index, part in enumerate(parts):
        image, label = make_phantom(seed, index, shape, family)
        affine = _place(shape, index % 3 == 2)
        if index % 3 == 2:
            image, label = np.flip(image, (0, 1)), np.flip(label, (0, 1))
        case_id = f"{family}_{index:03d}"
        image_path = folder / "images" / f"{case_id}.nii.gz"
        label_path = folder / "labels" / f"{case_id}.nii.gz"
        _write_scan(image_path, image, affine)
        if part != "unlabeled":
            write_mask(label_path, label, affine, (0, *LABEL_NAMES[family]))
        rows.append((case_id, image_path, label_path, part))
    _write_list(folder, rows)


def _write_list(folder: Path, cases: Sequence[tuple[str, Path, Path, str]]) -> None:
    """Write cases.csv of case_id, image, label and part; each case is a patient."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["case_id", "image", "label", "patient_id", "split"])
    for case_id, image, label, part in cases:
        stored = "" if part == "unlabeled" else str(label.relative_to(folder))
        rows.writerow([case_id, image.relative_to(folder), stored, case_id, part])
    write_text(folder / "cases.csv", table.getvalue())


def make_phantom(
    seed: int, index: int, shape: tuple[int, int, int], family: Family
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Draw one case: a pure function of its arguments.

    Args:
        seed: Seed of the data set.
        index: Index of the case in it.
        shape: Shape (I, J, K).
        family: Which anatomy.

    Returns:
        Image (I, J, K) int16 in arbitrary units, axes right, anterior, superior; classes
        (I, J, K) uint8.
    """
    rng = np.random.default_rng([seed, index, list(LABEL_NAMES).index(family)])
    draw: Callable[[np.random.Generator, Points], list[Structure]] = {
        "organs": _draw_organs,
        "vessels": _draw_vessels,
    }[family]
    structures = draw(rng, _draw_pose(rng, shape))
    edge = float(np.mean(_BOX / shape))  # mm over which a border is blurred by partial volume
    image = np.full(shape, 0.03)
    label = np.zeros(shape, dtype=np.uint8)
    for structure in structures:
        share = np.clip(0.5 + structure.field / edge, 0, 1)
        image += share * (structure.intensity - image)
        label[structure.field > 0] = structure.label
    return _scan(rng, image), label


def _draw_organs(rng: np.random.Generator, points: Points) -> list[Structure]:
    """Draw a trunk: organ (1) with lesions (2) and a vessel (3), and what resembles them."""
    shape = points.shape[:3]
    tissue = rng.uniform(0.36, 0.48)
    organ_value = tissue + rng.uniform(0.14, 0.28)
    lesion_value = organ_value - rng.uniform(0.16, 0.34)
    vessel_value = organ_value + rng.uniform(0.18, 0.36)
    trunk = _ellipsoid(points, (0, 0, 0), (22, 25, 70))
    center = rng.normal([7.5, 5.0, 0.0], 1.5)
    radii = np.array([11.5, 14.0, 13.0]) * rng.uniform(0.87, 1.15, 3)
    organ = _ellipsoid(points, center, radii) + _noise(rng, shape, 5, 1.3)
    notch = center + radii * [-1.0, rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5)]
    organ = np.minimum(organ, -_ellipsoid(points, notch, radii * rng.uniform(0.35, 0.6, 3)))
    organ = np.minimum(organ, trunk - 3)
    structures = [
        Structure(trunk, rng.uniform(0.15, 0.6)),  # the rim of fat
        Structure(trunk - rng.uniform(2, 4), tissue),
        Structure(_tube(points, [(0, -17, -30), (0, -16, 0), (0, -17, 30)], 5), 0.95),
        Structure(_tube(points, [(0, -20, -30), (0, -20, 30)], 1.8), 0.3),
        Structure(  # a spleen: the organ's gray values on the other side
            _ellipsoid(points, rng.normal([-12, -3, 3], 2), rng.uniform(5, 9, 3))
            + _noise(rng, shape, 5, 1.0),
            organ_value + rng.uniform(-0.08, 0.08),
        ),
        Structure(  # an aorta: the vessel's gray values, but straight and apart from the organ
            _tube(points, [(-4, -9, -30), (-4 + rng.normal(), -9, 0), (-4, -8, 30)], 2.6),
            vessel_value + rng.uniform(-0.06, 0.06),
        ),
    ]
    for value in rng.choice([lesion_value, vessel_value], rng.integers(2, 5)):  # bowel
        place = np.array([rng.uniform(-16, 2), rng.uniform(2, 17), rng.uniform(-17, 17)])
        blob = _ellipsoid(points, place, rng.uniform(2.5, 5, 3)) + _noise(rng, shape, 9, 1.0)
        structures.append(Structure(blob, value + rng.uniform(-0.08, 0.08)))
    structures.append(Structure(organ, organ_value, 1))
    nodes = np.array(  # from beside the spine through the hilum into the organ
        [
            [rng.normal(1, 2), -7, rng.uniform(-22, -12)],
            rng.normal(center + radii * [-0.7, -0.3, 0] + [-5, -5, 0], 2.5),
            center + radii * [-0.7, -0.3, 0],
            center + radii * rng.uniform(-0.35, 0.35, 3),
            center + radii * rng.uniform([0.2, 0.1, 0.2], [0.6, 0.6, 0.7]),
        ]
    )
    vessel = _tube(points, nodes, rng.uniform(2.3, 3.2))
    structures.append(Structure(vessel, vessel_value, 3))
    for _ in range(rng.integers(1, 4)):
        direction = rng.normal(size=3)
        place = center + radii * rng.uniform(0.25, 0.65) * direction / np.linalg.norm(direction)
        lesion = _ellipsoid(points, place, rng.uniform(4, 6.5, 3)) + _noise(rng, shape, 9, 0.9)
        structures.append(Structure(np.minimum(lesion, organ + 0.5), lesion_value, 2))
    return structures


def _draw_vessels(rng: np.random.Generator, points: Points) -> list[Structure]:
    """Draw a head: curved ventricle (1), vessel tree (2) with an aneurysm (3), and the like."""
    shape = points.shape[:3]
    brain = rng.uniform(0.45, 0.6)
    blood = brain + rng.uniform(0.2, 0.4)
    head = _ellipsoid(points, (0, 0, 0), (21, 25, 19)) + _noise(rng, shape, 4, 1.0)
    fluid = brain - rng.uniform(0.2, 0.35)
    arch = rng.normal([(5, -12, -4), (7, -3, 4), (5, 6, 5), (4, 12, 0)], 1)
    fork = rng.normal([-5, 0, -4], 1.5)
    radius = rng.uniform(1.6, 2.2)
    tree = [_tube(points, np.array([(-3, -8, -22), np.add(fork, (1, -4, -3)), fork]), radius * 1.2)]
    for way in ((-8, 9, 8), (-2, 11, -6)):
        tip = rng.normal(np.add(fork, way), 2)
        bend = rng.normal((fork + tip) / 2, 2)
        tree.append(_tube(points, np.array([fork, bend, tip]), radius))
    bulb = _ellipsoid(points, rng.normal(fork, 1), rng.uniform(3, 4.5, 3))
    return [
        Structure(head, 0.9),
        Structure(head - 2.5, brain),
        Structure(_ellipsoid(points, (10, 8, 8), rng.uniform(2, 4, 3)), blood),
        Structure(_ellipsoid(points, (-9, -10, 6), rng.uniform(2, 5, 3)), fluid),
        Structure(_tube(points, arch, rng.uniform(2.8, 4.2)), fluid, 1),
        Structure(np.minimum(np.maximum.reduce(tree), head - 3), blood, 2),
        Structure(bulb, blood + rng.uniform(-0.05, 0.1), 3),
    ]


def _draw_pose(rng: np.random.Generator, shape: tuple[int, int, int]) -> Points:
    """Return where in the anatomy each voxel lies: turned, scaled, shifted and bent."""
    steps = _BOX / shape
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    points = (grid - (np.asarray(shape) - 1) / 2) * steps
    turn = Rotation.from_euler("xyz", rng.normal(0, [5, 5, 9]), degrees=True).as_matrix()
    bend = np.stack([_noise(rng, shape, 5, 1.2) for _ in range(3)], -1)
    scale = rng.uniform(0.82, 1.05, 3)
    posed: Points = (points + rng.normal(0, 1.5, 3)) @ turn / scale + bend
    return posed


def _scan(rng: np.random.Generator, image: Field) -> NDArray[np.int16]:
    """Take the picture: texture, blur, bias field, noise, and units that no two scans share."""
    shape = image.shape
    image = image * (1 + _noise(rng, shape, 16, rng.uniform(0.02, 0.06)))
    image = ndimage.gaussian_filter(image, rng.uniform(0.4, 0.9))
    image = image * np.exp(_noise(rng, shape, 3, rng.uniform(0.05, 0.16)))
    level = rng.uniform(0.02, 0.055)
    noise = rng.normal(0, level, (2, *shape))
    magnitude = np.hypot(image + noise[0], noise[1])  # Rician, as in magnitude MRI
    stretched = magnitude ** rng.uniform(0.8, 1.25) * rng.uniform(400, 1600)
    scan: NDArray[np.int16] = np.rint(np.clip(stretched, 0, 32_000)).astype(np.int16)
    return scan


def _ellipsoid(points: Points, center: Place, radii: Place) -> Field:
    """Return the approximate signed distance to an ellipsoid, mm, positive inside."""
    size = np.asarray(radii, dtype=np.float64)
    field: Field = (1 - np.linalg.norm((points - center) / size, axis=-1)) * size.min()
    return field


def _tube(points: Points, nodes: Sequence[Place] | Field, radius: float) -> Field:
    """Return the signed distance to a tube along a smooth curve through nodes (n, 3), mm."""
    knots = np.asarray(nodes, dtype=np.float64)
    along = np.linspace(0, 1, len(knots))
    curve = make_interp_spline(along, knots, k=min(len(knots) - 1, 3))(np.linspace(0, 1, 120))
    reach = radius + 3  # farther away the exact distance does not matter
    near = ((points > curve.min(0) - reach) & (points < curve.max(0) + reach)).all(-1)
    distance = np.full(points.shape[:3], reach)
    distances, _ = cKDTree(curve).query(points[near], distance_upper_bound=reach)
    distance[near] = np.minimum(distances, reach)
    return radius - distance


def _noise(
    rng: np.random.Generator, shape: Sequence[int], num_knots: int, amplitude: float
) -> Field:
    """Return a smooth random field with the given standard deviation: cubic between knots."""
    field: Field = rng.normal(size=(num_knots,) * 3)
    for size in shape:  # one axis after the other; each becomes the last
        spline = make_interp_spline(
            np.linspace(0, 1, num_knots), np.eye(num_knots), k=min(num_knots - 1, 3)
        )
        field = np.tensordot(field, spline(np.linspace(0, 1, size)), axes=(0, 1))
    return field * (amplitude / max(float(field.std()), 1e-6))


def _place(shape: tuple[int, int, int], is_lps: bool) -> NDArray[np.float64]:
    """Return the affine (4, 4) of a scan of the reference box, centered in the world."""
    steps = _BOX / shape * ([-1, -1, 1] if is_lps else [1, 1, 1])
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.asarray(shape) - 1) / 2
    return affine


def _write_scan(path: Path, image: NDArray[np.int16], affine: NDArray[np.float64]) -> None:
    """Write an integer scan."""
    scan = nib.Nifti1Image(image, affine)
    scan.header.set_xyzt_units("mm")
    write_file(path, lambda temporary: nib.save(scan, temporary))
