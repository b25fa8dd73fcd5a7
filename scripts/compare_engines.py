"""Train VGG9 on digits with each engine and several seeds: do they reach the same accuracy?

    python scripts/compare_engines.py --seeds 3

Contenders: the plain loop and the fused engine in float32, and the fused engine in bfloat16. Writes
results/engines/result.json and prints a table; the last line of stdout is the same JSON as one line.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utill import UserError, entry_point, write_json  # noqa: E402

CONTENDERS = {
    "plain float32": ["--engine", "plain", "--amp", "off"],
    "fused float32": ["--engine", "fused", "--amp", "off"],
    "fused bfloat16": ["--engine", "fused", "--amp", "bf16"],
}


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
    table = {}
    print("| engine | test accuracy, % | mean | deviation | seconds a run |\n| --- | --- | --- | --- | --- |")
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
    command = " ".join(["python scripts/compare_engines.py", f"--seeds {args.seeds}", *more])
    result = {"command": command, "engines": table, "environment": environment}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
