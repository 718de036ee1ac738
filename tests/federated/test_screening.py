from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError, Reply
from mergesolve.federated.screening import REASONS, Screened, Screening, screen
from safetensors.torch import save_file
from torch import Tensor


def screened(anchor: Any, replies: Any, **options: Any) -> Screened:
    return screen(anchor, replies, **{"number": 1, "options": Screening(), **options})


def reasons(found: Screened) -> dict[str, str]:
    return {rejection.client: rejection.reason for rejection in found.rejected}


def changed(reply: Reply, **tensors: Tensor) -> Reply:
    assert isinstance(reply.weights, dict)
    names = {"weight": "a.weight", "bias": "a.bias", "count": "count"}
    return dataclasses.replace(reply, weights={**reply.weights, **{names[k]: t for k, t in tensors.items()}})


def without(reply: Reply, name: str) -> Reply:
    assert isinstance(reply.weights, dict)
    return dataclasses.replace(reply, weights={n: t for n, t in reply.weights.items() if n != name})


def moved(anchor: Any, reply: Reply, factor: float) -> Reply:
    """The same reply with its update times a factor."""
    assert isinstance(reply.weights, dict)
    weights = {
        n: anchor[n] + factor * (t - anchor[n]) if t.is_floating_point() else t for n, t in reply.weights.items()
    }
    return dataclasses.replace(reply, weights=weights)


def bad(anchor: Any, reply: Reply, tmp_path: Path) -> dict[str, list[Reply]]:
    """Replies of one client that are left out for each reason, but for those that need two replies."""
    assert isinstance(reply.weights, dict)
    nan, infinite = reply.weights["a.bias"].clone(), reply.weights["a.weight"].clone()
    nan[2], infinite[0, 0] = torch.nan, -torch.inf
    cut = tmp_path / "cut.safetensors"
    save_file(reply.weights, cut)
    cut.write_bytes(cut.read_bytes()[:-3])
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"no checkpoint")

    def sends(weights: Any) -> Reply:
        return dataclasses.replace(reply, weights=weights)

    return {
        "failed": [dataclasses.replace(reply, weights=None, error="battery"), sends(None)],
        "late": [dataclasses.replace(reply, round=0), dataclasses.replace(reply, round=2)],
        "counts": [dataclasses.replace(reply, samples=0), dataclasses.replace(reply, steps=-1)],
        "unreadable": [sends(w) for w in (cut, garbage, str(tmp_path / "absent.safetensors"), {"a.bias": [1.0]}, 5)],
        "names": [without(reply, "a.bias"), sends({**reply.weights, "extra": nan}), sends({})],
        "shape": [
            changed(reply, weight=infinite.T),
            changed(reply, bias=reply.weights["a.bias"].long()),
            changed(reply, count=torch.tensor([1.0, 2.0])),
            changed(reply, count=torch.tensor([1, 2, 3])),
        ],
        "unchanged": [sends(dict(anchor)), sends({**anchor, "count": anchor["count"] + 1})],
        "nonfinite": [changed(reply, bias=nan), changed(reply, weight=infinite)],
        "norm": [moved(anchor, reply, 1000.0), moved(anchor, reply, 1e25)],
    }


def test_each_reason_is_found_and_the_others_are_accepted(sampled: Any, tmp_path: Path) -> None:
    anchor, replies = sampled(4)
    cases = bad(anchor, replies[1], tmp_path)
    assert {*cases, "duplicate", "repeated"} == set(REASONS)
    for reason, variants in cases.items():
        for variant in variants:
            found = screened(anchor, [replies[0], variant, *replies[2:]])
            assert [reply.client for reply in found.accepted] == ["c0", "c2", "c3"]
            assert reasons(found) == {"c1": reason}, variant
            assert found.rejected[0].detail
            assert found.pool is not None
            assert found.pool.names == ("c0", "c2", "c3")


def test_details_say_what_was_found(sampled: Any, tmp_path: Path) -> None:
    anchor, replies = sampled(3)
    cases = bad(anchor, replies[1], tmp_path)

    def detail(reply: Reply) -> str:
        return screened(anchor, [replies[0], reply, replies[2]]).rejected[0].detail

    assert detail(cases["failed"][0]) == "battery"
    assert "round 2; this is round 1" in detail(cases["late"][1])
    assert "cut.safetensors" in detail(cases["unreadable"][0])
    assert "'a.bias' is missing, 1 of 5" in detail(cases["names"][0])
    assert "'extra'" in detail(cases["names"][1])
    assert "'a.weight' has shape [5, 6], expected [6, 5]" in detail(cases["shape"][0])
    assert "'a.bias'" in detail(cases["nonfinite"][0])
    assert "'a.weight'" in detail(cases["nonfinite"][1])
    assert "times the median" in detail(cases["norm"][0])


def test_a_model_that_the_client_sent_before_is_repeated_whoever_else_sent_it(sampled: Any) -> None:
    anchor, replies = sampled(3)
    first = screened(anchor, replies)
    later, fresh = sampled(3, number=2, anchor={n: t + 1 for n, t in anchor.items()})
    stale = dataclasses.replace(replies[1], round=2)
    found = screened(later, [fresh[0], stale, fresh[2]], number=2, last=first.fingerprints)
    assert reasons(found) == {"c1": "repeated"}
    other = {"c0": first.fingerprints["c1"]}
    assert not reasons(screened(anchor, replies, last=other))


def test_of_several_replies_of_one_client_the_first_good_one_counts(sampled: Any) -> None:
    anchor, replies = sampled(3)
    twice = screened(anchor, [*replies, moved(anchor, replies[1], 2.0)])
    assert reasons(twice) == {"c1": "duplicate"}
    assert [reply.client for reply in twice.accepted] == ["c0", "c1", "c2"]
    assert twice.accepted[1].weights is replies[1].weights
    late = screened(anchor, [dataclasses.replace(replies[1], round=0), *replies])
    assert reasons(late) == {"c1": "late"}
    assert late.accepted[1].weights is replies[1].weights
    np.testing.assert_array_equal(late.gram, screened(anchor, replies).gram)


def test_one_entry_outside_of_any_sample_is_a_change() -> None:
    anchor = {"w": torch.zeros(100, 100)}
    for index in (0, 1_000, 5_500, 9_999):
        model = {"w": anchor["w"].clone()}
        model["w"].view(-1)[index] = 1e-6
        found = screened(anchor, [Reply("a", model, 1)])
        assert not found.rejected
        assert found.gram[0, 0] == pytest.approx(1e-12)


def test_the_norm_rule_does_not_depend_on_the_scale_of_the_updates(sampled: Any) -> None:
    anchor, replies = sampled(5)
    replies[2] = moved(anchor, replies[2], 30.0)
    for scale in (1e-3, 1.0, 1e6):
        found = screened(anchor, [moved(anchor, reply, scale) for reply in replies])
        assert reasons(found) == {"c2": "norm"}


def test_the_norm_rule_is_a_threshold_on_the_low_median() -> None:
    """Norms 1, 1, 1, r: rejected if and only if r > ratio · 1."""
    anchor = {"w": torch.zeros(4)}

    def reply(name: str, norm: float) -> Reply:
        return Reply(name, {"w": torch.tensor([norm, 0.0, 0.0, 0.0])}, 1)

    for norm, expected in ((10.0, {}), (10.1, {"x": "norm"})):
        found = screened(anchor, [reply("a", 1), reply("b", -1.0), reply("c", 1), reply("x", norm)])
        assert reasons(found) == expected
    two = screened(anchor, [reply("a", 1), reply("x", 11.0)])
    assert reasons(two) == {"x": "norm"}
    strict = screened(anchor, [reply("a", 1), reply("b", 1), reply("x", 2.5)], options=Screening(norm_ratio=2))
    assert reasons(strict) == {"x": "norm"}


def test_recent_norms_unmask_a_client_that_is_alone(sampled: Any) -> None:
    anchor, replies = sampled(1)
    huge = [moved(anchor, replies[0], 1000.0)]
    assert not reasons(screened(anchor, huge))
    norm = float(np.sqrt(screened(anchor, replies).gram[0, 0]))
    assert reasons(screened(anchor, huge, norms=[norm, 1.1 * norm, 0.9 * norm])) == {"c0": "norm"}


def test_updates_whose_squares_vanish_are_unchanged_and_do_not_set_the_median() -> None:
    anchor = {"w": torch.zeros(4)}
    tiny, fine = {"w": torch.full((4,), 1e-40)}, {"w": torch.ones(4)}
    found = screened(anchor, [Reply("tiny", tiny, 1), Reply("fine", fine, 1)])
    assert reasons(found) == {"tiny": "unchanged"}


def test_gram_and_received_bytes(sampled: Any) -> None:
    anchor, replies = sampled(3)
    found = screened(anchor, [*replies, Reply("gone", None, 1, error="x")])
    names = [name for name in anchor if name != "count"]
    rows = np.stack([np.concatenate([(r.weights[n] - anchor[n]).numpy().ravel() for n in names]) for r in replies])
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(found.gram, rows @ rows.T, rtol=1e-6, atol=1e-8)
    size = sum(t.numel() * t.element_size() for t in anchor.values())
    assert found.received == 3 * size


def test_replies_of_less_precision_than_the_model_are_left_out_and_of_more_are_taken(sampled: Any) -> None:
    anchor, replies = sampled(2)

    def cast(weights: Any, dtype: torch.dtype) -> Any:
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()}

    half = dataclasses.replace(replies[0], weights=cast(replies[0].weights, torch.bfloat16))
    assert reasons(screened(anchor, [half, replies[1]])) == {"c0": "shape"}
    double = dataclasses.replace(replies[0], weights=cast(replies[0].weights, torch.float64))
    assert not screened(anchor, [double, replies[1]]).rejected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_ratio": 0.5}, r"'norm_ratio' parameter of Screening must be a number in \[1, inf\). Got 0.5"),
        ({"norm_ratio": float("nan")}, "norm_ratio"),
        ({"minimum": 0}, "'minimum' parameter of Screening must be an integer"),
        ({"minimum": 1.5}, "Got 1.5"),
        ({"attempts": True}, "Got True"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(FederationError, match=message):
        Screening(**options)


def test_a_copy_of_the_model_that_was_sent_in_the_round_before_is_repeated(sampled: Any) -> None:
    anchor, replies = sampled(3)
    first = screened(anchor, replies)
    later, fresh = sampled(3, number=2, anchor={n: t + 1 for n, t in anchor.items()})
    stale = dataclasses.replace(replies[1], weights={n: t.clone() for n, t in anchor.items()}, round=2)
    found = screened(later, [fresh[0], stale, fresh[2]], number=2, last=first.fingerprints)
    assert reasons(found) == {"c1": "repeated"}
    assert found.rejected[0].detail == "all tensors are those that the round before began with"


def test_a_refused_model_that_comes_again_is_repeated(sampled: Any) -> None:
    anchor, replies = sampled(3)
    first = screened(anchor, [*replies[:2], moved(anchor, replies[2], 1000.0)])
    again = dataclasses.replace(moved(anchor, replies[2], 1000.0), round=2)
    later, fresh = sampled(2, number=2, anchor={n: t + 1 for n, t in anchor.items()})
    found = screened(later, [*fresh, again], number=2, last=first.fingerprints)
    assert reasons(found) == {"c2": "repeated"}


@pytest.mark.parametrize(
    ("value", "shape", "reason"),
    [
        (float("nan"), (6,), "nonfinite"),
        (float("inf"), (6,), "nonfinite"),
        (-1.0, (6,), "nonfinite"),
        (1.0, (5,), "shape"),
    ],
)
def test_a_fisher_diagonal_that_is_none_is_named(value: float, shape: Any, reason: str, sampled: Any) -> None:
    anchor, replies = sampled(3)
    fisher = {**replies[1].fisher, "a.bias": torch.full(shape, value)}
    found = screened(anchor, [replies[0], dataclasses.replace(replies[1], fisher=fisher), replies[2]])
    assert reasons(found) == {"c1": reason}
    assert "Fisher diagonal of 'a.bias'" in found.rejected[0].detail
