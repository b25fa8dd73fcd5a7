"""Spiking VGG nets with Batch Normalization Through Time (BNTT), in plain PyTorch.

Kim & Panda, "Revisiting Batch Normalization for Training Low-Latency Deep Spiking Neural Networks From Scratch",
Front. Neurosci. 15:773954 (2021); equation numbers are the paper's. Where the authors' code differs, it is followed
(docs/faithful.md). T time-steps, B images, C channels, K classes. Time lives inside a layer:

    encoder(images, steps, t0)    images -> [T, B, C, H, W], from time-step t0 on
    synapse, pool                 know no time: applied at each step
    norm(x, t0)                   [T, B, C, ...] -> the same
    neuron(currents, membrane)    [T, B, ...] -> (spikes [T, B, ...], membrane [B, ...] after the last step)
"""

from collections import namedtuple
from functools import partial

import torch
import torch.nn as nn

from encoders import ENCODERS, PoissonGen, choose, require  # noqa: F401

SURROGATE_ALPHA = 0.3  # eq. 8
BN_EPS, BN_MOMENTUM = 1e-4, 0.1


class SurrogateSpike(torch.autograd.Function):
    """Heaviside step of v = u / threshold - 1; for its derivative the triangle of eq. 8, alpha * max(0, 1 - |v|)."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad_spike):
        (v,) = ctx.saved_tensors
        return grad_spike * SURROGATE_ALPHA * (1.0 - v.abs()).clamp(min=0)


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons, in one of two orders. The membrane is kept in at least float32.

    integrate_first: u <- leak * u + current; spike = 1[u > threshold]; u <- u - threshold * spike      (eq. 4)
    fire_first:      spike = 1[u > threshold]; u <- leak * u + current - threshold * spike
    The second is the authors' first upload: every layer answers one step late. The reset carries no gradient.
    """

    ORDERS = ("integrate_first", "fire_first")

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        super().__init__()
        require(0 < leak <= 1, f"leak_mem must be in (0, 1], got {leak}")
        require(0 < threshold < float("inf"), f"threshold must be a positive number, got {threshold}")
        require(spike_order in self.ORDERS, f"spike_order must be one of {self.ORDERS}, got {spike_order!r}")
        self.leak, self.threshold, self.spike_order = leak, threshold, spike_order
        self.delay = int(spike_order == "fire_first")  # steps from a current to the first spike it can cause

    def fire(self, membrane):
        return SurrogateSpike.apply(membrane / self.threshold - 1.0)

    def step(self, current, membrane):
        """One time-step: current and membrane [B, ...] -> (spikes, membrane) of that shape."""
        if self.spike_order == "fire_first":
            spikes = self.fire(membrane)
            return spikes, self.leak * membrane + current - self.threshold * spikes.detach()
        membrane = self.leak * membrane + current
        spikes = self.fire(membrane)
        return spikes, membrane - self.threshold * spikes.detach()

    def forward(self, currents, membrane=None):
        """currents: [T, B, ...]; membrane: [B, ...], None at rest. Returns (spikes [T, B, ...], membrane)."""
        if membrane is None:
            membrane = torch.zeros_like(currents[0], dtype=torch.promote_types(currents.dtype, torch.float32))
        spikes = []
        for current in currents:
            fired, membrane = self.step(current, membrane)
            spikes.append(fired.to(currents.dtype))
        return torch.stack(spikes), membrane


class BNTT(nn.ModuleList):
    """Batch Normalization Through Time, eq. 9: gamma_t * (x - mu_t) / sqrt(var_t + eps) at step t, no beta.
    Each step has its own BatchNorm. What stands below `forward` describes the norm to others; per_step: in training,
    each step is normalised by the mean and variance of its own batch."""

    per_step = gamma_per_step = True

    def __init__(self, num_steps, features, spatial):
        kind = nn.BatchNorm2d if spatial else nn.BatchNorm1d
        super().__init__(kind(features, BN_EPS, BN_MOMENTUM) for _ in range(num_steps))
        for bn in self:
            bn.bias = None

    def forward(self, x, t0=0):
        return torch.stack([bn(step) for bn, step in zip(self.batch_norms(t0 + len(x))[t0:], x, strict=True)])

    def batch_norms(self, T):
        """The BatchNorm of each of the first T steps: one object where steps share it."""
        return list(self)[:T]

    def gamma(self, T):
        """gamma of the first T steps, [T, C], as autograd sees it. (A norm with a beta has a method of that name.)"""
        return torch.stack([bn.weight for bn in self.batch_norms(T)])

    def affine(self, T):
        """(a, b), float64 [T, C], as autograd sees them: in eval mode norm(x) = a x + b (eq. 15, exactly)."""
        norms = self.batch_norms(T)
        mean, var = (torch.stack([getattr(bn, f"running_{key}") for bn in norms]).double() for key in ("mean", "var"))
        a = self.gamma(T).double() / (var + norms[0].eps).sqrt()
        return a, -a * mean


class SharedBN(BNTT):
    """The paper's first baseline: all time-steps share one BatchNorm, but each is normalised by its own batch."""

    def __init__(self, num_steps, features, spatial):
        super().__init__(0, features, spatial)
        self.gamma_per_step, self.shared = False, BNTT(1, features, spatial)[0]

    def batch_norms(self, T):
        return [self.shared] * T


class NoNorm(BNTT):
    """The paper's second baseline: no normalisation."""

    def __init__(self, num_steps, features, spatial):
        super().__init__(0, features, spatial)
        self.gamma_per_step, self.features = False, features

    def forward(self, x, t0=0):
        return x

    def affine(self, T):
        return torch.ones(T, self.features).double(), torch.zeros(T, self.features).double()


def each_step(module, x):
    """Apply a module that knows no time to every step of x: [T, B, ...] -> [T, B, ...]."""
    return module(x) if isinstance(module, nn.Identity) else torch.stack([module(step) for step in x])


class SpikingNet(nn.Module):
    """What all nets share: encoding, blocks of time, output voltage (eq. 5). A net need not be a chain of layers.
    A net has num_steps, encoder and output_currents(x, t0, steps, fire) -> [T, B, K], those of the output neurons. x:
    encoded images from step t0 on, of a run of `steps`; fire(neuron, currents) -> spikes, both [T, B, ...]."""

    def layers(self):
        """The spiking layers, input to output: a list of `Layer`, from which gammas, exits and statistics are read."""
        return []

    def gammas(self):
        """{layer name: gamma [T, features]} of the layers with a gamma of their own at every time-step."""
        norms = {layer.name: layer.norm for layer in self.layers() if getattr(layer.norm, "gamma_per_step", False)}
        return {name: norm.gamma(self.num_steps).detach() for name, norm in norms.items()}

    def check_input(self, images, steps=None):
        """Return the number of steps to run; ValueError if the images or steps do not fit the net."""
        steps = self.num_steps if steps is None else steps
        require(1 <= steps <= self.num_steps, f"steps must be between 1 and num_steps = {self.num_steps}, got {steps}")
        self.encoder.check_input(images)
        trained = any(m.training for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        require(len(images) > 1 or not trained, "batch norm cannot train on a batch of one image, or none: use two")
        return steps

    def stream(self, images, steps=None, block=1):
        """Generate `voltages` block by block (of one step: what lies between layers stays in the caches; of all, where
        a norm trains on all). Who stops iterating stops the work; `send(indices)` goes on with those images alone."""
        steps, voltage, membranes, kept = self.check_input(images, steps), 0.0, [], slice(None)

        def fire(neuron, currents):
            spikes, membrane = neuron(currents, membranes.pop(0) if t0 else None)
            membranes.append(membrane)
            return spikes

        block = steps if any(m.training and not getattr(m, "per_step", True) for m in self.modules()) else block
        for t0 in range(0, steps, block):
            encoded, trace = self.encoder(images, min(block, steps - t0), t0)[:, kept], []
            for current in self.output_currents(encoded, t0, steps, fire):
                trace.append(voltage := voltage + current.to(torch.promote_types(images.dtype, torch.float32)))
            if (keep := (yield torch.stack(trace))) is not None:
                kept = torch.arange(len(images), device=images.device)[kept][keep]
                voltage, membranes = voltage[keep], [membrane[keep] for membrane in membranes]

    def voltages(self, images, steps=None):
        """Output voltage after each of the first `steps` (default all) time-steps, [steps, B, K], of images [B, ...].
        `voltages[t - 1].argmax(-1)` is the prediction of an exit after t steps. ValueError as `check_input`."""
        return torch.cat([*self.stream(images, steps)])

    def forward(self, images, steps=None):
        """Logits [B, K]: the output voltage after `steps` (default all) time-steps, over `steps`."""
        voltages = self.voltages(images, steps)
        return voltages[-1] / len(voltages)


NORMS = {"bntt": BNTT, "bn": SharedBN, "none": NoNorm}
Layer = namedtuple("Layer", "name synapse norm lif pool")  # spikes = pool(lif(norm(synapse(x))))
# Channels of each convolution, "A" = 2x2 average pool, "G" = global average pool; widths of the spiking linear layers.
ARCHS = {  # or a class of a net that is no chain, which takes what `SpikingVGG` does after arch
    "vgg9": ((64, 64, "A", 128, 128, "A", 256, 256, 256, "A"), (1024,)),
    "vgg11": ((64, "A", 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "G"), (4096,)),
    "dvs_cnn7": ((128, 128, "A", 384, 384, "A"), (1024, 512)),  # Wu et al. 2019; BNTT gives no details
    "fc3": ((), (256, 256)),  # sequential MNIST
}


class SpikingVGG(SpikingNet):
    """A spiking VGG: weight layers without bias, normalisation, LIF neurons, average pooling.

    arch: a row of ARCHS. num_steps: T. leak_mem: in (0, 1]. img_size: H = W of the input. num_cls: K. norm, encoding: a
    name in NORMS or ENCODERS, or a factory norm(num_steps, features, spatial), encoding(num_steps, channels, size).
    neuron: a factory neuron(leak, threshold, spike_order). ValueError on values that make no net. Modules carry the
    authors' names (conv1, bntt1, ..., fc1, bntt_fc, fc2), so that state dicts are exchanged freely."""

    def __init__(
        self, arch, num_steps, leak_mem=0.95, img_size=32, num_cls=10, *, in_channels=3, threshold=1.0, norm="bntt",
        spike_order="integrate_first", encoding="poisson", neuron=LIF,
    ):  # fmt: skip
        super().__init__()
        channels, hidden = choose("arch", arch, ARCHS)
        norm, encoding = choose("norm", norm, NORMS), choose("encoding", encoding, ENCODERS)
        for key, value in dict(num_steps=num_steps, num_cls=num_cls, in_channels=in_channels).items():
            require(isinstance(value, int) and value >= 1, f"{key} must be an integer of at least 1, got {value}")
        self.num_steps, self.encoder = num_steps, encoding(num_steps, in_channels, img_size)
        self._norms, c, size, smallest = {}, in_channels, self.encoder.size, 2 ** channels.count("A")
        require(size >= smallest, f"img_size of {arch} must be at least {smallest}, got {size}")

        def add(name, norm_name, synapse, pool=None):
            self._norms[name] = norm_name
            self.add_module(name, synapse)
            self.add_module(norm_name, norm(num_steps, len(synapse.weight), isinstance(synapse, nn.Conv2d)))
            self.add_module(f"lif_{name}", neuron(leak_mem, threshold, spike_order))
            self.add_module(f"pool_{name}", pool or nn.Identity())

        for width, after in zip(channels, (*channels[1:], None), strict=False):
            if isinstance(width, int):
                i, pool = len(self._norms) + 1, {"A": nn.AvgPool2d(2), "G": nn.AdaptiveAvgPool2d(1)}.get(after)
                add(f"conv{i}", f"bntt{i}", nn.Conv2d(c, width, kernel_size=3, padding=1, bias=False), pool)
                c, size = width, {"A": size // 2, "G": 1}.get(after, size)
        widths = [c * size * size, *hidden, num_cls]
        for i in range(1, len(hidden) + 1):
            add(f"fc{i}", f"bntt_fc{i if len(hidden) > 1 else ''}", nn.Linear(*widths[i - 1 : i + 1], bias=False))
        self._readout = f"fc{len(hidden) + 1}"
        self.add_module(self._readout, nn.Linear(*widths[-2:], bias=False))
        for synapse in (m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            nn.init.xavier_uniform_(synapse.weight, gain=2)

    def layers(self):
        keys = [(name, norm, f"lif_{name}", f"pool_{name}") for name, norm in self._norms.items()]
        return [Layer(parts[0], *(getattr(self, part) for part in parts)) for parts in keys]

    @property
    def readout(self):
        """The output layer: no spikes, no leak; its voltage accumulates over time (eq. 5)."""
        return getattr(self, self._readout)

    def output_currents(self, x, t0, steps, fire):
        layers = self.layers()
        for i, layer in enumerate(layers):
            x = x.flatten(2) if isinstance(layer.synapse, nn.Linear) else x
            live = steps - t0 - sum(getattr(later.lif, "delay", 0) for later in layers[i:])
            x = each_step(layer.pool, fire(layer.lif, self._currents(layer, x, t0, max(0, live))))
        return each_step(self.readout, x.flatten(2))

    @staticmethod
    def _currents(layer, x, t0, live):
        """norm(synapse(x)) of eq. 9. The steps from `live` on cannot reach the output (firing first delays): their
        gammas must have no gradient, not even zero, by which weight decay would shrink them."""
        if live >= len(x) or not torch.is_grad_enabled() or not getattr(layer.norm, "per_step", True):
            return layer.norm(each_step(layer.synapse, x), t0)
        early = [layer.norm(each_step(layer.synapse, x[:live]), t0)] if live else []
        with torch.no_grad():
            late = layer.norm(each_step(layer.synapse, x[live:]), t0 + live)
        return torch.cat([*early, late])


# The authors' names and signatures; img_size at least 8 and 16, options as in `SpikingVGG`.
SNN_VGG9_BNTT, SNN_VGG11_BNTT = partial(SpikingVGG, "vgg9"), partial(SpikingVGG, "vgg11")
