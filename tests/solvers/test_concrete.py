"""Concrete merging against autograd through the whole merge, and as a pool that everything else can use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mergesolve.objectives import Entropy, ModuleModel, Proximity, Task
from mergesolve.pools import Pool
from mergesolve.pools.transforms import make_transform
from mergesolve.solvers import Concrete, OptionError, concrete_merge
from mergesolve.solvers.concrete import MaskLearner
from safetensors.torch import load_file
from torch import nn


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.fixture
def pool(module):
    generator = torch.manual_seed(1)
    base = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    experts = {
        f"e{i}": {name: t + 0.5 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for i in range(3)
    }
    return Pool.from_state_dicts(base, experts)


@pytest.fixture
def entropy(module):
    inputs = torch.randn(40, 5, generator=torch.manual_seed(2))
    return Entropy(ModuleModel(module), Task("t", inputs, None, tuple("abc")), batch_size=10)


def test_the_gradient_of_the_logits_is_that_of_autograd_through_the_merge(pool, module, entropy):
    options = Concrete(temperature=0.7, inner_lr=0.3, scale=0.4)
    learner = MaskLearner(pool, entropy, "tensor", options)
    for logits in learner.logits.values():
        logits.copy_(torch.randn(logits.shape, generator=torch.manual_seed(3)))
    start = {name: logits.clone() for name, logits in learner.logits.items()}
    found = {}
    learner._descend = lambda name, iteration, gradient: found.update({name: gradient})
    loss = learner.step(4)

    # The same in one graph, in float64, with the inner step taken by autograd, too.
    base = {name: tensor.double() for name, tensor in pool.base_weights().items()}
    blocks = pool.blocks("tensor")
    vectors = [pool.displacement(np.eye(3)[i : i + 1].repeat(blocks.count, 0), blocks) for i in range(3)]
    uniform = torch.Generator().manual_seed(4)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in start.items()}
    mask = {}
    for name, leaf in leaves.items():
        u = torch.rand(leaf.shape, generator=uniform).clamp(1e-6, 1 - 1e-6).double()
        m = torch.sigmoid((leaf + u.logit()) / 0.7)
        mask[name] = m / m.mean()

    def value(coefficients, mask, draw):
        weights = {
            name: base[name] + mask[name] * sum(coefficients[k, i] * vectors[i][name].double() for i in range(3))
            for k, name in enumerate(pool.tensors)
        }
        entropy.draw(draw)
        inputs = entropy._tasks[0].batch(entropy.batch_indices(entropy._tasks[0])).double()
        log_p = torch.func.functional_call(module.double(), weights, (inputs,)).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    coefficients = torch.full((blocks.count, 3), 0.4, dtype=torch.float64, requires_grad=True)
    inner = value(coefficients, {name: m.detach() for name, m in mask.items()}, 8)
    (step,) = torch.autograd.grad(inner, coefficients)
    outer = value((coefficients - 0.3 * step).detach(), mask, 9)
    outer.backward()
    assert loss == pytest.approx(outer.item(), rel=1e-5)
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name].double(), leaf.grad, rtol=1e-3, atol=1e-7)


def test_a_mask_that_is_needed_is_found(pool):
    """The target keeps the task vectors where a mask is 1; logits grow there and fall elsewhere."""
    blocks = pool.blocks("model")
    merged = pool.displacement(np.full((1, 3), 0.3), blocks)
    generator = torch.manual_seed(5)
    kept = {name: torch.rand(tensor.shape, generator=generator) < 0.5 for name, tensor in merged.items()}
    base = pool.base_weights()
    center = {name: base[name] + 2 * merged[name] * kept[name] for name in merged}
    learner = MaskLearner(pool, Proximity(center), "model", Concrete(lr=0.1, inner_lr=0.0))
    losses = [learner.step(iteration) for iteration in range(150)]
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])
    large = {name: merged[name].abs() > 0.1 for name in merged}
    right = [((learner.logits[name] > 0) == kept[name])[large[name]] for name in merged]
    assert torch.cat(right).float().mean() > 0.95


def test_the_mask_file_and_the_coefficients_are_the_merge(pool, entropy, tmp_path):
    path = tmp_path / "masks" / "mask.safetensors"
    seen = []
    options = Concrete(iterations=3, merge_iterations=2, seed=1)
    merge = concrete_merge(pool, entropy, path, options=options, progress=lambda *call: seen.append(call))
    assert [iteration for iteration, _ in seen] == [0, 1, 2]
    assert [loss for _, loss in seen] == merge.losses
    assert merge.gradients == 2 * 3 + merge.result.counts["gradients"]
    again = pool.transform(make_transform({"name": "mask", "path": str(path)}))
    assert again.fingerprint == merge.pool.fingerprint == merge.result.fingerprint
    blocks = again.blocks("tensor")
    mask, plain = load_file(path), pool.displacement(merge.result.coefficients, blocks)
    base = pool.base_weights()
    for name, tensor in again.combine(merge.result.coefficients, blocks).items():
        torch.testing.assert_close(tensor, base[name] + mask[name] * plain[name])
        assert mask[name].mean() == pytest.approx(1, rel=1e-5)
    merge.pool.materialize(merge.result.coefficients, blocks, tmp_path / "merged.safetensors")
    written = load_file(tmp_path / "merged.safetensors")
    torch.testing.assert_close(written["0.weight"], base["0.weight"] + mask["0.weight"] * plain["0.weight"])
    same = concrete_merge(pool, entropy, tmp_path / "same.safetensors", options=options)
    np.testing.assert_array_equal(same.result.coefficients, merge.result.coefficients)
    assert same.pool.fingerprint == merge.pool.fingerprint


def test_a_discrete_mask_keeps_or_drops_and_without_adaptation_it_is_task_arithmetic(pool, entropy, tmp_path):
    options = Concrete(iterations=2, mask="discrete", adapt=False, scale=0.2)
    merge = concrete_merge(pool, entropy, tmp_path / "mask.safetensors", options=options)
    assert (merge.result.coefficients == 0.2).all()
    for tensor in load_file(merge.mask_file).values():
        values = tensor.unique()
        assert len(values) <= 2
        assert set(values[values > 0].tolist()) == {float(tensor.max())}
        assert tensor.mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"iterations": -1}, {"mask": "soft"}, {"lr": float("inf")}, {"adapt": 2}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match=f"The '{next(iter(wrong))}' parameter of Concrete must be"):
        Concrete(**wrong)


def test_coefficients_outside_the_domain_are_refused_before_a_mask_is_learned(pool, entropy, tmp_path):
    def told(iteration, loss):
        raise AssertionError("a mask is being learned")

    with pytest.raises(OptionError, match="starting point"):
        concrete_merge(pool, entropy, tmp_path / "mask", domain="simplex", options=Concrete(scale=0.6), progress=told)
    assert not (tmp_path / "mask").exists()
