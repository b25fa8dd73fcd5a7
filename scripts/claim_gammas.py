"""Is the late fall of gamma learnt, or is it weight decay? From nets trained under several weight decays of gamma.

gammas: {layer: [mean gamma of its channels at each time-step]}, as early_exit.json has them.
"""

import itertools
import math
import statistics

from claim_parts import FAILS, HOLDS, OPEN, interval, judged, mean_and_half, verdict
from make_tables import flags_of, paired

from utill import learning_rate

ROWS = "gamma_0", "gamma_3.05", "gamma_18.3", "published_gamma_0", "published"
NETS = {  # {row: what its nets are}
    "gamma_0": "without weight decay on gammas",
    "gamma_3.05": "with the published command's weight decay on gammas (exponent 3.05)",
    "gamma_18.3": "with the paper's weight decay on gammas (exponent 18.3)",
}
PUBLISHED = flags_of("train.py --config configs/cifar10_vgg9.yaml", "the published command")
RULE = 0.1  # the threshold of the paper's early exit


def gamma_of(run):
    return run["exit"]["mean_gamma"]


def steps_of(run):
    """Steps of SGD in one of the run's epochs."""
    return run["train_images"] // run["config"]["batch_size"]


def rates(run):
    """The learning rate of each step of a run."""
    config, steps = run["config"], steps_of(run)
    schedule = config["lr_schedule"], config.get("warmup_epochs", 0.0)
    for epoch, step in itertools.product(range(config["num_epochs"]), range(steps)):
        yield learning_rate(config["lr"], epoch, config["num_epochs"], *schedule, step, steps)


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
    """{step: mean gamma} of the steps that training reached. At the others, gammas keep their first value, exactly 1:
    firing first, nothing has come so far yet, or can still reach the output."""
    return {step: value for step, value in enumerate(gammas, start=1) if value != 1.0}


def thirds(values):
    """(middle, last) third of the steps that training reached; both empty of fewer than three."""
    values = [*touched(values).values()]
    third = len(values) // 3
    return (values[third : len(values) - third], values[len(values) - third :]) if third else ([], [])


def late_over_middle(gammas):
    """{layer: mean gamma of the last third of its steps over that of the middle third}, of layers of three steps on."""
    parts = {layer: thirds(values) for layer, values in gammas.items()}
    return {layer: statistics.mean(late) / statistics.mean(middle) for layer, (middle, late) in parts.items() if late}


def late_over_peak(gammas):
    """{layer: mean gamma of the last third of its steps over the largest of any step}, of layers of three steps on."""
    parts = {layer: (thirds(values)[1], touched(values).values()) for layer, values in gammas.items()}
    return {layer: statistics.mean(late) / max(every) for layer, (late, every) in parts.items() if late}


RATIOS = {"late / middle": late_over_middle, "late / peak": late_over_peak}


def over_layers(found, name, ratio):
    """{seed: mean over layers of a ratio} of a row's runs."""
    ratios = {run["seed"]: ratio(gamma_of(run)).values() for run in found.get(name, [])}
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
    """Gammas fall late if late / middle is below 1."""
    if not (ratios := [*over_layers(kept, "gamma_0", late_over_middle).values()]):
        return None
    mean, half = mean_and_half(ratios)
    seen = f"[late / middle](claims/gamma.md) without weight decay on gammas: {interval(mean, half, '.3f')}"
    return seen, len(ratios), verdict(1 - mean, half)


def tell_deeper(kept, name):
    """The decay of a row does not deepen the fall if late / peak is not below that without decay."""
    with_decay, without = (over_layers(kept, row, late_over_peak) for row in (name, "gamma_0"))
    if not (pair := paired(with_decay, without)):
        return None
    mean, half, n = pair
    both = (statistics.mean(row[seed] for seed in row.keys() & other.keys())
            for row, other in ((with_decay, without), (without, with_decay)))  # fmt: skip
    seen = "[late / peak](claims/gamma.md) {:.3f} with it, {:.3f} without: ".format(*both)
    return seen + interval(mean, half, "+.3f"), n, verdict(mean, half)


def tell_exit(kept, name):
    """The rule exits early if it does in each net."""
    runs = kept[name]
    points, T = [exit_at(run, RULE) for run in runs], runs[0]["num_steps"]
    seen = f"[exit steps](claims/gamma.md) {exit_steps(points)} of {T}"
    if name != "gamma_0":
        lost = [point["acc"] - run["test_acc"] for point, run in zip(points, runs, strict=True)]
        seen += f"; accuracy there minus that of all steps: {interval(*mean_and_half(lost))}"
    early = HOLDS if all(point["exit_step"] < T for point in points) else FAILS
    return seen, len(runs), early if len(runs) > 1 else OPEN


def exit_steps(points):
    return ", ".join(str(point["exit_step"]) for point in points)


def claims(found):
    """That gammas fall without decay, that decay does not deepen their fall, and that the rule exits."""
    rows, where = lambda *names: {name: NETS[name] for name in names}, "3.4, figs. 4, 6"  # noqa: E731
    told = judged(found, rows("gamma_0"), "gamma.md", where, "gammas fall late, by training", tell_fall)
    for name in ("gamma_3.05", "gamma_18.3"):
        text = f"{NETS[name].removeprefix('with ')} does not deepen their fall"
        tell = lambda kept, name=name: tell_deeper(kept, name)  # noqa: E731
        told += judged(found, rows(name, "gamma_0"), "gamma.md", where, text, tell)
    for name in ("gamma_0", "gamma_3.05"):
        text = f"the gamma rule at {RULE:g} exits before T, {NETS[name]}"
        tell = lambda kept, name=name: tell_exit(kept, name)  # noqa: E731
        told += judged(found, rows(name), "gamma.md", "3.4", text, tell)
    return told
