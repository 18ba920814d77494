// The page's own part: its theme is the system's, its tables sort by the head that is chosen.
(() => {
  "use strict";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = sigmaPlots(JSON.parse(document.getElementById("themes").textContent), () => dark.matches);
  dark.addEventListener("change", plots.follow);

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
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
  plots.drawAll();
})();
