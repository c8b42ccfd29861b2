"use strict";
// The explorer: a state (text or image, token, quantity, layer, head, band, filter), and what is drawn from it.
// `view` draws the tokens themselves.
const $ = (id) => document.getElementById(id);
const STOPS = [[244, 246, 250], [157, 184, 217], [59, 110, 168], [8, 37, 74]];
const WARM = [[250, 246, 240], [240, 190, 120], [190, 110, 30], [90, 45, 0]];
const LISTED = 10;
const LABELS = {
  attention: "attention", received: "attention received", norm: "norm", share: "share", nll: "NLL",
  delta_nll: "change of NLL", delta_received: "change of attention received",
};
const state = { input: 0, token: 0, layer: 0, head: 0 };
const opened = new Map();

async function openInput(index) {
  if (opened.has(index)) return opened.get(index);
  const given = page.inputs[index], made = { ...given, size: given.labels.length, filtered: {} };
  for (const name of ["norm", "shares", "received"]) made[name] = given[name] && (await unpack(given[name]));
  for (const [name, { nll, received }] of Object.entries(given.filtered)) {
    made.filtered[name] = { nll, received: received && (await unpack(received)) };
  }
  if (given.maps) {
    made.maps = { kind: given.maps.kind, weights: await unpack(given.maps.weights) };
    if (given.maps.keys) made.maps.keys = await unpack(given.maps.keys);
  }
  opened.set(index, made);
  return made;
}

let input = null;
let cells = [];
const filterOn = () => $("filter-on") !== null && $("filter-on").checked;
const filterWords = () => `filter ${$("filter").value} at exit ${$("exit").value}`;
const filtered = () => ($("filter") ? input.filtered[`${$("filter").value}/${$("exit").value}`] : { nll: null, received: null });
const nllOf = (reading, token) => (reading.nll ? reading.nll[token] : null);
const band = () => ($("band") ? Number($("band").value) : 0);
const quantity = () => $("quantity").value;
const minus = (a, b) => (a === null || b === null || a === undefined || b === undefined ? null : a - b);

// The value of the chosen quantity for a token; layer -1 is the embedding
function valueOf(token, layer) {
  const on = filterOn();
  switch (quantity()) {
    case "received": return on ? filteredReceived(token, layer) : receivedBy(token, layer, state.head);
    case "norm": return input.norm.at(layer + 1, token);
    case "share": return input.shares && input.shares.at(layer + 1, band(), token);
    case "nll": return nllOf(on ? filtered() : input, token);
    case "delta_nll": return minus(nllOf(filtered(), token), nllOf(input, token));
    default: return minus(filteredReceived(token, layer), receivedBy(token, layer, 0));
  }
}

function receivedBy(token, layer, head) {
  if (!input.received || layer < 0) return null;
  return input.received.at(layer, head < input.received.shape[1] ? head : 0, token);
}

function filteredReceived(token, layer) {
  const { received } = filtered();
  return received && layer >= 0 ? received.at(layer, token) : null;
}

const byLayer = () => !["nll", "delta_nll"].includes(quantity());
const ofResidual = () => ["norm", "share"].includes(quantity());
const signed = () => quantity().startsWith("delta");
const usesHeads = () => quantity() === "received" && !filterOn() && input.received.shape[1] > 1;

// Colours: from light to dark; of changes, an increase is blue, and a decrease orange and underlined
function mixed(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
  return stops[low].map((from, channel) => Math.round(from + (stops[low + 1][channel] - from) * (place - low)));
}

function luminance(color) {
  const [r, g, b] = color.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function scaleOf(values, name = quantity()) {
  const known = values.filter((v) => v !== null && Number.isFinite(v));
  if (!known.length) return null;
  if (name.startsWith("delta")) {
    const most = Math.max(...known.map(Math.abs)) || 1;
    return { low: -most, high: most, words: `blue: more than without the filter; orange and ${view.less}: less`, share: (v) => Math.sqrt(Math.abs(v) / most), stops: (v) => (v < 0 ? WARM : STOPS) };
  }
  const low = name === "norm" || !view.fromZero(name) ? Math.min(...known) : 0, high = Math.max(...known);
  const stops = () => STOPS;
  if (name === "norm") {
    const from = Math.log(low), size = Math.log(high) - from || 1;
    return { low, high, words: "logarithmic", share: (v) => (Math.log(v) - from) / size, stops };
  }
  const root = name === "received" || name === "share";
  return { low, high, words: root ? "by square root" : "linear", share: (v) => (root ? Math.sqrt(Math.max(v - low, 0) / (high - low || 1)) : (v - low) / (high - low || 1)), stops };
}

function colour(spans, values, scale) {
  values.forEach((value, token) => {
    const span = spans[token], known = scale && value !== null && Number.isFinite(value);
    const color = known ? mixed(scale.stops(value), scale.share(value)) : [255, 255, 255];
    span.style.backgroundColor = `rgb(${color.join(" ")} / var(--over, 1))`;
    span.style.color = luminance(color) > 0.179 ? "#000" : "#fff";
    span.dataset.value = known ? value : "";
  });
}

function colourTokens() {
  const values = Array.from({ length: input.size }, (_, token) => valueOf(token, state.layer));
  const scale = scaleOf(values.slice(view.scaledFrom()));
  colour(cells, values, scale);
  values.forEach((value, token) => cells[token].classList.toggle("below", signed() && value !== null && value < 0));
  $("scale-low").textContent = scale ? shown(scale.low) : "";
  $("scale-high").textContent = scale ? shown(scale.high) : "";
  $("scale-words").textContent = scale ? `(${scale.words}${view.scaledFrom() ? "; the scale is that of the patches" : ""})` : "";
  const parts = signed() ? [...WARM.slice().reverse(), ...STOPS] : STOPS;
  $("scale-bar").style.background = `linear-gradient(to right, ${parts.map((c) => `rgb(${c.join(",")})`).join(",")})`;
}

function stateWords() {
  const name = quantity() === "share" ? `share of ${page.subspaces[band()]}` : LABELS[quantity()];
  const where = state.layer < 0 ? " at the embedding" : ofResidual() ? ` at the exit of layer ${state.layer}` : ` in layer ${state.layer}`;
  const head = usesHeads() ? (state.head === 0 ? ", mean over heads" : `, head ${state.head - 1}`) : byLayer() && !ofResidual() ? ", mean over heads" : "";
  const on = filterOn() || signed();
  const filter = !page.exits.length ? "" : !on ? ", untouched model" : ofResidual() ? ", untouched model (measured without filters)" : `, ${filterWords()}`;
  return `${name}${byLayer() ? where + head : ""}${filter}`;
}

function tipAt(words, x, y) {
  const tip = $("tip");
  tip.textContent = words;
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 12, window.innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > window.innerHeight ? Math.max(4, y - tip.offsetHeight - 12) : y + 18}px`;
}

const showTip = (token, x, y) => tipAt(view.tip(token).join("\n"), x, y);

// A token that can be chosen
function option(token, word) {
  const span = element("span", word, { role: "option", "aria-selected": "false", tabindex: "-1", "data-token": token });
  span.className = `token${String(token) in input.sinks ? " sink" : ""}`;
  span.setAttribute("aria-label", `${token}: ${input.labels[token]}`);
  return span;
}

const tokenOf = (event) => {
  const span = event.target.closest ? event.target.closest(".token") : null;
  return span ? Number(span.dataset.token) : null;
};

function setUpTokens() {
  const box = $("tokens");
  box.addEventListener("mouseover", (event) => { const token = tokenOf(event); if (token !== null) showTip(token, event.clientX, event.clientY); });
  box.addEventListener("mouseleave", () => { $("tip").hidden = true; });
  box.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token === null) return;
    const { left, bottom } = event.target.getBoundingClientRect();
    showTip(token, left, bottom - 14);
  });
  box.addEventListener("focusout", () => { $("tip").hidden = true; });
  box.addEventListener("click", (event) => { const token = tokenOf(event); if (token !== null) selectToken(token); });
  box.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (token === null) return;
    const next = view.step(event.key, token);
    if (next !== undefined) {
      event.preventDefault();
      focusToken(Math.min(Math.max(next, 0), input.size - 1));
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      selectToken(token);
    } else if (event.key === "Escape") $("tip").hidden = true;
  });
}

function focusToken(token) {
  for (const span of $("tokens").querySelectorAll('[tabindex="0"]')) span.tabIndex = -1;
  const span = cells[token];
  span.tabIndex = 0;
  span.focus();
}

function selectToken(token) {
  for (const span of $("tokens").querySelectorAll(".selected")) {
    span.classList.remove("selected");
    span.setAttribute("aria-selected", "false");
  }
  for (const span of $("tokens").querySelectorAll('[tabindex="0"]')) span.tabIndex = -1;
  state.token = token;
  const span = cells[token];
  span.classList.add("selected");
  span.setAttribute("aria-selected", "true");
  span.tabIndex = 0;
  showToken();
}

// Attention weights of a layer: pairs of a token and a weight. Head 0 is the mean.
function place(layer) { return page.attentionLayers.indexOf(layer); }

function weight(layer, head, query, key) {
  const { weights } = input.maps, heads = weights.shape[1];
  if (heads === 1) return weights.at(layer, 0, query, key);
  if (head > 0) return weights.at(layer, head - 1, query, key);
  let sum = 0;
  for (let h = 0; h < heads; h += 1) sum += weights.at(layer, h, query, key);
  return sum / heads;
}

function pairs(layer, head, token, incoming) {
  const at = place(layer), found = [];
  if (!input.maps || at < 0) return found;
  const { kind, keys, weights } = input.maps;
  if (kind === "whole") {
    for (let other = 0; other < input.size; other += 1) {
      const value = incoming ? weight(at, head, other, token) : weight(at, head, token, other);
      if (value > 0) found.push([other, value]);
    }
    return found;
  }
  const kept = keys.shape[2];
  for (let query = incoming ? 0 : token; query < (incoming ? input.size : token + 1); query += 1) {
    for (let rank = 0; rank < kept; rank += 1) {
      const key = keys.at(at, query, rank), value = weights.at(at, query, rank);
      if (value > 0 && (!incoming || key === token)) found.push([incoming ? query : key, value]);
    }
  }
  return found;
}

function listPairs(id, incoming) {
  const strongest = pairs(Math.max(state.layer, 0), state.head, state.token, incoming).sort((a, b) => b[1] - a[1]).slice(0, LISTED);
  $(id).replaceChildren(tableOf(["position", "token", "attention"], strongest.map(([other, value]) => [other, input.labels[other], value])));
}

function layerMap(id, incoming) {
  const layers = page.attentionLayers;
  const z = layers.map((layer) => {
    const row = new Array(input.size).fill(null);
    for (const [other, value] of pairs(layer, 0, state.token, incoming)) row[other] = value;
    return row;
  });
  const names = input.labels.map((label, index) => literal(`${index} ${label}`));
  const trace = { type: "heatmap", z, x: names.map((_, index) => index), y: layers, text: layers.map(() => names), zmin: 0, colorscale: LIGHT_TO_DARK, colorbar: { thickness: 10 }, hoverongaps: false, hovertemplate: "layer %{y}, %{text}: %{z:.3f}<extra></extra>" };
  Plotly.react(id, [trace], { ...BASE, xaxis: axis("position"), yaxis: axis("layer", { dtick: layers.length > 16 ? 5 : 1 }) }, CONFIG);
  once(id, (point) => setLayer(point.y));
}

const listening = new Set();
function once(id, react) {
  if (listening.has(id)) return;
  listening.add(id);
  $(id).on("plotly_click", (event) => react(event.points[0]));
}

function showToken() {
  const token = state.token, layer = state.layer;
  const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
  const norm = input.norm.at(layer + 1, token);
  const usual = median(Array.from({ length: input.size - view.usual() }, (_, other) => input.norm.at(layer + 1, other + view.usual())));
  const where = layer < 0 ? "at the embedding" : `at the exit of layer ${layer}`;
  const rows = [
    ...view.facts(token),
    ["Attention sink", String(token) in input.sinks ? "yes" : "no"],
    [`Norm ${where}`, `${shown(norm)} (${(norm / usual).toFixed(2)} times the median)`],
  ];
  if (input.shares) rows.push([`Share of ${page.subspaces[band()]} ${where}`, shown(input.shares.at(layer + 1, band(), token))]);
  if (input.received) rows.push(["Attention received in the layer", layer < 0 ? "–" : `${shown(receivedBy(token, layer, 0))} (mean over heads)`]);
  if (input.received && state.head > 0 && input.received.shape[1] > 1) rows.push([`Attention received from head ${state.head - 1}`, shown(receivedBy(token, layer, state.head))]);
  rows.push(...view.lastFacts(token));
  const table = $("token-facts");
  table.replaceChildren(...rows.map(([name, value]) => {
    const row = element("tr");
    const cell = element("td", value);
    if (name === "Token") cell.className = "token-text";
    row.append(element("th", name, { scope: "row" }), cell);
    return row;
  }));
  $("attention-lists").hidden = $("out-box").hidden = $("in-box").hidden = !input.maps;
  if (input.maps) {
    listPairs("reads", false);
    listPairs("readers", true);
    view.drawAttention();
    layerMap("chart-out", false);
    layerMap("chart-in", true);
    const { kind, weights } = input.maps;
    $("map-note").textContent = kind === "strongest" ? `Only the ${input.maps.keys.shape[2]} strongest weights of each token are kept, in the mean over heads.` : weights.shape[1] === 1 && page.heads > 1 ? "The mean over heads, since single heads are not kept for long texts." : "";
  }
  bandChart();
  layerChart();
  const channels = input.sinks[String(token)];
  $("channels-box").hidden = !channels;
  if (channels) $("channels").replaceChildren(tableOf(["channel", "value"], channels[layer + 1]));
}

function bandChart() {
  if (!input.shares) return;
  const count = page.subspaces.filter((name) => name.startsWith("band")).length, bands = Array.from({ length: count }, (_, b) => b);
  const y = bands.map((b) => input.shares.at(state.layer + 1, b, state.token));
  const shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1 / count, y1: 1 / count, line: { dash: "dash", color: "#111111", width: 1 } }];
  Plotly.react("chart-bands", [{ type: "bar", x: bands.map((b) => b + 1), y, marker: { color: "#3b6ea8" }, hovertemplate: "band %{x}: %{y:.4f}<extra></extra>" }], { ...BASE, shapes, xaxis: axis("band, the last is dark"), yaxis: axis("share") }, CONFIG);
}

function layerChart() {
  const layers = Array.from({ length: page.layers }, (_, layer) => layer), data = [];
  const line = (name, x, y, more) => data.push({ type: "scatter", mode: "lines+markers", name, x, y, hovertemplate: `${name}, layer %{x}: %{y:.4f}<extra></extra>`, ...more });
  if (input.received) line("attention received", layers, layers.map((layer) => receivedBy(state.token, layer, 0)), { line: { color: "#111111" }, marker: { symbol: "circle" } });
  if (input.received && filterOn()) line("under the filter", layers, layers.map((layer) => filteredReceived(state.token, layer)), { line: { color: "#111111", dash: "dash" }, marker: { symbol: "circle-open" } });
  const exits = [-1, ...layers];
  line("norm", exits, exits.map((layer) => input.norm.at(layer + 1, state.token)), { yaxis: "y2", line: { color: "#767676", dash: "dot" }, marker: { symbol: "square" } });
  Plotly.react("chart-layers", data, { ...BASE, margin: { ...BASE.margin, r: 54 }, xaxis: axis("layer"), yaxis: axis("attention received", { rangemode: "tozero" }), yaxis2: { overlaying: "y", side: "right", title: { text: "norm" }, rangemode: "tozero", showgrid: false, fixedrange: true } }, CONFIG);
  once("chart-layers", (point) => setLayer(point.x));
}

function heatMap() {
  $("heat").hidden = !byLayer();
  if (!byLayer()) {
    $("heat-words").textContent = "The NLL belongs to the whole model and has no layer: choose another quantity above to see it here.";
    return;
  }
  $("heat-words").textContent = `${stateWords().replace(/ (at the embedding|at the exit of layer \d+|in layer \d+)/, "")}. A click chooses a token and a layer.`;
  const layers = Array.from({ length: page.layers + (ofResidual() ? 1 : 0) }, (_, index) => index - (ofResidual() ? 1 : 0));
  const values = layers.map((layer) => Array.from({ length: input.size }, (_, token) => valueOf(token, layer)));
  const log = quantity() === "norm";
  const z = log ? values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : values;
  let most = 0;
  for (const row of values) for (const v of row) if (v !== null) most = Math.max(most, Math.abs(v));
  const names = input.labels.map((label, index) => literal(`${index} ${label}`));
  const scale = signed() ? { zmin: -most, zmax: most, colorscale: [[0, "#5a2d00"], [0.25, "#f0be78"], [0.5, "#fbfaf8"], [0.75, "#3b6ea8"], [1, "#08254a"]] } : { colorscale: LIGHT_TO_DARK, ...(log ? {} : { zmin: 0, zmax: most || 1 }) };
  const trace = { type: "heatmap", x: names.map((_, index) => index), y: layers, z, customdata: values, text: layers.map(() => names), hoverongaps: false, hovertemplate: "layer %{y}, %{text}: %{customdata:.4f}<extra></extra>", colorbar: { thickness: 10, title: { text: log ? "log10" : "" } }, ...scale };
  Plotly.react("heat", [trace], { ...BASE, height: Math.min(640, 140 + 22 * layers.length), xaxis: axis("position"), yaxis: axis(ofResidual() ? "exit of layer (−1: embedding)" : "layer", { dtick: layers.length > 16 ? 5 : 1 }) }, CONFIG);
  once("heat", (point) => { setLayer(point.y); selectToken(point.x); });
}

function setLayer(layer) {
  $("layer").value = layer;
  changed(false);
}

// Reads the controls, and draws everything that depends on them
function changed(redrawHeat = true) {
  $("layer").min = ofResidual() ? -1 : 0;
  state.layer = Number($("layer").value);
  $("layer-value").textContent = !byLayer() ? "all" : state.layer < 0 ? "embedding" : String(state.layer);
  $("layer").setAttribute("aria-valuetext", $("layer-value").textContent);
  state.head = Number($("head").value);
  if ($("band")) $("band").disabled = quantity() !== "share";
  $("head").disabled = !input.received || input.received.shape[1] === 1;
  $("state").textContent = `Shown: ${stateWords()}.`;
  colourTokens();
  showToken();
  if (redrawHeat) heatMap();
}

async function setInput(index) {
  state.input = index;
  input = await openInput(index);
  view.make($("tokens"));
  cells = [...$("tokens").querySelectorAll(".token")];
  state.token = 0;
  changed();
  selectToken(Number(Object.keys(input.sinks)[0] || 0));
}

async function setUp() {
  setUpTokens();
  view.setUp();
  $("layer").value = page.start;
  await setInput(0);
  for (const id of ["quantity", "band", "head", "filter", "exit", "filter-on"]) if ($(id)) $(id).addEventListener("change", () => changed());
  $("layer").addEventListener("input", () => changed(false));
  if ($("input")) $("input").addEventListener("change", () => setInput(Number($("input").value)));
  $("tokens-csv").addEventListener("click", () => download(`${view.file}${state.input + 1}.csv`, csvOf(...view.rows())));
  document.body.dataset.ready = "true";
}

setUp();
