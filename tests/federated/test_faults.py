from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mergesolve.federated import FAULTS, Faulty, FederationError, Membership, Reply, fit_all, roster
from mergesolve.federated.faults import HUGE, damaged
from torch import Tensor


class Scripted:
    """A client whose model in round r is the anchor plus r."""

    name = "blue"
    samples = 5

    def fit(self, weights: Any, round: int) -> Reply:
        found = {n: t + round if t.is_floating_point() else t.clone() for n, t in weights.items()}
        return Reply(self.name, found, round, samples=self.samples, steps=3)


@pytest.fixture
def anchor() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2), "n": torch.tensor(4)}


def healthy(anchor: Any, round: int) -> dict[str, Tensor]:
    found = Scripted().fit(anchor, round).weights
    assert isinstance(found, dict)
    return found


def differing(reply: Reply, expected: dict[str, Tensor]) -> set[str]:
    assert isinstance(reply.weights, dict)
    return {n for n in expected if n not in reply.weights or not torch.equal(reply.weights[n], expected[n])}


def test_every_kind_shows_in_the_reply_or_raises(anchor: Any) -> None:
    for kind in FAULTS:
        client = Faulty(Scripted(), kind)
        replies = fit_all([client], anchor, 1) + fit_all([client], anchor, 2)
        assert all(reply.client == "blue" and reply.samples == 5 for reply in replies)
        for round, reply in enumerate(replies, 1):
            wrong = reply.error or reply.round != round or differing(reply, healthy(anchor, round))
            assert wrong, kind


def test_nonfinite_is_one_nan_in_one_tensor(anchor: Any) -> None:
    reply = Faulty(Scripted(), "nonfinite").fit(anchor, 1)
    assert differing(reply, healthy(anchor, 1)) == {"a"}
    assert isinstance(reply.weights, dict)
    assert int(reply.weights["a"].isnan().sum()) == 1


def test_shape_is_transposed_where_that_shows(anchor: Any) -> None:
    reply = Faulty(Scripted(), "shape").fit(anchor, 1)
    assert isinstance(reply.weights, dict)
    assert torch.equal(reply.weights["a"], healthy(anchor, 1)["a"].T)
    for tensor in (torch.zeros(3, 3), torch.zeros(3), torch.zeros(())):
        found = damaged("shape", {"a": tensor}, {"a": tensor})["a"]
        assert found.shape == (1, *tensor.shape)


def test_missing_leaves_one_tensor_out(anchor: Any) -> None:
    reply = Faulty(Scripted(), "missing").fit(anchor, 1)
    assert isinstance(reply.weights, dict)
    assert set(reply.weights) == {"b", "n"}


def test_huge_is_the_update_times_a_thousand(anchor: Any) -> None:
    reply = Faulty(Scripted(), "huge").fit(anchor, 2)
    assert isinstance(reply.weights, dict)
    assert torch.equal(reply.weights["b"], torch.full((2,), 1 + 2 * HUGE))
    assert torch.equal(reply.weights["a"], anchor["a"] + 2 * HUGE)
    assert torch.equal(reply.weights["n"], anchor["n"])


def test_huge_keeps_half_precision() -> None:
    anchor = {"a": torch.zeros(4, dtype=torch.bfloat16)}
    reply = Faulty(Scripted(), "huge").fit(anchor, 1)
    assert isinstance(reply.weights, dict)
    assert reply.weights["a"].dtype == torch.bfloat16


def test_stale_is_the_last_model_under_the_number_of_this_round(anchor: Any) -> None:
    client = Faulty(Scripted(), "stale", rounds={2, 3})
    first = client.fit(anchor, 1)
    assert not differing(first, healthy(anchor, 1))
    moved = {n: t + 1 for n, t in anchor.items()}
    for round in (2, 3):
        reply = client.fit(moved, round)
        assert reply.round == round
        assert not differing(reply, healthy(anchor, 1))
    assert not differing(client.fit(moved, 4), healthy(moved, 4))


def test_stale_is_the_anchor_where_nothing_was_before(anchor: Any) -> None:
    reply = Faulty(Scripted(), "stale").fit(anchor, 1)
    assert not differing(reply, anchor)
    assert reply.weights is not anchor


def test_late_is_the_reply_to_the_round_before(anchor: Any) -> None:
    client = Faulty(Scripted(), "late")
    first = client.fit(anchor, 1)
    assert first.weights is None
    assert first.error is not None
    for round in (2, 3):
        reply = client.fit(anchor, round)
        assert reply.round == round - 1
        assert not differing(reply, healthy(anchor, round - 1))
        again = client.fit(anchor, round)  # a round that is repeated
        assert again.round == round - 1


def test_dropout_and_crash_become_replies_with_a_reason(anchor: Any) -> None:
    with pytest.raises(RuntimeError, match="round 1"):
        Faulty(Scripted(), "crash").fit(anchor, 1)
    dropped, crashed = fit_all([Faulty(Scripted(), "dropout"), Faulty(Scripted(), "crash")], anchor, 1)
    assert dropped.weights is None
    assert dropped.error == "rehearsed dropout"
    assert crashed.weights is None
    assert crashed.error == "RuntimeError: rehearsed crash in round 1"


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_keep_to_their_rounds_and_never_change_what_they_were_given(anchor: Any, kind: str) -> None:
    before = {n: t.clone() for n, t in anchor.items()}
    client = Faulty(Scripted(), kind, rounds=[2])
    for round in (1, 2, 3):
        reply = fit_all([client], anchor, round)[0]
        if round != 2:
            assert reply.error is None
            assert reply.round == round
            assert not differing(reply, healthy(anchor, round))
    assert all(torch.equal(before[n], anchor[n]) for n in anchor)


def test_damage_is_done_to_a_copy(anchor: Any) -> None:
    for kind in ("nonfinite", "shape", "missing", "huge"):
        weights = healthy(anchor, 1)
        damaged(kind, anchor, weights)
        assert all(torch.equal(weights[n], t) for n, t in healthy(anchor, 1).items())
        assert math.isfinite(float(weights["a"].sum()))


def test_unknown_faults_are_refused_with_the_list() -> None:
    with pytest.raises(FederationError, match=r"'blue': unknown fault 'slow'; there are nonfinite, .*crash"):
        Faulty(Scripted(), "slow")


def test_members_are_there_from_joining_until_leaving_but_for_their_absence() -> None:
    member = Membership(Scripted(), joins=2, leaves=6, absent={4})
    assert [round for round in range(1, 9) if member.present(round)] == [2, 3, 5]
    always = Scripted()
    assert [roster([always, member], round) for round in (1, 2)] == [[always], [always, member]]


def test_members_answer_as_their_client(anchor: Any) -> None:
    member = Membership(Faulty(Scripted(), "huge"))
    assert (member.name, member.samples) == ("blue", 5)
    assert not differing(member.fit(anchor, 1), damaged("huge", anchor, healthy(anchor, 1)))


def test_leaving_before_joining_is_refused() -> None:
    with pytest.raises(FederationError, match="leaves in round 2 and joins in round 2"):
        Membership(Scripted(), joins=2, leaves=2)
