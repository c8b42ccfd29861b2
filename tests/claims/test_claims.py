"""Claims: the committed ones hold; a changed number, sentence, row, column or file is caught, and said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models

import spectral_sinks as ss

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"

PAGE = """# A page

The norm is **7.4 times** that of
others [7.3, 7.6]; 54 % dark, chance 4.7 %, at most -0.06. Half of it: 1.1 %.
"""
TABLE = """experiment,quantity,value,low,high,control
x,"norm, exit 0",7.42152,7.30668,7.55425,
x,"dark share, exit 0",0.543835,,,"others 0.067, chance 0.047, most -0.062"
"""
LADDER = """layer,kept,filter,mean
0,1,Phi,0.5
0,2,Phi,0.25
0,1,Rnd,0.4
0,2,Rnd,0.1
"""
NORM = 'text = "{7.4} times** that of others [{7.3}, {7.6}]", row = "norm*"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "results" / "x_summary.csv").write_text(TABLE)
    (tmp_path / "results" / "ladder.csv").write_text(LADDER)
    (tmp_path / "results" / "numbers.json").write_text(json.dumps({"a": {"b": [1.13, 7.4]}, "n": 7.3}))
    return tmp_path


Check = Callable[..., ss.claims.Check]


@pytest.fixture
def check(folder: Path) -> Check:
    """Check one claim, written as in the file."""

    def of(claim: str, file: str = "x_summary.csv", more: str = "", pages: bool = True) -> ss.claims.Check:
        path = folder / "claims.toml"
        path.write_text(
            '[pages]\np = "page.md"\n[commands]\n"x_*.csv" = "make x"\n'
            f'[[table]]\nfile = "{file}"\n{more}\nclaims = [{{ page = "p", {claim} }}]\n'
        )
        found = ss.claims.verify(ss.claims.Claims.read(path), folder / "results", folder if pages else None)
        assert len(found) == 1
        return found[0]

    return of


def test_the_committed_claims_hold() -> None:
    claims = ss.claims.Claims.read(RESULTS / "claims.toml")
    failed = [check for check in ss.claims.verify(claims, RESULTS, ROOT) if not check.holds]
    assert not failed, "\n".join(f"{c.page}: {c.text}: {c.problem} ({c.command})" for c in failed)
    assert all(claims.command(file) for claim in claims.claims for file in claim.files)


def test_no_number_of_the_pages_is_without_a_claim() -> None:
    claims = ss.claims.Claims.read(RESULTS / "claims.toml")
    assert {page: words for page, words in ss.claims.uncovered(claims, ROOT).items() if words} == {}


def test_every_page_of_the_documentation_is_checked() -> None:
    pages = set(ss.claims.Claims.read(RESULTS / "claims.toml").pages.values())
    unchecked = {"docs/api.md", "docs/families.md"}  # made by a script
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")} - unchecked <= pages


def test_numbers_of_a_row(check: Check) -> None:
    found = check(NORM)
    assert found.holds and found.numbers == 3
    assert found.command == "make x" and found.files == ("x_summary.csv",) and found.page == "page.md"


@pytest.mark.parametrize(
    "claim",
    [
        'text = "{54} % dark", row = "dark*", scale = 100',
        'text = "chance {4.7} %", row = "dark*", column = "control:2", scale = 100',
        'text = "at most {-0.06}", row = { quantity = "dark*", experiment = "x" }, column = "control:-1"',
        'text = "{7.4} times", column = "value", take = "max"',
        'text = "[{7.3}, {7.6}]", row = "norm*"',
        'text = "{7.3}, {7.6}", column = ["low", "high"], row = { experiment = "x", value = 7.42152 }',
        'text = "chance {4.7} %", column = "control:2", row = "dark*", scale = 742.152, '
        'over = { row = "norm*", column = "value" }',
        'text = "{7.4} times", row = "norm*", tolerance = 0.03',
        'text = "{7.4} times", row = "norm*", minus = { row = "dark*", column = "control:1" }',
        'text = "The norm is", row = "norm*", above = { row = "dark*" }',
        'text = "54", row = "dark*", below = { row = "norm*", scale = 0.1 }',
    ],
)
def test_ways_to_say_where(check: Check, claim: str) -> None:
    assert check(claim).problem == ""


@pytest.mark.parametrize(
    "claim",
    [
        'text = "{7.4} times", column = "a.b.1"',
        'text = "{1.1} %", column = "a.b.0"',
        'text = "{7.3}", column = "n"',
        'text = "{7.4} times", column = "a.b", take = "max"',
    ],
)
def test_json(check: Check, claim: str) -> None:
    assert check(claim, "numbers.json").problem == ""


def test_rows_are_compared_in_pairs(check: Check) -> None:
    more = 'column = "mean"\nby = ["layer", "kept"]'

    def problem(claim: str) -> str:
        return check(f'text = "A page", {claim}', "ladder.csv", more).problem

    assert problem('row = { filter = "Phi" }, above = { row = { filter = "Rnd" } }') == ""
    assert problem('row = { filter = "Rnd" }, below = { row = { filter = "Phi" } }') == ""
    found = problem('row = { filter = "Rnd" }, above = { row = { filter = "Phi" }, scale = 0.6 }')
    assert found == "not above in 1 of 2 rows, such as layer 0, kept 2"
    assert "missing" in problem('row = { filter = "Rnd" }, below = { row = { filter = "Phi", kept = 2 } }')
    assert "by" in check(
        'text = "A page", row = { filter = "Rnd" }, below = { row = { filter = "Phi" } }',
        "ladder.csv",
        'column = "mean"',
    ).problem  # fmt: skip


def test_counts_over_several_files(check: Check) -> None:
    assert "2 numbers" not in check('text = "{54} % dark", take = "count", tolerance = 52', "x_*.csv").problem
    assert check('text = "{54} %", take = "count"', "x_*.csv").problem == "stated 54, x_*.csv has 2"


@pytest.mark.parametrize(
    ("claim", "problem"),
    [
        ('text = "{7.4} times", row = "no such row"', "has no row 'no such row'"),
        ('text = "{7.4} times", row = { name = "norm" }', "has no column 'name'"),
        ('text = "{7.4} times", row = "norm*", column = "mean"', "has no column 'mean'"),
        ('text = "{7.4} times", row = "norm*", column = "control:1"', "no number 1"),
        ('text = "{54} %", row = "dark*", column = "low"', "has no number there"),
        ('text = "{7.4} times"', "1 numbers in braces, 2 in the table"),
        ('text = "{7.4 times}", row = "norm*"', "is not a number"),
        ('text = "{7.5} times", row = "norm*"', "no longer says so; stated 7.5, x_summary.csv has 7.42152"),
        ('text = "{7.6}]", row = "norm*", column = "value"', "stated 7.6, x_summary.csv has 7.42152"),
        ('text = "7.4 times", row = "norm*"', "nothing to check"),
        ('text = "54", row = "dark*", above = { row = "norm*" }', "not above"),
        ('text = "%", row = "dark*", below = { row = "norm*" }', "3 times: give more of the sentence"),
        ('text = "{7.4} times", row = "norm*", over = { row = "*" }', "`over` selects 2 numbers"),
        ('text = "{7.4} times", file = "none.csv"', "file none.csv is missing"),
        ('text = "{7.4} times", file = "numbers.json", column = "a.c"', "has no 'a.c'"),
    ],
)
def test_what_is_wrong_is_said(check: Check, claim: str, problem: str) -> None:
    assert problem in check(claim, "ladder.csv" if "file" in claim else "x_summary.csv").problem


@given(value=st.floats(-100, 100), digits=st.integers(0, 4), off=st.sampled_from([-1, 1]))
def test_rounding_is_right_and_the_next_number_is_not(value: float, digits: int, off: int) -> None:
    from spectral_sinks.claims.claims import Claim
    from spectral_sinks.claims.verify import _compared

    def problems(number: float) -> list[str]:
        text = f"{number:.{digits}f}"
        return list(_compared(Claim(page="p", text="t", file="f"), [text], [value]))

    assert not problems(value)
    assert problems(round(value, digits) + 2 * off * 10.0**-digits)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Copy the committed tables."""
    return Path(shutil.copytree(RESULTS, tmp_path / "copied", ignore=shutil.ignore_patterns("*.png")))


def test_verify_on_the_command_line(capsys: pytest.CaptureFixture[str], copied: Path) -> None:
    ran = tiny_models.run(capsys, "verify")
    assert ran.status == 0 and "claims hold" in ran.out

    path = copied / "sink_summary.csv"
    table = pd.read_csv(path)
    norm = table["quantity"].str.startswith("norm")
    table.loc[norm, "value"] *= 1.02
    table.to_csv(path, index=False)
    (copied / "birth.csv").unlink()
    ran = tiny_models.run(capsys, "verify", "--results", copied, "--json")
    found = json.loads(ran.out)
    assert ran.status == 1
    assert found["claims"] - found["hold"] == len(found["failed"]) > 2
    problems = {failed["problem"].split(" in ")[0] for failed in found["failed"]}
    assert problems == {
        *(
            f"stated {stated}, sink_summary.csv has {table.loc[norm, 'value'].item():.6g}"
            for stated in (7.4, 7.42)
        ),
        "file birth.csv is missing",
    }

    # a missing table is one line, whatever number of claims rests on it
    rest = [failed for failed in found["failed"] if failed["missing"]]
    assert {failed["missing"] for failed in rest} == {"birth.csv"}
    lines = tiny_models.run(capsys, "verify", "--results", copied).out.splitlines()
    assert [line for line in lines if "birth.csv" in line] == [
        f"birth.csv is missing, on which {len(rest)} claims rest; it is written by: {rest[0]['command']}"
    ]
    assert f"missing files: 1; claims that rest on them: {len(rest)}" in lines

    ran = tiny_models.run(capsys, "verify", "--results", copied / "none")
    assert ran.status == 2 and "is not a folder" in ran.err
    ran = tiny_models.run(capsys, "verify", "--only", "nothing")
    assert ran.status == 2 and "no claim rests on" in ran.err


def test_a_changed_sentence(tmp_path: Path) -> None:
    everything = ss.claims.Claims.read(RESULTS / "claims.toml")
    (short,) = (name for name, path in everything.pages.items() if path == "docs/findings.md")
    claims = everything.model_copy(
        update={
            "pages": {short: "docs/findings.md"},
            "claims": [claim for claim in everything.claims if claim.page == short],
            "stated": [stated for stated in everything.stated if stated.page == short],
        }
    )
    (tmp_path / "docs").mkdir()
    page = Path(shutil.copy(ROOT / "docs" / "findings.md", tmp_path / "docs"))
    shutil.copytree(RESULTS / "real", tmp_path / "results" / "real")
    recipe = "spectral_sinks/models/embedded/sinklet/recipe.json"
    (tmp_path / recipe).parent.mkdir(parents=True)
    shutil.copy(ROOT / recipe, tmp_path / recipe)
    assert all(check.holds for check in ss.claims.verify(claims, RESULTS, tmp_path))
    text = page.read_text()
    page.write_text(text.replace("44 % of all", "45 % of all"))
    failed = [check for check in ss.claims.verify(claims, RESULTS, tmp_path) if not check.holds]
    assert [check.problem for check in failed] == ["docs/findings.md no longer says so"]
    page.write_text(text + "\nAnother number, 0.1234, appears; the last 5 % as well.\n")
    assert [words.count("0.1234") for words in ss.claims.uncovered(claims, tmp_path)["docs/findings.md"]] == [
        1
    ]
    page.unlink()
    failed = [check for check in ss.claims.verify(claims, RESULTS, tmp_path) if not check.holds]
    assert {check.problem for check in failed} == {"page docs/findings.md is missing"} and len(failed) > 20


def test_tables_are_checked_without_the_pages() -> None:
    claims = ss.claims.Claims.read(RESULTS / "claims.toml")
    assert all(
        check.holds
        for check in ss.claims.verify(claims, RESULTS)
        if not check.files[0].startswith(("spectral", "results/real"))  # outside the results folder
    )


def test_rerun_of_one_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    ran = tiny_models.run(capsys, "verify", "--rerun", "--only", "spectrum", "--json")
    found = json.loads(ran.out)
    assert ran.status == 0 and found["hold"] == found["claims"] == 5


def test_rerun_runs_commands_and_says_what_it_cannot(tmp_path: Path) -> None:
    from spectral_sinks.cli.verify import rerun

    path = tmp_path / "claims.toml"
    path.write_text(
        '[pages]\np = "page.md"\n[commands]\n"info.json" = "spectral-sinks info --json > info.json"\n'
        '"old.csv" = "python train.py"\n'
        '[[table]]\nfile = "info.json"\nclaims = [{ page = "p", text = "{6} layers", column = "layers" }]\n'
        '[[table]]\nfile = "old.csv"\nclaims = [{ page = "p", text = "{1}", column = "a" }]\n'
    )
    (tmp_path / "old.csv").write_text("a\n1\n")
    claims, out = ss.claims.Claims.read(path), tmp_path / "out"
    out.mkdir()
    assert rerun(claims, out, tmp_path, None) == ["old.csv"]
    assert all(check.holds for check in ss.claims.verify(claims, out))
    assert json.loads((out / "info.json").read_text())["layers"] == 6


COMMAND = (
    '[pages]\np = "page.md"\n[commands]\n"FILE" = "COMMAND"\n'
    '[[table]]\nfile = "FILE"\nclaims = [{ page = "p", text = "{6} layers", column = "layers" }]\n'
)


@pytest.mark.parametrize(
    "command",
    [
        "spectral-sinks info --trust-remote-code --json > a.json",
        "spectral-sinks info --allow-pickle --json > a.json",
        "spectral-sinks nll --json --text /etc/passwd > a.json",
        "spectral-sinks nll --json --remote ndif > a.json",
        "spectral-sinks sinks --figure /etc/passwd --json > a.json",
        "spectral-sinks sinks --figure=/etc/passwd --json > a.json",
        "spectral-sinks sweep x.toml --json > a.json",
        "spectral-sinks remote collect theirs --json > a.json",
        "spectral-sinks info ../theirs --json > a.json",
        "spectral-sinks info /srv/theirs --json > a.json",
        "spectral-sinks info --json > b.json",
        "spectral-sinks info --json",
        "spectral-sinks --json",
        "spectral-sinks info 'a --json > a.json",
    ],
)
def test_rerun_runs_only_what_a_stranger_may_name(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spectral_sinks.cli import verify

    monkeypatch.setattr(verify.subprocess, "run", lambda *_, **__: pytest.fail("it ran"))
    path = tmp_path / "claims.toml"
    path.write_text(COMMAND.replace("FILE", "a.json").replace("COMMAND", command))
    ran = tiny_models.run(capsys, "verify", "--claims", path, "--rerun")
    assert ran.status == 2 and ("is not run again" in ran.err or "cannot be read" in ran.err)


def test_rerun_names_its_commands_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spectral_sinks.cli import verify

    said: list[str] = []
    monkeypatch.setattr(
        verify.subprocess, "run", lambda words, **_: said.append(capsys.readouterr().err) or words
    )
    path = tmp_path / "claims.toml"
    path.write_text(
        COMMAND.replace("FILE", "a.json").replace(
            "COMMAND", "spectral-sinks nll org/model --layer 0 --remove dark --json > a.json"
        )
    )
    tiny_models.run(capsys, "verify", "--claims", path, "--rerun")
    assert said == ["verify runs: spectral-sinks nll org/model --layer 0 --remove dark --json\n"]


@pytest.mark.parametrize("name", ["../a.json", "/etc/passwd", "a/../../b.csv", ".hidden", "a\\\\b", ""])
def test_claims_name_files_below_their_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(COMMAND.replace("FILE", name))
    with pytest.raises(ss.InputError, match="is not the path of a file below the folder"):
        ss.claims.Claims.read(path)
    path.write_text(COMMAND.replace("FILE", "a.json").replace("page.md", name))
    with pytest.raises(ss.InputError, match="is not the path of a file below the folder"):
        ss.claims.Claims.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[table", "is not TOML"),
        ("[pages]", "Field required"),
        ('[[claims]]\npage = "q"\ntext = "t"', "page 'q' is not among"),
        ('[pages]\np = "a"\n[[claims]]\npage = "p"\ntext = "t"\ncolum = "x"', "colum: Extra inputs"),
        ('[pages]\np = "a"\n[[claims]]\npage = "p"\ntext = "t"\ntake = "most"', "'max', 'min'"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "claims.toml").write_text(text)
    with pytest.raises(ss.InputError, match=message):
        ss.claims.Claims.read(tmp_path / "claims.toml")
