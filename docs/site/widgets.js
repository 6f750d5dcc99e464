// Shows saved ipywidgets without a kernel. Where the marker stands comes the library that ipywidgets brings with it (widgetsnbextension); it
// expects the classic notebook around it, of which it gets what it asks for.
(() => {
  "use strict";
  let lib = null;
  const Jupyter = { version: "6.5.0", notebook: { container: { on() {} } } };
  const outputarea = { OutputArea: class { register_mime_type() {} } };
  const requirejs = Object.assign((names, ok) => { if (names.length === 3 && names[2] === "notebook/js/outputarea") ok(Jupyter, { on() {} }, outputarea); }, { config() {}, undef() {} });
  const before = window.requirejs;
  window.requirejs = requirejs;
  const define = (needs, make) => { lib = make({ id: "widgets", uri: location.href }); };
  /*LIBRARY*/
  if (before === undefined) delete window.requirejs; else window.requirejs = before;
  lib.load_ipython_extension();   // its style sheets

  const ManagerBase = Object.getPrototypeOf(lib.WidgetManager);
  // What a cell printed inside an Output widget.
  class OutputView extends lib.DOMWidgetView {
    render() {
      super.render();
      for (const o of this.model.get("outputs") || []) {
        const data = o.data || {}, text = (t) => (Array.isArray(t) ? t.join("") : t || "");
        let el;
        if (data["image/png"]) { el = document.createElement("img"); el.src = `data:image/png;base64,${text(data["image/png"])}`; el.alt = text(data["text/plain"]); }
        else if (data["text/html"]) { el = document.createElement("div"); el.innerHTML = text(data["text/html"]); }
        else { el = document.createElement("pre"); el.textContent = text(o.text) || text(data["text/plain"]) || `${o.ename || ""} ${o.evalue || ""}`; }
        this.el.append(el);
      }
    }
  }
  class OutputModel extends lib.DOMWidgetModel {
    defaults() { return { ...super.defaults(), _model_name: "OutputModel", _view_name: "OutputView", _model_module: "@jupyter-widgets/output", _view_module: "@jupyter-widgets/output", msg_id: "", outputs: [] }; }
  }
  class Manager extends ManagerBase {
    async loadClass(name, module) {
      const found = { OutputModel, OutputView }[name] || (/^@jupyter-widgets\/(base|controls)$/.test(module) ? lib[name] : null);
      if (!found) throw new Error(`${module} ${name} is not part of the book`);
      return found;
    }
    async _get_comm_info() { return {}; }
    async _create_comm() { return { on_close() {}, on_msg() {}, close() {}, send() {} }; }
    async display_view(view) { return view; }
  }
  window.edgenbWidgetsShow = async () => {
    const manager = new Manager();
    await manager.set_state(window.edgenbWidgets);
    for (const box of document.querySelectorAll(".edgenb-widget")) {
      try {
        const view = await manager.create_view(await manager.get_model(box.dataset.model), {});
        box.replaceChildren();
        view.luminoWidget.constructor.attach(view.luminoWidget, box);
      } catch (e) { console.error(e); }   // its text stays
    }
  };
})();
