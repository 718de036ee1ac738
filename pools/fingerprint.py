"""Which model a checkpoint holds, without reading all of it: names, types, shapes, and a sample of each tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable

import torch

from .checkpoint import Checkpoint, open_checkpoint
from .compatibility import RenamedCheckpoint
from .sources import Scratch

SAMPLE = 512  # elements


def model_fingerprint(model: str | os.PathLike[str] | Checkpoint) -> str:
    """Return SHA-256 over names, element types, shapes and a sample of each tensor of one checkpoint.

    It is that of the tensors as they are stored: the same in another folder or sharding, in any pool, and whatever
    the pool renames. The sample is the beginning, the middle and the end of every tensor, 2 kB each in float32.
    """
    checkpoint = open_checkpoint(model) if isinstance(model, (str, os.PathLike)) else model
    if isinstance(checkpoint, RenamedCheckpoint):
        checkpoint = checkpoint.stored
    names = sorted(checkpoint.tensors)
    digest = hashlib.sha256(json.dumps({name: str(checkpoint.tensors[name]) for name in names}).encode())
    digest.update(sample_digest(checkpoint, names, Scratch(3 * SAMPLE)))
    return digest.hexdigest()


def sample_digest(checkpoint: Checkpoint, names: Iterable[str], scratch: Scratch) -> bytes:
    """Return SHA-256 over samples of these tensors, in their order, and count the bytes read."""
    found = hashlib.sha256()
    for name in names:
        read = checkpoint.reader(name)
        for start, stop in _samples(checkpoint.tensors[name].numel):
            piece = read(start, stop, scratch.raw)
            scratch.bytes_read += piece.nbytes
            found.update(memoryview(piece.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return found.digest()


def _samples(size: int) -> list[tuple[int, int]]:
    """Return ranges at the beginning, in the middle and at the end of a tensor, or all of one that is no longer."""
    if size <= 3 * SAMPLE:
        return [(0, size)]
    middle = (size - SAMPLE) // 2
    return [(start, start + SAMPLE) for start in (0, middle, size - SAMPLE)]
