"""Loads a zoo: verifies the shipped files, derives the rest into a cache folder once, hands out tasks and model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..objectives import CLIP, DataError, Task, joint
from .rendering import Bytes, Ints
from .storage import Weights, checksum, decode, norm, read, write
from .tasks import BY_NAME, SPLITS, TEMPLATES, reference_images, split_images

SHIPPED = Path(__file__).parent / "data"
NOISY, NOISY_OF, NOISE = "noisy", "pictograms", 6.0
"""The noise-corrupted expert: that task's expert plus, in each tensor, noise of NOISE times the task vector's norm."""
DUPLICATE, DUPLICATE_OF = "duplicate", "digits"
"""The duplicate: an exact copy of that task's expert."""
_SOURCES = ("rendering.py", "drawings.py", "tasks.py", "storage.py", "loader.py")


def default_cache() -> Path:
    """$MERGESOLVE_CACHE, or ~/.cache/mergesolve."""
    return Path(os.environ.get("MERGESOLVE_CACHE") or Path.home() / ".cache" / "mergesolve")


def load(cache: str | Path | None = None, data: str | Path | None = None) -> Zoo:
    """The shipped zoo, or the one that `build` left in the folder `data`.

    Checks the sha256 of every shipped file. The first call writes the base and the experts as float32 safetensors files
    into the cache folder (a few seconds, 4 MB a model); any number of processes may do so at once.
    Raises DataError for a missing, truncated or altered file.
    """
    source = Path(data) if data is not None else SHIPPED
    record = _read_record(source)
    for name, entry in record["files"].items():
        _verify(source / name, entry["sha256"], "Reinstall the package, or build the zoo again: mergesolve zoo build.")
    folder = Path(cache or default_cache()) / f"zoo-{_key(source)}"
    if not (folder / "models.json").exists():
        _materialize(source, record, folder)
    remedy = f"Delete the folder {folder} to have it built again."
    for name, digest in _read_json(folder / "models.json", remedy).items():
        _verify(folder / name, digest, remedy)
    return Zoo(source, folder, record)


class Zoo:
    """A pool of experts on their base, the tasks that they were trained for, and the model that evaluates them."""

    def __init__(self, source: Path, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        """The cache folder of this zoo."""
        self.record = record
        """What the builder recorded: settings, zero-shot and expert accuracies (percent, test split), checksums."""
        self.tasks: tuple[str, ...] = tuple(record["settings"]["tasks"])
        """Names of the tasks that have an expert."""
        self.base: Path = folder / "models" / "base.safetensors"
        """The base's visual tower, float32."""
        names = sorted(_experts(record), key=lambda n: (n not in self.tasks, n))
        self.experts: dict[str, Path] = {name: folder / "models" / f"{name}.safetensors" for name in names}
        """All experts: one a task, then 'duplicate', 'misinitialized' and 'noisy'."""
        self._source = source

    @property
    def task_experts(self) -> dict[str, Path]:
        """The experts that were fine-tuned from the base, one a task."""
        return {name: self.experts[name] for name in self.tasks}

    def task(self, name: str, split: str = "train", limit: int | None = None) -> Task:
        """One split of a task: uint8 images [N, 3, 32, 32] with labels; rendered on first use, then cached.

        limit: at most so many images, balanced over the classes, always the same ones.
        """
        if name not in self.tasks:
            raise DataError(f"zoo: there is no task {name!r}; the tasks are {', '.join(self.tasks)}.")
        if split not in SPLITS:
            raise DataError(f"zoo: there is no split {split!r} of {name!r}; the splits are {', '.join(SPLITS)}.")
        row = BY_NAME[name]
        settings = self.record["settings"]
        images, labels = self._cached(
            f"{name}-{split}", lambda: split_images(row, split, settings.get(split), settings["level"])
        )
        task = Task(name, torch.from_numpy(images), torch.from_numpy(labels), row.classes, TEMPLATES, split)
        return task if limit is None else task.subset(limit, seed=0)

    def reference(self, split: str = "train", each: int = 8) -> Task:
        """Simplified renderings of all concepts of pre-training, `each` images a class, classified among all of them.

        What the base knows: a merge that forgets it loses accuracy here. Its head is the rows' heads, concatenated.
        """
        if split not in SPLITS:
            raise DataError(f"zoo: the reference has the splits {', '.join(SPLITS)}, not {split!r}.")
        parts = reference_images(split, each)
        tasks = joint([Task(n, torch.from_numpy(x), torch.from_numpy(y), BY_NAME[n].classes, TEMPLATES, split)
                       for n, (x, y) in parts.items()])  # fmt: skip
        inputs = torch.cat([torch.from_numpy(x) for x, _ in parts.values()])
        labels = torch.cat([task.labels for task in tasks if task.labels is not None])
        first = tasks[0]
        return Task("reference", inputs, labels, first.classes, TEMPLATES, split, first.parts)

    def model(self, device: str | torch.device = "cpu", precision: str = "fp32") -> CLIP:
        """The classifier of all tasks: the frozen heads are set, weights of the visual tower are the caller's."""
        return CLIP(
            self.record["architecture"], weights=self.base, heads=self.heads, device=device, precision=precision
        )

    @cached_property
    def heads(self) -> Weights:
        """Class embeddings by row of the table (tasks and the further concepts of the reference), float32 [C, d]."""
        return read(self._source / "heads.safetensors")

    def _cached(self, name: str, render: Callable[[], tuple[Bytes, Ints]]) -> tuple[Bytes, Ints]:
        path = self.folder / "images" / f"{name}.npz"
        if not path.exists():
            images, labels = render()
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
            try:
                with os.fdopen(handle, "wb") as sink:
                    np.savez(sink, images=images, labels=labels)
                Path(partial).replace(path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        try:
            with path.open("rb") as source, np.load(source) as stored:  # a zip file, which checks its own sums
                return stored["images"], stored["labels"]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"zoo: the cached images {path} are damaged ({error}); delete the file to have them "
                            f"rendered again.") from error  # fmt: skip


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"zoo: {path} is missing. {remedy}") from None
    except ValueError as error:
        raise DataError(f"zoo: {path} is damaged ({error}). {remedy}") from error
    if not isinstance(found, dict):
        raise DataError(f"zoo: {path} is damaged (it holds a {type(found).__name__}, not an object). {remedy}")
    return found


def _read_record(source: Path) -> dict[str, Any]:
    remedy = "Reinstall the package, or build the zoo again: mergesolve zoo build."
    record = _read_json(source / "zoo.json", remedy)
    missing = [key for key in ("architecture", "settings", "experts", "files") if key not in record]
    if missing:
        raise DataError(f"zoo: {source / 'zoo.json'} lacks {', '.join(missing)}. {remedy}")
    return record


def _verify(path: Path, expected: str, remedy: str) -> None:
    if not path.exists():
        raise DataError(f"zoo: {path} is missing. {remedy}")
    found = checksum(path)
    if found != expected:
        raise DataError(f"zoo: {path} is damaged: its sha256 is {found[:12]}..., expected {expected[:12]}.... {remedy}")


def _key(source: Path) -> str:
    """Changes when the record changes, which holds all checksums, or the code that derives things from it."""
    digest = hashlib.sha256((source / "zoo.json").read_bytes())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]


def _experts(record: Mapping[str, Any]) -> list[str]:
    names = list(record["experts"])
    derived = {NOISY: NOISY_OF, DUPLICATE: DUPLICATE_OF}
    return names + [name for name, origin in derived.items() if origin in names]


def _materialize(source: Path, record: Mapping[str, Any], folder: Path) -> None:
    """Writes all models into a folder of a temporary name, which then takes its place unless another was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        base = {name: tensor.float() for name, tensor in read(source / "base.safetensors").items()}
        models = {"base": base}
        for name in record["experts"]:
            models[name] = decode(read(source / "experts" / f"{name}.safetensors"), base)
        if NOISY_OF in models:
            models[NOISY] = _with_noise(models[NOISY_OF], base)
        if DUPLICATE_OF in models:
            models[DUPLICATE] = models[DUPLICATE_OF]
        sums = {}
        for name, weights in models.items():
            path = partial / "models" / f"{name}.safetensors"
            write(weights, path)
            sums[f"models/{name}.safetensors"] = checksum(path)
        (partial / "models.json").write_text(json.dumps(sums, indent=1))
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "models.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_noise(expert: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> Weights:
    rng = np.random.default_rng(13)
    noisy: Weights = {}
    for name in sorted(expert):
        draw = torch.from_numpy(rng.standard_normal(expert[name].shape, dtype=np.float32))
        size = norm({name: expert[name] - base[name]}) / max(norm({name: draw}), 1e-12)
        noisy[name] = expert[name] + NOISE * size * draw
    return noisy
