"""Write what the runs of scripts/claims.sh say of the paper's claims: no number on those pages is typed by hand.

python scripts/make_claims.py                          # results/claims.md, and pages with figures in results/claims/
python scripts/make_claims.py --results DIR/claims     # runs elsewhere: writes DIR/claims.md
"""

import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
from folding import off
from make_tables import PERCENT, ROOT, mean_and_deviation, paired, read, read_runs, student, table, write

from arguments import ArgumentParser
from runs import write_atomically
from utill import UserError, entry_point, learning_rate

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HOLDS, FAILS, OPEN = "holds", "does not", "cannot be told at this scale"


class Pair(NamedTuple):
    """A claim that the runs of one row are more accurate than those of another."""

    where: str  # in the paper; "-" where it does not say so
    text: str
    better: str
    other: str
    key: str = "test_acc"  # or averaged_acc, with statistics averaged over training batches before the test


PAIRS = [
    Pair("table 1", "BNTT is better than one BN for all time-steps", "base", "bn"),
    Pair("table 1", "the same, both tested with averaged statistics", "base", "bn", "averaged_acc"),
    Pair("table 1", "BNTT is better than no normalisation", "base", "none"),
    Pair("3.1", "the soft reset is better than a hard one", "base", "hard_reset"),
    Pair("3.1", "a surrogate of alpha = 0.3 is better than one of 1", "base", "alpha_1"),
    Pair("3.1", "a surrogate of alpha = 0.3 is better than one of 0.1", "base", "alpha_0.1"),
    Pair("3.2", "BNTT without a beta is better than with one", "base", "beta"),
    Pair("-", "cross-entropy of the last voltage is better than of each step's current (TET)", "base", "tet"),
    Pair("-", "integrating first is better than firing first", "gamma_0", "fire_first"),
    Pair("supplement B", "ternary spikes are better than binary ones", "base", "binary_T12"),
    Pair("supplement B", "direct encoding is better than Poisson spikes", "direct_T12", "base"),
    Pair("4.2", "one BN is better at T = 100 than at T = 25", "bn_T100", "bn_T25"),
    Pair("4.2", "the same, both tested with averaged statistics", "bn_T100", "bn_T25", "averaged_acc"),
]
DECAYS = {"gamma_0": 0.0, "gamma_3.05": 3.05, "gamma_18.3": 18.3}
STEPS = {
    "Poisson, ternary": {4: "T4", 6: "T6", 12: "base", 25: "T25"},
    "Poisson, binary": {4: "binary_T4", 6: "binary_T6", 12: "binary_T12", 25: "binary_T25"},
    "direct": {4: "direct_T4", 6: "direct_T6", 12: "direct_T12"},
}


def accuracies(runs, key="test_acc"):
    return {run["seed"]: run[key] for run in runs if key in run}


def setting(run):
    """What a run was, in words."""
    config = run["config"]
    size = f" at {config['img_size']}x{config['img_size']}" if config.get("img_size") else ""
    told = [f"{config['arch']}, {config['dataset']}{size}", f"{config['encoding']}, T = {config['num_steps']}"]
    told += [f"{run['train_images']:,} training images, {config['num_epochs']} epochs", f"{run['count']:,} test images"]
    return ", ".join(told)


def verdict(mean, half):
    if half is None or mean - half <= 0 <= mean + half:
        return OPEN
    return HOLDS if mean > 0 else FAILS


def interval(mean, half, form="+.2f"):
    return f"{mean:{form}}" + (f" ({mean - half:{form}} to {mean + half:{form}})" if half is not None else "")


def pair_rows(found):
    """A row of the table of claims for each pair that was run."""
    rows = []
    for claim in PAIRS:
        if pair := paired(*(accuracies(found.get(name, []), claim.key) for name in claim[2:4])):
            mean, half, n = pair
            links = f"[{claim.better}](claims/{claim.better}) - [{claim.other}](claims/{claim.other})"
            rows.append([claim.where, claim.text, f"{links}: {interval(mean, half)}", str(n), verdict(mean, half)])
    return rows


# ---- What becomes of the gammas --------------------------------------------------------------------


def decayed(run):
    """What weight decay alone makes of a gamma of 1 in this run: SGD with momentum, step by step."""
    config, gamma, velocity = run["config"], 1.0, 0.0
    steps = run["train_images"] // config["batch_size"]
    schedule = config["lr_schedule"], config.get("warmup_epochs", 0.0)
    for epoch, step in itertools.product(range(config["num_epochs"]), range(steps)):
        lr = learning_rate(config["lr"], epoch, config["num_epochs"], *schedule, step, steps)
        velocity = config["momentum"] * velocity + config["gamma_weight_decay"] * gamma
        gamma -= lr * velocity
    return gamma


def touched(gammas):
    """{step: mean gamma} of the steps that training reached. At the others, gammas keep their first value, exactly 1:
    firing first, nothing has come so far yet, or can still reach the output."""
    return {step: value for step, value in enumerate(gammas, start=1) if value != 1.0}


def late_over_middle(gammas):
    """{layer: mean gamma of the last third of its steps over that of the middle third}; nan without three steps."""
    found = {}
    for layer, values in gammas.items():
        values = [*touched(values).values()]
        third = len(values) // 3
        middle, late = values[third : len(values) - third], values[len(values) - third :]
        found[layer] = statistics.mean(late) / statistics.mean(middle) if third else math.nan
    return found


def gamma_of(run):
    return run["exit"]["mean_gamma"]


def gamma_row(found):
    """The row of the claim on which the early exit stands, by the runs without weight decay on the gammas."""
    if not found.get("gamma_0"):
        return []
    ratios = [statistics.mean(late_over_middle(gamma_of(run)).values()) for run in found["gamma_0"]]
    mean, half = statistics.mean(ratios), student(ratios)
    text = f"[late / middle](claims/gamma.md) without weight decay on gammas: {interval(mean, half, '.3f')}"
    return [["3.4, figs. 4, 6", "gammas fall late, by training", text, str(len(ratios)), verdict(1 - mean, half)]]


def gamma_page(found):
    """Page and figure of the gammas under three weight decays."""
    kept = {name: found[name] for name in DECAYS if name in found}
    if not kept:
        return None
    rows = []
    for name, runs in kept.items():
        for run in runs:
            ratio, gammas = late_over_middle(gamma_of(run)), gamma_of(run)
            means = [statistics.mean(values) for values in gammas.values()]
            rows.append([
                f"{DECAYS[name]:g}", str(run["seed"]), f"{decayed(run):.3g}", f"{min(means):.3f} to {max(means):.3f}",
                f"{min(ratio.values()):.3f} to {max(ratio.values()):.3f}", f"{run['test_acc']:.2f}",
                f"{run['exit']['exit_step']}: {run['exit']['acc_exit']:.2f}",
            ])  # fmt: skip
    heads = [
        "exponent",
        "seed",
        "decay alone",
        "mean gamma, layers",
        "late / middle, layers",
        "accuracy, %",
        "exit at 0.1: %",
    ]
    return f"""# Is the late fall of gamma learnt, or is it weight decay?

The early exit is read off gammas that fall late (paper, 3.4). Weight decay shrinks every gamma that has no gradient
alike, by exp(-exponent): 0 below is no decay, 3.05 that of the published command, 18.3 that of the paper's text. Decay
alone leaves all time-steps alike: the mean gamma of the last third of the steps over that of the middle third is 1.

{table(heads, rows)}
![Mean gamma of each layer against time-steps, and decay alone](gamma.png)

{setting(next(iter(kept.values()))[0])}: gammas that need longer training to fall are not seen here.
Command: `{found[next(iter(kept))][0]["command"]}`, with `--gamma_weight_decay` as `scripts/claims.sh` has it.
"""


def draw_gammas(kept, path):
    figure, axes = plt.subplots(1, len(kept), figsize=(3.2 * len(kept), 2.8), squeeze=False, layout="constrained")
    for axis, (name, runs) in zip(axes[0], kept.items(), strict=True):
        run, gammas = runs[0], gamma_of(runs[0])
        for i, (layer, values) in enumerate(gammas.items()):
            axis.plot(range(1, len(values) + 1), values, color=plt.cm.viridis(i / len(gammas)), label=layer)
        axis.axhline(decayed(run), color="black", linestyle="--", label="decay alone")
        axis.set(title=f"exponent {DECAYS[name]:g}, seed {run['seed']}", xlabel="time-step", ylim=(0, None))
    axes[0][0].set_ylabel("mean gamma")
    axes[0][-1].legend(fontsize=6, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    plt.close(figure)


# ---- Order ----------------------------------------------------------------------------------------------


def peaks(run):
    """{layer: step of its largest mean gamma, from 1}, of the layers that training reached."""
    steps = {layer: touched(values) for layer, values in gamma_of(run).items()}
    return {layer: max(found, key=found.get) for layer, found in steps.items() if found}


def slope(values):
    """Least-squares slope of values over 0, 1, 2, ...; 0 of a single one."""
    if len(values) < 2:
        return 0.0
    middle, mean = (len(values) - 1) / 2, statistics.mean(values)
    return sum((i - middle) * (y - mean) for i, y in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def order_row(found):
    delays = {
        name: {run["seed"]: slope([*peaks(run).values()]) for run in found.get(name, [])}
        for name in ("gamma_0", "fire_first")
    }
    if not (pair := paired(delays["fire_first"], delays["gamma_0"])):
        return []
    mean, half, n = pair
    text = "[steps that the peak comes later a layer](claims/order.md), firing first less integrating first: "
    return [
        [
            "figs. 1C, 6",
            "deeper layers peak later because they fire first",
            text + interval(mean, half),
            str(n),
            verdict(mean, half),
        ]
    ]


def order_page(found):
    if not found.get("gamma_0") or not found.get("fire_first"):
        return None
    rows, layers = [], list(gamma_of(found["gamma_0"][0]))
    for name, order in (("gamma_0", "integrate first"), ("fire_first", "fire first")):
        for run in found[name]:
            steps = peaks(run)
            told = [str(steps.get(layer, "-")) for layer in layers]
            rows.append([order, str(run["seed"]), *told, f"{slope([*steps.values()]):+.2f}"])
    return f"""# Do deeper layers peak later because layers fire first?

Step of the largest mean gamma, by layer, in nets trained without weight decay on gammas; last, by how many steps it
comes later from one layer to the next. Firing first, a layer answers one step after its input. Steps that training
cannot reach keep a gamma of 1 and do not count.

{table(["order", "seed", *layers, "a layer"], rows)}
{setting(found["gamma_0"][0])}. Commands: `{found["gamma_0"][0]["command"]}`,
`{found["fire_first"][0]["command"]}`.
"""


# ---- Folding --------------------------------------------------------------------------------------------


def folding_rows(path):
    """Rows of what scripts/folding.py found; none where it was not run."""
    if not path.exists():
        return []
    result = read(path)
    layers, found = result["layers"], result["accuracy"]["eq. 15"]
    sigmas = {layer["name"]: off(layer["sigma"]) for layer in layers}
    most = max(sigmas, key=sigmas.get)
    means = [statistics.mean(layer["mu_over_sigma"]) for layer in layers]
    differ = [layer["differ"]["eq. 15"] for layer in layers]
    lost, half = found["difference"], found["half_interval"]
    link, n = "(claims/folding.md)", f"1 net, {result['count']:,} images"
    told = [
        ("eq. 12 to 14", "sigma is alike over time-steps (within 10 % of its mean)",
         f"[off its mean]{link} by up to {sigmas[most]:.0f} % ({most})", HOLDS if sigmas[most] <= 10 else FAILS),
        ("eq. 12 to 14", "mu is small (below a tenth of sigma)",
         f"[absolute mu over sigma]{link}: {min(means):.2f} to {max(means):.2f}, by layer",
         HOLDS if max(means) < 0.1 else FAILS),
        ("eq. 15", "BNTT folds into thresholds without loss",
         f"[accuracy]{link} {interval(lost, half)}; spikes of a layer that differ: {min(differ):.0f} to "
         f"{max(differ):.0f} %", FAILS if lost + half < 0 else OPEN if lost - half < -1 else HOLDS),
    ]  # fmt: skip
    return [["3.3, " + where, text, seen, n, answer] for where, text, seen, answer in told]


# ---- Robustness -----------------------------------------------------------------------------------------


NETS = {"bntt_T25": "BNTT, 25 Poisson steps,", "bntt_T4": "BNTT, 4 direct steps,"}


def robust_nets(folder):
    """{net: {what was done to its images: (accuracy in %, number of images)}} of what scripts/robustness.sh measured.

    Of an attack by several surrogates the worst counts.
    """
    found = {}
    for path in sorted(folder.glob("*/analysis.json")):
        result = read(path)
        rows = found[path.parent.name] = {"as they are": (result["accuracy"][-1], result["data"]["count"])}
        for row in result["noise"] or []:
            rows[f"noise, sigma {row['sigma']:g}"] = row["acc"], row["count"]
        for row in result["attack"] or []:  # the worst comes last
            name = {"fgsm": "FGSM", "pgd": f"PGD-{row['steps']}"}[row["kind"]]
            rows[f"{name}, {255 * row['eps']:.0f}/255"] = row["acc"], row["count"]
    return found


def apart(one, other):
    """Difference of two accuracies in % on so many images each, and half its 95 % interval (unpaired)."""
    (p, n), (q, m) = one, other
    return p - q, 1.96 * (p * (100 - p) / n + q * (100 - q) / m) ** 0.5


def robust_rows(nets):
    """A row for each change of the images that a net with BNTT and the net without spikes were both tested under."""
    rows = []
    for name in [name for name in nets if name != "ann" and "ann" in nets]:
        for what in [what for what in nets[name] if what != "as they are" and what in nets["ann"]]:
            mean, half = apart(nets[name][what], nets["ann"][what])
            text = f"[{name} - ann](claims/robustness.md): {interval(mean, half)}"
            n = f"1 net, {nets[name][what][1]:,} images"
            rows.append(
                ["4.7", f"{NETS.get(name, name)} is more robust than no spikes: {what}", text, n, verdict(mean, half)]
            )
    return rows


def robust_page(nets):
    if not nets:
        return None
    whats = list(dict.fromkeys(what for rows in nets.values() for what in rows))
    cells = [
        [
            what,
            *(
                f"{nets[name][what][0]:.1f} (n = {nets[name][what][1]:,})" if what in nets[name] else "-"
                for name in nets
            ),
        ]
        for what in whats
    ]
    return f"""# Robustness

Accuracy in % of trained nets on CIFAR-10, 32x32, VGG9: `bntt_T25` sees Poisson spikes, `bntt_T4` the image itself at
each of four steps, `ann` does not spike. Noise is Gaussian, on images in [0, 1]. An attack knows the net; on a spiking
one its gradient is the mean over two draws of the spikes, and an image counts as right only if it is right under both
of two widths of the surrogate. One net each, unequal in accuracy as they are; attacks on few images; two draws are few
against a net that draws at random, and an attack made for these nets may find more.

{table(["images", *nets], cells)}
![Accuracy of each net by what was done to the images](robustness.png)

Command: `DATA=DIR bash scripts/robustness.sh`
"""


def draw_robust(nets, path):
    whats = list(dict.fromkeys(what for rows in nets.values() for what in rows))
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    for i, (name, rows) in enumerate(nets.items()):
        at = [x + 0.8 * (i + 0.5) / len(nets) - 0.4 for x, what in enumerate(whats) if what in rows]
        axis.bar(at, [rows[what][0] for what in whats if what in rows], 0.8 / len(nets), label=name)
    axis.axhline(10, color="black", linestyle=":", label="chance")
    axis.set_xticks(range(len(whats)), whats, rotation=30, ha="right")
    axis.set(ylabel="accuracy, %", ylim=(0, 100))
    axis.legend(frameon=False, ncols=4, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    plt.close(figure)


# ---- The page ------------------------------------------------------------------------------------------------


def steps_table(found):
    counts = sorted({T for rows in STEPS.values() for T in rows})
    rows = [
        [
            encoding,
            *(
                mean_and_deviation([*accuracies(found[names[T]]).values()]) if names.get(T) in found else "-"
                for T in counts
            ),
        ]
        for encoding, names in STEPS.items()
    ]
    return table(["encoding", *(f"T = {T}" for T in counts)], rows)


PAGE = """# The paper's claims, put to the test

Small runs (`scripts/claims.sh`), and what `scripts/folding.py` sees in a trained net. n: seeds, where nothing else is
said. Differences are in points of accuracy, paired by seed, with the 95 % interval of a t-test (by image, where it is
one net); each interval stands alone, so that of {} lines some would be wrong by chance. What needs the full size, or
longer training, is not seen here.

{}
{}{}Each row's command stands in its folder's environment.json.
"""


@entry_point
def main(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "claims", help="folder of the runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    args = parser.parse_args(argv)
    found = read_runs(args.results)
    for name, runs in found.items():
        for run in runs:
            averaged = args.results / name / f"seed{run['seed']}" / "averaged.json"
            if averaged.exists():
                run["averaged_acc"] = read(averaged, keys={"top1": PERCENT})["top1"]
            if name in (*DECAYS, "fire_first") and "mean_gamma" not in run["exit"]:
                raise UserError(f"{args.results / name}: run early_exit.py on its best.pth.tar first")
            if name in DECAYS and run["config"].get("gamma_weight_decay") is None:
                raise UserError(f"{args.results / name}: its command must name --gamma_weight_decay")
    rows = [*gamma_row(found), *order_row(found), *folding_rows(args.results / "folding.json"), *pair_rows(found)]
    rows += robust_rows(nets := robust_nets(args.results / "robustness"))
    heads = ["in the paper", "claim", "what was seen", "n", "the claim"]
    settings = "".join(f"{name}: {setting(runs[0])}.\n" for name, runs in found.items() if name in ("gamma_0", "base"))
    by_steps = f"Accuracy by encoding and number of time-steps, %:\n\n{steps_table(found)}\n" if found else ""
    parts = len(rows), table(heads, rows), by_steps, settings
    pages = {args.results.with_suffix(".md"): PAGE.format(*parts)}
    pages |= {args.results / "gamma.md": gamma_page(found), args.results / "order.md": order_page(found)}
    pages |= {args.results / "robustness.md": robust_page(nets)}
    if pages[args.results / "gamma.md"] and not args.check:
        draw_gammas({name: found[name] for name in DECAYS if name in found}, args.results / "gamma.png")
    if nets and not args.check:
        draw_robust(nets, args.results / "robustness.png")
    return write({path: text for path, text in pages.items() if text}, args.check, "python scripts/make_claims.py")


if __name__ == "__main__":
    sys.exit(main())
