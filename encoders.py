"""What the first layer of a net sees of an input: Poisson spikes, the image itself, frames, or a pixel a time-step.

Shapes: T time-steps, B images, C channels, S pixels a side. An encoder is called as encoder(images, steps, t0=0) and
returns [steps, B, C, S, S], the time-steps from t0 on.
"""

import torch
import torch.nn as nn


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def choose(key, value, table):
    """The row `value` of a table, or `value` itself where it is a class or a function; ValueError if neither."""
    require(callable(value) or value in table, f"{key} must be one of {', '.join(table)}, got {value!r}")
    return value if callable(value) else table[value]


def PoissonGen(images, rescale_fac=2.0):
    """Draw one time-step of ternary Poisson spikes: sign(x) with probability min(1, |x| / 2).

    images: [B, C, S, S] after mean/std normalisation. Returns spikes in {-1, 0, 1} of the same shape and dtype. One
    contiguous uniform draw in the images' own dtype, so that a seed gives the same spikes in every memory format.
    (The authors' `PoissonGen`.)
    """
    uniform = torch.rand_like(images, memory_format=torch.contiguous_format)
    return (uniform * rescale_fac <= images.abs()).to(images.dtype) * images.sign()


class Encoder(nn.Module):
    """Base of the encoders. num_steps: T; channels: C; size: S of the input.

    `input_shape` is that of one input, `size` then the S of what the first layer sees. `step(images)` is what it sees
    at every time-step; an encoder that depends on the time-step overrides `forward`.
    """

    random = False  # draws spikes, so that two runs differ
    analog = False  # gives values, not spikes or event counts

    def __init__(self, num_steps, channels, size):
        super().__init__()
        self.input_shape, self.size = (channels, size, size), size

    def check_input(self, images):
        """ValueError unless images are a batch of what this encoder takes."""
        require(images.is_floating_point(), f"the net takes images of floating point, normalised, got {images.dtype}")
        expected = ", ".join(["B", *map(str, self.input_shape)])
        fits = images.shape[1:] == self.input_shape
        require(fits, f"the net takes images [{expected}], got {list(images.shape)}")

    def forward(self, images, steps, t0=0):
        return torch.stack([self.step(images) for _ in range(steps)])


class RandomEncoder(Encoder):
    """Base of the encoders that draw spikes. `expected(images)`: their mean over draws, as autograd sees it.

    A drawn spike has no derivative. With `straight_through = True`, here or set later, it gets the derivative
    of its mean, so that an attack has a gradient of the images: the straight-through estimate of Sharmin et al. (ECCV
    2020). That takes 1; here it is the slope of the mean, so zero for a pixel so large that its spikes are certain. The
    spikes stay the same. With False, images that ask for a gradient raise ValueError: it would be zero everywhere.
    """

    random = True

    def __init__(self, num_steps, channels, size, straight_through=False):
        super().__init__(num_steps, channels, size)
        self.straight_through = straight_through

    def forward(self, images, steps, t0=0):
        wanted = images.requires_grad and torch.is_grad_enabled()
        reason = "Poisson spikes have no gradient with respect to the images: set net.encoder.straight_through = True"
        require(self.straight_through or not wanted, f"{reason} for an estimate of it, or pass images.detach()")
        spikes = super().forward(images.detach(), steps, t0)
        if not wanted:
            return spikes
        mean = self.expected(images)
        return spikes + (mean - mean.detach())  # adds 0, and the gradient


class PoissonEncoder(RandomEncoder):
    """Ternary Poisson spikes of normalised images: the authors' input. Their mean is x / 2, from -1 to 1."""

    def step(self, images):
        return PoissonGen(images)

    def expected(self, images):
        return torch.where(images.abs() <= 2, images / 2, images.detach().sign())  # a clamp has no slope at its ends


class BinaryPoissonEncoder(RandomEncoder):
    """0/1 spikes with probability x, for images in [0, 1]: the textbook rate code. Their mean is x, from 0 to 1."""

    def step(self, images):
        uniform = torch.rand_like(images, memory_format=torch.contiguous_format)
        return (uniform < images).to(images.dtype)

    def expected(self, images):
        return torch.where((images >= 0) & (images <= 1), images, images.detach().clamp(0, 1))  # as above


class DirectEncoder(Encoder):
    """The image itself, as an input current at every time-step."""

    analog = True

    def forward(self, images, steps, t0=0):
        return images.expand(steps, *images.shape)


class FrameEncoder(Encoder):
    """A frame a time-step, as it is: event frames [B, T, C, S, S], one channel per polarity."""

    def __init__(self, num_steps, channels, size):
        super().__init__(num_steps, channels, size)
        self.input_shape = (num_steps, channels, size, size)

    def forward(self, frames, steps, t0=0):
        return frames[:, t0 : t0 + steps].transpose(0, 1)


class PixelEncoder(Encoder):
    """A pixel a time-step, row by row, as it is: sequential MNIST. T must be S * S; gives [T, B, C, 1, 1].

    Raises ValueError where T is another.
    """

    analog = True

    def __init__(self, num_steps, channels, size):
        super().__init__(num_steps, channels, size)
        expected = f"images of {size}x{size} pixels, one a time-step, need num_steps {size**2}"
        require(num_steps == size**2, expected)
        self.size = 1

    def forward(self, images, steps, t0=0):
        return self.pixels(images)[t0 : t0 + steps, ..., None, None]

    def pixels(self, images):
        """[T, B, C], in the order in which they are seen."""
        return images.flatten(2).permute(2, 0, 1)


class PermutedPixelEncoder(PixelEncoder):
    """The pixels in one fixed random order, kept in the state dict: permuted sequential MNIST."""

    def __init__(self, num_steps, channels, size):
        super().__init__(num_steps, channels, size)
        self.register_buffer("order", torch.randperm(num_steps, generator=torch.Generator().manual_seed(0)))

    def pixels(self, images):
        return super().pixels(images)[self.order]


ENCODERS = {
    "poisson": PoissonEncoder,
    "poisson_binary": BinaryPoissonEncoder,
    "direct": DirectEncoder,
    "frames": FrameEncoder,
    "pixels": PixelEncoder,
    "pixels_permuted": PermutedPixelEncoder,
}
