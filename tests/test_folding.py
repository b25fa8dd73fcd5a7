"""scripts/folding.py: what it counts, against loops written by hand, and the page it writes."""

import json

import folding
import pytest
import torch
from conftest import call
from torch import nn

import train
from model import LIF, SpikingVGG

TINY = "--dataset synthetic --limit_train 8 --limit_test 4 --batch_size 4 --num_epochs 1 --num_workers 0 --device cpu"


def a_net(T=6, seed=0):
    """A tiny net in float64 with random statistics and gammas of each step."""
    torch.manual_seed(seed)
    net = SpikingVGG("vgg9", T, img_size=8, encoding="direct").double().eval()
    for layer in net.layers():
        for bn in layer.norm:
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            bn.running_mean.normal_(0, 0.2)
            bn.running_var.uniform_(0.5, 1.5)
    return net, torch.randn(3, 3, 8, 8, dtype=torch.float64)


def alike(net, mean=None):
    """Give all time-steps of a layer the statistics and gamma of its first."""
    for layer in net.layers():
        for bn in layer.norm:
            if mean is not None:
                layer.norm[0].running_mean.fill_(mean)
            bn.load_state_dict(layer.norm[0].state_dict())


def test_the_exact_way_is_the_net_itself():
    net, images = a_net()
    _, logits = folding.compare(net, images, folding.statistics_of(net))
    torch.testing.assert_close(logits["exact"], net.voltages(images)[-1], rtol=1e-9, atol=1e-9)


def test_with_the_same_scale_at_all_steps_thresholds_are_exact_if_the_mean_is_kept():
    net, images = a_net()
    alike(net)
    counts, logits = folding.compare(net, images, folding.statistics_of(net))
    assert all(count["mean kept"] == 0 < count["spikes"] for count in counts.values())
    assert any(count["eq. 15"] for count in counts.values())
    torch.testing.assert_close(logits["mean kept"], logits["exact"])


def test_without_a_mean_eq_15_is_exact_too():
    net, images = a_net()
    alike(net, mean=0.0)
    counts, _ = folding.compare(net, images, folding.statistics_of(net))
    assert all(count["eq. 15"] == 0 for count in counts.values())
    assert counts["conv1"]["spikes"] > 0 < counts["conv3"]["spikes"]


def test_a_scale_that_changes_makes_spikes_differ():
    net, images = a_net()
    counts, logits = folding.compare(net, images, folding.statistics_of(net))
    assert all(0 < count["mean kept"] <= count["all"] for count in counts.values())
    assert not torch.equal(logits["mean kept"], logits["exact"])


def test_a_folded_neuron_by_hand():
    lif, a, mu = LIF(0.5, 1.0, "integrate_first"), torch.tensor([2.0]), torch.tensor([0.1])
    spikes, v = folding.folded_step(torch.tensor([[0.5]]), torch.tensor([[0.4]]), a, mu, lif)  # 0.5 * 0.4 + 0.4 > 1 / 2
    assert (spikes.item(), v.item()) == (1.0, pytest.approx(0.1))
    spikes, v = folding.folded_step(torch.tensor([[0.3]]), torch.tensor([[0.4]]), a, 0.0, lif)  # 0.5 is not above it
    assert (spikes.item(), v.item()) == (0.0, pytest.approx(0.5))
    v = folding.folded_step(torch.tensor([[0.3]]), torch.tensor([[0.4]]), 0 * a, 0.0, lif)[1]  # a gamma of 0
    assert v.item() == pytest.approx(0.5)


def test_the_page_and_its_numbers(tmp_path):
    assert call(train.main, TINY, "--img_size 8 --num_steps 5", "--run_dir", tmp_path / "run").code == 0
    outcome = call(folding.main, tmp_path / "run" / "best.pth.tar", "--limit_test 4", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    one = call(folding.main, tmp_path / "run" / "best.pth.tar", "--limit_test 1", "--out", tmp_path / "one")
    assert one.code == 0, one.err  # one image has no interval
    plain = call(folding.main, tmp_path / "run" / "best.pth.tar", "--engine fused")
    assert plain.code == 2
    assert plain.err[0].endswith("--engine does nothing without the fused engine: leave it out")
    result = json.loads((tmp_path / "out" / "folding.json").read_text())
    assert (result["count"], result["num_steps"], len(result["layers"])) == (4, 5, 8)
    assert all(len(layer["sigma"]) == len(layer["mu_over_sigma"]) == 5 for layer in result["layers"])
    text = (tmp_path / "out" / "folding.md").read_text()
    assert f"| folded exactly | {result['accuracy']['exact']['top1']:.2f} |" in text
    assert (tmp_path / "out" / "folding.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", ["--norm bn", "--neuron if --leak_mem 1", "--spike_order fire_first --num_steps 10"])
def test_another_net_is_refused_in_one_sentence(tmp_path, flags):
    assert call(train.main, TINY, "--img_size 8 --num_steps 2", flags, "--run_dir", tmp_path / "run").code == 0
    outcome = call(folding.main, tmp_path / "run" / "best.pth.tar", "--out", tmp_path / "out")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "folding is of nets with --norm bntt" in outcome.err[0]
    assert not (tmp_path / "out").exists()


def test_the_deviation_of_a_list_is_that_of_its_farthest_value():
    assert folding.largest_deviation([1.0, 1.0, 4.0]) == pytest.approx(100)
