"""What the engine and its passes for each kind of device have in common."""

from typing import NamedTuple


class Unsupported(Exception):
    """Why the fused engine cannot run a net here, in one sentence."""


class Shape(NamedTuple):
    """A layer's neurons over one block of time."""

    T: int
    B: int
    H: int
    W: int
    C: int
    pool: int
    fire_first: bool
    leak: float
    threshold: float

    @property
    def N(self):
        return self.B * self.H * self.W

    @property
    def full(self):
        return self.T, self.B, self.H, self.W, self.C

    @property
    def pooled(self):
        return self.T, self.B, self.H // self.pool, self.W // self.pool, self.C
