"""Small models on which we and the peers must agree, and what "equal to rounding" means.

The peers are imported inside fixtures only: where they are missing, the tests are collected and skipped.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form import make_merge, merge_weights

Weights = dict[str, torch.Tensor]
EXPERTS = ("first", "second", "third", "fourth")
SHAPES = {
    "embed.weight": (24, 16),
    "block.attention.weight": (16, 16),
    "block.attention.bias": (16,),
    "block.mlp.weight": (40, 16),
    "patch.weight": (8, 3, 2, 2),
    "norm.weight": (16,),
    "temperature": (1,),
    "scalar": (),
}
ULP = 2.0**-23


def random_models(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> tuple[Weights, dict[str, Weights]]:
    """A base and four experts in float32: task vectors of a tenth of the weights, entries that cancel or are 0.

    Values are multiples of 2⁻²⁰ below 16, so that differences are exact, and a + b + (−a) + (−b) is 0 in any order.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale * 2**20).round() / 2**20

    base = {name: draw(shape, 1.0) for name, shape in shapes.items()}
    tau = {expert: {name: draw(shape, 0.1) for name, shape in shapes.items()} for expert in EXPERTS}
    for name, shape in shapes.items():
        if len(shape) >= 2:
            cancelling = draw((2, 5), 0.5)
            for values, expert in zip(
                (cancelling[0], cancelling[1], -cancelling[0], -cancelling[1]), EXPERTS, strict=True
            ):
                flat = tau[expert][name].view(-1)
                flat[:5] = values
                flat[5:9] = 0.0
            tau["second"][name].view(-1)[9:14] = 0.0
    return base, {expert: {name: base[name] + tau[expert][name] for name in shapes} for expert in EXPERTS}


@pytest.fixture
def models() -> tuple[Weights, dict[str, Weights]]:
    """A base and four experts."""
    return random_models()


@pytest.fixture
def ours() -> Callable[..., Weights]:
    """ours(base, experts, method, **options): our merge of models in memory."""

    def merge(base: Weights, experts: Mapping[str, Weights], method: str, **options: object) -> Weights:
        return merge_weights(Pool.from_state_dicts(base, experts), make_merge({"name": method, **options}))

    return merge


@pytest.fixture
def assert_equal() -> Callable[..., None]:
    """assert_equal(found, expected, ulps=8): the same to that many float32 ulps of the largest value of each tensor.

    Tensors that we do not merge (identical in all models) are left out.
    """

    def check(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], ulps: float = 8) -> None:
        assert found
        for name, value in found.items():
            want = expected[name].detach()
            assert value.shape == want.shape
            off = (value.double() - want.double()).abs().max().item()
            allowed = ulps * ULP * max(want.abs().max().item(), 2**-126)
            assert off <= allowed, f"{name}: off by {off:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """record("bernoulli"): within the context, every result of that function of torch is kept, in order."""

    @contextmanager
    def recording(name: str) -> Iterator[list[torch.Tensor]]:
        original = getattr(torch, name)
        drawn: list[torch.Tensor] = []

        def keeping(*args: object, **kwargs: object) -> torch.Tensor:
            drawn.append(original(*args, **kwargs))
            return drawn[-1].clone()

        with monkeypatch.context() as patch:
            patch.setattr(torch, name, keeping)
            yield drawn

    return recording


@pytest.fixture
def use_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Mapping[tuple[str, str], torch.Tensor]], None]:
    """use_masks(module, {(expert, tensor): mask}): our random transform keeps what the masks say.

    A random word of 0 is kept by every probability but 0, the largest word by none but 1.
    """

    def install(module: str, masks: Mapping[tuple[str, str], torch.Tensor]) -> None:
        def words(seed: int, expert: str, name: str, start: int, stop: int) -> np.ndarray:
            kept = masks[expert, name].reshape(-1)[start:stop].bool().numpy()
            return np.where(kept, 0, 2**32 - 1).astype(np.uint32)

        monkeypatch.setattr(f"mergesolve.pools.transforms.{module}.random_words", words)

    return install
