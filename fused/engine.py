"""One run of a net from model.py, layer by layer, over all time-steps at once: the maths of the fused engine.

A feed-forward spiking net needs its time loop only inside the neuron. So a layer is run over all T
steps at once: its convolution sees [T * B, C, H, W], and all that stands between two convolutions is
a few passes over the matrix x[t, n, c] of its outputs (n = image and pixel, c = channel):

  statistics    mu_t, var_t over n                                      (training, with BatchNorm)
  lif_forward   a_t = gamma_t / sqrt(var_t + eps),  b_t = -a_t mu_t;  then, membranes in registers:
                    u_t = leak m_{t-1} + a_t x_t + b_t,  s_t = 1[u_t > theta],  m_t = u_t - theta s_t
                or, firing first,
                    s_t = 1[m_{t-1} > theta],  m_t = leak m_{t-1} + a_t x_t + b_t - theta s_t
                or, with a hard reset, m_t = u_t (1 - s_t),
                and the average pool of s: what the next layer sees, and for the backward pass the
                same counted in one byte.
  lif_backward  the membranes once more, then the reverse scan from the gradient g of s, with
                h(v) = alpha / theta max(0, 1 - |v / theta - 1|):
                    d_t = g_t h(u_t) + leak d_{t+1}
                or, firing first,
                    d_t = g_{t+1} h(m_t) + leak d_{t+1}
                or, with a hard reset,
                    d_t = g_t h(u_t) + leak d_{t+1} (1 - s_t)
                d is the gradient of a_t x_t + b_t. In the same pass S1 = sum_n d and
                S2 = sum_n d (x - mu), all that BatchNorm's backward pass needs:
                    dgamma_t = S2 / sqrt(var_t + eps)
                and where the leak is learnt S3 = sum_n d_t m_{t-1}, whose sum is its gradient.
  affine        dx = a d - a S1 / N - a (x - mu) S2 / (N (var + eps)), as k1 d + k2 x + k3.
                A norm whose statistics run over batch and time (tdBN) has the means of S1 and S2 over t here.
  unpack        the byte counts as numbers again, for the gradient of the next layer's weights.

For the backward pass a layer keeps x and the packed spikes, nothing else. `save_memory` cuts time
into blocks, keeps the membranes at their borders, and runs each block again in the backward pass:
exact, for the statistics of a time-step are measured once and the draws are kept.

What a norm is, it says itself (`batch_norms`, `per_step`, `gamma`, `beta`, `affine`), and so does a neuron (`leak`,
`threshold`, `spike_order`, and where it has them `hard_reset`, `alpha`): no type of either is known here.
A threshold has the gradient -sum_t,n d_t (a_t x_t + b_t) / theta. Of a negative one the passes see the mirror image.
The passes are in cpu.py (C++) and triton.py, one for each kind of device.
"""

import functools
import itertools
import sys
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from fused.common import Shape, Unsupported

MAX_POOL = 15  # packed spikes count those of a window in one byte
INFERENCE_BYTES = 2**28  # of one layer's outputs over the time-steps run at once, without gradients
NO_CUMSUM = ("cuda",)  # where PyTorch refuses its cumsum if algorithms must be deterministic
COLUMNS = 32  # most of the first layer; with zeros there are as many
READOUT_NUMBERS = 2**22  # of the output layer's input in its own dtype at once: larger ones cost page faults


@functools.cache
def backend(device_type):
    """The passes for a kind of device. Raises `Unsupported` where there are none."""
    if device_type == "cpu":
        if sys.platform == "win32":
            raise Unsupported("the fused engine has no CPU build for Windows")
        from fused.cpu import CpuPasses

        return CpuPasses()
    if device_type == "cuda":
        try:
            from fused.triton import TritonPasses

            passes = TritonPasses()
            passes.unpack(torch.zeros(1, dtype=torch.uint8, device="cuda"), 1.0, torch.float32)  # compiles a kernel
        except Exception as error:  # no Triton, no C compiler for its launcher, a GPU it does not know ...
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise Unsupported(f"the fused engine on a GPU needs a working Triton: {reason}") from None
        return passes
    raise Unsupported(f"the fused engine does not know the device {device_type}")


def by_columns(device_type, dtype, synapse):
    """Whether the first layer is one matrix product over the pixels that a kernel sees, its columns.

    cuDNN has no fast convolution for images of three channels in 16 bit, forwards or for the weight's gradient.
    """
    small = isinstance(synapse, nn.Conv2d) and synapse.weight[0].numel() <= COLUMNS
    return small and device_type == "cuda" and dtype.itemsize == 2


def shapes(net, B, T, size=None):
    """The `Shape` of every spiking layer of `net`; size: of what the first sees, height and width."""
    found, (H, W) = [], size or (net.encoder.size, net.encoder.size)
    for layer in net.layers():
        H, W = (H, W) if isinstance(layer.synapse, nn.Conv2d) else (1, 1)
        pool = H if isinstance(layer.pool, nn.AdaptiveAvgPool2d) else getattr(layer.pool, "kernel_size", 1)
        features, lif = layer.synapse.weight.shape[0], layer.lif
        kind = lif.spike_order == "fire_first", getattr(lif, "hard_reset", False)
        leak, threshold, alpha = lif.leak, lif.threshold, getattr(lif, "alpha", model.SURROGATE_ALPHA)
        leak = leak.detach().view(()) if torch.is_tensor(leak) else leak
        threshold = threshold.detach().abs().view(()) if torch.is_tensor(threshold) else threshold
        found.append(Shape(T, B, H, W, features, pool, *kind, leak, threshold, alpha))
        H, W = H // pool, W // pool
    return found


class Scale(NamedTuple):
    """A norm as y = a x + b over one block of time; [T, C] each, a, b and mean in state_dtype, the others float64."""

    a: torch.Tensor
    b: torch.Tensor
    mean: torch.Tensor  # of the batch; 0 where the batch is not measured
    rstd: torch.Tensor | None  # 1 / sqrt(var + eps) of the batch; None where it is not measured
    gamma: torch.Tensor | None


class Run:
    """One forward pass and its backward pass: the net's layers, shapes, dtypes and what is kept.

    block: time-steps run at once; None: all of them with gradients or in training mode, else as many as fit.
    Raises `Unsupported` where dtypes or what a norm says of itself are not the engine's.
    """

    def __init__(self, net, images, steps, block=None):
        self.net, self.layers, self.steps = net, net.layers(), steps
        self.device, self.images = images.device, len(images)
        self.passes = backend(self.device.type)
        weight = net.readout.weight
        self.autocast = torch.is_autocast_enabled(self.device.type) and weight.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(self.device.type) if self.autocast else weight.dtype
        self.state_dtype = torch.promote_types(self.dtype, torch.float32)
        if self.autocast and images.dtype == torch.float64 or not self.autocast and images.dtype != weight.dtype:
            raise Unsupported(f"the fused engine takes images of the weights' {weight.dtype}, not {images.dtype}")
        if self.dtype not in self.passes.dtypes:
            raise Unsupported(f"the fused engine does not compute in {self.dtype}")
        self.grad_enabled = torch.is_grad_enabled()
        self.shapes = shapes(net, len(images), steps)
        self.by_columns = by_columns(self.device.type, self.dtype, self.layers[0].synapse)
        most = max(s.N * s.C for s in self.shapes) * self.dtype.itemsize
        fit = steps if self.grad_enabled or net.training else max(1, INFERENCE_BYTES // most)
        self.block = min(block or fit, steps)
        self.norms = [layer.norm.batch_norms(steps) for layer in self.layers]
        self.measured = [bool(norms) and norms[0].training for norms in self.norms]
        self.early, self.live = self.reach()
        # leaks and thresholds as autograd sees them, None where one is a number
        numbers = [(layer.lif.leak, layer.lif.threshold) for layer in self.layers]
        self.leaks, self.thresholds = (
            [v.view(()) if torch.is_tensor(v) else None for v in vs] for vs in zip(*numbers, strict=True)
        )
        learnt = any(v is not None and v.requires_grad for v in (*self.leaks, *self.thresholds))
        if learnt and not all(self.live):
            raise Unsupported(
                "the fused engine cannot learn leaks and thresholds in runs too short to reach the output"
            )
        # gamma and beta of a norm that measures its batch, else a and b: as autograd sees them
        self.scales = [self.scale_parameters(i, live) for i, live in enumerate(self.live)]
        self.replaying = False  # in the backward pass, where hooks are not called again

    def prepared(self, weights):
        """Those of the layers in dtype and as the passes take them, and that of the output layer in state_dtype."""
        *weights, readout = (w.detach() for w in weights)
        weights = [w.to(self.dtype) for w in weights]
        if self.by_columns:
            weights[0] = F.pad(weights[0].flatten(1), (0, COLUMNS - weights[0][0].numel()))
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
        return weights, readout.to(self.state_dtype)

    def blocks(self):
        return [(t, min(t + self.block, self.steps)) for t in range(0, self.steps, self.block)]

    def state(self, wanted):
        """Membranes at rest, one per layer, for a run of several blocks; else a None each."""
        if not wanted:
            return [None] * len(self.layers)
        return [torch.zeros(s.N, s.C, dtype=self.state_dtype, device=self.device) for s in self.shapes]

    def keep(self, images, membranes):
        """Go on with those images of the batch alone; returns their membranes."""
        pairs = list(zip(membranes, self.shapes, strict=True))
        self.shapes = [shape._replace(B=len(images)) for shape in self.shapes]
        return [m if m is None else m.view(s.B, -1, s.C)[images].view(-1, s.C) for m, s in pairs]

    def checked(self, encoded, steps):
        """What the encoder gave for so many steps; RuntimeError where it is not what the passes can trust."""
        conv, wide = isinstance(self.layers[0].synapse, nn.Conv2d), not self.autocast
        fits = encoded.ndim == 5 and encoded.shape[:2] == (steps, self.images)
        if not fits or wide and encoded.dtype != self.net.readout.weight.dtype:
            found = (
                f"the encoder gave {[*encoded.shape]} of {encoded.dtype}, where {steps} steps of {self.images} images"
            )
            raise RuntimeError(f"{found} were due: mend it, or run the net plain by fused.detach(net)")
        if conv and encoded.shape[3:] != self.shapes[0][2:4]:  # not what the encoder says
            self.shapes = shapes(self.net, self.shapes[0].B, self.steps, encoded.shape[3:])
            whole = all(s.H == s.W for s, layer in self.pairs() if isinstance(layer.pool, nn.AdaptiveAvgPool2d))
            if not whole or max(s.pool for s in self.shapes) > MAX_POOL:
                size = "x".join(map(str, encoded.shape[3:]))
                raise RuntimeError(f"the fused engine cannot pool maps of {size}: fused.detach(net) makes it run plain")
        return encoded

    def pairs(self):
        return zip(self.shapes, self.layers, strict=True)

    def reach(self):
        """For each layer: how many first steps can reach the output (firing first, the last ones cannot), and how many
        have a gradient in its norm, as in the plain loop: all or none where a block holds all steps."""
        whole = any(m.training and not getattr(m, "per_step", True) for m in self.net.modules())
        early, connected, found = self.steps, True, []
        for shape, layer in reversed([*self.pairs()]):
            early = max(0, early - shape.fire_first)
            mixed = whole and not layer.norm.per_step
            connected = connected and (self.steps > shape.fire_first if mixed else early > 0)
            found.append((early, 0 if not connected else early if layer.norm.per_step else self.steps))
        return zip(*reversed(found), strict=True)

    # -- Norms as x -> a x + b, per time-step and channel

    def scale_parameters(self, i, steps):
        """What scales and shifts in the norm of layer i at the first steps: two tensors [steps, C], or None."""
        norm, features = self.layers[i].norm, self.shapes[i].C
        if not steps:
            return None, None
        if self.measured[i]:
            beta = getattr(norm, "beta", None)
            found = norm.gamma(steps), beta(steps) if beta else None
        else:
            dtype = torch.float64 if self.grad_enabled else self.state_dtype
            alike = self.norms[i] and self.norms[i][0] is self.norms[i][-1] and not norm.gamma_per_step
            with self.device:  # a copy from the CPU could not be captured in a CUDA graph
                affine = norm.affine(1 if alike else steps)
            found = tuple(v.to(self.device, dtype).expand(steps, -1) for v in affine)
        if self.thresholds[i] is not None:
            mirror = torch.where(self.thresholds[i].detach() < 0, -1, 1)
            found = tuple(v if v is None else v * mirror for v in found)
        if odd := [[*v.shape] for v in found if v is not None and v.shape != (steps, features)]:
            said = f"{type(norm).__name__} describes itself as {odd[0]}, where [{steps}, {features}] were due"
            raise Unsupported(f"the fused engine does not know this net's parts: {said}")
        return found

    @functools.cached_property
    def all_scales(self):
        """`scale_parameters` of all steps, without gradients: float64 for norms that measure, else in state_dtype."""
        found = []
        for i, (scale, shift) in enumerate(self.scales):
            if scale is None or len(scale) < self.steps:
                scale, shift = self.scale_parameters(i, self.steps)
            dtype = torch.float64 if self.measured[i] else self.state_dtype
            found.append([v if v is None else v.detach().to(dtype) for v in (scale, shift)])
        return found

    def measure(self, i, x, t0, t1):
        """The `Scale` of layer i at steps t0 .. t1, x its outputs there: measures the batch if the norm does.

        Then the running statistics are updated.
        """
        shape, norm = self.shapes[i]._replace(T=t1 - t0), self.layers[i].norm
        scale, shift = (v if v is None else v[t0:t1] for v in self.all_scales[i])
        if not self.measured[i]:
            return Scale(scale.contiguous(), shift.contiguous(), torch.zeros_like(scale), None, None)
        mean, variance = self.passes.statistics(x, shape)
        if norm.per_step:
            update_running(self.norms[i][t0:t1], mean, variance, shape.N)
        else:  # over batch and time
            variance = (variance + (mean - mean.mean(0)) ** 2).mean(0).expand_as(variance)
            mean = mean.mean(0).expand_as(mean)
            update_running(self.norms[i][:1], mean[:1], variance[:1], shape.N * shape.T)
        rstd = (variance + self.norms[i][0].eps).rsqrt()
        a = scale * rstd
        b = -a * mean if shift is None else shift - a * mean
        return Scale(*(v.to(self.state_dtype).contiguous() for v in (a, b, mean)), rstd, scale)

    # -- Synapses over all steps of a block: [T, B, H, W, C] in and out

    def synapse(self, i, inputs, weight):
        if i == 0 and self.by_columns:
            return F.linear(inputs, weight)
        if weight.ndim == 4:
            images = inputs.flatten(0, 1).permute(0, 3, 1, 2)
            y = F.conv2d(images, weight, padding=self.layers[i].synapse.padding)
            y = y.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            return y.view(*inputs.shape[:2], *y.shape[1:])
        y = F.linear(self.features(inputs), weight)
        return y.view(*inputs.shape[:2], 1, 1, -1)

    def features(self, inputs):
        """[T, B, H, W, C] -> [T * B, C * H * W], the order in which `flatten` reads an image."""
        return inputs.permute(0, 1, 4, 2, 3).reshape(inputs.shape[0] * inputs.shape[1], -1)

    # -- The output layer, in state_dtype

    def pieces(self, features, *others):
        """Some rows of the matrix of features [T * B, C * H * W] at a time, and those of the others."""
        count = max(1, READOUT_NUMBERS // features.shape[1])
        return zip(*(matrix.split(count) for matrix in (features, *others)), strict=True)

    def readout(self, spikes, weight):
        """Currents [T, B, K] of the output layer from spikes [T, B, H, W, C]."""
        currents = [F.linear(x.to(self.state_dtype), weight) for (x,) in self.pieces(self.features(spikes))]
        return torch.cat(currents).view(*spikes.shape[:2], -1)

    def readout_backward(self, grad, spikes, weight):
        """Gradients of its weight, [K, features], and of spikes, in dtype and contiguous, from grad [T, B, K]."""
        features, g, T, B, H, W, C = self.features(spikes), grad.flatten(0, 1), *spikes.shape
        gx, gw = torch.empty(len(g), features.shape[1], dtype=self.dtype, device=self.device), 0
        for x, to, part in self.pieces(features, gx, g):
            gw = gw + part.t() @ x.to(self.state_dtype)
            to.copy_(part @ weight)
        return gw, gx.view(T, B, C, H, W).permute(0, 1, 3, 4, 2).contiguous()

    def synapse_backward(self, i, grad, inputs, weight, weight_grad, want_inputs):
        """Gradients of the synapse's weight, added to weight_grad, and of its inputs, [T, B, H, W, C]."""
        if i == 0 and self.by_columns:  # image by image, for a GPU is slow at one product with millions of terms
            g, x = (v.flatten(2, 3).flatten(0, 1) for v in (grad, inputs))
            shape, gx = self.layers[0].synapse.weight.shape, None
            gw = torch.bmm(g.mT, x).sum(0, dtype=self.state_dtype)[:, : shape[1:].numel()].reshape(shape)
        elif weight.ndim == 4:
            g, x = (v.flatten(0, 1).permute(0, 3, 1, 2) for v in (grad, inputs))
            pad = list(self.layers[i].synapse.padding)
            by_columns = self.device.type == "cpu" and x.shape[-1] <= (4 if self.dtype == torch.bfloat16 else 2)
            gx, gw, _ = torch.ops.aten.convolution_backward(
                g, x, weight, None, [1, 1], pad, [1, 1], False, [0, 0], 1, [want_inputs, not by_columns, False]
            )
            if by_columns:
                gw = self.weight_grad_by_columns(grad.flatten(0, 1), inputs.flatten(0, 1), weight, pad)
            if want_inputs:
                gx = gx.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(inputs.shape)
        else:
            g, gx = grad.view(-1, grad.shape[-1]), None
            gw = g.t() @ self.features(inputs)
            if want_inputs:
                T, B, H, W, C = inputs.shape
                gx = (g @ weight).view(T, B, C, H, W).permute(0, 1, 3, 4, 2).contiguous()
        gw = gw.to(self.state_dtype)
        return gw if weight_grad is None else weight_grad.add_(gw), gx

    def weight_grad_by_columns(self, grad, x, weight, pad):
        """The convolution's weight gradient as one matrix product; grad, x: [N, H, W, C].

        On maps of a few pixels up to ten times as fast as oneDNN's own.
        """
        columns = F.pad(x, (0, 0, pad[1], pad[1], pad[0], pad[0]))
        for dim, size in enumerate(weight.shape[2:], start=1):
            columns = columns.unfold(dim, size, 1)  # [N, H, W, C, kernel height, kernel width] in the end
        columns = columns.permute(0, 1, 2, 4, 5, 3).reshape(-1, weight[0].numel())
        gw = grad.reshape(-1, grad.shape[-1]).t() @ columns
        return gw.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)

    # -- Forward and backward over one block of time

    def dense(self, packed, i):
        """What layer i's synapse sees, as numbers: packed spikes count those in the pool's window."""
        if packed.dtype != torch.uint8:  # the encoded images
            return packed
        return self.passes.unpack(packed, 1.0 / self.shapes[i - 1].pool ** 2, self.dtype)

    def encoded(self, images, steps):
        """Encoded images [T, B, C, H, W] as the first layer takes them: [T, B, H, W, C], in memory of their own."""
        given, images = images, images.to(self.dtype)
        images = self.columns(images) if self.by_columns else images.permute(0, 1, 3, 4, 2).contiguous()
        return images.clone() if images.data_ptr() == given.data_ptr() else images  # who gave them may change them

    def columns(self, images):
        """What the first layer's kernel sees at each pixel, then zeros: [T, B, C, H, W] -> [T, B, H, W, COLUMNS]."""
        conv = self.layers[0].synapse
        count, (height, width), (up, left) = conv.weight[0].numel(), conv.kernel_size, conv.padding
        seen = F.pad(images.flatten(0, 1), (left, left, up, up)).unfold(2, height, 1).unfold(3, width, 1)
        columns = images.new_zeros(*images.shape[:2], *seen.shape[2:4], COLUMNS)
        shape = seen.shape[1], height, width
        columns.flatten(0, 1)[..., :count].unflatten(-1, shape).copy_(seen.permute(0, 2, 3, 1, 4, 5))
        return columns

    def forward_block(self, encoded, t0, t1, weights, membranes, keep, scales=None):
        """Run steps t0 .. t1 of all layers. Returns (spikes of the last layer [T, B, H, W, C], kept, scales).

        encoded: [T, B, C, H, W]. membranes: one per layer, moved on in place, or None if this is the only block.
        kept: with `keep` a list of (outputs of the synapse, its packed inputs, membrane at the start), and last the
        packed spikes. scales: those measured before, when a block is run again.
        """
        x = packed = self.encoded(encoded, t1 - t0)
        kept, replaying, scales = [], scales is not None, scales or []
        for i, (layer, weight, membrane) in enumerate(zip(self.layers, weights, membranes, strict=True)):
            shape = self.shapes[i]._replace(T=t1 - t0)
            y = self.synapse(i, x, weight)
            if layer.synapse._forward_hooks and not replaying:
                self.call_synapse_hooks(layer.synapse, encoded if i == 0 else x.permute(0, 1, 4, 2, 3), y)
            if not replaying:
                scales.append(self.measure(i, y, t0, t1))
            a, b = scales[i].a, scales[i].b
            watched = bool(layer.lif._forward_hooks) and not replaying
            before = membrane.clone() if membrane is not None and (keep or watched) else None
            if keep:
                kept.append((y, packed, before))
                packed = torch.empty(shape.pooled, dtype=torch.uint8, device=self.device)
            if watched:  # hooks may keep what they see, and see it before pooling
                whole, state = shape._replace(pool=1), None if before is None else before.clone()
                spikes = self.passes.lif_forward(y, whole, a, b, state, t0 > 0, None, fresh=True)
                spikes = spikes.permute(0, 1, 4, 2, 3)
                spikes = spikes if isinstance(layer.synapse, nn.Conv2d) else spikes.flatten(2)
                for hook in [*layer.lif._forward_hooks.values()]:
                    hook(layer.lif, (), (spikes, None))
            x = self.passes.lif_forward(y, shape, a, b, membrane, t0 > 0, packed if keep else None)
        return x, [*kept, packed] if keep else [], scales

    def call_synapse_hooks(self, synapse, inputs, outputs):
        """Call the forward hooks of a synapse once a step, as the plain loop does. inputs: [T, B, C, H, W]."""
        outputs = outputs.permute(0, 1, 4, 2, 3)
        if isinstance(synapse, nn.Linear):
            inputs, outputs = inputs.flatten(2), outputs.flatten(2)
        for x, y in zip(inputs, outputs, strict=True):
            for hook in [*synapse._forward_hooks.values()]:
                hook(synapse, (x,), y)

    def output(self, spikes, weight):
        """Currents [T, B, K] of the output layer, whose hooks are called."""
        currents = self.readout(spikes, weight)
        if self.net.readout._forward_hooks:
            self.call_synapse_hooks(self.net.readout, spikes.permute(0, 1, 4, 2, 3), currents[:, :, None, None])
        return currents

    def backward_block(self, grad, kept, scales, t0, t1, weights, carries, results, last, want_images):
        """Add a block's gradients to `results`, from the gradient of the last layer's spikes.

        Returns that of the encoded images, [T, B, H, W, C], if want_images, else None.

        carries: the gradient of each layer's membrane, moved back in time in place, or None if this is
        the only block. Empties `kept` as it goes.
        """
        for i in reversed(range(len(self.layers))):
            x, inputs, membrane = kept.pop()
            shape, scale, norm = self.shapes[i]._replace(T=t1 - t0), scales[i], self.layers[i].norm
            leak, threshold = self.leaks[i], self.thresholds[i]
            scaled = bool(self.norms[i]) or threshold is not None
            count = 3 if leak is not None else 2 * scaled
            arguments = (membrane, grad, carries[i], not last, count)
            delta, sums = self.passes.lif_backward(x, shape, scale.a, scale.b, scale.mean, *arguments)
            if leak is not None:
                results.leaks[i] += sums[2].sum()
            if threshold is not None:
                a, b = scale.a.double(), scale.b.double()
                results.thresholds[i] -= (a * sums[1] + (a * scale.mean + b) * sums[0]).sum() / threshold
            if norm.per_step and self.early[i] < t1:  # cut by the plain loop, though a norm over time may reach them
                for part in (delta, *sums):
                    part[max(0, self.early[i] - t0) :] = 0
            if scaled:
                s1, s2 = sums[:2]
                k1, k2, k3 = scale.a.double(), torch.zeros_like(s1), torch.zeros_like(s1)
                if self.measured[i]:
                    s2 = s2 * scale.rstd  # of d and the normalised x
                    m1, m2 = scale.gamma * s1 / shape.N, scale.gamma * s2 / shape.N
                    if not norm.per_step:
                        m1, m2 = m1.mean(0), m2.mean(0)
                    k2 = -(scale.rstd**2) * m2
                    k3 = -scale.rstd * m1 - k2 * scale.mean
                results.scales[i][t0:t1], results.shifts[i][t0:t1] = s2, s1
                coefficients = (k.to(self.state_dtype).contiguous() for k in (k1, k2, k3))
                delta = self.passes.affine(delta, x, shape, *coefficients)
            del x
            results.weights[i], grad = self.synapse_backward(
                i, delta, self.dense(inputs, i), weights[i], results.weights[i], i > 0 or want_images
            )
        return grad


def sum_over_time(x):
    """x[0] + ... + x[t] for every t, along the first dimension."""
    if x.device.type in NO_CUMSUM and torch.are_deterministic_algorithms_enabled():
        return torch.stack([*itertools.accumulate(x)])
    return x.cumsum(0)


@torch.no_grad()
def update_running(norms, mean, variance, count):
    """The running statistics of BatchNorms after the statistics [T, C] of `count` numbers each, in order of time.

    norms: one BatchNorm a step, all different or all the same.
    """
    momentum, unbiased = norms[0].momentum, variance * (count / (count - 1))
    shared = norms[0] is norms[-1]
    torch._foreach_add_([bn.num_batches_tracked for bn in norms[: 1 if shared else None]], len(norms) if shared else 1)
    for name, batch in (("running_mean", mean), ("running_var", unbiased)):
        buffers = [getattr(bn, name) for bn in norms]
        if shared:
            steps = torch.arange(len(norms) - 1, -1, -1, device=batch.device, dtype=batch.dtype)
            weights = momentum * (1 - momentum) ** steps
            buffers[0].mul_((1 - momentum) ** len(norms)).add_((weights[:, None] * batch).sum(0))
        else:
            torch._foreach_mul_(buffers, 1 - momentum)
            torch._foreach_add_(buffers, list(batch.to(buffers[0].dtype).unbind(0)), alpha=momentum)


class _Results:
    """Gradients as the blocks of time add to them."""

    def __init__(self, run):
        sizes = [(run.steps, shape.C) for shape in run.shapes]
        self.weights = [None] * len(run.layers)
        self.leaks, self.thresholds = [0.0] * len(run.layers), [0.0] * len(run.layers)
        self.scales, self.shifts = (
            [torch.zeros(size, dtype=torch.float64, device=run.device) for size in sizes] for _ in range(2)
        )


class FusedVoltages(torch.autograd.Function):
    """Encoded images [T, B, C, H, W], weights, norms' scales and shifts, leaks, thresholds to voltages [T, B, K]."""

    @staticmethod
    def forward(ctx, run, encoded, *parameters):
        with torch.autocast(run.device.type, enabled=False):  # dtypes are chosen below, the output is not rounded
            return FusedVoltages.run_forward(ctx, run, encoded, parameters)

    @staticmethod
    def run_forward(ctx, run, encoded, parameters):
        run.by_columns &= not ctx.needs_input_grad[1]
        weights, readout = run.prepared(parameters[: len(run.layers) + 1])
        blocks, keep = run.blocks(), run.grad_enabled and any(ctx.needs_input_grad)
        membranes, borders, currents, scales = run.state(len(blocks) > 1), [], [], []
        for t0, t1 in blocks:
            if keep and len(blocks) > 1:
                borders.append([m.clone() for m in membranes])
            only = keep and len(blocks) == 1
            spikes, kept, measured = run.forward_block(encoded[t0:t1], t0, t1, weights, membranes, only)
            scales.append(measured)
            currents.append(run.output(spikes, readout))
        if keep:
            again = [encoded] if len(blocks) > 1 else []  # is run again
            ctx.save_for_backward(*parameters, *again)  # autograd then notices if they change before the backward pass
            ctx.run, ctx.weights, ctx.readout = run, weights, readout
            ctx.shape, ctx.dtype, ctx.alpha = encoded.shape, encoded.dtype, model.SURROGATE_ALPHA
            ctx.kept, ctx.borders, ctx.scales = kept, borders, scales
        return sum_over_time(torch.cat(currents))

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # else what comes out would pass for a constant
            raise RuntimeError("the fused engine has no gradients of gradients: fused.detach(net) makes it run plain")
        with torch.autocast(ctx.run.device.type, enabled=False):
            return FusedVoltages.run_backward(ctx, grad)

    @staticmethod
    def run_backward(ctx, grad):
        if ctx.kept is None:
            once = "it can run only once; fused.detach(net) makes it run plain"
            raise RuntimeError(f"the fused engine frees what it kept in the backward pass: {once}")
        kept, ctx.kept = ctx.kept, None
        if ctx.alpha != model.SURROGATE_ALPHA:
            raise RuntimeError("SURROGATE_ALPHA has changed since the forward pass: the fused engine took it there")
        run, blocks, parameters = ctx.run, ctx.run.blocks(), ctx.saved_tensors
        parameters, encoded = parameters[: len(ctx.needs_input_grad) - 2], parameters[-1]
        grad = sum_over_time(grad.flip(0)).flip(0).to(run.state_dtype)  # of the output's current at each step
        results, readout, carries = _Results(run), 0, run.state(len(blocks) > 1)
        live, seen = run.live, None
        if ctx.needs_input_grad[1] and live[0]:
            seen = torch.empty(ctx.shape, dtype=run.dtype, device=run.device)
        for (t0, t1), scales in zip(reversed(blocks), reversed(ctx.scales), strict=True):
            if len(blocks) > 1:
                again = (ctx.weights, ctx.borders.pop(), True, scales)
                _, kept, _ = run.forward_block(encoded[t0:t1], t0, t1, *again)
            spikes = run.dense(kept.pop(), len(run.layers))
            gw, gs = run.readout_backward(grad[t0:t1], spikes, ctx.readout)
            readout = readout + gw
            last = t1 == run.steps
            images = run.backward_block(gs, kept, scales, t0, t1, ctx.weights, carries, results, last, seen is not None)
            if seen is not None:
                seen[t0:t1] = images.permute(0, 1, 4, 2, 3)
        weights = [w if steps else None for w, steps in zip(results.weights, live, strict=True)]
        vectors = [v[:steps] for part in (results.scales, results.shifts) for v, steps in zip(part, live, strict=True)]
        found = [*weights, readout, *vectors, *results.leaks, *results.thresholds]
        pairs = zip(parameters, found, strict=True)
        grads = (None if p is None or g is None else g.to(p.dtype).contiguous() for p, g in pairs)
        return None, None if seen is None else seen.to(ctx.dtype), *grads
