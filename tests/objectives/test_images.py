from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from mergesolve.objectives import CLIP, DataError, Task
from mergesolve.objectives.images import ImageFiles, resizer
from PIL import Image

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def _photo(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of two classes, one of them nested, and files that are no images."""
    for name, size in (("red_fox/b.png", (50, 40)), ("red_fox/deep/a.PNG", (33, 64)), ("owl/x.bmp", (20, 20))):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _photo(size, seed=len(name)).save(path, format=path.suffix[1:].upper())
    (tmp_path / "animals" / "owl" / "notes.txt").write_text("no image")
    (tmp_path / "animals" / "owl" / ".hidden.png").write_text("no image")
    (tmp_path / "animals" / ".cache").mkdir()
    return tmp_path / "animals"


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(57, 40), (40, 57), (32, 32), (20, 31)])
def test_images_are_prepared_as_open_clip_prepares_them(mode: str, resize_mode: str, size: tuple[int, int]) -> None:
    photo = _photo(size, mode=mode)
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD, resize_mode=resize_mode)
    pixels = resizer(32, resize_mode=resize_mode)(photo)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 32, 32))
    normalized = (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalized, transform(photo))


def test_palettes_and_transparency_become_rgb() -> None:
    photo = _photo((40, 40))
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    torch.testing.assert_close(resizer(16)(palette), resizer(16)(palette.convert("RGB")))
    assert resizer(16)(_photo((40, 40), mode="RGBA")).shape == (3, 16, 16)


def test_a_folder_has_one_class_a_subfolder_in_the_order_of_their_names(folder: Path) -> None:
    task = Task.from_folder(folder, image_size=16, split="validation")
    assert (task.name, task.classes, task.split) == ("animals", ("owl", "red fox"), "validation")
    assert task.labels is not None
    assert task.labels.tolist() == [0, 1, 1]
    batch = task.batch(np.array([2, 0]))
    assert batch.shape == (2, 3, 16, 16)
    with Image.open(folder / "red_fox" / "deep" / "a.PNG") as image:
        torch.testing.assert_close(batch[0], resizer(16)(image))


def test_images_are_decoded_only_when_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    decode = ImageFiles.decode

    def recorded(self: ImageFiles, i: int) -> torch.Tensor:
        read.append(i)
        return decode(self, i)

    monkeypatch.setattr(ImageFiles, "decode", recorded)
    task = Task.from_folder(folder, image_size=16)
    assert read == []
    first = task.subset(2).batch(np.array([0]))
    assert read == [0]
    # Decoded images are kept while there is room for them ...
    assert torch.equal(task.batch(np.array([2, 0, 2]))[1], first[0])
    assert read == [0, 2]
    # ... and read again where there is none.
    monkeypatch.setattr("mergesolve.objectives.images.KEPT_BYTES", 0)
    assert torch.equal(task.batch(np.array([1])), task.batch(np.array([1])))
    assert read == [0, 2, 1, 1]


def test_the_preprocessing_of_a_model_builds_its_tasks(folder: Path, clip: CLIP, clip_weights: Any) -> None:
    heads = {"animals": torch.randn(2, 16)}
    model = CLIP(clip.architecture, heads=heads)
    task = Task.from_folder(folder, **model.preprocess)
    assert model.logits(clip_weights, task.batch(np.arange(3)), task).shape == (3, 2)
    arrays = np.zeros((2, 50, 40), dtype=np.uint8)
    small = Task.from_arrays("animals", arrays, None, ["owl", "fox"], **model.preprocess)
    assert model.logits(clip_weights, small.batch(np.arange(2)), small).shape == (2, 2)


def test_resized_arrays_are_resized_as_images_are() -> None:
    photo = _photo((40, 50))
    task = Task.from_arrays("t", np.asarray(photo)[None], None, ["a"], image_size=(16, 16))
    torch.testing.assert_close(task.batch(np.arange(1))[0], resizer(16)(photo))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.json", json.dumps({"red_fox": "a fox", "wolf": "a wolf", "owl": "an owl"})),
        ("names.tsv", "red_fox\ta fox\nwolf\ta wolf\n\nowl\tan owl\n"),
    ],
)
def test_class_names_from_a_mapping_keep_its_order_and_classes_without_a_folder(
    folder: Path, tmp_path: Path, file: str, content: str
) -> None:
    (tmp_path / file).write_text(content)
    task = Task.from_folder(folder, classes=tmp_path / file, image_size=16)
    assert task.classes == ("a fox", "a wolf", "an owl")
    assert task.labels is not None
    assert task.labels.tolist() == [2, 0, 0]  # files stay in the order of the folders


@pytest.mark.parametrize(("file", "content"), [("names.json", '["an owl", "a fox"]'), ("n.txt", "an owl\na fox\n")])
def test_class_names_from_a_list_are_in_the_order_of_the_folders(
    folder: Path, tmp_path: Path, file: str, content: str
) -> None:
    (tmp_path / file).write_text(content)
    for classes in (str(tmp_path / file), ["an owl", "a fox"]):
        task = Task.from_folder(folder, classes=classes, image_size=16)
        assert task.classes == ("an owl", "a fox")
        assert task.labels is not None
        assert task.labels.tolist() == [0, 1, 1]


def test_images_without_subfolders_are_a_task_without_labels(folder: Path) -> None:
    task = Task.from_folder(folder / "owl", classes=["owl", "fox"], image_size=16)
    assert (task.labels, task.classes, len(task)) == (None, ("owl", "fox"), 1)


def test_folders_that_are_no_tasks_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "mixed.tsv").write_text("owl\tan owl\nred_fox\n")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "broken.json").write_text("{")
    cases: list[tuple[Path, Any, str]] = [
        (tmp_path / "nowhere", None, "task 'nowhere': there is no folder '.*nowhere'"),
        (folder / "owl", None, "has no subfolders, one a class; .*must be given"),
        (tmp_path / "empty", None, r"'.*empty' holds no images \(looked for .jpg"),
        (folder, ["owl"], r"1 class names for 2 folders \('owl', 'red_fox'\)"),
        (folder, {"owl": "an owl"}, "no class name for the folder 'red_fox'; it has names for 'owl'"),
        (folder, tmp_path / "none.json", "class names: there is no file '.*none.json'"),
        (folder, tmp_path / "mixed.tsv", "mixes lines with a tab and without; 'red_fox' has none"),
        (folder, tmp_path / "number.json", "holds a int; expected an object or a list"),
        (folder, tmp_path / "broken.json", "is not JSON"),
    ]
    for path, classes, message in cases:
        with pytest.raises(DataError, match=message):
            Task.from_folder(path, classes=classes)


def test_files_that_are_no_images_are_named(folder: Path) -> None:
    path = folder / "owl" / "x.bmp"
    task = Task.from_folder(folder, image_size=16)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"images: cannot read '.*x.bmp' \(.*truncated.*\); repair it or take it out"):
        task.batch(np.array([0]))
    path.write_text("no image")
    with pytest.raises(DataError, match=r"images: cannot read '.*x.bmp' \(cannot identify image file"):
        task.batch(np.array([0]))
    path.unlink()
    with pytest.raises(DataError, match=r"images: cannot read '.*x.bmp' \(.*No such file"):
        task.batch(np.array([0]))
