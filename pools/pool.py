"""Pool: checkpoints on disk as a linear operator with an adjoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from . import memory, operator
from .blocks import Blocks, make_blocks
from .checkpoint import Checkpoint, MemoryCheckpoint, TensorInfo, locate, model_folder, open_checkpoint
from .compatibility import RenamedCheckpoint, mergeable
from .device import DeviceStack
from .errors import PoolError, listing, nearest
from .fingerprint import model_fingerprint, sample_digest
from .operator import Matrix, Weights
from .resident import Resident, resident_nbytes
from .sources import Narrowed, Scratch, Selected, Shape, Stored, TaskVectors, Transformed, TransformFunction
from .spec import Spec, parse_dtype, parse_patterns, parse_prefixes, parse_spec
from .transforms.transform import Prepared, Transform
from .workers import Workers
from .writer import write_checkpoint

Backend = Literal["auto", "streaming", "resident"]
BACKENDS = ("auto", "streaming", "resident")
GROUP = 1 << 24  # elements that are merged before they are written: 64 MB


class Models:
    """The checkpoints of a pool and which of their tensors are merged; shared by its subsets and transforms."""

    def __init__(
        self,
        base: RenamedCheckpoint,
        experts: Mapping[str, Checkpoint],
        candidates: Mapping[str, Shape],
        folder: Path | None,
    ) -> None:
        self.base = base
        self.experts = dict(experts)
        self.candidates = candidates
        self.folder = folder
        self.fingerprints: dict[str, str] = {}  # of the experts, as they are asked for
        self._merged: dict[str, Shape] | None = None

    @cached_property
    def files(self) -> frozenset[Path]:
        """The files that hold tensors of these models."""
        models: list[Checkpoint] = [self.base, *self.experts.values()]
        return frozenset(Path(place) for place in {model.location(name) for model in models for name in model.tensors})

    def restricted(self, names: Collection[str], workers: Workers) -> Models:
        """Return the same models, of which only some of the merged tensors are merged."""
        merged = {name: shape for name, shape in self.merged(workers).items() if name in names}
        models = Models(self.base, self.experts, merged, self.folder)
        models._merged = merged
        return models

    def merged(self, workers: Workers) -> dict[str, Shape]:
        """Return the tensors that differ between models; the first call compares data, up to the first difference."""
        if self._merged is None:
            names = list(self.candidates)
            same = dict.fromkeys(names, True)

            def compare(name: str, scratch: Scratch) -> None:
                same[name] = _identical(name, self.base, list(self.experts.values()), scratch)

            workers.run(names, compare)
            merged = {name: shape for name, shape in self.candidates.items() if not same[name]}
            if not merged:
                raise PoolError(
                    f"pool: all {len(self.experts)} experts are identical to the base {self.base.label}, "
                    "so there is nothing to merge; check the paths."
                )
            self._merged = merged
        return self._merged


def _identical(name: str, base: Checkpoint, experts: Sequence[Checkpoint], scratch: Scratch) -> bool:
    """Whether a tensor has the same values in all models; stops at the first piece that differs."""
    size = prod(base.tensors[name].shape)
    kind = base.tensors[name].dtype
    read_base, readers = base.reader(name), [expert.reader(name) for expert in experts]
    start, step = 0, min(1024, scratch.limit)
    while start < size:
        stop = min(start + step, size)
        reference = read_base(start, stop, scratch.base)
        scratch.bytes_read += reference.nbytes
        for read in readers:
            other = read(start, stop, scratch.raw)
            scratch.bytes_read += other.nbytes
            if other.dtype == kind:
                equal = torch.equal(other.view(torch.uint8), reference.view(torch.uint8))
            else:
                equal = torch.equal(other.to(torch.float64), reference.to(torch.float64))
            if not equal:
                return False
        start, step = stop, scratch.limit
    return True


class Pool:
    """A base and n experts: a linear operator from coefficients Λ [rows, n] to weights, with its adjoint.

    Build one with `Pool.open` (files; reads headers only) or `Pool.from_state_dicts` (memory).
    """

    def __init__(
        self,
        models: Models,
        names: Sequence[str],
        *,
        dtype: torch.dtype | None,
        backend: Backend,
        device: str | torch.device,
        source: Callable[[Workers], TaskVectors] | None = None,
        lineage: tuple[str, ...] = (),
        workers: Workers | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise PoolError(
                f"pool: unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}."
                + nearest(backend, BACKENDS)
            )
        self.names = tuple(names)
        self.dtype = dtype
        self.device = check_device(device)
        self._models = models
        self._given_source = source
        self._lineage = lineage
        self._workers = Workers(operator.PIECE) if workers is None else workers
        self._fingerprint: str | None = None
        elements = sum(prod(shape) for shape in models.candidates.values())
        needed = resident_nbytes(self.n, models.candidates)
        room = memory.available(self.device)
        if backend == "auto":
            backend = "resident" if 4 * self.n * elements < room / 2 else "streaming"
        elif backend == "resident" and needed > room:
            raise PoolError(
                f"pool: the resident backend needs {memory.readable(needed)} on {self.device} for {self.n} task "
                f'vectors of {elements} parameters; {memory.readable(room)} are available. Use backend="streaming".'
            )
        self.backend: str = backend
        self.memory_needed: int = needed if backend == "resident" else streaming_nbytes(self.n, self._workers)
        """Bytes that the backend allocates, beside what it returns.

        Streaming, the buffers of its threads; k > 4 gradients correlated in one pass take 4 k bytes more for each of
        the `operator.PIECE` elements of a piece.
        """

    @classmethod
    def open(
        cls,
        spec: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        experts: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        dtype: str | torch.dtype | None = None,
        backend: Backend = "auto",
        device: str | torch.device = "cpu",
    ) -> Pool:
        """Open checkpoints by path or Hub id; read headers only.

        `spec` is a YAML file or a mapping with the same fields as the keyword arguments up to `dtype` (see `spec.py`);
        arguments that are given win over it. Raises PoolError that names every difference between the models.
        """
        given = {
            "base": base,
            "experts": experts,
            "include": include,
            "exclude": exclude,
            "rename": rename,
            "dtype": dtype,
        }
        parsed = parse_spec(spec, given)
        opened = {name: open_checkpoint(path) for name, path in parsed.experts.items()}
        place = locate(parsed.base)
        return cls._assemble(
            open_checkpoint(place), opened, parsed, model_folder(place), backend=backend, device=device
        )

    @classmethod
    def from_state_dicts(
        cls,
        base: Mapping[str, torch.Tensor],
        experts: Mapping[str, Mapping[str, torch.Tensor] | str | os.PathLike[str]],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        dtype: str | torch.dtype | None = None,
        backend: Backend = "auto",
        device: str | torch.device = "cpu",
    ) -> Pool:
        """Make a pool of state dicts in memory, which it shares with the caller (do not change them afterwards).

        An expert may be the path of a checkpoint instead, of which only headers are read here.
        """
        if not experts:
            raise PoolError("pool: there are no experts; a pool needs at least one.")
        spec = Spec(
            "memory",
            dict.fromkeys(experts, "memory"),
            parse_patterns(include, "pool: include"),
            parse_patterns(exclude, "pool: exclude"),
            parse_prefixes(rename, "pool: rename"),
            parse_dtype(dtype, "pool: dtype"),
        )
        opened = {
            name: MemoryCheckpoint(f"state dict {name!r}", state)
            if isinstance(state, Mapping)
            else open_checkpoint(state)
            for name, state in experts.items()
        }
        return cls._assemble(
            MemoryCheckpoint("state dict of the base", base), opened, spec, None, backend=backend, device=device
        )

    @classmethod
    def _assemble(
        cls,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        spec: Spec,
        folder: Path | None,
        *,
        backend: Backend,
        device: str | torch.device,
    ) -> Pool:
        if "base" in experts:
            raise PoolError("pool: an expert cannot be called 'base', which means θ0; give it another name.")
        named_base = RenamedCheckpoint(base, spec.rename)
        named = {name: RenamedCheckpoint(expert, spec.rename) for name, expert in experts.items()}
        candidates = mergeable(named_base, named, spec.include, spec.exclude)
        models = Models(named_base, named, candidates, folder)
        return cls(models, list(named), dtype=spec.dtype, backend=backend, device=device)

    # What is in it

    @property
    def n(self) -> int:
        """Number of experts."""
        return len(self.names)

    @cached_property
    def tensors(self) -> dict[str, Shape]:
        """Merged tensors and their shapes, in natural order of names.

        The first access compares the models' data, piece by piece up to the first difference, to find tensors that are
        identical in all of them.
        """
        return self._models.merged(self._workers)

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """Tensors of the base that are not merged: integers, left out by pattern, or identical in all models."""
        return tuple(name for name in self._models.base.tensors if name not in self.tensors)

    @property
    def candidates(self) -> dict[str, Shape]:
        """Tensors that are merged unless they are identical in all models; known without reading data."""
        return dict(self._models.candidates)

    @property
    def candidate_nbytes(self) -> int:
        """Bytes of the candidates as stored, base and experts together; known without reading data."""
        models = [self._models.base, *(self._models.experts[name] for name in self.names)]
        return sum(model.tensors[name].nbytes for model in models for name in self._models.candidates)

    def written_nbytes(self, dtype: str | torch.dtype | None = None) -> int:
        """Bytes of a model that `materialize` or `write` writes, the header left out."""
        chosen = parse_dtype(dtype, "pool: dtype") or self.dtype
        infos = self._models.base.tensors.values()
        return sum(
            info.numel * (chosen if chosen is not None and info.is_float else info.dtype).itemsize for info in infos
        )

    @property
    def transforms(self) -> tuple[str, ...]:
        """Labels of the transforms that were applied, in order."""
        return self._lineage

    @property
    def nbytes(self) -> int:
        """Bytes of the merged tensors as stored, base and experts together."""
        models = [self._models.base, *(self._models.experts[name] for name in self.names)]
        return sum(model.tensors[name].nbytes for model in models for name in self.tensors)

    @property
    def resident_nbytes(self) -> int:
        """Memory that the resident backend needs for the merged tensors."""
        return resident_nbytes(self.n, self.tensors)

    @cached_property
    def storage(self) -> dict[str, tuple[torch.dtype, ...]]:
        """Element types in which the merged tensors are stored, for "base" and each expert."""
        models = {"base": self._models.base, **{name: self._models.experts[name] for name in self.names}}
        return {
            name: tuple(dict.fromkeys(model.tensors[tensor].dtype for tensor in self.tensors))
            for name, model in models.items()
        }

    @property
    def bytes_read(self) -> int:
        """Bytes read from the checkpoints so far, by this pool, its subsets and transforms."""
        return self._workers.bytes_read

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, element types and a sample of each tensor; the same in another folder.

        The sample is the beginning, the middle and the end of every tensor that may be merged, 2 kB each in float32.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            models = {"": self._models.base, **self._models.experts}
            table = {
                name: {key: str(info) for key, info in sorted(model.tensors.items())} for name, model in models.items()
            }
            digest.update(json.dumps([table, list(self.names), list(self._lineage)]).encode())

            def sample(model: Checkpoint, scratch: Scratch) -> bytes:
                return sample_digest(model, sorted(self._models.candidates), scratch)

            self._workers.run(list(models.values()), sample, then=lambda model, found: digest.update(found))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def expert_fingerprint(self, name: str) -> str:
        """SHA-256 of one expert's checkpoint, as `model_fingerprint` gives it; the same in every pool."""
        if name not in self.names:
            raise PoolError(
                f"pool: there is no expert {name!r}; the experts are {listing(self.names, 40)}."
                + nearest(str(name), self.names)
            )
        if name not in self._models.fingerprints:
            self._models.fingerprints[name] = model_fingerprint(self._models.experts[name])
        return self._models.fingerprints[name]

    def __repr__(self) -> str:
        return f"Pool({self.n} experts, backend={self.backend!r}, device={str(self.device)!r})"

    # The operator

    @cached_property
    def _source(self) -> TaskVectors:
        if self._given_source is not None:
            return self._given_source(self._workers)
        experts = [self._models.experts[name] for name in self.names]
        frozen = sum(prod(shape) for name, shape in self.candidates.items() if name not in self.tensors)
        return Stored(self._models.base, experts, self.tensors, frozen)

    @cached_property
    def _resident(self) -> Resident:
        return Resident(self._source, self._workers)

    @cached_property
    def _stacked(self) -> DeviceStack | None:
        """The operator on an accelerator, where the pool is resident on one."""
        if self.backend != "resident" or self.device.type == "cpu":
            return None
        return DeviceStack(self._source, self._workers, self.device)

    def engine(self) -> tuple[TaskVectors, Workers]:
        """Return where task vectors come from on the host, and the threads that take them."""
        if self.backend == "resident" and self.device.type == "cpu":
            return self._resident, self._workers
        return self._source, self._workers

    def stream(self) -> tuple[TaskVectors, Workers]:
        """Return the same for single passes: experts are read as they come unless they are in memory already."""
        loaded: Resident | None = self.__dict__.get("_resident")
        return self._source if loaded is None else loaded, self._workers

    def blocks(self, kind: str | Sequence[str]) -> Blocks:
        """Partition the merged tensors by "model", "layer", "tensor", "row", or regular expressions (first match)."""
        return make_blocks(kind, self.tensors)

    def combine(self, coefficients: Matrix, blocks: Blocks, *, since: tuple[Matrix, Weights] | None = None) -> Weights:
        """Return θ_b = θ0_b + Σ_i Λ[b,i] τ_{i,b} for coefficients Λ [rows, n]; Λ = 0 gives the base bit for bit.

        `since` = (Λ_old, weights of Λ_old) updates those weights in place and returns them: tensors whose rows did not
        change are not read, and of the others only the experts whose coefficients changed.
        """
        self._check_blocks(blocks)
        matrix = self._matrix(coefficients, blocks, "coefficients")
        old: tuple[Matrix, Weights] | None = None
        if since is not None:
            old = self._matrix(since[0], blocks, "coefficients of `since`"), self._check_weights(since[1])
        if self._stacked is not None:
            return self._stacked.combine(matrix, blocks, since=old)
        source, workers = self.engine()
        return operator.combine(source, workers, matrix, blocks, self.device, since=old)

    def displacement(self, coefficients: Matrix, blocks: Blocks) -> Weights:
        """Return Σ_i D[b,i] τ_{i,b} for D [rows, n]; experts whose coefficients are 0 are not read."""
        self._check_blocks(blocks)
        matrix = self._matrix(coefficients, blocks, "coefficients")
        if self._stacked is not None:
            return self._stacked.combine(matrix, blocks, with_base=False)
        source, workers = self.engine()
        return operator.combine(source, workers, matrix, blocks, self.device, with_base=False)

    def correlate(
        self,
        gradients: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
        blocks: Blocks,
        *,
        experts: Sequence[int] | None = None,
    ) -> Matrix:
        """Return the scores S[b,i] = ⟨G_b, τ_{i,b}⟩, [rows, n]; for k gradients, in one pass, [k, rows, n].

        Tensors that a gradient lacks count as 0. With `experts` (indices) only those are read; other columns are nan.
        """
        self._check_blocks(blocks)
        one = isinstance(gradients, Mapping)
        stack: list[Mapping[str, torch.Tensor]] = [gradients] if isinstance(gradients, Mapping) else list(gradients)
        for gradient in stack:
            self._check_gradient(gradient)
        asked = range(self.n) if experts is None else [self._index(expert) for expert in experts]
        if self._stacked is not None:
            found = self._stacked.correlate(stack, blocks)[:, :, list(asked)]
        else:
            source, workers = self.engine()
            found = operator.correlate(source, workers, stack, blocks, asked)
        if experts is not None:
            scores = np.full((len(stack), blocks.count, self.n), np.nan)
            scores[:, :, list(asked)] = found
            found = scores
        return found[0] if one else found

    def gram(self, blocks: Blocks) -> Matrix:
        """Return the inner products ⟨τ_{i,b}, τ_{j,b}⟩ of the task vectors, [rows, n, n]."""
        self._check_blocks(blocks)
        if self._stacked is not None:
            return self._stacked.gram(blocks)
        source, workers = self.engine()
        return operator.gram(source, workers, blocks)

    # Other pools

    def subset(self, names: Sequence[str]) -> Pool:
        """Return the pool of some experts, in the order given; merged tensors and rows stay the same."""
        chosen = list(names)
        unknown = [name for name in chosen if name not in self.names]
        if unknown:
            raise PoolError(
                f"pool: there is no expert {unknown[0]!r}; the experts are {listing(self.names, 40)}."
                + nearest(str(unknown[0]), self.names)
            )
        if not chosen or len(set(chosen)) != len(chosen):
            raise PoolError(f"pool: a subset needs at least one expert, each once; got {chosen}.")
        index = [self.names.index(name) for name in chosen]
        return self._derived(chosen, lambda _: Selected(self.stream()[0], index), self._lineage)

    def restrict(self, tensors: Collection[str]) -> Pool:
        """Return the pool in which only these merged tensors are merged; the others keep the base's values."""
        unknown = [name for name in tensors if name not in self.tensors]
        if unknown or not tensors:
            what = f"{unknown[0]!r} is none" if unknown else "none was given"
            raise PoolError(f"pool: restrict needs merged tensors of the pool; {what}.")
        models = self._models.restricted(tensors, self._workers)
        shapes = models.merged(self._workers)
        return Pool(
            models,
            self.names,
            dtype=self.dtype,
            backend=self.backend,  # type: ignore[arg-type]
            device=self.device,
            source=lambda _: Narrowed(self.stream()[0], shapes),
            lineage=self._lineage,
            workers=self._workers,
        )

    def transform(self, fn: Transform | TransformFunction, label: str | None = None) -> Pool:
        """Return a pool whose task vectors are transformed, lazily.

        `fn` is a transform of `TRANSFORMS`, which streams in pieces; or fn(name, base [*shape], task_vectors
        [n, *shape]) -> [n, *shape] with a label that says what it does. The latter is called tensor by tensor, when
        the tensor is used: with the streaming backend once in every pass, so it must be a pure function (seed its
        random numbers by name) of CPU tensors. The label enters the fingerprint.
        """
        if isinstance(fn, Transform):
            made, label = fn, label or fn.label
            return self._derived(
                self.names,
                lambda workers: Prepared(self.stream()[0], workers, made, self.names),
                (*self._lineage, label),
                joint=fn.joint,
            )
        if not isinstance(label, str) or not label:
            raise PoolError(f"pool: a transform needs a label that says what it does; got {label!r}.")
        function, said = fn, label
        return self._derived(
            self.names, lambda _: Transformed(self.stream()[0], function, said), (*self._lineage, label)
        )

    def _derived(
        self,
        names: Sequence[str],
        source: Callable[[Workers], TaskVectors],
        lineage: tuple[str, ...],
        *,
        joint: bool = False,
    ) -> Pool:
        """Return a pool of other task vectors; `joint` ones take all experts of a piece at once, so pieces shrink."""
        limit = self._workers.limit
        return Pool(
            self._models,
            names,
            dtype=self.dtype,
            backend=self.backend,  # type: ignore[arg-type]
            device=self.device,
            source=source,
            lineage=lineage,
            workers=self._workers.of(min(limit, operator.gram_limit(limit, self.n))) if joint else self._workers,
        )

    # Weights

    def base_weights(self) -> Weights:
        """Return all tensors of the base, carried ones too: float32 for floating-point ones, others as stored."""
        base = self._models.base
        weights: Weights = {}
        scratch = self._workers.scratch()
        for name, info in base.tensors.items():
            kind = torch.float32 if info.is_float else info.dtype
            read = base.reader(name)
            flat = torch.empty(info.numel, dtype=kind)
            for start in range(0, info.numel, scratch.limit):
                stop = min(start + scratch.limit, info.numel)
                flat[start:stop] = read(start, stop, scratch.raw)
                scratch.bytes_read += (stop - start) * info.dtype.itemsize
            weights[name] = flat.view(info.shape).to(self.device)
        return weights

    def materialize(
        self,
        coefficients: Matrix,
        blocks: Blocks,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        max_shard_size: float = 5e9,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Path]:
        """Write the merged model to a .safetensors file or a folder, tensor by tensor, and return the files.

        Merged tensors are those of `combine`, carried ones the base's, all under the names that the base's file uses.
        Element types are `dtype`, else the pool's, else the base's per tensor. A folder is sharded above
        `max_shard_size` bytes and gets the base folder's configuration and tokenizer files. The header's metadata says
        where the weights came from. Raises OSError if the place cannot be written, PoolError for coefficients that are
        not finite, values that overflow the element type, and a path of the pool's own; then nothing is left behind.
        """
        self._check_blocks(blocks)
        matrix = self._matrix(coefficients, blocks, "coefficients")
        if not np.isfinite(matrix).all():
            raise PoolError("pool: the coefficients are not all finite; a model with them could not be used.")
        source, workers = self.engine()

        def merged(names: Sequence[str]) -> Weights:
            return operator.combine(source, workers, matrix, blocks, torch.device("cpu"), names=names)

        summary = {
            "blocks": blocks.kind,
            "coefficients_sha256": hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest(),
            "coefficients_mean": json.dumps([round(float(value), 9) for value in matrix.mean(axis=0)]),
            **(metadata or {}),
        }
        return self.write(merged, path, dtype=dtype, max_shard_size=max_shard_size, metadata=summary)

    def write(
        self,
        merged: Callable[[Sequence[str]], Weights],
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        max_shard_size: float = 5e9,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Path]:
        """Write a model to a .safetensors file or a folder, as `materialize` does, from any merged tensors.

        `merged(names)` returns the float32 values of some merged tensors; it is asked for groups of at most 64 MB (or
        one tensor), each tensor once, those of wide elements first. Raises PoolError, too, for values that are not
        finite.
        """
        chosen = parse_dtype(dtype, "pool: dtype") or self.dtype
        base = self._models.base
        stored = base.stored_names
        names = {stored[name]: name for name in base.tensors}
        infos = {
            stored[name]: TensorInfo(chosen if chosen is not None and info.is_float else info.dtype, info.shape)
            for name, info in base.tensors.items()
        }
        # In the order in which a file is written, or what is merged together with a tensor would wait for its turn.
        order = sorted(self.tensors, key=lambda name: -infos[stored[name]].dtype.itemsize)
        ready: Weights = {}

        def read(stored_name: str) -> Iterator[torch.Tensor]:
            name, target = names[stored_name], infos[stored_name].dtype
            if name in self.tensors:
                if name not in ready:
                    ready.update(merged(self._group(order, name)))
                    order[:] = [left for left in order if left not in ready]
                values = ready.pop(name).view(-1)
                if not bool(torch.isfinite(values.sum()) or torch.isfinite(values).all()):
                    raise PoolError(
                        f"pool: the merged {name!r} holds NaN or infinity; look for the model it comes from with "
                        "`mergesolve pool inspect`, or leave the tensor out with exclude."
                    )
                yield _cast(values, target, name)
                return
            scratch = self._workers.scratch()
            info, stored_piece = base.tensors[name], base.reader(name)
            for start in range(0, info.numel, scratch.limit):
                stop = min(start + scratch.limit, info.numel)
                scratch.bytes_read += (stop - start) * info.dtype.itemsize
                yield _cast(stored_piece(start, stop, scratch.raw), target, name)

        summary = {
            "mergesolve": version("mergesolve"),
            "pool_fingerprint": self.fingerprint,
            "base": base.label,
            "experts": json.dumps(list(self.names)),
            "transforms": json.dumps(list(self._lineage)),
            **(metadata or {}),
        }
        return write_checkpoint(Path(path), infos, read, summary, max_shard_size, self._models.folder, self.files)

    @property
    def files(self) -> frozenset[Path]:
        """The files of base and experts, which nothing that is made of them may replace."""
        return self._models.files

    def _group(self, order: Sequence[str], first: str) -> list[str]:
        """Return tensors from `first` on, as many as are merged at once."""
        group, size = [first], prod(self.tensors[first])
        for name in order[order.index(first) + 1 :]:
            size += prod(self.tensors[name])
            if size > GROUP:
                break
            group.append(name)
        return group

    # Checks

    def _check_blocks(self, blocks: Blocks) -> None:
        if list(blocks.rows) != list(self.tensors):
            raise PoolError(
                f"pool: these blocks partition {len(blocks.rows)} tensors, not the pool's {len(self.tensors)}; "
                "make them with pool.blocks()."
            )

    def _matrix(self, value: Matrix, blocks: Blocks, what: str) -> Matrix:
        matrix = np.asarray(value, dtype=np.float64)
        if matrix.shape != (blocks.count, self.n):
            raise PoolError(
                f"pool: {what} must have the shape [rows, experts] = [{blocks.count}, {self.n}]; "
                f"got {list(matrix.shape)}."
            )
        return matrix

    def _check_weights(self, weights: Weights) -> Weights:
        for name, shape in self.tensors.items():
            value = weights.get(name)
            if (
                value is None
                or tuple(value.shape) != shape
                or value.dtype != torch.float32
                or not value.is_contiguous()
            ):
                found = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
                raise PoolError(
                    f"pool: the weights of `since` hold {found} for {name!r}; expected contiguous float32 "
                    f"{list(shape)}, as combine returned them."
                )
        return weights

    def _check_gradient(self, gradient: Mapping[str, torch.Tensor]) -> None:
        for name, value in gradient.items():
            if name in self.tensors:
                if tuple(value.shape) != self.tensors[name]:
                    raise PoolError(
                        f"pool: the gradient of {name!r} has shape {list(value.shape)}; "
                        f"expected {list(self.tensors[name])}."
                    )
            elif name not in self._models.base.tensors:
                raise PoolError(
                    f"pool: there is a gradient for {name!r}, which is no tensor of the base; match the names with "
                    "rename." + nearest(name, self.tensors)
                )

    def _index(self, expert: int) -> int:
        if not 0 <= int(expert) < self.n:
            raise PoolError(f"pool: expert indices run from 0 to {self.n - 1}; got {expert}.")
        return int(expert)


def streaming_nbytes(n: int, workers: Workers) -> int:
    """Memory of the threads' buffers, with the stack of n experts that `gram` takes (or of up to 4 gradients)."""
    return workers.nbytes + 4 * workers.threads * max(n * operator.gram_limit(workers.limit, n), 4 * workers.limit)


def _cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Convert to the element type that is written; raise PoolError if finite values overflow it."""
    if values.dtype == dtype:
        return values
    result = values.to(dtype)
    if dtype.itemsize < values.dtype.itemsize and bool((result.isinf() & values.isfinite()).any()):
        largest = float(values.abs().max())
        raise PoolError(
            f"pool: {name!r} has values up to {largest:.3g}, which overflow {str(dtype).removeprefix('torch.')}; "
            "write bfloat16 or float32 (dtype)."
        )
    return result


def check_device(device: str | torch.device) -> torch.device:
    """Return the device; raise PoolError if it names none, or CUDA where there is none."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise PoolError(f'pool: {device!r} is no device; use "cpu" or "cuda".') from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PoolError(
            "pool: the device 'cuda' was asked for, but PyTorch sees no CUDA device here; use device=\"cpu\"."
        )
    return found
