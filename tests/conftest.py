"""Put the repo root on the path, and use one thread: the same sums in the same order everywhere."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
