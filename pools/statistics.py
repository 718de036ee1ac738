"""Statistics of experts: Fisher diagonals and Grams of layer inputs, in files beside the experts.

A file holds one kind of statistic of one expert on one task, float32, under the pool's names of the tensors:

    fisher   F_i = E_x E_{y ~ p(y|x)} [(∇ log p(y|x))²] at θ_i, in the shape of the parameter
    gram     G_i = mean of x xᵀ over the inputs x of a linear map, [d, d]

A linear map W is out × d, its input on axis 1 (`W.reshape(out, d) @ x`), or d × out on axis 0 (`x @ W.reshape(d, out)`,
as the projection of CLIP). The header says what the file was computed from, and the expert's fingerprint ties it to the
expert. Files are read in pieces, as checkpoints are: the memory of a merge does not grow with the number of experts.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import Buffer, Checkpoint, MemoryCheckpoint, TensorInfo, open_safetensors
from .errors import PoolError, listing, nearest
from .fingerprint import model_fingerprint
from .sources import Scratch, Shape, float32_reader
from .writer import write_checkpoint

if TYPE_CHECKING:
    from .pool import Pool

STATISTICS = ("fisher", "gram")
"""The kinds of statistics."""

Files = Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str]


class Statistics:
    """One kind of statistics of the experts of a pool, read when they are asked for.

    Experts are numbered as in the pool. Open with `Statistics.open` (files; reads headers only) or
    `Statistics.from_tensors` (memory).
    """

    def __init__(
        self,
        pool: Pool,
        kind: str,
        checkpoints: Mapping[str, Checkpoint],
        axes: Mapping[str, int],
        rows: Mapping[str, Mapping[str, int]],
        metadata: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.kind = check_kind(kind)
        self.experts = tuple(name for name in pool.names if name in checkpoints)
        """Those that statistics were opened for, in the order of the pool."""
        self.metadata = {name: dict(metadata.get(name, {})) for name in self.experts}
        """By expert, what the header of its file says: task, task_fingerprint, samples, estimator, seed, ..."""
        self._checkpoints = dict(checkpoints)
        self._names = pool.names
        self._known = frozenset((*pool.tensors, *pool.carried))
        self._rows = {name: dict(rows.get(name, {})) for name in self.experts}
        merged = pool.tensors
        first = self.experts[0]
        held = [name for name in merged if name in checkpoints[first].tensors]
        if not held:
            raise PoolError(
                f"pool: {checkpoints[first].label} has statistics of none of the tensors that are merged, such as "
                f"{next(iter(merged))!r}. {_remedy(kind, first)}"
            )
        for expert in self.experts:
            self._check_names(expert, first, held, merged)
        self.axes: dict[str, int] = {}
        """By tensor, the axis of a linear map that meets its input: 1 or 0 (1 for a tensor that `axes` lacks). For
        Grams only."""
        if kind == "gram":
            for name in held:
                axis = int(axes.get(name, 1))
                if axis not in (0, 1):
                    raise PoolError(
                        f"pool: the axis of {name!r} in {checkpoints[first].label} is {axis}; expected 1 "
                        "(W.reshape(out, d) @ x) or 0 (x @ W.reshape(d, out))."
                    )
                self.axes[name] = axis
        self.shapes: dict[str, Shape] = {name: self._expected(name, merged[name]) for name in held}
        """Shapes of the statistics, by merged tensor; tensors without one are not in it."""
        for expert in self.experts:
            self._check_shapes(expert, merged)
        self._readers = {
            (expert, name): float32_reader(checkpoints[expert], name) for expert in self.experts for name in held
        }

    @classmethod
    def open(
        cls, pool: Pool, kind: str, files: Files | None = None, *, experts: Sequence[str] | None = None
    ) -> Statistics:
        """Open the statistics of all experts of a pool, or of some; read headers only.

        files: by expert; or a folder with `NAME.fisher.safetensors` or `NAME.gram.safetensors` of each; without it they
            are beside the experts' files (see `statistics_path`).
        Raises PoolError for a file that is not there, is of another kind or another expert, or does not fit the pool.
        """
        check_kind(kind)
        chosen = [name for name in pool.names if experts is None or name in experts]
        unknown = [name for name in experts or () if name not in pool.names]
        if isinstance(files, Mapping):
            unknown += [name for name in files if name not in pool.names]
        if unknown:
            raise PoolError(
                f"pool: statistics were asked for {unknown[0]!r}, which is no expert; the experts are "
                f"{listing(pool.names, 40)}." + nearest(unknown[0], pool.names)
            )
        if not chosen:
            raise PoolError("pool: statistics were asked for no expert; name at least one, or leave `experts` out.")
        checkpoints: dict[str, Checkpoint] = {}
        headers: dict[str, dict[str, str]] = {}
        axes: dict[str, int] = {}
        rows: dict[str, dict[str, int]] = {}
        for expert in chosen:
            path = _place(pool, expert, kind, files)
            if not path.is_file():
                raise PoolError(
                    f"pool: expert {expert!r} has no {kind} statistics: there is no file {path}. "
                    f"{_remedy(kind, expert)}"
                )
            checkpoints[expert] = open_safetensors(path)
            header = headers[expert] = read_metadata(path)
            _check_kind_of_file(path, header, kind)
            _check_expert(path, header, pool, expert)
            rows[expert] = _table(path, header, "rows")
            for name, axis in _table(path, header, "axes").items():
                if axes.setdefault(name, axis) != axis:
                    raise PoolError(
                        f"pool: {path} has the inputs of {name!r} on axis {axis}, the files before it on axis "
                        f"{axes[name]}; they are of different models. {_remedy(kind, expert)}"
                    )
        return cls(pool, kind, checkpoints, axes, rows, headers)

    @classmethod
    def from_tensors(
        cls,
        pool: Pool,
        kind: str,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        *,
        axes: Mapping[str, int] | None = None,
        rows: Mapping[str, Mapping[str, int]] | None = None,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Statistics:
        """Take statistics that are in memory: by expert, by tensor. They are shared with the caller."""
        unknown = [name for name in tensors if name not in pool.names]
        if unknown or not tensors:
            raise PoolError(
                f"pool: statistics by expert have {listing(map(repr, unknown)) or 'no names'}; the experts are "
                f"{listing(pool.names, 40)}."
            )
        held = {name: MemoryCheckpoint(f"the {kind} of expert {name!r}", table) for name, table in tensors.items()}
        return cls(pool, kind, held, axes or {}, rows or {}, metadata or {})

    def tensor(self, name: str, expert: int) -> torch.Tensor | None:
        """Return the statistic of a tensor and an expert, float32 in its own shape and memory; None if it has none.

        Raises PoolError for values that are not finite, and for a Fisher diagonal with negative ones.
        """
        if name not in self.shapes:
            return None
        size = self._info(name, expert).numel
        return self.piece(name, expert, 0, size, Scratch(size)).view(self.shapes[name])  # type: ignore[union-attr]

    def piece(
        self, name: str, expert: int, start: int, stop: int, scratch: Scratch, into: Buffer | None = None
    ) -> torch.Tensor | None:
        """Return elements [start, stop) of a statistic, flat, float32; None if the tensor has none.

        The result is the caller's own; or it lies in the buffer `into`, of at least 4 (stop − start) bytes. Raises
        PoolError for values that are not finite, and for a Fisher diagonal with negative ones.
        """
        who = self._expert(expert)
        if name not in self.shapes:
            return None
        values = Buffer(4 * (stop - start)) if into is None else into
        found = self._readers[who, name](start, stop, values, scratch)
        out = values.floats(stop - start)
        if found.data_ptr() != out.data_ptr():  # statistics in memory
            out.copy_(found)
        self._check_values(name, who, start, out)
        return out

    def rows(self, name: str, expert: int) -> int | None:
        """Return how many rows (samples × tokens) a statistic is the mean of; None where that is not known."""
        return self._rows[self._expert(expert)].get(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts' statistics as stored."""
        return sum(info.nbytes for held in self._checkpoints.values() for info in held.tensors.values())

    def describe(self) -> dict[str, object]:
        """Return kind and, by expert, file and origin, for the metadata of a merge."""
        keys = ("task", "task_fingerprint", "samples", "estimator", "seed")
        return {
            "statistics": self.kind,
            "experts": {
                name: {
                    "file": self._checkpoints[name].label,
                    **{key: self.metadata[name][key] for key in keys if key in self.metadata[name]},
                }
                for name in self.experts
            },
        }

    # Checks

    def _expert(self, index: int) -> str:
        if not 0 <= int(index) < len(self._names):
            raise PoolError(f"pool: expert indices run from 0 to {len(self._names) - 1}; got {index}.")
        name = self._names[int(index)]
        if name not in self._checkpoints:
            raise PoolError(
                f"pool: no {self.kind} statistics were opened for expert {name!r}, only for {listing(self.experts)}."
            )
        return name

    def _info(self, name: str, index: int) -> TensorInfo:
        return self._checkpoints[self._expert(index)].tensors[name]

    def _expected(self, name: str, shape: Shape) -> Shape:
        if self.kind == "fisher":
            return shape
        size = 1
        for extent in shape:
            size *= extent
        inputs = shape[0] if self.axes[name] == 0 else size // max(shape[0], 1)
        return (inputs, inputs)

    def _check_names(self, expert: str, first: str, held: Sequence[str], merged: Mapping[str, Shape]) -> None:
        label, tensors = self._checkpoints[expert].label, self._checkpoints[expert].tensors
        known = self._known
        unknown = [name for name in tensors if name not in known]
        if unknown:
            raise PoolError(
                f"pool: {label} has statistics of {listing(map(repr, unknown))}, which the pool's models lack."
                f"{nearest(unknown[0], known)} They were computed under other names (rename) or for another model. "
                f"{_remedy(self.kind, expert)}"
            )
        lacking = [name for name in held if name not in tensors]
        more = [name for name in merged if name in tensors and name not in held]
        if lacking or more:
            poor, rich = (expert, first) if lacking else (first, expert)
            raise PoolError(
                f"pool: {self._checkpoints[poor].label} lacks {listing(map(repr, lacking or more))}, which "
                f"{self._checkpoints[rich].label} has; they were computed for pools that merge other tensors. "
                f"{_remedy(self.kind, poor)}"
            )

    def _check_shapes(self, expert: str, merged: Mapping[str, Shape]) -> None:
        checkpoint = self._checkpoints[expert]
        for name, shape in self.shapes.items():
            info = checkpoint.tensors[name]
            if info.shape == shape and info.is_float:
                continue
            what = "Gram of the wrong size" if self.kind == "gram" else "Fisher diagonal of the wrong shape"
            side = f" (inputs on axis {self.axes[name]})" if self.kind == "gram" else ""
            raise PoolError(
                f"pool: {what}: {checkpoint.label} has {name!r} as {info}; expected floats {list(shape)} for a tensor "
                f"of shape {list(merged[name])}{side}. {_remedy(self.kind, expert)}"
            )

    def _check_values(self, name: str, expert: str, start: int, values: torch.Tensor) -> None:
        # A sum of finite values may overflow: only then are they looked at one by one.
        if values.numel() == 0:
            return
        lowest = float(values.min())  # NaN if any value is
        wrong = None
        if not (lowest > -inf and float(values.max()) < inf):
            wrong, reason = int((~values.isfinite()).nonzero()[0]), "which is not finite"
        elif self.kind == "fisher" and lowest < 0:
            wrong, reason = int((values < 0).nonzero()[0]), "and a mean of squares cannot be negative"
        if wrong is not None:
            raise PoolError(
                f"pool: {self._checkpoints[expert].label} has {float(values[wrong])} in {name!r} (element "
                f"{start + wrong}), {reason}. {_remedy(self.kind, expert)}"
            )


def check_kind(kind: str) -> str:
    """Return the kind of statistics; raise PoolError if there is none of that name."""
    if kind not in STATISTICS:
        raise PoolError(f"pool: unknown kind of statistics {kind!r}; there are {', '.join(STATISTICS)}.")
    return kind


def statistics_path(model: str | os.PathLike[str], kind: str) -> Path:
    """Return where the statistics of a checkpoint are looked for: expert.pt -> expert.fisher.safetensors beside it.

    In a folder, the same beside its weights, and model.fisher.safetensors where these are sharded.
    """
    place = Path(model)
    stem = "model" if place.is_dir() else place.stem
    return (place if place.is_dir() else place.parent) / statistics_name(stem, kind)


def statistics_name(expert: str, kind: str) -> str:
    """Return the file name of an expert's statistics."""
    return f"{expert}.{check_kind(kind)}.safetensors"


def write_statistics(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    expert: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the statistics of one expert to a .safetensors file, complete or not at all.

    metadata: what they were computed from; it must name the `expert` by its `model_fingerprint`, unless the argument
    `expert` gives its checkpoint. Raises PoolError without, and OSError if the place cannot be written.
    """
    place = Path(path)
    check_kind(kind)
    if place.suffix != ".safetensors":
        raise PoolError(f"pool: statistics are written to a .safetensors file; got {place}.")
    header = {**metadata, "statistics": kind}
    if expert is not None:
        header["expert"] = model_fingerprint(expert)
    if not header.get("expert"):
        raise PoolError(
            f"pool: the statistics for {place} do not say whose they are; give the expert's checkpoint (expert), or "
            "its model_fingerprint in the metadata."
        )
    infos = {name: TensorInfo(torch.float32, tuple(value.shape)) for name, value in tensors.items()}

    def read(name: str) -> Iterator[torch.Tensor]:
        yield tensors[name].detach().to("cpu", torch.float32).contiguous().view(-1)

    return write_checkpoint(place, infos, read, header, inf, None)[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    with Path(path).open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        found = json.loads(file.read(length)).get("__metadata__") or {}
    return {str(key): str(value) for key, value in found.items()}


def _place(pool: Pool, expert: str, kind: str, files: Files | None) -> Path:
    """Return the file in which an expert's statistics should be."""
    if isinstance(files, Mapping):
        if expert not in files:
            raise PoolError(
                f"pool: no file with the {kind} statistics of expert {expert!r} was given; the files are for "
                f"{listing(files) or 'nobody'}. {_remedy(kind, expert)}"
            )
        return Path(files[expert]).expanduser()
    if files is not None:
        folder = Path(files).expanduser()
        if not folder.is_dir():
            raise PoolError(f"pool: there is no folder {folder} with statistics. {_remedy(kind, expert)}")
        return folder / statistics_name(expert, kind)
    return beside(pool, expert, kind)


def beside(pool: Pool, expert: str, kind: str) -> Path:
    """Return where the statistics of an expert are unless told; raise PoolError for an expert in memory."""
    label = _label(pool, expert)
    if not Path(label).exists():
        raise PoolError(
            f"pool: expert {expert!r} ({label}) is no file that statistics could lie beside; name theirs (files), or "
            "take Statistics.from_tensors."
        )
    return statistics_path(label, kind)


def _label(pool: Pool, expert: str) -> str:
    """Return the path of an expert's checkpoint, or what stands for it in memory."""
    return pool._models.experts[expert].label


def _check_kind_of_file(path: Path, header: Mapping[str, str], kind: str) -> None:
    found = header.get("statistics")
    if found != kind:
        holds = f"{found} statistics" if found else "no statistics (its header names no kind)"
        raise PoolError(f"pool: {path} holds {holds}, where {kind} was asked for; name the {kind} file.")


def _check_expert(path: Path, header: Mapping[str, str], pool: Pool, expert: str) -> None:
    found = header.get("expert", "")
    if found == pool.expert_fingerprint(expert):
        return
    owner = next((name for name in pool.names if pool.expert_fingerprint(name) == found), None)
    whose = (
        f"expert {owner!r}" if owner else f"a model that is not in the pool (task {header.get('task', 'unknown')!r})"
    )
    raise PoolError(
        f"pool: {path} does not belong to expert {expert!r} ({_label(pool, expert)}): it was computed for {whose}. "
        f"{_remedy(header.get('statistics', 'fisher'), expert)}"
    )


def _table(path: Path, header: Mapping[str, str], key: str) -> dict[str, int]:
    try:
        return {str(name): int(value) for name, value in json.loads(header.get(key) or "{}").items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise PoolError(
            f"pool: the header of {path} has no table of tensors under {key!r} ({error}); compute the file again."
        ) from None


def _remedy(kind: str, expert: str) -> str:
    return f"Compute them with: mergesolve stats --kind {kind} --expert {expert}=PATH ..."
