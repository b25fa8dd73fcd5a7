"""A run: its folder and the files in it, checkpoints (which may come from strangers), how it stops and goes on.

Files are written beside their place and renamed: a kill at any moment leaves the old one or the new one.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import pickle
import platform
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

import utill
from utill import DataFacts, Stopped, UserError, is_name, reading, reason_of

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of weights in a checkpoint
# Flags that a resumed run may change: they change neither the weights nor a number of its log.
RESUMABLE = ("num_workers", "data_dir", "data_on_device", "save_every", "train_display_freq", "test_display_freq")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module")  # where others keep a state dict
PREFIXES = ("module", "_orig_mod", "model", "net")  # of DataParallel, of torch.compile, of a wrapper's attribute
RUN_FILES = ("config.yaml", "environment.json", "log.jsonl", "last.pth.tar", "best.pth.tar", "result.json")
MEASURED = ("result.json", "early_exit*.json", "early_exit*.png", "averaged.json", "analysis.*")  # of a trained net


# ---- Writing -----------------------------------------------------------------------------------


def write_atomically(path, write):
    """Call write(file) on a file aside, flush it to disk, then put it in place of `path`.

    A kill at any moment leaves the old file or the new one. UserError if the disk does not take it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_of(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # it is in place, or its folder is gone
            os.unlink(temporary)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


# ---- Checkpoints -------------------------------------------------------------------------------


def save_checkpoint(path, checkpoint):
    """Save a dict of tensors and plain values, atomically."""
    content = io.BytesIO()  # torch.save hides what goes wrong with a file: a full disk, a Ctrl-C
    torch.save(checkpoint, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


class _NumpyDtype:
    """Stands for numpy.dtype while a checkpoint is unpickled, so that no file can steer numpy's own."""

    def __init__(self, name, *flags):
        self.size = {"f4": 4, "f8": 8}[name]

    def __setstate__(self, state):
        pass


def _numpy_scalar(dtype, data):
    (value,) = struct.unpack({4: "<f", 8: "<d"}[dtype.size], data)
    return value


# What an authors' checkpoint needs to be unpickled: its `accuracy` is a numpy scalar.
NUMPY_SCALAR = [
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def load_checkpoint(path):
    """Load a checkpoint of ours, of the authors' code or of one's own without running any code it may carry.

    Returns a dict with `state_dict`, plain tensors of finite numbers by their names in our nets: it may stand under
    another of WRAPPERS in the file, or be all of it, and its names may have PREFIXES. In a checkpoint of ours also
    `data` and `config`, {flag: value}, whether or not the flag takes it; and what else the file holds, unchecked.
    UserError if the file is anything else, or would take much more memory than it is large.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the checkpoint in it, as {Path(path) / 'best.pth.tar'}")
    with reading(path):
        size = _checked_size(path)
        try:
            with torch.serialization.safe_globals(NUMPY_SCALAR), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols: what follows says it in one sentence
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "GLOBAL" in str(error):
                why = "it holds more than tensors and plain values, perhaps code"
                raise UserError(f"{path} was refused: {why}; save net.state_dict() alone") from None
            raise ValueError("it is not a checkpoint") from None
        except (EOFError, IndexError, KeyError, TypeError, AttributeError):  # of a file that is no pickle at all
            raise ValueError("it is not a checkpoint") from None
        return _checked(_plain_dict(checkpoint), size)


def _checked_size(path):
    """Bytes of a file of torch.save; ValueError if it would unpack to more: torch.save compresses nothing."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # as torch tells; else its older format, which has no compression
        size = file.seek(0, os.SEEK_END)
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > size or archive.comment:  # with a comment, torch may see other members than zipfile does
                raise ValueError("it unpacks to more than its size")
    return size


def _plain_dict(value):
    """A dict's entries, whatever attributes a file gave it; {} for anything else."""
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _checked(checkpoint, size):
    """What `load_checkpoint` returns, of what a file of `size` bytes holds; any error where that is no net of ours."""
    where = next((key for key in WRAPPERS if _plain_dict(checkpoint.get(key))), None)
    state = _plain_dict(checkpoint[where]) if where else checkpoint
    if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError("it has no state_dict of tensors")
    if where != "state_dict":  # a config is then not one of ours
        checkpoint = {k: v for k, v in checkpoint.items() if where and k not in ("config", where)}
    names = {name: ".".join(part for part in name.split(".") if part not in PREFIXES) for name in state}
    if len({*names.values()}) < len(names):
        raise ValueError("two of its tensors have the same name, apart from a prefix")
    if "config" in checkpoint:  # ours, not the authors'
        config, known = _plain_dict(checkpoint["config"]), _plain_dict(checkpoint["data"])
        checkpoint, facts = checkpoint | {"config": config, "data": known}, DataFacts(**known)
        if not all(isinstance(value, (str, int, float, type(None))) for value in config.values()):
            raise ValueError("its config holds more than flags")
        if config.get("img_size") not in (None, facts.img_size):
            raise ValueError("its config and data differ in img_size")
        _check_facts(facts)
    for name, tensor in state.items():
        _check_tensor(names[name][:100], tensor, size)
        size -= tensor.nbytes  # views of one storage may name it again and again
    return checkpoint | {"state_dict": {names[name]: tensor.detach() for name, tensor in state.items()}}


def _check_tensor(name, tensor, most_bytes):
    """ValueError unless a net of ours can have this tensor."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise ValueError(f"its {name} is no plain tensor")
    if tensor.device.type != "cpu" or tensor.dtype not in (*FLOATS, torch.int64):
        raise ValueError(f"its {name} is of {tensor.dtype} on {tensor.device}")
    if tensor.nbytes > most_bytes:  # one number in the file may stand for any count of them
        raise ValueError(f"its {name} is larger than the file")
    if not tensor.float().isfinite().all():
        raise ValueError(f"its {name} is not finite")
    if name == "encoder.order" and not torch.equal(tensor.flatten().sort().values, torch.arange(tensor.numel())):
        raise ValueError(f"its {name} is not an order of the pixels")  # it would point outside the image


def _check_facts(facts):
    """An error of some kind unless these are `DataFacts` that images can be made by, with names that can be printed."""
    mean, std = torch.tensor([facts.mean, facts.std])  # float [C] each
    if not all(type(size) is int and size >= 1 for size in (facts.in_channels, facts.img_size)):
        raise ValueError("its in_channels or img_size is wrong")
    if len(mean) != facts.in_channels or not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise ValueError("its mean or std is wrong")
    if type(facts.classes) is not list or not facts.classes or not all(map(is_name, facts.classes)):
        raise ValueError("its class names are wrong")


# ---- Run folder --------------------------------------------------------------------------------


def environment(device, argv, **more):
    """What a number depends on besides the config: versions, machine, code, command, and `more`."""
    here = Path(__file__).resolve().parent

    def git(*command):
        done = subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except OSError:  # no git
        commit, dirty = None, None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *map(str, argv if argv is not None else sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": commit,
        "git_dirty": dirty,
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        **more,
    }


def cpu_name():
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


VERSIONS = ("git", "device", "threads", "python", "torch", "torchvision", "numpy", "engine")  # of environment.json


def read_environment(folder):
    """environment.json in `folder`; {} if there is none, or none that can be read."""
    try:
        return _plain_dict(json.loads((Path(folder) / "environment.json").read_text()))
    except (OSError, ValueError, RecursionError):
        return {}


def changed_versions(folder, now):
    """What of environment.json in `folder` is not as in `now`, in words; "" if nothing, or if it has none."""
    then = read_environment(folder)
    changed = [key for key in VERSIONS if then.get(key, now[key]) != now[key]]
    return ", ".join(f"{key} {then[key]} (now {now[key]})" for key in changed)


def note_resumed(folder, now, **where):
    """Add to environment.json in `folder` that its run went on in the environment `now`; UserError as `write_json`."""
    then = read_environment(folder) or now
    again = {"date": now["date"], "command": now["command"], "git": now["git"], **where}
    again["changed"] = changed_versions(folder, now)
    before = then.get("resumed")
    write_json(folder / "environment.json", then | {"resumed": [*(before if isinstance(before, list) else []), again]})


@contextlib.contextmanager
def alone_in(folder):
    """A context in which no other process may be in it for `folder`: UserError if one is."""
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        ours = False
        while not ours:
            file = stack.enter_context(open(path, "w"))
            try:
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a dead run's workers would keep that
            except (BlockingIOError, PermissionError):
                raise UserError(f"{folder} is in use by another training run that has not ended") from None
            except OSError:
                break  # a file system without locks
            with contextlib.suppress(FileNotFoundError):  # else the run before removed it after we opened it
                ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def check_folder(path, overwrite=False, resume=False):
    """UserError if no run can be kept in the folder `path`, or one is kept there and neither replaced nor resumed."""
    path = Path(path)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is no folder, where a run could be kept: name another by --run_dir or --out")
    kept = [path / name for name in RUN_FILES if (path / name).exists()]
    if not overwrite and not resume and (kept or any((path / "tensorboard").glob("events.out.tfevents.*"))):
        raise UserError(f"{path} already holds a run: pass --resume, --overwrite, or --run_dir for another folder")


@contextlib.contextmanager
def run_folder(path, overwrite=False, resume=False):
    """A context with the folder of a run to itself: (path, checkpoint to go on from or None).

    The folder is made if need be. UserError if it holds a run already, unless it is to be overwritten or
    resumed, or if one is being trained there. Files that a killed run had not finished writing are removed.
    """
    path = Path(path)
    check_folder(path, overwrite, resume)
    path.mkdir(parents=True, exist_ok=True)
    with alone_in(path):
        check_folder(path, overwrite, resume)
        old = [path / name for name in RUN_FILES if (path / name).exists()]
        checkpoint = None
        if resume and path / "last.pth.tar" in old:
            checkpoint, old = load_checkpoint(path / "last.pth.tar"), []
        elif resume and path / "result.json" in old:
            raise UserError(f"{path} holds a finished run without its last.pth.tar: pass --overwrite to train it again")
        else:  # a run killed before it saved anything begins anew
            old += (path / "tensorboard").glob("events.out.tfevents.*")
        for file in [*old, *(half for name in RUN_FILES for half in path.glob(f".{name}.*"))]:
            file.unlink()
        if overwrite:
            forget_results(path)
        yield path, checkpoint


def forget_results(folder):
    """Remove what was measured of a net that is no longer the one in `folder`."""
    for path in [path for name in MEASURED for path in Path(folder).glob(name)]:
        path.unlink()


@contextlib.contextmanager
def curves(folder, epoch):
    """A context with the SummaryWriter of a run. epoch: the first to come; what a killed run left of it is hidden."""
    before = threading.excepthook

    def hook(failure):  # of a full disk the writer's thread would print a traceback; `write_curves` raises it
        if not issubclass(failure.exc_type, OSError):
            before(failure)

    writer, threading.excepthook = SummaryWriter(folder, purge_step=epoch), hook
    try:
        yield writer
    finally:
        with contextlib.suppress(OSError):
            writer.close()
        threading.excepthook = before


def write_curves(writer, record, gammas):
    """Write the numbers of a log line and a histogram of each layer's gammas to the disk; UserError if it is full."""
    flat = {}
    for key, value in record.items():
        flat |= {f"{key}/{name}": x for name, x in value.items()} if isinstance(value, dict) else {key: value}
    try:
        epoch = flat.pop("epoch")
        for key, number in flat.items():
            writer.add_scalar(key, number, epoch)
        for name, gamma in gammas.items():
            writer.add_histogram(f"gamma/{name}", gamma, epoch, bins=64)
        writer.flush()  # else a kill loses what its thread has not written yet
    except OSError as error:
        raise UserError(f"cannot write {writer.log_dir}: {reason_of(error)}") from error


# ---- Stop and go on -------------------------------------------------------------------------------


class Signals:
    """While a run trains, Ctrl-C and SIGTERM ask it to save and stop, SIGUSR1 to save and go on.

        with Signals() as signals:
            ...                                   # Ctrl-C and SIGTERM raise Stopped, SIGUSR1 waits
            signals.run = run                     # has save(), and where() to tell how far it is
            for batch in signals.watch(loader):   # or signals.act() wherever the state can be saved
                ...
            signals.run = None

    While there is a run the handlers only take a note; `act` then saves it and raises `Stopped`. A second
    Ctrl-C or SIGTERM acts at once, as without this class. In a thread other than the main one nothing is changed.
    """

    def __init__(self):
        self.run, self.stop, self.wanted, self.before = None, None, False, {}

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None and threading.current_thread() is threading.main_thread():
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _note(self, number, frame):
        self.wanted = True
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.before[number] or signal.SIG_DFL)
            self.stop = signal.Signals(number)
            if self.run is None:
                raise Stopped(128 + number, f"stopped by {self.stop.name} outside of training")

    def act(self):
        if self.wanted:
            self.wanted = False
            self.run.save()
        if self.stop is not None:
            message = f"stopped by {self.stop.name} after {self.run.where()}; go on with --resume"
            raise Stopped(128 + self.stop, message)

    def watch(self, batches):
        for batch in batches:
            yield batch
            self.act()


class Run:
    """All that training changes, so that it can be saved at any step and taken up again (`state` and `restore`).

    folder: of the run. constants: what a checkpoint says of config and data.
    """

    def __init__(self, net, optimizer, scaler, device, folder, constants):
        self.net, self.optimizer, self.scaler, self.device = net, optimizer, scaler, device
        self.folder, self.constants = folder, constants
        self.epoch = self.step = 0  # epochs done; steps done in the epoch after them
        self.losses, self.rights, self.norms = (utill.AverageMeter() for _ in range(3))  # of that epoch's training
        self.log, self.best, self.accuracy = [], None, None
        self.seconds, self.epoch_seconds, self.clock = 0.0, 0.0, time.perf_counter()

    def tick(self):
        """Seconds since the last call, added to those of the run."""
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.seconds += passed
        return passed

    def state(self):
        self.epoch_seconds += self.tick()
        progress = {key: getattr(self, key) for key in ("step", "log", "best", "seconds", "epoch_seconds")}
        meters = {key: vars(getattr(self, key)) for key in ("losses", "rights", "norms")}
        parts = {"state_dict": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        parts |= {"scaler": self.scaler.state_dict(), "random_state": utill.random_state(self.device)}
        progress = {"global_step": self.epoch, "accuracy": self.accuracy, "progress": progress | meters}
        return {**progress, **parts, **self.constants}

    def where(self):
        """How far it is, in words."""
        return f"{self.epoch} epochs and {self.step} steps"

    def check(self):
        """UserError that names the layer if weights or gradients are inf or nan."""
        if fault := utill.where_not_finite(self.net, gradients=not self.scaler.is_enabled()):  # it skips such steps
            raise UserError(f"{fault} at epoch {self.epoch + 1}, step {self.step}: lower --lr, or check the data")

    def save(self, name="last.pth.tar"):
        self.check()  # the last good checkpoint is kept
        save_checkpoint(self.folder / name, self.state())

    def restore(self, checkpoint, defaults, now):
        """Take up the run of `checkpoint`. Raises UserError where it is of another config or data, or not whole.

        Some flags may differ: a larger number of epochs; a smaller one of a finished run, which then keeps its own;
        another name for the device or engine that it ran on. defaults: {flag: value} for flags newer than the
        checkpoint. now: the `environment` in which it continues.
        """
        with reading(self.folder / "last.pth.tar"):
            ours, known = self.constants["config"], self.constants["data"]
            theirs = {key: value for key, value in defaults.items() if key in ours} | checkpoint["config"]
            then = read_environment(self.folder)
            kinds = {k: [re.split("[ :]", str(where.get(k)))[0] for where in (then, now)] for k in ("device", "engine")}
            free = {*RESUMABLE, *(k for k, (before, after) in kinds.items() if before == after)}
            free |= {"num_epochs"} if theirs["num_epochs"] <= ours["num_epochs"] else set()
            if checkpoint["global_step"] >= theirs["num_epochs"] > ours["num_epochs"]:
                ours["num_epochs"] = theirs["num_epochs"]  # nothing to do: it stays a run of all its epochs
            odd = [k for k in sorted((theirs.keys() | ours.keys()) - {"split_seed"}) if theirs.get(k) != ours.get(k)]
            changes = [f"--{k} was {theirs.get(k)} and is now {ours.get(k)}" for k in odd if k not in free]
            changes += [f"the data have another {k}" for k, v in known.items() if checkpoint["data"][k] != v]
            if words := ", ".join(changes):
                raise UserError(f"{self.folder} holds a run of another config, so it cannot be resumed: {words}")
            self.net.load_state_dict(checkpoint["state_dict"])
            groups = self.optimizer.state_dict()["param_groups"]  # what they hold follows from the config
            self.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
            self.scaler.load_state_dict(checkpoint["scaler"])
            progress = checkpoint["progress"]
            for key in ("losses", "rights"):
                total = torch.as_tensor(progress[key]["sum"], dtype=torch.float32, device=self.device).reshape(())
                setattr(self, key, utill.AverageMeter(total, int(progress[key]["count"])))
            kept = progress.get("norms", {"sum": 0.0, "count": 0})  # older checkpoints have none
            total = torch.zeros(2, len(utill.synaptic_weights(self.net)), dtype=torch.float64, device=self.device)
            total += torch.as_tensor(kept["sum"], dtype=torch.float64, device=self.device)
            self.norms = utill.AverageMeter(total, int(kept["count"]))
            self.seconds, self.epoch_seconds = float(progress["seconds"]), float(progress["epoch_seconds"])
            self.epoch, self.step = int(checkpoint["global_step"]), int(progress["step"])
            self.log, self.best, self.accuracy = progress["log"], progress["best"], checkpoint["accuracy"]
            utill.set_random_state(checkpoint["random_state"], self.device)
            self._check_restored()
        self.clock = time.perf_counter()

    def _check_restored(self):
        """ValueError where what `restore` read would fail later, in the midst of training."""
        json.dumps(self.log)  # TypeError where it is no longer a log
        if self.step < 0 or len(self.log) != self.epoch or self.best not in (self.log or [None]):
            raise ValueError("its log does not fit its epochs")
        if self.best and not {"epoch", "train_loss", "train_acc"} <= self.best.keys():
            raise ValueError("its best epoch lacks a number")
        for weights, kept in self.optimizer.state.items():
            tensors = [x for x in kept.values() if torch.is_tensor(x)]
            if any(x.shape not in (weights.shape, ()) or not x.isfinite().all() for x in tensors):
                raise ValueError("its optimizer is of another net")
