"""Available memory within a control group's limit."""

import pytest
import torch
from mergesolve.pools import memory


@pytest.fixture(params=["inactive_file", "total_inactive_file"])
def group(request, tmp_path, monkeypatch):
    """A control group of 10 MB, 9 of them used, in a machine with more."""
    files = [tmp_path / name for name in ("limit", "used", "stat")]
    monkeypatch.setattr(memory, "CONTROL_GROUPS", ((*map(str, files), request.param),))
    monkeypatch.setattr(memory, "_host_available", lambda: 50_000_000)
    limit, used, stat = files
    limit.write_text("10000000\n")
    used.write_text("9000000\n")
    stat.write_text(f"anon 1000000\nfile 8000000\n{request.param} 6000000\nactive_file 2000000\n")
    return files


def available():
    return memory.available(torch.device("cpu"))


def test_cached_files_that_can_be_dropped_count_as_available(group):
    assert available() == 7_000_000


def test_reading_files_does_not_change_what_is_available(group):
    before = available()
    _, used, stat = group
    used.write_text("9500000\n")
    stat.write_text(stat.read_text().replace(" 6000000", " 6500000"))
    assert available() == before


def test_without_statistics_all_use_counts(group):
    group[2].unlink()
    assert available() == 1_000_000


def test_a_group_without_a_limit_leaves_the_machines_memory(group):
    group[0].write_text("max\n")
    assert available() == 50_000_000


def test_a_group_beyond_its_limit_leaves_nothing(group):
    group[1].write_text("19000000\n")
    assert available() == 0
