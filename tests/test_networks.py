import pytest
import torch
from torch import nn

from medssl.config import InputError
from medssl.machine import has_cpu_bfloat16
from medssl.networks.build import (
    CHANNELS_LAST,
    InstanceNorm,
    NetworkSpec,
    PointwiseConv,
    _replace_pointwise,
    arrange,
    arrange_weights,
    build_network,
)
from medssl.networks.noise import (
    DROPOUTS,
    DropBranch,
    add_stochastic_depth,
    drop_features,
    freeze_encoder,
    sample_dropout,
    silence_noise,
)


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


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(6, 5, 7), (12, 9, 11), (8, 9), (40, 30)])
def test_instance_norm_is_that_of_torch_in_values_and_gradients(size, dtype, is_last):
    generator = torch.Generator().manual_seed(2)
    layout = CHANNELS_LAST[2 + len(size)] if is_last else torch.contiguous_format
    x = (5 + 3 * torch.randn(2, 4, *size, generator=generator)).to(dtype)
    slope = torch.randn(x.shape, generator=generator)
    kind = nn.InstanceNorm3d if len(size) == 3 else nn.InstanceNorm2d
    ours, theirs = InstanceNorm(4), kind(4, affine=True)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_(generator=generator)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for norm in (ours, theirs):
        image = x.contiguous(memory_format=layout).requires_grad_()
        y = norm(image)
        with torch.no_grad():
            still = norm(image)
        (y.float() * slope).sum().backward()
        results.append([y, still, image.grad, norm.weight.grad, norm.bias.grad])
    rtol, atol = (2e-2, 5e-2) if dtype == torch.bfloat16 else (1e-4, 5e-4 if is_last else 1e-4)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("channels", [(1, 16), (4, 8), (5, 3)])
def test_a_pointwise_convolution_is_that_of_torch_in_values_and_gradients(channels, stride, dtype):
    generator = torch.Generator().manual_seed(3)
    conv = nn.Conv2d(*channels, 1, stride).to(dtype)
    results = []
    x = torch.randn(3, channels[0], 13, 10, generator=generator).to(dtype)
    last = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    for module, place in ((conv, x), (PointwiseConv(conv), last)):
        conv.zero_grad()
        image = place.detach().requires_grad_()
        y = module(image)
        (y.float() * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        results.append([y, image.grad, conv.weight.grad.clone(), conv.bias.grad.clone()])
    rtol, atol = (2e-2, 5e-2) if dtype == torch.bfloat16 else (1e-4, 1e-4)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol)


emulated = pytest.mark.skipif(
    not has_cpu_bfloat16(), reason="no native bfloat16: torch convolves in 3D without layouts"
)


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param("dynunet", (1, 1, 16, 16, 16), marks=emulated), ("unet", (1, 1, 64, 64))],
)
def test_features_have_their_channels_last_throughout(tiny_spec, name, size):
    flat = NetworkSpec(name="unet", in_channels=1, num_classes=3, encoder="resnet18")
    network = build_network(tiny_spec if name == "dynunet" else flat).eval()
    layouts = []
    for module in network.modules():
        if isinstance(module, InstanceNorm):
            module.register_forward_hook(lambda m, i, o: layouts.append(is_last(o)))
    with torch.autocast("cpu", torch.bfloat16):
        network(arrange(torch.zeros(size)))
    assert layouts
    assert all(layouts)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_in_2d_lie_as_the_precision_wants_them_and_give_the_same_bits(precision):
    spec = NetworkSpec(
        in_channels=1,
        num_classes=3,
        filters=(4, 8, 16),
        kernels=((3, 3),) * 3,
        strides=((1, 1), (2, 2), (2, 2)),
    )
    network, image = build_network(spec), torch.randn(2, 1, 32, 24)
    dtype = getattr(torch, precision)
    results = []
    for arranged in (None, precision):
        network.zero_grad()
        if arranged is not None:
            arrange_weights(network, arranged)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(arrange(image))
        logits.float().square().sum().backward()
        results.append([logits, *(weight.grad.clone() for weight in network.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    filters = [w for w in network.parameters() if w.ndim == 4 and min(w.shape) > 1]
    assert filters
    assert all(is_last(w) == (precision == "bfloat16") for w in filters)
    arrange_weights(network, "float32")
    assert all(weight.is_contiguous() for weight in network.parameters())


def is_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])


def test_an_encoder_whose_strided_convolutions_cannot_be_replaced_stays_as_it_is():
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, stride=2), nn.Conv2d(4, 4, 1))
    assert not _replace_pointwise(grouped)
    assert type(grouped[1]) is nn.Conv2d
    plain = nn.Sequential(nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, groups=2))
    assert _replace_pointwise(plain)
    assert [type(child) for child in plain] == [PointwiseConv, nn.Conv2d]


def test_weights_of_monai_s_own_network_fit_and_give_the_same_logits(tiny_spec, image):
    network = build_network(tiny_spec).eval()
    plain = build_network(tiny_spec).eval()
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, InstanceNorm):
                setattr(module, name, nn.InstanceNorm3d(child.num_channels, affine=True))
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(image), plain(image), rtol=1e-4, atol=1e-5)


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


def test_a_network_that_is_evaluated_in_between_has_its_modes_again(tiny_spec, image):
    network = build_network(tiny_spec.model_copy(update={"dropout": 0.5}))
    frozen = next(module for module in network.modules() if isinstance(module, DROPOUTS))
    frozen.eval()
    modes = [module.training for module in network.modules()]
    assert len({*modes}) == 2
    with silence_noise(network):
        assert torch.equal(network(image), network(image))
    with sample_dropout(network):
        assert frozen.training
    assert [module.training for module in network.modules()] == modes


def test_mc_dropout_on_a_network_without_dropout_is_an_error(tiny_spec):
    network = build_network(tiny_spec.model_copy(update={"dropout": 0.0}))
    with (
        pytest.raises(InputError, match="no active dropout"),
        sample_dropout(network),
    ):
        pass


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_passes_behind_one_encoder_stop_at_the_lowest_head(tiny_spec, image, deep_supervision):
    spec = tiny_spec.model_copy(update={"deep_supervision": deep_supervision, "dropout": 0.5})
    network = build_network(spec).eval()
    entered = []
    network.dynunet.input_block.register_forward_hook(lambda *_: entered.append(1))
    with torch.no_grad():
        logits, draws = network.forward_passes(image, 5)
        assert torch.equal(logits, network(image))
        for module in (m for m in network.modules() if isinstance(m, DROPOUTS)):
            module.p = 1e-9  # active, and drops nothing: such a pass is a clean one
        heads = network.forward_heads(image)
        (same,) = network.forward_passes(image, 1)[1]
    assert len(entered) == 4, "once for five passes"
    assert len(draws) == 5
    assert not torch.equal(draws[0], draws[1])
    assert torch.allclose(same, heads[-1], atol=1e-5)
    assert {draw.shape for draw in draws} == {heads[-1].shape}
    assert not any(module.training for module in network.modules())


def watch_levels(network, image, *, depth=2):
    """Return what goes down to each level and what the decoder gets, from a forward pass."""
    seen = {}
    layer = network.dynunet.skip_layers
    handles = []
    for level in range(depth):
        below, decoder = layer.next_layer, layer.upsample

        def keep_down(_, inputs, level=level):
            seen["down", level] = inputs[0].clone()

        def keep_up(_, inputs, level=level):
            seen["below", level], seen["skip", level] = (x.clone() for x in inputs)

        handles.append(below.register_forward_pre_hook(keep_down))
        handles.append(decoder.register_forward_pre_hook(keep_up))
        layer = layer.next_layer
    heads = network.forward_heads(image)
    for handle in handles:
        handle.remove()
    return seen, heads


def is_dropped(clean, features, scale):
    """Return (B, C) bool after a check that a channel is either gone or scaled, nothing else."""
    gone = (features == 0).flatten(2).all(2)
    kept = gone.logical_not()
    assert torch.allclose(features[kept], clean[kept] * scale)
    return gone


def test_feature_noise_drops_channels_of_every_skip_and_of_the_bottleneck(network):
    images = torch.randn(12, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    network.eval()
    clean, _ = watch_levels(network, images)
    with drop_features(network, 0.25, torch.Generator().manual_seed(0)):
        noisy, _ = watch_levels(network, images)
    for place in (("skip", 0), ("skip", 1), ("below", 1)):
        gone = is_dropped(clean[place], noisy[place], 4 / 3)
        assert 0.08 < gone.float().mean() < 0.45, place
        assert not torch.equal(gone[0], gone[1])  # each sample has its own draw
    for level in (0, 1):  # the encoder is clean, the decoder's own features have no channel gone
        assert torch.equal(noisy["down", level], clean["down", level])
    assert not (noisy["below", 0] == 0).flatten(2).all(2).any()


def test_feature_noise_in_2d_drops_channels_of_all_that_the_encoder_gives():
    torch.manual_seed(0)
    spec = NetworkSpec(name="unet", encoder="resnet18", in_channels=1, num_classes=3)
    network = build_network(spec).eval()
    seen = []
    decoder = network.smp.decoder
    handle = decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randn(2, 1, 64, 64)
    clean = network(image)
    with drop_features(network, 0.5, torch.Generator().manual_seed(0)):
        noisy = network(image)
    handle.remove()
    assert not torch.equal(clean, noisy)
    before, after = seen
    assert torch.equal(before[0], after[0])  # the image
    for one, other in zip(before[1:], after[1:], strict=True):
        gone = is_dropped(one, other, 2.0)
        assert 0.2 < gone.float().mean() < 0.8
        assert not torch.equal(gone[0], gone[1])


def test_freezing_in_2d_is_of_the_first_weights_of_the_encoder():
    spec = NetworkSpec(name="unet", encoder="resnet18", in_channels=1, num_classes=3)
    network = build_network(spec)
    number = freeze_encoder(network, 2)
    frozen = [not weight.requires_grad for weight in network.smp.encoder.parameters()]
    assert 0 < number < sum(weight.numel() for weight in network.smp.encoder.parameters())
    assert frozen == sorted(frozen, reverse=True)
    assert sum(frozen) == pytest.approx(len(frozen) / 3, abs=1)
    assert all(weight.requires_grad for weight in network.smp.decoder.parameters())


def test_every_skip_has_a_draw_of_its_own(tiny_spec):
    wide = tiny_spec.model_copy(update={"filters": (16, 16, 16)})
    network = build_network(wide).eval()
    image = torch.randn(2, 1, 8, 8, 8)
    with drop_features(network, 0.5, torch.Generator().manual_seed(0)):
        seen, _ = watch_levels(network, image)
    places = [("skip", 0), ("skip", 1), ("below", 1)]
    first, second, third = ((seen[p] == 0).flatten(2).all(2) for p in places)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_feature_noise_of_probability_zero_changes_no_bit(network, image):
    network.eval()
    expected = network.forward_heads(image)
    with drop_features(network, 0.0):
        found = network.forward_heads(image)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_feature_noise_reaches_every_head_in_evaluation_and_ends_with_its_context(
    tiny_spec, image, deep_supervision
):
    spec = tiny_spec.model_copy(update={"deep_supervision": deep_supervision})
    network = build_network(spec).eval()
    before = network.forward_heads(image)
    with drop_features(network, 0.5):
        first, second = network.forward_heads(image), network.forward_heads(image)
    after = network.forward_heads(image)
    assert len(before) == 1 + deep_supervision
    for level in range(len(before)):
        assert first[level].isfinite().all()
        assert not torch.equal(first[level], before[level])
        assert not torch.equal(first[level], second[level])
        assert torch.equal(after[level], before[level])
    assert not any(module.training for module in network.modules())


def test_feature_noise_acts_in_training_and_lets_gradients_to_every_weight(tiny_spec, image):
    network = build_network(tiny_spec.model_copy(update={"dropout": 0.0})).train()
    clean = network(image)
    with drop_features(network, 0.5):
        heads = network.forward_heads(image)
    assert not torch.equal(heads[0], clean)
    sum(level.square().mean() for level in heads).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    assert all(module.training for module in network.modules())


def test_feature_noise_is_drawn_by_its_generator(network, image):
    network.eval()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(results))
        with drop_features(network, 0.5, torch.Generator().manual_seed(seed)):
            results.append(network(image))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_feature_noise_leaves_no_hook_behind_after_an_error(network, image):
    def count_hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())

    def fail():
        with drop_features(network, 0.5):
            counts.append(count_hooks())
            network(image[:, :, :7])

    counts = [count_hooks()]
    with pytest.raises(RuntimeError, match="size"):
        fail()
    counts.append(count_hooks())
    assert counts == [0, 3, 0]
    network.eval()
    assert torch.equal(network(image), network(image))


def test_feature_noise_does_not_show_in_the_weights_that_are_saved(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with drop_features(network, 0.5):
        during = network.state_dict()
    assert before.keys() == during.keys()
    assert all(torch.equal(before[name], during[name]) for name in before)


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_feature_noise_that_leaves_nothing_is_an_error(network, probability):
    with pytest.raises(ValueError, match=r"\[0, 1\)"), drop_features(network, probability):
        pass


def test_a_network_that_is_no_dynunet_refuses_feature_noise_and_freezing():
    other = nn.Sequential(nn.Conv3d(1, 1, 1))
    with pytest.raises(InputError, match="no encoder"), drop_features(other, 0.5):
        pass
    with pytest.raises(InputError, match="no encoder"):
        freeze_encoder(other, 1)


def test_the_frozen_levels_are_those_next_to_the_input(network):
    # two convolutions of 3 x 3 x 3, two norms with scale and shift, and the residual 1 x 1 x 1
    # convolution with its norm, where channels or the stride change
    first = 27 * 1 * 4 + 27 * 4 * 4 + 2 * (4 + 4) + (1 * 4 + 4 + 4)
    second = 27 * 4 * 8 + 27 * 8 * 8 + 2 * (8 + 8) + (4 * 8 + 8 + 8)
    assert freeze_encoder(network, 0) == 0
    assert all(p.requires_grad for p in network.parameters())
    assert freeze_encoder(network, 1) == first
    assert freeze_encoder(network, 2) == first + second
    frozen = {name for name, p in network.dynunet.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen if "skip_layers" not in name} == {
        "input_block",
        "downsamples",
    }


def test_a_step_moves_every_weight_but_the_frozen_ones(network, image):
    freeze_encoder(network, 2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    sum(level.square().mean() for level in network.forward_heads(image)).backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert any(parameter.requires_grad for parameter in network.parameters())


def test_the_bottleneck_is_the_last_level_that_can_be_frozen(network):
    freeze_encoder(network, 3)
    assert not any(p.requires_grad for p in network.dynunet.bottleneck.parameters())
    for levels in (4, -1):
        with pytest.raises(InputError, match=f"frozen_levels={levels}: the encoder has 3 levels"):
            freeze_encoder(network, levels)
