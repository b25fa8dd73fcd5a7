"""Make a trained net part of the code: weights/NAME.pth in half precision, its row in index.json and README.md there.

    python scripts/publish_weights.py results/x/seed0/best.pth.tar cifar10_vgg9_T4 --data_dir data/cifar10

The accuracy in the row is that of the very file, by test.py on all test images, on the mean of --repeats Poisson draws.
Weights are rounded to float16; the statistics and gammas of norms stay float32. Of the settings, the
folder of the data is dropped.
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root

import torch
from make_tables import table

import nets
import runs
from arguments import ArgumentParser, path, positive_int
from utill import UserError, entry_point

MOST_BYTES = 13 * 2**20
FEW = 500  # images whose accuracy a test asks for
LOCAL = {"data_dir": "./data", "device": "auto", "engine": "auto", "amp": "off", "save_memory": None}


def halved(checkpoint):
    """The part of a run's checkpoint that makes the net again, in half precision where it may be."""
    state = {
        name: tensor.half() if re.fullmatch(r"(conv|fc)\d+\.weight", name) else tensor.clone()
        for name, tensor in checkpoint["state_dict"].items()
    }
    config = {key: LOCAL.get(key, value) for key, value in checkpoint["config"].items()}
    config |= dict.fromkeys({"init_from", "converted_from"} & config.keys())  # names of files
    kept = {key: checkpoint[key] for key in ("data", "held_out") if key in checkpoint}
    return {"state_dict": state, "config": config, **kept}


def tested(file, *flags):
    """What test.py prints of a checkpoint; its own errors go to the user."""
    command = [sys.executable, "test.py", str(file), *flags]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise UserError("test.py could not test it")
    return json.loads(done.stdout.splitlines()[-1])


START, END = "<!-- nets: written by scripts/publish_weights.py -->\n", "<!-- end -->"


def page(text, index):
    """The text of weights/README.md with the table of the nets in `index`."""
    heads = ["name", "net", "data", "T", "test accuracy, %", "test images", "bytes", "sha256"]
    rows = []
    for name, row in index.items():
        net = ", ".join(str(row[key]) for key in ("arch", "norm", "encoding"))
        spread = f" ± {row['deviation']:.2f} over {row['repeats']} draws" if row["deviation"] is not None else ""
        told = [f"{row['test_acc']:.2f}{spread}", f"{row['count']:,}", f"{row['bytes']:,}", f"{row['sha256'][:12]}..."]
        rows.append([f"`{name}`", net, row["dataset"], str(row["num_steps"]), *told])
    before, after = text.split(START)
    return before + START + table(heads, rows) + after[after.index(END) :]


@entry_point
def main(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=path, help="best.pth.tar of a run")
    parser.add_argument("name", help="of the net in nets.WEIGHTS")
    parser.add_argument("--data_dir", default="./data", type=path, help="where the data lie")
    parser.add_argument("--repeats", default=1, type=positive_int, help="Poisson draws of the accuracy")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\w+", args.name, re.ASCII):
        raise UserError(f"{args.name} is no name: letters, digits and _")
    checkpoint = runs.load_checkpoint(args.checkpoint)
    if "config" not in checkpoint:
        raise UserError(f"{args.checkpoint} does not hold its settings: only a run can be published")
    kept = ("dataset", "arch", "norm", "encoding", "num_steps", "leak_mem", "seed")
    row = {key: checkpoint["config"].get(key) for key in kept}
    file, index = nets.SHIPPED / f"{args.name}.pth", nets.SHIPPED / "index.json"
    if file.exists():
        raise UserError(f"{file} is there: a file of weights is made once (delete it first, if it was never committed)")
    runs.save_checkpoint(file, halved(checkpoint))
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file} would have {file.stat().st_size:,} bytes, more than {MOST_BYTES:,}")
        data = ["--data_dir", str(Path(args.data_dir).resolve())]
        full = tested(file.resolve(), *data, "--repeats", str(args.repeats))
        few = tested(file.resolve(), *data, "--limit_test", str(FEW))
    except BaseException:
        file.unlink()
        raise
    row |= {"test_acc": full["top1"], "deviation": full["top1_std"], "repeats": args.repeats, "count": full["count"]}
    row |= {f"test_acc_{FEW}": few["top1"], "bytes": file.stat().st_size}
    row |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "torch": torch.__version__}
    nets.WEIGHTS[args.name] = row
    runs.write_json(index, nets.WEIGHTS)
    readme = nets.SHIPPED / "README.md"
    if readme.exists():
        runs.write_text(readme, page(readme.read_text(encoding="utf-8"), nets.WEIGHTS))
    print(f"{file} and its row in {index} are written")
    print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
