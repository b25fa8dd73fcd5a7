"""Claims that runs of one row are more accurate than those of another, and accuracy by the number of time-steps."""

import statistics
import textwrap
from typing import NamedTuple

from claim_parts import FAILS, HOLDS, OPEN, Claim, by_seed, did_not_learn, drawn, learnt, mean_and_half, verdict
from make_tables import MACHINE, interval, mean_and_deviation, paired, table
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from figures import OKABE_ITO, PLAIN, colours, line
from runs import RESUMABLE
from utill import UserError


class Pair(NamedTuple):
    """A claim that the runs of one row are more accurate than those of another."""

    where: str  # in the paper; "-" where it does not say so
    text: str
    better: str
    other: str
    key: str = "test_acc"  # or averaged_acc, with statistics averaged over training batches before the test


PAIRS = [
    Pair("table 1", "BNTT is better than one BN for all time-steps", "base", "bn"),
    Pair("table 1", "BNTT is better than one BN, both with averaged statistics", "base", "bn", "averaged_acc"),
    Pair("table 1", "BNTT is better than no normalisation", "base", "none"),
    Pair("table 1", "BNTT (5 epochs) is better than hybrid training (8 of its ANN and 5)", "direct_T12", "hybrid"),
    Pair("table 1", "hybrid training (8 and 5) is better than its net from scratch (5)", "hybrid", "hybrid_scratch"),
    Pair("3.1", "the soft reset is better than a hard one", "base", "hard_reset"),
    Pair("3.1", "a surrogate of alpha = 0.3 is better than one of 1", "base", "alpha_1"),
    Pair("3.1", "a surrogate of alpha = 0.3 is better than one of 0.1", "base", "alpha_0.1"),
    Pair("3.2", "BNTT without a beta is better than with one", "base", "beta"),
    Pair("3.5", "BNTT regularises: dropout (0.2) does not help beside it", "base", "dropout_0.2"),
    Pair("-", "cross-entropy of the mean voltage over T is better than of the sum", "base", "logits_sum"),
    Pair("-", "cross-entropy of the last voltage is better than of each step's current (TET)", "base", "tet"),
    Pair("-", "integrating first is better than firing first", "gamma_0", "fire_first"),
    Pair("supplement B", "ternary spikes are better than binary ones", "base", "binary_T12"),
    Pair("supplement B", "direct encoding is better than Poisson spikes", "direct_T12", "base"),
    Pair("supplement B", "ternary spikes are better than binary ones at T = 4", "T4", "binary_T4"),
    Pair("supplement B", "direct encoding is better than Poisson spikes at T = 4", "direct_T4", "T4"),
    Pair("4.2", "one BN is better at T = 100 than at T = 10", "bn_T100", "bn_T10"),
    Pair(
        "4.2", "one BN, averaged statistics, is better at T = 100 than at T = 10", "bn_T100", "bn_T10", "averaged_acc"
    ),
    Pair("4.2", "one BN is better at T = 100 than at T = 25", "bn_T100", "bn_T25"),
    Pair(
        "4.2", "one BN, averaged statistics, is better at T = 100 than at T = 25", "bn_T100", "bn_T25", "averaged_acc"
    ),
    Pair("-", "BNTT, too, is better at T = 100 than at T = 25", "T100", "T25"),
]
TERNARY = {4: "T4", 6: "T6", 10: "T10", 12: "base", 25: "T25", 50: "T50", 100: "T100"}
ONE_BN = {10: "bn_T10", 12: "bn", 25: "bn_T25", 50: "bn_T50", 100: "bn_T100"}
START = "conversion/seed{}/best.pth.tar"  # of hybrid training, with the same seed
HYBRID = {"norm": "none", "neuron": "learnt_lif", "encoding": "direct", "leak_mem": 0.99, "optimizer": "adam",
          "weight_decay": 1e-4}  # fmt: skip
NEURONS = ("hard_reset", "alpha_0.1", "alpha_1", "dropout_0.2")
CHANGES = {  # {row: what it changes of `base`}
    **{name: {"neuron": name} for name in NEURONS},
    **{name: {"norm": norm} for name, norm in (("beta", "bntt_beta"), ("none", "none"), ("bn", "bn"))},
    "ann": {"arch": "vgg9_ann", "num_steps": 1, "norm": "none", "encoding": "direct", "dropout": 0.2,
            "num_epochs": 8},
    "hybrid": HYBRID | {"lr": 1e-4, "init_from": START}, "hybrid_scratch": HYBRID,
    "base_3": {"num_epochs": 3}, "tet": {"loss": "tet"}, "logits_sum": {"logit_scale": 12.0},
    **{name: {"num_steps": T} for T, name in TERNARY.items() if name != "base"},
    **{name: {"num_steps": T, "norm": "bn"} for T, name in ONE_BN.items() if name != "bn"},
    **{f"direct_T{T}": {"num_steps": T, "encoding": "direct"} for T in (4, 6, 12, 25)},
    **{f"binary_T{T}": {"num_steps": T, "encoding": "poisson_binary"} for T in (4, 6, 12, 25)},
}  # fmt: skip
STEPS = {  # {what: ({T: row}, key)}
    "BNTT, Poisson, ternary": (TERNARY, "test_acc"),
    "BNTT, Poisson, binary": ({T: f"binary_T{T}" for T in (4, 6, 12, 25)}, "test_acc"),
    "BNTT, direct": ({T: f"direct_T{T}" for T in (4, 6, 12, 25)}, "test_acc"),
    "one BN, stored statistics": (ONE_BN, "test_acc"),
    "one BN, averaged statistics": (ONE_BN, "averaged_acc"),
}


def check(found):
    """UserError where a row differs from `base` in more than its name says, or in less."""
    base = found.get("base", [None])[0]
    for name in [name for name in CHANGES if base and name in found]:
        expected, run = base["config"] | CHANGES[name], found[name][0]
        keys = [key for key in expected.keys() | run["config"].keys() if key not in (*MACHINE, *RESUMABLE, "init_from")]
        for one, other, of in ((run, base, ("count", "train_images")), (run["config"], expected, sorted(keys))):
            if wrong := [key for key in of if one.get(key) != other.get(key)]:
                said = f"{wrong[0]} is {one.get(wrong[0])}, where {other.get(wrong[0])} goes with base"
                raise UserError(f"the runs of {name}: {said}")
        for run in found[name]:  # each from the net of its seed
            start, due = run["config"].get("init_from"), (expected.get("init_from") or "").format(run["seed"])
            if not str(start or "").endswith(due) or start and not due:
                raise UserError(f"the runs of {name}: init_from is {start}, where {due or None} goes with base")


def compared(found):
    """[(pair, mean difference, half its interval or None, seeds)] of the pairs that were run."""
    results = [(pair, paired(*(by_seed(found, name, pair.key) for name in pair[2:4]))) for pair in PAIRS]
    return [(pair, *result) for pair, result in results if result]


def claims(found):
    told = []
    for pair, mean, half, n in compared(found):
        rows = " - ".join(f"[{name}](claims/{name})" for name in pair[2:4])
        seen = f"{rows}: [{interval(mean, half)}](claims/pairs.png)"
        for name in pair[2:4]:
            if bad := [run for run in found[name] if not learnt(run)]:
                seen += f"; of {name} {len(bad)} {did_not_learn(bad)}"
        told.append(Claim(pair.where, pair.text, seen, n, verdict(mean, half)))
    return told


def conversion_claims(found):
    """A claim on what is lost in the conversion of a net of ReLUs, in so few steps."""
    runs = [run for run in found.get("conversion", []) if "difference" in run]
    if not runs:
        return []
    T, images = runs[0]["num_steps"], runs[0]["count"]
    mean, half = mean_and_half([run["difference"] for run in runs])
    seen = f"[conversion - ann](claims/conversion/seed{runs[0]['seed']}/conversion.png), {images:,} images: "
    text = f"a converted net loses more than a point in {T} {runs[0]['config']['encoding']} steps"
    return [Claim("table 1", text, seen + interval(mean, half), len(runs), verdict(-mean - 1, half))]


def draw_pairs(found, path):
    """A line a pair: the difference with its interval, by verdict."""
    look = dict(zip((HOLDS, FAILS, OPEN), zip(OKABE_ITO, "osD", strict=False), strict=True))
    results = compared(found)
    with drawn(path, 1.1 + 0.42 * len(results)) as figure:
        axis = figure.subplots()
        for y, (_, mean, half, n) in enumerate(results):
            colour, mark = look[verdict(mean, half)]
            axis.errorbar(mean, y, xerr=half, color=colour, marker=mark, markersize=5, capsize=2.5,
                          markerfacecolor=colour if n > 2 else "none")  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        labels = [f"{textwrap.fill(pair.text, 58)}\n{pair.better} - {pair.other}" for pair, *_ in results]
        axis.set_yticks(range(len(results)), labels)
        axis.set_ylim(len(results) - 0.5, -0.5)
        axis.set_xscale("symlog", linthresh=1)
        reach = 1.2 * max(1.0, *(abs(mean) + (half or 0.0) for _, mean, half, _ in results))
        ticks = [x for x in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if abs(x) <= reach]
        axis.set(xlim=(-reach, reach), xlabel="difference, points (linear up to 1, then logarithmic)")
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(PLAIN)
        axis.xaxis.set_minor_locator(NullLocator())
        handles = [Line2D([], [], color=c, marker=m, linestyle="", label=word) for word, (c, m) in look.items()]
        handles.append(Line2D([], [], color="grey", marker="o", mfc="none", linestyle="", label="hollow: n below 3"))
        figure.legend(handles=handles, loc="outside upper center", ncols=4)


def by_steps(found):
    """{what: {T: accuracies in %}} of what was run."""
    cells = {
        what: {T: [*by_seed(found, name, key).values()] for T, name in rows.items()}
        for what, (rows, key) in STEPS.items()
    }
    cells = {what: {T: values for T, values in row.items() if values} for what, row in cells.items()}
    return {what: row for what, row in cells.items() if row}


def steps_table(found):
    cells = by_steps(found)
    counts = sorted({T for row in cells.values() for T in row})
    told = lambda values: f"{mean_and_deviation(values)} (n = {len(values)})" if values else "-"  # noqa: E731
    rows = [[what, *(told(row.get(T)) for T in counts)] for what, row in cells.items()]
    return table(["norm, input", *(f"T = {T}" for T in counts)], rows)


def draw_steps(found, path):
    """Accuracy against T, mean and deviation over seeds."""
    cells = by_steps(found)
    counts, palette = sorted({T for row in cells.values() for T in row}), colours(len(STEPS))
    with drawn(path, 3.0) as figure:
        axis = figure.subplots()
        for k, what in enumerate(STEPS):
            if row := cells.get(what):
                means = [statistics.mean(values) for values in row.values()]
                bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in row.values()]
                axis.errorbar([*row], means, bars, linestyle="", color=palette[k], capsize=2.5)
                line(axis, [*row], means, k, palette, markevery=1, label=what)
        axis.set(xscale="log", xlabel="time-steps T", ylabel="accuracy, %, mean ± deviation")
        axis.set_xticks(counts, [str(T) for T in counts])
        axis.xaxis.set_minor_locator(NullLocator())
        figure.legend(loc="outside right upper")
