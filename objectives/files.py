"""Arrays and class names from files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, some


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file; DataError where it is missing, truncated, of another kind, or holds pickles."""
    if not path.is_file():
        raise DataError(f"data: there is no file {str(path)!r}.")
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"data: {str(path)!r} holds one array; an .npz file with named arrays is needed.")
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"data: {str(path)!r} is not a readable .npz file ({error}); write it with np.savez and plain arrays "
            f"(class names as an array of strings)."
        ) from error


def read_class_names(path: Path) -> dict[str, str] | list[str]:
    """Class names from JSON (an object, or a list) or text (a name a line, or folder and name with a tab between)."""
    if not path.is_file():
        raise DataError(f"class names: there is no file {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except ValueError as error:
            raise DataError(f"class names: {str(path)!r} is not JSON ({error}).") from error
        if isinstance(names, dict):
            return {str(k): str(v) for k, v in names.items()}
        if isinstance(names, list):
            return [str(v) for v in names]
        raise DataError(
            f"class names: {str(path)!r} holds a {type(names).__name__}; expected an object or a list of names."
        )
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if any("\t" in line for line in lines):
        pairs = [line.split("\t", 1) for line in lines]
        broken = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
        if broken is not None:
            raise DataError(f"class names: {str(path)!r} mixes lines with a tab and without; {broken!r} has none.")
        return {pair[0]: pair[1] for pair in pairs}
    return lines


def listed_names(classes: Sequence[str] | str | Path, where: str) -> tuple[str, ...]:
    """Class names in the order of the labels: as given, or from a file that lists them."""
    if not isinstance(classes, str | Path):
        return tuple(classes)
    names = read_class_names(Path(classes))
    if isinstance(names, dict):
        raise DataError(
            f"{where}: {str(classes)!r} names folders; without folders a list in the order of the labels is needed."
        )
    return tuple(names)


def class_order(
    subfolders: Sequence[str], names: Mapping[str, str] | Sequence[str] | None, where: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The class index of every subfolder, and the class names in that order.

    A mapping may name classes that have no folder here (a split without them), so that indices agree over splits.
    """
    if names is None:
        return {folder: i for i, folder in enumerate(subfolders)}, tuple(f.replace("_", " ") for f in subfolders)
    if isinstance(names, Mapping):
        unnamed = [folder for folder in subfolders if folder not in names]
        if unnamed:
            raise DataError(f"{where}: no class name for the folder {some(unnamed)}; it has names for {some(names)}.")
        return {folder: i for i, folder in enumerate(names)}, tuple(names.values())
    if len(names) != len(subfolders):
        raise DataError(
            f"{where}: {len(names)} class names for {len(subfolders)} folders ({some(subfolders)}); give one a "
            f"folder, or a mapping from folder to name."
        )
    return {folder: i for i, folder in enumerate(subfolders)}, tuple(names)
