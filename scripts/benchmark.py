"""Time and memory of our engines beside the authors' code, SpikingJelly and snnTorch, on one and the same net.

    git clone https://github.com/Intelligent-Computing-Lab-Yale/BNTT-Batch-Normalization-Through-Time authors
    pip install --no-deps -r requirements-bench.txt              # the peers; those not installed are left out
    python scripts/benchmark.py --authors authors                # VGG9, T = 25, batch 16, 32x32, all cores
    python scripts/benchmark.py --authors authors --profile --scaling
    python scripts/benchmark.py --contenders ours-plain ours-fused --num_steps 10 --repeats 5

Every contender is a process of its own that stays warm; one computes at a time, in turns (A B C A B C ...), so
that a slow minute of the machine hits all alike. Judge by the ratios, taken round by round, not by the times.

What is timed. A training step is forward, cross-entropy, backward, SGD with momentum and weight decay; inference
is eval mode without gradients. All draw the same ternary Poisson spikes inside the timed step, one `rand_like` per
time-step. Before anything is timed, the contenders' logits and gradients are compared with those of our plain loop,
from the same weights and seed: in float64 on a CPU they must agree (else the contender is marked as another net);
the differences in float32, where rounding makes some neurons fire otherwise, are shown as they are.

Memory is the peak resident memory of a fresh process (on a GPU, PyTorch's peak) at two batch sizes; its slope is
what one more image costs. On a GPU float32 contenders may use TF32. SpikingJelly takes the neuron kernels it finds
best (its compiled CUDA ones, then Triton's); the variable SJ_LIF_CUDA_IMPLEMENTATION overrides it.

Writes <out>/<device>_<arch>_T<T>_B<B>.json (with `--scaling` a .png of the same name); the last line printed is one
JSON object. Exit code 0: done; 1: a contender computes another net; 2: an option is wrong.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import ARCHS, BN_EPS, BN_MOMENTUM, SURROGATE_ALPHA, PoissonGen, SpikingVGG  # noqa: E402
from utill import UserError, entry_point  # noqa: E402

# name: (whose code, under autocast to bfloat16?)
CONTENDERS = {
    "authors": ("authors", False),
    "ours-plain": ("ours-plain", False),
    "ours-plain-bf16": ("ours-plain", True),
    "ours-fused": ("ours-fused", False),
    "ours-fused-bf16": ("ours-fused", True),
    "spikingjelly": ("spikingjelly", False),
    "spikingjelly-bf16": ("spikingjelly", True),
    "snntorch": ("snntorch", False),
}
MODES = ("train", "infer")
LEAK, NUM_CLS = 0.95, 10
SGD = dict(lr=0.01, momentum=0.9, weight_decay=1e-4)
SAME_NET = 1e-6  # largest difference of logits and gradients in float64, over the largest value
SYNAPSE_OPS = re.compile(r"convolution|conv2d|linear|matmul|::(b|add|badd)?mm$")  # a profiler's names on a CPU
SYNAPSE_KERNELS = re.compile(r"conv|gemm|cudnn|cutlass|xmma|nvjet|[fdw]grad|fprop", re.IGNORECASE)  # and on a GPU


class LeftOut(Exception):
    """Why a contender does not run, in one sentence."""


# ---- The peers' nets: same parameters in the same order as SpikingVGG ------------------------------------


def authors_net(ours, spec):
    """The authors' class from the model.py that the user named, imported from there."""
    path = Path(spec["authors"]) / "model.py"
    module_spec = importlib.util.spec_from_file_location("authors_model", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.dont_write_bytecode = True
    try:
        module_spec.loader.exec_module(module)
        builder = getattr(module, {"vgg9": "SNN_VGG9_BNTT", "vgg11": "SNN_VGG11_BNTT"}[spec["arch"]])
    except Exception as error:
        raise LeftOut(f"the authors' model.py cannot be used ({type(error).__name__}: {error})") from None
    if spec["device"] == "cpu":
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    net = builder(spec["num_steps"], leak_mem=LEAK, img_size=spec["img_size"], num_cls=NUM_CLS)
    for m in net.modules():  # commits before 2021 leave the beta on
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.bias = None
    return net


def spikingjelly_net(ours, spec):
    """SpikingJelly's layers in multi-step mode, with its own BNTT."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    if not hasattr(layer, "BatchNormThroughTime2d"):
        raise LeftOut("this SpikingJelly has no BatchNormThroughTime2d: install version 2")

    class ScaleGrad(torch.autograd.Function):
        """Identity whose gradient is scaled: SpikingJelly's triangle has height 1, the paper's 0.3."""

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return SURROGATE_ALPHA * grad

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            steps, bn = spec["num_steps"], dict(eps=BN_EPS, momentum=BN_MOMENTUM, step_mode="m")
            self.blocks = nn.ModuleList()
            for part in ours.layers():
                features, inputs = part.synapse.weight.shape[:2]
                conv = isinstance(part.synapse, nn.Conv2d)
                if conv:
                    synapse = layer.Conv2d(inputs, features, 3, padding=1, bias=False, step_mode="m")
                    norm = layer.BatchNormThroughTime2d(steps, features, **bn)
                else:
                    synapse = layer.Linear(inputs, features, bias=False, step_mode="m")
                    norm = layer.BatchNormThroughTime1d(steps, features, **bn)
                lif = neuron.LIFNode(
                    tau=1 / (1 - LEAK), decay_input=False, v_threshold=1.0, v_reset=None, detach_reset=True,
                    surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0), step_mode="m",
                )  # fmt: skip
                pool = nn.Identity()
                if isinstance(part.pool, nn.AvgPool2d):
                    pool = layer.AvgPool2d(2, step_mode="m")
                elif isinstance(part.pool, nn.AdaptiveAvgPool2d):
                    pool = layer.AdaptiveAvgPool2d(1, step_mode="m")
                self.blocks.append(nn.ModuleList([synapse, norm, lif, pool]))
            self.readout = layer.Linear(*reversed(ours.readout.weight.shape), bias=False, step_mode="m")

        def forward(self, images):
            x = torch.stack([PoissonGen(images) for _ in range(spec["num_steps"])])  # [T, B, C, H, W]
            for synapse, norm, lif, pool in self.blocks:
                x = x.flatten(2) if isinstance(synapse, nn.Linear) else x
                x = pool(ScaleGrad.apply(lif(norm(synapse(x)))))
            logits = self.readout(x.flatten(2)).mean(0)
            functional.reset_net(self)
            return logits

    return Net()


def snntorch_net(ours, spec):
    """snnTorch's neuron and BNTT in a time loop; its own reset comes one step late, so it is done outside."""
    import snntorch
    from snntorch import surrogate

    triangle = surrogate.custom_surrogate(lambda v, grad, spikes: grad * SURROGATE_ALPHA * (1 - v.abs()).clamp(min=0))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList()
            for part in ours.layers():
                features, inputs = part.synapse.weight.shape[:2]
                if isinstance(part.synapse, nn.Conv2d):
                    synapse, bntt = nn.Conv2d(inputs, features, 3, padding=1, bias=False), snntorch.BatchNormTT2d
                else:
                    synapse, bntt = nn.Linear(inputs, features, bias=False), snntorch.BatchNormTT1d
                norm = bntt(features, spec["num_steps"], eps=BN_EPS, momentum=BN_MOMENTUM)
                leaky = snntorch.Leaky(LEAK, threshold=1.0, spike_grad=triangle, reset_mechanism="none")
                pool = {nn.AvgPool2d: lambda: nn.AvgPool2d(2), nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d(1)}
                self.blocks.append(nn.ModuleList([synapse, norm, leaky, pool.get(type(part.pool), nn.Identity)()]))
            self.readout = nn.Linear(*reversed(ours.readout.weight.shape), bias=False)

        def forward(self, images):
            membranes, voltage = [None] * len(self.blocks), 0
            for t in range(spec["num_steps"]):
                x = PoissonGen(images)
                for i, (synapse, norm, leaky, pool) in enumerate(self.blocks):
                    current = norm[t](synapse(x.flatten(1) if isinstance(synapse, nn.Linear) else x))
                    before = torch.zeros_like(current) if membranes[i] is None else membranes[i]
                    spikes, membrane = leaky(current, before)
                    spikes = spikes.to(current.dtype)
                    membranes[i] = membrane - spikes.detach()
                    x = pool(spikes)
                voltage = voltage + self.readout(x.flatten(1))
            for _, _, leaky, _ in self.blocks:
                leaky.mem = leaky.mem.detach()  # or the module would keep the graph until the next step
            return voltage / spec["num_steps"]

    return Net()


def fused_net(ours, spec):
    """Our net with the fused engine attached."""
    import fused

    try:
        return fused.attach(ours)
    except fused.Unsupported as error:
        raise LeftOut(str(error)) from None


BUILDERS = {
    "ours-plain": lambda ours, spec: ours, "ours-fused": fused_net, "authors": authors_net,
    "spikingjelly": spikingjelly_net, "snntorch": snntorch_net,
}  # fmt: skip


def build(spec):
    """A contender's net on its device, in the default dtype, with the weights that our net has from seed 0."""
    torch.manual_seed(0)
    ours = SpikingVGG(spec["arch"], spec["num_steps"], LEAK, spec["img_size"], NUM_CLS).to(spec["device"])
    whose = CONTENDERS[spec["contender"]][0]
    try:
        net = BUILDERS[whose](ours, spec).to(spec["device"])
    except ModuleNotFoundError as error:
        raise LeftOut(f"{error.name} is not installed (pip install --no-deps -r requirements-bench.txt)") from None
    for theirs, weight in zip(net.parameters(), ours.parameters(), strict=True):
        assert theirs.shape == weight.shape, (theirs.shape, weight.shape)
        theirs.data.copy_(weight.data)
    return net


# ---- A contender's process -------------------------------------------------------------------------------


class Contender:
    """One net with its optimizer and batch; its methods are the commands a worker process obeys."""

    def __init__(self, spec):
        self.spec, self.device = spec, torch.device(spec["device"])
        torch.set_num_threads(spec["threads"])
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.bf16 = CONTENDERS[spec["contender"]][1]
        self.net = None

    def batch(self, size):
        generator = torch.Generator().manual_seed(1)
        shape = (size, 3, self.spec["img_size"], self.spec["img_size"])
        images = torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device)
        return images, torch.randint(NUM_CLS, (size,), generator=generator).to(self.device)

    def calibrate(self, net):
        """Running statistics by one batch in training mode: with those of a fresh net no neuron fires."""
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        yield
        for norm in norms:
            norm.momentum = BN_MOMENTUM

    def prepare(self):
        self.net = build(self.spec)
        self.images, self.labels = self.batch(self.spec["batch_size"])
        calibration = self.calibrate(self.net)
        next(calibration)
        with torch.no_grad():
            self.logits(self.net.train(), self.images if len(self.images) > 1 else self.batch(2)[0])
        next(calibration, None)
        self.optimizer = torch.optim.SGD(self.net.parameters(), **SGD)
        return {}

    def logits(self, net, images):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return net(images)

    def train(self):
        self.net.train()
        F.cross_entropy(self.logits(self.net, self.images).float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self):
        self.net.eval()
        return self.logits(self.net, self.images)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- Commands

    def time(self, mode, steps=1):
        """Seconds of one step, the mean over `steps` of them."""
        if self.net is None:
            self.prepare()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            getattr(self, mode)()
        self.synchronize()
        return {"seconds": (time.perf_counter() - start) / steps}

    def memory(self):
        """Peak memory of this process so far, in bytes."""
        if self.device.type == "cuda":
            return {"bytes": torch.cuda.max_memory_allocated()}
        with contextlib.suppress(OSError, StopIteration):  # unlike ru_maxrss, not inherited from the parent
            lines = Path("/proc/self/status").read_text().splitlines()
            return {"bytes": 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))}
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"bytes": peak if sys.platform == "darwin" else 1024 * peak}

    def profile(self, steps=2):
        """Share of convolutions and matrix products in the time of a training step, and the longest others.

        On a CPU the passes of the fused engine are calls that the profiler does not see: time without a name.
        """
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            seconds = self.time("train", steps)["seconds"] * steps
        spent = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) for e in profiler.key_averages()}
        pattern = SYNAPSE_KERNELS if cuda else SYNAPSE_OPS
        share = {key: us / 1e6 / seconds for key, us in spent.items()}
        synapses = sum(s for key, s in share.items() if pattern.search(key))
        others = sorted(((s, key) for key, s in share.items() if not pattern.search(key)), reverse=True)[:8]
        return {"convolutions_and_matmuls": synapses, "others": {key: round(s, 4) for s, key in others}}

    def check(self, path, dtype, batch_size):
        """Save logits and gradients of a training pass, and logits in eval mode, from fixed weights and seeds."""
        torch.set_default_dtype(getattr(torch, dtype))
        net = build(self.spec)
        images, labels = self.batch(batch_size)
        images = images.to(torch.get_default_dtype())
        next(calibration := self.calibrate(net))
        torch.manual_seed(2)
        logits = self.logits(net.train(), images)
        F.cross_entropy(logits, labels).backward()
        next(calibration, None)
        grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        torch.manual_seed(3)
        with torch.no_grad():
            evaluated = self.logits(net.eval(), images)
        results = {"logits, training": logits.detach(), "gradients": grads, "logits, eval": evaluated}
        torch.save({name: x.cpu() for name, x in results.items()}, path)
        return {}


def work(spec):
    """Serve commands, one JSON object a line on stdin, until it closes; whatever else is printed goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    contender = Contender(spec)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(contender, command.pop("do"))(**command)
        except LeftOut as error:
            reply = {"left_out": str(error)}
        except Exception as error:
            reply = {"left_out": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """The other end of a contender's process: `ask` raises LeftOut where it fails. Use as a context manager."""

    def __init__(self, name, args, **changes):
        keys = ("arch", "num_steps", "batch_size", "img_size", "device", "threads", "authors")
        spec = {"contender": name, **{key: getattr(args, key) for key in keys}, **changes}
        command = [sys.executable, __file__, "--worker", json.dumps(spec)]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        self.log = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=env)

    def ask(self, do, **options):
        try:
            print(json.dumps({"do": do, **options}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["it said nothing"])[-1]
            cause = "killed, perhaps for want of memory" if status == -9 else f"its process ended: {last[:300]}"
            raise LeftOut(cause)
        reply = json.loads(line)
        if "left_out" in reply:
            raise LeftOut(reply["left_out"])
        return reply

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        if exc[0] is not None:  # an interrupt must not wait for a long step
            self.process.terminate()
        self.process.wait()
        self.log.close()


# ---- What is measured ------------------------------------------------------------------------------------


def leave_out(report, name, reason):
    if name not in report["left_out"]:
        print(f"left out: {name}, because {reason}", flush=True)
        report["left_out"][name] = reason


def check_same_net(names, args, report):
    """Compare every contender's code with our plain loop. Fills report["check"]; returns the names that run."""
    kinds = dict.fromkeys(["ours-plain", *(CONTENDERS[name][0] for name in names)])
    dtypes = ["float64", "float32"] if args.device == "cpu" else ["float32"]
    outputs, failed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            for dtype in dtypes:
                path = f"{folder}/{kind}-{dtype}.pt"
                try:
                    with Worker(kind, args) as worker:
                        worker.ask("check", path=path, dtype=dtype, batch_size=min(args.batch_size, 4))
                    outputs[kind, dtype] = torch.load(path)
                except LeftOut as error:
                    failed[kind] = str(error)
                    break
    if "ours-plain" in failed:
        raise UserError(f"our plain loop does not run here: {failed['ours-plain']}")
    for kind in [k for k in kinds if k not in failed and k != "ours-plain"]:
        rows = report["check"][kind] = {}
        for dtype in dtypes:
            mine, theirs = outputs["ours-plain", dtype], outputs[kind, dtype]
            for what, reference in mine.items():
                scale = reference.abs().max().item()
                assert scale > 0, f"{what} are all zero: nothing compared"
                row = {"max_diff": (theirs[what] - reference).abs().max().item(), "max_value": scale}
                row["cosine"] = F.cosine_similarity(theirs[what].flatten(), reference.flatten(), dim=0).item()
                rows[f"{what}, {dtype}"] = row
        worst = max(r["max_diff"] / r["max_value"] for key, r in rows.items() if key.endswith(dtypes[0]))
        report["same_net"][kind] = worst <= SAME_NET if dtypes[0] == "float64" else None
    for name in names:
        if CONTENDERS[name][0] in failed:
            leave_out(report, name, failed[CONTENDERS[name][0]])
    return [name for name in names if name not in report["left_out"]]


def time_in_turns(names, args, report):
    """Fill report["seconds"]: {mode: {contender: [seconds of every round]}}."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, args)) for name in names}
        for mode in args.modes:
            rounds = {name: [] for name in workers}
            for turn in range(args.warmup + args.repeats):
                for name in list(workers):
                    try:
                        seconds = workers[name].ask("time", mode=mode, steps=args.steps_per_turn)["seconds"]
                    except LeftOut as error:
                        leave_out(report, name, str(error))
                        del workers[name], rounds[name]
                        continue
                    if turn >= args.warmup:
                        rounds[name].append(seconds)
                print(f"  {mode} round {turn + 1} of {args.warmup + args.repeats}", file=sys.stderr)
            report["seconds"][mode] = rounds
    return [name for name in names if name in workers]


def peak_memory(name, args, **changes):
    """Peak bytes of a fresh process after two training steps."""
    with Worker(name, args, **changes) as worker:
        worker.ask("time", mode="train", steps=2)
        return worker.ask("memory")["bytes"]


def measure_memory(names, args, report):
    """Fill report["memory"]: peak MB at two batch sizes and the slope, MB per image."""
    small, large = args.memory_batches
    for name in names:
        try:
            peaks = [peak_memory(name, args, batch_size=size) / 1e6 for size in (small, large)]
        except LeftOut as error:
            print(f"memory of {name} not measured: {error}", flush=True)
            continue
        slope = (peaks[1] - peaks[0]) / (large - small)
        report["memory"][name] = {"batch_sizes": [small, large], "peak_mb": peaks, "mb_per_image": slope}


def measure_profile(names, args, report):
    """Fill report["profile"] with the shares of convolutions and matrix products in a training step."""
    for name in names:
        try:
            with Worker(name, args) as worker:
                worker.ask("time", mode="train", steps=args.warmup)
                report["profile"][name] = worker.ask("profile")
        except LeftOut as error:
            print(f"no profile of {name}: {error}", flush=True)


def available_bytes():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return float("inf")


def scale_along(axis, values, name, args):
    """Points {axis, train, infer: seconds, peak_mb} of one contender; all its sizes take turns, as in the table."""
    points, peak, before = [], 0, None
    with contextlib.ExitStack() as stack:
        for value in values:
            point = {axis: value, "train": None, "infer": None, "peak_mb": None}
            points.append(point)
            if args.device == "cpu" and before and peak * value / before > 0.9 * available_bytes():
                print(f"  {name} at {axis} {value} would not fit into memory: left out", flush=True)
                continue
            modes = [mode for mode in args.modes if mode == "infer" or axis != "batch_size" or value > 1]
            worker = stack.enter_context(Worker(name, args, **{axis: value}))
            try:
                for mode in modes:
                    worker.ask("time", mode=mode, steps=2)
                peak, before = worker.ask("memory")["bytes"], value
            except LeftOut as error:
                print(f"  {name} at {axis} {value} left out, because {error}", flush=True)
                continue
            point.update(peak_mb=peak / 1e6, worker=worker, rounds={mode: [] for mode in modes})
        for turn in range(args.scaling_repeats):
            for point in (p for p in points if "worker" in p):
                for mode, seconds in point["rounds"].items():
                    seconds.append(point["worker"].ask("time", mode=mode, steps=args.steps_per_turn)["seconds"])
            print(f"  scaling, {name}, {axis}, round {turn + 1} of {args.scaling_repeats}", file=sys.stderr)
    for point in points:
        point.update({mode: statistics.median(s) for mode, s in point.pop("rounds", {}).items()})
        point.pop("worker", None)
    return points


def straight_line(points, axis, mode):
    """Fit seconds = a + b x with equal relative weights; the line and the largest relative deviation from it."""
    pairs = [(p[axis], p[mode]) for p in points if p[mode]]
    if len(pairs) < 3:
        return None
    x, y = torch.tensor(pairs, dtype=torch.float64).t()
    a, b = torch.linalg.lstsq(torch.stack([1 / y, x / y], 1), torch.ones(len(x), 1, dtype=torch.float64))[0][:, 0]
    deviation = ((a + b * x) / y - 1).abs().max()
    return {"intercept": a.item(), "slope": b.item(), "max_relative_deviation": deviation.item()}


def measure_scaling(names, args, report):
    """Fill report["scaling"]: time and memory against T and against the batch size, for our engines."""
    axes = {"num_steps": args.scaling_steps, "batch_size": args.scaling_batches}
    for axis, values in axes.items():
        report["scaling"][axis] = {}
        for name in [name for name in names if name.startswith("ours")]:
            points = scale_along(axis, values, name, args)
            lines = {mode: straight_line(points, axis, mode) for mode in args.modes}
            report["scaling"][axis][name] = {"points": points, "line": lines}


def plot_scaling(scaling, args, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [("train", "training step [s]"), ("infer", "inference [s]"), ("peak_mb", "peak memory [MB]")]
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.5), constrained_layout=True)
    labels = {
        "num_steps": f"time-steps T (batch {args.batch_size})", "batch_size": f"batch size (T = {args.num_steps})"
    }  # fmt: skip
    for row, (axis, contenders) in zip(grid, scaling.items(), strict=True):
        for ax, (key, label) in zip(row, columns, strict=True):
            for name, measured in contenders.items():
                points = [(p[axis], p[key]) for p in measured["points"] if p[key]]
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", label=name)
            ax.set(xlabel=labels[axis], ylabel=label, xlim=(0, None), ylim=(0, None))
            ax.grid(alpha=0.3)
    grid[0, 0].legend()
    figure.suptitle(f"{args.arch}, {args.img_size}x{args.img_size}, {args.device}, {args.threads} threads")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- Report ----------------------------------------------------------------------------------------------


def summary(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(rounds, name, reference):
    """How many times as fast `name` is as `reference`, round by round."""
    return summary([theirs / mine for mine, theirs in zip(rounds[name], rounds[reference], strict=True)])


def spread(s, digits=2):
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f}-{s['max']:.{digits}f})"


def print_table(rows):
    """Rows of strings as a markdown table; the first is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def print_check(report):
    print("\nThe same net? Differences from our plain loop, over the largest value there (cosine)\n")
    columns = list(dict.fromkeys(key for rows in report["check"].values() for key in rows))
    rows = [["", *columns, "same net"]]
    for kind, measured in report["check"].items():
        cells = [f"{r['max_diff'] / r['max_value']:.1e} ({r['cosine']:.5f})" for r in measured.values()]
        rows.append([kind, *cells, {True: "yes", False: "NO", None: "see cosines"}[report["same_net"][kind]]])
    print_table(rows)


def print_results(names, args, report):
    """The main table, then our contenders against every other one; fills report["times"] and report["speedups"]."""
    baseline = report["baseline"]
    print(
        f"{args.arch}, T = {args.num_steps}, batch {args.batch_size}, {args.img_size}x{args.img_size}, {args.device}, "
        f"{args.threads} threads, {args.repeats} rounds: median (min-max)\n"
    )
    header = [""]
    for mode in args.modes:
        header += [f"{mode}, ms per image", f"times as fast as {baseline}"]
    rows = [[*header, "memory, MB per image", *(["convolutions and matmuls"] if report["profile"] else [])]]
    for mode, rounds in report["seconds"].items():
        report["times"][mode] = {
            n: summary([1000 * s / args.batch_size for s in seconds]) for n, seconds in rounds.items()
        }
        report["speedups"][mode] = {n: {other: ratios(rounds, n, other) for other in names} for n in names}
    for name in names:
        row = [name]
        for mode in args.modes:
            row += [spread(report["times"][mode][name], 1), spread(report["speedups"][mode][name][baseline])]
        memory = report["memory"].get(name)
        row.append(f"{memory['mb_per_image']:.1f}" if memory else "-")
        if report["profile"]:
            share = report["profile"].get(name)
            row.append(f"{share['convolutions_and_matmuls']:.0%}" if share else "-")
        rows.append(row)
    print_table(rows)
    others = [n for n in names if not n.startswith("ours-fused")]
    for mode in args.modes:
        print(f"{mode}: how many times as fast (row) as (column), median (min-max) of the rounds' ratios\n")
        ours = [n for n in names if n.startswith("ours")]
        speedups = report["speedups"][mode]
        print_table([["", *others], *([n, *(spread(speedups[n][other]) for other in others)] for n in ours)])


def print_scaling(report, args):
    for axis, contenders in report["scaling"].items():
        print(f"Against {axis}: seconds a step, peak MB\n")
        rows = [["", axis, *args.modes, "peak MB"]]
        for name, measured in contenders.items():
            for point in measured["points"]:
                cells = [f"{point[mode]:.3f}" if point[mode] else "-" for mode in args.modes]
                rows.append([name, str(point[axis]), *cells, f"{point['peak_mb']:.0f}" if point["peak_mb"] else "-"])
        print_table(rows)
        for name, measured in contenders.items():
            for mode, line in measured["line"].items():
                if line:
                    deviation = line["max_relative_deviation"]
                    print(f"{name}, {mode}: at most {deviation:.1%} off a straight line in {axis}")
        print(flush=True)


def machine(args):
    """What the numbers depend on besides the options."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    packages = {}
    for package in ("torch", "numpy", "triton", "spikingjelly", "snntorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.version(package)
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    authors = hashlib.sha256((Path(args.authors) / "model.py").read_bytes()).hexdigest() if args.authors else None
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None,
        "cuda": torch.version.cuda if args.device.startswith("cuda") else None,
        "python": platform.python_version(),
        "packages": {**packages, "torch": torch.__version__},
        "git": git.stdout.strip() or None,
        "authors_model_sha256": authors,
        "spikingjelly_cuda_implementation": os.environ.get("SJ_LIF_CUDA_IMPLEMENTATION", "auto"),
    }


# ---- Command line ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")


def at_least(least):
    def number(text):
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", default="vgg9", choices=ARCHS)
    add("--batch_size", type=at_least(2), default=16)
    add("--num_steps", type=at_least(1), default=25, help="time-steps T")
    add("--img_size", type=at_least(1), default=32)
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), help="CPU threads of the one that computes")
    add("--repeats", type=at_least(1), default=11, help="timed rounds")
    add("--warmup", type=at_least(1), default=3, help="rounds before those")
    add("--steps_per_turn", type=at_least(1), help="steps timed as one (default: 1 on a CPU, 10 on a GPU)")
    add("--authors", metavar="PATH", help="folder with the authors' model.py")
    add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)} (all)")
    add("--modes", nargs="+", default=list(MODES), choices=MODES)
    add("--memory_batches", nargs=2, type=at_least(2), help="two batch sizes (default: half of --batch_size and it)")
    add("--no_memory", action="store_true", help="do not measure memory")
    add("--profile", action="store_true", help="share of convolutions and matrix products in a training step")
    add("--scaling", action="store_true", help="our engines against T and against the batch size")
    add("--scaling_steps", nargs="+", type=at_least(1), default=[5, 10, 25, 50, 100])
    add("--scaling_batches", nargs="+", type=at_least(1), help="(default: 1, 2, 4 ... --batch_size)")
    add("--scaling_repeats", type=at_least(1), default=5)
    add("--out", metavar="DIR", default=str(ROOT / "results" / "benchmarks"))
    args = parser.parse_args(argv)
    half = max(2, args.batch_size // 2)
    args.memory_batches = sorted(args.memory_batches or (half, max(args.batch_size, half + 1)))
    if args.memory_batches[0] == args.memory_batches[1]:
        raise UserError("--memory_batches needs two different batch sizes")
    powers = [2**k for k in range(args.batch_size.bit_length()) if 2**k <= args.batch_size]
    args.scaling_batches = sorted(set(args.scaling_batches or powers))
    args.scaling_steps = sorted(set(args.scaling_steps))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {args.device}")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: PyTorch sees no GPU here; try --device cpu")
    args.steps_per_turn = args.steps_per_turn or (1 if args.device == "cpu" else 10)
    if args.authors and not (Path(args.authors) / "model.py").is_file():
        raise UserError(f"--authors: there is no model.py in {args.authors}; name a clone of the authors' repository")
    if args.contenders and "authors" in args.contenders and not args.authors:
        raise UserError("the contender authors needs --authors PATH, a clone of the authors' repository")
    try:
        with torch.device("meta"):
            SpikingVGG(args.arch, args.num_steps, LEAK, args.img_size, NUM_CLS)
    except ValueError as error:
        raise UserError(str(error)) from None
    return args


@entry_point
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        work(json.loads(argv[1]))
        return 0
    args = parse(argv)
    keys = ("left_out", "check", "same_net", "seconds", "times", "speedups", "memory", "profile", "scaling")
    command = " ".join(["python scripts/benchmark.py", *("PATH" if a == args.authors else a for a in argv)])
    report = {"command": command, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    settings = ("arch", "batch_size", "num_steps", "img_size", "device", "threads", "repeats", "warmup")
    report |= {key: getattr(args, key) for key in (*settings, "steps_per_turn")} | {"machine": machine(args)}
    report |= {key: {} for key in keys}
    path = Path(args.out) / f"{args.device.replace(':', '')}_{args.arch}_T{args.num_steps}_B{args.batch_size}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None

    names = args.contenders or list(CONTENDERS)
    if "authors" in names and not args.authors:
        leave_out(report, "authors", "no --authors PATH was given")
        names = [name for name in names if name != "authors"]
    names = check_same_net(list(dict.fromkeys(names)), args, report)
    print_check(report)
    names = time_in_turns(names, args, report)
    if not names:
        raise UserError("no contender is left to measure")
    report["baseline"] = next((n for n in ("authors", "ours-plain") if n in names), names[0])
    if not args.no_memory:
        measure_memory(names, args, report)
    if args.profile:
        measure_profile(names, args, report)
    print_results(names, args, report)
    if args.scaling:
        measure_scaling(names, args, report)
        print_scaling(report, args)
        plot_scaling(report["scaling"], args, path.with_suffix(".png"))
    path.write_text(json.dumps(report, indent=1) + "\n")
    others = [kind for kind, same in report["same_net"].items() if same is False]
    if others:
        print(f"not the same net as ours: {', '.join(others)}")
    line = {"file": str(path), "baseline": report["baseline"], "left_out": list(report["left_out"])}
    for mode in args.modes:
        line[f"{mode}_speedup"] = {n: round(report["speedups"][mode][n][report["baseline"]]["median"], 3) for n in names}
    line["mb_per_image"] = {n: round(m["mb_per_image"], 2) for n, m in report["memory"].items()}
    line["same_net"] = report["same_net"]
    print(json.dumps(line))
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
