"""Spiking VGG nets with Batch Normalization Through Time (BNTT), in plain PyTorch.

Kim & Panda, "Revisiting Batch Normalization for Training Low-Latency Deep Spiking Neural
Networks From Scratch", Front. Neurosci. 15:773954 (2021), arXiv 2010.01729; equation numbers
below are the paper's. Where the paper and the authors' code differ, the code is followed and
the README's table says so.

Shapes: B images, C channels, H x W pixels, T time-steps, K classes.

    net = SNN_VGG9_BNTT(num_steps=25)            # weights as the authors draw them for a seed
    logits = net(images)                         # [B, K]: output voltage after T steps, over T
    voltages = net.voltages(images)              # [T, B, K]: output voltage after every step
"""

from typing import NamedTuple

import torch
import torch.nn as nn

SURROGATE_ALPHA = 0.3  # eq. 8
BN_EPS, BN_MOMENTUM = 1e-4, 0.1


# ---- Input encoding --------------------------------------------------------------------------


def PoissonGen(images, rescale_fac=2.0):
    """Draw one time-step of ternary Poisson spikes: sign(x) with probability min(1, |x| / 2).

    images: [B, C, H, W] after mean/std normalisation. Returns spikes in {-1, 0, 1} of the same
    shape and dtype. One contiguous uniform draw in the images' own dtype, so that a seed gives the
    same spikes whatever the memory format. (The authors' `PoissonGen`.)
    """
    uniform = torch.rand_like(images, memory_format=torch.contiguous_format)
    return (uniform * rescale_fac <= images.abs()).to(images.dtype) * images.sign()


class Encoder(nn.Module):
    """What the first layer sees of the input at step t (from 0): encoder(images, t) -> [B, C, H, W].

    num_steps: T; channels: C; size: S, pixels a side of the input. `input_shape` is that of one input,
    `size` then the pixels a side of what the first layer sees.
    """

    random = False  # draws spikes, so that two runs differ
    analog = False  # gives values, not spikes or event counts

    def __init__(self, num_steps, channels, size):
        super().__init__()
        self.input_shape, self.size = (channels, size, size), size


class PoissonEncoder(Encoder):
    """Ternary Poisson spikes of normalised images: the authors' input."""

    random = True

    def forward(self, images, t):
        return PoissonGen(images)


class BinaryPoissonEncoder(Encoder):
    """0/1 spikes with probability x, for images in [0, 1]: the textbook rate code."""

    random = True

    def forward(self, images, t):
        uniform = torch.rand_like(images, memory_format=torch.contiguous_format)
        return (uniform < images).to(images.dtype)


class DirectEncoder(Encoder):
    """The image itself, as an input current at every time-step."""

    analog = True

    def forward(self, images, t):
        return images


class FrameEncoder(Encoder):
    """A frame a time-step, as it is: event frames [B, T, C, S, S], one channel per polarity."""

    def __init__(self, num_steps, channels, size):
        super().__init__(num_steps, channels, size)
        self.input_shape = (num_steps, channels, size, size)

    def forward(self, frames, t):
        return frames[:, t]


class PixelEncoder(Encoder):
    """A pixel a time-step, row by row, as it is: sequential MNIST. T must be S * S; gives [B, C, 1, 1]."""

    analog = True

    def __init__(self, num_steps, channels, size):
        super().__init__(num_steps, channels, size)
        if num_steps != size**2:
            raise ValueError(f"images of {size}x{size} pixels, one a time-step, need num_steps {size**2}")
        self.size = 1

    def forward(self, images, t):
        return images.flatten(2)[:, :, t, None, None]


class PermutedPixelEncoder(PixelEncoder):
    """The pixels in one fixed random order, kept in the state dict: permuted sequential MNIST."""

    def __init__(self, num_steps, channels, size):
        super().__init__(num_steps, channels, size)
        self.register_buffer("order", torch.randperm(num_steps, generator=torch.Generator().manual_seed(0)))

    def forward(self, images, t):
        return super().forward(images, self.order[t])


ENCODERS = {
    "poisson": PoissonEncoder,
    "poisson_binary": BinaryPoissonEncoder,
    "direct": DirectEncoder,
    "frames": FrameEncoder,
    "pixels": PixelEncoder,
    "pixels_permuted": PermutedPixelEncoder,
}


# ---- Neuron ----------------------------------------------------------------------------------


class SurrogateSpike(torch.autograd.Function):
    """Heaviside step of v = u / threshold - 1, with the triangle of eq. 8 as its derivative.

    Forward: 1 where v > 0, else 0. Backward: alpha * max(0, 1 - |v|).
    """

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad_spike):
        (v,) = ctx.saved_tensors
        return grad_spike * SURROGATE_ALPHA * (1.0 - v.abs()).clamp(min=0)


class LIF(nn.Module):
    """One time-step of leaky integrate-and-fire neurons: state in, state out, nothing kept.

    integrate_first (eq. 4, and the authors' code since 2021-01-24):
        u <- leak * u + current;  spike = 1[u > threshold];  u <- u - threshold * spike
    fire_first (the authors' first upload: every layer answers one step late):
        spike = 1[u > threshold];  u <- leak * u + current - threshold * spike

    The reset (`threshold * spike`) carries no gradient. The membrane is kept in at least float32.
    Watch a layer with `register_forward_hook`: called once a time-step, `output[0]` its spikes.
    """

    ORDERS = ("integrate_first", "fire_first")

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        super().__init__()
        if not 0 < leak <= 1:
            raise ValueError(f"leak_mem must be in (0, 1], got {leak}")
        if not 0 < threshold < float("inf"):
            raise ValueError(f"threshold must be a positive number, got {threshold}")
        if spike_order not in self.ORDERS:
            raise ValueError(f"spike_order must be one of {self.ORDERS}, got {spike_order!r}")
        self.leak, self.threshold, self.spike_order = leak, threshold, spike_order

    def fire(self, membrane):
        return SurrogateSpike.apply(membrane / self.threshold - 1.0)

    def forward(self, current, membrane=None):
        """current: [B, ...]; membrane: the same shape, or None at rest. Returns (spikes, membrane)."""
        if membrane is None:
            dtype = torch.promote_types(current.dtype, torch.float32)
            membrane = torch.zeros_like(current, dtype=dtype)
        if self.spike_order == "fire_first":
            spikes = self.fire(membrane)
            membrane = self.leak * membrane + current - self.threshold * spikes.detach()
        else:
            membrane = self.leak * membrane + current
            spikes = self.fire(membrane)
            membrane = membrane - self.threshold * spikes.detach()
        return spikes.to(current.dtype), membrane

    def extra_repr(self):
        return f"leak={self.leak}, threshold={self.threshold}, spike_order={self.spike_order!r}"


# ---- Normalisation: modules called as norm(x, t) ------------------------------------------------


def batch_norm(features, spatial):
    """BatchNorm2d (spatial) or BatchNorm1d with the authors' constants, gamma and no beta."""
    norm = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(features, BN_EPS, BN_MOMENTUM)
    norm.bias = None
    return norm


class BNTT(nn.ModuleList):
    """Batch Normalization Through Time, eq. 9: one BatchNorm per time-step, no beta.

    gamma_t * (x - mu_t) / sqrt(var_t + eps), where step t has its own gamma and its own running
    mean and variance.
    """

    def __init__(self, num_steps, features, spatial):
        super().__init__(batch_norm(features, spatial) for _ in range(num_steps))

    def forward(self, x, t):
        return self[t](x)


class SharedBN(nn.Module):
    """The paper's first baseline: one BatchNorm (gamma, statistics) shared by all time-steps.

    In training each step is normalised by its own batch and updates the shared running statistics.
    """

    def __init__(self, num_steps, features, spatial):
        super().__init__()
        self.shared = batch_norm(features, spatial)

    def forward(self, x, t):
        return self.shared(x)


class NoNorm(nn.Module):
    """The paper's second baseline: no normalisation."""

    def __init__(self, num_steps, features, spatial):
        super().__init__()

    def forward(self, x, t):
        return x


NORMS = {"bntt": BNTT, "bn": SharedBN, "none": NoNorm}


# ---- Network ---------------------------------------------------------------------------------

# Output channels of each convolution, "A" = 2x2 average pool, "G" = global average pool; then the
# widths of the spiking fully connected layers. The non-spiking output layer follows.
ARCHS = {
    "vgg9": ((64, 64, "A", 128, 128, "A", 256, 256, 256, "A"), (1024,)),
    "vgg11": ((64, "A", 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "G"), (4096,)),
    "dvs_cnn7": ((128, 128, "A", 384, 384, "A"), (1024, 512)),  # Wu et al. 2019; BNTT gives no details
    "fc3": ((), (256, 256)),  # sequential MNIST
}


class Layer(NamedTuple):
    """One spiking layer: spikes = pool(lif(norm(synapse(x), t)))."""

    name: str
    synapse: nn.Module
    norm: nn.Module
    lif: LIF
    pool: nn.Module


class SpikingVGG(nn.Module):
    """A spiking VGG: weight layers without bias, normalisation, LIF neurons, average pooling.

    arch: a row of ARCHS. num_steps: T. leak_mem: membrane leak per step, in (0, 1]. img_size:
    H = W of the input in pixels. num_cls: K. norm: a name in NORMS, or any callable
    (num_steps, features, spatial) -> module called as norm(x, t). encoding: a name in ENCODERS.
    Raises ValueError on values that make no net.

    Modules carry the authors' names (conv1, bntt1, ..., fc1, bntt_fc, fc2), so that state dicts
    are exchanged freely; `layers()` lists them in order.
    """

    def __init__(
        self, arch, num_steps, leak_mem=0.95, img_size=32, num_cls=10, *, in_channels=3,
        threshold=1.0, norm="bntt", spike_order="integrate_first", encoding="poisson",
    ):  # fmt: skip
        super().__init__()
        _choice("arch", arch, ARCHS)
        _choice("encoding", encoding, ENCODERS)
        if isinstance(norm, str):
            norm = NORMS[_choice("norm", norm, NORMS)]
        for key, value in dict(num_steps=num_steps, num_cls=num_cls, in_channels=in_channels).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} must be an integer of at least 1, got {value}")
        self.num_steps = num_steps
        self.encoder = ENCODERS[encoding](num_steps, in_channels, img_size)
        channels, hidden = ARCHS[arch]
        self._names = []

        def add(name, synapse, norm_name, spatial, pool=None):
            features = synapse.weight.shape[0]
            setattr(self, name, synapse)
            setattr(self, norm_name, norm(num_steps, features, spatial))
            setattr(self, f"lif_{name}", LIF(leak_mem, threshold, spike_order))
            setattr(self, f"pool_{name}", pool or nn.Identity())
            self._names.append((name, norm_name))

        c, size = in_channels, self.encoder.size
        for i, (width, pool) in enumerate(_with_pools(channels), start=1):
            conv = nn.Conv2d(c, width, kernel_size=3, padding=1, bias=False)
            pools = {None: nn.Identity, "A": lambda: nn.AvgPool2d(2), "G": lambda: nn.AdaptiveAvgPool2d(1)}
            add(f"conv{i}", conv, f"bntt{i}", True, pools[pool]())
            c, size = width, {None: size, "A": size // 2, "G": min(size, 1)}[pool]
        if size < 1:
            smallest = 2 ** channels.count("A")
            raise ValueError(f"img_size of {arch} must be at least {smallest}, got {self.encoder.size}")
        features = c * size * size
        for i, width in enumerate(hidden, start=1):
            norm_name = "bntt_fc" if len(hidden) == 1 else f"bntt_fc{i}"
            add(f"fc{i}", nn.Linear(features, width, bias=False), norm_name, False)
            features = width
        self._output = f"fc{len(hidden) + 1}"
        setattr(self, self._output, nn.Linear(features, num_cls, bias=False))
        for synapse in [*(layer.synapse for layer in self.layers()), self.readout]:
            nn.init.xavier_uniform_(synapse.weight, gain=2)

    def layers(self):
        """The spiking layers, input to output: a list of `Layer`."""
        return [
            Layer(n, *(getattr(self, part) for part in (n, norm, f"lif_{n}", f"pool_{n}"))) for n, norm in self._names
        ]

    @property
    def readout(self):
        """The output layer: no spikes, no leak; its voltage accumulates over time (eq. 5)."""
        return getattr(self, self._output)

    def gammas(self):
        """{layer name: gamma [T, features]} of the layers with a BatchNorm per time-step."""
        bntt = {layer.name: layer.norm for layer in self.layers() if isinstance(layer.norm, BNTT)}
        return {name: torch.stack([bn.weight for bn in norm]).detach() for name, norm in bntt.items()}

    def check_input(self, images, steps=None):
        """Return the number of steps to run; ValueError if the images or steps do not fit the net."""
        steps = self.num_steps if steps is None else steps
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"steps must be between 1 and num_steps = {self.num_steps}, got {steps}")
        if not images.is_floating_point():
            raise ValueError(f"the net takes images of floating point, normalised, got {images.dtype}")
        if images.shape[1:] != self.encoder.input_shape:
            expected = ", ".join(["B", *map(str, self.encoder.input_shape)])
            raise ValueError(f"the net takes images [{expected}], got {list(images.shape)}")
        batch_norms = (m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if len(images) < 2 and any(norm.training for norm in batch_norms):
            raise ValueError("batch norm cannot train on a batch of one image, or none: use two or more")
        return steps

    def voltages(self, images, steps=None):
        """Output voltage after each of the first `steps` (default all) time-steps, [steps, B, K].

        images: [B, C, H, W], or [B, T, C, H, W] with `encoding="frames"`. `voltages[t - 1].argmax(-1)` is
        the prediction of an exit after t steps.
        """
        steps = self.check_input(images, steps)
        layers, membranes, trace = self.layers(), {}, []
        voltage, dtype = 0.0, torch.promote_types(images.dtype, torch.float32)
        for t in range(steps):
            x = self.encoder(images, t)
            for layer in layers:
                if isinstance(layer.synapse, nn.Linear):
                    x = x.flatten(1)
                current = layer.norm(layer.synapse(x), t)
                spikes, membranes[layer.name] = layer.lif(current, membranes.get(layer.name))
                x = layer.pool(spikes)
            voltage = voltage + self.readout(x.flatten(1)).to(dtype)
            trace.append(voltage)
        return torch.stack(trace)

    def forward(self, images, steps=None):
        """Logits [B, K]: the output voltage after `steps` (default all) time-steps, over `steps`."""
        voltages = self.voltages(images, steps)
        return voltages[-1] / len(voltages)


def SNN_VGG9_BNTT(num_steps, leak_mem=0.95, img_size=32, num_cls=10, **options):
    """VGG9 under the authors' name and signature; options as in `SpikingVGG`. img_size >= 8."""
    return SpikingVGG("vgg9", num_steps, leak_mem, img_size, num_cls, **options)


def SNN_VGG11_BNTT(num_steps, leak_mem=0.95, img_size=32, num_cls=10, **options):
    """VGG11 under the authors' name and signature; options as in `SpikingVGG`. img_size >= 16."""
    return SpikingVGG("vgg11", num_steps, leak_mem, img_size, num_cls, **options)


def _choice(key, value, table):
    if value not in table:
        raise ValueError(f"{key} must be one of {', '.join(table)}, got {value!r}")
    return value


def _with_pools(channels):
    """(64, "A", 128) -> (64, "A"), (128, None): each convolution with the pool that follows it."""
    for i, width in enumerate(channels):
        if isinstance(width, int):
            pool = channels[i + 1] if i + 1 < len(channels) else None
            yield width, pool if isinstance(pool, str) else None
