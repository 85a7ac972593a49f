"""Voxels to try losses on. Axes: B batch, C classes, I J K voxels (K absent in 2D)."""

import math

import torch

SHAPES = [(2, 3, 4, 5), (2, 3, 4, 3, 5)]


def soften(classes, num_classes):
    """Probs (B, C, ...) that favor the given classes (B, 1, ...); NaN where these are 255."""
    one_hot = torch.zeros(classes.shape[0], num_classes, *classes.shape[2:])
    one_hot.scatter_(1, torch.where(classes == 255, 0, classes).long(), 1.0)
    return torch.where(classes == 255, math.nan, 0.7 * one_hot + 0.3 / num_classes)


def draw(shape, seed=0, scale=2.0):
    """Logits with gradient, classes, weight, valid of one shape (B, C, ...)."""
    generator = torch.Generator().manual_seed(seed)
    flat = (shape[0], 1, *shape[2:])
    logits = (scale * torch.randn(shape, generator=generator)).requires_grad_()
    classes = torch.randint(0, shape[1], flat, generator=generator, dtype=torch.uint8)
    weight = torch.rand(flat, generator=generator)
    valid = torch.rand(flat, generator=generator) < 0.7
    return logits, classes, weight, valid


def logits_of(*probs):
    """Logits (1, C, 1, num_voxels) with these probs at each voxel."""
    return torch.tensor(probs, dtype=torch.float64).log().T[None, :, None].float().requires_grad_()


def gradient(loss, logits):
    (grad,) = torch.autograd.grad(loss, logits)
    return grad
