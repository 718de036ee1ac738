"""Safetensors written tensor by tensor, so that memory holds one tensor at a time.

A file is an eight-byte length, a JSON header and the data. It is written under a temporary name, synced, and renamed:
what has the final name is complete. Every failure of the disk surfaces as OSError, with nothing left behind.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from .checkpoint import INDEX_FILES, SAFETENSORS_DTYPES, SAFETENSORS_SUFFIXES, TORCH_SUFFIXES, TensorInfo
from .errors import PoolError
from .memory import readable

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIXES = SAFETENSORS_SUFFIXES + TORCH_SUFFIXES
SHARD = re.compile(r"model(\.\d+)?-\d+-of-\d+\.safetensors")
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "open_clip_config.json",
    "preprocessor*",
    "processor*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)

Read = Callable[[str], Iterator[torch.Tensor]]
"""read(name) -> the tensor's elements in order, as flat pieces of the dtype that is written."""


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Read,
    metadata: Mapping[str, str],
    max_shard_size: float,
    companions: Path | None,
    inputs: Collection[Path] = (),
) -> list[Path]:
    """Write one file if `path` ends in .safetensors, else a folder, in shards of at most `max_shard_size` bytes.

    Configuration and tokenizer files of the folder `companions` are copied along. A model that the folder holds is
    replaced: the folder is read as the one or the other at any moment. Returns the files with weights (and the index).
    Raises PoolError if that would replace one of the files `inputs`, OSError if the place cannot be written or has no
    room.
    """
    _keep(inputs, path)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise PoolError(f"pool: the metadata of a checkpoint must be text; {key!r} is {value!r}. Use json.dumps.")
    total = sum(info.nbytes for info in tensors.values())
    if path.suffix.lower() == ".safetensors":
        if path.is_dir():
            raise PoolError(f"pool: {path} is a folder; name a file, or a folder without the suffix .safetensors.")
        _make_room(path.parent, total)
        with temporary(path) as place:
            write_safetensors(place, tensors, read, metadata)
        return [path]
    if path.exists() and not path.is_dir():
        raise PoolError(f"pool: {path} is a file; name a .safetensors file or a folder.")
    shards = shard(tensors, max_shard_size)
    existed = path.exists()
    _make_room(path, total)
    earlier = _earlier_model(path)
    names = [SINGLE] if len(shards) == 1 else _shard_names(path, len(shards))
    try:
        with contextlib.ExitStack() as stack:
            # All files are complete under temporary names before the first takes its own. Names are taken in the
            # reverse of this order: the index, which decides what the folder is read as, comes last.
            if len(shards) > 1:
                place = stack.enter_context(temporary(path / INDEX))
                weight_map = {key: name for name, part in zip(names, shards, strict=True) for key in part}
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                place.write_text(json.dumps(index, indent=1), encoding="utf-8")
            for name, part in zip(names, shards, strict=True):
                place = stack.enter_context(temporary(path / name))
                write_safetensors(place, {key: tensors[key] for key in part}, read, metadata)
            for companion in _companions(companions, path):
                place = stack.enter_context(temporary(path / companion.name))
                shutil.copyfile(companion, place)
    except BaseException as error:
        if isinstance(error, OSError) and len(shards) > 1:
            for name in names:
                with contextlib.suppress(OSError):
                    (path / name).unlink(missing_ok=True)
        if not existed:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    if len(shards) > 1:
        names.append(INDEX)
    for name in earlier:
        if name not in names:
            (path / name).unlink(missing_ok=True)
    _sync_folder(path)
    return [path / name for name in names]


def _shard_names(folder: Path, count: int) -> list[str]:
    """Return names for the shards that no file has: those of a model that is replaced stay until the index changes."""
    for stem in itertools.chain(["model"], (f"model.{k}" for k in itertools.count(1))):
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if not any((folder / name).exists() for name in names):
            break
    return names


def _keep(inputs: Collection[Path], path: Path) -> None:
    """Raise PoolError if a model at this path would replace a file that it is made from."""
    targets = [path] if path.suffix.lower() == ".safetensors" else [path / name for name in _earlier_model(path)]
    replaced = {target.resolve() for target in targets} & {file.resolve() for file in inputs}
    if replaced:
        raise PoolError(
            f"pool: {min(replaced)} is one of the models that are merged, and would be replaced; choose another path."
        )


def _earlier_model(folder: Path) -> list[str]:
    """Return the files of a sharded model or model.safetensors in a folder: indexes first, as they decide what is read.

    Files of other names are left alone: they are not read beside model.safetensors or an index.
    """
    indexes = [name for name in INDEX_FILES if (folder / name).is_file()]
    files = {path.name for path in folder.glob("model*") if path.name == SINGLE or SHARD.fullmatch(path.name)}
    for name in indexes:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # not an index after all
            shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
            files |= {shard for shard in shards if Path(shard).name == shard and shard.endswith(SUFFIXES)}
    return indexes + sorted(files)


def write_safetensors(path: Path, tensors: Mapping[str, TensorInfo], read: Read, metadata: Mapping[str, str]) -> None:
    """Write header and data of one file and sync it."""
    # Wide elements first, as the safetensors library does, keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        info = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            for piece in read(name):
                file.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path}: {file.tell()} bytes written, {8 + len(text) + end} announced")


def shard(tensors: Mapping[str, TensorInfo], max_shard_size: float) -> list[list[str]]:
    """Split names, in order, so that no part exceeds the size in bytes unless a single tensor does."""
    if not max_shard_size > 0:
        raise PoolError(f"pool: max_shard_size must be a positive number of bytes; got {max_shard_size!r}.")
    parts: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if parts[-1] and size + info.nbytes > max_shard_size:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += info.nbytes
    return parts


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename to `path` on success, remove on failure."""
    place = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield place
        place.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_room(folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the folder {folder} cannot be made: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"the folder {folder} is not writable; choose another path")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{folder} has {readable(free)} left and the weights need {readable(needed)}; free some space"
        )


def _companions(source: Path | None, target: Path) -> Sequence[Path]:
    if source is None or not source.is_dir() or source.resolve() == target.resolve():
        return []
    found: Iterable[Path] = (file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file())
    return sorted(set(found))
