"""Changes to a net, each before and after attach: the numbers of the net's own code, or one clear error.

docs/changes.md says which run fused, and why the others do not. `PYTHONPATH=. python tests/test_changes.py` prints it.
"""

import copy
import re
import tempfile
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from test_fused import TINY, make_net, only_looks, tiny_archs  # noqa: F401 (a fixture)
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import baselines
import encoders
import fused
import model
from baselines import IF, PLIF, TEBN, LearntLIF, TdBN
from model import ARCHS, BNTT, LIF, SpikingVGG, SurrogateSpike

PAGE = Path(__file__).parent.parent / "docs" / "changes.md"
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
LABELS = torch.arange(4)
CHANGES = {}  # {(part, description): change(net, patch) -> the changed net, or None for `net` itself}


def change(part, description):
    def keep(function):
        CHANGES[part, description] = function
        return function

    return keep


def replace(net, name, module, load=True):
    """Put `module` in the place of `name`, with its weights."""
    module = module.double()
    if load:
        module.load_state_dict(getattr(net, name).state_dict(), strict=False)
    setattr(net, name, module)


def each_neuron(net, make):
    for layer in net.layers():
        setattr(net, f"lif_{layer.name}", make(layer.lif).double())


def as_class(net, **methods):
    """The net as one of a class of the user's own."""
    base = fused.guard.plain_class(net)
    mine = type("Mine", (base,), methods)
    net.__class__ = (
        type(f"Fused{mine.__name__}", (fused.FusedNet, mine), {}) if isinstance(net, fused.FusedNet) else mine
    )


class Arctan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad / (1 + (3.1416 * v) ** 2)


def arctan(self, membrane):
    return Arctan.apply(membrane / self.threshold - 1)


# ---- Surrogate -----------------------------------------------------------------------------------------


@change("surrogate", "arctan, set on each neuron")
def _(net, patch):
    for layer in net.layers():
        layer.lif.fire = types.MethodType(arctan, layer.lif)


@change("surrogate", "arctan, in a subclass of LIF")
def _(net, patch):
    each_neuron(net, lambda lif: type("ArctanLIF", (LIF,), {"fire": arctan})(lif.leak))


@change("surrogate", "`model.SurrogateSpike` replaced")
def _(net, patch):
    patch.setattr(model, "SurrogateSpike", Arctan)


@change("surrogate", "its `backward` replaced")
def _(net, patch):
    patch.setattr(model.SurrogateSpike, "backward", staticmethod(lambda ctx, g: g * (ctx.saved_tensors[0].abs() < 0.5)))


class Annealed(Arctan):
    slope = torch.tensor(3.1416, dtype=torch.float64)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad / (1 + (Annealed.slope * v) ** 2)


@change("surrogate", "one that reads a tensor")
def _(net, patch):
    patch.setattr(model, "SurrogateSpike", Annealed)


@change("surrogate", "`SURROGATE_ALPHA` = 0.7")
def _(net, patch):
    patch.setattr(model, "SURROGATE_ALPHA", 0.7)


# ---- Neuron --------------------------------------------------------------------------------------------


class HardReset(LIF):
    def step(self, current, membrane):
        spikes, membrane = super().step(current, membrane)
        return spikes, membrane * (1 - spikes.detach())


@change("neuron", "hard reset")
def _(net, patch):
    each_neuron(net, lambda lif: HardReset(lif.leak))


@change("neuron", "hard reset, from baselines.py")
def _(net, patch):
    each_neuron(net, lambda lif: baselines.HardReset(lif.leak))


@change("neuron", "hard reset, from baselines.py, whose `step` was replaced")
def _(net, patch):
    each_neuron(net, lambda lif: baselines.HardReset(lif.leak))
    patch.setattr(baselines.HardReset, "step", LIF.step)


@change("neuron", "a `hard_reset` that its code does not know")
def _(net, patch):
    net.lif_conv1.hard_reset = True


@change("neuron", "alpha 0.7, from baselines.py")
def _(net, patch):
    each_neuron(net, lambda lif: baselines.ScaledSurrogate(lif.leak, alpha=0.7))


@change("neuron", "alpha 0.7, from baselines.py, in a class with a `fire` of its own")
def _(net, patch):
    each_neuron(net, lambda lif: type("Mine", (baselines.ScaledSurrogate,), {"fire": arctan})(lif.leak, alpha=0.7))


@change("neuron", "an `alpha` that its code does not know")
def _(net, patch):
    net.lif_conv1.alpha = 0.7


@change("neuron", "dropout, from baselines.py")
def _(net, patch):
    each_neuron(net, lambda lif: baselines.DropoutLIF(lif.leak))


@change("neuron", "IF, from baselines.py")
def _(net, patch):
    each_neuron(net, lambda lif: IF())


@change("neuron", "leak and threshold that are learnt, from baselines.py")
def _(net, patch):
    each_neuron(net, lambda lif: LearntLIF(lif.leak))


@change("neuron", "PLIF, from baselines.py")
def _(net, patch):
    each_neuron(net, lambda lif: PLIF(lif.leak))


@change("neuron", "a learnable leak")
def _(net, patch):
    for layer in net.layers():
        layer.lif.leak = nn.Parameter(torch.tensor(0.95, dtype=torch.float64))


@change("neuron", "a learnable threshold")
def _(net, patch):
    for layer in net.layers():
        layer.lif.threshold = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))


@change("neuron", "a learnable threshold that is negative")
def _(net, patch):
    net.lif_conv1.threshold = nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))


@change("neuron", "a learnable leak and threshold of shape [1]")
def _(net, patch):
    for layer in net.layers():
        layer.lif.leak = nn.Parameter(torch.tensor([0.95], dtype=torch.float64))
        layer.lif.threshold = nn.Parameter(torch.tensor([0.9], dtype=torch.float64))


@change("neuron", "a learnable leak of shape [1], in float32")
def _(net, patch):
    net.lif_conv1.leak = nn.Parameter(torch.tensor([0.95]))


@change("neuron", "a learnable leak for each channel")
def _(net, patch):
    net.lif_conv1.leak = nn.Parameter(torch.linspace(0.5, 0.9, 8, dtype=torch.float64)[:, None, None])


@change("neuron", "a threshold for each channel")
def _(net, patch):
    net.lif_conv1.threshold = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)[:, None, None]


@change("neuron", "leak and threshold of one layer")
def _(net, patch):
    net.lif_conv2.leak, net.lif_conv2.threshold = 0.5, 0.8


@change("neuron", "`spike_order` of one layer")
def _(net, patch):
    net.lif_conv2.spike_order, net.lif_conv2.delay = "fire_first", 1


@change("neuron", "a negative threshold")
def _(net, patch):
    net.lif_conv1.threshold = -0.5


class Jittered(LIF):
    @property
    def threshold(self):
        return vars(self)["threshold"] + 0.5 * torch.rand(1).item()

    @threshold.setter
    def threshold(self, value):
        vars(self)["threshold"] = value


@change("neuron", "a threshold that is a property")
def _(net, patch):
    each_neuron(net, lambda lif: Jittered(lif.leak))


@change("neuron", "noise on the membrane of one layer")
def _(net, patch):
    step = LIF.step
    net.lif_conv1.step = lambda i, u: step(net.lif_conv1, i + 0.1 * torch.randn_like(i), u)


@change("neuron", "one neuron for two layers")
def _(net, patch):
    net.lif_conv2 = net.lif_conv1


# ---- Norm ----------------------------------------------------------------------------------------------


class Doubled(BNTT):
    def forward(self, x, t0=0):
        return 2 * super().forward(x, t0)


class HalfBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 0.5


class Norm(nn.Module):
    """A norm that does not describe itself."""

    def forward(self, x, t0=0):
        return F.layer_norm(x, x.shape[2:])


@change("norm", "tdBN, from baselines.py")
def _(net, patch):
    replace(net, "bntt1", TdBN(4, 8, True), load=False)


@change("norm", "TEBN, from baselines.py")
def _(net, patch):
    replace(net, "bntt1", TEBN(4, 8, True), load=False)


@change("norm", "BNTT with a `forward` that doubles")
def _(net, patch):
    replace(net, "bntt1", Doubled(4, 8, True))


@change("norm", "LayerNorm")
def _(net, patch):
    replace(net, "bntt1", Norm(), load=False)


@change("norm", "a BatchNorm2d of one's own at one step")
def _(net, patch):
    half = HalfBatchNorm(8, 1e-4)
    half.bias = None
    net.bntt1[1] = half.double()


@change("norm", "a beta at every step")
def _(net, patch):
    for bn in net.bntt1:
        bn.bias = nn.Parameter(torch.full((8,), 0.3, dtype=torch.float64))


@change("norm", "another eps in one layer")
def _(net, patch):
    for bn in net.bntt1:
        bn.eps = 0.1


@change("norm", "another eps at each step")
def _(net, patch):
    for t, bn in enumerate(net.bntt1):
        bn.eps = 0.1 * (t + 1)


@change("norm", "another momentum at one step")
def _(net, patch):
    net.bntt1[1].momentum = 0.5


@change("norm", "momentum None: a cumulative mean")
def _(net, patch):
    for bn in net.bntt1:
        bn.momentum = None


@change("norm", "no running statistics")
def _(net, patch):
    for bn in net.bntt1:
        bn.track_running_stats, bn.running_mean, bn.running_var = False, None, None


class Gated(BNTT):
    """A BNTT that holds more than its BatchNorms."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.gate = nn.Softsign()

    def forward(self, x, t0=0):
        return self.gate(super().forward(x, t0))

    def affine(self, T):
        return super().affine(T)


class Tripled(BNTT):
    """A BNTT whose list of factors says that it is none."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.factors = [3.0]

    def forward(self, x, t0=0):
        return self.factors[0] * super().forward(x, t0)

    def affine(self, T):
        return super().affine(T)


@change("norm", "one that says it is a BNTT, with a module of its own")
def _(net, patch):
    replace(net, "bntt1", Gated(4, 8, True))


@change("norm", "one that says it is a BNTT, with a list of its own")
def _(net, patch):
    replace(net, "bntt1", Tripled(4, 8, True))


@change("norm", "variances that all steps share")
def _(net, patch):
    for bn in net.bntt1:
        bn.running_var = net.bntt1[0].running_var


@change("norm", "means in one memory")
def _(net, patch):
    for mean, bn in zip(torch.zeros(1, 8, dtype=torch.float64).expand(4, 8), net.bntt1, strict=True):
        bn.running_mean = mean


@change("norm", "running statistics that all steps share")
def _(net, patch):
    for bn in net.bntt1:
        bn.running_mean, bn.running_var = net.bntt1[0].running_mean, net.bntt1[0].running_var


@change("norm", "a BatchNorm of another layer")
def _(net, patch):
    net.bntt_fc[1] = net.bntt_fc[0]


@change("norm", "one layer in eval mode")
def _(net, patch):
    net.bntt2.eval()


@change("norm", "some steps in eval mode")
def _(net, patch):
    for bn in list(net.bntt2)[:2]:
        bn.eval()


@change("norm", "gammas frozen")
def _(net, patch):
    for bn in net.bntt1:
        bn.weight.requires_grad_(False)


@change("norm", "two layers that share one")
def _(net, patch):
    net.conv3 = nn.Conv2d(12, 12, 3, padding=1, bias=False, dtype=torch.float64)
    net.fc1 = nn.Linear(12 * 16, 24, bias=False, dtype=torch.float64)
    net.bntt3 = net.bntt2


# ---- Synapse -------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return F.conv2d(x, (w - w.mean()) / w.std(), None, 1, 1)


@change("synapse", "weight standardisation")
def _(net, patch):
    replace(net, "conv2", Standardised(8, 12, 3, padding=1, bias=False))


@change("synapse", "kernel of 5x5")
def _(net, patch):
    replace(net, "conv2", nn.Conv2d(8, 12, 5, padding=2, bias=False), load=False)


@change("synapse", "a bias")
def _(net, patch):
    replace(net, "conv2", nn.Conv2d(8, 12, 3, padding=1))


@change("synapse", "dilation")
def _(net, patch):
    replace(net, "conv2", nn.Conv2d(8, 12, 3, padding=2, dilation=2, bias=False))


@change("synapse", "groups")
def _(net, patch):
    replace(net, "conv2", nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), load=False)


@change("synapse", "circular padding")
def _(net, patch):
    replace(net, "conv2", nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular", bias=False))


@change("synapse", "dropout before it")
def _(net, patch):
    class Dropped(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.2, self.training))

    replace(net, "conv2", Dropped(8, 12, 3, padding=1, bias=False))


@change("synapse", "weights frozen")
def _(net, patch):
    net.conv2.weight.requires_grad_(False)


@change("synapse", "two layers that share a weight")
def _(net, patch):
    net.conv3 = nn.Conv2d(12, 12, 3, padding=1, bias=False, dtype=torch.float64)
    net.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False, dtype=torch.float64)
    net.fc1 = nn.Linear(12 * 16, 24, bias=False, dtype=torch.float64)
    replace(net, "bntt3", BNTT(4, 12, True), load=False)
    net.conv3.weight = nn.Parameter(net.conv2.weight.detach().repeat(1, 2, 1, 1)[:, :12])


# ---- Pool ----------------------------------------------------------------------------------------------


@change("pool", "MaxPool2d")
def _(net, patch):
    net.pool_conv1 = nn.MaxPool2d(2)


@change("pool", "a strided AvgPool2d of 3x3")
def _(net, patch):
    net.pool_conv1 = nn.AvgPool2d(3, stride=2, padding=1)


@change("pool", "average pool with dropout")
def _(net, patch):
    net.pool_conv1 = nn.Sequential(nn.AvgPool2d(2), nn.Dropout(0.1))


@change("pool", "a sum in place of the average")
def _(net, patch):
    net.pool_conv1 = nn.AvgPool2d(2, divisor_override=1)


@change("pool", "AvgPool2d moved by one layer")
def _(net, patch):
    net.pool_conv1, net.pool_conv2 = nn.Identity(), nn.AvgPool2d(2)


# ---- Readout -------------------------------------------------------------------------------------------


@change("readout", "a bias")
def _(net, patch):
    replace(net, "fc2", nn.Linear(24, 5))


@change("readout", "two linear layers")
def _(net, patch):
    replace(net, "fc2", nn.Sequential(nn.Linear(24, 9, bias=False), nn.Linear(9, 5, bias=False)), load=False)


@change("readout", "a property of one's own class")
def _(net, patch):
    as_class(net, readout=property(lambda self: lambda x: 2 * self.fc2(x)))


@change("readout", "weights frozen")
def _(net, patch):
    net.fc2.weight.requires_grad_(False)


# ---- Encoder -------------------------------------------------------------------------------------------


class Fading(encoders.PoissonEncoder):
    """An encoder of one's own: the image fades with time."""

    def forward(self, images, steps, t0=0):
        return torch.stack([self.step(images * 0.8**t) for t in range(t0, t0 + steps)])


class Scaled(encoders.DirectEncoder):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images, steps, t0=0):
        return self.scale * super().forward(images, steps, t0)


@change("encoder", "direct")
def _(net, patch):
    net.encoder = encoders.DirectEncoder(4, 3, 8)


@change("encoder", "one of one's own")
def _(net, patch):
    net.encoder = Fading(4, 3, 8)


@change("encoder", "one that learns")
def _(net, patch):
    net.encoder = Scaled(4, 3, 8).double()


class Counting(encoders.PoissonEncoder):
    """Sees more of the image at every call."""

    calls = 0

    def forward(self, images, steps, t0=0):
        self.calls += 1
        return super().forward(images / self.calls, steps, t0)


@change("encoder", "one with a state")
def _(net, patch):
    net.encoder = Counting(4, 3, 8)


class Dropping(encoders.DirectEncoder):
    """Has a module of its own, with statistics of its own, and draws numbers that it does not use."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.inside = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))

    def forward(self, images, steps, t0=0):
        torch.rand(1)
        return super().forward(self.inside(images), steps, t0)


@change("encoder", "one with dropout and a BatchNorm")
def _(net, patch):
    net.encoder = Dropping(4, 3, 8).double()


@change("encoder", "one that changes the size")
def _(net, patch):
    shrink = lambda self, images, steps, t0=0: images[..., ::2, ::2].expand(steps, -1, -1, -1, -1)  # noqa: E731
    net.encoder = type("Shrinking", (encoders.DirectEncoder,), {"forward": shrink})(4, 3, 8)
    net.pool_conv1 = nn.Identity()


@change("encoder", "noise added by a hook")
def _(net, patch):
    net.encoder.register_forward_hook(lambda m, i, out: out + 0.1 * torch.randn_like(out))


# ---- The net's own methods -----------------------------------------------------------------------------


@change("voltages", "`voltages` that halve")
def _(net, patch):
    as_class(net, voltages=lambda self, images, steps=None: SpikingVGG.voltages(self, images, steps) / 2)


@change("voltages", "`voltages` set on this net")
def _(net, patch):
    own = net.voltages
    net.voltages = lambda images, steps=None: own(images, steps) / 2


@change("voltages", "`stream` that leaks")
def _(net, patch):
    def stream(self, images, steps=None, block=1):
        for t, voltage in enumerate(SpikingVGG.stream(self, images, steps, 1)):
            yield voltage * 0.9**t

    as_class(net, stream=stream)


@change("voltages", "`output_currents` that double")
def _(net, patch):
    own = SpikingVGG.output_currents
    net.output_currents = lambda x, t0, steps, fire: 2 * own(net, x, t0, steps, fire)


@change("voltages", "`output_currents` set on the class of the net")
def _(net, patch):
    own = SpikingVGG.output_currents
    patch.setattr(type(net), "output_currents", lambda self, *args: 2 * own(self, *args))


@change("voltages", "`forward` with a softmax over steps")
def _(net, patch):
    as_class(net, forward=lambda self, images: self.voltages(images).softmax(-1).mean(0).log())


@change("voltages", "`layers` that leave one out")
def _(net, patch):
    as_class(net, layers=lambda self: [x for x in SpikingVGG.layers(self) if x.name != "fc1"])
    net.fc2 = nn.Linear(20 * 4, 5, bias=False, dtype=torch.float64)


# ---- Hooks ---------------------------------------------------------------------------------------------


@change("hooks", "one that only looks at spikes")
def _(net, patch):
    net.lif_conv1.register_forward_hook(only_looks(lambda m, i, out: None))


@change("hooks", "one on a neuron that keeps spikes")
def _(net, patch):
    net.lif_conv1.register_forward_hook(lambda m, i, out: None)


@change("hooks", "one on a neuron that halves spikes")
def _(net, patch):
    net.lif_conv1.register_forward_hook(lambda m, i, out: (out[0] * 0.5, out[1]))


@change("hooks", "one on a pool that halves")
def _(net, patch):
    net.pool_conv1.register_forward_hook(lambda m, i, out: out * 0.5)


@change("hooks", "one before a synapse that doubles")
def _(net, patch):
    net.conv2.register_forward_pre_hook(lambda m, i: (2 * i[0],))


@change("hooks", "one on a norm")
def _(net, patch):
    net.bntt1[2].register_forward_hook(lambda m, i, out: out * 0.5)


@change("hooks", "one on the readout that triples")
def _(net, patch):
    net.readout.register_forward_hook(lambda m, i, out: out * 3)


@change("hooks", "one on a module's gradient")
def _(net, patch):
    net.conv2.register_full_backward_hook(lambda m, i, out: (i[0] * 2,))


@change("hooks", "one on a parameter's gradient")
def _(net, patch):
    net.conv2.weight.register_hook(lambda grad: grad * 2)


@change("hooks", "one on the whole net")
def _(net, patch):
    net.register_forward_hook(lambda m, i, out: out * 3)


@change("hooks", "one for all modules")
def _(net, patch):
    hook = lambda m, i, out: out * 2 if isinstance(m, nn.Linear) else out  # noqa: E731
    patch.setitem(nn.modules.module._global_forward_hooks, 0, hook)


# ---- Code replaced while running -----------------------------------------------------------------------


@change("monkeypatches", "`LIF.fire`")
def _(net, patch):
    patch.setattr(LIF, "fire", arctan)


@change("monkeypatches", "`LIF.step`")
def _(net, patch):
    step = LIF.step
    patch.setattr(LIF, "step", lambda self, i, u: (step(self, i, u)[0], step(self, i, u)[1] * 0))


@change("monkeypatches", "`BNTT.forward`")
def _(net, patch):
    patch.setattr(BNTT, "forward", lambda self, x, t0=0: x)


@change("monkeypatches", "`nn.Conv2d.forward`")
def _(net, patch):
    patch.setattr(nn.Conv2d, "forward", lambda self, x: F.conv2d(x, self.weight.abs(), None, 1, 1))


@change("monkeypatches", "`model.each_step`")
def _(net, patch):
    own = model.each_step
    patch.setattr(model, "each_step", lambda module, x: own(module, x) * 0.9)


@change("monkeypatches", "`SpikingVGG._currents`")
def _(net, patch):
    own = SpikingVGG._currents
    patch.setattr(SpikingVGG, "_currents", staticmethod(lambda *args: own(*args) * 0.9))


@change("monkeypatches", "`nn.BatchNorm2d.__call__`")
def _(net, patch):
    patch.setattr(nn.BatchNorm2d, "__call__", lambda self, x: nn.Module.__call__(self, x) * 0.5)


@change("monkeypatches", "`F.batch_norm`")
def _(net, patch):
    own = F.batch_norm
    patch.setattr(F, "batch_norm", lambda *args: own(*args) * 0.5)


@change("monkeypatches", "the code of `LIF.fire`, as an editor's autoreload does")
def _(net, patch):
    patch.setattr(LIF.fire, "__code__", (lambda self, membrane: SurrogateSpike.apply(membrane - 2)).__code__)


@change("monkeypatches", "`forward` of one BatchNorm")
def _(net, patch):
    net.bntt1[0].forward = lambda x: x


@change("monkeypatches", "`step` of one neuron")
def _(net, patch):
    net.lif_conv1.step = lambda i, u: (i * 0, u)


# ---- Dtype and device ----------------------------------------------------------------------------------


@change("dtype and device", "half precision")
def _(net, patch):
    return net.half()


@change("dtype and device", "weights in channels_last")
def _(net, patch):
    return net.to(memory_format=torch.channels_last)


@change("dtype and device", "norms in float32, weights in float64")
def _(net, patch):
    for layer in net.layers():
        layer.norm.float()


@change("dtype and device", "no memory for its weights (meta)")
def _(net, patch):
    return net.to("meta")


@change("dtype and device", "weights as a view")
def _(net, patch):
    net.conv2.weight = nn.Parameter(net.conv2.weight.detach().transpose(2, 3))


# ---- Wrappers ------------------------------------------------------------------------------------------


@change("wrappers", "DistributedDataParallel")
def _(net, patch):
    return nn.parallel.DistributedDataParallel(net)


@change("wrappers", "DataParallel")
def _(net, patch):
    return nn.DataParallel(net)


@change("wrappers", "AveragedModel (SWA)")
def _(net, patch):
    return AveragedModel(net)


@change("wrappers", "a deep copy")
def _(net, patch):
    return copy.deepcopy(net)


@change("wrappers", "prune.l1_unstructured")
def _(net, patch):
    prune.l1_unstructured(net.conv2, "weight", 0.5)


@change("wrappers", "spectral_norm")
def _(net, patch):
    parametrizations.spectral_norm(net.conv2)


@change("wrappers", "quantisation-aware convolution")
def _(net, patch):
    conv = torch.ao.nn.qat.Conv2d(8, 12, 3, padding=1, bias=False, qconfig=get_default_qat_qconfig())
    conv.weight.data.copy_(net.conv2.weight)
    net.conv2 = conv.double()


@change("wrappers", "SyncBatchNorm")
def _(net, patch):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


@change("wrappers", "activation checkpointing")
def _(net, patch):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net

        def forward(self, images):
            return torch.utils.checkpoint.checkpoint(self.module, images, use_reentrant=False)

    return Checkpointed()


@change("wrappers", "functional_call")
def _(net, patch):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net

        def forward(self, images):
            halved = {name: p / 2 for name, p in self.module.named_parameters() if "conv" in name}
            return torch.func.functional_call(self.module, halved, (images,))

    return Called()


# ---- The comparison ------------------------------------------------------------------------------------


def two_steps(net):
    """Losses, gradients, buffers and random state of two training steps; the type of what they raise instead."""
    dtype, device = next((p.dtype, p.device) for p in net.parameters())
    images, labels = IMAGES.to(device, dtype), LABELS.to(device)
    optimizer, losses = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1), []
    try:
        for seed in range(2):
            torch.manual_seed(seed)
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    except Exception as error:
        return type(error)
    named = ((name.removeprefix("module."), p.grad) for name, p in net.named_parameters())
    buffers = ((name.removeprefix("module."), b) for name, b in net.named_buffers())
    return {"losses": torch.stack(losses), **dict(named), **dict(buffers), "random state": torch.get_rng_state()}


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (result[name] is None), name
        if value is not None:
            torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-9, msg=name)


def outcome(key, when, patch):
    """What a changed net that was attached computes, and how it ran: "fused", or why plain."""
    net, reason, change = make_net(), "fused", CHANGES[key]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if when == "after":
            fused.attach(net)
        torch.manual_seed(3)
        net = change(net, patch) or net
        if when == "before":
            inner = next(m for m in net.modules() if isinstance(m, SpikingVGG))
            try:
                fused.attach(inner)
            except fused.Unsupported as error:
                reason = str(error)
        result = two_steps(net)
    plain = [str(w.message) for w in said if "runs plain" in str(w.message)]
    return result, plain[0].partition("runs plain: ")[2] if plain else reason


def own_numbers(key, patch):
    net = make_net()
    torch.manual_seed(3)
    return two_steps(CHANGES[key](net, patch) or net)


def row(key, before, after):
    before, after = (re.sub(r"\s+", " ", how.removeprefix("the fused engine ")) for how in (before, after))
    return f"| {key[0]} | {key[1]} | {before} | {'the same' if before == after else after} |"


HEAD = """# Changes to a net, and what the fused engine does with them

Each change below was made to a small VGG in float64, before and after `fused.attach`. Two training steps then gave the
losses, gradients, running statistics and random state of the net's own code to 1e-9, or the same error. The table says
how the net ran: `fused`, or plain, with the reason that the engine gives. `pytest tests/test_changes.py` checks every
row.

| part | change | before attach | after attach |
| --- | --- | --- | --- |"""


def measured_row(key):
    """The row of a change, after its numbers were found to be those of the net's own code. AssertionError if not."""
    how = {}
    with pytest.MonkeyPatch.context() as patch:
        expected = own_numbers(key, patch)
    for when in ("before", "after"):
        with pytest.MonkeyPatch.context() as patch:
            result, how[when] = outcome(key, when, patch)
        if isinstance(expected, type):
            assert result is expected
            how[when] += " (its own code cannot run either)" if how[when] != "fused" else ""
            continue
        assert not isinstance(result, type), result
        assert_same(result, expected)
    return row(key, how["before"], how["after"])


@contextmanager
def one_process(folder):
    """What DistributedDataParallel asks for."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def group(tmp_path):
    with one_process(tmp_path):
        yield


@pytest.mark.parametrize("key", CHANGES, ids=" - ".join)
def test_a_changed_net_computes_what_its_own_code_does(key):
    assert measured_row(key) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_a_row_for_each_change():
    head, _, rows = PAGE.read_text(encoding="utf-8").partition(HEAD)
    assert (head, len(rows.strip().splitlines())) == ("", len(CHANGES))


if __name__ == "__main__":
    ARCHS.update(TINY)
    with tempfile.TemporaryDirectory() as folder, one_process(folder):
        print(HEAD, *map(measured_row, CHANGES), sep="\n")
