"""Attacks against formulas of their own; energy against a hand count."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_fused import make_net, tiny_archs  # noqa: F401 (a fixture)

import attacks
import fused
import model
from encoders import DirectEncoder
from energy import energy
from model import LIF, SpikingVGG
from utill import SpikeMeter, UserError

LABELS = torch.arange(4)
IMAGES = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MEAN, STD = 0.45, 0.25


def logits_of(net):
    return lambda images: net((images - MEAN) / STD)


class ReLU(LIF):
    """A neuron that knows no time."""

    def forward(self, currents, membrane=None):
        return currents.relu(), currents[-1]


@pytest.fixture
def twins():
    """A spiking net that is no other than a net of ReLUs, and that net."""
    net = make_net(T=1, encoding="direct", norm="none", neuron=ReLU)
    layers = []
    for layer in net.layers():
        layers += [nn.Flatten()] if isinstance(layer.synapse, nn.Linear) else []
        layers += [layer.synapse, nn.ReLU(), layer.pool]
    return net, nn.Sequential(*layers, net.readout)


@pytest.mark.parametrize("attack", [attacks.fgsm, attacks.pgd])
def test_on_a_net_of_relus_it_is_the_plain_attack(twins, attack):
    results = []
    for net in twins:
        torch.manual_seed(0)
        with attacks.attackable(net):
            results.append(attack(logits_of(net), IMAGES, LABELS, 0.05))
    assert torch.equal(*results)
    assert (results[0] != IMAGES).double().mean() > 0.9


def test_fgsm_is_the_formula():
    weight = torch.randn(5, 3 * 8 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = lambda x: x.flatten(1) @ weight.t()  # noqa: E731
    errors = logits(IMAGES).softmax(-1) - F.one_hot(LABELS, 5)
    expected = (IMAGES + 0.1 * (errors @ weight).sign().view_as(IMAGES)).clamp(0, 1)
    torch.testing.assert_close(attacks.fgsm(logits, IMAGES, LABELS, 0.1), expected, rtol=0, atol=0)


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
def test_the_gradient_sums_that_of_the_first_layers_current_over_time(attach):
    """Sharmin et al.: the transposed convolution of sum_t dL / dI_t, here with the slope 1/2 of a Poisson spike."""
    net, kept = make_net(T=5), []
    with attacks.attackable(net):
        net.conv1.register_forward_hook(lambda m, args, out: kept.append(out.requires_grad_()) or out.retain_grad())
        torch.manual_seed(0)
        F.cross_entropy(logits_of(net)(IMAGES.clone().requires_grad_()), LABELS, reduction="sum").backward()
        total = sum(current.grad for current in kept)
    slope = 0.5 * ((IMAGES - MEAN) / STD).abs().le(2)
    expected = F.conv_transpose2d(total, net.conv1.weight, padding=1) * slope / STD
    other = attach(make_net(T=5))
    with attacks.attackable(other):
        torch.manual_seed(0)
        found = attacks.input_gradient(logits_of(other), IMAGES, LABELS)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_mean_over_draws_is_the_mean_of_single_ones():
    net = make_net(T=3)
    with attacks.attackable(net):
        torch.manual_seed(0)
        together = attacks.input_gradient(logits_of(net), IMAGES, LABELS, draws=3)
        torch.manual_seed(0)
        single = [attacks.input_gradient(logits_of(net), IMAGES, LABELS) for _ in range(3)]
    torch.testing.assert_close(together, torch.stack(single).mean(0))
    assert not torch.equal(single[0], single[1])


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_the_surrogate_of_the_attack_has_the_width_that_was_asked_for(width):
    net = make_net(T=3)
    v = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    with attacks.attackable(net, width):
        net.lif_conv1.fire(v + 1).sum().backward()
    torch.testing.assert_close(v.grad, 0.3 * (1 - v.detach().abs() / width).clamp(min=0), rtol=0, atol=1e-12)


def test_after_an_attack_the_net_is_as_before():
    net, spike = make_net().train(), model.SurrogateSpike
    net.conv2.weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), attacks.attackable(net, 2.0):
        raise ZeroDivisionError
    assert net.training
    assert not net.encoder.straight_through
    assert model.SurrogateSpike is spike
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["conv2.weight"]


@pytest.mark.parametrize("attack", [attacks.fgsm, attacks.pgd])
@pytest.mark.parametrize("eps", [0.0, 0.03, 0.9])
def test_an_attack_stays_within_eps_and_in_the_range_of_images(attack, eps):
    net = make_net(T=2, encoding="direct")
    with attacks.attackable(net):
        moved = attack(logits_of(net), IMAGES, LABELS, eps)
    assert (moved - IMAGES).abs().max() <= eps + 1e-12
    assert 0 <= moved.min() <= moved.max() <= 1


def test_noise_has_the_deviation_that_was_asked_for():
    images = torch.full((50, 1, 20, 20), 0.5, dtype=torch.float64)
    moved = attacks.noisy(images, 0.05, torch.Generator().manual_seed(0)) - images
    assert moved.std().item() == pytest.approx(0.05, rel=0.02)


def test_noise_below_zero_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        attacks.noisy(IMAGES, -0.1)


@pytest.fixture
def cifar10c(tmp_path, monkeypatch):
    monkeypatch.setattr(attacks, "PER_SEVERITY", 4)
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.arange(4, dtype=np.uint8), 5))
    return tmp_path


def test_severities_stand_one_after_the_other(cifar10c):
    images, labels = attacks.corruptions(cifar10c)["fog"]
    assert images[2, 1].max() == 9
    assert labels.tolist() == [[0, 1, 2, 3]] * 5


@pytest.mark.parametrize("damage", ["length", "labels", "classes", "none", "no file"])
def test_another_layout_is_refused(cifar10c, damage):
    if damage == "length":
        np.save(cifar10c / "fog.npy", np.zeros((19, 8, 8, 3), np.uint8))
    elif damage == "labels":
        np.save(cifar10c / "labels.npy", np.zeros(19, np.uint8))
    elif damage == "classes":
        np.save(cifar10c / "labels.npy", np.full(20, 10, np.uint8))
    elif damage == "none":
        (cifar10c / "fog.npy").unlink()
    else:
        (cifar10c / "fog.npy").write_bytes(b"PK\x03\x04 no array")
    with pytest.raises(UserError, match="must hold|cannot read|classes 0 to 9"):
        attacks.corruptions(cifar10c)


# ---- Energy ----------------------------------------------------------------------------------------------


@pytest.fixture
def three_neurons():
    """Two neurons and one, no norm: two inputs -> 2 -> 1 -> 2 classes, counted by hand below."""
    model.ARCHS["three"] = ((), (2, 1))
    net = SpikingVGG("three", 2, 1.0, img_size=1, num_cls=2, in_channels=2, norm="none", encoding=DirectEncoder)
    del model.ARCHS["three"]
    net.fc1.weight.data = torch.tensor([[1.0, 0.5], [0.3, 0.3]])
    net.fc2.weight.data = torch.tensor([[1.5, 1.5]])
    return net.eval()


def test_energy_and_spikes_equal_a_count_by_hand(three_neurons):
    """Input (1, 1) at both steps: currents 1.5 and 0.6. Neuron 1 spikes at both steps (1.5; 0.5 + 1.5), neuron 2 at the
    second (0.6; 1.2). Neuron 3 gets 1.5, spikes, keeps 0.5; then 3.0, spikes."""
    with SpikeMeter(three_neurons) as meter, torch.no_grad():
        three_neurons(torch.ones(1, 2, 1, 1))
    assert meter.spikes["fc1"].tolist() == [1, 2]
    assert meter.spikes["fc2"].tolist() == [1, 1]
    found = energy(meter)
    operations = [(x["name"], x["multiply_adds"], x["operations"], x["analog"]) for x in found["layers"]]
    assert operations == [("fc1", 4, 8.0, True), ("fc2", 2, 3.0, False), ("fc3", 2, 4.0, False)]
    assert found["snn_pj"] == pytest.approx(8 * 4.6 + 7 * 0.9)
    assert found["ann_pj"] == pytest.approx(8 * 4.6)
