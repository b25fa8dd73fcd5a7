"""What the claim_*.py share: a claim as a line of the table, its verdict, words and figures."""

import contextlib
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.style
from make_tables import apart, filled, flags_of, half_interval
from matplotlib.figure import Figure

from figures import DPI, STYLE, WIDTH
from image_data import CIFAR_CLASSES
from runs import write_atomically

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told at this scale"
FEW_SEEDS = 3  # a line of fewer says so
PUBLISHED = flags_of("train.py --config configs/cifar10_vgg9.yaml", "the published command")
CLASSES = 10  # of data sets but CIFAR: no file of a run tells how many there are


class Claim(NamedTuple):
    """A line of the table of claims."""

    where: str  # in the paper; "-" where it does not say so
    text: str
    seen: str  # with a link to a figure, or to a page that has one
    n: int  # seeds
    verdict: str
    images: int | None = None  # that one net was tested on, where the interval is over images
    nets: str = "one net"

    def cells(self):
        few = self.n < FEW_SEEDS and self.verdict != OPEN
        of = (self.nets if self.n == 1 else f"{self.n} seeds") if few else ""
        n = f"{self.nets}, {self.images:,} images" if self.images else str(self.n)
        return [self.where, self.text, self.seen, n, self.verdict + (f", in {of}" if of else "")]


class Page(NamedTuple):
    """A page below results/claims/: its text, or None where its runs are not there, and what draws its figures."""

    name: str
    text: str | None
    figures: dict[str, Callable] = {}  # {file name: draw(path)}


def chance(run):
    """Accuracy of a guess, in %."""
    names = CIFAR_CLASSES.get(run["dataset"].upper())
    return 100 / (len(names.split()) if names else CLASSES)


def learnt(run):
    """Whether a run's net is at least twice as accurate as a guess."""
    return run["test_acc"] >= 2 * chance(run)


def did_not_learn(runs):
    """'did not learn: 10.00, 14.71 % (chance is 10 %)'"""
    accuracies = ", ".join(f"{run['test_acc']:.2f}" for run in runs)
    return f"did not learn: {accuracies} % (chance is {chance(runs[0]):g} %)"


def those_that_learnt(found, names):
    """{row: its runs that learnt}, of those of these rows that have any."""
    kept = {name: [run for run in found.get(name, []) if learnt(run)] for name in names}
    return {name: runs for name, runs in kept.items() if runs}


def unlearnt(found, names, label):
    """A paragraph on the nets of these rows that did not learn, their row as label(run) tells it; "" where all did."""
    told, decays = [], False
    for name in names:
        runs = found.get(name, [])
        if bad := [run for run in runs if not learnt(run)]:
            told.append(f"{len(bad)} of {len(runs)} nets {label(bad[0])} {did_not_learn(bad)}")
            decays = decays or bad[0]["config"]["gamma_weight_decay"] > 0
    if not told:
        return ""
    text = (
        f"{'; '.join(told)}. An accuracy below twice chance counts as not learnt; no results of such nets stand below."
    )
    if decays:
        text += " Equal exponents in few steps are not the paper's condition, so that this tells nothing of the paper's"
        text += " own training."
    return f"\n{filled(text)}"


def judged(found, rows, page, where, text, tell):
    """[Claim], or [] where one of its rows was not run or shows nothing. Nets that did not learn are left out; a row of
    no others leaves the claim open.

    rows: {row: what its nets are, in words}. page: with more of it, below results/claims/. tell({row: its runs that
    learnt}) gives what was seen, the number of seeds and the verdict; None where there is nothing to see.
    """
    if not all(found.get(name) for name in rows):
        return []
    kept = {name: [run for run in found[name] if learnt(run)] for name in rows}
    for name, what in rows.items():
        if not kept[name]:
            seen = f"[nets](claims/{page}) {what} {did_not_learn(found[name])}"
            return [Claim(where, text, seen, len(found[name]), OPEN)]
    if not (told := tell(kept)):
        return []
    seen, n, answer = told
    if left_out := [run for name in rows for run in found[name] if not learnt(run)]:
        seen += f"; left out, as they {did_not_learn(left_out)}"
    return [Claim(where, text, seen, n, answer)]


def verdict(mean, half):
    """Of a number that a claim wants above 0, and half its interval or None."""
    if not apart(mean, half):
        return OPEN
    return HOLDS if mean > 0 else FAILS


def spread(values, form=".3f"):
    """'least to most'"""
    return f"{min(values):{form}} to {max(values):{form}}" if values else "-"


def mean_and_half(values):
    return statistics.mean(values), half_interval(values)


def log_mean(values):
    """Geometric mean; 0 where one of them is 0."""
    return math.exp(statistics.mean(map(math.log, values))) if all(values) else 0.0


def by_seed(found, name, key="test_acc"):
    """{seed: number} of the runs of a row that have it."""
    return {run["seed"]: run[key] for run in found.get(name, []) if key in run}


def setting(run):
    """What a run was, in words."""
    config = run["config"]
    size = f" at {config['img_size']}x{config['img_size']}" if config.get("img_size") else ""
    told = [f"{config['arch']}, {config['dataset']}{size}", f"{config['encoding']}, T = {config['num_steps']}"]
    told += [f"{run['train_images']:,} training images, {config['num_epochs']} epochs", f"{run['count']:,} test images"]
    return ", ".join(told)


def steps_of(run):
    """Steps of SGD in one of the run's epochs."""
    return run["train_images"] // run["config"]["batch_size"]


def training(run):
    """How a run was trained, in words, beside the published command."""

    def told(config):
        rate = f"learning rate {config['lr']:g} ({config['lr_schedule']} schedule), batches of {config['batch_size']}"
        return f"{rate}, momentum {config['momentum']:g}, weight decay {config['weight_decay']:g}"

    ours, epochs = run["config"], PUBLISHED["num_epochs"]
    return (
        f"Training: {told(ours)} of all weights but gammas, {ours['num_epochs'] * steps_of(run):,} steps. The "
        f"published command (`configs/cifar10_vgg9.yaml`): {told(PUBLISHED)} of all weights and gammas, {epochs} "
        "epochs."
    )


@contextlib.contextmanager
def drawn(path, height, width=WIDTH):
    """An empty figure, so many inches high and as wide as a page, written to `path` as a PNG at the end."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))
