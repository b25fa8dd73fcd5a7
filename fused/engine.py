"""The fused engine: a net from model.py run layer by layer over all time-steps at once.

    net = fused.attach(SNN_VGG9_BNTT(num_steps=25))     # same parameters, buffers and state dict
    with torch.autocast("cpu", torch.bfloat16):         # or without, in float32 or float64
        loss = criterion(net(images), labels)
    loss.backward()

A feed-forward spiking net needs its time loop only inside the neuron. So a layer is run over all T
steps at once: its convolution sees [T * B, C, H, W], and all that stands between two convolutions is
a few passes over the matrix x[t, n, c] of its outputs (n = image and pixel, c = channel):

  statistics    mu_t, var_t over n                                      (training, with BatchNorm)
  lif_forward   a_t = gamma_t / sqrt(var_t + eps),  b_t = -a_t mu_t;  then, membranes in registers:
                    u_t = leak m_{t-1} + a_t x_t + b_t,  s_t = 1[u_t > theta],  m_t = u_t - theta s_t
                or, firing first,
                    s_t = 1[m_{t-1} > theta],  m_t = leak m_{t-1} + a_t x_t + b_t - theta s_t
                and the average pool of s: what the next layer sees, and for the backward pass the
                same counted in one byte.
  lif_backward  the membranes once more, then the reverse scan from the gradient g of s, with
                h(v) = alpha / theta max(0, 1 - |v / theta - 1|):
                    d_t = g_t h(u_t) + leak d_{t+1}
                or, firing first,
                    d_t = g_{t+1} h(m_t) + leak d_{t+1}
                d is the gradient of a_t x_t + b_t. In the same pass S1 = sum_n d and
                S2 = sum_n d (x - mu), all that BatchNorm's backward pass needs:
                    dgamma_t = S2 / sqrt(var_t + eps)
  affine        dx = a d - a S1 / N - a (x - mu) S2 / (N (var + eps)), as k1 d + k2 x + k3.
  unpack        the byte counts as numbers again, for the gradient of the next layer's weights.

For the backward pass a layer keeps x and the packed spikes, nothing else. `save_memory` cuts time
into blocks, keeps the membranes at their borders, and runs each block again in the backward pass:
exact, for BatchNorm's statistics belong to one time-step and the draws are kept.

This file is the engine; the passes are in cpu.py (C++) and triton.py, one for each kind
of device. model.py knows of none of them.
"""

import functools
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from fused.common import Shape, Unsupported
from model import BNTT, ENCODERS, LIF, NoNorm, SharedBN

MAX_POOL = 15  # packed spikes count those of a window in one byte
INFERENCE_BYTES = 2**29  # of one layer's outputs over the time-steps run at once, without gradients
READOUT_NUMBERS = 2**22  # of the output layer's input in its own dtype at once: larger ones cost page faults


# ---- Attaching ---------------------------------------------------------------------------------


def attach(net, save_memory=None):
    """Make `net` run fused, in place, and return it. Raises `Unsupported` where it cannot.

    save_memory: None, or the time-steps of one block: memory then grows by one membrane a block instead
    of by every time-step, for one more forward pass. `detach(net)` undoes it; parameters and buffers
    stay the same objects.
    Of forward hooks, those of the encoder and of the LIF modules are called (once a step, as ever).
    """
    reason = why_not(net)
    if reason:
        raise Unsupported(reason)
    if not isinstance(net, FusedNet):
        net.__class__ = _fused_class(type(net))
    net._block = save_memory
    return net


def detach(net):
    """Make `net` run by its own plain time loop again, and return it."""
    if isinstance(net, FusedNet):
        net.__class__ = type(net).__mro__[2]
        del net._block
    return net


def why_not(net):
    """None if `net` can run fused where it now lies, else the reason as a sentence."""
    device = next(net.parameters()).device
    try:
        _backend(device.type)
    except Unsupported as error:
        return str(error)
    if type(net.encoder) not in ENCODERS.values():
        return f"the fused engine does not know the encoder {type(net.encoder).__name__}"
    for layer in net.layers():
        if type(layer.norm) not in (BNTT, SharedBN, NoNorm):
            return f"the fused engine does not know the normalisation {type(layer.norm).__name__}"
        norms = [m for m in layer.norm.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not all(_knows_batch_norm(norm, norms[0]) for norm in norms):
            return f"the fused engine does not know the batch norm of {layer.name}"
        if type(layer.lif) is not LIF:
            return f"the fused engine does not know the neuron {type(layer.lif).__name__}"
        if not _knows_pool(layer.pool):
            return f"the fused engine does not know the pooling {layer.pool}"
        if not _knows_synapse(layer.synapse):
            return f"the fused engine does not know the weight layer {layer.synapse}"
    side = max((shape.pool for shape in _shapes(net, 1, 1)), default=1)
    if side > MAX_POOL:
        return f"the fused engine pools windows of up to {MAX_POOL}x{MAX_POOL}, this net has {side}x{side}"
    return None


def _knows_batch_norm(norm, first):
    plain = norm.weight is not None and norm.bias is None and norm.track_running_stats
    return plain and norm.momentum is not None and (norm.eps, norm.momentum) == (first.eps, first.momentum)


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
    """Mixed into the class of a net by `attach`: overrides the time loop."""

    def voltages(self, images, steps=None):
        steps = self.check_input(images, steps)
        if images.requires_grad or not len(images):  # a gradient of the images, as attacks want it, or none at all
            return super().voltages(images, steps)
        run = _Run(self, images, steps)
        if run.dtype not in run.passes.dtypes:
            return super().voltages(images, steps)
        spikes = torch.stack([self.encoder(images, t) for t in range(steps)])
        gammas = [run.gamma(i) for i in range(len(run.layers))]
        weights = [layer.synapse.weight for layer in run.layers] + [self.readout.weight]
        return _FusedVoltages.apply(run, spikes, *weights, *gammas)


@functools.cache
def _fused_class(cls):
    return type(f"Fused{cls.__name__}", (FusedNet, cls), {})


class GraphedStep:
    """A training step as one CUDA graph: thousands of kernel launches become one.

    step(images, labels) -> tuple of tensors; it may ask nothing of the GPU, must drop the gradients
    (zero_grad(set_to_none=True)) and update the weights itself. The first `warm` batches, and batches of
    another shape, run as they are: they compile kernels and create the optimizer's state. The returned
    tensors are overwritten by the next call. Poisson draws go on from the default generator as without.
    """

    def __init__(self, step, warm=3):
        self.step, self.warm, self.side = step, warm, None
        self.forget()

    def forget(self):
        """Capture anew: after a change of what the graph has fixed, such as the learning rate."""
        self.graph, self.inputs, self.outputs = None, None, None

    def __call__(self, images, labels):
        if self.warm > 0 or (self.graph and images.shape != self.inputs[0].shape):
            self.warm = max(0, self.warm - 1)
            self.side = self.side or torch.cuda.Stream()  # capturing wants the state to come from a side stream
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                outputs = self.step(images, labels)
            torch.cuda.current_stream().wait_stream(self.side)
            return outputs
        if self.graph is None:
            self.inputs, self.graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)
        for kept, new in zip(self.inputs, (images, labels), strict=True):
            kept.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.outputs


# ---- One run of a net ----------------------------------------------------------------------------


@functools.cache
def _backend(device_type):
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


def _shapes(net, B, T):
    """The `Shape` of every spiking layer of `net`."""
    shapes, size = [], net.encoder.size
    for layer in net.layers():
        size = size if isinstance(layer.synapse, nn.Conv2d) else 1
        kernel = getattr(layer.pool, "kernel_size", 1)
        pool = size if isinstance(layer.pool, nn.AdaptiveAvgPool2d) else kernel
        features, lif = layer.synapse.weight.shape[0], layer.lif
        fire_first = lif.spike_order == "fire_first"
        shapes.append(Shape(T, B, size, size, features, pool, fire_first, lif.leak, lif.threshold))
        size //= pool
    return shapes


class _Run:
    """One forward pass and its backward pass: the net's layers, shapes, dtypes and what is kept."""

    def __init__(self, net, images, steps):
        self.net, self.layers, self.steps = net, net.layers(), steps
        self.device = images.device
        self.passes = _backend(self.device.type)
        weight = net.readout.weight
        autocast = torch.is_autocast_enabled(self.device.type) and weight.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(self.device.type) if autocast else weight.dtype
        self.state_dtype = torch.promote_types(self.dtype, torch.float32)
        self.grad_enabled = torch.is_grad_enabled()
        self.shapes = _shapes(net, len(images), steps)
        most = max(s.N * s.C for s in self.shapes) * self.dtype.itemsize
        if net._block:
            self.block = min(net._block, steps)
        elif self.grad_enabled:
            self.block = steps
        else:  # nothing is kept: as many steps at once as fit
            self.block = min(steps, max(1, INFERENCE_BYTES // most))
        self.norms = [{} for _ in self.layers]
        self.replaying = False  # in the backward pass, where hooks are not called again

    def blocks(self):
        return [(t, min(t + self.block, self.steps)) for t in range(0, self.steps, self.block)]

    def state(self, wanted):
        """Membranes at rest, one per layer, for a run of several blocks; else a None each."""
        if not wanted:
            return [None] * len(self.layers)
        return [torch.zeros(s.N, s.C, dtype=self.state_dtype, device=self.device) for s in self.shapes]

    # -- BatchNorm as x -> a x + b, per time-step and channel

    def live_steps(self, i):
        """Steps whose current can still reach the output: firing first loses one a layer."""
        later = sum(shape.fire_first for shape in self.shapes[i:])
        return max(0, self.steps - later)

    def gamma(self, i):
        """gamma [live steps, C] as autograd sees it; the gammas of later steps get no gradient at all."""
        norm, live = self.layers[i].norm, self.live_steps(i)
        if isinstance(norm, BNTT):
            return torch.stack([bn.weight for bn in list(norm)[:live]]) if live else None
        return norm.shared.weight if isinstance(norm, SharedBN) and live else None

    def batch_norms(self, i):
        norm = self.layers[i].norm
        if isinstance(norm, NoNorm):
            return None
        return list(norm)[: self.steps] if isinstance(norm, BNTT) else [norm.shared] * self.steps

    def normalisation(self, i, x, t0, t1):
        """(a, b, mu, rstd, gamma) [T, C] of layer i at steps t0 .. t1, x its outputs there.

        rstd and gamma, None without BatchNorm, are float64. Measures the batch and updates the running
        statistics the first time a training run asks.
        """
        shape, norms = self.shapes[i], self.batch_norms(i)
        if norms is None:
            one = torch.ones(t1 - t0, shape.C, dtype=self.state_dtype, device=self.device)
            zero = torch.zeros_like(one)
            return one, zero, zero, None, None
        if (t0, t1) not in self.norms[i]:
            some = norms[t0:t1]
            if some[0].training:
                mean, variance = self.passes.statistics(x, shape._replace(T=t1 - t0))
                self.update_running(self.layers[i].norm, some, mean, variance, shape.N)
            else:
                mean = torch.stack([bn.running_mean for bn in some]).double()
                variance = torch.stack([bn.running_var for bn in some]).double()
            gamma = torch.stack([bn.weight.detach() for bn in some]).double()
            rstd = (variance + some[0].eps).rsqrt()
            a = gamma * rstd
            cast = [v.to(self.state_dtype).contiguous() for v in (a, -a * mean, mean)]
            self.norms[i][t0, t1] = (*cast, rstd, gamma)
        return self.norms[i][t0, t1]

    @torch.no_grad()
    def update_running(self, norm, norms, mean, variance, N):
        """The running statistics after these steps; a shared BatchNorm is updated once a step, in order."""
        momentum, unbiased = norms[0].momentum, variance * (N / (N - 1))
        counters = list({id(bn): bn.num_batches_tracked for bn in norms}.values())
        torch._foreach_add_(counters, len(norms) // len(counters))
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            buffers = [getattr(bn, name) for bn in norms]
            if isinstance(norm, BNTT):
                torch._foreach_mul_(buffers, 1 - momentum)
                torch._foreach_add_(buffers, list(batch.to(buffers[0].dtype).unbind(0)), alpha=momentum)
            else:
                steps = torch.arange(len(norms) - 1, -1, -1, device=batch.device, dtype=batch.dtype)
                weights = momentum * (1 - momentum) ** steps
                buffers[0].mul_((1 - momentum) ** len(norms)).add_((weights[:, None] * batch).sum(0))

    # -- Synapses over all steps of a block: [T, B, H, W, C] in and out

    def synapse(self, i, inputs, weight):
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
        if weight.ndim == 4:
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

    def forward_block(self, encoded, t0, t1, weights, membranes, keep):
        """Run steps t0 .. t1 of all layers. Returns (spikes of the last layer [T, B, H, W, C], what is kept).

        membranes: one per layer, moved on in place, or None if this is the only block. With `keep` the
        second value is a list of (outputs of the synapse, its packed inputs, membrane at the start), and
        last the packed spikes.
        """
        x, packed, kept = encoded, encoded, []
        for i, (layer, weight, membrane) in enumerate(zip(self.layers, weights, membranes, strict=False)):
            shape = self.shapes[i]._replace(T=t1 - t0)
            y = self.synapse(i, x, weight)
            a, b, *_ = self.normalisation(i, y, t0, t1)
            watched = bool(layer.lif._forward_hooks) and not self.replaying
            before = membrane.clone() if membrane is not None and (keep or watched) else None
            if keep:
                kept.append((y, packed, before))
                packed = torch.empty(shape.pooled, dtype=torch.uint8, device=self.device)
            if watched:  # hooks may keep what they see, and see it before pooling
                whole, state = shape._replace(pool=1), None if before is None else before.clone()
                self.call_hooks(layer, self.passes.lif_forward(y, whole, a, b, state, t0 > 0, None, fresh=True))
            x = self.passes.lif_forward(y, shape, a, b, membrane, t0 > 0, packed if keep else None)
        return x, [*kept, packed]

    def call_hooks(self, layer, spikes):
        """Call the hooks of the LIF module as the plain loop does: once a step, output[0] the spikes."""
        spikes = spikes.permute(0, 1, 4, 2, 3)
        for step in spikes if isinstance(layer.synapse, nn.Conv2d) else spikes.flatten(2):
            for hook in layer.lif._forward_hooks.values():
                hook(layer.lif, (), (step, None))

    def backward_block(self, grad, kept, t0, t1, weights, carries, results, last):
        """Add a block's gradients to `results`, from the gradient of the last layer's spikes.

        carries: the gradient of each layer's membrane, moved back in time in place, or None if this is
        the only block. Empties `kept` as it goes.
        """
        for i in reversed(range(len(self.layers))):
            x, inputs, membrane = kept.pop()
            shape = self.shapes[i]._replace(T=t1 - t0)
            a, b, mean, rstd, gamma = self.normalisation(i, x, t0, t1)
            arguments = (membrane, grad, carries[i], not last, rstd is not None)
            delta, s1, s2 = self.passes.lif_backward(x, shape, a, b, mean, *arguments)
            if rstd is not None:
                results.gammas[i][t0:t1] = s2 * rstd
                k1, k2, k3 = gamma * rstd, torch.zeros_like(s1), torch.zeros_like(s1)
                if self.batch_norms(i)[0].training:
                    k2 = -k1 * rstd**2 * s2 / shape.N
                    k3 = -k1 * s1 / shape.N - k2 * mean
                coefficients = (k.to(self.state_dtype).contiguous() for k in (k1, k2, k3))
                delta = self.passes.affine(delta, x, shape, *coefficients)
            del x
            results.weights[i], grad = self.synapse_backward(
                i, delta, self.dense(inputs, i), weights[i], results.weights[i], want_inputs=i > 0
            )


class _Results:
    """Gradients as the blocks of time add to them."""

    def __init__(self, run):
        self.weights = [None] * len(run.layers)
        self.gammas = [torch.zeros(run.steps, s.C, dtype=torch.float64, device=run.device) for s in run.shapes]


class _FusedVoltages(torch.autograd.Function):
    """Encoded images [T, B, C, H, W], weights and gammas to output voltages [T, B, K]."""

    @staticmethod
    def forward(ctx, run, encoded, *parameters):
        with torch.autocast(run.device.type, enabled=False):  # dtypes are chosen below, the output is not rounded
            return _FusedVoltages.run_forward(ctx, run, encoded, parameters)

    @staticmethod
    def run_forward(ctx, run, encoded, parameters):
        weights = [w.detach().to(run.dtype) for w in parameters[: len(run.layers)]]
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
        readout = parameters[len(run.layers)].detach().to(run.state_dtype)
        inputs = encoded.to(run.dtype).permute(0, 1, 3, 4, 2).contiguous()
        blocks, keep = run.blocks(), run.grad_enabled and any(ctx.needs_input_grad)
        membranes, borders, currents = run.state(len(blocks) > 1), [], []
        for t0, t1 in blocks:
            if keep and len(blocks) > 1:
                borders.append([m.clone() for m in membranes])
            spikes, kept = run.forward_block(inputs[t0:t1], t0, t1, weights, membranes, keep and len(blocks) == 1)
            currents.append(run.readout(spikes, readout))
        if keep:
            ctx.save_for_backward(*parameters)  # autograd then notices if they change before the backward pass
            ctx.run, ctx.inputs, ctx.weights, ctx.readout = run, inputs, weights, readout
            ctx.kept, ctx.borders = kept, borders
        return torch.cat(currents).cumsum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with torch.autocast(ctx.run.device.type, enabled=False):
            return _FusedVoltages.run_backward(ctx, grad)

    @staticmethod
    def run_backward(ctx, grad):
        if ctx.kept is None:
            raise RuntimeError("the fused engine frees what it kept in the backward pass: it can run only once")
        kept, ctx.kept = ctx.kept, None
        run, blocks, _ = ctx.run, ctx.run.blocks(), ctx.saved_tensors
        run.replaying = True
        grad = grad.flip(0).cumsum(0).flip(0).to(run.state_dtype)  # of the output's current at each step
        results, readout, carries = _Results(run), 0, run.state(len(blocks) > 1)
        for t0, t1 in reversed(blocks):
            if len(blocks) > 1:
                _, kept = run.forward_block(ctx.inputs[t0:t1], t0, t1, ctx.weights, ctx.borders.pop(), True)
            spikes = run.dense(kept.pop(), len(run.layers))
            gw, gs = run.readout_backward(grad[t0:t1], spikes, ctx.readout)
            readout = readout + gw
            run.backward_block(gs, kept, t0, t1, ctx.weights, carries, results, last=t1 == run.steps)
        weights, gammas = [], []
        for i, layer in enumerate(run.layers):
            live, dtype = run.live_steps(i), layer.synapse.weight.dtype
            gamma = results.gammas[i].to(dtype)
            weights.append(results.weights[i].to(dtype) if live else None)
            gammas.append(gamma[:live] if isinstance(layer.norm, BNTT) else gamma.sum(0))
            if not live or isinstance(layer.norm, NoNorm):
                gammas[i] = None
        return None, None, *weights, readout.to(run.net.readout.weight.dtype), *gammas
