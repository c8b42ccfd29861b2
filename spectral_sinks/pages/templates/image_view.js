"use strict";
// The tokens of an image: patches over the picture, and beside it the tokens that belong to no patch.
const view = {
  file: "image",
  less: "hatched",
  usual: () => input.prefix,
  // The tokens beside the picture would hide differences between patches
  scaledFrom: () => input.prefix,
  // Patches of one picture often differ by less than they have
  fromZero: () => false,

  setUp() {
    const cover = () => {
      const share = Number($("cover").value);
      document.documentElement.style.setProperty("--cover", share / 100);
      // the colours of a picture that nothing covers are its own
      document.documentElement.style.setProperty("--grey", share > 0 ? 1 : 0);
      $("cover-value").textContent = `${share} %`;
    };
    $("cover").addEventListener("input", cover);
    cover();
    for (const id of ["reads-map", "readers-map"]) {
      if (!$(id)) continue;
      const tell = (event) => {
        const token = tokenOf(event);
        if (token !== null) tipAt(`${input.labels[token]}\n${LABELS.attention}: ${shown(Number(event.target.dataset.value))}`, event.clientX, event.clientY);
      };
      $(id).addEventListener("mouseover", tell);
      $(id).addEventListener("mouseleave", () => { $("tip").hidden = true; });
      $(id).addEventListener("click", (event) => { const token = tokenOf(event); if (token !== null) selectToken(token); });
    }
  },

  // The picture under its patches, beside the other tokens
  make(box, cell = option) {
    const [rows, columns] = input.grid, tokens = input.labels.map((_, token) => cell(token, ""));
    const prefix = element("div", null, { role: "group", "aria-label": "Tokens before the patches" });
    prefix.className = "prefix";
    tokens.slice(0, input.prefix).forEach((made, token) => { made.textContent = input.labels[token]; prefix.append(made); });
    const picture = element("div", null, { role: "group", "aria-label": `Patches of ${input.name}` }), grid = element("div", null, { role: "presentation" });
    picture.className = "picture";
    picture.style.setProperty("--shape", columns / rows);
    grid.className = "grid";
    grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
    grid.append(...tokens.slice(input.prefix));
    picture.append(element("img", null, { src: input.picture, alt: "" }), grid);
    box.replaceChildren(...(input.prefix ? [prefix] : []), picture);
  },

  step(key, token) {
    const [rows, columns] = input.grid, first = input.prefix, patch = token - first;
    const steps = { ArrowRight: token + 1, ArrowLeft: token - 1, Home: 0, End: input.size - 1 };
    if (patch < 0) return { ...steps, ArrowDown: token + 1, ArrowUp: token - 1 }[key];
    const above = first > 0 ? first - 1 : token, up = patch < columns ? above : token - columns;
    const down = patch < (rows - 1) * columns ? token + columns : token;
    return { ...steps, ArrowUp: up, ArrowDown: down }[key];
  },

  tip: (token) => [`${token}: ${input.labels[token]}`, `${stateWords()}: ${shown(valueOf(token, state.layer))}`, `norm: ${shown(input.norm.at(state.layer + 1, token))}`],
  facts: (token) => [["Token", input.labels[token]], ["Position", token]],
  lastFacts: () => [],

  drawAttention() {
    for (const [id, incoming] of [["reads-map", false], ["readers-map", true]]) {
      const values = new Array(input.size).fill(0);
      for (const [other, value] of pairs(Math.max(state.layer, 0), state.head, state.token, incoming)) values[other] = value;
      view.make($(id), (token) => {
        const made = element("span", null, { "data-token": token });
        made.className = `token${token === state.token ? " selected" : ""}`;
        return made;
      });
      colour([...$(id).querySelectorAll(".token")], values, scaleOf(values.slice(view.scaledFrom()), "received"));
    }
  },

  rows() {
    const [, columns] = input.grid;
    const rows = input.labels.map((label, token) => {
      const patch = token - input.prefix;
      const where = patch < 0 ? [null, null] : [Math.floor(patch / columns), patch % columns];
      return [token, label, ...where, valueOf(token, state.layer)];
    });
    return [["position", "token", "row", "column", stateWords()], rows];
  },
};
