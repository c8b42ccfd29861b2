"""From the tables of a report to its figures."""

from html import escape
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.pages.html import Chart

INK, GREY, PALE = "#111111", "#767676", "#d9d9d9"


BLUES = [[0.0, "#f4f6fa"], [0.35, "#9db8d9"], [0.7, "#3b6ea8"], [1.0, "#08254a"]]
"""From light to dark, so that it reads the same in greyscale."""


DASHES = ("solid", "dash", "dot")


SYMBOLS = ("circle", "square", "diamond")


SMALLEST = 1e-3
"""The smallest share that the colours of the energy tell apart."""


CLASSES = {"bos": "first token (BOS)", "first": "first token", "other": "other tokens", "sep": "last token"}


def charts_of(record: dict[str, Any], tables: dict[str, pd.DataFrame]) -> list[Chart]:
    """Return the figures that the tables allow."""
    found = [spectrum_chart(tables["spectrum"], record)]
    if "energy" in tables:
        found.append(energy_chart(tables["energy"], record))
    if "sinks" in tables and len(tables["sinks"]):
        found.append(share_chart(tables["sinks"], record))
    if "norms" in tables:
        found.append(norm_chart(tables["norms"]))
    if "heads" in tables and len(tables["heads"]):
        found.append(head_chart(tables["heads"]))
    if "bands" in tables:
        found.append(band_chart(tables["bands"], record))
    return found


def spectrum_chart(table: pd.DataFrame, record: dict[str, Any]) -> Chart:
    """Draw the singular values, with the bands behind them."""
    data: list[dict[str, Any]] = []
    for place, (name, part) in enumerate(table.groupby("convention", sort=False)):
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": str(name),
                "x": part["direction"].tolist(),
                "y": part["relative"].tolist(),
                "line": {"color": INK if place == 0 else GREY, "dash": DASHES[place], "width": 2},
                "hovertemplate": "direction %{x}<br>%{y:.4g} of the largest<extra>" + str(name) + "</extra>",
            }
        )
    first = table[table["convention"] == record["convention"]]
    edges = first.groupby("band")["direction"].agg(["min", "max"])
    shapes = [
        {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": row["min"] - 0.5,
            "x1": row["max"] + 0.5,
            "y0": 0,
            "y1": 1,
            "line": {"width": 0},
            "fillcolor": GREY if band == edges.index[-1] else PALE,
            "opacity": 0.45 if band == edges.index[-1] else 0.35,
            "layer": "below",
        }
        for band, row in edges.iterrows()
        if band == edges.index[-1] or int(str(band)) % 2
    ]
    layout = _layout("direction, the most strongly read first", "singular value / largest") | {
        "shapes": shapes,
        "annotations": [_note("dark", float(edges["max"].iloc[-1]), 1.0)],
    }
    layout["yaxis"] |= {"type": "log", "dtick": "D2", "exponentformat": "none"}
    return Chart(
        "spectrum",
        "How strongly the vocabulary reads each direction",
        f"The residual stream of this model has {record['d']} directions. The unembedding, the matrix that "
        "turns a residual into a score for every token, reads some of them strongly and others hardly at "
        "all. The singular values say how strongly. The directions are divided into "
        f"{record['bands']} bands (stripes); the last one, {record['dark_rank']} directions wide, is called "
        "dark. “Raw” is the matrix as stored. “Folded” includes the gain of the final norm, which scales "
        "every channel just before the matrix reads it.",
        table,
        {"": {"data": data, "layout": layout}},
    )


def energy_chart(table: pd.DataFrame, record: dict[str, Any]) -> Chart:
    """Draw the share of each band by layer, one map for each class of token."""
    variants: dict[str, dict[str, Any]] = {}
    for name, part in table.groupby("convention", sort=False):
        classes = list(dict.fromkeys(part["position_class"]))
        data: list[dict[str, Any]] = []
        layout = _layout("", "") | {
            "height": 60 + 250 * len(classes),
            "grid": {"rows": len(classes), "columns": 1, "pattern": "independent", "ygap": 0.28},
            "annotations": [],
        }
        for place, kind in enumerate(classes):
            grid = part[part["position_class"] == kind].pivot(index="band", columns="layer", values="share")
            end = "" if place == 0 else str(place + 1)
            layers = ["emb." if layer < 0 else str(layer) for layer in grid.columns]
            data.append(
                {
                    "type": "heatmap",
                    "x": layers,
                    "y": grid.index.tolist(),
                    "z": np.log10(np.clip(grid.to_numpy(), SMALLEST, 1)).tolist(),
                    "customdata": (100 * grid.to_numpy()).tolist(),
                    "zmin": np.log10(SMALLEST),
                    "zmax": 0.0,
                    "colorscale": BLUES,
                    "xaxis": f"x{end}",
                    "yaxis": f"y{end}",
                    "showscale": place == 0,
                    "colorbar": {
                        "title": {"text": "share"},
                        "tickvals": np.log10([0.001, 0.01, 0.05, 0.2, 1]).tolist(),
                        "ticktext": ["0.1 %", "1 %", "5 %", "20 %", "100 %"],
                        "thickness": 12,
                    },
                    "hovertemplate": f"{CLASSES.get(kind, kind)}<br>after layer %{{x}}, band %{{y}}: "
                    "%{customdata:.2f} %<extra></extra>",
                }
            )
            layout[f"xaxis{end}"] = {
                "type": "category",
                "title": {"text": f"exit of layer: {CLASSES.get(kind, kind)}"},
            }
            layout[f"yaxis{end}"] = {
                "title": {"text": "band"},
                "autorange": "reversed",
                "fixedrange": True,
            }
        variants[str(name)] = {"data": data, "layout": layout}
    return Chart(
        "energy",
        "Where the energy of the residual stream lies",
        "Every token has a residual, a vector that the layers add to. Its energy is its squared length. Each "
        "square is the share of that energy in one band after one layer. If energy lay evenly, each band "
        f"would hold {100 / record['bands']:.0f} %. Band {record['bands']}, at the bottom, is the dark one: "
        "a sink that is dark shows as a dark square there, and only for the first token.",
        table,
        variants,
        "Convention",
    )


def share_chart(table: pd.DataFrame, record: dict[str, Any]) -> Chart:
    """Draw the dark share of each sink beside that of other tokens and of random subspaces."""
    rows = dark_share_rows(table, record["conventions"])
    # Plotly reads tags in its texts
    labels = [escape(f"{row['sink']}, {row['convention']}", quote=False) for row in rows]
    data: list[dict[str, Any]] = []
    ranges = {"x": [], "y": []}
    for label, row in zip(labels, rows, strict=True):
        ranges["x"] += [row["random_least"], row["random_most"], None]
        ranges["y"] += [label, label, None]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "random subspaces",
            **ranges,
            "line": {"color": PALE, "width": 14},
            "hovertemplate": "random subspaces: %{x:.3f}<extra></extra>",
        }
    )
    for name, column, symbol, color in (
        ("the sink", "share", "circle", INK),
        ("other tokens", "others", "square-open", GREY),
    ):
        values = [row[column] for row in rows]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": values,
                "y": labels,
                "marker": {"symbol": symbol, "size": 11, "color": color, "line": {"width": 2}},
                "error_x": _errors(values, rows, column),
                "hovertemplate": name + ": %{x:.3f}<extra></extra>",
            }
        )
    layout = _layout("share of the energy in the dark band", "")
    layout["yaxis"] |= {"type": "category", "automargin": True, "autorange": "reversed"}
    layout["xaxis"] |= {"range": [0, 1.02]}
    layout["height"] = 160 + 46 * len(rows)
    return Chart(
        "dark-share",
        "How dark each sink is",
        "The share of a sink's energy that lies in the dark band, at the layer that attends to it most. The "
        f"pale bar is what {record['draws']} random subspaces of the same size hold of the same residual; "
        "the open square is the share of all tokens that are not sinks. A sink is called dark if it lies "
        "above both. Horizontal lines are 95 % intervals over documents.",
        pd.DataFrame(rows),
        {"": {"data": data, "layout": layout}},
    )


def dark_share_rows(table: pd.DataFrame, conventions: list[str]) -> list[dict[str, Any]]:
    """Return one row per sink and convention, from the table of sinks."""
    rows: list[dict[str, Any]] = []
    for _, sink in table.iterrows():
        for place, name in enumerate(conventions):
            end = f"_{name}" if place else ""
            rows.append(
                {
                    "sink": sink_name(sink),
                    "convention": name,
                    "share": number(sink, f"dark_share{end}"),
                    "share_low": number(sink, f"dark_share{end}_low"),
                    "share_high": number(sink, f"dark_share{end}_high"),
                    "others": number(sink, f"other_dark_share{end}"),
                    "others_low": number(sink, f"other_dark_share{end}_low"),
                    "others_high": number(sink, f"other_dark_share{end}_high"),
                    "random_least": number(sink, f"dark_share{end}_least"),
                    "random_most": number(sink, f"dark_share{end}_most"),
                    "dark": sink.get(f"dark{end}"),
                }
            )
    return rows


def sink_name(sink: pd.Series) -> str:
    """Return the place and the token of a sink."""
    token = sink["token"]
    named = f"“{token}”" if isinstance(token, str) else "any token"
    return named if pd.isna(sink["position"]) else f"position {int(sink['position'])}, {named}"


def share_names(table: pd.DataFrame) -> list[str]:
    return ["dark_share"] + [
        f"dark_share_{name}" for name in ("raw", "folded", "centred") if f"dark_share_{name}" in table
    ]


def norm_chart(table: pd.DataFrame) -> Chart:
    """Draw the norm of every position by layer."""
    grid = table.pivot(index="layer", columns="position", values="norm_ratio")
    values = np.clip(grid.to_numpy(), 1e-3, None)
    highest = max(2.0, float(np.nanmax(values)))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000) if t <= highest]
    data = [
        {
            "type": "heatmap",
            "x": grid.columns.tolist(),
            "y": ["emb." if layer < 0 else str(layer) for layer in grid.index],
            "z": np.log10(values).tolist(),
            "customdata": grid.to_numpy().tolist(),
            "zmin": -0.3,
            "zmax": float(np.log10(highest)),
            "colorscale": BLUES,
            "colorbar": {
                "title": {"text": "norm"},
                "tickvals": np.log10(ticks).tolist(),
                "ticktext": [f"{t:g}×" for t in ticks],
                "thickness": 12,
            },
            "hovertemplate": "position %{x}, after layer %{y}: %{customdata:.2f} times<extra></extra>",
        }
    ]
    layout = _layout("position in the text", "exit of layer")
    layout["yaxis"] |= {"type": "category"}
    return Chart(
        "norms",
        "How long the residual of each position is",
        "The length (norm) of the residual at every position, after every layer, in units of the median of "
        "usual tokens. A sink often shows as a dark column: its residual is many times longer than all "
        "others. Where the column begins and ends is where the model builds the sink and where it takes it "
        "away.",
        table,
        {"": {"data": data, "layout": layout}},
    )


def head_chart(table: pd.DataFrame) -> Chart:
    """Draw the attention that each head pays the first token."""
    grid = table.pivot(index="layer", columns="head", values="received")
    circuits = table[table["circuit"].eq(True)] if "circuit" in table else table.iloc[:0]
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "x": grid.columns.tolist(),
            "y": grid.index.tolist(),
            "z": grid.to_numpy().tolist(),
            "zmin": 0,
            "zmax": 1,
            "colorscale": BLUES,
            "colorbar": {"title": {"text": "attention"}, "thickness": 12},
            "xgap": 1,
            "ygap": 1,
            "hovertemplate": "layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
        }
    ]
    if len(circuits):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": circuits["head"].tolist(),
                "y": circuits["layer"].tolist(),
                "marker": {
                    "symbol": "circle",
                    "size": 9,
                    "color": "#ffffff",
                    "line": {"width": 2, "color": INK},
                },
                "hovertemplate": "layer %{y}, head %{x}: no-op circuit<extra></extra>",
            }
        )
    layout = _layout("head", "layer")
    layout["showlegend"] = False
    layout["xaxis"] |= {"dtick": 1 if grid.shape[1] <= 16 else 4, "fixedrange": True}
    layout["yaxis"] |= {"dtick": 1 if grid.shape[0] <= 16 else 5, "fixedrange": True}
    layout["height"] = int(np.clip(22 * len(grid) + 110, 260, 820))
    return Chart(
        "heads",
        "How much attention each head pays the first token",
        "Attention received by the first token (alpha), the mean over the positions of the text: 1 means "
        "that a head looks at nothing else. A ring marks a head with a no-op circuit: it looks at the sink "
        "by default, and what it copies from there is almost nothing. Click a square, or choose a layer and "
        "a head below.",
        table,
        {"": {"data": data, "layout": layout}},
    )


def band_chart(table: pd.DataFrame, record: dict[str, Any]) -> Chart:
    """Draw what the removal of each band does to the NLL and to the sink."""
    bands = table["band"].tolist()
    rows = table.to_dict("records")
    has_sink = "sink" in table
    layout = _layout("", "") | {
        "showlegend": False,
        "height": 560 if has_sink else 320,
        "grid": {"rows": 2 if has_sink else 1, "columns": 1, "pattern": "independent", "ygap": 0.25},
        "shapes": [],
    }
    data: list[dict[str, Any]] = []
    plots = [("delta_nll", "increase of NLL (nats)", "random_least", "random_most")]
    if has_sink:
        plots.append(("sink", "attention to the sink", "random_sink_least", "random_sink_most"))
    for place, (column, label, least, most) in enumerate(plots):
        end = "" if place == 0 else str(place + 1)
        data.append(
            {
                "type": "scatter",
                "mode": "markers+lines",
                "name": label,
                "x": bands,
                "y": table[column].tolist(),
                "xaxis": f"x{end}",
                "yaxis": f"y{end}",
                "line": {"color": GREY, "width": 1},
                "marker": {"color": INK, "size": 8, "symbol": SYMBOLS[place]},
                "error_y": _errors(table[column].tolist(), rows, column),
                "hovertemplate": "without band %{x}: %{y:.4f}<extra></extra>",
            }
        )
        layout[f"xaxis{end}"] = {"title": {"text": "band that is removed"}, "dtick": 2, "fixedrange": True}
        layout[f"yaxis{end}"] = {
            "title": {"text": label},
            "automargin": True,
            "fixedrange": True,
            "rangemode": "tozero",
        }
        if least in table and np.isfinite(table[least].iloc[0]):
            layout["shapes"].append(_stripe(end, float(table[least].iloc[0]), float(table[most].iloc[0])))
        if column == "sink":
            layout["shapes"].append(
                {
                    "type": "line",
                    "xref": f"x{end} domain",
                    "yref": f"y{end}",
                    "x0": 0,
                    "x1": 1,
                    "y0": float(table["untouched_sink"].iloc[0]),
                    "y1": float(table["untouched_sink"].iloc[0]),
                    "line": {"dash": "dash", "color": INK, "width": 1},
                }
            )
    return Chart(
        "bands",
        "What the removal of each band does",
        f"One band at a time is taken out of every token's residual at {record['site']}, and the rest of the "
        "model goes on from there. Above: how much worse the model predicts the text (NLL, in nats per "
        "token). Below: the attention that the next layer pays the first token; the dashed line is the "
        f"untouched model. The pale stripe is what {record['draws']} random subspaces of that size do: a "
        "band inside the stripe does no more than chance. Vertical lines are 95 % intervals over documents.",
        table,
        {"": {"data": data, "layout": layout}},
    )


def _layout(x: str, y: str) -> dict[str, Any]:
    return {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 54, "r": 12, "t": 24, "b": 48},
        "height": 340,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "xaxis": {"title": {"text": x}, "gridcolor": "#eeeeee", "automargin": True, "fixedrange": True},
        "yaxis": {"title": {"text": y}, "gridcolor": "#eeeeee", "automargin": True, "fixedrange": True},
        "legend": {"orientation": "h", "y": 1.12},
        "dragmode": False,
    }


def _note(text: str, x: float, y: float) -> dict[str, Any]:
    return {
        "text": text,
        "x": x,
        "y": y,
        "xref": "x",
        "yref": "paper",
        "showarrow": False,
        "xanchor": "right",
    }


def _stripe(end: str, least: float, most: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": f"x{end} domain",
        "yref": f"y{end}",
        "x0": 0,
        "x1": 1,
        "y0": least,
        "y1": most,
        "line": {"width": 0},
        "fillcolor": PALE,
        "opacity": 0.6,
        "layer": "below",
    }


def _errors(values: list[Any], rows: list[dict[str, Any]], column: str) -> dict[str, Any]:
    """Return the distances from means to the ends of their intervals, as Plotly wants them."""

    def distance(value: float, end: float) -> float:
        return 0.0 if np.isnan(end) else abs(end - value)

    return {
        "type": "data",
        "symmetric": False,
        "array": [distance(v, row[f"{column}_high"]) for v, row in zip(values, rows, strict=True)],
        "arrayminus": [distance(v, row[f"{column}_low"]) for v, row in zip(values, rows, strict=True)],
        "thickness": 1.2,
        "color": INK,
    }


def number(row: pd.Series, name: str) -> float:
    return float(row.get(name, float("nan")))
