import math
import typing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.config import FilterSection, ThresholdSection
from medssl.pseudo.gates import trust_voxels
from medssl.pseudo.thresholds import (
    HIGHEST,
    LEAST_GAP,
    RULES,
    ClassThresholds,
    Rule,
    find_surface,
    measure_coverage,
)

NAMES = typing.get_args(ThresholdSection.model_fields["name"].annotation)
# Class 1 has 4/5 of its voxels at 0.9, class 2 has 9/10 of them at 0.95.
FOREGROUND = [(1, 0.9)] * 32 + [(1, 0.6)] * 8 + [(2, 0.95)] * 36 + [(2, 0.5)] * 4
BY_CLASS = ["flex", "free", "soft", "quantile"]
pairs_of_voxels = st.lists(
    st.tuples(st.integers(0, 2), st.floats(0.34, 1.0)), min_size=30, max_size=60
)


def make(name="flex", num_classes=3, **section):
    return ClassThresholds(ThresholdSection(name=name, **section), num_classes)


def voxels(confidences):
    """Return probs (1, C, n, 1, 1) of (class, confidence) pairs; the rest is shared evenly."""
    probs = []
    for chosen, confidence in confidences:
        one = torch.full((3,), (1 - confidence) / 2)
        one[chosen] = confidence
        probs.append(one)
    return torch.stack(probs, 1)[None, :, :, None, None]


def all_valid(probs):
    return torch.ones_like(probs[:, :1], dtype=torch.bool)


def update(thresholds, probs, progress=0.0):
    thresholds.update(probs, all_valid(probs), progress)
    return thresholds.thresholds.tolist()


def test_a_fixed_threshold_stays_at_its_start():
    thresholds = make("fixed", start=0.8, end=0.5)
    probs = voxels([(0, 0.9)])
    assert update(thresholds, probs, 0.0) == update(thresholds, probs, 1.0)
    assert thresholds.thresholds.tolist() == pytest.approx([0.8] * 3)


def test_a_curriculum_falls_linearly_from_start_to_end():
    thresholds = make("curriculum", start=0.9, end=0.7)
    probs = voxels([(0, 0.9)])
    assert update(thresholds, probs, 0.0) == pytest.approx([0.9] * 3)
    assert update(thresholds, probs, 0.5) == pytest.approx([0.8] * 3)
    assert update(thresholds, probs, 1.0) == pytest.approx([0.7] * 3)


def test_without_a_threshold_every_voxel_is_accepted():
    thresholds = make("none")
    probs = voxels([(0, 0.4), (1, 0.5)])
    update(thresholds, probs)
    assert thresholds.accept(probs).all()


def test_flex_lowers_the_threshold_of_the_class_that_the_teacher_is_unsure_of():
    # by hand: class 2 reaches tau = 0.9 with all of its voxels, class 1 with 9 of 10
    probs = voxels([(2, 0.95)] * 30 + [(1, 0.95)] * 36 + [(1, 0.85)] * 4)
    found = update(make(start=0.9), probs)
    assert found[2] == pytest.approx(0.9)
    assert found[1] == pytest.approx(0.9 * 0.9 / (2 - 0.9))


def test_a_background_that_is_sure_everywhere_does_not_switch_the_filter_of_flex_off():
    # by hand: half of class 1 reaches tau, 2 of 5 of class 2; so b = 1 and 0.8
    probs = voxels(
        [(0, 0.99)] * 500 + [(1, 0.95), (1, 0.7)] * 30 + [(2, 0.95)] * 20 + [(2, 0.7)] * 30
    )
    found = update(make(start=0.9), probs)
    assert found == pytest.approx([0.9 * 0.8 / 1.2, 0.9, 0.9 * 0.8 / 1.2])


def test_a_few_sure_voxels_are_not_the_best_class_of_flex():
    probs = voxels([(2, 0.99)] * 3 + [(1, 0.95), (1, 0.7)] * 30)
    assert update(make(start=0.9), probs)[1] == pytest.approx(0.9)


def test_the_background_is_not_stricter_than_any_other_class():
    probs = voxels([(0, 0.99)] * 50 + [(2, 0.95)] * 30 + [(1, 0.95)] * 36 + [(1, 0.85)] * 4)
    found = update(make(start=0.9), probs)
    assert found[0] == min(found)


def test_flex_counts_inside_a_class_so_that_background_does_not_drown_the_rest():
    few = voxels([(0, 0.99)] * 30 + [(1, 0.99)] * 30)
    many = voxels([(0, 0.99)] * 3000 + [(1, 0.99)] * 30)
    assert update(make(), few)[:2] == pytest.approx(update(make(), many)[:2])


def test_a_class_with_too_few_voxels_keeps_its_last_threshold():
    thresholds = make(start=0.9)
    before = thresholds.thresholds[2].item()
    found = update(thresholds, voxels([(0, 0.95)] * 30 + [(2, 0.5)] * 5))
    assert found[2] == before


def test_voxels_that_do_not_count_change_nothing():
    thresholds = make()
    probs = voxels([(0, 0.99)] * 50 + [(1, 0.5)] * 50)
    before = {key: value.clone() for key, value in thresholds.state_dict().items()}
    thresholds.update(probs, torch.zeros_like(probs[:, :1], dtype=torch.bool), 0.0)
    assert all(torch.equal(before[key], value) for key, value in thresholds.state_dict().items())


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.34, 1.0)), min_size=30, max_size=80),
    st.floats(0.0, 1.0),
)
@settings(max_examples=15)
def test_flex_thresholds_stay_between_the_floor_and_the_highest(pairs, progress):
    thresholds = make(start=1.0, end=0.0)
    thresholds.thresholds.fill_(0.7)
    found = torch.tensor(update(thresholds, voxels(pairs), progress))
    assert thresholds.floor - 1e-6 <= found.min()
    assert found.max() <= HIGHEST + 1e-6


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.34, 1.0)), min_size=30, max_size=60))
@settings(max_examples=8)
def test_the_order_of_voxels_plays_no_part(pairs):
    assert update(make(), voxels(pairs)) == update(make(), voxels(pairs[::-1]))


def test_the_floor_is_higher_for_two_classes():
    assert make(num_classes=2).floor == 0.6
    assert make(num_classes=4).floor == pytest.approx(0.45)


def test_counts_and_thresholds_are_in_the_state():
    first, second = make(), make()
    update(first, voxels([(0, 0.99)] * 40 + [(1, 0.6)] * 40))
    second.load_state_dict(first.state_dict())
    probs = voxels([(2, 0.99)] * 30 + [(1, 0.99)] * 30)
    assert update(first, probs) == update(second, probs)
    assert update(make(), probs) != second.thresholds.tolist()


def test_a_voxel_is_judged_by_the_threshold_of_its_class():
    thresholds = make()
    thresholds.thresholds.copy_(torch.tensor([0.9, 0.5, 0.7]))
    accepted = thresholds.accept(voxels([(0, 0.8), (1, 0.8), (2, 0.7), (2, 0.6)]))
    assert accepted.flatten().tolist() == [False, True, True, False]


def test_every_name_of_the_configuration_is_a_rule_and_the_reverse():
    assert sorted(RULES) == sorted(NAMES)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'find_surface' is unknown; .*flex, free, soft, quant"):
        ClassThresholds(ThresholdSection.model_construct(name="find_surface"), 3)


@pytest.mark.parametrize(("lowest", "trusted"), [(lambda section, n: 0.8, 1), (None, 2)])
def test_all_that_is_asked_of_a_rule_stands_beside_it(monkeypatch, lowest, trusted):
    rule = Rule(lambda known, section, t: known.predicted, lowest, find_first=lambda section: 0.5)
    monkeypatch.setitem(RULES, "count", rule)
    section = ThresholdSection.model_construct(name="count", start=0.9, end=0.7)
    thresholds = ClassThresholds(section, 3)
    assert thresholds.thresholds.tolist() == [0.5] * 3
    probs = voxels([(0, 0.9), (2, 0.7)])
    assert update(thresholds, probs) == [1.0, 0.0, 1.0]
    assert thresholds.histogram.sum() == 0
    filters = FilterSection().model_copy(update={"threshold": section})
    assert trust_voxels(probs[0].numpy(), np.zeros((2, 1, 1)), filters).sum() == trusted


def spread(chosen, mean, deviation, count):
    """Return count voxels of a class, half of them a deviation over the mean, half under it."""
    return [(chosen, mean + deviation)] * (count // 2) + [(chosen, mean - deviation)] * (count // 2)


def test_free_follows_the_mean_confidence_of_each_class():
    # by hand: mu = (0.9, 0.8, 0.7), tau = 0.8; T = 0.8 mu / 0.9, background as the lowest
    probs = voxels(spread(0, 0.9, 0.05, 40) + spread(1, 0.8, 0.1, 60) + spread(2, 0.7, 0.1, 20))
    assert update(make("free"), probs) == pytest.approx(
        [0.8 * 0.7 / 0.9, 0.8 * 0.8 / 0.9, 0.8 * 0.7 / 0.9]
    )


def test_a_class_that_is_not_there_plays_no_part_in_the_mean_of_free():
    # by hand: mu = (0.9, 0.7), tau = 0.8; class 2 has too few voxels and stays at 0.95
    probs = voxels([(0, 0.9)] * 40 + [(1, 0.7)] * 40 + [(2, 0.4)] * 10)
    assert update(make("free"), probs)[1:] == pytest.approx([0.8 * 0.7 / 0.9, 0.95])


def test_free_is_clamped_to_the_floor_and_the_highest():
    low = voxels([(0, 0.99)] * 40 + [(1, 0.36)] * 40 + [(2, 0.99)] * 40)
    assert update(make("free"), low)[1] == pytest.approx(1 / 3 + 0.2)
    high = voxels([(0, 0.999)] * 40 + [(1, 0.999)] * 40 + [(2, 0.999)] * 40)
    assert update(make("free"), high) == pytest.approx([HIGHEST] * 3)


def test_soft_is_a_gaussian_under_the_mean_and_one_above_it():
    # by hand: mu = 0.8, sd = 0.1, so the Gaussian has a width of 0.05
    thresholds = make("soft")
    update(thresholds, voxels(spread(1, 0.8, 0.1, 60) + spread(2, 0.9, 0.05, 60)))
    found = thresholds.weigh(voxels([(1, 1.0), (1, 0.8), (1, 0.75), (1, 0.7), (2, 0.85)]))
    wanted = [1.0, 1.0, math.exp(-1 / 2), math.exp(-2), math.exp(-2)]
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-5)
    half = 0.8 - 0.05 * math.sqrt(2 * math.log(2))
    assert thresholds.thresholds[1].item() == pytest.approx(half, abs=1e-6)


def test_soft_weighs_background_like_the_class_with_the_lowest_threshold():
    thresholds = make("soft")
    probs = spread(0, 0.99, 0.005, 500) + spread(1, 0.7, 0.1, 60) + spread(2, 0.9, 0.05, 60)
    update(thresholds, voxels(probs))
    probe = [0.45, 0.55, 0.65, 0.75, 0.95]
    background = thresholds.weigh(voxels([(0, confidence) for confidence in probe]))
    assert torch.equal(background, thresholds.weigh(voxels([(1, c) for c in probe])))
    assert background.flatten()[0] < background.flatten()[1] < background.flatten()[2] < 1


def test_soft_accepts_where_the_weight_is_a_half():
    thresholds = make("soft")
    update(thresholds, voxels(spread(1, 0.8, 0.1, 60) + spread(2, 0.9, 0.05, 60)))
    probs = voxels([(i % 3, 0.34 + 0.013 * i) for i in range(50)])
    weight = thresholds.weigh(probs)
    assert torch.equal(thresholds.accept(probs), weight >= 0.5)
    assert 0 < thresholds.accept(probs).float().mean() < 1


@given(pairs_of_voxels, pairs_of_voxels)
@settings(max_examples=15)
def test_weights_of_soft_are_above_zero_and_do_not_fall_with_confidence(seen, pairs):
    thresholds = make("soft")
    update(thresholds, voxels(seen))
    for chosen in range(3):
        ordered = voxels([(chosen, c) for c in sorted(c for _, c in pairs)])
        weight = thresholds.weigh(ordered).flatten()
        assert weight[0] > 0
        assert weight[-1] <= 1
        assert (weight.diff() >= 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "soft"])
def test_the_weight_of_a_hard_rule_is_what_it_accepts(name):
    thresholds = make(name)
    probs = voxels([(i % 3, 0.34 + 0.011 * i) for i in range(60)] * 2)
    update(thresholds, probs, 0.5)
    weight = thresholds.weigh(probs)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, thresholds.accept(probs).float())


def test_quantile_keeps_the_wanted_share_of_each_class_to_within_a_bin():
    generator = torch.Generator().manual_seed(0)
    doubt = torch.rand(2000, generator=generator) ** 2 * 0.6
    pairs = [(1 + i % 2, 1 - d / (1 + i % 2)) for i, d in enumerate(doubt.tolist())]
    probs = voxels(pairs)
    thresholds = make("quantile", start=0.8, end=0.95)
    confidence, classes = probs.max(1, keepdim=True)
    for progress, share in [(0.0, 0.8), (0.5, 0.875), (1.0, 0.95)]:
        update(thresholds, probs, progress)
        for chosen in (1, 2):
            mine = classes == chosen
            threshold = thresholds.thresholds[chosen]
            bin_above = (confidence < 1 - (1 - threshold) / 1.06) & (confidence >= threshold)
            kept = thresholds.accept(probs)[mine].float().mean().item()
            one_bin = bin_above[mine].float().mean().item()
            assert 0 < one_bin < 0.05
            assert share <= kept < share + one_bin


def test_quantile_has_its_threshold_on_the_lower_edge_of_a_bin():
    # by hand: 8 of 10 voxels are over 0.9, which is in a bin of 6 % of 0.1
    thresholds = make("quantile", start=0.8)
    update(thresholds, voxels([(1, 0.9)] * 80 + [(1, 0.5)] * 20))
    assert 0.9 - 0.006 < thresholds.thresholds[1].item() <= 0.9


def test_a_voxel_on_the_edge_of_a_bin_is_kept_with_it():
    thresholds = make("quantile", start=1.0)
    edge = thresholds.edges[100].item()
    probs = voxels([(1, edge)] * 50 + [(2, edge)] * 50)
    assert update(thresholds, probs) == [edge] * 3
    assert thresholds.accept(probs).all()


def test_quantile_keeps_all_voxels_that_are_equally_confident():
    thresholds = make("quantile", start=0.8)
    probs = voxels([(1, 1.0)] * 90 + [(1, 0.9)] * 10 + [(2, 0.6)] * 50)
    found = update(thresholds, probs)
    assert found[1] == pytest.approx(1 - LEAST_GAP)
    assert thresholds.accept(probs).flatten().tolist() == [True] * 90 + [False] * 10 + [True] * 50


def test_quantile_with_a_share_of_one_keeps_every_voxel():
    probs = voxels([(i % 3, 0.3334 + 0.01 * i) for i in range(66)])
    thresholds = make("quantile", start=1.0)
    update(thresholds, probs)
    assert thresholds.accept(probs).all()


@pytest.mark.parametrize("num_classes", [2, 3, 5, 6, 7, 9, 10, 11])
def test_even_probs_fall_into_the_lowest_bin(num_classes):
    probs = torch.full((1, num_classes, 5, 5, 2), 1 / num_classes)
    thresholds = make("quantile", num_classes)
    update(thresholds, probs)
    assert thresholds.histogram[0, 0].item() == 50


@pytest.mark.parametrize("name", BY_CLASS)
def test_much_background_changes_nothing_of_the_foreground(name):
    few = make(name, start=0.85, end=0.95)
    many = make(name, start=0.85, end=0.95)
    found = update(few, voxels(spread(0, 0.97, 0.02, 40) + FOREGROUND))
    assert found == pytest.approx(update(many, voxels(spread(0, 0.97, 0.02, 3920) + FOREGROUND)))
    probs = voxels([(1, 0.4), (1, 0.9), (2, 0.4), (2, 0.95)])
    assert torch.allclose(few.weigh(probs), many.weigh(probs), atol=1e-4)
    assert many.accept(probs).flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("name", BY_CLASS)
def test_background_has_the_lowest_threshold_of_the_foreground(name):
    probs = voxels(spread(0, 0.98, 0.01, 60) + FOREGROUND)
    found = update(make(name, start=0.85), probs)
    assert found[0] == min(found[1:])
    assert found[1] != found[2]


@pytest.mark.parametrize("name", BY_CLASS)
def test_a_class_that_became_rare_keeps_threshold_and_weights(name):
    thresholds = make(name, start=0.85)
    update(thresholds, voxels(spread(1, 0.8, 0.1, 60) + spread(2, 0.75, 0.1, 20)))
    probe = voxels([(2, 0.4), (2, 0.68), (2, 0.72), (2, 0.9)])
    before = thresholds.thresholds[2].item(), thresholds.weigh(probe).tolist()
    thresholds.predicted[2] = 10.0
    update(thresholds, voxels(spread(1, 0.6, 0.05, 400) + [(2, 0.99)] * 5))
    assert before == (thresholds.thresholds[2].item(), thresholds.weigh(probe).tolist())


@pytest.mark.parametrize("name", ["free", "soft", "quantile"])
def test_until_a_class_has_enough_voxels_it_is_judged_strictly(name):
    thresholds = make(name, start=0.5)
    update(thresholds, voxels([(1, 0.5)] * 10))
    probs = voxels([(1, 0.94), (1, 0.96)])
    assert thresholds.accept(probs).flatten().tolist() == [False, True]
    weight = thresholds.weigh(voxels([(1, 0.95), (1, 1.0)])).flatten().tolist()
    assert weight == pytest.approx([0.5, 1.0] if name == "soft" else [1.0, 1.0])


@pytest.mark.parametrize("name", NAMES)
@given(pairs=pairs_of_voxels)
@settings(max_examples=6)
def test_no_rule_minds_the_order_of_voxels(name, pairs):
    one, other = make(name), make(name)
    found = update(one, voxels(pairs))
    assert found == pytest.approx(update(other, voxels(pairs[::-1])), abs=1e-5)
    assert torch.equal(one.histogram, other.histogram)


@pytest.mark.parametrize("name", ["soft", "quantile"])
def test_the_mean_and_variance_are_those_of_all_voxels_weighted_by_their_age(name):
    thresholds = make(name)
    generator = torch.Generator().manual_seed(0)
    batches = [0.5 + 0.5 * torch.rand(n, generator=generator) ** 0.2 for n in (50, 30, 70)]
    for batch in batches:
        update(thresholds, voxels([(1, c) for c in batch.tolist()]))
    weight = torch.cat([torch.full((len(b),), 0.99 ** (2 - i)) for i, b in enumerate(batches)])
    confidence = torch.cat(batches)
    mean = (weight * confidence).sum() / weight.sum()
    squares = (weight * (confidence - mean) ** 2).sum()
    assert thresholds.mean[1].item() == pytest.approx(mean.item(), abs=1e-6)
    assert thresholds.squares[1].item() == pytest.approx(squares.item(), rel=1e-4)
    assert thresholds.predicted[1].item() == pytest.approx(weight.sum().item())
    counted = weight.sum().item() if name == "quantile" else 0.0  # nobody else asks for it
    assert thresholds.histogram[1].sum().item() == pytest.approx(counted)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_gives_the_same_thresholds_and_weights(name):
    first, second = make(name, end=0.8), make(name, end=0.8)
    update(first, voxels(FOREGROUND), 0.7)
    second.load_state_dict(first.state_dict())
    probe = voxels([(i % 3, 0.4 + 0.01 * i) for i in range(60)])
    assert torch.equal(first.weigh(probe), second.weigh(probe))
    probs = voxels([(1, 0.99)] * 30 + [(2, 0.99)] * 30)
    assert update(first, probs, 0.8) == update(second, probs, 0.8)
    assert torch.equal(first.weigh(probe), second.weigh(probe))
    if name in BY_CLASS:
        assert update(make(name, end=0.8), probs, 0.8) != first.thresholds.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_is_a_volume_of_one_slice(name):
    generator = torch.Generator().manual_seed(0)
    flat = torch.softmax(3 * torch.randn(2, 3, 8, 8, generator=generator), 1)
    valid = torch.rand(2, 1, 8, 8, generator=generator) < 0.8
    planar, solid = make(name), make(name)
    planar.update(flat, valid, 0.5)
    solid.update(flat[..., None], valid[..., None], 0.5)
    assert torch.equal(planar.thresholds, solid.thresholds)
    assert torch.equal(planar.weigh(flat)[..., None], solid.weigh(flat[..., None]))
    assert planar.accept(flat).shape == (2, 1, 8, 8)


def test_the_surface_is_both_sides_of_a_border():
    classes = torch.zeros(1, 1, 6, 3, 3, dtype=torch.long)
    classes[:, :, 3:] = 1
    assert find_surface(classes)[0, 0, :, 1, 1].tolist() == [False, False, True, True, False, False]


def test_coverage_is_counted_per_class_and_on_surfaces():
    classes = torch.zeros(1, 1, 4, 1, 1, dtype=torch.long)
    classes[:, :, 2:] = 1
    accepted = torch.tensor([True, False, True, True])[None, None, :, None, None]
    valid = torch.ones_like(accepted)
    shares = measure_coverage(accepted, classes, valid, ["background", "organ", "absent"])
    assert shares.pop("coverage/absent").isnan()
    assert shares == {
        "coverage": 0.75,
        "coverage_surface": 0.5,
        "coverage/background": 0.5,
        "coverage/organ": 1.0,
    }


def test_coverage_leaves_out_voxels_that_do_not_count():
    classes = torch.zeros(1, 1, 4, 1, 1, dtype=torch.long)
    accepted = torch.tensor([True, False, False, False])[None, None, :, None, None]
    valid = torch.tensor([True, True, False, False])[None, None, :, None, None]
    assert measure_coverage(accepted, classes, valid, ["background"])["coverage"] == 0.5
