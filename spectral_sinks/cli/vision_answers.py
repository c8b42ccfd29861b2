"""What the command `vision` says: sentences with numbers, and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import spectral_sinks as ss
from spectral_sinks.cli.output import plain, table
from spectral_sinks.errors import plural

if TYPE_CHECKING:
    import pandas as pd


def answers(
    found: ss.vision.Outliers,
    sinks: ss.vision.VisionSinks,
    record: dict[str, Any],
    registers: int,
    layer: int,
) -> list[str]:
    """Return what was found, in sentences with numbers: outliers, attention, no-op heads, registers."""
    lines = [of_images(found.pixels), of_outliers(found), of_attention(sinks), of_no_op(sinks)]
    return [*lines, of_registers(found, record, registers, layer)]


def of_images(pixels: ss.Pixels) -> str:
    """Say what the model has read."""
    record = pixels.record
    count = plural(record["images"], "image")
    if pixels.alike:
        sides = (
            f"{record['width']} x {record['height']} pixels ({record['columns']} x {record['rows']} patches)"
        )
        return f"{record['model']} on {count} of {sides}."
    tokens = min(pixels.lengths)
    return (
        f"{record['model']} on {count} that keep their {len(set(pixels.grids))} shapes, in {tokens} to "
        f"{pixels.length} tokens. Sides are rounded to whole patches of {pixels.model.patch_size} pixels, "
        f"which changes proportions by at most {record['stretched']:.1%}."
    )


def of_outliers(found: ss.vision.Outliers) -> str:
    """Say whether there are outlier tokens, since which layer, how many and how large."""
    layers = found.summary()
    ratio = layers["largest"] / layers["median"]
    if found.strongest is None:
        most = int(ratio.argmax())
        return (
            f"Outlier tokens: no. No patch of any image is an outlier in any layer ({found.rule}). The "
            f"largest norm is {ratio[most]:.2f} times the median of its layer, at {layer_name(most - 1)}, "
            f"where the cut-off is {layers['cutoff'][most] / layers['median'][most]:.2f} times."
        )
    row = layers.iloc[found.strongest + 1]
    assert found.onset_layer is not None
    return (
        f"Outlier tokens: yes, since {layer_name(found.onset_layer)}. At {layer_name(found.strongest)}, "
        f"where most are, {row['share']:.2%} of the patches are outliers (95 %: {row['low']:.2%} to "
        f"{row['high']:.2%}), in {row['images']:.0f} of {len(found.pixels)} images. The largest norm is "
        f"{ratio[found.strongest + 1]:.1f} times the median there."
    )


def layer_name(layer: int) -> str:
    return "the embedding" if layer < 0 else f"layer {layer}"


def of_attention(sinks: ss.vision.VisionSinks) -> str:
    """Say where attention goes, in the mean over layers and in the layer where each kind draws most."""
    layers = sinks.by_layer()
    names = {f"to_{name}": TOKEN_NAMES.get(name, name) for name in sinks.prefix}
    names |= {"to_top_patch": "the one patch that draws most"}
    parts = [
        f"{layers[column].mean():.1%} to {name} (most in layer {layers[column].argmax()}: "
        f"{layers[column].max():.1%})"
        for column, name in names.items()
    ]
    rest = f"{layers['to_other_patches'].mean():.1%} to the other patches"
    return (
        f"Attention: over all layers and heads, {', '.join(parts)}, and {rest}. Uniform attention gives each "
        f"token {sinks.uniform.mean():.2%}."
    )


TOKEN_NAMES = {"cls": "[CLS]"}
"""Names of tokens as they are usually written."""


def of_no_op(sinks: ss.vision.VisionSinks) -> str:
    """Say which heads spend their attention on tokens that write nothing, or what comes nearest to that."""
    heads, layers = sinks.heads(), sinks.by_layer()
    wasted = heads[heads["no_op"]]
    most = int(layers["no_op_mass"].argmax())
    rule = f"above {sinks.epsilon:g} of its attention on tokens whose value writes at most 0.2 of the mean"
    if len(wasted):
        shown = ", ".join(f"{row.layer}.{row.head}" for row in wasted.head(12).itertuples())
        more = f" and {len(wasted) - 12} more" if len(wasted) > 12 else ""
        return (
            f"No-op heads: {len(wasted)} of {len(heads)} (layer.head: {shown}{more}). Each spends {rule}. "
            f"Layer {most} spends most on such tokens: {layers['no_op_mass'].max():.1%} of its attention."
        )
    at_sink = heads[heads["attention"] > sinks.epsilon]
    if at_sink.empty:
        row = heads.loc[heads["attention"].idxmax()]
        near = f"No head gives one token so much; the most is {row['attention']:.2f}"
    else:
        row = at_sink.loc[at_sink["value_ratio"].idxmin()]
        near = (
            f"{len(at_sink)} give one token so much, and the nearest of them gives {row['attention']:.2f} to "
            f"a token that writes {row['value_ratio']:.2f} of the mean"
        )
    where = f"layer {row['layer']}, head {row['head']}, at {TOKEN_NAMES.get(row['kind'], row['kind'])}"
    return f"No-op heads: none of {len(heads)} spends {rule}. {near} ({where})."


def of_registers(found: ss.vision.Outliers, record: dict[str, Any], registers: int, layer: int) -> str:
    """Say what test-time registers change, or what option measures it."""
    if not registers:
        reason = "" if found.strongest is not None else ", once there are outliers that they could take over"
        return f"Registers: not measured. --registers 1 measures what test-time registers change{reason}."
    rows = record["registers"]
    if not rows:
        return "Registers: nothing to change, since no patch is an outlier at the layer that --layer names."
    layer = layer % found.pixels.model.layers

    def mean(state: str, measure: str, at: int | None = None) -> float | None:
        here = [
            row["mean"]
            for row in rows
            if (row["state"], row["measure"]) == (state, measure) and (at is None or row["layer"] == at)
        ]
        return here[0] if here else None

    random = [
        row["mean"]
        for row in rows
        if row["state"].startswith("random") and row["measure"] == "outlier share" and row["layer"] == layer
    ]
    count = plural(registers, "test-time register")
    said = (
        f"Registers: with {count}, the share of outliers at layer {layer} changes from "
        f"{mean('original', 'outlier share', layer):.2%} to {mean('repaired', 'outlier share', layer):.2%}; "
        f"with as many random neurons, it is {min(random):.2%} to {max(random):.2%}."
    )
    kept = mean("repaired", "patch cosine")
    return said + (
        "" if kept is None else f" The other patches keep their output, with a cosine of {kept:.3f}."
    )


def layer_table(found: ss.vision.Outliers, sinks: ss.vision.VisionSinks) -> Any:
    """Make the table of what happens in each layer."""
    outliers = found.summary().set_index("layer")
    columns = ("layer", "outliers", "largest norm", *(f"to {name}" for name in sinks.prefix))
    columns += ("to one patch", "to others", "to no-ops", "no-op heads")
    shares = [f"to_{name}" for name in (*sinks.prefix, "top_patch", "other_patches")] + ["no_op_mass"]
    rows = [
        (
            str(row["layer"]),
            f"{outliers['share'][row['layer']]:.2%}",
            f"{outliers['largest'][row['layer']] / outliers['median'][row['layer']]:.2f}",
            *(f"{row[name]:.3f}" for name in shares),
            str(row["no_op_heads"]),
        )
        for row in sinks.by_layer().to_dict("records")
    ]
    title = "Layer by layer: outliers at its exit, largest norm in medians, shares of its attention"
    return table(title, columns, rows)


def outlier_table(found: ss.vision.Outliers) -> Any:
    """Make the table of outliers by layer."""
    record = found.record()
    title = (
        f"Outlier patches of {found.model}, {record['images']} images of {record['patches']} patches; "
        f"onset layer {plain(record['onset_layer'])}"
    )
    prefix = found.pixels.model.prefix
    columns = ("layer", "outliers", "images", "largest norm", *prefix)
    rows = [
        (
            "embedding" if row["layer"] < 0 else str(row["layer"]),
            spread(row, "share", "low", "high"),
            str(row["images"]),
            f"{row['largest'] / row['median']:.2f}",
            *(f"{row[name]:.2f}" for name in prefix),
        )
        for row in found.summary().to_dict("records")
    ]
    return table(title + "; norms in medians of patches", columns, rows)


def sink_table(sinks: ss.vision.VisionSinks) -> Any:
    """Make the table of the attention that each kind of token receives."""
    title = (
        f"Attention by kind of token, T = {sinks.length}, epsilon = {sinks.epsilon:g}, onset layer "
        f"{plain(sinks.onset_layer)}"
    )
    found = {sink.token: sink for sink in sinks.sinks}
    rows: list[tuple[str, ...]] = []
    for row in sinks.by_kind().to_dict("records"):
        rows.append(
            (
                row["kind"],
                spread(row, "sink_rate"),
                f"{spread(row, 'mass')}\nuniform {row['uniform']:.3f}",
                spread(row, "weighted"),
                f"{row['share_of_images']:.0%}",
                *(dark_of(found.get(row["kind"]), name) for name in sinks.conventions),
            )
        )
    shares = (f"dark share,\n{name}" for name in sinks.conventions)
    columns = ("token", "sink rate", "attention", "norm-weighted", "sink in images", *shares)
    return table(title, columns, rows)


def dark_of(sink: ss.sinks.Sink | None, convention: str) -> str:
    """Format the dark share of a sink, with that of the tokens that are not sinks below it."""
    if sink is None:
        return "-"
    share = sink.conventions[convention]
    return f"{plain(share.share.value)}\nothers {plain(share.others.value)}"


def circuit_table(kind: str, heads: pd.DataFrame) -> Any:
    """Make the table of heads with a no-op circuit at one kind of token."""
    rows = [
        (
            f"{row['layer']}.{row['head']}",
            spread(row, "attention"),
            spread(row, "value_ratio"),
            f"{row['top_two']:.2f}\nrandom {row['random_top_two']:.2f}",
            f"{row['always_on']:.2f}",
            f"{row['rival']:.2f}",
        )
        for row in heads[heads["circuit"]].to_dict("records")
    ]
    columns = ("head", "to sink", "value ratio", "two modes", "query always on", "next key")
    return table(f"No-op circuits at {kind}", columns if rows else ("head",), rows or [("none",)])


def place_table(places: pd.DataFrame) -> Any:
    """Make the table of the positions of outliers, compared with other patches."""
    rows = [
        (
            f"{row['quantity']}, {row['control']}",
            plain(row["outliers"]),
            plain(row["others"]),
            spread(row, "difference", "low", "high"),
        )
        for row in places.to_dict("records")
    ]
    return table(
        "Position of outliers, and similarity to their neighbours",
        ("quantity, control", "outliers", "others", "difference"),
        rows,
    )


def probe_table(probes: pd.DataFrame) -> Any:
    """Make the table of what linear probes read from outliers, other patches and [CLS]."""
    rows = [
        (question, *(spread(by[name], "mean", "low", "high") if name in by else "-" for name in READ))
        for question, part in probes.groupby("question", sort=False)
        for by in [part.set_index("tokens").to_dict("index")]
    ]
    return table("Linear probes of tokens, at the layer with most outliers", ("", *READ), rows)


READ = ("outliers", "others", "cls", "shuffled")
"""Kinds of tokens in the table of the probes."""


def repair_table(repair: pd.DataFrame, registers: int) -> Any:
    """Make the table of the effect of test-time registers, and of the controls."""
    chosen = repair[repair["layer"].isna() | (repair["layer"] == repair["layer"].max())]
    rows = [
        (str(state), str(row["measure"]), spread(row, "mean", "low", "high"))
        for state, part in chosen.groupby("state", sort=False)
        for row in part.to_dict("records")
    ]
    return table(
        f"Effect of {registers} test-time registers on the last layer and the output",
        ("state", "measure", "mean"),
        rows,
    )


def spread(row: Any, name: str, low: str = "", high: str = "") -> str:
    """Format a mean with its interval."""
    low, high = low or f"{name}_low", high or f"{name}_high"
    return f"{plain(float(row[name]))} [{plain(float(row[low]))}, {plain(float(row[high]))}]"
