// The settings in the page's address, and a button that copies it. In JupyterLab the address belongs to the Lab, so
// there it is left alone and the button copies one line of Python instead.
const alone = () =>
  "voila" in document.body.dataset || (/\/voila\//.test(location.pathname) && !document.querySelector(".jp-LabShell"));

function read(prefix) {
  const found = {};
  for (const text of [location.search.slice(1), location.hash.slice(1)]) {
    for (const [key, value] of new URLSearchParams(text)) {
      if (key.startsWith(prefix + ".")) found[key.slice(prefix.length + 1)] = value;
    }
  }
  return found;
}

function write(prefix, settings) {
  const all = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(settings)) all.set(prefix + "." + name, value);
  history.replaceState(history.state, "", "#" + all.toString());
}

function initialize({ model }) {
  if (!alone()) return;
  const prefix = model.get("prefix"), found = read(prefix);
  if (Object.keys(found).length) {
    model.set("found", found);
    model.save_changes();
  }
  model.on("change:settings", () => write(prefix, model.get("settings")));
}

function render({ model, el }) {
  const button = document.createElement("button");
  const field = document.createElement("input");
  const what = alone() ? "link" : "code";
  el.classList.add("wb-address");
  button.className = "wb-button";
  button.textContent = "Copy " + what;
  button.title = alone()
    ? "Copy the address of this page with these settings"
    : "Copy a line of Python that makes this technique with these settings";
  field.readOnly = true;
  field.hidden = true;
  field.setAttribute("aria-label", "The " + what + " to copy");
  button.addEventListener("click", async () => {
    if (alone()) write(model.get("prefix"), model.get("settings"));
    const text = alone() ? location.href : model.get("code");
    field.value = text;
    field.hidden = false;
    field.select();
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => (button.textContent = "Copy " + what), 2000);
    setTimeout(() => (field.hidden = document.activeElement !== field), 8000);
  });
  field.addEventListener("keydown", (event) => event.stopPropagation());
  field.addEventListener("blur", () => (field.hidden = true));
  el.replaceChildren(button, field);
}
export default { initialize, render };
