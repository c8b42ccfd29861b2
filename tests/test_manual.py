"""The manual: pages have a place on the site, notebooks no outputs, and the citation is of this version."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import spectral_sinks as ss

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/tutorials/*.ipynb"))
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md"), *NOTEBOOKS]


def places(entry: Any) -> list[str]:
    """The files that a table of contents names, at any depth."""
    if isinstance(entry, dict):
        own = [entry[key] for key in ("root", "file") if key in entry]
        return own + [name for value in entry.values() for name in places(value)]
    return [name for part in entry for name in places(part)] if isinstance(entry, list) else []


def test_every_page_has_one_place_on_the_site() -> None:
    listed = places(yaml.safe_load((ROOT / "docs" / "_toc.yml").read_text()))
    assert len(listed) == len(set(listed))
    found = {str(path.relative_to(ROOT).with_suffix("")) for path in PAGES}
    assert len(found) > 30
    assert found <= set(listed)
    assert all((ROOT / f"{name}.md").exists() or (ROOT / f"{name}.ipynb").exists() for name in listed)


def test_the_index_links_to_every_tutorial_how_to_and_concept() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    rooms = ("tutorials", "how-to", "concepts")
    pages = [
        path for room in rooms for path in ROOT.glob(f"docs/{room}/*") if path.suffix in (".md", ".ipynb")
    ]
    assert len(pages) > 15
    assert not [path.name for path in pages if f"]({path.parent.name}/{path.name})" not in index]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs_and_link_to_what_exists(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text)
    assert links and all((path.parent / link).exists() for link in links)


def test_citation_and_changelog_name_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["authors"] == [{"name": "the spectral_sinks authors"}]
    assert citation["version"] == ss.__version__
    assert f"version = {{{ss.__version__}}}" in (ROOT / "docs" / "how-to" / "cite.md").read_text()
    versions = re.findall(
        r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == ss.__version__
    assert versions == sorted(versions, reverse=True)
