"""What BNTT is compared with: other norms and neurons, each one class here and one row in nets.py."""

import math

import torch
import torch.nn as nn

from encoders import require
from model import BN_EPS, BN_MOMENTUM, LIF, SharedBN


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


class PLIF(LIF):
    """LIF whose leak is learnt, one for a layer: leak = sigmoid(w) (Fang et al., ICCV 2021, eq. 8).

    leak: at the start, in (0, 1). Unlike there the current is not multiplied by 1 - leak, which a gamma would undo.
    """

    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        require(0 < leak < 1, f"leak_mem of plif must be in (0, 1), got {leak}")
        super().__init__(leak, threshold, spike_order)

    @property
    def leak(self):
        return self.w.sigmoid()

    @leak.setter
    def leak(self, leak):
        self.w = nn.Parameter(torch.tensor(math.log(leak / (1 - leak))))
