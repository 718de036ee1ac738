from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.objectives import DataError, Task
from mergesolve.objectives.images import resizer
from PIL import Image


@pytest.fixture
def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(4)]


@pytest.fixture
def data(photos: list[Image.Image]) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs pip install 'mergesolve[hub]'")
    kinds = {
        "id": datasets.Value("int64"),
        "img": datasets.Image(),
        "kind": datasets.ClassLabel(names=["red_fox", "owl"]),
    }
    rows = {"id": [7, 8, 9, 10], "img": photos, "kind": [1, 0, 1, 1]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def test_image_and_label_columns_are_found_by_their_kind(data: Any, photos: list[Image.Image]) -> None:
    task = Task.from_hub(data, image_size=16, name="animals")
    assert (task.name, task.classes, task.split) == ("animals", ("red fox", "owl"), "train")
    assert task.labels is not None
    assert task.labels.tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(task.batch(np.array([3, 0])), torch.stack([resizer(16)(photos[i]) for i in (3, 0)]))


@pytest.mark.parametrize(
    ("split", "kind"),
    [("train[:10%]", "train"), ("validation", "validation"), ("valid", "validation"), ("test", "test"), ("x", "test")],
)
def test_what_is_not_surely_training_or_validation_counts_as_test(data: Any, split: str, kind: str) -> None:
    assert Task.from_hub(data, split, image_size=16).split == kind


def test_a_local_folder_of_images_loads_by_its_path(tmp_path: Path, photos: list[Image.Image], data: Any) -> None:
    file = tmp_path / "animals.parquet"
    data.to_parquet(file)
    (tmp_path / "set").mkdir()
    file.rename(tmp_path / "set" / "train.parquet")
    task = Task.from_hub(str(tmp_path / "set"), image_size=16, classes=["a fox", "an owl"])
    assert (task.name, task.classes, len(task)) == ("set", ("a fox", "an owl"), 4)


def test_columns_and_datasets_that_are_not_there_are_refused(data: Any) -> None:
    with pytest.raises(DataError, match=r"the dataset has no column 'image'\. Did you mean 'img'"):
        Task.from_hub(data, image="image")
    with pytest.raises(DataError, match="the dataset has no image column among 'id', 'kind'; name it"):
        Task.from_hub(data.remove_columns("img"))
    with pytest.raises(DataError, match=r"one split of it \(datasets.Dataset\), got dict; choose a split"):
        Task.from_hub({"train": data})
    unlabelled = Task.from_hub(data.remove_columns("kind"), image_size=16, classes=["a", "b"])
    assert unlabelled.labels is None
    with pytest.raises(DataError, match="has an empty class list"):
        Task.from_hub(data.remove_columns("kind"), image_size=16)


def test_without_the_library_the_message_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'mergesolve\[hub\]'"):
        Task.from_hub("beans")
