"""The page of a report in a browser without a network: every figure is drawn, nothing is cut off, tables sort."""

import profiles
import pytest

from workbench.reports import html_page

SCROLLS = """() => [...document.querySelectorAll('.wide')]
  .filter(one => one.scrollWidth > one.clientWidth).map(one => one.textContent.slice(0, 80))"""
DRAWN = "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0 && " + (
    "[...document.querySelectorAll('.js-plotly-plot')].every(plot => plot.querySelector('.main-svg'))"
)
OUTSIDE = """() => [...document.querySelectorAll('figure, .tiles > div, .card, section')]
  .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(one => one.outerHTML.slice(0, 80))"""
CUT = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
  const room = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].filter(one => one.textContent && one.getBoundingClientRect().width)
    .filter(one => { const at = one.getBoundingClientRect();
      return at.left < room.left - 1 || at.right > room.right + 1 || at.bottom > room.bottom + 1; })
    .map(one => one.textContent);
})"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A file with the page of a made-up report."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_page(profiles.report()), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("width", [1280, 800])
def test_the_page_is_whole_without_a_network(page, address, screenshots, width):
    page.context.set_offline(True)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(address)
    page.wait_for_function(DRAWN)
    assert page.visit.requests == [address] and page.visit.errors == []
    assert page.locator(".js-plotly-plot").count() == 9
    page.screenshot(path=screenshots / f"report-{width}.png", full_page=True)
    assert page.evaluate(OUTSIDE) == [] and page.evaluate(CUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate(SCROLLS) == []


def test_tables_sort_by_value_at_a_click_and_by_the_keyboard(page, address):
    page.goto(address)
    page.get_by_text("Table of 6 layers").click()
    table = page.locator("details[open] table")
    names = lambda: table.locator("tbody tr td:first-child").all_text_contents()
    before = names()
    button = table.locator("th button").nth(2)  # milliseconds
    button.click()
    assert names()[0] == "pool" and sorted(names()) == sorted(before)
    button.press("Enter")
    assert names()[-1] == "pool" and table.locator("th[aria-sort=descending]").count() == 1
