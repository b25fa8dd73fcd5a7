"""What the entry points share: errors, devices, schedule, seeds, evaluation, checkpoints, run log."""

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import pickle
import platform
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import SpikingVGG

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of weights in a checkpoint
RUN_FILES = ("config.yaml", "environment.json", "log.jsonl", "last.pth.tar", "best.pth.tar", "result.json")


class UserError(Exception):
    """A mistake the user can mend, said in one sentence: the scripts print it and exit with 2."""


class Stopped(BaseException):
    """A signal stopped the run, as the message says. code: what to exit with, 128 + the signal."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def one_line(text, most=2000):
    """`text` on one line, what would drive a terminal escaped: it may quote a file that nobody vouches for."""
    line = " ".join(str(text).splitlines())
    line = line if len(line) <= most else line[:most] + " ..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def entry_point(main):
    """Decorate `main(argv=None)`: UserError becomes one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143.

    So does a lack of memory.
    """

    def refuse(error):
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        return 2

    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(argv) or 0
        except UserError as error:
            return refuse(error)
        except (MemoryError, RuntimeError) as error:
            # PyTorch has a class of its own for a GPU that is full, but not for the rest of the machine
            words = ("allocate memory", "not enough memory", "size calculation overflowed")
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(w in str(error) for w in words):
                raise
            return refuse("out of memory: lower --batch_size, --img_size or --num_steps")
        except Stopped as stop:
            print(stop, file=sys.stderr)
            return stop.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapper


# ---- Machine ------------------------------------------------------------------------------------


def pick_device(name):
    """torch.device for auto, cpu, cuda, cuda:N; UserError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for what asks for the current device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise UserError(f"--device {name}: this machine or this PyTorch has no such device; try --device cpu") from None
    return device


def pick_amp(device, amp):
    """What `--amp` comes to on this device: off, bf16 or fp16; UserError where it cannot be."""
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU: use --amp bf16 or off on a CPU")
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "off"


def use_engine(net, args):
    """Attach the engine that `--engine` names. Returns (its name, why not fused or None)."""
    reason = None
    if args.engine != "plain":
        import fused

        try:
            fused.attach(net, args.save_memory)
            return "fused", None
        except fused.Unsupported as error:
            reason = str(error)
    if args.engine == "fused":
        raise UserError(f"--engine fused: {reason}")
    if args.save_memory is not None:
        raise UserError(
            f"--save_memory belongs to the fused engine, which does not run here: {reason or 'plain asked'}"
        )
    return "plain", reason


def autocast(device, amp):
    """Autocast context of `--amp`, after `pick_amp`."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def make_deterministic():
    """Let PyTorch use only algorithms that give the same bits each time; an operation without one is an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


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


def random_state(device):
    """State of the generators that a run on `device` draws its Poisson spikes from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def where_not_finite(net, gradients=True):
    """Which layer of `net` has weights, or gradients, that are inf or nan, in words; None if none has.

    Gradients flow from the output back, so the fault is in the last layer whose gradient has it.
    """
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} holds inf or nan"
    for name, parameter in reversed(list(net.named_parameters())):
        if gradients and parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name} is inf or nan"
    return None


# ---- Training pieces ---------------------------------------------------------------------------


def seed_stream(seed, *stream):
    """Seed PyTorch for one named part of a run, such as (seed, epoch): parts do not depend on each other."""
    torch.manual_seed(int(np.random.SeedSequence((seed, *stream)).generate_state(1)[0]))


def learning_rate(base, epoch, num_epochs, schedule="step"):
    """Learning rate of `epoch` (from 0): divided by 10 at 50, 70 and 90 % of the epochs, or cosine to 0."""
    if schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * epoch / num_epochs))
    return base / 10 ** sum(10 * epoch >= tenths * num_epochs for tenths in (5, 7, 9))


def accuracy(logits, labels, topk=(1,)):
    """Accuracy in % over the top k classes, for each k. logits: [B, K], labels: [B]."""
    ranks = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices == labels[:, None]
    return [100.0 * ranks[:, :k].any(1).float().mean().item() for k in topk]


class AverageMeter:
    """Mean of a quantity over images."""

    def __init__(self, sum=0, count=0):
        self.sum, self.count = sum, count

    def update(self, value, n=1):
        self.sum += value * n
        self.count += n

    @property
    def avg(self):
        return self.sum / max(self.count, 1)


class SpikeMeter:
    """Count the spikes of the input and of every layer at every time-step, through forward hooks.

        with SpikeMeter(net) as meter:
            net(images)
        meter.spikes["conv1"]     # [T] float64: spikes at each step, over all images and neurons

    Works on any engine that calls the hooks of `net.encoder` and of the LIF modules once a step.
    """

    def __init__(self, net, steps=None):
        self.net, self.steps = net, steps or net.num_steps
        self.spikes = {n: torch.zeros(self.steps, dtype=torch.float64) for n in ["input", *self._layers()]}
        self.neurons, self._calls, self._handles = {}, dict.fromkeys(self.spikes, 0), []
        self.images = 0

    def _layers(self):
        return {layer.name: layer for layer in self.net.layers()}

    def _hook(self, name):
        def hook(module, inputs, output):
            spikes = output[0] if isinstance(output, tuple) else output
            self.spikes[name][self._calls[name] % self.steps] += spikes.abs().sum(dtype=torch.float64).cpu()
            self.neurons[name] = spikes[0].numel()
            self._calls[name] += 1
            if name == "input" and self._calls[name] % self.steps == 0:
                self.images += len(spikes)

        return hook

    def __enter__(self):
        watched = {"input": self.net.encoder, **{n: layer.lif for n, layer in self._layers().items()}}
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in watched.items()]
        return self

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()

    def rates(self):
        """{layer: spikes of an image over all T / neurons of the layer}; may exceed 1 (paper, supplement D)."""
        return {
            n: float(s.sum()) / (self.neurons[n] * max(self.images, 1)) for n, s in self.spikes.items() if n != "input"
        }

    def per_image(self):
        """Spikes of all layers over all T for one image; those of the input do not count."""
        return sum(float(s.sum()) for n, s in self.spikes.items() if n != "input") / max(self.images, 1)

    def operations(self):
        """[T] accumulate operations per image and step: a layer's dense multiply-adds x its input's spike rate.

        The rate is that of the presynaptic neurons, so an average-pooled input counts as spikes. The
        non-spiking output layer is included.
        """
        total, source = torch.zeros(self.steps, dtype=torch.float64), "input"
        synapses = [(n, layer.synapse.weight, self.neurons[n]) for n, layer in self._layers().items()]
        readout = self.net.readout.weight
        for name, weight, neurons in [*synapses, (None, readout, readout.shape[0])]:
            dense = neurons * weight[0].numel()
            total += dense * self.spikes[source] / (self.neurons[source] * max(self.images, 1))
            source = name
        return total


class Evaluation(NamedTuple):
    """Correct answers over a data set; the lists are indexed by the time-steps run, minus one."""

    count: int
    loss: float
    correct: list
    correct5: list
    class_correct: list
    class_count: list

    def top1(self, steps=None):
        """Top-1 accuracy in % after `steps` (default all) time-steps."""
        return 100.0 * self.correct[(steps or len(self.correct)) - 1] / self.count

    def top5(self, steps=None):
        return 100.0 * self.correct5[(steps or len(self.correct5)) - 1] / self.count


@torch.no_grad()
def evaluate(net, loader, device, seed=0, steps=None, amp="off", progress=None):
    """Run `net` in eval mode over every image of `loader` once: an `Evaluation` of every exit step."""
    net.eval()
    seed_stream(seed, 1)
    steps = steps or net.num_steps
    num_cls = net.readout.weight.shape[0]
    correct, correct5 = (torch.zeros(steps, dtype=torch.long, device=device) for _ in range(2))
    class_correct, class_count = (torch.zeros(num_cls, dtype=torch.long, device=device) for _ in range(2))
    loss, seen = 0.0, 0
    for images, labels in progress(loader) if progress else loader:
        images, labels = images.to(device), labels.to(device)
        with autocast(device, amp):
            voltages = net.voltages(images, steps).float()
        loss += F.cross_entropy(voltages[-1] / steps, labels, reduction="sum").item()
        hits = voltages.topk(min(5, num_cls), dim=-1).indices == labels[:, None]  # [T, B, 5]
        correct += hits[..., 0].sum(1)
        correct5 += hits.any(-1).sum(1)
        class_count += torch.bincount(labels, minlength=num_cls)
        class_correct += torch.bincount(labels[hits[-1, :, 0]], minlength=num_cls)
        seen += len(labels)
    if seen != loader.num_images:
        raise RuntimeError(f"evaluated {seen} of {loader.num_images} images")
    counts = (x.tolist() for x in (correct, correct5, class_correct, class_count))
    return Evaluation(seen, loss / seen, *counts)


# ---- Checkpoints -------------------------------------------------------------------------------


def write_atomically(path, write):
    """Call write(file) on a file aside, flush it to disk, then put it in place of `path`.

    A kill at any moment leaves the old file or the new one. UserError if the disk does not take it.
    """
    path, temporary = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error
        while not isinstance(cause, OSError) and cause.__context__:  # torch.save has words of its own for a full disk
            cause = cause.__context__
        if not isinstance(cause, Exception):  # nor does it let a Ctrl-C through
            raise cause from None
        raise UserError(f"cannot write {path}: {reason_of(cause)}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # it is in place, or its folder is gone
                os.unlink(temporary)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path, checkpoint):
    """Save a dict of tensors and plain values, atomically."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


class _NumpyDtype:
    """Stands for numpy.dtype while a checkpoint is unpickled, so that no file drives numpy's own."""

    def __init__(self, name, *flags):
        self.size = {"f4": 4, "f8": 8}[name]

    def __setstate__(self, state):
        pass


def _numpy_scalar(dtype, data):
    (value,) = struct.unpack({4: "<f", 8: "<d"}[dtype.size], data)
    return value


def _numpy_scalar_globals():
    """What an authors' checkpoint needs to unpickle: its `accuracy` is a numpy scalar."""
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [(_NumpyDtype, "numpy.dtype"), *((_numpy_scalar, name) for name in names)]


def load_checkpoint(path):
    """Load a checkpoint of ours or of the authors' code without running any code it may carry.

    Returns a dict with `state_dict`, plain tensors of finite numbers; in a checkpoint of ours also `data` and
    `config`, {flag: value}, whether or not the flag takes it; and what else the file holds, unchecked. UserError if
    the file is anything else, or would take much more memory than it is large.
    """
    try:
        size = _checked_size(path)
        with torch.serialization.safe_globals(_numpy_scalar_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what follows says it in one sentence
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {reason_of(error)}") from None
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise UserError(f"{path} was refused: it holds more than tensors and plain values, perhaps code") from None
        raise UserError(f"{path} is not a checkpoint") from None
    except Exception:  # a damaged file can fail anywhere inside the unpickler
        raise UserError(f"{path} is not a whole checkpoint: it is cut short, damaged or of another kind") from None
    checkpoint = _plain_dict(checkpoint)
    state = _plain_dict(checkpoint.get("state_dict"))
    if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise UserError(f"{path} is not a checkpoint of a BNTT net: it has no state_dict of tensors")
    if "config" in checkpoint:  # ours, not the authors'
        for key, is_right in (("config", _is_config), ("data", _is_data)):
            if not is_right(checkpoint.get(key)):
                raise UserError(f"{path} is not a checkpoint of a BNTT net: its {key} is missing or wrong")
        if checkpoint["config"].get("img_size") not in (None, checkpoint["data"]["img_size"]):
            raise UserError(f"{path} is not a checkpoint of a BNTT net: its config and data differ in img_size")
    for name, tensor in state.items():
        if wrong := _what_is_wrong(name, tensor, size):
            raise UserError(f"{path} is not a checkpoint of a BNTT net: its {name[:100]} {wrong}")
        size -= tensor.nbytes
    checkpoint["state_dict"] = {name: tensor.detach() for name, tensor in state.items()}
    return checkpoint


def _checked_size(path):
    """Bytes of a file of torch.save; BadZipFile if it would unpack to more: torch.save compresses nothing."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # as torch tells; else its older format, which has no compression
        size = file.seek(0, os.SEEK_END)
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            stored = all(m.compress_type == zipfile.ZIP_STORED and m.file_size == m.compress_size for m in members)
            if archive.comment or not stored or sum(m.file_size for m in members) > size:
                raise zipfile.BadZipFile
    return size


def _plain_dict(value):
    """A dict's entries, whatever attributes a file gave it; {} for anything else."""
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _what_is_wrong(name, tensor, most_bytes):
    """None for a tensor as our nets have them, else what is wrong with it."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return "is no plain tensor"
    if tensor.device.type != "cpu" or tensor.dtype not in (*FLOATS, torch.int64):
        return f"is of {tensor.dtype} on {tensor.device}, where no net of ours has such"
    if tensor.nbytes > most_bytes:  # one number in the file may stand for any count of them
        return "is larger than the file"
    if tensor.dtype != torch.int64 and not tensor.float().isfinite().all():
        return "is not finite"
    if name.endswith("running_var") and (tensor < 0).any():
        return "is negative, which no variance is"
    if name == "encoder.order" and not torch.equal(tensor.flatten().sort().values, torch.arange(tensor.numel())):
        return "is not an order of the pixels"
    return None


def _is_config(value):
    """Whether this is a dict of texts, numbers and such, as flags are."""
    plain = (str, int, float, bool, type(None))
    return type(value) is dict and all(type(k) is str and type(v) in plain for k, v in value.items())


def _is_data(value):
    """Whether this is what a checkpoint of ours says of its data."""
    kinds = {"classes": str, "mean": float, "std": float}
    return (
        type(value) is dict
        and value.keys() == {*kinds, "in_channels", "img_size"}
        and all(type(value[k]) is list and all(type(x) is kinds[k] for x in value[k]) for k in kinds)
        and all(type(value[k]) is int and value[k] >= 1 for k in ("in_channels", "img_size"))
        and len(value["mean"]) == len(value["std"]) == value["in_channels"]
        and all(map(math.isfinite, value["mean"]))
        and all(0 < x < math.inf for x in value["std"])
        and len(value["classes"]) > 0
        and all(is_name(x) for x in value["classes"])
    )


def is_name(text):
    """Whether a class may be called so: not too long, nothing that would drive a terminal, and encodable."""
    return len(text) <= 255 and not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


def build_net(args, img_size, num_cls, in_channels):
    """The `SpikingVGG` that the flags ask for; UserError where they make no net."""
    try:
        return SpikingVGG(
            args.arch, args.num_steps, args.leak_mem, img_size, num_cls, in_channels=in_channels,
            threshold=args.threshold, norm=args.norm, spike_order=args.spike_order, encoding=args.encoding,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def check_weights(args, checkpoint, img_size, num_cls, in_channels):
    """UserError unless the checkpoint's weights are those of the net asked for. Allocates no weights."""
    state, another = checkpoint["state_dict"], f"{args.checkpoint} holds another net than {args.arch} as asked for"
    steps = {name.split(".")[1] for name in state if name.startswith("bntt") and name.endswith(".weight")}
    if args.norm == "bntt" and args.num_steps != len(steps):  # before so many steps are built
        raise UserError(f"{another}: it has {len(steps)} time-steps with a norm of their own, not {args.num_steps}")
    with torch.device("meta"):
        expected = build_net(args, img_size, num_cls, in_channels).state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{another}: it has no {name}")
        if state[name].shape != tensor.shape or state[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(
                f"{another}: size mismatch for {name}: it is {list(state[name].shape)} of {state[name].dtype}, "
                f"not {list(tensor.shape)} of {tensor.dtype}"
            )
    if state.keys() > expected.keys():
        raise UserError(f"{another}: that has no {min(state.keys() - expected.keys())[:100]}")


def load_net(args, checkpoint, img_size, num_cls, in_channels, device):
    """Rebuild the net of a checkpoint on `device`, with its engine; UserError where its weights are of another net."""
    check_weights(args, checkpoint, img_size, num_cls, in_channels)
    net = build_net(args, img_size, num_cls, in_channels)
    net.load_state_dict(checkpoint["state_dict"])
    engine, reason = use_engine(net.to(device), args)
    if reason:
        print(f"engine: {engine}, because {reason}")
    return net


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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
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
        "platform": platform.platform(),
        **more,
    }


def _cpu_name():
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
    again = {"date": now["date"], "git": now["git"], **where, "changed": changed_versions(folder, now)}
    before = then.get("resumed")
    write_json(folder / "environment.json", then | {"resumed": [*(before if isinstance(before, list) else []), again]})


def run_folder(path, overwrite=False, resume=False):
    """Make the folder of a run. Returns (path, checkpoint to go on from or None).

    UserError if it holds a run already, unless it is to be overwritten or resumed. Files that a killed run
    had not finished writing are removed.
    """
    path = Path(path)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    old = [path / name for name in RUN_FILES if (path / name).exists()]
    checkpoint = None
    if resume and path / "last.pth.tar" in old:
        checkpoint, old = load_checkpoint(path / "last.pth.tar"), []
    elif resume and path / "result.json" in old:
        raise UserError(f"{path} holds a finished run without its last.pth.tar: pass --overwrite to train it again")
    else:
        old += (path / "tensorboard").glob("events.out.tfevents.*")
        if old and not overwrite and not resume:  # a run killed before it saved anything begins anew
            raise UserError(f"{path} already holds a run: pass --resume, --overwrite, or --run_dir for another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        for file in [*old, *(half for name in RUN_FILES for half in path.glob(f".{name}.*"))]:
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot make the run folder {path}: {reason_of(error)}") from None
    return path, checkpoint


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def reason_of(error):
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
