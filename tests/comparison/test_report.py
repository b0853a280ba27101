from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskd_lightning.comparison.compare import compare_all
from dskd_lightning.comparison.gate import parse_condition
from dskd_lightning.comparison.report import GateResult, ReportData, plots, word_diff, write_report
from dskd_lightning.comparison.report.content import number
from dskd_lightning.evaluation.scores import prompt_metric
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.samples import SampledResponse, write_samples

HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\"'><svg onload=window.hacked=1>",
    "</p></details></main></body><h1>broken</h1>",
    "{{ 7*7 }}{% raw %}",
    "\x1b[31mred\x00\u202etxt",
    "$\\frac{1}{2$ _x_",
    "<!-- <style>*{display:none}</style>",
]


def make_run(root: Path, name: str, position: int) -> RunFolder:
    run = root / f"run{position}"
    (run / "predictions").mkdir(parents=True)
    (run / "alignments").mkdir()
    lines = [
        Prediction(
            i, f"{text} prompt", (f"{text} right",), f"{text} {'right' if position else 'wrong'} {i}", 10, 4
        ).to_json()
        for i, text in enumerate(HOSTILE)
    ]
    (run / "predictions" / "seed_10.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (run / "metrics.json").write_text(json.dumps(dict.fromkeys(HOSTILE, position + 0.5)))
    (run / "metrics.csv").write_text("step,val/<b>$x\n1,2.0\n2,1.0\n")
    (run / "config.yaml").write_text("\n".join([*HOSTILE, str(position)]))
    (run / "environment.json").write_text(
        json.dumps({text: text for text in HOSTILE} | {"packages": {"<i>": "<b>"}})
    )
    (run / "efficiency.json").write_text(
        json.dumps({"parameters": 10**6 * (position + 1), "device": HOSTILE[0]})
    )
    alignment = {
        "title": HOSTILE[0],
        "student": HOSTILE[:2],
        "teacher": HOSTILE[6:],
        "weights": [[0, 1], [1, 0]],
    }
    spectrum = {"effective_rank": 1.5, "singular_values": [2.0, 1.0, 0.0]}
    measured = {"structure_distance_cosine": 0.1, "structure_distance_inner_product": 0.2, "cka": 0.9}
    representation = {"after": measured, "before": measured, "projectors": {HOSTILE[0]: spectrum}}
    (run / "representation.json").write_text(json.dumps(representation))
    (run / "alignments" / "a.json").write_text(json.dumps(alignment))
    sample = SampledResponse(
        HOSTILE[0], tuple(HOSTILE), (-1.0,) * len(HOSTILE), (-0.1, -1.0, None, *[-9.0] * 5)
    )
    write_samples(run / "samples.json", [sample])
    return RunFolder.read(run, name)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    names = ["base " + HOSTILE[1], "_new $x^ " + HOSTILE[0], HOSTILE[2]]
    runs = [make_run(root, name, i) for i, name in enumerate(names)]
    comparisons = compare_all(runs, prompt_metric("rougeL"), resamples=200)
    gates = [GateResult(parse_condition("rougeL drops > 1"), names[1], True)]
    counts = {"candidate": 1, "tie": 2, "baseline": 3, "inconsistent": 0, "unreadable": 0}
    data = ReportData(runs, comparisons, gates, judge={names[1]: counts}, title=HOSTILE[3])
    return write_report(data, root / "out")


class Elements(HTMLParser):
    """Collects elements, attributes and text, and checks that they nest."""

    VOID = frozenset({"meta", "input", "br", "img", "link", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(report) -> Elements:
    return Elements(report.read_text(encoding="utf-8"))


def test_hostile_text_is_text(page) -> None:
    assert page.open == []
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert tags.count("style") == 1 + len([t for t in tags if t == "svg"])  # matplotlib writes one per plot
    assert tags.count("h1") == 1
    assert tags.count("body") == tags.count("main") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for text in [*HOSTILE[:5], HOSTILE[6], HOSTILE[7]]:
        assert text in page.text
    for character in "\x1b\x00\u202e":
        assert character not in page.text


def test_nothing_is_loaded_from_elsewhere(page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            local = value is None or value.startswith(("#", "plots/", "data:image/png;base64,"))
            assert local, f"{tag} {name}={value}"
    policies = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])


def test_ids_are_unique_and_references_resolve(page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("href", "xlink:href"):
            if (attributes.get(name) or "").startswith("#"):
                assert attributes[name][1:] in ids
        for name in ("style", "clip-path"):
            for target in re.findall(r"url\(#([^)]+)\)", attributes.get(name) or ""):
                assert target in ids


def test_accessible_names(page) -> None:
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    assert ("html", {"lang": "en"}) in page.tags


def test_plots_lie_beside(report) -> None:
    names = {path.name for path in (report.parent / "plots").iterdir()}
    stems = {"difference", "quality_cost", "curve_0", "alignment_0_0"}
    assert {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")} <= names


@pytest.mark.parametrize(("seconds", "drawn"), [((10.0, 20.0), True), ((10.0, 10.0), False)])
def test_students_of_one_size_are_set_against_the_time_of_training(tmp_path, seconds, drawn) -> None:
    runs = []
    for i, value in enumerate(seconds):
        run = make_run(tmp_path, f"run{i}", i)
        (run.path / "efficiency.json").write_text(json.dumps({"parameters": 10**6}))
        (run.path / "training.json").write_text(json.dumps({"seconds": value, "peak_bytes": 3_000_000}))
        runs.append(RunFolder.read(run.path, run.name))
    comparisons = compare_all(runs, prompt_metric("rougeL"), resamples=50)
    html = write_report(ReportData(runs, comparisons, []), tmp_path / "out").read_text()
    assert (tmp_path / "out/plots/quality_cost.svg").is_file() == drawn
    assert ("seconds of training" in html) == drawn
    assert "Cost of training" in html


@pytest.mark.parametrize("spectrum", [[2.0, 1.0, 0.7], [30.0, 1.0, 1e-4, 0.0], [0.0, 0.0], []])
def test_spectra_have_plain_numbers_on_their_axis(spectrum) -> None:
    plot = plots.spectrum_plot("s", "t2s.weight", {"run": spectrum})
    assert "mathdefault" not in plot.svg
    assert "singular value" in plot.svg


@given(st.text("ab c.\n", max_size=30), st.text("ab c.\n", max_size=30))
def test_word_diff_spells_both_texts(before, after) -> None:
    segments = word_diff(before, after)
    assert "".join(s.text for s in segments if s.kind != "insert") == before
    assert "".join(s.text for s in segments if s.kind != "delete") == after


def test_numbers() -> None:
    values = [None, 3, 2.0, 1234567, 25.974, 0.00123456, "x", float("nan"), True]
    assert [number(v) for v in values] == [
        "–",  # noqa: RUF001
        "3",
        "2",
        "1,234,567",
        "25.97",
        "0.001235",
        "x",
        "nan",
        "True",
    ]


CHECK = """
<iframe id="frame" src="report.html" width="390" height="800"></iframe>
<script>
onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const click = (element) => element.dispatchEvent(new view.MouseEvent("click", {bubbles: true}));
  const result = {};
  result.hacked = view.hacked === undefined;
  result.fits = page.documentElement.scrollWidth <= 390;
  const before = view.getComputedStyle(page.body).backgroundColor;
  click(page.getElementById("theme"));
  result.theme = before !== view.getComputedStyle(page.body).backgroundColor;
  const table = page.querySelector("table[data-sortable]");
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[1].dataset.value).map(Number);
  click(table.querySelectorAll("thead button")[1]);
  const down = names();
  click(table.querySelectorAll("thead button")[1]);
  const up = names();
  result.sorts = down[0] > down[2] && up[0] < up[2];
  const search = page.getElementById("search");
  search.value = "onload";
  search.dispatchEvent(new view.Event("input"));
  const hits = [...page.querySelectorAll(".example:not([hidden])")];
  result.filters = hits.length > 0;
  result.counts = page.getElementById("count").textContent;
  document.body.dataset.result = JSON.stringify(result);
};
</script>
"""


@pytest.mark.slow
def test_in_a_browser(report) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    (report.parent / "check.html").write_text(CHECK)
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={report.parent / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
        (report.parent / "check.html").as_uri(),
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-result="([^"]*)"', output)
    assert found is not None, output[-2000:]
    result = json.loads(found[1].replace("&quot;", '"'))
    assert result.pop("counts").endswith(f"of {len(HOSTILE)} prompts")
    assert all(result.values()), result
