// A piece of the page written as HTML by the kernel; a fold that the reader opened stays open when it is redrawn.
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
  model.on("change:html", draw);
  draw();
  return () => model.off("change:html", draw);
}
export default { render };
