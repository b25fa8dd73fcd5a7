"""The figures of Kim & Panda 2021 and more, from analysis.json files, one a net.

A figure is one function of its axes [rows, columns] and the list of results, and one row of FIGURES. T: time-steps.
"""

import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

import pages
import runs
from records import VERSION as VERSION  # what this file offers, too
from records import data_sets, labels, picojoules, union
from records import load as load
from utill import UserError, reason_of

# ---- Style --------------------------------------------------------------------------------------

WIDTH, DPI, FONT = 7.2, 150, 8  # inches: two columns of a journal; dots an inch; points at that width
LETTERS = 17  # an inch
STYLE = {
    "font.size": FONT, "axes.titlesize": FONT, "axes.labelsize": FONT, "legend.fontsize": FONT,
    "xtick.labelsize": FONT, "ytick.labelsize": FONT, "legend.frameon": False, "legend.handlelength": 2.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9",
    "axes.axisbelow": True, "hatch.linewidth": 0.5, "lines.linewidth": 1.2, "svg.hashsalt": "bntt",
    "axes.formatter.useoffset": False, "text.parse_math": False,  # dollars in a name make no formula
}  # fmt: skip
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # no yellow: pale on paper
DASHES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1.5, 1)))
MARKS = "osD^vP<X>*"
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo")
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def colours(n):
    return [OKABE_ITO[k % len(OKABE_ITO)] for k in range(n)]


def shades(n):
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.88, n))


def line(ax, x, y, k, palette, **more):
    """The k-th line. Dashes, marks and their places differ, so that lines that coincide can be told apart."""
    n, stride = len(palette), max(1, math.ceil(len(x) / 8))
    size = 4 if stride > 1 else 4 + 4 * (n - 1 - k) / n  # where all points have marks, they stand one in another
    style = {"color": palette[k], "linestyle": DASHES[k % len(DASHES)], "marker": MARKS[k % len(MARKS)]}
    place = {"markevery": (k * stride // n, stride), "markerfacecolor": "none", "markersize": size}
    ax.plot(x, y, **style | place | more)


def stairs(ax, values, edges, k, palette, **more):
    ax.stairs(values, edges, color=palette[k], linestyle=DASHES[k % len(DASHES)], linewidth=1.2, **more)


def per_layer(ax, values, names):
    """A line for each layer of {layer: [T numbers]}; names: the layers of all panels."""
    for name, y in values.items():
        line(ax, range(1, len(y) + 1), y, names.index(name), shades(len(names)), label=name)


def per_step(ax, values, edges, steps):
    """A histogram for each step of {step: [n numbers]}; steps: those of all panels."""
    for step in sorted(values, key=int):
        stairs(ax, values[step], edges, steps.index(step), shades(len(steps)), label=f"step {step}")


def panels(axes, results):
    """(axes of a net, its result, its label) for each net."""
    return zip(axes, results, labels(results), strict=False)


def time_axis(ax, T, name="time-step"):
    margin = max(0.5, 0.02 * T)
    ax.set(xlabel=name, xlim=(1 - margin, T + margin))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def ylabel(ax, text):
    """On the left of a row of panels with one y axis."""
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel(text)


def legend(axes, where="right upper"):
    """One legend outside all panels, "right upper" for short words or "upper center", with every label once."""
    handles, figure = {}, axes.flat[0].figure
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    width, height = figure.get_size_inches()
    columns = 1 + len(handles) // int(5.5 * height)  # about six lines an inch
    if where == "upper center":
        columns = max(1, min(7, int(LETTERS * width / (8 + max(map(len, handles), default=0)))))
    figure.legend(handles.values(), handles, loc=f"outside {where}", ncols=columns)


def bars(ax, series, unit=1):
    """Bars of {label: {name: value}} side by side on a logarithmic axis. A zero has no bar: "0" stands there."""
    names, width = union(series.values()), 0.8 / len(series)
    positive = [unit * y for values in series.values() for y in values.values() if y > 0] or [1.0]
    low, high = min(positive) / 2, max(positive) * 1.5
    ax.set(yscale="log", ylim=(low, high), xlim=(-0.6, len(names) - 0.4))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=9))
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(names)), names, rotation=90 if sum(map(len, names)) > 80 else 0)
    ax.grid(False, axis="x")
    for k, (label, values) in enumerate(series.items()):
        x = [names.index(name) + (k - (len(series) - 1) / 2) * width for name in values]
        look = {"color": colours(k + 1)[k], "hatch": HATCHES[k % len(HATCHES)], "edgecolor": "black", "linewidth": 0.5}
        ax.bar(x, [unit * y for y in values.values()], width, label=label, **look)
        for place, y in zip(x, values.values(), strict=True):
            if y <= 0:
                ax.text(place, low, "0", ha="center", va="bottom")


# ---- The figures --------------------------------------------------------------------------------


def figure1(axes, results):
    """Mean spikes of each layer at each step, a panel a net."""
    names = union(r["spikes"] for r in results)
    for ax, r, label in panels(axes.flat, results):
        per_layer(ax, r["spikes"], names)
        ax.set_yscale("asinh", linear_width=1)  # a logarithm that has a 0, for layers fall silent
        ax.set_yticks([0, *(10**k for k in range(8))])
        ax.yaxis.set_major_formatter(PLAIN)
        ax.set_title(label)
        time_axis(ax, r["num_steps"])
        ylabel(ax, "spikes of an image in a layer")
    axes.flat[0].set_ylim(0, 2 * max(1, *(max(y) for r in results for y in r["spikes"].values())))  # for all panels
    legend(axes)


def figure2(axes, results):
    """The derivative that stands for that of a spike (eq. 8)."""
    for k, (_, r, label) in enumerate(panels([None] * len(results), results)):
        line(axes[0, 0], r["surrogate"]["v"], r["surrogate"]["derivative"], k, colours(len(results)), label=label)
    axes[0, 0].set(xlabel="distance from the threshold, v = u / threshold - 1", ylabel="surrogate d spike / d v")
    legend(axes, "upper center")


def figure3(axes, results):
    """A row a net: the input of one norm at some steps; its mean and deviation in a batch against the stored ones."""
    steps = sorted(union(r["norm_input"]["frequency"] for r in results), key=int)
    for row, r, label in panels(axes, results):
        data = r["norm_input"]
        per_step(row[0], data["frequency"], data["edges"], steps)
        row[0].set(title=f"{label}: {data['layer']}", xlabel="input of the norm", ylabel="frequency")
        cut_peaks(row[0], data["frequency"].values())
        for ax, kind, name in ((row[1], "mean", "mean"), (row[2], "std", "deviation")):
            for k, (key, words) in enumerate((("batch", "of the test images"), ("stored", "stored"))):
                if data[f"{key}_{kind}"]:
                    line(ax, range(1, r["num_steps"] + 1), data[f"{key}_{kind}"], k, colours(2), label=words)
            ax.set(ylabel=f"{name} of the input")
            time_axis(ax, r["num_steps"])
    legend(axes, "upper center")


def cut_peaks(ax, histograms):
    """Let a bin over three times as high as the others leave the axes: zeros of silent steps would hide the rest."""
    tops = [sorted([0, 0, *values])[-2:] for values in histograms]
    shown = max((second if first > 3 * second else first for second, first in tops), default=0)
    if 0 < 1.2 * shown < max(first for _, first in tops):
        ax.set(ylim=(0, 1.2 * shown), ylabel="frequency, cut at the top")


def figure4(axes, results):
    """A column a net: mean gamma of each layer and step, the largest below; the steps after the exit are shaded."""
    names = union(r["gamma"] for r in results)
    for column, r, label in panels(axes.T, results):
        T, rule = r["num_steps"], r["exit"]
        for ax, kind in zip(column, ("mean", "max"), strict=True):
            per_layer(ax, {name: gamma[kind] for name, gamma in r["gamma"].items()}, names)
            time_axis(ax, T)
            if rule and rule["step"] < T:
                right = ax.get_xlim()[1]
                ax.axvspan(rule["step"], right, color="0.5", alpha=0.25, linewidth=0, label="after the exit")
        words = "no exit"
        if rule:
            column[0].axhline(rule["gamma_threshold"], color="black", linestyle=":", label="threshold")
            words = f"exit at {rule['step']} of {T}" if rule["step"] < T else f"no exit before {T}"
        column[0].set(title=f"{label}: {words}", xlabel="")
        ylabel(column[0], "mean gamma of a layer")
        ylabel(column[1], "largest gamma of a layer")
    legend(axes)


def figure5(axes, results):
    """Spikes of an image over all steps / neurons, by layer, nets side by side."""
    bars(axes[0, 0], dict(zip(labels(results), (r["spike_rate"] for r in results), strict=True)))
    axes[0, 0].set_ylabel("spikes of a neuron over all steps")
    legend(axes, "upper center")


def figure6(axes, results):
    """A row a net: how gamma is distributed over channels at some steps, in the first, a middle and the last layer."""
    steps = sorted(union(gamma["counts"] for r in results for gamma in r["gamma"].values()), key=int)
    for row, r, label in panels(axes, results):
        for ax, name in zip(row, three_of(r["gamma"]), strict=False):
            counts = r["gamma"][name]["counts"].items()
            shares = {step: np.array(values) / max(1, sum(values)) for step, values in counts}
            per_step(ax, shares, r["gamma"][name]["edges"], steps)
            ax.set(title=f"{label}: {name}", xlabel="gamma", ylim=(0, None))
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ylabel(ax, "share of channels")
    legend(axes)


def three_of(names):
    names = list(names)
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def figure7(axes, results):
    """A column a data set: accuracy and exit step at every gamma threshold."""
    for column, dataset in zip(axes.T, data_sets(results), strict=True):
        for k, (_, r, label) in enumerate(panels([None] * len(results), results)):
            if r["data"]["dataset"] != dataset:
                continue
            points = sorted(r["exit"]["sweep"], key=lambda point: point["threshold_above"])
            start = [point["threshold_above"] for point in points]
            x = [*start, max(1.15 * start[-1], 1.5 * r["exit"]["gamma_threshold"])]  # the last goes on without end
            for ax, key in zip(column, ("acc", "exit_step"), strict=True):
                y = [point[key] for point in (*points, points[-1])]
                line(ax, x, y, k, colours(len(results)), label=label, drawstyle="steps-post")
        for used in {r["exit"]["gamma_threshold"] for r in results if r["data"]["dataset"] == dataset}:
            for ax in column:
                ax.axvline(used, color="black", linestyle=":", label="threshold in use")
        column[0].set_title(dataset)
        column[1].set_xlabel("gamma threshold")
        column[1].yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        ylabel(column[0], "accuracy at the exit, %")
        ylabel(column[1], "exit, time-step")
    legend(axes, "upper center")


def attack_words(point):
    """Tells attacks apart. width None: each image under the width that is worst for it."""
    steps, draws = (f"{point[key]} {key}" if point[key] > 1 else "" for key in ("steps", "draws"))
    width = "" if point["width"] == 1 else "worst width" if point["width"] is None else f"width {point['width']:g}"
    return ", ".join(filter(None, (point["kind"].upper(), steps, draws, width)))


def figure8(axes, results):
    """Accuracy against Gaussian noise (A) and attacks (B), a line a net; marks tell the attacks apart."""
    kinds = union({attack_words(point): None} for r in results for point in r["attack"] or [])
    left, palette = axes.flat[0], colours(len(results))
    for k, (_, r, label) in enumerate(panels([None] * len(results), results)):
        points = sorted(r["noise"] or [], key=lambda point: point["sigma"])
        if points:
            x, y = [p["sigma"] for p in points], [p["acc"] for p in points]
            line(left, x, y, k, palette, label=label, marker=".", markevery=1)
        for i, kind in enumerate(kinds):
            points = sorted((p for p in r["attack"] or [] if attack_words(p) == kind), key=lambda point: point["eps"])
            x, y = [255 * p["eps"] for p in points], [p["acc"] for p in points]
            line(axes.flat[-1], x, y, k, palette, label=label, marker=MARKS[i % len(MARKS)], markevery=1)
    if left.lines and (left is not axes.flat[-1] or not kinds):
        left.set(title="A: Gaussian noise", xlabel="deviation of the noise, images in [0, 1]")
    if kinds:
        axes.flat[-1].set(title="B: attack", xlabel="attack strength k, eps = k / 255")
        axes.flat[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for i, kind in enumerate(kinds):
            axes.flat[-1].plot([], [], color="black", marker=MARKS[i % len(MARKS)], mfc="none", ls="", label=kind)
    for ax in axes.flat:
        chance = 100 / max(1, len(results[0]["data"]["classes"]))
        ax.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        ylabel(ax, "accuracy, %")
    left.set_ylim(0)
    legend(axes, "upper center")


def figure_exits(axes, results):
    """A column a net: accuracy against mean steps of all exits; below, at which steps the images left."""
    policies = union(r["policies"] or {} for r in results)
    palette, bin_width = colours(len(policies)), -(-max(r["num_steps"] for r in results) // 50)
    for column, r, label in panels(axes.T, results):
        T, above, below = r["num_steps"], column[0], column[-1]  # one and the same where nothing was calibrated
        look = {"color": "black", "marker": "." if T <= 100 else "", "markersize": 3}
        above.plot(range(1, T + 1), r["accuracy"], label="fixed steps", **look)
        for name, policy in (r["policies"] or {}).items():
            k, best = policies.index(name), policy["calibrated"]
            curve = sorted(policy["curve"], key=lambda point: point[1])
            line(above, [x for _, x, _ in curve], [y for _, _, y in curve], k, palette, label=name)
            if best:
                look = {
                    "marker": "*",
                    "markersize": 9,
                    "markeredgecolor": "black",
                    "mew": 0.6,
                    "linestyle": "",
                    "zorder": 3,
                }
                words = f"{name}, calibrated"
                above.plot([best["mean_steps"]], [best["acc"]], color=palette[k], label=words, **look)
                share = 100 * np.array(best["histogram"]) / max(1, sum(best["histogram"]))
                starts = np.arange(0, T, bin_width)
                stairs(below, np.add.reduceat(share, starts), [*(starts + 0.5), T + 0.5], k, palette)
        if r["exit"]:
            at = sorted({point["exit_step"] for point in r["exit"]["sweep"]})
            above.plot(at, [r["accuracy"][t - 1] for t in at], "p", color="black", mfc="none", label="gamma threshold")
        if below is not above:
            time_axis(below, T, "exit, time-step")
            ylabel(below, f"share of images in {bin_width} steps, %" if bin_width > 1 else "share of images, %")
            if not below.has_data():
                below.text(0.5, 0.5, "nothing calibrated", transform=below.transAxes, ha="center")
        above.set_title(label)
        time_axis(above, T, "mean time-steps of an image")
        ylabel(above, "accuracy, %")
    legend(axes, "upper center")


def figure_maps(axes, results):
    """A row a net: mean gamma, stored deviation of the norm's input and spike rate, layer by step."""
    for row, r, label in panels(axes, results):
        rate = {name: np.array(y) / r["neurons"][name] for name, y in r["spikes"].items()}
        gamma = {name: values["mean"] for name, values in r["gamma"].items()}
        maps = {"mean gamma": gamma, "stored sigma": r["sigma"], "spikes of a neuron": rate}
        for ax, (title, values) in zip(row, maps.items(), strict=True):
            if values:
                extent = (0.5, r["num_steps"] + 0.5, len(values) - 0.5, -0.5)
                image = ax.imshow(list(values.values()), aspect="auto", interpolation="nearest", extent=extent)
                ax.figure.colorbar(image, ax=ax)
                ax.set_yticks(range(len(values)), values)
                ax.set_title(f"{label}: {title}")
                ax.grid(False)
                time_axis(ax, r["num_steps"])
                ax.set_xlim(extent[:2])


def figure_energy(axes, results):
    """A row a net: energy of an image in each layer, beside that of the same net without spikes."""
    for ax, r, label in panels(axes.flat, results):
        costs, (snn, ann) = picojoules(r), (1e-6 * r["energy"][key] for key in ("snn_pj", "ann_pj"))
        bars(ax, {kind: {name: pair[k] for name, pair in costs.items()} for k, kind in enumerate(("SNN", "ANN"))}, 1e-6)
        ratio = f", ANN / SNN = {ann / snn:.3g}" if snn > 0 else ""
        ax.set(title=f"{label}: SNN {snn:,.1f} µJ, ANN {ann:,.1f} µJ{ratio}", ylabel="energy of an image, µJ")
    legend(axes)


# ---- The table ----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """rows x columns of panels, each so many inches high, that share an axis ("row", "col", True) or not."""

    rows: int
    columns: int
    height: float
    sharex: bool | str = False
    sharey: bool | str = False


class Row(NamedTuple):
    """draw(axes, results), a title, layout(results), what each result must have, and must all be of one data set?"""

    draw: Callable
    title: str
    layout: Callable
    needs: tuple = ()
    one_data_set: bool = False


def calibrated(results):
    return any(policy["calibrated"] for r in results for policy in (r["policies"] or {}).values())


def one(results):
    return Layout(1, 1, 2.6)


def grid(results):
    return Layout(-(-len(results) // 3), min(3, len(results)), 2.6, sharey=True)


FIGURES = {
    "1": Row(figure1, "Spikes of each layer against time-steps, mean of all images", grid, ("spikes",), True),
    "2": Row(figure2, "Surrogate derivative as it is in use", one, ("surrogate",)),
    "3": Row(
        figure3, "Input of a norm, its statistics and the stored ones",
        lambda results: Layout(len(results), 3, 2.2), ("norm_input",),
    ),
    "4": Row(
        figure4, "Mean and largest gamma of each layer, and the early exit",
        lambda results: Layout(2, len(results), 1.9, "col", "row"), ("gamma",),
    ),
    "5": Row(figure5, "Spike rate of each layer", one, ("spikes",), True),
    "6": Row(
        figure6, "Gammas of the channels at several time-steps",
        lambda results: Layout(len(results), max(len(three_of(r["gamma"])) for r in results), 2.0), ("gamma",),
    ),
    "7": Row(
        figure7, "Accuracy and early exit against the gamma threshold",
        lambda results: Layout(2, len(data_sets(results)), 1.9, "col"), ("exit",),
    ),
    "8": Row(
        figure8, "Accuracy under Gaussian noise and under attack",
        lambda results: Layout(1, sum(any(r[key] for r in results) for key in ("noise", "attack")), 2.8, sharey=True),
        ("noise", "attack"), True,
    ),
    "exits": Row(
        figure_exits, "Accuracy against mean time-steps of all exits",
        lambda results: Layout(2 if calibrated(results) else 1, len(results), 2.3, sharey="row"), (), True,
    ),
    "maps": Row(
        figure_maps, "Gamma, sigma and spike rate by layer and time-step",
        lambda results: Layout(len(results), 3, 0.9 + 0.14 * max(len(r["spikes"]) for r in results)), ("gamma",),
    ),
    "energy": Row(
        figure_energy, "Energy of an image by layer, at 45 nm (Horowitz 2014)",
        lambda results: Layout(len(results), 1, 2.0),
    ),
}  # fmt: skip
WANTS = {
    "gamma": "a gamma of each time-step", "exit": "a gamma of each time-step", "norm_input": "the input of a norm",
    "spikes": "neurons that spike",
    "surrogate": "a surrogate derivative", "noise": "accuracies under noise", "attack": "accuracies under attack",
}  # fmt: skip

# ---- Drawing ------------------------------------------------------------------------------------


def check_numbers(numbers):
    """UserError if one of the numbers (or None: all) is not in FIGURES."""
    for number in numbers or ():
        if str(number) not in FIGURES:
            raise UserError(f"there is no figure {number}: choose among {' '.join(FIGURES)}")


def check(number, results):
    """UserError unless the figure can be drawn of all the results."""
    check_numbers([number])
    row, sets = FIGURES[number], data_sets(results)
    for r, label in zip(results, labels(results), strict=True):
        if lacking := [need for need in row.needs if not r[need]]:
            raise UserError(
                f"figure {number} needs {WANTS[lacking[0]]}, and {label} has none: leave one of the two out"
            )
    if row.one_data_set and len(sets) > 1:
        raise UserError(f"figure {number} compares nets on one data set, and these are on {' and '.join(sets)}")


def drawable(results):
    """[(number, results)] of all figures, each with the nets that have something to show; one for each data set."""
    found = []
    for number, row in FIGURES.items():
        able = [r for r in results if not row.needs or any(r[need] for need in row.needs)]
        groups = [[r for r in able if r["data"]["dataset"] == name] for name in data_sets(able)]
        found += [(number, group) for group in (groups if row.one_data_set else [able]) if group]
    return found


def caption(number, results):
    """The figure's title, and of what data."""
    data = ((r["data"]["dataset"], r["data"]["count"], r["num_steps"]) for r in results)
    data = [f"{name}, n\xa0=\xa0{count:,} test images, T\xa0=\xa0{T}" for name, count, T in dict.fromkeys(data)]
    if attacked := sorted({row["count"] for r in results for row in r["attack"] or []} if number == "8" else ()):
        data[-1] += f", attacks on {' and '.join(f'{count:,}' for count in attacked)} of them"
    return f"{f'Figure {number}: ' if number.isdecimal() else ''}{FIGURES[number].title}. {'; '.join(data)}."


def build(number, results, captioned=True):
    """The matplotlib figure."""
    layout = FIGURES[number].layout(results)
    width = max(WIDTH, 2.4 * layout.columns)
    figure = Figure(figsize=(width, layout.rows * layout.height + 0.4), layout="constrained")
    share = {"sharex": layout.sharex, "sharey": layout.sharey}
    axes = figure.subplots(layout.rows, layout.columns, squeeze=False, **share)
    FIGURES[number].draw(axes, results)
    for ax in axes.flat:
        ax.set_title(textwrap.fill(ax.get_title(), int(13 * width / layout.columns)))
        if not ax.has_data() and not ax.texts:
            ax.remove()
    if captioned:
        text = textwrap.fill(caption(number, results), int(LETTERS * width))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=FONT)
    return figure


def render(number, results, kind, captioned=True):
    """Bytes of the figure, kind "png" or "svg": the same for the same results."""
    file = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = build(number, results, captioned)
        figure.savefig(file, dpi=DPI, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def draw(results, folder, numbers=None):
    """Write figN.png and figN.svg of each N of `numbers` into `folder`, made if need be; return their paths.

    numbers: keys of FIGURES; None is all that can be drawn, each with the nets that have something to show in it.
    UserError, and nothing written, if one of the numbers does not exist or cannot be drawn of all the results.
    """
    if numbers is None:
        found = drawable(results)
        drawn = [number for number, _ in found]
        chosen = {number: group for number, group in found if drawn.count(number) == 1}  # of one data set
    else:
        chosen = {str(number): results for number in numbers}
        for number in chosen:
            check(number, results)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {reason_of(error)}") from None
    paths = []
    for number, group in chosen.items():
        for kind in ("png", "svg"):
            image, path = render(number, group, kind), Path(folder) / f"fig{number}.{kind}"
            runs.write_atomically(path, lambda file, image=image: file.write(image))
            paths.append(path)
    return paths


def page(results, path):
    """Write one HTML file with all figures that can be drawn, and the numbers. It loads nothing from elsewhere."""
    images = [(caption(n, group), render(n, group, "svg", captioned=False)) for n, group in drawable(results)]
    runs.write_text(path, pages.page(results, labels(results), images))
