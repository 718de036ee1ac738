"""Fisher diagonals against single samples in float64, Grams against the inputs that hooks see."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mergesolve.objectives import CLIP, DataError, ModuleModel, Task, fisher_diagonal, grams
from torch import nn

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}


def fisher_by_samples(model, weights, task, estimator):
    """One sample, one class, one gradient at a time, in float64."""
    leaves = {n: t.double().requires_grad_() for n, t in weights.items()}
    total = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in weights.items()}
    for k in range(len(task)):
        log_p = model.logits(leaves, task.batch(np.array([k])), task)[0].log_softmax(-1)
        classes = range(len(log_p)) if estimator == "exact" else [int(task.labels[k])]
        for c in classes:
            share = float(log_p[c].detach().exp()) if estimator == "exact" else 1.0
            gradients = torch.autograd.grad(log_p[c], list(leaves.values()), retain_graph=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                total[name] += share * gradient.square() / len(task)
    return total


def close(found, expected, rtol=2e-5):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=rtol, atol=1e-5 * scale + 1e-20)


def second_moment(x):
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows / len(rows)


@pytest.fixture
def shapes(clip_tasks):
    return clip_tasks[0]


# -- Fisher ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("microbatch", [1, 4, None])
def test_fisher_of_a_network_is_that_of_single_samples(mlp_model, mlp64_weights, mlp_tasks, estimator, microbatch):
    found = fisher_diagonal(mlp_model, mlp64_weights, mlp_tasks[0], estimator=estimator, microbatch=microbatch)
    close(found.tensors, fisher_by_samples(mlp_model, mlp64_weights, mlp_tasks[0], estimator), rtol=1e-6)
    assert set(found.rows.values()) == {11}


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("microbatch", [1, 5])
def test_fisher_of_a_clip_tower_is_that_of_single_samples(clip, clip_weights, shapes, estimator, microbatch):
    found = fisher_diagonal(clip, clip_weights, shapes, estimator=estimator, microbatch=microbatch)
    assert found.tensors.keys() == set(clip.parameter_names)
    close(found.tensors, fisher_by_samples(clip, clip_weights, shapes, estimator), rtol=1e-3)


def test_exact_fisher_of_a_linear_classifier_has_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    model = ModuleModel(nn.Linear(5, 3).double())
    weights = {
        "weight": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "bias": torch.randn(3, generator=generator, dtype=torch.float64),
    }
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    found = fisher_diagonal(model, weights, Task("t", x, None, tuple("abc")))
    p = (x @ weights["weight"].T + weights["bias"]).softmax(-1)
    close(found.tensors, {"weight": (p * (1 - p)).T @ x.square() / 20, "bias": (p * (1 - p)).mean(0)}, rtol=1e-6)


def test_sampled_fisher_converges_to_the_exact_one():
    model = ModuleModel(nn.Linear(3, 3).double())
    weights = {n: t.double() for n, t in model.base_weights().items()}
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).repeat(4000, 1)
    task = Task("t", x, None, tuple("abc"))
    exact = fisher_diagonal(model, weights, task.take(np.arange(1)))
    sampled = fisher_diagonal(model, weights, task, estimator="sampled", microbatch=1000)
    for name, tensor in exact.tensors.items():
        torch.testing.assert_close(sampled.tensors[name], tensor, rtol=0.15, atol=0)


def test_sampled_fisher_is_one_of_the_classes_and_follows_the_seed(mlp_model, mlp64_weights, mlp_tasks):
    task = mlp_tasks[0]

    def sampled(seed, microbatch=1):
        return fisher_diagonal(
            mlp_model, mlp64_weights, task, estimator="sampled", seed=seed, microbatch=microbatch
        ).tensors

    first = sampled(3)
    close(sampled(3, 4), {n: t.double() for n, t in first.items()}, rtol=1e-6)
    assert all(torch.equal(t, first[n]) for n, t in sampled(3).items())
    assert any(not torch.equal(t, first[n]) for n, t in sampled(4).items())
    one = task.take(np.arange(1))
    drawn = fisher_diagonal(mlp_model, mlp64_weights, one, estimator="sampled").tensors
    each = [
        fisher_by_samples(mlp_model, mlp64_weights, Task("t", one.inputs, torch.tensor([c]), one.classes), "empirical")
        for c in range(4)
    ]
    assert any(all(torch.allclose(drawn[n].double(), e[n], rtol=1e-5) for n in drawn) for e in each)


def test_labels_matter_to_the_empirical_fisher_alone(mlp_model, mlp64_weights, mlp_tasks):
    task = mlp_tasks[0]
    other = Task(task.name, task.inputs, (task.labels + 1) % 4, task.classes)

    def both(estimator):
        return [fisher_diagonal(mlp_model, mlp64_weights, t, estimator=estimator).tensors for t in (task, other)]

    for estimator in ("exact", "sampled"):
        one, two = both(estimator)
        assert all(torch.equal(one[n], two[n]) for n in one)
    one, two = both("empirical")
    assert any(not torch.allclose(one[n], two[n]) for n in one)


def test_buffers_have_no_fisher_and_unused_parameters_have_zero():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.norm(self.lin(x))

    model = ModuleModel(Net())
    task = Task("t", torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), None, tuple("abc"))
    for microbatch in (1, 3):
        found = fisher_diagonal(model, model.base_weights(), task, microbatch=microbatch).tensors
        assert set(found) == set(model.parameter_names)
        assert not found["unused"].any()
        assert found["lin.weight"].all()


def test_weights_are_left_as_they_were(clip, clip_weights, shapes):
    before = {n: t.clone() for n, t in clip_weights.items()}
    fisher_diagonal(clip, clip_weights, shapes, microbatch=3)
    grams(clip, clip_weights, shapes)
    for name, tensor in clip_weights.items():
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None
        assert not tensor.requires_grad


def test_progress_counts_the_samples(mlp_model, mlp64_weights, mlp_tasks):
    for compute, size in ((fisher_diagonal, 4), (grams, 4)):
        seen = []
        compute(mlp_model, mlp64_weights, mlp_tasks[0], microbatch=size, progress=lambda *step: seen.append(step))  # noqa: B023
        assert seen == [("one", 4, 11), ("one", 8, 11), ("one", 11, 11)]


def test_samples_are_a_subset_that_is_part_of_the_larger_one(mlp_model, mlp64_weights, mlp_tasks):
    task = mlp_tasks[0]
    for compute in (fisher_diagonal, grams):
        found = compute(mlp_model, mlp64_weights, task, samples=5, seed=2)
        expected = compute(mlp_model, mlp64_weights, task.subset(5, 2))
        assert found.samples == 5
        assert all(torch.equal(t, expected.tensors[n]) for n, t in found.tensors.items())
        assert found.task_fingerprint == task.subset(5, 2).fingerprint
        assert compute(mlp_model, mlp64_weights, task, samples=100).samples == 11


def test_what_cannot_be_computed_is_refused(mlp_model, mlp64_weights, mlp_tasks, clip, clip_weights):
    task = mlp_tasks[0]
    with pytest.raises(DataError, match=r"unknown estimator 'emprical'. Did you mean 'empirical'"):
        fisher_diagonal(mlp_model, mlp64_weights, task, estimator="emprical")
    with pytest.raises(DataError, match="needs labels"):
        fisher_diagonal(mlp_model, mlp64_weights, task.without_labels(), estimator="empirical")
    for compute in (fisher_diagonal, grams):
        with pytest.raises(DataError, match="'microbatch' parameter"):
            compute(mlp_model, mlp64_weights, task, microbatch=0)
        with pytest.raises(DataError, match="'samples' parameter"):
            compute(mlp_model, mlp64_weights, task, samples=0)
        broken = {n: t.clone() for n, t in mlp64_weights.items()}
        broken["0.weight"][2, 3] = float("nan")
        with pytest.raises(DataError, match=r"'one' (is|are) not finite"):
            compute(mlp_model, broken, task)
        with pytest.raises(DataError, match="which the weights have"):
            compute(mlp_model, {**mlp64_weights, "more": torch.ones(1)}, task)
        with pytest.raises(DataError, match="takes"):
            compute(clip, clip_weights, Task("shapes", torch.zeros(2, 3, 8, 8), None, tuple("abc")))
    with pytest.raises(DataError, match=r"none of '0.bias' is the weight of a linear map"):
        grams(mlp_model, {"0.bias": mlp64_weights["0.bias"]}, task)


def test_a_module_that_vmap_cannot_take_is_told_to_go_sample_by_sample():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x):
            y = self.lin(x)
            return y if float(y.detach().sum()) > 0 else -y

    model = ModuleModel(Branching())
    task = Task("t", torch.randn(4, 4), None, tuple("abc"))
    with pytest.raises(DataError, match=r"vmap.*microbatch=1"):
        fisher_diagonal(model, model.base_weights(), task, microbatch=2)
    assert fisher_diagonal(model, model.base_weights(), task, microbatch=1).samples == 4


# -- Grams -------------------------------------------------------------------------------------------------------------


def test_gram_of_a_linear_model_is_that_of_its_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 5, generator=generator)
    model = ModuleModel(nn.Linear(5, 3))
    found = grams(model, model.base_weights(), Task("t", x, None, tuple("abc")), microbatch=7)
    close(found.tensors, {"weight": second_moment(x)}, rtol=1e-6)
    assert found.axes == {"weight": 1}
    assert found.rows == {"weight": 33}
    assert found.left_out == {}


def test_merge_by_grams_keeps_the_outputs_of_linear_models_on_their_own_data():
    """Experts that agree on nothing but are consulted on disjoint directions: the regression is solved exactly."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(30, 6, generator=generator), torch.randn(30, 6, generator=generator)]
    x[0][:, 3:] = 0
    x[1][:, :3] = 0
    model = ModuleModel(nn.Linear(6, 3, bias=False))
    weights = [torch.randn(3, 6, generator=generator) for _ in x]
    found = [
        grams(model, {"weight": w}, Task("t", rows, None, tuple("abc"))) for w, rows in zip(weights, x, strict=True)
    ]
    total = sum(f.tensors["weight"] for f in found)
    merged = sum(w @ f.tensors["weight"] for w, f in zip(weights, found, strict=True)) @ torch.linalg.inv(total)
    for w, rows in zip(weights, x, strict=True):
        torch.testing.assert_close(rows @ merged.T, rows @ w.T, rtol=1e-4, atol=1e-4)


def clip_inputs(clip, weights, task):
    """Inputs of every linear map of the tower, by forward hooks and by the formulas of its layers."""
    tower = clip._build_tower()
    tower.load_state_dict(weights)
    seen = {}
    for name, module in tower.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args, out)))
    pixels = clip._pixels(task.batch(np.arange(len(task))), torch.float32)
    with torch.no_grad():
        tower(pixels)
    inputs = {"conv1.weight": F.unfold(pixels, 8, stride=8).transpose(1, 2)}
    for k in range(2):
        block = f"transformer.resblocks.{k}"
        x = seen[f"{block}.ln_1"][1]
        attention = tower.get_submodule(f"{block}.attn")
        q, key, v = (
            F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
            .unflatten(-1, (3, 2, 16))
            .permute(2, 0, 3, 1, 4)
        )
        heads = (q @ key.transpose(-1, -2) / 4).softmax(-1) @ v
        inputs[f"{block}.attn.in_proj_weight"] = x
        inputs[f"{block}.attn.out_proj.weight"] = heads.transpose(1, 2).flatten(2)
        inputs[f"{block}.mlp.c_fc.weight"] = seen[f"{block}.ln_2"][1]
        inputs[f"{block}.mlp.c_proj.weight"] = seen[f"{block}.mlp.gelu"][1]
    inputs["proj"] = seen["ln_post"][1][:, 0]
    return inputs


def test_grams_of_a_clip_tower_are_those_of_the_inputs_of_its_layers(clip, clip_weights, shapes):
    found = grams(clip, clip_weights, shapes)
    inputs = clip_inputs(clip, clip_weights, shapes)
    close(found.tensors, {name: second_moment(x) for name, x in inputs.items()})
    assert found.rows == {name: x.shape[:-1].numel() for name, x in inputs.items()}
    assert found.axes == {name: 0 if name == "proj" else 1 for name in inputs}
    assert found.left_out == {}
    assert not set(found.tensors) & {"class_embedding", "positional_embedding", "ln_post.weight"}


def test_every_matrix_of_the_tower_but_its_embeddings_has_a_gram(clip, clip_weights, shapes):
    matrices = {name for name, tensor in clip_weights.items() if tensor.ndim > 1 and "embedding" not in name}
    assert set(grams(clip, clip_weights, shapes).tensors) == matrices


def test_grams_do_not_depend_on_the_microbatch(clip, clip_weights, shapes):
    whole = grams(clip, clip_weights, shapes, microbatch=64)
    for microbatch in (1, 5):
        parts = grams(clip, clip_weights, shapes, microbatch=microbatch)
        close(parts.tensors, whole.tensors, rtol=1e-5)
        assert parts.rows == whole.rows


def test_grams_are_symmetric_and_positive(clip, clip_weights, shapes):
    for gram in grams(clip, clip_weights, shapes).tensors.values():
        assert torch.equal(gram, gram.T)
        values = torch.linalg.eigvalsh(gram.double())
        assert float(values[0]) > -1e-6 * float(values[-1])


def test_prefixed_weights_have_prefixed_statistics(clip, clip_weights, shapes):
    prefixed = {f"visual.{n}": t for n, t in clip_weights.items()}
    for compute in (grams, fisher_diagonal):
        plain, other = compute(clip, clip_weights, shapes, samples=3), compute(clip, prefixed, shapes, samples=3)
        assert {f"visual.{n}" for n in plain.tensors} == set(other.tensors)
        assert all(torch.equal(t, other.tensors[f"visual.{n}"]) for n, t in plain.tensors.items())


def test_weights_that_are_left_out_of_the_merge_have_no_statistics(shapes, heads, clip_weights):
    model = CLIP(copy.deepcopy(CONFIG), weights=clip_weights, heads=heads)
    some = {n: t for n, t in clip_weights.items() if "resblocks.1" in n}
    assert set(fisher_diagonal(model, some, shapes, samples=2).tensors) == set(some)
    found = grams(model, some, shapes)
    close(found.tensors, {n: t for n, t in grams(model, clip_weights, shapes).tensors.items() if n in some})


def test_autocast_copies_of_the_weights_are_recognized(shapes, heads, clip_weights):
    half = CLIP(copy.deepcopy(CONFIG), heads=heads, precision="bf16")
    full = CLIP(copy.deepcopy(CONFIG), heads=heads)
    found, expected = grams(half, clip_weights, shapes, microbatch=5), grams(full, clip_weights, shapes)
    assert found.tensors.keys() == expected.tensors.keys()
    assert found.rows == expected.rows
    for name, gram in found.tensors.items():
        assert float((gram - expected.tensors[name]).norm() / expected.tensors[name].norm()) < 0.03


class Attending(nn.Module):
    def __init__(self, batch_first, other=False, need_weights=False, bias=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        self.batch_first, self.other, self.need_weights = batch_first, other, need_weights

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        y = 2 * x if self.other else x
        out = self.attention(x, y, y, need_weights=self.need_weights)[0]
        return out.mean(1 if self.batch_first else 0)[:, :3]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_both_projections_of_attention_have_grams_on_every_path(batch_first, need_weights, bias):
    torch.manual_seed(0)
    module = Attending(batch_first, need_weights=need_weights, bias=bias)
    model = ModuleModel(module)
    x = torch.randn(7, 5, 8)
    found = grams(model, model.base_weights(), Task("t", x, None, tuple("abc")), microbatch=4)
    attention = module.attention
    heads = []
    with torch.no_grad():
        q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        for h in (slice(0, 4), slice(4, 8)):
            heads.append((q[..., h] @ k[..., h].transpose(1, 2) / 2).softmax(-1) @ v[..., h])
    expected = {
        "attention.in_proj_weight": second_moment(x),
        "attention.out_proj.weight": second_moment(torch.cat(heads, -1)),
    }
    close(found.tensors, expected)
    assert set(found.rows.values()) == {35}


def test_attention_to_other_tokens_has_no_one_gram_and_says_why():
    model = ModuleModel(Attending(True, other=True))
    found = grams(model, model.base_weights(), Task("t", torch.randn(7, 5, 8), None, tuple("abc")))
    assert set(found.tensors) == {"attention.out_proj.weight"}
    assert found.left_out == {"attention.in_proj_weight": "it is used in parts"}


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 0, 1), ((2, 3), (2, 1), (1, 2), (1, 2)), (1, 1, 0, 1)]
)
def test_gram_of_a_convolution_is_that_of_its_patches(kernel, stride, padding, dilation, monkeypatch):
    monkeypatch.setattr("mergesolve.objectives.statistics.PATCHES", 500)  # a few samples at a time
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, kernel, stride, padding, dilation), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    model = ModuleModel(net)
    x = torch.randn(9, 2, 7, 8)
    found = grams(model, model.base_weights(), Task("t", x, None, tuple("abc")), microbatch=4)
    patches = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
    close({"0.weight": found.tensors["0.weight"]}, {"0.weight": second_moment(patches)})
    with torch.no_grad():  # and the patches are in the order of the kernel
        torch.testing.assert_close(
            patches @ net[0].weight.reshape(4, -1).T + net[0].bias, net[0](x).flatten(2).transpose(1, 2)
        )


def test_convolutions_in_one_dimension_and_those_that_are_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Conv1d(4, 4, 3, stride=2, padding=1)
            self.grouped, self.back = nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose1d(4, 3, 2)

        def forward(self, x):
            return self.back(self.grouped(self.plain(x))).mean(-1)

    model = ModuleModel(Net())
    x = torch.randn(6, 4, 20)
    found = grams(model, model.base_weights(), Task("t", x, None, tuple("abc")))
    patches = F.pad(x, (1, 1)).unfold(2, 3, 2).permute(0, 2, 1, 3).flatten(2)
    close(found.tensors, {"plain.weight": second_moment(patches)})
    assert set(found.left_out) == {"grouped.weight", "back.weight"}


def test_products_are_found_in_whatever_form_they_are_written():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = {"right": (4, 4), "left": (4, 4), "sum": (4, 5), "vector": (4,), "head": (3, 5)}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))

        def forward(self, x):  # [B, T, 4]
            x = x @ self.right
            x = (self.left @ x.transpose(1, 2)).transpose(1, 2)
            gate = (x @ self.vector)[..., None].sigmoid()
            return F.linear(torch.einsum("btd,do->bto", gate * x, self.sum), self.head).mean(1)

    torch.manual_seed(0)
    net = Net()
    model = ModuleModel(net)
    x = torch.randn(6, 3, 4)
    found = grams(model, model.base_weights(), Task("t", x, None, tuple("abc")))
    with torch.no_grad():
        a = x @ net.right
        b = a @ net.left.T
        c = (b @ net.vector)[..., None].sigmoid() * b
    inputs = {"right": x, "left": a, "vector": b, "sum": c, "head": (c @ net.sum).detach()}
    close(found.tensors, {name: second_moment(rows) for name, rows in inputs.items()})
    assert found.axes == {"right": 0, "left": 1, "vector": 0, "sum": 0, "head": 1}


def test_a_layer_that_is_applied_twice_has_one_gram_over_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            return self.lin(self.lin(x).tanh())

    model = ModuleModel(Twice())
    x = torch.randn(8, 3)
    found = grams(model, model.base_weights(), Task("t", x, None, tuple("abc")))
    with torch.no_grad():
        rows = torch.cat([x, model.module.lin(x).tanh()])
    close(found.tensors, {"lin.weight": second_moment(rows)})
    assert found.rows == {"lin.weight": 16}


def test_metadata_says_what_it_was_computed_from(clip, clip_weights, shapes):
    found = grams(clip, clip_weights, shapes, samples=4, seed=5)
    header = found.metadata
    assert {key: header[key] for key in ("statistics", "task", "samples", "seed")} == {
        "statistics": "gram", "task": "shapes", "samples": "4", "seed": "5"
    }  # fmt: skip
    assert json.loads(header["axes"])["proj"] == 0
    assert json.loads(header["rows"])["proj"] == 4
    assert all(isinstance(value, str) for value in header.values())
    fisher = fisher_diagonal(clip, clip_weights, shapes, estimator="sampled", samples=4)
    assert fisher.metadata["estimator"] == "sampled"
    assert "axes" not in fisher.metadata
