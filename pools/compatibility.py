"""Whether checkpoints can be merged: the one place where headers are compared.

Nothing is read but headers, and every difference is named at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .blocks import compile_pattern, natural
from .checkpoint import Checkpoint, Read, TensorInfo
from .errors import PoolError, listing

SHOWN = 40  # names a line; the rest is counted


class RenamedCheckpoint:
    """A checkpoint under other tensor names; `stored` is the checkpoint itself."""

    def __init__(self, checkpoint: Checkpoint, prefixes: Mapping[str, str]) -> None:
        self.label = checkpoint.label
        self.stored = checkpoint
        self.stored_names: dict[str, str] = {}
        for stored in checkpoint.tensors:
            name = rename(stored, prefixes)
            if name in self.stored_names:
                raise PoolError(
                    f"pool: after renaming, {self.stored_names[name]!r} and {stored!r} in {self.label} "
                    f"are both {name!r}; make the rename prefixes more specific."
                )
            self.stored_names[name] = stored
        self.tensors: Mapping[str, TensorInfo] = {
            name: checkpoint.tensors[stored] for name, stored in self.stored_names.items()
        }

    def reader(self, name: str) -> Read:
        """Read under the stored name."""
        return self.stored.reader(self.stored_names[name])

    def location(self, name: str) -> str:
        """Return the file."""
        return self.stored.location(self.stored_names.get(name, name))


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the longest of the prefixes that the name begins with, once."""
    for old in sorted(prefixes, key=len, reverse=True):
        if name.startswith(old):
            return prefixes[old] + name[len(old) :]
    return name


def select(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Keep the names in which an `include` expression is found (all, if there are none) and no `exclude` expression."""
    wanted = [compile_pattern(pattern, "include") for pattern in include]
    unwanted = [compile_pattern(pattern, "exclude") for pattern in exclude]
    return [
        name
        for name in names
        if (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    ]


def mergeable(
    base: Checkpoint, experts: Mapping[str, Checkpoint], include: Sequence[str], exclude: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the floating-point tensors that all models share, in natural order, with their shapes.

    Integer tensors are the base's affair: an expert may lack them or have others. Raises PoolError that names, for
    every expert, what is missing, what is too much, and what has another shape or another kind of number.
    """
    chosen = select(sorted(base.tensors, key=natural), include, exclude)
    floats = [name for name in chosen if base.tensors[name].is_float]
    if not floats:
        filters = f" that pass include={list(include)} exclude={list(exclude)}" if include or exclude else ""
        raise PoolError(
            f"pool: the base {base.label} has no floating-point tensors{filters}, so there is nothing to merge."
        )
    complaints: list[str] = []
    remedies: dict[str, None] = {}
    for expert, checkpoint in experts.items():
        who = f"expert {expert!r} ({checkpoint.label})"
        theirs = select(list(checkpoint.tensors), include, exclude)
        missing = [name for name in floats if name not in checkpoint.tensors]
        extra = sorted((n for n in theirs if n not in base.tensors and checkpoint.tensors[n].is_float), key=natural)
        if missing:
            shown = listing((f"{name!r} {list(base.tensors[name].shape)}" for name in missing), SHOWN)
            complaints.append(f"{who} lacks {shown}, which the base has")
        if extra:
            shown = listing((f"{name!r} {list(checkpoint.tensors[name].shape)}" for name in extra), SHOWN)
            complaints.append(f"{who} also has {shown}, which the base has not")
        if missing or extra:
            remedies["leave tensors out of the merge with exclude, or match names with rename"] = None
        for name in chosen:
            if name not in checkpoint.tensors:
                continue
            found, expected = checkpoint.tensors[name], base.tensors[name]
            where = f"expert {expert!r} ({checkpoint.location(name)})"
            if found.is_float != expected.is_float:
                complaints.append(f"{where} stores {name!r} as {found}, the base as {expected}")
                remedies["store the tensor as the base does, or leave it out of the merge with exclude"] = None
            elif found.shape != expected.shape:
                complaints.append(f"{where} has {name!r} of shape {list(found.shape)}, the base {list(expected.shape)}")
                remedies[
                    "use experts of the base's architecture, or leave the tensor out of the merge with exclude"
                ] = None
    if complaints:
        raise PoolError(
            "pool: " + ";\n  ".join(complaints) + f".\nAll experts need the base's tensors: {'; '.join(remedies)}."
        )
    return {name: base.tensors[name].shape for name in floats}
