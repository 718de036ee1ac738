"""mergekit's YAML as a recipe of ours: the same merge, by mergekit's conventions, or one sentence that says why not.

    models: [{model: a, parameters: {weight: 0.5, density: 0.3}}, ...]        pool: {base, experts}
    merge_method: ties                                                   ->   method: {name: ties, densities, ...}
    parameters: {lambda: [{filter: self_attn, value: [0, 1]}, {value: 1}]}    overrides: [{match, method}, ...]

Filters and gradients become overrides: one for each combination of filters and each group of layers whose options are
its own. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .mergekit_methods import Inputs, Method, mergekit_method
from .mergekit_settings import Chain, branches_of, chain_of, classes, mapping, settings_of
from .names import UsageProblem, unknown
from .schema import found

FIELDS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

# As configurations call the number of layers, where there is one stack of them.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 1000
_REMEDY = "Name the base by a local folder with its config.json, or give values by filters ('.layers.3.') instead"


@dataclass(frozen=True)
class Model:
    """A model that is named in the file, with its own parameters."""

    path: str
    parameters: Mapping[str, Any]
    where: str


def from_mergekit(fields: Mapping[str, Any], where: str, *, folder: Path | None = None) -> dict[str, Any]:
    """Return the fields of our merge recipe for those of a mergekit YAML.

    `where` names the file in messages. Paths are relative to `folder` where they exist there, else to where we run.
    Raises UsageProblem for what mergekit would reject, and for methods and fields that we lack, with what to do.
    """
    for field in fields:
        if field not in FIELDS:
            raise unknown("field of a mergekit recipe", field, FIELDS, where=where)
    method = mergekit_method(fields.get("merge_method"), where)
    _check_rest(fields, where)
    models, levels, base, in_slices = _models(fields, where)
    inputs, listed = _inputs(method, models, base, in_slices, where)
    chains = _chains(method, inputs, listed, levels, where)
    gradients = any(isinstance(value, tuple) for chain in chains.values() for _, value in chain)
    layers = _layer_count(inputs.base, folder, where, "a gradient over layers") if gradients else 0
    if in_slices is not None:
        _check_range(in_slices, inputs.base, folder, where)
    entries = list(classes(chains, layers, lambda values: method.options(inputs, values), where))
    main = entries.pop()[1]
    while entries and entries[-1][1] == main:
        entries.pop()
    experts = {name: _placed(path, folder) for name, path in inputs.experts.items()}
    recipe: dict[str, Any] = {"method": main, "pool": {"base": _placed(inputs.base, folder), "experts": experts}}
    if entries:
        recipe["overrides"] = [{"match": pattern, "method": options, "optional": True} for pattern, options in entries]
    dtype = _dtype(fields, where)
    if dtype is not None:
        recipe["dtype"] = dtype
    return recipe


def _models(
    fields: Mapping[str, Any], where: str
) -> tuple[list[Model], list[Mapping[str, Any]], str | None, int | None]:
    """Return the models, the parameters of all of them by falling precedence, the base, and a slice's last layer."""
    top = settings_of(fields.get("parameters"), f"{where}: parameters")
    base = None if fields.get("base_model") is None else _reference(fields["base_model"], f"{where}: base_model")
    if fields.get("modules") is not None:
        raise UsageProblem(f"{where}: 'modules' are not here; merge whole models with 'models'.")
    if (fields.get("models") is None) == (fields.get("slices") is None):
        raise UsageProblem(f"{where}: expected 'models', or else 'slices' of one slice with all layers of each model.")
    if fields.get("models") is not None:
        return _listed(fields["models"], f"{where}: models", ("model", "parameters")), [top], base, None
    slices = fields["slices"]
    if not isinstance(slices, list) or len(slices) != 1:
        count = f"{len(slices)} of them" if isinstance(slices, list) else found(slices)
        raise UsageProblem(
            f"{where}: 'slices' must be a list of one slice, with all layers of each model; found {count}. "
            "Choosing and stacking layers makes another architecture, which we do not."
        )
    place = f"{where}: slices[0]"
    slice_ = mapping(slices[0], place, ("sources", "parameters", "base_model", "residual_weight"))
    if slice_.get("residual_weight") is not None:
        raise UsageProblem(f"{place}: 'residual_weight' is not here; leave it out.")
    if slice_.get("base_model") is not None:
        own = _reference(slice_["base_model"], f"{place}: base_model")
        if base not in (None, own):
            raise UsageProblem(f"{place}: base_model is '{own}', but '{base}' above; the merge has one base.")
        base = own
    models = _listed(slice_.get("sources"), f"{place}: sources", ("model", "layer_range", "parameters"))
    ends = set()
    for k, source in enumerate(slice_["sources"]):
        extent = source.get("layer_range")
        whole = isinstance(extent, list) and len(extent) == 2 and all(type(end) is int for end in extent)
        if not whole or extent[0] != 0 or extent[1] < 1:
            raise UsageProblem(
                f"{place}: sources[{k}]: layer_range must be [0, number of layers], all of them; "
                f"found {found(extent)}. We merge whole models; list them under 'models'."
            )
        ends.add(extent[1])
    if len(ends) > 1:
        raise UsageProblem(f"{place}: the layer_range of all sources must be the same; found ends {sorted(ends)}.")
    settings = settings_of(slice_.get("parameters"), f"{place}: parameters")
    return models, [settings, top], base, ends.pop()


def _listed(value: object, where: str, fields: tuple[str, ...]) -> list[Model]:
    if not isinstance(value, list) or not value:
        raise UsageProblem(f"{where} must be a list of models; found {found(value)}.")
    models: list[Model] = []
    for k, item in enumerate(value):
        place = f"{where}[{k}]"
        entry = mapping(item, place, fields)
        if entry.get("model") is None:
            raise UsageProblem(f"{place}: lacks 'model', the path or Hub id of a model.")
        path = _reference(entry["model"], f"{place}: model")
        if any(path == other.path for other in models):
            raise UsageProblem(f"{place}: '{path}' is listed twice; list it once, with the sum of its weights.")
        models.append(Model(path, settings_of(entry.get("parameters"), f"{place}: parameters"), place))
    return models


def _reference(value: object, where: str) -> str:
    """Return the path or Hub id of `path`, `id@revision`, {path, revision} or {model: any of these}."""
    if isinstance(value, Mapping):
        known = ("model", "path", "revision", "lora", "override_architecture")
        entry = mapping(value, where, known)
        if entry.get("lora") is not None:
            _refuse_lora(entry["lora"], where)
        if entry.get("override_architecture") is not None:
            raise UsageProblem(
                f"{where}: 'override_architecture' is not here: models are compared by the names of their tensors. "
                "Leave it out."
            )
        if isinstance(entry.get("model"), Mapping):
            inner = mapping(entry["model"], where, ("path", "revision"))
        elif entry.get("model") is not None:
            return _reference(entry["model"], where)
        else:
            inner = entry
        path = inner.get("path")
        if not isinstance(path, str) or not path:
            raise UsageProblem(f"{where}: expected a path or Hub id; found {found(path)}.")
        revision = inner.get("revision")
        if revision is not None and not isinstance(revision, str):
            raise UsageProblem(f"{where}: 'revision' must be text; found {found(revision)}.")
        return _reference(f"{path}@{revision}" if revision else path, where)
    if not isinstance(value, str) or not value.strip():
        raise UsageProblem(f"{where}: expected a path or Hub id; found {found(value)}.")
    if "+" in value:
        _refuse_lora(value, where)
    return value


def _refuse_lora(value: object, where: str) -> None:
    raise UsageProblem(
        f"{where}: {found(value)} adds a LoRA adapter, which we do not load. Merge the adapter into its model first "
        "(peft: merge_and_unload), save that, and name it here."
    )


def _inputs(
    method: Method, models: list[Model], base: str | None, in_slices: int | None, where: str
) -> tuple[Inputs, list[Model]]:
    """Return base and experts, and all models that have parameters."""
    named = base is not None
    listed = any(model.path == base for model in models)
    if base is None:
        if method.needs_base:
            raise UsageProblem(f"{where}: {method.name} needs 'base_model', from which the models were fine-tuned.")
        base, listed = models[0].path, True
    elif not listed and (in_slices is None or method.needs_base):
        models, listed = [*models, Model(base, {}, f"{where}: base_model")], True
    paths = [model.path for model in models if model.path != base]
    counted = listed and (method.base == "expert" or (method.base == "optional" and not named))
    if counted:
        paths = [base, *paths]
    low, high = method.experts
    if len(paths) < low or (high is not None and len(paths) > high):
        wanted = f"{'exactly' if low == high else 'at least'} {low} {'model' if low == 1 else 'models'}"
        beside = "the base included" if counted else f"beside the base, '{base}'"
        raise UsageProblem(f"{where}: {method.name} merges {wanted} ({beside}); found {len(paths)}.")
    names = distinct_names(paths)
    return Inputs(base, {names[path]: path for path in paths}, named, listed), models


def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a name for each path: the last part of it, and as many of the others as tell it from the rest.

    The order of the paths does not matter. No name is "base", which means θ0.
    """
    parts = {path: [part for part in PurePosixPath(path).parts if part != "/"] or ["model"] for path in paths}
    for found_parts in parts.values():
        if found_parts[-1].lower().endswith(WEIGHT_SUFFIXES):
            found_parts[-1] = PurePosixPath(found_parts[-1]).stem
    depth = dict.fromkeys(paths, 1)
    while True:
        names = {path: "-".join(parts[path][-depth[path] :]) for path in paths}
        taken = ["base", *names.values()]
        deeper = [path for path in paths if names[path] == "base" or taken.count(names[path]) > 1]
        deeper = [path for path in deeper if depth[path] < len(parts[path])]
        if not deeper:
            break
        for path in deeper:
            depth[path] += 1
    used = {"base"}
    for path in sorted(paths):
        name, count = names[path], 1
        while names[path] in used or (count > 1 and names[path] in taken):
            count += 1
            names[path] = f"{name}-{count}"
        used.add(names[path])
    return names


def _chains(
    method: Method, inputs: Inputs, models: list[Model], levels: list[Mapping[str, Any]], where: str
) -> dict[tuple[str, str | None], Chain]:
    """Return the branches of each parameter of the merge (None) and of each model, by its path."""
    _check_names(method, models, levels, where)
    chains: dict[tuple[str, str | None], Chain] = {}
    above = [(level, f"{where}: parameters") for level in levels]
    for parameter, default in method.shared.items():
        chains[parameter, None] = chain_of(parameter, above, default, where)
    for model in models:
        for parameter, default in method.per_model.items():
            scopes = [(model.parameters, f"{model.where}: parameters"), *above]
            if model.path in inputs.experts.values() or method.base == "weighed":
                chains[parameter, model.path] = chain_of(parameter, scopes, default, model.where)
            elif parameter in model.parameters:
                # The base has no task vector: its weight and density have no effect, but must be numbers.
                branches_of(parameter, model.parameters[parameter], f"{scopes[0][1]}: '{parameter}'")
    return chains


def _check_names(method: Method, models: list[Model], levels: list[Mapping[str, Any]], where: str) -> None:
    """Refuse parameters that the method does not have: mergekit would ignore them."""
    scopes = [(level, f"{where}: parameters", False) for level in levels]
    scopes += [(model.parameters, f"{model.where}: parameters", True) for model in models]
    valid = ", ".join((*method.per_model, *method.shared))
    for settings, place, own in scopes:
        for parameter in settings:
            if parameter == "int8_mask":
                # How masks are stored while mergekit works; the result is the same.
                branches_of(parameter, settings[parameter], f"{place}: 'int8_mask'")
            elif parameter not in method.per_model and parameter not in method.shared:
                raise UsageProblem(
                    f"{place}: '{parameter}' has no effect on {method.name}; leave it out. It has {valid or 'none'}."
                )
            elif own and parameter in method.shared:
                raise UsageProblem(
                    f"{place}: '{parameter}' belongs to the whole merge, not to a model; "
                    "put it under 'parameters' at the top."
                )


def _placed(path: str, folder: Path | None) -> str:
    """Return a path that lies in the recipe's folder as one from here; mergekit's own are relative to where it runs."""
    if folder is None or not (folder / path).exists():
        return path
    return os.path.normpath(folder / path)


def _configuration(model: str) -> Path:
    """Return where config.json of a folder is, or of a Hub id in the local cache; nothing is fetched."""
    local = Path(model) / "config.json"
    if not local.exists():
        with contextlib.suppress(ImportError, ValueError, OSError):
            from huggingface_hub import try_to_load_from_cache

            name, _, revision = model.partition("@")
            cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
            return Path(cached) if isinstance(cached, str) else local
    return local


def _layer_count(base: str, folder: Path | None, where: str, what: str) -> int:
    """Return the number of layers that the base's configuration says."""
    try:
        config = json.loads(_configuration(_placed(base, folder)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageProblem(
            f"{where}: {what} needs the number of layers, from config.json of the base; '{base}' is no local folder "
            f"with one, nor a Hub id that was fetched before. {_REMEDY}."
        ) from None
    config = config if isinstance(config, dict) else {}
    stacks = config.get("is_encoder_decoder") or any(
        isinstance(value, dict) and _count(value) for value in config.values()
    )
    count = _count(config)
    if stacks or count is None:
        raise UsageProblem(
            f"{where}: {what} needs one stack of layers; config.json of '{base}' "
            f"{'has several' if stacks else 'does not say how many it has (num_hidden_layers)'}. {_REMEDY}."
        )
    return count


def _count(config: Mapping[str, Any]) -> int | None:
    counts = (config.get(name) for name in LAYER_COUNTS)
    return next((count for count in counts if type(count) is int and 0 < count <= MOST_LAYERS), None)


def _check_range(end: int, base: str, folder: Path | None, where: str) -> None:
    count = _layer_count(base, folder, where, "a layer_range")
    if end != count:
        raise UsageProblem(
            f"{where}: slices[0]: layer_range is [0, {end}] of {count} layers; we merge whole models, "
            f"[0, {count}]: list them under 'models'."
        )


def _dtype(fields: Mapping[str, Any], where: str) -> str | None:
    """Return the element type that is written: out_dtype, else dtype."""
    chosen = None
    for field in ("dtype", "out_dtype"):
        value = fields.get(field)
        if value is None:
            continue
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in DTYPES:
            raise unknown(field, value, DTYPES, where=where)
        chosen = name
    return chosen


def _check_rest(fields: Mapping[str, Any], where: str) -> None:
    """Refuse what changes vocabularies and templates: tokenizer files are copied from the base as they are."""
    sources = {"tokenizer_source": fields.get("tokenizer_source")}
    if fields.get("tokenizer") is not None:
        tokenizer = mapping(fields["tokenizer"], f"{where}: tokenizer", ("source", "tokens", "pad_to_multiple_of"))
        sources["tokenizer: source"] = tokenizer.get("source")
        for field in ("tokens", "pad_to_multiple_of"):
            if tokenizer.get(field) is not None:
                raise UsageProblem(
                    f"{where}: tokenizer: '{field}' changes the vocabulary, which we do not; leave it out."
                )
    for field, source in sources.items():
        if source is not None and source not in ("base", fields.get("base_model")):
            raise UsageProblem(
                f"{where}: '{field}: {source}' is not here: the base's tokenizer files are copied, and all models must "
                "have its vocabulary. Write 'base', or leave it out."
            )
    if fields.get("chat_template") is not None:
        raise UsageProblem(
            f"{where}: 'chat_template' is not here: the base's tokenizer files are copied as they are. Leave it out, "
            "and set the template in the merged folder's tokenizer_config.json."
        )
    if fields.get("name") is not None and not isinstance(fields["name"], str):
        raise UsageProblem(f"{where}: 'name' must be text; found {found(fields['name'])}.")
