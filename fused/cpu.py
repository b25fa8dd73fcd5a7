"""The passes of the fused engine on a CPU: cpu.cpp, compiled once per processor and called on tensors.

engine.py holds their maths. Tensors are contiguous, [T, B, H, W, C] for neurons and [T, C] for what
belongs to a channel and time-step; results do not depend on the number of threads.
"""

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from fused.common import Shape, Unsupported, cache_folder


class _Layer(ctypes.Structure):
    """`struct Layer` of cpu.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("T", "B", "H", "W", "C", "pool", "fire_first", "hard_reset")] + [
        (name, ctypes.c_double) for name in ("leak", "threshold", "alpha")
    ]


class CpuPasses:
    """The passes of cpu.cpp as functions of tensors."""

    dtypes = (torch.float32, torch.float64, torch.bfloat16)

    def __init__(self):
        try:
            self.library = ctypes.CDLL(compiled(Path(__file__).with_name("cpu.cpp")))
        except (OSError, RuntimeError) as error:  # a disk mounted noexec, a compiler that is none, no home folder
            raise Unsupported(f"the fused engine could not be built or loaded: {error}") from None
        self.reused = threading.local()

    def _call(self, name, dtype, *arguments):
        values = (
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor)
            else ctypes.byref(_Layer(*x)) if isinstance(x, Shape) else x
            for x in arguments
        )  # fmt: skip
        getattr(self.library, f"{name}_{str(dtype).removeprefix('torch.')}")(*values)

    def scratch(self, use, shape, dtype):
        """An uninitialised tensor, the same memory for each `use` and thread: valid until the next call.

        Fresh memory would cost a page fault every 4 KiB, a fifth of a training step.
        """
        size = math.prod(shape) * dtype.itemsize
        buffer = getattr(self.reused, use, None)
        if buffer is None or buffer.numel() < size or buffer.numel() > 4 * size + 2**26:
            setattr(self.reused, use, None)  # free the old one first
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
            setattr(self.reused, use, buffer)
        return buffer[:size].view(dtype).view(shape)

    def statistics(self, x, shape):
        """Mean and biased variance of x over n, float64 [T, C] each."""
        mean, variance = torch.empty(2, shape.T, shape.C, dtype=torch.float64, device="cpu")
        sizes = (ctypes.c_int64(size) for size in (shape.T, shape.N, shape.C))
        self._call("statistics", x.dtype, *sizes, x, mean, variance)
        return mean, variance

    def lif_forward(self, x, shape, a, b, membrane, start, packed, fresh=False):
        """Pooled spikes [T, B, H // pool, W // pool, C], in scratch memory unless `fresh`.

        a, b: [T, C]. membrane: None, or [N, C], read if `start` and left as it is after the last step.
        packed: None, or uint8 for the spikes counted per window.
        """
        spikes = (
            torch.empty(shape.pooled, dtype=x.dtype, device="cpu")
            if fresh
            else self.scratch("a", shape.pooled, x.dtype)
        )
        arguments = (a, b, membrane, int(start), spikes, packed)
        self._call("lif_forward", x.dtype, shape, x, *arguments)
        return spikes

    def lif_backward(self, x, shape, a, b, centre, membrane, grad, carry, start, sums):
        """(delta [T, N, C] in scratch memory, sums): S1, S2, and S3 if `sums` is 3, float64 [sums, T, C].

        membrane: None, or that before the first step. grad: of the pooled spikes. carry: None, or the
        membrane's gradient, read if `start` (after the last step) and left as it is before the first.
        """
        delta = self.scratch("a", shape.full, x.dtype)
        found = torch.empty(sums, shape.T, shape.C, dtype=torch.float64, device="cpu")
        arguments = (a, b, centre, membrane, grad, carry, int(start), delta, ctypes.c_int64(sums), found)
        self._call("lif_backward", x.dtype, shape, x, *arguments)
        return delta, found

    def affine(self, delta, x, shape, k1, k2, k3):
        """delta <- k1 delta + k2 x + k3 in place; k1, k2, k3: [T, C]."""
        sizes = (ctypes.c_int64(size) for size in (shape.T, shape.N, shape.C))
        self._call("affine", x.dtype, *sizes, delta, x, k1, k2, k3)
        return delta

    def unpack(self, packed, share, dtype):
        """packed * share as `dtype`, in scratch memory."""
        spikes = self.scratch("b", packed.shape, dtype)
        kind = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
        self._call("unpack", dtype, ctypes.c_int64(packed.numel()), packed, spikes, kind(share))
        return spikes


def compiled(source):
    """Path of the shared library of `source`: compiled for this processor and cached for the next run."""
    found = (shutil.which(name) for name in ("g++", "c++", "clang++"))
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(None, found))[:1]
    if not compiler or not shutil.which(compiler[0]):
        raise Unsupported("the fused engine needs a C++ compiler (on Debian and Ubuntu: apt install g++)")
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\n".join([source.read_text(), " ".join(flags), version, torch.__version__, _processor()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = cache_folder()
    library = folder / name
    if library.exists():
        return library
    # torch's own OpenMP runtime, so that both share one pool of threads
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    openmp = ["-fopenmp", "-c"], [str(runtime[0])] if runtime else ["-fopenmp"]
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        half, done = f"{aside}/half.o", f"{aside}/done.so"
        for compile_openmp, link_openmp in (openmp, (["-c"], [])):
            commands = (
                [*compiler, *flags[:-1], *compile_openmp, str(source), "-o", half],
                [*compiler, "-shared", half, *link_openmp, "-o", done],
            )
            runs = [subprocess.run(command, capture_output=True, text=True, check=False) for command in commands]
            if all(run.returncode == 0 for run in runs):
                if not link_openmp:
                    print(f"the fused engine runs on one thread: {compiler[0]} has no OpenMP", file=sys.stderr)
                os.replace(done, library)
                return library
    reason = next((line for run in runs for line in run.stderr.splitlines() if "error" in line), "no message")
    raise Unsupported(f"the fused engine could not be compiled by {compiler[0]}: {reason}")


def _processor():
    """What -march=native depends on: another processor gets another build."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in wanted}))
