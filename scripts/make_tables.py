"""Write the README's tables of results from the runs under results/, so that no number in them is typed.

    python scripts/make_tables.py            # after a run has been added
    python scripts/make_tables.py --check    # exits with 1 if README.md is not up to date

The runs of an experiment are results/<experiment>/seed<k>/ as train.py left them, or results/<experiment>/
itself where there is one alone: result.json, with config.yaml, log.jsonl and early_exit.json where there are
such. A new row is one line of TABLES. A new table is one entry of it and, where it is to stand in the README,

    <!-- NAME: written by scripts/make_tables.py -->
    <!-- end -->
"""

import fnmatch
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

import train  # noqa: E402
from arguments import ArgumentParser  # noqa: E402
from runs import write_text  # noqa: E402
from utill import UserError, entry_point, reason_of  # noqa: E402


class Row(NamedTuple):
    """A row of a table.

    title: {norm} in it becomes the runs' norm. T: time-steps, None for those of the runs. paper: its accuracy
    in %, or None. mark: where `paper` is from: P the paper's text, S and M as in MARKS; "?" if the paper's value
    is unknown, "" if there is none: such a row is left out until it has been run. runs: folder under results/;
    with a * each folder becomes a row. how: the command, until runs bring theirs. note: a footnote. exit: the
    paper's early exit (step, accuracy, mark). settings: dataset, arch and norm that the runs must have, * for
    any. wilson: show the 95 % interval that the size of the test set allows.
    """

    title: str
    T: int | None
    paper: float | None
    mark: str
    runs: str
    how: str
    note: str = ""
    exit: tuple | None = None
    settings: str = "* * *"
    wilson: bool = False


class Run(NamedTuple):
    """One run: its folder, and result.json, config.yaml and early_exit.json as dicts, {} for those it lacks; the
    command of environment.json, or ""."""

    folder: Path
    result: dict
    config: dict
    exit: dict
    command: str


class Table(NamedTuple):
    """columns: {heading: function of (row, its runs, page)}, the text of a cell. all_rows: also those not yet run
    of which the paper has nothing."""

    columns: dict[str, Callable]
    rows: list[Row]
    all_rows: bool = False


MARKS = {
    "S": "As quoted by another publication; the paper's own table was not at hand.",
    "M": "From memory of the literature, unverified: not to be quoted as the paper's value.",
}
NORMS = {"bntt": "BNTT", "bn": "one BN for all steps", "none": "no BN"}

# What may differ between the seeds of one row: it is no part of the method.
FREE = {
    "seed", "data_dir", "num_workers", "device", "engine", "save_memory", "save_every", "data_on_device", "cuda_graph",
    "deterministic", "train_display_freq", "test_display_freq",
}  # fmt: skip

# ---- Reading runs --------------------------------------------------------------------------------

KINDS = {
    "text": lambda x: isinstance(x, str),
    "an integer of at least 0": lambda x: type(x) is int and x >= 0,
    "an integer of at least 1": lambda x: type(x) is int and x >= 1,
    "a percentage": lambda x: type(x) in (int, float) and 0 <= x <= 100,
    "a positive number": lambda x: type(x) in (int, float) and 0 < x < math.inf,
}
RESULT = {
    "text": ("dataset", "arch", "norm"),
    "an integer of at least 0": ("seed",),
    "an integer of at least 1": ("num_steps", "count", "epoch", "train_images"),
    "a percentage": ("test_acc",),
}
EXIT = {
    "an integer of at least 1": ("exit_step", "num_steps", "count"),
    "a percentage": ("acc_exit",),
    "a positive number": ("gamma_threshold",),
}


def read(path, parse):
    """What `parse` makes of the text of a file; UserError where it cannot."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {reason_of(error)}") from None


def read_record(path, needed):
    """The JSON object of a file; UserError unless it has every key of `needed` {kind: keys}."""
    record = read(path, json.loads)
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no JSON object")
    for kind, keys in needed.items():
        for key in keys:
            if key not in record:
                raise UserError(f"{path} lacks {key}")
            if not KINDS[kind](record[key]):
                raise UserError(f"{path}: {key} must be {kind}, got {str(record[key])[:100]!r}")
    return record


def read_run(folder):
    result = read_record(folder / "result.json", RESULT)
    path, config, found = folder / "config.yaml", {}, {}
    if path.exists():
        config = read(path, yaml.safe_load)
        if not isinstance(config, dict):
            raise UserError(f"{path} holds no list of flags")
    path = folder / "early_exit.json"
    if path.exists():
        found = read_record(path, EXIT)
        for key in ("num_steps", "count"):
            if found[key] != result[key]:
                raise UserError(f"{path} is not of the run beside it: its {key} is {found[key]}, not {result[key]}")
    path, command = folder / "environment.json", ""
    if path.exists():
        command = read_record(path, {"text": ("command",)})["command"]
    run = Run(folder, result, config, found, command)
    check_command(run)
    return run


def check_command(run):
    """UserError if the command that the table shows would now train something else: a config has changed since."""
    script, *argv = shlex.split(run.command) or [""]
    if script != "train.py" or not run.config:
        return
    before = [script, *argv[:-1]]
    argv = [str(ROOT / word) if flag == "--config" else word for flag, word in zip(before, argv, strict=True)]
    for key, value in vars(train.parse_args(argv)).items():
        if key in run.config and key not in FREE and value not in (None, "auto", run.config[key]):
            raise UserError(
                f"{run.folder} was trained with --{key} {run.config[key]}, its command would now take {value}: "
                f"train it again, or remove it"
            )


def runs_in(folder):
    """The runs of an experiment by seed; [] if there is none. Its own result.json counts where no seed has one."""
    seeds = [path for path in folder.glob("seed*") if re.fullmatch(r"seed\d+", path.name)]
    seeds = [path for path in seeds if (path / "result.json").exists()]
    if not seeds and (folder / "result.json").exists():
        seeds = [folder]
    return sorted(map(read_run, seeds), key=lambda run: run.result["seed"])


def settings_of(run):
    """All that the runs of one row must have in common."""
    measured = {key: run.result[key] for key in ("dataset", "arch", "norm", "num_steps", "count", "train_images")}
    return {key: value for key, value in run.config.items() if key not in FREE} | measured


def check(row, runs):
    """UserError unless the runs are what the row says and differ in nothing but their seeds."""
    first = runs[0]
    for run in runs:
        path, result = run.folder / "result.json", run.result
        settings = [result[key] for key in ("dataset", "arch", "norm")]
        if not all(map(fnmatch.fnmatchcase, settings, row.settings.split())):
            raise UserError(f"{path} is a run of {' '.join(settings)}, the row {row.title!r} wants {row.settings}")
        if row.T not in (None, result["num_steps"]):
            raise UserError(f"{path} is a run of T = {result['num_steps']}, the row {row.title!r} wants {row.T}")
        ours, theirs = settings_of(run), settings_of(first)
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key] != theirs[key]:
                raise UserError(
                    f"{path} and {first.folder / 'result.json'} cannot share a row: "
                    f"{key} is {ours[key]} in one and {theirs[key]} in the other"
                )
    seeds = [run.result["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{first.folder.parent} holds two runs of one seed: {', '.join(map(str, seeds))}")


def find(row, results, always=False):
    """[(row, runs)] of one declared row: an entry for each folder that its pattern finds, or one without runs."""
    folders = results.glob(row.runs) if "*" in row.runs else [results / row.runs]
    found = [runs for runs in map(runs_in, sorted(folders)) if runs]
    for runs in found:
        check(row, runs)
    found.sort(key=lambda runs: (runs[0].result["num_steps"], runs[0].result["train_images"]))
    return [(row, runs) for runs in found or ([[]] if row.mark or always else [])]


# ---- Numbers -------------------------------------------------------------------------------------


def mean_and_deviation(values):
    """'90.12', or '90.12 ± 0.34' for two and more."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def wilson(percent, count, z=1.96):
    """The 95 % Wilson interval, in %, of a share of `percent` % that was seen in `count` trials."""
    p = percent / 100
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * (centre - half), 100 * (centre + half)


def span(numbers):
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def spikes_per_image(run):
    """Spikes of all layers over all T for a test image, from log.jsonl; None where it was not measured."""
    path = run.folder / "log.jsonl"
    if not path.exists():
        return None
    records = read(path, lambda text: [json.loads(line) for line in text.splitlines()])
    found = [x.get("spikes_per_image") for x in records if x.get("epoch") == run.result["epoch"]]
    return found[-1] if found else None


# ---- Cells ---------------------------------------------------------------------------------------


class Page:
    """The file that holds the tables: links from its folder, and the footnotes of all its tables.

    One text has one label, and is written out below the first table that cites it.
    """

    def __init__(self, folder):
        self.folder, self.labels, self.due = folder, {}, []

    def cite(self, text, label=None):
        """The reference to `text`, "" for none."""
        if not text:
            return ""
        if text not in self.labels:
            self.labels[text] = label or str(1 + sum(known.isdigit() for known in self.labels.values()))
            self.due.append(f"[^{self.labels[text]}]: {text}")
        return f" [^{self.labels[text]}]"

    def take_due(self):
        due, self.due = self.due, []
        return due

    def path(self, path):
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def link(self, runs, text):
        """`text`, linked to the folder of the runs."""
        return f"[{text}]({quote(self.path(runs[0].folder if len(runs) == 1 else runs[0].folder.parent))})"


def title_cell(row, runs, page):
    norm = runs[0].result["norm"] if runs else ""
    batches = runs[0].config.get("precise_bn") if runs else None
    precise = f"Tested with the statistics of {batches} training batches (`--precise_bn`, not in the paper)."
    return row.title.format(norm=NORMS.get(norm, norm)) + page.cite(row.note) + page.cite(precise if batches else "")


def steps_cell(row, runs, page):
    return str(runs[0].result["num_steps"] if runs else row.T or "")


def paper_cell(row, runs, page):
    if row.paper is None:
        return "unknown" if row.mark == "?" else "–"
    cell = f"{row.paper:.1f}" + page.cite(MARKS.get(row.mark), row.mark.lower())
    if row.exit:
        step, accuracy, mark = row.exit
        cell += f"<br>exit at {step}: {accuracy:.1f}" + page.cite(MARKS.get(mark), mark.lower())
    return cell


def here_cell(row, runs, page):
    if not runs:
        return "not yet run"
    accuracies = [run.result["test_acc"] for run in runs]
    cell = page.link(runs, mean_and_deviation(accuracies))
    if row.wilson:
        low, high = wilson(statistics.mean(accuracies), runs[0].result["count"])
        cell += f" ({low:.2f} to {high:.2f})" + page.cite(
            "In brackets the 95 % Wilson interval: what so few test recordings allow to be said.", "w"
        )
    exits = exit_text(runs)
    return cell + (f"<br>{exits}" if exits else "")


def exit_text(runs):
    """Step and accuracy of the early exit, "" where no run has been asked for it."""
    exits = [run.exit for run in runs if run.exit]
    if not exits:
        return ""
    text = f"exit at {span([x['exit_step'] for x in exits])}: {mean_and_deviation([x['acc_exit'] for x in exits])}"
    if all(x["exit_step"] == x["num_steps"] for x in exits):
        text = f"no exit before {exits[0]['num_steps']}"
    thresholds = [x["gamma_threshold"] for x in exits]
    if set(thresholds) != {0.1}:
        text += f" (gamma threshold {span(thresholds)})"
    return text + (f" (n = {len(exits)})" if len(exits) < len(runs) else "")


def data_cell(row, runs, page):
    if not runs:
        return ""
    first = runs[0].result
    counted = f"{first['train_images']:,} / {first['count']:,}"
    if first["dataset"] == "dvs_cifar10" and "dvs_split" in runs[0].config:  # it has no official one
        counted += f" ({runs[0].config['dvs_split']} split)"
    return f"{counted}, epoch {span([run.result['epoch'] for run in runs])}, n = {len(runs)}"


def how_cell(row, runs, page):
    """The command that was run, without what does not change its numbers; else the one to run."""
    command = row.how
    if runs and runs[0].command:
        words = shlex.split(re.sub(r"(--\w+)=", r"\1 ", runs[0].command))
        dropped = {"--resume": 1, "--run_dir": 2, "--save_every": 2, "--seed": 2, "--data_dir": 2}
        kept = []
        while words:
            count = dropped.get(words[0], 0)
            kept += [] if count else words[:1]
            words = words[count or 1 :]
        command = shlex.join(["python", *kept])
    return f"`{command}`" if command else ""


def accuracy_cell(row, runs, page):
    return page.link(runs, mean_and_deviation([run.result["test_acc"] for run in runs])) if runs else "not yet run"


def each_cell(row, runs, page):
    return ", ".join(f"{run.result['test_acc']:.2f}" for run in runs)


def count_cell(row, runs, page):
    return f"{len(runs)}" if runs else ""


def exit_step_cell(row, runs, page):
    if runs and runs[0].result["norm"] != "bntt":
        return "–"  # no gamma per step
    exits = [run.exit for run in runs if run.exit]
    if exits and all(x["exit_step"] == x["num_steps"] for x in exits):
        return f"none before {exits[0]['num_steps']}"
    return span([x["exit_step"] for x in exits]) if exits else ""


def spikes_cell(row, runs, page):
    spikes = [spikes_per_image(run) for run in runs]
    if not spikes or None in spikes:
        return ""
    deviation = f" ± {statistics.stdev(spikes):,.0f}" if len(spikes) > 1 else ""
    return f"{statistics.mean(spikes):,.0f}{deviation}"


# ---- The tables ----------------------------------------------------------------------------------

TRAIN = "python train.py --config configs/"
MAIN = {
    "": title_cell, "T": steps_cell, "paper, %": paper_cell, "here, %": here_cell,
    "train / test images, n [^d]": data_cell, "command": how_cell,
}  # fmt: skip
DIGITS = {
    "digits, VGG9": title_cell, "accuracy, %": accuracy_cell, "each seed": each_cell, "n": count_cell, "T": steps_cell,
    "exit step": exit_step_cell, "spikes an image": spikes_cell,
}  # fmt: skip
DATA = (
    "Training images or recordings / those tested; the epoch tested; n seeds, over which ± is the standard deviation."
)

TABLES = {
    "results": Table(MAIN, [
        Row("CIFAR-10, VGG9, BNTT", 25, 90.5, "P", "cifar10_vgg9", f"{TRAIN}cifar10_vgg9.yaml",
            exit=(20, 90.3, "S"), settings="cifar10 vgg9 bntt"),
        Row("CIFAR-10, VGG9, no BN", 100, 88.7, "P", "cifar10_vgg9_none",
            f"{TRAIN}cifar10_vgg9.yaml --norm none --num_steps 100", settings="cifar10 vgg9 none"),
        Row("CIFAR-10 (JPEG copy), VGG9, {norm}", None, None, "", "cifar10jpeg_vgg9_*", "",
            "Decoded from a copy stored as JPEG: not the original images, on which the paper has 90.5 % with BNTT at "
            "T = 25.", settings="* vgg9 *"),
        Row("CIFAR-100, VGG11, BNTT", 50, 66.6, "S", "cifar100_vgg11_paper", f"{TRAIN}cifar100_vgg11_paper.yaml",
            exit=(30, 65.8, "M"), settings="cifar100 vgg11 bntt"),
        Row("CIFAR-100, VGG11, BNTT, authors' command", 30, None, "", "cifar100_vgg11", f"{TRAIN}cifar100_vgg11.yaml",
            settings="cifar100 vgg11 bntt"),
        Row("Tiny-ImageNet, VGG11, BNTT", 30, 57.8, "M", "tiny_imagenet_vgg11", f"{TRAIN}tiny_imagenet_vgg11.yaml",
            exit=(25, 56.8, "M"), settings="tiny_imagenet vgg11 bntt"),
        Row("Tiny-ImageNet, 20 classes (mini), VGG11, BNTT", None, None, "", "tiny_imagenet_mini_vgg11", "",
            settings="tiny_imagenet vgg11 bntt"),
        Row("DVS-CIFAR10, 7-layer CNN, BNTT", 20, 63.2, "S", "dvs_cifar10_cnn7",
            f"{TRAIN}dvs_cifar10_cnn7.yaml --data_dir DIR",
            settings="dvs_cifar10 dvs_cnn7 bntt"),
        Row("N-MNIST, small part, 7-layer CNN, BNTT", 20, None, "", "nmnist_small_cnn7",
            f"{TRAIN}nmnist_cnn7.yaml --data_dir DIR",
            settings="nmnist dvs_cnn7 bntt", wilson=True),
        Row("Sequential MNIST, FC3, BNTT", 784, 96.6, "S", "smnist_fc3_bntt", f"{TRAIN}smnist_fc3.yaml",
            settings="smnist fc3 bntt"),
        Row("Sequential MNIST, FC3, one BN for all steps", 784, None, "?", "smnist_fc3_bn",
            f"{TRAIN}smnist_fc3.yaml --norm bn", settings="smnist fc3 bn"),
        Row("Sequential MNIST, FC3, no BN", 784, None, "?", "smnist_fc3_none",
            f"{TRAIN}smnist_fc3.yaml --norm none", settings="smnist fc3 none"),
        Row("scikit-learn digits 8x8, VGG9, BNTT", 25, None, "", "digits_vgg9_bntt", f"{TRAIN}digits_vgg9.yaml",
            settings="digits vgg9 bntt"),
    ]),
    "digits": Table(DIGITS, [
        Row(NORMS[norm], 25, None, "", f"digits_vgg9_{norm}", "", settings=f"digits vgg9 {norm}") for norm in NORMS
    ], all_rows=True),
}  # fmt: skip


# ---- Writing -------------------------------------------------------------------------------------


def render(table, results, page):
    """The Markdown of a table and of the footnotes that it is the first to cite."""
    lines = ["| " + " | ".join(table.columns) + " |", "| " + " | ".join("---" for _ in table.columns) + " |"]
    if any("[^d]" in heading for heading in table.columns):
        page.cite(DATA, "d")
    for declared in table.rows:
        for row, runs in find(declared, results, table.all_rows):
            cells = (column(row, runs, page) for column in table.columns.values())
            lines.append("| " + " | ".join(cells) + " |")
    due = page.take_due()
    return "\n".join([*lines, "", *due, ""] if due else [*lines, ""])


def replace(text, name, table, readme):
    """`text` with `table` between the markers of that name; UserError where they are not there once."""
    start, end = f"<!-- {name}: written by scripts/make_tables.py -->\n", "<!-- end -->"
    if text.count(start) != 1:
        raise UserError(f"{readme} must have the line {start.strip()} once, and has it {text.count(start)} times")
    head, rest = text.split(start)
    body, found, tail = rest.partition(end)
    if not found or "written by scripts/make_tables.py" in body:
        raise UserError(f"{readme} has no {end} after {start.strip()}")
    return f"{head}{start}{table}{end}{tail}"


@entry_point
def main(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file that holds the tables")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the tables are stale")
    args = parser.parse_args(argv)
    text = new = read(args.readme, str)
    page = Page(args.readme.resolve().parent)
    for name, table in TABLES.items():
        new = replace(new, name, render(table, args.results.resolve(), page), args.readme.name)
    if args.check and new != text:
        print(f"{args.readme.name} is not up to date: run python scripts/make_tables.py")
        return 1
    if new != text:
        write_text(args.readme, new)
    print(f"{args.readme.name} is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
