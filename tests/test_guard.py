"""The engine computes the net that it is given: what was changed, before or after attach, runs plain, with a reason."""

import copy
import io
import pickle
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from test_fused import make_net, tiny_archs  # noqa: F401 (a fixture)
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fused
import model
from encoders import DirectEncoder
from fused import guard
from model import BNTT, LIF, SpikingVGG
from utill import SpikeMeter

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
LABELS = torch.arange(4)


class Arctan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad / (1 + (3.1416 * v) ** 2)


class HardReset(LIF):
    def step(self, current, membrane):
        spikes, membrane = super().step(current, membrane)
        return spikes, membrane * (1 - spikes.detach())


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return F.conv2d(x, (w - w.mean()) / w.std(), None, 1, 1)


class HalfBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 0.5


class Doubled(BNTT):
    def forward(self, x, t0=0):
        return 2 * super().forward(x, t0)


def own_fire(net):
    for layer in net.layers():
        layer.lif.fire = types.MethodType(lambda self, u: Arctan.apply(u / self.threshold - 1), layer.lif)


def parameter(name, value):
    def change(net):
        for layer in net.layers():
            setattr(layer.lif, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    return change


def hard_reset(net):
    for layer in net.layers():
        setattr(net, f"lif_{layer.name}", HardReset(0.95))


def put(name, make):
    """Another module in the place of `name`, with its weights."""

    def change(net):
        module = make(getattr(net, name)).double()
        module.load_state_dict(getattr(net, name).state_dict())
        setattr(net, name, module)

    return change


def other_eps(net):
    for t, bn in enumerate(net.bntt1):
        bn.eps = 0.1 * (t + 1)


def frozen_steps(net):
    for layer in net.layers():
        for bn in list(layer.norm)[:2]:
            bn.eval()


def half_batch_norm(net):
    for t, bn in enumerate(net.bntt1):
        half = HalfBatchNorm(len(bn.weight), bn.eps, bn.momentum).double()
        half.bias = None
        net.bntt1[t] = half


CHANGES = {
    "surrogate of one's own": own_fire,
    "learnable leak": parameter("leak", 0.95),
    "learnable threshold": parameter("threshold", 1.0),
    "hard reset": hard_reset,
    "step of one neuron": lambda net: setattr(net.lif_conv1, "step", lambda i, u: (i * 0, u)),
    "norm that doubles": put("bntt1", lambda norm: Doubled(len(norm), len(norm[0].weight), True)),
    "BatchNorm of one's own": half_batch_norm,
    "eps a step": other_eps,
    "momentum of one step": lambda net: setattr(net.bntt1[1], "momentum", 0.5),
    "cumulative momentum": lambda net: setattr(net.bntt1[1], "momentum", None),
    "first steps frozen": frozen_steps,
    "forward of one BatchNorm": lambda net: setattr(net.bntt1[0], "forward", lambda x: x),
    "weight standardisation": put("conv2", lambda c: Standardised(*c.weight.shape[1::-1], 3, padding=1, bias=False)),
    "pruned weights": lambda net: prune.l1_unstructured(net.conv2, "weight", 0.5),
    "spectral norm": lambda net: nn.utils.parametrizations.spectral_norm(net.conv2),
    "pool of another kind": lambda net: setattr(net, "pool_conv1", nn.MaxPool2d(2)),
    "hook that halves a pool": lambda net: net.pool_conv1.register_forward_hook(lambda m, i, out: out * 0.5),
    "hook that halves spikes": lambda net: net.lif_conv1.register_forward_hook(lambda m, i, o: (o[0] * 0.5, o[1])),
    "hook that doubles a synapse's input": lambda net: net.conv2.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "hook on a gradient": lambda net: net.conv2.register_full_backward_hook(lambda m, i, out: (i[0] * 2,)),
    "readout with a hook": lambda net: net.readout.register_forward_hook(lambda m, i, out: out * 3),
    "output currents of one net": lambda net: setattr(
        net, "output_currents", lambda x, t0, steps, fire: 2 * SpikingVGG.output_currents(net, x, t0, steps, fire)
    ),
}  # fmt: skip


def two_steps(net):
    """Losses, gradients and buffers of two training steps."""
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.1), []
    for seed in range(2):
        torch.manual_seed(seed)
        loss = F.cross_entropy(net(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return torch.tensor(losses), gradients, dict(net.named_buffers())


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-9)
    for part in (1, 2):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert (value is None) == (other[part][name] is None), name
            if value is not None:
                torch.testing.assert_close(other[part][name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_net_computes_what_its_own_code_does(change, when):
    plain, other = make_net(), make_net()
    torch.manual_seed(3)
    CHANGES[change](plain)
    torch.manual_seed(3)
    if when == "after":
        fused.attach(other)
        torch.manual_seed(3)
        CHANGES[change](other)
        with pytest.warns(UserWarning, match="runs plain: the fused engine"):
            result = two_steps(other)
    else:
        CHANGES[change](other)
        with pytest.raises(fused.Unsupported, match="the fused engine"):
            fused.attach(other)
        result = two_steps(other)
    assert_same(two_steps(plain), result)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (model, "SurrogateSpike", Arctan),
        (LIF, "fire", lambda self, u: Arctan.apply(u / self.threshold - 1)),
        (LIF, "step", HardReset.step),
        (BNTT, "forward", lambda self, x, t0=0: x),
        (nn.Conv2d, "forward", lambda self, x: F.conv2d(x, self.weight.abs(), None, 1, 1)),
    ],
)
def test_code_replaced_while_running_is_noticed(owner, name, value, when, monkeypatch):
    net = make_net()
    if when == "after":
        fused.attach(net)
    if value is HardReset.step:
        before = LIF.step
        value = lambda self, i, u: (before(self, i, u)[0], before(self, i, u)[1] * 0)  # noqa: E731
    monkeypatch.setattr(owner, name, value)
    if when == "after":
        with pytest.warns(UserWarning, match="runs plain: the fused engine does not fit this net"):
            result = two_steps(net)
        assert_same(two_steps(make_net()), result)
    else:
        with pytest.raises(fused.Unsupported, match="does not fit this net"):
            fused.attach(net)


def test_another_alpha_of_the_surrogate_runs_fused(monkeypatch):
    monkeypatch.setattr(model, "SURROGATE_ALPHA", 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(two_steps(make_net()), two_steps(fused.attach(make_net())))


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


def test_an_encoder_that_learns_unseen_is_one_clear_error():
    class Scaled(DirectEncoder):
        def forward(self, images, steps, t0=0):
            return factor * super().forward(images, steps, t0)

    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    net = fused.attach(make_net(encoding=Scaled))
    with pytest.raises(RuntimeError, match="call fused.detach"):
        net(IMAGES)


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
def test_recomputed_in_the_backward_pass_it_has_the_same_gradients(attach):
    results = []
    for again in (False, True):
        net = attach(make_net())
        torch.manual_seed(0)
        output = checkpoint(net, IMAGES, use_reentrant=False) if again else net(IMAGES)
        F.cross_entropy(output, LABELS).backward()
        results.append({name: p.grad for name, p in net.named_parameters()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_in_ddp_it_computes_the_same(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fused.attach(make_net()))
        losses, *parts = two_steps(wrapped)
        gradients, buffers = ({k.removeprefix("module."): v for k, v in part.items()} for part in parts)
        assert_same(two_steps(make_net()), (losses, gradients, buffers))
        assert wrapped.module.voltages(IMAGES).requires_grad
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["quantisation-aware", "synchronised"])
def test_convolutions_and_norms_of_other_kinds_are_declined(kind):
    net = make_net()
    if kind == "synchronised":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    else:
        net.conv2 = torch.ao.nn.qat.Conv2d(8, 12, 3, padding=1, bias=False, qconfig=get_default_qat_qconfig()).double()
    with pytest.raises(fused.Unsupported, match="does not know the (batch norm|weight layer)"):
        fused.attach(net)
