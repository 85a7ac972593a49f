import pytest
import torch
from torch import nn

from medssl.config import InputError
from medssl.networks.build import build_network
from medssl.networks.noise import DropBranch, add_stochastic_depth, sample_dropout


@pytest.fixture
def network(tiny_spec):
    torch.manual_seed(0)
    return build_network(tiny_spec)


@pytest.fixture
def image():
    return torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def survivals(network):
    return [m.survival for m in network.modules() if isinstance(m, DropBranch)]


def test_heads_give_logits_of_every_class_from_full_resolution_downwards(network, image):
    shapes = [tuple(level.shape) for level in network.forward_heads(image)]
    assert shapes == [(2, 3, 8, 8, 8), (2, 3, 4, 4, 4)]


def test_the_first_head_is_what_the_network_predicts(network, image):
    network.eval()
    assert torch.equal(network.forward_heads(image)[0], network(image))


def test_without_deep_supervision_there_is_one_head(tiny_spec, image):
    network = build_network(tiny_spec.model_copy(update={"deep_supervision": False}))
    assert len(network.forward_heads(image)) == 1


def test_anisotropic_strides_and_kernels_keep_the_shape_of_the_scan(tiny_spec):
    flat = {
        "strides": ((1, 1, 1), (2, 2, 1), (2, 2, 2)),
        "kernels": ((3, 3, 1), (3, 3, 3), (3, 3, 3)),
    }
    network = build_network(tiny_spec.model_copy(update=flat))
    assert network(torch.randn(1, 1, 12, 8, 6)).shape == (1, 3, 12, 8, 6)


def test_every_weight_gets_a_gradient(network, image):
    sum(level.square().mean() for level in network.forward_heads(image)).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []


def test_the_same_seed_builds_the_same_weights_and_another_seed_does_not(tiny_spec):
    def build(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_network(tiny_spec).parameters()])

    assert torch.equal(build(3), build(3))
    assert not torch.equal(build(3), build(4))


def test_dropout_acts_in_training_and_not_in_evaluation(network, image):
    network.train()
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


def test_dropout_is_never_on_logits_nor_at_full_resolution(network):
    places = [n for n, m in network.named_modules() if isinstance(m, nn.Dropout3d) and m.p > 0]
    assert places
    assert not [n for n in places if "output_block" in n or "super_head" in n]
    assert not [n for n in places if "input_block" in n or n.startswith("dynunet.upsamples.1")]


def test_no_batch_statistics_are_kept_that_would_mix_labeled_and_unlabeled(network):
    assert not [name for name, _ in network.named_buffers() if "running" in name]


def test_survival_falls_linearly_from_the_input_to_the_last_block(tiny_spec):
    network = build_network(tiny_spec.model_copy(update={"stochastic_depth": 0.7}))
    found = survivals(network)
    assert found == pytest.approx([0.9, 0.8, 0.7])


def test_a_network_without_residual_blocks_refuses_stochastic_depth():
    with pytest.raises(InputError, match="no residual block"):
        add_stochastic_depth(nn.Sequential(nn.Conv3d(1, 1, 1)), 0.8)


def test_a_dropped_branch_is_zero_per_sample_and_survivors_are_scaled():
    torch.manual_seed(0)
    result = DropBranch(0.8).train()(torch.ones(2000, 1, 2, 1, 1))
    per_sample = result.flatten(1)
    assert torch.equal(per_sample[:, 0], per_sample[:, 1])
    assert set(per_sample.unique().tolist()) == {0.0, 1.25}
    assert result.mean().item() == pytest.approx(1.0, abs=0.05)


def test_a_branch_is_never_dropped_in_evaluation():
    branch = torch.ones(100, 1, 1, 1, 1)
    assert torch.equal(DropBranch(0.1).eval()(branch), branch)


def test_mc_dropout_varies_between_passes_and_leaves_the_mode_as_it_was(network, image):
    network.eval()
    with sample_dropout(network):
        first, second = network(image), network(image)
    assert not torch.equal(first, second)
    assert not any(module.training for module in network.modules())


def test_mc_dropout_leaves_stochastic_depth_off(tiny_spec):
    network = build_network(tiny_spec.model_copy(update={"stochastic_depth": 0.5}))
    with sample_dropout(network):
        branches = [m for m in network.modules() if isinstance(m, DropBranch)]
        assert branches
        assert not any(branch.training for branch in branches)


def test_mc_dropout_on_a_network_without_dropout_is_an_error(tiny_spec):
    network = build_network(tiny_spec.model_copy(update={"dropout": 0.0}))
    with (
        pytest.raises(InputError, match="no active dropout"),
        sample_dropout(network),
    ):
        pass
