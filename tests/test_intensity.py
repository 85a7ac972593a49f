import numpy as np
import torch
from monai.transforms import Compose, Randomizable, Transform

from medssl.transforms.intensity import apply_seeded, build_intensity


class Draw(Randomizable, Transform):
    """Adds what it draws to a patch."""

    def __call__(self, patch):
        return patch + self.R.random_sample()


def test_a_seed_makes_the_same_patch_whatever_was_drawn_before():
    transform, patch = build_intensity(2.0, dimension=2), torch.randn(1, 32, 32)
    first = apply_seeded(transform, patch, 7)
    other = apply_seeded(transform, patch, 8)
    assert torch.equal(apply_seeded(transform, patch, 7), first)
    assert not torch.equal(first, other)
    assert not torch.equal(first, patch)


def test_transforms_draw_apart_from_each_other_and_from_the_geometry():
    one, two = Compose([Draw()]), Compose([Draw(), Draw()])
    pairs = []
    for seed in range(200):
        first = float(apply_seeded(one, torch.zeros(1), seed))
        second = float(apply_seeded(two, torch.zeros(1), seed)) - first
        geometry = np.random.default_rng(seed).random()
        pairs.append((first, second, geometry))
    correlations = np.corrcoef(np.array(pairs).T)
    assert np.abs(correlations - np.eye(3)).max() < 0.25
    assert len({pair[0] for pair in pairs}) == 200
