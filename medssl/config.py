"""Every section of a configuration and its default; all mistakes are reported at once.

Order of precedence: defaults < preset (``method``) < YAML < ``key.path=value``. A value that is
``auto`` is decided by the plan, from the data and the machine.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

IGNORE = 255
"""Class index, inside the program, of voxels without supervision."""

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PlaneNetwork = Literal[
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus",
    "upernet", "segformer",
]  # fmt: skip
"""Architectures of segmentation-models-pytorch, all in 2D."""
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class InputError(ValueError):
    """A user's mistake: what is wrong, the value got, where, and how to repair it."""


class Section(BaseModel):
    """One section of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Where the scans are and which of them are labeled, unlabeled and test cases."""

    root: Path | None = None
    format: Literal["auto", "decathlon", "nnunet", "folders", "list"] = "auto"
    labels: dict[int, str] | None = None
    ignore: int | None = None
    labeled: Count | Literal["all"] = "all"
    test: Annotated[int, Field(ge=0)] = 0
    split_seed: int = 0
    draw: int = 0


class PlanSection(Section):
    """What the plan decides unless it is given: spacing in mm, patch_size in voxels.

    In dimension 2, slice by slice, both have two entries, those of the plane.
    """

    dimension: Auto | Literal[2, 3] = "auto"
    spacing: Auto | tuple[float, float, float] | tuple[float, float] = "auto"
    patch_size: Auto | tuple[int, int, int] | tuple[int, int] = "auto"
    normalization: Auto | Literal["zscore", "ct"] = "auto"
    flips: Auto | tuple[Literal[0, 1, 2], ...] = "auto"


class NetworkSection(Section):
    """The network: ``width`` scales the channels, ``depth`` counts the resolution levels.

    ``auto`` is dynunet in 3D and unet in 2D. All but dynunet are of segmentation-models-pytorch:
    in 2D, with an ``encoder``, which ``pretrained`` starts from weights of ImageNet (a download).
    """

    name: Auto | Literal["dynunet"] | PlaneNetwork = "auto"
    encoder: str = "resnet18"
    pretrained: bool = False
    width: Annotated[float, Field(gt=0.0, le=8.0)] = 1.0
    depth: Auto | Annotated[int, Field(ge=3, le=7)] = "auto"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    deep_supervision: bool = True


class TeacherSection(Section):
    """Who makes the targets: the previous round's model (offline), an EMA of the student, both."""

    source: tuple[Literal["previous_round", "ema"], ...] = ("previous_round", "ema")
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99


class TargetSection(Section):
    """The pseudo-target: hard or soft; temperatures of the teacher's and student's softmax."""

    kind: Literal["hard", "soft"] = "soft"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0


class ThresholdSection(Section):
    """Class-wise confidence threshold of a voxel, moving from ``start`` to ``end`` in a round."""

    name: Literal["none", "fixed", "curriculum", "flex"] = "flex"
    start: Fraction = 0.95
    end: Fraction = 0.7


class UncertaintySection(Section):
    """Filter of voxels by predictive entropy of ``passes`` MC-dropout passes.

    A voxel is accepted while its entropy is under ``(start + (1 - start) r(t)) ln C``.
    Source: Yu et al. 2019 (UA-MT), section 2.3, with ln C in place of ln 2.
    """

    source: Literal["none", "mc_dropout"] = "mc_dropout"
    passes: Annotated[int, Field(ge=2, le=64)] = 8
    start: Fraction = 0.75


class CaseFilterSection(Section):
    """Which pseudo-labeled cases a student is trained on."""

    confidence: Fraction = 0.3


class FilterSection(Section):
    """What of a pseudo-label is trusted: per voxel, then per case.

    ``components: largest`` turns islands of a class into background, for the classes that are one
    piece in every labeled case.
    """

    threshold: ThresholdSection = ThresholdSection()
    uncertainty: UncertaintySection = UncertaintySection()
    components: Literal["all", "largest"] = "largest"
    case: CaseFilterSection = CaseFilterSection()


class NoiseSection(Section):
    """Noise of the student: mixing, strong views, stochastic depth (survival probability p_L)."""

    mixing: Literal["none", "copy_paste"] = "copy_paste"
    mixing_probability: Fraction = 0.5
    strong: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    stochastic_depth: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9


class Ramp(Section):
    """Weight over the progress t of a round: 0 before ``start``, 1 from ``end`` on."""

    name: Literal["constant", "linear", "sigmoid"] = "sigmoid"
    start: Fraction = 0.0
    end: Fraction = 0.25


class SupervisedSection(Section):
    """Loss on labeled voxels."""

    name: Literal["dice_ce", "ce", "dice"] = "dice_ce"


class PseudoLabelSection(Section):
    """Loss between the student's view and the pseudo-target.

    Cross-entropy by default: its optimum is the target itself, while that of Dice under doubt is a
    larger structure, a little more so with each round.
    """

    name: Literal["dice_ce", "ce", "dice"] = "ce"
    weight: NonNegative = 1.0
    ramp: Ramp = Ramp()
    voxels: Literal["all", "accepted"] = "accepted"


class EntropySection(Section):
    """Entropy of order ``order`` (1 is Shannon) of the student, normalized by ln C."""

    order: NonNegative = 1.0
    weight: NonNegative = 0.01
    ramp: Ramp = Ramp()
    voxels: Literal["all", "accepted"] = "accepted"


class ConsistencySection(Section):
    """Distance between the EMA teacher on the weak view and the student on the strong view."""

    name: Literal["mse", "ce", "kl"] = "mse"
    weight: NonNegative = 0.1
    ramp: Ramp = Ramp()
    voxels: Literal["all", "accepted"] = "all"


class LossesSection(Section):
    """The terms of the objective."""

    supervised: SupervisedSection = SupervisedSection()
    pseudo_label: PseudoLabelSection = PseudoLabelSection()
    entropy: EntropySection = EntropySection()
    consistency: ConsistencySection = ConsistencySection()


class TrainSection(Section):
    """The loop: rounds after round 0, steps of each, labeled patches per step, optimizer."""

    rounds: Annotated[int, Field(ge=0, le=20)] = 2
    steps: Auto | Count = "auto"
    batch: Auto | Count = "auto"
    unlabeled_ratio: Annotated[float, Field(gt=0.0)] = 1.0
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    weight_decay: NonNegative = 1e-2
    warmup: Fraction = 0.03
    grad_clip: Annotated[float, Field(gt=0.0)] = 12.0
    foreground: Fraction = 0.5
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: Auto | Annotated[int, Field(ge=0)] = "auto"
    log_every: Count = 50
    checkpoint_every: Count = 200


class TrackingSection(Section):
    """MLflow: the store and the experiment; ``uri: none`` keeps the journal only."""

    uri: str = "auto"
    experiment: str = "auto"


class Config(Section):
    """The whole configuration of a run."""

    data: DataSection = DataSection()
    plan: PlanSection = PlanSection()
    network: NetworkSection = NetworkSection()
    method: str = "default"
    teacher: TeacherSection = TeacherSection()
    views: tuple[Literal["strong"], ...] = ("strong",)
    target: TargetSection = TargetSection()
    filter: FilterSection = FilterSection()
    noise: NoiseSection = NoiseSection()
    losses: LossesSection = LossesSection()
    train: TrainSection = TrainSection()
    validation: Auto | Annotated[int, Field(ge=0)] = "auto"
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        """Refuse settings that contradict each other."""
        if self.filter.uncertainty.source == "mc_dropout" and self.network.dropout == 0.0:
            raise ValueError(
                "filter.uncertainty.source=mc_dropout needs network.dropout above 0 (got 0.0): "
                "without dropout the passes do not differ; set network.dropout=0.1 or "
                "filter.uncertainty.source=none"
            )
        names = list((self.data.labels or {}).values())
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.labels: two label values are named {', '.join(twice)}")
        if not self.teacher.source:
            raise ValueError("teacher.source is empty: name previous_round, ema, or both")
        if "ema" not in self.teacher.source and self.losses.consistency.weight > 0:
            raise ValueError(
                f"teacher.source={list(self.teacher.source)} has no ema, which the consistency "
                "loss compares with; add it, or set losses.consistency.weight=0"
            )
        online = "previous_round" not in self.teacher.source
        if online and self.filter.uncertainty.source != "none":
            raise ValueError(
                f"teacher.source={list(self.teacher.source)} makes targets online, but the "
                "uncertainty is measured offline; add previous_round, or set "
                "filter.uncertainty.source=none"
            )
        return self


SHORTCUTS = {
    "labeled": "data.labeled",
    "test": "data.test",
    "draw": "data.draw",
    "seed": "train.seed",
    "rounds": "train.rounds",
    "steps": "train.steps",
    "device": "train.device",
}
"""Keys that also work at the top level of the command line and of a YAML."""


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each value came from (dotted key -> source)."""

    config: Config
    sources: dict[str, str]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, or refuse it where a key stands twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):  # such as {{ name }}, a placeholder of templates
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def find_configs() -> Path:
    """Return the folder of the presets: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def list_methods() -> dict[str, Path]:
    """Return the presets by name."""
    return {path.stem: path for path in sorted((find_configs() / "methods").glob("*.yaml"))}


def load_config(
    first: str | Path | None = None, overrides: Sequence[str] = (), plan: Mapping[str, Any] = {}
) -> Resolved:
    """Resolve a configuration.

    Args:
        first: A CONFIG (ends in .yaml or .yml) or DATA (a folder or a list of cases).
        overrides: ``key.path=value``, values parsed as YAML.
        plan: Dotted keys that the plan decided, which replace ``auto`` only.

    Raises:
        InputError: Naming all mistakes at once, with the nearest valid key.
    """
    problems: list[str] = []
    given: dict[str, tuple[Any, str]] = {}
    layers: list[tuple[dict[str, Any], str]] = []
    if first is not None and str(first).endswith((".yaml", ".yml")):
        layers.append((_flatten(_read_yaml(Path(first))), str(first)))
    elif first is not None:
        layers.append(({"data.root": str(first)}, "command line"))
    layers.append((_parse_overrides(overrides, problems), "command line"))
    for values, source in layers:
        given.update({SHORTCUTS.get(key, key): (value, source) for key, value in values.items()})
    method = given.get("method", ("default", "default"))[0]
    preset, preset_name = _read_method(str(method), problems)
    merged = {key: (value, f"method {preset_name}") for key, value in preset.items()}
    merged.update(given)
    tree = _unflatten({key: value for key, (value, _) in merged.items()}, problems)
    config = _validate(tree, problems)
    sources = {key: merged.get(key, (None, "default"))[1] for key in _flatten(dump(config))}
    for key, value in plan.items():
        if _flatten(dump(config)).get(key) == "auto":
            merged[key] = (value, "plan")
            sources[key] = "plan"
    if plan:
        tree = _unflatten({key: value for key, (value, _) in merged.items()}, problems)
        config = _validate(tree, problems)
    for key in list(sources):
        sources[key] = _find_source(key, merged)
    return Resolved(config, sources)


def _find_source(key: str, merged: Mapping[str, tuple[Any, str]]) -> str:
    """Return where a dotted key, or the section that holds it, was given."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in merged:
            return merged[prefix][1]
    return "default"


def dump(config: Config) -> dict[str, Any]:
    """Return a configuration as plain types, ready for YAML or JSON."""
    result: dict[str, Any] = config.model_dump(mode="json")
    return result


def render(resolved: Resolved) -> str:
    """Return the configuration as text, one dotted key a line with its source."""
    values = _flatten(dump(resolved.config))
    shown = {key: yaml.safe_dump(value, default_flow_style=True) for key, value in values.items()}
    shown = {key: text.replace("\n...\n", "").strip() for key, text in shown.items()}
    width = max(len(f"{key}: {text}") for key, text in shown.items())
    width = min(width, 72)
    return "\n".join(
        f"{f'{key}: {text}':<{width}}  # {resolved.sources.get(key, 'default')}"
        for key, text in shown.items()
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; every way in which that fails is an InputError."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such configuration file{hint}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected `key: value` lines, got {type(content).__name__}")
    return content


def _read_method(name: str, problems: list[str]) -> tuple[dict[str, Any], str]:
    """Read the preset of a method, given by name or by file."""
    if name.endswith((".yaml", ".yml")):
        return _flatten(_read_yaml(Path(name))), name
    methods = list_methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(f"method: unknown preset {name!r}; {hint}there are: {', '.join(methods)}")
        return {}, name
    values = _flatten(_read_yaml(methods[name]))
    return {key: value for key, value in values.items() if not key.startswith("about.")}, name


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Parse ``key.path=value`` arguments."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"{text!r}: expected key=value, such as labeled=4 or train.lr=1e-3")
            continue
        try:
            parsed = yaml.load(value, Loader=_UniqueKeyLoader)
        except yaml.YAMLError as error:
            problems.append(f"{key}: {value!r} cannot be read as a value: {error}")
            continue
        values.update(_flatten({key: parsed}) if isinstance(parsed, dict) else {key: parsed})
    return values


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys for nested sections; class names of ``data.labels`` stay together."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name != "data.labels":
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _unflatten(flat: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return nested sections for dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        node = tree
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                problems.append(f"{key}: {parent!r} is given both a value and keys below it")
                child = {}
            node = child
        node[last] = value
    return tree


def _validate(tree: dict[str, Any], problems: list[str]) -> Config:
    """Build the configuration, or raise one error that names every mistake."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = problems + _explain_all(error.errors())
        config = Config()
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        plural = "mistake" if len(problems) == 1 else "mistakes"
        raise InputError(f"{len(problems)} {plural} in the configuration:\n{lines}")
    return config


def _explain_all(items: Sequence[Any]) -> list[str]:
    """Say each validation error in a sentence: key, problem, value, nearest valid key."""
    valid = list(_list_keys(Config))
    unknown = []
    wrong: dict[tuple[str, str], list[str]] = {}
    for item in items:
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            key = next(iter(_flatten({".".join(path): item["input"]})))
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            near = near or [name for name in valid if name.split(".")[-1] == key.split(".")[-1]]
            hint = f"did you mean {near[0]}?" if near else "`medssl config` lists all keys"
            unknown.append(f"{key}: unknown key; {hint}")
            continue
        while path and ".".join(path) not in valid:
            path.pop()  # the rest names a member of a union, or a place in a list
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = "a value is missing"
        value = f" (got {item['input']!r})" if path else ""
        wrong.setdefault((".".join(path), value), []).append(message)
    told = [
        f"{key}: {'; or: '.join(m)}{value}" if key else m[0] for (key, value), m in wrong.items()
    ]
    return unknown + told


def _list_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a section."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _list_keys(kind, f"{prefix}{name}.")
    if not prefix:
        yield from SHORTCUTS


def hash_config(config: Config, ignore: Sequence[str] = ()) -> str:
    """Return a hash of what decides the result: not device, workers, logging or tracking."""
    values = _flatten(dump(config))
    skipped = (
        "tracking.", "train.device", "train.workers", "train.log_every", "train.checkpoint_every",
        "data.root",
    )  # fmt: skip
    kept = {k: v for k, v in values.items() if not k.startswith((*skipped, *ignore))}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
