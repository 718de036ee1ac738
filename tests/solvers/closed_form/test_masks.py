"""TALL masks: retrieval of one expert, and what is written."""

import json

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import make_merge, merge_weights
from mergesolve.solvers.closed_form.masks import write_masks
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture
def pool(sampled):
    base, experts = sampled("normal", 4)
    return Pool.from_state_dicts(base, experts)


def masks_of(tables, sampled, tall, multitask):
    base, taus = tables.arrays(*sampled("normal", 4))
    total = {name: multitask * rows.sum(0) for name, rows in taus.items()}
    return base, total, {name: np.abs(r) >= tall * np.abs(total[name] - r) for name, r in taus.items()}


@pytest.mark.parametrize(("tall", "multitask"), [(0.4, 1.0), (1.3, 0.5)])
def test_retrieval_is_the_masked_sum(pool, tables, sampled, tall, multitask):
    base, total, masks = masks_of(tables, sampled, tall, multitask)
    for i, expert in enumerate(pool.names):
        found = merge_weights(
            pool, make_merge({"name": "tall-mask", "expert": expert, "tall": tall, "multitask": multitask})
        )
        for name, value in base.items():
            wanted = value + np.where(masks[name][i], total[name], 0)
            off = np.abs(found[name].numpy() - wanted) > 1e-5
            assert off.mean() < 1e-3  # at the edge, float32 may decide otherwise


def test_disjoint_experts_are_retrieved_exactly():
    base = {"w": torch.randn(12, generator=torch.Generator().manual_seed(0))}
    experts = {}
    for i in range(3):
        experts[f"e{i}"] = {"w": base["w"].clone()}
        experts[f"e{i}"]["w"][4 * i : 4 * i + 4] += 1.0
    pool = Pool.from_state_dicts(base, experts)
    for name, state in experts.items():
        found = merge_weights(pool, make_merge({"name": "tall-mask", "expert": name}))
        torch.testing.assert_close(found["w"], state["w"])


def test_masks_on_disk_are_those_of_the_definition(pool, tables, sampled, tmp_path):
    _, _, masks = masks_of(tables, sampled, 0.7, 1.0)
    place = tmp_path / "masks.safetensors"
    assert write_masks(pool, place, tall=0.7) == [place]
    with safe_open(place, "pt") as file:
        metadata = file.metadata()
    shapes = json.loads(metadata["shapes"])
    assert json.loads(metadata["experts"]) == list(pool.names)
    stored = load_file(place)
    assert len(stored) == len(shapes) * pool.n
    for name, shape in shapes.items():
        for i, expert in enumerate(pool.names):
            count = int(np.prod(shape))
            bits = np.unpackbits(stored[f"{expert}/{name}"].numpy(), count=count).astype(bool).reshape(shape)
            assert (bits != masks[name][i]).mean() < 1e-2 / max(1, 0.01 * count)


def test_an_expert_has_to_be_named(pool):
    with pytest.raises(OptionError, match="'expert'"):
        merge_weights(pool, make_merge("tall-mask"))
    with pytest.raises(OptionError, match="e1"):
        merge_weights(pool, make_merge({"name": "tall-mask", "expert": "e11"}))


def test_masks_take_one_pass_over_the_experts(pool, tmp_path):
    pool.fingerprint  # noqa: B018 (its sample, and the search for equal tensors, are read once)
    model = 4 * sum(int(np.prod(shape)) for shape in pool.tensors.values())
    before = pool.bytes_read
    write_masks(pool, tmp_path / "masks.safetensors")
    assert pool.bytes_read - before == (pool.n + 1) * model
