"""The engine computes the net that it is given: what was changed, before or after attach, runs plain, with a reason."""

import copy
import io
import pickle
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_changes import IMAGES, LABELS, Arctan, assert_same, one_process, two_steps
from test_fused import make_net, tiny_archs  # noqa: F401 (a fixture)
from torch.nn.utils import parametrizations

import fused
import model
from baselines import TdBN
from encoders import DirectEncoder
from fused import guard
from model import BNTT, LIF, SpikingVGG
from utill import SpikeMeter


def test_a_remembered_proof_is_not_taken_for_another_surrogate_of_the_same_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Mine(SpikingVGG):
        pass

    net = Mine("tiny", 4, img_size=8, num_cls=5).double()
    proved = guard._mark(guard._kind(net))
    monkeypatch.setattr(model, "SurrogateSpike", Arctan)
    assert guard._mark(guard._kind(net)) != proved is not None


def test_a_proof_leaves_net_and_random_generator_as_they_are():
    net = make_net()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert guard.prove(net, fused.attached) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_proof_may_use_any_algorithm(monkeypatch):
    """On a GPU the plain loop of a net with a global pool has an operation that is not deterministic."""
    seen = []
    monkeypatch.setattr(
        guard, "_first_difference", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    torch.use_deterministic_algorithms(True)
    try:
        assert guard.prove(make_net(), fused.attached) is None
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, False]


def test_a_penalty_on_spikes_seen_by_a_hook_has_its_gradient():
    gradients = []
    for attach in (lambda net: net, fused.attach):
        net, rates = attach(make_net()), []
        net.lif_conv1.register_forward_hook(lambda m, i, output, rates=rates: rates.append(output[0].mean()))
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (net(IMAGES).square().mean() + sum(rates)).backward()
        gradients.append(net.conv1.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_the_spike_meter_does_not_send_a_net_to_the_plain_loop():
    net = fused.attach(make_net())
    with SpikeMeter(net), warnings.catch_warnings():
        warnings.simplefilter("error")
        net(IMAGES)


@pytest.mark.parametrize("save", ["torch.save", "pickle"])
def test_an_attached_net_is_saved_as_the_plain_net(save):
    net, file = fused.attach(make_net()), io.BytesIO()
    if save == "torch.save":
        torch.save(net, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = pickle.loads(pickle.dumps(net))
    assert type(loaded) is SpikingVGG
    assert_same(two_steps(net), two_steps(loaded))


def test_a_copy_of_an_attached_net_is_attached():
    assert isinstance(copy.deepcopy(fused.attach(make_net())), fused.FusedNet)


def test_a_net_with_voltages_of_its_own_is_asked_for_them():
    class Mine(SpikingVGG):
        def voltages(self, images, steps=None):
            return super().voltages(images, steps) * 0 + 7

    net = Mine("tiny", 4, img_size=8, num_cls=5).double()
    assert (fused.attach(net)(IMAGES) == 7 / 4).all()


def test_an_attached_net_is_exported_as_the_plain_net():
    net = fused.attach(make_net(encoding="direct", dtype=torch.float32).eval())
    exported = torch.export.export(net, (IMAGES.float(),))
    torch.testing.assert_close(exported.module()(IMAGES.float()), fused.detach(net)(IMAGES.float()))


def test_statistics_are_updated_for_an_averaged_net():
    nets = [make_net(), fused.attach(make_net())]
    for net in nets:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.optim.swa_utils.update_bn([IMAGES, -IMAGES], net)
    for name, buffer in nets[0].named_buffers():
        torch.testing.assert_close(dict(nets[1].named_buffers())[name], buffer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["bntt", "bn"])
def test_layers_that_share_a_norm_are_declined(norm):
    net = make_net("tiny_global", norm=norm)
    net.bntt2 = net.bntt2
    for layer in net.layers()[1:]:
        setattr(net, net._norms[layer.name], net.bntt2)
    assert "share a normalisation" in fused.why_not(net)


def test_an_encoder_that_learns_unseen_has_its_gradient():
    class Scaled(DirectEncoder):
        def forward(self, images, steps, t0=0):
            return factor * super().forward(images, steps, t0)

    gradients = []
    for attach in (lambda net: net, fused.attach):
        factor = torch.full((), 2.0, dtype=torch.float64)
        net = attach(make_net(encoding=Scaled)).eval()
        factor.requires_grad_()
        net(IMAGES).square().sum().backward()
        gradients.append(factor.grad)
    assert gradients[0].abs() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_the_module_in_ddp_answers(tmp_path):
    with one_process(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(fused.attach(make_net()))
        assert wrapped.module.voltages(IMAGES).requires_grad


def test_asking_leaves_the_state_of_a_parametrised_layer_as_it_is():
    net = make_net()
    parametrizations.spectral_norm(net.conv2)
    before = copy.deepcopy(net.state_dict())
    assert fused.why_not(net) is not None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_half_precision_net_says_that_it_runs_plain():
    net = fused.attach(make_net()).half()
    with pytest.warns(UserWarning, match="runs plain: the fused engine does not compute in torch.float16"):
        net(IMAGES.half())


class Strong(BNTT):
    """Says that it is a BNTT, and is one where `strength` and STRENGTH are 1."""

    strength = 1.0

    def forward(self, x, t0=0):
        return super().forward(x, t0) * self.strength * STRENGTH

    def affine(self, T):
        return super().affine(T)


STRENGTH = 1.0


def test_a_norm_that_was_proved_is_proved_again_with_another_setting():
    nets = [make_net(norm=Strong) for _ in range(2)]
    for layer in nets[1].layers():
        layer.norm.strength = 2.0
    assert fused.why_not(nets[0]) is None
    assert "does not fit this net" in fused.why_not(nets[1])


def test_a_norm_that_was_proved_is_proved_again_with_another_value_in_its_file(monkeypatch):
    net = make_net(norm=Strong)
    assert fused.why_not(net) is None
    monkeypatch.setattr(sys.modules[__name__], "STRENGTH", 2.0)
    assert "does not fit this net" in fused.why_not(net)


def test_what_a_stream_yields_may_be_changed():
    nets = [make_net().eval(), fused.attach(make_net()).eval()]
    found = []
    for net in nets:
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(torch.cat([voltages.div_(t + 1) for t, voltages in enumerate(net.stream(IMAGES, block=1))]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 3])
def test_a_stream_in_training_has_the_blocks_of_the_plain_loop(block):
    found = []
    for attach in (lambda net: net, fused.attach):
        net = attach(make_net(norm=TdBN))
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            voltages = list(net.stream(IMAGES, block=block))
        found.append({"blocks": torch.tensor([len(v) for v in voltages]), **dict(net.named_buffers())})
    assert_same(*found)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_changes_nothing(device):
    net, found = fused.attach(make_net()), []
    for context in (nullcontext(), torch.device(device)):
        torch.manual_seed(0)
        with context:
            found.append(net.eval()(IMAGES))
    assert torch.equal(*found)


@pytest.mark.parametrize("where", ["weight", "gamma", "image"])
def test_a_nan_spreads_as_in_the_plain_loop(where):
    found = []
    for attach in (lambda net: net, fused.attach):
        net, images = attach(make_net(encoding="direct")), IMAGES.clone()
        place = {"weight": net.conv2.weight, "gamma": net.bntt2[1].weight, "image": images}[where]
        place.data.flatten()[3] = float("nan")
        torch.manual_seed(0)
        F.cross_entropy(net(images), LABELS).backward()
        values = [p.grad for p in net.parameters()] + list(net.buffers())
        found.append([bool(value.isnan().any()) for value in values])
    assert True in found[0]
    assert found[0] == found[1]


@pytest.mark.parametrize("what", ["static method", "code of a function", "default of a function"])
def test_a_remembered_proof_is_of_the_code_in_memory(what, monkeypatch):
    net = make_net()
    shipped = guard._mark(guard._kind(net))
    if what == "static method":
        monkeypatch.setattr(model.SurrogateSpike, "backward", staticmethod(lambda ctx, grad: grad))
    elif what == "code of a function":
        monkeypatch.setattr(LIF.fire, "__code__", (lambda self, u: (u > 1).double()).__code__)
    else:
        monkeypatch.setattr(LIF.forward, "__defaults__", (0.0,))
    assert guard._mark(guard._kind(net)) != shipped is not None
