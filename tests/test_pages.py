"""The Python examples on the pages of docs/ run, and links between pages lead to files."""

import re
import runpy
from pathlib import Path

import pytest

import spectral_sinks as ss

ROOT = Path(__file__).parents[1]
PRINTED = {
    "filters-and-spectra.md": "at exit 0 (nats per token)",
    "moving-the-sink.md": "position 4 as the sink of sinklet, in place of position 0",
    "circuits.md": "layer",
    "using-sinks.md": "masked positions: [0]",
    "sweeps.md": "removed_energy_share",
    "how-to/quantise.md": "sink tokens",
    "how-to/read-the-verdict.md": "the conventions disagree",
}
"""Part of what the examples of each page print."""

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("results/**/*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]


@pytest.mark.parametrize("page", PRINTED)
def test_examples_run(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert blocks
    script = tmp_path / "page.py"  # a file, since nnsight reads the source of a trace
    script.write_text("\n".join(blocks))
    runpy.run_path(str(script))
    assert PRINTED[page] in capsys.readouterr().out


def test_the_readme_prints_what_it_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    languages = [language for language, _ in blocks]
    first = languages.index("python")
    script = tmp_path / "quick_start.py"
    script.write_text(blocks[first][1])
    capsys.readouterr()
    runpy.run_path(str(script))
    printed, stated = capsys.readouterr().out.split(), blocks[first + 1][1].split()
    assert len(printed) == len(stated) == 2
    assert [float(x) for x in printed] == pytest.approx([float(x) for x in stated], abs=0.0011)


def anchors(text: str) -> set[str]:
    """The names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    for target, heading in links:
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not heading or heading in anchors(path.read_text()), f"{page.name} links to {target}#{heading}"


def test_files_that_the_architecture_names_exist() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|\.toml|/))`", (ROOT / "docs" / "architecture.md").read_text())
    package = ROOT / "spectral_sinks"
    folders = (ROOT, package, package / "measure", ROOT / "experiments")
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert len(named) > 40 and not missing


def test_the_reference_lists_every_public_name() -> None:
    space = runpy.run_path(str(ROOT / "docs" / "generate_api.py"))
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == space["page"](), "run: python docs/generate_api.py"
    assert all(f"`ss.{name}`" in page for name in ss.__all__)
