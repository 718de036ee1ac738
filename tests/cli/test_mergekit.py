"""mergekit's YAML as a recipe of ours, against mergekit's rules written out again in float64 NumPy."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergesolve.cli import main
from mergesolve.cli.mergekit import distinct_names, from_mergekit
from mergesolve.cli.mergekit_methods import METHODS as METHODS_OF_MERGEKIT
from mergesolve.cli.names import UsageProblem
from mergesolve.cli.recipe import from_yaml
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form import MERGES, make_merge, merge_weights
from safetensors.torch import load_file, save_file

LAYERS = 4
TENSORS = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(LAYERS)
        for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.1.w1", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
)
MODELS = ("m/base", "m/first", "m/second", "m/third")

relaxed = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw_weights() -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    base = {name: generator.normal(size=12).astype(np.float32) for name in TENSORS}
    found = {"m/base": base}
    for model in MODELS[1:]:
        found[model] = {n: v + generator.normal(size=12).astype(np.float32) / 4 for n, v in base.items()}
    return found


WEIGHTS = draw_weights()
"""model -> tensor -> values, whose task vectors have different magnitudes everywhere."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of every model, and no weights."""
    root = tmp_path_factory.mktemp("mergekit")
    for model in MODELS:
        (root / model).mkdir(parents=True)
        (root / model / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    return root


def method_of(recipe: Mapping[str, Any], tensor: str) -> dict[str, Any]:
    """The method that a tensor takes by a recipe of ours."""
    for override in recipe.get("overrides", []):
        if re.search(override["match"], tensor):
            return override["method"]
    return recipe["method"]


def merged(recipe: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What our recipe makes of the models."""
    states = {model: {name: torch.from_numpy(value) for name, value in of.items()} for model, of in WEIGHTS.items()}
    of = {name: states["/".join(Path(path).parts[-2:])] for name, path in recipe["pool"]["experts"].items()}
    pool = Pool.from_state_dicts(states["/".join(Path(recipe["pool"]["base"]).parts[-2:])], of)
    found: dict[str, np.ndarray] = {}
    methods = {name: method_of(recipe, name) for name in TENSORS}
    for method in {json.dumps(method): method for method in methods.values()}.values():
        part = pool.restrict([name for name in TENSORS if methods[name] == method])
        found |= {name: value.numpy() for name, value in merge_weights(part, make_merge(method)).items()}
    return found


# The rules of mergekit, again: parameters of a tensor, and its merge.


def layer_position(tensor: str) -> float:
    """0 for the first layer and for what is in none, 1 for the last."""
    parts = tensor.split(".")
    return int(parts[2]) / (LAYERS - 1) if parts[1] == "layers" else 0.0


def evaluate(setting: Any, tensor: str) -> Any:
    """The value of a setting for a tensor, or None if no filter matches."""
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for condition in setting:
            if condition.get("filter") in (None, "*") or condition["filter"] in tensor:
                return evaluate(condition["value"], tensor)
        return None
    if isinstance(setting, list):
        # In this order of operations: the last bit decides how many entries a density keeps.
        whole, rest = divmod(layer_position(tensor) * (len(setting) - 1), 1)
        return (1 - rest) * setting[int(whole)] + (rest * setting[int(whole) + 1] if rest else 0)
    return setting


def lookup(parameter: str, tensor: str, scopes: list[Mapping[str, Any]], default: Any) -> Any:
    for scope in scopes:
        value = evaluate(scope[parameter], tensor) if parameter in scope else None
        if value is not None:
            return value
    return default


def by_the_rules(spec: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """linear, task_arithmetic, ties and breadcrumbs of models, in float64."""
    result = {}
    top, method = spec.get("parameters", {}), spec["merge_method"]
    own = {entry["model"]: entry.get("parameters", {}) for entry in spec["models"]}
    base = spec.get("base_model")
    if base is not None:
        own.setdefault(base, {})
    for name in TENSORS:
        values = {model: WEIGHTS[model][name].astype(np.float64) for model in own}

        def each(parameter: str, default: float | None, name: str = name) -> dict[str, float]:
            return {
                model: lookup(parameter, name, [scope, top], default)
                for model, scope in own.items()
                if method == "linear" or model != base
            }

        weight = each("weight", None)
        normalize = lookup("normalize", name, [top], method in ("linear", "ties"))
        if method == "linear":
            total = sum(weight[m] * values[m] for m in weight)
            result[name] = total / sum(weight.values())
            continue
        density, gamma = each("density", 1.0), each("gamma", 0.01)
        deltas = {m: values[m] - values[base] for m in weight}
        for m, delta in deltas.items():
            order = np.argsort(np.abs(delta))
            size, keep = delta.size, int(density[m] * delta.size)
            if method == "ties" and density[m] < 1:
                delta[order[: size - max(1, keep)]] = 0
            if method.startswith("breadcrumbs") and density[m] < 1:
                low = max(0, size - keep - int(gamma[m] * size))
                delta[order[:low]] = 0
                delta[order[low + keep :]] = 0
        stack = np.stack([weight[m] * deltas[m] for m in weight])
        factors = np.array([weight[m] for m in weight])[:, None] * np.ones_like(stack)
        if "ties" in method:
            sign = np.where(stack.sum(0) >= 0, 1, -1)
            agrees = np.sign(stack) == sign
            stack, factors = stack * agrees, factors * agrees
        divisor = factors.sum(0)
        merge = stack.sum(0) / np.where(np.abs(divisor) < 1e-8, 1, divisor) if normalize else stack.sum(0)
        result[name] = values[base] + lookup("lambda", name, [top], 1.0) * merge
    return result


# Recipes.

number = st.floats(0.125, 2, width=16).map(lambda value: round(value, 3))
density = st.sampled_from([0.25, 0.4, 0.5, 0.75, 0.9, 1.0, 1])


def setting(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A value, a gradient, or a list behind filters that ends with a value for all."""
    gradient = st.lists(value, min_size=1, max_size=5)
    filters = st.lists(st.sampled_from(["self_attn", "mlp", ".layers.2.", "attn", "experts"]), max_size=3)
    one = value | gradient
    conditional = st.tuples(filters, st.lists(one, min_size=3, max_size=3), one).map(
        lambda drawn: [
            *({"filter": name, "value": item} for name, item in zip(drawn[0], drawn[1], strict=False)),
            {"value": drawn[2]},
        ]
    )
    return value | gradient | conditional


@st.composite
def recipes(draw: st.DrawFn, methods: tuple[str, ...]) -> dict[str, Any]:
    """Valid recipes of these methods, with and without the base among the models."""
    method = draw(st.sampled_from(methods))
    delta = method != "linear"
    listed = draw(st.lists(st.sampled_from(MODELS[1:]), min_size=2, max_size=3, unique=True))
    if draw(st.booleans()):
        listed.insert(draw(st.integers(0, len(listed))), "m/base")
    sparse = method not in ("linear", "task_arithmetic")
    models = []
    for model in listed:
        parameters = {"weight": draw(setting(number))}
        if sparse and draw(st.booleans()):
            parameters["density"] = draw(setting(density))
        models.append({"model": model, "parameters": parameters})
    top: dict[str, Any] = {"weight": draw(number)} if draw(st.booleans()) or not delta else {}
    if delta and draw(st.booleans()):
        top["normalize"] = draw(st.booleans())
    if delta and draw(st.booleans()):
        top["lambda"] = draw(setting(number))
    if method.startswith("breadcrumbs") and draw(st.booleans()):
        top["gamma"] = draw(setting(st.sampled_from([0.1, 0.2])))
    spec = {"merge_method": method, "models": models, "parameters": top}
    if delta or draw(st.booleans()):
        spec["base_model"] = "m/base"
    return spec


SHARED = ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")


@relaxed
@given(spec=recipes(SHARED))
def test_our_merge_of_a_recipe_is_mergekits(spec, folder):
    recipe = from_mergekit(spec, "recipe", folder=folder)
    expected = by_the_rules(spec)
    for name, value in merged(recipe).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-5)


@relaxed
@given(spec=recipes(SHARED), data=st.data())
def test_the_order_of_the_models_does_not_matter(spec, data, folder):
    other = {**spec, "models": data.draw(st.permutations(spec["models"]))}
    one, two = from_mergekit(spec, "recipe", folder=folder), from_mergekit(other, "recipe", folder=folder)
    if "base_model" in spec:
        assert one["pool"] == two["pool"]
        for name in TENSORS:
            assert method_of(one, name) == method_of(two, name)
    again = merged(two)
    for name, value in merged(one).items():
        np.testing.assert_allclose(value, again[name], rtol=0, atol=2e-5)


# Methods by angles.


def slerp(t: float, a: np.ndarray, b: np.ndarray, parallel: float) -> np.ndarray:
    cosine = np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)
    if abs(cosine) > parallel:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def by_angles(spec: Mapping[str, Any], name: str) -> np.ndarray:
    """slerp, nuslerp and model_stock of one tensor, in float64."""
    top, base = spec.get("parameters", {}), spec.get("base_model")
    values = {model: WEIGHTS[model][name].astype(np.float64) for model in MODELS}
    others = [entry["model"] for entry in spec["models"] if entry["model"] != base]
    if spec["merge_method"] == "slerp":
        return slerp(lookup("t", name, [top], None), values[base], values[others[0]], 0.9995)
    origin = values[base] if base is not None else 0.0
    deltas = [values[model] - origin for model in others]
    if spec["merge_method"] == "nuslerp":
        own = {entry["model"]: entry.get("parameters", {}) for entry in spec["models"]}
        first, second = (lookup("weight", name, [own[model], top], None) for model in others)
        return origin + slerp(second / (first + second), deltas[0], deltas[1], 1.0)
    units = [delta / np.linalg.norm(delta) for delta in deltas]
    cosine = np.mean([a @ b for a, b in itertools.combinations(units, 2)])
    n = len(deltas)
    return origin + n * cosine / (1 + (n - 1) * cosine) * np.mean(deltas, axis=0)


@st.composite
def angular(draw: st.DrawFn) -> dict[str, Any]:
    """Valid recipes of slerp, nuslerp and model_stock."""
    method = draw(st.sampled_from(["slerp", "nuslerp", "model_stock"]))
    count = {"slerp": 1, "nuslerp": 2}.get(method) or draw(st.integers(2, 3))
    listed = draw(st.permutations(MODELS[1:]))[:count]
    named = method != "nuslerp" or draw(st.booleans())
    if named and draw(st.booleans()):
        listed.insert(draw(st.integers(0, count)), "m/base")
    spec: dict[str, Any] = {"merge_method": method, "models": [{"model": model} for model in listed]}
    if method == "nuslerp":
        for entry in spec["models"]:
            entry["parameters"] = {"weight": draw(setting(number))}
    if method == "slerp":
        spec["parameters"] = {"t": draw(setting(st.sampled_from([0, 0.25, 0.5, 0.7, 1])))}
    return spec | ({"base_model": "m/base"} if named else {})


@relaxed
@given(spec=angular())
def test_our_merge_by_angles_is_mergekits(spec, folder):
    recipe = from_mergekit(spec, "recipe", folder=folder)
    for name, value in merged(recipe).items():
        np.testing.assert_allclose(value, by_angles(spec, name), rtol=0, atol=2e-5)


@pytest.mark.parametrize("base", [None, "m/base"])
def test_karcher_is_the_spherical_mean_of_all_models(base):
    spec = {"merge_method": "karcher", "models": [{"model": model} for model in MODELS[1:]], "base_model": base}
    found = merged(from_mergekit(spec, "recipe"))
    for name, value in found.items():
        vectors = np.stack([WEIGHTS[model][name].astype(np.float64) for model in (MODELS if base else MODELS[1:])])
        norms = np.linalg.norm(vectors, axis=1)
        mean = value / np.linalg.norm(value)
        cosines = vectors @ mean / norms
        tangent = (np.arccos(cosines) / np.sqrt(1 - cosines**2)) @ (vectors / norms[:, None] - np.outer(cosines, mean))
        np.testing.assert_allclose(tangent, 0, atol=1e-5)  # where the mean of the logarithms vanishes
        np.testing.assert_allclose(np.linalg.norm(value), norms.mean(), rtol=1e-6)


# However it is written.


def as_written(value: Any, write: Callable[[float], Any]) -> Any:
    """A recipe with every number written in another way."""
    if isinstance(value, dict):
        return {key: as_written(item, write) for key, item in value.items()}
    if isinstance(value, list):
        return [as_written(item, write) for item in value]
    return write(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@relaxed
@given(spec=recipes(SHARED) | angular())
def test_numbers_are_the_same_however_they_are_written(spec, folder):
    recipe = from_mergekit(spec, "recipe", folder=folder)
    for write in (float, repr, lambda value: int(value) if value == int(value) else f"{value:.17e}"):
        assert from_mergekit(as_written(spec, write), "recipe", folder=folder) == recipe


@relaxed
@given(spec=recipes(SHARED) | angular())
def test_a_recipe_survives_yaml(spec, folder):
    recipe = from_mergekit(spec, "recipe", folder=folder)
    assert from_yaml(yaml.safe_dump(recipe, sort_keys=False)) == recipe
    assert from_mergekit(from_yaml(yaml.safe_dump(spec)), "recipe", folder=folder) == recipe


# Anything else: a recipe, or the user's mistake told.

KEYS = [
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "name",
    "tokenizer", "chat_template", "model", "weight", "density", "gamma", "epsilon", "lambda", "t", "normalize",
    "rescale", "int8_mask", "filter_wise", "filter", "value", "sources", "layer_range", "path", "revision", "lora",
]  # fmt: skip
WORDS = (
    "ties",
    "linear",
    "slerp",
    "della",
    "dare_ties",
    "model_stock",
    "base",
    "float16",
    "a",
    "b/c",
    "a+b",
    "1e-3",
    "",
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
anything = st.recursive(
    leaves | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
        | st.dictionaries(leaves, inner, max_size=2)
    ),
    max_leaves=12,
)
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs")


def parses_or_tells(spec: Any, folder: Path) -> None:
    try:
        recipe = from_mergekit(spec, "recipe 'merge.yml'", folder=folder)
    except UsageProblem as problem:
        assert str(problem).startswith("recipe 'merge.yml': ")  # noqa: PT017
        return
    assert set(recipe) <= {"method", "pool", "overrides", "dtype"}
    make_merge(recipe["method"])
    for override in recipe.get("overrides", []):
        re.compile(override["match"])
        make_merge(override["method"])


@relaxed
@given(spec=st.dictionaries(st.sampled_from(KEYS) | leaves, anything, max_size=6))
def test_any_mapping_is_a_recipe_or_a_problem_that_is_told(spec, folder):
    parses_or_tells(spec, folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything within a recipe."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *itertools.chain.from_iterable(places(item, (*path, key)) for key, item in inner)]


def with_change(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_change(value[path[0]], path[1:], new)
    return copy


@relaxed
@given(spec=recipes((*METHODS, "breadcrumbs_ties")) | angular(), data=st.data())
def test_a_recipe_with_one_change_is_a_recipe_or_a_problem_that_is_told(spec, data, folder):
    parses_or_tells(spec, folder)
    path = data.draw(st.sampled_from(places(spec)[1:]))
    parses_or_tells(with_change(spec, path, data.draw(anything)), folder)


# Single recipes, as people write them.


def experts(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": f"org/{name}", **({"parameters": parameters} if parameters else {})} for name in names]


TIES = {"merge_method": "ties", "base_model": "org/base", "models": experts("a", "b", weight=1, density=0.5)}
POOL = {"base": "org/base", "experts": {"a": "org/a", "b": "org/b"}}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param(
            TIES | {"models": [{"model": "org/base"}, *TIES["models"]], "dtype": "float16"},
            {
                "method": {
                    "name": "ties", "trim": "tensor", "merge": "mean", "zero": "plus", "scale": 1.0, "density": 0.5,
                },
                "pool": POOL,
                "dtype": "float16",
            },
            id="ties",
        ),
        pytest.param(
            {
                "merge_method": "dare_ties",
                "base_model": "org/base",
                "models": [
                    {"model": "org/a", "parameters": {"density": 0.53, "weight": 0.4}},
                    {"model": "org/b", "parameters": {"density": 0.6, "weight": -0.3}},
                ],
                "parameters": {"int8_mask": True, "lambda": 1.5},
                "dtype": "float32",
                "out_dtype": "bfloat16",
                "tokenizer_source": "base",
                "name": "mine",
            },
            {
                "method": {
                    "name": "dare-ties", "merge": "sum", "zero": "plus", "scale": 1.5, "rescale": "l1",
                    "weights": {"a": 0.4, "b": -0.3}, "density": 1.0, "densities": {"a": 0.53, "b": 0.6},
                },
                "pool": POOL,
                "dtype": "bfloat16",
            },
            id="dare-ties",
        ),
        pytest.param(
            {
                "merge_method": "dare_linear",
                "base_model": "org/base",
                "models": experts("a", "b"),
                "parameters": {"weight": 0.25, "density": 0.5, "normalize": True, "rescale": False},
            },
            {
                "method": {
                    "name": "dare", "scale": 2.0, "weights": {"a": 0.25, "b": 0.25}, "density": 0.5, "rescale": "none",
                },
                "pool": POOL,
            },
            id="dare-linear",
        ),
        pytest.param(
            {
                "merge_method": "della",
                "base_model": "org/base",
                "models": experts("a", "b", weight=1, density=0.7, epsilon=0.05),
            },
            {
                "method": {
                    "name": "della", "merge": "mean", "zero": "plus", "scale": 1.0, "density": 0.7, "rescale": "l1",
                    "epsilon": 0.05, "window": "symmetric",
                },
                "pool": POOL,
            },
            id="della",
        ),
        pytest.param(
            {"merge_method": "linear", "models": experts("a", "b", "c", weight=1.0)},
            {
                "method": {"name": "average", "normalize": False, "weights": {"b": 1 / 3, "c": 1 / 3}},
                "pool": {"base": "org/a", "experts": {"b": "org/b", "c": "org/c"}},
            },
            id="linear",
        ),
        pytest.param(
            {
                "merge_method": "linear",
                "base_model": "org/base",
                "models": experts("a", "b"),
                "parameters": {"weight": 2},
            },
            {"method": {"name": "average", "normalize": False, "weights": {"a": 1 / 3, "b": 1 / 3}}, "pool": POOL},
            id="linear, the base counts",
        ),
    ],
)  # fmt: skip
def test_recipe(spec, expected):
    assert from_mergekit(spec, "recipe") == expected


def test_filters_become_patterns_in_their_order():
    spec = TIES | {
        "parameters": {"lambda": [{"filter": "self_attn", "value": 0.5}, {"filter": "mlp", "value": 0.7}, {"value": 1}]}
    }
    recipe = from_mergekit(spec, "recipe")
    assert [(o["match"], o["method"]["scale"]) for o in recipe["overrides"]] == [("self_attn", 0.5), ("mlp", 0.7)]
    assert recipe["method"]["scale"] == 1.0


def test_gradients_become_layers(folder):
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": "m/base",
        "models": [{"model": "m/first", "parameters": {"weight": [0, 1, 1]}}],
    }
    recipe = from_mergekit(spec, "recipe", folder=folder)
    scales = {name: method_of(recipe, name).get("weights", {"first": 1.0})["first"] for name in TENSORS}
    for layer, weight in enumerate([0.0, 2 / 3, 1.0, 1.0]):
        assert scales[f"model.layers.{layer}.mlp.experts.1.w1.weight"] == pytest.approx(weight, abs=1e-15)
    assert scales["lm_head.weight"] == scales["model.embed_tokens.weight"] == 0.0
    assert len(recipe["overrides"]) == 2


@pytest.mark.parametrize("name", ["transformer.h.3.attn.weight", "h.3.mlp.weight", "bert.encoder.layer.3.output.bias"])
def test_layers_of_other_architectures(name, folder):
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": "m/base",
        "models": [{"model": "m/first", "parameters": {"weight": [0.5, 0.75]}}],
    }
    assert method_of(from_mergekit(spec, "recipe", folder=folder), name)["weights"] == {"first": 0.75}


def test_the_layer_is_the_first_number_of_a_name(folder):
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": "m/base",
        "models": [{"model": "m/first", "parameters": {"weight": [0.5, 0.75]}}],
    }
    recipe = from_mergekit(spec, "recipe", folder=folder)
    assert method_of(recipe, "layers.0.blocks.3.weight")["weights"] == {"first": 0.5}
    assert method_of(recipe, "layers.3.blocks.0.weight")["weights"] == {"first": 0.75}
    assert method_of(recipe, "projector.3.weight")["weights"] == {"first": 0.5}


def test_weights_that_cancel_are_not_divided_by():
    spec = parameters("task_arithmetic", normalize=True)
    spec["models"] = [*experts("a", weight=1), *experts("b", weight=-1 + 1e-9)]
    assert from_mergekit(spec, "recipe")["method"]["scale"] == 1.0


def test_how_masks_are_stored_has_no_effect():
    assert from_mergekit(change(parameters={"int8_mask": True}), "recipe") == from_mergekit(TIES, "recipe")


def test_one_slice_of_all_layers_is_a_list_of_models(folder):
    sources = [{"model": model, "layer_range": [0, LAYERS], "parameters": {"weight": 1}} for model in MODELS[:3]]
    spec = {"merge_method": "ties", "base_model": "m/base", "slices": [{"sources": sources}]}
    models = [{"model": source["model"], "parameters": source["parameters"]} for source in sources]
    listed = {"merge_method": "ties", "base_model": "m/base", "models": models}
    assert from_mergekit(spec, "recipe", folder=folder) == from_mergekit(listed, "recipe", folder=folder)
    cut = [{**source, "layer_range": [0, 2]} for source in sources]
    with pytest.raises(UsageProblem, match=r"\[0, 2\] of 4 layers"):
        from_mergekit({**spec, "slices": [{"sources": cut}]}, "recipe", folder=folder)


def test_parameters_of_a_slice_come_before_those_of_all(folder):
    sources = [{"model": model, "layer_range": [0, LAYERS]} for model in MODELS[:3]]
    spec = {
        "merge_method": "ties",
        "base_model": "m/base",
        "slices": [{"sources": sources, "parameters": {"weight": 1, "density": 0.25}}],
        "parameters": {"density": 0.5, "lambda": 0.5},
    }
    method = from_mergekit(spec, "recipe", folder=folder)["method"]
    assert (method["density"], method["scale"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    "model",
    [
        "org/a@v1",
        {"path": "org/a", "revision": "v1"},
        {"model": "org/a@v1"},
        {"model": {"path": "org/a", "revision": "v1"}, "lora": None},
    ],
)
def test_forms_of_a_reference(model):
    spec = TIES | {"models": [{"model": model, "parameters": {"weight": 1}}]}
    assert from_mergekit(spec, "recipe")["pool"]["experts"] == {"a@v1": "org/a@v1"}


@given(
    paths=st.lists(st.lists(st.sampled_from(["a", "b", "a-b", "b-2", "base"]), min_size=1, max_size=3), unique_by=tuple)
)
def test_names_are_distinct_in_any_order(paths):
    joined = ["/".join(parts) for parts in paths]
    names = distinct_names(joined)
    assert len({*names.values(), "base"}) == len(joined) + 1
    assert distinct_names(joined[::-1]) == names


def test_names_say_what_is_different():
    assert distinct_names(["x/model", "y/model", "z"]) == {"x/model": "x-model", "y/model": "y-model", "z": "z"}
    assert distinct_names(["a/one.safetensors", "a/two.safetensors"]) == {
        "a/one.safetensors": "one",
        "a/two.safetensors": "two",
    }


def change(**fields: Any) -> dict[str, Any]:
    return {**TIES, **fields}


def parameters(method: str, **values: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "org/base",
        "models": experts("a", "b", weight=1),
        "parameters": values,
    }


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (change(merge_method="passthrough"), "stacks layers"),
        (change(merge_method="sce"), "we lack mergekit's method 'sce': the nearest is 'ties'"),
        (change(merge_method="dare-ties"), "Did you mean 'dare_ties'"),
        ({"models": experts("a")}, "lacks 'merge_method'"),
        (change(base_model=None), "ties needs 'base_model'"),
        (change(models=None), "expected 'models', or else 'slices'"),
        (change(models=None, slices=[{}, {}]), "one slice"),
        (change(modules={}), "'modules' are not here"),
        (change(model="org/a"), "unknown field of a mergekit recipe 'model'. Did you mean 'models'"),
        (change(models=[*TIES["models"], TIES["models"][0]]), "'org/a' is listed twice"),
        (change(models=experts("base", weight=1)), "at least 1 model (beside the base, 'org/base'); found 0"),
        (change(models=experts("a+lora", weight=1)), "adds a LoRA adapter"),
        (change(models=[{"model": {"model": "org/a", "override_architecture": "X"}}]), "override_architecture"),
        (change(models=experts("a")), "lacks a weight, which has no default"),
        (change(models=experts("a", weight=[{"filter": "mlp", "value": 1}])), "no filter of 'weight' matches all"),
        (change(models=experts("a", weight=[1, {"value": 1}])), "not of both"),
        (change(models=experts("a", weight=[])), "a gradient needs at least one value"),
        (change(models=experts("a", weight="heavy")), "'weight' must be a finite number; found 'heavy'"),
        (change(models=experts("a", weight=True)), "'weight' must be a finite number; found True"),
        (change(models=experts("a", weight=1, wieght=1)), "Did you mean 'weight'"),
        (change(models=experts("a", weight=1, normalize=True)), "belongs to the whole merge"),
        (change(models=experts("a", weight=1, density=1.5)), "density of 'a' must be a number in (0, 1]; found 1.5"),
        (change(models=experts("a", weight=1, density=-0.5)), "found -0.5"),
        (change(parameters={"rescale": True}), "'rescale: true' with ties is not here"),
        (change(parameters={"normalize": "yes"}), "'normalize' must be true or false"),
        (change(parameters={"gamma": 0.1}), "'gamma' has no effect on ties"),
        (change(parameters={"lambda": [0, 1]}), "needs the number of layers"),
        (change(dtype="float64"), "unknown dtype 'float64'"),
        (change(dtype="int8"), "unknown dtype 'int8'"),
        (change(tokenizer_source="union"), "'tokenizer_source: union' is not here"),
        (change(tokenizer={"source": "base", "tokens": {"x": {}}}), "'tokens' changes the vocabulary"),
        (change(chat_template="chatml"), "'chat_template' is not here"),
        (parameters("task_arithmetic", density=0.5), "'density' has no effect on task_arithmetic"),
        (parameters("model_stock"), "'weight' has no effect on model_stock; leave it out. It has filter_wise"),
        ({**TIES, "merge_method": "slerp", "models": experts("a", "b"), "parameters": {"t": 0.5}}, "found 3"),
        ({**TIES, "merge_method": "slerp", "models": experts("a")}, "lacks a t, which has no default"),
        ({**TIES, "merge_method": "slerp", "models": experts("a"), "parameters": {"t": 1.5}}, "between 0 and 1"),
        ({**TIES, "merge_method": "model_stock", "models": experts("a")}, "at least 2 models (beside the base"),
        ({"merge_method": "karcher", "models": experts("a", "b"), "parameters": {"tol": 1e-3}}, "to convergence"),
        ({"merge_method": "karcher", "models": experts("a")}, "at least 2 models (the base included)"),
        (
            {"merge_method": "nuslerp", "models": experts("a", "b", weight=1)} | {"parameters": {"nuslerp_flatten": 0}},
            "interpolates single rows",
        ),
        (
            {"merge_method": "nuslerp", "models": [*experts("a", weight=1), *experts("b", weight=-3)]},
            "the share of the second weight must be between 0 and 1",
        ),
        (
            {"merge_method": "model_stock", "base_model": "org/base", "models": experts("a", "b")}
            | {"parameters": {"filter_wise": True}},
            "angles of single filters",
        ),
        (parameters("linear", normalize=False), "weights that sum to 3 scales the whole model"),
        (parameters("della", density=0.9, epsilon=0.2), "density 0.9 and epsilon 0.2"),
        (
            {
                "merge_method": "breadcrumbs",
                "base_model": "org/base",
                "models": [*experts("a", weight=1, gamma=0.1, density=0.5), *experts("b", weight=1, density=0.5)],
            },
            "'gamma' is one number for all models here; found 0.1 for 'a', 0.01 for 'b'",
        ),
        (
            {"merge_method": "linear", "models": [*experts("a", weight=1), *experts("b", weight=-1)]},
            "sum to 0, by which it divides",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_is_told(spec, told):
    if spec.get("merge_method") == "linear" and "parameters" in spec:
        spec["models"].append({"model": "org/base", "parameters": {"weight": 1}})
    with pytest.raises(UsageProblem) as problem:
        from_mergekit(spec, "recipe 'merge.yml'")
    assert told in str(problem.value)
    assert str(problem.value).startswith("recipe 'merge.yml': ")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 4, "is_encoder_decoder": True},
        {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}},
    ],
)
def test_gradients_need_one_stack_of_layers(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = TIES | {"base_model": str(tmp_path), "parameters": {"lambda": [0, 1]}}
    with pytest.raises(UsageProblem, match="one stack of layers"):
        from_mergekit(spec, "recipe")


def test_the_command_merges_models_beside_the_recipe(folder, tmp_path, monkeypatch):
    for model in MODELS[:3]:
        tensors = {name: torch.from_numpy(value) for name, value in WEIGHTS[model].items()}
        save_file(tensors, folder / model / "model.safetensors")
    models = [{"model": model, "parameters": {"weight": [1, 0.5], "density": 0.5}} for model in MODELS[1:3]]
    spec = {"merge_method": "ties", "base_model": "m/base", "models": models, "out_dtype": "bfloat16"}
    (folder / "merge.yml").write_text(yaml.safe_dump(spec))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["merge", "--recipe", str(folder / "merge.yml"), "--out", "merged"])
    assert done.exit_code == 0, done.output
    found, expected = load_file(tmp_path / "merged/model.safetensors"), by_the_rules(spec)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        np.testing.assert_allclose(value.float().numpy(), expected[name], rtol=2**-8, atol=1e-6)
    assert (tmp_path / "merged/config.json").read_text() == (folder / "m/base/config.json").read_text()


def test_the_command_writes_nothing_for_a_recipe_that_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(TIES | {"merge_method": "sce"}))
    done = CliRunner().invoke(main, ["merge", "--recipe", "merge.yml", "--out", "merged"])
    assert done.exit_code == 2
    assert done.output == "Error: recipe 'merge.yml': we lack mergekit's method 'sce': the nearest is 'ties'.\n"
    assert not (tmp_path / "merged").exists()


def test_the_docs_say_which_methods_there_are_and_show_a_recipe_that_is_one(folder):
    text = (Path(__file__).parents[2] / "docs/own-models.md").read_text(encoding="utf-8")
    section = text.split("## Coming from mergekit")[1].split("\n## ")[0]
    (block,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    spec = from_yaml(block)
    with pytest.raises(UsageProblem, match=r"config\.json"):
        from_mergekit(spec, "recipe")
    recipe = from_mergekit({**spec, "base_model": "m/base"}, "recipe", folder=folder)
    assert recipe["dtype"] == "bfloat16"
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    theirs = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    ours = [name for row in rows for name in re.findall(r"`([\w-]+)`", row[1])]
    assert theirs == list(METHODS_OF_MERGEKIT)
    assert set(ours) <= set(MERGES)
