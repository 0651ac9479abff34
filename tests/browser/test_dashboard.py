"""The dashboards in a real browser: the index, a page, the way from one to the next, and what happens when it fails."""

import json

import pytest
from conftest import ROOT, serving

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
READY = "body[data-ready]"
ALL_DRAWN = """[...document.querySelectorAll('.wb-panel')].every(panel => {
  const state = panel.querySelector('.wb-state'), plot = panel.querySelector('.js-plotly-plot');
  if (!state || !plot) return true;
  const now = plot.data.filter(trace => trace.name === 'now');
  return state.dataset.state === 'done' && now.every(trace => trace.visible !== false && trace.x.length > 0);
})"""  # every panel has measured, and its figure shows all of what it measured
CUT_FORMULAS = """[...document.querySelectorAll('mjx-container')]
  .filter(formula => formula.scrollWidth > formula.clientWidth + 1 && getComputedStyle(formula).display !== 'inline')
  .map(formula => formula.innerText)"""


def cell(kind, source):
    extra = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "id": f"c{abs(hash(source)) % 10**8}", "metadata": {}, "source": source, **extra}


def write_notebook(path, *cells):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    content = {"cells": list(cells), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The address of three small notebooks: one with a slider and formulas, one that fails, one with little to say."""
    folder = tmp_path_factory.mktemp("course")
    write_notebook(
        folder / "00_slider.ipynb",
        cell("markdown", "# What does a slider move?\n\n[next](01_failing.ipynb) · 5 minutes\n\nA *number* below it."),
        cell("code", "import ipywidgets as widgets\nsecret_name = widgets.IntSlider(description='rank', max=10)"),
        cell(
            "code",
            "label = widgets.Label('rank 0')\nlink = widgets.dlink((secret_name, 'value'), (label, 'value'), str)",
        ),
        cell("markdown", r"Inline $W \approx UV^\top$ and $$\hat W = \sum_{i=1}^r \sigma_i u_i v_i^\top$$"),
        cell("code", "widgets.VBox([secret_name, label])"),
    )
    write_notebook(
        folder / "01_failing.ipynb",
        cell("markdown", "# What happens when a cell fails?\n\n[previous](00_slider.ipynb) · [next](02_last.ipynb)"),
        cell("code", "import sys\nprint('a warning', file=sys.stderr)\nprint('a line')"),
        cell("code", "raise ValueError('rank is 7; it goes from 0.05 to 1.0.')"),
    )
    write_notebook(folder / "02_last.ipynb", cell("markdown", "# Is this the end?"), cell("code", "1 + 1"))
    command = ("-m", "workbench", "dashboard", "--no-browser", "--notebooks", str(folder))
    with serving(*command, says=r"(http://127\.0\.0\.1:\d+/)") as address:
        yield address


def test_index_lists_the_notebooks(course, page):
    page.goto(course)
    cards = page.locator(".wb-cards a")
    assert cards.count() == 3
    assert page.locator(".wb-cards h2").all_inner_texts() == [
        "What does a slider move?",
        "What happens when a cell fails?",
        "Is this the end?",
    ]
    assert cards.first.locator("p").inner_text() == "A number below it."
    assert cards.first.locator("small").inner_text() == "5 minutes"
    cards.first.click()
    page.wait_for_selector(READY)
    assert page.url.endswith("/voila/render/00_slider.ipynb")


def test_page_hides_code_sets_formulas_and_moves_a_slider(course, page):
    page.goto(course + "voila/render/00_slider.ipynb")
    page.wait_for_selector(READY)
    assert "secret_name" not in page.locator("body").inner_text()
    page.wait_for_selector("mjx-container")
    handle = page.locator(".noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    handle.press("ArrowRight")
    page.wait_for_function("[...document.querySelectorAll('.widget-label')].some(e => e.textContent === '2')")
    assert page.visit.strangers == [] and page.visit.errors == []


def test_text_can_be_read_while_the_kernel_starts(course, page):
    page.goto(course + "voila/render/00_slider.ipynb", wait_until="commit")
    page.wait_for_selector("#wb-status:visible")
    assert page.locator("#wb-status-text").inner_text().endswith("…")
    page.wait_for_selector("h1:visible", timeout=60_000)
    page.wait_for_selector(READY)
    assert page.locator("#wb-status").is_hidden()


def test_one_page_leads_to_the_next_and_back(course, page):
    page.goto(course + "voila/render/00_slider.ipynb")
    page.wait_for_selector(READY)
    page.locator(".jp-MarkdownCell a", has_text="next").click()  # the link that the notebook itself has
    page.wait_for_url("**/01_failing.ipynb")
    page.wait_for_selector(READY)
    page.locator(".wb-next a[rel=next]").click()
    page.wait_for_url("**/02_last.ipynb")
    page.wait_for_selector(READY)
    page.locator(".wb-next a[rel=index]").click()
    page.wait_for_selector(".wb-cards")


def test_a_failing_cell_says_so(course, page):
    page.goto(course + "voila/render/01_failing.ipynb")
    page.wait_for_selector(READY)
    assert "rank is 7; it goes from 0.05 to 1.0." in page.locator(".wb-error-message").inner_text()
    assert page.locator(".wb-error pre").is_hidden()
    assert "a line" in page.locator("main").inner_text()
    assert "a warning" not in page.locator("main").inner_text()


def test_a_page_that_does_not_exist_leads_back(course, page):
    answer = page.goto(course + "voila/render/99_nothing.ipynb")
    assert answer.status == 404
    page.get_by_text("All notebooks").click()
    page.wait_for_selector(".wb-cards")


def kernel_of(page):
    return json.loads(page.locator("#jupyter-config-data").inner_text())["kernelId"]


def test_a_page_whose_kernel_has_ended_says_so(course, page):
    page.goto(course + "voila/render/00_slider.ipynb")
    page.wait_for_selector(READY)
    token = next(cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "_xsrf")
    page.request.post(f"{course}voila/api/shutdown/{kernel_of(page)}", form={"_xsrf": token})
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("#wb-status.wb-stopped:visible")
    assert "Reload the page" in page.locator("#wb-status-text").inner_text()


def test_leaving_a_page_ends_its_kernel(course, page):
    page.goto(course + "voila/render/00_slider.ipynb")
    page.wait_for_selector(".noUi-handle")
    kernel = kernel_of(page)
    page.goto(course)
    page.wait_for_function(f"fetch('/api/kernels/{kernel}').then(answer => answer.status === 404)", polling=500)


@pytest.mark.parametrize("width", [1280, 800])
def test_shipped_index(dashboards, page, screenshots, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(dashboards)
    assert page.locator(".wb-cards a").count() == len(NOTEBOOKS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    page.screenshot(path=screenshots / f"index-{width}.png", full_page=True)
    assert page.visit.strangers == [] and page.visit.errors == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_shipped_notebook_is_a_clean_page(dashboards, page, screenshots, path):
    page.set_default_timeout(120_000)
    page.goto(f"{dashboards}voila/render/{path.name}")
    page.wait_for_selector(READY)
    assert page.locator(".wb-error").count() == 0, page.locator(".wb-error").all_inner_texts()
    assert "import workbench" not in page.locator("main").inner_text()
    drawn = ".js-plotly-plot .trace path, .js-plotly-plot .points path"
    page.wait_for_function(
        "([panel, marks]) => !document.querySelector(panel) || document.querySelectorAll(marks).length > 5",
        arg=[".wb-panel", drawn],
    )
    page.wait_for_function(ALL_DRAWN)
    assert page.visit.strangers == [] and page.visit.errors == []
    for width in (1280, 800):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(400)
        assert page.evaluate(CUT_FORMULAS) == [], f"formulas are cut off at {width}"
        page.screenshot(path=screenshots / f"{path.stem}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"it scrolls sideways at {width}"
