// What the pages of the book do: plots come alive when they are looked at, widgets too, search works from a folder without a server.
(() => {
  "use strict";
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  const dark = () => document.documentElement.classList.contains("quarto-dark");
  const loaded = {};
  const load = (src) => loaded[src] ||= new Promise((ok, no) => {
    const s = document.createElement("script");
    s.src = src; s.onload = ok; s.onerror = () => no(new Error(`${src} is missing`));
    document.head.append(s);
  });

  // A page opened from a disk may not fetch: the search index comes as a script then.
  if (location.protocol === "file:") {
    const fetched = window.fetch;
    window.fetch = (what, ...more) => String(what).endsWith("search.json")
      ? load(here + "search.js").then(() => ({ json: async () => window.edgenbSearch })) : fetched(what, ...more);
  }

  // ---- plots
  const figures = {}, shown = new Map();
  window.edgenbPlot = (name, figure) => { figures[name] = figure; };
  const styled = (layout) => {
    const css = getComputedStyle(document.body), ink = css.color, grid = dark() ? "#3a4048" : "#e3e6ea";
    const axis = (a) => ({ gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, ...a, ...(a && a.title ? { title: { standoff: 12, ...(typeof a.title === "string" ? { text: a.title } : a.title) } } : {}) });
    const out = { ...layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color: ink, family: css.fontFamily } };
    for (const k of Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k)).concat(["xaxis", "yaxis"])) out[k] = axis(layout[k]);
    const visible = (c) => (!c || (dark() && /^(black|#000|#000000|rgb\(0, ?0, ?0\))$/i.test(c)) ? ink : c);
    if (layout.shapes) out.shapes = layout.shapes.map((s) => ({ ...s, line: { ...s.line, color: visible(s.line && s.line.color) } }));
    const narrow = window.innerWidth < 600;
    out.margin = { l: 56, r: narrow ? 10 : 24, t: 52, b: 52, ...layout.margin };
    const title = typeof layout.title === "string" ? { text: layout.title } : layout.title && { ...layout.title };
    if (title && narrow && title.text) title.text = title.text.replace(/<br ?\/?>/g, " ").replace(/(.{18,38})\s+/g, "$1<br>");
    if (title) out.title = { ...title, font: { size: narrow ? 14 : 16, ...title.font } };
    if (narrow && !layout.legend) out.legend = { orientation: "h", y: -0.25 };
    return out;
  };
  const draw = (box) => {
    const { data, layout } = figures[box.dataset.plot];
    let live = box.querySelector(".edgenb-live");
    if (!live) { live = document.createElement("div"); live.className = "edgenb-live"; live.style.height = `${box.dataset.height}px`; box.replaceChildren(live); box.removeAttribute("role"); }
    window.Plotly.react(live, data, styled(layout), { responsive: true, displaylogo: false });
    shown.set(box, true);
  };
  const boxes = [...document.querySelectorAll(".edgenb-plot")];
  const begin = (box) => load(here + "plotly.min.js").then(() => load(new URL(box.dataset.src, location.href).href)).then(() => draw(box)).catch(console.error);
  const seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => { seen.unobserve(e.target); begin(e.target); }), { rootMargin: "400px" });
  boxes.forEach((b) => seen.observe(b));
  new MutationObserver(() => shown.forEach((_, box) => draw(box))).observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });

  // ---- widgets
  const state = document.getElementById("edgenb-widget-state");
  if (state) load(new URL(state.dataset.src, location.href).href).then(() => load(here + "widgets.js")).then(() => window.edgenbWidgetsShow()).catch(console.error);

  // ---- wide tables scroll by themselves, and by keyboard
  document.querySelectorAll("main table").forEach((t) => {
    if (t.closest(".table-scroll, .edgenb-widget")) return;
    const box = document.createElement("div");
    box.className = "table-scroll";
    t.replaceWith(box); box.append(t);
    for (const cell of t.querySelectorAll("td, th")) {
      const letters = cell.textContent.trim().length;
      if (letters <= 28) cell.style.whiteSpace = "nowrap"; else cell.style.minWidth = `${Math.min(letters * 0.25, 20)}rem`;
    }
    if (box.scrollWidth > box.clientWidth) { box.tabIndex = 0; box.setAttribute("role", "region"); box.setAttribute("aria-label", "Table"); }
  });
})();
