"""What a user names: base, experts, and which tensors to merge; from Python, a mapping or a YAML file.

    base: base.safetensors
    experts: {mnist: experts/mnist.safetensors, svhn: experts/svhn}     # or a list of paths and globs
    include: ['^visual\\.']        # regular expressions, found in tensor names
    exclude: ['logit_scale']
    rename: {'module.': ''}        # prefixes of tensor names
    dtype: float16                 # of merged weights on disk; default: as in the base

Paths are relative to the YAML file.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from .blocks import natural
from .checkpoint import SAFETENSORS_SUFFIXES, STATISTICS_SUFFIXES, TORCH_SUFFIXES, WEIGHT_FILES, is_hub_id
from .errors import PoolError, nearest

FIELDS = ("base", "experts", "include", "exclude", "rename", "dtype")

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Spec:
    """A pool by name: every path resolved, every field checked, nothing opened yet."""

    base: str
    experts: dict[str, str]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype | None = None


def parse_spec(spec: str | os.PathLike[str] | Mapping[str, Any] | None, given: Mapping[str, Any]) -> Spec:
    """Merge a YAML file or a mapping with fields given in Python (which win) into a `Spec`.

    Raises PoolError for unknown and missing fields, wrong types, globs without matches and names used twice.
    """
    fields: dict[str, Any] = {}
    folder: Path | None = None
    owner = "pool"
    if isinstance(spec, Mapping):
        fields = dict(spec)
    elif spec is not None:
        fields, folder = read_yaml(Path(spec)), Path(spec).parent
        owner = f"pool {spec}"
    for key in fields:
        if key not in FIELDS:
            raise PoolError(
                f"{owner}: unknown field {key!r}; the fields are {', '.join(FIELDS)}." + nearest(str(key), FIELDS)
            )
    here: dict[str, Path | None] = dict.fromkeys(fields, folder)
    for key, value in given.items():
        if value is not None and value != () and value != {}:
            fields[key], here[key] = value, None
    for key in ("base", "experts"):
        if fields.get(key) is None:
            raise PoolError(f"{owner}: the field {key!r} is missing; a pool needs a base and at least one expert.")
    base = _path(fields["base"], here["base"], f"{owner}: base")
    experts = expand_experts(fields["experts"], folder=here["experts"], base=base, owner=owner)
    return Spec(
        base=base,
        experts=experts,
        include=parse_patterns(fields.get("include"), f"{owner}: include"),
        exclude=parse_patterns(fields.get("exclude"), f"{owner}: exclude"),
        rename=parse_prefixes(fields.get("rename"), f"{owner}: rename"),
        dtype=parse_dtype(fields.get("dtype"), f"{owner}: dtype"),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; raise PoolError that names the line otherwise."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PoolError(f"pool: {path} does not exist; give the YAML file of a pool, or base and experts.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise PoolError(f"pool: {path} is not a YAML file of a pool ({reason}).") from None
    if not isinstance(fields, dict):
        raise PoolError(f"pool: {path} holds {type(fields).__name__}; expected fields: {', '.join(FIELDS)}.")
    return fields


def expand_experts(
    experts: object, *, folder: Path | None = None, base: str | None = None, owner: str = "pool"
) -> dict[str, str]:
    """Return name -> path from a mapping, or from a sequence of paths and globs, named by file stem or folder.

    A glob leaves out the base, and files that are not weights, such as statistics of the experts.
    """
    named: list[tuple[str, str]] = []
    if isinstance(experts, Mapping):
        named = [(str(name), _path(path, folder, f"{owner}: expert {name!r}")) for name, path in experts.items()]
    else:
        if isinstance(experts, (str, os.PathLike)):
            experts = [experts]
        if not isinstance(experts, Sequence):
            raise PoolError(
                f"{owner}: experts must be a mapping of names to paths, or a list of paths; got {experts!r}."
            )
        for entry in experts:
            path = _path(entry, folder, f"{owner}: experts")
            paths = _glob(path, base, owner) if glob.has_magic(path) and not Path(path).exists() else [path]
            named += [(expert_name(found), found) for found in paths]
    if not named:
        raise PoolError(f"{owner}: there are no experts; a pool needs at least one.")
    result: dict[str, str] = {}
    for name, path in named:
        if not name:
            raise PoolError(f"{owner}: the expert at {path} has an empty name; give it one: experts: {{name: path}}.")
        if name in result:
            raise PoolError(
                f"{owner}: two experts are called {name!r} ({result[name]} and {path}); "
                "name them: experts: {name: path}."
            )
        result[name] = path
    return result


def expert_name(path: str) -> str:
    """Return the stem of a file or the folder's name, also for standard file names such as model.safetensors."""
    place = Path(path)
    if place.name in WEIGHT_FILES:
        return place.absolute().parent.name
    return place.stem if place.suffix.lower() in SAFETENSORS_SUFFIXES + TORCH_SUFFIXES else place.name


def parse_dtype(value: object, owner: str) -> torch.dtype | None:
    """Return the element type of a name such as "float16"; None stays None."""
    if value is None or (isinstance(value, torch.dtype) and value in DTYPES.values()):
        return value  # type: ignore[return-value]
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise PoolError(f"{owner} must be one of {', '.join(DTYPES)}; got {value!r}." + nearest(name, DTYPES))
    return DTYPES[name]


def _glob(pattern: str, base: str | None, owner: str) -> list[str]:
    found = sorted(glob.glob(pattern, recursive=True), key=natural)  # noqa: PTH207 (a pattern may be absolute)
    weights = [
        path
        for path in found
        if (Path(path).is_dir() or Path(path).suffix.lower() in SAFETENSORS_SUFFIXES + TORCH_SUFFIXES)
        and not path.endswith(STATISTICS_SUFFIXES)
        and not (base is not None and Path(base).exists() and Path(path).samefile(base))
    ]
    if not weights:
        raise PoolError(f"{owner}: {pattern!r} matches no checkpoints ({len(found)} other files); check the folder.")
    return weights


def _path(value: object, folder: Path | None, owner: str) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise PoolError(f"{owner} must be a path; got {value!r}.")
    place = Path(value).expanduser()
    if place.is_absolute():
        return str(place)
    local = (folder or Path()) / place
    # What is not there may be a Hub id, which must stay as it is; anything else fails with the full path when opened.
    if isinstance(value, str) and not local.exists() and is_hub_id(value, folder):
        return value
    # A path object is no Hub id even if it looks like one, and is told apart by being absolute.
    return str(local if isinstance(value, str) or local.exists() else local.absolute())


def parse_patterns(value: object, owner: str) -> tuple[str, ...]:
    """Return regular expressions from one or a sequence of them; None stands for none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise PoolError(f"{owner} must be a list of regular expressions; got {value!r}.")
    return tuple(value)


def parse_prefixes(value: object, owner: str) -> dict[str, str]:
    """Return prefixes of tensor names and what replaces them; None stands for none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise PoolError(f"{owner} must map prefixes of tensor names to other prefixes; got {value!r}.")
    return dict(value)
