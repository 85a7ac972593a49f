"""A model as MLflow serves it: files of scans come in, files of masks go out.

MLflow finds `_load_pyfunc` by the name of this module, which stands in the MLmodel file of every
registered model (see `medssl.tracking.send`).
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

from medssl.config import InputError
from medssl.data.io import write_mask
from medssl.formats.readers import name_mask_suffix
from medssl.machine import choose_device
from medssl.predict import Model, load_model, predict_case

_STARTS = {
    b"\x1f\x8b": ".nii.gz",
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


class ServedModel:
    """Segments scans that are given as the bytes of their files."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return the file of a mask, in base64, for each row of a table.

        Args:
            frame: A pandas table; a row is a scan, its columns are its file, or a file a channel:
                bytes, or base64. NIfTI, compressed or not, PNG, JPEG or TIFF.
            params: Of MLflow; there are none.

        Raises:
            InputError: A file cannot be read, or has other channels than the model.
        """
        return [self._segment(list(row)) for row in frame.itertuples(index=False, name=None)]

    def _segment(self, files: list[bytes | str]) -> str:
        """Return the mask of a scan."""
        with tempfile.TemporaryDirectory() as folder:
            images = []
            for index, content in enumerate(files):
                content = _decode(content)
                end = next((s for b, s in _STARTS.items() if content.startswith(b)), ".nii")
                images.append(Path(folder) / f"scan_{index:04d}{end}")
                images[-1].write_bytes(content)
            prediction = predict_case(self.model, tuple(images))
            mask = Path(folder) / f"mask{name_mask_suffix(images[0])}"
            place = (prediction.mask, prediction.affine, self.model.info.label_values)
            write_mask(mask, *place, header=prediction.header, origin="prediction")
            return base64.b64encode(mask.read_bytes()).decode()


def _decode(content: bytes | str) -> bytes:
    """Return the bytes of a file, or what base64 says."""
    if isinstance(content, bytes):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise InputError(f"a scan is no base64 ({error}): send the bytes of its file") from error


def _load_pyfunc(path: str) -> ServedModel:
    """Return the model of a folder, for MLflow."""
    return ServedModel(load_model(Path(path), choose_device("auto")))
