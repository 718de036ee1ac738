"""Recipes of federations: what they say without anything being loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mergesolve.cli.names import UsageProblem
from mergesolve.cli.protocol import (
    CONTINUAL_CLIP,
    NINE,
    OTHERS,
    PROTOCOLS,
    FederationRecipe,
    federation_recipe,
    relative_to,
    to_yaml,
)
from mergesolve.cli.recipe import read_yaml
from mergesolve.cli.study import steps_of_study
from mergesolve.federated import make_step

PAPER = Path(__file__).parents[2] / "docs" / "examples" / "federated_clip.yaml"
TABLE_2 = ["Cars", "DTD", "EuroSAT", "GTSRB", "KITTI", "MNIST", "RESISC45", "SUN397", "SVHN"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_survives_being_written_as_yaml(name):
    recipe = federation_recipe({"protocol": name})
    assert federation_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


def test_fields_stand_over_those_of_their_protocol_one_by_one():
    recipe = federation_recipe({"protocol": "continual-clip", "training": {"epochs": 3}, "clients": ["digits"]})
    assert recipe.training.epochs == 3
    assert recipe.training.lr == CONTINUAL_CLIP["training"]["lr"]
    assert [client.name for client in recipe.clients] == ["digits"]
    assert [client.name for client in federation_recipe({"protocol": "continual-clip"}).clients] == list(NINE)


def test_the_settings_of_the_study_were_chosen_on_tasks_that_it_does_not_measure():
    assert not {*OTHERS} & {*NINE}


def test_every_step_of_the_study_is_one_of_the_registry():
    for step, changes, _ in steps_of_study().values():
        made = make_step(step)
        assert make_step(made.describe()) == made
        federation_recipe({"protocol": "continual-clip", **changes})


def test_the_setting_of_the_paper_is_a_recipe():
    recipe = federation_recipe(relative_to(read_yaml(PAPER, "recipe"), PAPER.parent))
    assert [client.name for client in recipe.clients] == TABLE_2
    assert all(client.task.folder or client.task.hub for client in recipe.clients)
    assert all(client.task.test or client.task.hub for client in recipe.clients)
    assert recipe.model.architecture == "ViT-B-32-quickgelu"
    training = recipe.training
    assert (training.images, training.epochs, training.batch, training.lr, training.weight_decay) == (
        None, 10, 128, 1e-5, 0.1,
    )  # fmt: skip
    assert (recipe.rounds, recipe.seed, recipe.zoo) == (10, 0, False)
    assert recipe.server.reference_data is not None
    assert recipe.server.reference_data.test == "data/ImageNet/val"
    assert not recipe.server.labels
    assert federation_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


def test_paths_of_a_recipe_are_relative_to_its_file(tmp_path):
    for name in ("base.safetensors", "a.npz", "b.npz", "net.py", "r.npz", "p.npz"):
        (tmp_path / name).write_bytes(b"")
    fields = {
        "base": "base.safetensors",
        "model": {"module": "net.py:mlp"},
        "clients": ["digits", {"name": "a", "data": {"name": "a", "npz": "a.npz", "test": "b.npz"}}, {"name": "c"}],
        "partition": {"task": {"name": "p", "npz": "p.npz"}},
        "server": {"reference_data": {"name": "r", "npz": "r.npz", "test": "nowhere.npz"}},
    }
    placed = relative_to(fields, tmp_path)
    assert placed["base"] == f"{tmp_path}/base.safetensors"
    assert placed["model"]["module"] == f"{tmp_path}/net.py:mlp"
    assert placed["clients"][0] == "digits"
    assert placed["clients"][1]["data"] == {"name": "a", "npz": f"{tmp_path}/a.npz", "test": f"{tmp_path}/b.npz"}
    assert placed["partition"]["task"]["npz"] == f"{tmp_path}/p.npz"
    assert placed["server"]["reference_data"] == {"name": "r", "npz": f"{tmp_path}/r.npz", "test": "nowhere.npz"}
    assert fields["base"] == "base.safetensors"  # the fields that were given stay as they are


def client(**fields):
    return {"clients": [{"name": "a", **fields}]}


WRONG = {
    "protocol": ({"protocol": "continual-clop"}, ["continual-clop", "Did you mean 'continual-clip'?", "label-skew"]),
    "field": ({"trainin": {}}, ["trainin", "Did you mean 'training'?"]),
    "field of a part": ({"training": {"lrr": 1}}, ["'training'", "lrr", "Did you mean 'lr'?"]),
    "part": ({"training": 1}, ["'training'", "mapping", "found 1"]),
    "type": ({"training": {"lr": "abc"}}, ["'lr' must be a number", "'abc'"]),
    "fraction": ({"rounds": 1.5}, ["'rounds' must be an integer", "1.5"]),
    "no rounds": ({"rounds": 0}, ["'rounds' must be at least 1", "0"]),
    "negative seed": ({"seed": -1}, ["'seed' must be at least 0", "-1"]),
    "no images": ({"training": {"images": 0}}, ["'training'", "'images' must be at least 1"]),
    "negative server images": ({"server": {"images": -1}}, ["'server'", "'images' must be at least 0"]),
    "negative reference": ({"server": {"reference": -1}}, ["'reference' must be at least 0"]),
    "negative fisher": ({"server": {"client_fisher": -1}}, ["'client_fisher' must be at least 0"]),
    "nothing to evaluate on": ({"evaluation": {"images": 0}}, ["'evaluation'", "'images' must be at least 1"]),
    "server on the test split": ({"server": {"split": "test"}}, ["'server'", "'test'", "accuracies"]),
    "client on the test split": (client(data={"name": "a", "hub": "x", "split": "test"}), ["client 'a'", "accuracies"]),
    "clients are no list": ({"clients": 3}, ["'clients' must be a list", "found 3"]),
    "client without a name": ({"clients": [{}]}, ["clients'[0]", "lacks the field 'name'"]),
    "client twice": ({"clients": ["a", "b", "a"]}, ["'a' is named twice"]),
    "client called like the first model": ({"clients": ["origin"]}, ["'origin'", "another name"]),
    "client called like the reference": ({"clients": ["reference"]}, ["'reference'", "another name"]),
    "joins before the first round": (client(joins=0), ["client 'a'", "'joins' must be at least 1"]),
    "leaves before it joins": (client(joins=3, leaves=1), ["client 'a'", "'leaves'"]),
    "absent in no round": (client(absent=[2, 0]), ["client 'a'", "'absent' must be at least 1"]),
    "fault in no round": (client(fault={"kind": "huge", "rounds": [0]}), ["client 'a'", "'rounds' must be at least 1"]),
    "field of the data": (client(data={"name": "a", "nps": "x"}), ["nps", "Did you mean 'npz'?"]),
    "mixed": (client(data={"name": "a", "mixed": 30}), ["client 'a'", "'mixed'", "step.mixed=N"]),
    "teacher": (client(data={"name": "a", "teacher": "b"}), ["client 'a'", "'teacher'", "Leave it out"]),
    "weight": (client(data={"name": "a", "weight": 2.0}), ["client 'a'", "'weight'", "Leave it out"]),
    "clients and a partition": ({"clients": ["a"], "partition": {"task": "b"}}, ["either clients or a partition"]),
    "partition among nobody": ({"partition": {"task": "b", "clients": 0}}, ["'clients' must be at least 1"]),
    "step without a name": ({"step": {"density": 0.2}}, ["'step'", "needs a 'name'", "density"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named_with_what_is_expected(name):
    fields, words = WRONG[name]
    with pytest.raises(UsageProblem) as caught:
        federation_recipe(relative_to(fields, Path.cwd()))
    for word in words:
        assert word in str(caught.value)


def test_the_fields_of_a_recipe_have_defaults_that_are_valid():
    assert federation_recipe({}) == FederationRecipe()
