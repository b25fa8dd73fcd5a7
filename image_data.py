"""The image data sets, one function (args, train_too) -> Raw each; `synthetic` is a short example.

args: the data flags of train.py. Shapes: N images, C channels, H x W pixels. torchvision, whose import takes a second,
is imported by what needs it.
"""

import hashlib
import os
import re
import shutil
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from cache import aside, cached_array, download, extract_zip, file_facts
from utill import UserError, reading

# The authors' numbers (their train.py), used for both CIFAR sets there. CIFAR-100's own are the mean
# and standard deviation over all pixels of its training images, as in weiaicunzai/pytorch-cifar100.
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# Over all pixels of its training images, as in aimagelab/mammoth, seq_tinyimagenet.py; the other deviations in
# use, (0.2302, 0.2265, 0.2262), are the means of those of each image. A slice of the classes takes the same.
TINY_IMAGENET_STATS = (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)
UNIT_STATS = (0.0,), (1.0,)  # images stay in [0, 1], event counts as they are

MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

# In the published order, which is that of the alphabet.
CIFAR_CLASSES = {
    "CIFAR10": "airplane automobile bird cat deer dog frog horse ship truck",
    "CIFAR100": """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm""",
}

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

JPEG_SUFFIXES = {".jfif", ".jpe", ".jpeg", ".jpg"}
IMAGE_SUFFIXES = JPEG_SUFFIXES | {".avif", ".bmp", ".gif", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Folders that file servers, Macs and Windows leave, besides hidden ones; in lower case.
STRAY_FOLDERS = {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "__pycache__",
                 "$recycle.bin", "lost+found", "system volume information"}  # fmt: skip
# What a split's folder may be called; the first that is there is read.
SPLIT_FOLDERS = {"train": ["train"], "test": ["test", "val", "valid", "validation"]}
CHUNK = 1000  # images one decoding job returns
DIGITS = [str(k) for k in range(10)]

EPOCH, SUBSET, FIXED = range(3)  # one random stream per purpose: default_rng([seed, purpose, ...])


class Split(NamedTuple):
    """Images as stored, before augmentation and normalisation."""

    images: torch.Tensor  # uint8 [N, C, H, W]; event frames [N, T, C, H, W], events counted per pixel
    labels: torch.Tensor  # int64 [N]


class Raw(NamedTuple):
    """What the function of a data set returns.

    stats: (mean, std) where already at hand. note: a line on what was read, for the user. record: the same for
    environment.json, such as the layout that was found and a sha256 of the images.
    """

    train: Split | None
    test: Split
    classes: list[str]
    stats: tuple | None = None
    note: str = ""
    record: dict | None = None


def stratified_order(labels, seed):
    """All positions in random order, such that every prefix holds the classes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    progress = np.empty(len(labels))  # how far into its class each position comes
    for k in np.unique(labels):
        members = shuffled[labels[shuffled] == k]
        progress[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(progress[shuffled], kind="stable")]


# ---- Data sets: (args, train_too) -> Raw -------------------------------------------------------


def cifar(name, args, train_too):
    """CIFAR-10 or CIFAR-100 from data_dir: as published or as a tree of images, else downloaded there.

    name: of torchvision's class. Raises UserError if a file is damaged or cannot be downloaded.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, extract_archive

    root, dataset = Path(args.data_dir), getattr(datasets, name)
    folder, archive = root / dataset.base_folder, root / dataset.filename
    if not folder.exists() and not archive.exists() and (raw := cifar_tree(name, root, train_too)):
        return hashed(raw)
    if archive.exists() and not folder.exists() and not check_integrity(archive, dataset.tgz_md5):
        raise UserError(f"{archive} is incomplete or damaged: remove it and fetch {dataset.url} again")
    if not folder.exists():
        by_hand = f"fetch {dataset.url} on a machine with internet and put {dataset.filename} into {root}"
        with aside(folder, by_hand) as inside:
            if archive.exists():
                extract_archive(archive, inside)
            else:
                dataset(inside, download=True)
    meta = [dataset.meta["filename"], dataset.meta["md5"]]
    for file, md5 in [*dataset.train_list, *dataset.test_list, meta]:
        if not check_integrity(folder / file, md5):
            raise UserError(f"{folder / file} is missing or damaged: move {folder} away and fetch {dataset.url} again")

    def split(data):
        return Split(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))

    test = dataset(root, train=False)
    train = split(dataset(root, train=True)) if train_too else None
    return hashed(Raw(train, split(test), test.classes, record={"layout": "as published"}))


def hashed(raw):
    """`raw` with a sha256 of each split in its record: of the images with their labels, in whatever order they come."""
    sums = {}
    for name, split in {"train": raw.train, "test": raw.test}.items():
        if split:
            pairs = zip(split.images.numpy(), split.labels.tolist(), strict=True)
            each = sorted(hashlib.sha256(bytes([label]) + image.tobytes()).digest() for image, label in pairs)
            sums[name] = hashlib.sha256(b"".join(each)).hexdigest()
    return raw._replace(record=raw.record | {"sha256": sums})


def cifar_tree(name, root, train_too):
    """Raw of a tree train/<class>/*.png, test/<class>/*.png in `root` or in its cifar10/ or cifar100/; None if none.

    A folder is taken for such a tree if more than half of the classes are there. Raises UserError if it has
    other classes than the set, images of another size, or JPEG files, whose pixels are not those of the set.
    """
    classes, parts = CIFAR_CLASSES[name].split(), [part for names in SPLIT_FOLDERS.values() for part in names]
    for folder in (root, root / name.lower(), root / name):
        if any(2 * sum((folder / part / k).is_dir() for k in classes) > len(classes) for part in parts):
            break
    else:
        return None
    raw = image_tree(folder, train_too, None, classes, f"the classes of {name}", forbidden=JPEG_SUFFIXES)
    if any(split.images.shape[-1] != 32 for split in (raw.train, raw.test) if split):
        raise UserError(f"the images in {folder} are not 32x32 as those of {name}: read them by --dataset imagefolder")
    return raw


def digits(args, train_too):
    """The 1,797 handwritten digits of digits.npz (docs/data.md), 8x8, grey; a fixed stratified fifth is for testing."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:  # images: uint8 [N, 8, 8], 0 to 16
        images = torch.from_numpy(np.rint(file["images"] * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(file["labels"]).long()
    order = stratified_order(labels.numpy(), [0, FIXED])
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
    """Any tree data_dir/train/<class>/**, data_dir/test/<class>/** (or val/): decoded once, then read from a cache.

    Images become RGB and img_size x img_size (squeezed, not cropped). Raises UserError if the tree
    is not of that form, an image cannot be read, or sizes differ and there is no --img_size.
    """
    return image_tree(Path(args.data_dir), train_too, args.img_size)


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

    in_folders = any((root / "val" / wnid).is_dir() for wnid in wnids)
    files = {"val": (tiny_imagenet_sorted if in_folders else tiny_imagenet_val)(root / "val", wnids)}
    if train_too:
        files["train"] = [(path, wnid) for wnid in wnids for path in class_jpegs(root / "train" / wnid)]
    train = load("train", files["train"]) if train_too else None
    layout = "val/<wnid>/" if in_folders else "as published"
    counts = ", ".join(f"{part}/ {len(files[part]):,} images" for part in ("train", "val") if part in files)
    return Raw(train, load("val", files["val"]), names, note=f"{root}: {counts}", record={"layout": layout})


def tiny_imagenet_folder(root):
    """The folder of the published form in or at `root`; if there is none it is unpacked there, or downloaded first."""
    folder, archive = root / "tiny-imagenet-200", root / "tiny-imagenet-200.zip"
    if folder.is_dir():
        return folder
    if (root / "wnids.txt").exists() or (root / "val").is_dir():
        return root
    download(TINY_IMAGENET_URL, archive, TINY_IMAGENET_MD5)
    extract_zip(archive, folder, most_bytes=1 << 30)
    return folder


def tiny_imagenet_val(folder, wnids):
    """[(path, wnid)] of val/ as val_annotations.txt has them; UserError unless it names each image once, of a class."""
    notes, there = folder / "val_annotations.txt", {path.name for path in jpegs(folder / "images")}
    lines = [line.split() for line in read_lines(notes)]
    with reading(notes):
        found = dict(line[:2] for line in lines)
        if unknown := sorted(set(found.values()) - set(wnids)):
            raise ValueError(f"it names the class {unknown[0]!r}, and wnids.txt does not")
        if differ := sorted(found.keys() ^ there):
            raise ValueError(f"it and {folder / 'images'} do not agree on {', '.join(differ[:5])}")
        if len(found) < len(lines):
            raise ValueError("it names an image twice")
    return [(folder / "images" / name, wnid) for name, wnid in found.items()]


def tiny_imagenet_sorted(folder, wnids):
    """[(path, wnid)] of val/<wnid>/*.JPEG or val/<wnid>/images/*.JPEG, in the published order: by number.

    UserError if a class has no folder, or another folder has files in it: they were sorted by half.
    """
    others = (path for path in visible(folder) if path.is_dir() and path.name not in wnids)
    odd = [path.name for path in others if visible(path)]
    if odd:
        raise UserError(f"{folder} has files in {odd[0]}/, no class of wnids.txt: unpack the published archive again")
    found = [(path, wnid) for wnid in wnids for path in class_jpegs(folder / wnid)]
    return sorted(found, key=lambda pair: (int("0" + re.sub(r"\D", "", pair[0].stem)), pair[0].name))


def class_jpegs(folder):
    """Sorted paths of the JPEG files in images/ of a class folder, or in itself; UserError if there are none."""
    return jpegs(folder if not (folder / "images").is_dir() and folder.is_dir() else folder / "images")


def jpegs(folder):
    """Sorted paths of the JPEG files in `folder`; UserError if there are none."""
    found = [path for path in visible(folder) if path.suffix.lower() in (".jpeg", ".jpg")] if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder} is missing or has no .JPEG in it: unpack the published archive again")
    return found


def read_lines(path):
    """Lines of a text file, less empty ones; UserError if it is missing or is no text."""
    with reading(path):
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def mnist(args, train_too):
    """MNIST's idx files, grey, 28x28, from data_dir/MNIST/raw; what is missing is unpacked or downloaded there."""
    from torchvision import datasets

    root = Path(args.data_dir)
    if not all((root / "MNIST/raw" / name).exists() for name in MNIST_FILES):
        fetch_mnist(root)
    with reading(f"MNIST in {root}"):
        splits = [datasets.MNIST(root, train=train) for train in ([True, False] if train_too else [False])]
        if any(len(s.data) != len(s.targets) or s.targets.max() > 9 for s in splits):
            raise ValueError("images and labels do not go together")
    splits = [Split(split.data[:, None], split.targets) for split in splits]
    return Raw(splits[0] if train_too else None, splits[-1], DIGITS)


def fetch_mnist(root):
    """Put the files that are missing into root/MNIST/raw: from their .gz in root, root/MNIST or there, or downloaded.

    A .gz is used only if its md5 sum is the published one.
    """
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    raw = root / "MNIST/raw"
    for packed, md5 in MNIST.resources:
        path = raw / packed.removesuffix(".gz")
        if not path.exists():
            with aside(path, f"put the four files of MNIST ({MNIST_FILES[0]} ...) into {raw}") as folder:
                for place in (raw, raw.parent, root):
                    if check_integrity(place / packed, md5):
                        shutil.copy(place / packed, folder)  # then it is not downloaded
                download_and_extract_archive(MNIST.mirrors[0] + packed, folder, filename=packed, md5=md5)


# ---- Files of images ---------------------------------------------------------------------------


def image_tree(root, train_too, img_size, classes=None, whose=None, forbidden=()):
    """Raw of root/train/<class>/** and root/test/<class>/** (or val/), its statistics, a note and a record with it.

    classes: the names it must have, `whose` says of what; None: those of the test images, sorted. forbidden: suffixes.
    Raises UserError as `imagefolder` says.
    """
    left_out, files, splits = Counter(), {}, ["train", "test"] if train_too else ["test"]
    folders = {split: split_folder(root, split) for split in splits}
    for split in splits:
        files[split] = list_images(folders[split], left_out)
    wanted = classes or sorted(files["test"])
    for split in splits:
        if differ := sorted(set(wanted) ^ set(files[split])):
            whose = whose or f"the same classes as {folders['test']}"
            raise UserError(f"{folders[split]} must hold {whose}, one folder each: see {', '.join(differ[:5])}")

    def load(split):
        paths = [path for name in wanted for path in files[split][name]]
        if lossy := next((path for path in paths if Path(path).suffix.lower() in forbidden), None):
            raise UserError(f"{lossy} is a JPEG file, not with the published pixels: read it by --dataset imagefolder")
        labels = [k for k, name in enumerate(wanted) for _ in files[split][name]]
        images, stats = cached_images(root, split, paths, img_size)
        return Split(images, torch.tensor(labels)), stats

    train, stats = load("train") if train_too else (None, None)
    note = ", ".join(f"{folders[split].name}/ {sum(map(len, files[split].values())):,} images" for split in splits)
    if left_out:
        note += f"; left out: {', '.join(f'{count:,} {kind}' for kind, count in left_out.most_common())}"
    layout = ", ".join(f"{folder.name}/<class>/" for folder in folders.values())
    record = {"layout": layout, "left_out": dict(left_out)}
    return Raw(train, load("test")[0], list(wanted), stats, f"{root}: {note}", record)


def split_folder(root, split):
    """The folder of a split below root, by its usual names; UserError if there is none."""
    found = next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)
    if not found:
        names = "/ or ".join(SPLIT_FOLDERS[split][:2])
        raise UserError(f"data folder {root} has no {names}/: it must hold train/<class>/ and test/<class>/")
    return found


def is_stray(name):
    """Whether a file or folder of this name is none of the user's: hidden, or left by a Mac or a file server."""
    return name.startswith(".") or name.lower() in STRAY_FOLDERS


def visible(folder):
    """Sorted paths in a folder, less what `is_stray`."""
    return sorted(path for path in folder.iterdir() if not is_stray(path.name))


def list_images(folder, left_out):
    """{class name: sorted paths} of folder/<class>/**; UserError if a class has no image, or there is no class.

    Linked folders count, each real folder once in a class. left_out: Counter, to which the files that are no
    samples are added, by kind.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if is_stray(path.name) or not path.is_dir():
            left_out[kind_of(path.name, " beside the class folders")] += 1
        else:
            found[path.name] = walk_images(path, left_out)
            if not found[path.name]:
                raise UserError(f"class folder {path} has no image in it: add some or remove the folder")
    if not found:
        raise UserError(f"{folder} is empty: it must hold one folder of images per class")
    return found


def walk_images(top, left_out):
    """Sorted paths of the images in a folder and those below; the other files are counted in `left_out`, by kind."""

    def fail(error):
        raise error

    found, seen = [], set(map(str, top.resolve().parents))
    for where, folders, names in os.walk(top, followlinks=True, onerror=fail):
        here = os.path.realpath(where)
        if here in seen:  # a link that leads round in a circle, or a second one to the same folder
            folders.clear()
            continue
        seen.add(here)
        left_out.update(kind_of(name) for name in folders if is_stray(name))
        folders[:] = [name for name in folders if not is_stray(name)]
        for name in names:
            if is_stray(name) or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                left_out[kind_of(name)] += 1
            else:
                found.append(os.path.join(where, name))
    return sorted(found)


def kind_of(name, where=""):
    """What a file or folder that is left out is called in the count: `hidden`, its suffix, or the folder's name."""
    if is_stray(name):
        return "hidden" if name.startswith(".") else f"{name}/"
    suffix = Path(name).suffix.lower()
    if not suffix.isprintable() or len(suffix) > 10:
        return "of other kinds"
    return (suffix or "without a suffix") + (where if suffix in IMAGE_SUFFIXES else "")


def read_image(path, in_channels=3):
    """uint8 [C, H, W] of one file, converted to RGB (in_channels 3) or grey (1); UserError if it cannot be.

    It is turned as its EXIF orientation says, what is transparent shows white, and grey of more than 8 bits
    is scaled: see `to_8_bits`.
    """
    with reading(f"image {path}"), warnings.catch_warnings(record=True), Image.open(path) as image:
        image.filename = ""  # else Pillow maps a raw TIFF into memory, and then turns it wrongly
        image.load()
        with suppress(Exception):  # EXIF that cannot be read turns nothing
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            image = to_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("RGB" if in_channels == 3 else "L"))
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def to_8_bits(image):
    """A picture of mode I;16*, I or F as grey of 8 bits: its whole range becomes 0 to 255, whatever is in it.

    16 bits (or as many as a TIFF says): 0 to 65535. 32-bit integers have no usual range: they are taken for
    16 bits, and refused where they are negative, larger, or so small that they may be of 8 bits. Floats are
    0 to 1, or refused. Raises ValueError.
    """
    values = np.asarray(image)
    low, high, most = values.min(), values.max(), 65535
    if image.mode == "F":
        most = 1
        if not (low >= 0 and high <= 1):
            raise ValueError(f"its values go from {low:g} to {high:g}, and floats must lie in 0 to 1: scale it")
    elif image.mode == "I":
        if not (low >= 0 and high <= most):
            raise ValueError(f"its 32-bit integers go from {low} to {high}: save it with 8 or 16 bits")
        if image.format == "TIFF" and 0 < high < 256:
            raise ValueError(f"its 32-bit integers end at {high}, of 8 bits or of 16: save it with 8 or 16 bits")
    elif image.format == "TIFF":
        most = 2 ** image.tag_v2.get(258, (16,))[0] - 1  # BitsPerSample: 12 in some
    grey = np.rint(values.astype(np.float64) * (255 / most)).clip(0, 255).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):  # a grey value of a PNG that stands for nothing
        grey[values == clear] = 255
    return Image.fromarray(grey)


def resize(images, size):
    """uint8 [..., H, W] -> [..., size, size]: bilinear with antialias, unchanged if already so."""
    if images.shape[-2:] == (size, size):
        return images
    from torchvision.transforms import functional as transforms

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
