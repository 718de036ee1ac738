"""Fingerprints of one model: of what is stored, wherever and in whatever pool it is."""

from __future__ import annotations

import shutil

import pytest
import torch
from mergesolve.pools import Pool, PoolError, model_fingerprint
from safetensors.torch import save_file


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    base = {"b.weight": torch.randn(70, 40, generator=generator), "a.weight": torch.randn(3, generator=generator)}
    return base, *({k: v + torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(2))


def test_fingerprint_is_that_of_the_tensors_not_of_the_place_or_the_order(tmp_path, models):
    _, first, second = models
    save_file(first, tmp_path / "first.safetensors")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "first.safetensors", tmp_path / "folder" / "model.safetensors")
    torch.save(dict(reversed(first.items())), tmp_path / "first.pt")
    places = ("first.safetensors", "folder", "first.pt")
    prints = {model_fingerprint(tmp_path / place) for place in places}
    assert len(prints) == 1
    save_file(second, tmp_path / "second.safetensors")
    assert model_fingerprint(str(tmp_path / "second.safetensors")) not in prints


def test_fingerprint_of_an_expert_does_not_depend_on_the_pool_or_its_renames(tmp_path, models):
    base, first, second = models
    for name, state in (("base", base), ("first", first), ("second", second)):
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("first", "second")}
    alone = Pool.open(base=tmp_path / "base.safetensors", experts={"x": paths["first"]})
    both = Pool.open(base=tmp_path / "base.safetensors", experts=paths, rename={"a.": "other."}, exclude=["b"])
    expected = model_fingerprint(paths["first"])
    assert alone.expert_fingerprint("x") == expected
    assert both.expert_fingerprint("first") == expected
    assert both.subset(["second", "first"]).expert_fingerprint("first") == expected
    assert both.transform(lambda name, base, taus: 2 * taus, "twice").expert_fingerprint("first") == expected
    assert both.expert_fingerprint("second") == model_fingerprint(paths["second"]) != expected
    assert Pool.from_state_dicts(base, {"m": first}).expert_fingerprint("m") == expected


@pytest.mark.parametrize("place", [(0, 0), (35, 0), (69, 39)])
def test_fingerprint_sees_both_ends_and_the_middle_of_a_tensor(tmp_path, models, place):
    state = models[1]
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["b.weight"][place] += 1
    for name, tensors in (("one", state), ("two", changed)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert model_fingerprint(tmp_path / "one.safetensors") != model_fingerprint(tmp_path / "two.safetensors")


def test_fingerprint_sees_names_types_and_shapes(tmp_path, models):
    state = models[1]
    variants = [
        state,
        {name: tensor.half() for name, tensor in state.items()},
        {f"x.{name}": tensor for name, tensor in state.items()},
        {**state, "b.weight": state["b.weight"].reshape(40, 70)},
    ]
    prints = set()
    for k, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{k}.safetensors")
        prints.add(model_fingerprint(tmp_path / f"{k}.safetensors"))
    assert len(prints) == len(variants)


def test_unknown_expert_is_refused_with_the_nearest(models):
    pool = Pool.from_state_dicts(models[0], {"cars": models[1], "digits": models[2]})
    with pytest.raises(PoolError, match="Did you mean 'digits'"):
        pool.expert_fingerprint("digit")
