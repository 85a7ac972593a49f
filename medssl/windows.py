"""How a network is moved over a scan at prediction.

Axes: I J K voxel axes.
"""

from __future__ import annotations

from typing import NamedTuple

OVERLAP = 0.5  # of neighboring windows at prediction, fraction


class Window(NamedTuple):
    """What of a scan a network sees at once, and how often.

    ``patch_size`` in voxels, of a network in 2D that of the plane; ``precision`` float32 or
    bfloat16; ``flips`` are the axes of the volume whose mirrorings are averaged over;
    ``slice_axis`` is the one along which a network in 2D sees slices, None in 3D.
    """

    patch_size: tuple[int, ...]
    precision: str = "float32"
    flips: tuple[int, ...] = ()
    slice_axis: int | None = None

    @property
    def plain(self) -> Window:
        """The same without mirrorings."""
        return self._replace(flips=())
