// A text coloured by expert: choose a layer, a token or an expert. Everything comes from the JSON of the page.
(() => {
  "use strict";
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const at = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hue = (expert) => ((expert * 137.508) % 360).toFixed(1);
  const state = { layer: 0, expert: null, token: null };
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/\r/g, "␍") || " ";
  const percent = (share) => (100 * share < 1 ? (100 * share).toFixed(1) : Math.round(100 * share)) + " %";
  const experts = (layer, token) => facts.experts[layer][token].filter((expert) => expert >= 0);

  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const coloured = (made, expert) => {
    if (expert === undefined) made.classList.add("none");
    else made.style.setProperty("--hue", hue(expert));
    return made;
  };
  const row = (...cells) => element("tr", {}, ...cells.map((cell, i) => element("td", { className: i ? "number" : "" }, cell)));

  // ------------------------------------------------------------------------------------------------------- the text
  const buttons = facts.tokens.map(([text], place) => {
    const made = element("button", { type: "button", className: "token" });
    made.append(element("span", { textContent: visible(text) }), element("small", {}));
    made.onclick = () => choose({ token: state.token === place ? null : place, expert: null });
    at("text").append(made);
    for (let line = 0; line < (text.match(/\n/g) || []).length && line < 2; line++) at("text").append(element("br", {}));
    return made;
  });

  function paintText() {
    buttons.forEach((button, place) => {
      const own = experts(state.layer, place);
      button.classList.remove("none", "other");
      coloured(button, own[0]);
      button.lastChild.textContent = own.length ? own.slice(0, 2).join(",") + (own.length > 2 ? "…" : "") : "–";
      if (state.expert !== null && !own.includes(state.expert)) button.classList.add("other");
      button.setAttribute("aria-pressed", state.token === place);
      button.title = own.length ? `expert ${own.join(", ")}` : "no expert";
    });
  }

  function paintChips() {
    const counts = new Map();
    facts.tokens.forEach((_, place) => experts(state.layer, place).forEach((e) => counts.set(e, (counts.get(e) || 0) + 1)));
    const sorted = [...counts].sort((one, other) => other[1] - one[1] || one[0] - other[0]);
    at("chips").replaceChildren(...sorted.map(([expert, count]) => {
      const chip = coloured(element("button", { type: "button", className: "chip", textContent: `${expert} · ${count}×` }), expert);
      chip.setAttribute("aria-pressed", state.expert === expert);
      chip.setAttribute("aria-label", `expert ${expert}, ${count} tokens of this text`);
      chip.onclick = () => choose({ expert: state.expert === expert ? null : expert, token: null });
      return chip;
    }));
  }

  // ------------------------------------------------------------------------------------------------------ the panel
  function ofExpert(layer, expert) {
    const known = facts.known[layer][expert] || { slots: 0, tokens: [], kinds: [] };
    const all = facts.known[layer].reduce((sum, other) => sum + other.slots, 0) || 1;
    const parts = [element("h3", { textContent: `Expert ${expert} of layer ${layer}` })];
    parts.push(element("p", { textContent: known.slots
      ? `${known.slots.toLocaleString("en")} slots, ${(known.slots / all * facts.known[layer].length).toFixed(1)} times an even share, of ${facts.source}.`
      : `No token of ${facts.source}.` }));
    if (known.tokens.length) {
      parts.push(element("h4", { textContent: "Favourite tokens: how often, and which share of all their occurrences" }));
      parts.push(element("table", {}, element("tbody", {}, ...known.tokens.map(([text, count, share]) =>
        row(element("code", { textContent: visible(text) }), count.toLocaleString("en"), percent(share))))));
    }
    if (known.kinds.length) {
      parts.push(element("h4", { textContent: "Kinds: share of its slots, and of all slots" }));
      parts.push(element("table", {}, element("tbody", {}, ...known.kinds.slice(0, 6).map(([kind, share, usual, sure]) => {
        const meter = coloured(element("span", { className: "meter" }), expert);
        meter.style.width = `${100 * share}%`;
        const name = element("span", { textContent: kind + (sure ? " ●" : "") });
        name.title = sure ? "more than chance" : "";
        return row(element("span", {}, name, meter), percent(share), percent(usual));
      }))));
      parts.push(element("p", { textContent: "● more than chance gives (5 % for all cells of the layer together)" }));
    }
    return parts;
  }

  function ofToken(place) {
    const [text, kind, nats] = facts.tokens[place];
    const parts = [element("h3", {}, element("code", { textContent: visible(text) }))];
    const cost = nats === null ? "The first position: nothing came before." : `It cost ${nats.toFixed(2)} nats (probability ${percent(Math.exp(-nats))}).`;
    parts.push(element("p", { textContent: `Position ${place}, ${facts.kinds[kind]}. ${cost}` }));
    parts.push(element("h4", { textContent: "Its expert in each layer, and the gate" }));
    const chips = element("div", { className: "chips" });
    facts.experts.forEach((layer, number) => layer[place].forEach((expert, slot) => {
      if (expert < 0) return;
      const chip = coloured(element("button", { type: "button", className: "chip" }), expert);
      chip.textContent = `L${number}: ${expert} · ${facts.gates[number][place][slot].toFixed(2)}`;
      chip.onclick = () => choose({ layer: number, expert, token: null });
      chips.append(chip);
    }));
    return [...parts, chips];
  }

  function paintPanel() {
    const hint = [element("h3", { textContent: "Choose" }), element("p", { textContent:
      "A token shows its expert in every layer. An expert shows its favourite tokens and kinds, and which tokens of this text are its own. The small numbers are experts." })];
    const parts = state.expert !== null ? ofExpert(state.layer, state.expert) : state.token !== null ? ofToken(state.token) : hint;
    at("panel").replaceChildren(...parts);
  }

  // -------------------------------------------------------------------------------------------------------- the map
  const CELL = 15, LEFT = 26;
  function paintMap() {
    const [L, T, canvas] = [facts.experts.length, facts.tokens.length, at("map")];
    const scale = Math.min(devicePixelRatio || 1, 16000 / (LEFT + T * CELL));
    Object.assign(canvas, { width: (LEFT + T * CELL) * scale, height: L * CELL * scale });
    Object.assign(canvas.style, { width: `${LEFT + T * CELL}px`, height: `${L * CELL}px` });
    const pen = canvas.getContext("2d"), ink = getComputedStyle(document.body).color;
    const lightness = getComputedStyle(document.body).getPropertyValue("--full");
    pen.scale(scale, scale);
    pen.font = "11px system-ui, sans-serif";
    for (let layer = 0; layer < L; layer++) {
      pen.fillStyle = ink;
      pen.fillText(layer, 2, layer * CELL + 11);
      for (let place = 0; place < T; place++) {
        const own = experts(layer, place);
        const faded = state.expert !== null && !(layer === state.layer && own.includes(state.expert));
        pen.fillStyle = own.length ? `hsl(${hue(own[0])} 62% ${lightness} / ${faded ? 0.25 : 1})` : "transparent";
        pen.fillRect(LEFT + place * CELL, layer * CELL, CELL - 1, CELL - 1);
        if (place === state.token) { pen.strokeStyle = ink; pen.strokeRect(LEFT + place * CELL, layer * CELL, CELL - 2, CELL - 2); }
      }
    }
    pen.strokeStyle = ink;
    pen.strokeRect(LEFT - 0.5, state.layer * CELL - 0.5, T * CELL, CELL);
  }
  at("map").onclick = (event) => {
    const box = at("map").getBoundingClientRect();
    const [place, layer] = [Math.floor((event.clientX - box.left - LEFT) / CELL), Math.floor((event.clientY - box.top) / CELL)];
    if (place >= 0 && place < facts.tokens.length && layer < facts.experts.length) choose({ layer, token: place, expert: null });
  };

  function choose(change) {
    Object.assign(state, change);
    at("layer").value = state.layer;
    at("layer-shown").textContent = state.layer;
    at("clear").disabled = state.expert === null && state.token === null;
    document.querySelectorAll(".layer-here").forEach((here) => { here.textContent = state.layer; });
    paintText(); paintChips(); paintPanel(); paintMap();
  }
  at("layer").max = facts.experts.length - 1;
  at("layer").oninput = () => choose({ layer: +at("layer").value, expert: null });
  at("clear").onclick = () => choose({ expert: null, token: null });
  dark.addEventListener("change", () => choose({}));
  choose({});
  document.documentElement.dataset.drawn = facts.tokens.length;
})();
