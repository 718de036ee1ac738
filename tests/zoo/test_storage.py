"""Stored task vectors come back within half a quantization step, and files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mergesolve.zoo.storage import SCALE, decode, encode, half, norm, read, write


def _pair(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    base = {
        "matrix": torch.randn(6, 5, generator=g),
        "filter": torch.randn(4, 3, 2, 2, generator=g),
        "bias": torch.randn(7, generator=g),
    }
    expert = {name: t + 0.05 * torch.randn(t.shape, generator=g) for name, t in base.items()}
    expert["matrix"][2] = base["matrix"][2]
    return base, expert


def test_decoded_entries_are_within_half_a_step_of_their_row() -> None:
    base, expert = _pair()
    back = decode(encode(expert, base), base)
    for name in ("matrix", "filter"):
        error = (back[name] - expert[name]).abs().flatten(1).amax(1)
        step = (expert[name] - base[name]).abs().flatten(1).amax(1) / 127
        assert (error <= 0.5 * step + 1e-6).all()
    torch.testing.assert_close(back["bias"], expert["bias"], rtol=0, atol=1e-6)
    assert torch.equal(back["matrix"][2], base["matrix"][2])


def test_matrices_are_stored_as_bytes_with_one_scale_a_row() -> None:
    base, expert = _pair()
    stored = encode(expert, base)
    assert stored["matrix"].dtype == torch.int8
    assert stored["matrix" + SCALE].shape == (6,)
    assert stored["bias"].dtype == torch.float32
    assert "bias" + SCALE not in stored


def test_encoding_what_was_decoded_changes_nothing() -> None:
    base, expert = _pair()
    once = decode(encode(expert, base), base)
    twice = decode(encode(once, base), base)
    for name in base:
        torch.testing.assert_close(once[name], twice[name], rtol=0, atol=1e-6)


def test_norm_is_that_of_all_entries_together() -> None:
    assert norm({"a": torch.full((3,), 2.0), "b": torch.full((2, 2), 1.0)}) == pytest.approx(4.0)


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write({"a": torch.ones(2)}, path)
    with pytest.raises(Exception, match="str"):
        write({"a": "no tensor"}, path)  # type: ignore[dict-item]
    assert torch.equal(read(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_half_keeps_what_half_precision_can_hold() -> None:
    exact = half({"a": torch.tensor([0.5, -1.25])})
    assert exact["a"].dtype == torch.float16
    assert exact["a"].tolist() == [0.5, -1.25]
