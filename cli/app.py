"""The command tree. A command's module is imported when the command runs or prints its own help, not before."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

from .errors import MISUSED, OK, explain
from .names import unknown


class LazyGroup(click.Group):
    """A group that knows names and one-line summaries, and imports a command's module only to use it.

    `table`: command name -> (module of this package, attribute, summary).
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str, str]], **options: Any) -> None:
        super().__init__(*args, **options)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in self.table:
            return None
        module, attribute, _ = self.table[cmd_name]
        command = getattr(import_module(f".{module}", __package__), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one gets the valid names and the nearest."""
        if args and not args[0].startswith("-") and args[0] not in self.table:
            raise unknown("command", args[0], self.table)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by their summaries, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in self.table.items()])


class Application(LazyGroup):
    """The outermost group: every error leaves through here, as one line and an exit code (see `errors`)."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; exits the process unless standalone_mode is false."""
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given or bool(os.environ.get("MERGESOLVE_DEBUG"))
        given = [argument for argument in given if argument != "--debug"]
        try:
            with _one_line_warnings():
                name = prog_name or "mergesolve"
                code = super().main(given, name, complete_var, False, windows_expand_args=windows_expand_args, **extra)
        except BrokenPipeError:  # the reader of our output went away (`mergesolve list | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = OK
        except click.exceptions.NoArgsIsHelpError as error:  # a group without a command: its help is the answer
            click.echo(error.format_message(), err=True)
            code = MISUSED
        except BaseException as error:
            told = explain(error)
            if told is None and not isinstance(error, Exception):
                raise
            if debug:
                traceback.print_exception(error)
            message, code = told or (
                f"{type(error).__name__}: {error}. This is a defect of mergesolve; run again with --debug for the "
                "traceback and report it.",
                1,
            )
            click.echo("Error: " + " ".join(message.split("\n")), err=True)
            for place in getattr(error, "__notes__", ()) if told else ():  # a text with its place marked
                click.echo(place, err=True)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else OK)
        return code


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Our own warnings as one line on stderr; those of libraries are not for the user of a command."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        if issubclass(category, UserWarning) and not issubclass(category, (DeprecationWarning, FutureWarning)):
            click.echo(f"Warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


COMMANDS = {
    "demo": ("demo", "command", "Merge the embedded zoo with every method and print one table."),
    "zoo": ("zoo", "group", "Build the embedded benchmark, or say what is in it."),
    "pool": ("pool", "group", "Look into a pool of checkpoints before merging it."),
    "select": ("select", "command", "Choose the experts that are worth merging."),
    "solve": ("solve", "command", "Merge: find the coefficients that minimize an objective."),
    "pareto": ("pareto", "command", "Merges along preferences between tasks: their Pareto front."),
    "merge": ("merge", "command", "Merge in closed form: average, TIES, DARE, Fisher, ..."),
    "federate": (
        "federate",
        "command",
        "Rounds of a federation: clients train, any solver or merge merges.",
    ),
    "evaluate": ("evaluate", "command", "Top-1 accuracy of checkpoints and runs on tasks."),
    "stats": ("stats", "command", "Fisher diagonals and Grams of experts, for merges that weigh experts by them."),
    "landscape": ("landscape", "group", "The loss between merges: barriers, planes, layers; is a pool fit to merge?"),
    "materialize": ("materialize", "command", "Write the merged checkpoint of a run."),
    "plot": ("plot", "command", "Draw runs: coefficients, convergence, steps, vertices."),
    "report": ("report", "command", "One HTML page of runs: trajectories, active set, layers × experts, cost, recipe."),
    "compare": ("compare", "command", "Runs side by side at equal iterations, seconds, gradients or samples."),
    "trace": ("trace", "command", "The trace of a run as a table: shown, filtered, exported."),
    "list": (
        "listing",
        "command",
        "Solvers, rules, objectives, presets, methods, transforms, selectors, server steps, ...",
    ),
}


@click.group(cls=Application, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("mergesolve"), prog_name="mergesolve")
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error (anywhere on the line)."
)
def main() -> None:
    """Model merging as constrained optimization.

    A merge is a point in the convex hull of a pool of checkpoints; mergesolve solves for the best one.

    \b
    Examples:
      mergesolve demo
      mergesolve pool inspect --base base.safetensors --expert 'experts/*.safetensors'
      mergesolve solve --zoo --task digits --task shapes --preset fw-soft
      mergesolve merge ties --pool pool.yaml --scale 0.3 --out ties.safetensors
      mergesolve federate --protocol continual-clip --step rows-penalty
      mergesolve list methods
    """
