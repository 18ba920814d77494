// Draws the figures of the page and keeps the reader's guesses; needs no kernel and no network.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("script[data-plotly-for]").forEach((source) => {
    const figure = JSON.parse(source.textContent);
    Plotly.newPlot(source.dataset.plotlyFor, figure).catch((error) => console.error(error));
  });

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
