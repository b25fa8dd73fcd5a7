"""The nets that flags and checkpoints name: tables of their parts, building, weights, engine.

A new norm or neuron is a class of its own (see baselines.py) and one row here; encoders are rows in encoders.py,
chains of layers in model.py.
"""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

import arguments
import fused
import runs
import utill
from arguments import fraction, positive_float, size, unit_float
from baselines import ANN, IF, PLIF, TEBN, BetaBNTT, DropoutLIF, HardReset, LayerNorm, LearntLIF, ScaledSurrogate, TdBN
from encoders import ENCODERS
from model import ARCHS, BNTT, LIF, NoNorm, SharedBN, SpikingVGG
from utill import DataFacts, UserError, reading

NORMS = {"bntt": BNTT, "bn": SharedBN, "none": NoNorm, "tdbn": TdBN, "tebn": TEBN, "ln": LayerNorm}
NORMS["bntt_beta"] = BetaBNTT
OF_STEPS = ("bntt", "bntt_beta")  # with a BatchNorm of its own at each time-step
WITHOUT_STATISTICS = ("none", "ln")
NEURONS = {"lif": LIF, "plif": PLIF, "if": IF, "learnt_lif": LearntLIF, "hard_reset": HardReset}
NEURONS |= {f"alpha_{alpha:g}": partial(ScaledSurrogate, alpha=alpha) for alpha in (0.1, 1.0)}
NEURONS["dropout_0.2"] = partial(DropoutLIF, p=0.2)
ANNS = {"vgg9_ann": "vgg9", "vgg11_ann": "vgg11"}  # the same nets without spikes
# Flags of an ANN: what they are, and those of a spiking neuron, which stay at their defaults.
OF_ANN = {"num_steps": 1, "norm": "none", "encoding": "direct"}
OF_NEURON = {"neuron": "lif", "leak_mem": 0.95, "threshold": 1.0, "spike_order": LIF.ORDERS[0]}

# What a checkpoint must say of its net and data, and what of its settings belonged to the training alone.
NEEDED = ("arch", "num_steps", "leak_mem", "threshold", "norm", "encoding", "spike_order", "dataset")
UNSAID = ("leak_mem", "num_steps")  # what weights alone do not say
SIZES = ("num_cls", "in_channels", "img_size")
TRAINING_ONLY = ("device", "engine", "save_memory", "limit_test")

# {name: what is known of the trained net weights/NAME.pth}, written by scripts/publish_weights.py
SHIPPED = Path(__file__).resolve().parent / "weights"
WEIGHTS = json.loads((SHIPPED / "index.json").read_text()) if (SHIPPED / "index.json").exists() else {}


def add_net_arguments(parser):
    """The flags that define the net."""
    add = parser.add_argument_group("network").add_argument
    parser.fill = fill
    add("--arch", default="vgg9", choices=[*ARCHS, *ANNS], help="network; of those in _ann neurons do not spike")
    add("--num_steps", default=None, type=size, help="time-steps T (default: 25)")
    add("--leak_mem", default=0.95, type=unit_float, help="membrane leak per step")
    add("--threshold", default=1.0, type=positive_float, help="firing threshold")
    add("--norm", default=None, choices=list(NORMS), help="normalisation (default: bntt)")
    add("--neuron", default="lif", choices=list(NEURONS), help="spiking neuron")
    add("--encoding", default=None, choices=list(ENCODERS), help="input encoding (default: as suits the data set)")
    add("--spike_order", default="integrate_first", choices=LIF.ORDERS, help="order inside a step")
    scale = "scale of the logits in loss and softmax; T undoes their division by T"
    add("--logit_scale", default=1.0, type=positive_float, help=scale)
    add("--dropout", default=0.0, type=fraction, help="of an ANN: probability that a neuron is left out in training")


def fill(args, said=True):
    """Set the flags that go by the kind of net where they are None; UserError where they do not go with it.

    said=False: those of a spiking net stay None.
    """
    if args.arch not in ANNS:
        if args.dropout:
            raise UserError(f"--dropout belongs to a net without spikes: choose --arch {' or '.join(ANNS)}")
        if said:
            args.num_steps, args.norm = args.num_steps or 25, args.norm or "bntt"
        return
    for key, value in (OF_ANN | OF_NEURON).items():
        if getattr(args, key) not in (None, value):
            why = "has neither time-steps nor spiking neurons" if key in OF_NEURON else f"takes {value} alone"
            raise UserError(f"--arch {args.arch} is an ANN, which {why}: leave out --{key} {getattr(args, key)}")
        setattr(args, key, value)


def build_net(args, facts):
    """The net that the flags ask for, for data of these `DataFacts`; UserError where they make no net."""
    try:
        if args.arch in ANNS:
            sizes = facts.img_size, len(facts.classes)
            return ANN(ANNS[args.arch], *sizes, in_channels=facts.in_channels, dropout=args.dropout)
        norm = NORMS[args.norm]
        norm = partial(norm, threshold=args.threshold) if norm is TdBN else norm
        parts = dict(encoding=args.encoding, norm=norm, neuron=NEURONS[args.neuron])
        parts |= dict(threshold=args.threshold, spike_order=args.spike_order, in_channels=facts.in_channels)
        make = ARCHS[args.arch] if callable(ARCHS[args.arch]) else partial(SpikingVGG, args.arch)
        return make(args.num_steps, args.leak_mem, facts.img_size, len(facts.classes), **parts)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_weights(args, checkpoint, facts):
    """UserError unless the checkpoint's weights are those of the net asked for. Allocates no weights."""
    state, another = checkpoint["state_dict"], f"{args.checkpoint} holds another net than {args.arch} as asked for"
    asked, steps = args.num_steps, norm_of(state)[1] or 0
    if args.norm in (*OF_STEPS, "tebn") and asked != steps:  # before that many steps are built
        hint = ": leave --num_steps out, or train a net of so many with --init_from" if steps else ""
        if asked < steps:
            hint = f": --steps {asked} of test.py runs only the first {asked} time-step{'s' * (asked > 1)}"
        raise UserError(f"{another}: it has {steps} time-steps with a norm of their own, not {asked}{hint}")
    with torch.device("meta"):
        expected = build_net(args, facts).state_dict()
    for name in sorted(expected.keys() | state.keys()):
        there, here = state.get(name), expected.get(name)
        if there is None or here is None:
            raise UserError(f"{another}: {'it has no' if there is None else 'that has no'} {name[:100]}")
        if there.shape != here.shape or there.is_floating_point() != here.is_floating_point():
            kinds = [f"{list(tensor.shape)} of {tensor.dtype}" for tensor in (there, here)]
            raise UserError(f"{another}: size mismatch for {name}: it is {kinds[0]}, not {kinds[1]}")


def load_net(args, checkpoint, facts, device):
    """Rebuild the net of a checkpoint on `device`, with its engine; UserError where its weights are of another net."""
    check_weights(args, checkpoint, facts)
    net = build_net(args, facts)
    try:
        net.load_state_dict(checkpoint["state_dict"])
    except ValueError as error:
        raise UserError(f"{args.checkpoint}: {error}") from None
    engine, reason = use_engine(net.to(device), args.engine, args.save_memory)
    if "config" not in checkpoint:
        said = [f"{key} {getattr(args, key)}" for key in ("norm", "num_steps", "encoding", "norm_stats") if key in args]
        print(f"{args.checkpoint} does not say its settings: taken {', '.join(said)}")
    if reason:
        print(f"engine: {engine}, because {reason}")
    return net


def use_engine(net, engine="auto", save_memory=None):
    """Attach the engine that `--engine` names. Returns (its name, why not fused or None); UserError where it cannot."""
    reason = "plain asked"
    if engine != "plain":
        try:
            fused.attach(net, save_memory)
            return "fused", None
        except fused.Unsupported as error:
            reason = str(error)
    if engine == "fused":
        raise UserError(f"--engine fused: {reason}")
    if save_memory is not None:
        raise UserError(f"--save_memory belongs to the fused engine, which does not run here: {reason}")
    return "plain", None if engine == "plain" else reason


def parse_with_checkpoint(parser, argv=None, path=None):
    """Parse argv over the settings of its CHECKPOINT, or of the one at `path`. Returns (args, checkpoint).

    One without settings (of the authors' code, a bare state dict): see `apply_settings`. The flags must then name
    --arch, --dataset and --leak_mem, and where no norm tells T --num_steps; one with the authors' keys has images
    normalised as the authors do.
    """
    what = "last.pth.tar or best.pth.tar of a run, an authors' *_bestmodel.pth.tar, or a file with a state dict"
    if path is None:
        parser.add_argument("checkpoint", type=arguments.path, help=what)
        path = parser.parse_args(argv).checkpoint
    parser.set_defaults(checkpoint=path)
    checkpoint = read(path)
    apply_settings(parser, path, checkpoint)
    if "config" in checkpoint:
        args = parser.parse_args(argv)
        parser.refuse_idle(args, argv)
        trained = checkpoint["config"]
        # with another split or statistics, what it trained on would be tested; another arch or norm has other weights
        keys = ["arch", "norm", "dvs_split", "norm_stats"]
        if "poisson_binary" in (args.encoding, trained.get("encoding")):
            keys.append("encoding")  # it takes images in [0, 1], where others take normalised ones
        for key in keys:
            if getattr(args, key) != trained.get(key, getattr(args, key)):
                raise UserError(f"{path} was trained with --{key} {trained[key]}: test it with the same")
        network = next(g._group_actions for g in parser._action_groups if g.title == "network")
        for key in (key for key in (*(a.dest for a in network), "split_by", "bin_ms") if key in trained):
            if trained[key] is not None and getattr(args, key) != trained[key]:
                print(f"not as trained: --{key} {getattr(args, key)}, in place of {trained[key]}")
        check_weights(args, checkpoint, DataFacts(**checkpoint["data"]))
        return args, checkpoint
    authors = {"global_step", "accuracy"} <= checkpoint.keys()
    parser.set_defaults(dataset=None, norm_stats="authors" if authors else "own")
    args = parser.parse_args(argv)
    if missing := [f"--{key}" for key in ("arch", "dataset", *UNSAID) if getattr(args, key) is None]:
        raise UserError(f"{path} does not say its settings: pass {' '.join(missing)}")
    parser.refuse_idle(args, argv)
    return args, checkpoint


def apply_settings(parser, path, checkpoint):
    """Make what a checkpoint says of its net and data the defaults of a parser of net flags, at least.

    One without settings says norm, neuron and the T of BNTT by the names of its weights; arch, leak_mem and another T
    become None. UserError where it says too little, or what the flags do not take.
    """
    if "config" in checkpoint:
        settings = checkpoint["config"]
        if missing := [key for key in NEEDED if key not in settings]:
            raise UserError(f"{path} cannot be rebuilt: its config lacks {', '.join(missing)}")
        # only what the net and its data are: a checkpoint must not name the files that a script writes
        shared = (g._group_actions for g in parser._action_groups if g.title in ("network", "data", "machine"))
        known = {action.dest for actions in shared for action in actions} - set(TRAINING_ONLY)
        if settings.get("amp") == "fp16" and not torch.cuda.is_available():
            known.discard("amp")
        parser.apply_config({k: v for k, v in settings.items() if k in known}, f"the config in {path}")
        return
    state = checkpoint["state_dict"]
    norm, steps = norm_of(state)
    if norm == "bntt" and any(match and match[3] == "bias" for match in map(NORM_TENSOR.fullmatch, state)):
        raise UserError(
            "this checkpoint is of the authors' first upload (its bntt_fc has a beta, which BNTT has not): "
            "it cannot be read; train again with --spike_order fire_first"
        )
    fields = {name.split(".")[-1] for name in state if name.startswith("lif_")}
    found = [neuron for field, neuron in NEURON_TENSORS.items() if field in fields]
    neuron, parser.fill = [*found, "lif"][0], partial(fill, said=False)
    parser.set_defaults(arch=None, leak_mem=None, norm=norm, num_steps=steps, neuron=neuron)


NORM_TENSOR = re.compile(r"(bntt\w*)\.([0-9]{1,5}|shared)\.(\w+)")  # norm, time-step, field
NEURON_TENSORS = {"v": "learnt_lif", "w": "plif", "_extra_state": "if"}  # a field that no neuron above has


def norm_of(state):
    """(norm, T) of a net, by its state dict: T is None except where time-steps have tensors of their own."""
    found = [match.groups() for match in map(NORM_TENSOR.fullmatch, state) if match]
    steps = {step for _, step, _ in found} - {"shared"}
    for name, tensor in state.items():
        if re.fullmatch(r"bntt\w*\.scale", name):
            return "tebn", tensor.numel()
        if re.fullmatch(r"bntt\w*\.weight", name):
            return "ln", None
    layers, with_beta = {layer for layer, *_ in found}, {layer for layer, _, field in found if field == "bias"}
    if steps or not found:
        return ("bntt_beta" if layers == with_beta else "bntt", len(steps)) if steps else ("none", None)
    return "tdbn" if with_beta else "bn", None


def weights_file(name):
    """Path of a trained net that comes with the code, a row of WEIGHTS. UserError where its file is another."""
    path = SHIPPED / f"{name}.pth"
    with reading(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS[name]["sha256"]:
        raise UserError(f"{path} is damaged, its sha256 is {digest}: get it again with git checkout {path}")
    return path


def read(path):
    """`runs.load_checkpoint`; of a net of weights/ with what its file does not hold: which images were held out."""
    checkpoint, path = runs.load_checkpoint(path), Path(path).resolve()
    if path.parent == SHIPPED and (name := WEIGHTS.get(path.stem, {}).get("held_out")):
        with reading(SHIPPED / name):
            checkpoint["held_out"] = torch.from_numpy(np.load(SHIPPED / name, allow_pickle=False))
    return checkpoint


def beside(checkpoint):
    """The folder for what is measured of a checkpoint: its own; of a net of weights/ runs/<its name>, which is made."""
    path = Path(checkpoint)
    if path.resolve().parent != SHIPPED:
        return path.parent
    folder = Path("runs", path.stem)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(path, device="cpu", engine="auto", **settings):
    """The net of a checkpoint, for use in Python, in eval mode: `net = nets.load("runs/x/best.pth.tar")`.

    path: of the file, or a name in WEIGHTS.
    net.facts: the `DataFacts` of its data (classes, and the mean and std by which images [B, C, S, S] of pixels in
    [0, 1] are normalised), None where the file says none. settings: flags of the net by name, over what the file says.
    A file without settings (the authors', a bare state dict) needs arch and leak_mem, num_steps where its norm does not
    tell it, and what else is not the default; num_cls and in_channels are by default those of its weights, img_size 32.
    UserError where the file is no checkpoint, or of another net, and where device or engine cannot be had.
    """
    path, parser = weights_file(path) if path in WEIGHTS else arguments.path(path), arguments.ArgumentParser()
    add_net_arguments(parser)
    arguments.add_run_arguments(parser)
    checkpoint = runs.load_checkpoint(path)
    apply_settings(parser, path, checkpoint)
    known = DataFacts(**checkpoint["data"]) if "config" in checkpoint else None
    said = {} if known else {key: settings.pop(key) for key in SIZES if key in settings}
    parser.apply_config(settings | {"device": str(device), "engine": engine}, "nets.load")
    args = parser.parse_args([])
    if missing := [f"{key}=..." for key in ("arch", *UNSAID) if getattr(args, key) is None]:
        raise UserError(f"{path} does not say its settings: pass {', '.join(missing)}")
    args.checkpoint, args.encoding = path, args.encoding or "poisson"
    shapes = {name: [*tensor.shape, 1, 1] for name, tensor in checkpoint["state_dict"].items()}
    seen = shapes.get(_readout(args), [1])[0], shapes.get("conv1.weight", [1, 1])[1], 32
    num_cls, *rest = (dict(zip(SIZES, seen, strict=True)) | said).values()
    facts = known or DataFacts([str(k) for k in range(num_cls)], *rest, [], [])
    net = load_net(args, checkpoint, facts, utill.pick_device(args.device)).eval()
    net.facts = known
    return net


def _readout(args):
    """The name of the output layer's weight in a state dict; in a net of one's own, which is no chain, readout."""
    row = ARCHS[ANNS.get(args.arch, args.arch)]
    return "readout.weight" if callable(row) else f"fc{len(row[1]) + 1}.weight"


def init_from(net, args):
    """Copy into `net`, built of `args`, what fits it of the weights in the file args.init_from. Returns what to print.

    That net may be of another T, norm, neuron, encoding or number of classes. A BNTT takes step t from the old step t,
    or the last one, or from the one BatchNorm of all steps; a norm of one BatchNorm takes the mean over the old steps.
    A neuron that learns its threshold starts from that of a converted net.
    UserError where the file is no checkpoint, of another arch, or has no weight that fits.
    """
    checkpoint = runs.load_checkpoint(args.init_from)
    old, new, taken = checkpoint["state_dict"], net.state_dict(), {}
    (old_norm, T), (norm, _) = norm_of(old), norm_of(new)
    synapses, there = ({n for n in state if re.fullmatch(r"(conv|fc)\d+\.weight", n)} for state in (new, old))
    hidden = synapses - {_readout(args)}
    arch = checkpoint.get("config", {}).get("arch", args.arch)
    if arch != args.arch or not hidden <= there <= synapses:
        hint = ": convert it with convert.py first" if ANNS.get(arch) == args.arch else ""
        raise UserError(f"--init_from {args.init_from}: it holds a net of another arch than {args.arch}{hint}")
    for name, tensor in new.items():
        sources = [name]
        if match := NORM_TENSOR.fullmatch(name):
            layer, step, field = match.groups()
            if old_norm not in OF_STEPS:
                steps = ["shared"]
            else:
                steps = range(T) if step == "shared" else [min(int(step), T - 1)]
            sources = [f"{layer}.{t}.{field}" for t in steps]
        found = [old[source] for source in sources if source in old]
        if norm == old_norm == "tebn" and re.fullmatch(r"bntt\w*\.scale", name):
            found = [x[torch.arange(len(tensor)).clamp(max=len(x) - 1)] for x in found if x.ndim == 2 and len(x)]
        found = [x for x in found if x.shape == tensor.shape and x.is_floating_point() == tensor.is_floating_point()]
        if found:
            taken[name] = torch.stack(found).double().mean(0) if tensor.is_floating_point() else found[-1]
    if not synapses & taken.keys():
        raise UserError(f"--init_from {args.init_from}: none of its weights is of a shape that this {args.arch} has")
    net.load_state_dict(new | taken)
    how = ""
    if (norm == old_norm or {norm, old_norm} == {*OF_STEPS}) and T and net.num_steps != T:
        how = f", a norm's time-step t from the old step t, at most {T}"
    elif old_norm != norm and not {old_norm, norm} & {"none", "ln"} and {old_norm, norm} != {*OF_STEPS}:
        mean = old_norm in OF_STEPS
        how = ", each norm the mean of its old time-steps" if mean else ", the old BatchNorm at every time-step"
    kept = {*map(_short, new)}
    fresh, left = new.keys() - taken.keys(), {name for name in old if _short(name) not in kept}
    why = [f"{n} is {list(new[n].shape)}, there {list(old[n].shape)}" for n in sorted(fresh & synapses & there)]
    words = [f"new: {_layers(fresh, new)}" + (f" ({'; '.join(why)})" if why else "")] if fresh else []
    words += [f"left out: {_layers(left, old)}"] if left else []
    lines = [f"weights from {args.init_from}: {_layers(taken, new)}{how}", "; ".join(words)]
    return [utill.one_line(line) for line in lines if line]


def _short(name):
    """The name of a tensor in a state dict as one would say it, without the time-step."""
    return NORM_TENSOR.sub(r"\1.\3", name).replace("._extra_state", ".threshold")


def _layers(names, state):
    """Those names of a state dict in words: a layer is called by its own name where all its tensors are among them."""
    parted = {name.split(".")[0] for name in state if name not in names}
    layers = {name: name.split(".")[0] for name in state if name in names}
    return ", ".join(dict.fromkeys(_short(name) if layer in parted else layer for name, layer in layers.items()))
