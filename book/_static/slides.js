// One slide at a time. The place is in the address, so that a reload or a link comes back to it.
(() => {
  const slides = [...document.querySelectorAll("section:not(.list)")];
  if (!slides.length) return;
  const place = () => Math.min(Math.max(Number(location.hash.slice(1)) || 1, 1), slides.length);
  const show = () => {
    slides.forEach((slide, at) => slide.classList.toggle("now", at === place() - 1));
    window.scrollTo(0, 0);
    window.dispatchEvent(new Event("resize")); // a figure that was drawn while hidden has no width yet
  };
  const go = (to) => { location.hash = Math.min(Math.max(to, 1), slides.length); };
  const keys = {
    ArrowRight: () => go(place() + 1), PageDown: () => go(place() + 1), " ": () => go(place() + 1),
    ArrowLeft: () => go(place() - 1), PageUp: () => go(place() - 1),
    Home: () => go(1), End: () => go(slides.length), n: () => document.body.classList.toggle("notes"),
  };
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, a, .slider-container") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  let from = null; // a finger goes sideways
  document.addEventListener("touchstart", (event) => { from = event.changedTouches[0]; }, { passive: true });
  document.addEventListener("touchend", (event) => {
    const over = event.changedTouches[0].clientX - from.clientX;
    if (Math.abs(over) > 60 && !event.target.closest(".sigma-figure, pre")) go(place() + (over < 0 ? 1 : -1));
  }, { passive: true });
  window.addEventListener("hashchange", show);
  show();
})();
