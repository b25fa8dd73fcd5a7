"""The nets that flags and checkpoints name: tables of their parts, building, weights, engine.

A new norm or neuron is a class of its own (see baselines.py) and one row here; encoders are rows in encoders.py,
chains of layers in model.py.
"""

from functools import partial

import torch

import fused
import runs
from arguments import positive_float, size, unit_float
from baselines import PLIF, TdBN
from encoders import ENCODERS
from model import ARCHS, BNTT, LIF, NoNorm, SharedBN, SpikingVGG
from utill import DataFacts, UserError

NORMS = {  # args -> the norm as SpikingVGG takes it
    "bntt": lambda args: BNTT,
    "bn": lambda args: SharedBN,
    "none": lambda args: NoNorm,
    "tdbn": lambda args: partial(TdBN, threshold=args.threshold),
}
NEURONS = {"lif": LIF, "plif": PLIF}

# What a checkpoint must say of its net and data, and what of its settings belonged to the training alone.
NEEDED = ("arch", "num_steps", "leak_mem", "threshold", "norm", "encoding", "spike_order", "dataset")
TRAINING_ONLY = ("device", "engine", "save_memory", "limit_test")


def add_net_arguments(parser):
    """The flags that define the net."""
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vgg9", choices=list(ARCHS), help="network")
    add("--num_steps", default=25, type=size, help="time-steps T")
    add("--leak_mem", default=0.95, type=unit_float, help="membrane leak per step")
    add("--threshold", default=1.0, type=positive_float, help="firing threshold")
    add("--norm", default="bntt", choices=list(NORMS), help="normalisation")
    add("--neuron", default="lif", choices=list(NEURONS), help="spiking neuron")
    add("--encoding", default=None, choices=list(ENCODERS), help="input encoding (default: as suits the data set)")
    add("--spike_order", default="integrate_first", choices=LIF.ORDERS, help="order inside a step")
    add("--logit_scale", default=1.0, type=positive_float,
        help="scale of the logits in loss and softmax; T undoes their division by T")  # fmt: skip


def build_net(args, facts):
    """The `SpikingVGG` that the flags ask for, for data of these `DataFacts`; UserError where they make no net."""
    try:
        return SpikingVGG(
            args.arch, args.num_steps, args.leak_mem, facts.img_size, len(facts.classes),
            in_channels=facts.in_channels, threshold=args.threshold, norm=NORMS[args.norm](args),
            spike_order=args.spike_order, encoding=args.encoding,
            neuron=NEURONS[args.neuron],
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def check_weights(args, checkpoint, facts):
    """UserError unless the checkpoint's weights are those of the net asked for. Allocates no weights."""
    state, another = checkpoint["state_dict"], f"{args.checkpoint} holds another net than {args.arch} as asked for"
    steps = {name.split(".")[1] for name in state if name.startswith("bntt") and name.endswith(".weight")}
    if args.norm == "bntt" and args.num_steps != len(steps):  # before so many steps are built
        raise UserError(f"{another}: it has {len(steps)} time-steps with a norm of their own, not {args.num_steps}")
    with torch.device("meta"):
        expected = build_net(args, facts).state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{another}: it has no {name}")
        if state[name].shape != tensor.shape or state[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(
                f"{another}: size mismatch for {name}: it is {list(state[name].shape)} of {state[name].dtype}, "
                f"not {list(tensor.shape)} of {tensor.dtype}"
            )
    if state.keys() > expected.keys():
        raise UserError(f"{another}: that has no {min(state.keys() - expected.keys())[:100]}")


def load_net(args, checkpoint, facts, device):
    """Rebuild the net of a checkpoint on `device`, with its engine; UserError where its weights are of another net."""
    check_weights(args, checkpoint, facts)
    net = build_net(args, facts)
    net.load_state_dict(checkpoint["state_dict"])
    engine, reason = use_engine(net.to(device), args.engine, args.save_memory)
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


def parse_with_checkpoint(parser, argv=None):
    """Parse argv over the settings of its CHECKPOINT. Returns (args, checkpoint).

    An authors' checkpoint holds no settings: the flags must name --arch, --dataset and --leak_mem,
    and images are normalised as the authors do.
    """
    parser.add_argument("checkpoint", help="last.pth.tar or best.pth.tar of a run, or an authors' *_bestmodel.pth.tar")
    path = parser.parse_args(argv).checkpoint
    checkpoint = runs.load_checkpoint(path)
    if "config" in checkpoint:
        settings = checkpoint["config"]
        if missing := [key for key in NEEDED if key not in settings]:
            raise UserError(f"{path} cannot be rebuilt: its config lacks {', '.join(missing)}")
        # only what the net and its data are: a checkpoint must not name the files that a script writes
        shared = (g._group_actions for g in parser._action_groups if g.title in ("network", "data", "machine"))
        known = {action.dest for actions in shared for action in actions} - set(TRAINING_ONLY)
        if settings.get("amp") == "fp16" and not torch.cuda.is_available():
            known.remove("amp")
        parser.apply_config({k: v for k, v in settings.items() if k in known}, f"the config in {path}")
        args = parser.parse_args(argv)
        if args.dvs_split != settings.get("dvs_split", args.dvs_split):
            raise UserError(f"{path} was trained with --dvs_split {settings['dvs_split']}: test it on the same")
        if args.norm_stats != settings.get("norm_stats", args.norm_stats):
            raise UserError(f"{path} was trained with --norm_stats {settings['norm_stats']}: test it with the same")
        check_weights(args, checkpoint, DataFacts(**checkpoint["data"]))
        return args, checkpoint
    state = checkpoint["state_dict"]
    if any(name.startswith("bntt_fc.") and name.endswith(".bias") for name in state):
        raise UserError(
            "this checkpoint is of the authors' first upload (its bntt_fc has a beta, which BNTT has not): "
            "it cannot be read; train again with --spike_order fire_first"
        )
    steps = {name.split(".")[1] for name in state if name.startswith("bntt1.")}
    parser.set_defaults(arch=None, dataset=None, leak_mem=None, num_steps=len(steps) or 1, norm_stats="authors")
    args = parser.parse_args(argv)
    if missing := [f"--{key}" for key in ("arch", "dataset", "leak_mem") if getattr(args, key) is None]:
        raise UserError(f"a checkpoint of the authors' code does not say its settings: pass {' '.join(missing)}")
    return args, checkpoint


def known_data(checkpoint):
    """What `build_loaders` takes from a checkpoint, {} of an authors' one: facts of the data, seed of their split."""
    if "config" not in checkpoint:
        return {}
    return {"facts": DataFacts(**checkpoint["data"]), "split_seed": checkpoint["config"].get("seed")}
