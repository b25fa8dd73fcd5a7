"""Write the tables of results in README.md and results/README.md: no number in them is typed by hand.

    python scripts/make_tables.py            # after a run has been added
    python scripts/make_tables.py --check    # exits with 1 if one of the two files is not up to date
    python scripts/make_tables.py --results DIR    # runs kept elsewhere: writes DIR/README.md alone
    python scripts/make_tables.py --results results/recipes --held_out    # by accuracy on images held out of training

What the paper says is in results/paper.csv, each value with its source. If a line names `runs`, results/<runs>/seed<k>/
stand beside it, and must be what its `command` trains; `another_recipe` names runs of the same net, data and T. Runs
of one folder have one command, but for the seed.
"""

import csv
import itertools
import json
import re
import shlex
import statistics
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root

import yaml

import convert
import train
from arguments import ArgumentParser
from nets import WITHOUT_STATISTICS
from runs import RESUMABLE, write_text
from utill import UserError, entry_point, reading

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results: written by scripts/make_tables.py -->\n", "<!-- end -->"
SOURCES = ("paper", "quoted", "memory", "unknown")
MEMORY = "; (memory) unverified, do not quote"  # for those who look for the source: README leaves it out
LEGEND = """
Marks: (paper) text or figures; (quoted) by another publication{}; unknown: not found.
Here: mean ± deviation over n seeds; "-": not run; `--precise_bn N`: tested with the statistics of N training batches;
another recipe: the same net, data and T, trained otherwise, as where the paper's settings are not known.
"""
PAGE = """# The paper's tables, and our runs of their rows

{}minus its ANN (N): accuracy less that of the net it was converted from, on N test images, with the 95 % interval.

# BNTT against others on the same data

Accuracy of BNTT minus that of the other, in points: the mean over runs of the same seed, with the 95 % interval of a
paired t-test from two seeds on. They agree in all but the method (norm, neuron, order of firing, first weights), what
was chosen for it (optimizer, learning rate, averaged statistics by `--precise_bn`), and the machine (device, engine,
precision: environment.json). An interval around 0 does not say which is better; one that leaves 0 to 100 % is that of
nets of which some did not learn. "In training": the same difference in the last epoch of training, with the statistics
of each batch.

{}
{}
# Every run that was kept

Checkpoints are not in git: a command that starts from one needs that row trained first, or a file of
[weights](../weights). Where environment.json says `git_dirty`, the tree was not that of the commit it names: the code
was ahead of it, or pages of results/ had been written anew.

"Training" is the accuracy in the last epoch, on images as they were augmented, with the statistics of each batch.
"100 images: a to b" is the 95 % interval that so few test images give one net (Wilson).

{}"""
HELD_OUT = """# Recipes, by accuracy on the images held out of training, after the last epoch

Held out: {}. Recipes are chosen by them, never by test images.

{}"""
# What makes a run a run of the paper's row; and what changes no number but by rounding, and may differ between seeds.
ROW = ("dataset", "arch", "norm", "num_steps", "encoding", "spike_order", "dvs_split", "limit_train", "limit_test")
FREE = re.compile(
    r" --(resume|overwrite|deterministic|data_on_device|cuda_graph|(run_dir|seed|data_dir|num_workers|device|"
    r"engine|save_memory|save_every|train_display_freq|test_display_freq)[ =]('[^']*'|\S+))(?= |$)"
)
OTHER_RUN = re.compile(r"\S*?([^/\s]+)/seed\d+/best\.pth\.tar")  # that a run started from
# Runs of one protocol may differ in their method, in what was chosen for it, and in the machine.
METHOD = {"norm": "bntt", "neuron": "lif", "spike_order": "integrate_first", "init_from": None}
OPTIMIZER = ("optimizer", "lr", "lr_schedule", "warmup_epochs", "momentum", "weight_decay", "gamma_weight_decay")
OPTIMIZER += ("precise_bn",)  # statistics of its own for testing
MACHINE = ("seed", "device", "engine", "save_memory", "cuda_graph", "deterministic", "amp", "config", "run_dir")
MINI, BNS = "cifar10_mini_vgg9", ("bn", "bn_averaged")
MINIS = {MINI: "CIFAR-10", "cifar100_mini_vgg11": "CIFAR-100"}
HYBRIDS = "hybrid", "hybrid_scratch"
MINI_TABLES = {1: (*BNS, "none"), 4: (*BNS, "tdbn", "tebn", "plif_bn"), 5: ("ln",)}
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom
FEW = 1000  # test images: an accuracy on fewer has the interval that so few give
COUNT, PERCENT = (int, 1, 10**9), (float, 0, 100)  # type, least, most
BOTH = {"dataset": str, "arch": str, "norm": str, "num_steps": COUNT, "seed": (int, 0, 2**64)}
RESULT = BOTH | {"test_acc": PERCENT, "count": COUNT, "epoch": COUNT, "train_images": COUNT}
LOST = {"difference": (float, -100, 100), "half_interval": (float, 0, 100)}  # of a conversion, to its ANN
EXIT = {"num_steps": COUNT, "count": COUNT, "exit_step": COUNT, "acc_exit": PERCENT, "gamma_threshold": (float, 0, 1e9)}


def finite(text):
    """What JSON says; ValueError where a number is none."""

    def refuse(word):
        raise ValueError(f"it says {word} where a number is due")

    return json.loads(text, parse_constant=refuse)


def read(path, parse=finite, keys=None):
    """What `parse` makes of a file; with `keys` a dict with such values. UserError if it is damaged."""
    with reading(path):
        found = parse(path.read_text(encoding="utf-8"))
    for key, kind in (keys or {}).items():
        x = found.get(key) if isinstance(found, dict) else None
        if not (isinstance(x, str) if kind is str else type(x) in (int, kind[0]) and kind[1] <= x <= kind[2]):
            raise UserError(f"{path}: {key} cannot be {str(x)[:100]}")
    return found


def agree(where, keys, name, values, other_name, others):
    """UserError where two dicts differ in one of the keys that both have."""
    for key in keys:
        if key in values and key in others and values[key] != others[key]:
            raise UserError(f"{where}: {key} is {values[key]} in {name} and {others[key]} in {other_name}")


def plain(command):
    """A command without what changes no number and what differs between seeds."""
    command = re.sub(r" --out[ =]('[^']*'|\S+)", " --out runs/converted", FREE.sub("", command))
    return "python " + OTHER_RUN.sub(r"results/\1/seed0/best.pth.tar", command)


def flags_of(command, where):
    """{flag: value} that a command `train.py ...` would train with now, or `convert.py ...` convert."""
    script, *argv = shlex.split(command.removeprefix("python ").replace("--config=", "--config ")) or [""]
    if script not in ("train.py", "convert.py"):
        raise UserError(f"{where}: the command must be one of train.py or convert.py, got {command[:100]!r}")
    if script == "convert.py":
        return vars(convert.parse_args(argv))
    words = [str(ROOT / word) if flag == "--config" else word for flag, word in itertools.pairwise(["", *argv])]
    return vars(train.parse_args(words))


def read_run(folder):
    """A run's result.json and, under further keys, its config, command, amp, log, exit (or {}), spikes (or None)."""
    run = read(folder / "result.json", keys=RESULT)
    for key in LOST.keys() & run.keys():
        read(folder / "result.json", keys={key: LOST[key]})
    run["config"] = read(folder / "config.yaml", yaml.safe_load, BOTH | {"num_epochs": COUNT})
    environment = read(folder / "environment.json", keys={"command": str})
    commands = [environment["command"], *(one.get("command") for one in environment.get("resumed") or [])]
    epochs = lambda command: flags_of(command, folder).get("num_epochs")  # noqa: E731
    fits = [
        one for one in commands if one and epochs(one) == run["config"]["num_epochs"]
    ]  # one may have asked for more
    command = fits[0] if fits else commands[0]
    now = {k: v for k, v in flags_of(command, folder).items() if k not in RESUMABLE and v not in (None, "auto")}
    agree(folder, BOTH, "result.json", run, "config.yaml", run["config"])
    agree(folder, ["name"], "result.json", {"name": f"seed{run['seed']}"}, "the folder", {"name": folder.name})
    agree(folder, now, "config.yaml", run["config"], "what its command would train now", now)
    run |= {"command": plain(command), "amp": run["config"].get("amp")}
    exits, log = folder / "early_exit.json", folder / "log.jsonl"
    run["exit"] = read(exits, keys=EXIT) if exits.exists() else {}
    agree(folder, ("num_steps", "count"), "result.json", run, "early_exit.json", run["exit"])
    log = read(log, lambda text: [dict(json.loads(line)) for line in text.splitlines()]) if log.exists() else []
    epochs = [line.get("epoch") for line in log]
    trained = any("train_loss" in line for line in log)  # a conversion trains nothing
    if trained and epochs != [*range(1, run["config"]["num_epochs"] + 1)]:
        raise UserError(f"{folder}: log.jsonl must have a line for each epoch of the run once, and has {epochs}"[:300])
    best = {line.get("epoch"): line for line in log}.get(run["epoch"], {})
    return run | {"spikes": best.get("spikes_per_image"), "last": log[-1] if log else {}, "log": log}


def read_runs(results):
    """{folder's name: its runs by seed}; UserError unless the runs of a folder differ in their seeds alone."""
    found = {}
    for path in sorted(results.glob("*/seed*/result.json")):
        if path.parent.name.removeprefix("seed").isdecimal():
            runs = found.setdefault(path.parent.parent.name, [])
            runs.append(read_run(path.parent))
            names, keys = [f"seed {run['seed']}" for run in runs], ("command", "amp", "count", "train_images")
            agree(path.parent.parent, keys, names[0], runs[0], names[-1], runs[-1])
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in found.items()}


def read_paper(path, found, results):
    """The lines of paper.csv as dicts; UserError where a value has no source, or its runs train something else."""
    rows = read(path, lambda text: list(csv.DictReader(text.splitlines(), strict=True)))
    for number, row in enumerate(rows, 2):
        values = [(row["accuracy"], row["source"]), (row["exit_accuracy"], row["exit_source"] or "unknown")]
        if not all(source in SOURCES and bool(value) == (source != "unknown") for value, source in values):
            raise UserError(f"{path}, line {number}: each value needs a source, one of {', '.join(SOURCES)}")
        for name in filter(None, (row["runs"], row.get("another_recipe"))):
            for run in found.get(name, []):
                wanted = flags_of(row["command"], f"{path}, line {number}")
                agree(results / name, ROW, "config.yaml", run["config"], f"the row {row['row']!r}", wanted)
    return rows


def mean_and_deviation(values, form=".2f"):
    """'90.12', or '90.12 ± 0.34' for two and more."""
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def paired(ours, theirs):
    """(mean difference, half its 95 % interval or None, n) over the seeds that {seed: accuracy} share; None if none."""
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return None
    return statistics.mean(pairs), half_interval(pairs), len(pairs)


def half_interval(values):
    """Half the 95 % interval of the mean of some values by Student's t; None of one value."""
    n = len(values)
    if n == 1:
        return None
    return T_95[min(n - 2, len(T_95) - 1)] * statistics.stdev(values) / n**0.5  # too wide from 11 values on


def interval(mean, half, form="+.2f", of=lambda x: x):
    """'mean (low to high)', each as `of` turns it; the mean alone without half an interval."""
    low_high = f" ({of(mean - half):{form}} to {of(mean + half):{form}})" if half is not None else ""
    return f"{of(mean):{form}}{low_high}"


def apart(mean, half):
    """Whether an interval lies on one side of 0."""
    return half is not None and abs(mean) > half


def rivals(found):
    """[(BNTT's folder, that of another method, pair)] of runs of one protocol; the pair as `paired` gives it."""
    kept, accuracies = [], {name: {run["seed"]: run["test_acc"] for run in runs} for name, runs in found.items()}
    settings = {name: vars(train.parse_args([])) | runs[0]["config"] for name, runs in found.items()}
    free = {*METHOD, *OPTIMIZER, *MACHINE, *RESUMABLE}
    protocol = {
        name: [
            runs[0]["count"],
            runs[0]["train_images"],
            *((k, v) for k, v in sorted(settings[name].items()) if k not in free),
        ]
        for name, runs in found.items()
    }
    method = {name: {key: config.get(key) for key in METHOD} for name, config in settings.items()}
    for one, other in itertools.permutations(found, 2):
        if method[one] != METHOD or method[other] == METHOD or protocol[one] != protocol[other]:
            continue
        averaged, theirs = (settings[name].get("precise_bn") for name in (one, other))
        if averaged not in (None, theirs) and settings[other]["norm"] not in WITHOUT_STATISTICS:
            continue  # BNTT alone would be tested with better statistics
        if pair := paired(accuracies[one], accuracies[other]):
            kept.append((one, other, pair))
    return kept


def in_training(runs):
    """{seed: accuracy in the last epoch of training, in %}, of runs whose log says it: a conversion trains nothing."""
    return {run["seed"]: run["last"]["train_acc"] for run in runs if "train_acc" in run["last"]}


def comparisons(found):
    """A row for each folder of runs that another one of the same protocol with BNTT can be set beside."""
    rows = []
    for one, other, (mean, half, n) in rivals(found):
        low_high = f"{mean - half:+.2f} to {mean + half:+.2f}" if half is not None else "-"
        holds = "-" if not apart(mean, half) else "better" if mean > 0 else "worse"
        trained = paired(in_training(found[one]), in_training(found[other]))
        trained = f"{trained[0]:+.2f}" if trained else "-"
        rows.append([f"[{one}]({one})", f"[{other}]({other})", f"{mean:+.2f}", low_high, str(n), holds, trained])
    return table(["BNTT", "other", "difference", "95 % interval", "seeds", "BNTT is", "in training"], rows)


def orderings(found):
    """A sentence for each of the paper's tables that the mini protocol stands for: is BNTT ahead, as in the paper?"""
    seen = lambda mean, half, n: f"{interval(mean, half).removesuffix(')')}{' (' if half is None else ', '}n = {n})"  # noqa: E731
    lines = []
    for number, mini in itertools.product(MINI_TABLES, MINIS):
        verdicts, told = {}, []
        pairs = {other.removeprefix(f"{mini}_"): pair for one, other, pair in rivals(found) if one == mini}
        for other in [other for other in MINI_TABLES[number] if other in pairs]:
            mean, half, n = pairs[other]
            told.append(f"{other} {seen(mean, half, n)}")
            trained = paired(in_training(found[mini]), in_training(found[f"{mini}_{other}"]))
            behind = trained and trained[0] < 0 and apart(*trained[:2])
            key = "it cannot be told against"
            if apart(mean, half):
                key = "it does not against" if mean < 0 else "it holds against"
                if mean > 0 and behind:  # what is tested are running statistics
                    key = "it holds in tests alone, as BNTT is behind in training, against"
            verdicts.setdefault(key, []).append(other)
        if told:
            verdict = "; ".join(f"{key} {', '.join(names)}" for key, names in verdicts.items())
            where = f"Table {number}, {MINIS[mini]}, BNTT ahead"
            lines.append(filled(f"{where}: BNTT minus {', '.join(told)}: {verdict}."))
    start, scratch = ({run["seed"]: run["test_acc"] for run in found.get(f"{MINI}_{name}", [])} for name in HYBRIDS)
    if pair := paired(start, scratch):
        told = f"Hybrid training from a converted net minus that net from scratch, on as many images: {seen(*pair)}. "
        lines.append(filled(f"{told}Each has its own learning rate; the images that the ANN saw before do not count."))
    return "\n".join([*lines, *([mini_limits(found[MINI][0])] if lines and MINI in found else [])])


def mini_limits(run):
    """What the mini protocol, that of this run, cannot carry."""
    config = run["config"]
    what = f"{config['encoding']} encoding, T = {run['num_steps']}"
    what += f", {config['num_epochs']} epochs of {run['train_images']:,} images"
    return f"""These are rows of the mini protocol ({what}), each at the best learning
rate of [a small search](rates) on CIFAR-10, which for ln is the lowest tried; bn_averaged takes that of bn. In training
each batch and time-step has statistics of its own, in a test all time-steps of one BN share theirs: where it is ahead
in training and behind in tests, it is the sharing that fails, of averaged statistics too. Nothing is told of full
training, nor of Poisson spikes at T = 25.
"""


def wilson(percent, count):
    """The 95 % interval of an accuracy in %, as seen on `count` test images (Wilson 1927)."""
    p, z = percent / 100, 1.96
    centre, scale = p + z**2 / (2 * count), 1 + z**2 / count
    half = z * (p * (1 - p) / count + z**2 / (4 * count**2)) ** 0.5
    return 100 * (centre - half) / scale, 100 * (centre + half) / scale


def filled(text, **more):
    """A paragraph in lines of 120 characters; more: as textwrap.fill takes it."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False, **more) + "\n"


def table(heads, rows):
    """Rows of cells as Markdown, below a row of heads."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))


def ours(runs, link):
    """Our accuracy, linked to the runs, with what one must know to read it, and the early exit."""
    config, exits = runs[0]["config"], [run["exit"] for run in runs if run["exit"]]
    text = f"[{mean_and_deviation([run['test_acc'] for run in runs])}]({link}) (n = {len(runs)}"
    text += f", `--precise_bn {config['precise_bn']}`" if config.get("precise_bn") else ""
    text += f", {config.get('dvs_split')} split)" if config["dataset"] == "dvs_cifar10" else ")"
    if (count := runs[0]["count"]) < FEW:
        low, high = wilson(runs[0]["test_acc"], count)
        text += f"<br>{count} images" + (f": {low:.1f} to {high:.1f}" if len(runs) == 1 else "")
    if all(run.keys() >= {"difference", "half_interval"} for run in runs):
        lost = ", ".join(interval(run["difference"], run["half_interval"]) for run in runs)
        text += f"<br>minus its ANN ({count:,}): {lost}"
    if exits:
        steps, thresholds = [x["exit_step"] for x in exits], {x["gamma_threshold"] for x in exits}
        exited = f"exit at {mean_and_deviation(steps, '.4g')}: {mean_and_deviation([x['acc_exit'] for x in exits])}"
        text += f"<br>{exited if min(steps) < runs[0]['num_steps'] else f'no exit before {min(steps)}'}"
        text += "" if thresholds == {0.1} else f" (gamma threshold {', '.join(map(str, sorted(thresholds)))})"
        text += "" if len(exits) == len(runs) else f" (n = {len(exits)})"
    return text


def paper_table(paper, found, folder, memory=MEMORY):
    """The rows of the paper beside ours; links to runs start at `folder`. memory: "" leaves such values out."""

    def told(value, source):
        return f"{value} ({source})" if value and (memory or source != "memory") else "unknown"

    rows = []
    for row in paper:
        runs, title = found.get(row["runs"]), f"{row['row']} (table {row['table']})"
        cell = told(row["accuracy"], row["source"])
        if row["exit_T"] and (exited := told(row["exit_accuracy"], row["exit_source"])) != "unknown":
            cell += f"<br>exit at {row['exit_T']}: {exited}"
        command = f"`{runs[0]['command'] if runs else row['command']}`" if row["command"] else "-"
        here = [ours(runs, folder + row["runs"])] if runs else []
        if other := found.get(row.get("another_recipe")):
            here.append(f"another recipe: {ours(other, folder + row['another_recipe'])}")
        rows.append([title, row["T"] or "-", cell, "<br>".join(here) or "-", command])
    return table(["paper's row", "T", "paper, %", "here, %", "command"], rows) + LEGEND.format(memory)


def kept_runs(found, results):
    """Every folder of runs: a row in numbers, then what it shows (its file shows.txt) and its command."""
    heads = ["runs", "data, net", "T", "images trained on / tested", "epochs", "training, %", "here, %", "seeds"]
    heads += ["spikes an image"]
    rows, commands = [], ""
    for name, runs in found.items():
        first, spikes, path = runs[0], [run["spikes"] for run in runs], results / name / "shows.txt"
        each = ", ".join(f"{run['seed']}: {run['test_acc']:.2f}" for run in runs)
        net = [*(first[key] for key in ("dataset", "arch", "norm")), *{first["config"].get("neuron", "lif")} - {"lif"}]
        told = [", ".join(net), str(first["num_steps"]), f"{first['train_images']:,} / {first['count']:,}"]
        spikes = "-" if None in spikes else mean_and_deviation(spikes, ",.0f")
        trained = in_training(runs).values()
        told += [str(first["config"]["num_epochs"]), f"{statistics.mean(trained):.2f}" if trained else "-"]
        rows.append([name, *told, ours(runs, name), each, spikes])
        shows = read(path, str.strip) if path.exists() else ""
        commands += f"\n{name}: {shows}\n\n    {first['command']}\n"
    return table(heads, rows) + commands


def write(pages, check, command="python scripts/make_tables.py"):
    """Write {path: text} where a file says something else, or with `check` only say so. Returns the exit status."""
    stale = [path for path in pages if not path.exists() or read(path, str) != pages[path]]
    for path in stale:
        print(f"{path} is {f'not up to date: run {command}' if check else 'written'}")
        if not check:
            write_text(path, pages[path])
    return int(check and bool(stale))


def recipes(found):
    """The page of runs by their accuracy on the images held out, best first; UserError where some have none."""
    if wrong := [name for name, runs in found.items() if any("val_acc" not in run["last"] for run in runs)]:
        raise UserError(f"{wrong[0]}: its runs held no images out (--val_fraction)")
    heads = ["recipe", "held out, %", "seeds", "training, %", "images trained on", "epochs", "command"]
    rows = []
    for name, runs in sorted(
        found.items(), key=lambda item: -statistics.mean(run["last"]["val_acc"] for run in item[1])
    ):
        accuracies = mean_and_deviation([run["last"]["val_acc"] for run in runs])
        trained = mean_and_deviation([run["last"]["train_acc"] for run in runs])
        told = [f"{runs[0]['train_images']:,}", str(runs[0]["config"]["num_epochs"]), f"`{runs[0]['command']}`"]
        rows.append([name, f"[{accuracies}]({name})", str(len(runs)), trained, *told])
    fraction = {run["config"]["val_fraction"] for runs in found.values() for run in runs}
    return HELD_OUT.format(", ".join(f"{x:g} of the training images" for x in sorted(fraction)), table(heads, rows))


@entry_point
def main(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, help="file that holds the paper's rows (default: that of our results)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the runs")
    parser.add_argument(
        "--held_out", action="store_true", help="a page of the runs alone, by accuracy on images held out"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    args = parser.parse_args(argv)
    found, own = read_runs(args.results), args.results / "paper.csv"
    if args.held_out:
        command = f"python scripts/make_tables.py --results {args.results} --held_out"
        return write({args.results / "README.md": recipes(found)}, args.check, command)
    paper = read_paper(own if own.exists() else ROOT / "results" / "paper.csv", found, args.results)
    parts = paper_table(paper, found, ""), comparisons(found), orderings(found), kept_runs(found, args.results)
    new = {args.results / "README.md": PAGE.format(*parts)}
    if readme := args.readme or (ROOT / "README.md" if args.results.resolve() == ROOT / "results" else None):
        parts = re.fullmatch(f"(.*{START}).*?({END}.*)", text := read(readme, str), re.DOTALL)
        if not parts or text.count(START) > 1:
            raise UserError(f"{readme} must have {START.strip()} and, below it, {END} once")
        bntt = [row for row in paper if row["command"] and flags_of(row["command"], row["row"]).get("norm") == "bntt"]
        new[readme] = parts[1] + paper_table(bntt, found, "results/", "") + parts[2]
    return write(new, args.check)


if __name__ == "__main__":
    sys.exit(main())
