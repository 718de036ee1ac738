"""One closed-form merge of files by one tool, in this process, and what it took. Started by closed_form.py.

    python one_merge.py TOOL METHOD FOLDER COUNT [--write]

TOOL is "mergesolve", "mergekit" or "fusion_bench"; FOLDER holds base.safetensors, expert00.safetensors and so on. The
libraries are imported first and a toy merge loads what is loaded on first use; then CPU seconds and the peak of the
resident memory are those of reading the files and merging them into weights in memory, or with --write into a file.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from process import cpu_seconds, resident_bytes
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
SCALE, DENSITY, DROP = 0.3, 0.2, 0.5

OURS: dict[str, dict[str, Any]] = {
    "average": {"name": "average"},
    "task arithmetic": {"name": "task-arithmetic", "scale": SCALE},
    "TIES, per tensor": {"name": "ties", "density": DENSITY, "scale": SCALE, "trim": "tensor"},
    "TIES, whole model": {"name": "ties", "density": DENSITY, "scale": SCALE, "trim": "model"},
    "DARE": {"name": "dare", "density": 1 - DROP, "scale": SCALE, "seed": 0},
}
MERGEKIT: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {"lambda": SCALE}),
    "TIES, per tensor": ("ties", {"density": DENSITY, "lambda": SCALE}),
    "TIES, whole model": ("ties", {"density": DENSITY, "lambda": SCALE}),  # per tensor: it has no other
    "DARE": ("dare_linear", {"density": 1 - DROP, "lambda": SCALE}),
}


def by_mergesolve(method: str) -> Callable[[Path, list[Path], Path | None], None]:
    """Streamed by us, on as many threads as PyTorch was told."""
    from mergesolve.pools import Pool
    from mergesolve.solvers.closed_form import make_merge, merge_weights, write_merge

    def merge(base: Path, experts: list[Path], out: Path | None) -> None:
        pool = Pool.open(base=base, experts=experts, backend="streaming")
        if out is None:
            merge_weights(pool, make_merge(OURS[method]))
        else:
            write_merge(pool, make_merge(OURS[method]), out)

    return merge


def by_mergekit(method: str) -> Callable[[Path, list[Path], Path | None], None]:
    """merge_state_dicts of all checkpoints, which have to be in memory at once."""
    from mergekit.merge_methods.api import merge_state_dicts

    name, shared = MERGEKIT[method]

    def merge(base: Path, experts: list[Path], out: Path | None) -> None:
        models = {path.stem: load_file(path) for path in experts}
        per_expert = {key: [value] * len(experts) for key, value in shared.items() if key == "density"}
        parameters = {"weight": [1.0] * len(experts), **shared, **per_expert}
        with torch.no_grad():
            if name == "linear":
                merged = merge_state_dicts(models, name, parameters=parameters)
            else:
                merged = merge_state_dicts(
                    {"base": load_file(base), **models}, name, base="base", parameters=parameters
                )
        if out is not None:
            save_file(merged, out)

    return merge


def by_fusion_bench(method: str) -> Callable[[Path, list[Path], Path | None], None]:
    """The algorithm's `run` on a pool of modules, which have to be in memory at once."""
    from fusion_bench import BaseModelPool
    from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from fusion_bench.method.dare import DareTaskArithmetic

    algorithms: dict[str, Callable[[], Any]] = {
        "average": SimpleAverageAlgorithm,
        "task arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=SCALE),
        "TIES, whole model": lambda: TiesMergingAlgorithm(
            scaling_factor=SCALE, threshold=100 * DENSITY, remove_keys=[], merge_func="mean"
        ),
        "DARE": lambda: DareTaskArithmetic(
            scaling_factor=SCALE, sparsity_ratio=DROP, only_on_linear_weights=False, rescale=True
        ),
    }

    def merge(base: Path, experts: list[Path], out: Path | None) -> None:
        modules = {path.stem: as_module(load_file(path)) for path in experts}
        pool = BaseModelPool({"_pretrained_": as_module(load_file(base)), **modules})
        merged = algorithms[method]().run(pool)
        if out is not None:
            save_file({name: value.detach().contiguous() for name, value in merged.state_dict().items()}, out)

    return merge


def as_module(tensors: Tensors) -> torch.nn.Module:
    """A tree of modules with these parameters under these names; nothing is copied."""
    root = torch.nn.Module()
    for name, value in tensors.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, torch.nn.Parameter(value))
    return root


TOOLS = {"mergesolve": by_mergesolve, "mergekit": by_mergekit, "fusion_bench": by_fusion_bench}


def main(tool: str, method: str, folder: Path, count: int, write: bool) -> dict[str, float]:
    """Measure one merge; on Linux, be the first that the kernel ends when memory runs out."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
    merge = TOOLS[tool](method)
    with tempfile.TemporaryDirectory() as toys:
        paths = [Path(toys) / f"{name}.safetensors" for name in ("base", "expert00", "expert01")]
        for seed, path in enumerate(paths):
            generator = torch.Generator().manual_seed(seed)
            save_file({"layer.weight": torch.randn(8, 8, generator=generator)}, path)
        merge(paths[0], paths[1:], None)
    gc.collect()  # what the imports left, which the collector would count as the merge's
    out = folder / f"merged-{tool}.safetensors" if write else None
    before, began, cpu = resident_bytes(), time.perf_counter(), cpu_seconds()
    merge(folder / "base.safetensors", [folder / f"expert{i:02d}.safetensors" for i in range(count)], out)
    found = {
        "cpu": cpu_seconds() - cpu,
        "seconds": time.perf_counter() - began,
        "libraries": before,
        "peak": resident_bytes(peak=True),
    }
    if out is not None:
        out.unlink()
    return found


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    print(
        "\n"
        + json.dumps(main(arguments[0], arguments[1], Path(arguments[2]), int(arguments[3]), "--write" in sys.argv))
    )
