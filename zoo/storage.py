"""How the zoo is kept on disk: a half-precision base, and task vectors as 8-bit integers with one scale a row.

    τ[r, ...] ≈ s[r] · q[r, ...],   q = round(τ / s) in −127..127,   s[r] = max |τ[r, ...]| / 127

The error of an entry is at most half of its row's scale, 0.4% of the row's largest entry. Tensors with fewer than two
dimensions (biases, norms) are kept in single precision. The experts of the zoo *are* the decoded ones: their recorded
accuracies are measured after the round trip.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
SCALE = ".scale"


def half(weights: Mapping[str, torch.Tensor]) -> Weights:
    """float16 copies."""
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in weights.items()}


def encode(expert: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> Weights:
    """The task vector of an expert in its stored form."""
    stored: Weights = {}
    for name, start in base.items():
        tau = expert[name].detach().float() - start.float()
        if tau.ndim < 2:
            stored[name] = tau.contiguous()
            continue
        rows = tau.flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 127.0
        quotient = rows / torch.where(scale > 0, scale, torch.ones_like(scale))
        stored[name] = quotient.round().to(torch.int8).reshape(tau.shape).contiguous()
        stored[name + SCALE] = scale.squeeze(1).contiguous()
    return stored


def decode(stored: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> Weights:
    """The expert's weights, float32: base + task vector."""
    weights: Weights = {}
    for name, start in base.items():
        tau = stored[name].float()
        if name + SCALE in stored:
            tau = tau * stored[name + SCALE].reshape(-1, *[1] * (tau.ndim - 1))
        weights[name] = start.float() + tau
    return weights


def norm(weights: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm over all tensors."""
    return float(sum(float(tensor.double().square().sum()) for tensor in weights.values()) ** 0.5)


def write(weights: Weights, path: Path) -> None:
    """Writes a safetensors file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(weights, name)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> Weights:
    """All tensors of a safetensors file."""
    tensors: Weights = load_file(path)
    return tensors


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
