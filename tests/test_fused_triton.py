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

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))

EPSILON = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OLD_INTERPRETER = "InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')"
KINDS = ({}, {"fire_first": True}, {"hard_reset": True})  # of neurons
pytestmark = pytest.mark.slow


# ---- The checks, run by the script below -------------------------------------------------------------


def layer(T, B=2, H=5, W=7, C=10, pool=1, fire_first=False, hard_reset=False, leak=0.9, threshold=1.25):
    from fused import Shape

    return Shape(T, B, H, W, C, pool, fire_first, hard_reset, leak, threshold, alpha=0.4)


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
    from fused.cpu import CpuPasses
    from fused.triton import TritonPasses

    small = dict(tile=128, tile_back=256, channels=8, rows=24, chunk=3, programs=4)
    return CpuPasses(), TritonPasses(**(small | sizes))


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


def check_lif(device, dtype=torch.float32, state=True, start=True, sums=2, keep=True, sizes=None, **kind):
    """Forward and backward over one block of time. state: membranes and carries go in (if start) and out."""
    shape, (theirs, ours) = layer(**kind), passes(**(sizes or {}))
    start, wide = start and state, torch.promote_types(dtype, torch.float32)
    x, grad, a, b, centre, membrane, carry = draw(shape, dtype, device)
    cx, cgrad, ca, cb, ccentre, cmembrane, ccarry = on_cpu([x, grad, a, b, centre, membrane, carry])
    if not state:
        membrane = cmembrane = carry = ccarry = None
    before, cbefore = (membrane.clone(), cmembrane.clone()) if start else (None, None)
    packed = torch.full(shape.pooled, 99, dtype=torch.uint8, device=device) if keep else None
    cpacked = torch.zeros(shape.pooled, dtype=torch.uint8) if keep else None

    spikes = ours.lif_forward(x, shape, a, b, membrane, start, packed)
    expected = theirs.lif_forward(cx, shape, ca, cb, cmembrane, start, cpacked, fresh=True)
    assert spikes.dtype == dtype
    assert torch.equal(spikes.cpu().float(), expected.to(dtype).float())
    assert packed is None or torch.equal(packed.cpu(), cpacked)
    if state:
        same(membrane, cmembrane, wide, 16, "membrane")

    delta, s = ours.lif_backward(x, shape, a, b, centre, before, grad, carry, start, sums)
    cdelta, cs = theirs.lif_backward(cx, shape, ca, cb, ccentre, cbefore, cgrad, ccarry, start, sums)
    assert delta.dtype == dtype
    if shape.fire_first and shape.T == 1 and not start:  # at rest nothing fires, and a current acts a step late
        assert not expected.any()
        assert not delta.any()
        return
    assert 0.02 < expected.double().mean() < 0.98
    half = dtype in (torch.bfloat16, torch.float16)
    fine = torch.float16 if half else dtype  # how h is kept between the two scans
    same(delta, cdelta, dtype, 2 if half else 16, "delta")
    if state:
        same(carry, ccarry, fine, 4 if half else 16, "carry")
    assert len(s) == len(cs) == sums
    for name, ours_, theirs_ in zip(("S1", "S2", "S3"), s, cs, strict=False):
        assert ours_.dtype == torch.float64
        same(ours_, theirs_, fine, 4 if half else 64, name)


def check_lif_pools(device):
    for kind in KINDS:
        for pool, H, W in ((1, 3, 5), (2, 4, 4), (2, 5, 3), (3, 7, 5), (3, 3, 4), (4, 4, 4), (5, 7, 11)):
            check_lif(device, T=2, H=H, W=W, pool=pool, **kind)
        # Nine pixels in a tile of sixteen: at a low threshold the other seven would fire too.
        check_lif(device, T=3, H=3, W=3, pool=3, **kind, threshold=0.3)


def check_lif_steps(device):
    for kind in KINDS:
        for T in (1, 2, 7):  # chunks of 3
            for state, start in ((False, False), (True, False), (True, True)):
                check_lif(device, T=T, H=2, W=3, pool=2, **kind, state=state, start=start)


def check_lif_dtypes(device):
    for dtype in EPSILON:
        for pool, kind in ((1, KINDS[0]), (2, KINDS[0]), (2, KINDS[2])):
            check_lif(device, dtype, T=4, H=3, W=4, pool=pool, **kind)


def check_lif_options(device):
    for kind in KINDS:
        check_lif(device, T=3, H=2, W=2, sums=0, keep=False, **kind)
        check_lif(device, T=3, H=2, W=2, state=False, sums=0, **kind)
        check_lif(device, T=3, H=5, W=5, C=1, B=1, leak=1.0, threshold=0.5, **kind)


def check_lif_learnt(device):
    leak, threshold = torch.tensor([0.8, 1.25], dtype=torch.float64, device=device)
    size = dict(T=4, H=3, W=4, pool=2, threshold=threshold)
    for dtype, kind in [*((torch.float64, kind) for kind in KINDS), (torch.bfloat16, {})]:
        for start in (False, True):
            check_lif(device, dtype, start, start, 3, **size, leak=leak, **kind)
    check_lif(device, **size)


def check_lif_default_sizes(device):
    """The tiles that a run uses, larger than the layer; channels in two blocks; a window of 16 x 16."""
    sizes = dict(tile=2048, tile_back=4096, channels=64, rows=2048, chunk=32, programs=None)
    check_lif(device, T=5, C=72, pool=2, sizes=sizes)
    check_lif(device, T=2, H=16, W=16, pool=16, B=1, sizes=sizes)


def check_statistics(device):
    from fused.cpu import CpuPasses

    for dtype in EPSILON:
        for kind in (dict(T=3), dict(T=1, B=7, H=1, W=1, C=20), dict(T=2, B=3, H=6, W=6, C=5)):
            shape, (_, ours) = layer(**kind), passes()
            x = (draw(shape, dtype, device)[0].float() + 100).to(dtype)  # a mean that would cancel
            for got, want in zip(ours.statistics(x, shape), CpuPasses().statistics(*on_cpu([x]), shape), strict=True):
                assert got.dtype == torch.float64
                same(got, want, torch.promote_types(dtype, torch.float32), 64, "statistics")


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
    once, again = (ours.lif_backward(x, shape, a, b, centre, membrane, grad, None, False, 2) for _ in range(2))
    assert all(torch.equal(v, w) for v, w in zip(once, again, strict=True))


def check_net(device):
    """Voltages, gradients and running statistics of a net with these passes and of its plain time loop."""
    import fused
    from baselines import LearntLIF
    from fused import engine, guard
    from fused.triton import TritonPasses
    from model import ARCHS, SpikingVGG

    tile = 8192 if device == "cpu" else 512  # the interpreter wants few tiles, a compiler small ones
    engine.backend = guard.backend = lambda device_type: TritonPasses(tile=tile, tile_back=2 * tile, chunk=2)
    torch.backends.cudnn.allow_tf32 = False
    ARCHS["tiny"] = (8, "A", 16, 16, "G"), (24,)
    late = dict(spike_order="fire_first", norm="bn", encoding="direct")
    for dtype, tolerance, save_memory, columns, options in (
        (torch.float32, 1e-4, None, False, {}),
        (torch.float64, 1e-9, 2, True, {}),  # the first layer as a GPU runs it in 16 bit
        (torch.float64, 1e-9, 3, False, late),
        (torch.float64, 1e-9, 3, False, dict(neuron=LearntLIF, norm="none")),
    ):
        results, engine.by_columns = [], lambda *_, columns=columns: columns
        for kind in ("plain", "fused"):
            torch.manual_seed(3)
            net = SpikingVGG("tiny", 5, img_size=9, threshold=0.5, **options).to(device, dtype)
            images = torch.randn(3, 3, 9, 9).to(device, dtype)
            labels = torch.tensor([1, 7, 4], device=device)
            net = fused.attach(net, save_memory) if kind == "fused" else net
            torch.manual_seed(4)
            voltages = net.voltages(images)
            torch.nn.functional.cross_entropy(voltages[-1] / 5, labels).backward()
            gradients = {name: p.grad for name, p in net.named_parameters()}
            results.append((voltages.detach(), gradients, dict(net.named_buffers())))
        plain, ours = results
        assert plain[0].abs().max() > 1
        assert all(layer.synapse.weight.grad.any() for layer in net.layers())
        torch.testing.assert_close(ours[0], plain[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours[2], plain[2], rtol=tolerance, atol=tolerance)
        for name, grad in plain[1].items():
            assert (grad is None) == (ours[1][name] is None), name
            if grad is not None and grad.any():
                error = (ours[1][name] - grad).abs().max() / grad.abs().max()
                assert error < 10 * tolerance, f"gradient of {name}: {error:.1e}"


def compile_all(device):
    """Every kernel in the forms that the passes ask for goes through Triton's launcher and compiler, for an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fused import triton as fused_triton

    class H100:
        """Stands for the driver of a GPU that is not here: `warmup` does all of a launch but the launch."""

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    compiled = set()

    def compile_instead(kernel, grid, *arguments, **constants):
        binary = kernel.warmup(*arguments, grid=grid, **constants)
        assert binary.asm["cubin"]
        assert binary.metadata.shared <= 227 * 1024  # what one program may have
        compiled.add(binary.hash)

    driver.set_active(H100())
    fused_triton._launch = compile_instead
    passes = fused_triton.TritonPasses()
    for dtype, kind in (
        (torch.bfloat16, dict(T=25, B=8, H=8, W=8, C=64, pool=2)),
        (torch.bfloat16, dict(T=32, B=1, H=16, W=2, C=64, pool=2)),  # other sizes, the same kernels
        (torch.bfloat16, dict(T=4, B=1, H=4, W=4, C=64, pool=4)),
        (torch.bfloat16, dict(T=25, B=8, H=8, W=8, C=64, pool=2, hard_reset=True)),
        (torch.bfloat16, dict(T=25, B=8, H=8, W=8, C=64, pool=2, leak=torch.tensor(0.9), threshold=torch.tensor(1.2))),
        (torch.float32, dict(T=1, B=1, H=1, W=1, C=1)),
        (torch.float64, dict(T=2, H=16, W=16, C=72, pool=16, fire_first=True)),
    ):
        shape = layer(**kind)
        x, grad, a, b, centre, membrane, carry = draw(shape, dtype, "cpu")
        learnt = torch.is_tensor(shape.leak)
        passes.statistics(x, shape)
        passes.lif_forward(x, shape, a, b, None, False, torch.empty(shape.pooled, dtype=torch.uint8))
        passes.lif_forward(x, shape, a, b, membrane, True, None)
        passes.lif_backward(x, shape, a, b, centre, None, grad, None, False, 3 if learnt else 2)
        passes.lif_backward(x, shape, a, b, centre, membrane, grad, carry, True, 0)
        passes.affine(x.clone(), x, shape, a, b, centre)
        passes.unpack(torch.empty(shape.pooled, dtype=torch.uint8), 0.25, dtype)
    assert len(compiled) == 33


CHECKS = [name for name in dir() if name.startswith("check_") and name != "check_lif"]


# ---- pytest's side -----------------------------------------------------------------------------------


def run(device, *checks):
    """{check: "passed" or the traceback} of the checks, from one process of their own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    command = [sys.executable, __file__, device, *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def results(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return run(request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_passes(check, results):
    if results[check].startswith("skipped"):
        pytest.skip(results[check])
    assert results[check] == "passed", results[check]


def test_kernels_compile_for_a_gpu():
    if sys.platform != "linux":
        pytest.skip("Triton brings its compiler on Linux only")
    (result,) = run("compiler", "compile_all").values()
    assert result == "passed", result


# ---- The script --------------------------------------------------------------------------------------


def round_bfloat16_properly():
    """The interpreter cuts bfloat16 off where a GPU rounds to nearest, ties to even: make it round."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding)
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = convert


def main(device, *names):
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        round_bfloat16_properly()
    outcomes = {}
    for name in names or CHECKS:
        try:
            globals()[name](device)
            outcomes[name] = "passed"
        except Exception:  # noqa: BLE001 - reported by the test that asked
            outcomes[name] = traceback.format_exc()
            if OLD_INTERPRETER in outcomes[name]:
                outcomes[name] = "skipped: the interpreter of this old Triton needs numpy<2.4"
        print(f"{name}: {outcomes[name]}", file=sys.stderr, flush=True)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
