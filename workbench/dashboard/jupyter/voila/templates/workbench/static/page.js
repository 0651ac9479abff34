// The page's own words while the kernel works: what it is doing, how far it is, and whether it is still there.
(() => {
  // Two waits of the widgets' own scripts are short: two seconds for a widget's code, four for the state of all widgets.
  // A busy machine takes longer, and what they have given up stays broken. While the page opens they get a minute.
  const MINUTE = 60_000, opening = () => !document.body?.dataset.ready;
  const abortAfter = AbortSignal.timeout.bind(AbortSignal), callAfter = window.setTimeout.bind(window);
  AbortSignal.timeout = (ms) => abortAfter(ms === 2000 && opening() ? MINUTE : ms);
  window.setTimeout = (call, ms, ...rest) => callAfter(call, ms === 4000 && opening() ? MINUTE : ms, ...rest);

  const status = document.getElementById("wb-status");
  const text = document.getElementById("wb-status-text");
  const progress = document.getElementById("wb-progress");

  const say = (sentence) => { status.hidden = false; text.textContent = sentence; };
  const stop = (sentence) => { say(sentence); status.classList.add("wb-stopped"); };
  const done = () => { status.hidden = true; document.body.dataset.ready = "true"; };

  // Voilà calls these by name while it streams the cells and when its own script has taken over.
  window.voila_heartbeat = () => {};
  window.voila_process = (cell, cells) => {
    progress.max = cells;
    progress.value = cell;
    say(`Running cell ${Math.min(cell + 1, cells)} of ${cells} …`);
  };
  window.update_loading_text = (cell, cells, sentence) => (sentence ? say(sentence) : window.voila_process(cell, cells));
  window.display_cells = () => {};
  let finished = false;
  window.voila_finish = () => {
    finished = true;
    progress.removeAttribute("value");
    const outputs = [...document.querySelectorAll('script[type="application/vnd.voila.cell-output+json"]')];
    const widgets = outputs.some((output) => output.textContent.includes("application/vnd.jupyter.widget-view+json"));
    if (document.querySelector(".wb-error") || !outputs.length) return done();
    say("Drawing …");
    whenDrawn(widgets ? ".jupyter-widgets" : ".jp-OutputArea-output", done);
  };

  const whenDrawn = (selector, then) => {
    const drawn = () => document.querySelector(`#rendered_cells ${selector}`);
    if (drawn()) return then();
    const watch = new MutationObserver(() => { if (drawn()) { watch.disconnect(); then(); } });
    watch.observe(document.getElementById("rendered_cells"), { childList: true, subtree: true });
  };

  // Voilà ends a page's kernel when the page goes, but without the token that its server asks for, so kernels stayed.
  const sendBeacon = navigator.sendBeacon.bind(navigator);
  navigator.sendBeacon = (url, body) => {
    const token = document.cookie.match(/(?:^|; )_xsrf=([^;]+)/);
    if (body || !token || !String(url).includes("voila/api/shutdown/")) return sendBeacon(url, body);
    const form = new FormData();
    form.append("_xsrf", decodeURIComponent(token[1]));
    return sendBeacon(url, form);
  };

  // A kernel ends when its page was asleep for long, or the server was stopped: sliders would then move nothing.
  const kernelIsThere = async () => {
    const { baseUrl, kernelId } = JSON.parse(document.getElementById("jupyter-config-data").textContent);
    try {
      return (await fetch(`${baseUrl}api/kernels/${kernelId}`, { cache: "no-store" })).status !== 404;
    } catch {
      return false;
    }
  };
  const check = async () => {
    if (document.body.dataset.ready !== "true" || document.hidden || (await kernelIsThere())) return;
    stop("This page's kernel has ended, so its sliders no longer measure. Reload the page to start again.");
    clearInterval(timer);
  };
  document.addEventListener("DOMContentLoaded", () => {
    if (!finished) stop("The server stopped before this page was whole. Start it again, and reload the page.");
  });
  const timer = setInterval(check, 20000);
  document.addEventListener("visibilitychange", check);
  window.addEventListener("pageshow", check);
})();
