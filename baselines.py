"""What BNTT is compared with: norms, neurons, the net without spikes, each one class here and one row in nets.py."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from encoders import require
from model import BN_EPS, BN_MOMENTUM, BNTT, LIF, SURROGATE_ALPHA, NoNorm, SharedBN, SpikingVGG


class TdBN(SharedBN):
    """Threshold-dependent BatchNorm (Zheng et al., "Going deeper with directly-trained larger SNNs", AAAI 2021).

    One BatchNorm whose mean and variance run over batch *and* time; gamma starts at alpha * threshold, beta at 0.
    In training, x must hold all time-steps of the run.
    """

    per_step = False

    def __init__(self, num_steps, features, spatial, threshold=1.0, alpha=1.0):
        super().__init__(num_steps, features, spatial)
        self.shared = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(features, BN_EPS, BN_MOMENTUM)
        nn.init.constant_(self.shared.weight, alpha * threshold)

    def forward(self, x, t0=0):
        return self.shared(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def beta(self, T):
        return self.shared.bias.expand(T, -1)

    def affine(self, T):
        a, b = super().affine(T)
        return a, b + self.beta(T)


class TEBN(TdBN):
    """Temporal effective batch norm (Duan et al., NeurIPS 2022): p_t * (gamma * (x - mu) / sqrt(var + eps) + beta).

    Mean, variance, gamma and beta are those of one BatchNorm over batch and time, as in `TdBN`; each time-step t has a
    learnable scale p_t, one number. gamma and p start at 1, beta at 0.
    """

    def __init__(self, num_steps, features, spatial):
        super().__init__(num_steps, features, spatial)
        self.gamma_per_step, self.scale = True, nn.Parameter(torch.ones(num_steps, 1))

    def forward(self, x, t0=0):
        scale = self.scale[t0 : t0 + len(x)].view(-1, *[1] * (x.ndim - 1))
        return (super().forward(x) * scale).to(x.dtype)

    def gamma(self, T):
        return self.scale[:T] * self.shared.weight

    def beta(self, T):
        return self.scale[:T] * self.shared.bias


class BetaBNTT(BNTT):
    """BNTT with a beta for each step and channel, which starts at 0: the paper (3.2) leaves it out of eq. 9."""

    def __init__(self, num_steps, features, spatial):
        super().__init__(num_steps, features, spatial)
        for bn in self:
            bn.bias = nn.Parameter(torch.zeros(features))

    def beta(self, T):
        return torch.stack([bn.bias for bn in self.batch_norms(T)])

    def affine(self, T):
        a, b = super().affine(T)
        return a, b + self.beta(T)


class LayerNorm(nn.GroupNorm):
    """Layer norm (Ba, Kiros & Hinton 2016): gamma * (x - mu) / sqrt(var + eps) + beta.

    Mean and variance run over all neurons of the layer, for each image and time-step alone, in training and testing.
    gamma and beta start at 1 and 0 and are shared by all time-steps. In a linear layer each neuron has its own, as in
    eq. 4 there. In a convolution each channel has, as Wu & He (2018) read it (group norm with one group): its neurons
    share their weights too. Which of the two stands behind the paper's table 5 is not known.
    """

    def __init__(self, num_steps, features, spatial):
        super().__init__(1, features, BN_EPS)

    def forward(self, x, t0=0):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class IF(LIF):
    """Integrate-and-fire neurons, LIF without a leak: u <- u + current; spike = 1[u > threshold]; soft reset.

    What Sengupta et al. (2019) convert to. The threshold is saved with the weights: that of a converted net is its own
    in each layer. ValueError unless leak is 1.
    """

    def __init__(self, leak=1.0, threshold=1.0, spike_order="integrate_first"):
        require(leak == 1, f"leak_mem of an IF neuron must be 1, as it has no leak, got {leak}: pass --leak_mem 1")
        super().__init__(leak, threshold, spike_order)

    def get_extra_state(self):
        return torch.tensor(self.threshold, dtype=torch.float64)

    def set_extra_state(self, state):
        require(float(state) > 0, f"a threshold must be a positive number, got {float(state)}")
        self.threshold = float(state)


class HardReset(LIF):
    """LIF whose membrane is 0 after a spike: u <- leak * u + current; spike = 1[u > threshold]; u <- u * (1 - spike).

    The paper (3.1) prefers the soft reset, which keeps what is above the threshold. The reset carries no gradient
    here either. ValueError for another order than integrate_first.
    """

    hard_reset = True  # by which the fused engine knows it, as ScaledSurrogate by its alpha

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        require(spike_order == "integrate_first", f"a hard reset belongs to integrate_first, got {spike_order!r}")
        super().__init__(leak, threshold, spike_order)

    def step(self, current, membrane):
        membrane = self.leak * membrane + current
        spikes = self.fire(membrane)
        return spikes, membrane * (1 - spikes.detach())


class ScaledSurrogate(LIF):
    """LIF with another alpha in eq. 8, the height of the surrogate gradient."""

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first", alpha=SURROGATE_ALPHA):
        super().__init__(leak, threshold, spike_order)
        self.alpha = alpha

    def fire(self, membrane):
        spikes = super().fire(membrane)
        return spikes.detach() + self.alpha / SURROGATE_ALPHA * (spikes - spikes.detach())


class DropoutLIF(LIF):
    """LIF with dropout behind it in training: the same neurons at all time-steps of a batch (Lee et al. 2020).

    p: the probability. The membrane knows nothing of it. The paper (3.5) says that BNTT needs no dropout beside it.
    In training, ValueError where a batch has lost or won images since its first step.
    """

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first", p=0.2):
        super().__init__(leak, threshold, spike_order)
        self.p = p

    def forward(self, currents, membrane=None):
        if self.training and membrane is None:  # a new batch
            self.mask = F.dropout(torch.ones_like(currents[0]), self.p)
        kept = getattr(self, "mask", None)
        whole = not self.training or kept is not None and kept.shape == currents.shape[1:]
        require(whole, "dropout in training takes a whole batch from its first time-step on")
        spikes, membrane = super().forward(currents, membrane)
        return (spikes * self.mask if self.training else spikes), membrane


class PLIF(LIF):
    """LIF whose leak is learnt, one for a layer: leak = sigmoid(w) (Fang et al., ICCV 2021, eq. 8).

    leak: at the start, in (0, 1). Unlike there the current is not multiplied by 1 - leak, which a gamma would undo.
    Weight decay draws w to 0, so the leak to 0.5: without a gradient, from 0.95 to 0.53 in the published 100 epochs.
    """

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        require(0 < leak < 1, f"leak_mem of a neuron that learns it must be in (0, 1), got {leak}")
        super().__init__(leak, threshold, spike_order)

    @property
    def leak(self):
        return self.w.sigmoid()

    @leak.setter
    def leak(self, leak):
        self.w = nn.Parameter(torch.tensor(math.log(leak / (1 - leak))))


class LearntLIF(PLIF):
    """LIF whose leak and threshold are learnt, one each for a layer: leak = sigmoid(w), threshold = start * exp(v).

    The second half of the hybrid training of Rathi et al. (ICLR 2020), with the parameters that Rathi & Roy (DIET-SNN)
    learn there. `start` is the threshold given, or that of the converted net, and saved with the weights as that of
    `IF`. Weight decay draws v to 0, so the threshold to `start`. In the reset the threshold has a gradient, the spike
    has none.
    """

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        super().__init__(leak, threshold, spike_order)
        self.v = nn.Parameter(torch.tensor(0.0))

    @property
    def threshold(self):
        return self.start * self.v.exp()

    @threshold.setter
    def threshold(self, threshold):
        self.start = threshold

    def get_extra_state(self):
        return torch.tensor(self.start, dtype=torch.float64)

    set_extra_state = IF.set_extra_state


class ReLU(nn.Module):
    """Rectified linear neurons, then dropout: what stands in an ANN where a spiking net has `LIF`."""

    def __init__(self, leak=1.0, threshold=1.0, spike_order="integrate_first"):
        super().__init__()
        self.dropout = 0.0

    def forward(self, currents, membrane=None):
        """currents: [T, B, ...]. Returns (activations, membrane), without a use for the membrane."""
        x = F.relu(currents)
        return (dropout(x, self.dropout) if self.training and self.dropout else x), membrane


def dropout(x, p):
    """x with each value at 0 with probability p, rounded to 1 / 65536, else scaled so that the mean stays.

    On a CPU four masks share one random number of 64 bits: torch's own dropout draws one for each value, which takes
    more time there than a layer.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p)
    drop, draws = min(round(2**16 * p), 2**16 - 1), torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits = draws.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
    return x * (bits >= drop - 2**15) * (2**16 / (2**16 - drop))


class ANN(SpikingVGG):
    """The same net without spikes and time, which conversion starts from: ReLU, no norm, no bias, average pooling.

    One time-step that sees the image itself, so `voltages` are logits [1, B, K]. dropout: its probability behind each
    ReLU that no pool follows. Weights start as He et al. (2015) for ReLU. ValueError as `SpikingVGG`.
    """

    def __init__(self, arch, img_size=32, num_cls=10, *, in_channels=3, dropout=0.0):
        parts = dict(in_channels=in_channels, norm=NoNorm, encoding="direct", neuron=ReLU)
        super().__init__(arch, 1, 1.0, img_size, num_cls, **parts)
        for layer in self.layers():
            layer.lif.dropout = dropout if isinstance(layer.pool, nn.Identity) else 0.0
            nn.init.kaiming_normal_(layer.synapse.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(self.readout.weight)
