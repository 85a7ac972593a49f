# Axes: B batch, C classes, I J K voxels (K absent in 2D). Written by hand: p, q are probs.
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss
from scipy.spatial.distance import jensenshannon
from torch.nn import functional as F
from voxels import SHAPES, draw, gradient, logits_of, soften

from medssl import objective
from medssl.config import ConsistencySection
from medssl.losses import consistency, mean_over_valid, supervised
from medssl.losses.consistency import consistency_loss
from medssl.losses.entropy import entropy_loss, renyi_entropy
from medssl.losses.supervised import ce as cross_entropy
from medssl.losses.supervised import dice as dice_loss
from medssl.losses.supervised import dice_ce

SUPERVISED = [f for f in objective.LOSSES.values() if f.__module__ == supervised.__name__]
# f and f''(1) of each f-divergence D_f(q || p) = sum p f(q / p); total variation has a kink at 1.
GENERATORS = {
    "kl": (lambda u: u * np.log(u), 1.0),
    "total_variation": (lambda u: np.abs(u - 1) / 2, None),
    "pearson": (lambda u: (u - 1) ** 2, 2.0),
    "hellinger": (lambda u: (np.sqrt(u) - 1) ** 2, 1 / 2),
    "jensen_shannon": (lambda u: (u * np.log(u) - (u + 1) * np.log((u + 1) / 2)) / 2, 1 / 4),
}
DISTANCES = ["mse", "ce", *GENERATORS]
BOUNDS = {"mse": 1.0, "total_variation": 1.0, "hellinger": 2.0, "jensen_shannon": math.log(2)}
ORDERS = [0.0, 0.5, 1.0, 1.5, 2.0, 10.0, math.inf]

# Every loss of the package under one signature, loss(logits, classes, weight, valid): the laws
# below hold for all of them.
LOSSES = {
    **{f.__name__: f for f in SUPERVISED},
    **{
        f"{f.__name__}_soft": lambda x, y, w, v, f=f: f(x, soften(y, x.shape[1]), w, v)
        for f in SUPERVISED
    },
    **{f"entropy_{r}": lambda x, y, w, v, r=r: entropy_loss(x, r, w, v) for r in ORDERS},
    **{
        name: lambda x, y, w, v, name=name: consistency_loss(x, soften(y, x.shape[1]), name, w, v)
        for name in DISTANCES
    },
}
all_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


logits_strategy = st.integers(2, 5).flatmap(
    lambda num_classes: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=num_classes, max_size=num_classes),
        min_size=1,
        max_size=6,
    )
)


def as_logits(rows):
    """(B=1, C, 1, num_voxels) from a list of voxels."""
    return torch.tensor(rows).T[None, :, None]


# ---------------------------------------------------------------- known values, by hand


def test_cross_entropy_by_hand():
    logits = logits_of([0.5, 0.5], [0.25, 0.75], [0.9, 0.1])
    classes = torch.tensor([0, 1, 255], dtype=torch.uint8)[None, None, None]
    expected = (math.log(2) - math.log(0.75)) / 2
    assert cross_entropy(logits, classes).item() == pytest.approx(expected)


def test_weights_scale_but_do_not_enter_the_denominator():
    logits = logits_of([0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5])
    classes = torch.zeros(1, 1, 1, 4, dtype=torch.uint8)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0])[None, None, None]
    valid = torch.tensor([True, True, True, False])[None, None, None]
    # One accepted voxel of three valid ones: a third of ln 2, not all of it.
    assert cross_entropy(logits, classes, weight, valid).item() == pytest.approx(math.log(2) / 3)
    assert entropy_loss(logits, 1.0, weight, valid).item() == pytest.approx(1 / 3)
    target = torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, 1, 4)
    assert consistency_loss(logits, target, "mse", weight, valid).item() == pytest.approx(0.25 / 3)


def test_soft_cross_entropy_by_hand():
    logits = logits_of([0.5, 0.5], [0.2, 0.8])
    target = torch.tensor([[0.3, 0.7], [1.0, 0.0]]).T[None, :, None]
    expected = (math.log(2) - math.log(0.2)) / 2
    assert cross_entropy(logits, target).item() == pytest.approx(expected)


def test_dice_loss_by_hand():
    logits = logits_of([0.5, 0.5], [0.5, 0.5], [0.75, 0.25], [0.25, 0.75])
    classes = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)[None, None, None]
    # Overlap 0.5 + 0.75, sums 2 and 2: (2.5 + 1) / (4 + 1).
    assert dice_loss(logits, classes).item() == pytest.approx(1 - 3.5 / 5)
    assert dice_loss(logits, classes, smooth=0.0).item() == pytest.approx(1 - 2.5 / 4)
    # Without the last voxel: (1 + 1) / (1.25 + 1 + 1).
    valid = torch.tensor([True, True, True, False])[None, None, None]
    assert dice_loss(logits, classes, valid=valid).item() == pytest.approx(1 - 2 / 3.25)
    # The first voxel at half weight: overlap 1, sums 1.75 and 1.5.
    weight = torch.tensor([0.5, 1.0, 1.0, 1.0])[None, None, None]
    assert dice_loss(logits, classes, weight).item() == pytest.approx(1 - 3 / 4.25)


def test_dice_sums_over_the_batch_and_not_over_each_case():
    right, wrong = torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]])
    logits = torch.stack([right.T.expand(2, 3), wrong.T.expand(2, 3)])[:, :, None]
    classes = torch.ones(2, 1, 1, 3, dtype=torch.uint8)
    # Overlap 3, sums 3 and 6.
    assert dice_loss(logits, classes, smooth=0.0).item() == pytest.approx(1 - 6 / 9)


def test_dice_ce_is_the_sum_of_both():
    logits, classes, weight, valid = draw(SHAPES[1])
    parts = dice_loss(logits, classes, weight, valid) + cross_entropy(
        logits, classes, weight, valid
    )
    assert torch.equal(dice_ce(logits, classes, weight, valid), parts)


def test_renyi_entropy_by_hand():
    logits = logits_of([0.5, 0.25, 0.25])
    expected = {
        0.0: math.log(3),
        0.5: 2 * math.log(math.sqrt(0.5) + 1),
        1.0: 1.5 * math.log(2),
        2.0: -math.log(0.375),
        math.inf: math.log(2),
    }
    values = {order: renyi_entropy(logits, order).item() for order in expected}
    assert values == pytest.approx(expected, rel=1e-6)


def test_entropy_of_probs_is_that_of_their_logarithm_zeros_included():
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).T[None, :, None]
    for order in (0.5, 1.0, 1.2, 2.0, math.inf):
        values = renyi_entropy(probs.log(), order).flatten().tolist()
        assert values == pytest.approx([0.0, math.log(2)], abs=1e-6)


def test_consistency_by_hand():
    logits = logits_of([0.5, 0.5], [0.2, 0.8])
    target = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).T[None, :, None]
    expected = {
        "mse": (0.25**2 + 0.8**2) / 2,
        "ce": (math.log(2) - math.log(0.2)) / 2,
        "kl": (0.25 * math.log(0.5) + 0.75 * math.log(1.5) - math.log(0.2)) / 2,
        "total_variation": (0.25 + 0.8) / 2,
        "pearson": (2 * 0.25**2 / 0.5 + 0.8**2 / 0.2 + 0.8**2 / 0.8) / 2,
        # 2 - 2 sum sqrt(q p) at each voxel.
        "hellinger": (4 - 2 * (math.sqrt(0.125) + math.sqrt(0.375)) - 2 * math.sqrt(0.2)) / 2,
        # Middles 0.375, 0.625 and 0.6, 0.4: the KL of q and of p to them, halved.
        "jensen_shannon": (
            0.25 * math.log(0.25 / 0.375)
            + 0.75 * math.log(0.75 / 0.625)
            + 0.5 * math.log(0.5 / 0.375)
            + 0.5 * math.log(0.5 / 0.625)
            - math.log(0.6)
            + 0.2 * math.log(0.2 / 0.6)
            + 0.8 * math.log(0.8 / 0.4)
        )
        / 4,
    }
    assert set(expected) == set(DISTANCES)
    values = {name: consistency_loss(logits, target, name).item() for name in expected}
    assert values == pytest.approx(expected)


# ---------------------------------------------------------------- against other implementations


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_that_of_torch(shape):
    logits, classes, _, valid = draw(shape)
    ignored = torch.where(valid, classes, 255)
    reference = F.cross_entropy(logits, ignored[:, 0].long(), ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, ignored), reference)
    target = soften(classes, shape[1])
    torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smooth", [1.0, 1e-5])
def test_dice_loss_on_a_class_map_is_that_of_monai(shape, smooth):
    logits, classes, _, _ = draw(shape)
    options = {"include_background": False, "softmax": True, "to_onehot_y": True, "batch": True}
    reference = DiceLoss(**options, smooth_nr=smooth, smooth_dr=smooth)(logits, classes)
    loss = dice_loss(logits, classes, smooth=smooth)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(gradient(loss, logits), gradient(reference, logits))


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_and_mse_are_those_of_torch(shape):
    logits, classes, _, _ = draw(shape)
    target = soften(classes, shape[1])
    num_voxels = classes.numel()
    kl = F.kl_div(logits.log_softmax(1), target, reduction="sum") / num_voxels
    torch.testing.assert_close(consistency_loss(logits, target, "kl"), kl)
    mse = F.mse_loss(logits.softmax(1), target)
    torch.testing.assert_close(consistency_loss(logits, target, "mse"), mse)


def test_jensen_shannon_is_that_of_scipy():
    logits, classes, _, _ = draw(SHAPES[1])
    target = soften(classes, 3)
    rows = (x.detach().double().numpy() for x in (logits.softmax(1), target))
    reference = float((jensenshannon(*rows, axis=1) ** 2).mean())
    value = consistency_loss(logits, target, "jensen_shannon").item()
    assert value == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_an_f_divergence_is_the_mean_of_f_over_the_student(name):
    logits, *_ = draw(SHAPES[1])
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).softmax(1)
    p, q = logits.detach().double().softmax(1).numpy(), teacher.double().numpy()
    reference = (p * GENERATORS[name][0](q / p)).sum(axis=1).mean()
    value = consistency_loss(logits, teacher, name).item()
    assert value == pytest.approx(reference, rel=1e-5)


def test_shannon_entropy_is_that_of_torch():
    logits, _, _, _ = draw(SHAPES[1])
    reference = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy()
    torch.testing.assert_close(renyi_entropy(logits, 1.0)[:, 0], reference)


# ---------------------------------------------------------------- laws of every loss


@all_losses
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loss_is_a_finite_scalar_that_moves_the_logits(loss, shape, request):
    logits, classes, weight, valid = draw(shape)
    value = loss(logits, classes, weight, valid)
    assert value.shape == ()
    assert value.isfinite()
    grad = gradient(value, logits)
    assert grad.isfinite().all()
    is_constant = "entropy_0.0" in request.node.callspec.id
    assert (grad.abs().max() < 1e-9) == is_constant


@all_losses
@pytest.mark.parametrize("shape", SHAPES)
def test_ignored_voxels_give_no_gradient(loss, shape):
    logits, classes, weight, valid = draw(shape)
    grad = gradient(loss(logits, classes, weight, valid), logits)
    assert (grad.masked_select(~valid) == 0).all()


@all_losses
def test_ignored_voxels_give_no_gradient_even_if_nothing_there_is_finite(loss):
    logits, classes, weight, valid = draw(SHAPES[1])
    clean = loss(logits, classes, weight, valid)
    poisoned = torch.where(valid, logits.detach(), math.nan).requires_grad_()
    ignored = torch.where(valid, classes, 255)
    value = loss(poisoned, ignored, torch.where(valid, weight, math.inf), valid)
    torch.testing.assert_close(value, clean)
    grad = gradient(value, poisoned)
    torch.testing.assert_close(grad, gradient(clean, logits))
    assert (grad.masked_select(~valid) == 0).all()


def test_a_non_finite_valid_logit_is_not_hidden():
    logits, classes, _, _ = draw(SHAPES[0])
    poisoned = logits.detach().clone()
    poisoned[0, 0, 0, 0] = math.nan
    for loss in LOSSES.values():
        assert loss(poisoned, classes, None, None).isnan()


def test_the_mean_cuts_what_is_not_valid():
    values = torch.tensor([1.0, 3.0, math.nan, math.inf])[None, None].requires_grad_()
    weight = torch.tensor([1.0, 2.0, 1.0, 0.0])[None, None]
    valid = torch.tensor([True, True, False, False])[None, None]
    mean = mean_over_valid(values, weight, valid)
    assert mean.item() == 3.5
    assert gradient(mean, values).flatten().tolist() == [0.5, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", SUPERVISED)
def test_255_in_a_class_map_means_the_same_as_not_valid(loss):
    logits, classes, weight, valid = draw(SHAPES[1])
    ignored = torch.where(valid, classes, 255)
    assert torch.equal(loss(logits, ignored, weight), loss(logits, classes, weight, valid))
    grad = gradient(loss(logits, ignored, weight), logits)
    assert (grad.masked_select(ignored == 255) == 0).all()


@all_losses
def test_voxels_of_weight_zero_give_no_gradient(loss):
    logits, classes, weight, valid = draw(SHAPES[1])
    weight = torch.where(weight < 0.5, 0.0, weight)
    grad = gradient(loss(logits, classes, weight, valid), logits)
    assert (grad.masked_select(weight == 0) == 0).all()


@all_losses
def test_no_valid_voxel_and_no_weight_give_zero_with_a_zero_gradient(loss):
    logits, classes, weight, valid = draw(SHAPES[0])
    for w, v in ((weight, torch.zeros_like(valid)), (torch.zeros_like(weight), valid)):
        value = loss(logits, classes, w, v)
        assert value.item() == 0
        assert (gradient(value, logits) == 0).all()


@all_losses
@given(seed=st.integers(0, 2**20))
@settings(max_examples=10)
def test_the_order_of_voxels_does_not_matter(loss, seed):
    logits, classes, weight, valid = (x.detach().flatten(2) for x in draw(SHAPES[1], seed))
    order = torch.randperm(logits.shape[2], generator=torch.Generator().manual_seed(seed))
    shuffled = loss(*(x[:, :, order] for x in (logits, classes, weight, valid)))
    torch.testing.assert_close(shuffled, loss(logits, classes, weight, valid))


@all_losses
@given(seed=st.integers(0, 2**20), shift=st.floats(-50, 50))
@settings(max_examples=10)
def test_a_constant_added_to_all_logits_of_a_voxel_does_not_matter(loss, seed, shift):
    logits, classes, weight, valid = (x.detach() for x in draw(SHAPES[0], seed))
    torch.testing.assert_close(
        loss(logits + shift, classes, weight, valid),
        loss(logits, classes, weight, valid),
        rtol=1e-4,
        atol=1e-4,
    )


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(loss, dtype):
    logits, classes, weight, valid = draw((2, 3, 48, 48, 16))
    low = logits.detach().to(dtype).requires_grad_()
    value = loss(low, classes, weight.to(dtype), valid)
    assert value.dtype == torch.float32
    same = loss(low.detach().float(), classes, weight.to(dtype).float(), valid)
    assert torch.equal(value.detach(), same)
    assert gradient(value, low).isfinite().all()


@all_losses
def test_autocast_changes_nothing(loss):
    logits, classes, weight, valid = draw(SHAPES[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, classes, weight, valid)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits, classes, weight, valid))


@all_losses
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_extreme_and_equal_logits_stay_finite(loss, scale):
    signs, classes, weight, valid = draw(SHAPES[1])
    logits = (scale * signs.detach().sign()).requires_grad_()
    value = loss(logits, classes, weight, valid)
    assert value.isfinite()
    assert gradient(value, logits).isfinite().all()


@all_losses
def test_gradients_are_those_of_finite_differences(loss):
    # In float32, hence the wide tolerance; 1e-2 is about the best step there.
    logits, classes, weight, valid = draw((1, 3, 2, 2), scale=1.0)
    grad = gradient(loss(logits, classes, weight, valid), logits)
    step, numeric = 1e-2, torch.zeros_like(grad)
    for index in range(logits.numel()):
        offset = torch.zeros(logits.numel())
        offset[index] = step
        offset = offset.view_as(logits)
        with torch.no_grad():
            above = loss(logits + offset, classes, weight, valid)
            below = loss(logits - offset, classes, weight, valid)
        numeric.view(-1)[index] = (above - below) / (2 * step)
    torch.testing.assert_close(grad, numeric, rtol=1e-2, atol=1e-4)


# ---------------------------------------------------------------- Dice


@given(logits_strategy)
def test_dice_loss_of_a_soft_target_with_itself_is_zero(rows):
    logits = as_logits(rows)
    assert dice_loss(logits, logits.softmax(1)).item() == pytest.approx(0, abs=1e-5)


def test_the_optimum_on_a_soft_target_is_the_target_and_not_a_harder_one():
    target = torch.tensor([0.4, 0.6])[None, :, None, None].expand(1, 2, 1, 50)
    losses = {}
    for p in (0.3, 0.5, 0.6, 0.7, 0.99):
        logits = torch.tensor([1 - p, p]).log()[None, :, None, None].expand(1, 2, 1, 50)
        losses[p] = dice_loss(logits, target).item()
    assert min(losses, key=losses.__getitem__) == 0.6


def test_a_class_that_target_and_prediction_lack_costs_nothing_and_pulls_nothing():
    logits = torch.zeros(1, 3, 8, 8, 8)
    logits[:, 2] = -20.0  # a mass of 1e-6 voxels in all: right, and nothing to gain here
    logits[:, 1, :4], logits[:, 0, 4:] = 20.0, 20.0
    logits.requires_grad_()
    classes = torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    classes[:, :, :4] = 1
    value = dice_loss(logits, classes)
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert gradient(value, logits)[:, 2].abs().sum() < 1e-5


def test_a_false_class_in_the_prediction_is_pushed_down():
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    classes = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    assert (gradient(dice_loss(logits, classes), logits)[:, 1:] > 0).all()


@given(seed=st.integers(0, 2**20), keep=st.floats(0, 1), scale=st.floats(1e-3, 1e3))
@settings(max_examples=50)
def test_few_accepted_voxels_cannot_make_a_huge_dice_gradient(seed, keep, scale):
    logits, classes, weight, _ = draw(SHAPES[1], seed)
    weight = scale * (weight < keep)
    for target in (classes, soften(classes, 3)):
        grad = gradient(dice_loss(logits, target, weight), logits)
        assert grad.abs().sum() <= 4


@given(seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_dice_loss_is_a_fraction(seed):
    logits, classes, weight, valid = draw(SHAPES[0], seed)
    assert 0 <= dice_loss(logits, classes, weight, valid).item() <= 1


# ---------------------------------------------------------------- entropy


@given(logits_strategy, st.sampled_from([*ORDERS, 0.9, 0.999999, 1.000001, 1.1, 50.0]))
def test_entropy_lies_between_zero_and_ln_c(rows, order):
    logits = as_logits(rows)
    entropy = renyi_entropy(logits, order)
    assert entropy.shape == (1, 1, 1, len(rows))
    assert entropy.min() >= -1e-5
    assert entropy.max() <= math.log(logits.shape[1]) + 1e-5


@given(logits_strategy, st.floats(0, 60), st.floats(0, 60))
def test_entropy_never_rises_with_the_order(rows, a, b):
    logits = as_logits(rows)
    low, high = sorted((a, b))
    assert (renyi_entropy(logits, low) - renyi_entropy(logits, high)).min() >= -1e-5
    assert (renyi_entropy(logits, high) - renyi_entropy(logits, math.inf)).min() >= -1e-5


@given(logits_strategy, st.sampled_from([-1.0, 1.0]), st.integers(2, 30))
def test_entropy_is_continuous_at_shannon(rows, sign, exponent):
    logits = as_logits(rows)
    # |dH/dr| at 1 is half the variance of ln p under p, for 5 classes under 1.
    gap = 10.0**-exponent
    difference = renyi_entropy(logits, 1 + sign * gap) - renyi_entropy(logits, 1.0)
    assert difference.abs().max() <= gap + 1e-6


@pytest.mark.parametrize("border", [0.5, 1.5, 1e6])
def test_entropy_is_continuous_where_the_formula_changes(border):
    logits, _, _, _ = draw(SHAPES[1], scale=5.0)
    below, above = (renyi_entropy(logits, border * f) for f in (1 - 1e-7, 1 + 1e-7))
    torch.testing.assert_close(below, above, rtol=2e-6, atol=2e-6)


@given(st.integers(2, 20), st.sampled_from([*ORDERS, 1e3, 1e7, 1e300]))
def test_equal_probs_have_entropy_ln_c_for_every_order(num_classes, order):
    logits = torch.zeros(1, num_classes, 1, 2)
    assert entropy_loss(logits, order).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("order", [0.1, 0.5, 0.9, 1.0, 2.0])
def test_entropy_loss_makes_the_prediction_more_certain(order):
    logits = logits_of([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]).detach().requires_grad_()
    before = entropy_loss(logits, order)
    after = entropy_loss(logits - gradient(before, logits), order)
    assert after < before


@pytest.mark.parametrize("order", [-0.1, math.nan])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(ValueError, match=r"\[0, inf\]"):
        renyi_entropy(torch.zeros(1, 2, 3, 3), order)


# ---------------------------------------------------------------- consistency


@pytest.mark.parametrize("name", ["mse", *GENERATORS])
@given(logits_strategy, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_a_distance_is_not_negative_bounded_and_zero_at_equality(name, rows, random):
    student = as_logits(rows)
    teacher = as_logits(random.sample(rows, len(rows))).softmax(1)
    distance = getattr(consistency, name)(student.log_softmax(1), teacher)
    assert distance.shape == (1, 1, 1, len(rows))
    assert distance.min() >= -1e-5
    assert distance.max() <= BOUNDS.get(name, math.inf) + 1e-5
    assert distance.isfinite().all()
    equal = consistency_loss(student, student.softmax(1), name).item()
    assert equal == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("name", "bound"), BOUNDS.items())
def test_a_bound_is_reached_by_a_student_that_is_certain_and_wrong(name, bound):
    logits = torch.tensor([50.0, -50.0])[None, :, None, None].requires_grad_()
    target = torch.tensor([0.0, 1.0])[None, :, None, None]
    assert consistency_loss(logits, target, name).item() == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "curvature"), [(name, c) for name, (_, c) in GENERATORS.items() if c is not None]
)
def test_near_agreement_an_f_divergence_is_the_fisher_form(name, curvature):
    generator = torch.Generator().manual_seed(1)
    logits, step = torch.randn(2, 1, 4, 3, 3, generator=generator, dtype=torch.float64)
    p = logits.softmax(1)
    fisher = (p * step**2).sum(1, keepdim=True) - (p * step).sum(1, keepdim=True) ** 2
    divergence = getattr(consistency, name)
    epsilon = 1e-3  # the mean of both signs has no third-order term
    both = [
        divergence(logits.log_softmax(1), (logits + e * step).softmax(1))
        for e in (epsilon, -epsilon)
    ]
    torch.testing.assert_close(
        sum(both) / 2 / epsilon**2, curvature / 2 * fisher, rtol=1e-4, atol=0.0
    )


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("gap", [30.0, 90.0, 120.0, 1e4, 1e30])
def test_a_prob_that_underflows_keeps_loss_and_gradient_finite(name, gap):
    # Right, wrong and undecided students against one-hot and soft teachers.
    rows = [[0.0, -gap, -gap], [-gap, 0.0, -gap], [0.0, 0.0, -gap]]
    logits = torch.tensor(rows).T[None, :, None].requires_grad_()
    for teacher in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]):
        target = torch.tensor(teacher)[None, :, None, None].expand(1, 3, 1, 3)
        value = consistency_loss(logits, target, name)
        assert value.isfinite()
        assert gradient(value, logits).isfinite().all()


def test_pearson_is_continued_smoothly_and_pulls_on_a_student_however_wrong():
    lowest = math.log(1e-6)
    target = torch.tensor([0.0, 1.0])[None, :, None, None]
    values, pulls = [], []
    for x in (lowest + 1e-3, lowest - 1e-3, 2 * lowest, -1e4):
        logits = torch.tensor([0.0, x])[None, :, None, None].requires_grad_()
        value = consistency_loss(logits, target, "pearson")
        values.append(value.item())
        pulls.append(gradient(value, logits)[0, 1].item())
    assert values == sorted(values)
    assert values[0] == pytest.approx(values[1], rel=3e-3)
    assert pulls[0] == pytest.approx(pulls[1], rel=3e-3)
    assert values[2] == pytest.approx(1e6 * (1 - lowest), rel=1e-3)
    assert pulls[2:] == pytest.approx([-1e6, -1e6], rel=1e-3)


def test_f_divergences_differ_in_how_hard_they_pull_on_a_certain_and_wrong_student():
    target = torch.tensor([0.0, 1.0])[None, :, None, None]
    pulls = {}
    for name in GENERATORS:
        logits = torch.tensor([10.0, 0.0])[None, :, None, None].requires_grad_()
        pulls[name] = -gradient(consistency_loss(logits, target, name), logits)[0, 1].item()
    assert pulls["pearson"] > 1e4
    assert pulls["kl"] == pytest.approx(1, rel=1e-3)
    for name in ("total_variation", "hellinger", "jensen_shannon"):
        assert 0 < pulls[name] < 0.01


def test_ce_and_kl_have_the_same_gradient_and_differ_by_the_targets_entropy():
    logits, classes, weight, valid = draw(SHAPES[1])
    target = soften(classes, 3)
    ce = consistency_loss(logits, target, "ce", weight, valid)
    kl = consistency_loss(logits, target, "kl", weight, valid)
    torch.testing.assert_close(gradient(ce, logits), gradient(kl, logits))
    entropy = mean_over_valid(renyi_entropy(target.log(), 1.0), weight, valid)
    torch.testing.assert_close(ce - kl, entropy)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_goes_only_into_the_logits(name):
    logits, classes, _, _ = draw(SHAPES[0])
    target = soften(classes, 3).requires_grad_()
    consistency_loss(logits, target, name).backward()
    assert target.grad is None
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("loss", SUPERVISED)
def test_no_gradient_goes_into_a_soft_target(loss):
    logits, classes, weight, _ = draw(SHAPES[0])
    target, weight = soften(classes, 3).requires_grad_(), weight.requires_grad_()
    loss(logits, target, weight).backward()
    assert target.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("name", sorted({*DISTANCES} - {"total_variation"}))  # it has a kink there
def test_consistency_has_no_gradient_where_student_and_teacher_agree(name):
    logits, _, _, _ = draw(SHAPES[0])
    grad = gradient(consistency_loss(logits, logits.detach().softmax(1), name), logits)
    assert grad.abs().max() < 1e-7


@pytest.mark.parametrize("name", ["l1", "", "consistency_loss", "log_softmax", "replace_ignored"])
def test_an_unknown_distance_is_refused_with_the_choices(name):
    choices = "there are 'mse', 'ce', 'kl', .*'hellinger' and 'jensen_shannon'$"
    with pytest.raises(ValueError, match=choices):
        consistency_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), name)


def test_one_function_and_its_name_are_all_that_a_new_distance_needs(monkeypatch):
    def distance_of_background(log_probs, q):
        return (log_probs.exp() - q)[:, :1].abs()

    monkeypatch.setitem(consistency.DISTANCES, "background", distance_of_background)
    target = torch.tensor([0.75, 0.25])[None, :, None, None]
    assert consistency_loss(torch.zeros(1, 2, 1, 1), target, "background").item() == 0.25


def test_every_distance_that_a_configuration_can_name_is_tested_here():
    choices = get_args(ConsistencySection.model_fields["name"].annotation)
    assert sorted(choices) == sorted(DISTANCES) == sorted(consistency.DISTANCES)


# ---------------------------------------------------------------- shapes


@all_losses
def test_a_map_that_would_broadcast_is_refused(loss):
    logits, classes, weight, valid = draw((2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 2, 4\)"):
        loss(logits, classes, weight[:, 0], valid)
    with pytest.raises(ValueError, match=r"valid has shape \(2, 2, 4\)"):
        loss(logits, classes, weight, valid[:, 0])
    with pytest.raises(ValueError, match="bool"):
        loss(logits, classes, weight, valid.float())


@pytest.mark.parametrize("loss", SUPERVISED)
def test_a_target_of_another_shape_is_refused(loss):
    logits, classes, _, _ = draw((2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"class map.*\(2, 1, 2, 4\)"):
        loss(logits, classes[:, 0])
    with pytest.raises(ValueError, match=r"probs.*\(2, 3, 2, 4\)"):
        loss(logits, classes.float())
    with pytest.raises(ValueError, match=r"give target\.long\(\)"):
        loss(logits, classes.float())


def test_consistency_with_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="target_probs"):
        consistency_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 2), "mse")
