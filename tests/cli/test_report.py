from __future__ import annotations

import json
from pathlib import Path


def test_a_report_of_a_real_run_goes_into_its_folder_and_has_its_recipe(solved, run, tmp_path):
    import shutil

    shutil.copytree(solved, "mine")
    result = run("report", "mine")
    assert result.exit_code == 0, result.stderr
    page = Path("mine/report.html").read_text(encoding="utf-8")
    content = json.loads(page.split('id="data">')[1].split("</script>")[0])
    [found] = content["runs"]
    assert found["recipe"] == (solved / "recipe.yaml").read_text()
    assert found["frames"]["scores"] is not None
    assert found["cost"]["samples"] > 0
    assert set(found["cost"]["parts"]) == {"combine", "objective", "correlate"}
    assert found["task_data"][0]["labels_used"] is True


def test_several_runs_make_one_page_here(solved, run):
    result = run("report", solved, solved, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["report"] == "report.html"
    named = run("report", solved, "--out", "other.html")
    assert named.exit_code == 0, named.stderr
    assert Path("other.html").exists()


def test_mistakes_are_told_in_one_line(solved, run):
    for arguments, message in (
        (("nowhere",), "there is no such folder"),
        ((solved, "--out", "a.pdf"), "ends in .html"),
        ((solved, "--out", "none/a.html"), "there is no folder 'none'"),
    ):
        result = run("report", *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
