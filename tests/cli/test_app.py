from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import click
import pytest
from mergesolve.cli import main
from mergesolve.cli.app import COMMANDS, LazyGroup


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    context = click.Context(group)
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", [(), *commands(main)], ids=" ".join)
def test_every_help_shows_examples_that_name_the_command(path, run):
    result = run(*path, "--help")
    assert result.exit_code == 0
    examples = result.stdout.split("Examples:", 1)[1].split("\n\n")[0]
    assert " ".join(("mergesolve", *path)) in examples


@pytest.mark.parametrize("path", commands(main), ids=" ".join)
def test_help_fits_a_terminal_of_120_columns(path, run):
    assert max(len(line) for line in run(*path, "--help").stdout.split("\n")) <= 120


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["--version"], ["list", "nonsense"], ["solve", "--help"]], ids=" ".join
)
def test_light_commands_import_no_heavy_package(arguments):
    code = (
        "import sys\n"
        "from mergesolve.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'matplotlib', 'open_clip', 'torchvision', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_of_the_table_loads_and_is_summarized():
    assert isinstance(main, LazyGroup)
    for name, (_, _, summary) in COMMANDS.items():
        assert main.get_command(click.Context(main), name) is not None
        assert summary.endswith((".", "?"))


def test_version_is_the_package_version(run):
    assert version("mergesolve") in run("--version").stdout


def test_no_command_prints_help_and_fails(run):
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_unknown_command_names_the_nearest_and_the_valid_ones(run):
    result = run("slove")
    assert result.exit_code == 2
    assert result.stderr == (f"Error: unknown command 'slove'. Did you mean 'solve'? Valid: {', '.join(COMMANDS)}.\n")


def test_unknown_subcommand_and_option_are_one_line(run):
    for arguments in (["zoo", "biuld"], ["solve", "--sover", "x"], ["solve", "--max-iter", "many"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback_wherever_it_stands(run):
    for arguments in (["--debug", "plot", "nowhere"], ["plot", "nowhere", "--debug"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.rstrip().split("\n")[-1].startswith("Error: run 'nowhere'")
