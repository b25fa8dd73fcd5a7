"""What the engine asks before it runs a net: are these the parts that it knows, and was it proved on their like?

`why_not` goes by what the parts are and say, and is cheap enough to be asked at every call. `prove` compares engine and
plain loop in float64: once for each kind of net and each state of the source, and the answer is remembered.
"""

import copy
import functools
import hashlib
import inspect
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as nn_module

import model
from fused.common import Unsupported, cache_folder
from fused.engine import backend, shapes
from model import LIF, SpikingVGG

MAX_POOL = 15  # packed spikes count those of a window in one byte
DESCRIPTION = ("batch_norms", "gamma", "affine")  # by which a norm says what it is, besides per_step
TIME = ("stream", "output_currents", "_currents")  # in whose place the engine puts itself
TOLERANCE = 1e-9
WORK = 2e9  # multiply-adds of one forward pass of a proof: of seconds in all


# ---- What the parts are ------------------------------------------------------------------------------


def why_not(net, save_memory=None):
    """None if `net` is made of parts that the engine knows, where it now lies; else the reason as a sentence."""
    if not isinstance(net, SpikingVGG):
        return f"the fused engine runs chains of layers (SpikingVGG), and {type(net).__name__} may be another net"
    try:
        return _why_not(net, save_memory)
    except Unsupported as error:
        return str(error)
    except Exception as error:  # the parts may be anybody's
        return f"the fused engine does not know this net's parts ({type(error).__name__}: {error})"


def _why_not(net, save_memory):
    if reason := _synapse("readout", net.readout, net.readout):
        return f"the fused engine {reason}"
    backend(net.readout.weight.device.type)
    kind = plain_class(net)
    if own := [name for name in TIME if getattr(kind, name) is not getattr(SpikingVGG, name) or name in vars(net)]:
        return f"the fused engine does not know a net with a `{own[0]}` of its own"
    if nn_module._has_any_global_hook():
        return "the fused engine calls no hooks that are set for all modules"
    if reason := _changed(net.encoder, "encoder", called=True):
        return f"the fused engine {reason}"
    layers = net.layers()
    if len({id(layer.norm) for layer in layers}) < len(layers):
        return "the fused engine does not know layers that share a normalisation"
    for layer in layers:
        if reason := _synapse(*layer[:2], net.readout) or _layer(layer, net.num_steps, save_memory):
            return f"the fused engine {reason}"
    side = max((shape.pool for shape in shapes(net, 1, 1)), default=1)
    if side > MAX_POOL:
        return f"the fused engine pools windows of up to {MAX_POOL}x{MAX_POOL}, this net has {side}x{side}"
    return None


def plain_class(net):
    """The class of a net, attached or not, that model.py or its user gave it."""
    return next(c for c in type(net).__mro__ if not getattr(c, "is_fused", False))


def _layer(layer, num_steps, save_memory):
    name, synapse, norm, lif, pool = layer
    if not _describes_itself(norm):
        return f"does not know the normalisation {type(norm).__name__}"
    norms = norm.batch_norms(num_steps)
    shared = len({*map(id, norms)})
    if shared not in (0, 1, len(norms)) or (
        norms
        and not _knows_batch_norms(norms[: 1 if shared == 1 else None], hasattr(norm, "beta"), synapse.weight.dtype)
    ):
        return f"does not know the BatchNorms of {name}: of another type, not alike, changed, or with hooks"
    if save_memory and not norm.per_step:
        return f"cuts time into blocks to save memory, and {type(norm).__name__} takes its statistics over all of it"
    constants = isinstance(lif.leak, (int, float)) and isinstance(lif.threshold, (int, float))
    if type(lif) is not LIF or not constants or lif._parameters or lif.delay != (lif.spike_order == LIF.ORDERS[1]):
        return f"does not know the neuron {type(lif).__name__}" + (" with parameters" if type(lif) is LIF else "")
    if not _knows_pool(pool):
        return f"does not know the pool of {name}, {_short(pool)}"
    return (
        _changed(norm, f"normalisation of {name}")
        or _changed(lif, f"neuron of {name}", called=True)
        or _changed(pool, f"pool of {name}")
    )


def _synapse(name, synapse, readout):
    if not _knows_synapse(synapse):
        return f"does not know the weight layer {name}, {_short(synapse)}"
    if not _plain_weight(synapse):  # asked first: to read `weight` of a parametrised module may move its state
        return f"does not know the weight of {name}: it is no plain parameter"
    one, other = synapse.weight, readout.weight
    if (one.dtype, one.device) != (other.dtype, other.device):
        return "runs weights of one dtype on one device"
    return _changed(synapse, f"weight layer {name}", called=True)


def _short(module):
    return type(module).__name__ + (
        f"({module.extra_repr()})" if type(module).__module__.startswith("torch.nn") else ""
    )


def _changed(module, what, called=False):
    """Why a module of a known kind is not what its class says, or None. called: if hooks only look, they are called."""
    if _touched(module):
        return f"does not know the {what}: a method of it was replaced"
    return f"does not call the hooks of the {what}" if _hooks(module, called) else None


def _touched(module):
    """Whether a method was replaced in this one module."""
    kind = type(module)
    return any(callable(getattr(kind, name, None)) for name in vars(module).keys() - _own_names(kind))


@functools.cache
def _own_names(kind):
    """Names that every module has, which are not methods."""
    return frozenset(vars(nn.Module())) | {"weight", "bias"}


def _hooks(module, called=False):
    """Whether a module has hooks that the engine does not call. Of some it calls the forward hooks that only look."""
    forward = module._forward_hooks
    if forward and not (called and all(getattr(hook, "only_looks", False) for hook in forward.values())):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _plain_weight(module):
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.layout == torch.strided


def _describes_itself(norm):
    """Whether a norm says what it is; what it says is not taken for a `forward` that was written after it."""
    return all(hasattr(norm, name) for name in (*DESCRIPTION, "per_step", "gamma_per_step")) and _in_order(type(norm))


@functools.cache
def _in_order(kind):
    wrote = {name: i for i, c in reversed([*enumerate(kind.__mro__)]) for name in vars(c)}
    return min(wrote[name] for name in DESCRIPTION) <= wrote["forward"]


BATCH_NORM_NAMES = len(vars(nn.BatchNorm1d(1)))
BATCH_NORM_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _knows_batch_norms(norms, beta, dtype):
    """Whether a layer's BatchNorms are torch's own, alike and unchanged. Sequential MNIST asks of 1,568 at every call:
    hence what each has is read from its `vars`, and compared as sets."""
    parts = [vars(bn) for bn in norms]
    settings = {(part["eps"], part["momentum"], part["training"], part["track_running_stats"]) for part in parts}
    (eps, momentum, _, tracked), *others = settings
    if others or not tracked or not type(eps) is type(momentum) is float:
        return False
    tensors = [(part["_parameters"]["weight"], part["_buffers"]["running_mean"]) for part in parts]
    if None in {value for pair in tensors for value in pair}:
        return False
    kinds = {(type(w), w.layout, w.dtype, mean.dtype) for w, mean in tensors}
    half = dtype in (torch.bfloat16, torch.float16) and (nn.Parameter, torch.strided, *[torch.float32] * 2) in kinds
    return (
        {*map(type, norms)} <= {nn.BatchNorm1d, nn.BatchNorm2d}
        and (half or (nn.Parameter, torch.strided, dtype, dtype) in kinds)
        and len(kinds) == 1
        and {part["_parameters"]["bias"] is not None for part in parts} == {beta}
        and not any(part[hooks] for hooks in BATCH_NORM_HOOKS for part in parts)
        and all(len(part) == BATCH_NORM_NAMES or not _touched(bn) for bn, part in zip(norms, parts, strict=True))
    )


def _knows_pool(pool):
    if type(pool) is nn.AvgPool2d:
        plain = pool.padding == 0 and not pool.ceil_mode and pool.divisor_override is None
        return isinstance(pool.kernel_size, int) and pool.stride == pool.kernel_size and plain
    if type(pool) is nn.AdaptiveAvgPool2d:
        return pool.output_size in (1, (1, 1))
    return type(pool) is nn.Identity


def _knows_synapse(synapse):
    if type(synapse) is nn.Conv2d and isinstance(synapse.padding, tuple):
        same = all(2 * pad == kernel - 1 for pad, kernel in zip(synapse.padding, synapse.kernel_size, strict=True))
        simple = synapse.stride == synapse.dilation == (1, 1) and synapse.groups == 1
        return same and simple and synapse.padding_mode == "zeros" and synapse.bias is None
    return type(synapse) is nn.Linear and synapse.bias is None


def cannot_now(images):
    """Why a call must run plain whatever the net: traced, exported, transformed, or with other tensors. Else None."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return "the fused engine cannot be traced or transformed"
    if type(images) is not torch.Tensor or images.layout != torch.strided or not len(images):
        return "the fused engine takes plain tensors of images"
    return None


# ---- Proof ---------------------------------------------------------------------------------------------

_PROVED = {}  # {kind of net: None, or why it failed}
TORCHS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity)
TORCH_CODE = ("conv2d", "linear", "batch_norm", "avg_pool2d", "adaptive_avg_pool2d")


def _torch_code():
    """What torch's own parts run, unless somebody replaced it."""
    return (
        nn.Module.__call__, *(c.forward for c in TORCHS), nn.Conv2d._conv_forward,
        *(getattr(F, name) for name in TORCH_CODE), torch.stack,
    )  # fmt: skip


UNCHANGED_TORCH = _torch_code()


def disproved(net, attached):
    """None if engine and plain loop agree on nets of this kind, else why not; proved first if that is not known yet.

    attached: makes a net run fused without asking.
    """
    kind = _kind(net)
    if kind not in _PROVED:
        mark = _mark(kind)
        if mark is not None and mark.exists():
            _PROVED[kind] = None
        else:
            _PROVED[kind] = prove(net, attached)
            if mark is not None and _PROVED[kind] is None:
                with suppress(OSError):
                    mark.touch()
    return _PROVED[kind]


def _kind(net):
    """What of a net decides which code runs: its kinds of parts, their functions, and the values that those read."""
    parts = frozenset(
        (
            type(norm), _settings(norm), lif.spike_order, type(pool), getattr(pool, "kernel_size", None),
            type(synapse), getattr(synapse, "kernel_size", None),
        )
        for _, synapse, norm, lif, pool in net.layers()
    )  # fmt: skip
    used = (plain_class(net), type(net.encoder), LIF, model.SurrogateSpike, *{norm for norm, *_ in parts})
    classes = {c for kind in used for c in kind.__mro__ if not c.__module__.startswith(("torch", "builtins"))}
    code = [(c.__module__, c.__qualname__, name, value) for c in classes for name, value in _contents(c)]
    reads = frozenset(item for *_, value in code for item in _reads(value))
    return net.readout.weight.device.type, parts, _settings(net.encoder), frozenset(code), reads, _torch_code()


PLAIN = (int, float, str, type(None))


def _settings(module):
    """Numbers and words in a module, by which its code may go."""
    return tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, PLAIN) and k != "training"))


def _contents(kind):
    """(name, value) of all functions, numbers and words that stand in a class."""
    for name, value in vars(kind).items():
        found = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
        yield from ((name, v) for v in found if isinstance(v, PLAIN) or (callable(v) and not isinstance(v, type)))


def _reads(function, seen=()):
    """(name, value) of the module's values that a function reads, and of those that the functions among them read."""
    if not inspect.isfunction(function):
        return
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (int, float, str)):
            yield name, value
        elif inspect.isfunction(value) and value not in seen and not value.__module__.startswith("torch"):
            yield name, value
            yield from _reads(value, (*seen, value))


def _mark(kind):
    """The file that stands for a proof of this kind; None where the sources do not tell what runs."""
    device, parts, encoder, code, reads, torchs = kind
    found = [(module, f"{owner}.{name}", value) for module, owner, name, value in code]
    found += [("", name, value) for name, value in reads]
    functions = [(name, f) for _, name, f in found if callable(f)]
    if torchs != UNCHANGED_TORCH or not all(_as_written(name, f) for name, f in functions):
        return None  # replaced while running, or made by a function
    try:
        here = Path(__file__).parent
        files = {f.__code__.co_filename for _, f in functions} | {*map(str, here.glob("*.py")), str(here / "cpu.cpp")}
        texts = [Path(f).read_text(encoding="utf-8") for f in sorted(files)]
        names = sorted((module, name, repr(None if callable(value) else value)) for module, name, value in found)
        what = [torch.__version__, device, sorted(map(repr, parts)), encoder, names, texts]
        return cache_folder() / f"proved-{hashlib.sha256(repr(what).encode()).hexdigest()[:32]}"
    except (OSError, Unsupported):  # typed into an interpreter; no place to write
        return None


def _as_written(name, function):
    """Whether a function stands under this name in its file, and so is what the file's text says."""
    if not inspect.isfunction(function):
        return False
    return function.__qualname__ == name and {*function.__code__.co_freevars} <= {"__class__"}


def prove(net, attached):
    """None if engine and plain loop agree to 1e-9 in float64 on a batch of `net`'s own shape, else why not.

    Compared are voltages, gradients and running statistics, in training and in eval mode, on copies with gammas
    and running statistics of their own, so that every layer spikes. The net and the random generators stay as they are.
    """
    device, layers = net.readout.weight.device, net.layers()
    delay = sum(layer.lif.delay for layer in layers)
    dense = sum(s.N * layer.synapse.weight.numel() for s, layer in zip(shapes(net, 2, 1), layers, strict=True))
    steps = min(net.num_steps, max(3 + delay, min(12, int(WORK / dense))))
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(0)
            twin = _twin(net)
            images = torch.randn(2, *net.encoder.input_shape, dtype=torch.float64, device=device) * 1.5
            for training in (True, False):
                results = []
                for each in (copy.deepcopy(twin), attached(copy.deepcopy(twin), trusted=True)):
                    torch.manual_seed(1)
                    seen = images.clone().requires_grad_()
                    voltages = each.train(training).voltages(seen, steps)
                    loss = F.cross_entropy(voltages[-1], torch.zeros(2, dtype=torch.long, device=device))
                    (loss + voltages.sin().mean()).backward()
                    found = {f"gradient of {name}": p.grad for name, p in each.named_parameters()}
                    found |= dict(each.named_buffers())
                    results.append({"output": voltages.detach(), "gradient of the images": seen.grad} | found)
                if odd := next((name for name in results[0] if _differ(*(r[name] for r in results))), None):
                    return f"its {odd} is not what the net's own code computes"
    except Exception as error:  # the parts may be anybody's
        said = " ".join(str(error).split())[:120]
        return f"it could not be compared with the net's own code ({type(error).__name__}: {said})"
    return None


def _twin(net):
    """A float64 copy of a net, plain, without hooks, in which every layer spikes."""
    memo = {
        id(v): type(v)() for m in net.modules() for k, v in vars(m).items() if k.endswith("hooks") and v is not None
    }
    twin = copy.deepcopy(net, memo)
    twin.__class__ = plain_class(net)
    twin.double().requires_grad_(True)
    twin.encoder.straight_through = True
    ranges = {"bias": (-0.2, 0.4), "weight": (0.6, 1.6), "running_var": (0.2, 0.6), "running_mean": (-0.2, 0.2)}
    for layer in twin.layers():
        if not layer.norm.batch_norms(1):
            layer.synapse.weight.data *= 2.5
        for name, value in [*layer.norm.named_parameters(), *layer.norm.named_buffers()]:
            if (last := name.rpartition(".")[2]) in ranges:
                value.data.uniform_(*ranges[last])
    return twin


def _differ(a, b):
    if a is None or b is None:
        return a is not b
    return not torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE)
