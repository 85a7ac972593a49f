"""MODEL_CARD.md: what a model is, what it was made from, and what is known of its worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medssl import __version__
from medssl.names import choose_names
from medssl.predict import ModelInfo
from medssl.run_folder import RunFolder, read_folder_with_tables
from medssl.runs import list_rounds

CARD = "MODEL_CARD.md"
_MADE_BY_A_MODEL = "made by a model of medssl"  # of `medssl.data.check.describe_origins`
_UNTESTED = (
    "other scanners, protocols, sites and patient groups than those of the scans above",
    "whether its use changes a diagnosis, a treatment or an outcome",
    "images with implants, after surgery or of poor quality, unless the scans above hold such",
)


def write_card(model: Path, info: ModelInfo) -> str:
    """Return the card of a model as Markdown, without case ids, folders or user names.

    Args:
        model: The run, one of its rounds, or a model folder; without a run around it the card says
            what model.json knows.
        info: What stands in model.json.

    Raises:
        InputError: A file of the run is damaged.
    """
    home = next((p for p in (model, model.resolve().parent) if (p / "config.yaml").is_file()), None)
    run = None if home is None else read_folder_with_tables(home)
    title = (
        "a model" if run is None else str(run.splits.get("dataset", {}).get("name") or "a model")
    )
    lines = [
        f"# Model card: {title}",
        "",
        "**Not a medical device.** For research; nobody has cleared it for the care of patients.",
        "",
        *_describe_use(info),
        *_describe_data(info, run),
        *_describe_worth(info, run),
        "## Not tested on",
        "",
        *(f"- {line}" for line in _list_untested(info)),
        "",
        "## How it was made",
        "",
        *_describe_making(info, run),
    ]
    text = "\n".join(lines) + "\n"
    return text if run is None else choose_names(run).clean_text(text)


def _describe_use(info: ModelInfo) -> Iterator[str]:
    """Say what goes in and what comes out."""
    classes = zip(info.labels.items(), info.label_values, strict=True)
    names = ", ".join(f"{name} = {value}" for (index, name), value in classes if index)
    unit = " x ".join("own" if s is None else f"{s:.3g}" for s in info.preprocessing.spacing)
    yield from ("## What it does", "")
    yield f"- Segments, by label value: {names}; 0 or the rest is background."
    yield f"- Channels, in this order: {', '.join(info.channels)}."
    if info.has_spacing:
        yield f"- Computes at {unit} mm; masks come back on the scan's own voxels."
    else:
        yield "- Takes pictures without spacing; masks lie on them pixel by pixel."
    if info.slice_axis is not None:
        yield "- Sees each slice alone."
    yield ""


def _describe_data(info: ModelInfo, run: RunFolder | None) -> Iterator[str]:
    """Say what it was trained on, and whose labels these are."""
    yield from ("## Data", "")
    if run is None:
        known = info.provenance.get("labeled_cases"), info.provenance.get("unlabeled_cases")
        yield f"- Labeled scans: {known[0] or 'not known'}; unlabeled: {known[1] or 'not known'}."
    else:
        counts = {
            part: len(run.list_part(part)) for part in ("labeled", "unlabeled", "val", "test")
        }
        yield (
            f"- {counts['labeled']} labeled scans trained it; it saw {counts['unlabeled']} more "
            f"without labels. {counts['val']} chose the round, {counts['test']} were kept for the "
            "test."
        )
        made = [str(r) for r in run.plan.get("reasons", ()) if _MADE_BY_A_MODEL in str(r)]
        yield from (f"- {reason}" for reason in made)
        if not made:
            yield "- No label was found to be marked as made by a model."
    for channel, (low, high) in zip(info.channels, info.intensity_range, strict=False):
        yield f"- Intensities of {channel} in training: {low:.4g} to {high:.4g}."
    if info.spacing_range:
        pairs = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in info.spacing_range)
        yield f"- Voxel sizes in training, finest axis first: {pairs} mm."
    yield "- Who drew the labels, by which rules, and under which terms the scans may be used,"
    yield "  medssl does not know: **write it here.**"
    yield ""


def _describe_worth(info: ModelInfo, run: RunFolder | None) -> Iterator[str]:
    """Say what was measured of the delivered model, with intervals."""
    yield from ("## What was measured", "")
    delivered = run is not None and run.delivered == f"round_{info.provenance.get('round')}"
    measured: Mapping[str, Any] = run.evaluation if run is not None and delivered else {}
    folds: Mapping[str, Any] = run.cross_check if run is not None and delivered else {}
    if not measured and not folds:
        yield from ("Not measured.", "")
        return
    where = "on the test cases, that nothing was trained on" if measured else "out of fold"
    content = measured or folds
    dice = content.get("dice") or {}
    if dice:
        yield f"Mean Dice {where}: {_format_interval(dice)}, n = {dice.get('n')} cases of "
        yield f"{dice.get('num_patients')} patients."
        yield ""
    classes = content.get("classes") or {}
    if classes:
        columns = [name for name in next(iter(classes.values())) if not name.startswith("num_")]
        yield f"| class | {' | '.join(columns)} | missed | false alarms |"
        yield "|---" * (len(columns) + 3) + "|"
        for name, row in classes.items():
            cells = [_format_interval(row.get(column)) for column in columns]
            extra = [str(row.get(key, "")) for key in ("num_missed", "num_false_alarms")]
            yield f"| {' | '.join([name, *cells, *extra])} |"
        yield ""
    statement = content.get("statement")
    yield from [f"Against labels alone: {statement}.", ""] * bool(statement)
    yield from (f"- {note}" for note in content.get("notes") or ())
    yield ""


def _format_interval(estimate: Any) -> str:
    """Return a mean with its 95 % interval."""
    known = estimate if isinstance(estimate, Mapping) else {}
    values = [known.get(key) for key in ("mean", "low", "high")]
    if values[0] is None:
        return "not measured"
    if None in values:
        return f"{values[0]:.3f}"
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def _list_untested(info: ModelInfo) -> Iterator[str]:
    """Say on what it was not tested."""
    yield from _UNTESTED
    if info.intensity_range or info.spacing_range:
        yield "intensities and voxel sizes outside of the ranges above: `medssl predict` flags them"


def _describe_making(info: ModelInfo, run: RunFolder | None) -> Iterator[str]:
    """Say by which program, network and rounds."""
    network = info.network
    size = " x ".join(map(str, info.patch_size))
    yield f"- {network.name} {network.encoder}".rstrip() + f", patches of {size} voxels."
    if run is not None:
        versions = run.provenance.get("versions", {})
        names = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield f"- Method {run.config.get('method')}, {len(list_rounds(run.path))} rounds;"
        yield f"  delivered: {run.delivered.replace('_', ' ') or 'nothing yet'}. Made by {names}."
    yield f"- SHA-256 of the weights: {info.provenance.get('weights.safetensors', 'not known')}."
    yield f"- This card: medssl {__version__}."
