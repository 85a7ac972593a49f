import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from medssl.config import FilterSection
from medssl.pseudo.gates import (
    Expectation,
    expect_from,
    judge_model,
    measure_confidence,
    review_case,
    sum_classes,
)

NAMES = {0: "background", 1: "organ", 2: "lesion"}
EXPECTATION = Expectation(presence={1: 1.0, 2: 0.4}, share={1: 0.2, 2: 0.05})


def one_hot(classes, confidence=0.99):
    probs = np.full((3, *classes.shape), (1 - confidence) / 2, np.float32)
    np.put_along_axis(probs, classes[None], confidence, axis=0)
    return probs


def classes_of(organ=20, lesion=5):
    """Return a map of 100 voxels with so many of each class."""
    classes = np.zeros(100, np.int64)
    classes[:organ] = 1
    classes[organ : organ + lesion] = 2
    return classes.reshape(10, 10, 1)


def review(
    classes=None,
    confidence=0.99,
    doubt=0.0,
    agreement=None,
    probs=None,
    expectation=EXPECTATION,
    **section,
):
    classes = classes_of() if classes is None else classes
    probs = one_hot(classes, confidence) if probs is None else probs
    uncertainty = np.full(classes.shape, doubt, np.float32)
    return review_case(
        "a",
        [(probs[:, :3], uncertainty[:3]), (probs[:, 3:], uncertainty[3:])],
        {} if agreement is None else {"organ": agreement},
        0.5,
        NAMES,
        expectation,
        FilterSection(**section),
    )


def confidence_of(probs, usual):
    sums = sum_classes([(probs, np.zeros(probs.shape[1:], np.float32))], FilterSection())
    return measure_confidence(sums, usual)


def judge(*reviews):
    return judge_model(reviews, EXPECTATION, NAMES)


def test_labeled_cases_lead_one_to_expect_presence_and_share():
    labels = [classes_of(20, 10).astype(np.uint8), classes_of(40, 0).astype(np.uint8)]
    found = expect_from(labels, 3)
    assert found.presence == {1: 1.0, 2: 0.5}
    assert found.share == pytest.approx({1: 0.3, 2: 0.05})


def test_the_memory_of_expectations_is_that_of_the_largest_structure():
    label = np.zeros((120, 110, 100), np.uint8)
    label[40:60, 40:60, 40:60] = 1
    label[70:80, 40:60, 40:60] = 2
    tracemalloc.start()
    assert expect_from([label], 3).single == {1, 2}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < label.size, "bytes"


def test_voxels_that_nobody_annotated_count_nowhere():
    whole = classes_of(20, 10).astype(np.uint8)
    tenth = whole.copy()
    tenth.reshape(-1)[np.arange(100) % 10 > 0] = 255  # 2, 1 and 7 voxels are left
    nothing = np.full_like(whole, 255)
    found = expect_from([whole, tenth, nothing], 3)
    assert found.share == pytest.approx({1: 0.2, 2: 0.1})
    assert found.presence == {1: 1.0, 2: 1.0}
    assert not found.has_empty
    nothing_known = Expectation({1: 0.0, 2: 0.0}, {1: 0.0, 2: 0.0}, num_cases=0)
    assert expect_from([nothing], 3) == nothing_known


def test_labels_are_looked_at_one_after_the_other():
    alive = []

    def draw():
        for _ in range(3):
            label = classes_of().astype(np.uint8)
            alive.append(weakref.ref(label))
            assert sum(r() is not None for r in alive) <= 2, "this one, and the loop's last"
            yield label
            del label

    assert expect_from(draw(), 3).share == pytest.approx({1: 0.2, 2: 0.05})


def test_an_empty_pseudo_label_is_believed_where_labeled_cases_are_empty_too():
    healthy, ill = classes_of(0, 0).astype(np.uint8), classes_of(20, 5).astype(np.uint8)
    expectation = expect_from([healthy, ill], 3)
    assert expectation.has_empty
    assert review(classes_of(0, 0), expectation=expectation).accepted
    assert review(np.ones((10, 10, 1), np.int64), expectation=expectation).reason
    assert not expect_from([ill], 3).has_empty


def test_a_good_pseudo_label_is_accepted_with_its_numbers():
    found = review()
    assert found.accepted
    assert found.reason == ""
    assert found.volume_ml == {"organ": 10.0, "lesion": 2.5}
    assert found.share == pytest.approx({1: 0.2, 2: 0.05})
    assert found.coverage == 1.0
    assert found.coverage_per_class == {"organ": 1.0, "lesion": 1.0}
    organ = 2 * 20 * 0.99 / (20 * 0.99 + 80 * 0.005 + 20)
    assert found.confidence == pytest.approx(organ, abs=1e-4)


def test_an_empty_pseudo_label_is_refused():
    assert review(classes_of(0, 0)).reason == "empty"


def test_a_pseudo_label_of_one_class_everywhere_is_refused():
    assert review(classes_of(100, 0)).reason == "constant: all organ"


def test_a_case_that_lost_an_expected_class_is_refused_and_names_it():
    found = review(classes_of(0, 5))
    assert not found.accepted
    assert found.reason == "lost organ"


def test_a_class_that_few_labeled_cases_have_may_be_absent():
    assert review(classes_of(20, 0)).accepted


def test_a_case_under_the_least_confidence_is_refused_with_both_numbers():
    found = review(confidence=0.5, case={"confidence": 0.6})
    organ = 2 * 20 * 0.5 / (20 * 0.5 + 80 * 0.25 + 20)
    assert found.reason == f"confidence {organ:.2f} is below 0.6"


def test_confidence_is_the_dice_that_a_teacher_expects_of_its_own_mask():
    probs = np.zeros((2, 4, 1, 1), np.float32)
    probs[1, :, 0, 0] = [0.9, 0.7, 0.4, 0.1]
    probs[0] = 1 - probs[1]
    assert confidence_of(probs, {1}) == pytest.approx(2 * (0.9 + 0.7) / (2.1 + 2), abs=1e-6)


def test_confidence_counts_doubt_outside_of_the_mask_and_not_the_sure_background():
    classes = classes_of(20, 0)
    probs = one_hot(classes, 1.0)
    assert confidence_of(probs, {1}) == pytest.approx(1.0, abs=1e-6)
    outside = classes == 0
    probs[1, outside], probs[0, outside] = 0.45, 0.55
    found = confidence_of(probs, {1})
    assert found == pytest.approx(2 * 20 / (20 + 0.45 * 80 + 20), abs=1e-5)
    assert probs.max(0).mean() > found  # which a mean of the largest probs does not see


def test_a_case_in_slabs_is_reviewed_as_a_whole():
    rng = np.random.default_rng(0)
    probs = np.moveaxis(rng.dirichlet(np.ones(3), (9, 8, 7)), -1, 0).astype(np.float32)
    doubt = rng.random((9, 8, 7)).astype(np.float32)
    section = FilterSection(threshold={"name": "fixed", "start": 0.5})
    classes = probs.argmax(0)
    trusted = (probs.max(0) >= 0.5) & (doubt < 0.75 * np.log(2))
    parts = [(probs[:, a : a + 2], doubt[a : a + 2]) for a in range(0, 9, 2)]
    found = review_case("a", iter(parts), {}, 0.5, NAMES, EXPECTATION, section)
    assert found.coverage == trusted.mean()
    assert found.coverage_per_class["lesion"] == trusted[classes == 2].mean()
    assert found.volume_ml["organ"] == (classes == 1).sum() * 0.5
    assert found.share[2] == (classes == 2).mean()
    assert found.uncertainty == pytest.approx(doubt[classes > 0].mean(), rel=1e-6)
    inside, organ = classes == 1, probs[1].astype(np.float64)
    expected = 2 * organ[inside].sum() / (organ.sum() + inside.sum())
    assert found.confidence == pytest.approx(expected, rel=1e-12)


def test_confidence_is_that_of_the_least_certain_class_of_those_that_are_usual():
    classes = classes_of(20, 5)
    probs = one_hot(classes, 1.0)
    probs[:, classes == 2] = np.array([0.3, 0.3, 0.4], np.float32)[:, None]
    lesion = 2 * 5 * 0.4 / (5 * 0.4 + 5)
    organ = 2 * 20 / (20 + 5 * 0.3 + 20)
    assert confidence_of(probs, {1, 2}) == pytest.approx(lesion, abs=1e-5)
    assert confidence_of(probs, {1}) == pytest.approx(organ, abs=1e-5)
    assert confidence_of(probs, set()) == pytest.approx(lesion, abs=1e-5)
    assert review(classes, probs=probs).confidence == pytest.approx(organ, abs=1e-5)


def test_confidence_without_foreground_is_that_of_the_background():
    assert review(classes_of(0, 0)).confidence == pytest.approx(2 * 99 / 199, abs=1e-4)


def test_uncertain_voxels_are_not_covered_unless_that_filter_is_off():
    doubt = 0.8 * np.log(2)
    assert review(doubt=doubt).coverage == 0.0
    assert review(doubt=doubt, uncertainty={"start": None}).coverage == 1.0
    assert review(doubt=doubt, uncertainty={"source": "none"}).coverage == 1.0


@pytest.mark.parametrize(
    ("name", "start", "end", "covered"),
    [
        ("none", 0.95, 0.7, 1.0),
        ("flex", 0.95, 0.95, 1.0),  # of an unsure class it goes down to 1/3 + 0.2
        ("curriculum", 0.95, 0.7, 1.0),
        ("curriculum", 0.7, 0.95, 1.0),
        ("curriculum", 0.95, 0.9, 0.0),
        ("fixed", 0.95, 0.7, 0.0),
    ],
)
def test_coverage_is_under_the_lowest_threshold_that_a_student_may_meet(name, start, end, covered):
    threshold = {"name": name, "start": start, "end": end}
    assert review(confidence=0.8, threshold=threshold).coverage == covered


def test_a_row_of_the_review_holds_plain_columns():
    row = review(agreement=0.75).to_row()
    assert row["accepted"] == 1
    assert row["agreement"] == 0.75
    assert row["coverage/organ"] == 1.0
    assert row["volume_ml/lesion"] == 2.5
    assert not any(isinstance(value, dict) for value in row.values())


def test_labels_of_parts_of_scans_say_nothing_of_the_least_share():
    label = classes_of(20, 10).astype(np.uint8)
    label[9:] = 255
    whole, partial = (expect_from([case], 3) for case in (classes_of(20, 10), label))
    assert (whole.is_partial, partial.is_partial) == (False, True)
    few = review(classes_of(2, 1))
    assert not judge_model([few], whole, NAMES).passed
    assert judge_model([few], partial, NAMES).passed
    assert not judge_model([review(classes_of(0, 100))], partial, NAMES).passed


def test_empty_masks_that_stop_a_run_come_with_the_way_out():
    gate = judge(review(classes_of(0, 0)))
    assert "empty); if scans without any structure are to be expected" in gate.reasons[0]
    lost = judge(review(classes_of(0, 5)))
    assert "lost organ); if scans without it are to be expected" in lost.reasons[0]
    assert "to be expected" not in judge(review(confidence=0.1)).reasons[0]


def test_a_model_with_good_pseudo_labels_passes():
    gate = judge(review(agreement=0.9), review(agreement=0.8))
    assert gate.passed
    assert gate.reasons == ()


def test_a_model_passes_where_there_is_no_unlabeled_case_and_says_so():
    gate = judge()
    assert gate.passed
    assert "no unlabeled case" in gate.reasons[0]


def test_a_model_fails_if_most_of_its_pseudo_labels_were_refused():
    refused = review(classes_of(0, 5))
    assert judge(review(), refused, review(), review()).passed
    gate = judge(review(), refused, refused)
    assert not gate.passed
    assert "2 of 3 pseudo-labels were refused (2 lost organ)" in gate.reasons[0]


def test_reasons_that_differ_in_a_number_alone_are_counted_as_one():
    unsure = [
        replace(review(), accepted=False, reason=f"confidence 0.{number} is below 0.3")
        for number in (11, 12, 25)
    ]
    lost = review(classes_of(0, 5))
    gate = judge(review(), *unsure, lost)
    assert "(3 with a confidence below 0.3, 1 lost organ); give it more" in gate.reasons[0]


@pytest.mark.parametrize(("share", "passes"), [(0.03, False), (0.05, True), (0.9, True)])
def test_a_model_fails_if_a_class_covers_under_a_fifth_of_its_labeled_share(share, passes):
    assert judge(replace(review(), share={1: share, 2: 0.05})).passed is passes


def test_a_model_fails_if_a_class_floods_the_volume():
    gate = judge(replace(review(), share={1: 0.2, 2: 0.3}))
    assert not gate.passed
    assert "lesion covers 30.000% of the volumes, 5.000% in labeled cases" in gate.reasons


def judge_by(labels, reviews, voxel_ml=None):
    """Return the verdict on reviews of what labels lead one to expect."""
    expectation = expect_from([label.astype(np.uint8) for label in labels], 3, voxel_ml)
    return judge_model([r(expectation) for r in reviews], expectation, NAMES)


def mask(*counts, **given):
    """Return what reviews a pseudo-label with so many voxels of each class."""
    return lambda expectation: replace(
        review(classes_of(*counts), expectation=expectation), **given
    )


@pytest.mark.parametrize(
    ("num_labels", "lacking", "passes"),
    [(4, 6, True), (4, 7, False), (2, 8, True), (1, 8, True), (1, 9, False), (1, 10, False),
     (4, 10, False), (6, 5, True), (7, 5, True), (7, 6, False), (30, 6, False)],
)  # fmt: skip
@pytest.mark.parametrize("lost", [(20, 0), (0, 0)])
def test_as_many_scans_may_lack_a_class_as_the_labels_leave_open(num_labels, lacking, passes, lost):
    reviews = [mask(*lost)] * lacking + [mask(20, 5)] * (10 - lacking)
    gate = judge_by([classes_of(20, 5)] * num_labels, reviews)
    assert gate.passed is passes, gate.reasons
    assert passes or f"{lacking} of 10 pseudo-labels were refused" in gate.reasons[0]


def test_scans_without_a_class_excuse_no_other_reason():
    unsure = mask(20, 5, accepted=False, reason="confidence 0.10 is below 0.3")
    labels = [classes_of(20, 5)] * 4
    lost, good = mask(20, 0), mask(20, 5)
    assert judge_by(labels, [lost] * 5 + [unsure] * 2 + [good] * 3).passed
    assert not judge_by(labels, [lost] * 5 + [unsure] * 3 + [good] * 2).passed
    assert not judge_by(labels, [lost] * 6 + [unsure] * 4).passed


def test_a_share_is_judged_by_labels_without_the_one_that_is_unlike_the_others():
    usual, huge = classes_of(20, 1), classes_of(20, 60)
    assert judge_by([usual, usual, usual, huge], [mask(20, 1)]).passed
    assert not judge_by([usual, huge, huge, huge], [mask(20, 1)]).passed
    assert not judge_by([usual] * 40 + [huge] * 40, [mask(20, 1)]).passed
    assert not judge_by([usual] * 4, [mask(20, 30)]).passed


@pytest.mark.parametrize(("voxel_ml", "passes"), [(None, False), ([0.05] * 4, True)])
def test_a_structure_of_the_usual_volume_may_fill_another_share_of_a_larger_scan(voxel_ml, passes):
    wide = mask(3, 3)  # in ten times the volume: voxels of 0.5 ml
    assert judge_by([classes_of(20, 10)] * 4, [wide], voxel_ml).passed is passes
    assert not judge_by([classes_of(20, 10)] * 4, [mask(1, 90)], voxel_ml).passed


def test_labels_of_parts_of_scans_say_nothing_of_a_volume():
    part = classes_of(20, 10).astype(np.uint8)
    part[9:] = 255
    assert expect_from([part], 3, [0.5]).volume_range == {}
    assert expect_from([classes_of(20, 10)], 3, [0.5]).volume_range == {1: (10, 10), 2: (5, 5)}


def test_a_class_that_no_labeled_case_has_is_not_judged():
    expectation = Expectation(presence={1: 1.0, 2: 0.0}, share={1: 0.2, 2: 0.0})
    assert judge_model([review()], expectation, NAMES).passed


def test_a_model_fails_if_it_contradicts_the_round_before():
    gate = judge(review(agreement=0.1), review(agreement=0.3))
    assert not gate.passed
    assert "mean Dice 0.20" in gate.reasons[0]


def test_the_chain_from_a_dead_network_to_a_perfect_agreement_is_cut():
    dead = review(classes_of(0, 0), agreement=1.0)
    gate = judge(dead, dead)
    assert not gate.passed
    assert "empty" in gate.reasons[0]


@pytest.mark.parametrize(("dice", "passes"), [(None, True), (0.9, True), (0.2, False)])
def test_a_model_that_its_own_student_contradicts_fails(dice, passes):
    gate = judge_model([review()], EXPECTATION, NAMES, dice)
    assert gate.passed == passes
    assert passes or "0.20 of student and average" in gate.reasons[0]


def test_a_class_that_is_not_there_is_neither_trusted_nor_distrusted():
    found = review(classes_of(20, 0))
    assert found.coverage_per_class == {"organ": 1.0, "lesion": None}
    assert found.to_row()["coverage/lesion"] is None


def test_classes_that_neither_round_has_do_not_hide_a_contradiction():
    agreement = {"organ": 0.1, "lesion": None}
    probs = one_hot(classes_of())
    found = review_case(
        "a", [(probs, np.zeros((10, 10, 1), np.float32))], agreement, 0.5, NAMES, EXPECTATION,
        FilterSection(),
    )  # fmt: skip
    assert found.agreement == 0.1
    assert found.to_row()["agreement/lesion"] is None
    assert "mean Dice 0.10" in " ".join(judge(found).reasons)
    nothing = replace(found, agreement=None)
    assert "mean Dice" not in " ".join(judge(nothing).reasons)
