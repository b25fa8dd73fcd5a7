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

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets as published
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from utill import UserError

# The authors' numbers (their train.py), used for both CIFAR sets there. CIFAR-100's own are the mean
# and standard deviation over all pixels of its training images, as in weiaicunzai/pytorch-cifar100.
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
UNIT_STATS = (0.0,), (1.0,)  # images stay in [0, 1]

EPOCH, SUBSET, FIXED = range(3)  # one random stream per purpose: default_rng([seed, purpose, ...])


class Split(NamedTuple):
    """Images as stored, before augmentation and normalisation."""

    images: torch.Tensor  # uint8 [N, C, H, W]
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


class Row(NamedTuple):
    load: Callable
    augment: bool = True  # crop and flip unless the command line says otherwise
    stats: tuple | None = None  # (mean, std) per channel in [0, 1]; None = measured on the training set


DATASETS = {
    "cifar10": Row(partial(cifar, published.CIFAR10), stats=CIFAR10_STATS),
    "cifar100": Row(partial(cifar, published.CIFAR100), stats=CIFAR100_STATS),
    "imagefolder": Row(imagefolder),
    "digits": Row(digits, augment=False),
    "synthetic": Row(synthetic),
}


# ---- Image files and their cache ----------------------------------------------------------------

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CACHE_VERSION = 2  # raise it whenever decoding changes
CHUNK = 1000  # images one decoding job returns


def list_images(root, split):
    """{class name: sorted paths} of root/split/<class>/**; UserError if the tree is not of that form."""
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: name one with train/<class>/ and test/<class>/ inside")
    if not (root / split).is_dir():
        raise UserError(f"data folder {root} has no {split}/: it must hold train/<class>/ and test/<class>/")
    found = {}
    for folder in sorted(p for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith(".")):
        names = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
        found[folder.name] = sorted(p for p in names if Path(p).suffix.lower() in IMAGE_SUFFIXES)
        if not found[folder.name]:
            raise UserError(f"class folder {folder} has no image in it: add some or remove the folder")
    if not found:
        raise UserError(f"{root / split} is empty: it must hold one folder of images per class")
    return found


def read_image(path, in_channels=3):
    """uint8 [C, H, W] of one file, converted to RGB (in_channels 3) or grey (1)."""
    try:
        with Image.open(path) as image:
            return transforms.pil_to_tensor(image.convert("RGB" if in_channels == 3 else "L"))
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"cannot read image {path}: {error}") from error


def resize(images, size):
    """uint8 [..., H, W] -> [..., size, size]: bilinear with antialias, unchanged if already so."""
    if images.shape[-2:] == (size, size):
        return images
    return torch.cat([transforms.resize(part, [size, size], antialias=True) for part in images.split(CHUNK)])


def decode(paths, size, may_resize):
    """uint8 array [N, 3, size, size] of the files; UserError if one is of another size and may not be."""
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if not may_resize and image.shape[1:] != (size, size):
            raise UserError(f"{path} is not {size}x{size}: pass --img_size to bring all images to one size")
    return torch.stack([resize(image, size) for image in images]).numpy()


def cached_images(root, split, paths, img_size):
    """Decoded images of `paths`, uint8 [N, 3, S, S] mapped from a cache file, and their (mean, std).

    S: img_size, or None for the images' own size. The file's name carries a hash of the version,
    img_size and every path, size and time of change, so that another list of files is another cache.
    """
    size = img_size or max(read_image(paths[0]).shape[1:])
    facts = [(os.path.relpath(path, root), os.stat(path)) for path in paths]
    listing = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)
    key = hashlib.sha256(f"{CACHE_VERSION} {img_size}\n{listing}".encode()).hexdigest()[:16]
    folder, prefix = cache_folder(root), f"{split}-{img_size or 'own'}-"
    path = folder / f"{prefix}{key}.npy"
    shape = len(paths), 3, size, size
    cache = read_cache(path, shape)
    if cache is None:
        write_cache(path, shape, paths, may_resize=img_size is not None)
        for old in set(folder.glob(f"{prefix}*")) - {path}:
            old.unlink(missing_ok=True)
        cache = read_cache(path, shape)
    return cache


def cache_folder(root):
    """root/.bntt_cache, or one under the user's cache folder where root cannot be written to."""
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    for folder in (root / ".bntt_cache", user / "bntt" / name):
        with suppress(OSError, RuntimeError):
            folder = folder.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise UserError(f"cannot write the decoded images to {root} nor to {user}: set XDG_CACHE_HOME to a writable folder")


def read_cache(path, shape):
    """(images, mapped and not read, (mean, std)) in the file; None if it is not there and whole."""
    try:
        images = np.load(path, mmap_mode="c")  # copy on write: torch wants writable memory
        stats = np.fromfile(path, "f8", offset=images.offset + images.nbytes)
    except (OSError, ValueError, EOFError, AttributeError):
        return None
    if images.dtype != np.uint8 or images.shape != shape or stats.size != 6:
        return None
    return torch.from_numpy(images), (stats[:3].tolist(), stats[3:].tolist())


def write_cache(path, shape, paths, may_resize):
    """Decode `paths` into the cache file: written aside, synced and renamed, so never half there.

    One file, that images and statistics are whole together or not there at all: a .npy of the images,
    and behind it mean and std of the three channels as float64.
    """
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    job = partial(decode, size=shape[-1], may_resize=may_resize)
    workers = min(8, os.cpu_count() or 1, len(chunks))
    pool = ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None
    counts = 0
    header = dict(descr="|u1", fortran_order=False, shape=shape)
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix="tmp-") as aside,
            tqdm(total=len(paths), desc="decoding images once", unit="img", disable=None) as bar,
        ):
            with open(Path(aside) / path.name, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for images in (pool.map if pool else map)(job, chunks):
                    file.write(images.data)
                    counts = counts + pixel_counts(images)
                    bar.update(len(images))
                file.write(np.array(mean_std(counts)).data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(Path(aside) / path.name, path)
    except OSError as error:
        raise UserError(f"cannot write the decoded images to {path.parent}: {error}") from error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        with suppress(OSError):  # succeeds only on an empty folder: nothing is left of a failed first run
            path.parent.rmdir()


def pixel_counts(images):
    """[C, 256]: how often each value occurs in each channel of uint8 [N, C, H, W]."""
    return np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])


def mean_std(counts):
    """Per-channel mean and deviation in [0, 1] from `pixel_counts`; deviation 1 for a constant channel."""
    weights, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0))
    return mean.tolist(), np.where(std < 1e-6, 1.0, std).tolist()


def load_images(paths, img_size, in_channels, mean, std):
    """float32 [N, C, img_size, img_size] of a user's own pictures, as the net wants them."""
    return normalize(torch.stack([resize(read_image(p, in_channels), img_size) for p in paths]), mean, std)


# ---- Batches ------------------------------------------------------------------------------------


def normalize(images, mean, std):
    """uint8 [B, C, H, W] -> float32 (x / 255 - mean) / std, on the images' device."""
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

    def __init__(self, split, mean, std, augment, seed):
        self.split, self.mean, self.std, self.augment, self.seed = split, mean, std, augment, seed

    def __getitem__(self, key):
        epoch, indices = key
        device = self.split.images.device
        here = torch.as_tensor(indices, device=device)
        images = self.split.images[here]
        if self.augment:
            draws = epoch_draws(self.seed, epoch, len(self.split.labels))
            dy, dx, flip = (draw[indices].to(device) for draw in (draws.dy, draws.dx, draws.flip))
            images = augment_batch(images, dy, dx, flip)
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
            with warnings.catch_warnings():  # how many workers is for the user to say
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                self._workers = DataLoader(
                    self.maker, batch_size=None, sampler=self.keys, num_workers=self.num_workers,
                    collate_fn=_as_is, persistent_workers=True, generator=torch.Generator(),
                )  # fmt: skip
        return iter(self._workers)


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
    and for training val_fraction, limit_train, augment. A checkpoint's mean, std and classes, if args
    has them, are used (checked, for the classes) instead of the data set's: then testing needs no
    training images. The validation part is taken off first, --limit_train from what is left.
    Raises UserError.
    """
    check_args(args, train)
    row = DATASETS[args.dataset]
    stats = CIFAR10_STATS if args.norm_stats == "authors" else row.stats
    if args.encoding == "poisson_binary":
        stats = UNIT_STATS
    if getattr(args, "mean", None):
        stats = args.mean, args.std
    try:
        raw = row.load(args, train_too=train or stats is None)
    except OSError as error:
        raise UserError(f"cannot read {args.dataset} in {args.data_dir}: {error}") from error
    if args.img_size:
        train_split = raw.train and raw.train._replace(images=resize(raw.train.images, args.img_size))
        raw = raw._replace(train=train_split, test=raw.test._replace(images=resize(raw.test.images, args.img_size)))
    channels, height, width = raw.test.images.shape[1:]
    if height != width or raw.train and raw.train.images.shape[1:] != raw.test.images.shape[1:]:
        raise UserError(f"the images of {args.dataset} are not all square and of one size: pass --img_size")
    if getattr(args, "classes", None) and list(args.classes) != list(raw.classes):
        raise UserError(f"the classes of {args.data_dir} are not those that the net was trained on")
    mean, std = map(list, stats or raw.stats or mean_std(pixel_counts(raw.train.images.numpy())))
    if stats is UNIT_STATS:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise UserError(f"mean and std are of {len(mean)} channels, the images of {args.dataset} have {channels}")

    def loader(split, indices, training=False, augment=False):
        maker = BatchMaker(split, mean, std, augment, args.seed)
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
    order = stratified_order(raw.test.labels.numpy(), [args.seed, SUBSET])
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
