"""model.py against hand-computed numbers, torch's own functions, and the paper's equations."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import encoders
import fused
import model
from model import LIF, SNN_VGG9_BNTT, SNN_VGG11_BNTT, PoissonGen, SpikingVGG, SurrogateSpike

ORDERS = ["integrate_first", "fire_first"]
SMALLEST = {"vgg9": 8, "vgg11": 16}
BUILD = {"vgg9": SNN_VGG9_BNTT, "vgg11": SNN_VGG11_BNTT}


def vgg9(num_steps=2, **options):
    """A small net for the tests that are not about numbers."""
    return SNN_VGG9_BNTT(num_steps, img_size=8, **options)


def seeded(function, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def random_images(batch=3, size=8, channels=3, seed=1):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def run_lif(lif, currents):
    """Feed one neuron a list of currents; return its spikes and its membrane after every step."""
    membrane, spikes, membranes = None, [], []
    for current in currents:
        spike, membrane = lif(torch.tensor([current]), membrane)
        spikes.append(spike.item())
        membranes.append(membrane.item())
    return spikes, membranes


# ---- Neuron ----------------------------------------------------------------------------------


def test_lif_integrate_first_by_hand():
    # u before firing: 0.75 | 0.375 + 1 = 1.375 | 0.1875 + 0.8125 = 1 | 0.5 + 2 = 2.5 | 0.75 | 0.375 + 0.75 = 1.125
    spikes, membranes = run_lif(LIF(leak=0.5), [0.75, 1.0, 0.8125, 2.0, 0.0, 0.75])
    assert spikes == [0, 1, 0, 1, 0, 1]
    assert membranes == [0.75, 0.375, 1.0, 1.5, 0.75, 0.125]


def test_lif_fire_first_by_hand():
    # Step 3 fires from u = 2 and keeps 0.5 * 2 + 1 - 1 = 1: a leaked reset would leave 1.5.
    spikes, membranes = run_lif(LIF(leak=0.5, spike_order="fire_first"), [1.0, 1.5, 1.0, 1.25, 0.25, 0.0])
    assert spikes == [0, 0, 1, 0, 1, 0]
    assert membranes == [1.0, 2.0, 1.0, 1.75, 0.125, 0.0625]


def test_lif_resets_by_its_threshold():
    spikes, membranes = run_lif(LIF(leak=0.5, threshold=2.0), [1.5, 2.25, 4.5])
    assert spikes == [0, 1, 1]
    assert membranes == [1.5, 1.0, 3.0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
def test_lif_does_not_fire_at_the_threshold_itself(order, threshold):
    lif = LIF(leak=1.0, threshold=threshold, spike_order=order)
    assert run_lif(lif, [threshold, 0.0]) == ([0, 0], [threshold, threshold])


def test_lif_without_leak_keeps_its_membrane():
    assert run_lif(LIF(leak=1.0), [0.25, 0.25, 0.25])[1] == [0.25, 0.5, 0.75]


def test_lif_returns_spikes_in_the_dtype_of_the_current_and_a_float32_membrane():
    spikes, membrane = LIF(leak=0.5)(torch.tensor([[2.0]], dtype=torch.bfloat16))
    assert (spikes.dtype, membrane.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("order", ORDERS)
def test_lif_reset_is_not_rounded_to_the_dtype_of_the_spikes(order):
    lif = LIF(leak=1.0, threshold=0.7, spike_order=order)
    currents = [0.0, 1.0] + [0.0] * (order == "fire_first")
    _, membrane = lif(torch.tensor(currents, dtype=torch.bfloat16), torch.tensor(0.0))
    assert membrane.item() == pytest.approx(0.3, abs=1e-6)


def test_surrogate_spike_is_one_above_zero_and_zero_elsewhere():
    v = torch.tensor([-2.0, -1e-7, 0.0, 1e-7, 0.5, 2.0])
    assert SurrogateSpike.apply(v).tolist() == [0, 0, 0, 1, 1, 1]


def test_surrogate_gradient_is_the_triangle_of_eq_8():
    v = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    incoming = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(SurrogateSpike.apply(v), v, incoming)
    expected = torch.tensor([0.0, 0.0, 0.15, 0.3, 2 * 0.225, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


def test_spike_gradient_of_a_neuron_holds_one_over_threshold():
    current = torch.tensor([1.0, 2.0, 2.5, 5.0], dtype=torch.float64, requires_grad=True)
    spikes, _ = LIF(leak=0.5, threshold=2.0)(current[None])
    (grad,) = torch.autograd.grad(spikes.sum(), current)
    # 0.3 * (1 - |u / 2 - 1|) / 2
    expected = torch.tensor([0.075, 0.15, 0.1125, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("order", ORDERS)
def test_reset_carries_no_gradient(order):
    lif = LIF(leak=0.5, spike_order=order)
    current = torch.tensor([1.0, 0.2], requires_grad=True)
    before = torch.tensor([1.25, 0.5], requires_grad=True)  # the first neuron fires in either order
    spikes, after = lif(current[None], before)
    grad_current, grad_before = torch.autograd.grad(after.sum(), (current, before))
    assert spikes.tolist() == [[1, 0]]
    assert grad_current.tolist() == [1.0, 1.0]
    assert grad_before.tolist() == [0.5, 0.5]


# ---- Normalisation ---------------------------------------------------------------------------


def norm_input(spatial, step):
    shape = (4, 5, 3, 3) if spatial else (4, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (step + 1) + step


def bntt_with_random_gamma(spatial, norm="bntt", num_steps=3):
    layer = model.NORMS[norm](num_steps, 5, spatial).double()
    for gamma in layer.parameters():
        nn.init.uniform_(gamma, 0.5, 1.5)
    return layer


@pytest.mark.parametrize("spatial", [True, False])
def test_bntt_is_batch_norm_with_its_own_gamma_and_statistics_per_step(spatial):
    layer = bntt_with_random_gamma(spatial)
    mean = [torch.zeros(5, dtype=torch.float64) for _ in range(3)]
    var = [torch.ones(5, dtype=torch.float64) for _ in range(3)]
    for _ in range(2):
        for t in range(3):
            x = norm_input(spatial, t)
            expected = F.batch_norm(x, mean[t], var[t], layer[t].weight, None, training=True, momentum=0.1, eps=1e-4)
            assert torch.equal(layer(x[None], t)[0], expected)
    for t in range(3):
        assert torch.equal(layer[t].running_mean, mean[t])
        assert torch.equal(layer[t].running_var, var[t])
    layer.eval()
    for t in range(3):
        x = norm_input(spatial, t)
        assert torch.equal(layer(x[None], t)[0], F.batch_norm(x, mean[t], var[t], layer[t].weight, None, eps=1e-4))


def test_bntt_step_leaves_the_other_steps_alone():
    layer = bntt_with_random_gamma(spatial=True)
    layer(norm_input(True, 1)[None], 1).square().sum().backward()
    assert [bn.num_batches_tracked.item() for bn in layer] == [0, 1, 0]
    assert [bn.running_mean.any().item() for bn in layer] == [False, True, False]
    assert [bn.weight.grad is not None for bn in layer] == [False, True, False]


@pytest.mark.parametrize("spatial", [True, False])
def test_bntt_starts_with_gamma_one_and_has_no_beta(spatial):
    layer = model.BNTT(2, 5, spatial)
    assert [name for name, _ in layer.named_parameters()] == ["0.weight", "1.weight"]
    assert all(bool((bn.weight == 1).all()) for bn in layer)


@pytest.mark.parametrize("spatial", [True, False])
def test_shared_bn_uses_one_gamma_and_one_set_of_statistics_for_all_steps(spatial):
    layer = bntt_with_random_gamma(spatial, "bn")
    (gamma,) = layer.parameters()
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for t in range(3):
        x = norm_input(spatial, t)
        assert torch.equal(
            layer(x[None], t)[0], F.batch_norm(x, mean, var, gamma, None, training=True, momentum=0.1, eps=1e-4)
        )
    layer.eval()
    for t in range(3):
        x = norm_input(spatial, t)
        assert torch.equal(layer(x[None], t)[0], F.batch_norm(x, mean, var, gamma, None, eps=1e-4))


def test_no_norm_is_the_identity_without_state():
    layer, x = model.NoNorm(3, 5, True), norm_input(True, 2)
    assert torch.equal(layer(x[None], 2)[0], x)
    assert not layer.state_dict()


def test_a_norm_of_ones_own_plugs_in():
    built, called = [], []

    class Halve(nn.Module):
        def forward(self, x, t0=0):
            called.append((len(x), t0))
            return x / 2

    def halve(num_steps, features, spatial):
        built.append((num_steps, features, spatial))
        return Halve()

    net = vgg9(3, norm=halve)
    net(random_images())
    assert built == [(3, f, True) for f in (64, 64, 128, 128, 256, 256, 256)] + [(3, 1024, False)]
    assert called == [(1, 0)] * 8 + [(1, 1)] * 8 + [(1, 2)] * 8
    list(net.stream(random_images(), block=2))
    assert called[24:] == [(2, 0)] * 8 + [(1, 2)] * 8


# ---- Input encoding --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_poisson_gen_is_its_definition_draw_for_draw(dtype):
    images = random_images().to(dtype)
    torch.manual_seed(5)
    spikes = [PoissonGen(images) for _ in range(3)]
    torch.manual_seed(5)
    for drawn in spikes:
        uniform = torch.rand(images.shape, dtype=dtype)
        expected = torch.sign(images) * (2 * uniform <= images.abs()).to(dtype)
        assert drawn.dtype == dtype
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("encoding", ["poisson", "poisson_binary"])
def test_memory_format_does_not_change_the_spikes(encoding):
    images = random_images().abs()
    encoder = encoders.ENCODERS[encoding](1, *images.shape[1:3])
    channels_last = images.to(memory_format=torch.channels_last)
    assert channels_last.stride() != images.stride()
    assert torch.equal(seeded(encoder, images, 2), seeded(encoder, channels_last, 2))


def test_poisson_gen_fires_with_rate_half_the_intensity_and_at_most_one():
    values = torch.tensor([0.0, 0.5, -1.0, 1.5, -2.0, 3.0])
    images = values.view(1, 6, 1, 1).expand(1, 6, 100, 200).contiguous()
    spikes = seeded(PoissonGen, images)
    assert set(spikes.unique().tolist()) == {-1.0, 0.0, 1.0}
    expected = torch.tensor([0.0, 0.25, -0.5, 0.75, -1.0, 1.0])  # 20,000 draws each: deviation 0.0035
    torch.testing.assert_close(spikes.mean((0, 2, 3)), expected, rtol=0, atol=0.015)


def test_binary_encoder_fires_with_rate_equal_to_the_pixel():
    values = torch.tensor([0.0, 0.25, 0.8, 1.0])
    images = values.view(1, 4, 1, 1).expand(1, 4, 100, 200).contiguous()
    spikes = seeded(encoders.BinaryPoissonEncoder(1, 3, 8), images, 1)[0]
    torch.manual_seed(0)
    assert torch.equal(spikes, (torch.rand(images.shape) < images).float())
    torch.testing.assert_close(spikes.mean((0, 2, 3)), values, rtol=0, atol=0.015)


def test_direct_encoder_returns_the_image_at_every_step():
    images = random_images()
    assert all(torch.equal(step, images) for step in encoders.DirectEncoder(5, 3, 8)(images, 5))


def test_frame_encoder_shows_frame_t_at_step_t():
    frames = torch.randn(2, 4, 2, 8, 8)
    encoder = encoders.FrameEncoder(4, 2, 8)
    assert encoder.input_shape == (4, 2, 8, 8)
    assert all(torch.equal(encoder(frames, 4)[t], frames[:, t]) for t in range(4))


def test_pixel_encoder_reads_row_by_row():
    images = torch.arange(18.0).view(2, 1, 3, 3)
    seen = encoders.PixelEncoder(9, 1, 3)(images, 9)
    assert seen.shape == (9, 2, 1, 1, 1)
    assert seen[:, 0].flatten().tolist() == list(range(9))
    assert seen[:, 1].flatten().tolist() == list(range(9, 18))


def test_pixel_encoder_needs_a_step_for_every_pixel():
    with pytest.raises(ValueError, match="need num_steps 64"):
        SpikingVGG("fc3", 25, img_size=8, in_channels=1, encoding="pixels")


def test_permuted_pixels_are_the_same_pixels_in_one_other_order():
    images = torch.arange(64.0).view(1, 1, 8, 8)
    orders = []
    for seed in (0, 1):  # of the run: the order does not depend on it
        encoder = seeded(encoders.PermutedPixelEncoder, 64, 1, 8, seed=seed)
        orders.append(encoder(images, 64).flatten().int().tolist())
    assert orders[0] == orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == list(range(64))


def test_the_permutation_is_in_the_state_dict():
    net = SpikingVGG("fc3", 16, img_size=4, in_channels=1, encoding="pixels_permuted")
    assert sorted(net.state_dict()["encoder.order"].tolist()) == list(range(16))


def test_input_of_the_wrong_shape_for_the_encoder_is_refused():
    net = SpikingVGG("dvs_cnn7", 3, img_size=8, in_channels=2, encoding="frames")
    with pytest.raises(ValueError, match=r"takes images \[B, 3, 2, 8, 8\], got \[2, 2, 8, 8\]"):
        net(torch.zeros(2, 2, 8, 8))


# ---- The nets for event data and for sequential MNIST ----------------------------------------------


def test_frames_that_repeat_an_image_are_direct_encoding():
    images = random_images(channels=2)
    nets = [
        seeded(SpikingVGG, "dvs_cnn7", 3, img_size=8, in_channels=2, encoding=encoding)
        for encoding in ("frames", "direct")
    ]
    assert torch.equal(nets[0](images[:, None].expand(-1, 3, -1, -1, -1)), nets[1](images))


def test_dvs_cnn7_has_seven_weight_layers():
    net = SpikingVGG("dvs_cnn7", 1, img_size=42, in_channels=2, encoding="frames")
    shapes = [tuple(p.shape[:2]) for name, p in net.named_parameters() if name.startswith(("conv", "fc"))]
    convolutions = [(128, 2), (128, 128), (384, 128), (384, 384)]
    assert shapes == [*convolutions, (1024, 384 * 10 * 10), (512, 1024), (10, 512)]


def test_fc3_is_the_papers_net_for_sequential_mnist():
    net = SpikingVGG("fc3", 784, img_size=28, in_channels=1, encoding="pixels")
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if name.startswith("fc")}
    assert shapes == {"fc1.weight": (256, 1), "fc2.weight": (256, 256), "fc3.weight": (10, 256)}
    assert [len(layer.norm) for layer in net.layers()] == [784, 784]


@pytest.mark.parametrize("training", [True, False])
def test_sequential_net_matches_the_equations(training):
    net = seeded(SpikingVGG, "fc3", 16, 0.9, img_size=4, in_channels=1, encoding="pixels").double().train(training)
    pixels = torch.rand(6, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, out, spiked = [0.0, 0.0], 0.0, [0, 0]
    for t in range(16):
        x = pixels[:, t : t + 1]
        for i, (fc, bntt) in enumerate([(net.fc1, net.bntt_fc1[t]), (net.fc2, net.bntt_fc2[t])]):
            current = x @ fc.weight.T
            mean, var = (current.mean(0), current.var(0, unbiased=False)) if training else (0.0, 1.0)
            u[i] = 0.9 * u[i] + bntt.weight * (current - mean) / (var + 1e-4) ** 0.5
            x = (u[i] > 1).double()
            u[i], spiked[i] = u[i] - x, spiked[i] + x.sum()
        out = out + x @ net.fc3.weight.T
    assert spiked[0] > 0
    torch.testing.assert_close(net(pixels.view(6, 1, 4, 4)), out / 16, rtol=1e-12, atol=1e-12)


# ---- The whole net against the equations ---------------------------------------------------------
# Nothing below this line and above `test_net_matches_the_equations` uses model.py.

# (weights, normalisation, pooling window) of each spiking layer; "all" is the global average.
EQUATION_LAYERS = {
    "vgg9": [
        ("conv1", "bntt1", None),
        ("conv2", "bntt2", 2),
        ("conv3", "bntt3", None),
        ("conv4", "bntt4", 2),
        ("conv5", "bntt5", None),
        ("conv6", "bntt6", None),
        ("conv7", "bntt7", 2),
        ("fc1", "bntt_fc", None),
    ],
    "vgg11": [
        ("conv1", "bntt1", 2),
        ("conv2", "bntt2", 2),
        ("conv3", "bntt3", None),
        ("conv4", "bntt4", 2),
        ("conv5", "bntt5", None),
        ("conv6", "bntt6", 2),
        ("conv7", "bntt7", None),
        ("conv8", "bntt8", "all"),
        ("fc1", "bntt_fc", None),
    ],
}


def equation_input(encoding, images):
    if encoding == "direct":
        return images
    uniform = torch.rand(images.shape, dtype=images.dtype)
    if encoding == "poisson":
        return torch.sign(images) * (2 * uniform <= images.abs()).to(images.dtype)
    return (uniform < images).to(images.dtype)


def equation_batch_norm(x, state, key, training):
    """gamma * (x - mean) / sqrt(var + eps); the running statistics in `state` move by a tenth in training."""
    dims = (0, 2, 3) if x.ndim == 4 else (0,)
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
    mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
    if training:
        count = x.numel() / x.shape[1]
        batch_mean = x.mean(dims)
        batch_var = (x - batch_mean.view(shape)).square().mean(dims)
        state[f"{key}.running_mean"] = 0.9 * mean + 0.1 * batch_mean.detach()
        state[f"{key}.running_var"] = 0.9 * var + 0.1 * batch_var.detach() * count / (count - 1)
        state[f"{key}.num_batches_tracked"] = state[f"{key}.num_batches_tracked"] + 1
        mean, var = batch_mean, batch_var
    gamma = state[f"{key}.weight"]
    return gamma.view(shape) * (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-4)


def equation_spikes(u, threshold):
    """1[u > threshold], whose slope in u is 0.3 * max(0, 1 - |u / threshold - 1|) / threshold."""
    distance = u / threshold - 1
    slope = 0.3 * torch.clamp(1 - distance.abs(), min=0).detach()
    line = slope * distance
    return (u > threshold).to(u.dtype) + (line - line.detach())


def equation_net(arch, state, images, num_steps, *, norm, order, encoding, threshold, leak, training):
    """Logits, and the number of spikes of each layer. Updates the running statistics in `state`."""
    layers = EQUATION_LAYERS[arch]
    u = {name: None for name, _, _ in layers}
    spike_count = dict.fromkeys(u, 0)
    output = 0
    for t in range(num_steps):
        x = equation_input(encoding, images)
        for name, norm_name, pool in layers:
            if name.startswith("conv"):
                x = F.conv2d(x, state[f"{name}.weight"], padding=1)
            else:
                x = x.flatten(1) @ state[f"{name}.weight"].T
            if norm == "bntt":
                x = equation_batch_norm(x, state, f"{norm_name}.{t}", training)
            elif norm == "bn":
                x = equation_batch_norm(x, state, f"{norm_name}.shared", training)
            old = torch.zeros_like(x) if u[name] is None else u[name]
            if order == "integrate_first":
                charged = leak * old + x
                spikes = equation_spikes(charged, threshold)
                u[name] = charged - threshold * spikes.detach()
            else:
                spikes = equation_spikes(old, threshold)
                u[name] = leak * old + x - threshold * spikes.detach()
            spike_count[name] += spikes.sum().item()
            x = spikes
            if pool == 2:
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
            elif pool == "all":
                x = x.mean((2, 3))
        output = output + x.flatten(1) @ state["fc2.weight"].T
    return output / num_steps, spike_count


def lively_net(arch, num_steps, images, **options):
    """A float64 net that spikes in every layer, in eval mode too.

    Batch norms get random gammas and the running statistics of their own activity; without them the
    spikes of a fresh net die out after a few layers, so its weights are scaled up.
    """
    torch.manual_seed(0)
    net = BUILD[arch](num_steps, img_size=SMALLEST[arch], **options).double()
    batch_norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for bn in batch_norms:
        nn.init.uniform_(bn.weight, 0.7, 1.3)
        bn.momentum = 1.0
    with torch.no_grad():
        net(images)
    for bn in batch_norms:
        bn.momentum = 0.1
    if not batch_norms:
        for weight in net.parameters():
            weight.data *= 2
    return net


def check_against_equations(arch, num_steps, order, encoding, threshold, training, norm="bntt", leak=0.9):
    images = random_images(batch=4, size=SMALLEST[arch]).double()
    if encoding == "poisson_binary":
        images = torch.sigmoid(images)
    labels = torch.tensor([1, 4, 0, 9])
    options = dict(norm=norm, encoding=encoding, threshold=threshold)
    net = lively_net(arch, num_steps, images, leak_mem=leak, spike_order=order, **options)
    net.train(training)

    parameters = {name for name, _ in net.named_parameters()}
    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
    for name in parameters:
        state[name].requires_grad_()
    torch.manual_seed(7)
    expected, spike_count = equation_net(
        arch, state, images, num_steps, order=order, leak=leak, training=training, **options
    )
    F.cross_entropy(expected, labels).backward()

    logits = seeded(net, images, seed=7)
    F.cross_entropy(logits, labels).backward()

    # The case must be alive before agreement means anything.
    assert all(count > 0 for count in spike_count.values()), spike_count
    assert expected.abs().max() > 0.01
    for name, norm_name, _ in EQUATION_LAYERS[arch]:
        assert state[f"{name}.weight"].grad.abs().max() > 1e-8, name
        gammas = [state[p].grad for p in parameters if p.startswith(f"{norm_name}.")]
        assert norm == "none" or any(grad is not None and grad.any() for grad in gammas), norm_name

    close = dict(rtol=0, atol=1e-10)
    torch.testing.assert_close(logits, expected, **close)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (state[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, state[name].grad, **close, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, state[name], **close, msg=lambda m, n=name: f"{n}: {m}")


# fire_first delays every layer by a step: with fewer steps its logits are all zero.
STEPS = {"integrate_first": 4, "fire_first": 13}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("threshold", [0.7, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("encoding", ["poisson", "poisson_binary", "direct"])
@pytest.mark.parametrize("order", ORDERS)
def test_vgg9_matches_the_equations(order, encoding, threshold, training):
    check_against_equations("vgg9", STEPS[order], order, encoding, threshold, training)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("order", "encoding", "threshold"),
    [
        ("integrate_first", "poisson", 1.0),
        ("integrate_first", "direct", 0.7),
        ("fire_first", "poisson", 0.7),
        ("fire_first", "poisson_binary", 1.0),
    ],
)
def test_vgg11_matches_the_equations(order, encoding, threshold, training):
    check_against_equations("vgg11", STEPS[order], order, encoding, threshold, training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", ["bn", "none"])
def test_baseline_norms_match_the_equations(norm, order, training):
    check_against_equations("vgg9", STEPS[order], order, "poisson", 1.0, training, norm=norm)


def test_fire_first_output_is_silent_for_as_many_steps_as_there_are_layers():
    net = lively_net("vgg9", 12, random_images().double(), spike_order="fire_first")
    voltages = net.voltages(random_images().double())
    assert [bool(v.any()) for v in voltages] == [False] * 8 + [True] * 4


def test_fire_first_gives_late_gammas_no_gradient():
    net = vgg9(12, spike_order="fire_first")
    net(random_images()).sum().backward()
    for i, layer in enumerate(net.layers()):
        last = 12 - (8 - i)  # a spike of layer i needs 8 - i steps to the output
        assert [bn.weight.grad is None for bn in layer.norm] == [t >= last for t in range(12)], layer.name


# ---- Names and initial weights -------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "convs"), [("vgg9", 7), ("vgg11", 8)])
def test_state_dict_keys_are_the_authors(arch, convs):
    expected = ["fc1.weight", "fc2.weight"]
    expected += [f"conv{i}.weight" for i in range(1, convs + 1)]
    for norm in ["bntt_fc", *(f"bntt{i}" for i in range(1, convs + 1))]:
        for t in (0, 1):
            # no `.bias`: the norm has no beta
            keys = ("weight", "running_mean", "running_var", "num_batches_tracked")
            expected += [f"{norm}.{t}.{key}" for key in keys]
    assert sorted(BUILD[arch](2, img_size=16).state_dict()) == sorted(expected)


CHANNELS = {
    "vgg9": ([3, 64, 64, 128, 128, 256, 256, 256], 256 * 2 * 2, 1024),
    "vgg11": ([3, 64, 128, 256, 256, 512, 512, 512, 512], 512, 4096),
}


@pytest.mark.parametrize("arch", ["vgg9", "vgg11"])
def test_a_seed_gives_the_weights_the_authors_draw(arch):
    channels, features, hidden = CHANNELS[arch]
    torch.manual_seed(3)
    layers = [nn.Conv2d(c, d, 3, padding=1, bias=False) for c, d in zip(channels, channels[1:], strict=False)]
    layers += [nn.Linear(features, hidden, bias=False), nn.Linear(hidden, 10, bias=False)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, gain=2)

    net = seeded(BUILD[arch], 2, img_size=16, seed=3)
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weights) == len(layers)
    assert all(torch.equal(weight, layer.weight) for weight, layer in zip(weights, layers, strict=True))


def test_the_defaults_are_the_authors():
    net = SNN_VGG9_BNTT(2)
    lif = net.layers()[0].lif
    assert (lif.leak, lif.threshold, lif.spike_order) == (0.95, 1.0, "integrate_first")
    assert isinstance(net.encoder, encoders.PoissonEncoder)
    assert net(random_images(2, 32)).shape == (2, 10)


def test_layers_are_listed_from_input_to_output():
    names = [layer.name for layer in SNN_VGG11_BNTT(1, img_size=16).layers()]
    assert names == ["conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "conv7", "conv8", "fc1"]


def test_gammas_are_the_weights_of_each_layer_and_step():
    net = vgg9(3)
    for i, gamma in enumerate(net.gammas().values()):
        assert not gamma.requires_grad
        assert torch.equal(gamma, torch.stack([bn.weight.detach() for bn in net.layers()[i].norm]))
    assert list(net.gammas()) == [layer.name for layer in net.layers()]
    assert vgg9(3, norm="bn").gammas() == {}


# ---- Running the net -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net_and_images():
    """A float64 VGG9, T = 4, in eval mode, whose layers spike. Shared: tests copy it before they change it."""
    images = random_images().double()
    return lively_net("vgg9", 4, images).eval(), images


def test_voltages_hold_every_step_and_forward_is_the_last_over_num_steps(net_and_images):
    net, images = net_and_images
    voltages = seeded(net.voltages, images)
    assert voltages.shape == (4, 3, 10)
    assert voltages[-1].abs().max() > 0
    assert torch.equal(seeded(net, images), voltages[-1] / 4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_short_run_is_the_prefix_of_the_full_run(net_and_images, steps):
    net, images = net_and_images
    full = seeded(net.voltages, images)
    assert torch.equal(seeded(net.voltages, images, steps), full[:steps])
    assert torch.equal(seeded(net, images, steps=steps), full[steps - 1] / steps)


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
@pytest.mark.parametrize("block", [1, 3, 4, 9])
def test_a_stream_gives_the_voltages_block_by_block(net_and_images, block, attach):
    net, images = attach(copy.deepcopy(net_and_images[0])), net_and_images[1]
    with torch.no_grad():
        full = seeded(net.voltages, images)
        blocks = seeded(lambda: list(net.stream(images, block=block)))
    assert [len(voltages) for voltages in blocks] == {1: [1] * 4, 3: [3, 1], 4: [4], 9: [4]}[block]
    torch.testing.assert_close(torch.cat(blocks), full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
def test_who_stops_iterating_stops_the_work(net_and_images, attach):
    net, images = attach(copy.deepcopy(net_and_images[0])), net_and_images[1]
    seen = []
    look = lambda m, args, output: seen.append(len(output[0]))  # noqa: E731
    look.only_looks = True
    net.lif_conv1.register_forward_hook(look)
    with torch.no_grad():
        next(iter(net.stream(images, block=2)))
    assert seen == [2]


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
def test_layers_may_share_a_neuron_as_it_keeps_nothing(net_and_images, attach):
    net, images = copy.deepcopy(net_and_images[0]), net_and_images[1]
    expected = seeded(net.voltages, images)
    for layer in net.layers():
        setattr(net, f"lif_{layer.name}", net.lif_conv1)
    torch.testing.assert_close(seeded(attach(net).voltages, images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_gradient_does_not_depend_on_the_blocks(order):
    net, images = seeded(vgg9, 12, spike_order=order).double(), random_images().double()
    gradients = []
    for block in (1, 5, 12):
        net.zero_grad()
        voltages = seeded(lambda block=block: torch.cat(list(net.stream(images, block=block))))
        voltages.square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert any(grad is None for grad in gradients[0].values()) == (order == "fire_first")
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            assert (grad is None) == (other[name] is None), name
            if grad is not None:
                torch.testing.assert_close(other[name], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
def test_weight_decay_leaves_the_gammas_alone_that_cannot_reach_the_output(attach):
    net = attach(vgg9(12, spike_order="fire_first"))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.5)
    net(random_images()).sum().backward()
    optimizer.step()
    for i, layer in enumerate(net.layers()):
        untouched = [bool((bn.weight == 1).all()) for bn in layer.norm]
        assert untouched == [t >= 12 - (8 - i) for t in range(12)], layer.name


@pytest.mark.parametrize("norm", ["bntt", "bn", "none"])
def test_a_norm_says_what_it_does_in_eval_mode(norm):
    layer = bntt_with_random_gamma(True, norm)
    for t in range(3):
        layer(norm_input(True, t)[None], t)
    layer.eval()
    a, b = layer.affine(3)
    for t in range(3):
        x = norm_input(True, t)
        expected = a[t, :, None, None] * x + b[t, :, None, None]
        torch.testing.assert_close(layer(x[None], t)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 5, -1])
def test_steps_outside_one_to_num_steps_are_refused(net_and_images, steps):
    net, images = net_and_images
    with pytest.raises(ValueError, match="steps"):
        net(images, steps)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 16, 16), (2, 3, 8, 9), (3, 8, 8)])
def test_images_of_another_shape_are_refused(net_and_images, shape):
    with pytest.raises(ValueError, match="images"):
        net_and_images[0](torch.zeros(shape))


def test_batch_of_one_runs_in_eval_mode_as_it_would_in_a_batch():
    images = random_images().double()
    net = lively_net("vgg9", 4, images, encoding="direct").eval()
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(alone, net(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["bntt", "bn"])
def test_batch_of_one_cannot_be_trained_with_batch_norm(norm):
    with pytest.raises(ValueError, match="batch of one"):
        vgg9(norm=norm)(random_images(1))


def test_batch_of_one_can_be_trained_without_batch_norm():
    vgg9(norm="none")(random_images(1)).sum().backward()


def test_nothing_is_kept_between_calls(net_and_images):
    net, images = net_and_images
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = seeded(net, images)
    net(images[:2])
    assert torch.equal(seeded(net, images), first)
    assert not torch.equal(seeded(net, images, seed=1), first)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("encoding", ["poisson", "poisson_binary", "direct"])
def test_a_run_draws_one_uniform_image_batch_per_step_and_no_more(encoding):
    net, images = vgg9(3, encoding=encoding).eval(), random_images()
    seeded(net, images)
    after = torch.rand(1)
    torch.manual_seed(0)
    for _ in range(0 if encoding == "direct" else 3):
        torch.rand(images.shape)
    assert torch.equal(after, torch.rand(1))


def test_lif_modules_can_be_watched_by_hooks(net_and_images):
    net, images = copy.deepcopy(net_and_images[0]), net_and_images[1]
    spikes = {layer.name: [] for layer in net.layers()}
    for layer in net.layers():
        layer.lif.register_forward_hook(lambda m, args, output, name=layer.name: spikes[name].append(output[0]))
    net(images)
    for name, blocks in spikes.items():
        assert set(torch.cat(blocks).unique().tolist()) == {0.0, 1.0}, name
    assert torch.cat(spikes["conv3"]).shape == (4, 3, 128, 4, 4)  # before pooling


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copied_or_pickled_net_gives_the_same_logits(net_and_images, duplicate):
    net, images = net_and_images
    twin = duplicate(net)
    assert twin.conv1.weight.data_ptr() != net.conv1.weight.data_ptr()
    assert torch.equal(seeded(twin, images), seeded(net, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_runs_in_eval_mode(net_and_images, dtype):
    net, images = copy.deepcopy(net_and_images[0]).to(dtype), net_and_images[1].to(dtype)
    with torch.no_grad():
        logits = net(images)
    assert logits.isfinite().all()
    assert logits.any()
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_trains_with_float32_membranes_and_voltage():
    net, seen = vgg9(4), []
    for layer in net.layers():
        layer.lif.register_forward_hook(lambda m, args, output: seen.append((args[0].dtype, output[1].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(random_images())
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2]))
    loss.backward()
    assert torch.bfloat16 in {current for current, _ in seen}  # autocast is at work
    assert {membrane for _, membrane in seen} == {torch.float32}
    assert logits.dtype == torch.float32  # the output voltage is a membrane too
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_net_runs_where_its_weights_are():
    net = vgg9().cuda()
    logits = net(random_images().cuda())
    logits.sum().backward()
    assert logits.device.type == "cuda"


def test_input_channels_and_classes_are_parameters():
    net = vgg9(in_channels=1, num_cls=7)
    assert net.conv1.weight.shape == (64, 1, 3, 3)
    assert net(random_images(channels=1)).shape == (3, 7)


# ---- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "too_small"), [("vgg9", 7), ("vgg11", 15), ("vgg9", 0)])
def test_images_too_small_for_the_pooling_are_refused(arch, too_small):
    with pytest.raises(ValueError, match=f"img_size .* at least {SMALLEST[arch]}"):
        BUILD[arch](1, img_size=too_small)


@pytest.mark.parametrize("arch", ["vgg9", "vgg11"])
def test_the_smallest_and_an_odd_image_run(arch):
    for size in (SMALLEST[arch], SMALLEST[arch] + 3):
        assert BUILD[arch](1, img_size=size)(random_images(2, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("leak_mem", 0),
        ("leak_mem", 1.1),
        ("leak_mem", -0.5),
        ("leak_mem", float("nan")),
        ("threshold", 0),
        ("threshold", -1.0),
        ("threshold", float("inf")),
        ("num_steps", 0),
        ("num_steps", -3),
        ("num_cls", 0),
        ("in_channels", 0),
        ("arch", "vgg16"),
        ("norm", "layer"),
        ("encoding", "latency"),
        ("spike_order", "later"),
    ],
)
def test_values_that_make_no_net_are_refused_by_name(name, value):
    options = dict(arch="vgg9", num_steps=2, img_size=8)
    options[name] = value
    with pytest.raises(ValueError, match=name):
        SpikingVGG(**options)
