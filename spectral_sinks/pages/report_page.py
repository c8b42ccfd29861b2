"""From the tables of a report to its page."""

from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.pages.html import render
from spectral_sinks.pages.packing import as_codes
from spectral_sinks.pages.report_charts import charts_of, number, share_names

SINK_COLUMNS = {
    "position": "position",
    "token": "token",
    "documents": "documents",
    "onset_layer": "first layer",
    "erasure_layer": "gone in layer",
    "layer": "strongest layer",
    "attention_mass": "attention received",
    "uniform_mass": "if uniform",
    "norm_ratio": "norm beside other tokens",
}


def report_page(
    record: dict[str, Any], tables: dict[str, pd.DataFrame], maps: Any, absent: dict[str, str]
) -> str:
    """Return the page of a report. Raises InputError where Plotly is not installed."""
    charts = charts_of(record, tables)
    data: dict[str, Any] = {"figures": {chart.name: chart.json() for chart in charts}}
    heads = tables.get("heads")
    if heads is not None and not heads.empty:
        data["heads"] = heads.to_dict("records")
        data["tokens"] = record["tokens"]
        data["attentionLayers"] = record["attention_layers"]
        if maps is not None:
            data["maps"] = as_codes(np.asarray(maps), 8, within=(0.0, 1.0))
        if "profiles" in tables:
            data["profiles"] = _profiles(tables["profiles"])
    return render(
        "report.html.j2",
        ("common.js", "report.js"),
        data,
        title=f"{record['model']}: spectrum and sinks",
        record=record,
        charts={chart.name: chart for chart in charts},
        sinks=sink_cells(tables),
        sink_columns=[*SINK_COLUMNS.values(), *(f"dark share, {name}" for name in record["conventions"])],
        absent=absent,
        has_heads="heads" in data,
        layers=sorted(set(heads["layer"])) if "heads" in data and heads is not None else [],
        heads=sorted(set(heads["head"])) if "heads" in data and heads is not None else [],
        has_maps="maps" in data,
        has_profiles="profiles" in data,
    )


def sink_cells(tables: dict[str, pd.DataFrame]) -> list[list[str]]:
    """Return the sinks as rows of text, in the order of `SINK_COLUMNS` and then the dark shares."""
    table = tables.get("sinks")
    if table is None or not len(table):
        return []
    ends = [name.removeprefix("dark_share") for name in table if str(name) in share_names(table)]
    rows: list[list[str]] = []
    for _, sink in table.iterrows():
        cells = [
            "any" if pd.isna(sink["position"]) else str(int(sink["position"])),
            str(sink["token"]) if isinstance(sink["token"], str) else "any",
            f"{int(sink['documents'])} ({100 * sink['share_of_documents']:.0f} %)",
            str(int(sink["onset_layer"])),
            "never" if pd.isna(sink["erasure_layer"]) else str(int(sink["erasure_layer"])),
            str(int(sink["layer"])),
            _interval(sink, "attention_mass"),
            f"{sink['uniform_mass']:.3f}",
            f"{_interval(sink, 'norm_ratio')} times",
        ]
        for end in ends:
            least, most = (number(sink, f"dark_share{end}_{side}") for side in ("least", "most"))
            random = "no control" if np.isnan(most) else f"{least:.3f} to {most:.3f}"
            others = number(sink, f"other_dark_share{end}")
            cells.append(f"{_interval(sink, f'dark_share{end}')}; others {others:.3f}; random {random}")
        rows.append(cells)
    return rows


def _profiles(table: pd.DataFrame) -> dict[str, Any]:
    """Return the profiles of all heads as lists, by what they show and by head."""
    found: dict[str, Any] = {"chance": float(table["chance"].iloc[0])}
    for (what, layer, head), part in table.groupby(["what", "layer", "head"]):
        values = part.sort_values("band")["share"].to_numpy()
        found[f"{what}/{layer}/{head}"] = [None if np.isnan(v) else round(float(v), 5) for v in values]
    return found


def _interval(row: pd.Series, name: str) -> str:
    low, high = number(row, f"{name}_low"), number(row, f"{name}_high")
    return f"{row[name]:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")
