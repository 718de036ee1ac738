"""Files that are whole or absent: written under a temporary name beside the target, synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from .errors import OptionError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; NaN and infinities become null."""
    write_bytes(path, (dumps(content, indent=2) + "\n").encode())


def dumps(content: Any, indent: int | None = None) -> str:
    """Return strict JSON: NumPy numbers and arrays as plain ones, NaN and infinities as null."""
    return json.dumps(plain(content), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(content: Any) -> Any:
    """Return the JSON counterpart of nested mappings, sequences, NumPy values and paths."""
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, np.ndarray):
        return plain(content.tolist())
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    if isinstance(content, (bool, str)) or content is None:
        return content
    if isinstance(content, (int, np.integer)):
        return int(content)
    if isinstance(content, (float, np.floating)):
        return float(content) if np.isfinite(content) else None
    return str(content)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write arrays as safetensors, atomically, with JSON values as metadata."""
    packed = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    write_bytes(path, serialize(packed, metadata={key: dumps(value) for key, value in metadata.items()}))


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and metadata of a file written by :func:`write_arrays`. Raises OptionError if it is not one."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise OptionError(
            f"{path} does not exist. A run's folder holds it once the solve has saved something."
        ) from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise OptionError(
            f"{path} is not a readable coefficients file ({error}). Solve again, or restore it."
        ) from None
