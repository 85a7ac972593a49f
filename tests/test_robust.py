# Axes: B batch, C classes, I J K voxels (K absent in 2D). Written by hand: p, y are probs.
import functools
import inspect
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from voxels import SHAPES, draw, gradient, logits_of, soften

from medssl.config import InputError, PseudoLabelSection, Supervised
from medssl.losses import mean_over_valid, supervised
from medssl.losses.entropy import renyi_entropy
from medssl.losses.robust import (
    bootstrapped_ce,
    estimate_transition,
    forward_ce,
    generalized_ce,
    mae,
    symmetric_ce,
)
from medssl.losses.supervised import ce as cross_entropy
from medssl.objective import LOSSES

# Rows: truth; columns: target. Not symmetric, with a zero, and far from the identity.
TRANSITION = torch.tensor([[0.8, 0.15, 0.05], [0.3, 0.7, 0.0], [0.25, 0.15, 0.6]])


def soft_bootstrapped_ce(logits, target, weight=None, valid=None):
    return bootstrapped_ce(logits, target, weight, valid, kind="soft")


def bind(loss):
    """Return a loss with what it needs beside the four arguments that all have."""
    needs_transition = "transition" in inspect.signature(loss).parameters
    return functools.partial(loss, transition=TRANSITION) if needs_transition else loss


forward_ce_of_t = bind(forward_ce)
ROBUST = {name: bind(f) for name, f in LOSSES.items() if f.__module__ != supervised.__name__}
ROBUST["soft_bootstrapped_ce"] = soft_bootstrapped_ce
all_losses = pytest.mark.parametrize("loss", ROBUST.values(), ids=ROBUST.keys())
all_targets = pytest.mark.parametrize("as_target", [lambda y: y, lambda y: soften(y, 3)])


def classes_of(*classes):
    return torch.tensor(classes, dtype=torch.uint8)[None, None, None]


def every_class(logits):
    """For each class the class map (B, 1, ...) that is this class everywhere."""
    one = torch.ones_like(logits[:, :1], dtype=torch.uint8)
    return [k * one for k in range(logits.shape[1])]


# ---------------------------------------------------------------- known values, by hand


@pytest.mark.parametrize(
    ("loss", "options", "hard", "soft"),
    [
        (mae, {}, 2 * 0.5, 0.1 + 0.15 + 0.25),
        (
            generalized_ce,
            {"q": 0.5},
            2 * (1 - math.sqrt(0.5)),
            2 * (1 - 0.6 * math.sqrt(0.5) - 0.4 * math.sqrt(0.25)),
        ),
        (
            symmetric_ce,
            {"alpha": 2.0, "beta": 3.0, "log_zero": -4.0},
            2 * math.log(2) + 3 * 4 * 0.5,
            2 * (0.6 * math.log(2) + 0.4 * math.log(4))
            - 3 * (0.5 * math.log(0.6) + 0.25 * math.log(0.4) + 0.25 * -4),
        ),
        (
            bootstrapped_ce,
            {"beta": 0.75, "kind": "hard"},
            math.log(2),
            (0.75 * 0.6 + 0.25) * math.log(2) + 0.75 * 0.4 * math.log(4),
        ),
        (
            bootstrapped_ce,
            {"beta": 0.75, "kind": "soft"},
            0.75 * math.log(2) + 0.25 * 1.5 * math.log(2),
            0.75 * (0.6 * math.log(2) + 0.4 * math.log(4)) + 0.25 * 1.5 * math.log(2),
        ),
        (
            # T' p = 0.5 (0.8, 0.15, 0.05) + 0.25 (0.3, 0.7, 0) + 0.25 (0.25, 0.15, 0.6).
            forward_ce,
            {"transition": TRANSITION},
            -math.log(0.5375),
            -0.6 * math.log(0.5375) - 0.4 * math.log(0.2875),
        ),
    ],
    ids=["mae", "generalized_ce", "symmetric_ce", "hard_bootstrap", "soft_bootstrap", "forward_ce"],
)
def test_a_loss_by_hand(loss, options, hard, soft):
    logits = logits_of([0.5, 0.25, 0.25])
    assert loss(logits, classes_of(0), **options).item() == pytest.approx(hard, rel=1e-6)
    target = torch.tensor([0.6, 0.4, 0.0])[None, :, None, None]
    assert loss(logits, target, **options).item() == pytest.approx(soft, rel=1e-6)


def test_hard_bootstrapping_takes_the_class_that_the_student_favors():
    logits = logits_of([0.2, 0.7, 0.1])
    value = bootstrapped_ce(logits, classes_of(0), beta=0.8).item()
    assert value == pytest.approx(-0.8 * math.log(0.2) - 0.2 * math.log(0.7), rel=1e-6)


@all_losses
def test_weights_scale_but_do_not_enter_the_denominator(loss):
    logits = logits_of(*[[0.5, 0.25, 0.25]] * 4)
    whole = loss(logits, classes_of(1, 1, 1, 1)).item()
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0])[None, None, None]
    valid = torch.tensor([True, True, True, False])[None, None, None]
    value = loss(logits, classes_of(1, 1, 1, 1), weight, valid).item()
    assert value == pytest.approx(whole / 3, rel=1e-6)
    assert loss(logits, classes_of(1, 1, 1, 255), weight).item() == pytest.approx(whole / 3)


# ---------------------------------------------------------------- noise tolerance


@given(seed=st.integers(0, 2**20), log_zero=st.floats(-10, -0.1))
@settings(max_examples=20)
def test_mae_and_reverse_ce_are_symmetric(seed, log_zero):
    logits, _, _, _ = draw(SHAPES[0], seed, scale=5.0)
    total = sum(mae(logits, y) for y in every_class(logits))
    assert total.item() == pytest.approx(2 * (3 - 1), rel=1e-5)
    assert gradient(total, logits).abs().max() < 1e-6
    reverse = sum(
        symmetric_ce(logits, y, alpha=0.0, log_zero=log_zero) for y in every_class(logits)
    )
    assert reverse.item() == pytest.approx(-log_zero * (3 - 1), rel=1e-5)
    assert gradient(reverse, logits).abs().max() < 1e-6


def test_ce_is_not_symmetric():
    logits, _, _, _ = draw(SHAPES[0])
    total = sum(cross_entropy(logits, y) for y in every_class(logits))
    assert gradient(total, logits).abs().max() > 1e-3


@pytest.mark.parametrize("loss", [mae, lambda x, y: symmetric_ce(x, y, alpha=0.0)])
@pytest.mark.parametrize(("noise", "is_tolerant"), [(0.3, True), (0.6, True), (0.7, False)])
def test_uniform_noise_under_two_thirds_does_not_move_the_optimum_of_three_classes(
    loss, noise, is_tolerant
):
    students = logits_of([0.98, 0.01, 0.01], [0.6, 0.2, 0.2], [0.01, 0.98, 0.01])
    shares = [1 - noise, noise / 2, noise / 2]  # the truth is class 0 everywhere
    risks = [
        sum(s * loss(x, y).item() for s, y in zip(shares, every_class(x), strict=True))
        for x in students.split(1, dim=3)
    ]
    assert (risks[0] == min(risks)) == is_tolerant


# ---------------------------------------------------------------- generalized cross-entropy


@pytest.mark.parametrize(("q", "rtol"), [(1e-3, 1e-2), (1e-7, 1e-5)])
def test_generalized_ce_tends_to_ce(q, rtol):
    logits, classes, weight, valid = draw(SHAPES[1])
    ce = cross_entropy(logits, classes, weight, valid)
    value = generalized_ce(logits, classes, weight, valid, q=q)
    torch.testing.assert_close(value, ce, rtol=rtol, atol=0.0)
    torch.testing.assert_close(
        gradient(value, logits), gradient(ce, logits), rtol=10 * rtol, atol=1e-6
    )


def test_generalized_ce_with_q_1_is_half_of_mae_on_a_class_map():
    logits, classes, weight, valid = draw(SHAPES[1])
    value = generalized_ce(logits, classes, weight, valid, q=1.0)
    half = mae(logits, classes, weight, valid) / 2
    torch.testing.assert_close(value, half)
    torch.testing.assert_close(gradient(value, logits), gradient(half, logits))


@given(st.integers(0, 2**20), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=20)
def test_generalized_ce_falls_with_q_and_is_bounded(seed, a, b):
    logits, classes, _, _ = draw(SHAPES[0], seed, scale=10.0)
    low, high = sorted((a, b))
    values = [generalized_ce(logits, classes, q=q).item() for q in (low, high)]
    assert 0 <= values[1] <= values[0] + 1e-6
    assert values[0] <= 1 / low


def test_generalized_ce_has_the_gradient_of_ce_times_a_power_of_p():
    logits, classes, _, _ = draw(SHAPES[1])
    p = logits.softmax(1).gather(1, classes.long())
    grad = gradient(generalized_ce(logits, classes, q=0.4), logits)
    torch.testing.assert_close(grad, gradient(cross_entropy(logits, classes), logits) * p**0.4)


# ---------------------------------------------------------------- symmetric and bootstrapped


def test_symmetric_ce_is_the_sum_of_both_directions():
    logits, classes, weight, valid = draw(SHAPES[1])
    target = soften(classes, 3)
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    both = -(0.1 * target * log_p + 2.0 * p * target.log()).sum(1, keepdim=True)
    value = symmetric_ce(logits, target, weight, valid, alpha=0.1, beta=2.0)
    torch.testing.assert_close(value, mean_over_valid(both, weight, valid))
    only_ce = symmetric_ce(logits, classes, weight, valid, beta=0.0)
    torch.testing.assert_close(only_ce, cross_entropy(logits, classes, weight, valid))


def test_symmetric_ce_does_not_jump_where_a_soft_target_becomes_zero():
    logits = logits_of([0.5, 0.25, 0.25])
    targets = [torch.tensor([1 - e, e, 0.0])[None, :, None, None] for e in (0.0, 1e-8, 1e-5)]
    values = [symmetric_ce(logits, target).item() for target in targets]
    assert values == pytest.approx([values[0]] * 3, abs=1e-4)


@all_targets
def test_soft_bootstrapping_is_ce_and_entropy(as_target):
    logits, classes, weight, valid = draw(SHAPES[1])
    target = as_target(classes)
    entropy = mean_over_valid(renyi_entropy(logits, 1.0), weight, valid)
    sum_of_both = 0.7 * cross_entropy(logits, target, weight, valid) + 0.3 * entropy
    value = bootstrapped_ce(logits, target, weight, valid, beta=0.7, kind="soft")
    torch.testing.assert_close(value, sum_of_both)
    torch.testing.assert_close(gradient(value, logits), gradient(sum_of_both, logits))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_bootstrapping_with_all_of_the_target_is_ce_and_with_none_makes_certain(kind):
    logits, classes, weight, valid = draw(SHAPES[1])
    ce = cross_entropy(logits, classes, weight, valid)
    torch.testing.assert_close(
        bootstrapped_ce(logits, classes, weight, valid, beta=1.0, kind=kind), ce
    )
    own = bootstrapped_ce(logits, classes, beta=0.0, kind=kind)
    after = logits - gradient(own, logits)
    assert renyi_entropy(after, 1.0).mean() < renyi_entropy(logits, 1.0).mean()


# ---------------------------------------------------------------- forward correction


@all_targets
@pytest.mark.parametrize("scale", [2.0, 1e4])
def test_forward_ce_with_the_identity_is_ce(as_target, scale):
    logits, classes, weight, valid = draw(SHAPES[1], scale=scale)
    target = as_target(classes)
    ce = cross_entropy(logits, target, weight, valid)
    value = forward_ce(logits, target, weight, valid, transition=torch.eye(3))
    torch.testing.assert_close(value, ce)
    torch.testing.assert_close(gradient(value, logits), gradient(ce, logits))


def test_forward_ce_is_ce_of_the_noisy_probs():
    logits, classes, _, _ = draw(SHAPES[1])
    noisy = torch.einsum("ij,bi...->bj...", TRANSITION, logits.softmax(1))
    reference = F.nll_loss(noisy.log(), classes[:, 0].long())
    value = forward_ce(logits, classes, transition=TRANSITION)
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(gradient(value, logits), gradient(reference, logits))


@given(seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_the_clean_posterior_is_stationary_under_noise_of_the_given_transition(seed):
    logits, _, _, _ = draw(SHAPES[0], seed)
    clean = logits.detach().softmax(1)
    noisy = torch.einsum("ij,bi...->bj...", TRANSITION, clean)

    def expect(loss):
        """The mean loss over noisy targets, drawn class by class at every voxel."""
        return sum(loss(logits, y, noisy[:, k : k + 1]) for k, y in enumerate(every_class(logits)))

    assert gradient(expect(forward_ce_of_t), logits).abs().max() < 1e-6
    assert gradient(forward_ce_of_t(logits, noisy), logits).abs().max() < 1e-6
    assert gradient(expect(cross_entropy), logits).abs().max() > 1e-4


@given(seed=st.integers(0, 2**20), scale=st.floats(0.1, 5))
@settings(max_examples=20)
def test_no_student_has_a_lower_loss_on_noisy_targets_than_the_clean_posterior(seed, scale):
    logits, _, _, _ = draw(SHAPES[0], seed)
    noisy = torch.einsum("ij,bi...->bj...", TRANSITION, logits.detach().softmax(1))
    other, _, _, _ = draw(SHAPES[0], seed + 1, scale)
    for student in (other, logits + other, noisy.log()):
        assert forward_ce_of_t(student, noisy) > forward_ce_of_t(logits, noisy)


def test_a_transition_that_forgets_everything_teaches_nothing():
    logits, classes, _, _ = draw(SHAPES[0])
    value = forward_ce(logits, classes, transition=torch.full((3, 3), 1 / 3))
    assert value.item() == pytest.approx(math.log(3), rel=1e-6)
    assert gradient(value, logits).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("transition", "message"),
    [
        (torch.eye(2), r"shape \(2, 2\).*\(3, 3\)"),
        (torch.eye(3)[0], r"shape \(3,\)"),
        (TRANSITION.T, "each row"),
        (torch.tensor([[1.5, -0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "each row"),
        (torch.eye(3) * math.nan, "each row"),
        (torch.tensor([[0.5, 0.5, 0.0]] * 3), "a column"),
    ],
)
def test_a_transition_that_is_none_is_refused(transition, message):
    logits, classes, _, _ = draw(SHAPES[0])
    with pytest.raises(ValueError, match=message):
        forward_ce(logits, classes, transition=transition)


# ---------------------------------------------------------------- laws of every loss


@all_losses
@all_targets
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loss_is_a_finite_scalar_that_moves_the_logits(loss, as_target, shape):
    logits, classes, weight, valid = draw(shape)
    value = loss(logits, as_target(classes), weight, valid)
    assert value.shape == ()
    assert value.isfinite()
    assert value > 0
    grad = gradient(value, logits)
    assert grad.isfinite().all()
    assert grad.abs().max() > 1e-4
    assert (grad.masked_select(~valid) == 0).all()
    torch.testing.assert_close(grad.sum(1), torch.zeros_like(grad[:, 0]), atol=1e-6, rtol=0.0)


@all_losses
@all_targets
def test_ignored_voxels_give_no_gradient_even_if_nothing_there_is_finite(loss, as_target):
    logits, classes, weight, valid = draw(SHAPES[1])
    clean = loss(logits, as_target(classes), weight, valid)
    poisoned = torch.where(valid, logits.detach(), math.nan).requires_grad_()
    ignored = as_target(torch.where(valid, classes, 255))
    value = loss(poisoned, ignored, torch.where(valid, weight, math.inf), valid)
    torch.testing.assert_close(value, clean)
    grad = gradient(value, poisoned)
    torch.testing.assert_close(grad, gradient(clean, logits))
    assert (grad.masked_select(~valid) == 0).all()


@all_losses
def test_255_in_a_class_map_means_the_same_as_not_valid(loss):
    logits, classes, weight, valid = draw(SHAPES[1])
    ignored = torch.where(valid, classes, 255)
    assert torch.equal(loss(logits, ignored, weight), loss(logits, classes, weight, valid))
    grad = gradient(loss(logits, ignored, weight), logits)
    assert (grad.masked_select(ignored == 255) == 0).all()


@all_losses
def test_a_class_map_is_the_same_as_its_one_hot_probs(loss):
    logits, classes, weight, valid = draw(SHAPES[1])
    one_hot = F.one_hot(classes[:, 0].long(), 3).movedim(-1, 1).float()
    assert torch.equal(loss(logits, one_hot, weight, valid), loss(logits, classes, weight, valid))


@all_losses
def test_a_non_finite_valid_logit_is_not_hidden(loss):
    logits, classes, _, _ = draw(SHAPES[0])
    poisoned = logits.detach().clone()
    poisoned[0, 0, 0, 0] = math.nan
    assert loss(poisoned, classes).isnan()


@all_losses
def test_no_valid_voxel_and_no_weight_give_zero_with_a_zero_gradient(loss):
    logits, classes, weight, valid = draw(SHAPES[0])
    for w, v in ((weight, torch.zeros_like(valid)), (torch.zeros_like(weight), valid)):
        value = loss(logits, classes, w, v)
        assert value.item() == 0
        assert (gradient(value, logits) == 0).all()


@all_losses
@all_targets
@given(seed=st.integers(0, 2**20))
@settings(max_examples=5)
def test_the_order_of_voxels_does_not_matter(loss, as_target, seed):
    logits, classes, weight, valid = (x.detach().flatten(2) for x in draw(SHAPES[1], seed))
    order = torch.randperm(logits.shape[2], generator=torch.Generator().manual_seed(seed))
    target = as_target(classes)
    shuffled = loss(*(x[:, :, order] for x in (logits, target, weight, valid)))
    torch.testing.assert_close(shuffled, loss(logits, target, weight, valid))


@all_losses
@all_targets
@pytest.mark.parametrize("scale", [1e4, 100.0, 0.0])
def test_extreme_and_equal_logits_stay_finite(loss, as_target, scale):
    signs, classes, weight, valid = draw(SHAPES[1])
    logits = (scale * signs.detach().sign()).requires_grad_()
    value = loss(logits, as_target(classes), weight, valid)
    assert value.isfinite()
    assert gradient(value, logits).isfinite().all()


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(loss, dtype):
    logits, classes, weight, valid = draw((2, 3, 16, 16, 8))
    low = logits.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(low, classes, weight.to(dtype), valid)
    assert value.dtype == torch.float32
    same = loss(low.detach().float(), classes, weight.to(dtype).float(), valid)
    assert torch.equal(value.detach(), same)
    assert gradient(value, low).isfinite().all()


@all_losses
@all_targets
def test_gradients_are_those_of_finite_differences(loss, as_target):
    # In float32, hence the wide tolerance; 1e-2 is about the best step there.
    logits, classes, weight, valid = draw((1, 3, 2, 2), scale=1.0)
    target = as_target(classes)
    grad = gradient(loss(logits, target, weight, valid), logits)
    step, numeric = 1e-2, torch.zeros_like(grad)
    for index in range(logits.numel()):
        offset = torch.zeros(logits.numel())
        offset[index] = step
        offset = offset.view_as(logits)
        with torch.no_grad():
            above = loss(logits + offset, target, weight, valid)
            below = loss(logits - offset, target, weight, valid)
        numeric.view(-1)[index] = (above - below) / (2 * step)
    torch.testing.assert_close(grad, numeric, rtol=1e-2, atol=1e-4)


@all_losses
def test_no_gradient_goes_into_target_or_weight(loss):
    logits, classes, weight, _ = draw(SHAPES[0])
    target, weight = soften(classes, 3).requires_grad_(), weight.requires_grad_()
    loss(logits, target, weight).backward()
    assert target.grad is None
    assert weight.grad is None


@all_losses
def test_a_map_that_would_broadcast_is_refused(loss):
    logits, classes, weight, valid = draw((2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 2, 4\)"):
        loss(logits, classes, weight[:, 0], valid)
    with pytest.raises(ValueError, match=r"valid has shape \(2, 2, 4\)"):
        loss(logits, classes, weight, valid[:, 0])
    with pytest.raises(ValueError, match=r"class map.*\(2, 1, 2, 4\)"):
        loss(logits, classes[:, 0])


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (generalized_ce, {"q": 0.0}, r"q is 0.0.*\(0, 1\]"),
        (generalized_ce, {"q": 1.1}, r"\(0, 1\]"),
        (generalized_ce, {"q": math.nan}, r"\(0, 1\]"),
        (symmetric_ce, {"alpha": -0.1}, "alpha is -0.1"),
        (symmetric_ce, {"beta": -1.0}, "beta -1.0"),
        (symmetric_ce, {"log_zero": 0.0}, "log_zero is 0.0"),
        (bootstrapped_ce, {"beta": 1.5}, "beta is 1.5"),
        (bootstrapped_ce, {"kind": "argmax"}, "'argmax'.*'hard' and 'soft'"),
    ],
)
def test_an_option_out_of_range_is_refused(loss, options, message):
    logits, classes, _, _ = draw(SHAPES[0])
    with pytest.raises(ValueError, match=message):
        loss(logits, classes, **options)


def test_every_loss_has_a_name_that_a_configuration_knows_and_the_reverse():
    choices = get_args(PseudoLabelSection.model_fields["name"].annotation)
    assert sorted(choices) == sorted(LOSSES)
    assert set(get_args(Supervised)) <= set(choices)


# ---------------------------------------------------------------- the estimate of T


def test_a_transition_is_the_confusion_by_hand():
    label = torch.tensor([0, 0, 0, 0, 1, 1, 255, 1], dtype=torch.uint8)[None, None]
    said = torch.tensor([0, 0, 0, 1, 1, 0, 0, 255], dtype=torch.uint8)[None, None]
    # Counts (3, 1) and (1, 1), each + 1: neither an ignored label nor an ignored prediction counts.
    expected = torch.tensor([[4 / 6, 2 / 6], [2 / 4, 2 / 4]])
    torch.testing.assert_close(estimate_transition(said, label, 2), expected)
    raw = torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 2]])
    torch.testing.assert_close(estimate_transition(said, label, 2, smoothing=1e-9), raw)


def test_a_transition_of_probs_is_their_mean_in_each_class():
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [math.nan, math.nan]]).T[None]
    label = torch.tensor([0, 0, 1, 255], dtype=torch.uint8)[None, None]
    expected = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    torch.testing.assert_close(estimate_transition(probs, label, 2, smoothing=1e-9), expected)
    smoothed = torch.tensor([[3.6 / 6, 2.4 / 6], [2.4 / 5, 2.6 / 5]])
    torch.testing.assert_close(estimate_transition(probs, label, 2, smoothing=2.0), smoothed)


@pytest.mark.parametrize("is_soft", [False, True])
def test_cases_of_different_shapes_add_up_voxel_by_voxel(is_soft):
    cases = [draw((1, 3, 4, 5), seed=1), draw((1, 3, 2, 6), seed=2)]
    labels = [classes[0] for _, classes, _, _ in cases]
    said = [x.detach().softmax(1)[0] for x, _, _, _ in cases]
    if not is_soft:
        said = [x.argmax(0, keepdim=True).to(torch.uint8) for x in said]
    together = [torch.cat([x.flatten(1) for x in part], dim=1)[None] for part in (said, labels)]
    torch.testing.assert_close(
        estimate_transition(iter(said), iter(labels), 3), estimate_transition(*together, 3)
    )
    swapped = estimate_transition(said[::-1], labels[::-1], 3)
    torch.testing.assert_close(swapped, estimate_transition(said, labels, 3))


@given(seed=st.integers(0, 2**20), smoothing=st.floats(1e-3, 1e3))
@settings(max_examples=20)
def test_an_estimate_is_a_transition_without_zeros(seed, smoothing):
    logits, classes, _, _ = draw((2, 3, 4, 4, 4), seed)
    for said in (logits.softmax(1), classes, 0 * classes):
        transition = estimate_transition(said, classes, 3, smoothing)
        assert transition.dtype == torch.float32
        assert not transition.requires_grad
        assert (transition > 0).all()
        torch.testing.assert_close(transition.sum(1), torch.ones(3))
        assert forward_ce(logits, classes, transition=transition).isfinite()


def test_the_transition_that_made_the_noise_is_found_again():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (1, 1, 200, 200), generator=generator)
    rows = TRANSITION[label.flatten()]
    said = torch.multinomial(rows, 1, generator=generator).view_as(label)
    found = estimate_transition(said, label, 3)
    torch.testing.assert_close(found, TRANSITION, atol=0.02, rtol=0.0)


def test_a_class_without_a_voxel_is_refused_by_number():
    label = torch.tensor([1, 1, 255, 1], dtype=torch.uint8)[None, None]
    with pytest.raises(InputError, match=r"no voxel of class 0, 2.*hold out more"):
        estimate_transition(torch.zeros_like(label), label, 3)


@pytest.mark.parametrize(
    ("said", "label", "smoothing", "message"),
    [
        (torch.zeros(1, 1, 4).long(), torch.zeros(1, 1, 5).long(), 1.0, r"\(1, 5\).*\(1, 4\)"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 1, 4).long(), 1.0, "C is 2"),
        (torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), 1.0, "I, J, K"),
        (torch.full((1, 1, 4), 2), torch.zeros(1, 1, 4).long(), 1.0, "a prediction has classes"),
        (torch.zeros(1, 1, 4).long(), torch.full((1, 1, 4), 2), 1.0, "a label has classes"),
        (torch.zeros(1, 1, 4).long(), torch.full((1, 1, 4), -1), 1.0, "outside 0 to 1"),
        (torch.full((1, 2, 4), math.nan), torch.zeros(1, 1, 4).long(), 1.0, "not finite"),
        (torch.full((1, 2, 4), -0.5), torch.zeros(1, 1, 4).long(), 1.0, "negative"),
        (torch.zeros(1, 1, 4).long(), torch.zeros(1, 1, 4).long(), 0.0, "smoothing is 0.0"),
        (torch.zeros(2, 1, 4).long(), torch.zeros(1, 1, 4).long(), 1.0, "zip"),
    ],
)
def test_what_no_confusion_can_be_counted_of_is_refused(said, label, smoothing, message):
    with pytest.raises(ValueError, match=message):
        estimate_transition(said, label, 2, smoothing)
