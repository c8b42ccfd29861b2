"use strict";
// What both pages share: the data, tables, downloads, and figures. Texts of models are set as text, never as markup.
const page = JSON.parse(document.getElementById("data").textContent);
const CONFIG = { displayModeBar: false, responsive: true };

function element(name, text, attributes) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  return made;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (value === true) return "yes";
  if (value === false) return "no";
  if (typeof value !== "number") return typeof value === "object" ? JSON.stringify(value) : String(value);
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1000 || (size > 0 && size < 0.0005) ? value.toExponential(2) : value.toFixed(size < 10 ? 4 : 2);
}

function tableOf(columns, rows) {
  const made = element("table"), head = made.createTHead().insertRow(), body = made.createTBody();
  for (const column of columns) head.append(element("th", column, { scope: "col" }));
  for (const row of rows) {
    const line = body.insertRow();
    for (const value of row) {
      const cell = element("td", shown(value));
      if (typeof value === "number") cell.className = "number";
      line.append(cell);
    }
  }
  return made;
}

function csvOf(columns, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function download(name, text) {
  const link = element("a", "", { download: name });
  link.href = URL.createObjectURL(new Blob(["\ufeff" + text], { type: "text/csv" }));
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Plotly reads tags in its texts
function literal(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

async function unpack(coded) {
  const bytes = Uint8Array.from(atob(coded.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const codes = coded.bits === 8 ? new Uint8Array(buffer) : new Uint16Array(buffer);
  const missing = 2 ** coded.bits - 1;
  const strides = coded.shape.map((_, axis) => coded.shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const at = (...where) => {
    const code = codes[where.reduce((sum, index, axis) => sum + index * strides[axis], 0)];
    if (code === missing) return null;
    const value = coded.low + coded.step * code;
    return coded.log ? Math.exp(value) : value;
  };
  return { at, shape: coded.shape };
}

function drawFigure(name, variant) {
  const { data, layout } = page.figures[name].variants[variant];
  const chart = document.querySelector(`[data-figure="${name}"] .chart`);
  return Plotly.react(chart, data, layout, CONFIG);
}

function setUpFigures() {
  for (const [name, { variants, table }] of Object.entries(page.figures || {})) {
    drawFigure(name, Object.keys(variants)[0]);
    const select = document.querySelector(`select[data-variant="${name}"]`);
    if (select) select.addEventListener("change", () => drawFigure(name, select.value));
    const details = document.querySelector(`details[data-numbers="${name}"]`);
    details.addEventListener("toggle", () => {
      const region = details.querySelector(".tall");
      if (details.open && !region.firstChild) region.append(tableOf(table.columns, table.rows));
    });
    document.querySelector(`button[data-csv="${name}"]`).addEventListener("click", () =>
      download(`${name}.csv`, csvOf(table.columns, table.rows)));
  }
}

const LIGHT_TO_DARK = [[0, "#f4f6fa"], [0.35, "#9db8d9"], [0.7, "#3b6ea8"], [1, "#08254a"]];
const BASE = {
  font: { family: "system-ui, sans-serif", size: 13, color: "#111111" },
  margin: { l: 54, r: 12, t: 16, b: 48 }, height: 320, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff",
  dragmode: false, legend: { orientation: "h", y: 1.15 },
};
const axis = (title, more) => ({
  title: { text: title }, gridcolor: "#eeeeee", automargin: true, fixedrange: true, ...more,
});
