"""Throw wild and damaged input at every script: each must end in a result or in one sentence.

    python tests/stress/fuzz.py --count 2000
    python tests/stress/fuzz.py --count 2000 --kinds checkpoint --only 17 --keep kept     # repeat one input

In this process, through the `main(argv)` of each entry point. An input fails if an exception escapes, the exit code is
neither 0 nor 2, a refusal is not one line on stderr, it takes more than LIMIT seconds, a file is left half-written or
outside its folder, or a refused run leaves a run folder.

What would be right but take for ever is bounded: flags that set how much is computed are drawn wildly and then
given again with small values (argparse checks both, the last one counts). Paths stay inside the input's folder.
Prints a table of counts by kind, and exits with 1 if any input failed. Linux only.
"""

import argparse
import contextlib
import faulthandler
import io
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
import urllib.error
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import hypothesis
import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repo root
import analysis
import early_exit
import event_data
import runs
import test as test_script
import train

SCRIPTS = {"train": train, "test": test_script, "early_exit": early_exit, "analysis": analysis}
LIMIT = 20  # seconds an input may take
MEMORY = 4 << 30  # bytes it may add
NET = "--arch fc3 --num_steps 2 --img_size 8 --batch_size 4 --limit_test 8 --num_workers 0 --engine plain --device cpu"
TRAIN = f"{NET} --limit_train 8 --num_epochs 1"
TEST = "--limit_test 8 --num_workers 0 --engine plain --batch_size 4 --device cpu"
AUTHORS = "--arch fc3 --dataset digits --leak_mem 0.9 --norm_stats own"


class Case(NamedTuple):
    """An input: what to run, in a folder with these files."""

    script: str
    argv: list
    files: dict = {}  # {path: bytes}


class Assets(dict):
    """{kind of file: whole ones}; hypothesis asks for its name, now and then."""

    def __repr__(self):
        return "assets"


class Hang(BaseException):
    """Nothing in the scripts catches this."""


# ---- Values and bytes ----------------------------------------------------------------------------

NUMBERS = ["0", "-1", "2", "3", "1e-3", "0.5", "1e309", "-1e9", "nan", "-inf", "1_0", "٣", "0x10", "1e", "2.0"]
NUMBERS += ["9" * 20]
WORDS = ["", " ", "--", "-", "-x", "@file", "x" * 300, "9" * 5000, "\x1b[2J", "\udcff"]
NAMES = ["run", "missing", "missing/deeper", "file/under", "-", "x" * 300, "\x1b[2J", "\udcff"]
texts = st.text(max_size=20)  # any character but half a pair
numbers = st.sampled_from(NUMBERS)
words = numbers | texts | st.sampled_from(WORDS)
inside = st.characters(codec="utf-8", exclude_characters="/\0")
names = st.sampled_from(NAMES) | st.text(inside, min_size=1, max_size=12).filter(lambda x: x not in (".", ".."))
odd = st.sampled_from([10**9, 10**30, -1, 0, 1, 2, 1e300, "x" * 10**5, "\x1b[2J", b"bytes"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damage(draw, content, most=4):
    """`content` with a few bytes changed, put in, or cut out; half of the time near its beginning."""
    content, kinds = bytearray(content), ["flip", "write"]
    if draw(st.booleans()):  # and of another length
        kinds += ["insert", "delete", "cut"]
    for _ in range(draw(st.integers(1, most))):
        # no draw may depend on the length: pickle's depends on which equal strings are one object
        end = min(64, len(content)) if draw(st.booleans()) else len(content)
        at = int(draw(st.floats(0, 1, exclude_max=True)) * end)
        few = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
        match draw(st.sampled_from(kinds)):
            case "flip":
                content[at : at + 1] = bytes(x ^ 1 << few[0] % 8 for x in content[at : at + 1])
            case "write":
                content[at : at + len(few)] = few
            case "insert":
                content[at:at] = few
            case "delete":
                del content[at : at + 1 + few[0] % 64]
            case "cut":
                del content[at:]
    return bytes(content)


def put(files, folder):
    """Write the files {path: bytes} below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


# ---- Kinds of input: assets -> strategy of `Case` ---------------------------------------------------


def actions(script):
    """The flags of a script: argparse's actions."""
    found = []

    def look(parser, *_):
        found.extend(action for action in parser._actions if action.option_strings)
        raise SystemExit

    with (
        mock.patch("arguments.parse_with_config", look),
        mock.patch("nets.parse_with_checkpoint", look),
        contextlib.suppress(SystemExit),
    ):
        SCRIPTS[script].parse_args([], *(["any"] if script == "analysis" else []))  # analysis.py takes several
    return found


PATHS = {
    "--run_dir",
    "--data_dir",
    "--figure",
    "--image",
    "--config",
    "--init_from",
    "--out",
    "--from",
    "--corruptions",
}
GOOD = ["0.1", "0.5", "1", "1e-30"]


def good(action):
    """Strategy of values that a flag takes."""
    if action.choices:
        return st.sampled_from([str(x) for x in action.choices])
    return st.sampled_from(["1", "2", "3", "100000"] if getattr(action.type, "kind", None) is int else GOOD)


@st.composite
def flag(draw, action):
    """The words of one flag, mostly with a value that is right."""
    name = draw(st.sampled_from(action.option_strings))
    if action.nargs == 0:
        return [name, *draw(st.sampled_from([[]] * 9 + [["1"]]))]
    if name in PATHS:
        return [name, draw(names)]
    value = draw(st.one_of(good(action), good(action), good(action), numbers, words))
    return draw(st.sampled_from([[name, value]] * 7 + [[f"{name}={value}"]] * 2 + [[name]]))


@st.composite
def flags(draw, assets):
    script = draw(st.sampled_from(list(SCRIPTS)))
    known = [action for action in actions(script) if "--help" not in action.option_strings]
    wild = [word for action in draw(st.lists(st.sampled_from(known), max_size=3)) for word in draw(flag(action))]
    wild += draw(st.sampled_from([[]] * 9 + [["--help"], ["--no-such-flag"], ["--num", "3"], ["\udcff"]]))
    if script == "train":
        return Case(script, ["--dataset", "digits", "--run_dir", "run", *wild, *TRAIN.split()])
    checkpoint = draw(st.sampled_from(["good.tar"] * 4 + ["authors.tar", "missing.tar"]))
    given = AUTHORS.split() if checkpoint == "authors.tar" or not draw(st.integers(0, 5)) else []
    bounds = NET.split()[2:] + {"test": ["--repeats", "2"], "analysis": ["--figures", "5"]}.get(script, [])
    return Case(script, [checkpoint, *given, *wild, *bounds], assets["checkpoints"])


LAUGHS = b"a: &a [x,x,x,x,x,x,x,x,x]\n"
for c in b"abcdefgh":  # a billion of them
    LAUGHS += b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9))
YAML = [
    LAUGHS,
    b"a: &a [*a, *a]",
    b"num_steps: &a [1]\nlr: *a",
    b"<<: {lr: 1}",
    b"lr: !!python/object:os.system x",
    b"\tlr: 1",
    b"\xff\xfe",
    b"lr: !!int ''",
    b"lr: !!bool x",
    b"lr: !!timestamp x",
    b"? [a]\n: b",
    b"a: 1\n---\na: 2",
    b"",
    b"[]",
    b"lr",
    b"{" * 3000,
    b"lr: " + b"9" * 5000,
    b"lr: 1:2:3",
    b"seed: 0o17",
    b"lr: 2001-01-01",
    b"lr: .nan",
    b"norm: no",
    b"amp: off",
    b"lr: 5e-4",
]


@st.composite
def config(draw, assets):
    chosen = draw(st.lists(st.sampled_from(actions("train")), max_size=4, unique=True))
    lines = {action.dest: draw(st.one_of(good(action), good(action), values)) for action in chosen if action.nargs != 0}
    lines |= {action.dest: draw(st.booleans() | values) for action in chosen if action.nargs == 0}
    kinds = {action.dest: getattr(action.type, "kind", str) for action in chosen}
    with contextlib.suppress(ValueError):
        lines |= {key: kinds[key](x) for key, x in lines.items() if isinstance(x, str)}
    right, odd = yaml.safe_dump({"dataset": "digits", **lines}).encode("utf-8", "replace"), st.sampled_from(YAML)
    text = draw(st.one_of(st.just(right), st.just(right), damage(right), odd, odd.flatmap(damage)))
    return Case("train", ["--config", "my.yaml", *TRAIN.split(), "--run_dir", "run"], {"my.yaml": text})


# What may stand in a state dict in place of a tensor.
ODD = [
    lambda x: x * float("nan"),
    lambda x: x - float("inf"),
    lambda x: x * 1e30,
    lambda x: x * 0,
    lambda x: -x.abs() - 1,
    lambda x: x.half(),
    lambda x: x.double(),
    lambda x: x.double() + 1e300,
    lambda x: x.long(),
    lambda x: x.bool(),
    lambda x: x.cfloat(),
    lambda x: x.to(torch.float8_e5m2),
    lambda x: x.to_sparse(),
    lambda x: x.to("meta"),
    lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x: torch.nn.Parameter(x.float()),
    lambda x: x.flatten()[:1].expand(10**12),
    lambda x: x.flatten()[:1].expand(4),
    lambda x: x.flatten()[:0],
    lambda x: x[None],
    lambda x: x[:1],
    lambda x: x.transpose(0, -1),
    lambda x: torch.tensor(1.0),
    lambda x: x.tolist(),
]


@st.composite
def odd_checkpoint(draw, content):
    """Bytes of a checkpoint of which a few entries were changed, and perhaps a few bytes."""
    checkpoint = torch.load(io.BytesIO(content), weights_only=False)
    for _ in range(draw(st.integers(0, 2))):
        where = checkpoint
        while inner := [x for x in where.values() if type(x) in (dict, OrderedDict, list) and x]:
            if not draw(st.integers(0, 3)):
                break
            where = draw(st.sampled_from(inner))
            where = where[0] if type(where) is list and type(where[0]) is dict else where
            if type(where) is list:
                where[:] = draw(st.lists(values, max_size=3))
                break
        if type(where) is list:
            continue
        key = draw(st.sampled_from(sorted(where, key=str) or ["x"]))
        match draw(st.sampled_from(["value", "value", "tensor", "delete", "rename", "swap", "add"])):
            case "tensor" if isinstance(where.get(key), torch.Tensor):
                with contextlib.suppress(Exception), warnings.catch_warnings(record=True):  # not all can be made
                    where[key] = draw(st.sampled_from(ODD))(where[key])
            case "value" | "tensor":
                where[key] = draw(values)
            case "delete":
                where.pop(key, None)
            case "rename":
                where[draw(texts)] = where.pop(key, None)
            case "swap":
                other = draw(st.sampled_from(sorted(where, key=str) or ["x"]))
                where[key], where[other] = where.get(other), where.get(key)
            case "add":
                where[draw(texts | st.sampled_from(["encoder.order", "bntt_fc1.9.weight"]))] = draw(values)
    content = saved(checkpoint, _use_new_zipfile_serialization=draw(st.sampled_from([True, True, False])))
    match draw(st.sampled_from(["as it is", "as it is", "bytes", "pickle", "deflate"])):
        case "bytes":
            content = draw(damage(content))
        case "pickle" if content.startswith(b"PK"):
            content = zipped_again(content, zipfile.ZIP_STORED, lambda x: draw(damage(x)))
        case "deflate" if content.startswith(b"PK"):
            content = zipped_again(content, zipfile.ZIP_DEFLATED, lambda x: x)
    return content


def zipped_again(content, how, change):
    """The same zip, compressed or not, its pickle changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", how) as new:
        for member in old.infolist():
            inside = old.read(member)
            new.writestr(member.filename, change(inside) if member.filename.endswith("data.pkl") else inside)
    return file.getvalue()


@st.composite
def checkpoint(draw, assets):
    name = draw(st.sampled_from(sorted(assets["checkpoints"])))
    files = {"x.tar": draw(odd_checkpoint(assets["checkpoints"][name]))}
    argv = ["x.tar", *TEST.split()]
    more = {"authors.tar": AUTHORS, "events.tar": "--data_dir data"}.get(name, "--dataset digits")
    argv += more.split() if draw(st.integers(0, 5)) else []
    files |= assets["nmnist"] if name == "events.tar" else {}
    script = draw(st.sampled_from(["test", "early_exit", "analysis"]))
    argv += ["--figures", "5"] if script == "analysis" else []  # one, for time
    if script == "test" and draw(st.booleans()):
        files |= {"image.png": assets["images"][0]}
        argv += ["--image", "image.png"]
    return Case(script, argv, files)


@st.composite
def resume(draw, assets):
    files = dict(assets["run"])
    others = ["best.pth.tar", "config.yaml", "log.jsonl", "environment.json"]
    name = draw(st.sampled_from(["last.pth.tar"] * 6 + others))
    change = odd_checkpoint if name == "last.pth.tar" else damage
    files[f"run/{name}"] = draw(change(files[f"run/{name}"]))
    more = draw(st.sampled_from([[]] * 4 + [["--lr=0.2"], ["--num_epochs=2"], ["--overwrite"], ["--save_every=1"]]))
    return Case("train", [*TRAIN.split(), "--run_dir", "run", "--dataset", "digits", "--resume", *more], files)


@st.composite
def image(draw, assets):
    picture = st.sampled_from(assets["images"])
    content = draw(st.one_of(picture, picture.flatmap(damage), picture.flatmap(damage), st.binary(max_size=50)))
    name = "x" + draw(st.sampled_from([".png", ".jpg", ".tif", "", ".webp"]))
    more = draw(st.sampled_from([[], ["good.tar"], ["missing"], ["--steps", "1"]]))
    net = draw(st.sampled_from(["good.tar"] * 3 + ["bn.tar", "pixels.tar", "events.tar"]))
    files = {name: content, net: assets["checkpoints"][net]}
    return Case("test", [net, *TEST.split(), "--image", name, *more], files)


@st.composite
def imagefolder(draw, assets):
    folders = st.sampled_from(["cat", "dog"]) | names.filter(lambda x: "/" not in x and len(x) < 40)
    files = {}
    for k in range(draw(st.integers(0, 10))):
        picture = draw(st.sampled_from(assets["images"]))
        picture = picture if draw(st.integers(0, 5)) else draw(damage(picture))
        split, folder = ("train", "test")[k % 3 == 0], draw(folders)
        files[f"data/{split}/{folder}/{k}{draw(st.sampled_from(['.png', '.png', '.PNG', '.jpeg', '.txt']))}"] = picture
    if draw(st.booleans()):
        files |= {f"data/{s}/{c}/a.png": assets["images"][0] for s in ("train", "test") for c in ("cat", "dog")}
    argv = f"{TRAIN} --run_dir run --dataset imagefolder --data_dir data --batch_size 2".split()
    return Case("train", argv, files)


def of_files(dataset, options, whole):
    """Strategy: a data set of which one file is damaged, missing or another."""

    @st.composite
    def strategy(draw, assets):
        files = dict(assets[whole])
        for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3, unique=True)):
            others = st.sampled_from([None, b"", *files.values()])
            new = draw(st.one_of(damage(files[name]), damage(files[name]), others))
            files = {k: v for k, v in files.items() if k != name} | ({} if new is None else {name: new})
        more = draw(st.sampled_from([[], *options]))
        argv = f"{TRAIN} --run_dir run --dataset {dataset} --data_dir data".split()
        return Case("train", [*argv, *more], files)

    return strategy


SPLITS = [["--split_by", "number"], *(f"--split_by duration --bin_ms {ms}".split() for ms in ("1e-300", "1e300"))]
KINDS = {
    "flags": flags,
    "config": config,
    "checkpoint": checkpoint,
    "resume": resume,
    "image": image,
    "imagefolder": imagefolder,
    "aedat": of_files("dvs_cifar10", [*SPLITS, ["--dvs_split", "first100"], ["--img_size", "200"]], "aedat"),
    "nmnist": of_files("nmnist", [*SPLITS, ["--img_size", "40"]], "nmnist"),
    "nmnist_lists": of_files("nmnist", [], "nmnist lists"),
    "tiny_imagenet": of_files("tiny_imagenet", [["--img_size=9"]], "tiny_imagenet"),
    "idx": of_files("smnist", [["--img_size=4", "--num_steps=16"], ["--encoding=direct"]], "idx"),
}
SHARE = {"flags": 6, "config": 4, "checkpoint": 6, "resume": 2, "image": 3}  # of the inputs; of the others 1


# ---- Whole files, to be damaged ----------------------------------------------------------------------


def make_assets():
    """`Assets` as the scripts and the data sets' makers write them."""
    rng = np.random.default_rng(0)
    assets, pixels = Assets(checkpoints={}, images=[]), rng.integers(0, 256, (8, 8, 3), np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        assets["images"].append(file.getvalue())

    aedat = np.stack([rng.integers(0, 2**15, 60), np.arange(60) * 100], 1).astype(">u4").tobytes()
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n"
    assets["aedat"] = {f"data/{c}/cifar10_{c}_{k}.aedat": header + aedat for c in event_data.CIFAR10 for k in range(2)}
    t = np.arange(60) * 1000
    nmnist = np.stack([rng.integers(0, 34, 60), rng.integers(0, 34, 60), t >> 16, t >> 8 & 255, t & 255], 1)
    nmnist = nmnist.astype(np.uint8).tobytes()
    assets["nmnist"] = {f"data/{s}/{k}/0000{k}.bin": nmnist for s in ("Train", "Test") for k in range(10)}
    lists = {"train1K.txt": "".join(f"{k} {k}\n" for k in range(6)), "test100.txt": "6 6\n7 7\n"}
    assets["nmnist lists"] = {f"data/{k}.bs2": nmnist for k in range(8)}
    assets["nmnist lists"] |= {f"data/{name}": text.encode() for name, text in lists.items()}

    listing = {"wnids.txt": "n1\nn2\n", "words.txt": "n1\tcat\nn2\tdog\n"}
    listing["val/val_annotations.txt"] = "".join(f"val_{k}.JPEG\tn{1 + k % 2}\t0\t0\t7\t7\n" for k in range(4))
    assets["tiny_imagenet"] = {f"data/{name}": text.encode() for name, text in listing.items()}
    pictures = [f"train/{wnid}/images/{wnid}_{k}" for wnid in ("n1", "n2") for k in range(3)]
    pictures += [f"val/images/val_{k}" for k in range(4)]
    assets["tiny_imagenet"] |= {f"data/{name}.JPEG": assets["images"][1] for name in pictures}

    labels = bytes([0, 0, 8, 1, 0, 0, 0, 10, *range(10)])
    images = bytes([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 28, 0, 0, 0, 28])
    parts = {"images-idx3": images + rng.bytes(7840), "labels-idx1": labels}
    assets["idx"] = {f"data/MNIST/raw/{s}-{k}-ubyte": v for s in ("train", "t10k") for k, v in parts.items()}

    nets = {"good": "", "bn": "--norm bn", "pixels": "--encoding pixels_permuted --num_steps 64"}
    with tempfile.TemporaryDirectory() as place:
        put(assets["nmnist"], Path(place))
        nets["events"] = f"--dataset nmnist --data_dir {place}/data"
        for name, more in nets.items():
            run_dir = Path(place) / name
            command = [*TRAIN.split(), "--dataset", "digits", *more.split(), "--run_dir", str(run_dir)]
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True):
                if train.main(command):
                    raise RuntimeError(f"the net {name} could not be trained")
            assets["checkpoints"][f"{name}.tar"] = (run_dir / "best.pth.tar").read_bytes()
            if name == "good":  # the run to be resumed
                assets["run"] = {f"run/{p.name}": p.read_bytes() for p in run_dir.iterdir() if p.is_file()}
    last = torch.load(io.BytesIO(assets["run"]["run/last.pth.tar"]), weights_only=False)
    last |= {"global_step": 0, "progress": last["progress"] | {"step": 1, "log": [], "best": None}}
    assets["run"]["run/last.pth.tar"] = saved(last)  # there is a step to go
    ours = torch.load(io.BytesIO(assets["checkpoints"]["good.tar"]), weights_only=False)
    theirs = {"global_step": 1, "state_dict": ours["state_dict"], "accuracy": np.float64(10.0)}
    assets["checkpoints"]["authors.tar"] = saved(theirs)
    return assets


# ---- Running -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def little_memory():
    """So that what hopes for too much memory is told at once, and the machine does not swap."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def no_network(*args, **options):
    raise urllib.error.URLError("Name or service not known")


def files_in(folder):
    """{path: bytes, None for a folder}"""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run(case, place):
    """Run the input in the folder `place`. Returns (exit code or None, what is wrong or None)."""
    put(case.files, place)
    before = files_in(place)
    out, err, code, here = io.StringIO(), io.StringIO(), None, os.getcwd()

    def alarm(*args):
        raise Hang

    old = signal.signal(signal.SIGALRM, alarm)
    # where Python does not get to act on the alarm
    faulthandler.dump_traceback_later(3 * LIMIT, exit=True, file=sys.__stderr__)
    try:
        os.chdir(place)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")  # not only the first of its kind in this process
            signal.alarm(LIMIT)
            code = SCRIPTS[case.script].main(list(case.argv))
    except SystemExit as stop:
        code = stop.code or 0
    except Hang:
        return None, f"no end after {LIMIT} s\n{traceback.format_exc()}"
    except BaseException:
        return None, traceback.format_exc()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, old)
        torch.use_deterministic_algorithms(False)
        os.chdir(here)
    return code, verdict(code, out.getvalue(), err.getvalue(), before, place)


def verdict(code, out, err, before, place):
    """What is wrong with how an input ended, or None."""
    if code not in (0, 2):
        return f"exit code {code}\n{err}"
    if code == 2 and (len(err.splitlines()) != 1 or ": error: " not in err or not err[:-1].isprintable()):
        return f"not one line of error:\n{err}"
    if "Traceback" in err:
        return err
    if len(os.listdir(place.parent)) > 1:
        return "a file outside the input's folder"
    after = files_in(place)
    new = [name for name in after if name not in before]
    aside = re.compile(r"(^|/)(\.(?!bntt_cache)|tmp-)")  # what the scripts call a file until it is whole
    if half := [name for name in new if aside.search(name)]:
        return f"half-written files are left: {half}"
    if code == 0 and "run/best.pth.tar" in new:
        runs.load_checkpoint(place / "run/best.pth.tar")
    begun = "run folder" in out  # then the log stays
    if code == 2 and not begun and after != before | {name: after[name] for name in new if ".bntt_cache" in name}:
        return f"a refusal changed files: {new}"
    return None


class Report(NamedTuple):
    inputs: int
    accepted: int
    refused: int
    failures: list  # [(index, Case, what is wrong)]


def fuzz(kind, count, seed, assets, only=None):
    """Run `count` inputs of a kind, the same ones for a seed: a `Report`. only: the index of the one to run."""
    ends, failures, drawn = [], [], 0

    every_input = hypothesis.settings(max_examples=count, database=None, deadline=None)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        every_input, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(KINDS[kind](assets))
    def one(case):
        nonlocal drawn
        drawn += 1
        if only not in (None, drawn - 1):
            return
        with tempfile.TemporaryDirectory(prefix="fuzz-") as outer:
            place = Path(outer) / "place"
            place.mkdir()
            code, wrong = run(case, place)
        ends.append(code)
        if wrong:
            failures.append((drawn - 1, case, wrong))

    one()
    return Report(len(ends), ends.count(0), ends.count(2), failures)


def shares(count, kinds):
    """{kind: how many inputs} of about `count` in all."""
    parts = {kind: SHARE.get(kind, 1) for kind in kinds}
    return {kind: max(1, round(count * part / sum(parts.values()))) for kind, part in parts.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="which inputs")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", type=int, metavar="INDEX", help="run this input alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write each failing input there: files and command")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    assets, totals, line = make_assets(), np.zeros(4, int), "{:12} {:>7} {:>9} {:>8} {:>9}".format
    print(line("kind", "inputs", "accepted", "refused", "failures"), flush=True)
    with little_memory(), mock.patch("urllib.request.urlopen", no_network):
        for kind, count in shares(args.count, args.kinds).items():
            report = fuzz(kind, count, args.seed, assets, args.only)
            row = [*report[:3], len(report.failures)]
            totals += row
            print(line(kind, *row), flush=True)
            shown = set()
            for index, case, wrong in report.failures:
                last = wrong.strip().splitlines()[-1]
                if args.only is None and last in shown:
                    continue
                shown.add(last)
                again = f"--count {args.count} --seed {args.seed} --kinds {' '.join(args.kinds)} --only {index}"
                print(f"  {kind} {index}: {case.script} {case.argv!r:.500}\n    repeat: {again}", file=sys.stderr)
                print("    " + wrong.strip().replace("\n", "\n    "), file=sys.stderr)
                if args.keep:
                    command = repr([case.script, *case.argv]).encode()
                    put({**case.files, "ARGV": command}, args.keep / f"{kind}-{index}")
    print(line("all", *totals))
    return 1 if totals[3] else 0


if __name__ == "__main__":
    sys.exit(main())
