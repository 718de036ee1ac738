"""What the front page and the docs promise: commands, options, links, recipes and examples that exist and run."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import yaml
from mergesolve.cli.app import main as application
from mergesolve.cli.merging import MergeRecipe
from mergesolve.cli.recipe import from_mapping, from_yaml
from mergesolve.cli.schema import parse
from mergesolve.pools.spec import parse_spec
from mergesolve.solvers import DOMAINS, PRESETS, SOLVERS, STATUSES, STEP_RULES, FunctionProblem, solve

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "zoo/*.md") for page in ROOT.glob(pattern))
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def written(page: Path, program: str) -> list[str]:
    """Every command line of a program in code blocks and inline code, without comments and continuation marks."""
    text = text_of(page)
    plain = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip() for line in plain.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_in_the_docs_exists(page):
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for line in written(page, "make"):
        words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
        assert set(words) <= targets, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_mergesolve_command_in_the_docs_has_these_options(page):
    for line in written(page, "mergesolve"):
        command: click.Command = application
        words = shlex.split(line, comments=True)[1:]
        context = click.Context(command)
        while words and isinstance(command, click.Group) and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None, f"{line}: no command {words[0]!r}"
            command, words = found, words[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        asked = {word.split("=")[0] for word in words if word.startswith("-")}
        assert asked <= known, line
        for option, table in (("--preset", PRESETS), ("--solver", SOLVERS), ("--domain", DOMAINS)):
            named = [value for word, value in itertools.pairwise(words) if word == option]
            assert all(name in table for name in named if name.islower()), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_in_the_docs_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, heading = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", text_of(place), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_recipe_in_the_docs_is_one(page):
    for block in blocks(page, "yaml"):
        fields = from_yaml(block)
        if "method" in fields:
            assert parse(MergeRecipe, fields, "recipe").pool.base
        elif "tasks" in fields:
            recipe = from_mapping(fields, PRESETS)
            assert recipe.tasks
            assert recipe.pool.base
        elif "experts" not in fields:  # a part of a recipe
            from_mapping(fields, PRESETS)
        else:
            fields["experts"] = dict(fields["experts"])
            assert parse_spec(fields, {}).experts


def test_the_configuration_of_the_selection_studies_is_one():
    fields = yaml.safe_load(text_of(ROOT / "docs/examples/selection_clip.yaml"))
    unseen, corrupted = fields.pop("unseen"), fields.pop("corrupted")
    names = {task.name for task in from_mapping(fields, PRESETS).tasks}
    assert {*unseen, *corrupted} < names
    assert set(fields["pool"]["experts"]) == names - set(unseen)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_docs_parses(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def test_the_docs_show_the_examples_as_they_are():
    shown = blocks(ROOT / "README.md", "python")
    assert shown[0] == text_of(ROOT / "docs/examples/zoo.py")
    lines = text_of(ROOT / "docs/examples/mlp.py").splitlines()
    assert all(line in lines for line in shown[1].splitlines())
    assert blocks(ROOT / "CONTRIBUTING.md", "python")[0] in text_of(ROOT / "docs/examples/new_solver.py")


def test_concepts_names_every_domain_and_every_status():
    text = text_of(ROOT / "docs/concepts.md")
    rows = set(re.findall(r"`([a-z0-9_-]+)`", text))
    assert set(DOMAINS) <= rows
    assert set(STATUSES) <= rows


def test_concepts_lists_the_fields_of_a_trace_record():
    result = solve(FunctionProblem(lambda point: (0.0, 0 * point), rows=1, n=2), "frank-wolfe", max_iter=1)
    section = text_of(ROOT / "docs/concepts.md").split("A trace record:")[1]
    assert set(result.trace[0]) <= set(re.findall(r"`(\w+)`", section))


def test_contributing_names_tables_that_hold_what_it_says():
    text = text_of(ROOT / "CONTRIBUTING.md")
    for file, table in (("solvers/registry.py", "SOLVERS"), ("solvers/step_rules.py", "STEP_RULES")):
        assert file in text
        assert re.search(rf"^{table}\b", text_of(ROOT / file), re.MULTILINE)
    assert STEP_RULES


def run(*command: str) -> str:
    """What a program prints. One thread: the models are tiny, and tests may run side by side."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mlp_example_leaves_the_wrong_expert_out():
    printed = run(str(ROOT / "docs/examples/mlp.py"))
    assert printed.startswith("optimal")
    accuracy = {
        line.split()[0]: float(line.split()[1].rstrip("%")) for line in printed.splitlines() if line.endswith("%")
    }
    assert accuracy["merged"] > max(accuracy["average"], accuracy["low"], accuracy["high"], accuracy["wrong"])
    assert re.search(r"0\.weight .*'wrong': 0\.0\b", printed)


def test_new_solver_example_finds_the_target():
    assert run(str(ROOT / "docs/examples/new_solver.py")).startswith("optimal")


def test_entropy_trap_example_gets_surer_and_worse_and_distillation_does_not():
    lines = run(str(ROOT / "docs/examples/entropy_trap.py")).splitlines()[1:]
    accuracy, confidence, error, norm = (
        {re.split(r"  +", line)[0]: float(line.split()[k]) for line in lines} for k in (-4, -3, -2, -1)
    )
    assert accuracy["entropy"] < accuracy["average"] - 20
    assert confidence["entropy"] > confidence["average"] + 30
    assert norm["entropy"] > 5 * norm["average"]
    assert norm["entropy, logit_norm=5"] < norm["average"]
    distilled = "distillation, 1000 mixed inputs"
    assert accuracy[distilled] > accuracy["average"] - 5
    assert error[distilled] == min(error.values())


def test_federated_example_learns_more_by_solving_than_by_averaging():
    lines = run(str(ROOT / "docs/examples/federated.py")).splitlines()
    curves = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines}
    assert curves["projected-gradient"][-1] > curves["fedavg"][-1] + 5


def test_zoo_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run(str(ROOT / "docs/examples/zoo.py"))
    assert "gap" in printed
    assert (tmp_path / "merged.safetensors").exists()


def test_benchmarks_run_on_a_toy_tower(tmp_path):
    out = tmp_path / "figures.json"
    printed = run(str(ROOT / "benchmarks"), "--small", "--json", str(out), "--folder", str(tmp_path))
    figures = json.loads(out.read_text())
    assert {name: len(rows) for name, rows in figures.items() if name in ("operators", "memory", "iteration")} == {
        "operators": 8,
        "memory": 4,
        "iteration": 4,
    }
    assert all(row["met"] for row in figures["memory"][1:]), printed
    assert torch.cuda.is_available() or figures["gpu"] == {"skipped": "no CUDA device"}
    assert list(tmp_path.iterdir()) == [out], "the synthetic checkpoints are removed"


def test_unknown_benchmark_is_refused_with_the_names_that_exist():
    command = [sys.executable, str(ROOT / "benchmarks"), "operator"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "operators" in done.stderr
