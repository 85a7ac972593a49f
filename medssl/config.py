"""Every section of a configuration and its default.

A value that is ``auto`` is decided by the plan, from the data and the machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

IGNORE = 255
"""Class index, inside the program, of voxels without supervision."""

MOST_DIGITS = 20  # of a label value
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


def show_value(value: object) -> str:
    """Return a value as text, a long one by its beginning."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def is_url(text: object) -> bool:
    """Tell whether a text names something on a store (`s3://bucket/scans`), and no path."""
    return re.match(r"[A-Za-z][\w+.:-]*://", str(text)) is not None


_USER = re.compile(r"://(?:[^/\s]+|[^/@\s]*:(?!\d*/)\S*)@")  # a password may hold a slash or an @
_SIGNATURE = re.compile(
    r"([?&][^=&\s]*(?:sig|credential|token|secret|password|key)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)


def hide_password(text: str) -> str:
    """Return a URL, or a text with URLs, without user names, passwords and signatures."""
    return _SIGNATURE.sub(r"\1[hidden]", _USER.sub("://", text))


class Section(BaseModel):
    """One section of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_words(cls, value: object, info: ValidationInfo) -> object:
        """Refuse yes and no, which YAML reads as true and false, in the place of 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, Section)
        if annotation is not bool and not is_section and _holds_bool(value):
            raise ValueError("expected a number or a name (in quotes), not yes or no, on or off")
        return value


def _holds_bool(value: object) -> bool:
    """Tell whether a value, or one inside of it, is true or false."""
    inside = value.values() if isinstance(value, dict) else value
    if isinstance(inside, str) or not isinstance(inside, Iterable):
        return isinstance(value, bool)
    return any(_holds_bool(item) for item in inside)


def _read_root(root: object) -> object:
    """Return a URL as it is, and of a path what it is where `~` is the home folder."""
    if not isinstance(root, str | Path) or is_url(root):
        return root
    return Path(os.path.expanduser(root))


class DataSection(Section):
    """Where the scans are and which of them are labeled, unlabeled and test cases.

    ``labeled`` and ``unlabeled`` are how many of them train, ``test`` how many are kept aside.
    """

    root: Annotated[Path | str, BeforeValidator(_read_root)] | None = None
    format: Literal["auto", "decathlon", "nnunet", "folders", "list"] = "auto"
    labels: dict[int, str] | None = None
    ignore: Annotated[int, Field(ge=-LARGEST_LABEL, le=LARGEST_LABEL)] | None = None
    labeled: Count | Literal["all"] = "all"
    unlabeled: Count | Literal["all"] = "all"
    test: Annotated[int, Field(ge=0, le=10**8)] = 0
    split_seed: Seed = 0
    draw: Seed = 0

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: Path | str | None) -> Path | str | None:
        """Refuse a root that no system takes as a path."""
        if root is not None and ("\0" in str(root) or len(str(root)) > 4000):
            raise ValueError("no path: it has a null character, or more than 4000 letters")
        return root

    @field_validator("labels", mode="before")
    @classmethod
    def _check_labels(cls, labels: object) -> object:
        """Refuse names in place of values, the most frequent mistake."""
        for value, name in labels.items() if isinstance(labels, dict) else ():
            if not re.fullmatch(r"-?\d+", str(value)) or not isinstance(name, str):
                raise ValueError(
                    f'expected values with names, as data.labels.1=liver or "{{1: liver}}", got '
                    f"{value!r}: {name!r}"
                )
            if len(str(value)) > MOST_DIGITS or int(value) > LARGEST_LABEL:
                raise ValueError(f"no label file holds a value as large as {show_value(value)}")
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
    """What the plan decides unless the user does: spacing in mm, patch_size in voxels.

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
    ``auto`` takes dynunet, or in 2D unet where ``encoder`` or ``pretrained`` is set. All others are
    networks of segmentation-models-pytorch: in 2D only, with six levels, without
    ``deep_supervision``, and with an encoder (``auto``: resnet18) that ``pretrained`` starts from
    ImageNet weights (a download).
    """

    name: Auto | Literal["dynunet"] | PlaneNetwork = "auto"
    encoder: Name = "auto"
    pretrained: bool = False
    width: Width | Annotated[tuple[Width, ...], PerRound] = 1.0
    depth: Auto | Annotated[int, Field(ge=3, le=7)] = "auto"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    deep_supervision: bool = True


class TeacherSection(Section):
    """Who makes the targets: the model of the previous round (offline), an EMA, or the student.

    ``previous_round`` and ``ema`` together: offline pseudo-targets, online consistency. With
    ``ensemble: k`` every round that has a successor trains k models with different seeds, whose
    mean probs are the pseudo-labels. ``probs: clean`` is the network without its noise;
    pseudo-labels that are saved are averaged over mirrorings. ``probs: sampled`` is the mean of the
    passes of ``filter.uncertainty``, each with dropout and another mirroring, and for saved
    pseudo-labels with a small rotation and scale too.
    """

    source: Annotated[tuple[Literal["previous_round", "ema", "self"], ...], Distinct] = ("ema",)
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    probs: Literal["clean", "sampled"] = "sampled"
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

    kind: Literal["hard", "soft"] = "hard"
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
    def _keep_more_and_more(cls, section: object) -> object:
        """Give a share, which shall grow, a range of its own: thresholds fall."""
        if isinstance(section, dict) and section.get("name") == "quantile":
            return {"start": 0.8, "end": 0.95, **section}
        return section


Fidelity = Literal["full", "fast"]


class UncertaintySection(Section):
    """Filter of voxels by the uncertainty of MC dropout, of mirrorings, or of an ensemble.

    ``measure`` is predictive entropy or mutual information. A voxel is accepted while it is under
    ``u + (ln C - u) r(t)`` with ``u = start ln 2``: ln 2 is the uncertainty between two classes,
    which a boundary has however many classes there are. ``start: null`` refuses no voxel: the
    uncertainty is measured for the review. ``online_passes`` are those of an online teacher in each
    step, as many as ``passes`` where it is ``auto``. ``fidelity: fast`` takes the passes of saved
    pseudo-labels behind one clean encoder and stops low in the decoder: eight of them take about
    the time of two whole ones.
    Source: Yu et al. 2019 (UA-MT), section 2.3, which has two classes.
    """

    source: Literal["none", "mc_dropout", "flips", "ensemble"] = "mc_dropout"
    measure: Literal["entropy", "mutual_information"] = "entropy"
    passes: Annotated[int, Field(ge=2, le=64)] = 8
    online_passes: Auto | Annotated[int, Field(ge=2, le=64)] = "auto"
    fidelity: Fidelity = "full"
    start: Fraction | None = 0.75

    @property
    def is_limited(self) -> bool:
        """Whether an uncertainty is measured, and some voxels have too much of it."""
        return self.source != "none" and self.start is not None


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

    ``mixing: copy_paste`` goes both ways between labeled and unlabeled patches, ``cutmix`` between
    unlabeled ones. ``labeled_mixing`` is between labeled patches, wherever copy_paste does not mix
    them: in round 0, and for students with another ``mixing``. ``dropout`` replaces that of
    ``network`` in students.
    """

    mixing: Literal["none", "copy_paste", "cutmix"] = "cutmix"
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
    """Loss on labeled voxels; ``student`` is the one beside pseudo-labels (``auto``: the same)."""

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

    The optimum of cross-entropy is the target itself; that of Dice, where the target is uncertain,
    is a larger structure, a little more so with each offline round. ``options`` are those of the
    loss by name, such as ``{q: 0.7}`` of ``generalized_ce``. ``transition`` is for ``forward_ce``:
    row i holds the probabilities of the classes that a teacher says of voxels of true class i; with
    ``held_out`` it is measured for each teacher on the validation cases.
    """

    name: Literal[
        "dice_ce", "ce", "dice", "mae", "generalized_ce", "symmetric_ce", "bootstrapped_ce",
        "forward_ce",
    ] = "dice_ce"  # fmt: skip
    weight: NonNegative = 1.0
    ramp: Ramp = Ramp()
    voxels: Voxels = "accepted"
    options: dict[str, float | str] = {}
    transition: Literal["held_out"] | tuple[tuple[Fraction, ...], ...] | None = None


class EntropySection(Section):
    """Entropy of order ``order`` (1 is Shannon) of the student, normalized by ln C."""

    order: Annotated[float, Field(ge=0.0, allow_inf_nan=True)] = 1.0
    weight: NonNegative = 0.02
    ramp: Ramp = Ramp()
    voxels: Voxels = "accepted"


class ConsistencySection(Section):
    """Distance between the online teacher on the weak view and the student on the strong view."""

    name: Literal[
        "mse", "ce", "kl", "total_variation", "pearson", "hellinger", "jensen_shannon"
    ] = "mse"  # fmt: skip
    weight: NonNegative = 1.0
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
    (``auto``: ``lr``). ``schedule: pretrain`` leaves the labels out until the fine-tune.
    """

    rounds: Annotated[int, Field(ge=0, le=20)] = 2
    steps: Auto | Count | Annotated[tuple[Count, ...], PerRound] = "auto"
    batch: Auto | Annotated[int, Field(ge=1, le=2**16)] = "auto"
    unlabeled_ratio: Ratio | Annotated[tuple[Ratio, ...], PerRound] = 1.0
    start: Literal["scratch", "warm"] = "warm"
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
    ``auto`` takes a fifth of them from 16 scans and 6 patients on, and none below, where each is
    worth more in training; ``fifth`` takes a fifth from five labeled scans on.
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
        problems = [*_check_teacher(self), *_check_idle(self), *_check_rest(self)]
        if problems:
            raise ValueError("\n  - ".join(problems))
        return self


def _check_teacher(config: Config) -> Iterator[str]:
    """Yield what does not fit the teacher that was chosen."""
    source, case = list(config.teacher.source), config.filter.case
    uncertainty, fidelity = config.filter.uncertainty.source, config.filter.uncertainty.fidelity
    if fidelity == "fast" and (config.teacher.probs, uncertainty) != ("clean", "mc_dropout"):
        yield (
            "filter.uncertainty.fidelity=fast shares the encoder among passes of MC dropout that "
            "see a scan alike, beside a clean teacher: set filter.uncertainty.source=mc_dropout "
            "and teacher.probs=clean, or filter.uncertainty.fidelity=full"
        )
    if config.teacher.probs == "sampled" and uncertainty != "mc_dropout":
        yield (
            "teacher.probs=sampled is the mean of the passes of MC dropout, but "
            f"filter.uncertainty.source={uncertainty}; set it to mc_dropout, or teacher.probs=clean"
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
        ("filter.uncertainty.source", uncertainty, ("none", "mc_dropout")),
        ("filter.uncertainty.fidelity", fidelity, ("full",)),
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
    uncertainty, loss = config.filter.uncertainty.source, config.losses.pseudo_label
    threshold = config.filter.threshold
    if uncertainty == "mc_dropout" and config.network.dropout == 0.0:
        yield (
            "filter.uncertainty.source=mc_dropout needs network.dropout above 0 (got 0.0): "
            "without dropout the passes do not differ; set network.dropout=0.1 or "
            "filter.uncertainty.source=none"
        )
    if uncertainty == "mc_dropout" and config.noise.dropout == 0.0:
        yield (
            "filter.uncertainty.source=mc_dropout needs noise.dropout above 0 (got 0.0), since "
            "students teach and are reviewed too; leave it out, or set "
            "filter.uncertainty.source=none"
        )
    if uncertainty == "ensemble" and config.teacher.ensemble < 2:
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
    threshold, target = config.filter.threshold, config.target
    unlimited = not config.filter.uncertainty.is_limited
    if target.assignment == "transport" and target.kind != "hard" and target.temperature != 1.0:
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
