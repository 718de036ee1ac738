"""What is loaded is what was built; damage is found and named; any number of processes may load at once."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from mergesolve.objectives import DataError, evaluate
from mergesolve.zoo import Zoo, load
from mergesolve.zoo.builder import REDUCED
from mergesolve.zoo.loader import NOISE, NOISY_OF, _with_noise, default_cache
from mergesolve.zoo.storage import decode, norm, read


@pytest.fixture(scope="module")
def zoo(reduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return load(tmp_path_factory.mktemp("cache"), data=reduced)


def test_materialized_experts_are_base_plus_stored_task_vector(zoo: Zoo, reduced: Path) -> None:
    base = read(zoo.base)
    assert all(tensor.dtype == torch.float32 for tensor in base.values())
    for name, stored in read(reduced / "base.safetensors").items():
        assert torch.equal(base[name], stored.float())
    for name in (*REDUCED.tasks, "misinitialized"):
        expected = decode(read(reduced / "experts" / f"{name}.safetensors"), base)
        found = read(zoo.experts[name])
        assert found.keys() == base.keys()
        for key in expected:
            assert torch.equal(found[key], expected[key])
    assert tuple(zoo.task_experts) == zoo.tasks == REDUCED.tasks
    assert set(zoo.experts) == {*REDUCED.tasks, "misinitialized"}


def test_recorded_accuracies_come_back_through_the_public_model(zoo: Zoo) -> None:
    model = zoo.model()
    for name in REDUCED.tasks:
        test = zoo.task(name, "test")
        entry = zoo.record["experts"][name]
        assert evaluate(model, read(zoo.experts[name]), [test])[name] == pytest.approx(entry["expert"] / 100, abs=0.01)
        assert evaluate(model, read(zoo.base), [test])[name] == pytest.approx(entry["zero_shot"] / 100, abs=0.01)


def test_heads_are_unit_rows_one_a_class(zoo: Zoo) -> None:
    model = zoo.model()
    for name in zoo.tasks:
        task = zoo.task(name, "validation", limit=20)
        head = model.head(task)
        assert head.shape == (len(task.classes), REDUCED.embed_dim)
        torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)))


def test_a_limited_task_is_balanced_and_part_of_the_whole(zoo: Zoo) -> None:
    whole, part = zoo.task("shapes", "test"), zoo.task("shapes", "test", limit=35)
    assert len(whole) == REDUCED.test
    assert len(part) == 35
    assert part.labels is not None
    counts = np.bincount(part.labels.numpy(), minlength=10)
    assert counts.max() - counts.min() <= 1
    everything = {image.numpy().tobytes() for image in whole.inputs}  # type: ignore[attr-defined]
    assert all(image.numpy().tobytes() in everything for image in part.inputs)  # type: ignore[attr-defined]


def test_cached_images_are_those_rendered_first(zoo: Zoo) -> None:
    first = zoo.task("angles", "validation")
    again = zoo.task("angles", "validation")
    assert (zoo.folder / "images" / "angles-validation.npz").exists()
    assert torch.equal(first.batch(np.arange(20)), again.batch(np.arange(20)))
    assert not list((zoo.folder / "images").glob("*.partial"))


def test_reference_is_classified_among_all_concepts(zoo: Zoo) -> None:
    reference = zoo.reference("test", each=1)
    assert len(reference) == len(reference.classes) > 200
    assert reference.labels is not None
    assert reference.labels.tolist() != [0] * len(reference)
    assert sorted(reference.labels.tolist()) == list(range(len(reference.classes)))
    model = zoo.model()
    head = model.head(reference)
    assert head.shape == (len(reference.classes), REDUCED.embed_dim)
    torch.testing.assert_close(head[-10:], model._heads["objects"])
    assert 0 <= evaluate(model, read(zoo.base), [reference])["reference"] <= 1


def test_loading_at_once_from_several_threads_gives_one_folder(reduced: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        zoos = list(pool.map(lambda _: load(tmp_path, data=reduced), range(4)))
    assert len({zoo.folder for zoo in zoos}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [zoos[0].folder.name]
    assert read(zoos[0].base).keys() == read(zoos[3].base).keys()


@pytest.mark.parametrize("name", ["base.safetensors", "heads.safetensors", "experts/shapes.safetensors"])
def test_a_damaged_shipped_file_is_named(reduced: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "data"
    shutil.copytree(reduced, copy)
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*damaged.*sha256.*mergesolve zoo build"):
        load(tmp_path / "cache", data=copy)
    assert not (tmp_path / "cache").exists()


def test_a_missing_file_and_a_broken_record_are_named(reduced: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(reduced, copy)
    (copy / "heads.safetensors").unlink()
    with pytest.raises(DataError, match=r"heads\.safetensors is missing"):
        load(tmp_path / "cache", data=copy)
    (copy / "zoo.json").write_text("{")
    with pytest.raises(DataError, match=r"zoo\.json is damaged"):
        load(tmp_path / "cache", data=copy)
    (copy / "zoo.json").write_text("{}")
    with pytest.raises(DataError, match=r"zoo\.json lacks architecture"):
        load(tmp_path / "cache", data=copy)
    with pytest.raises(DataError, match=r"zoo\.json is missing"):
        load(tmp_path / "cache", data=tmp_path / "nowhere")


def test_a_damaged_cached_file_is_named_with_the_remedy(reduced: Path, tmp_path: Path) -> None:
    zoo = load(tmp_path, data=reduced)
    zoo.task("angles", "validation")
    images = zoo.folder / "images" / "angles-validation.npz"
    images.write_bytes(images.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cached images .*angles-validation.npz are damaged.*delete the file"):
        zoo.task("angles", "validation")
    with zoo.experts["shapes"].open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"shapes\.safetensors is damaged.*Delete the folder"):
        load(tmp_path, data=reduced)


def test_unknown_names_are_answered_with_the_valid_ones(zoo: Zoo) -> None:
    with pytest.raises(DataError, match=r"no task 'shape'.*shapes, angles"):
        zoo.task("shape")
    with pytest.raises(DataError, match=r"no split 'dev'.*train, validation, test"):
        zoo.task("shapes", "dev")
    with pytest.raises(DataError, match="reference has the splits"):
        zoo.reference("dev")


def test_the_noisy_expert_is_off_by_the_promised_share_of_each_task_vector() -> None:
    base = {"a": torch.zeros(50, 40), "b": torch.ones(300)}
    expert = {"a": base["a"] + 0.1, "b": base["b"] - 0.02}
    noisy = _with_noise(expert, base)
    for name in base:
        noise = norm({name: noisy[name] - expert[name]})
        assert noise == pytest.approx(NOISE * norm({name: expert[name] - base[name]}), rel=1e-3)
    assert torch.equal(_with_noise(expert, base)["a"], noisy["a"])
    assert isinstance(NOISY_OF, str)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MERGESOLVE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("MERGESOLVE_CACHE")
    assert default_cache() == Path.home() / ".cache" / "mergesolve"


def test_the_record_is_plain_json(reduced: Path) -> None:
    record = json.loads((reduced / "zoo.json").read_text())
    assert record["settings"]["tasks"] == list(REDUCED.tasks)
    assert all(len(entry["sha256"]) == 64 for entry in record["files"].values())
