"""The Triton passes of the fused engine against its C++ passes, on the same tensors.

Without a GPU the kernels run under Triton's interpreter, on CPU tensors through numpy: slow, but the
logic is tested. TRITON_INTERPRET must be set before triton is first imported and then holds for the
whole process, where it would break whatever else uses Triton. So the checks run in a process of their
own: this file is also a script, which runs the checks named on its command line. With a GPU they run
there as well, compiled.

    TRITON_INTERPRET=1 python tests/test_fused_triton.py cpu          # all checks, their errors in full
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EPSILON = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HALVES = (torch.bfloat16, torch.float16)
ORDERS = (False, True)  # fire_first


# ---- The checks, run by the script below -------------------------------------------------------------


def layer(T, B=2, H=5, W=7, C=10, pool=1, fire_first=False, leak=0.9, threshold=1.25):
    from fused import Shape

    return Shape(T, B, H, W, C, pool, fire_first, leak, threshold)


def draw(shape, dtype, device, seed=0):
    """Random arguments of the LIF passes; the scales make about a quarter of the neurons fire."""
    torch.manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    x, grad = torch.randn(shape.full).to(dtype), torch.randn(shape.pooled).to(dtype)
    a, b, centre = (torch.randn(3, shape.T, shape.C) * torch.tensor([0.3, 0.3, 0.5])[:, None, None]).to(wide)
    membrane, carry = torch.randn(2, shape.N, shape.C).to(wide)
    return [v.to(device) for v in (x, grad, 1.5 + a, b, centre, membrane, carry)]


def passes(**sizes):
    """(The C++ passes, the Triton passes): small tiles, few programs and short chunks, so that each is used."""
    from fused import CpuPasses
    from fused_triton import TritonPasses

    return CpuPasses(), TritonPasses(**(dict(tile=64, channels=8, rows=24, chunk=4, programs=6) | sizes))


def on_cpu(tensors):
    """Copies on the CPU, in float32 where C++ has no float16."""
    copies = [v.clone().cpu() if isinstance(v, torch.Tensor) else v for v in tensors]
    return [v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.float16 else v for v in copies]


def same(ours, theirs, dtype, ulps=2, what=""):
    """Equal to a few roundings of dtype at the largest value."""
    ours, theirs = ours.cpu().double(), theirs.double()
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0, f"{what}: nothing to compare"
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= ulps * EPSILON[dtype], f"{what}: relative error {error:.1e} in {dtype}"


def check_lif(device, dtype=torch.float32, state=True, sums=True, keep=True, sizes=None, **kind):
    """Forward and backward of one block of time. state: membranes and carries in and out."""
    shape, (theirs, ours) = layer(**kind), passes(**(sizes or {}))
    x, grad, a, b, centre, membrane, carry = draw(shape, dtype, device)
    membrane, carry = (membrane, carry) if state else (None, None)
    packed = torch.full(shape.pooled, 99, dtype=torch.uint8, device=device) if keep else None
    arguments = [x, a, b, membrane, packed]
    cx, ca, cb, cmembrane, cpacked = on_cpu(arguments)
    spikes = ours.lif_forward(x, shape, a, b, None if membrane is None else membrane.clone(), state, packed)
    expected = theirs.lif_forward(cx, shape, ca, cb, None if cmembrane is None else cmembrane.clone(), state, cpacked)
    assert spikes.dtype == dtype
    if not (shape.fire_first and shape.T == 1 and not state):  # at rest nothing fires yet
        assert 0.02 < expected.double().mean() < 0.98
    assert torch.equal(spikes.cpu().float(), expected.to(dtype).float())
    assert packed is None or torch.equal(packed.cpu(), cpacked)
    if state:
        for start in (False, True):  # a membrane is always written, and read only if asked
            m, cm = membrane.clone(), cmembrane.clone()
            ours.lif_forward(x, shape, a, b, m, start, None)
            theirs.lif_forward(cx, shape, ca, cb, cm, start, None)
            same(m, cm, _wide(dtype), 16, f"membrane, start={start}")

    for start in (False, True) if state else (False,):
        k, ck = (None, None) if carry is None else (carry.clone(), carry.clone().cpu())
        got = ours.lif_backward(x, shape, a, b, centre, membrane, grad, k, start, sums)
        cgrad, ccentre = on_cpu([grad, centre])
        want = theirs.lif_backward(cx, shape, ca, cb, ccentre, cmembrane, cgrad, ck, start, sums)
        assert got[0].dtype == dtype
        if shape.fire_first and shape.T == 1 and not start:  # a current reaches the output one step later
            assert not got[0].any()
            continue
        fine = torch.float16 if dtype in HALVES else dtype  # h is kept in float16 then
        same(got[0], want[0], dtype, 2 if dtype in HALVES else 16, "delta")
        if k is not None:
            same(k, ck, fine, 4 if dtype in HALVES else 16, "carry")
        for name, s, cs in zip(("S1", "S2"), got[1:], want[1:], strict=True):
            assert (s is None) == (cs is None) == (not sums)
            if sums:
                assert s.dtype == torch.float64
                same(s, cs, fine, 4 if dtype in HALVES else 64, name)


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def check_lif_pools(device):
    for fire_first in ORDERS:
        for pool, H, W in ((1, 3, 5), (2, 4, 4), (2, 5, 7), (3, 7, 5), (3, 2, 9), (4, 4, 4)):
            if pool <= H:
                check_lif(device, T=2, H=H, W=W, pool=pool, fire_first=fire_first)


def check_lif_steps(device):
    for fire_first in ORDERS:
        for T in (1, 2, 7, 9):  # chunks of 4
            check_lif(device, T=T, H=3, W=4, pool=2, fire_first=fire_first)
            check_lif(device, T=T, H=3, W=4, pool=2, fire_first=fire_first, state=False)


def check_lif_dtypes(device):
    for dtype in EPSILON:
        for pool in (1, 2):
            check_lif(device, dtype, T=7, H=3, W=4, pool=pool)


def check_lif_options(device):
    for fire_first in ORDERS:
        check_lif(device, T=3, H=2, W=2, sums=False, keep=False, fire_first=fire_first)
        check_lif(device, T=3, H=2, W=2, state=False, sums=False, fire_first=fire_first)
        check_lif(device, T=3, H=2, W=2, C=1, B=1, leak=1.0, threshold=0.5, fire_first=fire_first)


def check_lif_default_sizes(device):
    """The tiles that a run uses, larger than the layer; channels in two blocks; a window of 16 x 16."""
    sizes = dict(tile=2048, channels=64, rows=2048, chunk=32, programs=None)
    check_lif(device, T=5, C=72, pool=2, sizes=sizes)
    check_lif(device, T=2, H=16, W=16, pool=16, B=1, sizes=sizes)


def check_statistics(device):
    from fused import CpuPasses

    for dtype in EPSILON:
        for kind in (dict(T=3), dict(T=1, B=7, H=1, W=1, C=20), dict(T=2, B=3, H=6, W=6, C=5)):
            shape, (_, ours) = layer(**kind), passes()
            x = (draw(shape, dtype, device)[0].float() + 100).to(dtype)  # a mean that would cancel
            for got, want in zip(ours.statistics(x, shape), CpuPasses().statistics(*on_cpu([x]), shape), strict=True):
                assert got.dtype == torch.float64
                same(got, want, _wide(dtype), 64, "statistics")


def check_affine_and_unpack(device):
    theirs, ours = passes()
    for dtype in EPSILON:
        for kind in (dict(T=3), dict(T=1, B=7, H=1, W=1, C=20)):
            shape = layer(**kind)
            x, delta, k1, k2, k3, *_ = draw(shape, dtype, device)
            cdelta, *rest = on_cpu([delta, x, k1, k2, k3])
            got = ours.affine(delta, x, shape, k1, k2, k3)
            assert got is delta
            same(got, theirs.affine(cdelta, rest[0], shape, *rest[1:]), dtype, 2, "affine")
        packed = torch.randint(0, 10, (3, 7, 11), dtype=torch.uint8, device=device)
        got = ours.unpack(packed, 1 / 9, dtype)
        want = theirs.unpack(packed.cpu(), 1 / 9, torch.float32 if dtype == torch.float16 else dtype)
        assert got.dtype == dtype
        same(got, want, dtype, 2, "unpack")


def check_same_bits_again(device):
    """Sums do not depend on the order in which programs happen to run."""
    shape, (_, ours) = layer(T=3, pool=2), passes()
    x, grad, a, b, centre, membrane, _ = draw(shape, torch.float32, device)
    once, again = (ours.lif_backward(x, shape, a, b, centre, membrane, grad, None, False, True) for _ in range(2))
    assert all(torch.equal(v, w) for v, w in zip(once, again, strict=True))


def check_net(device):
    """Voltages, gradients and running statistics of a net with these passes and of its plain time loop."""
    import fused
    from fused_triton import TritonPasses
    from model import SNN_VGG9_BNTT

    fused._backend = lambda device_type: TritonPasses(tile=4096, rows=4096, chunk=2)
    for options in (dict(), dict(spike_order="fire_first", norm="bn", save_memory=2)):
        save_memory = options.pop("save_memory", None)
        results = []
        for engine in ("plain", "fused"):
            torch.manual_seed(3)
            net = SNN_VGG9_BNTT(9 if "norm" in options else 3, img_size=8, **options).to(device)
            images, labels = torch.randn(2, 3, 8, 8).to(device), torch.tensor([1, 7], device=device)
            net = fused.attach(net, save_memory) if engine == "fused" else net
            torch.manual_seed(4)
            voltages = net.voltages(images)
            torch.nn.functional.cross_entropy(voltages[-1] / len(voltages), labels).backward()
            gradients = {name: p.grad for name, p in net.named_parameters()}
            results.append((voltages.detach(), gradients, dict(net.named_buffers())))
        plain, ours = results
        assert plain[0].abs().max() > 0
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[2], plain[2], rtol=1e-4, atol=1e-5)
        for name, grad in plain[1].items():
            assert (grad is None) == (ours[1][name] is None), name
            if grad is not None and grad.any():
                cosine = torch.nn.functional.cosine_similarity(grad.flatten(), ours[1][name].flatten(), 0)
                assert cosine > 0.9999, f"{name}: cosine {cosine:.6f}"
        assert sum(g is not None and bool(g.any()) for g in plain[1].values()) > 9


CHECKS = [name for name in dir() if name.startswith("check_") and name != "check_lif"]


# ---- pytest's side -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def results(request):
    """{check: "passed" or the traceback}, from one process for all checks."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = os.environ | dict(OMP_NUM_THREADS="1", TRITON_INTERPRET="1" if request.param == "cpu" else "0")
    command = [sys.executable, __file__, request.param]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_passes(check, results):
    assert results[check] == "passed", results[check]


# ---- The script --------------------------------------------------------------------------------------


def round_bfloat16_properly():
    """The interpreter cuts bfloat16 off where a GPU rounds to nearest, ties to even: make it round."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding)
        rounded = torch.from_numpy(data.copy()).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = convert


def main(device, *names):
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    if device == "cpu":
        round_bfloat16_properly()
    outcomes = {}
    for name in names or CHECKS:
        try:
            globals()[name](device)
            outcomes[name] = "passed"
        except Exception:  # noqa: BLE001 - reported by the test that asked
            outcomes[name] = traceback.format_exc()
        print(f"{name}: {outcomes[name]}", file=sys.stderr, flush=True)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
