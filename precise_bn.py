"""Statistics of normalisation, measured anew over many batches ("Precise BN", Wu & Johnson 2021; not in the paper)."""

import copy
import itertools

import torch

import utill
from model import BNTT, SharedBN
from utill import UserError


@torch.no_grad()
def average_statistics(net, batches, amp="off"):
    """Replace running statistics by their average over batches of training images [B, C, H, W].

    The running average remembers some ten batches: too few where an input is rarely other than zero, as a
    border pixel of MNIST. One BatchNorm of all time-steps remembers the last of them most: here all count alike.
    ("Precise BN", Wu & Johnson 2021; not in the paper.) UserError for a norm that does not list its BatchNorms.
    """
    check_statistics(net)
    twin, T = copy.deepcopy(net), net.num_steps
    for layer in twin.layers():
        norm = layer.norm
        if _one_for_all_steps(norm):  # the same outputs, with statistics of each step
            own = BNTT(T, len(layer.synapse.weight), isinstance(layer.synapse, torch.nn.Conv2d))
            for bn in own:
                bn.load_state_dict(norm.shared.state_dict())
            name = next(name for name, module in twin.named_modules() if module is norm)
            twin.set_submodule(name, own.to(norm.shared.weight))
    measured, kept = ([_batch_norms(layer.norm, T) for layer in each.layers()] for each in (twin, net))
    twin.train()
    for layer in twin.layers():
        layer.lif.eval()  # no dropout: a test has none
    for i, images in enumerate(batches, start=1):
        for bn in itertools.chain(*measured):
            bn.momentum = 1 / i
        with utill.autocast(images.device, amp):
            twin(images)
    for norms, found in zip(kept, measured, strict=True):
        for key in ("running_mean", "running_var") if norms else ():
            values = torch.stack([getattr(bn, key) for bn in found])
            values = values if len(norms) == len(values) else values.mean(0, keepdim=True)
            for bn, value in zip(norms, values, strict=True):
                getattr(bn, key).copy_(value)


def check_statistics(net):
    """UserError where `average_statistics` cannot do its work on this net."""
    seen = {id(m) for layer in net.layers() for m in layer.norm.modules()}
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and id(m) not in seen for m in net.modules()):
        raise UserError(f"--precise_bn: the layers() of {type(net).__name__} do not list all its norms: leave it out")
    for norm in (layer.norm for layer in net.layers()):
        inside = {m for m in norm.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        if _one_for_all_steps(norm) and type(norm) is not SharedBN or inside != {*_batch_norms(norm, net.num_steps)}:
            raise UserError(f"--precise_bn does not know the statistics of {type(norm).__name__}: leave it out")
    if not any(_batch_norms(layer.norm, net.num_steps) for layer in net.layers()):
        raise UserError("--precise_bn: this net has no running statistics: leave it out")


def _one_for_all_steps(norm):
    return isinstance(norm, SharedBN) and norm.per_step


def _batch_norms(norm, T):
    """Those of T time-steps, each of them once."""
    return list({id(bn): bn for bn in (norm.batch_norms(T) if hasattr(norm, "batch_norms") else [])}.values())
