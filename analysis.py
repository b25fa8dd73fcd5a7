"""Measure what a trained net shows, and draw the paper's figures of it.

    python analysis.py runs/x/best.pth.tar                          # analysis.json and figures beside the checkpoint
    python analysis.py a/best.pth.tar b/best.pth.tar --out cmp      # several nets side by side
    python analysis.py --from a/analysis.json b/analysis.json --out cmp --figures 1 5    # again, without a net
    python analysis.py runs/x/best.pth.tar --noise 0.05 0.1 0.2 --fgsm 2 4 8 --html

One pass over the test images leaves analysis.json beside each checkpoint: all that the figures need. Noise and attacks
take a pass each. Exits of each image are calibrated on images that the training held out (--val_fraction of train.py).
"""

import contextlib
import copy
import functools
import json
import sys
from pathlib import Path

import torch

import arguments
import attacks
import data
import exits
import figures
import nets
import runs
import training_set
import utill
from energy import energy
from utill import UserError

DIGITS = 6  # significant, of the numbers in analysis.json
BINS, SHOWN_STEPS, SURROGATE_POINTS = 60, 5, 121
ATTACK_IMAGES = 1000
# flags that name files and what runs it, or make figures, and so are not written into analysis.json
UNTOLD = ("checkpoint", "checkpoints", "config", "data_dir", "num_workers", "device", "out", "files", "figures", "html")


def parse_args(argv=None, path=None):
    """(args, checkpoint): argv over the settings of the checkpoint at `path`; (args, None) without one."""
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    nets.add_net_arguments(parser)
    arguments.add_data_arguments(parser, data.DATASETS)
    arguments.add_run_arguments(parser)
    add = parser.add_argument_group("measuring").add_argument
    add("--norm_layer", default=None, help="layer whose norm's input is shown (default: the middle one)")
    add("--gamma_threshold", default=0.1, type=arguments.positive_float, help="of the gamma exit")
    add("--target_drop", default=0.3, type=arguments.nonnegative_float, help="points of accuracy that exits may cost")
    add("--noise", default=[], nargs="+", type=arguments.nonnegative_float, metavar="SIGMA", help="on images in [0, 1]")
    add("--fgsm", default=[], nargs="+", type=arguments.eps255, metavar="K", help="FGSM of K/255")
    add("--pgd", default=[], nargs="+", type=arguments.eps255, metavar="K", help="PGD-7 of K/255")
    add("--draws", default=1, type=arguments.positive_int, help="gradient of an attack: mean over so many draws")
    add("--surrogate_width", default=[1.0], nargs="+", type=arguments.positive_float, metavar="W",
        help="widths of the attack's surrogate: with several, the worst counts")  # fmt: skip
    add("--attack_images", default=ATTACK_IMAGES, type=arguments.positive_int, help="of the test set")
    for flag in ("--draws", "--surrogate_width", "--attack_images"):
        parser.needs[flag] = (lambda args: args.fgsm or args.pgd, "an attack (--fgsm, --pgd)")
    add("--corruptions", default=None, type=arguments.path, metavar="DIR", help="CIFAR-10-C as published")
    add = parser.add_argument_group("drawing").add_argument
    add("--from", dest="files", default=[], nargs="+", type=arguments.path, metavar="JSON", help="analysis.json files")
    add(
        "--figures", default=None, nargs="+", metavar="N", help=f"of {' '.join(figures.FIGURES)} (default: what can be)"
    )
    add("--html", action="store_true", help="also one page with all figures and numbers, analysis.html")
    add(
        "--out",
        default=None,
        type=arguments.path,
        metavar="DIR",
        help="of the figures (default: beside the first file)",
    )
    parser.add_argument("checkpoints", nargs="*", type=arguments.path, help="of runs")
    return (parser.parse_args(argv), None) if path is None else nets.parse_with_checkpoint(parser, argv, path)


# ---- One pass over the test images -----------------------------------------------------------------------


class NormInput:
    """What the norm of one layer gets: histograms at some steps, mean and deviation at all, over all images.

    Watches the outputs of the synapse, one step at a time.
    """

    def __init__(self, layer, num_steps):
        self.layer, self.T, self.calls = layer, num_steps, 0
        self.steps = shown_steps(num_steps)
        self.count, self.sums, self.counts = 0, 0.0, {}
        self.stored = [
            torch.stack([getattr(bn, f"running_{key}") for bn in layer.norm.batch_norms(num_steps)]).double().cpu()
            for key in ("mean", "var")
        ]
        mean, var = self.stored  # at its widest step, a norm's input lies within 4 deviations of most channels
        self.edges = float((mean.abs() + 4 * var.sqrt()).mean(1).max())

    def __enter__(self):
        see = lambda module, inputs, output: self.see(output.detach().float())  # noqa: E731
        see.only_looks = True
        self.handle = self.layer.synapse.register_forward_hook(see)
        return self

    def __exit__(self, *exc):
        self.handle.remove()

    def see(self, x):
        """x: [B, C, ...], of the step that comes next."""
        t = self.calls % self.T
        self.calls += 1
        if self.calls == 1:
            self.sums = torch.zeros(2, self.T, x.shape[1], dtype=torch.float64)
        values = x.transpose(0, 1).flatten(1).double()
        self.sums[0, t] += values.sum(1).cpu()
        self.sums[1, t] += values.square().sum(1).cpu()
        self.count += values.shape[1] * (t == 0)
        if t + 1 in self.steps:
            found = torch.histc(x.clamp(-self.edges, self.edges), BINS, -self.edges, self.edges).double().cpu()
            self.counts[t + 1] = self.counts.get(t + 1, 0) + found

    def result(self):
        mean, square = self.sums / self.count
        deviation = (square - mean**2).clamp(min=0).sqrt()
        return {
            "layer": self.layer.name,
            "steps": self.steps,
            "edges": torch.linspace(-self.edges, self.edges, BINS + 1).tolist(),
            "frequency": {str(t): (n / n.sum()).tolist() for t, n in self.counts.items()},
            "batch_mean": mean.mean(1).tolist(),
            "batch_std": deviation.mean(1).tolist(),
            "stored_mean": self.stored[0].mean(1).tolist(),
            "stored_std": self.stored[1].sqrt().mean(1).tolist(),
        }


def shown_steps(T):
    """A few steps from 1 to T, evenly spaced."""
    return sorted({round(1 + (T - 1) * i / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)})


def check(args):
    """UserError where a net cannot be measured as the flags say, before it is."""
    if args.encoding == "frames" and (args.noise or args.fgsm or args.pgd or args.corruptions):
        raise UserError("--noise, --fgsm, --pgd and --corruptions change pictures: this net takes event frames")
    if args.corruptions and args.dataset != "cifar10":
        raise UserError(f"--corruptions: CIFAR-10-C is of CIFAR-10, and this net was trained on {args.dataset}")
    if args.corruptions:
        attacks.corruptions(args.corruptions)  # reads no more than the sizes


def measure(args, checkpoint):
    """All that the figures need of one net: the dict that becomes analysis.json."""
    device = utill.pick_device(args.device)
    args.amp = utill.pick_amp(device, args.amp)
    known, settings = training_set.known_data(checkpoint), training_set.trained_with(args.checkpoint, checkpoint)
    loaders = data.build_loaders(args, train=False, **known)
    held_loader = training_set.held_out(args, settings, **known)
    net = nets.load_net(args, checkpoint, loaders.facts, device)
    T, layers, classes = args.num_steps, net.layers(), loaders.facts.classes
    normed = [layer for layer in layers if hasattr(layer.norm, "batch_norms") and layer.norm.batch_norms(T)]
    watched = chosen_norm(normed, args.norm_layer, T)
    with utill.SpikeMeter(net, by_image=True) as meter, watched or contextlib.nullcontext():
        evaluation, seen = exits.watch(net, loaders.test, device, args, meter)
    held = exits.watch(net, held_loader, device, args, what="held out")[1] if held_loader else None
    gammas = {name: gamma.double().cpu() for name, gamma in net.gammas().items()}
    mean_gamma = torch.stack([gamma.mean(1) for gamma in gammas.values()]) if gammas else None
    here = runs.environment(device, [])
    return {
        "version": figures.VERSION,
        "name": Path(args.checkpoint).resolve().parent.name,
        "label": label_of(args),
        "config": {key: value for key, value in (vars(args) | settings).items() if key not in UNTOLD},
        "environment": {key: here[key] for key in ("device", "threads", "python", "torch", "git")},
        "data": {"dataset": args.dataset, "count": evaluation.count, "classes": classes},
        "num_steps": T,
        "logit_scale": args.logit_scale,
        "accuracy": [evaluation.top1(t) for t in range(1, T + 1)],
        "class_accuracy": {
            name: 100.0 * right / total
            for name, right, total in zip(classes, evaluation.class_correct, evaluation.class_count, strict=True)
            if total
        },
        "neurons": {name: count for name, count in meter.neurons.items() if name != "input"},
        "spikes": {name: (s / meter.images).tolist() for name, s in meter.spikes.items() if name != "input"},
        "input_spikes": (meter.spikes["input"] / meter.images).tolist(),
        "spike_rate": meter.rates(),
        "surrogate": surrogate(layers[0].lif) if layers else None,
        "gamma": {name: shape_of(gamma) for name, gamma in gammas.items()} or None,
        "sigma": {x.name: [bn.running_var.sqrt().mean().item() for bn in x.norm.batch_norms(T)] for x in normed}
        or None,
        "norm_input": watched.result() if watched else None,
        "exit": exits.gamma_report(mean_gamma, args.gamma_threshold, evaluation, meter) if gammas else None,
        "policies": {name: exits.report(name, seen, held, args.target_drop, classes) for name in exits.POLICIES},
        "energy": energy(meter),
        **robustness(net, args, loaders, known, device),
    }


def label_of(args):
    """What tells a net from others in a figure."""
    if args.arch in nets.ANNS:
        return "ann"
    return args.norm + ("" if args.neuron == "lif" else f", {args.neuron}")


def chosen_norm(normed, name, T):
    """A `NormInput` of the layer that was asked for, else of the middle one; None where no layer has a norm."""
    names = [layer.name for layer in normed]
    if name is not None and name not in names:
        raise UserError(f"--norm_layer {name}: this net has norms in {', '.join(names) or 'no layer'}")
    return NormInput(normed[names.index(name) if name else len(normed) // 2], T) if normed else None


def surrogate(neuron):
    """d spike / d v against v = u / threshold - 1, as the neuron computes it now; None of one that has no `fire`."""
    if not hasattr(neuron, "fire"):
        return None
    v = torch.linspace(-2, 2, SURROGATE_POINTS, dtype=torch.float64)
    membrane = ((v + 1) * float(neuron.threshold)).requires_grad_()
    (slope,) = torch.autograd.grad(neuron.fire(membrane).sum(), membrane)
    return {"v": v.tolist(), "derivative": (slope * float(neuron.threshold)).tolist()}


def takes_widths(net):
    """Whether a width of model.SurrogateSpike changes the gradient of the net's neurons."""
    layers = net.layers()
    if not layers:
        return False
    with attacks.attackable(net, 2.0):
        wide = surrogate(layers[0].lif)
    return wide != surrogate(layers[0].lif)


def shape_of(gamma):
    """gamma [T, features]: mean and maximum at each step, histograms at some."""
    low, high = float(gamma.min()), float(gamma.max())
    high = high if high > low else low + 1.0
    counts = {str(t): torch.histc(gamma[t - 1], BINS // 2, low, high).int().tolist() for t in shown_steps(len(gamma))}
    edges = torch.linspace(low, high, BINS // 2 + 1).tolist()
    return {"mean": gamma.mean(1).tolist(), "max": gamma.amax(1).tolist(), "edges": edges, "counts": counts}


# ---- Noise, attacks, corruptions: a pass over the test images each -----------------------------------------


class Changed:
    """A loader whose images were changed: change(images in [0, 1], labels) -> images in [0, 1]."""

    def __init__(self, loader, facts, device, change):
        self.loader, self.change, self.num_images, self.device = loader, change, loader.num_images, device
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (facts.mean, facts.std))

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            images = self.change((images * self.std + self.mean).clamp(0, 1), labels)
            yield self.normalise(images), labels

    def normalise(self, images):
        return (images - self.mean) / self.std


class Pictures:
    """A loader of uint8 pictures [N, H, W, C], memory-mapped."""

    def __init__(self, images, labels, facts, args):
        self.images, self.labels, self.facts, self.num_images = images, labels, facts, len(labels)
        self.batch_size, self.size = args.batch_size, args.img_size

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def __iter__(self):
        for at in range(0, self.num_images, self.batch_size):
            images = torch.from_numpy(self.images[at : at + self.batch_size].copy()).permute(0, 3, 1, 2)
            images = images if self.size is None else data.resize(images, self.size)
            yield data.normalize(images, self.facts.mean, self.facts.std), self.labels[at : at + self.batch_size]


def robustness(net, args, loaders, known, device):
    """{"noise", "attack", "corruptions"}: accuracies under what the flags ask for, None each where they ask nothing."""
    found = {"noise": None, "attack": None, "corruptions": None}
    if not (args.noise or args.fgsm or args.pgd or args.corruptions):
        return found

    def accuracy(loader, change, what):
        """(accuracy in %, which images were answered rightly)"""
        evaluation, seen = exits.watch(net, Changed(loader, loaders.facts, device, change), device, args, what=what)
        return evaluation.top1(), seen.hits[-1]

    if args.noise:
        found["noise"] = []
        for sigma in args.noise:
            draw = torch.Generator().manual_seed(args.seed)
            acc, hits = accuracy(loaders.test, lambda x, _, s=sigma, g=draw: attacks.noisy(x, s, g), f"noise {sigma:g}")
            found["noise"].append({"sigma": sigma, "acc": acc, "count": len(hits)})
    if args.fgsm or args.pgd:
        few = copy.copy(args)
        few.limit_test = min(args.attack_images, args.limit_test or args.attack_images)
        found["attack"] = attacked(net, args, data.build_loaders(few, train=False, **known), accuracy)
    if args.corruptions:
        found["corruptions"] = {}
        for name, (images, labels) in attacks.corruptions(args.corruptions).items():
            n = min(args.limit_test or len(labels[0]), len(labels[0]))
            by_severity = []
            for k in range(len(images)):
                pictures = Pictures(images[k][:n], labels[k][:n], loaders.facts, args)
                by_severity.append(exits.watch(net, pictures, device, args, what=f"{name} {k + 1}")[0].top1())
            found["corruptions"][name] = by_severity
    return found


def attacked(net, args, loaders, accuracy):
    """A row for each attack, strength and width of its surrogate; width None: right under every width, so the worst."""
    rows, normalise = [], Changed(loaders.test, loaders.facts, utill.pick_device(args.device), None).normalise
    logits = lambda images: args.logit_scale * net(normalise(images))  # noqa: E731
    widths = args.surrogate_width
    if widths != [1.0] and not takes_widths(net):
        print("--surrogate_width does nothing: neurons without model.SurrogateSpike are attacked by their own gradient")
        widths = [1.0]
    for kind, k in [*(("fgsm", k) for k in args.fgsm), *(("pgd", k) for k in args.pgd)]:
        right = []
        for width in widths:
            change = functools.partial(getattr(attacks, kind), logits, eps=k / 255, draws=args.draws)
            with attacks.attackable(net, width):
                acc, hits = accuracy(loaders.test, change, f"{kind} {k:g}/255, width {width:g}")
            right.append(hits)
            row = {"kind": kind, "eps": k / 255, "draws": args.draws, "steps": 7 if kind == "pgd" else 1}
            rows.append(row | {"width": width, "acc": acc, "count": len(hits)})
        if len(right) > 1:
            worst = 100.0 * torch.stack(right).all(0).double().mean().item()
            rows.append(row | {"width": None, "acc": worst, "count": len(right[0])})
    return rows


# ---- The command line ----------------------------------------------------------------------------------------


def rounded(value):
    """A JSON value whose numbers have DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, (list, tuple)) else value


def summary(result):
    """What a measured net shows, in lines of text."""
    accuracy, policies = result["accuracy"], result["policies"]
    yield f"{result['name']}: {accuracy[-1]:.2f} % of {result['data']['count']} images, T = {result['num_steps']}"
    if found := result["exit"]:
        rule = f"gamma exit at {found['step']} (threshold {found['gamma_threshold']:g})"
        yield f"  {rule}: {accuracy[found['step'] - 1]:.2f} %"
    for name, policy in policies.items():
        if found := policy["calibrated"]:
            yield f"  {name}: {found['acc']:.2f} % after {found['mean_steps']:.2f} steps in the mean"
    if not any(policy["calibrated"] for policy in policies.values()):
        yield "  exits of each image are not calibrated: the training held no images out (--val_fraction)"
    cost = result["energy"]
    yield f"  arithmetic {cost['snn_pj'] / 1e6:.3f} uJ an image, without spikes {cost['ann_pj'] / 1e6:.3f} uJ"
    for row in result["noise"] or []:
        yield f"  noise {row['sigma']:g}: {row['acc']:.2f} % of {row['count']}"
    for row in result["attack"] or []:
        width = "worst of all widths" if row["width"] is None else f"surrogate width {row['width']:g}"
        attack = f"{row['kind']} {255 * row['eps']:.4g}/255, {width}, {row['draws']} draws"
        yield f"  {attack}: {row['acc']:.2f} % of {row['count']}"
    for name, accuracies in (result["corruptions"] or {}).items():
        yield f"  {name}, severity 1 to 5: {' '.join(f'{acc:.2f}' for acc in accuracies)} %"


@utill.entry_point
def main(argv=None):
    first, _ = parse_args(argv)
    if not first.checkpoints and not first.files:
        raise UserError("name a CHECKPOINT to measure, or --from an analysis.json")
    figures.check_numbers(first.figures)
    if first.out and Path(first.out).exists() and not Path(first.out).is_dir():
        raise UserError(f"--out {first.out}: it is a file, name a folder")
    results = [figures.load(file) for file in first.files]
    for path in first.checkpoints:
        args, checkpoint = parse_args(argv, path)
        check(args)
        result = rounded(measure(args, checkpoint))
        print(*summary(result), sep="\n")
        runs.write_json(nets.beside(path) / "analysis.json", result)
        results.append(result)
    folder = Path(first.out or nets.beside([*first.checkpoints, *first.files][0]))
    folder.mkdir(parents=True, exist_ok=True)
    # of files, damage of any kind; of what was just measured, errors of our own are to be seen
    with utill.reading(" or ".join(first.files)) if first.files else contextlib.nullcontext():
        paths = figures.draw(results, folder, first.figures)
        if first.html:
            figures.page(results, folder / "analysis.html")
            paths.append(folder / "analysis.html")
    print(json.dumps({"figures": [str(path) for path in paths]}))


if __name__ == "__main__":
    sys.exit(main())
