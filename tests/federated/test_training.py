from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.federated import FederationError, Training, train
from mergesolve.federated.training import attention
from mergesolve.objectives import CLIP, DataError, ModuleModel, Task
from torch import Tensor, nn

FAST = Training(epochs=2, batch=16, lr=1e-2)


def run(federation: Any, options: Training = FAST, **changes: Any) -> dict[str, Tensor]:
    values = {"weights": federation.anchor, "round": 1, "client": "blue", **changes}
    weights = values.pop("weights")
    return train(federation.model, federation.tasks[0], weights, options, **values)[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def test_defaults_are_those_of_the_paper() -> None:
    paper = {"epochs": 10, "batch": 128, "lr": 1e-5, "weight_decay": 0.1}
    assert {f.name: getattr(Training(), f.name) for f in fields(Training) if f.name in paper} == paper


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_equals_torchs_loop_over_a_module(federation: Any, warmup: int, clip: float | None) -> None:
    """The same batches through nn.Module, torch.optim.AdamW (one tensor at a time) and LambdaLR."""
    options = Training(epochs=3, batch=16, lr=1e-2, weight_decay=0.1, warmup=warmup, seed=5, max_grad_norm=clip)
    task = federation.tasks[0]
    module = type(federation.model.module)(6, 9)
    module.load_state_dict(federation.anchor)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    steps = 3 * math.ceil(60 / 16)

    def factor(k: int) -> float:
        return (k + 1) / warmup if k < warmup else (1 + math.cos(math.pi * (k - warmup) / (steps - warmup))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(3):
        for rows in options.batches(60, client="blue", round=4, epoch=epoch):
            optimizer.zero_grad()
            backward(F.cross_entropy(module(task.batch(rows)), task.labels[torch.from_numpy(rows)]))
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            scheduler.step()
    found, taken = train(federation.model, task, federation.anchor, options, round=4, client="blue")
    assert taken == steps
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert distance(found, federation.anchor) > 0.01


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 3))
def test_every_epoch_has_each_sample_once_and_keeps_the_last_batch(samples: int, batch: int, epoch: int) -> None:
    batches = list(Training(batch=batch).batches(samples, client="a", round=1, epoch=epoch))
    assert len(batches) == math.ceil(samples / batch)
    assert all(len(rows) == batch for rows in batches[:-1])
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(samples))


def test_order_depends_on_seed_client_round_and_epoch() -> None:
    given = {"client": "a", "round": 1, "epoch": 0}
    orders = [Training().order(50, **given), Training(seed=1).order(50, **given)]
    orders += [Training().order(50, **{**given, **change}) for change in ({"client": "b"}, {"round": 2}, {"epoch": 1})]
    assert len({tuple(order) for order in orders}) == 5
    assert np.array_equal(orders[0], Training(lr=1.0, batch=7).order(50, **given))


def test_training_is_deterministic_and_differs_by_seed_client_and_round(federation: Any) -> None:
    one = run(federation)
    torch.manual_seed(99)  # what others did to the global generator does not matter
    assert same(one, run(federation))
    for changed in (run(federation, Training(epochs=2, batch=16, lr=1e-2, seed=1)),
                    run(federation, client="green"), run(federation, round=2)):  # fmt: skip
        assert not same(one, changed)


def test_training_leaves_the_global_generator_and_the_given_weights_alone(federation: Any) -> None:
    before = {name: tensor.clone() for name, tensor in federation.anchor.items()}
    state = torch.get_rng_state()
    found = run(federation)
    assert torch.equal(state, torch.get_rng_state())
    assert same(before, federation.anchor)
    pointers = {tensor.data_ptr() for tensor in federation.anchor.values()}
    assert not pointers & {tensor.data_ptr() for tensor in found.values()}
    assert not any(tensor.requires_grad for tensor in found.values())
    module = dict(federation.model.module.named_parameters())
    assert all(torch.equal(module[name], federation.anchor[name]) for name in module)


def test_training_works_in_inference_mode(federation: Any) -> None:
    with torch.inference_mode():
        found = run(federation)
    assert same(found, run(federation))


def test_what_is_no_parameter_passes_through(federation: Any) -> None:
    found = run(federation)
    assert found["counter"].dtype == torch.int64
    assert int(found["counter"]) == 7
    assert all(not torch.equal(found[n], federation.anchor[n]) for n in found if n != "counter")


def test_running_statistics_stay_as_the_server_sent_them(federation: Any) -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9))
    anchor = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    anchor["1.running_mean"] += 0.5
    found, _ = train(ModuleModel(module), federation.tasks[0], anchor, FAST, round=1, client="a")
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(found[name], anchor[name])
    assert not torch.equal(found["1.weight"], anchor["1.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_float32_and_rounded_once(federation: Any, dtype: torch.dtype) -> None:
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in federation.anchor.items()}
    full = {n: t.float() if t.is_floating_point() else t for n, t in half.items()}
    found, expected = run(federation, weights=half), run(federation, weights=full)
    assert same(found, {n: t.to(half[n].dtype) for n, t in expected.items()})


def test_float64_stays_float64() -> None:
    module = nn.Linear(6, 3).double()
    rng = np.random.default_rng(0)
    task = Task("t", torch.from_numpy(rng.normal(size=(20, 6))), torch.from_numpy(rng.integers(0, 3, 20)), tuple("abc"))
    anchor = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    found, _ = train(ModuleModel(module), task, anchor, FAST, round=1, client="a")
    assert all(tensor.dtype == torch.float64 for tensor in found.values())


def test_no_proximal_term_is_bitwise_plain_training(federation: Any) -> None:
    assert same(run(federation, Training(2, 16, 1e-2, proximal=0.0)), run(federation, Training(2, 16, 1e-2)))


def test_proximal_gradient_is_that_of_the_term_in_the_loss(federation: Any) -> None:
    """Eq. 2 of FedProx with the term written out, through autograd."""
    mu, options = 0.7, Training(epochs=2, batch=16, lr=1e-2, proximal=0.7)
    task = federation.tasks[0]
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in federation.anchor.items()}
    trained = [tensor for tensor in leaves.values() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.1, foreach=False)
    step = 0
    for epoch in range(2):
        for rows in options.batches(60, client="blue", round=1, epoch=epoch):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 8)) / 2
            loss = F.cross_entropy(federation.model.logits(leaves, task.batch(rows), task),
                                   task.labels[torch.from_numpy(rows)])  # fmt: skip
            for name, tensor in leaves.items():
                if tensor.requires_grad:
                    loss = loss + mu / 2 * (tensor - federation.anchor[name]).square().sum()
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            step += 1
    found = run(federation, options)
    for name, tensor in leaves.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-4, atol=1e-6)


def test_a_growing_proximal_term_ties_the_weights_to_the_anchor(federation: Any) -> None:
    """AdamW normalizes gradients, so the limit is a ball of a few steps of size lr, not the anchor itself."""
    lr = 1e-2
    moved = [
        distance(run(federation, Training(20, 16, lr, weight_decay=0.0, proximal=mu)), federation.anchor)
        for mu in (0.0, 0.1, 10.0, 1e6)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 10 * lr
    assert moved[-1] < lr / 2


def test_a_single_step_of_size_lr_follows_the_sign_of_the_gradient(federation: Any) -> None:
    """Adam's first step, from zero moments, is -lr · g / (|g| + ε)."""
    options = Training(epochs=1, batch=60, lr=1e-3, weight_decay=0.0)
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in federation.anchor.items()}
    task = federation.tasks[0]
    backward(F.cross_entropy(federation.model.logits(leaves, task.inputs, task), task.labels))
    found = run(federation, options)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None
            large = leaf.grad.abs() > 1e-4
            step = (found[name] - leaf.detach())[large]
            torch.testing.assert_close(step, -1e-3 * leaf.grad[large].sign(), rtol=1e-3, atol=1e-7)


def test_clip_towers_learn_their_labels(clip_federation: Any) -> None:
    losses: list[float] = []
    task = clip_federation.tasks[1]
    options = Training(epochs=8, batch=8, lr=3e-3)
    found, steps = train(clip_federation.model, task, clip_federation.anchor, options, round=1, client="a",
                         losses=lambda epoch, loss: losses.append(loss))  # fmt: skip
    assert steps == 24
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]
    assert found.keys() == clip_federation.anchor.keys()


def bf16(federation: Any) -> CLIP:
    model = federation.model
    heads = {texts.name: model.head(replace(federation.tasks[0], name=texts.name, labels=None, parts=(texts,)))
             for texts in federation.tasks[0].texts}  # fmt: skip
    return CLIP(model.architecture, heads=heads, precision="bf16")


def test_bf16_computes_what_float32_does_up_to_its_rounding(clip_federation: Any) -> None:
    """Updates point the same way; the weights stay float32, since a step is below the resolution of bf16."""
    task, anchor = clip_federation.tasks[0], clip_federation.anchor
    options = Training(epochs=4, batch=10, lr=1e-3)
    models = (clip_federation.model, bf16(clip_federation))
    full, half = (train(model, task, anchor, options, round=1, client="a")[0] for model in models)
    a, b = (torch.cat([(found[n] - anchor[n]).flatten() for n in anchor]) for found in (full, half))
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    assert 0.9 < float(F.cosine_similarity(a, b, dim=0)) < 1 - 1e-6
    assert float((half["proj"] - half["proj"].bfloat16().float()).abs().max()) > 0


def test_attention_is_set_back_after_the_last_of_several(clip_federation: Any) -> None:
    backends: Any = torch.backends.cuda  # where torch keeps these settings for the CPU, too
    assert backends.flash_sdp_enabled()
    one, two = attention(bf16(clip_federation)), attention(bf16(clip_federation))
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert not backends.flash_sdp_enabled()
    two.__exit__(None, None, None)
    assert backends.flash_sdp_enabled()
    with attention(clip_federation.model):
        assert backends.flash_sdp_enabled()


def test_reported_loss_is_the_mean_over_the_samples(federation: Any) -> None:
    """At a vanishing step the epoch's losses are all those of the anchor."""
    losses: list[float] = []
    task = federation.tasks[0]
    train(federation.model, task, federation.anchor, Training(1, 16, 1e-12, 0.0), round=1, client="a",
          losses=lambda _, loss: losses.append(loss))  # fmt: skip
    expected = F.cross_entropy(federation.model.logits(federation.anchor, task.inputs, task), task.labels)
    assert losses == [pytest.approx(float(expected), rel=1e-5)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"warmup": -1}, "warmup"),
        ({"seed": -1}, "seed"),
        ({"lr": 0}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"lr": "1e-5"}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"proximal": math.nan}, "proximal"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(FederationError, match=f"Training: {named} must be"):
        Training(**options)


def test_a_task_without_labels_is_refused(federation: Any) -> None:
    with pytest.raises(FederationError, match=r"client 'a': task 'blue' has no labels"):
        train(federation.model, federation.tasks[0].without_labels(), federation.anchor, FAST, round=1, client="a")


def test_weights_without_parameters_are_refused(federation: Any) -> None:
    with pytest.raises(FederationError, match="no parameter"):
        run(federation, weights={"counter": federation.anchor["counter"]})


def test_weights_of_another_model_are_refused(federation: Any) -> None:
    with pytest.raises(DataError, match="shape"):
        run(federation, weights={**federation.anchor, "last.bias": torch.zeros(4)})
