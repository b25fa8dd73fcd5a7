"""Put section 3.3 to the test on a trained net: are the statistics of time-steps alike (eq. 12 to 14), and what becomes
of its spikes where BNTT is folded into thresholds (eq. 15)?

    python scripts/folding.py weights/cifar10_vgg9_T25.pth --data_dir data/cifar10 --limit_test 1000

Exactly folded, BNTT is a scale and a shift of each step's current: a_t = gamma_t / sigma_t, u_t = leak u_{t-1} +
a_t (x_t - mu_t), a spike where u_t > theta. Eq. 15 divides by a_t instead: v_t = leak v_{t-1} + x_t, threshold
theta / a_t. That leaves out the mean, and that a_t differs from a_{t-1}; "mean kept" leaves out the latter alone.

Writes folding.json, folding.md and folding.png into --out. The last line of stdout is folding.json as one line.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root

import matplotlib
import torch
import torch.nn as nn
from make_tables import interval, table
from tqdm import tqdm

import arguments
import data
import nets
import runs
import training_set
import utill
from model import BNTT, LIF, SpikingVGG, each_step
from utill import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

KINDS = {"eq. 15": False, "mean kept": True}  # folded into thresholds; whether the mean is subtracted


def statistics_of(net):
    """[(a, mu, sigma)] of each layer, float32 [T, C]: running statistics, and a = gamma / sigma.

    UserError unless the net is a chain of layers with BNTT and LIF neurons that integrate first.
    """
    if not isinstance(net, SpikingVGG) or any(
        type(layer.norm) is not BNTT or type(layer.lif) is not LIF or layer.lif.spike_order != LIF.ORDERS[0]
        for layer in net.layers()
    ):
        raise UserError("folding is of nets with --norm bntt, --neuron lif and --spike_order integrate_first")
    found = []
    for layer in net.layers():
        norms = layer.norm.batch_norms(net.num_steps)
        mu, var = (torch.stack([getattr(bn, f"running_{key}") for bn in norms]) for key in ("mean", "var"))
        sigma = (var + norms[0].eps).sqrt()
        found.append((layer.norm.gamma(net.num_steps) / sigma, mu, sigma))
    return found


def folded_step(x, v, a, mu, lif):
    """One time-step of neurons whose threshold holds the norm: (spikes, v). x: [B, C, ...]; a, mu: [C]; mu may be 0."""
    threshold = lif.threshold / a
    v = lif.leak * v + x - mu
    spikes = (v > threshold).to(v.dtype)
    return spikes, torch.where(spikes > 0, v - threshold, v)  # a gamma of 0 has an infinite threshold


@torch.no_grad()
def compare(net, images, folded):
    """Run images [B, C, S, S] exactly and folded. Returns ({layer: counts}, {way: logits [B, K]}).

    The counts are of neurons times steps: all of them; spikes of the exact net; by kind, spikes that differ where the
    layer alone is folded and sees what it sees in the exact net. The logits of a kind are those of all layers folded.
    """
    layers, membranes = net.layers(), {}
    counts = {layer.name: dict.fromkeys(("all", "spikes", *KINDS), 0) for layer in layers}
    voltages = dict.fromkeys(("exact", *KINDS), 0.0)
    for t in range(net.num_steps):
        flows = dict.fromkeys(voltages, net.encoder(images, 1, t))
        for layer, (a, mu, _) in zip(layers, folded, strict=True):
            linear = isinstance(layer.synapse, nn.Linear)
            x = {way: each_step(layer.synapse, flow.flatten(2) if linear else flow)[0] for way, flow in flows.items()}
            a, mu = (values[t].view(-1, *[1] * (x["exact"].ndim - 2)) for values in (a, mu))

            def folding(way, place, current, keeps, a=a, mu=mu, layer=layer):
                key = layer.name, way, place
                shift = mu if keeps else 0.0
                spikes, membranes[key] = folded_step(current, membranes.get(key, 0.0), a, shift, layer.lif)
                return spikes

            exact, membranes[layer.name] = layer.lif.step(a * (x["exact"] - mu), membranes.get(layer.name, 0.0))
            count = counts[layer.name]
            count["all"], count["spikes"] = count["all"] + exact.numel(), count["spikes"] + int(exact.sum())
            flows["exact"] = each_step(layer.pool, exact[None])
            for way, keeps in KINDS.items():
                count[way] += int((folding(way, "alone", x["exact"], keeps) != exact).sum())
                flows[way] = each_step(layer.pool, folding(way, "whole", x[way], keeps)[None])
        for way, flow in flows.items():
            voltages[way] = voltages[way] + each_step(net.readout, flow.flatten(2))[0]
    return counts, voltages


def measure(net, loader, seed):
    """What folding.json says of the layers and the accuracy."""
    folded, rights, totals = statistics_of(net), {}, {}
    utill.seed_stream(seed, 1)
    for images, labels in tqdm(loader, desc="folding", disable=None, leave=False):
        device = net.readout.weight.device
        counts, voltages = compare(net, images.to(device), folded)
        for name, count in counts.items():
            totals[name] = {key: value + totals.get(name, {}).get(key, 0) for key, value in count.items()}
        for way, logits in voltages.items():
            rights.setdefault(way, []).append(logits.argmax(1).cpu() == labels)
    rights = {way: torch.cat(right).double() for way, right in rights.items()}
    layers = []
    for layer, (a, mu, sigma) in zip(net.layers(), folded, strict=True):
        count, mean = totals[layer.name], sigma.mean(1)
        layers.append({
            "name": layer.name, "sigma": mean.tolist(), "mu_over_sigma": (mu.abs() / sigma).mean(1).tolist(),
            "negative_gammas": 100 * (a <= 0).double().mean().item(), "spikes": 100 * count["spikes"] / count["all"],
            "differ": {way: 100 * count[way] / max(1, count["spikes"]) for way in KINDS},
        })  # fmt: skip
    accuracy = {way: {"top1": 100 * right.mean().item()} for way, right in rights.items()}
    for way in KINDS:
        accuracy[way] |= utill.paired_difference(rights[way], rights["exact"])
    return {"count": len(rights["exact"]), "num_steps": net.num_steps, "layers": layers, "accuracy": accuracy}


def largest_deviation(values):
    """Largest deviation of values from their mean, in % of it."""
    mean = sum(values) / len(values)
    return 100 * max(abs(value / mean - 1) for value in values)


def page(result):
    """folding.md"""
    heads = ["layer", "sigma over steps: off its mean by up to, %", "from step 5 on, %", "mean of absolute mu / sigma"]
    heads += ["gammas of 0 and less, %", "neurons that spike, %", *(f"{way}: spikes that differ, %" for way in KINDS)]
    rows = []
    for layer in result["layers"]:
        late = layer["sigma"][4:]
        ratio = sum(layer["mu_over_sigma"]) / len(layer["mu_over_sigma"])
        deviations = [f"{largest_deviation(sigma):.2f}" if sigma else "-" for sigma in (layer["sigma"], late)]
        numbers = [f"{x:.2f}" for x in (ratio, layer["negative_gammas"], layer["spikes"])]
        rows.append([layer["name"], *deviations, *numbers, *(f"{x:.1f}" for x in layer["differ"].values())])
    accuracy = [["folded exactly", f"{result['accuracy']['exact']['top1']:.2f}", ""]]
    for way in KINDS:
        found = result["accuracy"][way]
        told = interval(found["difference"], found["half_interval"])
        accuracy.append([f"all layers by thresholds, {way}", f"{found['top1']:.2f}", told])
    return f"""# Can BNTT be folded into thresholds?

Section 3.3 of the paper takes the deviation sigma of a layer's input for alike over time-steps and its mean mu for
small (eq. 12 to 14), and folds BNTT into a threshold for each step (eq. 15). Exact is one scale and one shift of each
step's current. Eq. 15 leaves out the shift, and that the scale of a step is not that of the step before; "mean kept"
leaves out the latter alone. Spikes that differ: neurons times steps with another answer than in the exact net, where
this layer alone is folded and its input is that of the exact net, over the spikes of the exact net.

{table(heads, rows)}
{table(["", "accuracy, %", "difference (95 % interval, paired)"], accuracy)}
![Sigma and mean over time-steps, and spikes that differ](folding.png)

{result["what"]}, {result["count"]:,} test images, one net, one draw of its spikes: nets of another recipe may differ.
Command: `{result["command"]}`
"""


def draw(result, path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    layers, steps = result["layers"], range(1, result["num_steps"] + 1)
    for i, layer in enumerate(layers):
        colour, mean = plt.cm.viridis(i / len(layers)), sum(layer["sigma"]) / len(layer["sigma"])
        left.plot(steps, [value / mean for value in layer["sigma"]], ".-", color=colour, label=layer["name"])
        middle.plot(steps, layer["mu_over_sigma"], ".-", color=colour)
    left.set(title="sigma over its mean", xlabel="time-step", ylim=(0, None))
    left.legend(fontsize=7, ncols=2, frameon=False)
    middle.set(title="|mu| over sigma, mean of channels", xlabel="time-step", ylim=(0, None))
    for i, way in enumerate(KINDS):
        at = [x + 0.4 * i - 0.2 for x in range(len(layers))]
        right.bar(at, [layer["differ"][way] for layer in layers], 0.4, label=way)
    right.set_xticks(range(len(layers)), [layer["name"] for layer in layers], rotation=45)
    right.set(title="spikes that differ, % of the exact net's", ylim=(0, 1.25 * right.get_ylim()[1]))
    right.legend(frameon=False, ncols=2, loc="upper center")
    runs.write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    plt.close(figure)


@utill.entry_point
def main(argv=None):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    nets.add_net_arguments(parser)
    arguments.add_data_arguments(parser, data.DATASETS)
    arguments.add_run_arguments(parser)
    out = parser.add_argument_group("folding").add_argument
    where = "folder of folding.json, .md and .png (default: that of CHECKPOINT, or runs/NAME for one of weights/)"
    out("--out", default=None, type=arguments.path, help=where)
    parser.needs |= {flag: (lambda args: False, "the fused engine") for flag in ("--engine", "--amp", "--save_memory")}
    args, checkpoint = nets.parse_with_checkpoint(parser, argv)
    device = utill.pick_device(args.device)
    loaders = data.build_loaders(args, train=False, **training_set.known_data(checkpoint))
    args.engine = "plain"
    net = nets.load_net(args, checkpoint, loaders.facts, device).eval()
    result = measure(net, loaders.test, args.seed)
    environment = runs.environment(device, argv)
    size = f"{loaders.facts.img_size}x{loaders.facts.img_size}"
    result["what"] = f"{args.arch} on {args.dataset}, {size}, {args.encoding}, T = {args.num_steps}"
    result |= {"command": f"python scripts/{environment['command']}", "environment": environment}
    folder = Path(args.out) if args.out else nets.beside(args.checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "folding.json", result)
    runs.write_text(folder / "folding.md", page(result))
    draw(result, folder / "folding.png")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
