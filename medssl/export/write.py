"""Which format is written how, and where."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

from medssl.config import InputError
from medssl.data.trained import resolve_model
from medssl.runs import write_file, write_text

FORMATS = ("zip", "monai-bundle", "onnx", "torch-export", "torchscript")
_NEEDED = {"onnx": ("onnx", "onnxscript"), "monai-bundle": ("fire",)}


def check_export(model: Path, form: str, out: Path | None) -> Path:
    """Answer the mistakes that need no torch; return where the export goes.

    Raises:
        InputError: The format is unknown, what it needs is not installed, there is no model, or
            something stands where the export would go.
    """
    if form not in FORMATS:
        raise InputError(f"--format {form}: is none of {', '.join(FORMATS)}")
    lost = [name for name in _NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]
    if lost:
        raise InputError(
            f"--format {form}: needs {' and '.join(lost)}: pip install 'medssl[export]'"
        )
    folder = resolve_model(model)
    home = model if model.is_dir() and folder != model else Path()
    target = out or (home / "model.zip" if form == "zip" else home / "export" / form)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target}: is there already; delete it, or name another --out")
    return target


def export_model(model: Path, form: str, out: Path | None = None) -> Path:
    """Write a model in a format of others, with its card.

    Args:
        model: A run, one of its rounds, or a model folder.
        form: One of `FORMATS`.
        out: A new or empty folder, or a file for `zip`; default RUN/export/<format>, RUN/model.zip.

    Returns:
        What was written: the folder, or the zip.

    Raises:
        InputError: See `check_export`; or the model is damaged, or cannot be written so.
    """
    target = check_export(model, form, out)
    from medssl.export.bundle import write_bundle  # slow to import: after the mistakes
    from medssl.export.card import CARD, write_card
    from medssl.export.exchange import write_network
    from medssl.predict import check_weights, load_model

    card = write_card(model, check_weights(resolve_model(model)))
    if form == "zip":
        _write_zip(resolve_model(model), card, target)
        return target
    loaded = load_model(model)
    if form == "monai-bundle":
        write_bundle(loaded, target, card)
    else:
        write_network(loaded, form, target)
        write_text(target / CARD, card)
    return target


def _write_zip(folder: Path, card: str, path: Path) -> None:
    """Write a model folder as one file."""
    from medssl.export.card import CARD
    from medssl.predict import WEIGHTS

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(CARD, card)
            for name in (WEIGHTS, "model.json"):
                archive.write(folder / name, name)

    write_file(path, write)
