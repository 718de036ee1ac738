from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from mergesolve.objectives import CLIP, CrossEntropy, DataError, Entropy, Task, joint
from open_clip.model import CLIP as OpenCLIP
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor

TEMPLATES = ("a photo of a {}.", "a bad photo of a {}.", "{}, drawn")
CLASSES = ("red fox", "owl", "sea lion")


def _reference(config: dict[str, Any], kind: Any = OpenCLIP, seed: int = 4) -> Any:
    """A model of open_clip itself, with weights that are not those of our seed."""
    torch.manual_seed(seed)
    model = kind(**config).eval().requires_grad_(False)
    model.logit_scale.fill_(math.log(30.0))
    for name, tensor in model.visual.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.02)
        elif name.endswith("running_var"):
            tensor.uniform_(0.01, 0.1)
        elif name.endswith("bn3.weight"):  # initialized to 0, which would hide what comes before it
            tensor.uniform_(0.5, 1.0)
    return model


def _save(model: Any, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture
def reference(config: dict[str, Any]) -> Any:
    return _reference(config)


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8))


@pytest.fixture
def task(images: Tensor) -> Task:
    return Task("animals", images, None, CLASSES, TEMPLATES)


def _normalized(images: Tensor) -> Tensor:
    """As torchvision's ToTensor and Normalize would, with OpenAI's statistics."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _visual(model: Any) -> dict[str, Tensor]:
    return {name: t for name, t in model.visual.state_dict().items() if t.is_floating_point()}


def _own_logits(model: Any, config: dict[str, Any], images: Tensor, prompts: list[str]) -> Tensor:
    """The logits of open_clip's own forward pass with one prompt a class."""
    tokens = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])(prompts)
    with torch.no_grad():
        logits = model.get_logits(_normalized(images), tokens)[0]
    assert isinstance(logits, Tensor)
    return logits


RESNET = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 64, "image_size": 32}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (OpenCLIP, {}),
        (OpenCLIP, {"quick_gelu": True}),
        (OpenCLIP, {"vision_cfg": RESNET}),
        (CustomTextCLIP, {"custom_text": True}),
        (CustomTextCLIP, {"custom_text": True, "init_logit_bias": -10.0}),
    ],
    ids=["vit", "quickgelu", "resnet", "custom-text", "siglip"],
)
def test_logits_equal_the_forward_pass_of_open_clip(
    tmp_path: Path, config: dict[str, Any], images: Tensor, kind: Any, changes: dict[str, Any]
) -> None:
    config = {**config, **changes}
    reference = _reference({k: v for k, v in config.items() if k != "custom_text"}, kind)
    model = CLIP(config, _save(reference, tmp_path / "model.safetensors"))
    prompts = [f"a photo of a {name}." for name in CLASSES]
    task = Task("animals", images, None, CLASSES, ("a photo of a {}.",))
    with torch.no_grad():
        found = model.logits(_visual(reference), images, task)
        assert found.std(dim=0).max() > 1e-2, "all images look the same to this model"
        torch.testing.assert_close(found, _own_logits(reference, config, images, prompts), rtol=1e-4, atol=1e-4)
        # and the weights of the call count, not those of the file
        other = _reference({k: v for k, v in config.items() if k != "custom_text"}, kind, seed=5)
        other_logits = model.logits(_visual(other), images, task)
    other.load_state_dict(
        {n: t for n, t in reference.state_dict().items() if not n.startswith("visual.")}, strict=False
    )
    expected = _own_logits(other, config, images, prompts)
    torch.testing.assert_close(other_logits, expected, rtol=1e-4, atol=1e-4)


def test_head_is_the_normalized_mean_over_templates_of_normalized_text_embeddings(
    tmp_path: Path, config: dict[str, Any], reference: Any, task: Task
) -> None:
    model = CLIP(config, _save(reference, tmp_path / "model.safetensors"))
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    rows = []
    for name in CLASSES:
        embedded = reference.encode_text(tokenizer([template.format(name) for template in TEMPLATES]))
        mean = (embedded / embedded.norm(dim=-1, keepdim=True)).mean(dim=0)
        rows.append(mean / mean.norm())
    head = model.head(task)
    torch.testing.assert_close(head, torch.stack(rows), rtol=1e-5, atol=1e-5)
    assert not head.requires_grad


def test_heads_are_computed_once_for_each_set_of_class_texts(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], task: Task
) -> None:
    model = CLIP(config, _reference(config).state_dict())
    embedded: list[tuple[str, ...]] = []
    compute = model._embed

    def recorded(texts: Any) -> Tensor:
        embedded.append(texts.classes)
        return compute(texts)

    monkeypatch.setattr(model, "_embed", recorded)
    first = model.head(task)
    assert model.head(task) is first
    model.release_text_tower()
    assert model.head(Task("same texts", task.inputs, None, CLASSES, TEMPLATES)) is first
    other = model.head(Task("other", task.inputs, None, CLASSES, TEMPLATES[:1]))
    assert not torch.equal(other, first)
    assert embedded == [CLASSES, CLASSES]


def test_given_heads_are_normalized_and_need_no_text_tower(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], clip_tasks: tuple[Task, Task], heads: dict[str, Tensor]
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the text tower was built")

    monkeypatch.setattr("mergesolve.objectives.clip.build_model", refuse)
    model = CLIP(config, heads={name: head.half() for name, head in heads.items()})
    for task in clip_tasks:
        expected = F.normalize(heads[task.name].half().float(), dim=-1)
        torch.testing.assert_close(model.head(task), expected)
        CrossEntropy(model, task).value_and_grad(model.base_weights())


def test_joint_tasks_are_classified_among_the_classes_of_all(
    clip: CLIP, clip_weights: dict[str, Tensor], clip_tasks: tuple[Task, Task]
) -> None:
    joined = joint(clip_tasks)
    for task, together, columns in zip(clip_tasks, joined, (slice(0, 3), slice(3, 8)), strict=True):
        assert together.classes == ("disc", "ring", "cross", *"01234")
        logits = clip.logits(clip_weights, together.batch(np.arange(4)), together)
        assert logits.shape == (4, 8)
        torch.testing.assert_close(logits[:, columns], clip.logits(clip_weights, task.batch(np.arange(4)), task))
        assert together.labels is not None
        assert task.labels is not None
        assert torch.equal(together.labels, task.labels + (columns.start or 0))
    assert CrossEntropy(clip, joined).value(clip_weights) > CrossEntropy(clip, clip_tasks).value(clip_weights)


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual."])
def test_weights_files_with_and_without_the_prefix_are_the_same_tower(
    tmp_path: Path, config: dict[str, Any], reference: Any, heads: dict[str, Tensor], prefix: str
) -> None:
    path = tmp_path / "visual.safetensors"
    save_file({prefix + name: tensor.clone() for name, tensor in _visual(reference).items()}, path)
    base = CLIP(config, path, heads).base_weights()
    assert set(base) == set(_visual(reference))
    for name, tensor in _visual(reference).items():
        assert torch.equal(base[name], tensor)


def test_weights_with_the_prefix_give_the_same_loss_and_gradients_under_their_own_names(
    clip: CLIP, clip_weights: dict[str, Tensor], clip_tasks: tuple[Task, Task]
) -> None:
    objective = CrossEntropy(clip, clip_tasks)
    plain = objective.value_and_grad(clip_weights)
    prefixed = objective.value_and_grad({f"visual.{name}": tensor for name, tensor in clip_weights.items()})
    assert prefixed.loss == plain.loss
    assert list(prefixed.gradient) == [f"visual.{name}" for name in clip_weights]
    for name, gradient in plain.gradient.items():
        assert gradient.any()
        assert torch.equal(prefixed.gradient[f"visual.{name}"], gradient)


def test_no_parameter_of_the_tower_is_held(config: dict[str, Any], heads: dict[str, Tensor], clip_tasks: Any) -> None:
    model = CLIP(config, heads=heads)
    CrossEntropy(model, clip_tasks).value_and_grad(model.base_weights())
    assert all(parameter.is_meta for parameter in model._tower.parameters())


def test_tensors_that_the_merge_leaves_out_come_from_the_weights_file(
    tmp_path: Path, config: dict[str, Any], reference: Any, task: Task
) -> None:
    model = CLIP(config, _save(reference, tmp_path / "model.safetensors"))
    weights = model.base_weights()
    whole = Entropy(model, task).value_and_grad(weights)
    left_out = ("positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    partial = Entropy(model, task).value_and_grad({n: t for n, t in weights.items() if n not in left_out})
    assert partial.loss == whole.loss
    assert set(whole.gradient) - set(partial.gradient) == set(left_out)


def test_running_statistics_follow_the_merge_and_stay_when_left_out(
    tmp_path: Path, config: dict[str, Any], task: Task
) -> None:
    reference = _reference({**config, "vision_cfg": RESNET})
    model = CLIP({**config, "vision_cfg": RESNET}, _save(reference, tmp_path / "model.safetensors"))
    weights = _visual(reference)
    statistics = [name for name in weights if "running" in name]
    assert statistics
    objective = Entropy(model, task)
    evaluation = objective.value_and_grad(weights)
    assert not any(evaluation.gradient[name].any() for name in statistics)
    without = {name: tensor for name, tensor in weights.items() if name not in statistics}
    assert objective.value(without) == evaluation.loss
    assert objective.value({**weights, statistics[0]: weights[statistics[0]] + 1}) != evaluation.loss


def test_torch_files_and_mappings_give_the_same_model_as_safetensors(
    tmp_path: Path, config: dict[str, Any], reference: Any, task: Task, images: Tensor
) -> None:
    state = reference.state_dict()
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, tmp_path / "model.pt")
    models = [CLIP(config, _save(reference, tmp_path / "m.safetensors")), CLIP(config, tmp_path / "model.pt")]
    models.append(CLIP(config, state))
    logits = [model.logits(model.base_weights(), images, task) for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_without_a_file_the_initialization_is_a_function_of_nothing(config: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first = CLIP(config)
    before = torch.get_rng_state()
    second = CLIP(config)
    assert torch.equal(torch.get_rng_state(), before), "building a model used up the caller's random numbers"
    torch.manual_seed(2)
    for name, tensor in first.base_weights().items():
        assert torch.equal(tensor, second.base_weights()[name])


def test_the_logit_scale_is_the_files_or_the_configurations(
    tmp_path: Path, config: dict[str, Any], reference: Any, heads: dict[str, Tensor]
) -> None:
    assert CLIP(config, _save(reference, tmp_path / "m.safetensors")).logit_scale.exp().item() == pytest.approx(30)
    assert CLIP({**config, "init_logit_scale": 2.0}, heads=heads).logit_scale.item() == pytest.approx(2.0)
    assert CLIP(config, heads=heads).logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_configurations_come_from_mappings_files_folders_and_names(
    tmp_path: Path, config: dict[str, Any], heads: dict[str, Tensor]
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    plain = CLIP(config, heads=heads).base_weights()
    for architecture in (tmp_path / "tiny.json", str(tmp_path / "tiny.json"), tmp_path, f"local-dir:{tmp_path}"):
        model = CLIP(architecture, heads=heads)
        assert all(torch.equal(plain[name], tensor) for name, tensor in model.base_weights().items())
    assert model.preprocess == {"image_size": (32, 32), "interpolation": "bicubic", "resize_mode": "squash"}
    # uint8 images are normalized with the configuration's own statistics
    pixels = model._pixels(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), torch.float32)
    assert pixels.unique().tolist() == [2.0]
    assert config["vision_cfg"] == {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}


def test_a_named_architecture_has_the_tower_of_open_clip_and_its_checkpoints_preprocessing() -> None:
    model = CLIP("RN50", heads={"t": torch.randn(2, 1024)})
    assert set(model.parameter_names) == {n for n, _ in open_clip.create_model("RN50").visual.named_parameters()}
    assert model.preprocess["image_size"] == (224, 224)
    from mergesolve.objectives.clip import read_config

    siglip = read_config("ViT-B-16-SigLIP")[1]
    assert siglip["mean"] == (0.5, 0.5, 0.5)
    assert siglip["resize_mode"] == "squash"


def test_towers_of_timm_and_coca_work(config: dict[str, Any], task: Task, images: Tensor) -> None:
    timm = {"timm_model_name": "test_vit2", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    coca = {**config["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    decoder = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
    large = Task("animals", images.repeat(1, 1, 2, 2), None, CLASSES)
    heads = {"animals": torch.randn(3, 16)}
    for changes, data in (
        ({"vision_cfg": timm, "custom_text": True}, large),
        ({"vision_cfg": coca, "custom_text": True, "multimodal_cfg": decoder}, task),
    ):
        model = CLIP({**config, **changes}, heads=heads)
        evaluation = Entropy(model, data).value_and_grad(model.base_weights())
        assert evaluation.loss > 0
        assert any(gradient.any() for gradient in evaluation.gradient.values())


def test_float_images_are_taken_as_normalized_already(clip: CLIP, clip_weights: Any, clip_tasks: Any) -> None:
    task = clip_tasks[0]
    pixels = task.batch(np.arange(4))
    torch.testing.assert_close(
        clip.logits(clip_weights, _normalized(pixels), task), clip.logits(clip_weights, pixels, task)
    )


def test_bf16_autocast_is_close_to_fp32_and_keeps_float32_weights_and_gradients(
    config: dict[str, Any], heads: dict[str, Tensor], clip_tasks: Any, clip_weights: Any
) -> None:
    full = CrossEntropy(CLIP(config, heads=heads), clip_tasks).value_and_grad(clip_weights)
    half = CrossEntropy(CLIP(config, heads=heads, precision="bf16"), clip_tasks).value_and_grad(clip_weights)
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    assert half.loss != full.loss
    dot = sum((full.gradient[n] * half.gradient[n]).sum() for n in full.gradient)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in e.gradient.values())) for e in (full, half)]
    assert dot / (norms[0] * norms[1]) > 0.98
    assert {gradient.dtype for gradient in half.gradient.values()} == {torch.float32}


def test_evaluation_before_training_leaves_heads_that_can_be_differentiated(
    config: dict[str, Any], reference: Any, tmp_path: Path, images: Tensor
) -> None:
    from mergesolve.objectives import evaluate

    model = CLIP(config, _save(reference, tmp_path / "m.safetensors"))
    task = Task("animals", images, torch.tensor([0, 1, 2, 0, 1, 2]), CLASSES)
    weights = {n: t for n, t in model.base_weights().items() if n != "class_embedding"}
    evaluate(model, weights, task)
    assert CrossEntropy(model, task).value_and_grad(weights).gradient["proj"].any()


def test_the_head_of_a_coca_model_needs_no_decoder(config: dict[str, Any], task: Task) -> None:
    from mergesolve.objectives.clip import build_model

    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    config |= {"custom_text": True, "multimodal_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1}}
    reference = build_model(config)
    state = {n: t for n, t in reference.state_dict().items() if not n.startswith("text_decoder.")}
    tokens = open_clip.SimpleTokenizer(context_length=16)([TEMPLATES[0].format(name) for name in CLASSES])
    head = CLIP(config, state).head(Task("t", task.inputs, None, CLASSES, TEMPLATES[:1]))
    torch.testing.assert_close(head, reference.encode_text(tokens, normalize=True))


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "ViT-B-33"}, r"unknown architecture 'ViT-B-33'\. Did you mean 'ViT-B-32'\? Known: .*'RN50'"),
        ({"architecture": {"embed_dim": 4}}, "the given configuration lacks 'vision_cfg', 'text_cfg'"),
        ({"precision": "fp8"}, r"unknown precision 'fp8'\..* Known: 'fp32', 'bf16'"),
        ({"heads": {"t": torch.ones(3, 7)}}, r"head of task 't' has shape \[3, 7\], expected \[classes, 16\]"),
        ({"heads": {"t": torch.ones(16)}}, r"head of task 't' has shape \[16\], expected \[classes, 16\]"),
        ({"weights": "nowhere.safetensors"}, "there is no file 'nowhere.safetensors'"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CLIP(**{"architecture": config, **arguments})


def test_a_field_that_open_clip_does_not_know_is_refused(config: dict[str, Any]) -> None:
    config["vision_cfg"]["depth"] = 3
    with pytest.raises(DataError, match=r"cannot build a visual tower .*'depth'.*CLIPVisionCfg"):
        CLIP(config)


def test_a_configuration_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read the configuration '.*broken.json'"):
        CLIP(tmp_path / "broken.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_absent_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="device 'cuda' was asked for and torch sees no CUDA GPU; use device='cpu'"):
        CLIP(config, device="cuda")


def test_heads_of_the_wrong_number_of_classes_are_refused(clip: CLIP, clip_tasks: tuple[Task, Task]) -> None:
    task = Task("shapes", clip_tasks[0].inputs, None, ("disc", "ring"))
    with pytest.raises(DataError, match="the head of task 'shapes' has 3 rows for 2 classes; give one row a class"):
        Entropy(clip, task)


def test_without_a_file_and_a_head_nothing_is_classified_by_a_random_text_tower(
    config: dict[str, Any], task: Task
) -> None:
    with pytest.raises(DataError, match=r"task 'animals' has no head, and without a weights file .* weights=FILE"):
        Entropy(CLIP(config), task)


def test_a_visual_file_without_heads_asks_for_one_of_both(
    tmp_path: Path, config: dict[str, Any], reference: Any, task: Task
) -> None:
    save_file(_visual(reference), tmp_path / "v.safetensors")
    model = CLIP(config, tmp_path / "v.safetensors")
    with pytest.raises(DataError, match=r"task 'animals' has no head, and .*v.safetensors has no text tower"):
        Entropy(model, task)


def test_a_file_of_another_architecture_is_refused(tmp_path: Path, config: dict[str, Any], reference: Any) -> None:
    path = _save(reference, tmp_path / "m.safetensors")
    deeper = {**config, "vision_cfg": {**config["vision_cfg"], "layers": 3}}
    with pytest.raises(DataError, match=r"m.safetensors lacks 'transformer.resblocks.2.ln_1.weight'.* and 7 more of"):
        CLIP(deeper, path)
    wider = {**config, "vision_cfg": {**config["vision_cfg"], "width": 48}}
    with pytest.raises(DataError, match=r"'class_embedding' has shape \[32\] in .*m.safetensors and \[48\] in"):
        CLIP(wider, path)
    no_text = {**config, "text_cfg": {**config["text_cfg"], "layers": 2}}
    with pytest.raises(DataError, match=r"m.safetensors lacks .*'transformer.resblocks.1.*text tower"):
        CLIP(no_text, path).head(Task("t", torch.zeros(1, 3, 32, 32), None, ("a",)))
    short = {**config, "text_cfg": {**config["text_cfg"], "context_length": 8}}
    with pytest.raises(DataError, match=r"m.safetensors does not fit the text tower"):
        CLIP(short, path).head(Task("t", torch.zeros(1, 3, 32, 32), None, ("a",)))


def test_weights_that_lack_or_add_tensors_are_refused(clip: CLIP, clip_weights: Any, clip_tasks: Any) -> None:
    objective = CrossEntropy(clip, clip_tasks)
    without = {n: t for n, t in clip_weights.items() if n != "proj"}
    with pytest.raises(DataError, match=r"needs 'proj', which the weights lack\. Give them in the weights, or build"):
        objective.value(without)
    with pytest.raises(DataError, match=r"has no 'logit_scale', which the weights have; .*exclude"):
        objective.value_and_grad({**clip_weights, "logit_scale": torch.zeros(())})
    with pytest.raises(DataError, match=r"'proj' has shape \[16, 32\] in the weights and \[32, 16\] in the model"):
        objective.value({**clip_weights, "proj": clip_weights["proj"].T})


def test_text_tensors_beside_prefixed_ones_are_not_taken_for_the_towers(
    clip: CLIP, clip_weights: Any, clip_tasks: Any
) -> None:
    whole = {f"visual.{name}": tensor for name, tensor in clip_weights.items()}
    whole["transformer.resblocks.0.ln_1.weight"] = torch.zeros(32)  # in the tower, too, by that name
    with pytest.raises(DataError, match=r"has no '\(text\) transformer.resblocks.0.ln_1.weight'.*exclude"):
        CrossEntropy(clip, clip_tasks).value(whole)


def test_images_of_another_size_are_refused(clip: CLIP, clip_weights: Any) -> None:
    for shape in ((4, 3, 28, 28), (4, 1, 32, 32), (4, 32, 32)):
        task = Task("shapes", torch.zeros(shape, dtype=torch.uint8), None, ("disc", "ring", "cross"))
        with pytest.raises(
            DataError, match=r"task 'shapes': images of shape .* takes \[3, 32, 32\].*image_size=\(32, 32\)"
        ):
            Entropy(clip, task).value(clip_weights)
