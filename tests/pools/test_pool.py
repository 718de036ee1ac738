"""Pools as values: what is merged and carried, subsets, transforms, fingerprints, memory, and refusals."""

import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, PoolError, inspect, memory
from mergesolve.pools.operator import PIECE
from safetensors.torch import save_file

SHAPES = {"a.weight": (30, 40), "a.bias": (30,), "long": (2, PIECE)}
N = 4


def draw(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


BASE = draw(0)
EXPERTS = {f"e{i}": {k: v + draw(i + 1, 0.1)[k] for k, v in BASE.items()} for i in range(N)}


@pytest.fixture(params=["streaming", "resident"])
def backend(request):
    return request.param


@pytest.fixture
def pool(backend):
    return Pool.from_state_dicts(BASE, EXPERTS, backend=backend)


def stored(folder):
    save_file(BASE, folder / "base.safetensors")
    for name, expert in EXPERTS.items():
        save_file(expert, folder / f"{name}.safetensors")
    return folder


def open_files(folder, **options):
    return Pool.open(base=folder / "base.safetensors", experts=[str(folder / "*.safetensors")], **options)


def drawn(seed, rows, n=N):
    return np.random.default_rng(seed).normal(size=(rows, n))


class TestCarried:
    """Tensors that are not merged."""

    def test_identical_tensors_are_carried(self, backend):
        frozen = {"frozen": torch.randn(PIECE + 5), "nan": torch.full((3,), float("nan"))}
        experts = {name: {**expert, **{k: v.clone() for k, v in frozen.items()}} for name, expert in EXPERTS.items()}
        pool = Pool.from_state_dicts({**BASE, **frozen}, experts, backend=backend)
        assert set(pool.carried) == {"frozen", "nan"}
        assert set(pool.tensors) == set(SHAPES)

    @pytest.mark.parametrize("position", [0, 1023, PIECE, PIECE + 4])
    def test_one_changed_element_in_one_expert_is_found(self, position):
        frozen = torch.zeros(PIECE + 5)
        changed = frozen.clone()
        changed[position] = 1e-30
        experts = {name: {**expert, "x": changed if name == "e2" else frozen} for name, expert in EXPERTS.items()}
        assert "x" in Pool.from_state_dicts({**BASE, "x": frozen}, experts).tensors

    def test_equal_values_in_another_element_type_are_identical(self):
        experts = {name: {**expert, "x": torch.ones(5, dtype=torch.float16)} for name, expert in EXPERTS.items()}
        assert Pool.from_state_dicts({**BASE, "x": torch.ones(5)}, experts).carried == ("x",)

    def test_tensors_that_differ_are_recognized_from_their_beginnings(self, tmp_path):
        pool = open_files(stored(tmp_path))
        assert set(pool.tensors) == set(SHAPES)
        assert 0 < pool.bytes_read <= 2 * 4096 * len(SHAPES)

    def test_base_weights_hold_everything_as_float32(self):
        base = {**{k: v.half() for k, v in BASE.items()}, "steps": torch.tensor([3])}
        experts = {name: {k: v.half() for k, v in expert.items()} for name, expert in EXPERTS.items()}
        weights = Pool.from_state_dicts(base, experts).base_weights()
        assert weights["steps"].dtype == torch.int64
        for name in SHAPES:
            assert torch.equal(weights[name], base[name].float())

    def test_experts_that_all_equal_the_base_are_refused(self):
        pool = Pool.from_state_dicts(BASE, {"same": BASE, "too": BASE})
        with pytest.raises(PoolError, match="all 2 experts are identical to the base"):
            pool.blocks("model")


class TestSubset:
    """A subset is the pool of the experts it names."""

    def test_scores_and_weights_are_those_columns(self, pool):
        some = pool.subset(["e3", "e1"])
        blocks, gradient = pool.blocks("row"), draw(50)
        np.testing.assert_allclose(
            some.correlate(gradient, blocks), pool.correlate(gradient, blocks)[:, [3, 1]], rtol=1e-4, atol=1e-4
        )
        coefficients = drawn(0, blocks.count, 2)
        full = np.zeros((blocks.count, N))
        full[:, [3, 1]] = coefficients
        first, second = some.combine(coefficients, blocks), pool.combine(full, blocks)
        for name in SHAPES:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)

    def test_of_a_subset(self, pool):
        assert pool.subset(["e3", "e1", "e0"]).subset(["e0", "e3"]).names == ("e0", "e3")
        blocks, gradient = pool.blocks("model"), draw(51)
        np.testing.assert_allclose(
            pool.subset(["e3", "e1", "e0"]).subset(["e0", "e3"]).correlate(gradient, blocks),
            pool.correlate(gradient, blocks)[:, [0, 3]],
            rtol=1e-5,
        )

    def test_keeps_the_rows_even_where_its_experts_agree(self):
        experts = {name: {**expert, "x": torch.full((2,), float(name == "e0"))} for name, expert in EXPERTS.items()}
        pool = Pool.from_state_dicts({**BASE, "x": torch.zeros(2)}, experts)
        assert pool.subset(["e1"]).blocks("tensor").rows == pool.blocks("tensor").rows

    def test_reads_only_its_experts(self, tmp_path):
        pool = open_files(stored(tmp_path), backend="streaming").subset(["e2"])
        blocks = pool.blocks("model")
        before = pool.bytes_read
        pool.correlate(draw(52), blocks)
        assert pool.bytes_read - before == 2 * sum(value.nbytes for value in BASE.values())

    @pytest.mark.parametrize(
        ("names", "message"),
        [(["e11"], "no expert 'e11'.*Did you mean 'e1'"), ([], "at least one"), (["e1", "e1"], "each once")],
    )
    def test_mistakes(self, pool, names, message):
        with pytest.raises(PoolError, match=message):
            pool.subset(names)


class TestTransform:
    """A transformed pool is a pool whose task vectors went through a function of whole tensors."""

    @staticmethod
    def center(name, base, tau):
        """Depends on all experts and on the whole tensor."""
        return tau - tau.mean(dim=0) + 0.01 * base.max() * (1 + tau.abs().max())

    def reference(self):
        experts = {name: dict(expert) for name, expert in EXPERTS.items()}
        for key in SHAPES:
            tau = torch.stack([expert[key] - BASE[key] for expert in EXPERTS.values()])
            for i, name in enumerate(EXPERTS):
                experts[name][key] = BASE[key] + self.center(key, BASE[key], tau)[i]
        return Pool.from_state_dicts(BASE, experts, backend="streaming")

    @pytest.mark.parametrize("kind", ["model", "layer", "row"])
    def test_equals_the_pool_of_transformed_experts(self, pool, kind):
        transformed, expected = pool.transform(self.center, "center"), self.reference()
        blocks, gradient = pool.blocks(kind), draw(53)
        coefficients = drawn(1, blocks.count)
        scale = float(np.abs(expected.correlate(gradient, blocks)).max())
        np.testing.assert_allclose(
            transformed.correlate(gradient, blocks), expected.correlate(gradient, blocks), atol=1e-5 * scale
        )
        np.testing.assert_allclose(transformed.gram(blocks), expected.gram(blocks), rtol=1e-3, atol=1e-2)
        first, second = transformed.combine(coefficients, blocks), expected.combine(coefficients, blocks)
        for name in SHAPES:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-5)

    def test_transforms_compose(self, pool):
        blocks, gradient = pool.blocks("tensor"), draw(54)
        twice = pool.transform(lambda name, base, tau: 2 * tau, "double").transform(
            lambda n, b, tau: tau - 1, "minus one"
        )
        ones = np.array([[float(gradient[name].double().sum())] for name in pool.tensors])
        np.testing.assert_allclose(
            twice.correlate(gradient, blocks), 2 * pool.correlate(gradient, blocks) - ones, rtol=1e-4, atol=1e-2
        )

    def test_a_subset_of_a_transformed_pool_still_sees_all_experts(self, pool):
        blocks, gradient = pool.blocks("row"), draw(55)
        transformed = pool.transform(self.center, "center")
        np.testing.assert_allclose(
            transformed.subset(["e2", "e0"]).correlate(gradient, blocks),
            transformed.correlate(gradient, blocks)[:, [2, 0]],
            rtol=1e-4,
            atol=1e-4,
        )

    def test_zero_coefficients_still_give_the_base(self, pool):
        blocks = pool.blocks("tensor")
        found = pool.transform(self.center, "center").combine(np.zeros((blocks.count, N)), blocks)
        assert all(torch.equal(found[name], BASE[name]) for name in SHAPES)

    def test_is_called_once_a_tensor_and_pass_with_copies(self):
        calls = []

        def spoil(name, base, tau):
            calls.append(name)
            base.zero_()
            return tau.zero_()

        pool = Pool.from_state_dicts(BASE, EXPERTS, backend="streaming").transform(spoil, "spoil")
        before = {name: value.clone() for name, value in BASE.items()}
        pool.correlate(draw(56), pool.blocks("row"))
        assert calls == list(pool.tensors)
        assert all(torch.equal(BASE[name], before[name]) for name in SHAPES)

    def test_results_of_the_wrong_shape_are_refused(self, pool):
        wrong = pool.transform(lambda name, base, tau: tau[0], "first")
        with pytest.raises(
            PoolError, match=r"'first' returned \[30, 40\] for 'a.weight'; expected .*\[4, 30, 40\]|\[30\]"
        ):
            wrong.gram(wrong.blocks("model"))

    def test_needs_a_label(self, pool):
        with pytest.raises(PoolError, match="needs a label"):
            pool.transform(lambda name, base, tau: tau, "")


class TestFingerprint:
    """The fingerprint identifies the contents, not the place."""

    def test_is_the_same_in_another_folder_and_on_another_backend(self, tmp_path):
        first = stored(tmp_path)
        shutil.copytree(first, tmp_path / "copy")
        assert open_files(first).fingerprint == open_files(tmp_path / "copy", backend="streaming").fingerprint

    @pytest.mark.parametrize("position", [0, 511, PIECE, 2 * PIECE - 512, 2 * PIECE - 1])
    @pytest.mark.parametrize("last", range(0, 130, 43))
    def test_changes_with_the_beginning_middle_and_end_of_any_tensor(self, position, last):
        """130 tensors, of which one differs in one element in one expert."""
        base = {f"t{i}": torch.zeros(2 * PIECE if i == last else 3) for i in range(130)}
        expert = {name: value + 1 for name, value in base.items()}
        changed = {**expert, f"t{last}": expert[f"t{last}"].clone()}
        changed[f"t{last}"][position] = 2
        prints = {Pool.from_state_dicts(base, {"e": expert, "f": other}).fingerprint for other in (expert, changed)}
        assert len(prints) == 2

    def test_reads_a_few_kilobytes_a_tensor(self, tmp_path):
        pool = open_files(stored(tmp_path), backend="streaming")
        assert pool.fingerprint
        assert 0 < pool.bytes_read <= (N + 1) * len(SHAPES) * 3 * 2048

    def test_does_not_depend_on_the_number_of_threads(self, tmp_path):
        stored(tmp_path)
        prints = set()
        for threads in (1, 3):
            pool = open_files(tmp_path, backend="streaming")
            pool._workers._threads = threads
            prints.add(pool.fingerprint)
        assert len(prints) == 1

    def test_changes_with_a_value_a_name_a_subset_and_a_transform(self):
        pool = Pool.from_state_dicts(BASE, EXPERTS)
        changed = {**EXPERTS, "e1": {**EXPERTS["e1"], "a.bias": EXPERTS["e1"]["a.bias"] + 1}}
        renamed = {("x" if name == "e1" else name): expert for name, expert in EXPERTS.items()}
        prints = [
            p.fingerprint
            for p in (
                pool,
                Pool.from_state_dicts(BASE, changed),
                Pool.from_state_dicts(BASE, renamed),
                pool.subset(["e0", "e1"]),
                pool.subset(["e1", "e0"]),
                pool.transform(lambda name, base, tau: tau, "identity"),
                pool.transform(lambda name, base, tau: tau, "other"),
            )
        ]
        assert len(set(prints)) == len(prints)


class TestMemory:
    """Memory is stated before it is allocated, and does not grow with the pool when streaming."""

    def test_auto_chooses_by_memory(self, monkeypatch):
        task_vectors = 4 * N * sum(value.numel() for value in BASE.values())
        monkeypatch.setattr(memory, "available", lambda device: 2 * task_vectors + 8)
        assert Pool.from_state_dicts(BASE, EXPERTS).backend == "resident"
        monkeypatch.setattr(memory, "available", lambda device: 2 * task_vectors - 8)
        assert Pool.from_state_dicts(BASE, EXPERTS).backend == "streaming"

    def test_resident_memory_is_stated_and_is_what_is_allocated(self):
        pool = Pool.from_state_dicts(BASE, EXPERTS, backend="resident")
        stated = pool.memory_needed
        source, _ = pool.engine()
        assert stated == source.stack.nbytes + source.flat_base.nbytes

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("n", [1, 4, 9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_streaming_memory_is_stated_and_is_what_is_allocated(self, threads, n, dtype, tmp_path, monkeypatch):
        """Tensors of several pieces, so that all threads take part and fill their buffers."""
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        experts = {f"e{i}": {k: (v + i + 1).to(dtype) for k, v in BASE.items()} for i in range(n)}
        pool = Pool.from_state_dicts(BASE, experts, backend="streaming")
        stated = pool.memory_needed
        blocks = pool.blocks("row")
        pool.correlate([draw(1), draw(2)], blocks)
        pool.combine(drawn(0, blocks.count, n), blocks)
        pool.gram(blocks)
        pool.gram(pool.blocks("model"))
        inspect(pool)
        allocated = sum(scratch.nbytes for scratch in pool._workers._scratch)
        assert len(pool._workers._scratch) <= threads
        assert allocated <= stated
        full = stated / threads
        assert max(scratch.nbytes for scratch in pool._workers._scratch) > full / 2

    def test_resident_that_does_not_fit_is_refused_with_the_numbers(self, monkeypatch):
        monkeypatch.setattr(memory, "available", lambda device: 10_000)
        with pytest.raises(PoolError, match=r'needs 5\.3 MB on cpu .* 10\.0 kB are available.*backend="streaming"'):
            Pool.from_state_dicts(BASE, EXPERTS, backend="resident")

    def test_available_memory_is_positive_and_below_the_machine(self):
        assert 0 < memory.available(torch.device("cpu")) < 2**50

    def test_streaming_peak_is_flat_in_the_number_of_experts(self, tmp_path):
        """A child process uses a 40 MB model with 2 and with 16 experts; its peak resident memory hardly moves."""
        shapes = {f"layers.{i}.weight": (1024, 1024) for i in range(10)}
        generator = torch.Generator().manual_seed(0)
        model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(model, tmp_path / "base.safetensors")
        for i in range(16):
            save_file({name: value + 0.01 * (i + 1) for name, value in model.items()}, tmp_path / f"e{i}.safetensors")
        code = textwrap.dedent(
            """
            import resource, sys
            from pathlib import Path
            import numpy as np
            from mergesolve.pools import Pool

            folder, n = Path(sys.argv[1]), int(sys.argv[2])
            pool = Pool.open(base=folder / "base.safetensors", backend="streaming",
                             experts=[folder / f"e{i}.safetensors" for i in range(n)])
            blocks = pool.blocks("layer")
            weights = pool.combine(np.full((blocks.count, n), 1 / n), blocks)
            pool.correlate(weights, blocks)
            pool.gram(blocks)
            pool.materialize(np.full((blocks.count, n), 1 / n), blocks, folder / f"merged{n}.safetensors")
            status = Path("/proc/self/status").read_text()
            print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
            """
        )

        def peak(n):
            run = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path), str(n)], capture_output=True, text=True, check=True
            )
            return int(run.stdout)

        held = 14 * sum(4 * tensor.numel() for tensor in model.values())  # what keeping the other 14 would take
        assert peak(16) - peak(2) < held / 10  # libraries alone vary by some 25 MB from one process to the next


class TestRefusals:
    """Mistakes in calls, each with its message."""

    def test_no_experts(self):
        with pytest.raises(PoolError, match="there are no experts"):
            Pool.from_state_dicts(BASE, {})

    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_patterns_are_one_or_several(self, option):
        prints = [Pool.from_state_dicts(BASE, EXPERTS, **{option: value}).tensors for value in ("bias$", ["bias$"])]
        assert prints[0] == prints[1]
        assert ("a.bias" in prints[0]) == (option == "include")
        with pytest.raises(PoolError, match=f"{option} must be a list of regular expressions; got 3"):
            Pool.from_state_dicts(BASE, EXPERTS, **{option: 3})

    def test_prefixes_to_rename_must_be_a_mapping(self):
        with pytest.raises(PoolError, match="rename must map prefixes"):
            Pool.from_state_dicts(BASE, EXPERTS, rename=["a."])

    def test_unknown_backend(self):
        with pytest.raises(PoolError, match=r"unknown backend 'stream'.* Did you mean 'streaming'"):
            Pool.from_state_dicts(BASE, EXPERTS, backend="stream")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
    def test_cuda_asked_for_and_absent(self):
        with pytest.raises(PoolError, match=r'sees no CUDA device here; use device="cpu"'):
            Pool.from_state_dicts(BASE, EXPERTS, device="cuda")

    def test_unknown_device(self):
        with pytest.raises(PoolError, match="'gpu' is no device"):
            Pool.from_state_dicts(BASE, EXPERTS, device="gpu")

    def test_state_dicts_that_hold_other_things(self):
        with pytest.raises(PoolError, match="holds 'step', no tensor"):
            Pool.from_state_dicts({**BASE, "step": 3}, EXPERTS)

    @pytest.mark.parametrize("shape", [(1, N + 1), (2, N), (N,)])
    def test_coefficients_of_the_wrong_shape(self, pool, shape):
        with pytest.raises(PoolError, match=r"shape \[rows, experts\] = \[1, 4\]; got"):
            pool.combine(np.zeros(shape), pool.blocks("model"))

    def test_blocks_of_another_pool(self, pool):
        other = Pool.from_state_dicts({"x": torch.ones(2)}, {"e": {"x": torch.zeros(2)}})
        with pytest.raises(PoolError, match=r"these blocks partition 1 tensors, not the pool's 3"):
            pool.gram(other.blocks("model"))

    def test_gradients_of_the_wrong_shape(self, pool):
        with pytest.raises(PoolError, match=r"gradient of 'a.bias' has shape \[2\]; expected \[30\]"):
            pool.correlate({"a.bias": torch.ones(2)}, pool.blocks("model"))

    def test_gradients_of_unknown_tensors(self, pool):
        with pytest.raises(PoolError, match=r"gradient for 'a.wieght'.*Did you mean 'a.weight'"):
            pool.correlate({"a.wieght": torch.ones(2)}, pool.blocks("model"))

    def test_weights_of_since_that_combine_did_not_make(self, pool):
        blocks = pool.blocks("model")
        weights = pool.combine(np.zeros((1, N)), blocks)
        weights["a.bias"] = weights["a.bias"].double()
        with pytest.raises(PoolError, match=r"weights of `since` hold torch.float64 \[30\] for 'a.bias'"):
            pool.combine(np.ones((1, N)), blocks, since=(np.zeros((1, N)), weights))

    def test_expert_indices_out_of_range(self, pool):
        with pytest.raises(PoolError, match="run from 0 to 3; got 4"):
            pool.correlate(draw(1), pool.blocks("model"), experts=[4])


def test_an_expert_with_nan_spoils_only_its_own_scores():
    """NaN stays in the column of its expert, and a vertex away from it is untouched."""
    broken = {**EXPERTS["e1"], "a.bias": torch.full((30,), float("nan"))}
    pool = Pool.from_state_dicts(BASE, {**EXPERTS, "e1": broken}, backend="streaming")
    blocks = pool.blocks("model")
    scores = pool.correlate(draw(60), blocks)
    assert np.isnan(scores[:, 1]).all()
    assert np.isfinite(scores[:, [0, 2, 3]]).all()
    weights = pool.combine([[0.5, 0.0, 0.5, 0.0]], blocks)
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert any(flag.kind == "nonfinite" for flag in inspect(pool).flags)


def test_one_expert_is_a_pool(backend):
    pool = Pool.from_state_dicts(BASE, {"only": EXPERTS["e0"]}, backend=backend)
    weights = pool.combine([[1.0]], pool.blocks("model"))
    for name in SHAPES:
        torch.testing.assert_close(weights[name], EXPERTS["e0"][name], rtol=0, atol=2e-6)
