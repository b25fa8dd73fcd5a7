"""The engine computes the net that it is given: what was changed, before or after attach, runs plain, with a reason."""

import copy
import io
import pickle
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_changes import IMAGES, LABELS, Arctan, assert_same, one_process, two_steps
from test_fused import make_net, tiny_archs  # noqa: F401 (a fixture)
from torch.nn.utils import parametrizations

import fused
import model
from baselines import TdBN
from encoders import DirectEncoder
from fused import fingerprint, guard
from model import BNTT, LIF, SpikingVGG
from utill import SpikeMeter


def test_a_remembered_proof_is_not_taken_for_another_surrogate_of_the_same_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Mine(SpikingVGG):
        pass

    net = Mine("tiny", 4, img_size=8, num_cls=5).double()
    proved = guard._mark(guard._kind(net))
    monkeypatch.setattr(model, "SurrogateSpike", Arctan)
    assert guard._mark(guard._kind(net)) != proved is not None


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


class Strong(BNTT):
    """Says that it is a BNTT, and is one where `strength` and STRENGTH are 1."""

    strength = 1.0

    def forward(self, x, t0=0):
        return super().forward(x, t0) * self.strength * STRENGTH

    def affine(self, T):
        return super().affine(T)


STRENGTH = 1.0


def test_a_norm_that_was_proved_is_proved_again_with_another_setting():
    nets = [make_net(norm=Strong) for _ in range(2)]
    for layer in nets[1].layers():
        layer.norm.strength = 2.0
    assert fused.why_not(nets[0]) is None
    assert "does not fit this net" in fused.why_not(nets[1])


def test_a_norm_that_was_proved_is_proved_again_with_another_value_in_its_file(monkeypatch):
    net = make_net(norm=Strong)
    assert fused.why_not(net) is None
    monkeypatch.setattr(sys.modules[__name__], "STRENGTH", 2.0)
    assert "does not fit this net" in fused.why_not(net)


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


@pytest.mark.parametrize("what", ["static method", "code of a function", "default of a function"])
def test_a_remembered_proof_is_of_the_code_in_memory(what, monkeypatch):
    net = make_net()
    shipped = guard._mark(guard._kind(net))
    if what == "static method":
        monkeypatch.setattr(model.SurrogateSpike, "backward", staticmethod(lambda ctx, grad: grad))
    elif what == "code of a function":
        monkeypatch.setattr(LIF.fire, "__code__", (lambda self, u: (u > 1).double()).__code__)
    else:
        monkeypatch.setattr(LIF.forward, "__defaults__", (0.0,))
    assert guard._mark(guard._kind(net)) != shipped is not None


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


def test_a_file_of_the_user_s_that_is_called_as_one_of_python_s_is_read(monkeypatch, tmp_path):
    (tmp_path / "profile.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "profile", raising=False)
    fingerprint._shipped.cache_clear()
    import profile

    try:
        first = fingerprint.content(profile.twice, set())
        profile.twice.__code__ = (lambda x: 3 * x).__code__
        assert fingerprint.content(profile.twice, set()) != first
    finally:
        monkeypatch.undo()
        sys.modules.pop("profile", None)
        fingerprint._shipped.cache_clear()


@pytest.mark.parametrize(
    "value", [torch.ones(1), object(), nn.Identity(), [torch.ones(1)]], ids=lambda value: type(value).__name__
)
def test_what_may_change_unseen_has_no_value(value):
    with pytest.raises(fused.Unsupported, match="which may change unseen"):
        fingerprint.content(value, set())


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
