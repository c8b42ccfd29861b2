"""Sweep files: what they mean, the same as Python objects, and what is said of a bad one."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_chats, tiny_models

import spectral_sinks as ss

EXAMPLES = sorted((Path(__file__).parents[2] / "experiments").glob("sweep_*.toml"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"body": tiny_models.text(150, seed)}) + "\n" for seed in range(5)))
    return path


@pytest.fixture
def write(tmp_path: Path, checkpoint: Path, texts: Path) -> Any:
    """Write a sweep file on a small model; `{model}` and `{text}` are its paths."""

    def call(content: str) -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(content.replace("{model}", str(checkpoint)).replace("{text}", str(texts)))
        return path

    return call


HEAD = """
model = "{model}"
[texts]
text = "{text}"
column = "body"
length = 66
"""


def test_what_it_means(write: Any, checkpoint: Path, texts: Path) -> None:
    """The same cells, addresses and rows as the same things made in Python."""
    file = write("""
        model = "{model}"
        dtype = "float32"
        batch_size = 3
        [texts]
        text = "{text}"
        column = "body"
        documents = 4
        length = 66
        per_document = 2
        bos = "never"
        [spectrum]
        convention = "folded"
        bands = 8
        [[grid]]
        site = "exit"
        layer = [0, [0, 2]]
        ladder = "psi"
        kept = [3, 7]
        fill = ["zero", "mean"]
        controls = 1
        [[grid]]
        site = ["mlp", "head:1"]
        layer = 1
        remove = "dark"
        keep = ["1-3", "8"]
        tokens = ["all-but-first", [5, 7]]
        [[grid]]
        site = ["mlp", "embedding"]
        layer = 1
        remove = "dark"
        tokens = ["all-but-first"]
    """)
    model = ss.load(checkpoint)
    texts_read = ss.documents(texts, column="body", limit=4)
    windows = ss.cut(texts_read, model, length=66, per_document=2, bos="never")
    assert len(windows) == 8
    spectrum = ss.read_spectrum(model, convention="folded", bands=8)
    embedding = ss.read_spectrum(model, "embedding", bands=8)
    both = model, windows, spectrum, embedding
    cells = ss.grid(
        *both, layers=[0, [0, 2]], ladder=["psi"], kept=[3, 7], fills=["zero", "mean"], controls=1
    )
    tokens = ["all-but-first", [5, 7]]
    cells += ss.grid(
        *both, sites=["mlp", "head:1"], layers=[1], keep=["1-3", "8"], remove=["dark"], tokens=tokens
    )
    more = ss.grid(*both, sites=["mlp", "embedding"], layers=[1], remove=["dark"], tokens=["all-but-first"])
    expected = ss.Sweep.of(model, windows, [*cells, more[1]], batch_size=3)
    made = ss.sweeps.SweepFile.read(file).prepare()
    assert [cell.name for cell in made.cells] == [cell.name for cell in expected.cells]
    assert (made.addresses, made.key, made.units) == (expected.addresses, expected.key, expected.units)
    manifest = made.manifest()
    assert manifest["spectrum"].startswith("unembedding, folded, 8 bands, ")
    assert (manifest["batch_size"], manifest["dtype"]) == (3, "torch.float32")
    assert manifest["windows"]["bos"] == "never" and manifest["model"] == str(checkpoint)
    assert manifest["libraries"].keys() >= {"torch", "nnsight", "transformers", "python"}
    json.dumps(manifest)


def test_chats(write: Any, tmp_path: Path) -> None:
    checkpoint = tiny_chats.save(tmp_path / "chats")
    chats = [[{"role": "user", "content": f"Which number is {n}?"}] for n in range(3)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    file = write(
        f"""
        model = "{checkpoint}"
        [texts]
        text = "{tmp_path / "chats.jsonl"}"
        chat = true
        [[grid]]
        remove = "dark"
        """
    )
    made = ss.sweeps.SweepFile.read(file).prepare()
    expected = ss.cut(chats, ss.load(checkpoint), chat=True)
    assert made.manifest()["windows"]["data_hash"] == expected.record["data_hash"]
    assert made.windows.roles == expected.roles


def test_a_file_and_its_objects_share_a_folder(write: Any, tmp_path: Path) -> None:
    path = write(HEAD + '[[grid]]\nlayer = [0, 1]\nremove = ["dark", "1"]\nfill = ["zero", "swap"]')
    done = ss.sweep(path, tmp_path / "out")
    assert done.report.computed == len(done.store.rows()) == 8 * 5
    again = ss.sweep(ss.sweeps.SweepFile.read(str(path)).prepare(), tmp_path / "out")
    assert (again.report.computed, again.report.found) == (0, 8 * 5)
    assert again.table.equals(done.table)
    assert [*done.store.manifest["runs"]] == [done.sweep.key]


def test_a_sample_of_predictions(write: Any) -> None:
    sampled = ss.sweeps.SweepFile.read(write("predict = 16\n" + HEAD + GRID)).prepare()
    assert sampled.predict == ss.nll.Sample(16)
    assert sampled.addresses != ss.sweeps.SweepFile.read(write(HEAD + GRID)).prepare().addresses


def test_defaults(write: Any) -> None:
    file = ss.sweeps.SweepFile.read(write('[[grid]]\nremove = "dark"'))
    assert (file.model, file.batch_size, file.dtype, file.device) == (ss.DEFAULT, 16, "auto", None)
    assert (file.texts.documents, file.texts.per_document, file.texts.bos) == (16, 1, "auto")
    assert (file.spectrum.matrix, file.spectrum.convention, file.spectrum.bands) == ("unembedding", "raw", 20)
    (block,) = file.grid
    assert block.remove == ["dark"] and block.site == ["exit"] and block.fill == ["zero"]
    assert block.layer is None and block.tokens == ["all"] and block.controls == 0


def test_the_key_is_of_what_it_says(write: Any, tmp_path: Path) -> None:
    one = ss.sweeps.SweepFile.read(write('[[grid]]\nremove = "dark"'))
    (tmp_path / "copy.toml").write_text('# as before\n\n[[grid]]\nremove = ["dark"]')
    assert ss.sweeps.SweepFile.read(tmp_path / "copy.toml").key == one.key
    assert ss.sweeps.SweepFile.read(write('batch_size = 3\n[[grid]]\nremove = "dark"')).key != one.key
    assert ss.sweeps.SweepFile(grid=[{"remove": ["dark"]}]).key == one.key  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    sweep = ss.sweeps.SweepFile.read(path).prepare()
    counts = {
        "sweep_fills": 3 * 4 * 3 * 6,
        "sweep_ladder": 6 * (7 + 7 + 2 * 14 - 2),
        "sweep_reads": 6 * 3 * 6,
    }
    assert len(sweep.windows) == 16 and len(sweep.addresses) == len(sweep.cells) == counts[path.stem]


def test_there_are_three_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["sweep_fills", "sweep_ladder", "sweep_reads"]


GRID = '[[grid]]\nremove = "dark"\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "grid: Field required"),
        ("grid = []", "grid: List should have at least 1 item"),
        ("model = ", "is not TOML: Invalid value (at end of document)"),
        ("batch_size = " + "9" * 5000, "is not TOML: "),
        ("a = " + "[" * 10**5, "is not TOML: "),
        ("[[grid]]\nkeep = '1'\ncontrols = 1" + "0" * 30, "controls"),
        (GRID + "layers = [1]", "grid.0.layers is not known here: choose from site, layer, keep, remove, "),
        ("modle = 'x'\n" + GRID, "modle is not known here: choose from model, device, "),
        ("[texts]\nlimit = 3\n" + GRID, "texts.limit is not known here: choose from text, documents, "),
        ("[spectrum]\nfolded = true\n" + GRID, "spectrum.folded is not known here: choose from matrix, "),
        ("batch_size = 'many'\n" + GRID, "batch_size: Input should be a valid integer"),
        ("predict = 1\n" + GRID, "predict: Input should be greater than or equal to 2 (given: 1)"),
        ("batch_size = 0\n" + GRID, "batch_size: Input should be greater than or equal to 1 (given: 0)"),
        ("[texts]\ndocuments = 0\n" + GRID, "texts.documents: Input should be greater than"),
        ("[texts]\nbos = 'yes'\n" + GRID, "texts.bos: Input should be 'auto', 'always' or 'never'"),
        ("[spectrum]\nconvention = 'bold'\n" + GRID, "spectrum.convention: Input should be 'raw', 'folded'"),
        (GRID + GRID + "fill = 'zeros'", "grid.1.fill.0: Input should be 'zero', 'mean', 'swap' or 'noise'"),
        (GRID + "controls = -1", "grid.0.controls: Input should be greater than or equal to 0"),
        (GRID + "layer = 'low'", "grid.0.layer.0"),
        (GRID + "tokens = ['last']", "grid.0.tokens.0"),
        (GRID + "ladder = 'rho'", "grid.0.ladder.0: Input should be 'phi', 'psi' or 'omega'"),
        ("grid = 3", "grid: Input should be a valid list"),
    ],
)
def test_a_bad_file(write: Any, content: str, message: str) -> None:
    path = write(content)
    with pytest.raises(ss.InputError) as refused:
        ss.sweeps.SweepFile.read(path)
    assert f"{path}" in str(refused.value) and message in str(refused.value)
    assert len(str(refused.value)) < len(str(path)) + 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + "[[grid]]\nsite = 'exit'", "grid.0: a grid without filters"),
        (HEAD + GRID + "[[grid]]\nremove = 'darkest'", "grid.1: 'darkest' in 'darkest' is not a band"),
        (HEAD + "[[grid]]\nremove = '21'", "grid.0: bands 21 to 21: the spectrum has bands 1 to 20"),
        (HEAD + GRID + "layer = [0, 3]", "grid.0: layer 3: "),
        (HEAD + GRID + "layer = []", "grid.0: an empty grid"),
        (HEAD + GRID + "site = 'head:9'", "grid.0: head 9: "),
        (HEAD + GRID + "tokens = [[97]]", "grid: token id 97 lies outside the vocabulary of 97"),
        (HEAD + "[spectrum]\nbands = 33\n" + GRID, "spectrum: 33 bands of 32 directions"),
        (HEAD + "[spectrum]\nmatrix = 'nothing'\n" + GRID, "spectrum: "),
        (HEAD.replace("66", "129") + GRID, "texts: windows of 129 tokens"),
        (HEAD.replace("{text}", "./nowhere.txt") + GRID, "texts: nowhere.txt does not exist"),
        (HEAD.replace("{model}", "./nowhere") + GRID, "model: "),
        ("dtype = 'float99'\n" + HEAD + GRID, "model: dtype 'float99'"),
        ("device = 'tpu:7'\n" + HEAD + GRID, "model: the model cannot be put on device 'tpu:7'"),
    ],
)
def test_what_only_the_model_can_tell(write: Any, content: str, message: str) -> None:
    path = write(content)
    file = ss.sweeps.SweepFile.read(path)
    with pytest.raises(ss.InputError) as refused:
        file.prepare()
    assert str(refused.value).startswith(f"{path}: {message}"), str(refused.value)


def test_without_a_file_the_place_is_named() -> None:
    made: Any = {"grid": [{"remove": ["dark"], "layer": [9]}]}
    with pytest.raises(ss.InputError, match=r"^grid\.0: layer 9: sinklet has layers 0 to 5"):
        ss.sweeps.SweepFile(**made).prepare()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'model = "\xff"')
    for name, message in (
        ("nowhere.toml", "cannot be read: No such file"),
        ("", "cannot be read: Is a directory"),
        ("latin.toml", "is not TOML"),
    ):
        with pytest.raises(ss.InputError, match=message) as refused:
            ss.sweep(tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_device_map(write: Any) -> None:
    """One device stands for several: no GPU was at hand."""
    path = write('device_map = "cpu"\n' + HEAD + GRID)
    sweep = ss.sweeps.SweepFile.read(path).prepare()
    plain = ss.sweeps.SweepFile.read(write(HEAD + GRID)).prepare()
    assert sweep.model.device.type == "cpu" and sweep.addresses == plain.addresses
