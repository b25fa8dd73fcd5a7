"""When a net may stop: the exit read off the gammas, the same for all images, and those of each image by its output.

Shapes: T time-steps, N images, K classes, voltages [T, N, K] after every step. An exit step is in 1..T; T is no exit.
"""

import functools
from typing import NamedTuple

import torch
from tqdm import tqdm

import utill


def exit_step(mean_gamma, threshold):
    """Smallest number of time-steps after which every layer's mean gamma stays below `threshold` (paper, section 3.4).

    mean_gamma: [layers, T]. Returns an int in 1..T; T means that there is no early exit.
    """
    open_steps = (mean_gamma >= threshold).any(dim=0).nonzero()
    return int(open_steps.max()) + 1 if len(open_steps) else 1


def sweep_thresholds(mean_gamma):
    """{exit step: (lowest, highest) gamma threshold that gives it}: every exit that some threshold yields.

    The exit can only change where the threshold crosses the largest mean gamma of all later steps.
    """
    largest = mean_gamma.max(dim=0).values
    ahead = largest.flip(0).cummax(0).values.flip(0)  # over this and all later steps
    exits, low = {}, 0.0
    for value in [*ahead[1:].unique().tolist(), float("inf")]:  # ascending
        if value > 0:
            exits[exit_step(mean_gamma, value)] = (low, value)
            low = value
    return exits


# ---- Exits of each image: the first step at which its output is sure enough ------------------------------


def exit_probabilities(voltage, steps, logit_scale=1.0):
    """Softmax of the logits that an exit after `steps` has: voltage [N, K] over the steps run, times logit_scale."""
    return (logit_scale * voltage.double() / steps).softmax(-1)


def confidence(p):
    """Probability of the likeliest class, [N], of probabilities p [N, K]."""
    return p.max(-1).values


def certainty(p):
    """1 - entropy / log K, [N]: 0 where all classes are alike, 1 where one is certain (SEENN, Li et al. 2023)."""
    return 1 + torch.special.xlogy(p, p).sum(-1) / torch.log(torch.tensor(float(p.shape[-1])))


def margin(p):
    """Probability of the likeliest class less that of the second, [N]."""
    first, second = p.topk(2, -1).values.unbind(-1)
    return first - second


POLICIES = {"confidence": confidence, "entropy": certainty, "margin": margin}  # large: sure


def image_exits(sureness, threshold):
    """First step at which each image is at least that sure, int64 [N] in 1..T. sureness: [T, N]."""
    sure = sureness >= threshold
    sure[-1] = True
    return sure.int().argmax(0) + 1


def at_exits(values, exits):
    """values [T, N] at each image's exit step, [N]."""
    return values.gather(0, exits[None] - 1)[0]


def curve(sureness, hits, points=100):
    """[(threshold, mean exit step, accuracy in %)], the threshold rising: what a policy can have on these images.

    hits: bool [T, N], whether the answer at each step is right. Thresholds are quantiles of the sureness; the last is
    inf, which no image reaches.
    """
    at = torch.linspace(0, 1, points, dtype=torch.float64)
    candidates = sureness.double().flatten().sort().values
    thresholds = candidates[(at * (len(candidates) - 1)).round().long()].unique().tolist()
    found = []
    for threshold in [*thresholds, float("inf")]:
        exits = image_exits(sureness, threshold)
        right = 100.0 * at_exits(hits, exits).double().mean().item()
        found.append((threshold, exits.double().mean().item(), right))
    return found


def calibrate(points, target_drop):
    """The lowest threshold of a `curve` from which on no accuracy is over target_drop points below that of all T.

    Measure the curve on images that are neither trained nor tested on. inf (no exit) if only that threshold does.
    """
    floor, found = points[-1][2] - target_drop, points[-1][0]
    for threshold, _, right in reversed(points):
        if right < floor:
            break
        found = threshold
    return found


class Seen(NamedTuple):
    """What a net answered over a set of images: a pass to choose exits from without running it again."""

    voltages: torch.Tensor  # float32 [T, N, K]
    labels: torch.Tensor  # int64 [N]
    logit_scale: float = 1.0
    spikes: torch.Tensor | None = None  # [T, N], of each image at each step
    operations: torch.Tensor | None = None

    @property
    def hits(self):
        return self.voltages.argmax(-1) == self.labels

    def sureness(self, policy):
        """[T, N] of a function in POLICIES; step by step, as many steps and classes make large tensors."""
        steps = enumerate(self.voltages, 1)
        return torch.stack([policy(exit_probabilities(voltage, t, self.logit_scale)) for t, voltage in steps])


def watch(net, loader, device, args, meter=None, what="test"):
    """Answers of the net over a loader's images: (`Evaluation`, `Seen`). Shows a progress bar called `what`.

    args: the flags logit_scale, seed and amp. meter: a `utill.SpikeMeter` by image, that is watching the net.
    """
    kept, loss = [], utill.CrossEntropy(args.logit_scale)
    progress = functools.partial(tqdm, desc=what, disable=None, leave=False)
    see = lambda voltages, labels: kept.append((voltages.cpu(), labels.cpu()))  # noqa: E731
    evaluation = utill.evaluate(net, loader, device, loss, args.seed, amp=args.amp, progress=progress, see=see)
    voltages, labels = torch.cat([v for v, _ in kept], 1), torch.cat([y for _, y in kept])
    seen = Seen(voltages, labels, args.logit_scale)
    if meter:
        seen = seen._replace(spikes=torch.cat(meter.image_spikes, 1), operations=torch.cat(meter.image_operations, 1))
    return evaluation, seen


def gamma_report(mean_gamma, threshold, evaluation, meter):
    """The paper's exit at this threshold, and every exit that some threshold yields: a dict of plain numbers."""
    spikes = sum(s for name, s in meter.spikes.items() if name != "input")
    amounts, sweep = {"spikes": spikes, "operations": meter.operations()}, []
    for step, (low, high) in sorted(sweep_thresholds(mean_gamma).items()):
        point = {"exit_step": step, "acc": evaluation.top1(step)}
        point |= {f"{what}_saved": saved(x[:, None], torch.tensor([step])) for what, x in amounts.items()}
        sweep.append(point | {"threshold_above": low, "threshold_up_to": _plain([high])[0]})
    step = exit_step(mean_gamma, threshold)
    at = next(point for point in sweep if point["exit_step"] == step)
    at = {key: at[key] for key in ("spikes_saved", "operations_saved")}
    return {"gamma_threshold": threshold, "step": step, **at, "sweep": sweep}


def saved(amounts, exits):
    """Share in % of amounts [T, N] that come after each image's exit step [N]."""
    after = torch.arange(1, len(amounts) + 1)[:, None] > exits
    return 100.0 * float((amounts * after).sum() / amounts.sum().clamp(min=1e-300))


def report(policy, test, held, target_drop, classes):
    """What a policy gives on the test images, its threshold calibrated on those held out: a dict of plain numbers.

    policy: a name in POLICIES; test, held: `Seen`, held None where no images were held out, so nothing is calibrated.
    curve: [threshold, mean exit step, accuracy in %] of the test images. A threshold of None is never reached.
    """
    sure = test.sureness(POLICIES[policy])
    found = {"curve": [_plain(point) for point in curve(sure, test.hits)]}
    if held is None:
        return found | {"calibrated": None}
    threshold = calibrate(curve(held.sureness(POLICIES[policy]), held.hits), target_drop)
    exits = image_exits(sure, threshold)
    by_class = {
        c: exits[test.labels == k].double().mean().item() for k, c in enumerate(classes) if (test.labels == k).any()
    }
    calibrated = {
        "threshold": _plain([threshold])[0],
        "target_drop": target_drop,
        "held_out": len(held.labels),
        "mean_steps": exits.double().mean().item(),
        "acc": 100.0 * at_exits(test.hits, exits).double().mean().item(),
        "spikes_saved": saved(test.spikes, exits),
        "operations_saved": saved(test.operations, exits),
        "histogram": torch.bincount(exits, minlength=len(test.spikes) + 1)[1:].tolist(),
        "mean_steps_by_class": by_class,
    }
    return found | {"calibrated": calibrated}


def _plain(point):
    return [None if value == float("inf") else value for value in point]


@torch.no_grad()
def run_with_exits(net, images, policy, threshold, logit_scale=1.0):
    """Answer images [B, ...] and really stop: who is sure enough leaves the batch.

    policy: a function of probabilities, as in POLICIES. Returns (exit steps [B], output voltages there [B, K]). In eval
    mode; draws of the encoder are those of a full run.
    """
    T, K = net.num_steps, net.readout.weight.shape[0]
    going, keep = torch.arange(len(images), device=images.device), None
    exits = torch.full_like(going, T)
    answers = torch.zeros(len(images), K, dtype=torch.promote_types(images.dtype, torch.float32), device=images.device)
    stream = net.stream(images, T, 1)
    for t in range(1, T + 1):
        voltage = stream.send(keep)[0].to(answers.dtype)
        answers[going] = voltage
        if t == T:
            break
        sure = policy(exit_probabilities(voltage, t, logit_scale)) >= threshold
        exits[going[sure]] = t
        keep = (~sure).nonzero()[:, 0]
        going = going[keep]
        if not len(going):
            break
        keep = keep if sure.any() else None
    stream.close()
    return exits, answers
