"""The fused engine: runs a net from model.py layer by layer over all time-steps at once, on a CPU or a GPU.

    net = fused.attach(SNN_VGG9_BNTT(num_steps=25))     # same parameters, buffers and state dict
    with torch.autocast("cpu", torch.bfloat16):         # or without, in float32 or float64
        loss = criterion(net(images), labels)
    loss.backward()

It serves chains of layers (`SpikingVGG`) whose parts it knows, and norms that describe themselves. The maths stand in
engine.py; model.py knows nothing of this.
"""

import functools

import torch
import torch.nn as nn

from fused.common import Shape, Unsupported
from fused.engine import FusedVoltages, Run, backend, shapes
from fused.graph import GraphedStep
from model import LIF, SpikingVGG

__all__ = ["GraphedStep", "Shape", "Unsupported", "attach", "detach", "why_not"]

MAX_POOL = 15  # packed spikes count those of a window in one byte
DESCRIPTION = ("batch_norms", "gamma", "affine")  # by which a norm says what it is, besides per_step


def attach(net, save_memory=None):
    """Make `net` run fused, in place, and return it. Raises `Unsupported` where it cannot.

    save_memory: None, or the time-steps of one block: memory then grows by one membrane a block instead
    of by every time-step, for one more forward pass. `detach(net)` undoes it; parameters and buffers
    stay the same objects. Of forward hooks, those of the encoder, the neurons and the synapses are called.
    """
    reason = why_not(net, save_memory)
    if reason:
        raise Unsupported(reason)
    if not isinstance(net, FusedNet):
        net.__class__ = _fused_class(type(net))
    net._block = save_memory
    return net


def detach(net):
    """Make `net` run by its own plain loop again, and return it."""
    if isinstance(net, FusedNet):
        net.__class__ = type(net).__mro__[2]
        del net._block
    return net


def why_not(net, save_memory=None):
    """None if `net` can run fused where it now lies, else the reason as a sentence."""
    try:
        backend(next(net.parameters()).device.type)
    except Unsupported as error:
        return str(error)
    if not isinstance(net, SpikingVGG):
        return f"the fused engine runs chains of layers (SpikingVGG), and {type(net).__name__} may be another net"
    for layer in net.layers():
        if not _describes_itself(layer.norm):
            return f"the fused engine does not know the normalisation {type(layer.norm).__name__}"
        norms = layer.norm.batch_norms(net.num_steps)
        if not all(_knows_batch_norm(norm, norms[0], hasattr(layer.norm, "beta")) for norm in norms):
            return f"the fused engine does not know the batch norm of {layer.name}"
        if len({*map(id, norms)}) not in (0, 1, len(norms)):
            return f"the fused engine does not know a norm some of whose steps share statistics, as in {layer.name}"
        if save_memory and not layer.norm.per_step:
            name = type(layer.norm).__name__
            return f"--save_memory cuts time into blocks, and {name} takes its statistics over all of it"
        if type(layer.lif) is not LIF:
            return f"the fused engine does not know the neuron {type(layer.lif).__name__}"
        if not _knows_pool(layer.pool):
            return f"the fused engine does not know the pooling {layer.pool}"
        if not _knows_synapse(layer.synapse):
            return f"the fused engine does not know the weight layer {layer.synapse}"
    side = max((shape.pool for shape in shapes(net, 1, 1)), default=1)
    if side > MAX_POOL:
        return f"the fused engine pools windows of up to {MAX_POOL}x{MAX_POOL}, this net has {side}x{side}"
    return None


def _describes_itself(norm):
    """Whether a norm says what it is; what it says is not taken for a `forward` that was written after it."""
    classes = type(norm).__mro__
    wrote = [i for i, c in enumerate(classes) if not vars(c).keys().isdisjoint(DESCRIPTION)]
    forward = next(i for i, c in enumerate(classes) if "forward" in vars(c))
    whole = all(hasattr(norm, name) for name in (*DESCRIPTION, "per_step"))
    return whole and min(wrote) <= forward and "forward" not in vars(norm)


def _knows_batch_norm(norm, first, beta):
    plain = norm.weight is not None and norm.track_running_stats and norm.momentum is not None
    plain = plain and (norm.bias is not None) == beta
    alike = all(getattr(norm, key) == getattr(first, key) for key in ("eps", "momentum", "training"))
    return plain and alike


def _knows_pool(pool):
    if isinstance(pool, nn.AvgPool2d):
        plain = pool.padding == 0 and not pool.ceil_mode and pool.divisor_override is None
        return isinstance(pool.kernel_size, int) and pool.stride == pool.kernel_size and plain
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return pool.output_size in (1, (1, 1))
    return isinstance(pool, nn.Identity)


def _knows_synapse(synapse):
    if isinstance(synapse, nn.Conv2d):
        same = all(2 * pad == kernel - 1 for pad, kernel in zip(synapse.padding, synapse.kernel_size, strict=True))
        simple = synapse.stride == synapse.dilation == (1, 1) and synapse.groups == 1
        return same and simple and synapse.padding_mode == "zeros" and synapse.bias is None
    return isinstance(synapse, nn.Linear) and synapse.bias is None


class FusedNet:
    """Mixed into the class of a net by `attach`: overrides how time goes by."""

    def stream(self, images, steps=None, block=None):
        """As `SpikingNet.stream`; by default a block is as many time-steps as fit into memory at once."""
        steps = self.check_input(images, steps)
        # the plain loop for a gradient of the images, as attacks want it, an encoder that learns, or no image at all
        if not images.requires_grad and len(images) and not any(p.requires_grad for p in self.encoder.parameters()):
            run = Run(self, images, steps, self._block or block)
            if run.knows_dtype():
                yield from self._run(run, images)
                return
        yield from super().stream(images, steps, block or 1)

    def _run(self, run, images):
        weights = [*(layer.synapse.weight for layer in run.layers), self.readout.weight]
        if run.grad_enabled or self.training:
            scales, shifts = zip(*run.scales, strict=True)
            yield FusedVoltages.apply(run, self.encoder(images, run.steps), *weights, *scales, *shifts)
            return
        weights, readout = run.prepared(weights)
        membranes, voltage = run.state(run.block < run.steps), 0.0
        for t0, t1 in run.blocks():
            encoded = self.encoder(images, t1 - t0, t0)
            with torch.autocast(run.device.type, enabled=False):
                spikes = run.forward_block(encoded, t0, t1, weights, membranes, keep=False)[0]
                voltages = run.output(spikes, readout).cumsum(0) + voltage
            voltage = voltages[-1]
            del encoded, spikes
            yield voltages


@functools.cache
def _fused_class(cls):
    return type(f"Fused{cls.__name__}", (FusedNet, cls), {})
