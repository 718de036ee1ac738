"""Whole CLIP checkpoints: text tower and visual tower in one file, the visual tower under its prefix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CLASSES = ["red fox", "owl", "sea lion"]


def write(model, path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Base, two experts that differ in the visual tower, their data, and a recipe."""
    folder = tmp_path_factory.mktemp("clips")
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**CONFIG).eval().requires_grad_(False)
    write(model, folder / "base.safetensors")
    (folder / "base").mkdir()
    write(model, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text("{}")
    for name in ("a", "b"):
        for tensor in model.visual.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
        write(model, folder / f"{name}.safetensors")
        images = np.random.default_rng(len(name)).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(12) % 3, classes=CLASSES)
    fields = {
        "pool": {"base": "base.safetensors", "experts": {"a": "a.safetensors", "b": "b.safetensors"}},
        "model": {"architecture": CONFIG},
        "tasks": [{"name": name, "npz": f"{name}.npz", "test": f"{name}.npz"} for name in ("a", "b")],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    fields["pool"]["base"] = "base"
    (folder / "from_folder.yaml").write_text(yaml.safe_dump(fields))
    return folder


def accuracy(path, images, labels):
    """By open_clip's own model and forward pass."""
    model = open_clip.model.CLIP(**CONFIG).eval()
    model.load_state_dict(load_file(path))
    tokens = open_clip.SimpleTokenizer(context_length=77)([f"a photo of a {name}." for name in CLASSES])
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    with torch.no_grad():
        logits = model.get_logits(pixels, tokens)[0]
    return float((logits.argmax(1).numpy() == labels).mean())


@pytest.mark.parametrize("recipe", ["recipe.yaml", "from_folder.yaml"])
def test_whole_models_are_solved_and_evaluated(recipe, clips, run):
    done = run("solve", clips / recipe, "--max-iter", 2, "--run", "r", "--no-figures", "--quiet")
    assert done.exit_code == 0, done.stderr
    models = [clips / "base.safetensors", clips / "a.safetensors", Path("r/merged.safetensors")]
    result = run("evaluate", "r", *models, "--recipe", clips / recipe, "--json")
    assert result.exit_code == 0, result.stderr
    of_run, *rows = (row["accuracies"] for row in json.loads(result.stdout)["rows"])
    for name in ("a", "b"):
        data = np.load(clips / f"{name}.npz")
        for path, row in zip(models, rows, strict=True):
            assert row[name] == pytest.approx(accuracy(path, data["images"], data["labels"]))
        assert of_run[name] == rows[-1][name]


def test_the_base_teaches(clips, run):
    fields = yaml.safe_load((clips / "recipe.yaml").read_text())
    for task in fields["tasks"]:
        task["teacher"] = "base"
    (clips / "taught.yaml").write_text(yaml.safe_dump(fields))
    result = run(
        "solve", clips / "taught.yaml", "--objective", "distillation", "--domain", "capped", "--start", "base",
        "--max-iter", 0, "--run", "r", "--no-merge", "--no-figures", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["objective"] == pytest.approx(0, abs=1e-6)  # the merge is its own teacher


def test_a_checkpoint_of_another_model_is_refused(clips, tiny, run):
    result = run("evaluate", tiny / "base.safetensors", "--recipe", clips / "recipe.yaml")
    assert result.exit_code == 2
    assert "lacks" in result.stderr
    assert result.stderr.count("\n") == 1
