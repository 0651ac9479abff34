"""The profiler's panel in a real browser: roofs and layers are drawn, the table sorts, and nothing is cut off."""

import pages
import pytest
from conftest import serving

ADDRESS = r"(http://127\.0\.0\.1:\d+/\S*)"


OTHER_INK = """(() => {
  const own = "rgb(1, 2, 3)";
  document.querySelector(".wb-panel").style.setProperty("--wb-ink", own);
  const drawn = (kind) => [...document.querySelectorAll(`.main-svg ${kind}`)];
  const texts = drawn("text").filter((e) => getComputedStyle(e).fill !== own);
  const lines = drawn("path").filter((e) => getComputedStyle(e).stroke === "rgb(59, 59, 59)");
  return [...texts.map((e) => e.textContent), ...lines.map((e) => e.getAttribute("class"))];
})()"""  # what is drawn in an ink that does not follow the theme's


@pytest.fixture(scope="module")
def voila(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profilers")
    pages.write_notebook(folder / "profiler.ipynb", images=300, sources=pages.PROFILER)
    command = ("-m", "workbench", "dashboard", "--no-browser", "--notebooks", str(folder))
    with serving(*command, says=ADDRESS) as address:
        yield address


def column(page, name):
    """Return a column of the table of layers, as numbers."""
    heads = page.locator("table[data-sorts] thead th").all_inner_texts()
    cells = page.locator(f"table[data-sorts] tbody tr > :nth-child({heads.index(name) + 1})").all_inner_texts()
    return [float(cell.replace(",", "")) for cell in cells]


def test_layers_move_under_the_roofs_and_the_table_sorts(voila, page, screenshots):
    page.set_default_timeout(120_000)
    page.goto(f"{voila}voila/render/profiler.ipynb")
    page.wait_for_selector(".wb-tile")
    pages.wait_for_state(page, "done", timeout=120_000)
    pages.wait_for_marks(page)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length >= 10")
    assert any("fp32" in text for text in page.locator(".js-plotly-plot .annotation text").all_text_contents())
    page.locator(".wb-table summary", has_text="Layers").click()
    page.get_by_role("button", name="ms", exact=True).click()
    ms = column(page, "ms")
    assert len(ms) > 4 and ms == sorted(ms, reverse=True)
    page.locator(".wb-dial input[type=range]").first.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('.wb-words').innerText.includes('rank 0.45')")
    pages.wait_for_state(page, "done", timeout=120_000)
    page.locator(".wb-table summary", has_text="Table").click()
    ms = column(page, "ms")
    assert ms == sorted(ms, reverse=True)  # the order that was asked for outlives a new table
    assert page.locator(".wb-verdicts li").count() > 1 and page.locator(".wb-words .wb-kind").count() == 1
    for width in (1280, 800):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(600)
        page.screenshot(path=screenshots / f"profiler-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"it scrolls sideways at {width}"
        cut = page.evaluate(
            "[...document.querySelectorAll('.wb-tile')].filter(e => e.scrollWidth > e.clientWidth).length"
        )
        assert cut == 0, "text in a tile is cut off"
        tables = "[...document.querySelectorAll('.wb-tables')].map(e => e.scrollWidth - e.clientWidth)"
        assert max(page.evaluate(tables)) <= 0, "a table has to be scrolled"
    assert page.evaluate(OTHER_INK) == [], "a dark theme would not reach these"
    assert page.visit.strangers == [] and page.visit.errors == []
