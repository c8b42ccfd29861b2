"""Files become upright RGB pictures with names and labels; every choice made on the way is recorded."""

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from spectral_sinks.errors import InputError, SpectralWarning

Raw = Path | bytes | Image.Image
"""An image that is not decoded yet, or that is at hand."""

PAPER = (255, 255, 255)
"""What transparent pixels are laid on: white."""

DEEP = 65535
"""The largest grey value of 16 bits."""

TURNED = 0x0112
"""The EXIF tag that says how a picture is turned."""

SHOWN = 500
"""Images from which on decoding shows its progress."""

Broken = Literal["skip", "refuse"]


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures in an order of their own, decoded when they are asked for."""

    raw: tuple[Raw, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    """Class of each picture; None where nothing says so."""
    label_names: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """Source, count, sizes, hash of the pixels, what was converted, which files are broken."""

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, place: int) -> Image.Image:
        """One picture, RGB and upright."""
        return upright(_opened(self.raw[place]))[0]

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[place] for place in range(len(self)))


def images(
    source: str | Path | Iterable[Any],
    *,
    limit: int | None = None,
    broken: Broken = "skip",
    labels: Sequence[int | str] | None = None,
    split: str = "train",
    name: str | None = None,
) -> Images:
    """Pictures from a folder, a file, a list of files (.txt, one a line), or a `datasets` id of the hub.

    A folder is searched through; where all of its images lie in folders of their own, two at least, these
    are the classes. An iterable of paths, of PIL images or of rows with an image works too, such as a
    `datasets` object. `labels` names or numbers the classes, one for each image; `limit` keeps the first
    images, taken in turn from each class. Pictures are turned as their EXIF data say, 16-bit
    greys are scaled to 8, transparency is laid on white, other colour spaces become RGB, of an animation the
    first frame is taken.

    Broken files are left out with a warning that names them, or raise InputError with `broken="refuse"`.
    Raises InputError also for a source that is not there or not reachable, no images, and labels of another
    number.
    """
    if broken not in ("skip", "refuse"):
        raise InputError(f"broken {broken!r}: choose 'skip' or 'refuse'")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give at least 1")
    found, classes = _found(source, split, name, limit)
    if labels is not None:
        if len(labels) != len(found):
            raise InputError(f"{len(labels)} labels for {len(found)} images")
        classes = list(labels)
    if limit is not None and classes is not None:
        order = _in_turn(classes)
        found, classes = [found[i] for i in order], [classes[i] for i in order]
    taken: list[tuple[str, Raw, Any]] = []
    bad: dict[str, str] = {}
    digest, converted, sizes = hashlib.sha256(), Counter[str](), set[tuple[int, int]]()
    listed = zip(found, classes or [None] * len(found), strict=True)
    total = min(len(found), limit or len(found))
    for (title, raw), label in tqdm(listed, "reading images", total, disable=total < SHOWN):
        if limit is not None and len(taken) == limit:
            break
        try:
            picture, how = upright(_opened(raw))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if broken == "refuse":
                raise InputError(f"{title} is not a readable image: {error}") from error
            bad[title] = str(error)
            continue
        digest.update(repr(picture.size).encode() + picture.tobytes())
        converted.update(how)
        sizes.add(picture.size)
        taken.append((title, raw, label))
    if bad:
        said = "; ".join(f"{title} ({why})" for title, why in bad.items())
        warnings.warn(f"{len(bad)} broken images are left out: {said}", SpectralWarning, stacklevel=2)
    if not taken:
        raise InputError(f"no images in {source if isinstance(source, str | Path) else 'what was given'}")
    chosen = [label for _, _, label in taken]
    names: list[Any] = sorted(set(classes or [])) if None not in chosen else []
    return Images(
        raw=tuple(raw for _, raw, _ in taken),
        names=tuple(title for title, _, _ in taken),
        labels=tuple(names.index(label) for label in chosen) if names else None,
        label_names=tuple(map(str, names)),
        record={
            "source": str(source) if isinstance(source, str | Path) else type(source).__name__,
            "data_hash": digest.hexdigest(),
            "smallest": min(sizes, key=lambda size: size[0] * size[1]),
            "largest": max(sizes, key=lambda size: size[0] * size[1]),
            "converted": dict(sorted(converted.items())),
            "broken": bad,
            "classes": len(names),
        },
    )


def upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A picture in RGB as it is to be seen, and what was done to it.

    Raises ValueError for grey values without a known range (floating point), OSError for broken data.
    """
    how: list[str] = []
    turned = ImageOps.exif_transpose(image)
    if turned.size != image.size or image.getexif().get(TURNED, 1) != 1:
        how.append("turned")
    mode = turned.mode
    if mode == "RGB" and "transparency" not in turned.info:
        return turned.convert("RGB"), how
    if mode.startswith("I"):
        values: NDArray[Any] = np.asarray(turned)
        if values.min() < 0 or values.max() > DEEP:
            raise ValueError(f"grey values from {values.min()} to {values.max()}: expected 0 to {DEEP}")
        scaled = np.round(values / (DEEP / 255)).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB"), [*how, "16 bit"]
    if mode == "F":
        raise ValueError("floating-point grey values have no known range: save it as 8 or 16 bit")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in turned.info:
        layer = turned.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (*PAPER, 255))
        return Image.alpha_composite(paper, layer).convert("RGB"), [*how, "transparent"]
    return turned.convert("RGB"), [*how, mode]


def _opened(raw: Raw) -> Image.Image:
    """The first frame, decoded whole."""
    if isinstance(raw, Image.Image):
        return raw
    with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as image:
        image.load()
        return image


def _found(
    source: Any, split: str, name: str | None, limit: int | None
) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    """Names and what is behind them, and the class of each where something says so."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _in_folder(path)
        if path.suffix == ".txt" and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [(line, path.parent / line) for line in map(str.strip, lines) if line], None
        if path.is_file():
            return [(path.name, path)], None
        if isinstance(source, Path) or source[:1] in "./~" or path.suffix.lower() in _extensions():
            raise InputError(f"{source} does not exist")
        source = _from_hub(source, name, split)
    return _rows(source, limit)


def _in_folder(root: Path) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in _extensions() and p.is_file())
    if not files:
        raise InputError(f"{root} holds no images: expected files such as .jpg or .png, in it or below")
    parents = [path.parent for path in files]
    classes = [parent.name for parent in parents]
    labelled = root not in parents and len(set(classes)) > 1
    return [(path.relative_to(root).as_posix(), path) for path in files], classes if labelled else None


def _extensions() -> set[str]:
    return set(Image.registered_extensions())


def _from_hub(source: str, name: str | None, split: str) -> Any:
    try:
        return datasets.load_dataset(source, name, split=split, streaming=True)
    except Exception as error:  # the hub client's own errors, of several libraries
        raise InputError(
            f"{source!r} is no file or folder, and as a data set of the hub it cannot be read ({error})"
        ) from error


def _rows(source: Iterable[Any], limit: int | None) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    """Rows of a data set with an image column, and a class column if there is one; or paths and pictures."""
    features = getattr(source, "features", None)
    column = label = None
    given: Any = source
    if features is not None:
        column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
        label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
        if column is None:
            raise InputError(f"the data set has no column of images; columns: {', '.join(features)}")
        given = given.cast_column(column, datasets.Image(decode=False))
    found: list[tuple[str, Raw]] = []
    classes: list[Any] = []
    for place, row in enumerate(given):
        if features is not None and len(found) == limit:
            break
        if column is not None:
            stored = row[column]
            title = Path(stored["path"]).name if stored.get("path") else f"image {place}"
            found.append((title, stored["bytes"] if stored.get("bytes") else Path(stored["path"])))
            if label is not None and features is not None:
                classes.append(features[label].int2str(row[label]))
        elif isinstance(row, Image.Image):
            found.append((getattr(row, "filename", "") or f"image {place}", row))
        elif isinstance(row, str | Path):
            found.append((str(row), Path(row).expanduser()))
        else:
            raise InputError(f"image {place} is {type(row).__name__}: expected a path or a PIL image")
    return found, classes or None


def _in_turn(classes: Sequence[Any]) -> list[int]:
    """Places such that each class comes in turn, in its own order."""
    seen = Counter[Any]()
    turn: list[tuple[int, int]] = []
    for place, label in enumerate(classes):
        turn.append((seen[label], place))
        seen[label] += 1
    return [place for _, place in sorted(turn)]
