import json
import subprocess

import pytest
from click.testing import CliRunner
from mergesolve.federated import FederationError
from mergesolve.federated.flower import status


def run(number: int, ended: str, details: str = "N/A") -> dict:
    """One entry of `flwr ls --format json`; runs of higher numbers are later."""
    return {
        "run-id": str(1000 - number),
        "status": ended,
        "status-details": details,
        "elapsed": 12.6,
        "pending-at": f"2026-11-22 15:{number:02d}:00Z",
    }


COMPLETE = run(1, "finished:completed")
FAILED = run(2, "finished:failed", "ServerApp failed with exception: round 2 had too few usable replies")


def test_the_latest_run_counts_unless_one_is_named():
    assert status.verdict([FAILED, COMPLETE]) == (
        False,
        "run 998: finished:failed after 13 s (ServerApp failed with exception: round 2 had too few usable replies)",
    )
    assert status.verdict([FAILED, COMPLETE], "999") == (True, "run 999: finished:completed after 13 s")


@pytest.mark.parametrize("ended", ["finished:failed", "finished:stopped", "running", "pending"])
def test_only_a_complete_run_is_a_success(ended):
    assert status.verdict([run(1, ended)])[0] is False


def test_no_run_and_an_unknown_run_are_errors():
    with pytest.raises(FederationError, match="knows no run; start one"):
        status.verdict([])
    with pytest.raises(FederationError, match="knows no run 7; it knows 998, 999"):
        status.verdict([COMPLETE, FAILED], "7")


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ({"success": True, "runs": [COMPLETE]}, 0, "finished:completed"),
        ({"success": True, "runs": [COMPLETE, FAILED]}, 1, "too few usable replies"),
        ({"success": False, "error-message": "Connection is unavailable."}, 2, "flwr ls failed: Connection is"),
        ({"success": True, "runs": []}, 2, "knows no run"),
    ],
)
def test_the_exit_status_tells_success_failure_and_no_answer_apart(monkeypatch, answer, code, words):
    # flwr ls itself exits with 0 in each of these cases
    said = subprocess.CompletedProcess([], 0, stdout=json.dumps(answer), stderr="")
    monkeypatch.setattr(status.subprocess, "run", lambda *_, **__: said)
    result = CliRunner().invoke(status.main, ["lab"])
    assert result.exit_code == code
    assert words in result.output


def test_an_answer_that_is_no_json_is_quoted(monkeypatch):
    said = subprocess.CompletedProcess([], 1, stdout="", stderr="no config")
    monkeypatch.setattr(status.subprocess, "run", lambda *_, **__: said)
    with pytest.raises(FederationError, match="flwr ls failed: no config"):
        status.ask(None)
