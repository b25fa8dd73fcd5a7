"""Time and memory of our engines beside the authors' code, SpikingJelly and snnTorch, on one and the same net.

    git clone https://github.com/Intelligent-Computing-Lab-Yale/BNTT-Batch-Normalization-Through-Time authors
    pip install --no-deps -r requirements-bench.txt              # the peers; those not installed are left out
    python benchmarks/benchmark.py --authors authors             # VGG9, T = 25, batch 16, 32x32, all cores
    python benchmarks/benchmark.py --authors authors --profile --scaling
    python benchmarks/benchmark.py --contenders ours-plain ours-fused --num_steps 10 --repeats 5

Every contender is a process of its own that stays warm; one computes at a time, in turns (A B C A B C ...), so
that a slow minute of the machine hits all alike. Judge by the ratios, taken round by round, not by the times.

What is timed. A training step is forward, cross-entropy, backward, SGD with momentum and weight decay; inference
is eval mode without gradients. All draw the same ternary Poisson spikes inside the timed step, one `rand_like` per
time-step. Before anything is timed, every contender's logits and gradients are compared with our plain loop's, from
the same weights and seed: in float64 (on a CPU) they must agree, else it is another net; differences in float32,
where rounding makes a few neurons fire otherwise, are shown as they are.

Who takes part: CONTENDERS in contenders.py.

Memory is the peak resident memory of a fresh process (on a GPU, PyTorch's peak) at two batch sizes; its slope is
what one more image costs. On a GPU the peak of the timed training is told too. On a GPU float32 contenders may use
TF32. SpikingJelly takes the neuron kernels it finds best (its compiled CUDA ones, then Triton's); the variable
SJ_LIF_CUDA_IMPLEMENTATION overrides it.

Writes <out>/<device>_<arch>_T<T>_B<B>.json (with `--scaling` a .png of the same name); the last line printed is one
JSON object. Exit code 0: done; 1: a contender computes another net; 2: an option is wrong.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root
from contenders import CONTENDERS, LEAK, NUM_CLS, LeftOut, batch_norms, build, whose

import arguments
import fused
import runs
from model import ARCHS, BN_MOMENTUM, SpikingVGG
from utill import UserError, entry_point

ROOT = Path(__file__).resolve().parents[1]
WARM = 3  # eager steps before a graph is captured
SGD = dict(lr=0.01, momentum=0.9, weight_decay=1e-4)
SAME_NET = 1e-6  # largest difference of logits and gradients in float64, over the largest value
SYNAPSE_OPS = re.compile(r"convolution|conv2d|linear|matmul|::(b|add|badd)?mm$")  # a profiler's names on a CPU
SYNAPSE_KERNELS = re.compile(r"conv|gemm|cutlass|xmma|nvjet|[dw]grad|fprop", re.IGNORECASE)  # and on a GPU


# ---- A contender's process -------------------------------------------------------------------------------


class Process:
    """A net with its optimizer and batch. The methods under "Commands" are what a worker process obeys."""

    def __init__(self, spec):
        torch.set_num_threads(spec["threads"])
        self.spec, self.device = spec, torch.device(spec["device"])
        self.name, self.row = spec["contender"], CONTENDERS[spec["contender"]]
        self.net = self.train_step = None
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def batch(self, size):
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(size, 3, self.spec["img_size"], self.spec["img_size"], generator=generator)
        return images.to(self.device), torch.randint(NUM_CLS, (size,), generator=generator).to(self.device)

    def pass_twice(self, net, images, labels):
        """Logits and gradients of a training pass; then, with its running statistics, logits in eval mode.

        (With the running statistics of a fresh net no neuron fires.)
        """
        for norm in batch_norms(net):
            norm.momentum = 1.0
        torch.manual_seed(2)
        logits = net.train()(images)
        F.cross_entropy(logits, labels).backward()
        grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        net.zero_grad()
        with torch.no_grad():
            evaluated = net.eval()(images)
        for norm in batch_norms(net):
            norm.momentum = BN_MOMENTUM
        return {"logits": logits.detach(), "gradients": grads, "eval logits": evaluated}

    def prepare(self):
        self.net = build(self.name, self.spec)
        self.train_step = fused.GraphedStep(self.step, warm=WARM) if self.row.graph else self.step
        with self.autocast():
            self.pass_twice(self.net, *self.batch(max(2, min(self.spec["batch_size"], 4))))
        self.images, self.labels = self.batch(self.spec["batch_size"])
        self.optimizer = torch.optim.SGD(self.net.parameters(), **SGD)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.row.bf16)

    def step(self, images, labels):
        with self.autocast():
            logits = self.net(images)
        self.optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        return (logits.detach(),)

    def train(self):
        self.net.train()
        self.train_step(self.images, self.labels)

    @torch.no_grad()
    def infer(self):
        self.net.eval()
        with self.autocast():
            self.net(self.images)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- Commands

    def check(self):
        """{what: largest difference from our plain loop over the largest value, and cosine}, without autocast."""
        rows = {}
        for dtype in (torch.float64, torch.float32) if self.device.type == "cpu" else (torch.float32,):
            images, labels = self.batch(max(2, min(self.spec["batch_size"], 4)))
            torch.set_default_dtype(dtype)
            try:
                pair = [build(name, self.spec) for name in ("ours-plain", self.name)]
                mine, theirs = (self.pass_twice(net, images.to(dtype), labels) for net in pair)
            finally:
                torch.set_default_dtype(torch.float32)
            for what, reference in mine.items():
                scale, difference = reference.abs().max().item(), (theirs[what] - reference).abs().max().item()
                assert scale > 0, f"{what} are all zero: nothing to compare"
                cosine = F.cosine_similarity(theirs[what].double().flatten(), reference.double().flatten(), dim=0)
                name = f"{what}, {str(dtype).removeprefix('torch.')}"
                rows[name] = {"difference": difference / scale, "cosine": cosine.item()}
        return rows

    def time(self, mode, steps=1):
        """Seconds of one step, the mean over `steps` of them."""
        if self.net is None:
            self.prepare()
        if self.device.type == "cuda":
            getattr(self, mode)()  # takes the memory that the last turn gave back
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            getattr(self, mode)()
        self.synchronize()
        seconds = (time.perf_counter() - start) / steps
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the other contenders, which are as large
        return seconds

    def memory(self):
        """Peak memory of this process so far, in MB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        with contextlib.suppress(OSError, TypeError):  # unlike ru_maxrss, not inherited from the parent
            return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

    def profile(self, steps=2):
        """Share of convolutions and matrix products in the time of a training step, and the longest others.

        On a CPU the passes of the fused engine are calls that the profiler does not see: time without a name.
        """
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        self.time("train", steps)
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            seconds = self.time("train", steps) * steps
        pattern, spent = (SYNAPSE_KERNELS, "self_device_time_total") if cuda else (SYNAPSE_OPS, "self_cpu_time_total")
        share = {event.key: getattr(event, spent) / 1e6 / seconds for event in profiler.key_averages()}
        others = sorted((key for key in share if not pattern.search(key)), key=share.get, reverse=True)[:8]
        synapses = sum(value for key, value in share.items() if pattern.search(key))
        return {"convolutions_and_matmuls": synapses, "others": {key: round(share[key], 4) for key in others}}


def work(spec):
    """Obey commands, one JSON object a line on stdin, until it closes; what else is printed goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = Process(spec)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = {"result": getattr(contender, command.pop("do"))(**command)}
        except Exception as error:
            kind = "" if isinstance(error, LeftOut) else f"{type(error).__name__}: "
            reply = {"left_out": kind + " ".join(str(error).split())[:300]}
        print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """The other end of a contender's process, a context manager: `ask` raises LeftOut where it fails."""

    def __init__(self, name, args, **changes):
        keys = ("arch", "num_steps", "batch_size", "img_size", "device", "threads", "authors")
        spec = {"contender": name, **{key: getattr(args, key) for key in keys}, **changes}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(spec)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        )

    def ask(self, do, **options):
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": do, **options}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        if not line:
            raise LeftOut(f"its process ended with status {self.process.wait()} (-9: killed, perhaps out of memory)")
        reply = json.loads(line)
        if "left_out" in reply:
            raise LeftOut(reply["left_out"])
        return reply["result"]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# ---- What is measured: each fills one part of the report -----------------------------------------------------


@contextlib.contextmanager
def noted(report, what):
    """What raises LeftOut inside is said in one line, and kept in the report."""
    try:
        yield
    except LeftOut as error:
        report["left_out"][what] = str(error)
        print(f"left out: {what}, because {error}", flush=True)


def progress(text):
    print(f"  {text}", file=sys.stderr, flush=True)


def check_and_time(names, args, report):
    """check: {whose code: differences}; seconds: {mode: {contender: [seconds of every round]}}."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, args)) for name in names}
        for name in names:
            report["seconds"][name] = {mode: [] for mode in args.modes}
            with noted(report, name):
                if whose(name) not in report["check"]:
                    report["check"][whose(name)] = workers[name].ask("check")
        if set(names) <= set(report["left_out"]):
            raise UserError("no contender is left to measure")
        for mode in args.modes:
            for turn in range(args.warmup + args.repeats):
                for name in [name for name in names if name not in report["left_out"]]:
                    with noted(report, name):
                        seconds = workers[name].ask("time", mode=mode, steps=args.steps_per_turn)
                        report["seconds"][name][mode] += [seconds] if turn >= args.warmup else []
                progress(f"{mode} round {turn + 1} of {args.warmup + args.repeats}")
            there = [name for name in names if name not in report["left_out"]]
            for name in there if args.device != "cpu" and mode == "train" else ():
                with noted(report, f"peak memory of {name}"):
                    report["peak_mb"][name] = workers[name].ask("memory")
    report["seconds"] = {name: s for name, s in report["seconds"].items() if name not in report["left_out"]}


def measure_memory(names, args, report):
    """memory: peak MB of a fresh process after two training steps, at two batch sizes, and MB per image."""
    small, large = args.memory_batches
    for name in names:
        peaks = []
        with noted(report, f"memory of {name}"), contextlib.ExitStack() as stack:
            started = [stack.enter_context(Worker(name, args, batch_size=size)) for size in (small, large)]
            for worker in started:  # both import at once
                with worker:
                    worker.ask("time", mode="train", steps=WARM + 2 if CONTENDERS[name].graph else 2)
                    peaks.append(worker.ask("memory"))
            slope = (peaks[1] - peaks[0]) / (large - small)
            report["memory"][name] = {"batch_sizes": [small, large], "peak_mb": peaks, "mb_per_image": slope}
        progress(f"memory of {name}")


def measure_profile(names, args, report):
    """profile: share of convolutions and matrix products in a training step."""
    for name in names:
        with noted(report, f"profile of {name}"), Worker(name, args) as worker:
            report["profile"][name] = worker.ask("profile")
        progress(f"profile of {name}")


def fits(megabytes):
    """False where that would fill the memory of this machine, so far as it tells."""
    with contextlib.suppress(OSError):
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        return available is None or megabytes < 0.9 * int(available[1]) / 1e3
    return True


def measure_scaling(names, args, report):
    """scaling: {axis: {contender: points and straight lines}}; all sizes of a contender take turns."""
    for axis, sizes in {"num_steps": args.scaling_steps, "batch_size": args.scaling_batches}.items():
        measured = report["scaling"][axis] = {}
        for name in names:
            with noted(report, f"{name} against {axis}"):
                measured[name] = scale_along(axis, sizes, name, args, report)


def scale_along(axis, sizes, name, args, report):
    points, workers = {}, {}
    with contextlib.ExitStack() as stack:
        for size in sizes:
            modes = [mode for mode in args.modes if mode == "infer" or axis == "num_steps" or size > 1]
            worker = stack.enter_context(Worker(name, args, **{axis: size}))
            with noted(report, f"{name} at {axis} {size}"):
                last = max(points, default=None)
                if last and args.device == "cpu" and not fits(points[last]["peak_mb"] * size / last):
                    raise LeftOut("it would not fit into memory")
                for mode in modes:
                    worker.ask("time", mode=mode, steps=2)
                points[size], workers[size] = {"peak_mb": worker.ask("memory"), **{m: [] for m in modes}}, worker
        for turn in range(args.scaling_repeats):
            for size, worker in workers.items():
                for mode in [mode for mode in args.modes if mode in points[size]]:
                    points[size][mode].append(worker.ask("time", mode=mode, steps=args.steps_per_turn))
            progress(f"{name} against {axis}, round {turn + 1} of {args.scaling_repeats}")
    for point in points.values():
        point |= {mode: statistics.median(point[mode]) for mode in args.modes if mode in point}
    return {"points": points, "off_a_straight_line": {mode: off_a_line(points, mode) for mode in args.modes}}


def off_a_line(points, mode):
    """Largest relative deviation of the times from a + b x, fitted with equal relative weights."""
    pairs = [(size, point[mode]) for size, point in points.items() if mode in point]
    if len(pairs) < 3:
        return None
    x, y = np.array(pairs).T
    return float(np.abs(np.polyval(np.polyfit(x, y, 1, w=1 / y), x) / y - 1).max())


def plot_scaling(scaling, args, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {"train": "training step [s]", "infer": "inference [s]", "peak_mb": "peak memory [MB]"}
    columns = {key: label for key, label in columns.items() if key in (*args.modes, "peak_mb")}
    labels = {"num_steps": f"time-steps T (batch {args.batch_size})", "batch_size": f"batch (T = {args.num_steps})"}
    figure, grid = plt.subplots(2, len(columns), figsize=(4 * len(columns), 6.5), constrained_layout=True)
    for row, (axis, contenders) in zip(grid, scaling.items(), strict=True):
        for ax, (key, label) in zip(row, columns.items(), strict=True):
            for name, measured in contenders.items():
                pairs = [(size, point[key]) for size, point in measured["points"].items() if key in point]
                ax.plot([x for x, _ in pairs], [y for _, y in pairs], "o-", label=name)
            ax.set(xlabel=labels[axis], ylabel=label, xlim=(0, None), ylim=(0, None))
            ax.grid(alpha=0.3)
    grid[0, 0].legend()
    figure.suptitle(f"{args.arch}, {args.img_size}x{args.img_size}, {args.device}, {args.threads} CPU threads")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- Report ----------------------------------------------------------------------------------------------


def summary(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(s, digits=2):
    """Median, least and most; digits: behind the point at least, more where they are not three figures."""
    digits = max(digits, 2 - math.floor(math.log10(s["median"])))
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f}-{s['max']:.{digits}f})"


def print_table(title, rows):
    """Rows of strings as a markdown table; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    print("", title, "", lines[0], rule, *lines[1:], sep="\n", flush=True)


def print_check(report):
    rows = [["", *next(iter(report["check"].values())), "same net"]]
    for code, row in report["check"].items():
        exact = [r["difference"] for what, r in row.items() if what.endswith("float64")]
        report["same_net"][code] = max(exact) <= SAME_NET if exact else None
        verdict = {True: "yes", False: "NO", None: "float32 only"}[report["same_net"][code]]
        rows.append([code, *(f"{r['difference']:.1e} ({r['cosine']:.6f})" for r in row.values()), verdict])
    print_table("Largest difference from our plain loop, over the largest value (cosine):", rows)


def print_results(names, args, report):
    """The main table, then our contenders beside every other; fills times (ms per image) and speedups."""
    seconds, times, speedups = report["seconds"], report["times"], report["speedups"]
    for mode in args.modes:
        times[mode] = {n: summary([1000 * s / args.batch_size for s in seconds[n][mode]]) for n in names}
        speedups[mode] = {n: {} for n in names}
        for n, other in itertools.product(names, names):
            pairs = zip(seconds[n][mode], seconds[other][mode], strict=True)
            speedups[mode][n][other] = summary([theirs / mine for mine, theirs in pairs])
    table = {"": names}
    for mode in args.modes:
        table[f"{mode}, ms per image"] = [spread(times[mode][n], 1) for n in names]
        baseline = report["baseline"]
        table[f"times as fast as {baseline}, {mode}"] = [spread(speedups[mode][n][baseline]) for n in names]
    if report["peak_mb"]:
        table[f"peak MB at batch {args.batch_size}"] = [f"{report['peak_mb'].get(n, math.nan):.0f}" for n in names]
    for key, part, form in (("mb_per_image", "memory", "{:.1f}"), ("convolutions_and_matmuls", "profile", "{:.0%}")):
        if report[part]:
            table[key.replace("_", " ")] = [
                form.format(report[part][n][key]) if n in report[part] else "-" for n in names
            ]
    title = (
        f"{args.arch}, T = {args.num_steps}, batch {args.batch_size}, {args.img_size}x{args.img_size}, {args.device}, "
        f"{args.threads} CPU threads; median (min-max) of {args.repeats} rounds:"
    )
    print_table(title, [list(table), *map(list, zip(*table.values(), strict=True))])
    others = [n for n in names if not n.startswith("ours-fused")]
    for mode in args.modes:
        rows = [[n, *(spread(speedups[mode][n][o]) for o in others)] for n in names if n.startswith("ours")]
        print_table(f"{mode}: how many times as fast (row) as (column), by rounds:", [["", *others], *rows])


def print_scaling(args, report):
    for axis, contenders in report["scaling"].items():
        rows = [["", axis, *(f"{mode}, s" for mode in args.modes), "peak MB"]]
        lines = [["", *(f"{mode}, furthest from a line" for mode in args.modes)]]
        for name, measured in contenders.items():
            for size, point in measured["points"].items():
                cells = [f"{point[mode]:.3f}" if mode in point else "-" for mode in args.modes]
                rows.append([name, str(size), *cells, f"{point['peak_mb']:.0f}"])
            off = measured["off_a_straight_line"].values()
            lines.append([name, *("-" if value is None else f"{value:.1%}" for value in off)])
        print_table(f"Against {axis}:", rows)
        print_table(f"Time against {axis}:", lines)


def machine(args):
    """What the numbers depend on besides the options."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "triton", "spikingjelly", "snntorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    environment = runs.environment(torch.device("cpu"), [])
    authors = args.authors and hashlib.sha256((Path(args.authors) / "model.py").read_bytes()).hexdigest()
    cuda = args.device != "cpu"
    return {
        "cpu": runs.cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(args.device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
        "git": environment["git"],
        "git_dirty": environment["git_dirty"],
        "authors_model_sha256": authors,
        "spikingjelly_cuda_implementation": os.environ.get("SJ_LIF_CUDA_IMPLEMENTATION", "auto"),
    }


# ---- Command line ----------------------------------------------------------------------------------------


at_least_two = arguments.number(int, lambda x: x >= 2, "an integer of at least 2")


def parse(argv):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", default="vgg9", choices=ARCHS)
    add("--batch_size", type=at_least_two, default=16)
    add("--num_steps", type=arguments.positive_int, default=25, help="time-steps T")
    add("--img_size", type=arguments.positive_int, default=32)
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add(
        "--threads",
        type=arguments.positive_int,
        default=torch.get_num_threads(),
        help="CPU threads of the one that computes",
    )
    add("--repeats", type=arguments.positive_int, default=11, help="timed rounds")
    add("--warmup", type=arguments.positive_int, default=3, help="rounds before those")
    add("--steps_per_turn", type=arguments.positive_int, help="steps timed as one (default: 1 on a CPU, 10 on a GPU)")
    add("--authors", metavar="PATH", help="folder with the authors' model.py")
    add("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=f"of {', '.join(CONTENDERS)} (all)")
    add("--modes", nargs="+", default=["train", "infer"], choices=["train", "infer"])
    add("--memory_batches", nargs=2, type=at_least_two, help="two batch sizes (default: half of --batch_size, and it)")
    add("--no_memory", action="store_true", help="do not measure memory")
    add("--profile", action="store_true", help="share of convolutions and matrix products in a training step")
    add("--scaling", action="store_true", help="our contenders against T and against the batch size")
    add("--scaling_steps", nargs="+", type=arguments.positive_int, default=[5, 10, 25, 50, 100])
    add("--scaling_batches", nargs="+", type=arguments.positive_int, help="(default: 1, 2, 4 ... --batch_size)")
    add("--scaling_repeats", type=arguments.positive_int, default=5)
    add("--out", metavar="DIR", default=ROOT / "results" / "benchmarks", type=Path)
    args = parser.parse_args(argv)
    half = max(2, args.batch_size // 2)
    args.memory_batches = sorted(args.memory_batches or (half, max(args.batch_size, half + 1)))
    args.scaling_batches = sorted(args.scaling_batches or [2**k for k in range(args.batch_size.bit_length())])
    args.scaling_steps.sort()
    args.steps_per_turn = args.steps_per_turn or (1 if args.device == "cpu" else 10)
    args.contenders = list(dict.fromkeys(args.contenders or CONTENDERS))
    if args.memory_batches[0] == args.memory_batches[1]:
        raise UserError("--memory_batches needs two different batch sizes")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {args.device}")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: PyTorch sees no GPU here; try --device cpu")
    if args.authors and not (Path(args.authors) / "model.py").is_file():
        raise UserError(f"--authors: there is no model.py in {args.authors}; name a clone of the authors' repository")
    try:
        with torch.device("meta"):
            SpikingVGG(args.arch, args.num_steps, LEAK, args.img_size, NUM_CLS)
        args.out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None
    return args


@entry_point
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        return work(json.loads(argv[1]))
    args = parse(argv)
    words = ["python benchmarks/benchmark.py", *("PATH" if a == args.authors else a for a in argv)]
    report = {"command": " ".join(words)}
    report["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    settings = ("arch", "batch_size", "num_steps", "img_size", "device", "threads", "repeats", "warmup")
    report |= {key: getattr(args, key) for key in (*settings, "steps_per_turn")} | {"machine": machine(args)}
    parts = "left_out check same_net times speedups memory peak_mb profile scaling seconds"
    for key in parts.split():
        report[key] = {}

    check_and_time(args.contenders, args, report)
    names = list(report["seconds"])
    if not names:
        raise UserError("every contender failed: see above")
    report["baseline"] = next((n for n in ("authors", "ours-plain") if n in names), names[0])
    if not args.no_memory:
        measure_memory(names, args, report)
    if args.profile:
        measure_profile(names, args, report)
    print_check(report)
    print_results(names, args, report)
    path = args.out / f"{args.device.replace(':', '')}_{args.arch}_T{args.num_steps}_B{args.batch_size}.json"
    if args.scaling:
        measure_scaling([n for n in names if n.startswith("ours")], args, report)
        print_scaling(args, report)
        plot_scaling(report["scaling"], args, path.with_suffix(".png"))
    path.write_text(json.dumps(report, indent=1) + "\n")

    line = {"file": str(path), "baseline": report["baseline"], "left_out": list(report["left_out"])}
    for mode in args.modes:
        medians = {n: round(ratio[report["baseline"]]["median"], 3) for n, ratio in report["speedups"][mode].items()}
        line[f"{mode}_speedup"] = medians
    line["mb_per_image"] = {n: round(m["mb_per_image"], 2) for n, m in report["memory"].items()}
    line["same_net"] = report["same_net"]
    print("\n" + json.dumps(line))
    return 1 if False in report["same_net"].values() else 0


if __name__ == "__main__":
    sys.exit(main())
