"""materialize: what is written is what combine computes, it loads everywhere, and nothing is left half written."""

import contextlib
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, PoolError
from mergesolve.pools import pool as pool_module
from mergesolve.pools import writer as writer_module
from mergesolve.pools.operator import PIECE
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = {"emb.weight": (PIECE // 50 + 3, 60), "layers.1.weight": (20, 30), "layers.1.bias": (20,), "scale": ()}
N = 3


def draw(seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def pool(request, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("pool")
    base = {**draw(0, dtype=request.param), "frozen": torch.arange(5.0), "steps": torch.tensor([1, 2])}
    save_file(base, folder / "base.safetensors")
    for i in range(N):
        expert = {k: v + draw(i + 1, 0.1, request.param)[k] for k, v in base.items() if k in SHAPES}
        save_file({**expert, "frozen": base["frozen"]}, folder / f"e{i}.safetensors")
    return Pool.open(base=folder / "base.safetensors", experts=[str(folder / "e*.safetensors")], backend="streaming")


@pytest.fixture
def blocks(pool):
    return pool.blocks("layer")


@pytest.fixture
def coefficients(blocks):
    return np.random.default_rng(0).random((blocks.count, N))


def expected(pool, coefficients, blocks, dtype):
    merged = {name: value.to(dtype) for name, value in pool.combine(coefficients, blocks).items()}
    return {**merged, "frozen": torch.arange(5.0), "steps": torch.tensor([1, 2])}


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def stored_dtype(pool):
    return pool.storage["base"][0]


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_file_holds_what_combine_computes(pool, blocks, coefficients, tmp_path):
    path = tmp_path / "merged.safetensors"
    assert pool.materialize(coefficients, blocks, path) == [path]
    assert_same(load_file(path), expected(pool, coefficients, blocks, stored_dtype(pool)))
    assert listed(tmp_path) == ["merged.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", torch.float16, "bf16"])
def test_another_element_type_applies_to_all_floats(pool, blocks, coefficients, tmp_path, dtype):
    path = tmp_path / "merged.safetensors"
    pool.materialize(coefficients, blocks, path, dtype=dtype)
    kind = {"float32": torch.float32, torch.float16: torch.float16, "bf16": torch.bfloat16}[dtype]
    wanted = expected(pool, coefficients, blocks, kind)
    assert_same(load_file(path), {**wanted, "frozen": wanted["frozen"].to(kind)})


def test_shards_hold_the_same_as_one_file(pool, blocks, coefficients, tmp_path):
    files = pool.materialize(coefficients, blocks, tmp_path / "sharded", max_shard_size=3000)
    (one,) = pool.materialize(coefficients, blocks, tmp_path / "one")
    *weights, index = files
    assert one.name == "model.safetensors"
    assert index.name == "model.safetensors.index.json"
    assert len(weights) > 1
    parts = [load_file(path) for path in weights]
    together = {name: value for part in parts for name, value in part.items()}
    assert sum(len(part) for part in parts) == len(together)
    assert_same(together, load_file(one))
    described = json.loads(index.read_text())
    assert described["metadata"]["total_size"] == sum(value.nbytes for value in together.values())
    assert described["weight_map"] == {
        name: path.name for path, part in zip(weights, parts, strict=True) for name in part
    }
    for path, part in zip(weights, parts, strict=True):
        assert sum(value.nbytes for value in part.values()) <= 3000 or len(part) == 1, path


def test_a_written_folder_is_a_checkpoint(pool, blocks, coefficients, tmp_path):
    pool.materialize(coefficients, blocks, tmp_path / "merged", max_shard_size=3000)
    again = Pool.open(base=tmp_path / "merged", experts={"e": tmp_path / "merged"})
    assert_same(
        again.base_weights(),
        {
            k: v.float() if v.is_floating_point() else v
            for k, v in expected(pool, coefficients, blocks, stored_dtype(pool)).items()
        },
    )


def test_metadata_says_where_the_weights_came_from(pool, blocks, coefficients, tmp_path):
    (path,) = pool.materialize(coefficients, blocks, tmp_path / "m.safetensors", metadata={"run": "r1"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["pool_fingerprint"] == pool.fingerprint
    assert json.loads(metadata["experts"]) == list(pool.names)
    np.testing.assert_allclose(json.loads(metadata["coefficients_mean"]), coefficients.mean(axis=0), atol=1e-8)
    assert len(metadata["coefficients_sha256"]) == 64
    assert metadata["blocks"] == "layer"
    assert metadata["run"] == "r1"


def test_names_are_those_of_the_bases_file(tmp_path):
    state = {"module.w": torch.randn(4), "module.b": torch.randn(2)}
    save_file(state, tmp_path / "base.safetensors")
    save_file({k.removeprefix("module."): v + 1 for k, v in state.items()}, tmp_path / "e.safetensors")
    pool = Pool.open(base=tmp_path / "base.safetensors", experts=[tmp_path / "e.safetensors"], rename={"module.": ""})
    (path,) = pool.materialize(np.ones((1, 1)), pool.blocks("model"), tmp_path / "m.safetensors")
    assert_same(load_file(path), {k: v + 1 for k, v in state.items()})


@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_configuration_and_tokenizer_files_are_copied(tmp_path, named):
    base = tmp_path / "base"
    base.mkdir()
    save_file(draw(0), base / "model.safetensors")
    save_file(draw(1), tmp_path / "e.safetensors")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "vocab.json",
        "merges.txt",
    ):
        (base / name).write_text(name)
    (base / "training.log").write_text("not this")
    pool = Pool.open(base=base / named, experts=[tmp_path / "e.safetensors"])
    pool.materialize(np.ones((1, 1)), pool.blocks("model"), tmp_path / "out")
    assert listed(tmp_path / "out") == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert (tmp_path / "out" / "config.json").read_text() == "config.json"


def test_writing_again_with_other_shards_leaves_no_stale_index(pool, blocks, coefficients, tmp_path):
    pool.materialize(coefficients, blocks, tmp_path / "m", max_shard_size=3000)
    pool.materialize(0 * coefficients, blocks, tmp_path / "m")
    found = Pool.open(base=tmp_path / "m", experts={"e": tmp_path / "m"}).base_weights()
    assert_same(found, pool.base_weights())


class Crash(BaseException):
    """The process ends here."""


class Disk:
    """Renames to final names and removals of such, of which only the first few happen before the process ends."""

    def __init__(self, patch, left):
        self.left = left
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, self.counted(getattr(Path, name), name))

    def counted(self, action, name):
        def act(path, *args, **options):
            if self.left == 0:
                raise Crash
            if name == "replace" or not path.name.endswith(".partial"):
                self.left -= 1
            return action(path, *args, **options)

        return act


SIZES = {"one file": 5e9, "shards": 3000, "more shards": 1000}


class TestReplacing:
    """A folder that holds a model already is the old or the new one at any moment, and the new one alone at the end."""

    @staticmethod
    def read(folder):
        return Pool.open(base=folder, experts={"e": folder}).base_weights()

    @staticmethod
    def same(found, wanted):
        return all(torch.equal(found[name], value) for name, value in wanted.items())

    @pytest.mark.parametrize("old", SIZES)
    @pytest.mark.parametrize("new", SIZES)
    def test_a_crash_at_any_rename_or_removal_leaves_one_of_both(
        self, pool, blocks, coefficients, tmp_path, monkeypatch, old, new
    ):
        merged = {}
        for factor in (0, 1):
            pool.materialize(factor * coefficients, blocks, tmp_path / f"alone{factor}")
            merged[factor] = self.read(tmp_path / f"alone{factor}")
        states = []
        for survived in range(100):
            folder = tmp_path / f"m{survived}"
            pool.materialize(0 * coefficients, blocks, folder, max_shard_size=SIZES[old])
            finished = False
            with monkeypatch.context() as patch, contextlib.suppress(Crash):
                disk = Disk(patch, survived)
                pool.materialize(coefficients, blocks, folder, max_shard_size=SIZES[new])
                finished = disk.left > 0
            found = self.read(folder)
            states.append(self.same(found, merged[1]))
            assert states[-1] or self.same(found, merged[0])
            if finished:
                break
        assert finished
        assert states[0] is False
        assert states[-1] is True
        assert states == sorted(states)

    @pytest.mark.parametrize("old", SIZES)
    @pytest.mark.parametrize("new", SIZES)
    def test_nothing_of_the_old_model_is_left(self, pool, blocks, coefficients, tmp_path, old, new):
        folder = tmp_path / "m"
        pool.materialize(0 * coefficients, blocks, folder, max_shard_size=SIZES[old])
        (folder / "notes.txt").write_text("mine")
        (folder / "other.safetensors").write_bytes(b"mine")
        files = pool.materialize(coefficients, blocks, folder, max_shard_size=SIZES[new])
        assert listed(folder) == sorted([*(path.name for path in files), "notes.txt", "other.safetensors"])

    def test_shards_of_another_format_go_with_their_index(self, pool, blocks, coefficients, tmp_path):
        torch.save(draw(1), tmp_path / "pytorch_model-00001-of-00001.bin")
        weight_map = dict.fromkeys(SHAPES, "pytorch_model-00001-of-00001.bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        pool.materialize(coefficients, blocks, tmp_path)
        assert listed(tmp_path) == ["model.safetensors"]

    def test_a_failed_rename_leaves_the_old_model_and_no_new_file(
        self, pool, blocks, coefficients, tmp_path, monkeypatch
    ):
        pool.materialize(0 * coefficients, blocks, tmp_path, max_shard_size=3000)
        before = listed(tmp_path)
        rename = Path.replace

        def failing(path, target):
            if Path(target).name.endswith("index.json"):
                raise OSError(errno.EIO, "Input/output error")
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", failing)
        with pytest.raises(OSError, match="could not be written"):
            pool.materialize(coefficients, blocks, tmp_path, max_shard_size=3000)
        assert listed(tmp_path) == before
        assert self.same(self.read(tmp_path), pool.base_weights())


class TestFailures:
    """Errors of the disk and of the numbers leave nothing behind."""

    def test_coefficients_that_are_not_finite(self, pool, blocks, coefficients, tmp_path):
        coefficients[0, 0] = np.nan
        with pytest.raises(PoolError, match="not all finite"):
            pool.materialize(coefficients, blocks, tmp_path / "m.safetensors")
        assert listed(tmp_path) == []

    def test_values_that_overflow_half_precision(self, pool, blocks, coefficients, tmp_path):
        with pytest.raises(PoolError, match=r"overflow float16; write bfloat16 or float32"):
            pool.materialize(1e7 * coefficients, blocks, tmp_path / "m.safetensors", dtype="float16")
        assert listed(tmp_path) == []

    @pytest.mark.parametrize("target", ["m.safetensors", "m"])
    def test_disk_full_in_the_middle(self, pool, blocks, coefficients, tmp_path, monkeypatch, target):
        class Full:
            def __init__(self, file):
                self.file, self.room = file, 2000

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def write(self, data):
                self.room -= len(data)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return self.file.write(data)

        opened = Path.open
        monkeypatch.setattr(
            Path,
            "open",
            lambda path, *args, **more: (Full if args == ("wb",) else lambda file: file)(opened(path, *args, **more)),
        )
        with pytest.raises(OSError, match="could not be written: No space left on device") as error:
            pool.materialize(coefficients, blocks, tmp_path / target)
        assert error.value.errno == errno.ENOSPC
        assert listed(tmp_path) == []

    def test_a_disk_without_room_is_noticed_before_writing(self, pool, blocks, coefficients, tmp_path, monkeypatch):
        class Usage:
            free = 1000

        monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda folder: Usage)
        with pytest.raises(OSError, match=r"has 1.0 kB left and the weights need") as error:
            pool.materialize(coefficients, blocks, tmp_path / "m.safetensors")
        assert error.value.errno == errno.ENOSPC
        assert listed(tmp_path) == []

    def test_an_unwritable_folder(self, pool, blocks, coefficients, tmp_path, monkeypatch):
        if os.geteuid() == 0:  # the superuser may write everywhere
            monkeypatch.setattr(writer_module.os, "access", lambda path, mode: False)
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match=f"{tmp_path} is not writable"):
                pool.materialize(coefficients, blocks, tmp_path / "m.safetensors")
        finally:
            tmp_path.chmod(0o700)
        assert listed(tmp_path) == []

    def test_a_folder_that_cannot_be_made(self, pool, blocks, coefficients, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="cannot be made"):
            pool.materialize(coefficients, blocks, tmp_path / "file" / "m")

    def test_an_old_file_survives_a_failure(self, pool, blocks, coefficients, tmp_path):
        path = tmp_path / "m.safetensors"
        pool.materialize(coefficients, blocks, path, dtype="float32")
        before = path.read_bytes()
        with pytest.raises(PoolError):
            pool.materialize(1e7 * coefficients, blocks, path, dtype="float16")
        assert path.read_bytes() == before

    def test_a_file_where_a_folder_should_be(self, pool, blocks, coefficients, tmp_path):
        (tmp_path / "m").write_text("")
        with pytest.raises(PoolError, match=r"m is a file; name a \.safetensors file or a folder"):
            pool.materialize(coefficients, blocks, tmp_path / "m")

    def test_a_folder_where_a_file_should_be(self, pool, blocks, coefficients, tmp_path):
        (tmp_path / "m.safetensors").mkdir()
        with pytest.raises(PoolError, match="is a folder"):
            pool.materialize(coefficients, blocks, tmp_path / "m.safetensors")

    @pytest.mark.parametrize("size", [0, -1, float("nan")])
    def test_shard_sizes_that_make_no_sense(self, pool, blocks, coefficients, tmp_path, size):
        with pytest.raises(PoolError, match="max_shard_size must be a positive number"):
            pool.materialize(coefficients, blocks, tmp_path / "m", max_shard_size=size)


@pytest.mark.parametrize("file", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_folder_that_is_read_is_not_replaced(file, tmp_path):
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), float(name == "expert"))}, tmp_path / name / file)
        if "-of-" in file:
            index = {"metadata": {}, "weight_map": {"w": file}}
            (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
    pool = Pool.open(base=tmp_path / "base", experts={"e": tmp_path / "expert"})
    blocks = pool.blocks("model")
    for name in ("base", "expert"):
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(PoolError, match="would be replaced"):
            pool.materialize(np.ones((1, 1)), blocks, tmp_path / name)
        assert {path: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
    pool.materialize(np.ones((1, 1)), blocks, tmp_path)  # beside them is fine


def test_tensors_are_merged_in_the_order_in_which_they_are_written(tmp_path, monkeypatch):
    """Wide elements come first in a file: narrow ones that were merged along with them would all wait in memory."""
    monkeypatch.setattr(pool_module, "GROUP", 100)
    kinds = {f"layers.{i}.{name}": kind for i in range(6) for name, kind in (("norm", "float32"), ("proj", "bfloat16"))}
    base = {name: torch.zeros(40, dtype=getattr(torch, kind)) for name, kind in kinds.items()}
    pool = Pool.from_state_dicts(base, {"e": {name: tensor + 1 for name, tensor in base.items()}})
    asked: list[list[str]] = []

    def merged(names):
        asked.append(list(names))
        return {name: torch.ones(40) for name in names}

    pool.write(merged, tmp_path / "m.safetensors")
    assert sorted(name for names in asked for name in names) == sorted(kinds)
    assert all(len({kinds[name] for name in names}) == 1 for names in asked)
    assert [kinds[names[0]] for names in asked] == ["float32"] * 3 + ["bfloat16"] * 3


def test_metadata_that_no_reader_takes_are_refused(pool, blocks, coefficients, tmp_path):
    with pytest.raises(PoolError, match=r"'run'.*3"):
        pool.materialize(coefficients, blocks, tmp_path / "m.safetensors", metadata={"run": 3})
    assert listed(tmp_path) == []
