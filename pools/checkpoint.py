"""Checkpoints as named flat arrays that are read in pieces.

A checkpoint is a table of tensors (dtype, shape) and a way to read elements [start, stop) of one of them into a buffer
that the caller owns. Files are read with `os.preadv`, not through a memory map: mapped pages count as resident memory,
and the memory of a pool must not grow with the number of its experts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import struct
import weakref
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import PoolError, listing

try:
    import resource
except ImportError:  # not on Windows, which has no such limit
    resource = None  # type: ignore[assignment]

# Names of element types in safetensors headers.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself

SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
STATISTICS_SUFFIXES = (".fisher.safetensors", ".gram.safetensors")  # beside an expert, and no model themselves
HUB_TIMEOUT = 10.0  # seconds for the Hub to answer


@dataclass(frozen=True)
class TensorInfo:
    """Element type and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether the tensor can be merged; integers and booleans are carried over."""
        return self.dtype.is_floating_point

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Buffer:
    """Reusable bytes, seen as elements of any type."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8)
        self._view: Any = memoryview(self.bytes.numpy())  # type: ignore[arg-type]
        self._windows: dict[tuple[int, torch.dtype], tuple[Any, torch.Tensor]] = {}

    def window(self, count: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
        """Return the first `count` elements as writable bytes and as a tensor (kept for the next call)."""
        found = self._windows.get((count, dtype))
        if found is None:
            size = count * dtype.itemsize
            found = self._windows[count, dtype] = (self._view[:size], self.bytes[:size].view(dtype))
        return found

    def floats(self, count: int) -> torch.Tensor:
        """Return the first `count` float32 elements."""
        return self.window(count, torch.float32)[1]


Read = Callable[[int, int, Buffer], torch.Tensor]
"""read(start, stop, buffer) -> elements [start, stop) of one tensor, flat, in its stored dtype, on the CPU.

The result may alias the buffer (which must be large enough) or the checkpoint itself: it is not to be written to.
"""


class Checkpoint(Protocol):
    """One model's tensors, read in pieces."""

    label: str
    """The path, or what stands for it in messages."""
    tensors: Mapping[str, TensorInfo]

    def reader(self, name: str) -> Read:
        """Return the function that reads pieces of a tensor."""
        ...

    def location(self, name: str) -> str:
        """Return the file that holds a tensor, for messages."""
        ...


class MemoryCheckpoint:
    """A state dict that is already in memory."""

    def __init__(self, label: str, state: Mapping[str, torch.Tensor]) -> None:
        wrong = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
        if wrong:
            raise PoolError(
                f"pool: {label} holds {listing(map(repr, wrong))}, no tensor; give a state dict (module.state_dict())."
            )
        self.label = label
        self._flat = {name: value.detach().to("cpu").contiguous().view(-1) for name, value in state.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in state.items()
        }

    def reader(self, name: str) -> Read:
        """Return slices of the tensor itself."""
        flat = self._flat[name]
        return lambda start, stop, buffer: flat[start:stop]

    def location(self, name: str) -> str:
        """Return the label."""
        return self.label


class FileCheckpoint:
    """Tensors that lie in one file as plain little-endian arrays at known offsets."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], offsets: Mapping[str, int]) -> None:
        self.label = str(path)
        self.tensors = tensors
        self._offsets = offsets
        self._descriptor: int | None = None

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = _open_for_reading(self.label)
            weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor

    def reader(self, name: str) -> Read:
        """Read into the buffer; raise PoolError if the file ends before the tensor does."""
        offset, dtype = self._offsets[name], self.tensors[name].dtype
        size, descriptor = dtype.itemsize, self._open()

        def read(start: int, stop: int, buffer: Buffer) -> torch.Tensor:
            view, tensor = buffer.window(stop - start, dtype)
            done = os.preadv(descriptor, [view], offset + start * size)
            while done < len(view):
                more = os.preadv(descriptor, [view[done:]], offset + start * size + done)
                if more == 0:
                    raise PoolError(
                        f"pool: {self.label} ends inside {name!r} (byte {offset + start * size + done}); "
                        "the file was cut short. Copy it again."
                    )
                done += more
            return tensor

        return read

    def location(self, name: str) -> str:
        """Return the file."""
        return self.label


def _open_for_reading(path: str) -> int:
    """Open a file, which stays open; raise OSError that says what to do if too many are.

    Many experts in many shards exceed the usual soft limit of 1024 open files. It is raised when half of it is used,
    before other parts of the program run into it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        if not _allow_more_files():
            raise OSError(
                error.errno,
                f"{path} cannot be opened: the limit of open files is reached. Raise it (ulimit -Hn), or join the "
                "shards of each checkpoint into one file",
            ) from error
        descriptor = os.open(path, os.O_RDONLY)
    if resource is not None and descriptor >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
        _allow_more_files()
    return descriptor


def _allow_more_files() -> bool:
    """Raise the soft limit of open files; return False if the hard limit is reached."""
    if resource is None:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return False
    wanted = 4 * soft if hard == resource.RLIM_INFINITY else min(4 * soft, hard)
    if wanted <= soft:
        return False
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return True
    return False


class ShardedCheckpoint:
    """One model in several files."""

    def __init__(self, folder: Path, shards: Mapping[str, Checkpoint]) -> None:
        self.label = str(folder)
        self._shards = shards
        self.tensors: Mapping[str, TensorInfo] = {name: shard.tensors[name] for name, shard in shards.items()}

    def reader(self, name: str) -> Read:
        """Read from the shard that holds the tensor."""
        return self._shards[name].reader(name)

    def location(self, name: str) -> str:
        """Return the shard's file."""
        return self._shards[name].location(name)


def locate(path: str | os.PathLike[str]) -> Path:
    """Return the file or folder that is meant; a Hub id is fetched. Raises PoolError for what is not there."""
    place = Path(path).expanduser()
    if place.exists():
        return place
    if isinstance(path, str) and is_hub_id(path):
        return _download(path)
    raise PoolError(
        f"pool: {path} does not exist: there is no such file or folder. Give a .safetensors file, a .pt/.pth/.bin "
        "state dict, a folder that holds them, or a Hugging Face id such as 'openai/clip-vit-base-patch32'."
    )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a safetensors file, a PyTorch state dict, a folder of either, or a Hub id; read headers only.

    Raises PoolError for what is not there, is cut short, or would need code to unpickle.
    """
    place = locate(path)
    return _open_folder(place) if place.is_dir() else _open_file(place)


def model_folder(place: Path) -> Path | None:
    """Return the folder whose configuration files belong to a checkpoint, or None for a file that stands alone."""
    if place.is_dir():
        return place
    return place.parent if place.name in WEIGHT_FILES else None


def _open_file(path: Path) -> Checkpoint:
    suffix = path.suffix.lower()
    if suffix in SAFETENSORS_SUFFIXES:
        return open_safetensors(path)
    if suffix in TORCH_SUFFIXES:
        return open_torch(path)
    raise PoolError(
        f"pool: {path} has the suffix {path.suffix!r}; expected one of "
        f"{', '.join(SAFETENSORS_SUFFIXES + TORCH_SUFFIXES)}. Save the state dict with safetensors.torch.save_file."
    )


def open_safetensors(path: Path) -> FileCheckpoint:
    """Read the header of a safetensors file: eight bytes of length, then JSON, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if length is None or length > min(MAX_HEADER, size - 8):
            raise PoolError(
                f"pool: {path} is not a complete safetensors file (its {size} bytes do not hold the header). "
                "Copy it again, or save it with safetensors.torch.save_file."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("the header is not a table")
        header.pop("__metadata__", None)
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        end = 0
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name!r} has the element type {entry['dtype']}, which is not supported")
            info = TensorInfo(SAFETENSORS_DTYPES[entry["dtype"]], tuple(int(extent) for extent in entry["shape"]))
            if start < 0 or stop - start != info.nbytes:
                raise ValueError(f"{name!r} is {info}, but has {stop - start} bytes")
            tensors[name], offsets[name] = info, 8 + length + start
            end = max(end, stop)
    except (ValueError, KeyError, TypeError) as error:
        raise PoolError(
            f"pool: the header of {path} cannot be read ({error}). Save it again with safetensors.torch.save_file."
        ) from None
    if 8 + length + end > size:
        raise PoolError(
            f"pool: {path} is cut short: its header promises {8 + length + end} bytes, the file has {size}. "
            "Copy it again."
        )
    return FileCheckpoint(path, tensors, offsets)


def open_torch(path: Path) -> Checkpoint:
    """Open a state dict written by `torch.save`, without running any code that it may contain."""
    convert = (
        f'If you trust it, convert it once: python -c "import torch; from safetensors.torch import save_file; '
        f"m = torch.load('{path}', weights_only=False, map_location='cpu'); "
        "m = m.state_dict() if hasattr(m, 'state_dict') else m.get('state_dict', m); "
        f"save_file({{k: v.contiguous().clone() for k, v in m.items()}}, '{path.with_suffix('.safetensors')}')\""
    )
    if not zipfile.is_zipfile(path):
        raise PoolError(
            f"pool: {path} is cut short or not in the zip format of torch.save (PyTorch 1.6 and later), "
            f"so it cannot be read in pieces. {convert}"
        )
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
        state = _state_dict(loaded)
        if state is not None and not all(_offset(value) is not None for value in state.values()):
            # Older PyTorch does not tell where the bytes lie: map the file instead.
            state = _state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            if state is not None:
                return MemoryCheckpoint(str(path), state)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        unsafe = isinstance(error, pickle.UnpicklingError)
        what = "holds objects that need code to unpickle" if unsafe else f"cannot be read ({reason})"
        raise PoolError(f"pool: {path} {what}; only plain state dicts are opened. {convert}") from None
    if state is None:
        raise PoolError(
            f"pool: {path} holds no state dict (names to tensors, possibly under 'state_dict' or 'model'). {convert}"
        )
    infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in state.items()}
    offsets: dict[str, int] = {}
    size = path.stat().st_size
    for name, value in state.items():
        offset = _offset(value)
        if offset is None or (value.numel() and not value.is_contiguous()):
            raise PoolError(
                f"pool: {name!r} in {path} is not stored contiguously, so it cannot be read in pieces. {convert}"
            )
        offsets[name] = offset + int(value.storage_offset()) * value.dtype.itemsize
        if offsets[name] + infos[name].nbytes > size:
            raise PoolError(f"pool: {path} is cut short: {name!r} lies beyond its end. Copy it again.")
    return FileCheckpoint(path, infos, offsets)


def _state_dict(loaded: Any) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a state dict, also one level down under the usual names."""
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded.get(key) for key in ("state_dict", "model", "model_state_dict", "module")]
    for candidate in candidates:
        if (
            isinstance(candidate, Mapping)
            and candidate
            and all(isinstance(v, torch.Tensor) for v in candidate.values())
        ):
            return {str(name): value for name, value in candidate.items()}
    return None


def _offset(value: torch.Tensor) -> int | None:
    """Return where the tensor's storage begins in the file it was loaded from, if PyTorch says so."""
    if value.layout is not torch.strided:
        return None
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    return None if offset is None else int(offset)


INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def _open_folder(folder: Path) -> Checkpoint:
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return _open_shards(folder, folder / name)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _open_file(folder / name)
    found = [p for suffix in SAFETENSORS_SUFFIXES + TORCH_SUFFIXES for p in sorted(folder.glob(f"*{suffix}"))]
    found = [p for p in found if not p.name.endswith(STATISTICS_SUFFIXES)]
    if len(found) == 1:
        return _open_file(found[0])
    if not found:
        raise PoolError(
            f"pool: the folder {folder} holds no weights; expected model.safetensors, model.safetensors.index.json, "
            "pytorch_model.bin or one file of another name."
        )
    raise PoolError(
        f"pool: the folder {folder} holds {len(found)} weight files ({listing(p.name for p in found)}) and no index; "
        "name the file itself, or add model.safetensors.index.json."
    )


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
            raise ValueError("'weight_map' is not a table of names to files")
    except (ValueError, KeyError, TypeError) as error:
        raise PoolError(f"pool: {index} cannot be read ({error!r}); write the shards again.") from None
    files: dict[str, Checkpoint] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise PoolError(f"pool: {index} names the shard {name!r}, which is not in {folder}. Copy the folder again.")
        files[name] = _open_file(folder / name)
    absent = sorted(tensor for tensor, name in weight_map.items() if tensor not in files[name].tensors)
    if absent:
        raise PoolError(
            f"pool: {index} places {listing(map(repr, absent))} in shards that do not hold them. "
            "Write the shards again."
        )
    return ShardedCheckpoint(folder, {tensor: files[name] for tensor, name in weight_map.items()})


def is_hub_id(text: str, folder: Path | None = None) -> bool:
    """Whether a name that is no file or folder can be a Hugging Face id, rather than a path with a mistake in it.

    Weight files, what begins with . or ~, and what would lie in a folder that exists (in `folder`) are paths.
    """
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", text) is not None
        and not text.lower().endswith(SAFETENSORS_SUFFIXES + TORCH_SUFFIXES)
        and not (folder or Path()).joinpath(text.split("/")[0]).is_dir()
    )


def _download(hub_id: str) -> Path:
    """Fetch weights and configuration of a Hugging Face repository (``owner/name`` or ``owner/name@revision``).

    Without the network, what was fetched before is used.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise PoolError(
            f"pool: {hub_id} is not a local path, and Hub ids need huggingface_hub: pip install 'mergesolve[hub]'."
        ) from None
    name, _, revision = hub_id.partition("@")
    try:
        listed = _hub_files(name, revision or None)
        safe = any(file.endswith(".safetensors") for file in listed)
        patterns = ["*.safetensors", "*.safetensors.index.json"] if safe else ["*.bin", "*.bin.index.json"]
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*patterns, "*.json", "*.txt", "*.model"],
            etag_timeout=HUB_TIMEOUT,
        )
    except Exception as error:  # the Hub client raises many kinds; all mean that the id cannot be had
        with contextlib.suppress(Exception):
            return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PoolError(
            f"pool: {hub_id} is not a local path and could not be fetched from the Hugging Face Hub ({reason}). "
            "Check the name and the network, or give a local path."
        ) from None
    return Path(folder)


def _hub_files(name: str, revision: str | None) -> list[str]:
    """List a repository's files, in one request: `list_repo_files` retries for half a minute and warns each time."""
    from huggingface_hub import model_info

    return [file.rfilename for file in model_info(name, revision=revision, timeout=HUB_TIMEOUT).siblings or ()]
