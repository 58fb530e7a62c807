"use strict";
// Tables that sort by a column and show one method or ratio; the dense and the lossless network stay on top.
(() => {
  const tables = [...document.querySelectorAll("table.sorts")];
  const value = (row, column) => {
    const text = row.cells[column].dataset.v;
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;

  for (const table of tables) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    const controls = [...body.rows].filter((row) => row.classList.contains("control"));
    const rows = [...body.rows].filter((row) => !row.classList.contains("control"));
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = rows.map((row, i) => [value(row, column), i, row]);
      order.sort((a, b) => sign * compare(a[0], b[0]) || a[1] - b[1]);
      body.append(...controls, ...order.map((entry) => entry[2]));
    }));
  }

  const method = document.getElementById("method"), ratio = document.getElementById("ratio");
  const show = () => {
    for (const row of document.querySelectorAll("table.sorts tbody tr:not(.control)")) {
      row.hidden = (method.value !== "" && row.dataset.method !== method.value) || (ratio.value !== "" && row.dataset.ratio !== ratio.value);
    }
  };
  method.addEventListener("change", show);
  ratio.addEventListener("change", show);
  document.getElementById("controls").hidden = false;
  document.documentElement.dataset.ready = "yes";
})();
