// A slider and a number box for one setting, kept equal in the browser; the kernel hears of each new value.
function render({ model, el }) {
  const id = "wb-" + Math.random().toString(36).slice(2);
  const range = document.createElement("input");
  const box = document.createElement("input");
  const label = document.createElement("label");
  const unit = document.createElement("span");
  const name = model.get("label"), low = model.get("low"), high = model.get("high"), step = model.get("step");
  const digits = (String(step).split(".")[1] || "").length;
  const show = (v) => String(+(+v).toFixed(Math.max(digits, 4)));

  el.classList.add("wb-dial");
  label.textContent = name;
  label.htmlFor = id;
  label.title = model.get("help");
  unit.textContent = model.get("unit");
  unit.className = "wb-unit";
  range.type = "range";
  range.id = id;
  box.type = "number";
  box.setAttribute("aria-label", name + ", exact value");
  for (const input of [range, box]) {
    Object.assign(input, { min: low, max: high, step });
    input.title = model.get("help");
  }
  box.step = "any";

  const draw = () => {
    const value = show(model.get("value"));
    const part = high > low ? (100 * (value - low)) / (high - low) : 0;
    if (range.value !== value) range.value = value;
    if (document.activeElement !== box || +box.value !== +value) box.value = value;
    range.style.setProperty("--part", Math.min(100, Math.max(0, part)) + "%");
    range.setAttribute("aria-valuetext", (value + " " + model.get("unit")).trim());
  };
  const send = (value) => {
    model.set("value", value);
    model.save_changes();
  };
  // While the pointer or a key is held down the kernel shows what is exact and waits with the measurement.
  const hold = (held) => {
    if (model.get("held") === held) return;
    model.set("held", held);
    model.save_changes();
  };
  range.addEventListener("pointerdown", () => hold(true));
  range.addEventListener("keydown", (event) => hold(/^(Arrow|Page|Home|End)/.test(event.key)));
  for (const end of ["pointerup", "pointercancel", "keyup", "blur"]) range.addEventListener(end, () => hold(false));
  range.addEventListener("input", () => send(+range.value));
  box.addEventListener("change", () => {
    const typed = box.value === "" ? model.get("value") : +box.value;
    const value = Math.min(high, Math.max(low, model.get("whole") ? Math.round(typed) : typed));
    box.value = show(value);
    send(value);
  });
  // Jupyter has shortcuts on plain keys: keep what is typed here to ourselves.
  for (const input of [range, box]) input.addEventListener("keydown", (event) => event.stopPropagation());
  el.setAttribute("data-lm-suppress-shortcuts", "true");
  const grey = () => {
    for (const input of [range, box]) input.disabled = model.get("disabled");
    el.classList.toggle("wb-idle", model.get("disabled"));
  };
  model.on("change:value", draw);
  model.on("change:disabled", grey);
  el.replaceChildren(label, range, box, unit);
  draw();
  grey();
  return () => {
    model.off("change:value", draw);
    model.off("change:disabled", grey);
  };
}
export default { render };
