"""A reduced zoo, built from nothing once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from mergesolve.zoo import build


@pytest.fixture(scope="session")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "reduced"
    build(folder, reduced=True)
    return folder
