"""Boxes are read as they are meant, compared by counting pixels, and summed up by image."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_sinks as ss
from spectral_sinks.measure.vision.boxes import overlap
from spectral_sinks.stats import mean_interval

EDGES = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 6), st.integers(1, 6))

VOC = """<annotation><filename>a.jpg</filename><size><width>50</width><height>40</height></size>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmax>20</xmax><xmin>11</xmin><ymin>5</ymin><ymax>6</ymax></bndbox>
<part><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part></object>
</annotation>"""


@given(EDGES, st.lists(EDGES, min_size=1, max_size=3))
def test_overlap_counts_pixels(one: tuple[int, ...], several: list[tuple[int, ...]]) -> None:
    def area(edges: tuple[int, ...]) -> set[tuple[int, int]]:
        x, y, width, height = edges
        return {(u, v) for u in range(x, x + width) for v in range(y, y + height)}

    def box(edges: tuple[int, ...]) -> list[int]:
        x, y, width, height = edges
        return [x, y, x + width, y + height]

    found = overlap(box(one), [box(other) for other in several])
    expected = [len(area(one) & area(other)) / len(area(one) | area(other)) for other in several]
    np.testing.assert_allclose(found, expected)


def test_nothing_overlaps_no_box() -> None:
    assert overlap([np.nan] * 4, [[0, 0, 2, 2]]).tolist() == [0]


def test_files_of_boxes(tmp_path: Path) -> None:
    rows = [
        {"name": "007", "x0": 1, "y0": 2, "x1": 3.5, "y1": 4},
        {"name": "b.png", "x0": 0, "y0": 0, "x1": 1, "y1": 1},
        {"name": "007", "x0": 0, "y0": 0, "x1": 9, "y1": 9},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.json", "a.csv"):
        found = ss.vision.read_boxes(tmp_path / name)
        assert {key: boxes.tolist() for key, boxes in found.items()} == {
            "007": [[1, 2, 3.5, 4], [0, 0, 9, 9]],
            "b.png": [[0, 0, 1, 1]],
        }


def test_voc_counts_from_one(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(VOC)
    (tmp_path / "b.xml").write_text(VOC.replace("<filename>a.jpg</filename>", ""))
    found = ss.vision.read_boxes(tmp_path)
    assert list(found) == ["a.jpg", "b.jpg"]
    assert found["a.jpg"].tolist() == found["b.jpg"].tolist() == [[0, 0, 50, 40], [10, 4, 20, 6]]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[]", "no boxes"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"name": 1}', "expected a list of rows"),
        ("a.json", "[1]", "expected a list of rows"),
        ("a.json", '[{"name": "a", "x0": 1, "y0": 1, "x1": 1}]', "has no y1"),
        ("a.json", '[{"name": "a", "x0": 1, "y0": 1, "x1": 1, "y1": 2}]', "is empty"),
        ("a.json", '[{"name": "a", "x0": 1, "y0": 1, "x1": null, "y1": 2}]', "not four numbers"),
        ("a.csv", "name,x0,y0,x1,y1\na,1,2,b,4\n", "not four numbers"),
        ("a.csv", "name,x0,y0,x1,y1\na,1,2,,4\n", "is empty"),
        ("a.csv", "", "cannot be read"),
        ("a.txt", "a 1 2 3 4", "expected boxes in a .csv"),
        ("b/a.xml", "<annotation>", "cannot be read"),
        ("b/a.xml", "<annotation></annotation>", "no boxes"),
        ("b/a.xml", VOC.replace("<xmax>20</xmax>", ""), "is empty"),
    ],
)
def test_bad_files(name: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ss.InputError, match=said):
        ss.vision.read_boxes(path.parent if path.suffix == ".xml" else path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ss.InputError, match="cannot be read"):
        ss.vision.read_boxes(tmp_path / "none.csv")


def test_corloc_by_hand() -> None:
    """Draws are averaged within an image first; images without boxes do not count."""
    hits = {"LOST keys": [1, 0, 1, 1], "shuffled": [0, 0, 1, 0], "whole": [1, 1, 0, 0]}
    rows = [
        {"document": place, "method": method, "draw": 0, "located": bool(hit), "iou": 0.9 * hit}
        for method, found in hits.items()
        for place, hit in enumerate(found)
    ]
    rows.append({"document": 0, "method": "shuffled", "draw": 1, "located": True, "iou": 0.8})
    rows.append({"document": 4, "method": "LOST keys", "draw": 0, "located": None, "iou": np.nan})
    table = pd.DataFrame(rows)
    table["located"] = table["located"].astype("boolean")
    found = ss.vision.corloc(table).set_index("method")
    assert list(found.index) == ["LOST keys", "shuffled", "whole"]
    assert found["mean"].tolist() == [0.75, 0.375, 0.5] and (found["n"] == 4).all()
    assert found["ahead"].tolist() == [0, 0.375, 0.25]
    assert tuple(found.loc["shuffled", ["low", "high"]]) == mean_interval([0.5, 0, 1, 0])
    assert tuple(found.loc["whole", ["ahead_low", "ahead_high"]]) == mean_interval([0, -1, 1, 1])
    with pytest.raises(ss.InputError, match="no image has a given box"):
        ss.vision.corloc(table.tail(1))
