// Draws every figure of the page, turns plotly's menus and sliders into native controls, follows light and dark.
(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const themes = read("themes");
  const dark = matchMedia("(prefers-color-scheme: dark)");
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

  const element = (tag, attributes, ...children) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  };
  const apply = (plot, item) => Plotly[item.method](plot, ...item.args);

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
    const shown = element("output", { textContent: slider.steps[slider.active || 0].label });
    const input = element("input", { type: "range", min: 0, max: last, step: 1, value: slider.active || 0 });
    const move = (to) => {
      input.value = to;
      shown.textContent = slider.steps[to].label;
      return apply(plot, slider.steps[to]);
    };
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
    const { data, layout, frames } = read(`data-${plot.dataset.figure}`);
    controls(plot, layout);
    layout.template = themes[dark.matches ? "dark" : "light"];
    delete layout.height; // the page's element has it
    if (coarse) layout.dragmode = false; // a finger on a figure scrolls the page
    await Plotly.newPlot(plot, { data, layout, frames: frames || [], config });
    drawn.push(plot);
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = element("button", { type: "button", textContent: head.textContent });
      head.replaceChildren(button);
      button.onclick = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
        const order = (one, other) => {
          const [a, b] = [key(one), key(other)];
          if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last, either way
          return (down ? -1 : 1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
        };
        body.append(...[...body.rows].sort(order));
      };
    });
  }
  document.querySelectorAll("table.sortable").forEach(sortable);

  const paint = (name, size) =>
    drawn.forEach((plot) => Plotly.relayout(plot, { template: themes[name], width: undefined, ...size }));
  const follow = () => paint(dark.matches ? "dark" : "light", { autosize: true });
  dark.addEventListener("change", follow);
  addEventListener("beforeprint", () => paint("light", { width: 660 })); // A4 between its margins, at 96 dots an inch
  addEventListener("afterprint", follow);

  (async () => {
    for (const plot of document.querySelectorAll(".plot")) {
      await draw(plot);
      await new Promise((next) => setTimeout(next)); // let the page answer between figures
    }
    document.documentElement.dataset.drawn = drawn.length;
  })();
})();
