"""The event-camera data sets: readers of published recordings, frames of event counts, one function per data set.

    recording = read_nmnist("Train/5/00001.bin")
    counts = frames(recording, num_steps=25, sensor=34, size=34)      # uint8 [25, 2, 34, 34]

Shapes: E events, T time-steps, S x S pixels of a frame. Channel 0 counts the events of polarity 0,
channel 1 those of polarity 1. Coordinates and polarity are those of SpikingJelly's readers, and so
are the edges of its two ways to split, so that frames can be compared.
"""

import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cache import cached_array, extract_zip, file_facts
from image_data import CIFAR_CLASSES, DIGITS, SUBSET, Raw, Split
from utill import UserError, reading

VERSION = 2  # raise it whenever reading or binning changes: older caches are then made anew
CHUNK = 100  # recordings that one job bins
MOST_UNPACKED = 16 << 30  # bytes of one zip: far more than those of CIFAR10-DVS and N-MNIST have
MOST_LATE = 10_000  # microseconds by which an event may come too late in a file; more is damage
CLOCK = 1 << 32  # microseconds after which the clock of an AEDAT file starts at 0 again
# Folders below data_dir, in the order they are looked into: SpikingJelly's, tonic's
NMNIST_FOLDERS = ["", "NMNIST", "extract", "download"]
CIFAR10_DVS_FOLDERS = ["", "CIFAR10DVS", "extract", "download"]
NOT_READ = {".npz": "NumPy archives, as SpikingJelly makes", ".npy": "NumPy arrays", ".aedat4": "AEDAT 4, as tonic has",
            ".mat": "Matlab", ".h5": "HDF5", ".hdf5": "HDF5", ".raw": "Prophesee", ".dat": "Prophesee"}  # fmt: skip
CIFAR10 = CIFAR_CLASSES["CIFAR10"].split()
CIFAR10_DVS_URL = "https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671"
NMNIST_URL = "https://www.garrickorchard.com/datasets/n-mnist"


class Events(NamedTuple):
    """A recording, int64 [E] each: time in microseconds, never falling; column, row; polarity 0 or 1."""

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


class Mended(UserWarning):
    """What was mended in a recording: how many events were out of order, and whether its clock wrapped round."""

    def __init__(self, path, late, wrapped):
        super().__init__(f"{path}: mended, with {in_words(1, late, int(wrapped))}")
        self.late, self.wrapped = late, wrapped


def in_words(unsorted, late, wrapped):
    """What was mended, in words: events out of order, and recordings with them or a wrapped clock."""
    clock = f"a clock that wrapped round in {wrapped}"
    return ", ".join([f"{late} events out of order in {unsorted}"] * bool(late) + [clock] * bool(wrapped))


# ---- Readers -----------------------------------------------------------------------------------


def checked(path, events, sensor):
    """`events` in the order of time; ValueError if no camera of sensor x sensor pixels can have recorded them.

    Events that come up to MOST_LATE too late are sorted in and a clock that wrapped at CLOCK goes on: then it warns
    with `Mended`.
    """
    t = events.t
    if not len(t):
        raise ValueError("it holds no events")
    if max(events.x.max(), events.y.max()) >= sensor:
        raise ValueError(f"an event lies outside the {sensor}x{sensor} sensor")
    wrapped = bool((np.diff(t) < -CLOCK // 2).any())
    if wrapped:
        t = np.unwrap(t, period=CLOCK)
    late = np.maximum.accumulate(t) - t
    if late.max() > MOST_LATE:
        raise ValueError(f"time runs backwards after event {np.argmax(late > MOST_LATE)}, by {late.max()} microseconds")
    if late.any() or wrapped:
        warnings.warn(Mended(path, int((late > 0).sum()), wrapped), stacklevel=3)
        order = np.argsort(t, kind="stable")
        events = Events(*(column[order] for column in events._replace(t=t)))
    return events


def read_nmnist(path):
    """Events of an N-MNIST file (Orchard et al. 2015), published as .bin, in a small copy as .bs2.

    An event is x, y, then one bit of polarity and 23 bits of time, big-endian. UserError if the file
    is damaged.
    """
    with reading(path):
        x, y, high, middle, low = np.fromfile(path, np.uint8).reshape(-1, 5).T.astype(np.int64)
        t = (high & 127) << 16 | middle << 8 | low
        # Row 240 is no event: it moves time on by 2**13 us (Orchard's eventvision.py; his Matlab reader and
        # SpikingJelly's do not know it). N-MNIST lasts 0.3 s and has none in the 1,100 files looked at.
        late = y == 240
        columns = t + (np.cumsum(late) << 13), x, y, high >> 7
        return checked(path, Events(*(column[~late] for column in columns)), sensor=34)


def read_aedat(path):
    """Events of an AEDAT 2.0 file of a DVS128 camera, as CIFAR10-DVS is published (Li et al. 2017).

    Header lines that begin with #, then address and time as big-endian uint32. Bits 14-8 of the
    address are the row, 7-1 the column, 0 the polarity; turned as SpikingJelly turns them. UserError
    if the file is damaged or of another format.
    """
    with reading(path):
        data, start = Path(path).read_bytes(), 0
        if not data.startswith(b"#!AER-DAT2.0"):
            raise ValueError("its first line must be #!AER-DAT2.0")
        while data.startswith(b"#", start):  # an address cannot: its first two bytes are 0
            start = data.find(b"\n", start) + 1 or len(data)
        address, t = np.frombuffer(data[start:], ">u4").reshape(-1, 2).T.astype(np.int64)
        if (address >> 16).any():
            raise ValueError("an event lies outside the 128x128 sensor")
        pixel = address >> 15 == 0  # bit 15 marks a signal from outside: SpikingJelly counts it as an event, we do not
        columns = t, 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1)
        return checked(path, Events(*(column[pixel] for column in columns)), sensor=128)


# ---- Frames ------------------------------------------------------------------------------------


def frames(events, num_steps, sensor, size, split_by="time", bin_ms=5.0):
    """Event counts, uint8 [T, 2, size, size]; more than 255 events in one cell count as 255.

    split_by: `time`, T bins of equal time, or `number`, T bins of equally many events; the last bin
    takes what the division leaves over, as SpikingJelly's does. (Where it fails, on an empty bin of
    time, or crowds fewer than T events into the last bin, ours are empty or have one event each.)
    `duration`: bins of bin_ms milliseconds from the first event on; what comes after T of them is
    dropped. Pixel x goes to the cell x * size // sensor: a cell adds up its pixels. UserError if the
    frame is larger than the sensor.
    """
    if size > sensor:
        raise UserError(f"--img_size {size} is more than the {sensor}x{sensor} pixels of the sensor: ask for less")
    t, x, y, p = events
    since = t - t[0]
    if split_by == "time":
        step = np.minimum(since // max(1, since[-1] // num_steps), num_steps - 1)
    elif split_by == "number":
        step = np.minimum(np.arange(len(t)) // max(1, len(t) // num_steps), num_steps - 1)
    elif split_by == "duration":
        step = since // max(1, round(min(1000 * bin_ms, 2**40)))
        x, y, p, step = (column[step < num_steps] for column in (x, y, p, step))
    else:
        raise ValueError(f"split_by must be time, number or duration, got {split_by!r}")
    cell = ((2 * step + p) * size + y * size // sensor) * size + x * size // sensor
    counts = np.bincount(cell, minlength=num_steps * 2 * size * size)
    return np.minimum(counts, 255).astype(np.uint8).reshape(num_steps, 2, size, size)


class Source(NamedTuple):
    """A data set of recordings: its name, reader, width of the sensor, and size of a frame without --img_size."""

    name: str
    read: Callable
    sensor: int
    size: int


NMNIST = Source("nmnist", read_nmnist, 34, 34)
DVS_CIFAR10 = Source("dvs_cifar10", read_aedat, 128, 42)  # 42x42: Wu et al. 2019


def decode(paths, read, **how):
    """Frames of the files, uint8 [N, T, 2, S, S], and what `MendedCounts` adds up: what a worker process does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Mended)
        array = np.stack([frames(read(path), **how) for path in paths])
    found = [w.message for w in caught if isinstance(w.message, Mended)]
    return array, np.array([sum(m.late > 0 for m in found), sum(m.late for m in found), sum(m.wrapped for m in found)])


class MendedCounts:
    """Recordings with events out of order, these events, and recordings whose clock wrapped round, over all files."""

    counts = np.zeros(3)

    def update(self, images, counts):
        """counts: int [3], of the recordings that became `images`."""
        self.counts = self.counts + counts

    def values(self):
        return self.counts.tolist()


# ---- Which recordings --------------------------------------------------------------------------


def list_nmnist(root, split):
    """[(path, digit)] of one split, train or test; UserError if the files are not there.

    Either the published tree Train/<digit>/*.bin, Test/<digit>/*.bin, or Train.zip and Test.zip, which are unpacked,
    in root or one of NMNIST_FOLDERS; or <number>.bs2 files with the lists train1K.txt and test100.txt, whose lines
    are a number and a digit.
    """
    listing, name = root / {"train": "train1K.txt", "test": "test100.txt"}[split], split.capitalize()
    tree = unpacked([root / folder for folder in NMNIST_FOLDERS], name)
    if tree:
        found = [(path, k) for k, digit in enumerate(DIGITS) for path in sorted((tree / digit).glob("[!.]*.bin"))]
        absent = sorted(set(range(10)) - {k for _, k in found})
        if absent:
            raise UserError(
                f"{tree / str(absent[0])} holds no .bin file{not_read(tree)}: get {name}.zip of {NMNIST_URL}"
            )
        return found
    if not listing.is_file():
        raise UserError(f"{root} has no {name}/ and no {name}.zip of N-MNIST{not_read(root)}: get Train.zip and "
                        f"Test.zip of {NMNIST_URL}, and put them there")  # fmt: skip
    with reading(listing):
        lines = listing.read_text(encoding="utf-8").splitlines()
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#")]
        found = [(root / f"{int(number)}.bs2", DIGITS.index(digit)) for number, digit in pairs]
        if not found:
            raise ValueError("it names no recording")
    return found


def unpacked(folders, name):
    """The first of `folders` / `name` that is there; if none is, what the first of their name.zip holds; else None.

    Raises UserError if the zip is damaged; then nothing is unpacked.
    """
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    for folder in folders:
        if (folder / f"{name}.zip").is_file():
            extract_zip(folder / f"{name}.zip", folder / name, MOST_UNPACKED)
            return folder / name
    return None


def not_read(root):
    """Words on recordings in a folder that are of a format which is not read; "" if there are none."""
    names = (path.suffix.lower() for path in islice(root.rglob("[!.]*"), 100_000) if ".bntt_cache" not in path.parts)
    suffix = next((suffix for suffix in names if suffix in NOT_READ), None)
    return f", only {suffix} files ({NOT_READ[suffix]}), which are not read" if suffix else ""


def list_class(root, name):
    """Paths of one class of CIFAR10-DVS in the order of their numbers; its zip is unpacked. Raises UserError."""
    folder = unpacked([root / folder for folder in CIFAR10_DVS_FOLDERS], name)
    if not folder:
        raise UserError(f"{root} has no {name}/ and no {name}.zip{not_read(root)}: put the ten zips of CIFAR10-DVS "
                        f"there, airplane.zip to truck.zip, from {CIFAR10_DVS_URL}")  # fmt: skip
    found = {path: re.search(r"(\d+)\.aedat$", path.name) for path in folder.glob("[!.]*.aedat")}
    if len(found) < 2:
        raise UserError(f"{folder} holds {len(found)} .aedat files, too few to train and test on{not_read(folder)}: "
                        f"remove it, and get {name}.zip again from {CIFAR10_DVS_URL}")  # fmt: skip
    for path, number in found.items():
        if not number:
            raise UserError(f"{path} has no number before .aedat, as cifar10_bird_0.aedat has: rename or remove it")
    return sorted(found, key=lambda path: (int(found[path][1]), path.name))


def list_cifar10_dvs(root, how, seed):
    """{"train", "test": [(path, label)]}: the test set is a tenth of every class; zips are unpacked first.

    how: `random`, drawn from `seed`, or `first100`, the lowest numbers: 0 to 99 of the published 1,000.
    Raises UserError.
    """
    parts = {"train": [], "test": []}
    for k, name in enumerate(CIFAR10):
        paths = list_class(root, name)
        order, count = np.arange(len(paths)), max(1, len(paths) // 10)
        if how == "random":  # [seed, SUBSET] orders subsets, and a 0 behind it would be the same stream
            order = np.random.default_rng([seed, SUBSET, 1 + k]).permutation(len(paths))
        for split, chosen in (("test", order[:count]), ("train", order[count:])):
            parts[split] += [(paths[i], k) for i in np.sort(chosen)]
    return parts


# ---- Data sets: (args, train_too) -> Raw -------------------------------------------------------


def nmnist(args, train_too):
    """N-MNIST (Orchard et al. 2015): recordings of an event camera, from data_dir, as frames of event counts.

    Raises UserError if the files are not there or damaged.
    """
    splits = ["train", "test"] if train_too else ["test"]
    parts = {split: list_nmnist(Path(args.data_dir), split) for split in splits}
    return event_frames(args, NMNIST, parts, DIGITS)


def dvs_cifar10(args, train_too):
    """CIFAR10-DVS (Li et al. 2017) from data_dir, as frames of event counts; it has no split of its own.

    args.dvs_split: `random`, for testing a tenth of each class drawn from args.seed, or `first100`, its first
    100 recordings. Raises UserError if the files are not there or damaged.
    """
    parts = list_cifar10_dvs(Path(args.data_dir), args.dvs_split, args.seed)
    if not train_too:
        del parts["train"]
    return event_frames(args, DVS_CIFAR10, parts, CIFAR10, f"-{args.dvs_split}-seed{args.seed}")


def event_frames(args, source, parts, classes, drawn=""):
    """Raw of the recordings `parts`, {split: [(path, label)]}: frames uint8 [N, T, 2, S, S] mapped from a cache file.

    args: data_dir, num_steps, img_size (None: the size of `source`), split_by, bin_ms. drawn: how the recordings were
    chosen, for the name of the cache file.
    """
    how = dict(num_steps=args.num_steps, sensor=source.sensor, size=args.img_size or source.size)
    how |= dict(split_by=args.split_by, bin_ms=args.bin_ms if args.split_by == "duration" else None)
    splits, record = {}, {"recordings": {split: len(recordings) for split, recordings in parts.items()}}
    for split, recordings in parts.items():
        paths, labels = [path for path, _ in recordings], torch.tensor([label for _, label in recordings])
        name = f"{source.name}-{split}{drawn}-T{args.num_steps}-{how['size']}-{args.split_by}{how['bin_ms'] or ''}"
        images, mended = cached_array(
            Path(args.data_dir), name, f"{VERSION} {how}\n{file_facts(Path(args.data_dir), paths)}",
            (len(paths), args.num_steps, 2, how["size"], how["size"]), partial(decode, read=source.read, **how),
            [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)],
            f"binning the {split}{drawn} recordings of {source.name} once", MendedCounts(),
        )  # fmt: skip
        splits[split] = Split(images, labels)
        if any(mended):
            words = in_words(*map(int, mended))
            print(f"warning: {split} recordings of {source.name} mended: {words} of {len(paths)}", file=sys.stderr)
            record.setdefault("mended", {})[split] = words
    return Raw(splits.get("train"), splits["test"], classes, record=record)
