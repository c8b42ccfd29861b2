"use strict";
// The heads of a report: a click on the map, or two lists, choose the head that is shown.
const NAMES = {
  received: "attention received by the first token", use: "use of the sink", attention: "attention of the queries that see it",
  value_ratio: "length of the sink's value beside that of other tokens", top_two: "part of the margin in two modes",
  random_top_two: "the same in random bases, at most", always_on: "constant part of the query side",
  rival: "next strongest key", key_dark: "dark share of the key direction", reading_dark: "dark share of the reading",
  value_dark: "dark share of the value", circuit: "no-op circuit", lacking: "conditions that fail",
};
let maps = null, chosen = null;

function headAt(layer, head) {
  return page.heads.find((row) => row.layer === layer && row.head === head);
}

function headRows(row) {
  return Object.entries(NAMES).filter(([name]) => name in row).map(([name, label]) => {
    const low = row[`${name}_low`], high = row[`${name}_high`];
    const interval = typeof low === "number" ? ` [${shown(low)}, ${shown(high)}]` : "";
    return [label, row[name] === "" ? "none" : shown(row[name]) + interval];
  });
}

function headWords(row) {
  const said = `Head ${row.head} of layer ${row.layer} gives the first token ${(100 * row.received).toFixed(1)} % of its attention. `;
  if (row.circuit === true) return said + "It has a no-op circuit: it looks at the sink by default and copies almost nothing from it.";
  if (typeof row.lacking !== "string") return said + "Its circuit was not measured.";
  return said + `It has no no-op circuit; what is missing: ${row.lacking}.`;
}

function showHead(layer, head) {
  const row = headAt(layer, head);
  if (!row) return;
  chosen = row;
  document.getElementById("head-layer").value = layer;
  document.getElementById("head-head").value = head;
  document.getElementById("head-words").textContent = headWords(row);
  document.getElementById("head-numbers").replaceChildren(tableOf(["quantity", "value"], headRows(row)));
  const place = page.attentionLayers.indexOf(layer);
  if (maps && place >= 0) drawMap(place, head);
  if (page.profiles) drawProfile(layer, head);
}

function drawMap(place, head) {
  const [, , queries, keys] = maps.shape;
  const z = Array.from({ length: queries }, (_, q) => Array.from({ length: keys }, (_, k) => (k > q && maps.at(place, head, q, k) === 0 ? null : maps.at(place, head, q, k))));
  const names = page.tokens.map((token, index) => literal(`${index} ${token}`));
  const text = z.map((_, q) => names.map((key) => `${names[q]} reads ${key}`));
  const trace = { type: "heatmap", z, text, zmin: 0, zmax: 1, colorscale: LIGHT_TO_DARK, colorbar: { thickness: 10 }, hoverongaps: false, hovertemplate: "%{text}: %{z:.3f}<extra></extra>" };
  Plotly.react("head-map", [trace], { ...BASE, height: 380, xaxis: axis("token that is read"), yaxis: axis("token that reads", { autorange: "reversed" }) }, CONFIG);
}

function drawProfile(layer, head) {
  const kinds = [["key direction", "circle", "#111111", "solid"], ["reading", "square", "#3b6ea8", "dash"], ["value", "diamond-open", "#767676", "dot"]];
  const data = kinds.map(([kind, symbol, color, dash]) => {
    const y = page.profiles[`${kind}/${layer}/${head}`];
    return { type: "scatter", mode: "lines+markers", name: kind, x: y.map((_, band) => band + 1), y, marker: { symbol, color, size: 7 }, line: { color, dash, width: 1.5 }, hovertemplate: `${kind}, band %{x}: %{y:.3f}<extra></extra>` };
  });
  const shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: page.profiles.chance, y1: page.profiles.chance, line: { dash: "dash", color: "#111111", width: 1 } }];
  Plotly.react("head-profile", data, { ...BASE, height: 380, shapes, xaxis: axis("band"), yaxis: axis("share") }, CONFIG);
}

async function setUpHeads() {
  if (page.maps) maps = await unpack(page.maps);
  const layer = document.getElementById("head-layer"), head = document.getElementById("head-head");
  for (const select of [layer, head]) select.addEventListener("change", () => showHead(Number(layer.value), Number(head.value)));
  document.querySelector('[data-figure="heads"] .chart').on("plotly_click", (event) => showHead(Number(event.points[0].y), Number(event.points[0].x)));
  document.getElementById("head-csv").addEventListener("click", () =>
    download(`layer${chosen.layer}_head${chosen.head}.csv`, csvOf(Object.keys(chosen), [Object.values(chosen)])));
  const strongest = page.heads.reduce((best, row) => (row.received > best.received ? row : best));
  showHead(strongest.layer, strongest.head);
}

setUpFigures();
(page.heads ? setUpHeads() : Promise.resolve()).then(() => { document.body.dataset.ready = "true"; });
