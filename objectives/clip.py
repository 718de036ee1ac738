"""CLIP as a classifier whose visual tower is merged: logits = exp(s) · normalize(visual(x)) @ headᵀ (+ bias).

The head is frozen: row c is the normalized mean over the task's templates of the normalized text embeddings of class c
(Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, section 3.1.4). Every
architecture of open_clip works, by its name or as a configuration in the form of open_clip's JSON files.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .errors import DataError, nearest, some
from .models import Weights, check_weights
from .statefile import StateFile
from .task import ClassTexts, Task

PREFIX = "visual."
SCALARS = ("logit_scale", "logit_bias")
PRECISIONS = ("fp32", "bf16")
# OpenAI's statistics, which open_clip falls back on, too, where a configuration does not say how to normalize images.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP:
    """A CLIP classifier as a function of its visual tower's weights.

    architecture: a name that open_clip knows ('ViT-B-32'; for OpenAI's checkpoints 'ViT-B-32-quickgelu'), the path of a
        JSON configuration or of a folder with an `open_clip_config.json`, or the configuration as a mapping: embed_dim,
        vision_cfg, text_cfg, and whatever else open_clip's constructor takes (init_logit_scale, quick_gelu, ...), on
        its own or under 'model_cfg' beside a 'preprocess_cfg' with mean, std, interpolation and resize_mode.
    weights: a local file (.safetensors, or a torch file of tensors) or a mapping of tensors: the whole model, or only
        its visual tower, with or without the "visual." prefix. It gives the text tower and the logit scale, and the
        tensors of the visual tower that merged weights leave out. Without it the heads have to be given, the weights
        have to be complete, and `base_weights` is open_clip's initialization from seed 0.
    heads: task name -> [C, d], for tasks whose head is known; the text tower is then never built for them.
    precision: 'fp32', or 'bf16' for autocast (weights, gradients and losses stay float32).

    The tower's names carry no "visual." prefix; weights that do are understood. No parameter is held here: they live on
    the meta device, and each call computes with the weights that it is given.
    Raises DataError for an architecture that is not known, and for heads or files that do not fit it.
    """

    def __init__(
        self,
        architecture: str | Path | Mapping[str, Any],
        weights: str | Path | Mapping[str, Tensor] | None = None,
        heads: Mapping[str, Tensor] | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise DataError(f"CLIP: unknown precision {precision!r}.{nearest(str(precision), PRECISIONS)}")
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DataError(f"CLIP: device {str(device)!r} was asked for and torch sees no CUDA GPU; use device='cpu'.")
        self.precision = precision
        self.architecture = architecture if isinstance(architecture, Mapping) else str(architecture)
        self._config, preprocess = read_config(architecture)
        self._source = None if weights is None else StateFile(weights)
        self._tower = self._build_tower()
        self.parameter_names = tuple(name for name, _ in self._tower.named_parameters())
        self._parameters = frozenset(self.parameter_names)
        tensors = {**dict(self._tower.named_parameters()), **dict(self._tower.named_buffers())}
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.image_size = _pair(getattr(self._tower, "image_size", self._config["vision_cfg"].get("image_size", 224)))
        self._mean = torch.tensor(preprocess.get("mean", MEAN), device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess.get("std", STD), device=self.device).view(1, 3, 1, 1)
        self.preprocess: dict[str, Any] = {
            "image_size": self.image_size,
            "interpolation": preprocess.get("interpolation", "bicubic"),
            "resize_mode": preprocess.get("resize_mode", "shortest"),
        }
        self._check_source()
        self._own: Weights = {}
        self._release_parameters()
        scale, bias = self._scalars()
        self.logit_scale, self.logit_bias = scale, bias
        self._text: nn.Module | None = None
        self._tokenizer: Any = None
        self._cache: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}
        self._heads = {name: self._checked_head(name, head) for name, head in (heads or {}).items()}

    # -- the visual tower --------------------------------------------------------------------------------------------

    def _build_tower(self) -> nn.Module:
        from open_clip.model import _build_vision_tower

        try:
            with _seeded():
                tower = _build_vision_tower(
                    self._config["embed_dim"], self._config["vision_cfg"], self._config.get("quick_gelu", False)
                )
        except (TypeError, AssertionError, ValueError) as error:
            raise DataError(
                f"CLIP: open_clip cannot build a visual tower from vision_cfg {self._config['vision_cfg']}: {error}. "
                f"Its fields are those of open_clip.model.CLIPVisionCfg."
            ) from error
        assert isinstance(tower, nn.Module)
        return tower.eval().requires_grad_(False)

    def _release_parameters(self) -> None:
        """Parameters to the meta device: they are always given from outside. Buffers stay, on the model's device."""
        buffers = self._read([name for name, _ in self._tower.named_buffers()])
        for module in self._tower.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        for path, module in self._tower.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                value = buffers.get(f"{path}.{name}" if path else name, buffer)
                setattr(module, name, value.to(self.device, dtype=buffer.dtype))

    def _file_name(self, name: str) -> str | None:
        """The name of a tensor of the tower in the weights file; None where the file lacks it."""
        if self._source is None:
            return None
        # In a whole model, "transformer.resblocks.0..." is the text tower's and "visual.transformer..." is this one's.
        name = PREFIX + name if _prefixed(self._source.shapes) else name
        return name if name in self._source.shapes else None

    def _check_source(self) -> None:
        if self._source is None:
            return
        missing = [name for name in self.parameter_names if self._file_name(name) is None]
        if missing:
            raise DataError(
                f"CLIP: {self._source} lacks {some(missing)} of the visual tower of {self._label}; it has "
                f"{some(self._source.shapes)}. Give the file of this architecture, in open_clip's names."
            )
        for name in self.parameter_names:
            found = self._source.shapes[str(self._file_name(name))]
            if found != self._shapes[name]:
                raise DataError(
                    f"CLIP: {name!r} has shape {list(found)} in {self._source} and {list(self._shapes[name])} in "
                    f"{self._label}; the file is of another architecture."
                )

    def _read(self, names: Sequence[str]) -> Weights:
        """Tensors of the tower from the weights file, float32 where floating; those that it lacks are left out."""
        if self._source is None:
            return {}
        found = {name: file_name for name in names if (file_name := self._file_name(name)) is not None}
        tensors = self._source.read(found.values())
        return {name: tensors[file_name] for name, file_name in found.items()}

    @property
    def _label(self) -> str:
        return f"open_clip {self.architecture!r}" if isinstance(self.architecture, str) else "the given configuration"

    def base_weights(self) -> Weights:
        """The tower's own weights, float32, on the CPU: those of the weights file, or else the initialization."""
        if self._source is None:
            tower = self._build_tower()
            return {name: t.detach() for name, t in tower.state_dict().items() if t.is_floating_point()}
        names = [name for name in self._tower.state_dict() if self._file_name(name) is not None]
        return {name: tensor for name, tensor in self._read(names).items() if tensor.is_floating_point()}

    def differentiable(self, name: str) -> bool:
        """Whether a tensor of the weights is a parameter; running statistics follow the merge without a gradient."""
        return name.removeprefix(PREFIX) in self._parameters

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise DataError unless the weights are tensors of the tower, and all those that the model has no file for."""
        canonical = self._canonical_names(weights)
        known = self.parameter_names if self._source is None else ()
        remedy = "Give them in the weights, or build the model with the weights file that they come from."
        check_weights(canonical, self._shapes, known, f"CLIP ({self._label})", remedy)

    def features(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Normalized image embeddings [B, d], differentiable in the weights."""
        tensors = self._canonical_names(weights)
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        tensors.update(self._left_out(tensors, dtype))
        pixels = self._pixels(images, dtype)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            output = functional_call(self._tower, tensors, (pixels,))
        # Some towers (CoCa's) return the pooled embedding together with the tokens.
        pooled = output[0] if isinstance(output, tuple) else output
        return F.normalize(pooled.to(dtype), dim=-1)

    def check_images(self, images: Tensor, task: Task) -> None:
        """Raise DataError unless these images of the task have the tower's size."""
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise DataError(
                f"task {task.name!r}: images of shape {list(images.shape[1:])}, and {self._label} takes "
                f"[3, {height}, {width}]; build the task with image_size=({height}, {width})."
            )

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: Task) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W] (uint8, or floats that are already normalized)."""
        self.check_images(inputs, task)
        features = self.features(weights, inputs)
        logits = self.logit_scale.to(features.dtype).exp() * features @ self.head(task).to(features.dtype).T
        return logits if self.logit_bias is None else logits + self.logit_bias.to(features.dtype)

    @staticmethod
    def _canonical_names(weights: Mapping[str, Tensor]) -> Weights:
        """The weights by the tower's names. Where some names have the prefix, those without it are the text tower's
        (which may look like the visual tower's): they keep a name that no tower has, and `check` refuses them."""
        if not _prefixed(weights):
            return dict(weights)
        return {n.removeprefix(PREFIX) if n.startswith(PREFIX) else f"(text) {n}": t for n, t in weights.items()}

    def _left_out(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Weights:
        """The tower's own parameters that the weights do not hold (they were equal in all models, or excluded)."""
        missing = [name for name in self.parameter_names if name not in weights]
        unread = [name for name in missing if name not in self._own]
        if unread:
            with torch.inference_mode(False):  # kept for later calls, which may differentiate
                self._own.update({name: t.to(self.device) for name, t in self._read(unread).items()})
        return {name: self._own[name].to(dtype) for name in missing}

    def _pixels(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        images = images.to(self.device)
        if images.dtype != torch.uint8:
            return images.to(dtype)
        return (images.to(dtype).div_(255).sub_(self._mean)).div_(self._std)

    # -- the heads ---------------------------------------------------------------------------------------------------

    @property
    def _embedding_size(self) -> int:
        return int(self._config["embed_dim"])

    def _checked_head(self, name: str, head: Tensor) -> Tensor:
        if head.ndim != 2 or head.shape[1] != self._embedding_size:
            raise DataError(
                f"CLIP: the head of task {name!r} has shape {list(head.shape)}, expected [classes, "
                f"{self._embedding_size}], the embedding of {self._label}."
            )
        return F.normalize(head.detach().to(self.device, torch.float32), dim=-1)

    def head(self, task: Task) -> Tensor:
        """The task's head [C, d], float32 rows of norm 1: the given one of its name, or the mean of its class texts."""
        if len(task.texts) > 1:
            return torch.cat([self._head_of(texts) for texts in task.texts])
        return self._head_of(task.texts[0])

    def _head_of(self, texts: ClassTexts) -> Tensor:
        given = self._heads.get(texts.name)
        if given is not None:
            if len(given) != len(texts.classes):
                raise DataError(
                    f"CLIP: the head of task {texts.name!r} has {len(given)} rows for {len(texts.classes)} classes; "
                    f"give one row a class, in the order of the classes."
                )
            return given
        key = (texts.classes, texts.templates)
        if key not in self._cache:
            self._cache[key] = self._embed(texts)
        return self._cache[key]

    def check_task(self, task: Task) -> None:
        """Raise DataError unless the task has a head (computed here where it was not given)."""
        self.head(task)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _embed(self, texts: ClassTexts) -> Tensor:
        text, tokenizer = self._text_tower(texts.name)
        total = torch.zeros(len(texts.classes), self._embedding_size, device=self.device)
        for template in texts.templates:
            prompts = [template.replace("{}", name) for name in texts.classes]
            for start in range(0, len(prompts), 256):
                tokens = tokenizer(prompts[start : start + 256]).to(self.device)
                total[start : start + 256] += text.encode_text(tokens, normalize=True)
        return F.normalize(total, dim=-1)

    def _text_tower(self, task_name: str) -> tuple[Any, Any]:
        if self._text is None:
            self._text = self._build_text_tower(task_name)
            self._tokenizer = _tokenizer(self.architecture, self._config)
        return self._text, self._tokenizer

    def _build_text_tower(self, task_name: str) -> nn.Module:
        if self._source is None:
            raise DataError(
                f"CLIP: task {task_name!r} has no head, and without a weights file the text tower would be random; "
                f"build "
                f"the model with weights=FILE, or with heads={{{task_name!r}: tensor [C, {self._embedding_size}]}}."
            )
        if not self._text_names():
            raise DataError(
                f"CLIP: task {task_name!r} has no head, and {self._source} has no text tower to compute it from; "
                f"give the whole model's file, or the head: heads={{{task_name!r}: tensor [C, "
                f"{self._embedding_size}]}}."
            )
        from open_clip.model import convert_to_custom_text_state_dict

        model = build_model(self._config)
        model.visual = nn.Identity()
        state = self._source.read(self._text_names())
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)  # the text tower's names before it had a module of its own
        # Captions are not written here, so CoCa's decoder is not needed.
        wanted = {n for n in model.state_dict() if n not in SCALARS and not n.startswith("text_decoder.")}
        missing = sorted(wanted - set(state))
        if missing:
            raise DataError(
                f"CLIP: {self._source} lacks {some(missing)} of the text tower of {self._label}, which the head of "
                f"task {task_name!r} needs; give the whole model's file, or the head."
            )
        try:
            model.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted}, strict=False)
        except RuntimeError as error:
            raise DataError(f"CLIP: {self._source} does not fit the text tower of {self._label}: {error}") from error
        text: nn.Module = model.to(self.device)
        return text

    def _text_names(self) -> list[str]:
        """Names in the weights file that belong to neither the visual tower nor the logit scale."""
        assert self._source is not None
        tower = set() if _prefixed(self._source.shapes) else set(self._shapes)
        return [n for n in self._source.shapes if not n.startswith(PREFIX) and n not in tower and n not in SCALARS]

    def release_text_tower(self) -> None:
        """Free the text tower; heads that were computed stay, and it is built again when another one is asked for."""
        self._text = self._tokenizer = None

    def _scalars(self) -> tuple[Tensor, Tensor | None]:
        """Logit scale (a logarithm) and bias: the file's, or what the configuration starts from."""
        found: Weights = {}
        if self._source is not None:
            found = self._source.read(n for n in SCALARS if n in self._source.shapes)
        start = self._config.get("init_logit_scale", math.log(1 / 0.07))
        scale = found.get("logit_scale", torch.tensor(float(start)))
        bias = self._config.get("init_logit_bias")
        offset = found.get("logit_bias", None if bias is None else torch.tensor(float(bias)))
        return scale.reshape(()).to(self.device), None if offset is None else offset.reshape(()).to(self.device)

    def describe(self) -> dict[str, Any]:
        """Architecture, file and precision, for the record of a run."""
        architecture = self.architecture if isinstance(self.architecture, str) else dict(self.architecture)
        weights = None if self._source is None else str(self._source)
        return {"model": "CLIP", "architecture": architecture, "weights": weights, "precision": self.precision}


def read_config(architecture: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's configuration and how its images are prepared, from a name, a JSON file, a folder or a mapping."""
    import open_clip

    if isinstance(architecture, Mapping):
        loaded, label = deepcopy(dict(architecture)), "the given configuration"
    else:
        path = Path(str(architecture).removeprefix("local-dir:"))
        path = path / "open_clip_config.json" if path.is_dir() else path
        label = f"open_clip {str(architecture)!r}"
        if path.suffix == ".json" or path.is_file():
            try:
                loaded = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"CLIP: cannot read the configuration {str(path)!r}: {error}.") from error
        else:
            name = str(architecture).replace("/", "-")
            known = open_clip.list_models()
            if name not in known:
                raise DataError(
                    f"CLIP: unknown architecture {str(architecture)!r}.{nearest(name, known)} "
                    f"Or give a configuration: a mapping, a JSON file, or a folder with an open_clip_config.json."
                )
            loaded = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": _usual_preprocessing(name)}
    config = loaded.get("model_cfg", loaded)
    preprocess = loaded.get("preprocess_cfg", {})
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise DataError(
            f"CLIP: {label} lacks {some(missing)}; a configuration has embed_dim, vision_cfg and text_cfg, as "
            f"open_clip's model configuration files do."
        )
    for tower, pretrained in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        config[tower] = dict(config[tower])
        if pretrained.replace("_pretrained", "_name") in config[tower]:
            config[tower][pretrained] = False  # weights come from the file that the user names, never from a download
    return dict(config), dict(preprocess)


def _usual_preprocessing(name: str) -> dict[str, Any]:
    """How all of open_clip's own checkpoints of this architecture prepare images; what they disagree on is left out."""
    import open_clip

    keys = ("mean", "std", "interpolation", "resize_mode")
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    agreed = {}
    for key in keys:
        values = {tag.get(key) for tag in tags}
        if len(values) == 1 and None not in values:
            agreed[key] = values.pop()
    return agreed


def build_model(config: Mapping[str, Any]) -> Any:
    """open_clip's model class of a configuration, initialized from seed 0, in eval mode and without gradients."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP as PlainCLIP
    from open_clip.model import CustomTextCLIP

    options = deepcopy(dict(config))
    custom = options.pop("custom_text", False) or "hf_model_name" in options["text_cfg"]
    kind: Any = (CoCa if "multimodal_cfg" in options else CustomTextCLIP) if custom else PlainCLIP
    with _seeded():
        try:
            return kind(**options).eval().requires_grad_(False)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            raise DataError(f"CLIP: open_clip cannot build the model of this configuration: {error}.") from error


def _tokenizer(architecture: str | Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if isinstance(architecture, str) and architecture.replace("/", "-") in open_clip.list_models():
        return open_clip.get_tokenizer(architecture.replace("/", "-"))
    text = config["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if text.get("hf_tokenizer_name"):
        return HFTokenizer(text["hf_tokenizer_name"], tokenizer_mode=text.get("tokenizer_mode"), **options)
    return SimpleTokenizer(**options)


def _prefixed(names: Iterable[str]) -> bool:
    return any(name.startswith(PREFIX) for name in names)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Initialize from seed 0 and leave the caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
