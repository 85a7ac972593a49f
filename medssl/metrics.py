"""Metrics per case and class in the native grid, and bootstrap intervals over cases.

Policy, where a structure is absent in the reference, in the prediction, or in both:

=========  ===========  ========  =================  ============  ======
reference  prediction   dice      hd95               surface_dice  missed
=========  ===========  ========  =================  ============  ======
present    present      measured  measured           measured      0
present    absent       0         image's diagonal   0             1
absent     present      0         image's diagonal   0             0
absent     absent       n/a       n/a                n/a           0
=========  ===========  ========  =================  ============  ======

A false alarm costs what a miss costs, as in the BraTS challenges; n/a is None here and an empty
cell in a table. Of one model alone an n/a is in no mean (`mean_known`). Where models stand side by
side, the n/a of one where another has a value is perfect (dice 1, hd95 0), since the other has a
false alarm there; where all have n/a the class says nothing (`fill_absent`). This is done class by
class, before the mean over classes (`compare_cases`): see docs/metrics.md. Ignored voxels (255 in
the reference) count nowhere.

An axis of a single voxel counts for nothing but the volume: a slice has an outline, not a surface
on both of its faces. Axes: I J K are voxel axes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree

from medssl.config import IGNORE, InputError

Mask = NDArray[np.bool_]
Row = dict[str, str | float | int | None]
"""A row of ``per_case.csv``: ``case_id``, ``patient_id`` and numbers, None for n/a."""

ID_COLUMNS = ("case_id", "patient_id")
"""Columns of ``per_case.csv`` that are texts; all others are numbers."""

Values = Iterable[float | None]

NUM_RESAMPLES = 10_000
SEED = 0  # of the resampling: the same table has the same interval
_MOST_TOLERATED = 4.0  # median spacings: 1 mm down to 0.25 mm, as in scans of people
MIN_CASES_FOR_VERDICT = 8
"""Patients, each with a case that was not trained on, from which on a verdict is given."""

Verdict = Literal["gain", "no gain", "no verdict", "not measured"]


class Estimate(TypedDict):
    """A mean over cases with its 95 % interval; None where there are too few values for it.

    ``n`` cases of ``num_patients`` patients are in it; ``num_dropped`` others had no value.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    num_patients: int
    num_dropped: int


class Difference(Estimate):
    """The mean of a paired difference, with the two-sided bootstrap p."""

    p: float | None


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class in one case; None is n/a.

    Attributes:
        dice: Overlap of the masks, fraction in [0, 1].
        hd95_mm: The larger of the two directed 95th percentiles of surface distance, mm
            (voxels where no spacing was given).
        surface_dice: Share of both surfaces that lies within the tolerance, [0, 1].
        volume_ml: Predicted volume, ml (voxels where no spacing was given).
        reference_ml: Volume in the reference, ml (voxels where no spacing was given).
        missed: 1 where the reference has the class and the prediction has not, else 0.
    """

    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None
    volume_ml: float
    reference_ml: float
    missed: int


def case_metrics(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    spacing: Sequence[float] | None,
    num_classes: int,
    tolerance: float | None = None,
) -> dict[int, ClassMetrics]:
    """Compare a prediction with a reference, class by class, background left out.

    Args:
        prediction: Class indices (I, J, K).
        reference: Class indices (I, J, K); 255 is ignored.
        spacing: Voxel size along I, J, K in mm; None measures in voxels.
        num_classes: Number of classes with background.
        tolerance: Of surface_dice, in mm (voxels without spacing); None takes
            ``surface_tolerance(spacing)``.

    Raises:
        ValueError: If shapes differ, or a value is no class index.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ")
    if spacing is not None and (len(spacing) != prediction.ndim or min(spacing) <= 0):
        raise ValueError(f"spacing {tuple(spacing)} does not fit {prediction.ndim} axes")
    for name, array in (("prediction", prediction), ("reference", reference)):
        strange = _find_strange(array, reference, num_classes)
        if strange:
            raise ValueError(f"{name} holds {strange}, which are no classes 0..{num_classes - 1}")
    if tolerance is None:
        tolerance = surface_tolerance(spacing)
    boxes = [find_objects(array, num_classes - 1) for array in (prediction, reference)]
    metrics = {}
    for c, both in enumerate(zip(*boxes, strict=True), 1):
        box = _join_boxes([box for box in both if box], prediction.ndim)
        ours, theirs = prediction[box], reference[box]
        ignored = theirs == IGNORE
        masks = ((ours == c) & ~ignored, theirs == c, ignored)
        metrics[c] = _measure_class(*masks, spacing, tolerance, prediction.shape)
    return metrics


def _find_strange(
    array: NDArray[np.integer], reference: NDArray[np.integer], num_classes: int
) -> list[int]:
    """Return the first few values that are no classes where the reference is not ignored."""
    strange: set[int] = set()
    for plane, known in zip(array, reference, strict=True):
        outside = ((plane < 0) | (plane >= num_classes)) & (known != IGNORE)
        strange.update(np.unique(plane[outside]).tolist())
    return sorted(strange)[:5]


def _join_boxes(boxes: Sequence[tuple[slice, ...]], num_axes: int) -> tuple[slice, ...]:
    """Return the slices that hold several boxes, with a voxel around them; none for no box."""
    if not boxes:
        return (slice(0),) * num_axes
    return tuple(
        slice(max(min(part.start for part in parts) - 1, 0), max(part.stop for part in parts) + 1)
        for parts in zip(*boxes, strict=True)
    )


def surface_tolerance(spacing: Sequence[float] | None) -> float:
    """Return the default tolerance of surface_dice: 1 mm, but 1 to 4 times the median spacing.

    Without a spacing it is 1 voxel.

    Example:
        >>> [surface_tolerance((size,) * 3) for size in (2.0, 0.5, 0.25, 0.05)]
        [2.0, 1.0, 1.0, 0.2]
    """
    if spacing is None:
        return 1.0
    middle = float(np.median(spacing))
    return min(max(1.0, middle), _MOST_TOLERATED * middle)


def mean_dice(metrics: dict[int, ClassMetrics]) -> float | None:
    """Return the mean Dice over the classes present in reference or prediction, None if none is."""
    return mean_known(m.dice for m in metrics.values())


def mean_known(values: Values) -> float | None:
    """Return the mean of what one model has alone: an n/a (None, NaN) is in no mean.

    Example:
        >>> mean_known([0.75, None, 0.25])
        0.5
    """
    array = _to_array(values)
    known = array[np.isfinite(array)]
    return float(known.mean()) if len(known) else None


def fill_absent(arms: Sequence[Values], perfect: float = 1.0) -> list[list[float | None]]:
    """Return values of the same cases for models that stand side by side.

    Args:
        arms: For each model one value a case; None or NaN: n/a.
        perfect: What the n/a of a model is where another one has a value, and so a false alarm.

    Example:
        >>> fill_absent([[0.9, 0.0, None], [0.4, None, None]])
        [[0.9, 0.0, None], [0.4, 1.0, None]]
    """
    table = np.array([_to_array(arm) for arm in arms])
    filled = np.where(np.isnan(table) & np.isfinite(table).any(axis=0), perfect, table)
    return [[None if np.isnan(v) else v for v in arm] for arm in filled.tolist()]


def compare_cases(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[float | None]]:
    """Return the dice of each case, the mean over classes, for models that stand side by side.

    Args:
        tables: For each model the rows of the same cases in the same order, with ``dice/<class>``
            of the classes that all of them have, or only ``dice``.

    Raises:
        ValueError: If the numbers of cases differ.
    """
    first = tables[0][0] if tables and tables[0] else {}
    classes = [c for c in first if c.startswith("dice/") and all(c in t[0] for t in tables)]
    means: list[list[float | None]] = [[] for _ in tables]
    for rows in zip(*tables, strict=True):
        columns = [[row[column] for column in classes or ["dice"]] for row in rows]
        for arm, values in zip(means, fill_absent(columns), strict=True):
            arm.append(mean_known(values))
    return means


def _measure_class(
    prediction: Mask,
    reference: Mask,
    ignored: Mask,
    spacing: Sequence[float] | None,
    tolerance: float,
    shape: Sequence[int],
) -> ClassMetrics:
    """Measure one class in the part that holds it of a scan (I, J, K), under the policy above."""
    size = np.ones(prediction.ndim) if spacing is None else np.asarray(spacing, dtype=np.float64)
    num_predicted, num_reference = int(prediction.sum()), int(reference.sum())
    unit = 1.0 if spacing is None else float(np.prod(size)) / 1000.0
    thin = tuple(axis for axis, count in enumerate(shape) if count == 1)
    if num_predicted + num_reference and 0 < len(thin) < prediction.ndim:
        size, shape = np.delete(size, thin), np.delete(shape, thin).tolist()
        prediction, reference, ignored = (
            mask.squeeze(thin) for mask in (prediction, reference, ignored)
        )
    dice: float | None = None
    hd95: float | None = None
    surface: float | None = None
    if num_predicted and num_reference:
        dice = 2.0 * int((prediction & reference).sum()) / (num_predicted + num_reference)
        hd95, surface = _compare_surfaces(prediction, reference, ignored, size, tolerance)
    elif num_predicted or num_reference:
        diagonal = float(np.linalg.norm(size * shape))
        dice, hd95, surface = 0.0, diagonal, 0.0
    return ClassMetrics(
        dice=dice,
        hd95_mm=hd95,
        surface_dice=surface,
        volume_ml=num_predicted * unit,
        reference_ml=num_reference * unit,
        missed=int(num_reference > 0 and num_predicted == 0),
    )


def _compare_surfaces(
    prediction: Mask, reference: Mask, ignored: Mask, size: NDArray[np.float64], tolerance: float
) -> tuple[float, float]:
    """Return hd95 and surface_dice of two masks that are not empty."""
    box = _join_boxes(find_objects((prediction | reference).view(np.uint8)), prediction.ndim)
    prediction, reference, ignored = prediction[box], reference[box], ignored[box]
    surfaces = [_find_surface(mask, ignored) for mask in (prediction, reference)]
    if not all(len(points) for points in surfaces):  # every border lies against ignored voxels
        nothing = np.zeros_like(ignored)
        surfaces = [_find_surface(mask, nothing) for mask in (prediction, reference)]
    ours, theirs = (points * size for points in surfaces)
    there = np.asarray(KDTree(theirs).query(ours)[0])
    back = np.asarray(KDTree(ours).query(theirs)[0])
    hd95 = float(max(np.percentile(there, 95), np.percentile(back, 95)))
    reach = tolerance * (1.0 + 1e-5)  # one voxel off stays within a tolerance of one voxel
    num_close = int((there <= reach).sum() + (back <= reach).sum())
    return hd95, num_close / (len(there) + len(back))


def _find_surface(mask: Mask, ignored: Mask) -> NDArray[np.int64]:
    """Return the indices (n, 3) of voxels with a face outside the mask, ignored ones not counted.

    The outside of the image counts as outside of the mask, as in MONAI. Where the annotation
    ends (an ignored neighbor) nobody knows of a surface, so there is none.
    """
    return np.argwhere(mask & ~binary_erosion(mask | ignored))


def bootstrap_mean(values: Values, patients: Sequence[str] | None = None) -> Estimate:
    """Return the mean of one value per case with its 95 % interval.

    Percentile bootstrap over patients, with all of their cases, 10,000 resamples. It assumes
    independent patients, and with few of them it is too narrow (at 8 normally distributed cases it
    covers 89 %, at 40 94 %).

    Args:
        values: One value a case; None and NaN are left out and counted.
        patients: The patient of each case; None: each case is of another one.

    Returns:
        ``mean, low, high`` (None without a value; no interval from a single patient), ``n`` values
        used, their ``num_patients``, ``num_dropped``. Source: Efron & Tibshirani 1993, chapter 13.
    """
    return _estimate(_to_array(values), patients)[0]


def paired_difference(a: Values, b: Values, patients: Sequence[str] | None = None) -> Difference:
    """Return the mean of a - b over cases, with the 95 % interval of the paired bootstrap.

    Args:
        a: The dice of each case, averaged over seeds before; None or NaN: n/a. A mean over classes
            is that of ``compare_cases``.
        b: The same cases in the same order; see the policy above for n/a. Pairs without a value on
            both sides are left out and counted.
        patients: As in ``bootstrap_mean``.

    Returns:
        As ``bootstrap_mean``, and ``p``: twice the smaller share of resampled means on one side
        of zero (None where there is no interval).

    Raises:
        ValueError: If the numbers of cases differ.
    """
    left, right = _to_array(a), _to_array(b)
    if left.shape != right.shape:
        raise ValueError(f"pairs need the same cases, got {len(left)} and {len(right)}")
    left, right = (_to_array(side) for side in fill_absent((left.tolist(), right.tolist())))
    estimate, means = _estimate(left - right, patients)
    if len(means) == 0:
        return {**estimate, "p": None}
    smaller = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return {**estimate, "p": min(1.0, 2.0 * (1 + smaller) / (1 + NUM_RESAMPLES))}


class DrawDifference(TypedDict):
    """A mean difference over draws of the labeled cases, the draw as the unit.

    ``low`` and ``high`` are the 95 % interval of the two-way bootstrap, over draws and patients,
    which is too narrow with few draws; ``t_low``, ``t_high`` and ``p`` are those of Student's t
    with the variance of both, None with one draw.
    """

    mean: float
    low: float
    high: float
    per_draw: list[float]
    t_low: float | None
    t_high: float | None
    p: float | None


def draw_difference(differences: Sequence[Values], patients: Sequence[str]) -> DrawDifference:
    """Return the mean difference of two arms over draws of the labeled cases.

    Which cases are labeled is the largest source of chance, so an interval over the test cases of
    one draw says nothing of the next draw.

    Args:
        differences: For each draw the paired differences of the same test cases; None or NaN: n/a.
        patients: The patient of each test case.

    Raises:
        ValueError: There is no draw with a value, or one has other numbers of cases than patients.

    Source: Owen 2007, The pigeonhole bootstrap (both factors resampled, each on its own); for t
        Hillis 2007, equations for readers and cases, which are draws and patients here.
    """
    table = np.array([_to_array(draw) for draw in differences])
    if not len(table) or table.shape[1] != len(patients):
        raise ValueError(f"differences of shape {table.shape} for {len(patients)} cases")
    table = table[np.isfinite(table).any(1)]
    if not len(table):
        raise ValueError("no draw has a value")
    names, place = np.unique(np.array(patients), return_inverse=True)
    known = np.isfinite(table)

    def add(weights: NDArray[np.float64]) -> NDArray[np.float64]:  # (draws, cases) to patients
        return np.array([np.bincount(place, row, len(names)) for row in weights])

    sums, counts = add(np.where(known, table, 0.0)), add(known.astype(float))
    per_draw = (sums.sum(1) / counts.sum(1)).tolist()
    rng = np.random.default_rng(SEED)
    shape = (NUM_RESAMPLES, len(table))
    draws, totals, numbers = np.empty(shape, int), np.empty(shape), np.empty(shape)
    for index in range(NUM_RESAMPLES):
        draws[index] = rng.integers(len(table), size=len(table))
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        totals[index], numbers[index] = sums @ times, counts @ times
    with np.errstate(invalid="ignore"):  # where only patients without a value were drawn
        drawn = np.take_along_axis(totals / numbers, draws, axis=1)
        has_some = np.isfinite(drawn)
        means = np.where(has_some, drawn, 0.0).sum(1) / has_some.sum(1)
    low, high = np.nanpercentile(means, (2.5, 97.5))
    result: DrawDifference = {
        "mean": float(np.mean(per_draw)),
        "low": float(low),
        "high": float(high),
        "per_draw": per_draw,
        "t_low": None,
        "t_high": None,
        "p": None,
    }
    if len(per_draw) > 1:
        error, freedom = _find_crossed_error(sums, counts)
        mean, reach = result["mean"], float(stats.t.ppf(0.975, freedom)) * error
        result["t_low"], result["t_high"] = mean - reach, mean + reach
        shift = abs(mean) / error if error else math.inf if mean else 0.0
        result["p"] = 2.0 * float(stats.t.sf(shift, freedom))
    return result


def _find_crossed_error(
    sums: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the standard error of a mean over draws and patients, and its degrees of freedom.

    All draws have the same patients, so what a patient has in common in all of them is no chance
    of the draw, and does not show in the means of draws.

    Args:
        sums: (draws, patients), the sum over the cases of each patient; two draws at least.
        counts: (draws, patients), how many cases these are.
    """
    means = sums.sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    draws, patients = sums.shape
    table = means + patients * (sums - means * counts) / counts.sum(1, keepdims=True)
    by_draw, by_patient = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    of_draws = patients * float(by_draw.var(ddof=1))
    shared = 0.0
    if patients > 1:
        rest = table - by_draw - by_patient + table.mean()
        of_patients = draws * float(by_patient.var(ddof=1))
        shared = max(0.0, of_patients - float((rest**2).sum()) / ((draws - 1) * (patients - 1)))
    total = of_draws + shared
    freedom = (draws - 1) * (total / of_draws) ** 2 if of_draws else math.inf
    return math.sqrt(total / (draws * patients)), freedom


def fold_difference(
    a: Values, b: Values, patients: Sequence[str], folds: Sequence[int]
) -> Difference:
    """Return the mean of a - b over the cases of several folds, with the fold as the unit.

    The cases of a fold are measured by one training, whose luck they share. Interval and p are
    Student's t over the means of the folds, each weighed by its cases; None with one fold.

    Args:
        a: As in ``paired_difference``.
        b: The same cases in the same order.
        patients: Of each case.
        folds: The fold of each case.
    """
    result = paired_difference(a, b, patients)
    sides = fill_absent((a, b))
    pairs = [
        (fold, x - y)
        for x, y, fold in zip(*sides, folds, strict=True)
        if x is not None and y is not None
    ]
    _, owner = np.unique([fold for fold, _ in pairs], return_inverse=True)
    sizes, freedom = np.bincount(owner), len(set(owner.tolist())) - 1
    if result["mean"] is None or freedom < 1:
        return {**result, "low": None, "high": None, "p": None}
    mean = result["mean"]
    rest = np.bincount(owner, [value for _, value in pairs]) - mean * sizes
    error = math.sqrt((freedom + 1) * float((rest**2).sum()) / freedom) / len(pairs)
    reach = float(stats.t.ppf(0.975, freedom)) * error
    shift = abs(mean) / error if error else math.inf if mean else 0.0
    p = 2.0 * float(stats.t.sf(shift, freedom))
    return {**result, "low": mean - reach, "high": mean + reach, "p": p}


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the given order.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.

    Example:
        >>> adjust_holm([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    order = np.argsort(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def judge(difference: Difference | None) -> Verdict:
    """Return the verdict on a paired difference between a model and its baseline.

    "gain" needs cases of at least 8 patients that were not trained on and a 95 % interval above
    zero; of fewer patients there is "no verdict".

    Args:
        difference: Of ``paired_difference``, over cases that were not trained on; None where
            there is nothing to compare.
    """
    if difference is None or difference["mean"] is None:
        return "not measured"
    if difference["num_patients"] < MIN_CASES_FOR_VERDICT:
        return "no verdict"
    low = difference["low"]
    return "gain" if low is not None and low > 0 else "no gain"


def format_estimate(estimate: Estimate | Difference, sign: str = "") -> str:
    """Return ``0.806 [0.780, 0.831]``; a sign of "+" is for differences."""
    if estimate["mean"] is None:
        return "n/a"
    text = f"{estimate['mean']:{sign}.3f}"
    if estimate["low"] is None or estimate["high"] is None:
        return text
    return f"{text} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def read_table(path: Path) -> list[Row]:
    """Return the rows of a ``per_case.csv``; empty cells are None.

    Raises:
        InputError: The file is missing, is no such table, or holds something else than numbers.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if not rows or not text.endswith("\n") or any(None in row.values() for row in rows):
            raise ValueError("it holds no case, or is cut off")
        return [
            {"case_id": row["case_id"], "patient_id": row.get("patient_id") or row["case_id"]}
            | {k: float(v) if v else None for k, v in row.items() if k not in ID_COLUMNS}
            for row in rows
        ]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path}: not a table of medssl evaluate ({type(error).__name__}: {error}); run "
            "medssl evaluate again"
        ) from error


def _to_array(values: Values) -> NDArray[np.float64]:
    """Return values as floats, None as NaN."""
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _estimate(
    values: NDArray[np.float64], patients: Sequence[str] | None
) -> tuple[Estimate, NDArray[np.float64]]:
    """Return the estimate over finite values and the resampled means (empty below two patients)."""
    is_known = np.isfinite(values)
    known = values[is_known]
    names = np.arange(len(values)) if patients is None else np.array(patients)
    _, owner = np.unique(names[is_known], return_inverse=True)
    sums = np.asarray(np.bincount(owner, known), dtype=np.float64)
    sizes = np.bincount(owner)
    means = _resample_means(sums, sizes) if len(sums) > 1 else np.empty(0)
    low, high = np.percentile(means, [2.5, 97.5]).tolist() if len(means) else (None, None)
    estimate = Estimate(
        mean=float(known.mean()) if len(known) else None,
        low=low,
        high=high,
        n=len(known),
        num_patients=len(sums),
        num_dropped=len(values) - len(known),
    )
    return estimate, means


def _resample_means(sums: NDArray[np.float64], sizes: NDArray[np.int_]) -> NDArray[np.float64]:
    """Return the means over cases of NUM_RESAMPLES resamples of as many patients, with replacement.

    Args:
        sums: (P,), the sum over the cases of each patient.
        sizes: (P,), how many cases these are.
    """
    rng = np.random.default_rng(SEED)
    num_patients = len(sums)
    step = max(1, 2_000_000 // num_patients)  # bounds the memory of one block of resamples
    blocks = []
    for start in range(0, NUM_RESAMPLES, step):
        shape = (min(step, NUM_RESAMPLES - start), num_patients)
        resampled = rng.integers(0, num_patients, shape)
        blocks.append(sums[resampled].sum(axis=1) / sizes[resampled].sum(axis=1))
    return np.concatenate(blocks)
