"""The command line of all scripts: number types, flags of data and machine, config files."""

import argparse
import math
import os
import sys
from pathlib import Path

import yaml

from utill import UserError, reading


def number(kind, allows, words):
    """A flag's type: an int or float, as `kind` says, that `allows` accepts; `words` name it in errors."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allows(value):
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r:.100}")
        return value

    convert.kind = kind
    return convert


positive_int = number(int, lambda x: x >= 1, "an integer of at least 1")
size = number(int, lambda x: 1 <= x <= 10_000, "an integer of at least 1 and at most 10000")  # more is a slip
processes = number(int, lambda x: 0 <= x <= 256, "an integer of at least 0 and at most 256")
seed = number(int, lambda x: 0 <= x < 2**63, "an integer of at least 0 and below 2**63")
unit_float = number(float, lambda x: 0 < x <= 1, "a number in (0, 1]")
fraction = number(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
positive_float = number(float, lambda x: 0 < x < math.inf, "a positive number")
nonnegative_float = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
eps255 = number(float, lambda x: 0 <= x <= 255, "a number from 0 to 255, of 255")


path = os.path.expanduser  # of a flag that names a file or folder: ~ is the home folder, in a config file too


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, except None, where the help text says what happens."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s in one sentence. Flags cannot be abbreviated."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.datasets = {}  # set by `add_data_arguments`
        self.fill = lambda args: None  # set by nets.add_net_arguments
        self.needs = {}

    def parse_args(self, argv=None):
        """Parse argv; what is None because it depends on the net or the data set is filled in."""
        args = super().parse_args(argv)
        self.fill(args)
        row = self.datasets.get(getattr(args, "dataset", None))
        if row and args.permuted:
            if args.encoding not in (None, "pixels", "pixels_permuted") or row.encoding != "pixels":
                raise UserError("--permuted belongs to --dataset smnist with a pixel a time-step")
            args.encoding = "pixels_permuted"
        elif row and args.encoding is None:
            args.encoding = row.encoding
        return args

    def refuse_idle(self, args, argv=None):
        """UserError where the command line names a flag of self.needs, {flag: (acts(args), words)}, that does not act.

        Such a flag of a config file stays: it may be for another row of a table, or be in a run's own config.yaml.
        """
        typed = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        for flag, (acts, words) in self.needs.items():
            if flag in typed and not acts(args):
                raise UserError(f"{flag} does nothing without {words}: leave it out")

    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")

    def apply_config(self, values, source):
        """Make `values` {flag: value} the defaults, as the command line would take them; None is the default there is.

        UserError, naming `source`, on unknown flags and wrong values.
        """
        actions = {a.dest: a for a in self._actions if a.dest not in ("help", "config", "checkpoint")}
        for key, value in values.items():
            if key not in actions:
                raise UserError(f"{source}: unknown key {key!r} (--help lists every flag)")
            try:
                if value is not None:
                    self.set_defaults(**{key: _config_value(actions[key], value)})
            except (argparse.ArgumentTypeError, ValueError) as error:
                raise UserError(f"{source}: {key}: {error}") from None


def _config_value(action, value):
    """`value` of a config file as the flag takes it; ArgumentTypeError, saying what the flag takes, or ValueError."""
    if action.nargs == 0:  # a switch
        if isinstance(value, bool):
            return value
        raise argparse.ArgumentTypeError(f"expected true or false, got {value!r:.100}")
    if not isinstance(value, (str, int, float)):
        raise argparse.ArgumentTypeError(f"expected one value, got {value!r:.100}")
    text = "off" if value is False else str(value)  # YAML reads a bare off as false
    value = action.type(text) if action.type else text
    if action.choices and value not in action.choices:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(action.choices)}, got {text!r:.100}")
    return value


# ---- Flags that the entry points share -----------------------------------------------------------


def add_data_arguments(parser, datasets):
    """The flags that define the data. Returns their group."""
    parser.datasets = datasets
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", default="cifar10", choices=list(datasets), help="data set")
    add("--data_dir", default="./data", type=path, help="where the data lies or is downloaded to")
    add("--img_size", default=None, type=size, help="resize to this (default: as the data is)")
    add("--batch_size", default=256, type=positive_int, help="training batch; testing uses twice it")
    add("--num_workers", default=4, type=processes, help="data loading processes (0: in this one)")
    add("--limit_test", default=None, type=positive_int, help="use this many test images (default: all)")
    own = "mean and std: the data set's own, or CIFAR-10's for all as the authors"
    add("--norm_stats", default="own", choices=["own", "authors"], help=own)
    add("--permuted", action="store_true", help="smnist: pixels in one fixed random order")
    ways = "event data: T frames of equal time, of equally many events, or of --bin_ms"
    add("--split_by", default="time", choices=["time", "number", "duration"], help=ways)
    add("--bin_ms", default=5.0, type=positive_float, help="length of a frame for --split_by duration")
    part = "dvs_cifar10, test part: a random tenth of each class, or its first 100"
    add("--dvs_split", default="random", choices=["random", "first100"], help=part)
    parser.needs |= {
        "--norm_stats": (lambda args: args.encoding != "poisson_binary", "an encoding of normalised images"),
        "--split_by": (lambda args: datasets[args.dataset].encoding == "frames", "event data"),
        "--bin_ms": (lambda args: args.split_by == "duration", "--split_by duration"),
        "--dvs_split": (lambda args: args.dataset == "dvs_cifar10", "--dataset dvs_cifar10"),
    }
    return group


def add_run_arguments(parser):
    """The flags that say where and how to run."""
    add = parser.add_argument_group("machine").add_argument
    add("--seed", default=0, type=seed, help="random seed")
    add("--device", default="auto", type=str, help="auto, cpu, cuda, cuda:1, ...")
    engines = "the fused engine, the plain time loop, or the first that works"
    add("--engine", default="auto", choices=["auto", "plain", "fused"], help=engines)
    amp = "mixed precision; auto: bf16 where the processor has instructions for it"
    add("--amp", default="off", choices=["off", "auto", "bf16", "fp16"], help=amp)
    kept = "fused engine: keep the membranes of every STEPS-th time-step alone"
    add("--save_memory", default=None, type=positive_int, metavar="STEPS", help=kept)


# ---- Where the defaults come from ------------------------------------------------------------------


def parse_with_config(parser, argv=None):
    """Parse argv over the defaults of its `--config FILE` (YAML), if it names one."""
    about = "YAML file of flags; the command line wins"
    parser.add_argument("--config", default=None, type=path, metavar="FILE", help=about)
    first = ArgumentParser(add_help=False)
    first.add_argument("--config", type=path)
    file = first.parse_known_args(argv)[0].config
    if file is not None:
        with reading(file):
            text = Path(file).read_text(encoding="utf-8")
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
                raise ValueError("a list of flags needs no aliases")  # a few lines of them unfold to gigabytes
            node = yaml.compose(text, yaml.SafeLoader)
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"{twice[0]} stands there twice")
            values = yaml.safe_load(text)
            if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
                raise ValueError("it must be a list of `flag: value` lines")
        parser.apply_config(values, file)
    args = parser.parse_args(argv)
    if not getattr(args, "resume", False):  # a run of an older version may have begun with such a flag
        parser.refuse_idle(args, argv)
    return args
