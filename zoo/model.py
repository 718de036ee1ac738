"""The small CLIP of the zoo: open_clip's class, 32×32 images, patches of 8, and a text tower that only makes heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from open_clip import tokenizer
from open_clip.model import CLIP
from torch.nn import functional as F

from .rendering import Bytes
from .tasks import ALL, TEMPLATES, Concepts

CONTEXT = 16
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Normalization of images: open_clip's own constants, so that its defaults apply."""


def vocabulary() -> tuple[int, ...]:
    """The ids of open_clip's tokenizer that occur in the captions, sorted.

    The text tower embeds these only (its 49,408 embeddings would be most of the model, nearly all untrained). Sorted,
    so that end-of-text stays the largest id, which is how open_clip finds the token to pool.
    """
    return tuple(torch.unique(_tokens(captions("{}") + [t.format("x") for t in TEMPLATES])).tolist())


def _tokens(texts: list[str]) -> torch.Tensor:
    ids: torch.Tensor = tokenizer.tokenize(texts, context_length=CONTEXT)
    return ids


def captions(template: str, rows: tuple[Concepts, ...] = ALL) -> list[str]:
    """The caption of every class of the rows, in the table's order."""
    return [template.format(phrase) for row in rows for phrase in row.classes]


def tokens(texts: list[str]) -> torch.Tensor:
    """Texts as indices into `vocabulary()`, int64 [N, 16]."""
    known = torch.tensor(vocabulary())
    return torch.searchsorted(known, _tokens(texts))


def architecture(width: int, layers: int, heads: int, embed_dim: int) -> dict[str, Any]:
    """open_clip's configuration of the model."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": width,
            "layers": layers,
            "head_width": width // heads,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(vocabulary()),
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }


def create(config: dict[str, Any], seed: int) -> CLIP:
    """A freshly initialized model. The temperature stays at its initial value, exp(logit_scale) = 1/0.07."""
    torch.manual_seed(seed)
    model = CLIP(**config)
    model.logit_scale.requires_grad_(False)
    return model


def pixels(images: Bytes | torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, 32, 32] -> normalized float32."""
    x = torch.as_tensor(np.asarray(images)) if not isinstance(images, torch.Tensor) else images
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (x.float() / 255.0 - mean) / std


@torch.no_grad()
def heads(model: CLIP) -> torch.Tensor:
    """Class embeddings of all rows of the table, float32 [classes, d]: normalized mean over the templates."""
    model.eval()
    texts = [F.normalize(model.encode_text(tokens(captions(t))), dim=-1) for t in TEMPLATES]
    return F.normalize(torch.stack(texts).mean(0), dim=-1)


def head_of(rows: torch.Tensor, name: str) -> torch.Tensor:
    """The rows of the head matrix that belong to one task, [C, d]."""
    start = 0
    for row in ALL:
        if row.name == name:
            return rows[start : start + len(row.classes)]
        start += len(row.classes)
    raise KeyError(name)


@torch.no_grad()
def accuracy(visual: torch.nn.Module, images: Bytes, labels: Any, head: torch.Tensor) -> float:
    """Top-1 accuracy, a share of 1."""
    visual.eval()
    hits = 0
    for i in range(0, len(images), 500):
        scores = visual(pixels(images[i : i + 500])) @ head.T
        hits += int((scores.argmax(1) == torch.as_tensor(labels[i : i + 500])).sum())
    return hits / len(images)
