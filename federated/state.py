"""What a server keeps between rounds, in one file that is whole or absent: a killed server goes on from it.

The file is safetensors: the global model under "model/", the server step's own arrays under "memory/", the rest as JSON
in the header. θ_0 is not in it, since it never changes: it lies in a file of its own beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..solvers.files import dumps, write_bytes
from .errors import FederationError
from .replies import Weights

Array = np.ndarray[Any, Any]
MODEL, MEMORY = "model/", "memory/"
HISTORY = 50  # norms of updates that are remembered


@dataclass(frozen=True)
class ServerState:
    """Everything besides the global model that the next round depends on.

    round: rounds done. origin: θ_0. memory: arrays of the server step, by its own names. fingerprints: of what each
    client sent last, and was sent. norms: of the updates that were accepted, oldest first. backend: of the pools of the
    solvers, as it was chosen in the first round.
    """

    origin: Weights
    round: int = 0
    memory: Mapping[str, Array] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[float, ...] = ()
    backend: str | None = None

    def save(self, path: str | Path, weights: Weights, identity: Mapping[str, Any]) -> None:
        """Write state and global model. identity: what a run that resumes from the file must agree with."""
        tensors = {MODEL + name: tensor for name, tensor in stored(weights).items()}
        tensors |= {MEMORY + name: torch.from_numpy(np.array(value, order="C")) for name, value in self.memory.items()}
        content = {
            "round": self.round,
            "fingerprints": dict(self.fingerprints),
            "norms": [norm.hex() for norm in self.norms],
            "backend": self.backend,
            "identity": identity,
        }
        write_bytes(Path(path), save(tensors, metadata={"state": dumps(content)}))

    @classmethod
    def load(cls, path: str | Path, origin: Weights, identity: Mapping[str, Any]) -> tuple[ServerState, dict[str, Any]]:
        """Return state and global model. Raises FederationError for a file of another federation, or of none."""
        tensors, content = _read(Path(path))
        expected = json.loads(dumps(identity))
        found = content["identity"]
        different = sorted(key for key in {**expected, **found} if expected.get(key) != found.get(key))
        if different:
            where, *sides = _difference(different[0], found.get(different[0]), expected.get(different[0]))
            was, now = (dumps(side)[:80] for side in sides)
            raise FederationError(
                f"{path} belongs to another federation: {', '.join(different)} differ ({where} was {was} and is "
                f"{now}). Resume with what it was begun with, or choose another folder."
            )
        weights = {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)}
        memory = {n.removeprefix(MEMORY): t.numpy() for n, t in tensors.items() if n.startswith(MEMORY)}
        norms = tuple(float.fromhex(norm) for norm in content["norms"])
        return cls(origin, int(content["round"]), memory, content["fingerprints"], norms, content["backend"]), weights

    def after(
        self, memory: Mapping[str, Array], fingerprints: Mapping[str, str], norms: list[float], backend: str
    ) -> ServerState:
        """Return the state after one more round."""
        return replace(
            self,
            round=self.round + 1,
            memory=dict(memory),
            fingerprints={**self.fingerprints, **fingerprints},
            norms=(*self.norms, *norms)[-HISTORY:],
            backend=backend,
        )


def _difference(where: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """Return the first place, named by its path, in which two JSON values differ, and what is there."""
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in {**one, **other} if one.get(key) != other.get(key))
        return _difference(f"{where}.{key}", one.get(key), other.get(key))
    return where, one, other


def stored(weights: Weights) -> dict[str, torch.Tensor]:
    """Return the tensors as safetensors takes them: on the CPU, contiguous, and tied ones each with its own memory."""
    found, memories = {}, set()
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if memory in memories else plain
        memories.add(memory)
    return found


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            content = json.loads((file.metadata() or {})["state"])
            return tensors, {key: content[key] for key in ("round", "fingerprints", "norms", "backend", "identity")}
    except FileNotFoundError:
        raise FederationError(f"{path} does not exist; there is no federation to resume.") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise FederationError(f"{path} is no readable state of a federation ({error}). Begin anew.") from None
