from __future__ import annotations

import json
import math

import pytest
from mergesolve.reports import AccuracyRow, AccuracyTable
from mergesolve.reports.tables import listing, pairs, size
from rich.console import Console

ROWS = [
    AccuracyRow("average", {"a": 0.5, "b": 0.7}, 1.25, 2_000_000, "none", "methods"),
    AccuracyRow("best | so [far]", {"a": 0.9, "b": 0.6}, 10.0, 3_000_000, "200 labels", "methods"),
    AccuracyRow("expert a", {"a": 0.95}, None, None, "", "experts"),
]
TABLE = AccuracyTable(["a", "b"], ROWS, title="top-1")


def text(renderable):
    console = Console(width=120, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_mean_and_worst_are_over_the_tasks_that_were_evaluated():
    assert ROWS[0].mean == pytest.approx(0.6)
    assert ROWS[0].worst == 0.5
    assert ROWS[2].mean == 0.95
    assert math.isnan(AccuracyRow("nothing", {}).mean)


def test_markdown_has_one_line_a_row_and_the_best_of_a_group_in_bold():
    lines = TABLE.markdown().strip().split("\n")
    assert lines[0] == "| method | a | b | mean | worst | seconds | peak MB | data |"
    assert lines[2] == "| average | 50.0 | **70.0** | 60.0 | 50.0 | 1.2 | 2 | none |"
    assert lines[3] == r"| best \| so [far] | **90.0** | 60.0 | **75.0** | **60.0** | 10.0 | 3 | 200 labels |"
    assert lines[4] == "| expert a | 95.0 | – | 95.0 | 95.0 | – | – |  |"


def test_rich_prints_every_number_and_names_with_brackets():
    printed = text(TABLE.rich())
    assert "best | so [far]" in printed
    for cell in ("50.0", "70.0", "90.0", "75.0", "1.2", "200 labels", "top-1"):
        assert cell in printed


def test_columns_that_no_row_fills_are_left_out():
    table = AccuracyTable(["a"], [AccuracyRow("x", {"a": 1.0})])
    assert table.markdown().split("\n")[0] == "| method | a | mean | worst |"
    assert "seconds" not in text(table.rich())


def test_json_is_strict_and_holds_plain_numbers():
    value = json.loads(json.dumps(AccuracyTable(["a"], [*ROWS, AccuracyRow("x", {})]).json(), allow_nan=False))
    assert value["rows"][0]["accuracies"] == {"a": 0.5, "b": 0.7}
    assert value["rows"][0]["seconds"] == 1.25
    assert value["rows"][0]["peak_memory"] == 2_000_000
    assert value["rows"][3]["mean"] is None


def test_plain_tables_print_brackets_as_they_are():
    assert "[layer]" in text(pairs({"blocks": "2 [layer]"}))
    assert "[x]" in text(listing(("name",), [("[x]",)]))
    assert "[bold]" in text(listing(("run[bold]",), []))
    assert "[red]" in text(AccuracyTable(["task[red]"], ROWS).rich())


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1900, "1.9 kB"), (3.5e9, "3.5 GB"), (2e13, "20.0 TB")]
)
def test_sizes_for_people(count, words):
    assert size(count) == words


def test_calibration_has_columns_where_a_row_has_it():
    numbers = {"a": {"confidence": 0.8, "ece": 0.1, "logit_norm": 5.0}, "b": {"confidence": 0.6, "ece": 0.3}}
    table = AccuracyTable(["a", "b"], [AccuracyRow("x", {"a": 1.0, "b": 0.5}, 2.0, calibration=numbers), ROWS[0]])
    lines = table.markdown().strip().split("\n")
    assert lines[0].startswith("| method | a | b | mean | worst | confidence | ECE | seconds |")
    assert "| 70.0 | 20.0 | 2.0 |" in lines[2]
    assert "| – | – | 1.2 |" in lines[3]
    assert table.json()["rows"][0]["calibration"] == numbers
    assert "calibration" not in table.json()["rows"][1]
