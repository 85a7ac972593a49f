"""Every section of a configuration and its default; all mistakes are reported at once.

Order of precedence: defaults < preset (``method``) < YAML < ``key.path=value``. A value that is
``auto`` is decided by the plan, from the data and the machine.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

IGNORE = 255
"""Class index, inside the program, of voxels without supervision."""

MOST_BYTES = 2**17  # of a YAML file: a configuration has some hundred lines
MOST_LETTERS = 10_000  # of a value on the command line
MOST_NESTED = 12
MOST_TOLD = 20  # mistakes, and characters of a number
LARGEST_LABEL = 2**31 - 1

Value = TypeVar("Value")
Auto = Literal["auto"]


def _refuse_repeats(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Refuse a list that names something twice."""
    twice = [str(value) for place, value in enumerate(values) if value in values[:place]]
    if twice:
        raise ValueError(f"names {', '.join(dict.fromkeys(twice))} twice; once is enough")
    return values


Distinct = AfterValidator(_refuse_repeats)
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PlaneNetwork = Literal[
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus",
    "upernet", "segformer",
]  # fmt: skip
"""Architectures of segmentation-models-pytorch, all in 2D."""
NonNegative = Annotated[float, Field(ge=0.0, le=1e6)]
Positive = Annotated[float, Field(gt=0.0, le=1e6)]
Millimeters = Annotated[float, Field(gt=0.0, le=1e4)]
Count = Annotated[int, Field(ge=1, le=10**8)]
Side = Annotated[int, Field(ge=1, le=8192)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, Field(max_length=1000)]


class InputError(ValueError):
    """A user's mistake: what is wrong, the value got, where, and how to repair it."""


class Section(BaseModel):
    """One section of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_words(cls, value: object, info: ValidationInfo) -> object:
        """Refuse yes and no, which YAML reads as true and false, in the place of 1 and 0."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        is_section = isinstance(wanted, type) and issubclass(wanted, Section)
        if wanted is not bool and not is_section and _holds_bool(value):
            raise ValueError("expected a number or a name (in quotes), not yes or no, on or off")
        return value


def _holds_bool(value: object) -> bool:
    """Tell whether a value, or one inside of it, is true or false."""
    inside = value.values() if isinstance(value, dict) else value
    if isinstance(inside, str) or not isinstance(inside, Iterable):
        return isinstance(value, bool)
    return any(_holds_bool(item) for item in inside)


def _expand_home(path: Path) -> Path:
    """Return a path in which `~` is the home folder."""
    return Path(os.path.expanduser(path))


class DataSection(Section):
    """Where the scans are and which of them are labeled, unlabeled and test cases."""

    root: Annotated[Path, AfterValidator(_expand_home)] | None = None
    format: Literal["auto", "decathlon", "nnunet", "folders", "list"] = "auto"
    labels: dict[int, str] | None = None
    ignore: Annotated[int, Field(ge=-LARGEST_LABEL, le=LARGEST_LABEL)] | None = None
    labeled: Count | Literal["all"] = "all"
    test: Annotated[int, Field(ge=0, le=10**8)] = 0
    split_seed: Seed = 0
    draw: Seed = 0

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: Path | None) -> Path | None:
        """Refuse what no system takes for a path."""
        if root is not None and ("\0" in str(root) or len(str(root)) > 4000):
            raise ValueError("no path: it has a null character, or more than 4000 letters")
        return root

    @field_validator("labels", mode="before")
    @classmethod
    def _check_labels(cls, labels: object) -> object:
        """Refuse names in the place of values, the mistake that is made most."""
        for value, name in labels.items() if isinstance(labels, dict) else ():
            if not re.fullmatch(r"-?\d+", str(value)) or not isinstance(name, str):
                raise ValueError(
                    f'expected values with names, as data.labels.1=liver or "{{1: liver}}", got '
                    f"{value!r}: {name!r}"
                )
            if len(str(value)) > MOST_TOLD or int(value) > LARGEST_LABEL:
                raise ValueError(f"no label file holds a value as large as {_show(value)}")
            if int(value) < 0:
                raise ValueError(
                    f"a class has a value of 0 (background) or above, got {value}: {name}; correct "
                    f"the files, or say data.ignore={value} if it means not annotated"
                )
            if not name.strip() or not name.isprintable():
                raise ValueError(f"the name of label {value} has no letters, or hidden ones")
        if isinstance(labels, dict) and len({int(value) for value in labels}) < len(labels):
            raise ValueError("names a label value twice, in two ways of writing it")
        return labels


class PlanSection(Section):
    """What the plan decides unless it is given: spacing in mm, patch_size in voxels.

    In dimension 2, slice by slice, both have two entries, those of the plane.
    """

    dimension: Auto | Literal[2, 3] = "auto"
    spacing: (
        Auto | tuple[Millimeters, Millimeters, Millimeters] | tuple[Millimeters, Millimeters]
    ) = "auto"
    patch_size: Auto | tuple[Side, Side, Side] | tuple[Side, Side] = "auto"
    normalization: Auto | Literal["zscore", "ct"] = "auto"
    flips: Auto | Annotated[tuple[Literal[0, 1, 2], ...], Distinct] = "auto"


Width = Annotated[float, Field(gt=0.0, le=8.0)]
PerRound = Field(min_length=1, max_length=21)


class NetworkSection(Section):
    """The network: ``width`` scales the channels, ``depth`` counts the resolution levels.

    A list of widths has one entry per round, round 0 first: students larger than their teachers.
    ``auto`` is dynunet, but in 2D unet where an ``encoder`` or ``pretrained`` is asked for. All but
    dynunet are of segmentation-models-pytorch: in 2D, with an encoder (``auto`` is resnet18), which
    ``pretrained`` starts from weights of ImageNet (a download), of six levels and without
    ``deep_supervision``.
    """

    name: Auto | Literal["dynunet"] | PlaneNetwork = "auto"
    encoder: Name = "auto"
    pretrained: bool = False
    width: Width | Annotated[tuple[Width, ...], PerRound] = 1.0
    depth: Auto | Annotated[int, Field(ge=3, le=7)] = "auto"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    deep_supervision: bool = True


class TeacherSection(Section):
    """Who makes the targets: the previous round's model (offline), an EMA of the student, itself.

    ``previous_round`` and ``ema`` together: offline pseudo-targets, online consistency. With
    ``ensemble: k`` every round that has a successor trains k models of other seeds, and the mean
    of their probs labels. ``probs: clean`` are those of the network without its noise, averaged
    over mirrorings where they are saved; ``sampled`` the mean of the passes of
    ``filter.uncertainty``, each with dropout and under a mirroring of its own, and where they are
    saved under a small rotation and scale too.
    """

    source: Annotated[tuple[Literal["previous_round", "ema", "self"], ...], Distinct] = (
        "previous_round", "ema",
    )  # fmt: skip
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    probs: Literal["clean", "sampled"] = "clean"
    ensemble: Annotated[int, Field(ge=1, le=16)] = 1


class TransportSection(Section):
    """Assignment towards a class prior: entropy ``epsilon``, relaxation ``rho``.

    ``prior: labeled`` is the share of each class in labeled volumes, mixed with the pool's own
    shares by ``shrink`` (0: not at all). ``calibrated`` is the pool's own share, corrected by how
    much too large or small round 0 finds the class in the labeled cases, so for its own labels
    only; it needs offline pseudo-labels.
    """

    prior: Literal["labeled", "calibrated"] = "calibrated"
    epsilon: Positive = 0.1
    rho: Annotated[float, Field(gt=0.0, allow_inf_nan=True)] = 10.0
    shrink: Fraction = 0.5


class TargetSection(Section):
    """The pseudo-target: hard or soft; temperatures of the teacher's and student's softmax."""

    kind: Literal["hard", "soft"] = "soft"
    temperature: Positive = 1.0
    student_temperature: Positive = 1.0
    assignment: Literal["argmax", "transport"] = "argmax"
    transport: TransportSection = TransportSection()


class ThresholdSection(Section):
    """Class-wise confidence threshold of a voxel, moving from ``start`` to ``end`` in a round.

    For ``quantile`` they are the kept share of each predicted class, 0.8 to 0.95 unless
    the preset or the user has others.
    """

    name: Literal["none", "fixed", "curriculum", "flex", "free", "soft", "quantile"] = "flex"
    start: Fraction = 0.95
    end: Fraction = 0.7

    @model_validator(mode="before")
    @classmethod
    def _keep_more_and_more(cls, given: object) -> object:
        """Give a share, which shall grow, a range of its own: thresholds fall."""
        if isinstance(given, dict) and given.get("name") == "quantile":
            return {"start": 0.8, "end": 0.95, **given}
        return given


class UncertaintySection(Section):
    """Filter of voxels by the uncertainty of MC dropout, of mirrorings, or of an ensemble.

    ``measure`` is predictive entropy or mutual information. A voxel is accepted while it is under
    ``u + (ln C - u) r(t)`` with ``u = start ln 2``: ln 2 is the doubt between two classes, which a
    boundary has however many classes there are. ``start: null`` refuses no voxel: the uncertainty
    is measured for the review. ``online_passes`` are those of an online teacher in each step, as
    many as ``passes`` where it is not given.
    Source: Yu et al. 2019 (UA-MT), section 2.3, which has two classes.
    """

    source: Literal["none", "mc_dropout", "flips", "ensemble"] = "mc_dropout"
    measure: Literal["entropy", "mutual_information"] = "entropy"
    passes: Annotated[int, Field(ge=2, le=64)] = 8
    online_passes: Auto | Annotated[int, Field(ge=2, le=64)] = "auto"
    start: Fraction | None = 0.75


Stable = Annotated[float, Field(gt=0.0, le=1.0)]


class CaseFilterSection(Section):
    """Which pseudo-labeled cases a student is trained on, and how often each is drawn.

    ``stable`` keeps the share of cases whose pseudo-mask changed least while their teacher was
    trained; a list has one entry per student round. ``draw: coverage`` draws patches from a case
    by its accepted share, ``balance`` repeats cases of rare classes.
    """

    confidence: Fraction = 0.3
    stable: Stable | Annotated[tuple[Stable, ...], PerRound] = 1.0
    draw: Literal["uniform", "coverage"] = "uniform"
    balance: bool = False


class FilterSection(Section):
    """What of a pseudo-label is trusted: per voxel, then per case.

    ``components: largest`` turns islands of a class into background, for the classes that are one
    piece in every labeled case.
    """

    threshold: ThresholdSection = ThresholdSection()
    uncertainty: UncertaintySection = UncertaintySection()
    components: Literal["all", "largest"] = "largest"
    case: CaseFilterSection = CaseFilterSection()


class RandAugmentSection(Section):
    """RandAugment-3D on strong views: operations per patch, magnitude 0 to 30."""

    num_operations: Annotated[int, Field(ge=0, le=8)] = 0
    magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = 9.0


class NoiseSection(Section):
    """Noise of the student: mixing, strong views, dropout, stochastic depth (survival p_L).

    ``mixing`` goes both ways between labeled and unlabeled patches; ``labeled_mixing`` between
    labeled ones, where that is not so: in round 0, and for students without mixing.
    ``dropout`` is the student's where it shall differ from the network's.
    """

    mixing: Literal["none", "copy_paste", "cutmix"] = "copy_paste"
    labeled_mixing: Literal["none", "copy_paste", "cutmix"] = "copy_paste"
    mixing_probability: Fraction = 0.5
    labeled_mixing_probability: Fraction = 0.5
    strong: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    randaugment: RandAugmentSection = RandAugmentSection()
    dropout: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    stochastic_depth: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9


class Ramp(Section):
    """Weight over the progress t of a round: 0 before ``start``, 1 from ``end`` on."""

    name: Literal["constant", "linear", "sigmoid"] = "sigmoid"
    start: Fraction = 0.0
    end: Fraction = 0.25

    @model_validator(mode="after")
    def _check_order(self) -> Ramp:
        """Refuse a ramp that ends before it starts."""
        if self.start > self.end:
            raise ValueError(f"start={self.start} lies behind end={self.end}")
        return self


Supervised = Literal["dice_ce", "ce", "dice"]


class SupervisedSection(Section):
    """Loss on labeled voxels; ``student`` is that beside pseudo-labels where it shall differ."""

    name: Supervised = "dice_ce"
    student: Auto | Supervised = "auto"

    @property
    def beside_pseudo_labels(self) -> str:
        """The loss of a student on labels."""
        return self.name if self.student == "auto" else self.student


Voxels = Literal["all", "accepted", "refused"]
"""Where a term counts: accepted voxels have the weights of the filter, which may be soft, and
refused ones what is left of 1."""


class PseudoLabelSection(Section):
    """Loss between the student's view and the pseudo-target.

    Cross-entropy by default: its optimum is the target itself, while that of Dice under doubt is a
    larger structure, a little more so with each round. ``options`` are those of the loss by name,
    such as ``{q: 0.7}`` of ``generalized_ce``. ``transition`` is for ``forward_ce``: row i holds
    the probabilities of the classes that a teacher says of voxels of true class i; with
    ``held_out`` it is measured for each teacher on the validation cases.
    """

    name: Literal[
        "dice_ce", "ce", "dice", "mae", "generalized_ce", "symmetric_ce", "bootstrapped_ce",
        "forward_ce",
    ] = "ce"  # fmt: skip
    weight: NonNegative = 1.0
    ramp: Ramp = Ramp()
    voxels: Voxels = "accepted"
    options: dict[str, float | str] = {}
    transition: Literal["held_out"] | tuple[tuple[Fraction, ...], ...] | None = None


class EntropySection(Section):
    """Entropy of order ``order`` (1 is Shannon) of the student, normalized by ln C."""

    order: Annotated[float, Field(ge=0.0, allow_inf_nan=True)] = 1.0
    weight: NonNegative = 0.01
    ramp: Ramp = Ramp()
    voxels: Voxels = "accepted"


class ConsistencySection(Section):
    """Distance between the online teacher on the weak view and the student on the strong view."""

    name: Literal[
        "mse", "ce", "kl", "total_variation", "pearson", "hellinger", "jensen_shannon"
    ] = "mse"  # fmt: skip
    weight: NonNegative = 0.1
    ramp: Ramp = Ramp()
    voxels: Voxels = "all"


class LossesSection(Section):
    """The terms of the objective."""

    supervised: SupervisedSection = SupervisedSection()
    pseudo_label: PseudoLabelSection = PseudoLabelSection()
    entropy: EntropySection = EntropySection()
    consistency: ConsistencySection = ConsistencySection()


class FineTuneSection(Section):
    """The last steps of a student, on labeled patches without augmentation, at ``lr``.

    ``share`` is the fraction of a round's steps; the first ``frozen_levels`` levels of the encoder
    are frozen.
    """

    share: Fraction = 0.0
    lr: Positive = 1e-4
    frozen_levels: Annotated[int, Field(ge=0, le=6)] = 2


Ratio = Annotated[float, Field(gt=0.0, le=1000.0)]


class TrainSection(Section):
    """The loop: rounds after round 0, steps of each, labeled patches per step, optimizer.

    ``steps`` may have one entry per round, round 0 first.
    ``unlabeled_ratio``, unlabeled to labeled patches, may have one entry per student round.
    ``start: warm`` begins a student with its teacher's weights; ``student_lr`` is its learning rate
    where that shall differ. ``schedule: pretrain`` leaves the labels out until the fine-tune.
    """

    rounds: Annotated[int, Field(ge=0, le=20)] = 2
    steps: Auto | Count | Annotated[tuple[Count, ...], PerRound] = "auto"
    batch: Auto | Annotated[int, Field(ge=1, le=2**16)] = "auto"
    unlabeled_ratio: Ratio | Annotated[tuple[Ratio, ...], PerRound] = 1.0
    start: Literal["scratch", "warm"] = "scratch"
    schedule: Literal["joint", "pretrain"] = "joint"
    fine_tune: FineTuneSection = FineTuneSection()
    lr: Positive = 3e-3
    student_lr: Auto | Positive = "auto"
    weight_decay: NonNegative = 1e-2
    warmup: Fraction = 0.03
    grad_clip: Positive = 12.0
    foreground: Fraction = 0.5
    seed: Seed = 0
    device: Name = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: Auto | Annotated[int, Field(ge=0, le=128)] = "auto"
    log_every: Count = 50
    checkpoint_every: Count = 200


class TrackingSection(Section):
    """MLflow: the store and the experiment; ``uri: none`` keeps the journal only."""

    uri: Name = "auto"
    experiment: Name = "auto"


View = Literal["strong", "strong_2", "feature_noise"]
"""Noised views of an unlabeled patch; feature noise is channel dropout on the weak view."""


class Config(Section):
    """The whole configuration of a run.

    ``objective`` names the class of the losses as ``package.module:Class``; the built-in one is the
    equation of ``objective.py``. ``validation`` says how many of the labeled cases validate:
    ``auto`` takes a fifth where 16 scans of 6 patients or more are labeled and none below, where
    each of them is worth more in training; ``fifth`` takes one from five labeled scans on.
    """

    data: DataSection = DataSection()
    plan: PlanSection = PlanSection()
    network: NetworkSection = NetworkSection()
    method: Name = "default"
    objective: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] = "medssl.objective:Objective"
    teacher: TeacherSection = TeacherSection()
    views: Annotated[tuple[View, ...], Field(min_length=1), Distinct] = ("strong",)
    target: TargetSection = TargetSection()
    filter: FilterSection = FilterSection()
    noise: NoiseSection = NoiseSection()
    losses: LossesSection = LossesSection()
    train: TrainSection = TrainSection()
    validation: Auto | Literal["fifth"] | Annotated[int, Field(ge=0, le=10**8)] = "auto"
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        """Refuse settings that contradict each other."""
        found = [*_check_teacher(self), *_check_idle(self), *_check_rest(self)]
        if found:
            raise ValueError("\n  - ".join(found))
        return self


def _check_teacher(config: Config) -> Iterator[str]:
    """Yield what does not fit the teacher that was chosen."""
    source, case = list(config.teacher.source), config.filter.case
    doubt = config.filter.uncertainty.source
    if config.teacher.probs == "sampled" and doubt != "mc_dropout":
        yield (
            "teacher.probs=sampled is the mean of the passes of MC dropout, but "
            f"filter.uncertainty.source={doubt}; set it to mc_dropout, or teacher.probs=clean"
        )
    if not source:
        yield "teacher.source is empty: name previous_round, ema or self"
        return
    if {"ema", "self"} <= set(source):
        yield f"teacher.source={source}: only one online teacher, ema or self"
    if source == ["previous_round"] and config.losses.consistency.weight > 0:
        yield (
            f"teacher.source={source} has no ema, which the consistency loss compares with; add "
            "it, or set losses.consistency.weight=0"
        )
    if "previous_round" in source:
        return
    held_out = config.losses.pseudo_label.transition == "held_out"
    for key, value, neutral in (
        ("losses.pseudo_label.transition", "held_out" if held_out else "null", ("null",)),
        ("filter.uncertainty.source", doubt, ("none", "mc_dropout")),
        ("filter.case.stable", case.stable, (1.0,)),
        ("filter.case.draw", case.draw, ("uniform",)),
        ("filter.case.balance", case.balance, (False,)),
        ("teacher.ensemble", config.teacher.ensemble, (1,)),
        ("target.transport.prior", _choose_prior(config), ("labeled",)),
    ):
        if value not in neutral:
            yield (
                f"teacher.source={source} makes targets online, but {key}={value} is about "
                f"pseudo-labels made offline; add previous_round, or set {key}={neutral[0]}"
            )


def _choose_prior(config: Config) -> str:
    """Return the prior of the transport; without transport it is of no account."""
    target = config.target
    return target.transport.prior if target.assignment == "transport" else "labeled"


def _check_rest(config: Config) -> Iterator[str]:
    """Yield all other contradictions."""
    doubt, loss = config.filter.uncertainty.source, config.losses.pseudo_label
    threshold = config.filter.threshold
    if doubt == "mc_dropout" and config.network.dropout == 0.0:
        yield (
            "filter.uncertainty.source=mc_dropout needs network.dropout above 0 (got 0.0): "
            "without dropout the passes do not differ; set network.dropout=0.1 or "
            "filter.uncertainty.source=none"
        )
    if doubt == "mc_dropout" and config.noise.dropout == 0.0:
        yield (
            "filter.uncertainty.source=mc_dropout needs noise.dropout above 0 (got 0.0), since "
            "students teach and are reviewed too; leave it out, or set "
            "filter.uncertainty.source=none"
        )
    if doubt == "ensemble" and config.teacher.ensemble < 2:
        yield "filter.uncertainty.source=ensemble needs teacher.ensemble of 2 or more (got 1)"
    if config.train.schedule == "pretrain" and config.train.fine_tune.share == 0.0:
        yield (
            "train.schedule=pretrain leaves the labels to the fine-tune; give it steps, such as "
            "train.fine_tune.share=0.2"
        )
    widths = config.network.width
    if config.train.start == "warm" and isinstance(widths, tuple) and len(set(widths)) > 1:
        yield (
            f"train.start=warm gives a student the weights of its teacher, but network.width is "
            f"{list(widths)}; give it one value, or train.start=scratch"
        )
    if loss.name == "forward_ce" and loss.transition is None:
        yield (
            "losses.pseudo_label.name=forward_ce needs losses.pseudo_label.transition: held_out, "
            "which is measured on validation cases, or rows of true classes, each with sum 1"
        )
    if loss.name != "forward_ce" and loss.transition is not None:
        yield f"losses.pseudo_label.transition is for forward_ce, but the loss is {loss.name}"
    if threshold.name == "quantile" and threshold.start > threshold.end:
        yield (
            f"filter.threshold.start={threshold.start:g}, end={threshold.end:g}: of quantile they "
            "are the kept share, which shall grow; set filter.threshold={name: quantile, start: "
            "0.8, end: 0.95}"
        )
    names = list((config.data.labels or {}).values())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield f"data.labels: two label values are named {', '.join(twice)}"


def _check_idle(config: Config) -> Iterator[str]:
    """Yield settings without effect, or with one that another setting has switched off."""
    threshold, draw = config.filter.threshold, config.filter.case.draw
    doubt, target = config.filter.uncertainty, config.target
    unlimited = doubt.source == "none" or doubt.start is None
    unbounded = threshold.name in ("none", "free", "soft", "quantile")
    if draw == "coverage" and unlimited and unbounded:
        yield (
            "filter.case.draw=coverage draws by the share of accepted voxels, but with "
            f"filter.threshold.name={threshold.name} and no limit of uncertainty all cases have "
            "the same; set filter.threshold={name: fixed, start: 0.8}, or filter.case.draw=uniform"
        )
    if target.assignment == "transport" and target.kind == "soft" and target.temperature != 1.0:
        yield (
            f"target.temperature={target.temperature:g} has no effect on soft targets of "
            "target.assignment=transport, which target.transport.epsilon sharpens; leave it at 1"
        )
    if target.kind == "hard" and target.temperature != 1.0:
        yield (
            f"target.temperature={target.temperature:g} has no effect on target.kind=hard; leave "
            "it at 1, or set target.kind=soft"
        )
    if config.losses.entropy.weight > 0 and config.losses.entropy.order == 0.0:
        yield (
            "losses.entropy.order=0 is ln C whatever the student says, and teaches nothing; set an "
            "order above 0, or losses.entropy.weight=0"
        )
    for key, term in (
        ("consistency", config.losses.consistency),
        ("entropy", config.losses.entropy),
    ):
        if term.weight > 0 and term.voxels == "refused" and unlimited and threshold.name == "none":
            yield (
                f"losses.{key}.voxels=refused, but no voxel is refused: filter.threshold.name=none "
                f"and no limit of uncertainty; set losses.{key}.voxels=all"
            )
    if config.noise.mixing == "copy_paste" and config.losses.pseudo_label.weight == 0.0:
        yield (
            "noise.mixing=copy_paste pastes pseudo-labels into labeled patches, but "
            "losses.pseudo_label.weight=0 asks for none; set noise.mixing=none or cutmix"
        )


def at_round(value: Value | tuple[Value, ...], index: int) -> Value:
    """Return the value of a round, the last one for all rounds beyond a list's end.

    Example:
        >>> [at_round((900, 300), index) for index in range(4)]
        [900, 300, 300, 300]
    """
    return value[min(index, len(value) - 1)] if isinstance(value, tuple) else value


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

_OTHER_WORDS = {
    "batchsize": "train.batch",
    "learningrate": "train.lr",
    "epochs": "train.steps",
    "iterations": "train.steps",
    "maxsteps": "train.steps",
    "numworkers": "train.workers",
    "gpu": "train.device",
    "amp": "train.precision",
    "model": "network.name",
    "classes": "data.labels",
    "roisize": "plan.patch_size",
}
"""Keys of other programs, without their hyphens, and what they are called here."""

_NAMED_INSIDE = ("data.labels", "losses.pseudo_label.options")  # settings with keys of their own


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each value came from (dotted key -> source)."""

    config: Config
    sources: dict[str, str]


class _PlainLoader(yaml.SafeLoader):
    """YAML loader of plain values: what PyYAML would take silently for something else is not.

    Of duplicate keys it keeps the last; 010 is 8 for it, 1:30 is 90, 1e-3 a text, 2026-11-29 no
    text; and anchors of anchors fill any memory.
    """

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


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_OWN_TAGS = {_INTEGER, _FLOAT, "tag:yaml.org,2002:timestamp"}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in kinds if tag not in _OWN_TAGS]
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
_PlainLoader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_PlainLoader.add_implicit_resolver(
    _FLOAT, re.compile(rf"(?:{_NUMBER}|\.(?:nan|NaN|NAN))$"), list("-+.0123456789")
)


def _read_integer(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    """Return an integer; of more digits than any machine counts with it is none."""
    text = str(loader.construct_scalar(node))
    if len(text) > 100:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits", node.start_mark
        )
    return int(text)


_PlainLoader.add_constructor(_INTEGER, _read_integer)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        yaml.YAMLError: It is none, or uses what a configuration has no use for.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_PlainLoader):
        wrong, tag = None, getattr(event, "tag", None)
        where: Any = event.start_mark
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            wrong = "anchors (&) and aliases (*) are not read: write the value out, or quote it"
        elif tag:
            wrong = f"tags such as {_show(tag)} are not read here: write the value alone"
        elif depth > MOST_NESTED:
            wrong = f"more than {MOST_NESTED} brackets or sections are nested"
        if wrong:
            raise yaml.constructor.ConstructorError(None, None, wrong, where)
    return yaml.load(text, Loader=_PlainLoader)


def _show(value: object) -> str:
    """Return a value as text, a long one by its beginning."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


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
        layers.append((_spell_out(_read_yaml(Path(first)), problems), str(first)))
    elif first is not None:
        layers.append(({"data.root": str(first)}, "command line"))
    layers.append((_parse_overrides(overrides, problems), "command line"))
    for values, source in layers:
        given.update({key: (value, source) for key, value in values.items()})
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


def describe_terms(config: Config) -> str:
    """Return the terms of the objective that are on, in a line."""
    if not config.train.rounds:
        return f"supervised {config.losses.supervised.name}"
    target, losses = config.target, config.losses
    parts = [f"supervised {losses.supervised.beside_pseudo_labels}"]
    if losses.pseudo_label.weight:
        how = f"{target.kind} labels" + (", transport" if target.assignment != "argmax" else "")
        parts.append(f"pseudo-label {losses.pseudo_label.name} ({how})")
    if losses.entropy.weight:
        parts.append(f"entropy of order {losses.entropy.order:g}")
    if losses.consistency.weight:
        parts.append(f"consistency {losses.consistency.name}")
    used = [f"threshold {config.filter.threshold.name}"]
    used += [f"uncertainty {config.filter.uncertainty.source}", f"mixing {config.noise.mixing}"]
    extra = [text for text in used if not text.endswith(" none")]
    teacher = " and ".join(config.teacher.source).replace("_", " ")
    rounds = f"{config.train.rounds} round" + ("s" if config.train.rounds > 1 else "")
    return f"{' + '.join(parts)}; {', '.join([f'teacher {teacher}', *extra, rounds])}"


def render(resolved: Resolved, only_given: bool = False) -> str:
    """Return the configuration as text, one dotted key a line with its source.

    Args:
        resolved: The configuration.
        only_given: Leave out defaults, and what the preset or the plan decided.
    """
    values = _flatten(dump(resolved.config))
    if only_given:
        sources = {key: resolved.sources.get(key, "default") for key in values}
        own = [k for k, source in sources.items() if not source.startswith(("default", "method"))]
        values = {key: values[key] for key in own if sources[key] != "plan"}
    shown = {
        key: yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        for key, value in values.items()
    }
    shown = {key: text.replace("\n...\n", "").strip() for key, text in shown.items()}
    width = max((len(f"{key}: {text}") for key, text in shown.items()), default=0)
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
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(
            f"{path}: {size} bytes are no configuration, which has {MOST_BYTES} at most; DATA is a "
            "folder or a list that ends in .csv or .json"
        )
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 ({error.reason}); save it with that encoding"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a valid YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected `key: value` lines, got {type(content).__name__}")
    return content


def _read_method(name: str, problems: list[str]) -> tuple[dict[str, Any], str]:
    """Read the preset of a method, given by name or by file."""
    if name.endswith((".yaml", ".yml")):
        values = _spell_out(_read_yaml(Path(name)), problems)
        if "method" in values:
            problems.append(
                f"{name}: method={values['method']}: a preset builds on no other one; write out "
                "what it shall have of that"
            )
        return values, name
    methods = list_methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(
            f"method: unknown preset {_show(name)}; {hint}there are: {', '.join(methods)}"
        )
        return {}, name
    values = _flatten(_read_yaml(methods[name]))
    return {key: value for key, value in values.items() if not key.startswith("about.")}, name


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Parse ``key.path=value`` arguments; of two for the same key the later one counts."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"{_show(text)}: expected key=value, as labeled=4 or train.lr=1e-3")
        elif not value.strip():
            problems.append(f"{_show(text)}: a value is missing; leave the key out, or say null")
        elif len(text) > MOST_LETTERS:
            problems.append(f"{_show(text)}: too long; write it into a YAML file")
        else:
            try:
                values.update(_spell_out({key: parse_yaml(value)}, problems))
            except yaml.YAMLError as error:
                problems.append(f"{key}: {_show(value)} cannot be read as a value: {error}")
    return values


def _spell_out(tree: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return dotted keys, shortcuts by their full names, or name those that stand twice."""
    flat: dict[str, Any] = {}
    for key, value in _walk(tree):
        name = SHORTCUTS.get(key, key)
        if name in flat:
            problems.append(f"{name}: stands twice, in two ways of writing it")
        flat[name] = value
    return flat


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys for nested sections."""
    return dict(_walk(tree))


def _walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; class names of ``data.labels`` stay together."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name != "data.labels":
            yield from _walk(value, f"{name}.")
        else:
            yield name, value


def _unflatten(flat: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return nested sections for dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        if len(parents) > MOST_NESTED:
            problems.append(f"{_show(key)}: unknown key; `medssl config` lists all keys")
            continue
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
        told = [f"  - {problem}" for problem in dict.fromkeys(problems)]
        more = len(told) - MOST_TOLD
        lines = "\n".join(told[:MOST_TOLD] + ([f"  - and {more} more"] if more > 0 else []))
        plural = "mistake" if len(told) == 1 else "mistakes"
        raise InputError(f"{len(told)} {plural} in the configuration:\n{lines}")
    return config


def _explain_all(items: Sequence[Any]) -> list[str]:
    """Say each validation error in a sentence: key, problem, value, nearest valid key."""
    valid = list(_list_keys(Config))
    unknown: dict[str, None] = {}
    wrong: dict[tuple[str, str], list[str]] = {}
    for item in items:
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            key = next(iter(_flatten({".".join(path): item["input"]})))
            is_told = len(unknown) < MOST_TOLD  # to look for the nearest of thousands takes minutes
            unknown[_explain_key(key, valid) if is_told else f"{_show(key)}: unknown key"] = None
            continue
        while path and ".".join(path) not in valid:
            path.pop()  # the rest names a member of a union, or a place in a list
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = "a value is missing"
        if item["type"] == "tuple_type":
            message = "Input should be a list, such as [1, 2]"
        value = f" (got {_show(item['input'])})" if path else ""
        wrong.setdefault((".".join(path), value), []).append(message + _offer_choice(item))
    told = [
        f"{key}: {'; or: '.join(dict.fromkeys(m))}{value}" if key else m[0]
        for (key, value), m in wrong.items()
    ]
    return [*unknown, *told]


def _explain_key(key: str, valid: Sequence[str]) -> str:
    """Say what an unknown key may have meant."""
    first, _, rest = key.partition(".")
    last = key.split(".")[-1]
    near = [name for name in valid if name.split(".")[-1] == last]
    if rest and not near:
        near = [f"{name}.{rest}" for name in _NAMED_INSIDE if name.endswith(f".{first}")]
    near = near or [name for name in [_OTHER_WORDS.get(_squeeze(last))] if name]
    near = near or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`medssl config` lists all keys"
    return f"{key if len(key) <= 100 else _show(key)}: unknown key; {hint}"


def _offer_choice(item: Any) -> str:
    """Return a hint to the choice that a name is nearest to, whatever its case."""
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    choices = re.findall("'([^']+)'", item["ctx"]["expected"])
    near = difflib.get_close_matches(_squeeze(item["input"][:100]), map(_squeeze, choices), n=1)
    named = [choice for choice in choices if near == [_squeeze(choice)]]
    return f"; did you mean {named[0]}?" if named else ""


def _squeeze(word: str) -> str:
    """Return a word in lower case and without what parts it."""
    return re.sub(r"[-_ ]", "", word.lower())


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
    """Return a hash of what decides the result: not device, workers, logging or tracking.

    Args:
        config: The resolved configuration.
        ignore: Keys to leave out as well; one that ends in a dot stands for all below it.
    """
    kept = _list_deciding(config, ignore)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def list_changes(old: Config, new: Config) -> list[str]:
    """Say which settings decide another result than before, with both values."""
    before, now = _list_deciding(old), _list_deciding(new)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key} is {before.get(key)} there and {now.get(key)} here" for key in keys]


_ADDED = {
    "teacher.probs": "clean",
    "filter.uncertainty.online_passes": "auto",
    "train.student_lr": "auto",
}
"""Settings that 0.1.0 did not have, with the values that mean what it did: its runs go on."""

_RENAMED = {
    ("method", "classic"): "default",
    ("validation", "fifth"): "auto",
    ("network.encoder", "auto"): "resnet18",
}
"""What stands for a value of 0.1.0 now, and that value."""


def _list_deciding(config: Config, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings that decide the result, by dotted key."""
    values = _flatten(dump(config))
    skipped: tuple[str, ...] = (
        "tracking.", "train.device", "train.workers", "train.log_every", "train.checkpoint_every",
        "data.root",
    )  # fmt: skip
    skipped = (*skipped, *(key for key in ignore if key.endswith(".")))
    kept = {k: v for k, v in values.items() if not k.startswith(skipped) and k not in ignore}
    kept = {k: v for k, v in kept.items() if k not in _ADDED or v != _ADDED[k]}
    return {k: _RENAMED.get((k, str(v)), v) for k, v in kept.items()}
