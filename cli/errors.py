"""The one place where an exception becomes a line on stderr and an exit code.

0    done (a solve that used up its iterations or its time warns, and is done)
1    the machine failed: disk, memory, GPU; or the solve met NaN or infinity
2    the user's mistake: a name, a file, an option, data that do not fit together
130  interrupted; a solve says how to resume it
"""

from __future__ import annotations

import errno
import sys

import click

from .names import UsageProblem

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


class Interrupted(Exception):
    """The user stopped the command; the message says what was kept and how to go on."""


class SolveFailed(Exception):
    """The solve ended without a usable result (NaN or infinity); the message says where and what to try."""


# The errors of the floors below, by the module that defines them. Looked up among the loaded modules: an error can
# only come from a module that was imported, and `mergesolve list` must not import torch for its error handling.
USER_ERRORS = (
    ("mergesolve.pools", "PoolError"),
    ("mergesolve.objectives", "DataError"),
    ("mergesolve.objectives.errors", "DataError"),
    ("mergesolve.solvers", "OptionError"),
    ("mergesolve.federated", "FederationError"),
    ("mergesolve.reports.run", "RunError"),
    ("mergesolve.zoo", "ZooError"),
)


def user_errors() -> tuple[type[Exception], ...]:
    """The exception classes that mean a mistake of the user, of the modules that are loaded."""
    found: list[type[Exception]] = [UsageProblem, click.ClickException]
    for module, name in USER_ERRORS:
        kind = getattr(sys.modules[module], name, None) if module in sys.modules else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            found.append(kind)
    return tuple(found)


def explain(error: BaseException) -> tuple[str, int] | None:
    """The line for stderr and the exit code; None for an error that is a defect of this program."""
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "interrupted", INTERRUPTED
    if isinstance(error, SolveFailed):
        return str(error), FAILED
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "mergesolve"
        return f"{error.format_message()} See '{command} --help'.", MISUSED
    if isinstance(error, click.ClickException):
        return error.format_message(), MISUSED
    if isinstance(error, user_errors()):
        return str(error), MISUSED
    if out_of_gpu_memory(error):
        first = str(error).split(". ")[0]
        return (
            f"out of GPU memory ({first}). Keep the experts on disk with --backend streaming, take fewer samples at a "
            "time with --set objective.microbatch=N, or run on --device cpu.",
            FAILED,
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return (
            "out of memory. Keep the experts on disk with --backend streaming, or take fewer samples at a time with "
            "--set objective.microbatch=N.",
            FAILED,
        )
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}.", MISUSED
    if isinstance(error, OSError):
        remedy = {
            errno.ENOSPC: " Free some space or choose another folder; nothing was left half written.",
            errno.EACCES: " Choose a folder that you may write to.",
            errno.EROFS: " Choose a folder that you may write to.",
        }.get(error.errno or 0, "")
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}.{remedy}", FAILED
    return None


def out_of_gpu_memory(error: BaseException) -> bool:
    """Whether it is torch's OutOfMemoryError (torch is not imported to find out)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
