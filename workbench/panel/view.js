// A piece of the page written as HTML by the kernel; a fold that the reader opened stays open when it is redrawn.
// Tell the kernel when the figure beside the header stands on the page, and again when a slow page has settled.
function tell(model, el, tries) {
  const say = () => {
    model.set("opened", performance.now());
    model.save_changes();
  };
  if (el.closest(".wb-panel")?.querySelector(".js-plotly-plot .main-svg")) {
    for (const wait of [0, 1000, 4000]) setTimeout(say, wait);
  } else if (tries > 0) setTimeout(() => tell(model, el, tries - 1), 100);
}

function render({ model, el }) {
  const draw = () => {
    const open = [...el.querySelectorAll("details")].map((fold) => fold.open);
    el.innerHTML = model.get("html");
    el.querySelectorAll("details").forEach((fold, i) => (fold.open = open[i] ?? fold.open));
  };
  el.className += " wb-view " + model.get("kind");
  if (model.get("role")) el.setAttribute("role", model.get("role"));
  if (model.get("live")) el.setAttribute("aria-live", "polite");
  if (model.get("name")) el.setAttribute("aria-label", model.get("name"));
  if (model.get("kind") === "wb-header") tell(model, el, 300);
  model.on("change:html", draw);
  draw();
  return () => model.off("change:html", draw);
}
export default { render };
