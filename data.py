"""Every data set behind one call: `build_loaders(args)`.

    loaders = build_loaders(args)                # args: the flags of train.py
    for epoch in range(num_epochs):
        loaders.train.set_epoch(epoch)
        for images, labels in loaders.train:     # float32 [B, C, H, W] normalised, int64 [B]

A data set is one function that returns uint8 images and one row of DATASETS (see `synthetic` for a
short example); resizing, subsets, augmentation, normalisation and batching follow from there.

Order and augmentation depend on (seed, epoch, image index) alone: not on the number of workers, the
batch size or the global random state, which stays untouched (the Poisson spikes are drawn from it).

Shapes: N or B images, C channels, H x W pixels.
"""

import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets as published
from torchvision.datasets.utils import check_integrity, extract_archive

import events
import runfiles
import utill
from files import cached_images, download, extract_zip, list_images, mean_std, pixel_counts, read_image, resize
from utill import UserError

# The authors' numbers (their train.py), used for both CIFAR sets there. CIFAR-100's own are the mean
# and standard deviation over all pixels of its training images, as in weiaicunzai/pytorch-cifar100.
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# Over all pixels of its training images, as in aimagelab/mammoth, seq_tinyimagenet.py; the other deviations in
# use, (0.2302, 0.2265, 0.2262), are the means of those of each image. A slice of the classes takes the same.
TINY_IMAGENET_STATS = (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)
UNIT_STATS = (0.0,), (1.0,)  # images stay in [0, 1], event counts as they are

MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_SIZE, TINY_IMAGENET_MD5 = 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de"

EPOCH, SUBSET, FIXED = range(3)  # one random stream per purpose: default_rng([seed, purpose, ...])


class Split(NamedTuple):
    """Images as stored, before augmentation and normalisation."""

    images: torch.Tensor  # uint8 [N, C, H, W]; event frames [N, T, C, H, W], events counted per pixel
    labels: torch.Tensor  # int64 [N]


class Raw(NamedTuple):
    """What the function of a data set returns. stats: (mean, std) where already at hand."""

    train: Split | None
    test: Split
    classes: list[str]
    stats: tuple | None = None


class Loaders(NamedTuple):
    """What build_loaders returns; the fields after the loaders are what a checkpoint keeps."""

    train: "Loader | None"
    val: "Loader | None"
    test: "Loader"
    classes: list[str]
    in_channels: int
    img_size: int
    mean: list[float]
    std: list[float]


# ---- Data sets: (args, train_too) -> Raw -------------------------------------------------------


def cifar(dataset, args, train_too):
    """CIFAR-10 or CIFAR-100 as published, from data_dir, downloaded there if it is not yet there.

    dataset: torchvision's class. Raises UserError if a file is damaged or cannot be downloaded.
    """
    root, new = Path(args.data_dir), not Path(args.data_dir).exists()
    folder, archive = root / dataset.base_folder, root / dataset.filename
    if archive.exists() and not folder.exists() and not check_integrity(archive, dataset.tgz_md5):
        raise UserError(f"{archive} is incomplete or damaged: remove it and fetch {dataset.url} again")
    try:
        if not folder.exists():
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as aside:
                if archive.exists():
                    extract_archive(archive, aside)
                else:
                    dataset(aside, download=True)
                os.replace(Path(aside) / dataset.base_folder, folder)
    except (OSError, RuntimeError) as error:
        if new:
            with suppress(OSError):
                root.rmdir()
        raise UserError(
            f"cannot download {dataset.__name__} ({error}): fetch {dataset.url} on a machine with internet "
            f"and put {dataset.filename}, or the folder {dataset.base_folder} inside it, into {root}"
        ) from error
    meta = [dataset.meta["filename"], dataset.meta["md5"]]
    for name, md5 in [*dataset.train_list, *dataset.test_list, meta]:
        if not check_integrity(folder / name, md5):
            raise UserError(f"{folder / name} is missing or damaged: move {folder} away and fetch {dataset.url} again")

    def split(data):
        return Split(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))

    test = dataset(root, train=False)
    return Raw(split(dataset(root, train=True)) if train_too else None, split(test), test.classes)


def digits(args, train_too):
    """scikit-learn's 1,797 handwritten digits, 8x8, grey; a fixed stratified fifth is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = stratified_order(bunch.target, [0, FIXED])
    train, test = np.sort(order[360:]), np.sort(order[:360])
    return Raw(Split(images[train], labels[train]), Split(images[test], labels[test]), [str(k) for k in range(10)])


def synthetic(args, train_too):
    """For smoke tests: 10 classes of 32x32 colour images, a coarse pattern each under strong noise."""
    rng = np.random.default_rng([0, FIXED])
    pattern = rng.integers(64, 192, (10, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)

    def split(count):
        labels = np.arange(count) % 10
        images = pattern[labels] + rng.normal(0, 40, (count, 3, 32, 32))
        return Split(torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))

    return Raw(split(1000), split(200), [f"class{k}" for k in range(10)])


def imagefolder(args, train_too):
    """Any tree data_dir/train/<class>/*, data_dir/test/<class>/*: decoded once, then read from a cache.

    Images become RGB and img_size x img_size (squeezed, not cropped). Raises UserError if the tree
    is not of that form, an image cannot be read, or sizes differ and there is no --img_size.
    """
    root = Path(args.data_dir)
    splits = ["train", "test"] if train_too else ["test"]
    files = {split: list_images(root, split) for split in splits}
    classes = sorted(files["test"])
    if train_too and sorted(files["train"]) != classes:
        odd = sorted(set(files["train"]) ^ set(classes))
        raise UserError(f"{root}/train and {root}/test must hold the same classes, only one has {', '.join(odd[:5])}")

    def load(split):
        paths = [path for name in classes for path in files[split][name]]
        labels = [k for k, name in enumerate(classes) for _ in files[split][name]]
        images, stats = cached_images(root, split, paths, args.img_size)
        return Split(images, torch.tensor(labels)), stats

    train, stats = load("train") if train_too else (None, None)
    return Raw(train, load("test")[0], classes, stats)


def tiny_imagenet(args, train_too):
    """Tiny-ImageNet or a slice of its classes, 64x64, from data_dir (or tiny-imagenet-200 in it), else downloaded.

    The test split is the published val part: the labels of the test part were never published. Classes are
    those of wnids.txt, in its order, called by their first name in words.txt. Raises UserError if a file is
    damaged, cannot be downloaded or does not agree with the others.
    """
    root = tiny_imagenet_folder(Path(args.data_dir))
    wnids = [line.split()[0] for line in read_lines(root / "wnids.txt")]
    if not wnids or len(set(wnids)) < len(wnids):
        raise UserError(f"{root / 'wnids.txt'} must name every class once")
    words = dict(line.split("\t", 1) for line in read_lines(root / "words.txt") if "\t" in line)
    names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    names = [f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in zip(names, wnids, strict=True)]

    def load(split, files):
        """files: [(path, wnid)]"""
        number = {wnid: k for k, wnid in enumerate(wnids)}
        images, _ = cached_images(root, split, [path for path, _ in files], args.img_size)
        return Split(images, torch.tensor([number[wnid] for _, wnid in files]))

    val = tiny_imagenet_val(root / "val", wnids)
    train = [(path, wnid) for wnid in wnids for path in jpegs(root / "train" / wnid / "images")] if train_too else None
    return Raw(load("train", train) if train_too else None, load("val", val), names)


def tiny_imagenet_folder(root):
    """The folder of the published form in or at `root`; if there is none it is unpacked there, or downloaded first."""
    folder, archive = root / "tiny-imagenet-200", root / "tiny-imagenet-200.zip"
    if folder.is_dir():
        return folder
    if (root / "wnids.txt").exists() or (root / "val").is_dir():
        return root
    download(TINY_IMAGENET_URL, archive, TINY_IMAGENET_SIZE, TINY_IMAGENET_MD5)
    extract_zip(archive, folder, most_bytes=1 << 30, top=folder.name)
    return folder


def tiny_imagenet_val(folder, wnids):
    """[(path, wnid)] of val/ as val_annotations.txt has them; UserError unless it names each image once, of a class."""
    notes = folder / "val_annotations.txt"
    found = [line.split()[:2] for line in read_lines(notes)]
    for name, *wnid in found:
        if not wnid or wnid[0] not in wnids:
            raise UserError(f"{notes}: {name} is of the class {' '.join(wnid)!r}, which wnids.txt does not name")
    named, there = [name for name, _ in found], {path.name for path in jpegs(folder / "images")}
    if missing := sorted(set(named) - there):
        raise UserError(f"{notes} names images that are not in {folder / 'images'}: {', '.join(missing[:5])}")
    if unnamed := sorted(there - set(named)):
        raise UserError(f"{notes} does not name these images: {', '.join(unnamed[:5])}")
    if len(set(named)) < len(named):
        raise UserError(f"{notes} names an image twice")
    return [(folder / "images" / name, wnid) for name, wnid in found]


def jpegs(folder):
    """Sorted paths of the JPEG files in `folder`; UserError if there are none."""
    found = sorted(folder.glob("*.JPEG"))
    if not found:
        raise UserError(f"{folder} is missing or has no .JPEG in it: unpack the published archive again")
    return found


def read_lines(path):
    """Lines of a text file, less empty ones; UserError if it is missing or is no text."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {utill.reason_of(error)}") from error


def mnist(args, train_too):
    """MNIST's idx files, grey, 28x28, from data_dir/MNIST/raw, downloaded there if they are not yet there."""
    root, new = Path(args.data_dir), not Path(args.data_dir).exists()
    try:
        if not all((root / "MNIST/raw" / name).exists() for name in MNIST_FILES):
            published.MNIST(root, download=True)
        splits = [published.MNIST(root, train=train) for train in ([True, False] if train_too else [False])]
        if any(len(s.data) != len(s.targets) or len(s.data) == 0 or s.targets.max() > 9 for s in splits):
            raise ValueError("images and labels do not go together")
    except MemoryError:
        raise
    except Exception as error:  # torchvision raises many kinds on a damaged file
        if new:
            shutil.rmtree(root, ignore_errors=True)
        there = all((root / "MNIST/raw" / name).exists() for name in MNIST_FILES)
        fault = f"the MNIST files in {root} are damaged" if there else f"cannot download MNIST into {root}"
        raise UserError(
            f"{fault} ({utill.reason_of(error)}): put its four files ({MNIST_FILES[0]} ...) into {root / 'MNIST/raw'}"
        ) from None
    splits = [Split(split.data[:, None], split.targets) for split in splits]
    return Raw(splits[0] if train_too else None, splits[-1], [str(k) for k in range(10)])


def nmnist(args, train_too):
    """N-MNIST (Orchard et al. 2015): recordings of an event camera, from data_dir, as frames of event counts.

    Raises UserError if the files are not there or damaged.
    """
    splits = ["train", "test"] if train_too else ["test"]
    parts = {split: events.list_nmnist(Path(args.data_dir), split) for split in splits}
    return event_frames(args, events.NMNIST, parts, events.DIGITS)


def dvs_cifar10(args, train_too):
    """CIFAR10-DVS (Li et al. 2017) from data_dir, as frames of event counts; it has no split of its own.

    args.dvs_split: `random`, a tenth of each class drawn from the seed of the training for testing, or `first100`, its
    first 100 recordings. Raises UserError if the files are not there or damaged.
    """
    seed = getattr(args, "split_seed", args.seed)
    parts = events.list_cifar10_dvs(Path(args.data_dir), args.dvs_split, seed)
    if not train_too:
        del parts["train"]
    return event_frames(args, events.DVS_CIFAR10, parts, events.CIFAR10, f"-{args.dvs_split}-seed{seed}")


def event_frames(args, source, parts, classes, drawn=""):
    """Frames of the recordings `parts`, {split: [(path, label)]}, of an events.Source; `drawn` says how they were."""
    splits = {name: Split(*events.cached_frames(args, source, f"{name}{drawn}", part)) for name, part in parts.items()}
    return Raw(splits.get("train"), splits["test"], classes)


class Row(NamedTuple):
    load: Callable
    encoding: str = "poisson"  # unless the command line says otherwise
    augment: bool = True  # crop and flip unless the command line says otherwise
    mirrored: bool = True  # if the mirror image of one is one of its class: else it is cropped alone
    stats: tuple | None = None  # (mean, std) per channel in [0, 1]; None = measured on the training set


DATASETS = {
    "cifar10": Row(partial(cifar, published.CIFAR10), stats=CIFAR10_STATS),
    "cifar100": Row(partial(cifar, published.CIFAR100), stats=CIFAR100_STATS),
    "imagefolder": Row(imagefolder),
    "tiny_imagenet": Row(tiny_imagenet, stats=TINY_IMAGENET_STATS),
    "smnist": Row(mnist, "pixels", augment=False, mirrored=False, stats=UNIT_STATS),
    "digits": Row(digits, augment=False, mirrored=False),
    "synthetic": Row(synthetic),
    "nmnist": Row(nmnist, "frames", augment=False, mirrored=False),
    "dvs_cifar10": Row(dvs_cifar10, "frames", augment=False),
}


def load_images(paths, img_size, in_channels, mean, std):
    """float32 [N, C, img_size, img_size] of a user's own pictures, as the net wants them."""
    return normalize(torch.stack([resize(read_image(p, in_channels), img_size) for p in paths]), mean, std)


# ---- Batches ------------------------------------------------------------------------------------


def normalize(images, mean, std):
    """uint8 [B, C, H, W] -> float32 (x / 255 - mean) / std, on the images' device; event frames as counts."""
    if images.ndim == 5:
        return images.float()
    mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


def augment_batch(images, dy, dx, flip, padding=4):
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
def epoch_draws(seed, epoch, count, padding=4):
    rng = np.random.default_rng([seed, EPOCH, epoch])
    dy, dx = rng.integers(0, 2 * padding + 1, (2, count))
    draws = rng.random(count), dy, dx, rng.random(count) < 0.5
    return Draws(*(torch.from_numpy(np.ascontiguousarray(draw)) for draw in draws))


class BatchMaker:
    """maker[epoch, indices] -> (images, labels), a finished batch: what a worker process runs."""

    def __init__(self, split, mean, std, seed, augment=False, mirrored=True):
        self.split, self.mean, self.std, self.seed = split, mean, std, seed
        self.augment, self.mirrored = augment, mirrored

    def __getitem__(self, key):
        epoch, indices = key
        device = self.split.images.device
        here = torch.as_tensor(indices, device=device)
        images = self.split.images[here]
        if self.augment:
            draws = epoch_draws(self.seed, epoch, len(self.split.labels))
            dy, dx, flip = (draw[indices].to(device) for draw in (draws.dy, draws.dx, draws.flip))
            images = augment_batch(images.flatten(1, -3), dy, dx, flip & self.mirrored).view(
                images.shape
            )  # frames alike
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
            options |= dict(sampler=self.keys, batch_size=None, collate_fn=_as_is, persistent_workers=True)
            with warnings.catch_warnings():  # how many workers is for the user to say
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                self._workers = DataLoader(self.maker, num_workers=self.num_workers, **options)
        return self._from_workers()

    def _from_workers(self):
        handler = None
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        try:
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


def _as_is(batch):
    return batch


# ---- Putting it together ------------------------------------------------------------------------


def stratified_order(labels, seed):
    """All positions in random order, such that every prefix holds the classes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    progress = np.empty(len(labels))  # how far into its class each position comes
    for k in np.unique(labels):
        members = shuffled[labels[shuffled] == k]
        progress[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(progress[shuffled], kind="stable")]


def build_loaders(args, train=True):
    """Loaders of args.dataset, a name in DATASETS. train=False: only the test loader.

    args: dataset, data_dir, batch_size, num_workers, seed, img_size, limit_test, norm_stats, encoding,
    for event data num_steps, split_by, bin_ms and dvs_split, and for training val_fraction,
    limit_train, augment. A checkpoint's mean, std and classes, if args has them, are used (checked, for
    the classes) instead of the data set's: then testing needs no training images. The validation part
    is taken off first, --limit_train from what is left. Raises UserError.
    """
    check_args(args, train)
    row = DATASETS[args.dataset]
    stats = CIFAR10_STATS if args.norm_stats == "authors" else row.stats
    if (args.encoding == "frames") != (row.encoding == "frames"):
        raise UserError(f"--encoding {args.encoding} does not go with {args.dataset}: event data takes frames, only it")
    if args.encoding in ("poisson_binary", "frames"):
        stats = UNIT_STATS
    if getattr(args, "mean", None):
        stats = args.mean, args.std
    try:
        raw = row.load(args, train_too=train or stats is None)
    except OSError as error:
        raise UserError(f"cannot read {args.dataset} in {args.data_dir}: {error}") from error
    if args.img_size and args.encoding != "frames":  # event frames were binned to their size
        train_split = raw.train and raw.train._replace(images=resize(raw.train.images, args.img_size))
        raw = raw._replace(train=train_split, test=raw.test._replace(images=resize(raw.test.images, args.img_size)))
    channels, height, width = raw.test.images.shape[-3:]
    if height != width or raw.train and raw.train.images.shape[1:] != raw.test.images.shape[1:]:
        raise UserError(f"the images of {args.dataset} are not all square and of one size: pass --img_size")
    if odd := [str(c) for c in raw.classes if not runfiles.is_name(str(c))]:
        raise UserError(f"the class {odd[0]!r:.100} has too long a name, or control characters in it: rename it")
    if getattr(args, "classes", None) and list(args.classes) != list(raw.classes):
        raise UserError(f"the classes of {args.data_dir} are not those that the net was trained on")
    mean, std = map(list, stats or raw.stats or mean_std(pixel_counts(raw.train.images.numpy())))
    if stats is UNIT_STATS:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise UserError(f"mean and std are of {len(mean)} channels, the images of {args.dataset} have {channels}")

    def loader(split, indices, training=False, augment=False):
        maker = BatchMaker(split, mean, std, args.seed, augment, row.mirrored)
        return Loader(maker, indices, args.batch_size * (1 if training else 2), args.num_workers, training)

    train_loader = val_loader = None
    if train:
        order = stratified_order(raw.train.labels.numpy(), [args.seed, SUBSET])
        held_out = max(1, round(args.val_fraction * len(order))) if args.val_fraction else 0
        kept = order[held_out:][: args.limit_train]
        if len(kept) < args.batch_size:
            raise UserError(f"{len(kept)} training images do not fill a batch of {args.batch_size}: lower --batch_size")
        augment = row.augment if args.augment is None else args.augment
        train_loader = loader(raw.train, np.sort(kept), training=True, augment=augment)
        val_loader = loader(raw.train, np.sort(order[:held_out])) if held_out else None
    order = stratified_order(raw.test.labels.numpy(), [0, SUBSET])  # the same images whatever the seed
    test_loader = loader(raw.test, np.sort(order[: args.limit_test]))
    classes, mean, std = [str(c) for c in raw.classes], [float(v) for v in mean], [float(v) for v in std]
    return Loaders(train_loader, val_loader, test_loader, classes, channels, height, mean, std)


def check_args(args, train):
    if args.dataset not in DATASETS:
        raise UserError(f"--dataset must be one of {', '.join(DATASETS)}, got {args.dataset!r}")
    if args.norm_stats not in ("own", "authors"):
        raise UserError(f"--norm_stats must be own or authors, got {args.norm_stats!r}")
    least = dict(batch_size=1, num_workers=0, seed=0, img_size=1, limit_test=1)
    for key, low in (least | dict(limit_train=1) if train else least).items():
        value = getattr(args, key)
        if value is not None and value < low:
            raise UserError(f"--{key} must be at least {low}, got {value}")
    if train and not 0 <= args.val_fraction < 1:
        raise UserError(f"--val_fraction must be at least 0 and below 1, got {args.val_fraction}")
