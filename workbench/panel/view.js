// A piece of the page written as HTML by the kernel; a fold that the reader opened stays open when it is redrawn.
// Tell the kernel when the figure beside the header stands on the page, and again when a slow page has settled.
function tell(model, el, tries) {
  const say = () => {
    model.set("opened", performance.now());
    model.save_changes();
  };
  if (el.closest(".wb-panel")?.querySelector(".js-plotly-plot .main-svg")) {
    for (const wait of [0, 1000, 5000]) setTimeout(say, wait);
  } else if (tries > 0) setTimeout(() => tell(model, el, tries - 1), 100);
}

// In a table that sorts, each heading is a button; the order is kept when the kernel writes the table anew.
const number = (row, column) => {
  const text = row.children[column].innerText.trim();
  return [text, parseFloat(text.replaceAll(",", ""))];
};

function sort(table, { column, down }) {
  const before = (a, b) => {
    const [[textA, a1], [textB, b1]] = [number(a, column), number(b, column)];
    return Number.isNaN(a1) || Number.isNaN(b1) ? textA.localeCompare(textB) : a1 - b1;
  };
  const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? before(b, a) : before(a, b)));
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}

function sortable(table, order) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement("button");
    button.append(...cell.childNodes);
    button.title = "Sort by this column";
    button.onclick = () => {
      order.down = order.column === column ? !order.down : column > 0;
      order.column = column;
      sort(table, order);
    };
    cell.append(button);
  });
  if (order.column !== undefined) sort(table, order);
}

function render({ model, el }) {
  const order = {};
  const draw = () => {
    const open = [...el.querySelectorAll("details")].map((fold) => fold.open);
    el.innerHTML = model.get("html");
    el.querySelectorAll("details").forEach((fold, i) => (fold.open = open[i] ?? fold.open));
    el.querySelectorAll("table[data-sorts]").forEach((table) => sortable(table, order));
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
