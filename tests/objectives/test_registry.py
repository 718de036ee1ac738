from __future__ import annotations

import subprocess
import sys

import mergesolve.objectives as package
import pytest
from mergesolve.objectives import DataError, SumObjective
from mergesolve.objectives.registry import OBJECTIVES, objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_entry_loads_an_objective_of_the_package_and_says_what_it_is(name: str) -> None:
    found = objective(name)
    assert issubclass(found, SumObjective)
    assert getattr(package, found.__name__) is found
    entry = OBJECTIVES[name]
    assert entry.summary
    assert entry.source
    assert entry.data in {"labelled", "unlabelled", "teachers", "none", "any"}
    assert getattr(found, "needs_labels", False) == (entry.data == "labelled")


def test_every_public_name_is_there_and_no_other() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert dir(package) == sorted(package.__all__)
    assert set(package._MODULES) == set(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'CrossEntropi'"):
        package.CrossEntropi  # noqa: B018


def test_the_registry_imports_no_torch() -> None:
    script = "import sys, mergesolve.objectives.registry, mergesolve.objectives; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"Unknown objective 'entropie'\. Did you mean 'entropy'\? Known: 'cross-entropy'"
    ):
        objective("entropie")
