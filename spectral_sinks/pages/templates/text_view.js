"use strict";
// The tokens of a text: words in a line, each coloured by its number.
const view = {
  file: "text",
  less: "underlined",
  // The first token is apart from the usual ones, as a sink often is
  usual: () => 1,
  scaledFrom: () => 0,
  fromZero: () => true,
  setUp() {},

  make(box) {
    box.dir = input.direction;
    box.replaceChildren(...input.shown.map((word, token) => {
      const span = option(token, word);
      span.classList.add(input.kinds[token]);
      return span;
    }));
  },

  step(key, token) {
    const forward = input.direction === "rtl" ? "ArrowLeft" : "ArrowRight", back = input.direction === "rtl" ? "ArrowRight" : "ArrowLeft";
    return { [forward]: token + 1, ArrowDown: token + 1, [back]: token - 1, ArrowUp: token - 1, Home: 0, End: input.size - 1 }[key];
  },

  tip: (token) => [`${token}: ${input.labels[token]}`, `id ${input.ids[token]}`, `${stateWords()}: ${shown(valueOf(token, state.layer))}`, `NLL ${shown(nllOf(input, token))}`],
  facts: (token) => [["Token", input.labels[token]], ["Position", token], ["Id", input.ids[token]]],
  lastFacts: (token) => [["NLL", shown(nllOf(input, token))], [`NLL, filter ${$("filter").value} at exit ${$("exit").value}`, shown(nllOf(filtered(), token))]],
  drawAttention() {},

  rows() {
    const columns = ["position", "id", "token", "nll", ...Object.keys(input.filtered).map((name) => `nll, ${name.replace(/\/(?=\d+$)/, ", exit ")}`), stateWords()];
    const rows = input.ids.map((id, token) => [token, id, input.labels[token], nllOf(input, token), ...Object.values(input.filtered).map((reading) => nllOf(reading, token)), valueOf(token, state.layer)]);
    return [columns, rows];
  },
};
