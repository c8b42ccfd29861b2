"""Boxes around objects: read from files, compared, and counted as found or not."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from spectral_sinks.errors import InputError
from spectral_sinks.files import expanded
from spectral_sinks.stats import mean_interval, summarise

COLUMNS = ("x0", "y0", "x1", "y1")
"""Left, top, right and bottom edge in pixels of the upright picture; the origin is its top left corner."""

OVERLAP = 0.5
"""Intersection over union above which an object counts as found (Everingham et al. 2010)."""

Boxes = Mapping[str, ArrayLike]
"""The boxes of each image, `[boxes, 4]`, by the name of the image."""


def read_boxes(path: str | Path) -> dict[str, Float[NDArray[np.float64], "boxes 4"]]:
    """Read boxes by image, from a folder of Pascal VOC files (.xml) or a table (.csv, .json).

    A table has one box per row and the columns name, x0, y0, x1 and y1. VOC counts pixels from 1 and includes
    both edges, so its left and top edges are reduced by 1. All objects are read, also those marked
    "difficult".

    Raises InputError for a file that does not exist or cannot be read, missing columns, no boxes, and empty
    boxes.
    """
    path = expanded(path)
    try:
        if path.is_dir():
            rows = [row for file in sorted(path.rglob("*.xml")) for row in _voc(file)]
        elif path.suffix.lower() == ".csv":
            rows = pd.read_csv(path, dtype={"name": str}).to_dict("records")
        elif path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            raise InputError(f"{path}: expected boxes in a .csv, a .json or a folder of Pascal VOC files")
    except (OSError, ValueError, AttributeError, ElementTree.ParseError) as error:
        raise InputError(f"boxes of {path} cannot be read: {error}") from error
    return _by_name(rows, str(path))


def _by_name(rows: Any, source: str) -> dict[str, NDArray[np.float64]]:
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"{source}: expected a list of rows with name, {', '.join(COLUMNS)}")
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        if missing := {"name", *COLUMNS} - set(row):
            raise InputError(f"{source}: a box has no {', '.join(sorted(missing))}; it has {', '.join(row)}")
        try:
            box = [float(row[column]) for column in COLUMNS]
        except (TypeError, ValueError) as error:
            raise InputError(f"{source}: a box of {row['name']} is not four numbers: {error}") from error
        if not np.isfinite(box).all() or box[0] >= box[2] or box[1] >= box[3]:
            raise InputError(
                f"{source}: the box {box} of {row['name']} is empty: expected x0 < x1 and y0 < y1"
            )
        found.setdefault(str(row["name"]), []).append(box)
    if not found:
        raise InputError(f"{source}: no boxes")
    return {name: np.array(boxes) for name, boxes in found.items()}


def _voc(file: Path) -> list[dict[str, Any]]:
    root = ElementTree.parse(file).getroot()
    name = root.findtext("filename") or file.with_suffix(".jpg").name
    rows: list[dict[str, Any]] = []
    for part in root.iterfind("object/bndbox"):
        left, top, right, bottom = (
            float(part.findtext(key, "nan")) for key in ("xmin", "ymin", "xmax", "ymax")
        )
        rows.append({"name": name, "x0": left - 1, "y0": top - 1, "x1": right, "y1": bottom})
    return rows


def overlap(box: ArrayLike, boxes: ArrayLike) -> Float[NDArray[np.float64], "boxes"]:
    """Return the intersection over union of one box with each of several; 0 for a box of NaN."""
    one, others = np.asarray(box, dtype=np.float64), np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if not np.isfinite(one).all():
        return np.zeros(len(others))
    sides = np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])
    common = sides.clip(0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1) + (one[2:] - one[:2]).prod()
    return common / (areas - common)


def corloc(table: pd.DataFrame) -> pd.DataFrame:
    """Return CorLoc by method, from the table of `discover`: the share of images whose box meets a given one.

    There is one row per method, the measured one first: `mean`, `low`, `high` and `n` over the images that
    have boxes, and `ahead`, the difference between the first method and this one, paired by image, with its
    95 % interval. Several draws of one image are averaged first. Raises InputError if no boxes are given.
    """
    known = table[table["iou"].notna()] if "iou" in table else table[:0]
    if known.empty:
        raise InputError("no image has a given box to compare with: discover(..., boxes=...)")
    known = known.assign(located=known["located"].astype(float))
    found = summarise(known, ["method"], "located")
    shares = known.pivot_table(index="document", columns="method", values="located", aggfunc="mean")
    rows: list[dict[str, float]] = []
    for method in found["method"]:
        ahead = (shares[found["method"][0]] - shares[method]).to_numpy()
        low, high = mean_interval(ahead)
        rows.append({"ahead": float(ahead.mean()), "ahead_low": low, "ahead_high": high})
    return pd.concat([found, pd.DataFrame(rows)], axis=1)
