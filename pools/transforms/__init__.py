"""Transforms of task vectors, by name, for the command line, the documentation and the common tests.

A transformed pool is a pool: `pool.transform(make_transform({"name": "trim", "density": 0.2}))` is what every solver
and closed-form merge runs on. Importing this table imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import PoolError, listing, nearest

if TYPE_CHECKING:
    from .transform import Transform


@dataclass(frozen=True)
class Entry:
    """Where a transform lives ("module:Class", relative to this package), what it does, and who proposed it."""

    target: str
    summary: str
    source: str

    def load(self) -> type[Transform]:
        """Import the class."""
        module, name = self.target.split(":")
        found: type[Transform] = getattr(import_module(f".{module}", __package__), name)
        return found


TRANSFORMS: dict[str, Entry] = {
    "trim": Entry(
        "trim:Trim",
        "Keep the entries of largest magnitude, of each tensor or of the whole model.",
        "Yadav et al. (2023), TIES-Merging, section 4",
    ),
    "dare": Entry(
        "dare:Dare",
        "Drop entries at random and rescale the others.",
        "Yu et al. (2024), Language Models are Super Mario, equation 2",
    ),
    "della": Entry(
        "della:Della",
        "Drop entries at random, small ones more often, and rescale the others.",
        "Deep et al. (2024), DELLA-Merging, section 3.1 (MagPrune)",
    ),
    "breadcrumbs": Entry(
        "breadcrumbs:Breadcrumbs",
        "Drop the largest and the smallest entries of each tensor.",
        "Davari and Belilovsky (2024), Model Breadcrumbs, equation 2",
    ),
    "elect": Entry(
        "agreement:Elect",
        "Drop the entries whose sign is not that of the sum over experts.",
        "Yadav et al. (2023), TIES-Merging, section 4",
    ),
    "consensus": Entry(
        "agreement:Consensus",
        "Drop the entries that fewer than k experts need, by their TALL masks.",
        "Wang et al. (2024), Localizing Task Information (TALL-masks), equations 4 and 6",
    ),
    "mask": Entry(
        "mask:Mask",
        "Multiply by one mask for all experts, from a file.",
        "Tang et al. (2023), Concrete Subspace Learning based Interference Elimination",
    ),
}


def make_transform(spec: object) -> Transform:
    """Return a transform from a name or a mapping {"name": ..., option: value}.

    Raises PoolError for unknown names and options, with the nearest known one, and for values out of range.
    """
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("name", None) if isinstance(spec, Mapping) else spec
    if not isinstance(name, str) or name not in TRANSFORMS:
        raise PoolError(
            f"pool: unknown transform {name!r}; the transforms are {', '.join(TRANSFORMS)}."
            + nearest(str(name), TRANSFORMS)
        )
    cls = TRANSFORMS[name].load()
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise PoolError(
                f"pool: the transform {name!r} has no option {option!r}; it has {listing(known)}."
                + nearest(option, known)
            )
    return cls(**options)
