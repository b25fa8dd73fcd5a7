"""The engine computes the net that it is given: what was changed, before or after attach, runs plain, with a reason."""

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from conftest import ROOT
from test_changes import IMAGES, LABELS, assert_same, one_process, two_steps
from test_fused import make_net, tiny_archs  # noqa: F401 (a fixture)
from torch.nn.utils import parametrizations

import baselines
import encoders
import fused
import model
from baselines import PLIF, HardReset, LearntLIF, TdBN
from encoders import DirectEncoder
from fused import guard, snapshot
from fused.common import cache_folder
from model import LIF, SpikingVGG
from utill import SpikeMeter


def test_a_proof_leaves_net_and_random_generator_as_they_are():
    net = make_net()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert guard.prove(net, fused.attached) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_proof_may_use_any_algorithm(monkeypatch):
    """On a GPU the plain loop of a net with a global pool has an operation that is not deterministic."""
    seen = []
    monkeypatch.setattr(
        guard, "_first_difference", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    torch.use_deterministic_algorithms(True)
    try:
        assert guard.prove(make_net(), fused.attached) is None
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, False]


def test_a_penalty_on_spikes_seen_by_a_hook_has_its_gradient():
    gradients = []
    for attach in (lambda net: net, fused.attach):
        net, rates = attach(make_net()), []
        net.lif_conv1.register_forward_hook(lambda m, i, output, rates=rates: rates.append(output[0].mean()))
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (net(IMAGES).square().mean() + sum(rates)).backward()
        gradients.append(net.conv1.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_the_spike_meter_does_not_send_a_net_to_the_plain_loop():
    net = fused.attach(make_net())
    with SpikeMeter(net), warnings.catch_warnings():
        warnings.simplefilter("error")
        net(IMAGES)


@pytest.mark.parametrize("save", ["torch.save", "pickle"])
def test_an_attached_net_is_saved_as_the_plain_net(save):
    net, file = fused.attach(make_net()), io.BytesIO()
    if save == "torch.save":
        torch.save(net, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = pickle.loads(pickle.dumps(net))
    assert type(loaded) is SpikingVGG
    assert_same(two_steps(net), two_steps(loaded))


def test_a_copy_of_an_attached_net_is_attached():
    assert isinstance(copy.deepcopy(fused.attach(make_net())), fused.FusedNet)


def test_a_net_with_voltages_of_its_own_is_asked_for_them():
    class Mine(SpikingVGG):
        def voltages(self, images, steps=None):
            return super().voltages(images, steps) * 0 + 7

    net = Mine("tiny", 4, img_size=8, num_cls=5).double()
    assert (fused.attach(net)(IMAGES) == 7 / 4).all()


def test_an_attached_net_is_exported_as_the_plain_net():
    net = fused.attach(make_net(encoding="direct", dtype=torch.float32).eval())
    exported = torch.export.export(net, (IMAGES.float(),))
    torch.testing.assert_close(exported.module()(IMAGES.float()), fused.detach(net)(IMAGES.float()))


def test_statistics_are_updated_for_an_averaged_net():
    nets = [make_net(), fused.attach(make_net())]
    for net in nets:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.optim.swa_utils.update_bn([IMAGES, -IMAGES], net)
    for name, buffer in nets[0].named_buffers():
        torch.testing.assert_close(dict(nets[1].named_buffers())[name], buffer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["bntt", "bn"])
def test_layers_that_share_a_norm_are_declined(norm):
    net = make_net("tiny_global", norm=norm)
    net.bntt2 = net.bntt2
    for layer in net.layers()[1:]:
        setattr(net, net._norms[layer.name], net.bntt2)
    assert "share a normalisation" in fused.why_not(net)


def test_an_encoder_that_learns_unseen_has_its_gradient():
    class Scaled(DirectEncoder):
        def forward(self, images, steps, t0=0):
            return factor * super().forward(images, steps, t0)

    gradients = []
    for attach in (lambda net: net, fused.attach):
        factor = torch.full((), 2.0, dtype=torch.float64)
        net = attach(make_net(encoding=Scaled)).eval()
        factor.requires_grad_()
        net(IMAGES).square().sum().backward()
        gradients.append(factor.grad)
    assert gradients[0].abs() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_the_module_in_ddp_answers(tmp_path):
    with one_process(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(fused.attach(make_net()))
        assert wrapped.module.voltages(IMAGES).requires_grad


def test_asking_leaves_the_state_of_a_parametrised_layer_as_it_is():
    net = make_net()
    parametrizations.spectral_norm(net.conv2)
    before = copy.deepcopy(net.state_dict())
    assert fused.why_not(net) is not None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_half_precision_net_says_that_it_runs_plain():
    net = fused.attach(make_net()).half()
    with pytest.warns(UserWarning, match="runs plain: the fused engine does not compute in torch.float16"):
        net(IMAGES.half())


def test_what_a_stream_yields_may_be_changed():
    nets = [make_net().eval(), fused.attach(make_net()).eval()]
    found = []
    for net in nets:
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(torch.cat([voltages.div_(t + 1) for t, voltages in enumerate(net.stream(IMAGES, block=1))]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 3])
def test_a_stream_in_training_has_the_blocks_of_the_plain_loop(block):
    found = []
    for attach in (lambda net: net, fused.attach):
        net = attach(make_net(norm=TdBN))
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            voltages = list(net.stream(IMAGES, block=block))
        found.append({"blocks": torch.tensor([len(v) for v in voltages]), **dict(net.named_buffers())})
    assert_same(*found)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_changes_nothing(device):
    net, found = fused.attach(make_net()), []
    for context in (nullcontext(), torch.device(device)):
        torch.manual_seed(0)
        with context:
            found.append(net.eval()(IMAGES))
    assert torch.equal(*found)


@pytest.mark.parametrize("where", ["weight", "gamma", "image"])
def test_a_nan_spreads_as_in_the_plain_loop(where):
    found = []
    for attach in (lambda net: net, fused.attach):
        net, images = attach(make_net(encoding="direct")), IMAGES.clone()
        place = {"weight": net.conv2.weight, "gamma": net.bntt2[1].weight, "image": images}[where]
        place.data.flatten()[3] = float("nan")
        torch.manual_seed(0)
        F.cross_entropy(net(images), LABELS).backward()
        values = [p.grad for p in net.parameters()] + list(net.buffers())
        found.append([bool(value.isnan().any()) for value in values])
    assert True in found[0]
    assert found[0] == found[1]


# ---- Found by an attack on the engine ------------------------------------------------------------


def both(build, run):
    """What run(net) gives of a net as it is, and of one that is attached."""
    found = []
    for attach in (lambda net: net, fused.attach):
        net = attach(build())
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(run(net))
    return found


def test_a_gradient_of_a_gradient_is_one_clear_error():
    """Also of a loss that is linear in the output, as that of a gradient penalty."""
    net, images = fused.attach(make_net(encoding="direct")), IMAGES.clone().requires_grad_()
    loss = net(images).sum()
    with pytest.raises(RuntimeError, match=r"no gradients of gradients: fused.detach\(net\) makes it run plain"):
        torch.autograd.grad(loss, images, create_graph=True)


@pytest.mark.parametrize("side", [1, 5])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_weight_of_another_size_than_its_layer_says_runs_plain(side, when):
    def change(net):
        torch.manual_seed(1)
        weight = torch.randn(12, 8, side, side, dtype=torch.float64)
        net.conv3.weight = nn.Parameter(weight)

    assert fused.why_not(make_net("tiny_global")) is None  # its kind is proved
    net = make_net("tiny_global")
    nets = [copy.deepcopy(net), fused.attach(net) if when == "after" else net]
    for each in nets:
        change(each)
    assert "another size" in fused.why_not(nets[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(two_steps(nets[0]), two_steps(nets[1]))


def test_a_proof_is_of_the_order_of_layers_too():
    def build(which, features):
        net = make_net("tiny_global", T=6, spike_order="fire_first")
        setattr(net, which, TdBN(6, features, True).double())
        return net

    assert fused.why_not(build("bntt1", 20)) is None
    found = both(lambda: build("bntt2", 8), two_steps) if fused.why_not(build("bntt2", 8)) is None else None
    if found:
        assert_same(*found)


def test_a_stream_has_the_block_that_is_asked_for_where_memory_is_saved():
    net = fused.attach(make_net().eval(), save_memory=2)
    with torch.no_grad():
        assert [len(voltages) for voltages in net.stream(IMAGES, block=1)] == [1] * 4


@pytest.mark.parametrize("block", [None, 1])
def test_statistics_over_all_steps_are_taken_at_once_where_norms_train_alone(block):
    def run(net):
        net.eval()
        for layer in net.layers():
            layer.norm.train()
        with torch.no_grad():
            voltages = torch.cat(list(net.stream(IMAGES, **{"block": block} if block else {})))
        return {"voltages": voltages, **dict(net.named_buffers())}

    assert_same(*both(lambda: make_net(norm=TdBN), run))


@pytest.mark.parametrize(("memory", "shape", "T"), [(2, (4, 3, 8, 8), 4), (None, (4, 1, 8, 8), 1)])
def test_images_that_change_before_the_backward_pass_change_no_gradient(memory, shape, T):
    gradients, images = [], torch.randn(shape, dtype=torch.float64)
    for changed in (False, True):
        net, seen = fused.attach(make_net(T=T, encoding="direct", in_channels=shape[1]), memory), images.clone()
        loss = F.cross_entropy(net(seen), LABELS)
        if changed:
            seen.zero_()
        loss.backward()
        gradients.append(net.conv1.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("norm", ["bntt", "bn", TdBN])
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_firing_first_what_no_step_reaches_has_no_gradient(norm, steps):
    def run(net):
        images = IMAGES.clone().requires_grad_()
        F.cross_entropy(net(images, steps), LABELS).backward()
        return {"images": images.grad, **{name: p.grad for name, p in net.named_parameters()}}

    assert_same(*both(lambda: make_net(T=8, spike_order="fire_first", encoding="direct", norm=norm), run))


@pytest.mark.parametrize(
    "value", [torch.ones(1), object(), nn.Identity(), [torch.ones(1)]], ids=lambda value: type(value).__name__
)
def test_what_may_change_unseen_makes_a_net_run_plain(value, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model, "SLOPE", value, raising=False)
        assert fused.why_not(make_net()).endswith(f"model.SLOPE is a {type(value).__name__}, which may change unseen")
    net = make_net()
    net.bntt1.slope = value if not isinstance(value, nn.Module) else {}
    assert fused.why_not(net).endswith("which may change unseen")


def test_a_package_that_model_py_uses_makes_a_net_run_plain(monkeypatch):
    monkeypatch.setattr(model, "yaml", yaml, raising=False)
    assert fused.why_not(make_net()) == "the fused engine does not fit this net: model.yaml is of another file"


@pytest.mark.parametrize(
    "left",
    [torch.tensor([True, False, True, False]), slice(0, 2), [3, 0], torch.tensor([], dtype=torch.long)],
    ids=["mask", "slice", "list", "none"],
)
def test_images_leave_a_stream_by_any_index(left):
    def run(net):
        stream = net.eval().stream(IMAGES, block=1)
        with torch.no_grad():
            return {"first": next(stream), "second": stream.send(left), "third": next(stream)}

    assert_same(*both(make_net, run))


def test_wider_layers_than_a_norm_knows_run_plain():
    def build():
        net = make_net(norm="none")
        net.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False).double()
        net.conv2 = nn.Conv2d(16, 12, 3, padding=1, bias=False).double()
        return net

    assert fused.why_not(make_net(norm="none")) is None
    net = make_net(norm="none")
    fused.attach(net)
    torch.manual_seed(0)
    net.conv1, net.conv2 = build().conv1, build().conv2
    with pytest.warns(UserWarning, match="runs plain: .* NoNorm describes itself as "):
        net(IMAGES)


def test_a_net_without_neurons_runs_plain(monkeypatch):
    monkeypatch.setitem(model.ARCHS, "linear", ((), ()))
    assert "without neurons" in fused.why_not(make_net("linear", encoding="direct"))


def test_gradients_have_the_memory_format_of_their_parameters():
    net = fused.attach(make_net())
    gradients = torch.autograd.grad(F.cross_entropy(net(IMAGES), LABELS), list(net.parameters()))
    assert all(gradient.is_contiguous() for gradient in gradients)


class Stateful(SpikingVGG):
    """Drops what cannot be pickled, and has a method by a name of the engine's."""

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "callback"}

    def _run(self):
        return 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_net_is_copied_by_its_own_state(copied):
    net = Stateful("tiny", 4, img_size=8, num_cls=5).double()
    net.callback = lambda: None
    fused.attach(net)
    assert net._run() == 3
    assert not hasattr(copied(net), "callback")
    assert isinstance(net, fused.FusedNet)


@pytest.mark.parametrize("encoding", ["poisson", "direct"])
@pytest.mark.parametrize("norm", ["bntt", "none", TdBN])
def test_every_layer_of_a_net_that_a_proof_looks_at_spikes(encoding, norm):
    """Its images are frames of both signs, whatever the net's encoder; its gammas near 1."""
    net = make_net(norm=norm, encoding=encoding)
    twin = guard._twin(net)
    torch.manual_seed(0)
    with SpikeMeter(twin) as meter, torch.no_grad():
        twin(torch.randn(2, *twin.encoder.input_shape, dtype=torch.float64) * 1.5)
    assert all(rate > 0.02 for rate in meter.rates().values())
    gammas = torch.cat([gamma.flatten() for gamma in twin.gammas().values()] or [torch.ones(1)])
    assert 0.5 < gammas.min() <= gammas.max() < 1.7


@pytest.mark.parametrize(
    "what", ["static method", "method", "default", "class attribute", "helper", "constant", "property", "torch"]
)
def test_code_that_was_replaced_runs_plain(what, monkeypatch):
    """As an editor's autoreload does, which puts other code into the functions that are there."""
    if what == "static method":
        name, code = "SurrogateSpike.backward", (lambda ctx, grad: grad).__code__.replace(co_filename=model.__file__)
        monkeypatch.setattr(model.SurrogateSpike.backward, "__code__", code)
    elif what == "method":
        name, code = "LIF.fire", (lambda self, u: (u > 1).double()).__code__.replace(co_filename=model.__file__)
        monkeypatch.setattr(LIF.fire, "__code__", code)
    elif what == "default":
        name = "LIF.forward"
        monkeypatch.setattr(LIF.forward, "__defaults__", (0.0,))
    elif what == "class attribute":
        name = "BNTT.per_step"
        monkeypatch.setattr(model.BNTT, "per_step", 1)
    elif what == "helper":
        name = "model.each_step"
        monkeypatch.setattr(model, "each_step", model.choose)
    elif what == "constant":
        name = "model.BN_EPS"
        monkeypatch.setattr(model, "BN_EPS", 0.1)
    elif what == "property":
        name = "PLIF.leak"
        monkeypatch.setattr(PLIF, "leak", LearntLIF.threshold)
    else:
        name = "torch.stack"
        monkeypatch.setattr(torch, "stack", torch.cat)
    assert fused.why_not(make_net()) == f"the fused engine does not fit this net: {name} was replaced"


def test_a_remembered_proof_is_of_one_t_one_alpha_and_one_code(monkeypatch):
    shipped = guard._mark(guard._kind(make_net()))
    assert guard._mark(guard._kind(make_net())) == shipped is not None
    assert guard._mark(guard._kind(make_net(T=5))) != shipped
    for name, value in (("code", guard.CODE | {"LIF.fire": snapshot.fixed("", LIF.step)}), ("alpha", 0.7)):
        with monkeypatch.context() as patch:
            patch.setattr(guard, "CODE", value) if name == "code" else patch.setattr(model, "SURROGATE_ALPHA", value)
            assert guard._mark(guard._kind(make_net())) != shipped


def test_a_proof_is_found_again_by_another_process():
    script = "import torch, fused.guard as g, model; print(g._mark(g._kind(model.SNN_VGG9_BNTT(num_steps=2))))"
    found = [subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True) for _ in range(2)]
    assert found[0] == found[1] != "None\n"


# ---- Found by a second attack ----------------------------------------------------------------------


class Upwards(DirectEncoder):
    """Gives larger maps than it says."""

    def forward(self, images, steps, t0=0):
        return super().forward(F.interpolate(images, (12, 12)), steps, t0)


@pytest.mark.parametrize("how", ["stream", "memory"])
def test_an_encoder_may_give_another_size_than_it_says(how):
    def run(net):
        if how == "stream":
            with torch.no_grad():
                return dict(enumerate(net.eval().stream(IMAGES, block=1)))
        if isinstance(net, fused.FusedNet):
            fused.attach(net, 2)
        return two_steps(net)

    assert_same(*both(lambda: make_net("tiny_global", encoding=Upwards), run))


def test_a_pool_larger_than_a_byte_can_count_is_refused():
    class Huge(DirectEncoder):
        def forward(self, images, steps, t0=0):
            return super().forward(F.interpolate(images, (48, 48)), steps, t0)

    net = fused.attach(make_net("tiny_global", encoding=Huge))
    with pytest.raises(RuntimeError, match=r"cannot pool maps of 48x48: fused.detach\(net\) makes it run plain"):
        net(IMAGES)


class Fading(DirectEncoder):
    """Writes each step into the memory of the last one."""

    def forward(self, images, steps, t0=0):
        if t0 == 0:
            self.state = torch.zeros_like(images)
        return self.state.mul_(0.9).add_(images).unsqueeze(0)


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_may_write_into_what_it_gave(training):
    def run(net):
        with torch.no_grad():
            return {"voltages": net.train(training).voltages(IMAGES), **dict(net.named_buffers())}

    assert_same(*both(lambda: make_net(encoding=Fading), run))


@pytest.mark.parametrize("odd", ["batch", "steps", "dtype"])
def test_an_encoder_that_gives_something_else_is_one_clear_error(odd):
    class Odd(DirectEncoder):
        def forward(self, images, steps, t0=0):
            given = super().forward(images, steps + (odd == "steps"), t0)
            return given.float() if odd == "dtype" else given.repeat(1, 2, 1, 1, 1) if odd == "batch" else given

    net = fused.attach(make_net(encoding=Odd))
    with pytest.raises(RuntimeError, match="the encoder gave .* were due: mend it, or run the net plain"):
        net(IMAGES)


@pytest.mark.parametrize("which", [("bntt2",), ("bntt3",), ("bntt1", "bntt3"), ("bntt2", "bntt_fc")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_firing_first_norms_of_both_kinds_have_the_gradients_of_the_plain_loop(which, training, steps):
    def build():
        net = make_net(T=6, spike_order="fire_first")
        for name in which:
            layer = next(layer for layer in net.layers() if layer.norm is getattr(net, name))
            spatial = isinstance(layer.synapse, nn.Conv2d)
            torch.manual_seed(1)
            setattr(net, name, TdBN(6, len(layer.synapse.weight), spatial).double())
        return net

    def run(net):
        net.train(training)
        voltages = net.voltages(IMAGES, steps)
        if voltages.requires_grad:
            F.cross_entropy(voltages[-1], LABELS).backward()
        return {"voltages": voltages.detach(), **{name: p.grad for name, p in net.named_parameters()}}

    if fused.why_not(build()) is None:
        assert_same(*both(build, run))


class Stepwise(DirectEncoder):
    """A learnt factor for each step."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.factors = nn.ParameterList(torch.ones(()) for _ in range(shape[0]))

    def forward(self, images, steps, t0=0):
        return torch.stack([self.factors[t] * images for t in range(t0, t0 + steps)])


def test_what_an_encoder_learns_of_steps_that_reach_nothing_has_no_gradient():
    def run(net):
        F.cross_entropy(net(IMAGES), LABELS).backward()
        return {name: p.grad for name, p in net.named_parameters()}

    found = both(lambda: make_net(T=6, spike_order="fire_first", encoding=Stepwise), run)
    assert found[0]["encoder.factors.5"] is None
    assert_same(*found)


@pytest.mark.parametrize("what", ["layers", "views", "expanded"])
def test_running_statistics_that_share_memory_run_plain(what):
    net = fused.attach(make_net("tiny_global", norm="bn"))
    shared = net.bntt1.shared
    if what == "layers":
        net.bntt2.shared.running_mean = net.bntt2.shared.running_var
    elif what == "views":
        shared.running_mean = torch.zeros(40, dtype=torch.float64)[:20]
    else:
        shared.running_mean = torch.zeros(1, dtype=torch.float64).expand(20)
    with pytest.warns(UserWarning, match="runs plain"), suppress(RuntimeError):
        net.eval()(IMAGES)


def test_a_hook_that_looks_may_remove_itself():
    net, seen = fused.attach(make_net()), []

    def look(module, inputs, output):
        seen.append(module)
        handle.remove()

    look.only_looks = True
    handle = net.conv1.register_forward_hook(look)
    other = lambda module, inputs, output: seen.append(module)  # noqa: E731
    other.only_looks = True
    net.conv1.register_forward_hook(other)
    net(IMAGES)
    assert seen[:3] == [net.conv1] * 3


def test_a_net_that_is_just_being_copied_runs_plain():
    net = fused.attach(make_net())
    mine = vars(net).pop("_fused")
    with pytest.warns(UserWarning, match="runs plain: it is being copied"):
        net(IMAGES)
    vars(net)["_fused"] = mine


# ---- Found by a third attack -----------------------------------------------------------------------


@pytest.mark.parametrize("base", [LIF, HardReset])
def test_a_neuron_of_another_file_runs_plain_whatever_it_inherits(base):
    kind = type("Mine", (base,), {"hard_reset": base is LIF, "__module__": "baselines"})
    assert fused.why_not(make_net(neuron=kind)) == "the fused engine does not know the neuron Mine"


def test_a_surrogate_that_changes_before_the_backward_pass_is_an_error(monkeypatch):
    loss = fused.attach(make_net())(IMAGES).square().sum()
    monkeypatch.setattr(model, "SURROGATE_ALPHA", 0.9)
    with pytest.raises(RuntimeError, match="SURROGATE_ALPHA has changed since the forward pass"):
        loss.backward()


@pytest.mark.parametrize("value", [torch.tensor(0.3), [0.3]], ids=["tensor", "list"])
def test_a_surrogate_s_height_that_may_change_unseen_runs_plain(value, monkeypatch):
    monkeypatch.setattr(baselines, "SURROGATE_ALPHA", value)
    assert fused.why_not(make_net()).endswith("which may change unseen")


def test_a_leak_that_is_no_plain_number_runs_plain():
    net = make_net()
    net.lif_conv1.leak = type("Halved", (float,), {"__mul__": lambda self, other: 0.5 * other})(0.9)
    assert fused.why_not(net) == "the fused engine does not know the neuron LIF as it was changed"


@pytest.mark.parametrize("where", ["norm", "neuron", "child of the neuron"])
def test_what_a_part_holds_besides_its_own_runs_plain(where):
    net = make_net()
    if where == "child of the neuron":
        net.lif_conv1.after = nn.Identity()
    else:
        part = net.bntt1 if where == "norm" else net.lif_conv1
        part.register_buffer("on", torch.zeros((), dtype=torch.bool))
    assert fused.why_not(net).startswith("the fused engine does not know the n")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (model, "__gain__", 2.0),
        (LIF, "__gain__", 2.0),
        (LIF, "Inner", type("Inner", (), {"__module__": "model", "gain": 2.0})),
        (LIF.fire, "gain", 2.0),
        (model, "tau", 2.0),
        (model, "read", io.BytesIO().read),
        (model, "copied", {}.copy),
        (encoders, "GAIN", 2.0),
        (torch, "cat", torch.stack),
    ],
    ids=["dunder", "dunder of a class", "nested class", "of a function", "tau", "method", "builtin", "encoders", "cat"],
)
def test_whatever_code_may_read_is_in_the_snapshot(owner, name, value, monkeypatch):
    monkeypatch.setattr(owner, name, value, raising=False)
    assert fused.why_not(make_net()).startswith("the fused engine does not fit this net")


BOUNDED = """
class Learnt(LIF):
    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        super().__init__(leak, threshold, spike_order)
        self.leak, self.threshold = (nn.Parameter(torch.tensor(v)) for v in (leak, threshold))


class ClampedLeak(Learnt):
    def step(self, current, membrane):
        membrane = self.leak.clamp(0, 1) * membrane + current
        spikes = self.fire(membrane)
        return spikes, membrane - self.threshold * spikes.detach()


class ClampedThreshold(Learnt):
    def fire(self, membrane):
        return SurrogateSpike.apply(membrane / self.threshold.clamp(min=0.5) - 1.0)


class Gain(Learnt):
    def __init__(self, leak, threshold=1.0, spike_order="integrate_first"):
        super().__init__(leak, threshold, spike_order)
        self.gain = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def fire(self, membrane):
        return super().fire(self.gain.detach() * membrane)
"""


def test_an_edit_that_shows_only_at_other_values_of_what_is_learnt_is_found(tmp_path):
    for name in ("model.py", "baselines.py", "encoders.py", "fused"):
        take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        take(ROOT / name, tmp_path / name)
    with (tmp_path / "model.py").open("a") as file:
        file.write(BOUNDED)
    (tmp_path / "bntt").mkdir()
    for library in cache_folder().glob("*.so"):  # else it would be compiled anew
        shutil.copy(library, tmp_path / "bntt")
    script = """
import fused, model
model.ARCHS["tiny"] = (8, "A", 12, "A"), (24,)
for neuron in (model.Learnt, model.ClampedLeak, model.ClampedThreshold, model.Gain):
    print(fused.why_not(model.SpikingVGG("tiny", 4, 0.9, 8, neuron=neuron)))
"""
    place = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, text=True, env=place).splitlines()
    assert said[0] == "None"
    assert all(line.endswith("is not what the net's own code computes") for line in said[1:])
    assert len(said) == 4


def test_a_proof_where_the_engine_cannot_run_is_none_and_is_not_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "SURROGATE_ALPHA", 0.37)  # a kind of net that no test has
    with torch.autograd.graph.save_on_cpu():
        assert fused.why_not(make_net()).endswith(
            "keeps what no hook on saved tensors sees (to save memory, use save_memory)"
        )
    assert not [*tmp_path.glob("bntt/proved-*")]
    assert fused.why_not(make_net()) is None
    assert [*tmp_path.glob("bntt/proved-*")]


def test_a_proof_is_of_one_size_of_image_leak_and_threshold():
    kinds = [guard._kind(make_net(**options)) for options in ({}, {"img_size": 16}, {"leak_mem": 1}, {"threshold": 2})]
    assert len({*kinds}) == 4


def test_a_proof_does_not_go_by_the_values_that_a_net_has_learnt(monkeypatch):
    net = make_net()
    for layer in net.layers():
        layer.lif.threshold = nn.Parameter(torch.tensor(0.0))  # plain loop and engine differ in their NaNs
    monkeypatch.setattr(guard, "_PROVED", {})
    monkeypatch.setattr(guard, "_mark", lambda kind: None)
    assert fused.why_not(net) is None
