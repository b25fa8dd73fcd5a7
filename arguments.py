"""The command line of train.py, test.py and early_exit.py: number types, flags of data and machine, config files."""

import argparse
import math
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from utill import UserError, reason_of


class Number(NamedTuple):
    """The type of a flag: an int or float that `allows` accepts; `words` name it in errors."""

    kind: type
    allows: Callable
    words: str

    def __call__(self, value):
        """`value`, a text or a number, as `kind`; ValueError where it is no such number."""
        try:
            number = self.kind(value)
        except OverflowError:
            raise ValueError from None
        if not self.allows(number):
            raise ValueError
        return number


positive_int = Number(int, lambda x: x >= 1, "an integer of at least 1")
size = Number(int, lambda x: 1 <= x <= 10_000, "an integer of at least 1 and at most 10000")  # more is a slip
processes = Number(int, lambda x: 0 <= x <= 256, "an integer of at least 0 and at most 256")
seed = Number(int, lambda x: 0 <= x < 2**63, "an integer of at least 0 and below 2**63")
unit_float = Number(float, lambda x: 0 < x <= 1, "a number in (0, 1]")
fraction = Number(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
positive_float = Number(float, lambda x: 0 < x < math.inf, "a positive number")
nonnegative_float = Number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")


def path(text):
    """The type of a flag that names a file or folder: `~` is the home folder, in a config file too."""
    return os.path.expanduser(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, but for None, where the help text says what happens."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s in one sentence. Flags are not to be abbreviated."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.datasets = {}  # set by `add_data_arguments`

    def parse_args(self, argv=None):
        """Parse argv; what is None because it depends on the data set is filled in."""
        args = super().parse_args(argv)
        row = self.datasets.get(getattr(args, "dataset", None))
        if row and args.permuted:
            if args.encoding not in (None, "pixels", "pixels_permuted") or row.encoding != "pixels":
                raise UserError("--permuted belongs to --dataset smnist with a pixel a time-step")
            args.encoding = "pixels_permuted"
        elif row and args.encoding is None:
            args.encoding = row.encoding
        return args

    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")

    def _get_value(self, action, string):
        if not isinstance(action.type, Number):
            return super()._get_value(action, string)
        try:
            return action.type(string)
        except ValueError:
            raise argparse.ArgumentError(action, f"expected {action.type.words}, got {string!r}") from None

    def apply_config(self, values, source):
        """Make `values` {flag: value} the defaults; UserError on unknown flags and wrong types."""
        actions = {a.dest: a for a in self._actions if a.dest not in ("help", "config", "checkpoint")}
        for key, value in values.items():
            if key not in actions:
                raise UserError(f"{source}: unknown key {key!r}")
            try:
                self.set_defaults(**{key: _config_value(actions[key], value)})
            except ValueError as error:
                hint = " (YAML reads 5e-4 as text: write 5.0e-4)" if _is_number(value) else ""
                raise UserError(f"{source}: {key} must be {error}, got {reprlib.repr(value)}{hint}") from None


def _config_value(action, value):
    """`value` of a config file as the flag takes it; ValueError, saying what the flag takes, where it does not."""
    if value is None and action.default is None:
        return None
    if action.nargs == 0:  # a switch
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if action.choices:
        value = "off" if value is False else value  # YAML reads a bare off as false
        if value in action.choices:
            return value
        raise ValueError(f"one of {', '.join(action.choices)}")
    if isinstance(action.type, Number):
        try:
            if isinstance(value, (int, action.type.kind)) and not isinstance(value, bool):
                return action.type(value)
        except ValueError:
            pass
        raise ValueError(action.type.words)
    if isinstance(value, str):
        return value
    raise ValueError("text")


def _is_number(value):
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


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
    add("--limit_test", default=None, type=positive_int, help="use so many test images (default: all)")
    add("--norm_stats", default="own", choices=["own", "authors"],
        help="mean and std: the data set's own, or CIFAR-10's for all as the authors")  # fmt: skip
    add("--permuted", action="store_true", help="smnist: pixels in one fixed random order")
    add("--split_by", default="time", choices=["time", "number", "duration"],
        help="event data: T frames of equal time, of equally many events, or of --bin_ms")  # fmt: skip
    add("--bin_ms", default=5.0, type=positive_float, help="length of a frame for --split_by duration")
    add("--dvs_split", default="random", choices=["random", "first100"],
        help="dvs_cifar10, test part: a random tenth of each class, or its first 100")  # fmt: skip
    return group


def add_run_arguments(parser):
    """The flags that say where and how to run."""
    add = parser.add_argument_group("machine").add_argument
    add("--seed", default=0, type=seed, help="random seed")
    add("--device", default="auto", type=str, help="auto, cpu, cuda, cuda:1, ...")
    add("--engine", default="auto", choices=["auto", "plain", "fused"],
        help="the fused engine, the plain time loop, or the first that works")  # fmt: skip
    add("--amp", default="off", choices=["off", "auto", "bf16", "fp16"],
        help="mixed precision; auto: bf16 where the processor has instructions for it")  # fmt: skip
    add("--save_memory", default=None, type=positive_int, metavar="STEPS",
        help="fused engine: keep only the membranes of every so many time-steps")  # fmt: skip


# ---- Where the defaults come from ------------------------------------------------------------------


def parse_with_config(parser, argv=None):
    """Parse argv over the defaults of its `--config FILE` (YAML), if it names one."""
    parser.add_argument(
        "--config", default=None, type=path, metavar="FILE", help="YAML file of flags; the command line wins"
    )
    first = ArgumentParser(add_help=False)
    first.add_argument("--config", type=path)
    file = first.parse_known_args(argv)[0].config
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the config {file}: {reason_of(error)}") from None
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
                raise ValueError("a list of flags needs no aliases")  # a few lines of them unfold to gigabytes
            values = yaml.safe_load(text)
        except Exception as error:  # PyYAML raises many kinds
            raise UserError(f"the config {file} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UserError(f"the config {file} must be a list of `flag: value` lines")
        parser.apply_config(values, file)
    return parser.parse_args(argv)
