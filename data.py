"""Every data set behind one call: `build_loaders(args)`.

    loaders = build_loaders(args)                # args: the flags of train.py
    for epoch in range(num_epochs):
        loaders.train.set_epoch(epoch)
        for images, labels in loaders.train:     # float32 [B, C, H, W] normalised, int64 [B]

A data set is one function that returns uint8 images, in image_data.py or event_data.py, and one row of
DATASETS; resizing, subsets, augmentation, normalisation and batching follow from there.

Order and augmentation depend on (seed, epoch, image index) alone: not on the number of workers, the
batch size or the global random state, which stays untouched (the Poisson spikes are drawn from it).

Shapes: N or B images, C channels, H x W pixels.
"""

import copy
import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import event_data
import image_data
from image_data import EPOCH, SUBSET, UNIT_STATS, Raw, Split, read_image, resize, stratified_order
from utill import DataFacts, UserError, is_name, one_line

CROP_PADDING = 4  # pixels, the authors'
MOST = 0.9  # of the images held out must be found again


class NotThere(UserError):
    """Too few of the images that were held out are among those of the data."""


class Loaders(NamedTuple):
    """What build_loaders returns."""

    train: "Loader | None"
    val: "Loader | None"
    test: "Loader"
    facts: DataFacts
    held: torch.Tensor  # `fingerprints` of the images held out of training, for checkpoints
    record: dict = {}  # what was read, for environment.json, as far as the data set says it


class Row(NamedTuple):
    load: Callable[..., Raw]  # of (args, train_too)
    encoding: str = "poisson"  # unless the command line says otherwise
    augment: bool = True  # crop and flip unless the command line says otherwise
    mirrored: bool = True  # if the mirror image of one is one of its class: else it is cropped alone
    stats: tuple | None = None  # (mean, std) per channel in [0, 1]; None = measured on the training set


DATASETS = {
    "cifar10": Row(partial(image_data.cifar, "CIFAR10"), stats=image_data.CIFAR10_STATS),
    "cifar100": Row(partial(image_data.cifar, "CIFAR100"), stats=image_data.CIFAR100_STATS),
    "imagefolder": Row(image_data.imagefolder),
    "tiny_imagenet": Row(image_data.tiny_imagenet, stats=image_data.TINY_IMAGENET_STATS),
    "smnist": Row(image_data.mnist, "pixels", augment=False, mirrored=False, stats=UNIT_STATS),
    "digits": Row(image_data.digits, augment=False, mirrored=False),
    "synthetic": Row(image_data.synthetic),
    "nmnist": Row(event_data.nmnist, "frames", augment=False, mirrored=False),
    "dvs_cifar10": Row(event_data.dvs_cifar10, "frames", augment=False),
}


def load_images(paths, facts):
    """float32 [N, C, S, S] of a user's own pictures, as a net for data of these `facts` wants them."""
    images = [resize(read_image(path, facts.in_channels), facts.img_size) for path in paths]
    return normalize(torch.stack(images), facts.mean, facts.std)


# ---- Batches ------------------------------------------------------------------------------------


def normalize(images, mean, std):
    """uint8 [B, C, H, W] -> float32 (x / 255 - mean) / std, on the images' device; event frames as counts."""
    if images.ndim == 5:
        return images.float()
    stats = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
    mean, std = (v.to(images.device, non_blocking=True) for v in stats)  # else the CPU waits for a GPU to be idle
    return images.float().div_(255).sub_(mean).div_(std)


def augment_batch(images, dy, dx, flip, padding=CROP_PADDING):
    """Crop each image at its own offset out of a zero-padded frame, then mirror it where `flip`.

    images: uint8 [B, C, H, W]; dy, dx: int64 [B] in 0 .. 2 * padding; flip: bool [B]; all on one
    device. Returns the shape and type of `images`.
    """
    B, C, H, W = images.shape
    padded = F.pad(images, (padding,) * 4).view(B, C, -1)
    rows = dy[:, None] + torch.arange(H, device=images.device)  # [B, H]
    cols = dx[:, None] + torch.arange(W, device=images.device)  # [B, W]
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    pixels = rows[:, :, None] * (W + 2 * padding) + cols[:, None, :]  # [B, H, W], into the flat frame
    return padded.gather(2, pixels.view(B, 1, -1).expand(B, C, H * W)).view(B, C, H, W)


class Draws(NamedTuple):
    """One epoch's random numbers, [N] each: one entry per image of the whole training set."""

    order: torch.Tensor  # images are visited in rising order of this
    dy: torch.Tensor
    dx: torch.Tensor
    flip: torch.Tensor


@lru_cache(maxsize=2)
def epoch_draws(seed, epoch, count, padding=CROP_PADDING):
    rng = np.random.default_rng([seed, EPOCH, epoch])
    dy, dx = rng.integers(0, 2 * padding + 1, (2, count))
    draws = rng.random(count), dy, dx, rng.random(count) < 0.5
    return Draws(*(torch.from_numpy(np.ascontiguousarray(draw)) for draw in draws))


class BatchMaker:
    """maker[epoch, indices] -> (images, labels), a finished batch: what a worker process runs."""

    def __init__(self, split, mean, std, seed, padding=0, mirrored=True):
        self.split, self.mean, self.std, self.seed = split, mean, std, seed
        self.padding, self.mirrored = padding, mirrored

    def __getitem__(self, key):
        epoch, indices = key
        device = self.split.images.device
        here = torch.as_tensor(indices).to(device, non_blocking=True)
        images = self.split.images[here]
        if self.padding:
            draws = epoch_draws(self.seed, epoch, len(self.split.labels), self.padding)
            picked = (draw[indices].to(device, non_blocking=True) for draw in (draws.dy, draws.dx, draws.flip))
            dy, dx, flip = picked
            flip &= self.mirrored
            cropped = augment_batch(images.flatten(1, -3), dy, dx, flip, self.padding)  # frames alike
            images = cropped.view_as(images)
        return normalize(images, self.mean, self.std), self.split.labels[here]


class BatchKeys:
    """The (epoch, indices) of every batch of an epoch, from `start_batch` on."""

    def __init__(self, maker, indices, batch_size, train):
        self.maker, self.indices, self.batch_size, self.train = maker, indices, batch_size, train
        self.epoch = self.start_batch = 0

    def __len__(self):
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > 0 and not self.train)

    def __iter__(self):
        epoch, indices = self.epoch, self.indices
        if self.train:
            draws = epoch_draws(self.maker.seed, epoch, len(self.maker.split.labels))
            indices = indices[np.argsort(draws.order.numpy()[indices], kind="stable")]
        for batch in range(self.start_batch, len(self)):
            yield epoch, indices[batch * self.batch_size :][: self.batch_size]


class Loader:
    """Iterates over one epoch's batches: images float32 [B, C, H, W], labels int64 [B].

    train: shuffled anew each epoch, last partial batch dropped (as the authors do). Else in order,
    nothing dropped. len() is the batches and `num_images` the images of a whole epoch.
    """

    def __init__(self, maker, indices, batch_size, num_workers, train=False):
        self.maker, self.num_workers = maker, num_workers
        self.keys = BatchKeys(maker, np.asarray(indices), batch_size, train)
        self.num_images = len(self) * batch_size if train else len(indices)
        self._workers = None

    def set_epoch(self, epoch, start_batch=0):
        """Choose the epoch to iterate over; start_batch skips the batches a resumed run has seen."""
        self.keys.epoch, self.keys.start_batch = epoch, start_batch

    def to(self, device):
        """Keep the images on `device` and make batches there, in this process; UserError if they do not fit."""
        split, self.num_workers = self.maker.split, 0
        try:
            self.maker.split = Split(split.images.to(device), split.labels.to(device))
        except torch.OutOfMemoryError:
            raise UserError(f"the data set does not fit on {device}: do without --data_on_device") from None
        return self

    def __len__(self):
        return len(self.keys)

    def __iter__(self):
        if self.num_workers == 0:
            return (self.maker[key] for key in self.keys)
        if self._workers is None:
            # its own generator: torch's would otherwise be drawn from at every epoch
            options = dict(generator=torch.Generator(), worker_init_fn=_leave_signals_to_main)
            options |= dict(sampler=self.keys, batch_size=None, collate_fn=tuple, persistent_workers=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                self._workers = DataLoader(self.maker, num_workers=self.num_workers, **options)
        return self._from_workers()

    def _from_workers(self):
        handler = None
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        try:
            with warnings.catch_warnings():  # how many workers is for the user to say
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                batches = iter(self._workers)
            if handler is not None:  # PyTorch's raises where it pleases, in a lock or in a save; it also looks itself
                signal.signal(signal.SIGCHLD, handler)
            yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            raise UserError(
                "a data loading process was killed, maybe for lack of memory: lower --num_workers or --batch_size"
            ) from None


def _leave_signals_to_main(worker):
    """A terminal or a scheduler signals every process of a run: the main one saves, then ends the workers.

    Only a SIGTERM of the main process counts: Python sends one when a script dies of an error, and waits for ever.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def wait_for_main():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_main, daemon=True).start()


# ---- Putting it together ------------------------------------------------------------------------


def build_loaders(args, train=True, facts=None, split_seed=None, held=None):
    """Loaders of args.dataset, a name in DATASETS. train=False: only the test loader.

    args: dataset, data_dir, batch_size, num_workers, seed, img_size, limit_test, norm_stats, encoding,
    for event data num_steps, split_by, bin_ms and dvs_split, and for training val_fraction,
    limit_train, augment. facts: the DataFacts of the training, if it was before: their mean and std are
    used, their classes and size checked, so that testing needs no training images. split_seed: args.seed of
    that training, as recordings it trained on must not be tested. held: the `Loaders.held` of that training, whose
    images are held out again. The validation part is taken off first, --limit_train from what is left.
    Raises UserError, or OSError where the system refuses a file.
    """
    seed, split_seed = args.seed, args.seed if split_seed is None else split_seed
    args = copy.copy(args)
    args.seed = split_seed
    row = DATASETS[args.dataset]
    stats = known_stats(args, row, facts)
    raw = row.load(args, train_too=train or stats is None)
    pixels = raw.train.images if raw.train else None  # before they are resized
    raw = checked_raw(raw, args, facts)
    channels, height, _ = raw.test.images.shape[-3:]
    mean, std = map(list, stats or raw.stats or image_data.mean_std(image_data.pixel_counts(raw.train.images.numpy())))
    if stats is UNIT_STATS:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise UserError(f"mean and std are of {len(mean)} channels, the images of {args.dataset} have {channels}")

    def loader(split, indices, training=False, padding=0):
        maker = BatchMaker(split, mean, std, seed, padding, row.mirrored)
        return Loader(maker, indices, args.batch_size * (1 if training else 2), args.num_workers, training)

    train_loader = val_loader = None
    kept_out = fingerprints(pixels, [])
    if train:
        order = stratified_order(raw.train.labels.numpy(), [split_seed, SUBSET])
        count = max(1, round(args.val_fraction * len(order))) if args.val_fraction else 0
        if held is not None and count:
            order, count = held_first(order, count, pixels, held, args)
        kept_out, kept = fingerprints(pixels, order[:count]), order[count:][: args.limit_train]
        if len(kept) < args.batch_size:
            raise UserError(f"{len(kept)} training images do not fill a batch of {args.batch_size}: lower --batch_size")
        augment = row.augment if args.augment is None else args.augment
        train_loader = loader(raw.train, np.sort(kept), training=True, padding=args.crop_padding if augment else 0)
        val_loader = loader(raw.train, np.sort(order[:count])) if count else None
    order = stratified_order(raw.test.labels.numpy(), [0, SUBSET])  # the same images whatever the seed
    test_loader = loader(raw.test, np.sort(order[: args.limit_test]))
    classes, mean, std = [str(c) for c in raw.classes], [float(v) for v in mean], [float(v) for v in std]
    facts = DataFacts(classes, channels, height, mean, std)
    return Loaders(train_loader, val_loader, test_loader, facts, kept_out, raw.record or {})


def known_stats(args, row, facts):
    """(mean, std) of the pixels, per channel or UNIT_STATS; None where they must be measured. UserError where the
    encoding does not go with the data."""
    if (args.encoding == "frames") != (row.encoding == "frames"):
        raise UserError(f"--encoding {args.encoding} does not go with {args.dataset}: event data takes frames, only it")
    if facts:
        return facts.mean, facts.std
    if args.encoding in ("poisson_binary", "frames"):
        return UNIT_STATS
    return image_data.CIFAR10_STATS if args.norm_stats == "authors" else row.stats


def checked_raw(raw, args, facts):
    """`raw` as tensors of the size asked for; prints its note.

    UserError where no net takes the images, or that of `facts` does not.
    """
    axes = ["N", "T", "C", "H", "W"] if args.encoding == "frames" else ["N", "C", "H", "W"]
    for name in ("train", "test") if raw.train else ("test",):
        split = checked_split(getattr(raw, name), f"{name} split of {args.dataset}", axes, len(raw.classes))
        if args.img_size and args.encoding != "frames":  # event frames were binned to their size
            split = split._replace(images=resize(split.images, args.img_size))
        raw = raw._replace(**{name: split})
    if raw.note:
        print(one_line(f"data: {raw.note}"))
    height, width = raw.test.images.shape[-2:]
    if height != width or raw.train and raw.train.images.shape[1:] != raw.test.images.shape[1:]:
        raise UserError(f"the images of {args.dataset} are not all square and of one shape: pass --img_size")
    if len(raw.classes) < 2:
        raise UserError(f"{args.data_dir} has one class alone: there is nothing to tell apart")
    if odd := [str(c) for c in raw.classes if not is_name(str(c))]:
        raise UserError(f"the class {odd[0]!r:.100} has too long a name, or control characters in it: rename it")
    if facts and facts.classes != [str(c) for c in raw.classes]:
        raise UserError(f"the classes of {args.data_dir} are not those that the net was trained on")
    if facts and height != facts.img_size and not args.img_size:
        size = f"{height}x{height}, the net was trained on {facts.img_size}x{facts.img_size}"
        raise UserError(f"the images of {args.data_dir} are {size}: pass --img_size {facts.img_size}")
    return raw


def fingerprints(images, indices):
    """uint8 [n, 8] of these of the images, by their pixels: the files of a data set may lie in any order."""
    each = [hashlib.sha256(np.ascontiguousarray(images[i])).digest()[:8] for i in indices]
    return torch.tensor([*map(list, each)], dtype=torch.uint8).view(-1, 8)


def held_first(order, count, images, held, args):
    """(`order` with the images first that another training held out, how many): `count`, or those that are there.

    held: their fingerprints. CIFAR as published and as a tree of files, say, has the same images in two orders, and
    some in other pixels where they went through JPEG. Where none is there the data are others, or were decoded
    otherwise: then the order is as good as any. UserError where many are missing, or none was held out.
    """
    wanted = {*map(bytes, held.tolist())}
    if not wanted:
        raise UserError("--val_fraction: the earlier training held out no images, so leave it out here too")
    if wanted.issuperset(map(bytes, fingerprints(images, order[:count]).tolist())):
        return order, count
    known = np.array([bytes(row) in wanted for row in fingerprints(images, order).tolist()])
    if not known.any():
        print(f"none of the images that the earlier training held out is in {args.data_dir}: taken for other data")
        return order, count
    if known.sum() < MOST * count:
        there = f"{known.sum()} of the images that the earlier training held out are in {args.data_dir}"
        asked = f"--val_fraction {args.val_fraction:g} needs {count}"
        raise NotThere(f"{there}, {asked}: give the same data, or a smaller part")
    count = count if count < len(held) else int(known.sum())  # also both of two equal images
    return np.concatenate([order[known], order[~known]]), count


def checked_split(split, whose, axes, num_classes):
    """`split` as tensors, images uint8 and labels int64; its arrays and lists become tensors.

    UserError where training would learn nonsense or fail far from here. axes: names of the images' dimensions.
    """
    images, labels = (
        part if torch.is_tensor(part) else torch.from_numpy(np.require(part, requirements="CW")) for part in split
    )
    pixels = images.dtype == torch.uint8 and images.ndim == len(axes) and images.numel() > 0
    if not pixels or images.shape[-3] > 4 >= images.shape[-1]:  # the channels are last
        wanted = f"uint8 [{', '.join(axes)}] of 0 to 255"
        raise UserError(f"the images of the {whose} are {images.dtype} {list(images.shape)}: they must be {wanted}")
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"the labels of the {whose} are {labels.dtype} {list(labels.shape)}, not an integer an image")
    if labels.min() < 0 or labels.max() >= num_classes:
        spread = f"from {labels.min()} to {labels.max()}"
        raise UserError(f"the labels of the {whose} go {spread}, but must lie in 0 to {num_classes - 1}")
    return Split(images, labels.long())
