import copy
import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from medssl import objective as objective_module
from medssl.config import IGNORE, InputError
from medssl.losses.supervised import ce as cross_entropy
from medssl.networks.build import NetworkSpec, build_network
from medssl.networks.noise import sample_dropout
from medssl.objective import (
    Patches,
    average,
    draw_mirrorings,
    follow,
    load_objective,
    paste_patches,
    repeat_patches,
    shrink,
)
from medssl.pseudo.uncertainty import entropy_of
from medssl.settings import list_methods, load_config

FULL = Path(__file__).with_name("full.yaml")

NAMES = ("background", "organ", "lesion")
SIDES = ("kernels", "strides")
METHODS = sorted(list_methods())

FEW = ("default", "bcp", "cross_pseudo", "unimatch")
"""Presets that together use every part of the equation: tried in 2D too."""

ENCODED = ("default", "unimatch")
"""Those of them that are tried with an encoder too: samples of it, and noise on its features."""

ALIKE = {
    "curriculum", "cutmix", "ensemble", "entropy", "fixmatch", "labels_only", "mean_teacher",
    "noisy_student", "pseudo_label", "st_plus_plus",
}  # fmt: skip
"""Presets that differ from the others by numbers, a threshold or terms left out."""


def pair(in_3d, in_2d=(), encoded=()):
    """Give a test presets with the kinds of networks that they are tried with."""
    pairs = [pytest.param(*method.values, "3D", marks=method.marks) for method in in_3d]
    pairs += [(method, "2D") for method in in_2d] + [(method, "2D encoder") for method in encoded]
    return pytest.mark.parametrize(("method", "spec"), pairs, indirect=["spec"])


DIFFERENT = [
    pytest.param(method, marks=[pytest.mark.slow, pytest.mark.nightly] * (method in ALIKE))
    for method in METHODS
]
"""Every preset, by day those that are not alike."""

different_presets = pytest.mark.parametrize("method", DIFFERENT)
different_presets_in_3d = pair(DIFFERENT)
different_presets_in_2d_too = pair(DIFFERENT, FEW)
every_preset_on_all_networks = pair(map(pytest.param, METHODS), FEW, ENCODED)


@pytest.fixture
def spec(request, tiny_spec):
    """A tiny network in 3D, the same in 2D, or one of segmentation-models-pytorch."""
    return make_spec(request.param, tiny_spec)


def make_spec(kind, tiny_spec):
    if kind == "3D":
        return tiny_spec
    if kind == "2D encoder":
        return NetworkSpec(
            name="unet", encoder="resnet18", in_channels=1, num_classes=3, dropout=0.1
        )
    flat = {key: tuple(size[:2] for size in getattr(tiny_spec, key)) for key in SIDES}
    return tiny_spec.model_copy(update=flat)


def configure(method=FULL, *overrides):
    return load_config(overrides=[f"method={method}", *overrides]).config


def configure_voxelwise(method):
    """Return the settings of a preset without what a network of single voxels does not have."""
    views = [view for view in configure(method).views if view != "feature_noise"]
    return configure(
        method, f"views={views}", "filter.uncertainty.source=none", "teacher.probs=clean"
    )


def make_batch(config, seed=0, num_labeled=2, num_unlabeled=3, spec=None):
    """Return labeled and unlabeled patches, with probs where a method's teacher is offline."""
    source = torch.Generator().manual_seed(seed)
    size = (8, 8, 8)
    if spec is not None and spec.encoder:
        size = (64, 64)
    elif spec is not None:
        size = (8,) * len(spec.strides[0])

    def draw(count, channels=1):
        return torch.randn(count, channels, *size, generator=source)

    label = torch.randint(0, 3, (num_labeled, 1, *size), generator=source).to(torch.uint8)
    labeled = {
        "image": draw(num_labeled) + label.float(),
        "label": label,
        "weight": torch.ones(num_labeled, 1, *size),
    }
    weak = draw(num_unlabeled)
    unlabeled = {
        "weak": weak,
        "strong": weak + 0.3 * draw(num_unlabeled),
        "strong_2": weak + 0.3 * draw(num_unlabeled),
        "weight": torch.ones(num_unlabeled, 1, *size),
    }
    if "previous_round" in config.teacher.source:
        unlabeled["probs"] = torch.softmax(8 * draw(num_unlabeled, 3), dim=1)
        unlabeled["uncertainty"] = 0.1 * draw(num_unlabeled).abs()
    return labeled, unlabeled


def find_last_layer(student):
    if hasattr(student, "smp"):
        return student.smp.segmentation_head[0]
    return student.dynunet.output_block.conv.conv


@functools.cache
def build_sure_network(spec, seed):
    """Return a network of a seed; an encoder takes longer to be drawn than to learn a step."""
    torch.manual_seed(seed)
    network = build_network(spec)
    with torch.no_grad():
        find_last_layer(network).weight.mul_(20)
    return network


def make_objective(config, spec, seed=0, student=None):
    """Return an objective whose student, and so whose online teacher, is sure of itself."""
    if student is None:
        student = copy.deepcopy(build_sure_network(spec, seed))
    torch.manual_seed(seed + 1)  # a second student is another one
    prior = torch.tensor([0.6, 0.3, 0.1])
    return load_objective(config.objective)(student, config, NAMES, prior).train()


def read_monitors(objective):
    """Return the monitors that have a value, as numbers."""
    values = {name: float(value) for name, value in objective.monitors.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def compute(objective, labeled, unlabeled, progress=0.5, seed=7):
    """Return the terms under a seed for dropout and mixing."""
    torch.manual_seed(seed)
    return objective(labeled, unlabeled, progress, torch.Generator().manual_seed(seed))


def find_gradient(objective, loss):
    """Return the gradient of a loss on the student, as one vector."""
    parameters = list(objective.student.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def take_steps(objective, batch, count, seed=0):
    """Train for some steps and return the losses."""
    optimizer = torch.optim.SGD(objective.student.parameters(), lr=0.05)
    losses = []
    for step in range(count):
        terms = compute(objective, *batch, progress=0.3 + 0.1 * step, seed=seed + step)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        objective.after_step()
        losses.append({name: term.item() for name, term in terms.items()})
    return losses


@every_preset_on_all_networks
def test_every_term_is_finite_from_the_first_to_the_last_step(method, spec):
    config = configure(method)
    objective = make_objective(config, spec)
    for progress in (0.0, 0.5, 1.0):
        terms = compute(objective, *make_batch(config, spec=spec), progress=progress)
        assert "supervised" in terms
        for term in terms.values():
            assert term.ndim == 0
            assert torch.isfinite(term)
            assert term >= 0


@different_presets_in_2d_too
def test_labeled_patches_alone_give_the_supervised_term_alone(method, spec):
    config = configure(method)
    terms = compute(make_objective(config, spec), make_batch(config, spec=spec)[0], None)
    assert set(terms) == {"supervised"}


@every_preset_on_all_networks
def test_every_unlabeled_term_moves_the_student(method, spec):
    config = configure(method)
    objective = make_objective(config, spec)
    terms = compute(objective, *make_batch(config, spec=spec))
    assert len(terms) > 1
    for name, term in terms.items():
        assert find_gradient(objective, term).abs().max() > 1e-8, name


@different_presets_in_2d_too
def test_unlabeled_images_move_the_student_also_without_mixing(method, spec):
    config = configure(method, "noise.mixing=none")
    labeled, unlabeled = make_batch(config, spec=spec)
    other = make_batch(config, seed=1, spec=spec)[1]
    gradients = []
    for part in (unlabeled, unlabeled, other):
        objective = make_objective(config, spec)
        terms = compute(objective, labeled, part)
        gradients.append(find_gradient(objective, sum(terms.values())))
    assert torch.equal(gradients[0], gradients[1])
    difference = (gradients[2] - gradients[0]).norm() / gradients[0].norm()
    assert difference > 1e-3


@every_preset_on_all_networks
def test_no_gradient_flows_into_the_teacher_nor_into_its_targets(method, spec):
    config = configure(method)
    objective = make_objective(config, spec)
    labeled, unlabeled = make_batch(config, spec=spec)
    targets = {"probs", "weak"} - ({"weak"} if "feature_noise" in config.views else set())
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    leaves = [value.requires_grad_() for key, value in unlabeled.items() if key in targets]
    leaves += list(objective.teacher.requires_grad_(True).parameters())
    sum(compute(objective, labeled, unlabeled).values()).backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


@different_presets_in_2d_too
def test_the_teacher_follows_the_student_after_a_step_and_not_before(method, spec):
    config = configure(method)
    objective = make_objective(config, spec)
    take_steps(objective, make_batch(config, spec=spec), 1)
    before = [p.clone() for p in objective.predictor.parameters()]
    student = [p.clone() for p in objective.student.parameters()]
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1.0)
    assert all(map(torch.equal, before, objective.predictor.parameters()))
    objective.after_step()
    decay = min(0.5, config.teacher.ema_decay)
    for old, own, new in zip(before, student, objective.predictor.parameters(), strict=True):
        assert torch.allclose(new, decay * old + (1 - decay) * (own + 1.0), atol=1e-5)


def test_a_fine_tune_does_not_mix_and_starts_the_average_anew(tiny_spec):
    config = configure(FULL, "noise.labeled_mixing_probability=1.0", "teacher.ema_decay=0.99")
    labeled, unlabeled = make_batch(config)
    objective = make_objective(config, tiny_spec)
    take_steps(objective, (labeled, unlabeled), 2)
    seen, predict = [], objective.student.forward_heads
    objective.student.forward_heads = lambda image: [seen.append(image), *predict(image)][1:]
    compute(objective, labeled, None)
    objective.fine_tune(first=True)
    compute(objective, labeled, None)
    mixed, plain = seen
    assert not torch.equal(mixed, labeled["image"])
    assert torch.equal(plain, labeled["image"])
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1.0)
    objective.after_step()
    pairs = zip(objective.student.parameters(), objective.predictor.parameters(), strict=True)
    assert all(torch.equal(own, mean) for own, mean in pairs)
    objective.fine_tune(first=False)
    assert objective.teacher.n_averaged == 1


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_buffers_of_the_teacher_are_averaged_too(decay):
    student = nn.Sequential(nn.BatchNorm3d(1))
    teacher = average(student)
    follow(teacher, student, decay)  # the first time it copies
    teacher.module[0].running_mean.fill_(4.0)
    student[0].running_mean.fill_(8.0)
    student[0].num_batches_tracked.fill_(7)
    follow(teacher, student, decay, skipped=torch.tensor(True))
    assert teacher.module[0].running_mean.item() == 4.0
    assert teacher.module[0].num_batches_tracked.item() == 0
    follow(teacher, student, decay, skipped=torch.tensor(False))
    assert teacher.n_averaged == 2
    assert teacher.module[0].running_mean.item() == pytest.approx(8.0 - 4.0 * decay)
    assert teacher.module[0].num_batches_tracked.item() == 7


def test_each_of_two_students_learns_what_the_other_one_says(tiny_spec):
    config = configure("cross_pseudo")
    objective = make_objective(config, tiny_spec)
    labeled, unlabeled = make_batch(config)
    asked = []

    def keep(module, *arguments):
        asked.append((objective.student, arguments[1]["probs"]))
        return {"supervised": torch.zeros(())}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective_module.Objective, "forward", keep)
        first, second = objective.student, objective.second
        compute(objective, labeled, unlabeled)
    says = {id(n): objective_module.predict_still(n, unlabeled["weak"]) for n in (first, second)}
    taught = {id(learner): probs for learner, probs in asked}
    assert torch.equal(taught[id(first)], says[id(second)])
    assert torch.equal(taught[id(second)], says[id(first)])
    assert not torch.equal(says[id(first)], says[id(second)])


def make_cross(spec, *more):
    config = configure("cross_pseudo", "filter.threshold={name: free}", *more)
    return make_objective(config, spec), make_batch(config)


def test_each_of_two_students_has_statistics_of_its_own_targets(tiny_spec):
    objective, (labeled, unlabeled) = make_cross(tiny_spec)
    compute(objective, labeled, unlabeled)
    second, first = (
        objective_module.predict_still(network, unlabeled["weak"]).argmax(1).flatten()
        for network in (objective.student, objective.second)
    )
    counts = [part.bincount(minlength=3).tolist() for part in (first, second)]
    assert counts[0] != counts[1]
    assert objective.thresholds.predicted.tolist() == counts[0]
    assert objective.second_thresholds.predicted.tolist() == counts[1]
    prior = ("target.assignment=transport", "target.transport.prior=labeled")
    objective, batch = make_cross(tiny_spec, *prior)
    compute(objective, *batch)
    assert not torch.equal(objective.transport.log_v, objective.second_transport.log_v)


def test_a_checkpoint_of_two_students_with_one_filter_goes_on(tiny_spec):
    objective, batch = make_cross(tiny_spec)
    compute(objective, *batch)
    before = {k: v for k, v in objective.state_dict().items() if "second_thresholds" not in k}
    other, _ = make_cross(tiny_spec)
    other.load_state_dict(before)
    assert torch.equal(other.second_thresholds.predicted, objective.thresholds.predicted)


def test_the_decay_of_the_teacher_rises_to_what_is_set(tiny_spec):
    objective = make_objective(configure(FULL, "teacher.ema_decay=0.75"), tiny_spec)
    (parameter, *_) = objective.student.parameters()
    (average, *_) = objective.predictor.parameters()
    value = 0.0
    for count in range(8):
        with torch.no_grad():
            parameter.fill_(float(count))
        objective.after_step()
        decay = min(1 - 1 / (count + 1), 0.75)
        value = decay * value + (1 - decay) * count
        assert average.detach().flatten()[0].item() == pytest.approx(value, abs=1e-5)


class VoxelNetwork(nn.Module):
    """Logits of each voxel from that voxel alone, so that gradients stay where they belong."""

    def __init__(self, num_heads=1):
        super().__init__()
        self.layer = nn.Conv3d(1, 3, 1)
        self.num_heads = num_heads

    def forward(self, image):
        return 4 * self.layer(image)

    def forward_heads(self, image):
        pools = (nn.AvgPool3d(2**level) for level in range(1, self.num_heads))
        return [self(image), *(pool(self(image)) for pool in pools)]


class Heads(nn.Module):
    """Any network of somebody else: logits, or what ``give`` makes of them."""

    def __init__(self, give=lambda logits: logits):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Dropout3d(0.2))
        self.layers.append(nn.Conv3d(4, 3, 1))
        self.give = give

    def forward(self, image):
        return self.give(self.layers(image))


def learn_elsewhere(method, give=lambda logits: logits, cast=lambda batch: batch):
    """Return terms and gradient of a network of somebody else, its batch cast to another kind."""
    views = [view for view in configure(method).views if view != "feature_noise"]
    config = configure(method, f"views={views}")
    torch.manual_seed(0)
    objective = make_objective(config, None, student=Heads(give))
    terms = compute(objective, *map(cast, make_batch(config)))
    return terms, find_gradient(objective, torch.stack(list(terms.values())).sum())


@different_presets
def test_any_module_is_a_student_with_batches_of_monai_too(method):
    terms, gradient = learn_elsewhere(method)
    assert all(term.isfinite() for term in terms.values())
    assert gradient.any()
    loaded, same = learn_elsewhere(method, cast=lambda b: {k: MetaTensor(v) for k, v in b.items()})
    for name, term in terms.items():
        assert torch.equal(torch.as_tensor(loaded[name]), term)
    assert torch.equal(torch.as_tensor(same), gradient)


def test_heads_of_any_module_are_a_list_of_logits(tiny_spec):
    def add_a_head(logits):
        return logits, nn.functional.avg_pool3d(logits, 2)

    one, two = (learn_elsewhere("fixmatch", give)[0] for give in (lambda x: [x], add_a_head))
    assert torch.equal(one["supervised"], learn_elsewhere("fixmatch")[0]["supervised"])
    assert not torch.equal(one["supervised"], two["supervised"])


@pytest.mark.parametrize(
    "give",
    [
        lambda logits: {"out": logits},
        lambda logits: [],
        lambda logits: torch.stack([logits, logits], 1),  # as MONAI's DynUNet in training
        lambda logits: logits[..., :4],
    ],
)
def test_what_is_no_logits_of_the_image_is_refused_with_a_repair(give):
    with pytest.raises(InputError, match=r"the network gave .* let its forward return logits"):
        learn_elsewhere("default", give)


def test_feature_noise_wants_an_encoder_that_is_known():
    objective = make_objective(configure("unimatch"), None, student=Heads())
    with pytest.raises(InputError, match=r"leave out feature_noise"):
        compute(objective, *make_batch(objective.config))


@different_presets
def test_ignored_voxels_give_no_gradient(method):
    config = configure_voxelwise(method)
    objective = make_objective(config, None, student=VoxelNetwork())
    labeled, unlabeled = make_batch(config)
    labeled["label"][:, :, :2] = IGNORE
    labeled["weight"][:, :, :, :2] = 0
    unlabeled["weight"][:, :, 5:] = 0
    labeled["image"].requires_grad_()
    unlabeled["strong"].requires_grad_()
    sum(compute(objective, labeled, unlabeled).values()).backward()
    counted = (labeled["weight"] > 0) & (labeled["label"] != IGNORE)
    assert not labeled["image"].grad[~counted].any()
    assert not unlabeled["strong"].grad[unlabeled["weight"] == 0].any()
    assert labeled["image"].grad[counted].any()
    assert unlabeled["strong"].grad[unlabeled["weight"] > 0].any()


@different_presets
@pytest.mark.parametrize("num_heads", [1, 3])
def test_what_stands_in_ignored_voxels_changes_no_loss(method, num_heads):
    config = configure_voxelwise(method)
    student = VoxelNetwork(num_heads)
    results = []
    for filler in (0, 2):
        labeled, unlabeled = make_batch(config)
        labeled["label"][:, :, :4] = IGNORE
        labeled["weight"][:, :, :, :4] = 0
        labeled["label"][:, :, 4:, :4] = filler
        unlabeled["weight"][:, :, :, 4:] = 0
        for key in {"probs", "uncertainty"} & set(unlabeled):
            unlabeled[key][:, :, :, 4:] = float(filler)
        objective = make_objective(config, None, student=student)
        terms = compute(objective, labeled, unlabeled)
        results.append(({k: v.item() for k, v in terms.items()}, read_monitors(objective)))
    assert results[0] == results[1]


def test_a_student_may_have_another_loss_on_labels_than_round_0(tiny_spec):
    off = ["noise.mixing=none", "noise.labeled_mixing=none", "losses.pseudo_label.weight=0"]
    terms = {}
    for student in ("auto", "ce"):
        config = configure("fixmatch", *off, f"losses.supervised.student={student}")
        labeled, unlabeled = make_batch(config)
        terms[student, "beside"] = compute(make_objective(config, tiny_spec), labeled, unlabeled)
        terms[student, "alone"] = compute(make_objective(config, tiny_spec), labeled, None)
    found = {key: value["supervised"].item() for key, value in terms.items()}
    assert found["auto", "alone"] == found["ce", "alone"]
    assert found["ce", "beside"] < found["auto", "beside"]  # without the part of Dice
    config = configure("fixmatch", *off, "losses.supervised.name=ce")
    only = compute(make_objective(config, tiny_spec), *make_batch(config))["supervised"].item()
    assert only == found["ce", "beside"]


def test_label_255_and_weight_zero_mean_the_same(tiny_spec):
    config = configure()
    labeled, unlabeled = make_batch(config)
    by_label = {**labeled, "label": labeled["label"].clone()}
    by_weight = {**labeled, "weight": labeled["weight"].clone()}
    by_label["label"][:, :, :3] = IGNORE
    by_weight["weight"][:, :, :3] = 0
    losses = [
        compute(make_objective(config, tiny_spec), part, unlabeled)
        for part in (by_label, by_weight)
    ]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@different_presets_in_2d_too
def test_a_batch_without_a_single_valid_voxel_has_a_loss_of_zero(method, spec):
    config = configure(method)
    labeled, unlabeled = make_batch(config, spec=spec)
    labeled["weight"].zero_()
    unlabeled["weight"].zero_()
    objective = make_objective(config, spec)
    total = sum(compute(objective, labeled, unlabeled).values())
    total.backward()
    assert total.item() == 0
    assert not any(p.grad.any() for p in objective.student.parameters() if p.grad is not None)


@different_presets_in_3d
def test_all_state_is_in_the_state_dict(method, spec):
    config = configure(method)
    batch = make_batch(config, spec=spec)
    first = make_objective(config, spec)
    take_steps(first, batch, 1)
    second = make_objective(config, spec, seed=99)
    second.load_state_dict(first.state_dict())
    assert take_steps(first, batch, 2, seed=5) == take_steps(second, batch, 2, seed=5)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert read_monitors(first) == read_monitors(second)


@different_presets_in_3d
def test_the_same_seed_gives_the_same_losses_and_another_one_does_not(method, spec):
    config = configure(method)
    batch = make_batch(config, spec=spec)
    runs = [take_steps(make_objective(config, spec), batch, 2, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@different_presets_in_2d_too
def test_monitors_stay_on_the_device_and_are_finite_where_there_are_voxels(method, spec):
    config = configure(method)
    objective = make_objective(config, spec)
    labeled, unlabeled = make_batch(config, spec=spec)
    compute(objective, labeled, unlabeled)
    assert {"coverage", "threshold/organ"} <= set(objective.monitors)
    assert all(value.shape == () for value in objective.monitors.values())
    assert not any(value.requires_grad for value in objective.monitors.values())
    assert all(math.isfinite(value) for value in read_monitors(objective).values())
    assert {"coverage", "threshold/organ"} <= set(read_monitors(objective))
    compute(objective, labeled, None)
    assert objective.monitors == {}


@pair(map(pytest.param, FEW), FEW)  # without unlabeled patches all presets are alike
def test_a_step_lowers_the_loss_on_its_own_batch(method, spec):
    config = configure(method, "network.dropout=0.1")
    still = spec.model_copy(update={"dropout": 0.0})
    objective = make_objective(config, still)
    labeled, _ = make_batch(config, spec=spec)
    losses = [compute(objective, labeled, None)["supervised"].item()]
    optimizer = torch.optim.SGD(objective.student.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        compute(objective, labeled, None)["supervised"].backward()
        optimizer.step()
    losses.append(compute(objective, labeled, None)["supervised"].item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("weight", "term"),
    [
        ("losses.pseudo_label.weight=0", "pseudo_label"),
        ("losses.entropy.weight=0", "entropy"),
        ("losses.consistency.weight=0", "consistency"),
    ],
)
def test_a_term_without_weight_is_left_out(tiny_spec, weight, term):
    unmixed = (FULL, "noise.mixing=none")
    full, less = configure(*unmixed), configure(*unmixed, weight)
    batch = make_batch(full)
    everything = compute(make_objective(full, tiny_spec), *batch)
    rest = compute(make_objective(less, tiny_spec), *batch)
    assert set(everything) - set(rest) == {term}


def test_unlabeled_terms_rise_with_their_ramp_and_are_scaled_by_their_weight(tiny_spec):
    overrides = [
        f"losses.{name}.ramp={{name: linear, start: 0.2, end: 0.6}}"
        for name in ("pseudo_label", "entropy", "consistency")
    ]
    overrides += ["noise.mixing=none", "filter.threshold.name=none"]
    overrides += ["filter.uncertainty.start=null"]
    config = configure(FULL, *overrides)
    double = configure(FULL, *overrides, "losses.pseudo_label.weight=2.0")
    batch = make_batch(config)
    terms = {t: compute(make_objective(config, tiny_spec), *batch, t) for t in (0.1, 0.4, 0.9)}
    for name in ("pseudo_label", "entropy", "consistency"):
        assert terms[0.1][name] == 0
        assert terms[0.4][name].item() == pytest.approx(terms[0.9][name].item() / 2, rel=1e-5)
    twice = compute(make_objective(double, tiny_spec), *batch, 0.9)
    assert twice["pseudo_label"].item() == pytest.approx(2 * terms[0.9]["pseudo_label"].item())


def test_the_supervised_term_is_the_loss_of_the_heads_weighted_1_and_a_half(tiny_spec):
    config = configure(FULL, "noise.labeled_mixing=none", "losses.supervised.name=ce")
    labeled, _ = make_batch(config)
    objective = make_objective(config, None, student=VoxelNetwork(num_heads=2))
    fine, coarse = objective.student.forward_heads(labeled["image"])
    target = nn.functional.one_hot(labeled["label"][:, 0].long(), 3).movedim(-1, 1).float()
    expected = 2 / 3 * cross_entropy(fine, target) + 1 / 3 * cross_entropy(
        coarse, nn.functional.avg_pool3d(target, 2)
    )
    found = compute(objective, labeled, None)["supervised"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_voxels_that_the_filter_refuses_do_not_teach():
    config = configure(
        "classic",
        "noise.mixing=none",
        "target.assignment=argmax",
        "filter.threshold={name: fixed, start: 0.9}",
        "filter.uncertainty.start=0.75",
        "losses.consistency.weight=0",
        "losses.pseudo_label.name=ce",
    )
    objective = make_objective(config, None, student=VoxelNetwork())
    labeled, unlabeled = make_batch(config)
    unlabeled["uncertainty"][:, :, :2] = 10.0
    unlabeled["strong"].requires_grad_()
    sum(compute(objective, labeled, unlabeled).values()).backward()
    sure = unlabeled["probs"].amax(1, keepdim=True) >= 0.9
    sure[:, :, :2] = False
    moved = unlabeled["strong"].grad != 0
    assert not (moved & ~sure).any()
    assert (moved & sure).sum() > 0.9 * sure.sum()


@pytest.mark.parametrize("term", ["entropy", "consistency"])
@pytest.mark.parametrize("voxels", ["accepted", "all", "refused"])
def test_entropy_and_consistency_act_where_they_are_asked_to(term, voxels):
    others = {"pseudo_label", "entropy", "consistency"} - {term}
    config = configure(
        FULL,
        "noise.mixing=none",
        "target.assignment=argmax",
        "filter.threshold={name: fixed, start: 0.9}",
        "filter.uncertainty.source=none",
        f"losses.{term}={{weight: 1.0, voxels: {voxels}}}",
        *(f"losses.{other}.weight=0" for other in others),
    )
    objective = make_objective(config, None, student=VoxelNetwork())
    labeled, unlabeled = make_batch(config)
    unlabeled["strong"].requires_grad_()
    compute(objective, labeled, unlabeled)[term].backward()
    sure = unlabeled["probs"].amax(1, keepdim=True) >= 0.9
    moved = unlabeled["strong"].grad != 0
    assert (moved[sure].float().mean() > 0.9) == (voxels != "refused")
    assert moved[sure].any() == (voxels != "refused")
    assert moved[~sure].any() == (voxels != "accepted")


def test_cutmix_pastes_the_next_patch_with_what_is_said_of_it(monkeypatch):
    def paste_half(kind, probability, patches, generator):
        boxes = torch.zeros_like(patches.valid)
        boxes[:, :, :3] = kind == "cutmix"
        return boxes

    monkeypatch.setattr(objective_module, "draw_mixing", paste_half)
    config = configure("cutmix", "noise.labeled_mixing=none")
    objective = make_objective(config, None, student=VoxelNetwork())
    view, known = make_patches(torch.tensor([1.0, 2.0])[:, None, None, None, None]), make_patches(5)
    x_l, (mixed,) = objective._mix(known, [view], torch.Generator())
    assert torch.equal(x_l.image, known.image)
    for part in (mixed.image, mixed.target, mixed.g_w, mixed.accepted):
        assert (part[0, :, :3] == 2).all()
        assert (part[0, :, 3:] == 1).all()
        assert (part[1, :, :3] == 1).all()


@pytest.mark.parametrize(("teacher", "student"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_both_temperatures_divide_logits(teacher, student):
    config = configure(
        "noisy_student",
        f"target={{temperature: {teacher}, student_temperature: {student}}}",
    )
    labeled, unlabeled = make_batch(config)
    network = VoxelNetwork()
    found = compute(make_objective(config, None, student=network), labeled, unlabeled)
    target = torch.softmax(unlabeled["probs"].log() / teacher, dim=1)
    logits = network.forward_heads(unlabeled["strong"])[0] / student
    expected = cross_entropy(logits, target)
    assert found["pseudo_label"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_uncertainty_of_an_online_teacher_is_that_of_mc_dropout_under_a_rising_limit(tiny_spec):
    config = configure("uamt", "noise.mixing=none", "filter.uncertainty.start=0.0")
    objective = make_objective(config, tiny_spec)
    _, unlabeled = make_batch(config)
    uncertainty = objective._measure_uncertainty(unlabeled, None)
    assert uncertainty.shape == unlabeled["weight"].shape
    assert 0 <= uncertainty.min() < uncertainty.max() <= math.log(3) + 1e-6
    q, passes = objective._teach(unlabeled["weak"], torch.Generator())
    assert passes is None
    valid = torch.ones_like(uncertainty, dtype=torch.bool)
    for progress in (0.0, 0.5, 1.0):
        limit = math.log(3) * math.exp(-5 * (1 - progress) ** 2)
        accepted = objective._filter(q, uncertainty, valid, progress)
        assert torch.equal(accepted > 0, uncertainty < limit)


@pytest.mark.parametrize(("start", "count"), [("null", 0), ("0.75", 1)])
def test_no_pass_is_sampled_where_no_limit_of_uncertainty_applies(tiny_spec, start, count):
    config = configure("uamt", f"filter.uncertainty.start={start}", "filter.threshold.name=fixed")
    objective, sampled = make_objective(config, tiny_spec), []
    real = objective._sample
    objective._sample = lambda *given: sampled.append(1) or real(*given)
    compute(objective, *make_batch(config))
    assert len(sampled) == count


def test_the_mean_is_over_all_valid_voxels_and_not_over_the_accepted_ones():
    settings = ["noise.mixing=none", "losses.pseudo_label.name=ce", "filter.threshold.name=none"]
    config = configure(FULL, *settings)
    labeled, unlabeled = make_batch(config)
    student = VoxelNetwork()
    whole = compute(make_objective(config, None, student=student), labeled, unlabeled)
    parts = []
    for half in (slice(0, 4), slice(4, 8)):
        doubtful = unlabeled["uncertainty"].clone()
        doubtful[:, :, half] = 10.0
        part = {**unlabeled, "uncertainty": doubtful}
        terms = compute(make_objective(config, None, student=student), labeled, part)
        parts.append(terms["pseudo_label"].item())
    assert sum(parts) == pytest.approx(whole["pseudo_label"].item(), rel=1e-5)


def test_a_method_without_any_teacher_is_an_error(tiny_spec):
    config = configure(FULL, "teacher.source=[previous_round]", "losses.consistency.weight=0")
    labeled, unlabeled = make_batch(config)
    del unlabeled["probs"]
    with pytest.raises(ValueError, match="no teacher"):
        compute(make_objective(config, tiny_spec), labeled, unlabeled)


def test_an_online_teacher_needs_no_pseudo_labels_on_disk(tiny_spec):
    online = ["teacher.source=[ema]", "target.assignment=argmax"]
    config = configure(FULL, *online, "filter.uncertainty.source=none")
    objective = make_objective(config, tiny_spec)
    labeled, unlabeled = make_batch(config)
    assert "probs" not in unlabeled
    terms = compute(objective, labeled, unlabeled)
    assert find_gradient(objective, terms["pseudo_label"]).any()


def make_patches(value, count=2):
    ones = torch.ones(count, 1, 4, 4, 4)
    probs = ones.expand(-1, 3, -1, -1, -1) * value
    return Patches(ones * value, probs, ones > 0, ones > 0, probs, ones * value)


def test_mixing_moves_image_targets_trust_and_valid_alike():
    cubes = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    cubes[0, :, :2] = True
    source = make_patches(2.0)
    source.valid[0, :, 0] = False
    mixed = paste_patches(make_patches(1.0), source, cubes)
    for part in (mixed.image, mixed.target, mixed.g_w, mixed.accepted):
        assert torch.equal(part, 1.0 + cubes.expand_as(part).float())
    assert not mixed.valid[0, :, 0].any()
    assert mixed.valid[0, :, 1:].all()


@pytest.mark.parametrize("progress", [0.1, 0.4, 1.0])  # a_pl(t) = 0, 0.35 and 0.7
def test_a_pasted_voxel_keeps_the_loss_and_the_weight_of_its_case(monkeypatch, progress):
    def paste_half(kind, probability, patches, generator):
        boxes = torch.zeros_like(patches.valid)
        boxes[:, :, :3] = kind != "none"
        return boxes

    monkeypatch.setattr(objective_module, "draw_mixing", paste_half)
    settings = (
        FULL, "views=[strong]", "filter.threshold.name=none", "losses.supervised.student=ce",
        "losses.pseudo_label={name: mae, weight: 0.7, ramp: {name: linear, start: 0.2, end: 0.6}}",
        "noise.labeled_mixing=none",
    )  # fmt: skip
    student = VoxelNetwork()  # looks at each voxel alone: what lies beside it does not count
    terms = []
    for mixing in ("none", "copy_paste"):
        config = configure(*settings, f"noise.mixing={mixing}")
        batch = make_batch(config, num_labeled=2, num_unlabeled=2)
        terms.append(compute(make_objective(config, None, student=student), *batch, progress))
    apart, mixed = terms
    assert (apart["pseudo_label"] > 0) == (progress > 0.2)
    for name in ("supervised", "pseudo_label"):
        assert mixed[name].item() == pytest.approx(apart[name].item(), rel=1e-5)


def test_partners_for_mixing_are_the_next_in_the_batch_and_repeat_as_needed():
    patches = make_patches(torch.tensor([1.0, 2.0, 3.0])[:, None, None, None, None], count=3)
    assert repeat_patches(patches, 3, shift=1).image[:, 0, 0, 0, 0].tolist() == [2, 3, 1]
    fitted = repeat_patches(patches, 5)
    assert fitted.image[:, 0, 0, 0, 0].tolist() == [1, 2, 3, 1, 2]
    assert fitted.accepted[:, 0, 0, 0, 0].tolist() == [1, 2, 3, 1, 2]
    assert len(repeat_patches(patches, 2).valid) == 2


def test_lower_resolutions_average_over_valid_voxels_only():
    patches = make_patches(1.0, count=1)
    patches.target[:, :, :1] = 100.0
    patches.accepted[:, :, :1] = 50.0
    patches.valid[:, :, :1] = False
    target, weight, valid = shrink(patches.target, patches.accepted, patches.valid, (2, 2, 2))
    assert torch.allclose(target, torch.ones(()))
    assert torch.allclose(weight, torch.ones(()))
    assert valid[:, :, 1].all()


def test_potentials_of_a_pool_shift_the_classes_and_leave_the_teacher_unsharpened():
    config = configure(FULL, "target.transport.epsilon=0.5", "noise.mixing=none")
    prior, potentials = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([2.0, 0.0, -1.0])
    kind = load_objective(config.objective)
    objective = kind(VoxelNetwork(), config, NAMES, prior, potentials).train()
    probs = torch.tensor([0.30, 0.45, 0.25]).reshape(1, 3, 1, 1, 1)
    valid = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)
    weights = torch.tensor([0.30 * math.e, 0.45, 0.25 * math.exp(-0.5)])  # p v^epsilon
    found = objective._assign(probs, valid)
    assert torch.allclose(found.flatten(), weights / weights.sum(), atol=1e-6)
    assert found.argmax(1).item() == 0
    assert torch.equal(objective.transport.log_v, potentials)  # fitted on the pool, not moved
    plan = weights**2 / (weights**2).sum()  # p^(1/epsilon) v
    assert torch.allclose(objective.read_target(found).flatten(), plan, atol=1e-5)


def test_without_offline_labels_the_potentials_follow_the_batches():
    config = configure(FULL, "target.transport={prior: labeled}", "teacher.source=[ema]")
    objective = make_objective(config, None, student=VoxelNetwork())
    _, unlabeled = make_batch(config)
    before = objective.transport.log_v.clone()
    probs, _ = objective._teach(unlabeled["weak"], torch.Generator())
    objective._assign(probs, unlabeled["weight"] > 0)
    assert not torch.equal(objective.transport.log_v, before)


def sample_teacher(spec, *overrides, flips=(), seed=0):
    """Return an objective with a sampled EMA teacher, a view, and what its passes say of it."""
    config = configure("default", "network.dropout=0.5", *overrides)
    torch.manual_seed(seed)
    objective = load_objective(config.objective)(build_network(spec), config, NAMES, flips=flips)
    weak = make_batch(config)[1]["weak"]
    torch.manual_seed(1)
    probs, doubt = objective._teach(weak, torch.Generator().manual_seed(2))
    return objective.train(), weak, probs, doubt


@pytest.fixture
def dropout_spec(tiny_spec):
    return tiny_spec.model_copy(update={"dropout": 0.5})


def test_the_teacher_has_no_noise_of_its_own_while_the_student_trains(dropout_spec):
    objective, weak, *_ = sample_teacher(dropout_spec)
    assert objective.student.training
    assert not any(module.training for module in objective.teacher.modules())
    assert torch.equal(objective.teacher(weak), objective.teacher(weak))


def test_a_sampled_teacher_says_the_mean_of_its_passes(dropout_spec):
    objective, weak, probs, doubt = sample_teacher(
        dropout_spec, "filter.uncertainty.online_passes=3"
    )
    torch.manual_seed(1)
    with sample_dropout(objective.teacher):
        passes = torch.softmax(objective.teacher(torch.cat([weak] * 3)), dim=1).chunk(3)
    mean = torch.stack(passes).mean(0)
    assert torch.allclose(probs, mean, atol=1e-5)
    assert not torch.allclose(passes[0], mean, atol=1e-3)
    entropy = -(mean * mean.clamp(min=1e-12).log()).sum(1, keepdim=True)
    assert torch.allclose(doubt, entropy, atol=1e-5)
    assert not probs.requires_grad


def test_a_pass_under_a_mirroring_is_brought_back(dropout_spec):
    """A network of single voxels with dropout 0 would say the same under every mirroring."""

    class Dropping(VoxelNetwork):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout3d(1e-6)

        def forward(self, image):
            return 4 * self.layer(self.dropout(image))

    config = configure("default", "filter.uncertainty.online_passes=4")
    torch.manual_seed(0)
    student = Dropping()
    objective = load_objective(config.objective)(student, config, NAMES, flips=(0, 2))
    weak = make_batch(config)[1]["weak"]
    probs, doubt = objective._teach(weak, torch.Generator().manual_seed(2))
    alone = objective_module.predict_still(objective.teacher, weak)
    assert torch.allclose(probs, alone, atol=1e-6)  # whatever the mirroring, voxel by voxel
    assert torch.allclose(doubt, entropy_of(alone), atol=1e-5)


def test_passes_are_mirrored_along_the_axes_that_may_be(dropout_spec):
    generator = torch.Generator().manual_seed(0)
    turns = draw_mirrorings(64, (0, 2), generator)
    assert turns[0] == []
    assert {axis for turn in turns for axis in turn} == {2, 4}
    assert all(a != b for a, b in itertools.pairwise(turns))
    assert draw_mirrorings(3, (), generator) == [[], [], []]
    assert draw_mirrorings(3, (0,), generator) == [[], [2], []]
    assert draw_mirrorings(3, (0,), None) == [[], [], []]


def test_the_uncertainty_of_the_passes_refuses_voxels(dropout_spec):
    config = configure("default", "network.dropout=0.5", "filter.threshold.name=none")
    objective = make_objective(config, dropout_spec)
    compute(objective, *make_batch(config), progress=0.0)
    strict = objective.monitors["coverage"]
    assert objective.monitors["refused_by_uncertainty"] == pytest.approx(1 - strict)
    free = configure("default", "filter.threshold.name=none", "filter.uncertainty.start=null",
                     "losses.consistency.voxels=all")  # fmt: skip
    objective = make_objective(free, dropout_spec)
    compute(objective, *make_batch(free), progress=0.0)
    assert strict < objective.monitors["coverage"] == 1.0


def test_a_kept_average_goes_on_from_the_teacher(tiny_spec):
    for keeps in (True, False):
        config = configure("default", "teacher.ema_decay=0.9")
        objective = make_objective(config, tiny_spec)
        before = [p.clone() for p in objective.predictor.parameters()]
        if keeps:
            objective.keep_average()
        with torch.no_grad():
            for parameter in objective.student.parameters():
                parameter.add_(1.0)
        objective.after_step()
        moved = [
            (now - old).abs().max().item()
            for now, old in zip(objective.predictor.parameters(), before, strict=True)
        ]
        assert max(moved) == pytest.approx(0.1 if keeps else 1.0, rel=1e-4)


def test_terms_without_a_weight_cost_no_pass_over_unlabeled_patches(tiny_spec, monkeypatch):
    off = [f"losses.{term}.weight=0" for term in ("pseudo_label", "entropy", "consistency")]
    config = configure("default", *off, "noise.mixing=none")
    objective = make_objective(config, tiny_spec)
    monkeypatch.setattr(objective, "_teach", None)
    terms = compute(objective, *make_batch(config))
    assert set(terms) == {"supervised"}
    assert terms["supervised"].requires_grad
