"""The report in a real browser, without a network; comparison and pictures."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_lm
from bitfold.errors import CheckpointError, UsageError
from bitfold.evaluation.comparison import Candidate, compare, pareto, short_names
from bitfold.records.record import add_to_record, read_record, write_record
from bitfold.reporting import Measuring, gather, plots, save_plots, write_report
from bitfold.reporting.charts import heat_map
from bitfold.run.driver import quantize

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 180_000  # milliseconds: a busy machine takes half a minute to draw the page
EVIL = "</script><img src=x onerror=alert(1)>"
OPTIONS = {"context": 64, "max_tokens": 256}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original and three quantized folders that know about themselves."""
    home = tmp_path_factory.mktemp("report")
    tiny_lm.folder(home / "original", tiny_lm.model())
    for bits in (8, 4, 2):
        report = quantize(home / "original", home / f"q{bits}", bits=bits, group_size=16, keep_embeddings=True)
        write_record(home / f"q{bits}", report, {"seed": 0})
    text = home / "text.txt"
    text.write_text(tiny_lm.TEXT * 4, encoding="utf-8")
    prompts = ("Line 1", EVIL)
    measuring = Measuring(str(home / "original"), str(text), {**OPTIONS, "cache_dir": home / "cache"}, 4, prompts)
    gather([home / f"q{bits}" for bits in (8, 4, 2)], measuring)
    return home


@pytest.fixture(scope="module")
def runs(home: Path) -> list[Path]:
    return [home / "q8", home / "q4", home / "q2"]


@pytest.fixture(scope="module")
def report(home: Path, runs: list[Path]) -> Path:
    pytest.importorskip("plotly", reason="plotly is not installed (pip install 'bitfold[report]')")
    return write_report(gather(runs), home / "report.html")


def test_what_was_measured_is_kept_and_used(home: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("bitfold.models.model_ref.ModelRef.load", never)
    data = gather(runs, Measuring(str(home / "original"), prompts=("Line 1",)))
    assert data.comparison is not None
    assert [run.name for run in data.comparison.runs] == ["q2", "q4", "q8"]
    assert {o["model"] for o in data.outliers} == {"original"}
    assert [prompt for prompt, _ in data.samples] == ["Line 1", EVIL]
    assert [who for who, _ in data.samples[0][1]] == ["original", "q8", "q4", "q2"]
    swapped = [t for t in data.runs[0].tensors if t.swap_kl is not None]
    assert len(swapped) == 4


def test_comparison_is_that_of_evaluate(home: Path, runs: list[Path]) -> None:
    result = compare(runs)
    kl = {run.name: run.kl_mean for run in result.runs}
    assert kl["q8"] < kl["q4"] < kl["q2"]
    assert all(run.front for run in result.runs)
    (saved,) = read_record(runs[1])["evaluations"]
    assert saved["kl_mean"] == kl["q4"]
    assert {run.name: run.size for run in result.runs}["q4"] == (home / "q4" / "model.safetensors").stat().st_size
    again = compare(runs[:1], home / "original", str(home / "text.txt"), **OPTIONS)
    assert again.runs[0].kl_mean == pytest.approx(kl["q8"], rel=1e-6)
    assert again.setting == result.setting


def run_of(size: int, kl: float) -> Candidate:
    return Candidate(f"{size}", "", size, 4.0, 4.0, 10.0, kl, kl, kl, 0.9, 0.9, 1.0)


def test_the_front() -> None:
    runs = [run_of(30, 0.1), run_of(10, 0.9), run_of(20, 0.9), run_of(20, 0.5), run_of(40, 0.2)]
    marked = [(run.size, run.kl_mean, run.front) for run in pareto(runs)]
    assert marked == [(10, 0.9, True), (20, 0.5, True), (20, 0.9, False), (30, 0.1, True), (40, 0.2, False)]
    assert [run.front for run in pareto([run_of(10, 0.5), run_of(10, 0.5)])] == [True, True]


def test_names_tell_runs_apart() -> None:
    assert short_names([Path("/a/q4"), Path("/b/q4"), Path("/b/q8")]) == ["a/q4", "b/q4", "q8"]
    assert (
        short_names([Path("/a/q4"), Path("/a/q4")]) == ["/a/q4 (1)", "/a/q4 (2)"]
        or len(set(short_names([Path("/a/q4"), Path("/a/q4")]))) == 2
    )


def test_numbers_that_cannot_be_compared(home: Path, runs: list[Path], tmp_path: Path) -> None:
    quantize(home / "original", tmp_path / "new", bits=3, method="rtn")
    with pytest.raises(UsageError, match="nothing was measured"):
        compare([tmp_path / "new"])
    (other,) = read_record(runs[0])["evaluations"]
    add_to_record(tmp_path / "new", "evaluations", {**other, "context": 7})
    with pytest.raises(UsageError, match="different texts or in different ways"):
        compare([runs[0], tmp_path / "new"])
    with pytest.raises(UsageError, match="needs a reference"):
        compare(runs, None, "text.txt")
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([])
    with pytest.raises(CheckpointError, match="was not written by bitfold"):
        gather([home / "original"])


def test_a_folder_that_knows_nothing_has_a_report(home: Path, tmp_path: Path) -> None:
    quantize(home / "original", tmp_path / "bare", bits=4, method="rtn", keep_embeddings=True)
    (tmp_path / "bare" / "bitfold_report.json").unlink(missing_ok=True)
    data = gather([tmp_path / "bare"])
    assert data.comparison is None
    text = write_report(data, tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "nothing was measured against a reference yet" in text
    assert "output head, kept by default" in text


def test_heat_map_cells() -> None:
    cells = {"model.layers.10.mlp.up.weight": 0.5, "model.layers.2.mlp.up.weight": 0.0, "lm_head.weight": 1.0}
    chart = heat_map({**cells, "model.layers.2.attn.q.weight": 0.25}, "x", log=True)
    assert chart is not None
    assert (chart.rows, chart.columns) == (("2", "10"), ("attn.q", "mlp.up"))
    assert chart.values == ((0.25, None), (None, 0.5))
    assert heat_map({"lm_head.weight": 1.0}, "x", log=False) is None


def test_pictures(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'bitfold[report]')")
    drawn = [replace(plot, views=dict(list(plot.views.items())[::5])) for plot in plots(gather(runs))]
    files = save_plots(drawn, tmp_path)
    assert len(files) == 2 * sum(len(plot.views) for plot in drawn)
    assert {"pareto.svg", "pareto.png", "sizes.svg"} <= {f.name for f in files}
    for file in files:
        if file.suffix == ".svg":
            ElementTree.parse(file)
        assert 1000 < file.stat().st_size < 150_000, file.name
    words = (tmp_path / "pareto.svg").read_text(encoding="utf-8")
    assert all(name in words for name in ("q8", "q4", "q2", "weight files, MB"))
    before = (tmp_path / "pareto.svg").read_bytes()
    save_plots(drawn[:1], tmp_path)
    assert (tmp_path / "pareto.svg").read_bytes() == before
    with pytest.raises(UsageError, match="unknown kind of picture"):
        save_plots(drawn[:1], tmp_path, (".gif",))


def test_the_file_is_self_contained(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    outside_of_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside_of_scripts)
    assert EVIL not in text
    assert report.stat().st_size < 8e6


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[(1440, "light"), (390, "dark")], ids=["desktop light", "phone dark"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.troubles = []
    page.on("console", lambda message: page.troubles.append(message.text))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or page.troubles.append(r.url))
    page.goto(report.as_uri())
    page.wait_for_selector("#plot-pareto .main-svg")
    yield page
    context.close()
    assert page.troubles == []


def test_nothing_overflows_and_nothing_is_fetched(page: Any) -> None:
    width = page.evaluate("innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"
    )
    assert wide == []
    assert page.evaluate("document.querySelectorAll('.plot').length") == 4
    assert page.evaluate("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")


def test_plots_hover_and_zoom(page: Any) -> None:
    plot = page.locator("#plot-pareto")
    plot.scroll_into_view_if_needed()
    dot = page.evaluate(
        "(() => { const r = document.querySelectorAll('#plot-pareto .points path')[1].getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2] })()"
    )
    page.mouse.move(dot[0] - 30, dot[1] - 30)
    page.mouse.move(*dot, steps=5)
    page.wait_for_selector("#plot-pareto .hovertext")
    assert "KL" in page.locator("#plot-pareto .hovertext").first.text_content()
    before = page.evaluate("document.getElementById('plot-pareto').layout.xaxis.range.slice()")
    if page.evaluate("innerWidth") > 600:
        box = plot.bounding_box()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.3 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"], steps=6)
        page.mouse.up()
        page.wait_for_timeout(400)
        after = page.evaluate("document.getElementById('plot-pareto').layout.xaxis.range")
        assert before[0] < after[0] < after[1] < before[1]


def test_views_and_theme(page: Any) -> None:
    shown = "document.getElementById('plot-layers').data[0].customdata.flat().filter(v => v !== null)[0]"
    select = page.locator("select[data-plot=layers]")
    first = page.evaluate(shown)
    select.select_option("weight error: q2")
    assert page.evaluate(shown) != first
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background), page.evaluate("document.getElementById('plot-pareto').layout.paper_bgcolor")
    page.locator("#theme").click()
    after = page.evaluate(background), page.evaluate("document.getElementById('plot-pareto').layout.paper_bgcolor")
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_tables_sort_and_filter_by_keyboard(page: Any) -> None:
    column = "[...document.querySelectorAll('#table-tensors tbody tr:not([hidden])')].map(r => r.cells[5].dataset.sort)"
    for expected, reverse in (("ascending", False), ("descending", True)):
        page.locator("#table-tensors th").nth(5).locator("button").focus()
        page.keyboard.press("Enter")
        assert page.locator("#table-tensors th").nth(5).get_attribute("aria-sort") == expected
        errors = [float(v) for v in page.evaluate(column) if v]
        assert len(errors) == 42
        assert errors == sorted(errors, reverse=reverse)
    page.locator("input[data-table=tensors]").focus()
    page.keyboard.type("q4 up_proj")
    rows = page.evaluate(
        "[...document.querySelectorAll('#table-tensors tbody tr:not([hidden])')].map(r => r.innerText)"
    )
    assert len(rows) == 2
    assert all("q4" in row and "up_proj" in row for row in rows)
    assert page.locator("#count-tensors").text_content() == "2 of 42 rows"


def test_every_control_is_reached_by_the_tab_key(page: Any) -> None:
    wanted = page.evaluate(
        "document.querySelectorAll('a, button:not(.modebar-btn), select, input, .scroll, pre').length"
    )
    seen: set[int] = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(2 * wanted + 60):  # plots have buttons of their own, and the browser goes on from where it was
        if len(seen - {-1}) == wanted:
            break
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "[...document.querySelectorAll('a, button:not(.modebar-btn), select, input, .scroll, pre')]"
                ".indexOf(document.activeElement)"
            )
        )
    assert len(seen - {-1}) == wanted


def test_texts_are_texts(page: Any) -> None:
    assert page.evaluate("document.images.length") == 0
    assert EVIL in page.locator("#samples").text_content()


def test_the_report_without_a_comparison_names_what_is_missing(runs: list[Path]) -> None:
    data = replace(gather(runs), comparison=None, why_not="because")
    assert "pareto" not in {plot.key for plot in plots(data)}
    json.dumps([plot.key for plot in plots(data)])
