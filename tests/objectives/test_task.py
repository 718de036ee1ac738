from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.objectives import DataError, Task, joint
from mergesolve.objectives.task import Selected


class Lazy:
    """Inputs that only know rows, and remember which were asked for."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.asked += np.asarray(index).tolist()
        return torch.as_tensor(np.asarray(index), dtype=torch.float32).unsqueeze(1)


def _task(labels: list[int] | None, classes: int = 3, n: int | None = None) -> Task:
    n = len(labels) if labels is not None else n
    assert n is not None
    inputs = torch.arange(n, dtype=torch.float32).unsqueeze(1)
    return Task("t", inputs, None if labels is None else torch.tensor(labels), tuple("abcdefgh"[:classes]))


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=40), seed=st.integers(0, 3), data=st.data())
def test_subsets_are_balanced_nested_and_a_function_of_the_seed(labels: list[int], seed: int, data: Any) -> None:
    n = data.draw(st.integers(1, len(labels) + 3))
    task = _task(labels, classes=4)
    small, large = task.subset(n, seed), task.subset(n + 2, seed)
    assert len(small) == min(n, len(labels))
    chosen = [int(x) for x in small.inputs[:]]
    assert chosen == sorted(chosen)
    assert set(chosen) <= {int(x) for x in large.inputs[:]}
    assert chosen == [int(x) for x in task.subset(n, seed).inputs[:]]
    assert small.labels is not None
    assert small.labels.tolist() == [labels[i] for i in chosen]
    # No class has two samples more than another one that had more to give.
    taken, there = (np.bincount(x, minlength=4) for x in (small.labels.numpy(), labels))
    for a in range(4):
        for b in range(4):
            assert taken[a] <= taken[b] + 1 or taken[b] == there[b]


def test_subsets_differ_with_the_seed_and_without_labels_are_drawn_from_all() -> None:
    task = _task([0, 1, 2] * 20)
    assert task.subset(9, 0).inputs[:].tolist() != task.subset(9, 1).inputs[:].tolist()
    without = task.without_labels().subset(9, 0)
    assert without.labels is None
    assert len(set(without.inputs[:].flatten().tolist())) == 9
    with pytest.raises(DataError, match="a subset needs at least 1 sample, got 0"):
        task.subset(0)


def test_lazy_inputs_are_read_only_when_and_where_they_are_asked_for() -> None:
    inputs = Lazy(50)
    task = Task("t", inputs, torch.arange(50) % 2, ("a", "b"))
    part = task.subset(20, 1).subset(6, 2)
    assert inputs.asked == []
    assert isinstance(part.inputs, Selected)
    rows = part.batch(np.array([1, 3]))
    assert len(inputs.asked) == 2
    assert part.labels is not None
    for row, label in zip(rows[:, 0].tolist(), part.labels[[1, 3]].tolist(), strict=True):
        assert row % 2 == label


def test_the_original_is_left_as_it_was() -> None:
    task = _task([0, 1, 2, 0])
    assert task.without_labels().labels is None
    assert task.take(np.array([2, 0])).labels is not None
    assert task.labels is not None
    assert task.labels.tolist() == [0, 1, 2, 0]
    assert len(task) == 4


def test_take_keeps_the_order_that_is_given() -> None:
    part = _task([0, 1, 2, 0]).take(np.array([3, 1]))
    assert part.inputs[:].flatten().tolist() == [3, 1]
    assert part.labels is not None
    assert part.labels.tolist() == [0, 1]


def test_joint_shifts_labels_by_the_classes_before_them() -> None:
    one, two = _task([0, 2]), Task("u", torch.zeros(2, 1), torch.tensor([1, 0]), ("x", "y"), ("a {}",))
    a, b = joint([one, two])
    assert a.classes == b.classes == ("a", "b", "c", "x", "y")
    assert a.labels is not None
    assert b.labels is not None
    assert (a.labels.tolist(), b.labels.tolist()) == ([0, 2], [4, 3])
    assert [text.name for text in b.texts] == ["t", "u"]
    assert [text.templates for text in a.texts] == [one.templates, ("a {}",)]
    assert joint([one.without_labels()])[0].labels is None


def _build(**changes: Any) -> Task:
    return Task(**{"name": "t", "inputs": torch.zeros(3, 1), "labels": None, "classes": ("a", "b"), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ()}, "task 't' has an empty class list; give one name a class"),
        ({"classes": "ab"}, "classes and templates are sequences of strings, got one string"),
        ({"templates": "a {}"}, "classes and templates are sequences of strings, got one string"),
        ({"templates": ()}, "task 't' has no templates"),
        ({"templates": ("a photo",)}, r"the template 'a photo' has no \{\}, where the class name goes"),
        ({"split": "val"}, "the split must be one of 'train', 'validation', 'test', got 'val'"),
        ({"inputs": torch.zeros(0, 1)}, "task 't' is empty: it has classes but no inputs"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels of shape \[2\] do not match 3 inputs"),
        ({"labels": torch.zeros(3, 1, dtype=torch.int64)}, r"labels of shape \[3, 1\] do not match 3 inputs"),
        ({"labels": torch.zeros(3)}, r"labels must be integers \(class indices\), got torch.float32"),
        ({"labels": torch.tensor([0, 2, 1])}, r"label 2 of input 1 is outside the 2 classes \(labels go from 0 to 1\)"),
        ({"labels": torch.tensor([0, 1, -1])}, "label -1 of input 2 is outside the 2 classes"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _build(**changes)


def test_labels_become_int64() -> None:
    labels = _build(labels=torch.tensor([0, 1, 0], dtype=torch.uint8)).labels
    assert labels is not None
    assert labels.dtype == torch.int64


# -- arrays and npz ----------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 4),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    channels=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 9),
)
def test_images_of_every_layout_become_the_same_tensor(
    n: int, height: int, width: int, channels: int, seed: int
) -> None:
    hwc = np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    expected = np.repeat(hwc, 3, axis=3) if channels == 1 else hwc[..., :3]
    sources = [hwc, np.transpose(hwc, (0, 3, 1, 2)), torch.from_numpy(hwc)]
    sources += [hwc[..., 0]] if channels == 1 else []
    for source in sources:
        task = Task.from_arrays("t", source, None, ["a"])
        batch = task.batch(np.arange(n))
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch.numpy(), np.transpose(expected, (0, 3, 1, 2)))


def test_greyscale_is_repeated_without_copying() -> None:
    task = Task.from_arrays("t", np.zeros((10, 8, 8), dtype=np.uint8), None, ["a"])
    assert isinstance(task.inputs, torch.Tensor)
    assert task.inputs.shape == (10, 3, 8, 8)
    assert task.inputs.untyped_storage().nbytes() == 10 * 8 * 8


def test_an_ambiguous_layout_has_to_be_said() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 7, 3), dtype=np.uint8)
    with pytest.raises(DataError, match=r"could have their channels first or last; say which with layout='chw'"):
        Task.from_arrays("t", images, None, ["a"])
    first = Task.from_arrays("t", images, None, ["a"], layout="chw")
    last = Task.from_arrays("t", images, None, ["a"], layout="hwc")
    np.testing.assert_array_equal(first.batch(np.arange(2)).numpy(), images)
    np.testing.assert_array_equal(last.batch(np.arange(2)).numpy(), np.transpose(images, (0, 3, 1, 2)))


def test_float_inputs_pass_as_they_are() -> None:
    values = np.random.default_rng(0).normal(size=(4, 6))
    task = Task.from_arrays("t", values, [0, 1, 1, 0], ["a", "b"])
    assert isinstance(task.inputs, torch.Tensor)
    torch.testing.assert_close(task.inputs, torch.from_numpy(values).float())


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (np.zeros((2, 8, 8), dtype=np.int64), {}, "images must be uint8 .* got torch.int64"),
        (
            np.zeros((2, 5, 8, 7), dtype=np.uint8),
            {},
            r"\[2, 5, 8, 7\] do not have 1, 3 or 4 channels where layout='auto'",
        ),
        (np.zeros((2, 5, 8, 3), dtype=np.uint8), {"layout": "chw"}, "channels where layout='chw' expects them"),
        (np.zeros((2, 8), dtype=np.uint8), {}, r"images of shape \[2, 8\]; expected \[N, H, W\]"),
        (np.zeros((2, 8, 8), dtype=np.uint8), {"layout": "nhwc"}, "unknown layout 'nhwc'. Did you mean 'hwc'"),
        (np.zeros((2, 3, 8, 8)), {"image_size": 4}, "only uint8 images can be resized"),
        (np.array(["a", "b"]), {}, "inputs must be an array of numbers"),
        (np.zeros((0, 8, 8), dtype=np.uint8), {"image_size": 4}, "task 't' is empty"),
        (np.zeros((2, 8, 8), dtype=np.uint8), {"image_size": 4, "resize_mode": "crop"}, "unknown resize_mode 'crop'"),
    ],
)
def test_arrays_that_are_no_inputs_are_refused(inputs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Task.from_arrays("t", inputs, None, ["a"], **options)


@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    classes=st.lists(st.text(min_size=1, max_size=5).filter(lambda s: "\0" not in s), min_size=3, max_size=3),
)
def test_npz_files_round_trip(tmp_path_factory: pytest.TempPathFactory, labels: list[int], classes: list[str]) -> None:
    path = tmp_path_factory.mktemp("npz") / "animals.npz"
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array(labels), classes=np.array(classes))
    task = Task.from_npz(path, split="test")
    assert (task.name, task.classes, task.split) == ("animals", tuple(classes), "test")
    assert task.labels is not None
    assert task.labels.tolist() == labels
    np.testing.assert_array_equal(task.batch(np.arange(len(labels))).numpy(), np.transpose(images, (0, 3, 1, 2)))


def test_npz_files_without_labels_and_with_given_classes(tmp_path: Any) -> None:
    np.savez(tmp_path / "t.npz", inputs=np.zeros((2, 5)))
    task = Task.from_npz(str(tmp_path / "t.npz"), name="mine", classes=["a", "b"])
    assert (task.name, task.labels, task.classes) == ("mine", None, ("a", "b"))


def test_class_names_of_npz_files_may_be_listed_in_a_file(tmp_path: Any) -> None:
    np.savez(tmp_path / "t.npz", inputs=np.zeros((2, 5)))
    (tmp_path / "names.txt").write_text("an owl\na fox\n")
    assert Task.from_npz(tmp_path / "t.npz", classes=tmp_path / "names.txt").classes == ("an owl", "a fox")
    (tmp_path / "names.json").write_text('{"owl": "an owl"}')
    with pytest.raises(DataError, match=r"task 't': .*names.json' names folders; .* a list in the order of the labels"):
        Task.from_npz(tmp_path / "t.npz", classes=str(tmp_path / "names.json"))


def test_npz_files_that_cannot_be_read_are_refused(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"there is no file '.*missing.npz'"):
        Task.from_npz(tmp_path / "missing.npz")
    np.savez(tmp_path / "whole.npz", images=np.zeros((50, 8, 8), dtype=np.uint8))
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1500])
    with pytest.raises(DataError, match=r"'.*half.npz' is not a readable .npz file"):
        Task.from_npz(tmp_path / "half.npz")
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(DataError, match=r"'.*text.npz' is not a readable .npz file"):
        Task.from_npz(tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", images=np.zeros((1, 8, 8), dtype=np.uint8), classes=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"not a readable .npz file .*class names as an array of strings"):
        Task.from_npz(tmp_path / "pickled.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match="holds one array"):
        Task.from_npz(tmp_path / "one.npy")
    with pytest.raises(DataError, match=r"task 'whole': .* has no array 'classes'; give classes"):
        Task.from_npz(tmp_path / "whole.npz")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(DataError, match="has no array 'images' or 'inputs'; it has 'pictures'"):
        Task.from_npz(tmp_path / "other.npz", classes=["a"])
