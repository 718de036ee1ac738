"""Opening checkpoints: every format gives the same numbers, headers are enough, and what cannot be read says why."""

import json
import os
import re
import struct
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from mergesolve.pools import Pool, PoolError
from mergesolve.pools.checkpoint import Buffer, is_hub_id, open_checkpoint
from safetensors.torch import save_file


def draw(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 5), "b.weight": (4, 3, 2), "scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def everything(checkpoint):
    """All tensors of a checkpoint, read in two pieces each."""
    result = {}
    buffer = Buffer(4096)
    for name, info in checkpoint.tensors.items():
        read, half = checkpoint.reader(name), info.numel // 2
        parts = [read(0, half, buffer).clone(), read(half, info.numel, buffer).clone()]
        result[name] = torch.cat(parts).view(info.shape)
    return result


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def shards(folder, state, suffix="safetensors"):
    folder.mkdir()
    names = list(state)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    parts = {f"{stem}-1.{suffix}": names[:1], f"{stem}-2.{suffix}": names[1:]}
    for file, keys in parts.items():
        part = {key: state[key] for key in keys}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


class TestFormats:
    """One state dict, every way to store it."""

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    )
    @pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
    def test_single_file(self, tmp_path, dtype, suffix):
        state = {**draw(0, dtype), "count": torch.tensor([1, 2, 3]), "mask": torch.tensor([True, False])}
        path = tmp_path / f"model.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        found = everything(open_checkpoint(path))
        assert_same(
            {k: v.view(torch.uint8) if dtype.itemsize == 1 else v for k, v in found.items()},
            {k: v.view(torch.uint8) if dtype.itemsize == 1 else v for k, v in state.items()},
        )

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_folder_with_shards(self, tmp_path, suffix):
        state = draw(1)
        assert_same(everything(open_checkpoint(shards(tmp_path / "model", state, suffix))), state)

    def test_folder_with_one_file(self, tmp_path):
        save_file(draw(2), tmp_path / "anything.safetensors")
        assert_same(everything(open_checkpoint(tmp_path)), draw(2))

    def test_folder_prefers_safetensors_to_pickles(self, tmp_path):
        save_file(draw(2), tmp_path / "model.safetensors")
        torch.save(draw(3), tmp_path / "pytorch_model.bin")
        assert_same(everything(open_checkpoint(tmp_path)), draw(2))

    @pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
    def test_state_dict_inside_a_training_checkpoint(self, tmp_path, key):
        torch.save({key: draw(4), "epoch": 3}, tmp_path / "last.pt")
        assert_same(everything(open_checkpoint(tmp_path / "last.pt")), draw(4))

    def test_parameters_of_a_module(self, tmp_path):
        module = torch.nn.Linear(3, 2)
        torch.save(dict(module.named_parameters()), tmp_path / "m.pt")
        assert_same(
            everything(open_checkpoint(tmp_path / "m.pt")), {k: v.detach() for k, v in module.named_parameters()}
        )

    def test_tensors_that_share_storage_or_begin_inside_one(self, tmp_path):
        whole = torch.arange(24.0).view(6, 4)
        state = {"first": whole[:2], "second": whole[2:], "again": whole}
        torch.save(state, tmp_path / "m.pt")
        assert_same(everything(open_checkpoint(tmp_path / "m.pt")), state)

    def test_pickled_files_are_read_from_disk_piece_by_piece(self, tmp_path):
        torch.save(draw(5), tmp_path / "m.pt")
        checkpoint = open_checkpoint(tmp_path / "m.pt")
        buffer = Buffer(64)
        piece = checkpoint.reader("a.weight")(3, 7, buffer)
        assert piece.data_ptr() == buffer.bytes.data_ptr()


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestRefusals:
    """Each refusal names the file and the remedy."""

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path):
        evil = tmp_path / "evil.pt"
        torch.save({"a.weight": torch.ones(2), "x": Payload(tmp_path / "ran")}, evil)
        with pytest.raises(PoolError, match=r"evil\.pt holds objects that need code.*weights_only=False"):
            open_checkpoint(evil)
        assert not (tmp_path / "ran").exists()

    def test_a_pickled_module_is_refused_and_the_conversion_that_is_named_works(self, tmp_path):
        path = tmp_path / "module.pt"
        torch.save(torch.nn.Linear(3, 2), path)
        with pytest.raises(PoolError, match="need code") as error:
            open_checkpoint(path)
        code = str(error.value).split('python -c "', 1)[1].rsplit('"', 1)[0]
        subprocess.run([sys.executable, "-c", code], check=True)
        assert set(open_checkpoint(tmp_path / "module.safetensors").tensors) == {"weight", "bias"}

    def test_truncated_safetensors(self, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file(draw(0), path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-10])
        with pytest.raises(PoolError, match=rf"m\.safetensors is cut short: its header promises {len(whole)} bytes"):
            open_checkpoint(path)

    @pytest.mark.parametrize("keep", [0, 5, 8, 40])
    def test_safetensors_cut_inside_the_header(self, tmp_path, keep):
        path = tmp_path / "m.safetensors"
        save_file(draw(0), path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(PoolError, match="not a complete safetensors file"):
            open_checkpoint(path)

    def test_truncated_pickle(self, tmp_path):
        path = tmp_path / "m.pt"
        torch.save(draw(0), path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(PoolError, match=r"m\.pt is cut short or not in the zip format"):
            open_checkpoint(path)

    def test_a_file_that_shrinks_while_it_is_open(self, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file({"w": torch.ones(1000)}, path)
        checkpoint = open_checkpoint(path)
        os.truncate(path, path.stat().st_size - 400)
        with pytest.raises(PoolError, match="ends inside 'w'"):
            checkpoint.reader("w")(0, 1000, Buffer(4000))

    @pytest.mark.parametrize(
        "header",
        [
            b"[1, 2]",
            b"{nonsense",
            b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"w": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}',
            b'{"w": {"shape": [2]}}',
            b'{"w": 3}',
        ],
    )
    def test_headers_that_make_no_sense(self, tmp_path, header):
        path = tmp_path / "m.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
        with pytest.raises(PoolError, match=r"header of .*m\.safetensors cannot be read"):
            open_checkpoint(path)

    def test_no_state_dict(self, tmp_path):
        torch.save([torch.ones(2)], tmp_path / "m.pt")
        with pytest.raises(PoolError, match="holds no state dict"):
            open_checkpoint(tmp_path / "m.pt")

    def test_tensors_that_are_not_contiguous(self, tmp_path):
        torch.save({"w": torch.ones(4, 6).t()}, tmp_path / "m.pt")
        with pytest.raises(PoolError, match=r"'w' in .* is not stored contiguously"):
            open_checkpoint(tmp_path / "m.pt")

    def test_unknown_suffix(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"x")
        with pytest.raises(PoolError, match=r"suffix '\.onnx'; expected one of \.safetensors"):
            open_checkpoint(tmp_path / "m.onnx")

    def test_a_path_that_does_not_exist(self, tmp_path):
        with pytest.raises(PoolError, match="does not exist"):
            open_checkpoint(tmp_path / "nothing.safetensors")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(PoolError, match="holds no weights"):
            open_checkpoint(tmp_path)

    def test_a_folder_with_several_files_and_no_index(self, tmp_path):
        save_file(draw(0), tmp_path / "x.safetensors")
        save_file(draw(1), tmp_path / "y.safetensors")
        with pytest.raises(PoolError, match="2 weight files"):
            open_checkpoint(tmp_path)

    def test_a_missing_shard(self, tmp_path):
        folder = shards(tmp_path / "model", draw(0))
        (folder / "model-2.safetensors").unlink()
        with pytest.raises(PoolError, match=r"names the shard 'model-2\.safetensors', which is not in"):
            open_checkpoint(folder)

    def test_a_shard_outside_the_folder(self, tmp_path):
        folder = shards(tmp_path / "model", draw(0))
        save_file(draw(0), tmp_path / "else.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a.weight": "../else.safetensors"}}))
        with pytest.raises(PoolError, match="names the shard"):
            open_checkpoint(folder)

    def test_an_index_that_places_tensors_where_they_are_not(self, tmp_path):
        folder = shards(tmp_path / "model", draw(0))
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"ghost": "model-1.safetensors"}}))
        with pytest.raises(PoolError, match="'ghost' in shards that do not hold them"):
            open_checkpoint(folder)

    @pytest.mark.parametrize("text", ["{", '{"weight_map": 3}', "{}"])
    def test_an_index_that_makes_no_sense(self, tmp_path, text):
        folder = shards(tmp_path / "model", draw(0))
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(PoolError, match=r"index\.json cannot be read"):
            open_checkpoint(folder)


class TestHub:
    """Hub ids go through huggingface_hub; here it is replaced, as there is no network."""

    def test_an_id_is_fetched_and_opened(self, tmp_path, monkeypatch):
        hub = pytest.importorskip("huggingface_hub")
        save_file(draw(0), tmp_path / "model.safetensors")
        asked = {}

        def snapshot(name, **options):
            asked.update(options, name=name)
            return str(tmp_path)

        files = [SimpleNamespace(rfilename=name) for name in ("model.safetensors", "pytorch_model.bin")]
        monkeypatch.setattr(hub, "model_info", lambda name, revision, timeout: SimpleNamespace(siblings=files))
        monkeypatch.setattr(hub, "snapshot_download", snapshot)
        assert_same(everything(open_checkpoint("owner/name@v2")), draw(0))
        assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
        assert not any(pattern.startswith("*.bin") for pattern in asked["allow_patterns"])

    def test_without_the_library_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(PoolError, match=r"pip install 'mergesolve\[hub\]'"):
            open_checkpoint("owner/name")

    def test_an_id_that_cannot_be_fetched(self, monkeypatch, tmp_path):
        hub = pytest.importorskip("huggingface_hub")
        asked = []

        def fail(name, revision, timeout):
            asked.append(name)
            raise ConnectionError("no route to host\nsecond line")

        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "model_info", fail)
        with pytest.raises(PoolError, match=r"owner/name is not a local path and could not be fetched .*no route") as e:
            open_checkpoint("owner/name")
        assert "second line" not in str(e.value)
        assert asked == ["owner/name"]

    def test_without_the_network_what_was_fetched_before_is_used(self, monkeypatch, tmp_path):
        hub = pytest.importorskip("huggingface_hub")
        save_file(draw(0), tmp_path / "model.safetensors")

        def fail(name, revision, timeout):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(hub, "model_info", fail)
        monkeypatch.setattr(hub, "snapshot_download", lambda name, revision, local_files_only: str(tmp_path))
        assert_same(everything(open_checkpoint("owner/name")), draw(0))

    @pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "laion/model-v1.5@refs/pr/3", "a_b/c@main"])
    def test_ids(self, name, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert is_hub_id(name)

    @pytest.mark.parametrize(
        "name",
        [
            "ex/missing.safetensors",
            "ex/missing.PT",
            "ex/pytorch_model.bin",
            "./missing",
            "../missing",
            ".hidden/missing",
            "~/missing",
            "/tmp/missing",
            "folder/missing",
            "missing",
            "a/b/c",
        ],
    )
    def test_missing_paths_are_no_ids_and_nothing_is_asked_of_the_hub(self, name, monkeypatch, tmp_path):
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub, "model_info", lambda *args, **options: pytest.fail("the Hub was asked"))
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(PoolError, match="does not exist: there is no such file or folder"):
            open_checkpoint(name)


class TestManyFiles:
    """More files than the soft limit of open files allows."""

    CODE = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from mergesolve.pools import Pool

        folder, hard = Path(sys.argv[1]), int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        experts = {f"e{i}": folder / f"e{i}.safetensors" for i in range(120)}
        pool = Pool.open(base=folder / "base.safetensors", experts=experts, backend="streaming")
        try:
            print(np.allclose(pool.gram(pool.blocks("model")).diagonal(0, 1, 2)[0], 3.0))
            print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        except OSError as error:
            print(error)
        """
    )

    def outcome(self, folder, hard):
        save_file({"w": torch.zeros(3)}, folder / "base.safetensors")
        for i in range(120):
            save_file({"w": torch.ones(3)}, folder / f"e{i}.safetensors")
        command = [sys.executable, "-c", self.CODE, str(folder), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")

    def test_the_soft_limit_is_raised_as_far_as_needed(self, tmp_path):
        assert self.outcome(tmp_path, 1000)[:2] == ["True", "256"]

    def test_beyond_the_hard_limit_the_error_says_what_to_do(self, tmp_path):
        (message, *_) = self.outcome(tmp_path, 100)
        assert re.search(r"e\d+\.safetensors cannot be opened: the limit of open files", message)


def test_opening_reads_headers_only(tmp_path):
    """Files of 40 GB whose data section is a hole open without their data being read."""
    elements = 10 * 2**30
    header = json.dumps({"w": {"dtype": "F32", "shape": [elements // 1024, 1024], "data_offsets": [0, 4 * elements]}})
    for name in ("base", "expert"):
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header.encode())
            file.truncate(8 + len(header) + 4 * elements)
    pool = Pool.open(base=tmp_path / "base.safetensors", experts=[tmp_path / "expert.safetensors"])
    assert pool.bytes_read == 0
    assert pool.backend == "streaming" or pool.memory_needed > 80e9
