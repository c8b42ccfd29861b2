"""Loading of images as upright RGB pictures with names and labels, with a record of every conversion."""

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from spectral_sinks.data import image_stores
from spectral_sinks.errors import InputError, SpectralWarning, brief
from spectral_sinks.files import expanded

Raw = Path | bytes | Callable[[], bytes] | Image.Image
"""An image that is not decoded yet (a path, bytes, or a function that reads bytes), or a PIL image."""

PAPER = (255, 255, 255)
"""The background of transparent pixels: white."""

DEEP = 65535
"""The largest 16-bit grey value."""

TURNED = 0x0112
"""The EXIF tag of a picture's orientation."""

SHOWN = 500
"""Number of images from which decoding shows a progress bar."""

EXTENSIONS = frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)
"""Endings of the names of image files, in small letters."""

OTHERS = frozenset({".txt", ".tar", ".parquet"})
"""Endings of the names of other files that hold images or name them."""

Broken = Literal["skip", "refuse"]


@dataclass(frozen=True, eq=False)
class Images:
    """A sequence of pictures that are decoded on access."""

    raw: tuple[Raw, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    """Class index of each picture; None for unlabelled pictures."""
    label_names: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of each picture in pixels, once it is upright."""
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """The source, the number of classes, the sizes, the hash of the pixels, the conversions, and the broken
    files.
    """

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, place: int) -> Image.Image:
        """Return one picture, RGB and upright."""
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
    """Load pictures from a folder, a file, a list of files (.txt, one per line), a tar file, or a data set.

    A folder is searched recursively; files that are no images by their names are left out. If all of its
    images are in subfolders, and these have at least two names, the names are the classes. A tar file is read
    like a folder, or as a shard of WebDataset, whose `.cls` files are the classes. A data set is a folder
    that `datasets` saved, a file or folder of .parquet, or an id of the hub. An iterable of paths, of PIL
    images, or of rows with an image works too, such as a `datasets` object.

    Every image is decoded once here, for its size and the hash. Pictures are decoded again on access and not
    kept, so that the memory does not grow with their number.

    Pictures are rotated according to their EXIF data, 16-bit grey values are scaled to 8 bits, transparency
    is laid on white, and other colour spaces become RGB. Of an animation, the first frame is taken.

    Args:
        source: a path, a hub id, or an iterable of images.
        limit: the number of images to keep. If there are classes, the first images of each are taken in turn.
        broken: "skip" leaves out broken files with a warning that names them; "refuse" raises InputError.
        labels: the class of each image, as names or numbers.
        split: the split of a data set.
        name: the configuration of a data set of the hub.

    Raises:
        InputError: for a source that does not exist or cannot be reached, for no images, for a number of
            labels other than that of the images, and for a broken file with `broken="refuse"`.

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
    # decode every image once, for the record; `Images` decodes them again on access
    digest, converted, sizes = hashlib.sha256(), Counter[str](), list[tuple[int, int]]()
    listed = zip(found, classes or [None] * len(found), strict=True)
    total = min(len(found), limit or len(found))
    for (title, raw), label in tqdm(listed, "reading images", total, disable=total < SHOWN):
        if limit is not None and len(taken) == limit:
            break
        try:
            picture, how = upright(_opened(raw))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if broken == "refuse":
                raise InputError(f"{title} is not a readable image: {brief(error)}") from error
            bad[title] = str(error)
            continue
        digest.update(repr(picture.size).encode() + picture.tobytes())
        converted.update(how)
        sizes.append(picture.size)
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
        sizes=tuple(sizes),
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
    """Convert a picture to upright RGB; return it with a list of the conversions.

    Raises ValueError for grey values without a known range (floating point), and OSError for broken data.
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
    """Return the first frame, fully decoded."""
    if isinstance(raw, Image.Image):
        return raw
    data = raw() if callable(raw) else raw
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        image.load()
        return image


def _found(
    source: Any, split: str, name: str | None, limit: int | None
) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    """Return names with undecoded images, and the class of each image if the source tells it."""
    if isinstance(source, str | Path):
        path = expanded(source)
        if path.is_dir():
            stored = image_stores.saved(path, split, EXTENSIONS)
            if stored is None:
                return _in_folder(path)
            if isinstance(stored, list):
                return _in_tars(stored)
            source = stored
        elif path.suffix == ".txt" and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [(line, path.parent / line) for line in map(str.strip, lines) if line], None
        elif path.is_file():
            if image_stores.is_tar(path):
                return _in_tars([path])
            if path.suffix != ".parquet":
                return [(path.name, path)], None
            source = image_stores.of_parquet([path])
        elif isinstance(source, Path) or source[:1] in "./~" or path.suffix.lower() in EXTENSIONS | OTHERS:
            raise InputError(f"{source} does not exist")
        else:
            source = _from_hub(source, name, split)
    return _rows(source, limit)


def _in_folder(root: Path) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not files:
        raise InputError(f"{root} holds no images: expected files such as .jpg or .png, in it or below")
    parents = [path.parent for path in files]
    classes = [parent.name for parent in parents]
    labelled = root not in parents and len(set(classes)) > 1
    return [(path.relative_to(root).as_posix(), path) for path in files], classes if labelled else None


def _in_tars(paths: Sequence[Path]) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    members = [member for path in paths for member in image_stores.in_tar(path, EXTENSIONS)]
    if not members:
        raise InputError(f"{paths[0]} holds no images: expected files such as .jpg or .png in it")
    labels = [member.label for member in members]
    if None not in labels:
        classes: list[Any] | None = labels
    else:
        parents = [Path(member.name).parent for member in members]
        labelled = Path() not in parents and len({parent.name for parent in parents}) > 1
        classes = [parent.name for parent in parents] if labelled else None
    return [(member.name, member.read) for member in members], classes


def _from_hub(source: str, name: str | None, split: str) -> Any:
    try:
        import datasets  # not for files

        return datasets.load_dataset(source, name, split=split, streaming=True)
    except Exception as error:  # errors of several libraries behind the hub client
        raise InputError(
            f"{source!r} is not a file or folder, and as a data set of the hub it cannot be read "
            f"({brief(error)})"
        ) from error


def _rows(source: Iterable[Any], limit: int | None) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    """Read rows of a data set with an image column and perhaps a class column, or an iterable of paths and
    pictures.
    """
    features = getattr(source, "features", None)
    if isinstance(source, dict):
        raise InputError(f"this is {len(source)} data sets, {', '.join(map(str, source))}: give one of them")
    if features is not None:
        return _of_data_set(source, features, limit)
    found: list[tuple[str, Raw]] = []
    for place, row in enumerate(source):
        if isinstance(row, Image.Image):
            found.append((getattr(row, "filename", "") or f"image {place}", row))
        elif isinstance(row, str | Path):
            found.append((str(row), expanded(row)))
        else:
            raise InputError(f"image {place} is {type(row).__name__}: expected a path or a PIL image")
    return found, None


def _of_data_set(
    source: Any, features: dict[str, Any], limit: int | None
) -> tuple[list[tuple[str, Raw]], list[Any] | None]:
    """Read a data set with an image column and perhaps a class column.

    Only a data set that is streamed has to be held in memory, as encoded bytes.
    """
    import datasets  # not for files

    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if column is None:
        raise InputError(f"the data set has no column of images; columns: {', '.join(features)}")
    given = source.cast_column(column, datasets.Image(decode=False))
    if isinstance(given, datasets.Dataset):
        found: list[tuple[str, Raw]] = list(image_stores.in_data_set(given, column))
        named = None if label is None else [features[label].int2str(int(row)) for row in given[label]]
        return found, named
    found, classes = [], list[Any]()
    for place, row in enumerate(given):
        if place == limit:
            break
        stored = row[column]
        title = Path(stored["path"]).name if stored.get("path") else f"image {place}"
        found.append((title, stored["bytes"] if stored.get("bytes") else Path(stored["path"])))
        if label is not None:
            classes.append(features[label].int2str(row[label]))
    return found, classes or None


def _in_turn(classes: Sequence[Any]) -> list[int]:
    """Return an order of indices that takes one image of each class in turn."""
    seen = Counter[Any]()
    turn: list[tuple[int, int]] = []
    for place, label in enumerate(classes):
        turn.append((seen[label], place))
        seen[label] += 1
    return [place for _, place in sorted(turn)]
