"""The zoo that is shipped: complete, small, and as good as its record says."""

from __future__ import annotations

import json
from pathlib import Path

import mergesolve.zoo
import pytest
from mergesolve.objectives import evaluate
from mergesolve.pools import Pool
from mergesolve.zoo import Zoo, load
from mergesolve.zoo.builder import SHIPPED, settings_as_json
from mergesolve.zoo.model import captions
from mergesolve.zoo.storage import read
from mergesolve.zoo.tasks import BY_NAME

DATA = Path(mergesolve.zoo.__file__).parent / "data"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return load(tmp_path_factory.mktemp("cache"))


def test_files_are_small_and_all_are_in_the_record() -> None:
    record = json.loads((DATA / "zoo.json").read_text())
    files = {str(path.relative_to(DATA)): path.stat().st_size for path in DATA.rglob("*.safetensors")}
    assert files == {name: entry["bytes"] for name, entry in record["files"].items()}
    assert max(files.values()) < 5e6
    assert sum(files.values()) < 40e6


def test_the_record_is_of_the_settings_in_the_code() -> None:
    assert json.loads((DATA / "zoo.json").read_text())["settings"] == settings_as_json(SHIPPED)


def test_there_are_twenty_experts_and_three_bad_ones(zoo: Zoo) -> None:
    assert len(zoo.tasks) >= 20
    assert set(zoo.experts) - set(zoo.tasks) == {"misinitialized", "noisy", "duplicate"}
    assert captions("{}", tuple(BY_NAME[name] for name in zoo.tasks))


def test_experts_are_good_and_the_base_is_between_chance_and_experts(zoo: Zoo) -> None:
    entries = [zoo.record["experts"][name] for name in zoo.tasks]
    chance = sum(100 / e["classes"] for e in entries) / len(entries)
    assert zoo.record["expert_mean"] >= 85
    assert zoo.record["zero_shot_mean"] >= chance + 20
    assert zoo.record["zero_shot_mean"] <= zoo.record["expert_mean"] - 20
    assert all(e["expert"] > e["zero_shot"] for e in entries)
    assert all(abs(e["expert"] - e["before_rounding"]) <= 0.5 for e in entries)


@pytest.mark.parametrize("name", ["digits", "arrows"])
def test_recorded_accuracies_come_back(zoo: Zoo, name: str) -> None:
    model, test, entry = zoo.model(), zoo.task(name, "test"), zoo.record["experts"][name]
    assert len(test) == 1000
    # Fonts and resampling may differ by a grey level between versions of the libraries: allow one image in a hundred.
    assert evaluate(model, read(zoo.experts[name]), [test])[name] == pytest.approx(entry["expert"] / 100, abs=0.01)
    assert evaluate(model, read(zoo.base), [test])[name] == pytest.approx(entry["zero_shot"] / 100, abs=0.01)


def test_the_bad_experts_are_bad_in_their_own_way(zoo: Zoo) -> None:
    model = zoo.model()
    pictograms, shapes = zoo.task("pictograms", "test", limit=300), zoo.task("shapes", "test", limit=300)
    good, noisy, stranger = (read(zoo.experts[name]) for name in ("pictograms", "noisy", "misinitialized"))
    assert evaluate(model, noisy, [pictograms])["pictograms"] < evaluate(model, good, [pictograms])["pictograms"] - 0.2
    assert zoo.experts["duplicate"].read_bytes() == zoo.experts["digits"].read_bytes()
    # Far from the base, yet an expert in its own right: only its start is another one.
    entry = zoo.record["experts"]["misinitialized"]
    assert entry["relative_norm"] > 5 * max(zoo.record["experts"][name]["relative_norm"] for name in zoo.tasks)
    assert evaluate(model, stranger, [shapes])["shapes"] > 0.3


def test_the_experts_open_as_a_pool(zoo: Zoo) -> None:
    pool = Pool.open(base=str(zoo.base), experts={name: str(path) for name, path in zoo.task_experts.items()})
    assert pool.names == zoo.tasks
