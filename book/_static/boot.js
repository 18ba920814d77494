// Draws the figures of the page and keeps the reader's guesses; needs no kernel and no network.
document.addEventListener("DOMContentLoaded", () => {
  const page = document.documentElement;
  if (typeof sigmaPlots === "function") {
    const plots = sigmaPlots(SIGMA_THEMES, () => page.dataset.theme === "dark");
    new MutationObserver(plots.follow).observe(page, { attributeFilter: ["data-theme"] });
    plots.drawAll();
  } else {
    page.dataset.drawn = 0;
  }

  // The theme's search button shows "Search" and a shortcut, and is named otherwise: voice control looks for what is shown.
  document.querySelectorAll(".search-button-field[aria-label]").forEach((button) => button.removeAttribute("aria-label"));
  // Its list of citations holds no list items.
  document.querySelectorAll(".citation-list[role]").forEach((list) => list.removeAttribute("role"));
  // Its switch beside a page that has pages of its own is an arrow without a name.
  document.querySelectorAll("li.has-children > a").forEach((link) =>
    link.parentNode.querySelector(":scope > details > summary")?.setAttribute("aria-label", `pages of ${link.textContent}`));

  const store = {
    get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window: forget it */ } },
  };
  const show = (key, value) =>
    document.querySelectorAll(`[data-sigma-guess="${key}"]`).forEach((place) => { place.textContent = value; });

  document.querySelectorAll("fieldset.sigma-predict").forEach((question) => {
    const before = store.get(question.id);
    if (before) show(question.id, before);
    question.querySelectorAll("input").forEach((button) => {
      button.checked = button.value === before;
      button.addEventListener("change", () => { store.set(question.id, button.value); show(question.id, button.value); });
    });
  });
});
