// Draws figures, turns plotly's menus and sliders into controls that a keyboard reaches, follows light and dark.
// Of report, lab and book alike: each .plot has its data in a script element beside it.
function sigmaPlots(themes, isDark) {
  "use strict";
  const coarse = matchMedia("(pointer: coarse)").matches;
  const drawn = [];
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

  // The title stands above the figure as text: a step that changes it changes it there.
  function apply(plot, item) {
    const untitled = (part) => {
      if (part === null || typeof part !== "object" || Array.isArray(part)) return part;
      const { "title.text": title, "title.subtitle.text": subtitle, ...others } = part;
      for (const [place, text] of [[".title", title], [".subtitle", subtitle]]) {
        const shown = text !== undefined && plot.closest("figure").querySelector(place);
        if (shown) shown.textContent = text;
      }
      return others;
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

  async function draw(plot) {
    const source = document.getElementById(`data-${plot.dataset.figure}`);
    const { data, layout, frames } = JSON.parse(source.textContent);
    controls(plot, layout);
    layout.template = theme();
    delete layout.height; // the page's element has it
    if (coarse) layout.dragmode = false; // a finger on a figure scrolls the page
    await Plotly.newPlot(plot, { data, layout, frames: frames || [], config });
    drawn.push(plot);
  }

  async function drawAll() {
    for (const plot of document.querySelectorAll(".plot")) {
      await draw(plot);
      await new Promise((next) => setTimeout(next)); // let the page answer between figures
    }
    document.documentElement.dataset.drawn = drawn.length;
  }

  const paint = (template, size) =>
    drawn.forEach((plot) => Plotly.relayout(plot, { template, width: undefined, ...size }));
  const follow = () => paint(theme(), { autosize: true });
  addEventListener("beforeprint", () => paint(themes.light, { width: 660 })); // A4 between its margins, at 96 dots an inch
  addEventListener("afterprint", follow);
  return { drawAll, follow };
}
