"""Statistics of experts: files that are tied to their experts, read in pieces, and refused when they do not fit."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from mergesolve.pools import (
    Pool,
    PoolError,
    Statistics,
    model_fingerprint,
    statistics_path,
    write_statistics,
)
from mergesolve.pools.sources import Scratch
from mergesolve.pools.statistics import read_metadata
from safetensors.torch import load_file, save_file

SHAPES = {"lin.weight": (6, 4), "lin.bias": (6,), "proj": (4, 3), "conv.weight": (5, 2, 3, 3)}
AXES = {"lin.weight": 1, "proj": 0, "conv.weight": 1}
INPUTS = {"lin.weight": 4, "proj": 4, "conv.weight": 18}
EXPERTS = ("a", "b", "c")


def random_state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def fisher(seed):
    return {name: tensor.square() for name, tensor in random_state(100 + seed).items()}


def gram(seed):
    generator = torch.Generator().manual_seed(200 + seed)
    x = {name: torch.randn(50, d, generator=generator) for name, d in INPUTS.items()}
    return {name: rows.T @ rows / 50 for name, rows in x.items()}


@pytest.fixture
def folder(tmp_path):
    """base.safetensors, a, b and c.safetensors, and both kinds of statistics of each beside them."""
    save_file(random_state(0), tmp_path / "base.safetensors")
    for seed, name in enumerate(EXPERTS, start=1):
        path = tmp_path / f"{name}.safetensors"
        save_file(random_state(seed), path)
        write_statistics(
            statistics_path(path, "fisher"), "fisher", fisher(seed), {"task": name, "samples": "7"}, expert=path
        )
        write_statistics(
            statistics_path(path, "gram"),
            "gram",
            gram(seed),
            {"task": name, "axes": json.dumps(AXES), "rows": json.dumps(dict.fromkeys(AXES, 50))},
            expert=path,
        )
    return tmp_path


def open_pool(folder, names=EXPERTS, **options):
    return Pool.open(
        base=folder / "base.safetensors", experts={name: folder / f"{name}.safetensors" for name in names}, **options
    )


def rewrite(folder, expert, kind, change):
    """Write an expert's statistics again after `change(tensors, metadata)`."""
    path = folder / f"{expert}.{kind}.safetensors"
    tensors, metadata = load_file(path), read_metadata(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_what_is_written_is_what_is_read_whole_and_in_pieces(folder):
    pool = open_pool(folder)
    for kind, make in (("fisher", fisher), ("gram", gram)):
        statistics = Statistics.open(pool, kind)
        for index in range(pool.n):
            for name, expected in make(index + 1).items():
                found = statistics.tensor(name, index)
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
                size = expected.numel()
                cuts = [0, size // 3, size // 2, size]
                scratch = Scratch(size)
                pieces = [statistics.piece(name, index, *cut, scratch) for cut in pairwise(cuts)]
                assert torch.equal(torch.cat(pieces), expected.flatten())
                assert scratch.bytes_read == 4 * size


def test_pieces_are_the_callers_own(folder):
    statistics = Statistics.open(open_pool(folder), "fisher")
    scratch = Scratch(64)
    first = statistics.piece("lin.weight", 0, 0, 24, scratch)
    kept = first.clone()
    statistics.piece("lin.weight", 1, 0, 24, scratch)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(statistics.piece("lin.weight", 0, 0, 24, scratch), kept)


def test_experts_are_numbered_as_in_the_pool_of_the_moment(folder):
    pool = open_pool(folder).subset(["c", "a"])
    statistics = Statistics.open(pool, "fisher")
    assert statistics.experts == ("c", "a")
    assert torch.equal(statistics.tensor("proj", 0), fisher(3)["proj"])
    assert torch.equal(statistics.tensor("proj", 1), fisher(1)["proj"])


def test_tensors_without_a_statistic_have_none(folder):
    statistics = Statistics.open(open_pool(folder), "gram")
    assert statistics.tensor("lin.bias", 0) is None
    assert statistics.piece("lin.bias", 0, 0, 2, Scratch(8)) is None
    assert statistics.rows("lin.bias", 0) is None


def test_axes_and_rows_come_from_the_header(folder):
    statistics = Statistics.open(open_pool(folder), "gram")
    assert statistics.axes == AXES
    assert statistics.rows("proj", 2) == 50
    assert statistics.shapes == {name: (d, d) for name, d in INPUTS.items()}
    assert statistics.describe()["experts"]["b"]["task"] == "b"


def test_statistics_follow_the_renames_of_the_pool_and_not_the_stored_names(folder):
    pool = open_pool(folder, rename={"lin.": "head."})
    with pytest.raises(PoolError, match=r"'lin.*', which the pool's models lack.*rename"):
        Statistics.open(pool, "fisher")
    for seed, name in enumerate(EXPERTS, start=1):
        tensors = {key.replace("lin.", "head."): value for key, value in fisher(seed).items()}
        path = folder / f"{name}.safetensors"
        write_statistics(statistics_path(path, "fisher"), "fisher", tensors, {}, expert=path)
    assert torch.equal(Statistics.open(pool, "fisher").tensor("head.bias", 1), fisher(2)["lin.bias"])


def test_files_can_be_named_or_lie_in_a_folder_of_their_own(folder, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    for name in EXPERTS:
        (folder / f"{name}.fisher.safetensors").rename(away / f"{name}.fisher.safetensors")
    pool = open_pool(folder)
    with pytest.raises(PoolError, match=r"'a' has no fisher statistics.*mergesolve stats --kind fisher"):
        Statistics.open(pool, "fisher")
    files = {name: away / f"{name}.fisher.safetensors" for name in EXPERTS}
    for place in (away, str(away), files):
        assert torch.equal(Statistics.open(pool, "fisher", place).tensor("proj", 2), fisher(3)["proj"])
    with pytest.raises(PoolError, match="expert 'c' was given"):
        Statistics.open(pool, "fisher", {name: files[name] for name in "ab"})
    with pytest.raises(PoolError, match="no folder"):
        Statistics.open(pool, "fisher", tmp_path / "nowhere")


def test_statistics_of_a_folder_are_inside_it_and_are_not_its_model(folder, tmp_path):
    for name, shards in (("single", 1), ("sharded", 2)):
        place = tmp_path / name
        place.mkdir()
        state = random_state(1)
        files = {key: f"model-{k % shards + 1:05d}-of-00002.safetensors" for k, key in enumerate(state)}
        if shards == 1:
            save_file(state, place / "model.safetensors")
        else:
            for file in set(files.values()):
                save_file({key: state[key] for key in state if files[key] == file}, place / file)
            (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        path = place / "model.fisher.safetensors"
        write_statistics(path, "fisher", fisher(1), {}, expert=place)
        pool = Pool.open(base=folder / "base.safetensors", experts={"x": place})
        assert statistics_path(place, "fisher") == path
        assert torch.equal(Statistics.open(pool, "fisher").tensor("proj", 0), fisher(1)["proj"])
        assert torch.equal(pool.combine([[1.0]], pool.blocks("model"))["lin.bias"], state["lin.bias"])
    assert statistics_path(tmp_path / "v1.5.pt", "gram") == tmp_path / "v1.5.gram.safetensors"


def test_a_glob_of_experts_leaves_statistics_out_and_so_does_a_folder(folder, tmp_path):
    pool = Pool.open(base=folder / "base.safetensors", experts=[str(folder / "*.safetensors")])
    assert pool.names == EXPERTS
    other = tmp_path / "other"
    other.mkdir()
    save_file(random_state(1), other / "weights.safetensors")
    path = statistics_path(other / "weights.safetensors", "fisher")
    write_statistics(path, "fisher", fisher(1), {}, expert=other)
    assert Pool.open(base=folder / "base.safetensors", experts={"x": other}).n == 1


def test_some_experts_can_be_asked_for(folder):
    (folder / "b.fisher.safetensors").unlink()
    statistics = Statistics.open(open_pool(folder), "fisher", experts=["c", "a"])
    assert statistics.experts == ("a", "c")
    assert torch.equal(statistics.tensor("proj", 2), fisher(3)["proj"])
    with pytest.raises(PoolError, match="no fisher statistics were opened for expert 'b'"):
        statistics.tensor("proj", 1)
    with pytest.raises(PoolError, match="from 0 to 2"):
        statistics.tensor("proj", 3)


def test_statistics_in_memory_read_like_files(folder):
    pool = open_pool(folder)
    tables = {name: gram(seed) for seed, name in enumerate(EXPERTS, start=1)}
    memory = Statistics.from_tensors(pool, "gram", tables, axes=AXES)
    assert memory.axes == AXES
    kept = tables["b"]["proj"].clone()
    memory.tensor("proj", 1).zero_()
    assert torch.equal(tables["b"]["proj"], kept)
    halves = Statistics.from_tensors(pool, "fisher", {"a": {k: v.half() for k, v in fisher(1).items()}})
    assert torch.equal(halves.tensor("proj", 0), fisher(1)["proj"].half().float())


def test_a_file_of_another_expert_is_refused_and_its_owner_named(folder):
    pool = open_pool(folder)
    files = {"a": folder / "b.fisher.safetensors", "b": folder / "b.fisher.safetensors"}
    with pytest.raises(PoolError, match=r"b.fisher.safetensors does not belong to expert 'a'.*expert 'b'.*stats"):
        Statistics.open(pool, "fisher", files, experts=["a", "b"])


def test_a_file_of_an_expert_that_was_trained_on_is_refused(folder):
    save_file(random_state(50), folder / "a.safetensors")
    with pytest.raises(PoolError, match=r"a model that is not in the pool \(task 'a'\)"):
        Statistics.open(open_pool(folder), "fisher")


def test_a_file_of_the_other_kind_or_of_none_is_refused(folder):
    pool = open_pool(folder)
    files = {name: folder / f"{name}.gram.safetensors" for name in EXPERTS}
    with pytest.raises(PoolError, match="holds gram statistics, where fisher"):
        Statistics.open(pool, "fisher", files)
    with pytest.raises(PoolError, match="no statistics"):
        Statistics.open(pool, "fisher", {name: folder / f"{name}.safetensors" for name in EXPERTS})
    with pytest.raises(PoolError, match="unknown kind of statistics 'hessian'"):
        Statistics.open(pool, "hessian")


def test_a_gram_of_the_wrong_size_is_refused(folder):
    rewrite(folder, "b", "gram", lambda tensors, _: tensors.update({"proj": torch.eye(3)}))
    with pytest.raises(PoolError, match=r"Gram of the wrong size.*b.gram.*'proj'.*\[4, 4\].*\[4, 3\].*axis 0"):
        Statistics.open(open_pool(folder), "gram")


def test_the_axis_decides_the_size_of_a_gram(folder):
    for name in EXPERTS:
        rewrite(folder, name, "gram", lambda _, metadata: metadata.update(axes=json.dumps({**AXES, "proj": 1})))
    with pytest.raises(PoolError, match=r"Gram of the wrong size.*'proj'.*\[3, 3\]"):
        Statistics.open(open_pool(folder), "gram")


def test_a_fisher_of_the_wrong_shape_is_refused(folder):
    rewrite(folder, "c", "fisher", lambda tensors, _: tensors.update({"proj": tensors["proj"].T.contiguous()}))
    with pytest.raises(PoolError, match=r"Fisher diagonal of the wrong shape.*c.fisher.*\[4, 3\]"):
        Statistics.open(open_pool(folder), "fisher")


def test_axes_that_differ_between_experts_are_refused(folder):
    rewrite(folder, "c", "gram", lambda _, metadata: metadata.update(axes=json.dumps({**AXES, "lin.weight": 0})))
    with pytest.raises(PoolError, match=r"'lin.weight' on axis 0"):
        Statistics.open(open_pool(folder), "gram")


def test_a_header_whose_axes_cannot_be_read_is_refused(folder):
    rewrite(folder, "a", "gram", lambda _, metadata: metadata.update(axes="[1]"))
    with pytest.raises(PoolError, match="no table of tensors under 'axes'"):
        Statistics.open(open_pool(folder), "gram")


def test_statistics_that_one_expert_has_and_another_lacks_are_refused(folder):
    rewrite(folder, "b", "fisher", lambda tensors, _: tensors.pop("lin.bias"))
    with pytest.raises(PoolError, match=r"b.fisher.safetensors lacks 'lin.bias', which .*a.fisher"):
        Statistics.open(open_pool(folder), "fisher")
    rewrite(folder, "a", "fisher", lambda tensors, _: [tensors.pop("lin.bias"), tensors.pop("proj")])
    with pytest.raises(PoolError, match=r"a.fisher.safetensors lacks 'proj', which .*b.fisher"):
        Statistics.open(open_pool(folder), "fisher")


def test_tensors_that_are_not_merged_do_not_matter(folder):
    pool = open_pool(folder, exclude=["proj"])
    rewrite(folder, "b", "fisher", lambda tensors, _: tensors.pop("proj"))
    statistics = Statistics.open(pool, "fisher")
    assert set(statistics.shapes) == set(SHAPES) - {"proj"}
    assert statistics.tensor("proj", 0) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e-3])
def test_values_that_no_fisher_can_have_are_refused_when_they_are_read(folder, value):
    def damage(tensors, _):
        tensors["lin.weight"].view(-1)[17] = value

    rewrite(folder, "b", "fisher", damage)
    statistics = Statistics.open(open_pool(folder), "fisher")
    assert statistics.tensor("lin.weight", 0) is not None
    for read in (
        lambda: statistics.tensor("lin.weight", 1),
        lambda: statistics.piece("lin.weight", 1, 10, 20, Scratch(64)),
    ):
        with pytest.raises(PoolError, match=r"b.fisher.safetensors.*'lin.weight' \(element 17\).*stats --kind fisher"):
            read()
    assert statistics.piece("lin.weight", 1, 0, 17, Scratch(64)) is not None


def test_a_gram_may_have_negative_values_and_no_nan(folder):
    rewrite(folder, "a", "gram", lambda tensors, _: tensors["proj"].__setitem__((1, 2), float("nan")))
    statistics = Statistics.open(open_pool(folder), "gram")
    assert float(statistics.tensor("lin.weight", 0).min()) < 0
    with pytest.raises(PoolError, match=r"nan in 'proj' \(element 6\)"):
        statistics.tensor("proj", 0)


def test_a_truncated_file_is_refused(folder):
    path = folder / "a.fisher.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PoolError, match="cut short"):
        Statistics.open(open_pool(folder), "fisher")


def test_unknown_experts_are_refused_with_the_nearest(folder):
    pool = Pool.from_state_dicts(random_state(0), {"cars": random_state(1), "digits": random_state(2)})
    for make in (
        lambda: Statistics.open(pool, "fisher", experts=["car"]),
        lambda: Statistics.open(pool, "fisher", {"car": "x"}),
    ):
        with pytest.raises(PoolError, match=r"'car', which is no expert.*Did you mean 'cars'"):
            make()
    with pytest.raises(PoolError, match="no file that statistics could lie beside"):
        Statistics.open(pool, "fisher")
    with pytest.raises(PoolError, match="'car'"):
        Statistics.from_tensors(pool, "fisher", {"car": fisher(1)})


def test_statistics_of_no_merged_tensor_are_refused(folder):
    pool = open_pool(folder, include=["bias"])
    with pytest.raises(PoolError, match=r"none of the tensors that are merged, such as 'lin.bias'"):
        Statistics.open(pool, "gram")


def test_written_files_say_whose_they_are_or_are_not_written(tmp_path):
    with pytest.raises(PoolError, match="do not say whose"):
        write_statistics(tmp_path / "x.fisher.safetensors", "fisher", fisher(1), {})
    with pytest.raises(PoolError, match=r"\.safetensors file"):
        write_statistics(tmp_path / "x.pt", "fisher", fisher(1), {"expert": "e"})
    with pytest.raises(PoolError, match="unknown kind"):
        write_statistics(tmp_path / "x.safetensors", "other", fisher(1), {"expert": "e"})
    assert list(tmp_path.iterdir()) == []
    save_file(random_state(1), tmp_path / "x.safetensors")
    path = write_statistics(
        tmp_path / "new" / "x.fisher.safetensors", "fisher", fisher(1), {"task": "t"}, expert=tmp_path / "x.safetensors"
    )
    header = read_metadata(path)
    assert header["statistics"] == "fisher"
    assert header["task"] == "t"
    assert header["expert"] == model_fingerprint(tmp_path / "x.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["x.fisher.safetensors"]
    assert {name: tensor.dtype for name, tensor in load_file(path).items()} == dict.fromkeys(SHAPES, torch.float32)


def test_a_failed_write_leaves_the_earlier_file(folder, monkeypatch):
    path = folder / "a.fisher.safetensors"
    before = path.read_bytes()
    tensors = {"proj": torch.ones(4, 3), "bad": torch.ones(2, device="meta")}
    with pytest.raises(NotImplementedError):
        write_statistics(path, "fisher", tensors, {"expert": "e"})
    assert path.read_bytes() == before
    assert not [p for p in folder.iterdir() if "partial" in p.name]
