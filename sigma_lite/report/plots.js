// Draws figures, turns plotly's menus and sliders into controls that a keyboard reaches, follows light and dark.
// Of report, lab and book alike: each .plot has its data in a script element beside it.
function sigmaPlots(themes, isDark) {
  "use strict";
  const coarse = matchMedia("(pointer: coarse)").matches;
  const drawn = new Map(); // each plot, and what its figure wants of legend, margins and words on a wide page
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: coarse ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    showSendToCloud: false, // plotly.js 4 offers by default to upload the figure
    plotlyServerURL: "",
  };
  const theme = () => themes[isDark() ? "dark" : "light"];

  const element = (tag, attributes, ...children) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  };

  // The title stands above the figure as text: a step that changes it changes it there. Other words are kept as it says.
  function apply(plot, item) {
    const untitled = (part) => {
      if (part === null || typeof part !== "object" || Array.isArray(part)) return part;
      const { "title.text": title, "title.subtitle.text": subtitle, ...others } = part;
      for (const [place, text] of [[".title", title], [".subtitle", subtitle]]) {
        const shown = text !== undefined && plot.closest("figure").querySelector(place);
        if (shown) shown.textContent = text;
      }
      const wanted = drawn.get(plot);
      if (others.annotations) wanted.annotations = others.annotations;
      for (const title of wanted.titles) title[1] = others[title[0]] ?? title[1];
      const fitting = Object.entries(shape(plot, wanted)).filter(([key]) => key in others);
      return { ...others, ...Object.fromEntries(fitting) };
    };
    return Plotly[item.method](plot, ...item.args.map(untitled));
  }

  function dropdown(plot, menu) {
    const options = menu.buttons.map((button, i) =>
      element("option", { value: i, textContent: button.label, selected: i === (menu.active || 0) }));
    const select = element("select", { onchange: () => apply(plot, menu.buttons[select.value]) }, ...options);
    return element("label", {}, `${menu.name || "show"}:`, select);
  }

  function choice(plot, menu) {
    const buttons = menu.buttons.map((item, i) => {
      const button = element("button", { type: "button", textContent: item.label });
      button.setAttribute("aria-pressed", i === (menu.active || 0));
      button.onclick = () => {
        buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
        apply(plot, item);
      };
      return button;
    });
    return element("span", { className: "choice" }, `${menu.name || "show"}:`, ...buttons);
  }

  function range(plot, slider) {
    const prefix = (slider.currentvalue || {}).prefix || "";
    const last = slider.steps.length - 1;
    const shown = element("output", {});
    const input = element("input", { type: "range", min: 0, max: last, step: 1, value: slider.active || 0 });
    const say = (at) => {
      input.value = at;
      shown.textContent = slider.steps[at].label;
      input.setAttribute("aria-valuetext", slider.steps[at].label);
    };
    const move = (to) => (say(to), apply(plot, slider.steps[to]));
    say(slider.active || 0);
    input.oninput = () => move(+input.value);
    let timer = 0;
    const play = element("button", { type: "button", textContent: "play" });
    const stop = () => { clearInterval(timer); timer = 0; play.textContent = "play"; };
    play.onclick = () => {
      if (timer) return stop();
      if (+input.value === last) move(0);
      play.textContent = "pause";
      timer = setInterval(() => (+input.value < last ? move(+input.value + 1) : stop()), 250);
    };
    input.addEventListener("pointerdown", stop);
    return [element("label", { className: "window" }, prefix, shown, input), play];
  }

  function controls(plot, layout) {
    const made = (layout.updatemenus || []).map((menu) => (menu.type === "buttons" ? choice : dropdown)(plot, menu));
    for (const slider of layout.sliders || []) made.push(...range(plot, slider));
    delete layout.updatemenus;
    delete layout.sliders;
    if (made.length) plot.before(element("div", { className: "controls" }, ...made));
  }

  const wrap = (text, columns) => text.includes("<") ? text : text.split(" ").reduce((lines, word) => {
    const line = `${lines.at(-1)} ${word}`.trim();
    return line.length > columns && lines.at(-1) ? [...lines, word] : [...lines.slice(0, -1), line];
  }, [""]).join("<br>");

  // On a phone a legend beside the plot goes above it, margins shrink, long words around it take more lines.
  const NARROW = 520;
  function shape(plot, { legend, margin, titles, annotations, height, rows, names }) {
    const width = plot.clientWidth, narrow = width > 0 && width < NARROW; // 0: in a closed fold
    const more = Math.max(0, rows - 3) * 19 + names.length * 22; // rows of the legend, and names of two or three lines
    plot.style.height = `${height + (narrow ? more : 0)}px`;
    const room = (key) => (key[0] === "x" ? width - 130 : plot.clientHeight - 140 - rows * 19) / 6.6; // in columns
    const said = titles.map(([key, text]) => [key, narrow ? wrap(text, room(key)) : text]);
    const found = { legend: { ...legend }, margin: { ...margin }, annotations, ...Object.fromEntries(said) };
    if (names.length) {
      found["yaxis.tickvals"] = names;
      found["yaxis.ticktext"] = narrow ? names.map((name) => wrap(name, 16)) : names;
    }
    if (!narrow) return found;
    if (legend && (legend.x ?? 0) > 0.9)
      found.legend = { ...legend, orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", yref: "paper" };
    found.margin.l = Math.min(found.margin.l ?? 64, 44);
    found.margin.r = Math.min(found.margin.r ?? 28, 14);
    const beside = (one) => annotations.filter((other) => other.y === one.y && other.xref === "paper").length;
    found.annotations = annotations.map((one) => one.xref === "paper" && one.text
      ? { ...one, text: wrap(one.text, (width - 130) / beside(one) / 7) } : one);
    return found;
  }

  const put = (layout, changes) => Object.entries(changes).forEach(([key, value]) => {
    const parts = key.split("."), last = parts.pop();
    parts.reduce((at, part) => (at[part] ??= {}), layout)[last] = value;
  });

  async function draw(plot) {
    const source = document.getElementById(`data-${plot.dataset.figure}`);
    const { data, layout, frames } = JSON.parse(source.textContent);
    controls(plot, layout);
    if (layout.meta?.min_width) { // text, whose letters cannot shrink: it scrolls instead
      const frame = element("div", { className: "sideways", tabIndex: 0 });
      plot.replaceWith(frame);
      frame.append(plot);
      plot.style.minWidth = `${layout.meta.min_width}px`;
    }
    layout.template = theme();
    delete layout.height; // the page's element has it
    if (layout.width) plot.style.maxWidth = `${layout.width}px`; // a phone may be narrower
    delete layout.width;
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key) && layout[key].title?.text);
    const titles = axes.map((key) => [`${key}.title.text`, layout[key].title.text]);
    const { legend, margin, annotations = [] } = layout;
    const inLegend = (one) => one.name && one.showlegend !== false && one.visible !== false;
    const named = layout.showlegend === false ? [] : data.filter(inLegend);
    const long = named.some((one) => one.name.length > 14);
    for (const one of named) one.name = wrap(one.name, 38); // what a phone's width holds
    const lines = named.reduce((sum, one) => sum + one.name.split("<br>").length, 0);
    const rows = long ? lines : Math.ceil(named.length / 2); // of a phone's legend
    const words = ({ y, yaxis }) => (Array.isArray(y) && !yaxis ? y.filter((one) => typeof one === "string") : []);
    const bars = data.flatMap(words);
    const names = bars.some((name) => name.length > 16) ? [...new Set(bars)] : []; // of rows, written beside the plot
    const wanted = { legend, margin, titles, annotations, rows, names, height: parseFloat(plot.style.height) };
    put(layout, shape(plot, wanted));
    drawn.set(plot, wanted);
    if (coarse) layout.dragmode = false; // a finger on a figure scrolls the page
    await Plotly.newPlot(plot, { data, layout, frames: frames || [], config });
  }

  async function drawAll() {
    for (const plot of document.querySelectorAll(".plot")) {
      await draw(plot);
      await new Promise((next) => setTimeout(next)); // let the page answer between figures
    }
    document.documentElement.dataset.drawn = drawn.size;
  }

  const paint = (template, size) => drawn.forEach((wanted, plot) =>
    Plotly.relayout(plot, { template, width: undefined, ...shape(plot, wanted), ...size }));
  const follow = () => paint(theme(), { autosize: true });
  let waiting = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (width === innerWidth) return; // a phone hides its address bar
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(follow, 200);
  });
  addEventListener("beforeprint", () => paint(themes.light, { width: 660 })); // A4 between its margins, at 96 dots an inch
  addEventListener("afterprint", follow);
  return { drawAll, follow };
}
