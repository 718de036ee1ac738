"""The HTML report: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from mergesolve.reports import Run, RunError, read_run, read_runs
from mergesolve.reports.html_report import render, save_report
from mergesolve.reports.palette import Palette

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = ("<script>document.documentElement.dataset.error='names run'</script>", "\"quoted\" 'twice' & {{DATA}}", "c")


def data_of(page: str) -> dict:
    """The JSON that the page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def unpacked(packed, shape):
    """Levels back to numbers, as the page does it."""
    levels = np.frombuffer(base64.b64decode(packed["data"]), "<u2").astype(float)
    values = packed["low"] + levels * (packed["high"] - packed["low"]) / 65534
    return np.where(levels == 65535, np.nan, values).reshape(shape)


def with_scores(folder, extra=True):
    """Add to a run's records what solvers write beside: scores, counters, parts, kinds of steps."""
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(0)
    for line in lines[1:]:
        k = line["iteration"]
        line["scores"] = rng.normal(size=np.shape(line["coefficients"])).tolist()
        line |= {"gradients": k + 1, "evaluations": 3 * k, "samples": 40 * (k + 1), "parts": {"combine": 0.1 * k}}
        if extra and line["step"] is not None:
            line["extra"] = {"active": k + 1, "kind": ("toward", "away", "drop")[k % 3]}
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Tags(HTMLParser):
    """Tags of a page, and what it refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_the_page_holds_the_run_to_the_precision_that_it_states(write_run):
    run = read_run(with_scores(write_run(experts=[f"e{k}" for k in range(7)], iterations=9)))
    content = data_of(render([run]))["runs"][0]
    _, path = run.trajectory()
    found = unpacked(content["frames"]["coefficients"], path.shape)
    assert np.abs(found - path).max() <= 0.51 * (path.max() - min(0, path.min())) / 65534
    scores = unpacked(content["frames"]["scores"], path.shape)
    assert np.abs(scores - run.scores()).max() <= 0.51 * np.ptp(run.scores()) / 65534
    np.testing.assert_allclose(content["trace"]["value"], run.series("value"), rtol=1e-5)
    assert content["trace"]["step"][-1] is None
    assert content["trace"]["kind"][:3] == ["toward", "away", "drop"]
    assert set(content["trace"]["tasks"]) == {"one", "two"}


def test_zeros_stay_zeros_and_nan_becomes_null(write_run):
    folder = with_scores(write_run(iterations=3))
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    lines[1]["coefficients"] = [[0.0, 0.5, 0.0], [1.0, 0.0, 0.0]]
    lines[2]["scores"][0][1] = None
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    frames = data_of(render([read_run(folder)]))["runs"][0]["frames"]
    assert (unpacked(frames["coefficients"], (3, 2, 3))[0] == np.array(lines[1]["coefficients"])).sum() >= 4
    assert np.argwhere(np.isnan(unpacked(frames["scores"], (3, 2, 3)))).tolist() == [[1, 0, 1]]


def test_the_page_loads_nothing(write_run):
    page = render([read_run(with_scores(write_run()))])
    tags = Tags(page)
    assert tags.addresses == ["#main"]
    assert not set(tags.tags) & {"link", "img", "iframe", "object", "embed", "base"}
    assert "default-src 'none'" in page
    assert "url(http" not in page
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_names_cannot_become_markup(write_run, tmp_path):
    folder = with_scores(write_run("a & <b>run", experts=HOSTILE, layers=("<i>layer", "]]>")))
    (folder / "recipe.yaml").write_text("note: '</script><img src=x onerror=alert(1)>'\n")
    page = render([read_run(folder)])
    plain = Tags(render([read_run(with_scores(write_run("plain")))]))
    assert Tags(page).tags == plain.tags
    content = data_of(page)
    assert set(content["names"]) == set(HOSTILE)
    assert "onerror" in content["runs"][0]["recipe"]
    assert "<title>a &amp; &lt;b&gt;run</title>" in page


def test_an_expert_has_the_colour_of_the_figures_and_more_than_twenty_have_one_each(write_run):
    run = read_run(write_run(experts=[f"e{k}" for k in range(26)], iterations=5))
    page = render([run])
    names = data_of(page)["names"]
    light = dict(re.findall(r"--e(\d+): (#\w+);", page.split("@media (prefers-color-scheme: dark)")[0]))
    colours = {name: light[str(k)] for k, name in enumerate(names)}
    figures = Palette.of([run])
    assert len(figures.colours) == 9
    assert all(colours[name] == colour for name, colour in figures.colours.items())
    assert len(set(colours.values())) == 26


def test_long_runs_are_thinned_and_the_page_is_small():
    experts, layers = tuple(f"expert-{k}" for k in range(24)), tuple(f"block.{k}" for k in range(25))
    rng = np.random.default_rng(0)
    matrices = [rng.dirichlet(np.full(24, 0.2), size=25).tolist() for _ in range(7)]
    records = tuple(
        {
            "iteration": k, "value": 1 / (k + 1.5), "gap": 1 / (k + 1.7) ** 2, "stationarity": 0.3, "step": 2 / (k + 2),
            "vertices": list(experts[:20]), "vertex_share": [0.05] * 20,
            "tasks": dict.fromkeys(experts[:8], 1 / (k + 3)),
            "coefficients": matrices[k % 7], "scores": matrices[-k % 7], "seconds": 0.1 * k, "samples": 40 * k,
        }
        for k in range(801)
    )  # fmt: skip
    header = {"domain": {"name": "simplex"}, "solver": {"name": "frank-wolfe"}}
    page = render([Run("long", None, experts, layers, records, header)])
    assert len(page.encode()) < 3_000_000
    content = data_of(page)["runs"][0]
    at = content["frames"]["iterations"]
    assert (at[0], at[-1], content["records"]) == (0, 800, 801)
    assert len(at) * 24 * 25 * 2 <= 300_000
    assert max(np.diff(at)) - min(np.diff(at)) <= 1  # evenly spaced
    assert len(content["trace"]["value"]) == 801
    assert content["frames"]["mean_iterations"] == list(range(801))
    means = unpacked(content["frames"]["means"], (801, 24))
    np.testing.assert_allclose(means, [np.mean(matrices[k % 7], axis=0) for k in range(801)], atol=1e-5)
    assert content["choices_note"] == "Dots of one record in 2."
    assert sum(map(len, content["choices"])) <= 12_000


def test_choices_are_counted_over_all_records(write_run):
    run = read_run(write_run(iterations=11))  # a 0.75, base 0.25 in each of ten steps
    chosen = {entry["name"]: entry for entry in data_of(render([run]))["runs"][0]["chosen"]}
    assert chosen["a"] == {"name": "a", "share": 0.75, "iterations": 10, "first": 0, "last": 9}
    assert chosen["base"]["share"] == 0.25


def test_the_bound_of_a_constrained_run_is_told_with_its_price(write_run):
    folder = write_run()
    assert "constraint" not in dict(data_of(render([read_run(folder)]))["runs"][0]["about"])
    result = json.loads((folder / "result.json").read_text())
    told = {"constraint": 0.0214, "bound": 0.02, "violation": 0.0014, "multiplier": 1.5}
    (folder / "result.json").write_text(json.dumps({**result, **told}))
    about = dict(data_of(render([read_run(folder)]))["runs"][0]["about"])
    assert about["constraint"] == "0.0214, at most 0.02 (violation 0.0014, price 1.5)"


def test_test_inputs_and_estimates_are_warned_of(write_run):
    folder = write_run(estimate=True)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "data": {"labelled": 0, "test_inputs": True}}))
    heads = [head for head, _ in data_of(render([read_run(folder)]))["runs"][0]["warnings"]]
    assert heads == ["Test inputs were seen.", "Estimates."]
    going = data_of(render([read_run(write_run("going", finished=False))]))["runs"][0]
    assert going["warnings"][0][0] == "Not finished."


def test_several_runs_share_names_and_say_what_does_not_compare(write_run):
    runs = read_runs([write_run("x"), write_run("y", experts=("c", "d"), domain="free", seed=1)])
    content = data_of(render(runs))
    assert set(content["names"]) == {"a", "b", "c", "d"}
    assert [run["name"] for run in content["runs"]] == ["x", "y"]
    assert any("domains" in sentence for sentence in content["differences"])


def test_the_same_runs_make_the_same_bytes(write_run, tmp_path):
    run = read_run(with_scores(write_run()))
    assert render([run]) == render([run])
    save_report([run], tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == render([run])


def test_runs_without_anything_to_show_are_refused(write_run, tmp_path):
    with pytest.raises(RunError, match="no iteration yet"):
        render([read_run(write_run(iterations=0, finished=False))])
    with pytest.raises(RunError, match="needs a run"):
        render([])
    with pytest.raises(RunError, match="there is no folder"):
        save_report([read_run(write_run("r"))], tmp_path / "none" / "a.html")


# --- in a browser ----------------------------------------------------------------------------------------------------

WRAPPER = """<!DOCTYPE html><html><body style="margin:0">%s<pre id="found"></pre><script>
const settle = (frames) => new Promise((done) => setTimeout(done, frames * 50));
async function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  await settle(4);
  const wide = () => [...page.body.querySelectorAll("*")].filter((node) => {
    if (node.closest(".scroll, pre, .tip, .skip, svg *") || node.closest(".plot[style*=auto]")) return false;
    const box = node.getBoundingClientRect();
    return box.width > 0 && (box.right > view.innerWidth + 0.5 || box.left < -0.5);
  }).map((node) => node.outerHTML.slice(0, 120));
  const cells = () => [...page.querySelectorAll("svg rect[rx='1.5']")].map((cell) => cell.style.fill).join();
  const found = {
    ready: root.dataset.ready, width: view.innerWidth, scroll: root.scrollWidth, wide: wide(),
    charts: [...page.querySelectorAll("svg[role=img]")].map((chart) => [chart.getAttribute("aria-label"), chart.querySelectorAll("path, rect, circle").length]),
    headings: [...page.querySelectorAll("h1, h2, h3")].map((heading) => heading.textContent),
    warnings: page.querySelectorAll(".warning").length, pre: (page.querySelector("pre") || {}).textContent,
    unnamed: [...page.querySelectorAll("button, input, select")].filter((node) => !(node.textContent || node.getAttribute("aria-label") || node.closest("label"))).length,
  };
  const before = cells(), slider = page.querySelector("input[type=range]");
  if (slider) { slider.value = 0; slider.dispatchEvent(new view.Event("input")); }
  found.moved = cells() !== before;
  for (const select of page.querySelectorAll("select")) { select.selectedIndex = select.options.length - 1; select.dispatchEvent(new view.Event("change")); }
  const paths = page.querySelectorAll("svg path").length;
  const chip = page.querySelector(".legend button");
  if (chip) chip.click();
  found.hidden = page.querySelectorAll("svg path").length < paths || paths === 0;
  for (const node of page.querySelectorAll("details")) node.open = true;
  const play = page.querySelector(".play");
  if (play) play.click();
  for (const chart of page.querySelectorAll("svg[role=img]")) {
    const box = chart.getBoundingClientRect();
    chart.dispatchEvent(new view.PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }));
  }
  await settle(2);
  found.rows = page.querySelectorAll("details tbody tr").length;
  const radios = page.querySelectorAll("input[type=radio]");
  if (radios.length) radios[radios.length - 1].click();
  await settle(8);
  found.tip = page.getElementById("tip").textContent.length;
  found.wideAfter = wide();
  found.scrollAfter = root.scrollWidth;
  found.error = root.dataset.error || null;
  return found;
}
addEventListener("load", async () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) { found.push(await look(frame)); frame.remove(); }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script></body></html>"""  # noqa: E501


@pytest.fixture
def look(tmp_path):
    """look([(page, width), ...]) -> what a browser found on each page; one start of the browser for all."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")

    def open_all(pages):
        frames = [
            f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
            for page, width in pages
        ]
        (tmp_path / "wrapper.html").write_text(WRAPPER % "".join(frames), encoding="utf-8")
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --virtual-time-budget=20000 --window-size=1400,1000 --dump-dom"
        )
        done = subprocess.run(
            [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "wrapper.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        return json.loads(html.unescape(found[1]))

    return open_all


def test_a_browser_draws_every_chart_without_error_or_overflow_at_400_and_1280_px(look, write_run):
    layers = [f"transformer.resblocks.{k}" for k in range(12)]
    one = with_scores(write_run("a-run-with-a-long-name-" * 4, experts=[f"e{k}" for k in range(24)], layers=layers))
    three = with_scores(write_run("three", experts=HOSTILE, layers=("<i>layer", "]]>"), iterations=8))
    (three / "recipe.yaml").write_text("note: '</script><img src=x onerror=alert(1)>'\n" + "x" * 400)
    free = write_run(
        "free", experts=("p", "q", "r", "s"), domain="free", finished=False, vertices=False
    )  # and no scores
    single = with_scores(write_run("single", iterations=1, domain="simplex"))
    runs = [read_run(folder) for folder in (one, three, free, single)]
    pages = {"one": runs[:1], "three": runs[1:2], "free": runs[2:3], "single": runs[3:], "several": runs}
    shown = [(name, 400) for name in pages] + [("one", 1280), ("several", 1280)]
    found = look([(render(pages[name]), width) for name, width in shown])
    assert len(found) == len(shown)
    for (name, width), entry in zip(shown, found, strict=True):
        what = f"{name} at {width} px"
        assert entry["width"] == width
        assert entry["error"] is None, what
        assert entry["ready"] == "1", what
        assert entry["wide"] == entry["wideAfter"] == [], what
        assert max(entry["scroll"], entry["scrollAfter"]) <= entry["width"], what
        assert entry["unnamed"] == 0, what
        labels = " ".join(label for label, _ in entry["charts"])
        for chart in ("Stacked", "Coefficient of each", "Active experts", "Size of the active", "Layers × experts"):
            assert chart in labels, what
        for chart in ("Objective", "Certificates", "Loss of each task"):
            assert chart in labels, what
        assert all(count > 0 for _, count in entry["charts"]), what
        titles = ["Coefficients", "Active set", "Layers × experts", "Convergence", "Cost and data"]
        assert set(titles) <= set(entry["headings"]), what
        assert entry["hidden"], what
        assert entry["rows"] > 5, what
        assert ("triangle of its three experts" in labels) == (name in ("three", "single")), what
        assert ("of all runs" in labels) == (name == "several"), what
        assert entry["moved"] == (name != "single"), what  # it has one iteration, and no slider
        assert entry["tip"] > 0, what
    by_name = dict(zip([name for name, _ in shown], found, strict=True))
    assert by_name["three"]["pre"].startswith("note: '</script><img")
    assert by_name["free"]["warnings"] == 1
    assert "Scores of the oracle" in by_name["one"]["headings"]
