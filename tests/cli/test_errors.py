from __future__ import annotations

import errno

import click
import pytest
import torch
from mergesolve.cli.app import Application
from mergesolve.cli.errors import Interrupted, SolveFailed, explain
from mergesolve.cli.names import UsageProblem, unknown
from mergesolve.objectives import DataError
from mergesolve.pools import PoolError
from mergesolve.reports.run import RunError
from mergesolve.solvers import OptionError


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PoolError("pool: no base"), 2, "pool: no base"),
        (DataError("task 'a' is empty"), 2, "task 'a' is empty"),
        (OptionError("Unknown solver"), 2, "Unknown solver"),
        (RunError("run 'x': not a run"), 2, "not a run"),
        (UsageProblem("recipe: unknown field"), 2, "unknown field"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.npz"), 2, "a.npz: No such file"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/m.safetensors"), 1, "Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/m"), 1, "folder that you may write to"),
        (MemoryError(), 1, "--backend streaming"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "--backend streaming"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "--backend streaming",
        ),
        (SolveFailed("became NaN"), 1, "became NaN"),
        (Interrupted("go on with --resume"), 130, "--resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_error_has_one_message_and_its_exit_code(error, code, words):
    told = explain(error)
    assert told is not None
    assert told[1] == code
    assert words in told[0]


def test_a_defect_is_not_explained_away():
    assert explain(ZeroDivisionError()) is None
    assert explain(ValueError("something inside")) is None


@pytest.mark.parametrize(
    ("error", "code"), [(PoolError("two\nlines"), 2), (ZeroDivisionError("1/0"), 1), (KeyboardInterrupt(), 130)]
)
def test_the_application_prints_one_line_and_exits_with_the_code(error, code, capsys):
    @click.group(cls=Application, table={})
    def app() -> None:
        raise error

    app.table = {"go": ("app", "main", "")}
    with pytest.raises(SystemExit) as exit_:
        app.main(["go"])
    assert exit_.value.code == code
    line = capsys.readouterr().err.lstrip("\n")  # click ends the line of a ^C
    assert line.startswith("Error: ")
    assert line.count("\n") == 1


def test_unknown_names_list_the_valid_ones_and_the_nearest():
    assert str(unknown("solver", "frank-wolf", ["frank-wolfe", "scan"])) == (
        "unknown solver 'frank-wolf'. Did you mean 'frank-wolfe'? Valid: frank-wolfe, scan."
    )
    assert "Did you mean" not in str(unknown("solver", "zzzzz", ["frank-wolfe"]))


def test_a_missing_place_without_a_file_name_is_told_by_its_own_words():
    assert explain(FileNotFoundError(2, "the folder x cannot be made")) == ("the folder x cannot be made.", 2)
