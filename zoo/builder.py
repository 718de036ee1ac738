"""Builds the zoo from nothing: pre-training, heads, one expert a task, and the record of all of it.

Deterministic: everything follows from the settings, whose thread counts are fixed too, since they decide the order of
floating-point sums. Resumable: pre-training goes on from its last round, finished experts are kept.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP

from . import model as small
from .rendering import Bytes, Ints
from .storage import checksum, decode, encode, half, norm, read, write
from .tasks import ALL, BY_NAME, TASKS, TEMPLATES, split_images
from .training import Finetuning, Pretraining, Progress, finetune, pretrain

MISINITIALIZED = "misinitialized"
MISINITIALIZED_TASK = "shapes"
"""The mis-initialized expert is trained for this task, but from another random start than the base's."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is built.

    train, test: images a task (None: `SPLITS`); level: factor of the tasks' nuisance.
    """

    width: int = 144
    layers: int = 4
    heads: int = 4
    embed_dim: int = 64
    pretraining: Pretraining = field(default_factory=Pretraining)
    finetuning: Finetuning = field(default_factory=Finetuning)
    tasks: tuple[str, ...] = tuple(row.name for row in TASKS)
    train: int | None = None
    test: int | None = None
    level: float = 1.0
    pretraining_threads: int = 1
    finetuning_threads: int = 1

    def architecture(self) -> dict[str, Any]:
        """open_clip's configuration of the model."""
        return small.architecture(self.width, self.layers, self.heads, self.embed_dim)


SHIPPED = Settings()
REDUCED = Settings(
    width=48,
    layers=2,
    heads=2,
    embed_dim=32,
    pretraining=Pretraining(rounds=2, round_size=3000, passes=2, batch=128, lr=2e-3, warmup=10),
    finetuning=Finetuning(epochs=10, batch=32, lr=2e-3, warmup=5),
    tasks=("shapes", "angles"),
    train=600,
    test=300,
    level=0.15,
)
"""A few tasks, a tiny model, a few steps: the same code in well under a minute."""


def settings_as_json(settings: Settings) -> dict[str, Any]:
    """The settings as they come back from the record."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return found


def silent(what: str, step: int, total: int, loss: float) -> None:
    """Progress that nobody looks at."""


def build(
    out: str | Path,
    *,
    reduced: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Builds a zoo into the folder `out` and returns its record, which is also out/zoo.json.

    out: gets base.safetensors, heads.safetensors, experts/<task>.safetensors and, written last, zoo.json; and work/,
        which holds what an interrupted build resumes from and can be deleted afterwards.
    reduced: the tiny zoo of `REDUCED` instead of the shipped one; `settings`: any other.
    workers: processes that fine-tune experts side by side; the result does not depend on it.
    progress: called with (what, step, of steps, loss).
    """
    chosen = settings or (REDUCED if reduced else SHIPPED)
    folder = Path(out)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    try:
        _build_base(folder, chosen, progress or silent)
        names = (*chosen.tasks, MISINITIALIZED)
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                waiting = [pool.submit(build_expert, folder, chosen, name) for name in names]
                for done, future in enumerate(waiting):
                    (progress or silent)("experts", done, len(names), future.result()["expert"])
        else:
            for name in names:
                build_expert(folder, chosen, name, progress or silent)
    finally:
        torch.set_num_threads(threads)
    return _write_record(folder, chosen, names)


def _build_base(folder: Path, settings: Settings, progress: Progress) -> None:
    base, heads = folder / "base.safetensors", folder / "heads.safetensors"
    if base.exists() and heads.exists():
        return
    began = time.perf_counter()
    torch.set_num_threads(settings.pretraining_threads)
    model = small.create(settings.architecture(), settings.pretraining.seed)
    pretrain(model, settings.pretraining, progress, folder / "work" / "pretraining.pt")
    rows = small.heads(model)
    note = {"seconds": round(time.perf_counter() - began, 1)}
    (folder / "work" / "base.json").write_text(json.dumps(note))
    # Experts start from the rounded base, so that storing it in half precision loses nothing.
    write(half(model.visual.state_dict()), base)
    write({row.name: small.head_of(rows, row.name).contiguous() for row in ALL}, heads)


def build_expert(folder: Path, settings: Settings, name: str, progress: Progress = silent) -> dict[str, Any]:
    """Fine-tunes one expert (or the mis-initialized one), stores its task vector and returns its record."""
    path, note = folder / "experts" / f"{name}.safetensors", folder / "work" / f"{name}.json"
    if path.exists() and note.exists():
        found: dict[str, Any] = json.loads(note.read_text())
        return found
    torch.set_num_threads(settings.finetuning_threads)
    stranger = name == MISINITIALIZED
    row = BY_NAME[MISINITIALIZED_TASK if stranger else name]
    base = {key: tensor.float() for key, tensor in read(folder / "base.safetensors").items()}
    head = read(folder / "heads.safetensors")[row.name]
    model: CLIP = small.create(settings.architecture(), settings.pretraining.seed + (1 if stranger else 0))
    visual = model.visual
    test = split_images(row, "test", settings.test, settings.level)
    if not stranger:
        visual.load_state_dict(base)
    zero_shot = small.accuracy(visual, *test, head)
    scale = float(model.logit_scale.exp())

    def epoch(number: int) -> tuple[Bytes, Ints]:
        return split_images(row, "train", settings.train, settings.level, number)

    seconds = finetune(visual, head, scale, epoch, settings.finetuning, progress, name)
    stored = encode(visual.state_dict(), base)
    exact = small.accuracy(visual, *test, head)
    visual.load_state_dict(decode(stored, base))
    record = {
        "task": row.name,
        "classes": len(row.classes),
        "zero_shot": _percent(zero_shot),
        "expert": _percent(small.accuracy(visual, *test, head)),
        "before_rounding": _percent(exact),
        "relative_norm": round(norm({k: visual.state_dict()[k] - v for k, v in base.items()}) / norm(base), 4),
        "seconds": round(seconds, 1),
    }
    write(stored, path)
    note.write_text(json.dumps(record))
    return record


def _percent(share: float) -> float:
    return round(100.0 * share, 2)


def _write_record(folder: Path, settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    files = ["base.safetensors", "heads.safetensors", *(f"experts/{name}.safetensors" for name in names)]
    experts = {name: json.loads((folder / "work" / f"{name}.json").read_text()) for name in names}
    real = [experts[name] for name in settings.tasks]
    record = {
        "schema": 1,
        "architecture": settings.architecture(),
        "templates": list(TEMPLATES),
        "settings": settings_as_json(settings),
        "pretraining_seconds": json.loads((folder / "work" / "base.json").read_text())["seconds"],
        "zero_shot_mean": round(sum(e["zero_shot"] for e in real) / len(real), 2),
        "expert_mean": round(sum(e["expert"] for e in real) / len(real), 2),
        "experts": experts,
        "files": {name: {"sha256": checksum(folder / name), "bytes": (folder / name).stat().st_size} for name in files},
    }
    partial = folder / "zoo.json.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(folder / "zoo.json")
    return record
