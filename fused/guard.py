"""What the engine asks before it runs a net: are these the parts that it knows, and was it proved on their like?

`why_not` goes by what the parts are and say, and is cheap enough to be asked at every call. `prove` compares engine and
plain loop in float64: once for each kind of net and each state of the source, and the answer is remembered.
"""

import copy
import functools
import hashlib
import inspect
import itertools
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

import baselines
import model
from fused import snapshot
from fused.common import Unsupported, cache_folder
from fused.engine import MAX_POOL, backend, shapes
from fused.snapshot import settings_of
from model import LIF, SpikingVGG

DESCRIPTION = ("batch_norms", "gamma", "affine")  # by which a norm says what it is, besides per_step
TIME = ("stream", "output_currents", "_currents", "layers", "readout")  # in whose place the engine puts itself
TOLERANCE = 1e-9
ALIKE = 64  # time-steps of a proof where none has a norm of its own: a converted net may have thousands
LEARNT = (-2.0, 0.02, 3.0)  # what a neuron may learn: values that a proof gives it
WORK = 1e9  # multiply-adds of one forward pass of a proof: of seconds in all


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
    mine = [vars(net), *(vars(c) for c in type(net).__mro__ if "is_fused" not in vars(c))]
    for name in TIME:
        if next(names[name] for names in mine if name in names) is not inspect.getattr_static(SpikingVGG, name):
            return f"the fused engine does not know a net with a `{name}` of its own"
    if nn_module._has_any_global_hook():
        return "the fused engine calls no hooks that are set for all modules"
    if not (layers := net.layers()):
        return "the fused engine does not know a net without neurons"
    described = [layer.norm.batch_norms(net.num_steps) for layer in layers if _describes_itself(layer.norm)]
    norms = [{id(bn): bn for bn in found} for found in described]
    if len({id(layer.norm) for layer in layers}) < len(layers) or len(set().union(*norms)) < sum(map(len, norms)):
        return "the fused engine does not know layers that share a normalisation"
    buffers = [bn._buffers.get(key) for found in norms for bn in found.values() for key in STATISTICS]
    buffers = [*map(id, filter(torch.is_tensor, buffers))]
    if len({*buffers}) < len(buffers):
        return "the fused engine does not know layers that share running statistics"
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
    shared, beta = len({*map(id, norms)}), hasattr(norm, "beta")
    known = not norms or norm.training == norms[0].training
    known = known and (not norms or _knows_batch_norms(norms[: 1 if shared == 1 else None], beta, synapse))
    if not known or shared not in (0, 1, num_steps):
        return f"does not know the BatchNorms of {name}: of another type, not alike, changed, or with hooks"
    if any(type(child) not in BATCH_NORMS for child in norm._modules.values()):
        return f"does not know what else is in the normalisation {type(norm).__name__}"
    if save_memory and not norm.per_step:
        return f"cuts time into blocks to save memory, and {type(norm).__name__} takes its statistics over all of it"
    if not _knows_neuron(lif, synapse.weight):
        return f"does not know the neuron {type(lif).__name__}" + (" as it was changed" if type(lif) is LIF else "")
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
    if synapse.weight.shape[2:] != getattr(synapse, "kernel_size", ()):
        return f"does not know the weight layer {name}: its weight is of another size than it says"
    one, other = synapse.weight, readout.weight
    if (one.dtype, one.device) != (other.dtype, other.device):
        return "runs weights of one dtype on one device"
    return _changed(synapse, f"weight layer {name}", called=True)


def _short(module):
    ours = type(module).__module__.startswith("torch.nn")
    return type(module).__name__ + (f"({module.extra_repr()})" if ours else "")


def _changed(module, what, called=False):
    """Why a module of a known kind is not what its class says, or None. called: if hooks only look, they are called."""
    if _touched(module):
        return f"does not know the {what}: a method of it was replaced"
    return f"does not call the hooks of the {what}" if _hooks(module, called) else None


def _touched(module):
    """Whether a method was replaced in this one module."""
    kind, names = type(module), vars(module).keys()
    return "_compiled_call_impl" in names or any(callable(getattr(kind, n, None)) for n in names - _own_names(kind))


@functools.cache
def _own_names(kind):
    """Names that every module has, which are not methods."""
    return frozenset(vars(nn.Module())) | {"weight", "bias"}


def _hooks(module, called=False):
    """Whether a module has hooks that the engine does not call. Of some it calls the forward hooks that only look."""
    forward, looking = module._forward_hooks, called and not module._forward_hooks_with_kwargs
    if forward and not (looking and all(getattr(hook, "only_looks", False) for hook in forward.values())):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _plain_weight(module):
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.layout == torch.strided


def _describes_itself(norm):
    """Whether a norm of our own files says what it is. Those of other files run plain: they may read anything."""
    said = all(hasattr(norm, name) for name in (*DESCRIPTION, "per_step", "gamma_per_step"))
    return said and _is_ours(norm) and not norm._buffers


def _is_ours(module):
    """Whether its class is one of model.py or baselines.py, of which there is a snapshot."""
    kind = type(module)
    return any(vars(file).get(kind.__name__) is kind for file in (model, baselines))


NEURON_CODE = ("forward", "__call__", "_call_impl", "__getattr__", "__getattribute__", "train")
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d
STATISTICS = "running_mean", "running_var"
BATCH_NORM_NAMES = len(vars(nn.BatchNorm1d(1)))
BATCH_NORM_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _knows_batch_norms(norms, beta, synapse):
    """Whether a layer's BatchNorms are torch's own, alike and unchanged. Sequential MNIST asks of 1,568 at every call:
    hence what each has is read from its `vars`, and compared as sets."""
    parts = [vars(bn) for bn in norms]
    settings = {(part["eps"], part["momentum"], part["training"], part["track_running_stats"]) for part in parts}
    (eps, momentum, _, tracked), *others = settings
    if others or not tracked or not type(eps) is type(momentum) is float or eps <= 0:
        return False
    tensors = [(part["_parameters"]["weight"], *map(part["_buffers"].get, STATISTICS)) for part in parts]
    if None in {value for row in tensors for value in row}:
        return False
    buffers = [v for _, *row in tensors for v in row]
    if len({v.data_ptr() for v in buffers}) < len(buffers) or any(v._is_view() for v in buffers):  # may share memory
        return False
    kinds, dtype = {(type(w), w.layout, w.dtype, m.dtype, v.dtype) for w, m, v in tensors}, synapse.weight.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return (
        {*map(type, norms)} == {nn.BatchNorm2d if isinstance(synapse, nn.Conv2d) else nn.BatchNorm1d}
        and any(kinds == {(nn.Parameter, torch.strided, d, d, d)} for d in (dtype, wide))
        and {part["_parameters"]["bias"] is not None for part in parts} == {beta}
        and all(part["_buffers"]["num_batches_tracked"] is not None for part in parts)
        and not any(part[hooks] for hooks in BATCH_NORM_HOOKS for part in parts)
        and all(len(part) == BATCH_NORM_NAMES or not _touched(bn) for bn, part in zip(norms, parts, strict=True))
    )


def _knows_neuron(lif, weight):
    """Whether a neuron goes through time by LIF's own code, its leak and threshold are numbers or learnt ones, and a
    class of our own files says how a step goes."""
    if not _is_ours(lif) or lif._buffers or lif._modules:
        return False
    if any(inspect.getattr_static(type(lif), n, None) is not inspect.getattr_static(LIF, n, None) for n in NEURON_CODE):
        return False
    if any(hasattr(type(lif), name) for name in ("spike_order", "delay", "alpha")):  # may be code
        return False
    constants = [getattr(lif, "alpha", model.SURROGATE_ALPHA)]
    for name in ("leak", "threshold"):
        value = getattr(lif, name)
        if type(value) not in (torch.Tensor, nn.Parameter):
            constants.append(vars(lif).get(name))  # None where code computes it
        else:
            number = value.shape in ((), (1,)) and value.is_floating_point() and value.device == weight.device
            if not number or value.ndim and value.dtype != weight.dtype:  # a product of both would be of the wider one
                return False
    numbers = all(type(x) in (int, float) and 0 < x < float("inf") for x in constants)
    known = numbers and type(inspect.getattr_static(lif, "hard_reset", False)) is bool
    return known and lif.delay == (lif.spike_order == LIF.ORDERS[1])


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
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    ):
        return "the fused engine cannot be traced or transformed"
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True):
        return "the fused engine keeps what no hook on saved tensors sees (to save memory, use save_memory)"
    if type(images) is not torch.Tensor or images.layout != torch.strided or not len(images):
        return "the fused engine takes plain tensors of images"
    return None


# ---- Proof ---------------------------------------------------------------------------------------------

_PROVED = {}  # {kind of net: None, or why it failed}
ENGINE = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).with_name("cpu.cpp")]
ENGINE = [path.read_text(encoding="utf-8") for path in ENGINE]  # of which a proof is
CODE = {}  # of this import; none where it cannot be told
with suppress(Exception):
    CODE = snapshot.code()


def disproved(net, attached):
    """None if engine and plain loop agree on nets of this kind, else why not; proved first if that is not known yet.

    attached: makes a net run fused without asking.
    """
    try:
        now, kind = snapshot.code(), _kind(net)
    except Exception as error:  # what code reads may be anything
        return str(error) if isinstance(error, Unsupported) else f"its code cannot be compared ({type(error).__name__})"
    if changed := [name for name in {**CODE, **now} if CODE.get(name) != now.get(name)]:
        return f"{changed[0]} was replaced"
    if kind not in _PROVED:
        mark = _mark(kind)
        if mark is not None and mark.exists():
            _PROVED[kind] = None
        else:
            try:
                _PROVED[kind] = prove(net, attached)
            except Unsupported as error:  # here and now, which says nothing of the kind
                return str(error).removeprefix("the fused engine ")
            if mark is not None and _PROVED[kind] is None:
                with suppress(OSError):
                    mark.touch()
    return _PROVED[kind]


def _kind(net):
    """What of a net decides which code runs: its kinds of parts, in order (its encoder is called as it is).

    Raises `Unsupported` where one of them holds what may change unseen.
    """
    parts = (
        (type(norm), settings_of(norm), type(lif), settings_of(lif), *lif._parameters, type(pool), type(synapse),
         *(getattr(part, "kernel_size", None) for part in (pool, synapse)))
        for _, synapse, norm, lif, pool in net.layers()
    )  # fmt: skip
    alphas = snapshot.fixed("SURROGATE_ALPHA", (model.SURROGATE_ALPHA, baselines.SURROGATE_ALPHA))
    where = net.readout.weight.device.type, net.num_steps, tuple(net.encoder.input_shape)
    return *where, alphas, tuple(part for part, _ in itertools.groupby(parts))


def _mark(kind):
    """The file that stands for a proof of this kind; None where there is no place to write."""
    text = snapshot.text((torch.__version__, sys.version, *ENGINE, *CODE.items(), kind))
    with suppress(Unsupported):
        return cache_folder() / f"proved-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    return None


def prove(net, attached):
    """None if engine and plain loop agree to 1e-9 in float64, else why not; `Unsupported` where it cannot be told now.

    Compared are voltages, gradients (of the images too) and running statistics: of the net's own shape in training over
    its first steps; of a few of its channels over all steps (or ALIKE ones), in training and in eval mode, with larger
    numbers of both signs. That on copies, so that the net and the random generators stay as they are.
    """
    device, layers, T = net.readout.weight.device, net.layers(), net.num_steps
    delay = sum(layer.lif.delay for layer in layers)
    dense = sum(s.N * layer.synapse.weight.numel() for s, layer in zip(shapes(net, 2, 1), layers, strict=True))
    if not any(layer.norm.gamma_per_step for layer in layers):
        T = min(T, ALIKE + delay)
    steps = min(T, max(2 + delay, min(12, int(WORK / dense))))
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)  # the net's own code may have an operation without one
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(0)
            twins = [(_twin(net), steps, (True,)), (_narrow(_twin(net, 4.0)), T, (True, False))]
            if any(layer.lif._parameters for layer in layers):
                few = min(T, 12 + delay)  # a membrane may grow without end
                twins += [(_narrow(_twin(net, 1.0, learnt)), few, (True,)) for learnt in LEARNT]
            for twin, count, modes in twins:
                if odd := _first_difference(twin, count, modes, attached):
                    return f"its {odd} is not what the net's own code computes"
    except Unsupported:
        raise
    except Exception as error:  # the parts may be anybody's
        said = " ".join(str(error).split())[:120]
        return f"it could not be compared with the net's own code ({type(error).__name__}: {said})"
    finally:
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
    return None


def _first_difference(net, steps, modes, attached):
    """What of the results of a net, run fused, is not as run plain; None if all is."""
    device = net.readout.weight.device
    images = torch.randn(2, *net.encoder.input_shape, dtype=torch.float64, device=device) * 1.5
    for training in modes:
        results = []
        for each in (copy.deepcopy(net), attached(copy.deepcopy(net), trusted=True)):
            torch.manual_seed(1)
            seen = images.clone().requires_grad_()
            voltages = each.train(training).voltages(seen, steps)
            loss = F.cross_entropy(voltages[-1], torch.zeros(2, dtype=torch.long, device=device))
            named = dict(each.named_parameters())
            found = torch.autograd.grad(loss + voltages.sin().mean(), [seen, *named.values()], allow_unused=True)
            names = (f"gradient of {name}" for name in ("the images", *named))
            gradients = dict(zip(names, found, strict=True))
            results.append({"output": voltages.detach()} | gradients | dict(each.named_buffers()))
        if odd := next((name for name in results[0] if _differ(*(r[name] for r in results))), None):
            return odd
    return None


def _twin(net, size=1.0, learnt=0.85):
    """A float64 copy of a net, plain, without hooks, in which every layer spikes. size: of its gammas and betas.
    learnt: about what its neurons' parameters are, whatever they are in the net, which the kind of it does not tell."""
    memo = {
        id(v): type(v)() for m in net.modules() for k, v in vars(m).items() if k.endswith("hooks") and v is not None
    }
    twin = copy.deepcopy(net, memo)
    twin.__class__ = plain_class(net)
    twin.double().requires_grad_(True)
    synapse, side = twin.layers()[0].synapse, twin.encoder.size
    channels = synapse.in_channels if isinstance(synapse, nn.Conv2d) else synapse.in_features // side**2
    twin.encoder = model.ENCODERS["frames"](twin.num_steps, channels, side)
    low = 0.6 if size == 1 else -1.6 * size
    ranges = {"bias": (-0.2 * size, 0.4 * size), "weight": (low, 1.6 * size), "running_var": (0.2, 0.6)}
    ranges["scale"] = (0.6, 1.6)  # of a time-step
    for layer in twin.layers():
        for value in layer.lif.parameters():
            value.data.uniform_(0.9, 1.1).mul_(learnt)
        if not layer.norm.batch_norms(1):
            layer.synapse.weight.data *= 2.5 * size * torch.as_tensor(layer.lif.threshold).detach()
        for name, value in [*layer.norm.named_parameters(), *layer.norm.named_buffers()]:
            if value.is_floating_point():
                value.data.uniform_(*ranges.get(name.rpartition(".")[2], (-0.2, 0.2)))
    return twin


def _narrow(net, width=8):
    """Leave `width` channels of each layer of a net, in place, and return it."""
    channels = net.encoder.input_shape[-3]
    for layer in net.layers():
        features, keep = len(layer.synapse.weight), min(width, len(layer.synapse.weight))
        for name, value in vars(layer.norm).items():
            if value == features and type(value) is int:
                setattr(layer.norm, name, keep)
        for value in [*layer.norm.parameters(), *layer.norm.buffers()]:
            if value.shape[-1:] == (features,):
                value.data = value.data[..., :keep].contiguous()
        _cut(layer.synapse, keep, channels, width)
        channels = features
    _cut(net.readout, len(net.readout.weight), channels, width)
    return net


def _cut(synapse, outputs, channels, width):
    """Leave the first outputs of a synapse, and `width` of the `channels` of its input."""
    weight = synapse.weight.data.unflatten(1, (channels, -1))[:outputs, : min(width, channels)]
    synapse.weight.data = weight.flatten(1, 2).contiguous()


def _differ(a, b):
    if a is None or b is None:
        return a is not b
    return not torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE)
