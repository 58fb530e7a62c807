"use strict";
// The neuron table: columns in typed arrays, only the rows in view in the document. Facts are data: textContent only.
(() => {
  const ROW = 32, EXTRA = 8;
  const find = (id) => document.getElementById(id);
  const { kinds, layers } = JSON.parse(find("data").textContent);
  const count = layers.reduce((sum, layer) => sum + layer.kind.length, 0);
  if (!count) return;

  const layerOf = new Uint32Array(count), indexOf = new Uint32Array(count), kindOf = new Uint32Array(count);
  const lower = new Float64Array(count), upper = new Float64Array(count);
  const number = (value) => typeof value === "number" ? value : value === "inf" ? Infinity : value === "-inf" ? -Infinity : NaN;
  let at = 0;
  layers.forEach((layer, k) => layer.kind.forEach((kind, i) => {
    layerOf[at] = k; indexOf[at] = i; kindOf[at] = kind; lower[at] = number(layer.lower[i]); upper[at] = number(layer.upper[i]); at++;
  }));

  const name = (layer) => `${layer.layer} (node ${layer.node})`;
  const fate = (kind) => kind.fate === "removed" ? `removed: ${kind.rule}` : kind.fate;
  const channel = (id) => {
    const shape = layers[layerOf[id]].shape, size = shape.slice(1).reduce((a, b) => a * b, 1);
    return Math.floor(indexOf[id] / size);
  };
  const place = (id) => {
    const shape = layers[layerOf[id]].shape;
    if (shape.length < 2) return `${indexOf[id]}`;
    let rest = indexOf[id];
    const parts = shape.slice().reverse().map((size) => { const part = rest % size; rest = Math.floor(rest / size); return part; });
    return `${indexOf[id]} (ch ${parts.reverse().join(", ")})`;
  };
  const bound = (value) => Number.isFinite(value) ? String(Number(value.toPrecision(6))) : String(value).replace("Infinity", "∞");
  const reason = (id) => layers[layerOf[id]].reasons[indexOf[id]];

  // -- search: a word is looked up once per layer, kind and reason, then neurons are only table look-ups
  const layerText = layers.map((layer) => `layer ${name(layer)}`.toLowerCase());
  const kindText = kinds.map((k) => [k.status, k.method, fate(k), k.meaning, k.proof, k.why].join(" ").toLowerCase());
  const matcher = (word) => {
    if (/^\d+$/.test(word)) return (id) => indexOf[id] === Number(word) || layers[layerOf[id]].node === word;
    if (/^ch\d+$/.test(word)) return (id) => channel(id) === Number(word.slice(2));
    const inLayer = layerText.map((text) => text.includes(word)), inKind = kindText.map((text) => text.includes(word));
    const inReason = layers.map((layer) => new Set(Object.keys(layer.reasons)
      .filter((i) => layer.reasons[i].toLowerCase().includes(word)).map(Number)));
    return (id) => inLayer[layerOf[id]] || inKind[kindOf[id]] || inReason[layerOf[id]].has(indexOf[id]);
  };

  // -- what is shown
  const state = { key: "id", up: true, order: new Uint32Array(0), chosen: -1 };
  const scroll = find("scroll"), rows = find("rows"), table = find("table");
  const rank = (words) => { const sorted = [...new Set(words)].sort(); return words.map((word) => sorted.indexOf(word)); };
  const ranks = { status: rank(kinds.map((k) => k.status)), method: rank(kinds.map((k) => k.method)), fate: rank(kinds.map(fate)) };
  const keys = {
    id: (id) => id, layer: (id) => layerOf[id], lower: (id) => lower[id], upper: (id) => upper[id],
    status: (id) => ranks.status[kindOf[id]], method: (id) => ranks.method[kindOf[id]], fate: (id) => ranks.fate[kindOf[id]],
  };

  const filter = () => {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean).map(matcher);
    const layer = find("layer").value, status = find("status").value, fateWord = find("fate").value;
    const wanted = kinds.map((k) => (!status || k.status === status) && (!fateWord || fate(k) === fateWord || k.fate === fateWord));
    const found = new Uint32Array(count);
    let n = 0;
    for (let id = 0; id < count; id++) {
      if (wanted[kindOf[id]] && (layer === "" || layerOf[id] === Number(layer)) && words.every((match) => match(id))) found[n++] = id;
    }
    state.order = found.subarray(0, n);
    sort();
    find("found").textContent = `${n.toLocaleString("en")} of ${count.toLocaleString("en")} neurons`;
  };

  const sort = () => {
    const key = keys[state.key], sign = state.up ? 1 : -1;
    const value = new Float64Array(count);
    for (const id of state.order) { const v = key(id); value[id] = Number.isNaN(v) ? -Infinity : v; }
    state.order.sort((a, b) => value[a] < value[b] ? -sign : value[a] > value[b] ? sign : a - b);
    table.setAttribute("aria-rowcount", state.order.length + 1);
    scroll.scrollTop = 0;
    draw();
  };

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  const row = (id, position) => {
    const kind = kinds[kindOf[id]], tr = element("tr", undefined, id === state.chosen ? "chosen" : "");
    const first = element("td"), button = element("button", place(id));
    button.type = "button";
    button.dataset.id = id;
    first.append(button);
    const status = element("td", "");
    const swatch = element("span", undefined, `swatch bg-${kind.status}`);
    swatch.setAttribute("aria-hidden", "true");
    status.append(swatch, kind.status);
    tr.append(first, element("td", name(layers[layerOf[id]])), status, element("td", kind.method || "—"),
      element("td", bound(lower[id]), "num"), element("td", bound(upper[id]), "num"), element("td", fate(kind)));
    tr.setAttribute("aria-rowindex", position + 2);
    return tr;
  };

  const space = (height) => {
    const tr = element("tr"), td = element("td", undefined, "space");
    td.colSpan = 7;
    td.style.height = `${height}px`;
    tr.append(td);
    tr.setAttribute("aria-hidden", "true");
    return tr;
  };

  const draw = () => {
    const n = state.order.length, view = Math.ceil(scroll.clientHeight / ROW) + 2 * EXTRA;
    const from = Math.max(0, Math.min(n - view, Math.floor(scroll.scrollTop / ROW) - EXTRA)), to = Math.min(n, from + view);
    const focused = document.activeElement && document.activeElement.dataset.id;
    const made = [];
    for (let i = from; i < to; i++) made.push(row(state.order[i], i));
    rows.replaceChildren(space(from * ROW), ...made, space((n - to) * ROW));
    if (focused !== undefined) rows.querySelector(`button[data-id="${Number(focused)}"]`)?.focus({ preventScroll: true });
  };

  const tell = (id) => {
    state.chosen = id;
    const kind = kinds[kindOf[id]], layer = layers[layerOf[id]], why = find("why");
    const said = reason(id);
    why.replaceChildren(element("strong", `Layer ${name(layer)}, neuron ${place(id)}, ${fate(kind)}. `),
      `It is ${kind.meaning}. Bounds of its pre-activation: ${bound(lower[id])} to ${bound(upper[id])}. `,
      kind.status === "unknown" ? "" : `Proof: ${kind.proof}. `,
      said ? `Why it is unknown: ${said}. ` : "",
      `Why it is ${kind.fate === "removed" ? "gone" : kind.fate}: ${kind.why}.`);
    for (const tr of rows.querySelectorAll("tr")) tr.classList.toggle("chosen", tr.querySelector("button")?.dataset.id === String(id));
  };

  // -- wiring
  const option = (select, value, text) => { const made = element("option", text); made.value = value; select.append(made); };
  layers.forEach((layer, k) => option(find("layer"), k, name(layer)));
  [...new Set(kinds.map((k) => k.status))].forEach((word) => option(find("status"), word, word));
  const fates = [...new Set(kinds.map((k) => k.fate))], rules = [...new Set(kinds.map(fate))];
  [...new Set([...fates, ...rules])].sort().forEach((word) => option(find("fate"), word, word));

  let waiting = 0;
  find("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 60); });
  for (const id of ["layer", "status", "fate"]) find(id).addEventListener("change", filter);
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      state.up = state.key === button.dataset.key ? !state.up : true;
      state.key = button.dataset.key;
      for (const th of table.querySelectorAll("thead th")) th.setAttribute("aria-sort", "none");
      button.parentElement.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      sort();
    });
  }
  rows.addEventListener("click", (event) => { const button = event.target.closest("button"); if (button) tell(Number(button.dataset.id)); });
  let drawing = false;
  scroll.addEventListener("scroll", () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; draw(); });
  });
  addEventListener("resize", draw);
  find("explorer").hidden = false;
  filter();
  document.documentElement.dataset.ready = "yes";
})();
