"""Exits: the gammas' and each image's own, worked by hand and against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fused import make_net, tiny_archs  # noqa: F401 (a fixture)

import exits
import fused
from utill import SpikeMeter

IMAGES = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)[None]


def test_the_sureness_of_each_policy_worked_by_hand():
    entropy = -(0.7 * torch.tensor(0.7).log() + 0.2 * torch.tensor(0.2).log() + 0.1 * torch.tensor(0.1).log())
    expected = {"confidence": 0.7, "margin": 0.5, "entropy": 1 - float(entropy / torch.tensor(3.0).log())}
    assert {name: pytest.approx(policy(P).item(), abs=1e-6) for name, policy in exits.POLICIES.items()} == expected


@pytest.mark.parametrize("policy", exits.POLICIES)
def test_a_certain_answer_is_as_sure_as_can_be(policy):
    assert exits.POLICIES[policy](torch.tensor([[0.0, 1.0, 0.0]])).item() == 1


def test_the_probabilities_of_an_exit_are_those_of_the_mean_output():
    expected = torch.tensor([[6.0, 3.0]]).double().softmax(-1)
    torch.testing.assert_close(exits.exit_probabilities(torch.tensor([[4.0, 2.0]]), 2, 3.0), expected)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6), st.floats(0, 1.1))
def test_an_image_leaves_at_the_first_step_at_which_it_is_sure(sureness, threshold):
    found = exits.image_exits(torch.tensor(sureness, dtype=torch.float64).T, threshold)
    expected = [next((t for t, s in enumerate(image, 1) if s >= threshold), 3) for image in sureness]
    assert found.tolist() == expected


def test_the_curve_ends_at_the_accuracy_of_all_steps():
    sureness = torch.tensor([[0.9, 0.2, 0.3], [0.95, 0.8, 0.4]])
    hits = torch.tensor([[True, False, False], [True, True, False]])
    points = exits.curve(sureness, hits)
    assert points[-1] == (float("inf"), 2.0, pytest.approx(100 * 2 / 3))
    assert points[0][1:] == (1.0, pytest.approx(100 / 3))


@pytest.mark.parametrize(("drop", "expected"), [(0.0, 0.8), (1.0, 0.5), (50.0, 0.1), (-1.0, float("inf"))])
def test_the_threshold_is_the_lowest_from_which_on_the_accuracy_holds(drop, expected):
    points = [(0.1, 1, 60.0), (0.3, 2, 70.0), (0.5, 3, 89.5), (0.8, 4, 90.0), (float("inf"), 5, 90.0)]
    assert exits.calibrate(points, drop) == expected


def test_a_dip_of_the_accuracy_ends_the_search_for_a_threshold():
    points = [(0.1, 1, 90.0), (0.3, 2, 80.0), (0.5, 3, 90.0), (float("inf"), 5, 90.0)]
    assert exits.calibrate(points, 1.0) == 0.5


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
@pytest.mark.parametrize("encoding", ["poisson", "direct"])
@pytest.mark.parametrize("policy", exits.POLICIES)
def test_the_loop_that_stops_answers_as_the_full_run_predicts(policy, encoding, attach):
    net = attach(make_net(T=6, encoding=encoding)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        voltages = net.voltages(IMAGES)
    sureness = exits.Seen(voltages, None, 2.0).sureness(exits.POLICIES[policy])
    threshold = sureness.median().item()
    expected = exits.image_exits(sureness.clone(), threshold)
    assert len(expected.unique()) > 1
    torch.manual_seed(0)
    found, answers = exits.run_with_exits(net, IMAGES, exits.POLICIES[policy], threshold, 2.0)
    assert found.tolist() == expected.tolist()
    at = voltages.gather(0, (expected - 1)[None, :, None].expand(1, -1, 5))[0]
    torch.testing.assert_close(answers, at, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
def test_images_that_left_are_not_computed(attach):
    net = attach(make_net(T=4)).eval()
    seen = []
    look = lambda m, args, output: seen.append(output[0].shape[1])  # noqa: E731
    look.only_looks = True
    net.lif_conv1.register_forward_hook(look)
    with torch.no_grad():
        stream = net.stream(IMAGES, block=1)
        next(stream)
        stream.send(torch.tensor([1, 4, 6]))
        stream.send(torch.tensor([2]))
    assert seen == [8, 3, 1]


@pytest.mark.parametrize("attach", [lambda net: net, fused.attach], ids=["plain", "fused"])
def test_the_spikes_of_each_image_are_those_of_a_batch_of_it_alone(attach):
    net = attach(make_net(T=4, encoding="direct")).eval()
    with SpikeMeter(net, by_image=True) as meter, torch.no_grad():
        net(IMAGES[:3])
        net(IMAGES[3:])
    spikes, operations = (torch.cat(parts, 1) for parts in (meter.image_spikes, meter.image_operations))
    for i in range(8):
        with SpikeMeter(net) as one, torch.no_grad():
            net(IMAGES[i : i + 1])
        torch.testing.assert_close(spikes[:, i], sum(s for name, s in one.spikes.items() if name != "input"))
        torch.testing.assert_close(operations[:, i], one.operations())
