"""The page of families: its rows, measured again for families of every kind."""

import runpy
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generate_families.py"))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return (ROOT / "docs" / "families.md").read_text().splitlines()


@pytest.mark.parametrize(
    "family",
    [
        "Llama",  # as most are
        "OPT",  # no module for the MLP
        "GPT-J",  # layers return tuples, and attention and MLP share a norm
        "Falcon 7B",  # adds in place
        "BLOOM",  # adds the residual inside attention and MLP
        "Cohere",  # a factor on the logits
        "Granite",  # a factor on what is added
        "NanoChat",  # one norm at both ends
        "Qwen3-Next",  # layers without attention
        "DeepSeek V3",  # keys and values from one compressed matrix
        "MiMo-V2-Flash",  # values narrower than keys
        "Gemma 3n",  # no one residual stream
        "Mamba",  # no attention
    ],
)
def test_a_row_of_the_page_is_what_is_measured(family: str, script: dict[str, Any], lines: list[str]) -> None:
    assert script["line"](family) in lines, "run: make families"


@pytest.mark.parametrize("family", ["Laguna", "gpt-oss", "BitNet"])
def test_a_row_of_the_second_table_is_what_is_measured(
    family: str, script: dict[str, Any], lines: list[str]
) -> None:
    assert script["counted"](family) in lines, "run: make families"


def test_every_family_has_a_row_and_none_is_wrong(script: dict[str, Any], lines: list[str]) -> None:
    first = lines[: lines.index("## Gates, learned logits and experts")]
    for part, families in ((first, script["FAMILIES"]), (lines[len(first) :], script["COUNTED"])):
        rows = [line.split("|")[1].strip() for line in part if line.startswith("| ")]  # and their head
        assert rows[1:] == list(families)
    assert "**wrong**" not in "\n".join(lines)
