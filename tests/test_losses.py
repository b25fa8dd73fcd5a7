"""The losses of utill.py and how they are passed: against formulas written out by hand, and through train.py."""

import json

import pytest
import torch
from conftest import TINY, call

import test as test_script
import train
import utill
from model import SpikingVGG

T, B, K = 4, 3, 5
SCALES = [1.0, 7.0]
LABELS = torch.tensor([4, 0, 2])


def some_voltages():
    torch.manual_seed(0)
    return torch.randn(T, B, K, dtype=torch.float64, requires_grad=True)


def softmax(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize("scale", SCALES)
def test_ce_is_that_of_the_last_voltage_over_T(scale):
    voltages = some_voltages()
    loss = utill.CrossEntropy(scale)(voltages, LABELS)
    loss.backward()
    p = softmax(scale * voltages[-1].detach() / T)
    right = p[range(B), LABELS]
    gradient = torch.zeros(T, B, K, dtype=torch.float64)
    gradient[-1] = (p - torch.eye(K)[LABELS]) * scale / (T * B)
    torch.testing.assert_close(loss, -right.log().mean())
    torch.testing.assert_close(voltages.grad, gradient)


@pytest.mark.parametrize("kind", utill.LOSSES.values(), ids=utill.LOSSES)
def test_label_smoothing_spreads_a_part_of_the_target_over_all_classes(kind):
    voltages = some_voltages().detach()
    whole, smooth = (kind(2.0, label_smoothing=part)(voltages, LABELS) for part in (0.0, 0.1))
    spread = torch.stack([kind(2.0)(voltages, torch.full_like(LABELS, k)) for k in range(K)]).mean()
    torch.testing.assert_close(smooth, 0.9 * whole + 0.1 * spread)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mse", [0.0, 0.05])
def test_tet_is_the_mean_over_steps_of_the_ce_of_each_steps_current(scale, mse):
    voltages = some_voltages()
    loss = utill.TET(scale, mse=mse, target=0.5)(voltages, LABELS)
    loss.backward()
    before, expected, by_current = torch.zeros(B, K, dtype=torch.float64), 0.0, []
    for voltage in voltages.detach():
        current, before = scale * (voltage - before), voltage
        p = softmax(current)
        expected += (1 - mse) * -p[range(B), LABELS].log().mean() / T
        expected += mse * ((current - 0.5) ** 2).mean() / T
        slope = (1 - mse) * (p - torch.eye(K)[LABELS]) / B + mse * 2 * (current - 0.5) / (B * K)
        by_current.append(scale * slope / T)
    # a voltage is the end of its step's current and the beginning of the next one
    gradient = torch.stack([*(a - b for a, b in zip(by_current, by_current[1:], strict=False)), by_current[-1]])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(voltages.grad, gradient)


def test_the_second_term_of_tet_is_off_by_default():
    voltages = some_voltages()
    assert torch.equal(utill.TET()(voltages, LABELS), utill.TET(mse=0.0, target=9.0)(voltages, LABELS))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", utill.LOSSES)
def test_the_logits_are_the_last_voltage_over_T_times_the_scale(name, scale):
    voltages = some_voltages().detach()
    assert torch.equal(utill.LOSSES[name](scale).logits(voltages), scale * (voltages[-1] / T))


def small_net():
    torch.manual_seed(0)
    return SpikingVGG("fc3", 4, img_size=4, in_channels=1).double()


def a_step(loss):
    """(what train_step returns, weights after it) of one step on one batch."""
    net, images, labels = small_net(), torch.randn(8, 1, 4, 4).double(), torch.arange(8)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.manual_seed(1)
    out = train.train_step(net, loss, optimizer, torch.amp.GradScaler(enabled=False), "off", images, labels)
    return out, net.state_dict(), images, labels


def test_a_step_with_ce_is_the_authors_to_the_last_bit():
    (loss, right, largest, norms), state, images, labels = a_step(utill.CrossEntropy(3.0))
    net = small_net()
    torch.manual_seed(1)
    logits = net(images)
    expected = torch.nn.functional.cross_entropy(logits * 3.0, labels)
    expected.backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert torch.equal(loss, expected.detach())
    assert right == (logits.argmax(1) == labels).sum()
    assert largest == max(p.grad.abs().max() for p in net.parameters())
    torch.testing.assert_close(norms, torch.stack([layer.weight.grad.norm() for layer in (net.fc1, net.fc2, net.fc3)]))
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_a_weight_computed_from_others_has_no_norm_in_the_log():
    net = small_net()
    torch.nn.utils.parametrizations.weight_norm(net.fc2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    rest = utill.CrossEntropy(), optimizer, torch.amp.GradScaler(enabled=False), "off"
    *_, norms = train.train_step(net, *rest, torch.randn(8, 1, 4, 4).double(), torch.arange(8))
    assert list(utill.synaptic_weights(net)) == ["fc1", "fc3"]
    assert norms.tolist() == [net.fc1.weight.grad.norm().item(), net.fc3.weight.grad.norm().item()]


def test_a_step_asks_the_net_once_and_gives_the_loss_all_voltages():
    seen = []

    def loss(voltages, labels):
        seen.append(voltages.shape)
        return voltages.square().mean()

    a_step(loss)
    assert seen == [(4, 8, 10)]


@torch.no_grad()
def test_evaluation_weighs_batches_by_their_images():
    class Batches(list):
        num_images = 7

    net, loss = small_net().eval(), utill.TET(2.0)
    loader = Batches([(torch.randn(n, 1, 4, 4).double(), torch.arange(n)) for n in (5, 2)])
    evaluation = utill.evaluate(net, loader, torch.device("cpu"), lambda v, y: loss(v.double(), y), seed=3)
    utill.seed_stream(3, 1)
    expected = sum(len(y) * loss(net.voltages(x).float().double(), y).item() for x, y in loader) / 7
    assert evaluation.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_tet_trains_through_train_py(engine, tmp_path):
    sizes = "--dataset digits --arch fc3 --limit_train 64 --limit_test 50 --num_epochs 3"
    flags = f"{sizes} --lr 0.05 --engine {engine} --loss"
    logs = {}
    for name in ("ce", "tet"):
        outcome = call(train.main, TINY, flags, name, "--run_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
        logs[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert f"loss: {name}\n" in (tmp_path / name / "config.yaml").read_text()
        assert torch.load(tmp_path / name / "best.pth.tar")["config"]["loss"] == name
    assert logs["tet"][-1]["train_loss"] < logs["tet"][0]["train_loss"]
    assert logs["tet"][-1]["test_loss"] != logs["ce"][-1]["test_loss"]
    tested = call(test_script.main, tmp_path / "tet" / "best.pth.tar", "--limit_test 50").result
    assert tested["top1"] == logs["tet"][-1]["test_acc"]


def test_a_loss_that_is_not_there_is_an_error():
    outcome = call(train.main, "--loss mse")
    assert outcome.code == 2
    assert "--loss" in outcome.err[0]
