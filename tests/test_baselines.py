"""baselines.py, and a net that is no chain: what the parts of model.py must allow without being touched."""

import copy
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import call
from test_fused import assert_alive, assert_equal, make_net, run, tiny_archs  # noqa: F401 (a fixture)

import early_exit
import fused
import nets
import test
import train
from baselines import (
    ANN,
    IF,
    PLIF,
    TEBN,
    BetaBNTT,
    DropoutLIF,
    HardReset,
    LayerNorm,
    LearntLIF,
    ScaledSurrogate,
    TdBN,
    dropout,
)
from encoders import DirectEncoder
from model import ARCHS, BNTT, LIF, Layer, SpikingNet, SpikingVGG, SurrogateSpike, each_step
from utill import SpikeMeter

DOUBLE = dict(dtype=torch.float64)

# ---- tdBN ------------------------------------------------------------------------------------


def tdbn_and_batch_norm(spatial):
    """TdBN for threshold 0.7, and PyTorch's BatchNorm with the same gamma."""
    norm = TdBN(5, 6, spatial, threshold=0.7, alpha=0.5).double()
    plain = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(6, eps=1e-4)
    nn.init.constant_(plain.weight, 0.35)
    return norm, plain.double()


@pytest.mark.parametrize("spatial", [True, False])
def test_tdbn_is_batch_norm_over_batch_and_time(spatial):
    norm, plain = tdbn_and_batch_norm(spatial)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn((5, 4, 6, 3, 3) if spatial else (5, 4, 6), **DOUBLE) * 2
        x = x + torch.arange(5.0).view(5, *[1] * (x.ndim - 1))  # each step has another mean
        torch.testing.assert_close(norm(x).flatten(0, 1), plain(x.flatten(0, 1)), rtol=0, atol=1e-12)
    for mine, theirs in zip(norm.shared.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    norm.eval(), plain.eval()
    torch.testing.assert_close(norm(x).flatten(0, 1), plain(x.flatten(0, 1)), rtol=0, atol=1e-12)


def tdbn_net(**options):
    net = make_net(norm=lambda *args: TdBN(*args, threshold=0.8), T=6, threshold=0.8, **options)
    for layer in net.layers():
        nn.init.uniform_(layer.norm.shared.bias, -0.2, 0.4)
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spike_order", LIF.ORDERS)
def test_tdbn_runs_fused_as_plain(spike_order, training):
    net = tdbn_net(spike_order=spike_order).train(training)
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    plain = run(net, images, labels)
    other = fused.attach(tdbn_net(spike_order=spike_order).train(training))
    assert_alive(net, plain) if training else None
    assert plain[1]["bntt1.shared.bias"].abs().max() > 0 or not training
    assert_equal(plain, run(other, images, labels))


def test_tdbn_without_gradients_measures_the_whole_run():
    net, images = tdbn_net(), torch.randn(3, 3, 8, 8, **DOUBLE)
    states = []
    for grad in (True, False):
        each = copy.deepcopy(net)
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            each.voltages(images)
        states.append(each.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_statistics_over_time_cannot_be_cut_into_blocks():
    with pytest.raises(fused.Unsupported, match="TdBN takes its statistics over all of it"):
        fused.attach(tdbn_net(), save_memory=2)


# ---- TEBN ------------------------------------------------------------------------------------


def drawn_tebn(spatial, T=5):
    norm = TEBN(T, 6, spatial).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.3, 1.5)
    return norm


@pytest.mark.parametrize("spatial", [True, False])
def test_tebn_is_one_batch_norm_over_batch_and_time_times_a_number_for_each_step(spatial):
    torch.manual_seed(0)
    norm = drawn_tebn(spatial)
    x = torch.randn((5, 4, 6, 3, 3) if spatial else (5, 4, 6), **DOUBLE) * 2 + 1
    dims = (0, 1, 3, 4) if spatial else (0, 1)
    mean, var = x.mean(dims), x.var(dims, unbiased=False)
    expected = []
    for step, p in zip(x, norm.scale.flatten(), strict=True):
        step = step.movedim(1, -1)
        y = p * (norm.shared.weight * (step - mean) / (var + 1e-4).sqrt() + norm.shared.bias)
        expected.append(y.movedim(-1, 1))
    torch.testing.assert_close(norm(x), torch.stack(expected), rtol=0, atol=1e-12)


def test_tebn_says_what_it_does_in_eval_mode():
    torch.manual_seed(0)
    norm, x = drawn_tebn(True), torch.randn(5, 4, 6, 3, 3, **DOUBLE)
    norm(x)
    norm.eval()
    a, b = (v[:, None, :, None, None] for v in norm.affine(5))
    torch.testing.assert_close(norm(x), a * x + b, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm(x[2:4], 2), (a * x + b)[2:4], rtol=0, atol=1e-12)


def tebn_net(**options):
    net = make_net(norm=TEBN, T=6, **options)
    for layer in net.layers():
        nn.init.uniform_(layer.norm.shared.bias, -0.2, 0.4)
        nn.init.uniform_(layer.norm.scale, 0.6, 1.4)
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spike_order", LIF.ORDERS)
def test_tebn_runs_fused_as_plain(spike_order, training):
    net = tebn_net(spike_order=spike_order).train(training)
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    plain = run(net, images, labels)
    other = fused.attach(tebn_net(spike_order=spike_order).train(training))
    assert_alive(net, plain) if training else None
    assert plain[1]["bntt1.scale"].abs().max() > 0
    assert_equal(plain, run(other, images, labels))


# ---- Layer norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [True, False])
def test_layer_norm_normalises_each_image_and_step_over_the_layer(spatial):
    torch.manual_seed(0)
    norm = LayerNorm(5, 6, spatial).double()
    nn.init.uniform_(norm.weight, 0.3, 1.5), nn.init.uniform_(norm.bias, -1, 1)
    x = torch.randn((5, 4, 6, 3, 3) if spatial else (5, 4, 6), **DOUBLE) * 2 + 1
    y = norm(x)
    for t in range(5):
        for b in range(4):
            one = x[t, b]
            deviation = ((one - one.mean()).square().mean() + 1e-4).sqrt()
            shape = (6, 1, 1) if spatial else (6,)
            expected = norm.weight.view(shape) * (one - one.mean()) / deviation + norm.bias.view(shape)
            torch.testing.assert_close(y[t, b], expected, rtol=0, atol=1e-12)


def test_the_engine_declines_layer_norm_in_one_sentence():
    assert fused.why_not(make_net(norm=LayerNorm)) == "the fused engine does not know the normalisation LayerNorm"


# ---- IF --------------------------------------------------------------------------------------


def test_if_is_a_sum_of_currents_less_the_threshold_of_each_spike():
    torch.manual_seed(0)
    currents, neuron, u, expected = torch.randn(9, 5, **DOUBLE), IF(threshold=0.7), torch.zeros(5, **DOUBLE), []
    for current in currents:
        u = u + current
        expected.append((u > 0.7).double())
        u = u - 0.7 * expected[-1]
    spikes, membrane = neuron(currents)
    assert 0 < spikes.sum() < spikes.numel()
    assert torch.equal(spikes, torch.stack(expected))
    torch.testing.assert_close(membrane, u, rtol=0, atol=1e-12)


def test_if_has_no_leak():
    with pytest.raises(ValueError, match=r"must be 1, as it has no leak, got 0.95: pass --leak_mem 1$"):
        IF(0.95)


def if_net(**options):
    """Of IF neurons, each layer with a threshold of its own."""
    net = make_net(neuron=IF, leak_mem=1.0, norm="none", T=6, **options)
    for threshold, layer in enumerate(net.layers(), start=1):
        layer.lif.threshold = threshold / 4
        layer.synapse.weight.data *= threshold
    return net


def test_thresholds_of_if_neurons_are_saved_with_the_weights():
    net, other = if_net(), make_net(neuron=IF, leak_mem=1.0, norm="none", T=6)
    other.load_state_dict(net.state_dict())
    assert [layer.lif.threshold for layer in other.layers()] == [k / 4 for k in range(1, len(net.layers()) + 1)]


@pytest.mark.parametrize("kind", [IF, LearntLIF])
def test_a_saved_threshold_that_is_not_positive_is_refused(kind):
    neuron = kind(1.0 if kind is IF else 0.9)
    with pytest.raises(ValueError, match="a threshold must be a positive number, got 0.0"):
        neuron.set_extra_state(torch.tensor(0.0))


@pytest.mark.parametrize("training", [True, False])
def test_if_runs_fused_as_plain_with_a_threshold_for_each_layer(training):
    net = if_net().train(training)
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    plain = run(net, images, labels)
    assert_alive(net, plain)
    assert_equal(plain, run(fused.attach(copy.deepcopy(net)), images, labels))


# ---- The net without spikes --------------------------------------------------------------------


def test_an_ann_is_convolutions_relu_and_average_pools(tiny_archs):  # noqa: F811
    torch.manual_seed(0)
    net = ANN("tiny", 8, 5).double().eval()
    images = torch.randn(3, 3, 8, 8, **DOUBLE)
    x = images
    for layer in net.layers():
        x = x.flatten(1) if isinstance(layer.synapse, nn.Linear) else x
        x = layer.pool(layer.synapse(x).clamp(min=0))
    expected = x.flatten(1) @ net.readout.weight.t()
    torch.testing.assert_close(net.voltages(images), expected[None], rtol=0, atol=1e-12)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-12)
    assert net.gammas() == {}


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.full((1000, 1001), 3.0, requires_grad=True)
    y = dropout(x, 0.2)
    y.sum().backward()
    kept = y != 0
    assert abs(float((~kept).float().mean()) - 0.2) < 0.002  # 4.9 standard deviations
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 3 / 0.8), rtol=1e-4, atol=0)
    assert torch.equal(x.grad == 0, ~kept)
    assert kept.float().corrcoef()[:100, :100].triu(1).abs().max() < 0.2  # rows are independent


def test_an_ann_drops_neurons_where_no_pool_follows_and_in_training_alone(tiny_archs):  # noqa: F811
    torch.manual_seed(0)
    net, seen = ANN("tiny", 8, 5, dropout=0.5).double(), {}
    for layer in net.layers():
        layer.lif.register_forward_hook(lambda m, i, o, name=layer.name: seen.update({name: (i[0].clamp(min=0), o[0])}))
    for training in (True, False):
        net.train(training)(torch.randn(3, 3, 8, 8, **DOUBLE))
        dropped = {name for name, (rectified, given) in seen.items() if not torch.equal(rectified, given)}
        without = {layer.name for layer in net.layers() if isinstance(layer.pool, nn.Identity)}
        assert dropped == (without if training else set())
        assert 0 < len(without) < len(net.layers())


# ---- A beta, a hard reset, another alpha ---------------------------------------------------------


def beta_net(**options):
    net = make_net(norm=BetaBNTT, T=6, **options)
    torch.manual_seed(5)
    for layer in net.layers():
        for bn in layer.norm:
            nn.init.uniform_(bn.bias, -0.2, 0.4)
    return net


def test_bntt_with_a_beta_is_a_batch_norm_for_each_step():
    norm = BetaBNTT(3, 4, True).double()
    assert all((bn.bias == 0).all() for bn in norm)
    nn.init.constant_(norm[1].bias, 0.7)
    x = torch.randn(3, 5, 4, 2, 2, **DOUBLE)
    expected = [F.batch_norm(step, None, None, training=True, eps=1e-4) for step in x]
    torch.testing.assert_close(norm(x), torch.stack([expected[0], expected[1] + 0.7, expected[2]]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_bntt_with_a_beta_runs_fused_as_plain(training):
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    plain = run(beta_net().train(training), images, labels)
    assert_equal(plain, run(fused.attach(beta_net().train(training)), images, labels))
    assert plain[1]["bntt1.0.bias"].abs().max() > 0


def test_after_a_spike_a_hard_reset_leaves_no_membrane():
    neuron = HardReset(0.5)
    spikes, membrane = neuron(torch.tensor([[0.8], [0.9], [0.6], [3.0]]))
    # 0.8; 0.4 + 0.9 = 1.3 fires and leaves 0; 0.6; 0.3 + 3 fires
    assert (spikes.flatten().tolist(), membrane.tolist()) == ([0, 1, 0, 1], [0])


def test_the_gradient_of_a_hard_reset_is_that_of_a_loop():
    currents = torch.tensor([0.8, 0.9, 0.6, 0.9], requires_grad=True, **DOUBLE)
    spikes, _ = HardReset(0.5)(currents[:, None])
    spikes.sum().backward()
    u, back = [0.8, 1.3, 0.6, 1.2], [0.0] * 5
    for t in (3, 2, 1, 0):  # what comes after a spike does not depend on what came before
        kept = 0.0 if u[t] > 1 else 1.0
        back[t] = 0.3 * (1 - abs(u[t] - 1)) + 0.5 * kept * back[t + 1]
    torch.testing.assert_close(currents.grad, torch.tensor(back[:4], **DOUBLE))


def test_a_hard_reset_firing_first_is_refused():
    with pytest.raises(ValueError, match="a hard reset belongs to integrate_first"):
        HardReset(0.5, spike_order="fire_first")


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_another_alpha_scales_the_surrogate_and_no_spike(alpha):
    membranes = torch.linspace(-1, 3, 41, requires_grad=True, **DOUBLE)
    spikes = ScaledSurrogate(0.9, 0.8, alpha=alpha).fire(membranes)
    spikes.sum().backward()
    assert torch.equal(spikes, (membranes > 0.8).double())
    expected = alpha / 0.8 * (1 - (membranes.detach() / 0.8 - 1).abs()).clamp(min=0)
    torch.testing.assert_close(membranes.grad, expected)


def test_dropout_leaves_the_same_neurons_out_at_all_steps_of_a_batch():
    torch.manual_seed(0)
    neuron, currents = DropoutLIF(1.0, p=0.5), torch.full((6, 400), 2.0)
    first, membrane = neuron(currents[:3])
    later, _ = neuron(currents[3:], membrane)
    assert torch.equal(first[:1].expand(6, -1), torch.cat([first, later]))
    assert 0.4 < (first[0] == 0).float().mean() < 0.6
    assert set(first.unique().tolist()) == {0.0, 2.0}  # what is left stands for twice as many
    assert not torch.equal(neuron(currents)[0][0], first[0])  # another batch
    assert torch.equal(neuron.eval()(currents)[0], torch.ones(6, 400))


def test_dropout_refuses_a_batch_that_has_lost_images():
    neuron, currents = DropoutLIF(1.0), torch.full((2, 4, 3), 2.0)
    _, membrane = neuron(currents)
    with pytest.raises(ValueError, match="takes a whole batch from its first time-step on"):
        neuron(currents[:, :1], membrane[:1])


@pytest.mark.parametrize("kind", [HardReset, partial(ScaledSurrogate, alpha=1.0)])
@pytest.mark.parametrize("save_memory", [None, 2])
def test_a_hard_reset_and_another_alpha_run_fused(kind, save_memory):
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    net, other = make_net(neuron=kind), fused.attach(make_net(neuron=kind), save_memory)
    assert fused.why_not(other, save_memory) is None
    plain = run(net, images, labels)
    assert_alive(net, plain)
    assert_equal(plain, run(other, images, labels))
    assert not torch.allclose(plain[1]["conv1.weight"], run(make_net(), images, labels)[1]["conv1.weight"])


def test_the_engine_declines_dropout_in_one_sentence():
    assert fused.why_not(make_net(neuron=DropoutLIF)) == "the fused engine does not know the neuron DropoutLIF"


# ---- PLIF ------------------------------------------------------------------------------------


def test_the_gradient_of_plifs_leak_is_that_of_a_loop():
    torch.manual_seed(0)
    neuron, currents = PLIF(0.8).double(), torch.rand(7, 5, 4, **DOUBLE)
    weights = torch.rand(7, 5, 4, **DOUBLE)
    spikes, _ = neuron(currents)
    (spikes * weights).sum().backward()

    w = torch.tensor(neuron.w.item(), requires_grad=True, **DOUBLE)
    leak, u, total = 1 / (1 + torch.exp(-w)), torch.zeros(5, 4, **DOUBLE), 0
    for current, weight in zip(currents, weights, strict=True):
        u = leak * u + current
        spike = SurrogateSpike.apply(u - 1)
        u, total = u - spike.detach(), total + (spike * weight).sum()
    total.backward()
    assert 0 < spikes.sum() < spikes.numel()
    assert w.grad.abs() > 1e-3
    torch.testing.assert_close(neuron.w.grad, w.grad, rtol=0, atol=1e-12)


def test_plif_starts_as_lif_and_learns_a_leak_of_its_own_in_each_layer():
    options = dict(T=5, img_size=8, leak_mem=0.9)
    nets = [make_net(**options), make_net(neuron=PLIF, **options)]
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    lif, plif = (run(net, images, labels) for net in nets)
    torch.testing.assert_close(plif[0], lif[0], rtol=0, atol=1e-6)  # w is drawn in float32
    gradients = [plif[1][f"lif_{layer.name}.w"] for layer in nets[1].layers()]
    assert all(g is not None and g.abs() > 0 for g in gradients)


@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_a_leak_that_no_sigmoid_gives_is_refused(leak):
    with pytest.raises(ValueError, match=r"leak_mem of a neuron that learns it must be in \(0, 1\)"):
        SpikingVGG("vgg9", 2, leak, img_size=8, neuron=PLIF)


def test_the_gradients_of_a_learnt_leak_and_threshold_are_those_of_a_loop():
    torch.manual_seed(0)
    neuron, currents = LearntLIF(0.8, 0.6).double(), torch.rand(7, 5, 4, **DOUBLE)
    nn.init.constant_(neuron.v, 0.1)
    weights = torch.rand(7, 5, 4, **DOUBLE)
    spikes, _ = neuron(currents)
    (spikes * weights).sum().backward()

    # by hand: du and dtheta of every step, the surrogate of eq. 8, no gradient of the spike in the reset
    w, theta = neuron.w.item(), 0.6 * math.exp(0.1)
    leak, u, grad = 1 / (1 + math.exp(-w)), torch.zeros(5, 4, **DOUBLE), [0.0, 0.0]
    tangents = [torch.zeros(5, 4, **DOUBLE), torch.zeros(5, 4, **DOUBLE)]  # of u by leak, by theta
    for current, weight in zip(currents, weights, strict=True):
        tangents = [leak * tangents[0] + u, leak * tangents[1]]
        u = leak * u + current
        spike, slope = (u > theta).double(), 0.3 * (1 - (u / theta - 1).abs()).clamp(min=0)
        grad[0] += float((weight * slope * tangents[0] / theta).sum())
        grad[1] += float((weight * slope * (tangents[1] / theta - u / theta**2)).sum())
        u, tangents = u - theta * spike, [tangents[0], tangents[1] - spike]
    assert 0 < spikes.sum() < spikes.numel()
    assert min(map(abs, grad)) > 1e-2
    assert neuron.w.grad.item() == pytest.approx(grad[0] * leak * (1 - leak), rel=0, abs=1e-12)
    assert neuron.v.grad.item() == pytest.approx(grad[1] * theta, rel=0, abs=1e-12)


def test_a_learnt_leak_and_threshold_start_as_they_are_given():
    neuron = LearntLIF(0.8, 0.6).double()
    assert (neuron.leak.item(), neuron.threshold.item()) == pytest.approx((0.8, 0.6), abs=1e-7)


@pytest.mark.parametrize(("norm", "save_memory"), [("bntt", None), ("bntt", 2), ("none", 2), ("tebn", None)])
@pytest.mark.parametrize("order", LIF.ORDERS)
@pytest.mark.parametrize("kind", [PLIF, LearntLIF])
def test_learnt_leaks_and_thresholds_run_fused(kind, save_memory, order, norm):
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    both = [make_net(T=6, neuron=kind, spike_order=order, norm=nets.NORMS[norm]) for _ in range(2)]
    for net in both:
        for i, layer in enumerate(net.layers()):
            layer.lif.leak = 0.6 + 0.1 * i  # of each layer another one
            layer.lif.double()
            for v in layer.lif.parameters():
                v.data += 0.1
            layer.synapse.weight.data *= 3 if norm == "none" else 1
    assert fused.why_not(fused.attach(both[1], save_memory), save_memory) is None
    plain = run(both[0], images, labels)
    assert all(plain[1][f"lif_{layer.name}.{v}"].abs() > 0 for layer in net.layers() for v in layer.lif._parameters)
    assert_equal(plain, run(both[1], images, labels))


@pytest.mark.parametrize("theta", [5 / 16, -5 / 16])
def test_a_learnt_threshold_decides_ties_as_the_plain_loop(theta):
    """Sums of sixteenths, which meet the threshold exactly, but not when each is divided by it first."""
    nets_ = [make_net(T=6, norm="none", encoding="direct", leak_mem=1) for _ in range(2)]
    images = torch.randint(0, 2, (3, 3, 8, 8)).double()
    for net in nets_:
        for layer in net.layers():
            layer.synapse.weight.data = (16 * layer.synapse.weight.data).round() / 16
            layer.lif.threshold = nn.Parameter(torch.tensor(theta, **DOUBLE))
    assert torch.equal(fused.attach(nets_[1]).voltages(images), nets_[0].voltages(images))


def test_thresholds_run_plain_where_a_run_ends_before_all_layers_fired():
    images, labels = torch.randn(3, 3, 8, 8, **DOUBLE) * 2, torch.arange(3)
    options = dict(T=6, neuron=LearntLIF, spike_order="fire_first")
    plain, other = run(make_net(**options), images, labels, 2), fused.attach(make_net(**options))
    with pytest.warns(UserWarning, match="cannot learn leaks and thresholds in runs too short to reach the output"):
        assert_equal(plain, run(other, images, labels, 2))


# ---- A residual net ----------------------------------------------------------------------------


class ResidualNet(SpikingNet):
    """conv1 - [conv2 - conv3 + shortcut] - readout: 25 lines from the parts of model.py.

    As a row of ARCHS it takes what `SpikingVGG` does after arch; the readout must be called so.
    """

    def __init__(
        self, num_steps, leak_mem=0.9, img_size=6, num_cls=5, *, in_channels=3, norm=BNTT, neuron=LIF, **others
    ):
        super().__init__()
        self.num_steps, self.encoder, channels = num_steps, DirectEncoder(num_steps, in_channels, img_size), 4
        for i, inputs in enumerate((in_channels, channels, channels), start=1):
            setattr(self, f"conv{i}", nn.Conv2d(inputs, channels, 3, padding=1, bias=False))
            setattr(self, f"bntt{i}", norm(num_steps, channels, True))
            setattr(self, f"lif_conv{i}", neuron(leak_mem))
        self.pool, self.readout = nn.AvgPool2d(2), nn.Linear(channels * (img_size // 2) ** 2, num_cls, bias=False)

    def layers(self):
        names = [(f"conv{i}", f"bntt{i}", f"lif_conv{i}") for i in (1, 2, 3)]
        return [Layer(name[0], *(getattr(self, part) for part in name), nn.Identity()) for name in names]

    def output_currents(self, x, t0, steps, fire):
        def step(layer, x):
            return fire(layer.lif, layer.norm(each_step(layer.synapse, x), t0))

        first, second, third = self.layers()
        shortcut = step(first, x)
        x = each_step(self.pool, step(third, step(second, shortcut)) + shortcut)
        return each_step(self.readout, x.flatten(2))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    net = ResidualNet(4).double()
    for conv in (net.conv1, net.conv2, net.conv3):
        nn.init.xavier_uniform_(conv.weight, gain=2)
    return net


def test_a_row_of_archs_may_be_a_class_of_a_net_that_is_no_chain(monkeypatch, tmp_path):
    monkeypatch.setitem(ARCHS, "residual", ResidualNet)
    flags = (
        "--arch residual --dataset digits --num_steps 3 --num_epochs 1 --limit_train 40 --limit_test 20 --batch_size 20"
    )
    flags += f" --batch_size 20 --num_workers 0 --device cpu --gamma_weight_decay 0 --precise_bn 1 --run_dir {tmp_path}"
    assert call(train.main, *flags.split()).code == 0
    tested = call(test.main, tmp_path / "best.pth.tar", "--limit_test", "20")
    assert json.loads(tested.out[-1])["top1"] == json.loads((tmp_path / "result.json").read_text())["test_acc"]
    exits = call(early_exit.main, tmp_path / "best.pth.tar")
    assert exits.code == 0, exits.err
    assert [*json.loads((tmp_path / "early_exit.json").read_text())["mean_gamma"]] == ["conv1", "conv2", "conv3"]
    assert nets.load(tmp_path / "best.pth.tar").readout.weight.shape == (10, 64)


def test_statistics_that_cannot_be_averaged_are_refused_before_anything_is_trained(monkeypatch, tmp_path):
    class GroupNorm(torch.nn.GroupNorm):
        def __init__(self, num_steps, features, spatial):
            super().__init__(4, features)

        def forward(self, x, t0=0):
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    monkeypatch.setitem(nets.NORMS, "group", GroupNorm)
    flags = "--dataset digits --arch fc3 --num_steps 2 --norm group --precise_bn 2 --batch_size 20 --num_workers 0"
    outcome = call(train.main, flags, "--device cpu --run_dir", tmp_path / "run")
    assert (outcome.code, (tmp_path / "run").exists()) == (2, False)
    assert "this net has no running statistics" in outcome.err[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("train --precise_bn 1", "the layers() of Bare do not list all its norms: leave it out"),
        ("early_exit", "Bare lists no layers() with a gamma per time-step: choose another --policy"),
    ],
)
def test_a_net_that_lists_no_layers_is_told_what_it_lacks(monkeypatch, tmp_path, flags, said):
    class Bare(ResidualNet):
        layers = SpikingNet.layers

        def output_currents(self, x, t0, steps, fire):
            parts = SimpleNamespace(layers=lambda: ResidualNet.layers(self), pool=self.pool, readout=self.readout)
            return ResidualNet.output_currents(parts, x, t0, steps, fire)

    monkeypatch.setitem(ARCHS, "bare", Bare)
    base = "--arch bare --dataset digits --num_steps 3 --num_epochs 1 --limit_train 40 --limit_test 20 --batch_size 20"
    program, *more = flags.split()
    base = f"{base} --num_workers 0 --device cpu --run_dir {tmp_path}".split()
    outcome = call(train.main, *base, *more)
    if program == "early_exit":
        outcome = call(early_exit.main, tmp_path / "best.pth.tar")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert said in outcome.err[0]


def test_a_residual_net_trains(residual):
    torch.manual_seed(1)
    images, labels = torch.randn(10, 3, 6, 6, **DOUBLE), torch.arange(10) % 5
    optimizer, losses = torch.optim.SGD(residual.parameters(), 0.1, 0.9), []
    for _ in range(30):
        losses.append(F.cross_entropy(residual(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert all(p.grad is not None for p in residual.parameters())


def test_spikes_and_operations_of_a_residual_net_are_those_counted_by_hand(residual):
    images, seen = torch.randn(2, 3, 6, 6, **DOUBLE), {}
    for name in ("conv1", "conv2", "conv3"):
        neuron = getattr(residual, f"lif_{name}")
        neuron.register_forward_hook(lambda m, i, output, name=name: seen.setdefault(name, []).append(output[0].sum()))
    with SpikeMeter(residual) as meter, torch.no_grad():
        residual(images)
    seen = {name: torch.stack(counts) for name, counts in seen.items()}
    assert all(spikes.sum() > 0 for spikes in seen.values())
    for name, spikes in seen.items():
        assert meter.spikes[name].tolist() == spikes.tolist()
    # of one image: conv1 sees the image; conv2 the spikes of conv1; conv3 those of conv2; the readout those of
    # conv3 and conv1 together, an average pool before it. Each spike goes to 4 x 9 (padding counted) or 5 neurons.
    conv = (seen["conv1"] + seen["conv2"]) / 2 * 4 * 9
    expected = 6 * 6 * 4 * 3 * 9 + conv + (seen["conv3"] + seen["conv1"]) / 2 / 4 * 5
    torch.testing.assert_close(meter.operations(), expected, rtol=1e-12, atol=0)


def test_the_engine_declines_a_residual_net_in_one_sentence(residual):
    with pytest.raises(fused.Unsupported, match=r"^the fused engine runs chains of layers .* ResidualNet .*$"):
        fused.attach(residual)


def test_a_residual_net_streams_block_by_block(residual):
    images = torch.randn(2, 3, 6, 6, **DOUBLE)
    residual(images)
    residual.eval()
    with torch.no_grad():
        whole, blocks = residual.voltages(images), list(residual.stream(images, block=3))
    assert [len(block) for block in blocks] == [3, 1]
    assert torch.equal(torch.cat(blocks), whole)
