"""What every module shares: errors, devices, seeds, facts of the data, schedule, losses, meters, evaluation."""

import contextlib
import functools
import math
import os
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(Exception):
    """A mistake the user can correct, said in one sentence: the scripts print it and exit with 2."""


class Stopped(BaseException):
    """A signal stopped the run, as the message says. code: what to exit with, 128 + the signal."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def one_line(text, most=2000):
    """`text` on one line, with control characters escaped: it may quote a stranger's file."""
    line = " ".join(str(text).splitlines())
    line = line if len(line) <= most else line[:most] + " ..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def reason_of(error):
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def reading(path):
    """While the block reads `path`, whatever goes wrong becomes a UserError that names it.

    A damaged file can raise anything, so no reader needs to look for each kind of damage.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    except Exception as error:
        why = f"({reason_of(error)}): it is damaged or of another kind, correct or replace it"
        raise UserError(f"cannot read {path} {why}") from error


def entry_point(main):
    """Decorate `main(argv=None)`: a UserError becomes one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143.

    So does a lack of memory, and a file or folder that the system refuses.
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
        except OSError as error:
            return refuse(f"cannot use {error.filename}: {reason_of(error)}" if error.filename else reason_of(error))
        except (MemoryError, RuntimeError) as error:
            # PyTorch has a class of its own for a GPU that is full, but not for the rest of the machine
            words = ("allocate memory", "not enough memory", "size calculation overflowed")
            said = (str(error).strip().splitlines() or [""])[-1]  # a worker process quotes its source lines before
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(w in said for w in words):
                raise
            return refuse("out of memory: lower --batch_size, --img_size or --num_steps")
        except Stopped as stop:
            print(stop, file=sys.stderr)
            return stop.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapper


class DataFacts(NamedTuple):
    """What the data are, to a net and to a checkpoint."""

    classes: list[str]
    in_channels: int
    img_size: int  # H = W, in pixels
    mean: list[float]  # per channel, of pixels in [0, 1]
    std: list[float]


def is_name(text):
    """Whether a class may be called so: a text, not too long, without control characters, and encodable."""
    return isinstance(text, str) and len(text) <= 255 and not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


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


def autocast(device, amp):
    """Autocast context of `--amp`, after `pick_amp`."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def make_deterministic():
    """Let PyTorch use only algorithms that give the same bits each time; an operation without one is an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


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


def learning_rate(base, epoch, num_epochs, schedule="step", warmup=0.0, step=0, steps=1):
    """Learning rate of a step (from 0, of `steps` in an epoch) of `epoch` (from 0).

    schedule: step: divided by 10 at 50, 70 and 90 % of the epochs; cosine: to 0 along half a cosine, the same
    over an epoch; cosine_steps: another at each step. warmup: over so many epochs it rises in a line from 0.
    """
    exact = epoch + step / steps
    base *= min(1.0, (exact + 1 / steps) / warmup) if warmup else 1.0
    if schedule == "step":
        return base / 10 ** sum(10 * epoch >= tenths * num_epochs for tenths in (5, 7, 9))
    return base * 0.5 * (1 + math.cos(math.pi * (epoch if schedule == "cosine" else exact) / num_epochs))


class CrossEntropy:
    """Softmax cross-entropy of the output voltage after T steps, over T: eq. 5 as the authors' code computes it.

    logit_scale: a factor on the logits; T undoes their division by T. label_smoothing: in [0, 1), the part of the
    target that is spread over all classes (Szegedy et al. 2016).
    """

    def __init__(self, logit_scale=1.0, label_smoothing=0.0):
        self.logit_scale, self.label_smoothing = logit_scale, label_smoothing

    def logits(self, voltages):
        """voltages: [T, B, K], the output voltage after every step. Returns [B, K], for a softmax."""
        return self.logit_scale * (voltages[-1] / len(voltages))

    def __call__(self, voltages, labels):
        """voltages: [T, B, K]; labels: int64 [B]. Returns the mean over images, a scalar."""
        return F.cross_entropy(self.logits(voltages), labels, label_smoothing=self.label_smoothing)


class TET(CrossEntropy):
    """Temporal Efficient Training (Deng et al., ICLR 2022): cross-entropy of every step's output current, mean over T.

    The current of a step is what it adds to the output voltage, times logit_scale. mse: the paper's lambda, the share
    of its second term, the mean squared distance of all currents from `target`, the threshold there. Default 0: that
    term is for outliers among the currents, and the paper's gain comes from the first (the authors' code: 0.001).
    """

    def __init__(self, logit_scale=1.0, label_smoothing=0.0, *, mse=0.0, target=1.0):
        super().__init__(logit_scale, label_smoothing)
        self.mse, self.target = mse, target

    def __call__(self, voltages, labels):
        currents = self.logit_scale * voltages.diff(dim=0, prepend=torch.zeros_like(voltages[:1]))
        each = labels.repeat(len(currents))
        loss = F.cross_entropy(currents.flatten(0, 1), each, label_smoothing=self.label_smoothing)
        return (1 - self.mse) * loss + self.mse * (currents - self.target).square().mean() if self.mse else loss


LOSSES = {"ce": CrossEntropy, "tet": TET}
SMOOTHED = ("ce", "tet")  # take label_smoothing


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


def synapses(net):
    """{name: module} of its convolutions and linear layers, as they stand in it: input to output, in ours."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


def synaptic_weights(net):
    """{name: weight} of the synapses whose weight is learnt as it is: not computed from other parameters."""
    return {name: module.weight for name, module in synapses(net).items() if module.weight.is_leaf}


class SpikeMeter:
    """Count spikes and operations at every time-step, through forward hooks, in any net made of our parts.

        with SpikeMeter(net) as meter:
            net(images)
        meter.spikes["conv1"]     # [T] float64: spikes at each step, over all images and neurons

    Neurons are the modules with a firing `threshold` (`lif_conv1` is called conv1); they and `net.encoder` show a
    block of steps at a time. Synapses are convolutions and linear layers, and show one step at a time.
    multiply_adds: {synapse: those of one image and step, all inputs counted}; neurons: {layer: how many};
    analog: the synapses that see values in place of spikes.
    by_image: keep `image_spikes` and `image_operations` too, lists of a [T, B] a batch, summed over layers.
    """

    def __init__(self, net, steps=None, by_image=False):
        self.net, self.steps, self.by_image = net, steps or net.num_steps, by_image
        modules = dict(net.named_modules())
        self._neurons = {name.removeprefix("lif_"): m for name, m in modules.items() if hasattr(m, "threshold")}
        self._synapses, self._first = synapses(net), next((layer.synapse for layer in net.layers()), None)
        self.spikes = {n: torch.zeros(self.steps, dtype=torch.float64) for n in ["input", *self._neurons]}
        self._operations = {n: torch.zeros(self.steps, dtype=torch.float64) for n in self._synapses}
        self.neurons, self.multiply_adds, self.analog, self.images = {}, {}, set(), 0
        self.image_spikes, self.image_operations, self._encoded = [], [], None
        self._steps_seen = {}  # at each place, in this run

    def _next(self, key, steps=1):
        """The step, of a run, that comes next at this place."""
        t = self._steps_seen.get(key, 0)
        self._steps_seen[key] = t + steps
        return t

    def _watch(self, module, see):
        """Have see(module, inputs, output) called; `only_looks` tells the fused engine that it wants no gradient."""
        see.only_looks = True
        self._handles.append(module.register_forward_hook(see))

    def _see_spikes(self, name, spikes):
        """spikes: [t, B, ...]"""
        t = self._next(name, len(spikes))
        counts = spikes.abs().flatten(2).sum(2, dtype=torch.float64).cpu()
        self.spikes[name][t : t + len(spikes)] += counts.sum(1)
        self.neurons[name] = spikes[0, 0].numel()
        if self.by_image and name != "input":
            self.image_spikes[-1][t : t + len(spikes)] += counts

    def _see_input(self, module, inputs, encoded):
        self._encoded, (*_, t0) = encoded, (*inputs, 0)[:3]
        if t0 == 0:  # a run begins; the last one may have stopped early
            self._steps_seen.clear()
            self.images += encoded.shape[1]
            if self.by_image:
                self.image_spikes.append(torch.zeros(self.steps, encoded.shape[1], dtype=torch.float64))
                self.image_operations.append(torch.zeros(self.steps, encoded.shape[1], dtype=torch.float64))
        self._see_spikes("input", encoded)

    def _see_synapse(self, name, module, inputs, output):
        """A step's accumulate operations: dense multiply-adds x mean |input|; those of analog input count in full."""
        x, t = inputs[0], self._next(module)
        sees_images = module is self._first or _same_memory(x, self._encoded)  # the second in a net that is no chain
        if not self._neurons or self.net.encoder.analog and sees_images:
            self.analog.add(name)
        self.multiply_adds[name] = output[0].numel() * module.weight[0].numel()
        rates = x.new_ones(len(x)) if name in self.analog else x.abs().flatten(1).mean(1, dtype=torch.float64)
        operations = self.multiply_adds[name] * rates.double().cpu()
        self._operations[name][t] += operations.sum()
        if self.by_image:
            self.image_operations[-1][t] += operations

    def __enter__(self):
        self._handles = []
        for name, module in self._neurons.items():
            self._watch(module, lambda m, inputs, output, name=name: self._see_spikes(name, output[0].detach()))
        self._watch(self.net.encoder, lambda *seen: self._see_input(*seen))
        for name, module in self._synapses.items():
            self._watch(module, lambda *seen, name=name: self._see_synapse(name, *seen))
        return self

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()
        self._encoded = None

    def rates(self):
        """{layer: spikes of an image over all T / neurons of the layer}; may exceed 1 (paper, supplement D)."""
        return {
            n: float(s.sum()) / (self.neurons[n] * max(self.images, 1)) for n, s in self.spikes.items() if n != "input"
        }

    def per_image(self):
        """Spikes of all layers over all T for one image; those of the input do not count."""
        return sum(float(s.sum()) for n, s in self.spikes.items() if n != "input") / max(self.images, 1)

    def operations(self, synapse=None):
        """[T] accumulate operations per image and step, of one synapse or all, from what each sees.

        A synapse costs its dense multiply-adds times the mean size of its input: the spike rate of the neurons before
        it, also where their spikes were averaged by a pool or added in a residual net. An input that is no spikes
        (Encoder.analog), or any in a net without neurons that spike, costs its multiply-adds in full. The output layer,
        which does not spike, is included.
        """
        found = self._operations.values() if synapse is None else [self._operations[synapse]]
        return torch.stack([*found]).sum(0) / max(self.images, 1)


def _same_memory(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def paired_difference(ours, theirs):
    """Accuracy of one net minus another's in points, and half its 95 % interval, paired by image; bool [N] each.

    As a dict with difference and half_interval; the latter is None of one image.
    """
    lost = 100 * (ours.double() - theirs.double())
    half = 1.96 * lost.std().item() / len(lost) ** 0.5 if len(lost) > 1 else None
    return {"difference": lost.mean().item(), "half_interval": half}


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


def likeliest(voltages):
    """The five classes, or all there are, of the highest voltage, highest first: [T, B, K] -> [T, B, 5].

    Of equal voltages, as those of a net that is silent yet, the lowest class comes first, as argmax has it.
    """
    return voltages.sort(dim=-1, descending=True, stable=True).indices[..., :5]


@torch.no_grad()
def evaluate(net, loader, device, loss, seed=0, steps=None, amp="off", progress=None, see=None):
    """Run `net` in eval mode over every image of `loader` once: an `Evaluation` of every exit step.

    loss: loss(voltages [T, B, K], labels [B]) -> mean over images. see: called with these two, batch by batch.
    RuntimeError if images were missed.
    """
    net.eval()
    seed_stream(seed, 1)
    steps = steps or net.num_steps
    num_cls = net.readout.weight.shape[0]
    correct, correct5 = (torch.zeros(steps, dtype=torch.long, device=device) for _ in range(2))
    class_correct, class_count = (torch.zeros(num_cls, dtype=torch.long, device=device) for _ in range(2))
    losses = AverageMeter()
    for images, labels in progress(loader) if progress else loader:
        images, labels = images.to(device), labels.to(device)
        with autocast(device, amp):
            voltages = net.voltages(images, steps).float()
        losses.update(loss(voltages, labels).item(), len(labels))
        if see is not None:
            see(voltages, labels)
        hits = likeliest(voltages) == labels[:, None]  # [T, B, 5]
        correct += hits[..., 0].sum(1)
        correct5 += hits.any(-1).sum(1)
        class_count += torch.bincount(labels, minlength=num_cls)
        class_correct += torch.bincount(labels[hits[-1, :, 0]], minlength=num_cls)
    if losses.count != loader.num_images:
        raise RuntimeError(f"evaluated {losses.count} of {loader.num_images} images")
    counts = (x.tolist() for x in (correct, correct5, class_correct, class_count))
    return Evaluation(losses.count, losses.avg, *counts)
