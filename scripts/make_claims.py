"""Write what the runs of scripts/claims.sh say of the paper's claims: no number on those pages is typed by hand.

python scripts/make_claims.py                          # results/claims.md, and pages with figures in results/claims/
python scripts/make_claims.py --results DIR/claims     # runs elsewhere: writes DIR/claims.md
"""

import itertools
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from make_tables import ROOT, mean_and_deviation, paired, read_runs, student, table, write

from arguments import ArgumentParser
from utill import entry_point, learning_rate

HOLDS, FAILS, OPEN = "holds", "does not", "cannot be told at this scale"


class Pair(NamedTuple):
    """A claim that the runs of one row are more accurate than those of another."""

    where: str  # in the paper
    text: str
    better: str
    other: str


PAIRS = [
    Pair("table 1", "BNTT is better than one BN for all time-steps", "base", "bn"),
    Pair("table 1", "BNTT is better than no normalisation", "base", "none"),
    Pair("3.1", "the soft reset is better than a hard one", "base", "hard_reset"),
    Pair("3.1", "a surrogate of alpha = 0.3 is better than one of 1", "base", "alpha_1"),
    Pair("3.1", "a surrogate of alpha = 0.3 is better than one of 0.1", "base", "alpha_0.1"),
    Pair("3.2", "BNTT without a beta is better than with one", "base", "beta"),
    Pair("4.2", "cross-entropy of the last voltage is better than that of each step's current (TET)", "base", "tet"),
    Pair("-", "integrating first is better than firing first", "gamma_0", "fire_first"),
    Pair("supplement B", "ternary spikes are better than binary ones", "base", "binary_T12"),
    Pair("supplement B", "direct encoding is better than Poisson spikes", "direct_T12", "base"),
    Pair("4.2", "one BN is better at T = 100 than at T = 25", "bn_T100", "bn_T25"),
]
DECAYS = {"gamma_0": 0.0, "gamma_3.05": 3.05, "gamma_18.3": 18.3}
STEPS = {
    "Poisson, ternary": {4: "T4", 6: "T6", 12: "base", 25: "T25"},
    "Poisson, binary": {4: "binary_T4", 6: "binary_T6", 12: "binary_T12", 25: "binary_T25"},
    "direct": {4: "direct_T4", 6: "direct_T6", 12: "direct_T12"},
}


def accuracies(runs):
    return {run["seed"]: run["test_acc"] for run in runs}


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
        if pair := paired(*(accuracies(found.get(name, [])) for name in (claim.better, claim.other))):
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


def late_over_peak(gammas):
    """{layer: the mean gamma of the last step over that of the largest}, of {layer: mean gamma of each step}."""
    return {layer: values[-1] / max(values) for layer, values in gammas.items()}


def gamma_of(run):
    return run["exit"]["mean_gamma"]


def gamma_row(found):
    """The row of the claim on which the early exit stands, by the runs without weight decay on the gammas."""
    if not found.get("gamma_0"):
        return []
    ratios = [statistics.mean(late_over_peak(gamma_of(run)).values()) for run in found["gamma_0"]]
    mean, half = statistics.mean(ratios), student(ratios)
    text = f"[late / peak](claims/gamma.md) without weight decay on gammas: {interval(mean, half, '.3f')}"
    holds = OPEN if half is None or mean - half <= 1 <= mean + half else HOLDS if mean < 1 else FAILS
    return [["3.4, figs. 4, 6", "gammas of late time-steps fall, by training", text, str(len(ratios)), holds]]


def gamma_page(found, folder):
    """Page and figure of the gammas under three weight decays."""
    kept = {name: found[name] for name in DECAYS if name in found}
    if not kept:
        return None
    rows = []
    for name, runs in kept.items():
        for run in runs:
            ratio, gammas = late_over_peak(gamma_of(run)), gamma_of(run)
            means = [statistics.mean(values) for values in gammas.values()]
            rows.append([
                f"{DECAYS[name]:g}", str(run["seed"]), f"{decayed(run):.3g}", f"{min(means):.3f} to {max(means):.3f}",
                f"{min(ratio.values()):.3f} to {max(ratio.values()):.3f}", f"{run['test_acc']:.2f}",
                f"{run['exit']['exit_step']}: {run['exit']['acc_exit']:.2f}",
            ])  # fmt: skip
    draw_gammas(kept, folder / "gamma.png")
    heads = [
        "exponent",
        "seed",
        "decay alone",
        "mean gamma, layers",
        "late / peak, layers",
        "accuracy, %",
        "exit at 0.1: %",
    ]
    return f"""# Is the late fall of gamma learnt, or is it weight decay?

The early exit is read off gammas that fall late (paper, 3.4). Weight decay shrinks every gamma that has no gradient
alike, by exp(-exponent): 0 below is no decay, 3.05 that of the published command, 18.3 that of the paper's text. Decay
alone leaves the last gamma as large as the largest, a ratio late / peak of 1.

{table(heads, rows)}
![Mean gamma of each layer against time-steps, and decay alone](gamma.png)

VGG9, CIFAR-10 at 16x16, 20,000 training images, 6 epochs: gammas that need longer training to fall are not seen here.
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
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- Order ----------------------------------------------------------------------------------------------


def peaks(run):
    """{layer: step of its largest mean gamma}, from 1."""
    return {layer: values.index(max(values)) + 1 for layer, values in gamma_of(run).items()}


def slope(values):
    """Least-squares slope of values over 0, 1, 2, ..."""
    middle, mean = (len(values) - 1) / 2, statistics.mean(values)
    return sum((i - middle) * (y - mean) for i, y in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def order_row(found):
    if not found.get("gamma_0") or not found.get("fire_first"):
        return []
    delays = {
        name: {run["seed"]: slope([*peaks(run).values()]) for run in found[name]} for name in ("gamma_0", "fire_first")
    }
    mean, half, n = paired(delays["fire_first"], delays["gamma_0"])
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
    rows = []
    for name, order in (("gamma_0", "integrate first"), ("fire_first", "fire first")):
        for run in found[name]:
            steps = peaks(run)
            rows.append([order, str(run["seed"]), *map(str, steps.values()), f"{slope([*steps.values()]):+.2f}"])
    layers = list(peaks(found["gamma_0"][0]))
    return f"""# Do deeper layers peak later because layers fire first?

Step of the largest mean gamma, by layer, in nets trained without weight decay on gammas; last, by how many steps it
comes later from one layer to the next. Firing first, a layer answers one step after its input.

{table(["order", "seed", *layers, "a layer"], rows)}
VGG9, CIFAR-10 at 16x16, T = 25, 20,000 training images, 6 epochs. Commands: `{found["gamma_0"][0]["command"]}`,
`{found["fire_first"][0]["command"]}`.
"""


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

Small runs: VGG9, CIFAR-10 at 16x16, 20,000 training images, a few epochs (`scripts/claims.sh`). Differences are in
points of accuracy, paired by seed, with the 95 % interval of a t-test. What needs the full size, or longer training, is
not seen here.

{}
Accuracy by encoding and number of time-steps, %:

{}
Each row's command stands in its folder's environment.json.
"""


@entry_point
def main(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "claims", help="folder of the runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    args = parser.parse_args(argv)
    found = read_runs(args.results)
    rows = [*gamma_row(found), *order_row(found), *pair_rows(found)]
    heads = ["in the paper", "claim", "what was seen", "seeds", "the claim"]
    pages = {args.results.with_suffix(".md"): PAGE.format(table(heads, rows), steps_table(found))}
    pages[args.results / "gamma.md"] = gamma_page(found, args.results)
    pages[args.results / "order.md"] = order_page(found)
    return write({path: text for path, text in pages.items() if text}, args.check)


if __name__ == "__main__":
    sys.exit(main())
