"""What the benchmarks share: medians of repeated timings, memory of a process, synthetic pools of ViT-B/32 towers."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergesolve.objectives import CLIP, Task
from safetensors.torch import save_file

Architecture = str | Mapping[str, Any]


def seconds(*calls: tuple[Any, ...], repeats: int) -> list[float]:
    """The median time in seconds of each call (function, *arguments).

    The calls take turns, so that a disturbance of the machine meets all of them. The first round is not counted.
    """
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for (function, *args), mine in zip(calls, times, strict=True):
            gc.collect()
            began = time.perf_counter()
            function(*args)
            if repeat:
                mine.append(time.perf_counter() - began)
    return [statistics.median(mine) for mine in times]


def machine() -> dict[str, Any]:
    """The kind of machine, as far as it explains a number."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GiB": round(memory, 1),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device",
    }


VIT_B_32 = "ViT-B-32"
SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def classifier(architecture: Architecture, classes: int = 10) -> CLIP:
    """A CLIP of this architecture with a random head for the task "images", so that no text tower is built."""
    width = 512 if architecture == VIT_B_32 else SMALL["embed_dim"]
    head = torch.nn.functional.normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(0)), dim=1)
    return CLIP(architecture, heads={"images": head})


def images(model: CLIP, n: int, classes: int = 10) -> Task:
    """A task of n random images with random labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, *model.image_size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return Task("images", pixels, labels, tuple(f"class {c}" for c in range(classes)))


class Towers:
    """A base and as many experts as are asked for, written to a folder when they are first needed.

    An expert is the base plus independent noise of 1% of each tensor's root mean square: what a merge costs does not
    depend on the values.
    """

    def __init__(self, folder: Path, architecture: Architecture = VIT_B_32, seed: int = 0) -> None:
        self.folder, self.architecture, self.seed = folder, architecture, seed
        self._base = CLIP(architecture).base_weights()
        self.bytes = sum(value.numel() * value.element_size() for value in self._base.values())
        self.base = folder / "base.safetensors"
        self._write(self.base, self._base)

    def experts(self, n: int) -> dict[str, Path]:
        """The first n experts, by name. Raises OSError when the disk has no room for those that are still missing."""
        paths = {f"expert{i:02d}": self.folder / f"expert{i:02d}.safetensors" for i in range(n)}
        missing = {name: path for name, path in paths.items() if not path.exists()}
        needed, free = len(missing) * self.bytes, shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise OSError(
                f"{n} experts need {needed / 1e9:.1f} GB more in {self.folder}, which has {free / 1e9:.1f} GB free; "
                "name a folder on a larger disk with --folder"
            )
        for done, (name, path) in enumerate(missing.items(), 1):
            say(f"writing expert {done} of {len(missing)} ({self.bytes / 1e6:.0f} MB each)")
            generator = torch.Generator().manual_seed(self.seed + 1 + int(name.removeprefix("expert")))
            self._write(path, {key: self._noisy(value, generator) for key, value in self._base.items()})
        say("")
        return paths

    @staticmethod
    def _noisy(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        scale = 0.01 * float(value.square().mean().sqrt())
        return value + torch.randn(value.shape, generator=generator) * max(scale, 1e-4)

    @staticmethod
    def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Writes and waits for the disk, so that no write-back runs beside a timing."""
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def towers(folder: Path | None, architecture: Architecture = VIT_B_32) -> Iterator[Towers]:
    """Synthetic towers in a new temporary folder (inside ``folder`` if given), removed afterwards, also on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="mergesolve-bench-", dir=folder) as made:
        yield Towers(Path(made), architecture)


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, the figures, and the target if there is one."""

    what: str
    figures: dict[str, str]
    value: float
    target: str = ""
    met: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


def show(title: str, rows: list[Row]) -> str:
    """The rows as a Markdown table, which is also readable in a terminal."""
    columns = list(dict.fromkeys(key for row in rows for key in row.figures))
    lines = [["", *columns, "target"]]
    for row in rows:
        verdict = row.target if row.met is None else f"{row.target} ({'met' if row.met else 'missed'})"
        lines.append([row.what, *(row.figures.get(column, "") for column in columns), verdict])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"{title}\n\n" + "\n".join(text) + "\n"


def say(text: str) -> None:
    """A line of progress that the next one overwrites; silent where standard error is a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--folder", type=Path, help="where the synthetic checkpoints go; default: the system's temporary folder"
    )
    parser.add_argument(
        "--small",
        dest="architecture",
        action="store_const",
        const=SMALL,
        default=VIT_B_32,
        help="a toy tower instead of ViT-B/32: does the benchmark run at all?",
    )
    return parser


def random_gradient(shapes: dict[str, tuple[int, ...]], seed: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A gradient of the given shapes."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}


def random_coefficients(rows: int, n: int, seed: int = 0) -> np.ndarray:
    """A point in the interior of the simplex for each row, [rows, n]."""
    return np.random.default_rng(seed).dirichlet(np.ones(n), size=rows)
