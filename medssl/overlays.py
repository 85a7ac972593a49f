"""One scan and its class map as a picture: three orthogonal planes with contours.

A picture is shown as it is, in one plane: alone, and beside it with contours.

Axes legend: I, J, K voxel axes of a RAS+ grid (I grows to the patient's right, J to the front,
K to the head). The picture is in radiological convention: the patient's right is on the left.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke, withStroke
from PIL import Image

from medssl.config import IGNORE

Array = npt.NDArray[Any]

CLASS_COLORS = ("#D55E00", "#2B8CE6", "#00A078", "#CC79A7", "#E69F00", "#7A5FD0", "#56B4E9")
"""Colors of the foreground classes, in all figures; told apart with color-blind eyes too.

Source: Okabe and Ito 2008, with the blue lightened so that it also shows on a gray scan.
"""

PLANES = (("axial", 2, "RA"), ("coronal", 1, "RS"), ("sagittal", 0, "AS"))
"""Name, normal axis, and what lies at the left and at the top of each plane."""


def pick_color(index: int) -> str:
    """Return the color of class ``index`` (1 is the first foreground class)."""
    return CLASS_COLORS[(index - 1) % len(CLASS_COLORS)]


def show_channels(image: Array, is_picture: bool) -> Array:
    """Return (I, J, K) of (C, I, J, K): the first channel; of a picture the mean of its colors."""
    intensity: Array = image.mean(0) if is_picture else image[0]
    return intensity


def render_overlay(
    image: Array,
    classes: Array,
    *,
    reference: Array | None = None,
    spacing: tuple[float, float, float] | None = None,
    names: Mapping[int, str] | None = None,
    title: str = "",
    legend: bool = True,
    width: float = 9.0,
    dpi: int = 100,
    is_picture: bool = False,
) -> bytes:
    """Return a PNG of three orthogonal planes, each through its largest cross-section.

    Args:
        image: (I, J, K) intensities on a RAS+ grid; the window is its 1 % to 99.7 % range.
        classes: (I, J, K) class indices; solid contours. 255 (ignore) is hatched.
        reference: (I, J, K) class indices of the label; dashed contours. None without one.
        spacing: Voxel size in mm along I, J, K; None takes cubes.
        names: Class names by index, for the legend; None takes "class 1" and so on.
        title: One line above the planes; empty for none.
        legend: Whether a line below the planes says which contour is what.
        width: Width in inches, against which lines and letters keep their size.
        dpi: Pixels per inch.
        is_picture: Whether the image is a picture: I are its rows from the top, J its columns.

    Raises:
        ValueError: If the shapes differ or are not (I, J, K).
    """
    others = [classes] if reference is None else [classes, reference]
    if image.ndim != 3 or any(other.shape != image.shape for other in others):
        shapes = [image.shape, *(other.shape for other in others)]
        raise ValueError(f"an overlay needs arrays of one shape (I, J, K), got {shapes}")
    sizes = spacing or (1.0, 1.0, 1.0)
    foreground = _find_foreground(others)
    center = [_find_largest(foreground, axis) for axis in range(3)]
    window = _find_window(image)
    indices = sorted({int(v) for other in others for v in np.unique(other)} - {0, IGNORE})

    bottom, top = (0.28 if legend else 0.0), (0.26 if title else 0.0)
    panels = 2 if is_picture else 3
    height = width / panels + bottom + top
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="black")
    for column in range(panels):
        frame = (column / panels, bottom / height, 1 / panels - 0.003, width / panels / height)
        axes = figure.add_axes(frame, facecolor="black")
        if is_picture:
            planes = [a[..., center[2]] for a in (image, *others)]
            drawn = indices if column else []
            _plot_plane(axes, planes if column else planes[:1], 2, sizes, window, drawn)
            continue
        _, axis, letters = PLANES[column]
        crop = _find_crop(foreground, axis, sizes)
        planes = [_take_plane(a, axis, center[axis], crop) for a in (image, *others)]
        _plot_plane(axes, planes, axis, sizes, window, indices)
        _plot_letters(axes, letters)
    style: dict[str, Any] = {"color": "white", "fontsize": 9, "parse_math": False}
    if title:
        figure.text(0.008, 1 - 0.13 / height, title, va="center", **style)
    if legend:
        has_ignore = bool((classes == IGNORE).any())
        _plot_legend(figure, indices, names or {}, reference is not None, has_ignore)
    return save_png(figure)


def _find_foreground(maps: list[Array]) -> Array:
    """Return where (I, J, K) any map holds a class; all voxels if there is no class."""
    foreground = np.zeros(maps[0].shape, dtype=bool)
    for classes in maps:
        foreground |= (classes != 0) & (classes != IGNORE)
    return foreground if foreground.any() else np.ones_like(foreground)


def _find_largest(foreground: Array, axis: int) -> int:
    """Return the slice along ``axis`` with most foreground, the middle one of equals."""
    areas = foreground.sum(axis=tuple(a for a in range(3) if a != axis))
    best = np.flatnonzero(areas == areas.max())
    return int(best[len(best) // 2])


def _find_crop(foreground: Array, axis: int, spacing: tuple[float, float, float]) -> list[slice]:
    """Return the slices of a plane: a square (in mm) around the foreground with a margin."""
    axes = [a for a in range(3) if a != axis]
    bounds = []
    for a in axes:
        line = np.flatnonzero(foreground.any(axis=tuple(b for b in range(3) if b != a)))
        bounds.append((int(line[0]), int(line[-1]) + 1))
    longest = max((high - low) * spacing[a] for a, (low, high) in zip(axes, bounds, strict=True))
    crop = []
    for a, (low, high) in zip(axes, bounds, strict=True):
        size = foreground.shape[a]
        width = min(size, max(8, round(1.7 * longest / spacing[a])))
        start = min(max(0, (low + high - width) // 2), size - width)
        crop.append(slice(start, start + width))
    return crop


def _take_plane(array: Array, axis: int, index: int, crop: list[slice]) -> Array:
    """Return one plane of (I, J, K) as a picture: rows from the top, radiological."""
    plane = np.take(array, index, axis=axis)[tuple(crop)]
    return np.ascontiguousarray(plane[::-1, ::-1].T)


def _find_window(image: Array) -> tuple[float, float]:
    """Return the shown intensities: 1 % to 99.7 % of a sparse sample of the finite voxels."""
    step = max(1, round((image.size / 200_000) ** (1 / 3)))
    along = slice(None, None, step if image.shape[2] > 1 else 1)
    sample = np.asarray(image[::step, ::step, along], dtype=np.float32)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(sample, (1.0, 99.7)))
    return low, high if high > low else low + 1.0


def _plot_plane(
    axes: Axes,
    planes: list[Array],
    axis: int,
    spacing: tuple[float, float, float],
    window: tuple[float, float],
    indices: list[int],
) -> None:
    """Draw the scan with the contours of the class map and of the reference, if there are maps."""
    image, *maps = planes
    width, height = (spacing[a] for a in range(3) if a != axis)
    image = np.nan_to_num(image.astype(np.float32), nan=window[0])
    axes.imshow(
        image,
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        aspect=height / width,
        interpolation="bilinear",
    )
    axes.set_axis_off()
    if maps and (ignored := maps[0] == IGNORE).any():
        _plot_hatching(axes, ignored)
    for index in indices:
        for is_reference, plane in zip((False, True), maps, strict=False):
            _plot_contour(axes, plane == index, pick_color(index), is_reference)
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def _plot_hatching(axes: Axes, mask: Array) -> None:
    """Hatch a mask in translucent white."""
    hatching = axes.contourf(*_pad(mask), levels=[0.5, 1.5], colors=["#FFFFFF26"], hatches=["////"])
    hatching.set_edgecolor("#FFFFFF66")


def _pad(mask: Array) -> tuple[Array, Array, Array]:
    """Return columns, rows and values of a mask with a border, so that its outline closes."""
    rows, columns = mask.shape
    values = np.pad(mask.astype(np.float32), 1)
    return np.arange(-1, columns + 1), np.arange(-1, rows + 1), values


def _plot_contour(axes: Axes, mask: Array, color: str, is_reference: bool) -> None:
    """Draw the outline of a mask."""
    if not mask.any():
        return
    lines = axes.contour(
        *_pad(mask),
        levels=[0.5],
        colors=["white" if is_reference else color],
        linewidths=1.1 if is_reference else 1.7,
        linestyles=[(0, (2.2, 1.6))] if is_reference else "solid",
    )
    halo = Stroke(linewidth=1.9 if is_reference else 2.9, foreground="#000000A0")
    lines.set_path_effects([halo, Normal()])


def _plot_letters(axes: Axes, letters: str) -> None:
    """Mark the left and the top side of a plane by the patient's directions."""
    halo = [withStroke(linewidth=2, foreground="black")]
    style: dict[str, Any] = {"color": "white", "fontsize": 9, "path_effects": halo}
    axes.text(0.02, 0.5, letters[0], transform=axes.transAxes, ha="left", va="center", **style)
    axes.text(0.5, 0.98, letters[1], transform=axes.transAxes, ha="center", va="top", **style)


def _plot_legend(
    figure: Figure,
    indices: list[int],
    names: Mapping[int, str],
    has_reference: bool,
    has_ignore: bool,
) -> None:
    """Say below the planes which contour is what."""
    entries = [
        Line2D([], [], color=pick_color(i), linewidth=2.2, label=names.get(i, f"class {i}"))
        for i in indices[:6]
    ]
    if has_reference:
        dashes = (0, (2.2, 1.6))
        entries.append(Line2D([], [], color="white", linestyle=dashes, label="reference label"))
    if has_ignore:
        entries.append(Line2D([], [], color="#FFFFFF66", linewidth=6, label="not trusted"))
    if not entries:
        return
    legend = figure.legend(
        handles=entries,
        loc="lower left",
        ncols=len(entries),
        frameon=False,
        labelcolor="white",
        fontsize=9,
        borderpad=0.2,
        borderaxespad=0.1,
        handlelength=1.8,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def save_png(figure: Figure) -> bytes:
    """Return a figure as a PNG of 256 colors: a third of the size, no visible loss."""
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib leaves draw and buffer_rgba untyped
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    buffer = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
