"""encoders.py: the gradient of images through spikes drawn at random."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fused
from encoders import ENCODERS, BinaryPoissonEncoder, PoissonEncoder
from model import SpikingVGG

RANDOM = {"poisson": PoissonEncoder, "poisson_binary": BinaryPoissonEncoder}
IMAGES = torch.tensor([-3.0, -2.0, -0.5, 0.0, 0.3, 1.0, 1.5, 2.5, 2.0]).view(1, 1, 3, 3)
SLOPES = {"poisson": [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0.5], "poisson_binary": [0, 0, 0, 1, 1, 1, 0, 0, 0]}


def alive_net(encoding):
    """A small net in which spikes reach the output, in eval mode."""
    torch.manual_seed(0)
    net = SpikingVGG("vgg9", 4, 0.95, 8, 10, encoding=encoding)
    with torch.no_grad():
        for _ in range(20):
            net(torch.rand(8, 3, 8, 8))
    return net.eval()


def image_gradient(net):
    torch.manual_seed(1)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    F.cross_entropy(net(images), torch.tensor([1, 2])).backward()
    return images.grad


@pytest.mark.parametrize("name", RANDOM)
def test_the_straight_through_gradient_is_the_slope_of_the_mean_spike_over_all_steps(name):
    images = IMAGES.clone().requires_grad_()
    ENCODERS[name](5, 1, 3, straight_through=True)(images, 5).sum().backward()
    assert images.grad.flatten().tolist() == [5 * slope for slope in SLOPES[name]]


@pytest.mark.parametrize("name", RANDOM)
def test_expected_is_the_mean_of_the_spikes(name):
    torch.manual_seed(0)
    encoder = RANDOM[name](4000, 1, 3)
    torch.testing.assert_close(encoder(IMAGES, 4000).mean(0), encoder.expected(IMAGES), atol=0.04, rtol=0)


@pytest.mark.parametrize("name", RANDOM)
def test_the_straight_through_gradient_changes_no_spike_of_a_seed(name):
    spikes = []
    for asked in (False, True):
        torch.manual_seed(3)
        spikes.append(RANDOM[name](6, 1, 3, straight_through=asked)(IMAGES.clone().requires_grad_(asked), 6))
    assert spikes[1].requires_grad
    assert torch.equal(*spikes)


@pytest.mark.parametrize("engine", ["plain", "fused"])
@pytest.mark.parametrize("name", RANDOM)
def test_a_gradient_of_the_images_is_refused_unless_asked_for_by_name(name, engine):
    net = alive_net(name)
    net = fused.attach(net) if engine == "fused" else net
    with pytest.raises(ValueError, match=r"set net.encoder.straight_through = True for an estimate"):
        image_gradient(net)


@pytest.mark.parametrize("engine", ["plain", "fused"])
@pytest.mark.parametrize("name", RANDOM)
def test_an_attack_on_a_net_with_a_straight_through_encoder_moves_every_pixel(name, engine):
    net = alive_net(partial(RANDOM[name], straight_through=True))
    gradient = image_gradient(fused.attach(net) if engine == "fused" else net)
    assert (gradient != 0).all()


def test_the_straight_through_gradient_can_be_switched_on_in_a_net_that_is_there():
    net = alive_net("poisson")
    net.encoder.straight_through = True
    assert image_gradient(net).abs().max() > 0


@pytest.mark.parametrize("name", RANDOM)
def test_images_that_ask_for_a_gradient_pass_where_none_is_recorded(name):
    with torch.no_grad():
        assert RANDOM[name](2, 1, 3)(IMAGES.clone().requires_grad_(), 2).shape == (2, 1, 1, 3, 3)


def test_the_gradient_of_images_shown_as_they_are_stays_whole():
    images = IMAGES.clone().requires_grad_()
    ENCODERS["direct"](5, 1, 3)(images, 5).sum().backward()
    assert (images.grad == 5).all()


def test_training_draws_what_it_drew_and_has_no_gradient_of_images():
    torch.manual_seed(0)
    spikes = PoissonEncoder(3, 1, 3)(IMAGES, 3)
    torch.manual_seed(0)
    draws = torch.stack([torch.rand(1, 1, 3, 3) for _ in range(3)])
    assert torch.equal(spikes, (2 * draws <= IMAGES.abs()) * IMAGES.sign())
    assert not spikes.requires_grad
