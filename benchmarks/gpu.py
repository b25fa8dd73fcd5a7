"""The stages of gpu.sh, which explains them: `all` runs what is not done yet, the other words run one stage.

A stage is a command of its own, so that it can be stopped and leaves the GPU's memory; the last line it prints is JSON.
With the environment variable TOY a CPU stands for the GPU, and the Triton passes run under Triton's interpreter.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TOY = bool(os.environ.get("TOY"))
DEVICE = "cpu" if TOY else "cuda"
WORK, OUT = Path(os.environ.get("WORK") or "runs/gpu"), Path(os.environ.get("OUT") or "results/gpu")
STOP_S = 3 if TOY else 20  # a training run needs some seconds to save
FRUITLESS = 2  # calls that a stage may fill without ending


class Stage(NamedTuple):
    name: str
    command: list
    least: float  # seconds left in the call for it to be begun
    judge: object = lambda result: "done"  # of its JSON: "done", "failed: ..." or "left out: ..."
    goes_on: bool = False  # it saves what it did when it is stopped
    timed: bool = True  # it measures time, so nothing runs beside it
    environment: dict = {}  # noqa: RUF012

    @property
    def file(self):
        return WORK / f"{self.name.replace(' ', '.')}.json"


def ours(word, *more):
    return [sys.executable, str(Path(__file__)), word, *more]


def stages(recipe):
    """All stages in order. recipe: name of a run and flags of train.py, or []."""
    checks = re.findall(r"^def (check_\w+)\(device\)", (ROOT / "tests" / "test_fused_triton.py").read_text(), re.M)
    yield Stage("machine", ours("machine"), 20)
    for dtype in ("bf16", "float32"):
        yield Stage(f"profile {dtype}", ours("profile", dtype), 60)
    yield Stage("benchmark", benchmark_command(), 100, environment={"SJ_LIF_CUDA_IMPLEMENTATION": "triton"})
    for check in checks:
        command = [sys.executable, "tests/test_fused_triton.py", DEVICE, check]
        yield Stage(f"tests {check}", command, 60, lambda result: passed(*result.values()), timed=False)
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    yield Stage("graph", ours("graph"), 60, lambda result: result["verdict"], environment=deterministic, timed=False)
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else what lies behind a tensor is PyTorch's own memory
    for tool in ("memcheck", "racecheck"):
        yield Stage(f"sanitizer {tool}", ours("sanitizer", tool), 90, lambda r: r["verdict"], environment=uncached)
    if recipe:
        name, *flags = recipe
        folder = WORK / name / "seed0"
        command = [sys.executable, "train.py", *flags, "--seed", "0", "--run_dir", str(folder), "--resume"]
        yield Stage("recipe", command, 60, goes_on=True)


def passed(outcome):
    return "done" if outcome == "passed" else outcome if outcome.startswith("skipped") else f"failed: {outcome}"


def benchmark_command():
    size = ["--batch_size", "256", "--repeats", "5", "--warmup", "1", "--steps_per_turn", "2", "--no_memory"]
    if TOY:
        words = "--batch_size 2 --num_steps 2 --img_size 8 --repeats 1 --warmup 1 --threads 1 --no_memory"
        size = [*words.split(), "--contenders", "ours-plain", "ours-fused"]
    authors = ["--authors", os.environ["AUTHORS"]] if os.environ.get("AUTHORS") else []
    command = [sys.executable, "benchmarks/benchmark.py", "--device", DEVICE, *size, *authors]
    return [*command, "--out", str(WORK / "benchmark")]


# ---- Running them ----------------------------------------------------------------------------------------


def run_all(recipe):
    """Run what is not done and fits into this call; write gpu.json and gpu.md. Exit code 1 where a stage failed."""
    deadline = time.monotonic() + float(os.environ.get("BUDGET_S") or 520)
    WORK.mkdir(parents=True, exist_ok=True)
    join_parts(recipe)
    every = list(stages(recipe))
    while todo := [stage for stage in every if not stage.file.exists()]:
        # the first ones mostly compile: several at once
        group = [*itertools.takewhile(lambda stage: not stage.timed, todo)]
        group = group[: 1 if TOY else max(1, os.cpu_count() - 2)] or todo[:1]
        left, fresh = deadline - time.monotonic(), not any(stage.name in BEGUN for stage in every)
        least = group[0].least / (10 if TOY else 1)
        if left < STOP_S + 1 or left < least and not fresh:
            print(f"{group[0].name}: {left:.0f} s are left: it is begun in the next call", flush=True)
            break
        with ThreadPoolExecutor(len(group)) as pool:
            ended = list(pool.map(partial(run_stage, deadline=deadline, fresh=fresh), group))
        if not all(ended):
            break
    records = {stage.name: json.loads(stage.file.read_text()) for stage in every if stage.file.exists()}
    waiting = [stage.name for stage in every if stage.name not in records]
    summarise(records, waiting, recipe)
    print("all stages are done" if not waiting else f"to be done by the next calls: {', '.join(waiting)}")
    return 1 if any(record["state"].startswith("failed") for record in records.values()) else 0


BEGUN = set()  # stages that this call began


def run_stage(stage, deadline, fresh):
    """Run one stage until its end or that of the call. Returns whether it ended; its file then says how."""
    BEGUN.add(stage.name)
    print(f"{stage.name} ...", flush=True)
    began, log = time.monotonic(), stage.file.with_suffix(".log")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | stage.environment
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    environment["TRITON_INTERPRET"] = "1" if TOY else "0"
    with open(log, "a") as errors:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        stopped = False
        try:
            out, _ = process.communicate(timeout=max(1, deadline - STOP_S - began))
        except subprocess.TimeoutExpired:
            stopped = True
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(1, deadline - time.monotonic() - 1))
            with contextlib.suppress(ProcessLookupError):  # and what it started
                os.killpg(process.pid, signal.SIGKILL)
            out = process.communicate()[0]
        errors.write(out)
    seconds = time.monotonic() - began
    tries = stage.file.with_suffix(".tries")
    if stopped:
        if stage.goes_on:
            print(f"{stage.name}: stopped after {seconds:.0f} s, goes on in the next call", flush=True)
            return False
        count = int(tries.read_text()) + 1 if tries.exists() else 1
        if fresh:  # it had the whole call
            tries.write_text(str(count))
        if not fresh or count < FRUITLESS:
            print(f"{stage.name}: not done after {seconds:.0f} s, is begun anew in the next call", flush=True)
            return False
        record = {"state": f"failed: it does not end within {seconds:.0f} s, a whole call"}
    else:
        record = judged(stage, process.returncode, out, log)
    write(stage.file, record | {"seconds": round(seconds, 1)})
    print(f"{stage.name}: {short(record['state'])} ({seconds:.0f} s)", flush=True)
    return True


def judged(stage, code, out, log):
    try:
        result = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        return {"state": f"failed: exit code {code}, {last[:300]}"}
    state = stage.judge(result)
    return {"state": state if code == 0 or state != "done" else f"failed: exit code {code}", "result": result}


def short(state):
    """A state on one line: of a traceback what it ends in."""
    lines = state.splitlines()
    text = state if len(lines) == 1 else f"{lines[0].split(':')[0]}: {lines[-1]}"
    return text.replace("|", "/")[:200]


def write(path, value):
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(value if isinstance(value, str) else json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def join_parts(recipe):
    """Put a checkpoint together that another machine left in parts."""
    parts = sorted((WORK / "parts").glob("last.pth.tar.*"))
    last = recipe and WORK / recipe[0] / "seed0" / "last.pth.tar"
    if recipe and parts and not last.exists():
        last.parent.mkdir(parents=True, exist_ok=True)
        last.write_bytes(b"".join(part.read_bytes() for part in parts))


def summarise(records, waiting, recipe):
    """gpu.json and gpu.md in OUT, and the recipe's checkpoint in parts."""
    OUT.mkdir(parents=True, exist_ok=True)
    report = {"command": "bash benchmarks/gpu.sh", "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    report |= {"toy": TOY, "recipe": recipe, "stages": records, "waiting": waiting}
    folder = WORK / recipe[0] / "seed0" if recipe else WORK
    with contextlib.suppress(OSError):
        report["recipe_log"] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for file in (WORK / "benchmark").glob("*.json"):
        report["benchmark"] = json.loads(file.read_text())
    write(OUT / "gpu.json", report)
    lines = ["| stage | state | what it gave | seconds |", "| --- | --- | --- | --- |"]
    for name, record in records.items():
        gave = in_words(name, record.get("result") or {})
        lines.append(f"| {name} | {short(record['state'])} | {gave} | {record['seconds']} |")
    epochs = report.get("recipe_log") or []
    for name in waiting:
        gave = f"{len(epochs)} epochs, train {epochs[-1]['train_acc']:.2f} %" if name == "recipe" and epochs else ""
        lines.append(f"| {name} | waits | {gave} | |")
    for name, record in records.items():
        if name.startswith("profile") and "result" in record:
            lines += ["", *layer_table(name, record["result"])]
    write(OUT / "gpu.md", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + "\n")
    if os.environ.get("PARTS") and (last := folder / "last.pth.tar").exists():
        for old in OUT.glob("last.pth.tar.*"):
            old.unlink()
        content, size = last.read_bytes(), int(float(os.environ["PARTS"]) * 2**20)
        for i, start in enumerate(range(0, len(content), size)):
            (OUT / f"last.pth.tar.{i:02}").write_bytes(content[start : start + size])


def in_words(name, result):
    """A stage's result in a few words."""
    if name == "machine" and result:
        return f"{result['device']}, copy {result['copy_tb_s']:.2f} TB/s, bf16 product {result['tflop_s']:.0f} TFLOP/s"
    if name == "graph" and result:
        other = "eager and graph" if result["graphed"] else "eager and eager again, for want of a GPU"
        found = result["differences"].items()
        each = (f"{mode}: {other} {m['graph']:.1e}, eager twice {m['eager']:.1e}" for mode, m in found)
        return "; ".join(each)
    if name.startswith("profile") and result:
        steps = ", ".join(f"{k} {v:.1f}" for k, v in result["step_ms"].items())
        return f"a step in ms: {steps}; floor {result['floor_ms'][0]:.1f} to {result['floor_ms'][1]:.1f}"
    if name == "benchmark" and result:
        return f"times as fast as {result['baseline']}: " + ", ".join(
            f"{k} {v}" for k, v in result.get("train_speedup", {}).items()
        )
    if name == "recipe" and result:
        return f"test {result['test_acc']:.2f} %, {result['seconds']:.0f} s"
    return ""


def layer_table(name, result):
    heads = list(dict.fromkeys(key for row in result["layers"] for key in row["ms"]))
    lines = [f"| {name}: ms (floor by bytes) | {' | '.join(heads)} | GFLOP | floor of the layer, ms |"]
    lines.append("| --- " * (len(heads) + 3) + "|")
    for row in result["layers"]:
        cells = [f"{row['ms'].get(k, 0):.2f} ({row['bytes_ms'].get(k, 0):.2f})" for k in heads]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['gflop']:.1f} | {row['floor_ms']:.2f} |")
    return lines


# ---- The stages ------------------------------------------------------------------------------------------


def passes(**sizes):
    from fused.triton import TritonPasses

    return TritonPasses(**sizes)


def use_triton():
    """Have the fused engine use the Triton passes also on a CPU."""
    from fused import engine, guard

    if TOY:
        ours = passes()
        engine.backend = guard.backend = lambda device_type: ours


def toy_arch():
    """The net of the stages: its name in ARCHS, T, batch and image size."""
    from model import ARCHS

    ARCHS["toy"] = (8, "A", 16, "A"), (24,)
    return ("toy", 3, 4, 8) if TOY else ("vgg9", 25, 256, 32)


def milliseconds(work, repeats=1 if TOY else 10):
    """The median time of `work()`, after one call that is not timed."""
    import torch

    times = []
    for _ in range(repeats + 1):
        with Clock() as clock:
            work()
        times.append(clock.ms())
    return float(torch.tensor(times[1:]).median())


class Clock:
    """Milliseconds between entering and leaving, on the GPU's own clock where there is one."""

    def mark(self):
        import torch

        if DEVICE == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.start = self.mark()
        return self

    def __exit__(self, *exc):
        self.end = self.mark()

    def ms(self):
        if DEVICE == "cpu":
            return 1000 * (self.end - self.start)
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def machine():
    """The two ceilings: bytes and operations a second; and what the other stages' numbers depend on."""
    import torch
    import triton

    import runs

    count, side = (2**20, 128) if TOY else (2**30, 8192)
    source, target = torch.randn(2, count // 2, device=DEVICE), torch.empty(2, count // 2, device=DEVICE)
    copy = milliseconds(lambda: target.copy_(source))
    a, b = torch.randn(2, side, side, device=DEVICE, dtype=torch.bfloat16)
    product = milliseconds(lambda: a @ b)
    keep = ("git", "git_dirty", "date", "python", "torch")
    facts = {k: v for k, v in runs.environment(torch.device("cpu"), []).items() if k in keep}
    name = "a CPU" if TOY else torch.cuda.get_device_name()
    facts |= {"triton": triton.__version__, "device": name}
    return facts | {"copy_tb_s": 8 * count / copy / 1e9, "tflop_s": 2 * side**3 / product / 1e9}


def graph():
    """8 steps of train.py, eager twice and with a graph: the largest differences of what they leave.

    In float32 with SGD, in bf16 with AdamW, fused and plain.
    """
    import torch

    import fused
    import utill
    from model import SpikingVGG
    from train import build_optimizer, parse_args, set_learning_rate, train_step

    use_triton()
    arch, T, _, size = toy_arch()
    batch = 4 if TOY else 32

    def eight_steps(graphed, amp, engine):
        torch.manual_seed(0)
        net = SpikingVGG(arch, T, img_size=size).to(DEVICE).train()
        net = fused.attach(net) if engine == "fused" else net
        kind = ["--optimizer", "sgd", "--lr", "0.1"] if amp == "off" else ["--optimizer", "adamw", "--lr", "0.001"]
        optimizer = build_optimizer(net, parse_args([*kind, *([] if TOY else ["--cuda_graph"])]))
        scaler = torch.amp.GradScaler(DEVICE, enabled=False)
        step = partial(train_step, net, utill.CrossEntropy(), optimizer, scaler, amp)
        if graphed and not TOY:
            step = fused.GraphedStep(step)
        losses = []
        for i in range(8):
            if i == 6:
                set_learning_rate(optimizer, 0.0003)
            generator = torch.Generator().manual_seed(i)
            images = torch.randn(batch, 3, size, size, generator=generator).to(DEVICE)
            loss, *_ = step(images, torch.arange(batch, device=DEVICE) % 10)
            losses.append(loss.clone())
        momenta = [value for state in optimizer.state.values() for value in state.values()]
        return [torch.stack(losses), *net.state_dict().values(), *momenta]

    def largest(one, other):
        assert all(a.isfinite().all() for a in (*one, *other))
        return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(one, other, strict=True))

    differences = {}
    for deterministic in (False, True):
        if deterministic:
            utill.make_deterministic()
        for amp, engine in itertools.product(("off",) if TOY else ("off", "bf16"), ("fused", "plain")):
            eager, again, graphed = (eight_steps(graphed, amp, engine) for graphed in (False, False, True))
            mode = f"{'deterministic' if deterministic else 'as it is'}, {engine}, amp {amp}"
            differences[mode] = {"eager": largest(again, eager), "graph": largest(graphed, eager)}
    bad = [mode for mode, d in differences.items() if mode.startswith("det") and d["graph"] > 0]
    verdict = f"failed: not the same bits: {', '.join(bad)}" if bad else "done"
    return {"differences": differences, "verdict": verdict, "graphed": not TOY}


def kernels():
    """Every kernel once at a tiny size in each dtype, for compute-sanitizer."""
    import torch

    from fused import Shape

    triton = passes(tile=256, tile_back=256, channels=16, rows=24, chunk=3, programs=4)
    learnt = [torch.tensor(v, device=DEVICE) for v in (0.95, 1.0)]
    kinds = [(1, False, False, 0.95, 1.0), (2, True, False, 0.95, 1.0), (2, False, True, 0.95, 1.0)]
    kinds += [(2, False, False, *learnt), (1, True, False, *learnt)]
    for dtype in (torch.float32, torch.bfloat16):
        for kind in kinds:
            shape = Shape(7, 2, 5, 6, 20, *kind, 0.3)
            a = torch.rand(shape.T, shape.C, device=DEVICE) + 0.5
            x, grad = (torch.randn(sizes, device=DEVICE).to(dtype) for sizes in (shape.full, shape.pooled))
            membrane, carry = torch.zeros(2, shape.N, shape.C, device=DEVICE)
            packed = torch.empty(shape.pooled, dtype=torch.uint8, device=DEVICE)
            triton.statistics(x, shape)
            triton.lif_forward(x, shape, a, a, membrane.clone(), True, packed)
            sums = 3 if torch.is_tensor(shape.leak) else 2
            delta, _ = triton.lif_backward(x, shape, a, a, a, membrane, grad, carry, True, sums)
            triton.affine(delta, x, shape, a, a, a)
            triton.unpack(packed, 1.0, dtype)
    if not TOY:
        torch.cuda.synchronize()
    return {"kernels": "ran"}


def sanitizer(tool):
    """Those kernels under one tool of compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    command = [*([found, "--tool", tool, "--error-exitcode", "9"] if found else []), *ours("kernels")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).splitlines()
    result = {"said": said[-15:]}
    if done.returncode:
        summary = next((line for line in said if "SUMMARY" in line), f"exit code {done.returncode}")
        return result | {"verdict": f"failed: {summary.strip('= ')}"}
    return result | {"verdict": "done" if found else "left out: compute-sanitizer is not here; the kernels ran without"}


def traffic(shape, fan_in, inputs, size, first):
    """({pass: bytes}, operations) that one training step of a layer needs at least.

    shape: of the layer. fan_in: weights of one of its neurons. inputs: numbers that it sees, over all steps. size:
    bytes of a number. first: whether nothing before it wants a gradient. Each input is read and each output written
    once; weights, statistics and what belongs to a channel are too small to count.
    """
    full, pooled = shape.T * shape.N * shape.C, shape.T * shape.B * (shape.H // shape.pool) ** 2 * shape.C
    moved = {
        "synapse": size * (inputs + full),
        "statistics": size * full,
        "lif_forward": size * (full + pooled) + pooled,
        "lif_backward": size * (2 * full + pooled),
        "affine": 3 * size * full,
        "unpack": 0 if first else (1 + size) * inputs,
        "synapse_backward": size * (full + inputs + (0 if first else full + inputs)),
    }
    return moved, 2 * full * fan_in * (2 if first else 3)


def profile(dtype):
    """Time of each pass of each layer in a training step, beside what it needs at least; and of a whole step."""
    import torch
    from benchmark import Process

    from fused import engine

    use_triton()
    arch, T, batch, size = toy_arch()
    ceilings = json.loads((WORK / "machine.json").read_text()).get("result")
    name = {"bf16": "ours-fused-bf16", "float32": "ours-fused"}[dtype]
    spec = dict(arch=arch, num_steps=T, batch_size=batch, img_size=size, device=DEVICE, threads=1, authors=None)
    process = Process(spec | {"contender": name})
    step_ms = {"eager": step(process)}
    peak = 0 if TOY else torch.cuda.max_memory_allocated() / 1e6
    layers = timed_layers(process, engine)
    if dtype == "bf16" and not TOY:
        step_ms["graph"] = step(Process(spec | {"contender": f"{name}-graph"}))
    net, item = process.net, 2 if dtype == "bf16" else 4
    rows, inputs = [], T * batch * 3 * size * size
    for i, (shape, layer) in enumerate(zip(engine.shapes(net, batch, T), net.layers(), strict=True)):
        moved, operations = traffic(shape, layer.synapse.weight[0].numel(), inputs, item, i == 0)
        inputs = T * batch * (shape.H // shape.pool) ** 2 * shape.C
        bytes_ms = {key: value / ceilings["copy_tb_s"] / 1e9 for key, value in moved.items()}
        floor = max(sum(bytes_ms.values()), operations / ceilings["tflop_s"] / 1e9)
        row = {"name": layer.name, "ms": layers[i], "bytes_ms": bytes_ms, "bytes": moved, "gflop": operations / 1e9}
        rows.append(row | {"floor_ms": floor, "flop_ms": operations / ceilings["tflop_s"] / 1e9})
    bytes_ms, flop_ms = sum(sum(row["bytes_ms"].values()) for row in rows), sum(row["flop_ms"] for row in rows)
    floor_ms = [max(bytes_ms, flop_ms), bytes_ms + flop_ms]
    return {"step_ms": step_ms, "floor_ms": floor_ms, "layers": rows, "peak_mb": peak}


def step(process):
    """Milliseconds of a training step, after some that compile, and capture."""
    process.time("train", 1 if TOY else 5)
    return 1000 * process.time("train", 1 if TOY else 10)


def timed_layers(process, engine):
    """[{pass: ms}] of each layer in one eager training step; each pass is timed by itself."""
    run, ours = engine.Run, engine.backend(DEVICE)
    clocks, at = [], {"layer": 0}

    def timed(name, call, *arguments, **options):
        with Clock() as clock:
            result = call(*arguments, **options)
        clocks.append((at["layer"], name, clock))
        return result

    def synapse(name, call, run_, i, *arguments):
        at["layer"] = i
        return timed(name, call, run_, i, *arguments)

    def backward(call, *arguments, **options):
        at["layer"] -= 1
        return timed("lif_backward", call, *arguments, **options)

    names = ("statistics", "lif_forward", "affine", "unpack")
    kept = {name: getattr(run, name) for name in ("synapse", "synapse_backward", "output")}

    def output(self, *arguments):
        at["layer"] = len(self.layers)  # the backward pass begins with the output layer, then comes the last
        return kept["output"](self, *arguments)

    run.output = output
    for name in ("synapse", "synapse_backward"):
        setattr(run, name, lambda self, i, *rest, name=name: synapse(name, kept[name], self, i, *rest))
    for name in names:
        setattr(ours, name, partial(timed, name, getattr(ours, name)))
    ours.lif_backward = partial(backward, ours.lif_backward)
    process.train()
    clocks.clear()
    process.train()
    process.synchronize()
    for name, function in kept.items():
        setattr(run, name, function)
    for name in (*names, "lif_backward"):
        delattr(ours, name)
    layers = [{} for _ in process.net.layers()]
    for layer, name, clock in clocks:
        if layer < len(layers):
            layers[layer][name] = layers[layer].get(name, 0) + clock.ms()
    return layers


def toy_data():
    """A tree of 10 classes with a few images of noise each, in WORK/toy."""
    import numpy as np
    from PIL import Image

    from image_data import CIFAR_CLASSES

    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for name in CIFAR_CLASSES["CIFAR10"].split():
            folder = WORK / "toy" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                if not (path := folder / f"{i}.png").exists():
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return {}


if __name__ == "__main__":
    os.chdir(ROOT)
    word, *more = sys.argv[1:]
    if word == "all":
        sys.exit(run_all(more))
    print(json.dumps({f.__name__: f for f in (machine, graph, kernels, sanitizer, profile, toy_data)}[word](*more)))
