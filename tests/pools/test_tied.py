"""Tensors that are tied (one storage under two names) are merged alike under both names, and written under both."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from safetensors.torch import load_file, save_file


def tied(seed):
    """A language model's state dict: the embedding is the output layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(50, 8, generator=generator)
    return {"emb.weight": weight, "body.weight": torch.randn(8, 8, generator=generator), "out.weight": weight}


MODELS = [tied(seed) for seed in range(3)]


@pytest.fixture(params=["state dicts", "pt", "safetensors"])
def pool(request, tmp_path):
    if request.param == "state dicts":
        return Pool.from_state_dicts(MODELS[0], {"a": MODELS[1], "b": MODELS[2]})
    paths = [tmp_path / f"{name}.{request.param}" for name in ("base", "a", "b")]
    for path, model in zip(paths, MODELS, strict=True):
        if request.param == "pt":
            torch.save(model, path)
        else:  # which refuses storage that is shared
            save_file({name: value.clone() for name, value in model.items()}, path)
    return Pool.open(base=paths[0], experts=paths[1:])


COEFFICIENTS = np.array([[0.25, 0.5]])


def expected(name):
    base, a, b = (model[name].double() for model in MODELS)
    return (base + 0.25 * (a - base) + 0.5 * (b - base)).float()


@pytest.mark.parametrize("backend", ["streaming", "resident"])
def test_both_names_get_the_merged_values_in_memory_of_their_own(backend):
    pool = Pool.from_state_dicts(MODELS[0], {"a": MODELS[1], "b": MODELS[2]}, backend=backend)
    weights = pool.combine(COEFFICIENTS, pool.blocks("model"))
    assert set(weights) == {"emb.weight", "body.weight", "out.weight"}
    assert torch.equal(weights["emb.weight"], weights["out.weight"])
    spans = {name: (value.data_ptr(), value.data_ptr() + value.nbytes) for name, value in weights.items()}
    assert spans["emb.weight"][1] <= spans["out.weight"][0] or spans["out.weight"][1] <= spans["emb.weight"][0]


@pytest.mark.parametrize("target", ["m.safetensors", "m"])
@pytest.mark.parametrize("max_shard_size", [5e9, 1800])
def test_both_names_are_written(pool, tmp_path, target, max_shard_size):
    files = pool.materialize(COEFFICIENTS, pool.blocks("model"), tmp_path / target, max_shard_size=max_shard_size)
    found = {}
    for path in files:
        found.update(load_file(path) if path.suffix == ".safetensors" else {})
    assert set(found) == {"emb.weight", "body.weight", "out.weight"}
    assert torch.equal(found["emb.weight"], found["out.weight"])
    for name, value in found.items():
        torch.testing.assert_close(value, expected(name), rtol=0, atol=1e-6)


def test_a_written_model_loads_into_a_module_that_ties_them(pool, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = torch.nn.Embedding(50, 8)
            self.body = torch.nn.Linear(8, 8, bias=False)
            self.out = torch.nn.Linear(8, 50, bias=False)
            self.out.weight = self.emb.weight

    (path,) = pool.materialize(COEFFICIENTS, pool.blocks("model"), tmp_path / "m.safetensors")
    model = Model()
    model.load_state_dict(load_file(path))
    torch.testing.assert_close(model.out.weight.detach(), expected("out.weight"), rtol=0, atol=1e-6)


def test_unchanged_tied_tensors_are_carried_under_both_names(tmp_path):
    experts = {name: {**MODELS[0], "body.weight": MODELS[k]["body.weight"]} for k, name in ((1, "a"), (2, "b"))}
    pool = Pool.from_state_dicts(MODELS[0], experts)
    assert set(pool.carried) == {"emb.weight", "out.weight"}
    (path,) = pool.materialize(COEFFICIENTS, pool.blocks("model"), tmp_path / "m.safetensors")
    for name in pool.carried:
        assert torch.equal(load_file(path)[name], MODELS[0][name])


def test_a_gradient_under_one_name_is_scored_by_that_name_alone(pool):
    """A module that ties them has one parameter, whose gradient comes under the first name."""
    gradient = {"emb.weight": torch.randn(50, 8, generator=torch.Generator().manual_seed(9))}
    scores = pool.correlate(gradient, pool.blocks("model"))
    wanted = [float((gradient["emb.weight"] * (m["emb.weight"] - MODELS[0]["emb.weight"])).sum()) for m in MODELS[1:]]
    np.testing.assert_allclose(scores[0], wanted, rtol=1e-4, atol=1e-4)
