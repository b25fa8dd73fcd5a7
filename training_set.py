"""Which images a training saw and which it held out: for those who test its net, or go on from it."""

import argparse
import contextlib
import copy
from pathlib import Path

import torch

import arguments
import data
import nets
from arguments import fraction, positive_int
from utill import DataFacts, UserError


def trained_with(path, checkpoint):
    """The settings of a checkpoint's training that say which images it saw, as train.py takes them: {flag: value}.

    UserError where the file says what the flags do not take.
    """
    parser, config = arguments.ArgumentParser(), checkpoint.get("config", {})
    parser.add_argument("--limit_train", default=None, type=positive_int)
    parser.add_argument("--val_fraction", default=0.0, type=fraction)
    parser.add_argument("--augment", default=None, action=argparse.BooleanOptionalAction)
    parser.add_argument("--crop_padding", default=data.CROP_PADDING, type=positive_int)
    keys = ("limit_train", "val_fraction", "augment", "crop_padding")
    known = {key: config[key] for key in keys if key in config}
    parser.apply_config(known, f"the config in {path}")
    return vars(parser.parse_args([]))


def known_data(checkpoint):
    """What `build_loaders` takes from a checkpoint, {} of an authors' one: facts of the data, seed of their split, and
    which images were held out, None in older files."""
    if "config" not in checkpoint:
        return {}
    config, held = checkpoint["config"], checkpoint.get("held_out")
    seed = config.get("split_seed", config.get("seed"))  # the first of a net that started from another run's
    if not torch.is_tensor(held) or held.dtype != torch.uint8 or held.shape[1:] != (8,) or not held.is_contiguous():
        held = None
    try:
        seed = None if seed is None else arguments.seed(str(seed))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"the checkpoint's seed: {error}") from None
    return {"facts": DataFacts(**checkpoint["data"]), "split_seed": seed, "held": held}


def known_split(args, path, resumed):
    """What `build_loaders` takes from the checkpoint that a training goes on or starts from, or None: the split of
    the data, so that what was trained on is neither held out nor tested. {} where that net is of other data.

    UserError where the file is no checkpoint, or its split of recordings is another.
    """
    checkpoint = nets.read(path) if path else {}
    config, known = checkpoint.get("config", {}), known_data(checkpoint)
    if config.get("dataset") != args.dataset:
        return {}
    if resumed and any(config.get(key) != getattr(args, key) for key in ("seed", "val_fraction")):
        return {}  # `Run.restore` says why it is refused
    if config.get("dvs_split", args.dvs_split) != args.dvs_split:
        raise UserError(f"--dvs_split {args.dvs_split}: {path} was trained with {config['dvs_split']}: give the same")
    part = trained_with(path, checkpoint)["val_fraction"]
    if known["held"] is None and args.val_fraction > part:  # an older file
        raise UserError(f"--val_fraction {args.val_fraction:g}: {path} was trained with {part:g}: give no more")
    elsewhere = Path(str(config.get("data_dir"))).resolve() != Path(args.data_dir).resolve()
    if args.dataset == "imagefolder" and elsewhere and not part:
        return {}  # other images, as far as can be told
    return {key: known[key] for key in ("split_seed", "held")}


def trained_on(args, settings, **known):
    """Loader of the images, augmented as well, that a training with these settings (`trained_with`) saw.

    args, known: as for `build_loaders` of its test. Raises UserError.
    """
    args = copy.copy(args)
    vars(args).update(settings)
    return data.build_loaders(args, **known).train


def held_out(args, settings, **known):
    """Loader of the images that a training with these settings (`trained_with`) held out; None if none, or where
    most of them are not there.

    args, known: as for `build_loaders` of its test. Raises UserError.
    """
    if not settings["val_fraction"]:
        return None
    args, wanted = copy.copy(args), 2 * args.batch_size
    args.val_fraction, args.limit_train, args.augment, args.batch_size = settings["val_fraction"], None, False, 1
    held, there = known.get("held"), []
    with contextlib.suppress(data.NotThere):
        loaders = data.build_loaders(args, **known)  # however few images are left to train on
        there = {*map(bytes, loaders.held.tolist())} & {*map(bytes, [] if held is None else held.tolist())}
    if held is not None and len(there) < data.MOST * len(held):
        print(f"the images held out of training are not in {args.data_dir}: no exit of each image is calibrated")
        return None
    loader = loaders.val
    loader.keys.batch_size = wanted
    return loader
