"""The fused engine: runs a net from model.py layer by layer over all time-steps at once, on a CPU or a GPU.

    net = fused.attach(SNN_VGG9_BNTT(num_steps=25))     # same parameters, buffers and state dict
    with torch.autocast("cpu", torch.bfloat16):         # or without, in float32 or float64
        loss = criterion(net(images), labels)
    loss.backward()

It serves chains of layers (`SpikingVGG`) whose parts it knows, and whose norms and neurons describe themselves: those
of model.py and baselines.py. The maths stand in engine.py; model.py knows nothing of this.
"""

import contextlib
import copy
import copyreg
import functools
import warnings

import torch

from fused import guard
from fused.common import Shape, Unsupported
from fused.engine import FusedVoltages, Run, sum_over_time
from fused.graph import GraphedStep, NoGraph

__all__ = ["GraphedStep", "NoGraph", "Shape", "Unsupported", "attach", "detach", "why_not"]


def attach(net, save_memory=None):
    """Make `net` run fused, in place, and return it. Raises `Unsupported` where it cannot.

    save_memory: None, or the time-steps of one block: memory then grows by one membrane a block instead
    of by every time-step, for one more forward pass. `detach(net)` undoes it; parameters and buffers
    stay the same objects.

    Whether the parts are still those that the engine knows is asked again at every call: where they are not, the
    net runs plain, and a warning says why. Forward hooks of neurons and synapses are called if they have an attribute
    `only_looks` that is true: they see inputs and outputs of a synapse, of a neuron its spikes alone, without a graph
    and in memory that is used again, so they must copy what they keep. Other hooks send the net to the plain loop.
    """
    reason = why_not(net, save_memory)
    if reason:
        raise Unsupported(reason)
    return attached(net, save_memory)


def attached(net, save_memory=None, trusted=False):
    """`net` with the engine on it, without asking whether it knows the parts; trusted: nor at each call."""
    if not isinstance(net, FusedNet):
        net.__class__ = _fused_class(type(net))
    vars(net)["_fused"] = {"save_memory": save_memory, "trusted": trusted, "said": None}
    return net


def detach(net):
    """Make `net` run by its own plain loop again, and return it."""
    if isinstance(net, FusedNet):
        net.__class__ = guard.plain_class(net)
        del vars(net)["_fused"]
    return net


def why_not(net, save_memory=None):
    """None if `net` can run fused where it now lies, else the reason as a sentence.

    A kind of net that the engine was not proved on yet is compared with its own code first, which takes seconds.
    """
    reason = guard.why_not(net, save_memory)
    if reason is None and (reason := guard.disproved(net, attached)):
        reason = f"the fused engine does not fit this net: {reason}"
    return reason


class FusedNet:
    """Mixed into the class of a net by `attach`: overrides how time goes by."""

    is_fused = True

    def stream(self, images, steps=None, block=None):
        """As `SpikingNet.stream`; by default a block is as many time-steps as fit into memory at once."""
        mine, reason = vars(self).get("_fused", {}), guard.cannot_now(images)
        if not reason and block and (torch.is_grad_enabled() or self.training):
            reason = "the fused engine streams block by block in eval mode and without gradients only"
        if not reason and not mine:  # another thread copies it just now
            reason = "it is being copied"
        if not reason and not mine["trusted"]:
            reason = why_not(self, mine["save_memory"])
        if not reason:
            steps = self.check_input(images, steps)
            whole = any(m.training and not getattr(m, "per_step", True) for m in self.modules())
            try:
                run = Run(self, images, steps, steps if whole else block or mine["save_memory"])
            except Unsupported as error:
                reason = str(error)
            else:
                encode = functools.partial(_encoded, run, images, steps if whole else block or 1)
                yield from _run(run, encode, self.training)
                return
        if mine.get("trusted"):  # it is being proved: plain, nothing would be
            raise Unsupported(reason)
        if reason != mine.get("said") and not torch.compiler.is_compiling():
            mine["said"] = reason
            warnings.warn(f"this net runs plain: {reason}", stacklevel=4)
        yield from super().stream(images, steps, block or 1)

    @contextlib.contextmanager
    def _as_plain(self):
        """A context in which it is the plain net."""
        cls, mine = type(self), vars(self).pop("_fused")
        self.__class__ = guard.plain_class(self)
        try:
            yield mine
        finally:
            self.__class__ = cls
            vars(self)["_fused"] = mine

    def __reduce_ex__(self, protocol):
        """Pickled and saved, it is the plain net."""
        with self._as_plain():
            made, arguments, *rest = (
                dict(part) if part is vars(self) else part for part in self.__reduce_ex__(protocol)
            )
        if made is copyreg.__newobj__:  # which pickle takes for the object's own class alone
            made, arguments = copyreg._reconstructor, (arguments[0], object, None)
        return made, arguments, *rest

    def __deepcopy__(self, memo):
        with self._as_plain() as mine:
            copied = copy.deepcopy(self, memo)
        return attached(copied, mine["save_memory"])


def _encoded(run, images, block, t0, t1):
    """Steps t0 .. t1 of a run, encoded by the calls that the plain loop makes: `block` steps at once."""
    parts = []
    for t in range(t0, t1, block):
        part = run.checked(run.net.encoder(images, min(block, run.steps - t), t), min(block, run.steps - t))
        part = part.detach() if block == 1 and t >= run.live[0] else part  # as the plain loop: nothing comes of it
        parts.append(part.clone() if block < t1 - t0 else part)  # an encoder may write into it again
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _run(run, encode, training):
    """Generate the voltages of a run, of images that encode(t0, t1) encodes."""
    weights = [*(layer.synapse.weight for layer in run.layers), run.net.readout.weight]
    if run.grad_enabled or training:
        scales, shifts = zip(*run.scales, strict=True)
        yield FusedVoltages.apply(run, encode(0, run.steps), *weights, *scales, *shifts, *run.leaks, *run.thresholds)
        return
    weights, readout = run.prepared(weights)
    membranes, voltage, kept = None, 0.0, slice(None)
    for t0, t1 in run.blocks():
        encoded = encode(t0, t1)[:, kept]
        membranes = run.state(run.block < run.steps) if membranes is None else membranes  # the first tells the sizes
        with torch.autocast(run.device.type, enabled=False):
            if encoded.shape[1]:
                spikes = run.forward_block(encoded, t0, t1, weights, membranes, keep=False)[0]
                voltages = sum_over_time(run.output(spikes, readout)) + voltage
                del spikes
            else:  # all images have left
                voltages = voltage.expand(t1 - t0, *voltage.shape)
        del encoded
        voltage = voltages[-1].clone()  # who gets the voltages may change them
        if (keep := (yield voltages)) is not None:
            keep = torch.arange(len(voltage), device=run.device)[keep]
            kept = torch.arange(run.images, device=run.device)[kept][keep]
            voltage, membranes = voltage[keep], run.keep(keep, membranes)


@functools.cache
def _fused_class(cls):
    return type(f"Fused{cls.__name__}", (FusedNet, cls), {})
