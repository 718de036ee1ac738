"""Pre-training on simplified renderings of all concepts, and fine-tuning of one expert."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from torch.nn import functional as F

from .model import captions, pixels, tokens
from .rendering import Bytes, Ints
from .tasks import ALL, TEMPLATES, generator, images

Progress = Callable[[str, int, int, float], None]
"""(what, step, of steps, loss)"""


@dataclass(frozen=True)
class Pretraining:
    """Settings of pre-training: `rounds` sets of about `round_size` fresh images, each passed over `passes` times."""

    rounds: int = 20
    round_size: int = 40000
    passes: int = 2
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200
    level: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Finetuning:
    """Settings of fine-tuning: the visual tower only, against the task's frozen head."""

    epochs: int = 16
    batch: int = 128
    lr: float = 8e-4
    weight_decay: float = 0.0
    warmup: int = 20
    seed: int = 0


def schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero: a factor for the learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def simplified(size: int, level: float, seed: int, number: int) -> tuple[Bytes, Ints]:
    """About `size` images of all concepts at nuisance levels uniform in [0, level], labelled by caption.

    A row with C classes gets a share proportional to √C.
    """
    shares = np.sqrt([len(row.classes) for row in ALL])
    pieces, labels, start = [], [], 0
    for row, share in zip(ALL, shares / shares.sum(), strict=True):
        rng = generator(row.name, 100, seed, number)
        chunk = max(1, round(size * share / 8))
        for _ in range(8):
            x, y = images(row, chunk, rng, float(rng.uniform(0, level)))
            pieces.append(x)
            labels.append(y + start)
        start += len(row.classes)
    return np.concatenate(pieces), np.concatenate(labels)


def pretrain(model: CLIP, options: Pretraining, progress: Progress, checkpoint: Path | None = None) -> None:
    """Cross-entropy of each image over the captions of all concepts, one template a step; both towers are trained.

    With a checkpoint file, state is saved after each round and a later call goes on from there.
    """
    texts = [tokens(captions(t)) for t in TEMPLATES]
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
    )
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["round"])
    model.train()
    for number in range(first, options.rounds):
        x, y = simplified(options.round_size, options.level, options.seed, number)
        data, labels = torch.from_numpy(x), torch.from_numpy(y)
        rng = np.random.default_rng([options.seed, number])
        batches = [rows for _ in range(options.passes) for rows in _batches(rng, len(y), options.batch)]
        total = options.rounds * len(batches)
        for i, rows in enumerate(batches):
            step = number * len(batches) + i
            for group in optimizer.param_groups:
                group["lr"] = options.lr * schedule(step, total, options.warmup)
            text = F.normalize(model.encode_text(texts[int(rng.integers(len(texts)))]), dim=-1)
            image = F.normalize(model.encode_image(pixels(data[rows])), dim=-1)
            loss = F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 50 == 0:
                progress("pre-training", step, total, float(loss.detach()))
        if checkpoint is not None:
            partial = checkpoint.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "round": number + 1}, partial)
            partial.replace(checkpoint)


def _batches(rng: np.random.Generator, n: int, size: int) -> Iterator[torch.Tensor]:
    order = torch.from_numpy(rng.permutation(n))
    for i in range(0, n - size + 1, size):
        yield order[i : i + size]


def finetune(
    visual: torch.nn.Module,
    head: torch.Tensor,
    scale: float,
    epoch: Callable[[int], tuple[Bytes, Ints]],
    options: Finetuning,
    progress: Progress,
    what: str = "expert",
) -> float:
    """Trains the visual tower in place by cross-entropy on the task's labels; seconds taken.

    epoch(e) gives the images and labels of epoch e: the training images themselves in epoch 0, later ones rendered
    anew. This is the usual augmentation; without it a tower of this size learns 3000 images by heart.
    """
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(visual.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    rng = np.random.default_rng([options.seed, 7])
    step = 0
    visual.train()
    for number in range(options.epochs):
        x, y = epoch(number)
        data, labels = torch.from_numpy(x), torch.from_numpy(y)
        total = options.epochs * (len(y) // options.batch)
        for rows in _batches(rng, len(y), options.batch):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * schedule(step, total, options.warmup)
            output: Any = visual(pixels(data[rows]))
            loss = F.cross_entropy(scale * F.normalize(output, dim=-1) @ head.T, labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 20 == 0:
                progress(what, step, total, float(loss.detach()))
            step += 1
    return time.perf_counter() - began
