"""What the engine and its passes for each kind of device have in common."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch


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
    hard_reset: bool
    leak: float | torch.Tensor  # a number in a tensor where it is learnt
    threshold: float | torch.Tensor  # positive, as leak
    alpha: float  # of the surrogate gradient

    @property
    def N(self):
        return self.B * self.H * self.W

    @property
    def full(self):
        return self.T, self.B, self.H, self.W, self.C

    @property
    def pooled(self):
        return self.T, self.B, self.H // self.pool, self.W // self.pool, self.C


def cache_folder():
    """A folder of the user's own for what is built or proved once. Raises `Unsupported` where there is none."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "bntt", Path(tempfile.gettempdir()) / f"bntt-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    raise Unsupported("the fused engine found no folder for what it compiles: set XDG_CACHE_HOME to a writable one")
