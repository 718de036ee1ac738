from __future__ import annotations

import string
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.cli.names import UsageProblem
from mergesolve.cli.recipe import (
    Choice,
    Recipe,
    TaskPart,
    assign,
    from_mapping,
    merge,
    plain,
    read_yaml,
    relative_to,
    to_yaml,
)
from mergesolve.solvers import PRESETS, STEP_RULES, make_solver

names = st.text(string.ascii_lowercase + string.digits + "-_", min_size=1, max_size=8)
texts = st.text(string.printable.strip(), min_size=1, max_size=12).map(str.strip).filter(bool)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(-1e6, 1e6), names)
options = st.dictionaries(names.filter(lambda n: n != "name"), st.one_of(scalars, st.lists(st.integers())), max_size=3)
choices = st.builds(Choice, names, options)
tasks = st.lists(
    st.builds(
        TaskPart,
        name=names,
        npz=st.none() | texts,
        split=st.none() | names,
        limit=st.none() | st.integers(1, 500),
        seed=st.integers(0, 9),
        classes=st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple),
        teacher=st.none() | names,
        mixed=st.none() | st.integers(1, 5000),
        weight=st.floats(0.1, 10),
    ),
    max_size=3,
    unique_by=lambda task: task.name,
).map(tuple)
recipes = st.builds(
    Recipe,
    zoo=st.booleans(),
    tasks=tasks,
    split=names,
    limit=st.none() | st.integers(1, 100),
    objective=choices | st.lists(choices, min_size=2, max_size=3).map(tuple),
    blocks=names | st.lists(texts, min_size=1, max_size=3).map(tuple),
    domain=choices,
    solver=choices,
    start=names,
    max_iter=st.integers(0, 10**6),
    tol=st.floats(0, 1),
    rtol=st.floats(0, 1),
    time_limit=st.none() | st.floats(0, 1e6),
    seed=st.integers(0, 2**31),
)


@given(recipes)
def test_a_recipe_survives_yaml(recipe):
    assert from_mapping(yaml.safe_load(to_yaml(recipe)), {}) == recipe


@given(recipes)
def test_plain_is_what_yaml_can_hold(recipe):
    assert yaml.safe_load(yaml.safe_dump(plain(recipe))) == plain(recipe)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_recipe_and_survives_yaml_with_its_name(preset):
    recipe = from_mapping({"preset": preset}, PRESETS)
    assert recipe.preset == preset
    assert recipe.solver.name == PRESETS[preset]["solver"]["name"]
    assert from_mapping(yaml.safe_load(to_yaml(recipe)), PRESETS) == recipe


def test_fields_win_over_their_preset_option_by_option():
    presets = {"p": {"solver": {"name": "adaptive", "lr": 0.1, "method": "sgd"}, "domain": "free", "max_iter": 7}}
    recipe = from_mapping({"preset": "p", "solver": {"name": "adaptive", "lr": 0.2}, "domain": "box"}, presets)
    assert recipe.solver == Choice("adaptive", {"lr": 0.2, "method": "sgd"})
    assert recipe.domain == Choice("box")
    assert recipe.max_iter == 7


def test_another_solver_does_not_inherit_the_options_of_the_presets_solver():
    presets = {"p": {"solver": {"name": "adaptive", "lr": 0.1}}}
    assert from_mapping({"preset": "p", "solver": "frank-wolfe"}, presets).solver == Choice("frank-wolfe")
    assert from_mapping({"preset": "p", "solver": "adaptive"}, presets).solver == Choice("adaptive", {"lr": 0.1})


def test_merge_keeps_what_only_one_side_has():
    assert merge({"a": {"x": 1}, "b": 2}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}, "b": 2}


def test_assign_turns_a_name_on_the_way_into_a_mapping():
    fields_ = {"solver": "frank-wolfe"}
    assign(fields_, "solver.step_rule.name", "open-loop")
    assign(fields_, "seed", 3)
    assert fields_ == {"solver": {"name": "frank-wolfe", "step_rule": {"name": "open-loop"}}, "seed": 3}


@pytest.mark.parametrize(
    ("given_fields", "message"),
    [
        ({"solvr": "x"}, "recipe: unknown field 'solvr'. Did you mean 'solver'? Valid: zoo, pool,"),
        ({"max_iter": "ten"}, "recipe: 'max_iter' must be an integer; found 'ten'."),
        ({"max_iter": True}, "recipe: 'max_iter' must be an integer; found True."),
        ({"tol": "small"}, "recipe: 'tol' must be a number; found 'small'."),
        ({"tasks": "mnist"}, "recipe: 'tasks' must be a list (each a mapping); found 'mnist'."),
        ({"tasks": [{"npz": "a.npz"}]}, "recipe: 'tasks'[0]: lacks the field 'name' (text)."),
        ({"tasks": [{"name": "a", "temlates": []}]}, "recipe: 'tasks'[0]: unknown field 'temlates'."),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, "the task 'a' is named twice"),
        ({"pool": {"bse": "x"}}, "recipe: 'pool': unknown field 'bse'. Did you mean 'base'?"),
        ({"pool": ["x"]}, "recipe: 'pool': expected a mapping of fields, found ['x']."),
        ({"solver": {"lr": 1}}, "recipe: 'solver': a mapping needs a 'name'; found lr."),
        ({"solver": 3}, "recipe: 'solver' must be a name, or a mapping of a name and options; found 3."),
        ({"preset": "fw-sof"}, "recipe: unknown preset 'fw-sof'. Did you mean 'fw-soft'?"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_name_place_type_and_value(given_fields, message):
    with pytest.raises(UsageProblem) as error:
        from_mapping(given_fields, PRESETS)
    assert message in str(error.value)


def test_exponents_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("tol: 1e-6\nsolver: {name: adaptive, lr: 5E-3, schedule: cosine}\n")  # text in YAML 1.1
    recipe = from_mapping(read_yaml(path, "recipe"), {})
    assert recipe.tol == 1e-6
    assert recipe.solver.options == {"lr": 5e-3, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "line 1: not YAML"), ("- a", "expected a mapping of fields, found ['a']"), ("", "found nothing")],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageProblem) as error:
        read_yaml(path, "recipe")
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageProblem, match=r"recipe '.*r\.yaml': there is no such file"):
        read_yaml(tmp_path / "r.yaml", "recipe")


def test_every_field_of_a_recipe_has_a_default():
    assert Recipe() == from_mapping({}, {})
    assert {f.name for f in fields(Recipe)} >= {"pool", "model", "tasks", "objective", "blocks", "domain", "solver"}


def test_an_option_of_a_default_takes_its_name():
    fields_ = {}
    assign(fields_, "solver.step_rule.evaluations", 4)
    rule = make_solver(fields_["solver"]).step_rule
    assert type(rule) is STEP_RULES["line-search"]
    assert rule.evaluations == 4


def test_an_option_of_a_default_that_is_no_name_keeps_the_others():
    fields_ = {"solver": "released-frank-wolfe"}
    default = make_solver("released-frank-wolfe").step_rule
    assign(fields_, "solver.step_rule.offset", 7)
    assert make_solver(fields_["solver"]).step_rule == replace(default, offset=7)


def test_a_start_is_relative_to_the_recipe_file(tmp_path, monkeypatch):
    (tmp_path / "here" / "old").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert relative_to({"start": "run:old"}, Path("here"))["start"] == "run:here/old"
    assert relative_to({"start": "run:elsewhere"}, Path("here"))["start"] == "run:elsewhere"
    assert relative_to({"start": "expert:old"}, Path("here"))["start"] == "expert:old"
