"""What `scripts/draw_features.py` reads of a network, measures and draws."""

import numpy as np
import pytest
import torch
from bright import make_model, write_case

from medssl.predict import prepare_scan


@pytest.fixture
def features(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "scripts")
    import draw_features

    return draw_features


@pytest.fixture
def case(tmp_path):
    return write_case(tmp_path)


@pytest.mark.parametrize("slice_axis", [None, 0, 1, 2])
def test_features_are_what_the_last_layer_takes_voxel_by_voxel(
    features, case, tiny_plan, slice_axis
):
    from robustness.measures import run_whole

    model = make_model(tiny_plan, slice_axis)
    image = prepare_scan(model.info, case.images).image
    read = torch.from_numpy(features.read_features(model, image))
    shape = (1, len(read), *image.shape[2:]) if slice_axis is None else (1, len(read), -1, 1)
    with torch.no_grad():
        logits = model.network.dynunet.output_block(read.reshape(shape))
        whole = run_whole(model, image)
    if slice_axis is not None:
        whole = whole[None].movedim(1, 2 + slice_axis)[0]
    assert torch.allclose(logits.flatten(), whole.flatten(), atol=1e-4)


def test_a_case_gives_as_many_voxels_of_each_class_and_their_patient(features, case, tiny_plan):
    model = make_model(tiny_plan)
    sample = features.sample_case(model, case, None, 7)
    assert np.bincount(sample.classes).tolist() == [7, 7, 7]
    assert set(sample.patients) == {"p"}
    again = features.sample_case(model, case, None, 7)
    assert np.array_equal(again.features, sample.features)

    assert sample.features.shape == (21, 4)


def make_sample(features, spread, num_patients=4):
    rng = np.random.default_rng(0)
    classes = np.tile(np.repeat([0, 1], 15), num_patients)
    patients = np.repeat([f"p{n}" for n in range(num_patients)], 30)
    points = classes[:, None] * np.ones(3) + rng.normal(0, spread, (len(classes), 3))
    return features.Sample(points.astype(np.float32), classes, patients)


def test_neighbors_are_those_of_other_patients(features):
    assert features.measure_purity(make_sample(features, 0.05)) == 1.0
    assert 0.4 < features.measure_purity(make_sample(features, 100.0)) < 0.6
    sample = make_sample(features, 0.05)
    turned = np.where(sample.patients == "p0", 1 - sample.classes, sample.classes)
    lonely = sample._replace(classes=turned)  # alike only within the patient
    assert 0.6 < features.measure_purity(lonely) <= 0.75  # none of p0, most of the others


@pytest.mark.slow
def test_the_picture_has_a_panel_for_each_arm_and_is_the_same_again(features):
    pure = make_sample(features, 0.05)
    title = f"recipe: {features.measure_purity(pure):.3f}"
    samples = {"labels": make_sample(features, 1.0), title: pure}
    picture = features.draw_panels(samples, {0: "background", 1: "organ"})
    assert ">recipe: 1.000<" in picture
    assert picture.count(">organ<") == 1
    assert features.draw_panels(samples, {0: "background", 1: "organ"}) == picture
