"""What the index page says about each notebook: its title, one line, the minutes it takes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """One notebook on the index page. `file` is its name in the folder, `minutes` 0 where it names none."""

    file: str
    title: str
    description: str
    minutes: int


def read_card(path: Path) -> Card:
    """Read a card: from `metadata.workbench`, else from the first heading, the first paragraph and "5 minutes"."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    said = notebook.get("metadata", {}).get("workbench", {})
    texts = ["".join(c["source"]) for c in notebook.get("cells", []) if c["cell_type"] == "markdown"][:2]
    first = texts[0] if texts else ""
    heading = re.search(r"^#\s+(.+)$", first, re.MULTILINE)
    minutes = re.search(r"(\d+) min", first)
    return Card(
        file=path.name,
        title=said.get("title") or (heading.group(1).strip() if heading else path.stem),
        description=said.get("description") or first_paragraph("\n\n".join(texts)),
        minutes=int(said.get("minutes") or (minutes.group(1) if minutes else 0)),
    )


def first_paragraph(text: str) -> str:
    """Return the first paragraph that is prose, without its markup: no heading, no line of links, no list."""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if paragraph and not re.match(r"[#\-*|!<>$]|\d+\. ", paragraph) and ".ipynb)" not in paragraph:
            return re.sub(r"[*_`]|\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return ""


def catalog(folder: Path) -> list[Card]:
    """Return the cards of a folder's notebooks in order of their names; one that cannot be read keeps its name."""
    cards = []
    for path in sorted(folder.glob("*.ipynb")):
        try:
            cards.append(read_card(path))
        except (OSError, ValueError, KeyError, TypeError):
            cards.append(Card(path.name, path.stem, "This notebook cannot be read.", 0))
    return cards


def prepare_page(page_config: dict, *, settings: dict, notebook_path: str = "", **_: object) -> dict:
    """Put the folder's cards into a page's configuration, where the templates find them (Voilà's page_config_hook).

    A Jupyter server names a MathJax on the internet; without one Voilà sets formulas with the copy that it carries.
    """
    place = Path(settings["contents_manager"].root_dir, notebook_path or "")
    folder = place.parent if place.suffix == ".ipynb" else place
    page_config["workbench"] = {
        "notebooks": [asdict(card) for card in catalog(folder)],
        "current": place.name if place.suffix == ".ipynb" else "",
    }
    page_config["fullMathjaxUrl"] = page_config["mathjaxConfig"] = None
    return page_config


def give_token(handler, notebook=None, cwd: str = "") -> None:
    """Set the cookie whose token lets the page end its kernel when it is left (Voilà's prelaunch_hook)."""
    assert handler.xsrf_token  # reading it sets the cookie
