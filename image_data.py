"""The image data sets, one function (args, train_too) -> Raw each; `synthetic` is a short example.

args: the data flags of train.py. Shapes: N images, C channels, H x W pixels.
"""

import os
import shutil
import tempfile
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import datasets as published
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms import functional as transforms

from cache import cached_array, download, extract_zip, file_facts
from utill import UserError, reason_of

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

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CHUNK = 1000  # images one decoding job returns
DIGITS = [str(k) for k in range(10)]

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


def stratified_order(labels, seed):
    """All positions in random order, such that every prefix holds the classes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    progress = np.empty(len(labels))  # how far into its class each position comes
    for k in np.unique(labels):
        members = shuffled[labels[shuffled] == k]
        progress[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(progress[shuffled], kind="stable")]


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
    return Raw(Split(images[train], labels[train]), Split(images[test], labels[test]), DIGITS)


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
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error


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
            f"{fault} ({reason_of(error)}): put its four files ({MNIST_FILES[0]} ...) into {root / 'MNIST/raw'}"
        ) from None
    splits = [Split(split.data[:, None], split.targets) for split in splits]
    return Raw(splits[0] if train_too else None, splits[-1], DIGITS)


# ---- Files of images ---------------------------------------------------------------------------


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
        with warnings.catch_warnings(record=True), Image.open(path) as image:  # of EXIF and such, not of pixels
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


def cached_images(root, name, paths, img_size):
    """Decoded images of `paths`, uint8 [N, 3, S, S] mapped from a cache file, and their (mean, std).

    S: img_size, or None for the images' own size.
    """
    size = img_size or max(read_image(paths[0]).shape[1:])
    images, stats = cached_array(
        root, f"{name}-{img_size or 'own'}", f"{img_size}\n{file_facts(root, paths)}", (len(paths), 3, size, size),
        partial(decode, size=size, may_resize=img_size is not None),
        [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)], "decoding images once", PixelStats(),
    )  # fmt: skip
    return images, (stats[:3], stats[3:])


class PixelStats:
    """Mean and deviation of every channel over all images it is shown."""

    counts = 0

    def update(self, images):
        """images: uint8 [N, C, H, W]."""
        self.counts = self.counts + pixel_counts(images)

    def values(self):
        """C means and C deviations."""
        mean, std = mean_std(self.counts)
        return [*mean, *std]


def pixel_counts(images):
    """[C, 256]: how often each value occurs in each channel of uint8 [N, C, H, W]."""
    return np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])


def mean_std(counts):
    """Per-channel mean and deviation in [0, 1] from `pixel_counts`; deviation 1 for a constant channel."""
    weights, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0))
    return mean.tolist(), np.where(std < 1e-6, 1.0, std).tolist()
