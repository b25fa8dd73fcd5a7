"""Compare our nets with the authors' own code, number by number.

    git clone https://github.com/Intelligent-Computing-Lab-Yale/BNTT-Batch-Normalization-Through-Time authors
    python benchmarks/check_authors.py --authors authors                     # HEAD: integrate, then fire
    git -C authors checkout 701d259                                          # their first upload
    python benchmarks/check_authors.py --authors authors --order fire_first

Their model.py is imported from the folder you name; nothing of theirs is copied or changed on disk.
It asks for a GPU; the check runs on the CPU, with `Tensor.cuda` doing nothing for as long as it takes.

For VGG9 and VGG11, from one seed, in float64: initial weights (bit for bit), state dicts loaded
strictly both ways, logits, every gradient and running statistic of a training pass, logits in eval mode.
Then a few SGD steps in float32, whose weights should be the same bit for bit.

Exit code 0: nothing differs by more than 1e-10. 1: something does. 2: the path or an option is wrong.
The last line is one JSON object.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root
import model

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-10
BUILDERS = {"vgg9": "SNN_VGG9_BNTT", "vgg11": "SNN_VGG11_BNTT"}
SGD = dict(lr=0.3, momentum=0.9, weight_decay=1e-4)
SGD_STEPS = 3
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", required=True, metavar="PATH", help="folder with the authors' model.py")
    parser.add_argument(
        "--order", default="integrate_first", choices=model.LIF.ORDERS, help="spike order of that commit"
    )
    parser.add_argument("--num_steps", type=int, default=25, help="time-steps; fire_first needs at least 12")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.order == "fire_first" and args.num_steps < 12:
        stop("fire_first delays every layer by a step, so --num_steps below 12 compares little but zeros.")
    if args.num_steps < 1 or args.batch_size < 2 or args.img_size < 16:
        stop("--num_steps must be at least 1, --batch_size at least 2 and --img_size at least 16.")
    return args


def stop(sentence):
    print(f"check_authors.py: {sentence}", file=sys.stderr)
    sys.exit(2)


def import_authors(folder):
    """Their model.py as a module, without leaving a bytecode cache in their folder."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        stop(f"there is no model.py in {folder}: name a clone of the authors' repository.")
    if path.samefile(ROOT / "model.py"):
        stop(f"{folder} is this repository: name a clone of the authors'.")
    spec = importlib.util.spec_from_file_location("authors_model", path)
    module = importlib.util.module_from_spec(spec)
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        stop(f"{path} cannot be imported ({type(error).__name__}: {error}).")
    finally:
        sys.dont_write_bytecode = keep
    if not all(hasattr(module, builder) for builder in BUILDERS.values()):
        stop(f"{path} does not define {' and '.join(BUILDERS.values())}: it is not the authors'.")
    return module


@contextlib.contextmanager
def on_cpu(dtype):
    """Default dtype, and `.cuda()` as the identity, which their code needs to run without a GPU."""
    cuda, default = torch.Tensor.cuda, torch.get_default_dtype()
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda
        torch.set_default_dtype(default)


def build_pair(authors, arch, args):
    """(theirs, ours) from the same seed, and how many of their norms came with a beta, now taken off."""
    shape = dict(leak_mem=0.95, img_size=args.img_size, num_cls=10)
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(io.StringIO()):  # their constructors print
        theirs = getattr(authors, BUILDERS[arch])(args.num_steps, **shape)
    torch.manual_seed(args.seed)
    ours = getattr(model, BUILDERS[arch])(args.num_steps, **shape, spike_order=args.order)
    betas = [m for m in theirs.modules() if isinstance(m, BATCH_NORM) and m.bias is not None]
    for norm in betas:
        norm.bias = None
    return theirs, ours, len(betas)


def make_batch(args, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator)
    return images, torch.randint(10, (args.batch_size,), generator=generator)


def train_pass(net, images, labels, seed):
    """Forward and backward; returns the logits."""
    torch.manual_seed(seed)
    logits = net(images)
    F.cross_entropy(logits, labels).backward()
    return logits.detach()


@torch.no_grad()
def eval_pass(net, images, seed):
    """Logits in eval mode, with the running statistics of one batch: those of a fresh net silence it."""
    for module in net.modules():
        if isinstance(module, BATCH_NORM):
            module.momentum = 1.0
    for mode in (True, False):
        torch.manual_seed(seed)
        logits = net.train(mode)(images)
    return logits


def compare(theirs, ours):
    """Two {name: tensor or None} -> a row of the table."""
    if theirs.keys() != ours.keys():
        raise SystemExit(f"the names differ: {sorted(theirs.keys() ^ ours.keys())}")
    both = [(theirs[k], ours[k]) for k in theirs if theirs[k] is not None and ours[k] is not None]
    both = [(a.double(), b.double()) for a, b in both]
    return {
        "max_abs_diff": torch.stack([(a - b).abs().max() for a, b in both]).max().item(),
        "max_abs_value": torch.stack([a.abs().max() for a, _ in both]).max().item(),
        "tensors": len(both),
        "none_in_both": sum(theirs[k] is None and ours[k] is None for k in theirs),
        "none_in_one": sum((theirs[k] is None) != (ours[k] is None) for k in theirs),
    }


def complaint(row):
    """What is wrong with a row of the table, or "" if it agrees."""
    if not row["max_abs_diff"] <= TOLERANCE or row["none_in_one"]:  # a NaN differs
        return "differs"
    return "" if row["max_abs_value"] > 0 else "all zero: compares nothing"


def compare_pass(authors, arch, args):
    """{quantity: row} of one training pass and one eval pass in float64, and the number of betas taken off."""
    with on_cpu(torch.float64):
        theirs, ours, betas = build_pair(authors, arch, args)
        rows = {"initial weights": compare(dict(theirs.named_parameters()), dict(ours.named_parameters()))}
        same_start = all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)

        images, labels = make_batch(args, args.seed + 1)
        logits = [train_pass(net, images, labels, args.seed + 2) for net in (theirs, ours)]
        rows["logits, training"] = compare({"logits": logits[0]}, {"logits": logits[1]})
        grads = [{name: p.grad for name, p in net.named_parameters()} for net in (theirs, ours)]
        rows["gradients"] = compare(*grads)
        rows["running statistics"] = compare(dict(theirs.named_buffers()), dict(ours.named_buffers()))
        logits = [eval_pass(net, images, args.seed + 3) for net in (theirs, ours)]
        rows["logits, eval"] = compare({"logits": logits[0]}, {"logits": logits[1]})
    return rows, betas, same_start


def compare_sgd(authors, arch, args):
    """Train both for a few float32 steps; return (bit for bit the same?, row of the state dicts)."""
    with on_cpu(torch.float32):
        theirs, ours, _ = build_pair(authors, arch, args)
        for net in (theirs, ours):
            optimizer = torch.optim.SGD(net.parameters(), **SGD)
            for step in range(SGD_STEPS):
                optimizer.zero_grad()
                train_pass(net, *make_batch(args, args.seed + 10 + step), seed=args.seed + 20 + step)
                optimizer.step()
        states = theirs.state_dict(), ours.state_dict()
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0]), compare(*states)


def main():
    args = parse_args()
    authors = import_authors(args.authors)
    print(f"{args.order}, T = {args.num_steps}, {args.img_size}x{args.img_size}, batch {args.batch_size}, CPU")
    report, passed = {}, True
    for arch in BUILDERS:
        rows, betas, same_start = compare_pass(authors, arch, args)
        print(f"\n{arch}, float64")
        if betas:
            print(f"  (their code leaves the beta of {betas} norms on; it was set to None before comparing)")
        header = f"{'max |difference|':>16} {'max |value|':>12} {'tensors':>8} {'None in both':>13} {'in one':>7}"
        print(f"  {'':<20} {header}")
        for name, row in rows.items():
            numbers = f"{row['max_abs_diff']:>16.3g} {row['max_abs_value']:>12.4g} {row['tensors']:>8}"
            print(
                f"  {name:<20} {numbers} {row['none_in_both']:>13} {row['none_in_one']:>7}  {complaint(row)}".rstrip()
            )
        print(f"  initial weights bit for bit the same: {'yes' if same_start else 'NO'}")
        print("  state dicts load strictly both ways")
        identical, row = compare_sgd(authors, arch, args)
        difference = "bit for bit the same" if identical else f"max |difference| {row['max_abs_diff']:.3g}"
        print(f"  after {SGD_STEPS} SGD steps in float32, weights and statistics: {difference}")
        arch_passed = same_start and not any(map(complaint, rows.values()))
        passed = passed and arch_passed
        report[arch] = {
            "passed": arch_passed,
            "max_abs_diff": {name: finite(row["max_abs_diff"]) for name, row in rows.items()},
            "betas_removed": betas,
            "sgd_bit_identical": identical,
        }
    if not passed:
        print("\nNo agreement. Is the folder at the right commit (HEAD: integrate_first, 701d259: fire_first)?")
    worst = max((d for r in report.values() for d in r["max_abs_diff"].values() if d is not None), default=None)
    summary = dict(order=args.order, num_steps=args.num_steps, tolerance=TOLERANCE, max_abs_diff=worst, passed=passed)
    print(json.dumps({**summary, **report}))
    return 0 if passed else 1


def finite(number):
    return number if math.isfinite(number) else None


if __name__ == "__main__":
    sys.exit(main())
