"""The fused engine against the plain time loop of model.py: equal, for everything the nets can be."""

import contextlib
import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fused
import model
from fused import cpu as fused_cpu
from fused import engine
from model import ARCHS, SNN_VGG9_BNTT, SpikingVGG
from utill import SpikeMeter

# Narrow relatives of the VGGs, so that a float64 comparison takes milliseconds; registered for this file only.
TINY = {
    "tiny": ((8, "A", 12, 20, "A"), (24,)),
    "tiny_global": ((20, 8, "A", 12, "G"), (16, 12)),
    "tiny_fc": ((), (16, 8)),
    "tiny_conv": ((8, "A"), ()),
}


@pytest.fixture(autouse=True)
def tiny_archs(monkeypatch):
    for name, channels in TINY.items():
        monkeypatch.setitem(ARCHS, name, channels)


def make_net(arch="tiny", T=4, img_size=8, dtype=torch.float64, **options):
    """A net whose gammas differ and whose weights are large enough that every layer spikes."""
    torch.manual_seed(0)
    net = SpikingVGG(arch, T, img_size=img_size, num_cls=5, **options).to(dtype)
    for p in net.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.6, 1.6)
        elif options.get("norm") == "none":
            p.data *= 2.5
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            torch.nn.init.uniform_(buffer, 0.2, 0.6)
        elif name.endswith("running_mean"):
            torch.nn.init.uniform_(buffer, -0.2, 0.2)
    return net


def only_looks(hook):
    """A hook that the engine may call: it changes nothing and wants no gradient."""
    hook.only_looks = True
    return hook


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def run(net, images, labels, steps=None, seed=1):
    """Voltages, gradients and buffers after one forward and backward pass through every step's output."""
    net.zero_grad()
    torch.manual_seed(seed)
    with SpikeMeter(net, steps) as meter:
        voltages = net.voltages(images, steps)
    weights = torch.linspace(0.5, 1.5, len(voltages), dtype=voltages.dtype)
    loss = F.cross_entropy(voltages[-1], labels) + (weights[:, None, None] * voltages.sin()).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return voltages.detach(), gradients, dict(net.named_buffers()), meter.spikes


def assert_equal(plain, other, tolerance=1e-9):
    """All that `run` returns, to `tolerance`; None where None."""
    (v, grads, buffers, spikes), (v2, grads2, buffers2, spikes2) = plain, other
    torch.testing.assert_close(v2, v, rtol=tolerance, atol=tolerance)
    for name, grad in grads.items():
        if grad is None:
            assert grads2[name] is None, f"{name} has a gradient, the plain loop gives it none"
        else:
            assert grads2[name] is not None, f"{name} has no gradient"
            torch.testing.assert_close(
                grads2[name], grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name, buffer in buffers.items():
        torch.testing.assert_close(
            buffers2[name], buffer, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, counts in spikes.items():
        assert torch.equal(spikes2[name], counts), f"{name} spikes differently"


def assert_alive(net, result):
    """Every layer spiked, and every weight has a gradient that is not zero."""
    _, gradients, _, spikes = result
    for layer in net.layers():
        assert spikes[layer.name].sum() > 0, f"{layer.name} never spiked"
        assert gradients[f"{layer.name}.weight"].abs().max() > 0, f"{layer.name} has no gradient"


def compare(net, images, steps=None, save_memory=None, alive=True):
    labels = torch.arange(len(images)) % 5
    other = fused.attach(copy.deepcopy(net), save_memory)
    plain = run(net, images, labels, steps)
    if alive:
        assert_alive(net, plain)
    assert_equal(plain, run(other, images, labels, steps))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    arch=st.sampled_from(["tiny", "tiny_global", "tiny_fc", "tiny_conv"]),
    T=st.integers(6, 11),
    batch=st.integers(2, 5),
    img_size=st.integers(4, 11),
    leak=st.floats(0.3, 1.0),
    threshold=st.floats(0.5, 1.5),
    norm=st.sampled_from(["bntt", "bn", "none"]),
    spike_order=st.sampled_from(["integrate_first", "fire_first"]),
    encoding=st.sampled_from(["poisson", "poisson_binary", "direct"]),
    training=st.booleans(),
    save_memory=st.sampled_from([None, 1, 4]),
)
@example("tiny", 6, 3, 9, 0.9, 1.0, "bntt", "fire_first", "poisson", True, 4)
def test_equals_the_plain_loop(
    arch, T, batch, img_size, leak, threshold, norm, spike_order, encoding, training, save_memory
):
    options = dict(norm=norm, spike_order=spike_order, encoding=encoding, threshold=threshold, leak_mem=leak)
    net = make_net(arch, T, img_size, **options).train(training)
    images = torch.randn(batch, 3, img_size, img_size, dtype=torch.float64) * 1.5
    images = images.abs().clamp(max=1) if encoding == "poisson_binary" else images
    # without its batch's statistics a random net may fall silent; the whole VGGs below are all alive
    compare(net, images, save_memory=save_memory, alive=norm == "bntt" and training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spike_order", ["integrate_first", "fire_first"])
@pytest.mark.parametrize(
    ("arch", "img_size", "norm"),
    [
        ("vgg9", 8, "bntt"),
        ("vgg9", 8, "bn"),
        ("vgg9", 8, "none"),
        pytest.param("vgg11", 16, "bntt", marks=pytest.mark.slow),
    ],
)
def test_whole_vgg_equals_the_plain_loop(arch, img_size, norm, spike_order, training):
    net = make_net(arch, 12, img_size, norm=norm, spike_order=spike_order, threshold=0.8)
    images = torch.randn(2, 3, img_size, img_size, dtype=torch.float64) * 2
    if norm != "none":  # running statistics of this very batch, or eval mode falls silent
        for bn in batch_norms(net):
            bn.momentum = 1.0
        with torch.no_grad():
            net.train()(images)
        for bn in batch_norms(net):
            bn.momentum = 0.1
    compare(net.train(training), images)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("encoding", ["pixels", "pixels_permuted"])
def test_a_pixel_a_step_equals_the_plain_loop(encoding, training):
    net = make_net("tiny_fc", T=25, img_size=5, in_channels=1, encoding=encoding).train(training)
    compare(net, torch.rand(4, 1, 5, 5, dtype=torch.float64) * 2, alive=training)


def test_event_frames_equal_the_plain_loop():
    net = make_net("tiny", T=6, img_size=9, in_channels=2, encoding="frames")
    frames = torch.randint(0, 4, (3, 6, 2, 9, 9)).double()
    compare(net, frames)
    compare(net, frames, steps=4)


def test_first_steps_only():
    compare(make_net(T=9), torch.randn(3, 3, 8, 8, dtype=torch.float64), steps=4)


def test_an_output_layer_cut_into_pieces_equals_the_plain_loop(monkeypatch):
    monkeypatch.setattr(fused.engine, "READOUT_NUMBERS", 24 * 5)  # five rows of the 24 features at a time, of 3 x 4
    compare(make_net(T=4), torch.randn(3, 3, 8, 8, dtype=torch.float64))


@pytest.mark.slow
def test_a_thousand_steps():
    net = make_net("tiny_fc", T=1000, img_size=1)
    compare(net, torch.randn(3, 3, 1, 1, dtype=torch.float64) * 2, alive=True)


def test_deterministic_algorithms_need_no_cumsum(monkeypatch):
    """PyTorch refuses its cumsum on a GPU where algorithms must be deterministic."""
    net, images = make_net(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = run(copy.deepcopy(net), images, torch.tensor([1, 3]))
    fused.attach(net)
    monkeypatch.setattr(torch.Tensor, "cumsum", None)
    monkeypatch.setattr(engine, "NO_CUMSUM", ("cpu",))
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(expected, run(net, images, torch.tensor([1, 3])))
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_a_norm_says_is_made_on_the_net_s_device(monkeypatch):
    """What is made on the CPU and copied cannot be captured in a CUDA graph."""
    net, made, affine = make_net(norm="none").to("meta"), [], model.NoNorm.affine
    monkeypatch.setattr(model.NoNorm, "affine", lambda norm, T: made.append(affine(norm, T)) or made[-1])
    monkeypatch.setattr(engine, "backend", lambda device_type: SimpleNamespace(dtypes=(torch.float64,)))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    engine.Run(net, torch.empty(2, 3, 8, 8, device="meta", dtype=torch.float64), 4)
    assert {v.device.type for pair in made for v in pair} == {"meta"}


@pytest.mark.parametrize("images_too", [False, True])
@pytest.mark.parametrize("memory", [None, 2])
def test_the_first_layer_by_columns_is_the_convolution(monkeypatch, memory, images_too):
    """As on a GPU in 16 bit; where the images have a gradient it stays a convolution."""
    plain, images = make_net(encoding="direct"), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net, made, columns = fused.attach(copy.deepcopy(plain), save_memory=memory), [], engine.Run.columns
    monkeypatch.setattr(engine, "by_columns", lambda device_type, dtype, synapse: True)
    monkeypatch.setattr(engine.Run, "columns", lambda run, x: made.append(columns(run, x)) or made[-1])
    ours, theirs = (images.clone().requires_grad_(images_too) for _ in range(2))
    assert_equal(run(plain, theirs, torch.tensor([1, 3])), run(net, ours, torch.tensor([1, 3])))
    assert bool(made) != images_too
    if images_too:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_columns_are_for_few_channels_in_16_bit_on_a_gpu():
    few, many, linear = torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(4, 64, 3), torch.nn.Linear(9, 4)
    assert engine.by_columns("cuda", torch.bfloat16, few)
    others = [("cpu", torch.bfloat16, few), ("cuda", torch.float32, few)]
    others += [("cuda", torch.bfloat16, synapse) for synapse in (many, linear)]
    assert not any(engine.by_columns(*other) for other in others)


def test_a_step_that_cannot_be_a_graph_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    @contextlib.contextmanager
    def capture(*_, **__):  # as PyTorch's, whose end fails where what it captured did
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", capture)

    def step(images, labels):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    words = "asks something of the GPU, so it cannot be a graph: operation not permitted when stream is capturing"
    graphed = fused.GraphedStep(step, warm=0)
    for _ in range(2):  # nor is it one the next time
        with pytest.raises(fused.NoGraph, match=words):
            graphed(torch.zeros(2), torch.zeros(2))


def test_one_step():
    compare(make_net("tiny_conv", T=1), torch.randn(2, 3, 8, 8, dtype=torch.float64) * 2)


def test_late_gammas_of_fire_first_get_no_gradient():
    net = fused.attach(make_net(T=8, spike_order="fire_first"))
    gradients = run(net, torch.randn(3, 3, 8, 8, dtype=torch.float64) * 2, torch.arange(3))[1]
    layers = len(net.layers())
    for i, layer in enumerate(net.layers(), start=1):
        name = "bntt_fc" if layer.name.startswith("fc") else f"bntt{i}"
        has = [gradients[f"{name}.{t}.weight"] is not None for t in range(8)]
        assert has == [t < 8 - (layers - i + 1) for t in range(8)], layer.name


def test_no_grad_keeps_nothing_and_agrees():
    net = make_net(T=6).eval()
    other = fused.attach(copy.deepcopy(net))
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = net.voltages(images)
        torch.manual_seed(0)
        voltages = other.voltages(images)
    assert voltages.grad_fn is None
    torch.testing.assert_close(voltages, expected, rtol=1e-9, atol=1e-9)


def test_inference_in_blocks_of_time_agrees(monkeypatch):
    """Large batches run a few steps at a time: membranes are carried over, hooks see every step."""
    net = make_net(T=7).eval()
    other = fused.attach(copy.deepcopy(net))
    monkeypatch.setattr(fused.engine, "INFERENCE_BYTES", 3 * 2 * 64 * 8 * 8)  # three steps of the widest layer
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for each in (net, other):
        torch.manual_seed(0)
        with torch.no_grad(), SpikeMeter(each) as meter:
            results.append((each.voltages(images), meter.spikes))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-9, atol=1e-9)
    for name, counts in results[0][1].items():
        assert torch.equal(results[1][1][name], counts), name


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_runs_that_stop_early_are_counted_whole(engine):
    net = make_net(T=4).eval()
    net = fused.attach(net) if engine == "fused" else net
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad(), SpikeMeter(net) as meter:
        for steps in (2, 1, 2):
            net.voltages(images, steps)
    assert meter.images == 9
    assert meter.spikes["input"][:2].min() > 0
    assert meter.spikes["input"][2:].sum() == 0
    assert meter.operations()[2:].sum() == 0


def test_save_memory_shows_every_step_to_hooks_once():
    net = fused.attach(make_net(T=6), save_memory=2)
    neurons, synapses = [], []
    net.lif_conv1.register_forward_hook(only_looks(lambda module, inputs, output: neurons.append(len(output[0]))))
    net.conv2.register_forward_hook(only_looks(lambda *args: synapses.append(1)))
    net(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert neurons == [2, 2, 2]
    assert len(synapses) == 6


def spikes_and_gradients(net, images, labels, dtype=None):
    """All spikes of every layer as one flat tensor, and the gradient of every weight layer."""
    seen, handles = [], []
    for layer in net.layers():
        look = only_looks(lambda m, i, out, n=layer.name: seen.append((n, out[0].clone())))
        handles.append(layer.lif.register_forward_hook(look))
    torch.manual_seed(1)
    net.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = net(images)
    F.cross_entropy(logits, labels).backward()
    for handle in handles:
        handle.remove()
    spikes = torch.cat([s.flatten() for name, s in sorted(seen, key=lambda pair: pair[0])]) > 0
    return spikes, {layer.name: layer.synapse.weight.grad.flatten() for layer in net.layers()}


@pytest.fixture(scope="module")
def training_step():
    """Spikes and gradients of one VGG9 step at 32x32: float32 (summed channels-last, as the engine's are) and bf16."""
    torch.manual_seed(0)
    net = SNN_VGG9_BNTT(10)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    plain = copy.deepcopy(net).to(memory_format=torch.channels_last)
    other = fused.attach(copy.deepcopy(net))
    images_last = images.contiguous(memory_format=torch.channels_last)
    return {
        "plain float32": spikes_and_gradients(plain, images_last, labels),
        "plain bf16": spikes_and_gradients(net, images, labels, torch.bfloat16),
        "fused float32": spikes_and_gradients(other, images, labels),
        "fused bf16": spikes_and_gradients(other, images, labels, torch.bfloat16),
    }


def flipped(one, two):
    """Share of the spikes that differ."""
    return (one[0] != two[0]).float().mean().item()


def test_float32_training_step_flips_hardly_a_spike(training_step):
    """The net is chaotic: an order of summation is enough to flip spikes, so both sum in the same order here."""
    plain, other = training_step["plain float32"], training_step["fused float32"]
    assert plain[0].float().mean() > 0.1
    assert flipped(plain, other) <= 1e-4
    for name, gradient in plain[1].items():
        assert F.cosine_similarity(gradient, other[1][name], dim=0) > 0.999, name


def test_bf16_training_step_is_as_near_to_float32_as_the_plain_loop_is(training_step):
    reference = training_step["plain float32"]
    distance = {engine: flipped(reference, training_step[f"{engine} bf16"]) for engine in ("plain", "fused")}
    assert 0 < distance["fused"] <= 1.1 * distance["plain"]


def test_trained_fused_loads_into_plain():
    net = fused.attach(make_net(dtype=torch.float32))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    F.cross_entropy(net(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    optimizer.step()
    plain = SpikingVGG("tiny", 4, img_size=8, num_cls=5)
    plain.load_state_dict(net.state_dict())
    assert list(plain.state_dict()) == list(net.state_dict())


def test_attach_keeps_parameters_and_detach_restores_the_class():
    net = make_net()
    before = [id(p) for p in net.parameters()]
    assert [id(p) for p in fused.attach(net).parameters()] == before
    assert isinstance(net, SpikingVGG)
    assert type(fused.detach(net)) is SpikingVGG
    assert type(fused.detach(net)) is SpikingVGG


def test_attached_net_can_be_copied():
    net = fused.attach(make_net())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs = []
    for each in (net, copy.deepcopy(net)):
        torch.manual_seed(0)
        outputs.append(each.eval()(images))
    assert torch.equal(*outputs)


def test_logits_under_autocast_are_float32():
    net = fused.attach(make_net(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.voltages(torch.randn(2, 3, 8, 8)).dtype == torch.float32


def test_float64_net_stays_float64_under_autocast():
    net = make_net()
    other = fused.attach(copy.deepcopy(net))
    with torch.autocast("cpu", torch.bfloat16):
        compared = [run(each, torch.randn(2, 3, 8, 8).double(), torch.arange(2))[0] for each in (net, other)]
    assert compared[1].dtype == torch.float64


def test_backward_inside_autocast_is_the_same():
    images, gradients = torch.randn(2, 3, 8, 8), []
    for inside in (True, False):
        net = fused.attach(make_net(dtype=torch.float32))
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(images).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_empty_batch_gives_no_rows():
    net = fused.attach(make_net().eval())
    assert net.voltages(torch.zeros(0, 3, 8, 8, dtype=torch.float64)).shape == (4, 0, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="the symbol is that of GNU's OpenMP runtime")
def test_build_has_openmp():
    library = fused_cpu.compiled(Path(fused_cpu.__file__).with_name("cpu.cpp"))
    assert b"GOMP_parallel" in library.read_bytes()


def test_results_do_not_depend_on_the_number_of_threads():
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        passes, shape = fused_cpu.CpuPasses(), fused.Shape(4, 4, 8, 8, 20, 2, False, False, 0.9, 1.0, 0.3)
        torch.manual_seed(0)
        x, a, grad = torch.randn(shape.full), torch.rand(4, 20) + 0.5, torch.randn(shape.pooled)
        delta, sums = passes.lif_backward(x, shape, a, a, a, None, grad, None, False, 3)
        delta = passes.affine(delta, x, shape, a, a, a).clone()
        packed = torch.empty(shape.pooled, dtype=torch.uint8)
        spikes = passes.lif_forward(x, shape, a, a, None, False, packed, fresh=True)
        assert torch.equal(spikes, passes.unpack(packed, 0.25, torch.float32))
        results.append([delta, *sums, spikes, *passes.statistics(x, shape)])
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("save_memory", [None, 3])
@pytest.mark.parametrize("arch", ["tiny", "tiny_fc"])
@pytest.mark.parametrize("encoding", ["direct", "poisson"])
def test_the_gradient_of_the_images_is_that_of_the_plain_loop(encoding, arch, save_memory):
    net = make_net(arch, T=5, encoding=encoding)
    net.encoder.straight_through = True
    gradients = []
    for each in (net, fused.attach(copy.deepcopy(net), save_memory)):
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        F.cross_entropy(each(images.requires_grad_()), torch.arange(2)).backward()
        gradients.append(images.grad)
    assert (gradients[0] != 0).double().mean() > 0.5
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_second_backward_pass_is_refused():
    loss = fused.attach(make_net())(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_weights_changed_before_the_backward_pass_are_noticed():
    net = fused.attach(make_net())
    loss = net(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum()
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_batch_norm_uses_its_running_statistics():
    net = make_net(T=3)
    for layer in net.layers():
        layer.norm.eval()
    compare(net, torch.randn(2, 3, 8, 8, dtype=torch.float64) * 2, alive=False)


class OwnNorm(model.NoNorm):
    """A normalisation that does something else than it says of itself."""

    def forward(self, x, t0=0):
        return 2 * x


def test_unknown_part_is_named():
    net = make_net(norm=OwnNorm)
    with pytest.raises(fused.Unsupported, match="OwnNorm"):
        fused.attach(net)


def untracked(net):
    """Keep no running statistics in one BatchNorm."""
    net.bntt1[1].track_running_stats = False


@pytest.mark.parametrize(
    "change",
    [
        untracked,
        lambda net: setattr(net.bntt1[1], "momentum", 0.2),
        lambda net: setattr(net.bntt1[0], "bias", torch.nn.Parameter(torch.zeros(8))),
        lambda net: setattr(net, "pool_conv1", torch.nn.MaxPool2d(2)),
        lambda net: setattr(net, "pool_conv1", torch.nn.AvgPool2d(2, ceil_mode=True)),
        lambda net: setattr(net, "conv1", torch.nn.Conv2d(3, 8, 3, padding=1)),
        lambda net: setattr(net, "conv1", torch.nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False)),
    ],
)
def test_parts_of_another_kind_are_refused(change):
    net = make_net()
    change(net)
    with pytest.raises(fused.Unsupported, match="does not know"):
        fused.attach(net)


def test_too_large_a_global_pool_is_refused():
    """Packed spikes are one byte: 15 x 15 is the largest window they count."""
    assert fused.why_not(make_net("tiny_global", img_size=30)) is None
    assert "15x15" in fused.why_not(make_net("tiny_global", img_size=32))


def test_full_windows_are_counted():
    """A window of 15 x 15 neurons that all fire."""
    net = make_net("tiny_global", T=2, img_size=30, leak_mem=1.0, threshold=1e-3, norm="none")
    for p in net.parameters():
        p.data.abs_()
    images = torch.rand(2, 3, 30, 30, dtype=torch.float64) + 2
    compare(net, images, alive=False)
    assert run(net, images, torch.arange(2))[3]["conv3"].tolist() == [2 * 15 * 15 * 12] * 2


def test_half_precision_on_a_cpu_takes_the_plain_loop():
    net = fused.attach(make_net(dtype=torch.float16).eval())
    with torch.no_grad():
        assert net(torch.randn(2, 3, 8, 8).half()).isfinite().all()


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(fused_cpu.shutil, "which", lambda name: None)
    with pytest.raises(fused.Unsupported, match="C\\+\\+ compiler"):
        fused_cpu.CpuPasses()


def test_failed_build_is_named_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int main( { return 0; }")
    with pytest.raises(fused.Unsupported, match="could not be compiled"):
        fused_cpu.compiled(source)
    assert list((tmp_path / "bntt").iterdir()) == []


def test_build_is_cached_per_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    first = fused_cpu.compiled(source)
    stamp = first.stat().st_mtime_ns
    assert fused_cpu.compiled(source) == first
    assert first.stat().st_mtime_ns == stamp
    monkeypatch.setattr(fused_cpu, "_processor", lambda: "another processor")
    assert fused_cpu.compiled(source) != first


def test_engine_builds_here():
    """On the project's own CI a fallback to the plain loop is a failure."""
    assert fused.why_not(make_net()) is None


def test_pickle_of_a_detached_net_works():
    assert type(pickle.loads(pickle.dumps(fused.detach(fused.attach(make_net()))))) is SpikingVGG
