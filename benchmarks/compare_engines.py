"""What rounding does to a spiking net, and whether it matters: the engines beside each other.

    python benchmarks/compare_engines.py --seeds 3

First one training step of a fresh VGG9 (32x32, T = 25, batch 16, noise images) in each engine and precision,
beside the plain loop in float32: the share of spikes that differ, and the cosine between the gradients. The
plain loop with channels-last weights differs from itself in nothing but the order of summation.
Then training on digits with several seeds: do the engines reach the same accuracy?

Writes results/engines/result.json and prints tables; the last line of stdout is the same JSON as one line.
Flags it does not know go to train.py.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root

import torch
import torch.nn.functional as F

import fused
from model import SNN_VGG9_BNTT
from runs import write_json
from utill import UserError, entry_point

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = {
    "plain float32": ["--engine", "plain", "--amp", "off"],
    "fused float32": ["--engine", "fused", "--amp", "off"],
    "fused bfloat16": ["--engine", "fused", "--amp", "bf16"],
}


def spikes_and_gradients(net, images, labels, dtype):
    """(every spike of every layer, flat bool; {layer: gradient of its weights, flat}) of one training step."""
    seen, handles = {}, []
    for layer in net.layers():
        hook = lambda module, inputs, output, n=layer.name: seen.setdefault(n, []).append(output[0] > 0)  # noqa: E731
        handles.append(layer.lif.register_forward_hook(hook))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = net(images)
    F.cross_entropy(logits, labels).backward()
    for handle in handles:
        handle.remove()
    spikes = torch.cat([step.flatten() for steps in seen.values() for step in steps])
    return spikes, {layer.name: layer.synapse.weight.grad.flatten() for layer in net.layers()}


def compare_one_step():
    """{engine and precision: share of flipped spikes, least cosine of a layer's gradient}, against plain float32."""
    torch.manual_seed(0)
    net = SNN_VGG9_BNTT(25)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    reference, gradients = spikes_and_gradients(copy.deepcopy(net), images, labels, "float32")
    rows = {}
    for name in ("plain channels-last float32", "fused float32", "plain bfloat16", "fused bfloat16"):
        other, dtype = copy.deepcopy(net), name.split()[-1]
        if "channels-last" in name:
            other = other.to(memory_format=torch.channels_last)
        if name.startswith("fused"):
            fused.attach(other)
        spikes, theirs = spikes_and_gradients(other, images, labels, dtype)
        cosine = min(F.cosine_similarity(gradients[n], theirs[n], dim=0).item() for n in gradients)
        rows[name] = {"flipped": (spikes != reference).float().mean().item(), "cosine": cosine}
    return rows


def train(name, seed, out, more):
    """result.json of one run of train.py, and its environment."""
    folder = out / f"{name.replace(' ', '_')}_seed{seed}"
    command = [sys.executable, "train.py", "--config", "configs/digits_vgg9.yaml", "--seed", str(seed)]
    command += ["--run_dir", str(folder), "--overwrite", *CONTENDERS[name], *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"train.py failed for {name}, seed {seed}: {(done.stderr.splitlines() or ['no message'])[-1]}")
    environment = json.loads((folder / "environment.json").read_text())
    return json.loads(done.stdout.splitlines()[-1]), environment


@entry_point
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "engines", help="where result.json goes")
    args, more = parser.parse_known_args(argv)  # what else there is goes to train.py
    if args.seeds < 1:
        raise UserError("--seeds must be at least 1")
    step = compare_one_step()
    print(
        "| one training step, against plain float32 | spikes that differ | least gradient cosine |\n| --- | --- | --- |"
    )
    for name, row in step.items():
        print(f"| {name} | {row['flipped']:.2e} | {row['cosine']:.4f} |", flush=True)
    table = {}
    print("\n| engine | test accuracy, % | mean | deviation | seconds a run |\n| --- | --- | --- | --- | --- |")
    for name in CONTENDERS:
        runs = [train(name, seed, ROOT / "runs" / "compare_engines", more) for seed in range(args.seeds)]
        accuracies = [result["test_acc"] for result, _ in runs]
        row = {
            "test_acc": accuracies,
            "mean": statistics.mean(accuracies),
            "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "seconds": statistics.median(result["seconds"] for result, _ in runs),
        }
        table[name] = row
        shown = ", ".join(f"{a:.2f}" for a in accuracies)
        spread = "-" if row["deviation"] is None else f"{row['deviation']:.2f}"
        print(f"| {name} | {shown} | {row['mean']:.2f} | {spread} | {row['seconds']:.0f} |", flush=True)
    keep = ("device", "threads", "python", "torch", "torchvision", "numpy", "platform", "date", "git")
    environment = {key: runs[-1][1].get(key) for key in keep}
    command = " ".join(["python benchmarks/compare_engines.py", f"--seeds {args.seeds}", *more])
    result = {"command": command, "one_step": step, "engines": table, "environment": environment}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
