"""Inputs made to mislead a net: Gaussian noise, FGSM, PGD, and the published corruptions of CIFAR-10-C (paper, 4.7).

Images are un-normalised, float [B, C, H, W] in [0, 1]; `logits(images)` normalises them and runs the net. An attack on
a spiking net goes through every time-step and, by `attackable`, straight through the encoder (Sharmin et al. 2020).
"""

import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model
from utill import UserError


@contextmanager
def attackable(net, width=1.0):
    """The net as an attack sees it: in eval mode, no gradient of its weights, one of the images through the encoder.

    width: of the surrogate that the attack uses, alpha * max(0, 1 - |v| / width), 1 that of training. One surrogate
    alone makes a net look more robust than it is. Another than 1 runs in the plain loop.
    """
    encoder, spike = getattr(net, "encoder", None), model.SurrogateSpike
    asked, was = [p for p in net.parameters() if p.requires_grad], getattr(encoder, "straight_through", None)
    trained = net.training
    try:
        net.eval()
        for p in asked:
            p.requires_grad_(False)
        if was is not None:
            encoder.straight_through = True
        if width != 1:
            model.SurrogateSpike = _surrogate(width)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "this net runs plain")  # which is meant here
            yield net
    finally:
        net.train(trained)
        for p in asked:
            p.requires_grad_(True)
        if was is not None:
            encoder.straight_through = was
        model.SurrogateSpike = spike


def _surrogate(width):
    class Wide(model.SurrogateSpike):
        @staticmethod
        def backward(ctx, grad_spike):
            (v,) = ctx.saved_tensors
            return grad_spike * model.SURROGATE_ALPHA * (1.0 - v.abs() / width).clamp(min=0)

    return Wide


def input_gradient(logits, images, labels, draws=1):
    """Gradient of the summed cross-entropy with respect to the images; the mean over so many draws of the encoder.

    One draw alone makes a net with random input look more robust than it is (Athalye et al., ICML 2018).
    """
    total = torch.zeros_like(images)
    for _ in range(draws):
        x = images.clone().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logits(x), labels, reduction="sum")
        total += torch.autograd.grad(loss, x)[0]
    return total / draws


def fgsm(logits, images, labels, eps, draws=1):
    """One step along the sign of the gradient: clip(x + eps sign(dL/dx)) (Goodfellow et al. 2015). eps on [0, 1]."""
    return (images + eps * input_gradient(logits, images, labels, draws).sign()).clamp(0, 1)


def pgd(logits, images, labels, eps, draws=1, steps=7, step_size=None):
    """`steps` steps of that kind inside the eps ball, from a random point of it (Madry et al. 2018).

    step_size: by default 2.5 eps / steps.
    """
    step_size = 2.5 * eps / steps if step_size is None else step_size
    x = (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    for _ in range(steps):
        x = x + step_size * input_gradient(logits, x, labels, draws).sign()
        x = torch.minimum(torch.maximum(x, images - eps), images + eps).clamp(0, 1)
    return x


def noisy(images, sigma, generator=None):
    """Images with Gaussian noise of that deviation, clipped to [0, 1]. ValueError for a negative sigma."""
    if sigma < 0:
        raise ValueError(f"the deviation of the noise must be at least 0, got {sigma}")
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    return (images + sigma * noise).clamp(0, 1)


# ---- CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019) ------------------------------------------------------

PER_SEVERITY = 10000  # images; severities 1 to 5 stand one after the other in each file


def corruptions(folder):
    """{name: (images uint8 [5, 10000, H, W, C], labels int64 [5, 10000])} of a folder as published, memory-mapped.

    UserError where it is none: a file for each corruption, and labels.npy.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.glob("*.npy") if p.name != "labels.npy")
    if not files or not (folder / "labels.npy").is_file():
        raise UserError(f"{folder} is no CIFAR-10-C: it must hold labels.npy and a .npy file for each corruption")
    labels, found = _read(folder / "labels.npy"), {}
    for path in files:
        images = _read(path)
        if (
            images.ndim != 4
            or images.dtype != np.uint8
            or len(images) != 5 * PER_SEVERITY
            or len(labels) != len(images)
        ):
            raise UserError(
                f"{path} must hold 50,000 uint8 images, severity 1 to 5, and labels.npy as many labels; it holds "
                f"{images.dtype} {list(images.shape)}, labels.npy {len(labels)}"
            )
        if labels.min() < 0 or labels.max() > 9:
            raise UserError(f"{folder}/labels.npy holds {labels.min()} to {labels.max()}, CIFAR-10 has classes 0 to 9")
        found[path.stem] = (
            images.reshape(5, PER_SEVERITY, *images.shape[1:]),
            torch.from_numpy(labels.astype(np.int64)).view(5, -1),
        )
    return found


def _read(path):
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:150]}") from None
