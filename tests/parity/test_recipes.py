"""mergekit's own YAML on a small Hugging Face model, through mergekit and through `mergesolve merge --recipe`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergesolve.cli import main
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.skipif(find_spec("mergekit") is None, reason="mergekit is not installed here; make parity"),
    pytest.mark.filterwarnings("default", "ignore:numpy.core is deprecated"),
]

LAYERS, WIDTH, INNER, WORDS = 3, 16, 24, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
}


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the model above."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{place}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{place}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{place}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and three experts as Hugging Face folders, by name."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in llama_shapes().items()}
    found = {}
    for name in ("base", "a", "b", "c"):
        noise = 0.0 if name == "base" else 0.2
        weights = {key: value + noise * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found[name] = str(folder)
    return found


FILTERED = [{"filter": "self_attn", "value": [0.0, 0.5, 1.0]}, {"filter": "mlp", "value": [1.0, 0.2]}, {"value": 0.4}]
FILTERED_POSITIVE = [{"filter": "mlp", "value": [1.0, 0.2]}, {"value": 0.4}]
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": {"a": {"weight": 1.0}, "b": {"weight": 0.3}, "c": {"weight": 2}}},
    "linear, filters and gradients": {
        "merge_method": "linear",
        "models": {"a": {"weight": FILTERED}, "b": {"weight": 1.0}, "c": {"weight": [0.1, 0.9]}},
    },
    "linear, with the base": {"merge_method": "linear", "models": {"base": {"weight": 1.0}, "a": {"weight": 0.5}}},
    "task arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": {"a": {"weight": 1.0}, "b": {"weight": -0.5}},
        "parameters": {"lambda": 0.6},
    },
    "task arithmetic, normalized, filters": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": {"a": {"weight": FILTERED}, "b": {"weight": 1.0}},
        "parameters": {"normalize": True},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": {name: {"weight": 1.0, "density": 0.5} for name in "abc"},
        "dtype": "float32",
    },
    "ties, base listed, sum, lambda": {
        "merge_method": "ties",
        "base_model": "base",
        "models": {"base": {}, "a": {"weight": 0.5, "density": 0.3}, "b": {"weight": 1.5, "density": 0.9}},
        "parameters": {"normalize": False, "lambda": 0.7},
    },
    "ties, filters and gradients": {
        "merge_method": "ties",
        "base_model": "base",
        "models": {"a": {"weight": FILTERED, "density": [0.2, 0.8]}, "b": {"weight": [1, 0.5, 0.1], "density": 0.4}},
        "parameters": {"normalize": True},
    },
    "ties, defaults at the top": {
        "merge_method": "ties",
        "base_model": "base",
        "models": {"a": {}, "b": {"weight": 0.2}, "c": {}},
        "parameters": {"weight": 1.0, "density": 0.6},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": {
            "a": {"weight": 1.0, "density": 0.9, "gamma": 0.05},
            "b": {"weight": 1, "density": 0.9, "gamma": 0.05},
        },
    },
    "breadcrumbs ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": {name: {"weight": 1.0} for name in "abc"},
        "parameters": {"density": 0.5, "gamma": 0.1, "normalize": True},
    },
    "dare, nothing dropped": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": {"a": {"weight": 0.4, "density": 1.0}, "b": {"weight": 0.6, "density": 1.0}},
    },
    "dare ties, nothing dropped": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": {"a": {"weight": 0.4, "density": 1.0}, "b": {"weight": 0.6, "density": 1.0}},
    },
    "della, nothing dropped": {
        "merge_method": "della",
        "base_model": "base",
        "models": {"a": {"weight": 0.4, "density": 1.0}, "b": {"weight": 0.6, "density": 1.0}},
    },
    "slerp": {"merge_method": "slerp", "base_model": "a", "models": {"a": {}, "b": {}}, "parameters": {"t": 0.3}},
    "slerp, filters and gradients": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": {"a": {}, "b": {}},
        "parameters": {"t": FILTERED},
    },
    "nuslerp": {"merge_method": "nuslerp", "models": {"a": {"weight": 0.7}, "b": {"weight": 0.5}}},
    "nuslerp of task vectors": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": {"a": {"weight": FILTERED_POSITIVE}, "b": {"weight": 1.0}},
    },
    "karcher": {"merge_method": "karcher", "models": {"a": {}, "b": {}, "c": {}}},
    "model stock": {"merge_method": "model_stock", "base_model": "base", "models": {name: {} for name in "abc"}},
}


def recipe(name: str, folders: dict[str, str]) -> dict[str, Any]:
    """The recipe with paths instead of names."""
    spec = dict(RECIPES[name])
    spec["models"] = [
        {"model": folders[model], **({"parameters": parameters} if parameters else {})}
        for model, parameters in spec["models"].items()
    ]
    if "base_model" in spec:
        spec["base_model"] = folders[spec["base_model"]]
    return spec


def by_mergekit(spec: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """What `mergekit-yaml` writes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, device="cpu")
    run_merge(MergeConfiguration.model_validate(spec), str(out), options)
    return weights_in(out)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def by_us(spec: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """What `mergesolve merge --recipe` writes from the same file."""
    path = out.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    done = CliRunner().invoke(main, ["merge", "--recipe", str(path), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return weights_in(out)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, folders, tmp_path, assert_equal):
    spec = recipe(name, folders)
    expected = by_mergekit(spec, tmp_path / "theirs")
    found = by_us(spec, tmp_path / "ours")
    assert set(found) == set(expected)
    assert_equal(found, expected, ulps=64 if name == "karcher" else 8)  # theirs stops at an angle of 1e-5


def test_output_type(folders, tmp_path):
    """`out_dtype` rounds the result, which may fall on the other side of a tie by one unit in the last place."""
    spec = {**recipe("ties", folders), "out_dtype": "bfloat16"}
    expected = by_mergekit(spec, tmp_path / "theirs")
    found = by_us(spec, tmp_path / "ours")
    for name, value in found.items():
        assert value.dtype == expected[name].dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "breadcrumbs ties", "model stock"])
def test_half_precision_checkpoints_in_float32(name, folders, tmp_path, assert_equal):
    """`dtype: float32` on checkpoints in bfloat16; nothing is trimmed.

    Their task vectors are full of equal magnitudes, and which of them a trim keeps is open in mergekit.
    """
    half = {}
    for key, folder in folders.items():
        half[key] = str(tmp_path / key)
        Path(half[key]).mkdir()
        weights = {name: value.bfloat16() for name, value in weights_in(Path(folder)).items()}
        save_file(weights, Path(half[key]) / "model.safetensors", metadata={"format": "pt"})
        (Path(half[key]) / "config.json").write_text(json.dumps({**CONFIG, "dtype": "bfloat16"}))
    spec = {**recipe(name, half), "dtype": "float32"}
    if name in ("ties", "breadcrumbs ties"):
        spec["parameters"] = {"density": 1.0, **({"gamma": 0.0} if name != "ties" else {})}
        for model in spec["models"]:
            model["parameters"] = {"weight": 0.5}
    expected = by_mergekit(spec, tmp_path / "theirs")
    found = by_us(spec, tmp_path / "ours")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_equal(found, expected)


def test_slices_of_all_layers(folders, tmp_path, assert_equal):
    sources = [{"model": folders[name], "layer_range": [0, LAYERS]} for name in ("a", "b")]
    spec = {
        "merge_method": "slerp",
        "base_model": folders["a"],
        "slices": [{"sources": sources}],
        "parameters": {"t": FILTERED},
        "dtype": "float32",
    }
    assert_equal(by_us(spec, tmp_path / "ours"), by_mergekit(spec, tmp_path / "theirs"))


@pytest.mark.parametrize("method", ["sce", "passthrough", "arcee_fusion"])
def test_methods_that_we_lack_are_refused(method, folders, tmp_path):
    spec = {**recipe("ties", folders), "merge_method": method}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(spec))
    done = CliRunner().invoke(main, ["merge", "--recipe", str(path), "--out", str(tmp_path / "ours")])
    assert done.exit_code == 2
    assert method in done.output
    assert not (tmp_path / "ours").exists()
