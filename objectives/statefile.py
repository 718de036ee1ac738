"""Named tensors of one local file (or a mapping in memory): names and shapes first, values by name when asked for."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import DataError

TORCH_SUFFIXES = (".pt", ".pth", ".bin")


class StateFile:
    """A `.safetensors` file, a torch file that holds nothing but tensors, or a mapping of tensors.

    shapes: name -> shape. A 'state_dict' entry is unwrapped and a 'module.' prefix dropped, as training scripts leave
    them. Raises DataError for a file that is missing, truncated, of another kind, or that needs code to unpickle.
    """

    def __init__(self, source: str | Path | Mapping[str, Tensor]) -> None:
        self._path: Path | None = None
        self._tensors: dict[str, Tensor] | None = None
        if isinstance(source, Mapping):
            self._label = "the given weights"
            self._tensors = _named_tensors(source, self._label)
            self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
            return
        self._path = Path(source)
        self._label = str(source)
        if not self._path.is_file():
            raise DataError(
                f"weights: there is no file {self._label!r}; give a local .safetensors, .pt, .pth or .bin file."
            )
        if self._path.suffix == ".safetensors":
            self._stored = self._safetensors_names()
        elif self._path.suffix in TORCH_SUFFIXES:
            tensors = self._load_torch()
            self._stored = {name: name for name in tensors}
            self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        else:
            raise DataError(
                f"weights: {self._label!r} is neither .safetensors nor a torch file ({', '.join(TORCH_SUFFIXES)})."
            )

    def __str__(self) -> str:
        return self._label

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors on the CPU, as copies, floating ones in float32."""
        names = list(names)
        if self._tensors is not None:
            tensors = {name: self._tensors[name] for name in names}
        elif self._path is not None and self._path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(self._path, framework="pt") as file:
                tensors = {name: file.get_tensor(self._stored[name]) for name in names}
        else:
            loaded = self._load_torch()
            tensors = {name: loaded[name] for name in names}
        return {
            name: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype, copy=True)
            for name, t in tensors.items()
        }

    def _safetensors_names(self) -> dict[str, str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, framework="pt") as file:
                stored = {_plain(name): name for name in file.keys()}  # noqa: SIM118 -- not a mapping
                self.shapes = {n: torch.Size(file.get_slice(s).get_shape()) for n, s in stored.items()}
        except SafetensorError as error:
            raise DataError(
                f"weights: {self._label!r} is not a complete safetensors file ({error}); copy or convert it again."
            ) from error
        return stored

    def _load_torch(self) -> dict[str, Tensor]:
        assert self._path is not None
        try:
            with warnings.catch_warnings(action="ignore"):  # about TorchScript, refused below with a better message
                loaded = torch.load(self._path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise DataError(
                f"weights: {self._label!r} holds more than tensors, and unpickling it would run code. Where you trust "
                f"it: torch.save(torch.load(file, weights_only=False).state_dict(), 'tensors.pt')."
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            if "TorchScript" in str(error):
                raise DataError(
                    f"weights: {self._label!r} is a TorchScript program, as OpenAI's checkpoints are. Where you trust "
                    f"it: torch.save(torch.jit.load(file, map_location='cpu').state_dict(), 'tensors.pt')."
                ) from error
            raise DataError(f"weights: {self._label!r} is not a readable torch file ({error}).") from error
        if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
            loaded = loaded["state_dict"]
        if not isinstance(loaded, Mapping):
            raise DataError(
                f"weights: {self._label!r} holds a {type(loaded).__name__}, not a mapping of names to tensors."
            )
        return _named_tensors(loaded, self._label)


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _named_tensors(mapping: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    for name, value in mapping.items():
        if not isinstance(value, Tensor):
            raise DataError(f"weights: {name!r} in {label} is a {type(value).__name__}, not a tensor.")
    return {_plain(str(name)): value for name, value in mapping.items()}
