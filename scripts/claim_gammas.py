"""Is the late fall of gamma learnt, or is it weight decay? From nets trained under several weight decays of gamma.

gammas: {layer: [mean gamma of its channels at each time-step]}, as early_exit.json has them.
"""

import itertools
import math
import statistics

from claim_parts import FAILS, HOLDS, OPEN, judged, mean_and_half, steps_of, verdict
from make_tables import interval, paired

from utill import learning_rate

ROWS = "gamma_0", "gamma_3.05", "gamma_18.3", "published_gamma_0", "published"
NETS = {  # {row: what its nets are}; an exponent is the same total decay, in other steps
    "gamma_0": "without weight decay on gammas",
    "gamma_3.05": "with the weight decay of the published command's exponent (3.05) on gammas",
    "gamma_18.3": "with the weight decay of the paper's exponent (18.3) on gammas",
}
FALL = 0.01  # of late / middle: less is no fall to speak of
RULE = 0.1  # the threshold of the paper's early exit


def gamma_of(run):
    return run["exit"]["mean_gamma"]


def rates(run):
    """The learning rate of each step of a run."""
    config, steps = run["config"], steps_of(run)
    schedule = config["lr_schedule"], config.get("warmup_epochs", 0.0)
    for epoch, step in itertools.product(range(config["num_epochs"]), range(steps)):
        yield learning_rate(config["lr"], epoch, config["num_epochs"], *schedule, step, steps)


def steps_in_all(run):
    return run["config"]["num_epochs"] * steps_of(run)


def exponent(run):
    """Sum of learning rates times the weight decay on gamma, over 1 - momentum."""
    return sum(rates(run)) * run["config"]["gamma_weight_decay"] / (1 - run["config"]["momentum"])


def decayed(run):
    """What weight decay alone makes of a gamma of 1 in this run: SGD with momentum, step by step."""
    config, gamma, velocity = run["config"], 1.0, 0.0
    for lr in rates(run):
        velocity = config["momentum"] * velocity + config["gamma_weight_decay"] * gamma
        gamma -= lr * velocity
    return gamma


def touched(gammas):
    """{step: mean gamma} of the steps whose mean gamma is not exactly 1, the value that all begin with."""
    return {step: value for step, value in enumerate(gammas, start=1) if value != 1.0}


def untouched(values):
    """(how many first steps, how many last steps) kept a mean gamma of exactly 1; (0, all) if all did."""
    steps = [*touched(values)] or [1, 0]
    return steps[0] - 1, len(values) - steps[-1]


def thirds(steps):
    """(middle, last) third of some steps; both empty of fewer than three."""
    steps, third = [*steps], len(steps) // 3
    return (steps[third : len(steps) - third], steps[len(steps) - third :]) if third else ([], [])


def late_over_middle(gammas):
    """{layer: mean gamma of the last third of its steps over that of the middle third}, of layers of three steps on."""
    ratios = {}
    for layer, values in gammas.items():
        middle, late = thirds(touched(values).values())
        if late:
            ratios[layer] = statistics.mean(late) / statistics.mean(middle)
    return ratios


def over_layers(found, name):
    """{seed: late / middle in the mean of layers} of a row's runs."""
    ratios = {run["seed"]: late_over_middle(gamma_of(run)).values() for run in found.get(name, [])}
    return {seed: statistics.mean(values) for seed, values in ratios.items() if values}


def exit_at(run, threshold):
    """The point of the run's sweep that is the exit at this threshold."""
    return next(
        point
        for point in run["exit"]["sweep"]
        if point["threshold_above"] < threshold and threshold <= (point["threshold_up_to"] or math.inf)
    )


# ---- Claims --------------------------------------------------------------------------------------


def tell_fall(kept):
    """Gammas fall late if late / middle is below 1 by FALL and more."""
    if not (ratios := [*over_layers(kept, "gamma_0").values()]):
        return None
    mean, half = mean_and_half(ratios)
    seen = f"[late / middle](claims/gamma.md) without weight decay on gammas: {interval(mean, half, '.5f')}"
    return seen, len(ratios), verdict(1 - FALL - mean, half)


def tell_deeper(kept, name):
    """The decay of a row deepens the fall if late / middle is below that without decay."""
    with_decay, without = (over_layers(kept, row) for row in (name, "gamma_0"))
    if not (pair := paired(with_decay, without)):
        return None
    mean, half, n = pair
    both = (statistics.mean(row[seed] for seed in row.keys() & other.keys())
            for row, other in ((with_decay, without), (without, with_decay)))  # fmt: skip
    seen = "[late / middle](claims/gamma.md) {:.3f} with it, {:.3f} without: ".format(*both)
    return seen + interval(mean, half, "+.3f"), n, verdict(-mean, half)


def tell_exit(kept, name):
    """The rule exits early if it does in each net."""
    runs = kept[name]
    points, T = [exit_at(run, RULE) for run in runs], runs[0]["num_steps"]
    seen = f"[exit steps](claims/gamma.md) {exit_steps(points, T)} of {T}"
    if name != "gamma_0":
        lost = [point["acc"] - run["test_acc"] for point, run in zip(points, runs, strict=True)]
        seen += f"; accuracy there minus that of all steps: {interval(*mean_and_half(lost))}"
    early = {point["exit_step"] < T for point in points}
    return seen, len(runs), OPEN if len(runs) == 1 or len(early) > 1 else HOLDS if early == {True} else FAILS


def exit_steps(points, T):
    """'19, none': an exit at T is none."""
    return ", ".join(str(point["exit_step"]) if point["exit_step"] < T else "none" for point in points)


def claims(found):
    """That gammas fall without decay, that decay makes them fall further, and that the rule exits."""
    rows, where = lambda *names: {name: NETS[name] for name in names}, "3.4, figs. 4, 6"  # noqa: E731
    steps = steps_in_all(found["gamma_0"][0]) if found.get("gamma_0") else 0
    text = f"{steps:,} steps of training make gammas fall late (by 1 % and more)"
    told = judged(found, rows("gamma_0"), "gamma.md", where, text, tell_fall)
    for name in ("gamma_3.05", "gamma_18.3"):
        text = f"{NETS[name].removeprefix('with ')} makes them fall late, or further"
        tell = lambda kept, name=name: tell_deeper(kept, name)  # noqa: E731
        told += judged(found, rows(name, "gamma_0"), "gamma.md", where, text, tell)
    for name in ("gamma_0", "gamma_3.05"):
        text = f"the gamma rule at {RULE:g} exits before T, {NETS[name]}"
        tell = lambda kept, name=name: tell_exit(kept, name)  # noqa: E731
        told += judged(found, rows(name), "gamma.md", "3.4", text, tell)
    return told
