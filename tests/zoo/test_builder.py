"""The builder makes the same zoo twice, resumes, and what it makes has learnt something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mergesolve.zoo import build
from mergesolve.zoo.builder import REDUCED, SHIPPED, build_expert
from mergesolve.zoo.model import create
from mergesolve.zoo.training import Finetuning, Pretraining, pretrain, schedule, simplified


def test_a_second_build_from_nothing_has_the_same_checksums(reduced: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int, float]] = []
    record = build(tmp_path, reduced=True, progress=lambda *step: steps.append(step))
    first = json.loads((reduced / "zoo.json").read_text())
    assert record["files"] == first["files"]
    assert set(record["files"]) == {
        "base.safetensors",
        "heads.safetensors",
        *(f"experts/{name}.safetensors" for name in (*REDUCED.tasks, "misinitialized")),
    }
    assert {step[0] for step in steps} == {"pre-training", *REDUCED.tasks, "misinitialized"}


def test_fine_tuning_helps_and_rounding_costs_nothing(reduced: Path) -> None:
    experts = json.loads((reduced / "zoo.json").read_text())["experts"]
    for name in REDUCED.tasks:
        entry = experts[name]
        assert entry["expert"] > entry["zero_shot"] + 10
        assert abs(entry["expert"] - entry["before_rounding"]) <= 2
    assert experts["misinitialized"]["relative_norm"] > 3 * experts[REDUCED.tasks[0]]["relative_norm"]


def test_a_build_goes_on_where_another_stopped(reduced: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    shutil.copytree(reduced, folder)
    name = REDUCED.tasks[1]
    (folder / "zoo.json").unlink()
    (folder / "experts" / f"{name}.safetensors").unlink()
    kept = (folder / "base.safetensors").stat().st_mtime_ns
    trained: list[str] = []
    record = build(folder, reduced=True, progress=lambda what, *_: trained.append(what))
    assert set(trained) == {name}
    assert (folder / "base.safetensors").stat().st_mtime_ns == kept
    assert record["files"] == json.loads((reduced / "zoo.json").read_text())["files"]


def test_pretraining_resumed_from_its_checkpoint_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    options = Pretraining(rounds=2, round_size=700, passes=1, batch=128, warmup=2)
    architecture = REDUCED.architecture()

    def silent(what: str, step: int, total: int, loss: float) -> None:
        pass

    whole = create(architecture, 0)
    pretrain(whole, options, silent, tmp_path / "whole.pt")
    # The checkpoint after round 1, from a run of the same schedule that was stopped in round 2.
    import mergesolve.zoo.training as training

    original, rounds = training.simplified, []

    def stop_in_second(size: int, level: float, seed: int, number: int):  # type: ignore[no-untyped-def]
        rounds.append(number)
        if rounds == [0, 1]:
            raise Stop
        return original(size, level, seed, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "simplified", stop_in_second)
        with pytest.raises(Stop):
            pretrain(create(architecture, 0), options, silent, tmp_path / "part.pt")
        resumed = create(architecture, 5)
        pretrain(resumed, options, silent, tmp_path / "part.pt")
    assert rounds == [0, 1, 1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_finished_expert_is_not_trained_again(reduced: Path) -> None:
    def never(what: str, step: int, total: int, loss: float) -> None:
        raise AssertionError(what)

    name = REDUCED.tasks[0]
    record = build_expert(reduced, REDUCED, name, never)
    assert record["task"] == name


def test_simplified_renderings_differ_between_rounds_and_cover_all_labels() -> None:
    x, y = simplified(2000, 0.5, 0, 0)
    other, _ = simplified(2000, 0.5, 0, 1)
    assert len(x) == len(y) == len(other)
    assert (x != other).any()
    assert len(set(y.tolist())) > 250


def test_schedule_rises_to_one_and_falls_to_zero() -> None:
    values = [schedule(step, 100, 10) for step in range(100)]
    assert values.index(max(values)) in (9, 10)
    assert max(values) == pytest.approx(1.0)
    assert values[0] == pytest.approx(0.1)
    assert values[-1] < 1e-2
    assert values[10:] == sorted(values[10:], reverse=True)


def test_the_shipped_settings_have_the_size_that_is_promised() -> None:
    parameters = sum(p.numel() for p in create(SHIPPED.architecture(), 0).visual.parameters())
    assert 0.9e6 <= parameters <= 1.3e6
    assert SHIPPED.finetuning == Finetuning()
