"""combine, correlate and gram against a float64 reference, and as a linear operator with its adjoint."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from mergesolve.pools import Blocks, Pool
from mergesolve.pools.operator import PIECE
from safetensors.torch import save_file

KINDS = ["model", "layer", "tensor", "row", (r"^embed", r"\.weight$", ".*")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["streaming", "resident"]

# Two tensors are longer than a piece: one of many rows, one of few rows that are themselves longer than a piece.
SHAPES = {
    "embed": (5, 12),
    "blocks.2.mlp.weight": (7, 3, 2),
    "blocks.2.mlp.bias": (7,),
    "blocks.10.long.weight": (3, PIECE + 77),
    "blocks.10.tall.weight": (PIECE // 128 + 9, 200),
    "scale": (),
}
N = 4


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def models(request):
    """Models rounded to a storage type, so that what is stored is the truth that references are computed from."""
    generator = torch.Generator().manual_seed(3)

    def draw(scale):
        return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base = draw(1.0)
    experts = [{name: base[name] + tau for name, tau in draw(0.1).items()} for _ in range(N)]
    rounded = [{name: value.to(request.param) for name, value in model.items()} for model in [base, *experts]]
    for model in rounded:
        model["steps"] = torch.tensor([3, 4])
    return rounded


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("models")
    for i, model in enumerate(models):
        save_file(model, folder / ("base.safetensors" if i == 0 else f"e{i - 1}.safetensors"))
    return folder


def open_pool(folder, backend):
    return Pool.open(
        base=folder / "base.safetensors", experts=[folder / f"e{i}.safetensors" for i in range(N)], backend=backend
    )


@pytest.fixture(scope="module", params=BACKENDS)
def pool(request, files):
    return open_pool(files, request.param)


@pytest.fixture(params=KINDS, ids=lambda kind: kind if isinstance(kind, str) else "patterns")
def blocks(request, pool):
    return pool.blocks(request.param)


def drawn(seed, rows):
    return np.random.default_rng(seed).normal(size=(rows, N))


def gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def double(model):
    return {name: model[name].double().numpy() for name in SHAPES}


def norm(weights):
    return float(sum(float((value.double() ** 2).sum()) for value in weights.values())) ** 0.5


def taus(models):
    base = double(models[0])
    return [{name: double(model)[name] - base[name] for name in SHAPES} for model in models[1:]]


def spread(values, shape):
    """Coefficients of one expert for one tensor, shaped to multiply it."""
    return values.reshape(-1, *[1] * (len(shape) - 1)) if shape else values.reshape(())


def reference_combine(models, coefficients, blocks: Blocks, with_base=True):
    result = {}
    for name, shape in SHAPES.items():
        total = double(models[0])[name].copy() if with_base else np.zeros(shape)
        for i, tau in enumerate(taus(models)):
            total = total + spread(coefficients[blocks.rows[name], i], shape) * tau[name]
        result[name] = total
    return result


def reference_correlate(models, gradients, blocks: Blocks):
    scores = np.zeros((blocks.count, N))
    for i, tau in enumerate(taus(models)):
        for name in SHAPES:
            product = gradients[name].double().numpy() * tau[name]
            rows = blocks.rows[name]
            scores[rows, i] += product.reshape(rows.stop - rows.start, -1).sum(axis=1)
    return scores


def scale_of(models, gradients, blocks):
    """‖G_b‖ · ‖τ_{i,b}‖: what rounding errors of a score are relative to."""
    size = np.zeros((2, blocks.count, N))
    for i, tau in enumerate(taus(models)):
        for name in SHAPES:
            rows = blocks.rows[name]
            for k, array in enumerate((gradients[name].double().numpy(), tau[name])):
                size[k, rows, i] += (array.reshape(rows.stop - rows.start, -1) ** 2).sum(axis=1)
    return np.sqrt(size[0] * size[1])


def test_combine_equals_the_float64_reference(pool, models, blocks):
    coefficients = drawn(0, blocks.count)
    found = pool.combine(coefficients, blocks)
    expected = reference_combine(models, coefficients, blocks)
    assert list(found) == list(pool.tensors)
    for name in SHAPES:
        assert found[name].dtype == torch.float32
        assert tuple(found[name].shape) == SHAPES[name]
        np.testing.assert_allclose(
            found[name].numpy(), expected[name], rtol=0, atol=4e-7 * np.abs(expected[name]).max()
        )


def test_displacement_is_combine_without_the_base(pool, models, blocks):
    coefficients = drawn(1, blocks.count)
    coefficients[:, 2] = 0
    found = pool.displacement(coefficients, blocks)
    expected = reference_combine(models, coefficients, blocks, with_base=False)
    for name in SHAPES:
        np.testing.assert_allclose(
            found[name].numpy(), expected[name], rtol=0, atol=4e-7 * np.abs(expected[name]).max()
        )


def test_correlate_equals_the_float64_reference(pool, models, blocks):
    g = gradient(5)
    error = np.abs(pool.correlate(g, blocks) - reference_correlate(models, g, blocks))
    assert (error <= 2e-6 * scale_of(models, g, blocks)).all()


def test_gram_equals_the_float64_reference(pool, models, blocks):
    found = pool.gram(blocks)
    for j, tau in enumerate(taus(models)):
        g = {name: torch.from_numpy(np.asarray(tau[name], dtype=np.float64)) for name in SHAPES}
        error = np.abs(found[:, :, j] - reference_correlate(models, g, blocks))
        assert (error <= 2e-6 * scale_of(models, g, blocks)).all()
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))


def test_correlate_is_the_adjoint_of_combine(pool, models, blocks):
    """⟨combine(Λ) − θ0, G⟩ = ⟨Λ, correlate(G)⟩, up to the rounding of the weights themselves."""
    coefficients, g = drawn(2, blocks.count), gradient(6)
    weights, base = pool.combine(coefficients, blocks), double(models[0])
    left = sum(((weights[n].double().numpy() - base[n]) * g[n].double().numpy()).sum() for n in SHAPES)
    right = float((coefficients * pool.correlate(g, blocks)).sum())
    assert abs(left - right) <= 1e-7 * norm(weights) * norm(g)
    moved = pool.displacement(coefficients, blocks)
    closer = sum(float((moved[name].double() * g[name].double()).sum()) for name in SHAPES)
    assert abs(closer - right) <= 1e-7 * norm(moved) * norm(g)


def test_zero_coefficients_give_the_base_bit_for_bit(pool, models, blocks):
    found = pool.combine(np.zeros((blocks.count, N)), blocks)
    for name in SHAPES:
        assert torch.equal(found[name].view(torch.int32), models[0][name].float().view(torch.int32))


def test_a_vertex_gives_the_expert_to_rounding(pool, models, blocks):
    for i in range(N):
        vertex = np.zeros((blocks.count, N))
        vertex[:, i] = 1
        for name, value in pool.combine(vertex, blocks).items():
            expected = models[1 + i][name].float()
            bound = 2**-23 * torch.maximum(expected.abs(), models[0][name].float().abs())
            assert ((value - expected).abs() <= bound).all()


def test_combine_is_a_pure_function_of_the_coefficients(pool, blocks):
    a, b = drawn(3, blocks.count), drawn(4, blocks.count)
    first = pool.combine(a, blocks)
    pool.combine(b, blocks)
    again = pool.combine(a, blocks)
    assert all(torch.equal(first[name], again[name]) for name in SHAPES)


def test_a_stack_of_gradients_equals_one_by_one(pool, models, blocks):
    stack = [gradient(7), {"embed": gradient(8)["embed"]}, gradient(9)]
    found = pool.correlate(stack, blocks)
    assert found.shape == (3, blocks.count, N)
    for k, g in enumerate(stack):
        full = {name: g.get(name, torch.zeros(SHAPES[name])) for name in SHAPES}
        assert (np.abs(found[k] - pool.correlate(g, blocks)) <= 2e-6 * scale_of(models, full, blocks)).all()


def test_correlate_with_some_experts_leaves_the_others_nan(pool, blocks):
    g = gradient(10)
    found = pool.correlate(g, blocks, experts=[3, 1])
    everything = pool.correlate(g, blocks)
    np.testing.assert_allclose(found[:, [1, 3]], everything[:, [1, 3]], rtol=1e-4, atol=1e-5)
    assert np.isnan(found[:, [0, 2]]).all()


def test_tensors_without_a_gradient_have_score_zero(pool):
    blocks = pool.blocks("tensor")
    scores = pool.correlate({"embed": gradient(11)["embed"]}, blocks)
    row = blocks.rows["embed"].start
    assert (scores[row] != 0).all()
    assert (np.delete(scores, row, axis=0) == 0).all()


def test_threads_do_not_change_the_result(files, models):
    results = []
    for threads in (1, 3):
        pool = open_pool(files, "streaming")
        pool._workers._threads = threads
        blocks = pool.blocks("row")
        results.append((pool.correlate(gradient(12), blocks), pool.combine(drawn(5, blocks.count), blocks)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in SHAPES)


@pytest.mark.parametrize("kind", ["model", "row"])
def test_threads_do_not_change_the_gram_matrices(files, kind):
    results = []
    for threads in (1, 3, 3):
        pool = open_pool(files, "streaming")
        pool._workers._threads = threads
        results.append(pool.gram(pool.blocks(kind)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_gram_takes_the_memory_of_its_result_however_many_pieces_there_are():
    """With 64 experts there are 128 pieces here, whose products together would take 32 times the result of a row."""
    n, generator = 64, torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(PIECE * 8)}
    experts = {f"e{i}": {"w": torch.randn(len(base["w"]), generator=generator)} for i in range(n)}
    pool = Pool.from_state_dicts(base, experts, backend="streaming")
    blocks = pool.blocks("model")
    pool.gram(blocks)
    tracemalloc.start()  # counts what numpy allocates
    try:
        pool.gram(blocks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 8 * n * n


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_backends_give_the_same(files, models, kind):
    streaming, resident = open_pool(files, "streaming"), open_pool(files, "resident")
    blocks = streaming.blocks(kind)
    coefficients, g = drawn(6, blocks.count), gradient(13)
    first, second = streaming.combine(coefficients, blocks), resident.combine(coefficients, blocks)
    for name in SHAPES:
        assert torch.equal(first[name], second[name])
    difference = np.abs(streaming.correlate(g, blocks) - resident.correlate(g, resident.blocks(kind)))
    assert (difference <= 2e-6 * scale_of(models, g, blocks)).all()


def test_experts_in_another_order_permute_columns(files):
    pool = open_pool(files, "streaming")
    order = [2, 0, 3, 1]
    other = Pool.open(
        base=files / "base.safetensors",
        experts={f"e{i}": files / f"e{i}.safetensors" for i in order},
        backend="streaming",
    )
    blocks, g = pool.blocks("layer"), gradient(14)
    assert other.names == tuple(f"e{i}" for i in order)
    np.testing.assert_array_equal(other.correlate(g, blocks), pool.correlate(g, blocks)[:, order])
    gram = pool.gram(blocks)
    np.testing.assert_allclose(other.gram(blocks), gram[:, order][:, :, order], rtol=1e-6, atol=1e-9)
    coefficients = drawn(7, blocks.count)
    first, second = pool.combine(coefficients, blocks), other.combine(coefficients[:, order], blocks)
    for name in SHAPES:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-6)


class TestSince:
    """`since` gives what a fresh combine gives, and reads only what changed."""

    @pytest.fixture
    def streaming(self, files):
        return open_pool(files, "streaming")

    @staticmethod
    def read_by(pool, action):
        before = pool.bytes_read
        result = action()
        return result, pool.bytes_read - before

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_equals_a_fresh_combine(self, files, kind, backend):
        pool = open_pool(files, backend)
        blocks = pool.blocks(kind)
        old = drawn(8, blocks.count)
        new = old.copy()
        new[:: max(1, blocks.count // 3), 1] += 0.5
        weights = pool.combine(old, blocks)
        updated = pool.combine(new, blocks, since=(old, weights))
        fresh = pool.combine(new, blocks)
        for name in SHAPES:
            assert updated[name] is weights[name]
            torch.testing.assert_close(updated[name], fresh[name], rtol=0, atol=2e-6)

    def test_no_change_reads_nothing(self, streaming):
        blocks = streaming.blocks("tensor")
        old = drawn(9, blocks.count)
        weights = streaming.combine(old, blocks)
        before = {name: value.clone() for name, value in weights.items()}
        _, read = self.read_by(streaming, lambda: streaming.combine(old.copy(), blocks, since=(old, weights)))
        assert read == 0
        assert all(torch.equal(before[name], weights[name]) for name in SHAPES)

    def test_one_coefficient_reads_one_expert_and_the_base_of_one_tensor(self, streaming, models):
        blocks = streaming.blocks("tensor")
        old = drawn(10, blocks.count)
        weights = streaming.combine(old, blocks)
        new = old.copy()
        new[blocks.rows["blocks.10.tall.weight"], 2] += 1
        _, read = self.read_by(streaming, lambda: streaming.combine(new, blocks, since=(old, weights)))
        assert read == 2 * models[0]["blocks.10.tall.weight"].nbytes

    def test_going_back_to_the_base_reads_the_base_alone(self, streaming, models):
        blocks = streaming.blocks("model")
        old = drawn(11, blocks.count)
        weights = streaming.combine(old, blocks)
        _, read = self.read_by(streaming, lambda: streaming.combine(0 * old, blocks, since=(old, weights)))
        assert read == sum(models[0][name].nbytes for name in SHAPES)
        assert all(torch.equal(weights[name], models[0][name].float()) for name in SHAPES)

    def test_experts_with_zero_coefficients_are_not_read(self, streaming, models):
        blocks = streaming.blocks("row")
        coefficients = np.zeros((blocks.count, N))
        coefficients[:, 3] = 0.5
        _, read = self.read_by(streaming, lambda: streaming.displacement(coefficients, blocks))
        assert read == 2 * sum(models[0][name].nbytes for name in SHAPES)

    def test_correlate_reads_each_model_once(self, streaming, models):
        blocks = streaming.blocks("row")
        _, read = self.read_by(streaming, lambda: streaming.correlate([gradient(1), gradient(2)], blocks))
        assert read == (N + 1) * sum(models[0][name].nbytes for name in SHAPES)
