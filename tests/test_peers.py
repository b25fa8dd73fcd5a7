"""Our count of operations beside those of NeuroBench and SpikingJelly, where they are installed."""

import pytest
import torch
import torch.nn as nn
from test_fused import make_net, tiny_archs  # noqa: F401 (a fixture)

from energy import energy
from utill import SpikeMeter

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    """Fully connected, without pools: every input of a synapse is a spike, 0 or 1, and reaches all outputs."""
    return make_net("tiny_fc", T=4, dtype=torch.float32, encoding="poisson_binary").eval()


@pytest.fixture
def counted(net):
    """Operations of an image, all time-steps, as energy.py counts them."""
    torch.manual_seed(0)
    with SpikeMeter(net) as meter, torch.no_grad():
        net(IMAGES)
    return sum(layer["operations"] for layer in energy(meter)["layers"])


def test_neurobench_counts_the_same_operations(net, counted):
    single_layer_macs = pytest.importorskip("neurobench.metrics.utils.layers").single_layer_MACs
    seen, hooks = [], []
    for module in net.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(lambda m, args, out: seen.append((args[0], m))))
    torch.manual_seed(0)
    with torch.no_grad():
        net(IMAGES)
    for hook in hooks:
        hook.remove()  # it copies the layers
    found = [single_layer_macs(*pair) for pair in seen]
    assert all(spiking for _, spiking in found)
    assert sum(operations for operations, _ in found) / len(IMAGES) == pytest.approx(counted, rel=1e-6)


def test_spikingjelly_counts_the_same_operations(net, counted):
    op_counter = pytest.importorskip("spikingjelly.activation_based.op_counter")
    counter = op_counter.SynOpCounter()
    torch.manual_seed(0)
    with op_counter.DispatchCounterMode([counter]), torch.no_grad():
        net(IMAGES)
    assert counter.get_total() / len(IMAGES) == pytest.approx(counted, rel=1e-6)
