"""The contenders of benchmark.py: a row of CONTENDERS each, and what builds their nets.

To add one, write a function or class build(ours, spec) and a row. It gets our net, a fresh `SpikingVGG`, and the spec:
a dict of arch, num_steps, batch_size, img_size, device and authors (the folder of their code, or None). It returns a
net, images [B, 3, S, S] -> logits [B, 10], that draws the same Poisson spikes and whose parameters are those of ours,
in the same order: they are overwritten with our weights. It imports what it needs, and raises `LeftOut` where it cannot
run.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from model import BN_EPS, BN_MOMENTUM, SURROGATE_ALPHA, PoissonGen, SpikingVGG

LEAK, NUM_CLS = 0.95, 10


class LeftOut(Exception):
    """Why a contender does not run, in one sentence."""


# ---- Their nets ------------------------------------------------------------------------------------------


def plain_net(ours, spec):
    return ours


def fused_net(ours, spec):
    import fused

    try:
        return fused.attach(ours)
    except fused.Unsupported as error:
        raise LeftOut(str(error)) from None


def authors_net(ours, spec):
    """The authors' class, imported from the model.py that the user named."""
    if not spec["authors"]:
        raise LeftOut("no --authors PATH was given")
    module_spec = importlib.util.spec_from_file_location("authors_model", Path(spec["authors"]) / "model.py")
    module = importlib.util.module_from_spec(module_spec)
    sys.dont_write_bytecode = True
    module_spec.loader.exec_module(module)
    if spec["device"] == "cpu":
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    builder = getattr(module, f"SNN_{spec['arch'].upper()}_BNTT")
    net = builder(spec["num_steps"], leak_mem=LEAK, img_size=spec["img_size"], num_cls=NUM_CLS)
    for norm in batch_norms(net):
        norm.bias = None  # their later commits say so themselves
    return net


class ScaleGrad(torch.autograd.Function):
    """Identity whose gradient is scaled: SpikingJelly's triangle has height 1, the paper's 0.3."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return SURROGATE_ALPHA * grad


class SpikingJellyNet(nn.Module):
    """SpikingJelly's layers in multi-step mode, with its own BNTT."""

    def __init__(self, ours, spec):
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        super().__init__()
        self.num_steps, self.forget = spec["num_steps"], functional.reset_net
        bn = dict(eps=BN_EPS, momentum=BN_MOMENTUM, step_mode="m")
        pools = {nn.AvgPool2d: lambda: layer.AvgPool2d(2, step_mode="m"), nn.Identity: nn.Identity}
        pools[nn.AdaptiveAvgPool2d] = lambda: layer.AdaptiveAvgPool2d(1, step_mode="m")
        self.blocks = nn.ModuleList()
        for part in ours.layers():
            features, inputs = part.synapse.weight.shape[:2]
            synapse, norm = layer.Linear(inputs, features, bias=False, step_mode="m"), layer.BatchNormThroughTime1d
            if isinstance(part.synapse, nn.Conv2d):
                synapse = layer.Conv2d(inputs, features, 3, padding=1, bias=False, step_mode="m")
                norm = layer.BatchNormThroughTime2d
            lif = neuron.LIFNode(
                tau=1 / (1 - LEAK),
                decay_input=False,
                v_threshold=1.0,
                v_reset=None,
                detach_reset=True,
                surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
                step_mode="m",
            )
            parts = synapse, norm(self.num_steps, features, **bn), lif, pools[type(part.pool)]()
            self.blocks.append(nn.ModuleList(parts))
        self.readout = layer.Linear(*reversed(ours.readout.weight.shape), bias=False, step_mode="m")

    def forward(self, images):
        x = torch.stack([PoissonGen(images) for _ in range(self.num_steps)])  # [T, B, C, H, W]
        for synapse, norm, lif, pool in self.blocks:
            x = x.flatten(2) if isinstance(synapse, nn.Linear) else x
            x = pool(ScaleGrad.apply(lif(norm(synapse(x)))))
        logits = self.readout(x.flatten(2)).mean(0)
        self.forget(self)
        return logits


class SnnTorchNet(nn.Module):
    """snnTorch's neuron and BNTT in a time loop; its own reset comes one step late, so it is done outside."""

    def __init__(self, ours, spec):
        import snntorch

        super().__init__()
        self.num_steps = spec["num_steps"]
        triangle = snntorch.surrogate.custom_surrogate(
            lambda v, grad, spikes: grad * SURROGATE_ALPHA * (1 - v.abs()).clamp(min=0)
        )
        self.blocks = nn.ModuleList()
        for part in ours.layers():
            bntt = snntorch.BatchNormTT2d if isinstance(part.synapse, nn.Conv2d) else snntorch.BatchNormTT1d
            norm = bntt(part.synapse.weight.shape[0], self.num_steps, eps=BN_EPS, momentum=BN_MOMENTUM)
            leaky = snntorch.Leaky(LEAK, threshold=1.0, spike_grad=triangle, reset_mechanism="none")
            self.blocks.append(nn.ModuleList([part.synapse, norm, leaky, part.pool]))
        self.readout = ours.readout

    def forward(self, images):
        membranes, voltage = [None] * len(self.blocks), 0
        for t in range(self.num_steps):
            x = PoissonGen(images)
            for i, (synapse, norm, leaky, pool) in enumerate(self.blocks):
                current = norm[t](synapse(x.flatten(1) if isinstance(synapse, nn.Linear) else x))
                membrane = torch.zeros_like(current) if membranes[i] is None else membranes[i]
                spikes, membrane = leaky(current, membrane)
                spikes = spikes.to(current.dtype)
                membranes[i] = membrane - spikes.detach()
                x = pool(spikes)
            voltage = voltage + self.readout(x.flatten(1))
        for _, _, leaky, _ in self.blocks:
            leaky.mem = leaky.mem.detach()  # or the module keeps the graph until the next step
        return voltage / self.num_steps


# ---- The table ---------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    build: Callable  # of (ours, spec): see above
    bf16: bool = False  # under autocast to bfloat16
    graph: bool = False  # the training step replayed as one CUDA graph


CONTENDERS = {
    "authors": Contender(authors_net),
    "ours-plain": Contender(plain_net),
    "ours-plain-bf16": Contender(plain_net, bf16=True),
    "ours-fused": Contender(fused_net),
    "ours-fused-bf16": Contender(fused_net, bf16=True),
    "ours-fused-bf16-graph": Contender(fused_net, bf16=True, graph=True),
    "spikingjelly": Contender(SpikingJellyNet),
    "spikingjelly-bf16": Contender(SpikingJellyNet, bf16=True),
    "snntorch": Contender(SnnTorchNet),
}


def whose(name):
    """The first contender of the same code: those that differ in precision alone are one net."""
    return next(first for first, row in CONTENDERS.items() if row.build is CONTENDERS[name].build)


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def build(name, spec):
    """A contender's net on its device, in the default dtype, with the weights that our net draws from seed 0."""
    row = CONTENDERS[name]
    if row.graph and spec["device"] == "cpu":
        raise LeftOut("a CUDA graph needs a GPU")
    torch.manual_seed(0)
    ours = SpikingVGG(spec["arch"], spec["num_steps"], LEAK, spec["img_size"], NUM_CLS).to(spec["device"])
    weights = [p.detach().clone() for p in ours.parameters()]
    try:
        net = row.build(ours, spec).to(spec["device"])
    except ModuleNotFoundError as error:
        raise LeftOut(f"{error.name} is not installed (pip install --no-deps -r requirements-bench.txt)") from None
    for parameter, weight in zip(net.parameters(), weights, strict=True):
        assert parameter.shape == weight.shape
        parameter.data.copy_(weight)
    return net
