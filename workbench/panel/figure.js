// Plotly is 5 MB. anywidget waits two seconds for a widget, and drops every message to one that took longer, for good.
// So the figure is there at once and plotly follows, read once for all figures of a page.
const page = (globalThis.workbenchPlotly ??= {});

async function load(manager, id) {
  const library = await manager.get_model(id);
  const address = URL.createObjectURL(new Blob([library.get("code")], { type: "text/javascript" }));
  try {
    return (await import(address)).default;
  } finally {
    URL.revokeObjectURL(address);
  }
}

export default () => {
  let figure;
  return {
    initialize({ model }) {
      const id = model.get("library").slice("IPY_MODEL_".length);
      page.loading ??= load(model.widget_manager, id).catch((error) => {
        page.loading = undefined; // the next figure tries again
        throw error;
      });
      figure = page.loading.then((make) => {
        const made = make();
        made.initialize({ model });
        return made;
      });
    },
    async render({ model, el }) {
      return (await figure).render({ model, el });
    },
  };
};
