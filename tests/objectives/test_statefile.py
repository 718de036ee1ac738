from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from mergesolve.objectives import DataError
from mergesolve.objectives.statefile import StateFile
from safetensors.torch import save_file


class Custom:
    """Something that only code can unpickle."""


def test_shapes_and_values_of_every_kind_of_source_agree(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3).half(), "b": torch.arange(4)}
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "s.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "s.pth")
    for source in (tmp_path / "s.safetensors", str(tmp_path / "s.pth"), state):
        file = StateFile(source)
        assert file.shapes == {"a": torch.Size([2, 3]), "b": torch.Size([4])}
        read = file.read(["b", "a"])
        assert torch.equal(read["a"], state["a"].float())
        assert read["a"].dtype == torch.float32
        assert torch.equal(read["b"], state["b"])
        assert set(file.read(["a"])) == {"a"}


def test_what_is_read_from_a_mapping_is_a_copy() -> None:
    state = {"a": torch.zeros(2)}
    StateFile(state).read(["a"])["a"].fill_(1.0)
    assert not state["a"].any()


def test_files_that_are_no_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:200])
    torch.save({"model": Custom()}, tmp_path / "code.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(2), "epoch": 3}, tmp_path / "mixed.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "torch.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "torch.pt").read_bytes()[:900])
    (tmp_path / "weights.h5").write_bytes(b"")
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated, and OpenAI's files are made of it
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "openai.pt")
    cases = {
        "openai.pt": r"'.*openai.pt' is a TorchScript program, .*torch.jit.load\(file",
        "missing.pt": "there is no file '.*missing.pt'; give a local .safetensors",
        "half.safetensors": "'.*half.safetensors' is not a complete safetensors file",
        "code.pt": r"'.*code.pt' holds more than tensors, .*weights_only=False",
        "list.pt": "'.*list.pt' holds a list, not a mapping",
        "mixed.pt": "'epoch' in .*mixed.pt is a int, not a tensor",
        "text.pt": "'.*text.pt' ",
        "empty.pt": "'.*empty.pt' is not a readable torch file",
        "short.pt": "'.*short.pt' is not a readable torch file",
        "weights.h5": "'.*weights.h5' is neither .safetensors nor a torch file",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            StateFile(tmp_path / name)
