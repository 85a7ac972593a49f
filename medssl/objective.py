"""The one equation: every method is a setting of it.

L(t) = L_sup(f(x~_l), y~_l)
     + sum over views v of a_pl(t)  mean[m_pl  L_pl(f(v), q_v)]
                         + a_ent(t) mean[m_ent H_r(f(v))]
                         + a_con(t) mean[m_con D(stopgrad g(w) || f(v))]

f is the noised student, g the teacher, w the weak view; q is what g says of w, hard or sharpened.
``mean`` is over all voxels that are not ignored. Where patches are mixed each voxel keeps the loss
and the weight of the case that it comes from: L_sup with 1 or L_pl with a_pl(t), in whichever patch
it lies (Bai et al. 2023). A Dice loss is taken for labels and pseudo-labels of labeled patches and
of each view apart.

Axes: B batch, C channels, I J K voxel axes (K is absent in 2D).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medssl.config import IGNORE, Config, InputError, PseudoLabelSection, Ramp
from medssl.losses import robust, supervised
from medssl.losses.consistency import consistency_loss
from medssl.losses.entropy import entropy_loss
from medssl.losses.ramps import ramp_value
from medssl.networks.build import SegmentationNetwork, arrange, read_heads
from medssl.networks.noise import drop_features, freeze_encoder, sample_dropout, silence_noise
from medssl.networks.sharing import share_batch
from medssl.pseudo.thresholds import ClassThresholds, measure_coverage
from medssl.pseudo.transport import RunningTransport, assign
from medssl.pseudo.uncertainty import combine_slab, find_limit
from medssl.transforms.mixing import draw_boxes, draw_cubes, paste

Loss = Callable[..., Tensor]

FEATURE_DROPOUT = 0.5  # of the skips' channels in the view feature_noise; Yang et al. 2023
LEAST_PROB = 1e-6
LOSSES: dict[str, Loss] = {
    "ce": supervised.ce,
    "dice": supervised.dice,
    "dice_ce": supervised.dice_ce,
    "mae": robust.mae,
    "generalized_ce": robust.generalized_ce,
    "symmetric_ce": robust.symmetric_ce,
    "bootstrapped_ce": robust.bootstrapped_ce,
    "forward_ce": robust.forward_ce,
}
"""Functions of (logits, target, weight, valid) by the name that ``losses.*.name`` gives them."""


@dataclass(frozen=True)
class Patches:
    """What a network sees of a batch, and what that is compared with; mixed together.

    ``target`` (B, num_classes, I, J, K) has one-hot labels, or the pseudo-target q. ``valid``
    (B, 1, I, J, K) says which voxels count at all, ``is_unlabeled`` which of them come from an
    unlabeled case. Of these ``g_w`` has the probs of the online teacher on the weak view, and
    ``accepted`` says in [0, 1] how far the filter trusts each.
    """

    image: Tensor
    target: Tensor
    valid: Tensor
    is_unlabeled: Tensor
    g_w: Tensor
    accepted: Tensor


class Objective(nn.Module):
    """Student, EMA teacher, filter and losses of one round.

    ``monitors`` are what the last step measured: numbers, or tensors of one element, which stay on
    the device until the journal reads them. One that is NaN has no value in this step.

    Args:
        student: The network that learns: any module whose forward returns logits, or a list of
            them from full resolution downwards; ``forward_heads``, where it has one, goes first.
        config: The resolved configuration.
        class_names: Names of the classes, background first; monitors are named by them.
        prior: Share of each class for ``target.assignment: transport``, in whole volumes with
            ``log_potentials``, else in patches cut as the unlabeled ones are.
        log_potentials: Transport potentials (num_classes,) fitted on a pool of offline
            pseudo-labels; None where they are fitted online.
        flips: Axes of a patch, 0 for I, along which a sampled teacher may see it mirrored.
    """

    def __init__(
        self,
        student: nn.Module,
        config: Config,
        class_names: Sequence[str],
        prior: Tensor | None = None,
        log_potentials: Tensor | None = None,
        flips: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.flips = tuple(flips)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.student = cast(SegmentationNetwork, student)  # as it is in medssl's own trainings
        self.teacher = average(student)
        self.thresholds = ClassThresholds(config.filter.threshold, self.num_classes)
        self.transport: RunningTransport | None = None
        self.fits_transport = log_potentials is None
        if config.target.assignment == "transport" and prior is not None:
            section = config.target.transport
            self.transport = RunningTransport(self.num_classes, prior, section.epsilon, section.rho)
            if log_potentials is not None:
                self.transport.log_v.copy_(log_potentials)
        self.losses: dict[str, Loss] = {
            "supervised": find_loss(config.losses.supervised.name),
            "student": find_loss(config.losses.supervised.beside_pseudo_labels),
            "pseudo_label": build_loss(config.losses.pseudo_label),
        }
        self.monitors: dict[str, Tensor | float] = {}
        self.skipped: Tensor | None = None
        self.tuning = False

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student; the teacher has no noise but what is asked for."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def predictor(self) -> SegmentationNetwork:
        """The network that validates, labels and is delivered: the EMA teacher."""
        return cast(SegmentationNetwork, self.teacher.module)

    def after_step(self) -> None:
        """Move the EMA teacher towards the student, after an optimizer step.

        The training loop says in ``skipped``, a bool on the device, whether the loss was not finite
        and the step left out; then nothing moves. It calls this all the same, rather than wait for
        the device to know.
        """
        follow(self.teacher, self.student, self.config.teacher.ema_decay, self.skipped)

    def keep_average(self) -> None:
        """Let the average go on from the weights that the student starts with.

        Else it copies the student after its first step and is its plain mean for the first
        1 / (1 - decay) steps, at the highest learning rate: it would forget the teacher that it
        came from.
        """
        self.teacher.n_averaged.fill_(round(1.0 / (1.0 - self.config.teacher.ema_decay)))

    def fine_tune(self, first: bool) -> None:
        """Get ready for a step of the fine-tune: no mixing, the first levels of the encoder frozen.

        Before the ``first`` one the average starts anew: else a short fine-tune hardly reached the
        model that is delivered.
        """
        self.tuning = True
        freeze_encoder(self.student, self.config.train.fine_tune.frozen_levels)
        if first:
            self.teacher.n_averaged.zero_()

    def forward(
        self,
        labeled: Mapping[str, Tensor] | None,
        unlabeled: Mapping[str, Tensor] | None,
        progress: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss.

        Args:
            labeled: image (B, C, I, J, K), label and weight (B, 1, I, J, K); None while a student
                is pretrained on pseudo-labels alone.
            unlabeled: weak and the strong views (B, C, I, J, K), weight (B, 1, I, J, K) and, with
                an offline teacher, probs (B, num_classes, I, J, K) and uncertainty
                (B, 1, I, J, K); None in round 0 and in a fine-tune.
            progress: t in [0, 1] within the round.
            generator: Source of the mixing draws, on the CPU.
        """
        self.monitors = {}
        t, losses = progress, self.config.losses
        x_l = None if labeled is None else self._read_labeled(labeled)
        if unlabeled is None or not self._has_unlabeled_terms():
            if x_l is None:
                raise ValueError("neither labeled nor unlabeled patches to learn from")
            x_l = x_l if self.tuning else self._mix_labeled(x_l, generator)
            loss = "supervised" if unlabeled is None else "student"
            f_l = self._predict(x_l.image)
            return {"supervised": self._compare(loss, x_l, f_l, choose_voxels("labeled", x_l))}

        valid = unlabeled["weight"] > 0
        wants_online = "probs" not in unlabeled or losses.consistency.weight > 0
        g_w, u_w = self._teach(unlabeled["weak"], generator) if wants_online else (None, None)
        probs = self._assign(unlabeled.get("probs", g_w), valid)
        accepted = self._filter(probs, self._measure_uncertainty(unlabeled, u_w), valid, t)
        q = self.read_target(probs)
        views = [
            Patches(
                image=unlabeled["weak" if view == "feature_noise" else view],
                target=q,
                valid=valid,
                is_unlabeled=valid,
                g_w=probs if g_w is None else g_w,
                accepted=accepted,
            )
            for view in self.config.views
        ]
        mixed = self._mixes_both_ways(x_l)
        x_l, x_v = self._mix(x_l, views, generator)
        f_l, f_v = self._predict_views(x_l, x_v)

        terms: dict[str, Tensor] = {}
        with_labels = [] if x_l is None else [(x_l, f_l)]
        with_views = list(zip(x_v, f_v, strict=True))
        for x, f in with_labels + (with_views if mixed else []):
            l_sup = self._compare("student", x, f, choose_voxels("labeled", x))
            add_term(terms, "supervised", l_sup)
        for x, f in with_views + (with_labels if mixed else []):
            if losses.pseudo_label.weight > 0:
                a_pl = losses.pseudo_label.weight * ramp(losses.pseudo_label.ramp, t)
                m_pl = choose_voxels(losses.pseudo_label.voxels, x)
                l_pl = self._compare("pseudo_label", x, f, m_pl)
                add_term(terms, "pseudo_label", a_pl * l_pl)
        for x, f in with_views:
            if losses.entropy.weight > 0:
                a_ent = losses.entropy.weight * ramp(losses.entropy.ramp, t)
                m_ent = choose_voxels(losses.entropy.voxels, x)
                h_r = entropy_loss(f[0], losses.entropy.order, m_ent, x.valid)
                add_term(terms, "entropy", a_ent * h_r)
            if losses.consistency.weight > 0 and g_w is not None:
                a_con = losses.consistency.weight * ramp(losses.consistency.ramp, t)
                m_con = choose_voxels(losses.consistency.voxels, x)
                d = consistency_loss(f[0], x.g_w, losses.consistency.name, m_con, x.valid)
                add_term(terms, "consistency", a_con * d)
        return terms

    def _has_unlabeled_terms(self) -> bool:
        """Return whether a term on unlabeled voxels has a weight; without one they cost nothing."""
        losses = self.config.losses
        return any(
            term.weight > 0 for term in (losses.pseudo_label, losses.entropy, losses.consistency)
        )

    def _predict(self, image: Tensor) -> list[Tensor]:
        """Return the student's logits, full resolution first."""
        forward = getattr(self.student, "forward_heads", self.student)

        def predict(x: Tensor) -> list[Tensor]:
            return [lay_out(head) for head in read_heads(forward(arrange(x)), x)]

        return share_batch(predict, self.student, image)

    def _predict_views(
        self, x_l: Patches | None, x_v: Sequence[Patches]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return the student's logits of the labeled patches and of each view.

        One pass for all of them, but for the view feature_noise, in which only the features of its
        own patches are disturbed.
        """
        disturbed = [v == "feature_noise" for v in self.config.views]
        plain = [x for x, alone in zip(x_v, disturbed, strict=True) if not alone]
        together = [x.image for x in ([x_l] if x_l is not None else []) + plain]
        parts: list[list[Tensor]] = []
        if together:
            heads = self._predict(torch.cat(together))
            sizes = [len(image) for image in together]
            parts = [
                list(part) for part in zip(*(torch.split(h, sizes) for h in heads), strict=True)
            ]
        f_l = parts.pop(0) if x_l is not None else []
        f_v = []
        for x, alone in zip(x_v, disturbed, strict=True):
            if alone:
                with drop_features(self.student, FEATURE_DROPOUT):
                    f_v.append(self._predict(x.image))
            else:
                f_v.append(parts.pop(0))
        return f_l, f_v

    def _teach(
        self, weak: Tensor, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the probs of the online teacher on the weak view, and their uncertainty in nats.

        The probs are those of the un-noised teacher, or the mean of its sampled passes, which tell
        the uncertainty too; None where there is no online teacher, or no passes.
        """
        source = self.config.teacher.source
        if not {"ema", "self"} & set(source):
            return None, None
        network: nn.Module = self.teacher if "ema" in source else self.student
        if self.config.teacher.probs == "clean":
            return predict_still(network, weak), None
        return self._sample(network, weak, generator)

    @torch.no_grad()
    def _sample(
        self, network: nn.Module, weak: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return mean probs and uncertainty of MC-dropout passes.

        With a generator each pass after the first sees the view under a drawn mirroring, which is
        taken back; all passes are one batch.
        """
        section = self.config.filter.uncertainty
        count = section.passes if section.online_passes == "auto" else section.online_passes
        turns = draw_mirrorings(count, self.flips, generator)
        views = torch.cat([weak.flip(turn) for turn in turns])
        with sample_dropout(network):
            probs = predict_probs(network, views).chunk(count)
        passes = (part.flip(turn) for part, turn in zip(probs, turns, strict=True))
        mean, entropy, information, _ = combine_slab(passes)
        return mean, information if section.measure == "mutual_information" else entropy

    def assign(self, probs: Tensor) -> Tensor:
        """Return probs with the transport potentials as they are; probs themselves without any."""
        if self.transport is None:
            return probs
        return assign(probs, self.transport.epsilon * self.transport.log_v, 1.0)

    @torch.no_grad()
    def _assign(self, probs: Tensor | None, valid: Tensor) -> Tensor:
        """Return the teacher's probs, or those with which its classes have the prior's shares.

        The latter, p_c v_c^epsilon, sharpened by the temperature epsilon is the transport plan.
        """
        if probs is None:
            raise ValueError("no teacher: the batch holds no probs and teacher.source none online")
        if self.transport is not None and self.fits_transport:
            self.transport.update(probs, valid)
        return self.assign(probs)

    def _measure_uncertainty(
        self, unlabeled: Mapping[str, Tensor], u_w: Tensor | None
    ) -> Tensor | None:
        """Return the uncertainty (B, 1, I, J, K) in nats, measured offline or here.

        None where no limit applies to it.
        """
        if not self.config.filter.uncertainty.is_limited:
            return None
        if "uncertainty" in unlabeled:
            return unlabeled["uncertainty"]
        if u_w is not None:
            return u_w
        network = self.teacher if "ema" in self.config.teacher.source else self.student
        return self._sample(network, unlabeled["weak"], None)[1]

    def _read_labeled(self, labeled: Mapping[str, Tensor]) -> Patches:
        """Return labeled patches with one-hot targets."""
        label = labeled["label"].long()
        valid = (labeled["weight"] > 0) & (label != IGNORE)
        target = encode_classes(torch.where(valid, label, 0), self.num_classes)
        none = torch.zeros_like(valid)
        return Patches(labeled["image"], target, valid, none, target, none.float())

    def read_target(self, probs: Tensor) -> Tensor:
        """Return the pseudo-target q (B, num_classes, I, J, K) of assigned probs.

        Hard, or soft under the temperature of the target, or of the transport plan.
        """
        section = self.config.target
        if section.kind == "hard":
            return encode_classes(probs.max(1, keepdim=True).indices, self.num_classes)
        is_plan = self.transport is not None
        temperature = section.transport.epsilon if is_plan else section.temperature
        return torch.softmax(probs.clamp(min=LEAST_PROB).log() / temperature, dim=1)

    @torch.no_grad()
    def _filter(
        self, probs: Tensor, uncertainty: Tensor | None, valid: Tensor, progress: float
    ) -> Tensor:
        """Return (B, 1, I, J, K) in [0, 1]: how far the pseudo-target of a voxel is trusted."""
        self.thresholds.update(probs, valid, progress)
        sure = valid
        if uncertainty is not None:
            rise = ramp_value("sigmoid", progress, 0.0, 1.0)
            limit = find_limit(self.config.filter.uncertainty, self.num_classes, rise)
            sure = valid & (uncertainty < limit)
        confident = self.thresholds.accept(probs)
        accepted = confident & sure
        if uncertainty is not None:  # what the uncertainty alone takes away
            refused = (confident & valid & ~sure).sum() / valid.sum().clamp(min=1)
            self.monitors["refused_by_uncertainty"] = refused
        classes = probs.max(1, keepdim=True).indices
        self.monitors |= measure_coverage(accepted, classes, valid, self.class_names)
        thresholds = self.thresholds.thresholds.clone().unbind()  # they go on moving
        for name, threshold in zip(self.class_names, thresholds, strict=True):
            self.monitors[f"threshold/{name}"] = threshold
        return self.thresholds.weigh(probs) * sure

    def _mix_labeled(self, x_l: Patches, generator: torch.Generator) -> Patches:
        """Return labeled patches mixed among themselves, one alone as it is."""
        if len(x_l.image) < 2:
            return x_l
        noise = self.config.noise
        boxes = draw_mixing(noise.labeled_mixing, noise.labeled_mixing_probability, x_l, generator)
        return paste_patches(x_l, repeat_patches(x_l, len(x_l.image), shift=1), boxes)

    def _mix(
        self, x_l: Patches | None, views: Sequence[Patches], generator: torch.Generator
    ) -> tuple[Patches | None, list[Patches]]:
        """Return labeled patches and views, mixed.

        copy_paste goes both ways between labeled and unlabeled patches (Bai et al. 2023); cutmix
        goes between unlabeled patches, view by view, where there are two (French et al. 2020).
        The view feature_noise stays as it is (Yang et al. 2023).
        """
        kind, probability = self.config.noise.mixing, self.config.noise.mixing_probability
        both_ways = self._mixes_both_ways(x_l)
        mixed_l = x_l
        if x_l is not None and both_ways:
            source = repeat_patches(views[0], len(x_l.image))
            mixed_l = paste_patches(x_l, source, draw_mixing(kind, probability, x_l, generator))
        elif x_l is not None:
            mixed_l = self._mix_labeled(x_l, generator)
        x_v = []
        for view, x in zip(self.config.views, views, strict=True):
            if view == "feature_noise" or kind == "none":
                x_v.append(x)
                continue
            partner = x_l if x_l is not None and both_ways else x
            boxes = draw_mixing(kind, probability, x, generator)
            source = repeat_patches(partner, len(x.image), shift=int(partner is x))
            x_v.append(paste_patches(x, source, boxes))
        return mixed_l, x_v

    def _mixes_both_ways(self, x_l: Patches | None) -> bool:
        """Return whether labels are pasted into views, and pseudo-labels into labeled patches."""
        return self.config.noise.mixing == "copy_paste" and x_l is not None

    def _compare(self, name: str, x: Patches, f: Sequence[Tensor], m: Tensor) -> Tensor:
        """Return the loss, its voxels weighted by m, over the heads: 1, 1/2, 1/4, ... (sum 1)."""
        loss = self.losses[name]
        temperature = self.config.target.student_temperature if name == "pseudo_label" else 1.0
        shares = [0.5**level for level in range(len(f))]
        total = torch.zeros((), device=x.image.device)
        for share, logits in zip(shares, f, strict=True):
            target, weight, valid = shrink(x.target, m, x.valid, logits.shape[2:])
            logits = logits / temperature if temperature != 1.0 else logits
            total = total + share / sum(shares) * loss(logits, target, weight, valid)
        return total


def load_objective(name: str) -> type[Objective]:
    """Return the class that ``objective: package.module:Class`` names.

    Raises:
        InputError: There is no such module or class, or it is not an ``Objective``.
    """
    module, _, kind = name.partition(":")
    try:
        objective = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"objective={name}: {error}; expected package.module:Class of an installed package"
        ) from error
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise InputError(f"objective={name}: {kind} is no subclass of medssl.objective:Objective")
    return objective


def find_loss(name: str) -> Loss:
    """Return the loss that ``losses.*.name`` names.

    Raises:
        ValueError: There is none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is unknown; there are {', '.join(LOSSES)}")
    return LOSSES[name]


def list_options(name: str) -> dict[str, Any]:
    """Return what ``losses.pseudo_label.options`` may hold for a loss, with its defaults."""
    named = inspect.signature(find_loss(name)).parameters.values()
    return {p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY and p.default != p.empty}


def build_loss(section: PseudoLabelSection, transition: Tensor | None = None) -> Loss:
    """Return the pseudo-label loss with its options.

    Args:
        section: Its settings.
        transition: Matrix (C, C) of a teacher, where it was measured.
    """
    rows = section.transition
    if transition is None and rows is not None and rows != "held_out":
        transition = torch.tensor(rows)
    matrix = {} if transition is None else {"transition": transition}
    return functools.partial(find_loss(section.name), **section.options, **matrix)


def average(student: nn.Module) -> AveragedModel:
    """Return an average of a network, buffers included, that `follow` moves; without gradient."""
    return AveragedModel(student, use_buffers=True).requires_grad_(False)


@torch.no_grad()
def follow(
    teacher: AveragedModel, student: nn.Module, decay: float, skipped: Tensor | None = None
) -> None:
    """Move an average towards a network, buffers included; the first time it copies.

    What `AveragedModel.update_parameters` does, but that waits for the device to know its count.

    Args:
        teacher: Of `average`.
        student: The network.
        decay: Of the exponential average; a plain mean until it has as many steps.
        skipped: Bool, of no axes, on the device: the average stays as it is.
    """
    count = teacher.n_averaged
    moves = torch.ones_like(count) if skipped is None else (~skipped).to(count)
    share = (1.0 / (count + 1)).clamp(min=1.0 - decay) * moves
    pairs = list(zip(_list_state(teacher.module), _list_state(student), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    shares = {dtype: share.to(dtype) for dtype in {mean.dtype for mean, _ in floating}}
    means = [mean for mean, _ in floating]
    torch._foreach_lerp_(means, [now for _, now in floating], [shares[m.dtype] for m in means])
    for mean, now in pairs:
        if not mean.is_floating_point():  # batch norm counts its batches
            mean.copy_(torch.where(moves > 0, now, mean))
    count.add_(moves)


def _list_state(network: nn.Module) -> list[Tensor]:
    """Return parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


@torch.no_grad()
def predict_still(network: nn.Module, image: Tensor) -> Tensor:
    """Return the probs of a network without its noise; its mode stays as it is."""
    with silence_noise(network):
        return predict_probs(network, image)


def predict_probs(network: nn.Module, image: Tensor) -> Tensor:
    """Return the probs (B, num_classes, I, J, K) of a network in its mode."""

    def predict(x: Tensor) -> list[Tensor]:
        logits = read_heads(network(arrange(x)), x)[0]
        return [torch.softmax(lay_out(logits), dim=1)]

    return share_batch(predict, network, image)[0]


def lay_out(logits: Tensor) -> Tensor:
    """Return logits in float32 and, in 3D, in the memory layout of the targets.

    With channels last a step of the default method takes a ninth more there; less in 2D.
    """
    return logits.float().contiguous() if logits.ndim == 5 else logits.float()


def add_term(terms: dict[str, Tensor], name: str, term: Tensor) -> None:
    """Add a view's term to the sum over views."""
    terms[name] = terms[name] + term if name in terms else term


def choose_voxels(voxels: str, x: Patches) -> Tensor:
    """Return m_* (B, 1, I, J, K): how much each voxel counts.

    Args:
        voxels: "labeled", or of the unlabeled cases "all", "accepted" or "refused" ones.
        x: The patches, mixed.
    """
    if voxels == "labeled":
        return (x.valid & ~x.is_unlabeled).float()
    if voxels == "accepted":
        return x.accepted
    everywhere = x.is_unlabeled.float()
    return everywhere - x.accepted if voxels == "refused" else everywhere


def draw_mirrorings(
    count: int, flips: Sequence[int], generator: torch.Generator | None
) -> list[list[int]]:
    """Return the axes of a batch (B, C, I, J, K) along which each of several passes is mirrored.

    The first pass sees it as it is, the others under mirrorings that differ from the one before.
    """
    turns: list[list[int]] = [[]]
    while len(turns) < count:
        code = 0
        if flips and generator is not None:
            code = int(torch.randint(1, 2 ** len(flips), (), generator=generator))
        drawn = {axis for place, axis in enumerate(flips) if code >> place & 1}
        turns.append([axis + 2 for axis in flips if (axis in drawn) != (axis + 2 in turns[-1])])
    return turns


def ramp(section: Ramp, progress: float) -> float:
    """Return a_*(t) without its weight."""
    return ramp_value(section.name, progress, section.start, section.end)


def draw_mixing(
    kind: str, probability: float, patches: Patches, generator: torch.Generator
) -> Tensor:
    """Draw which part (B, 1, I, J, K) of each patch is replaced; none without mixing."""
    size = tuple(patches.image.shape[2:])
    draw_parts = draw_boxes if kind == "cutmix" else draw_cubes
    share = 0.0 if kind == "none" else probability
    return draw_parts(len(patches.image), size, generator, share, device=patches.image.device)


def paste_patches(into: Patches, source: Patches, boxes: Tensor) -> Patches:
    """Paste ``source`` inside the boxes (B, 1, I, J, K): image, target and all else alike."""
    pairs = {f.name: (getattr(into, f.name), getattr(source, f.name)) for f in fields(into)}
    return Patches(**{name: paste(*pair, boxes) for name, pair in pairs.items()})


def repeat_patches(patches: Patches, count: int, shift: int = 0) -> Patches:
    """Return ``count`` patches, repeated or cut as needed, shifted along the batch."""
    index = (torch.arange(count, device=patches.image.device) + shift) % len(patches.image)
    return Patches(**{f.name: getattr(patches, f.name)[index] for f in fields(patches)})


def encode_classes(classes: Tensor, num_classes: int) -> Tensor:
    """Return classes (B, 1, I, J, K) as one-hot probs (B, num_classes, I, J, K), float32."""
    shape = (len(classes), num_classes, *classes.shape[2:])
    return torch.zeros(shape, device=classes.device).scatter_(1, classes, 1.0)


def shrink(
    target: Tensor, weight: Tensor, valid: Tensor, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return target, weight and valid at a lower resolution, averaged over the valid voxels.

    On the border of a pasted box a target is the mean of what lies on both sides.
    """
    if tuple(size) == tuple(target.shape[2:]):
        return target, weight, valid
    kernel = [full // low for full, low in zip(target.shape[2:], size, strict=True)]
    pool = F.avg_pool3d if len(kernel) == 3 else F.avg_pool2d
    counted = valid.float()
    share = pool(counted, kernel)
    target = pool(target * counted, kernel) / share.clamp(min=1e-6)
    weight = pool(weight * counted, kernel) / share.clamp(min=1e-6)
    return target, weight, share > 0.5
