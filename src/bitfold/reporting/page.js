"use strict";
(() => {
  const root = document.documentElement;
  const colours = {
    light: { ink: "#1c2026", grid: "#e3e6ea", paper: "#ffffff", line: ["#1f5fd0", "#c2600a", "#128060", "#7a3fc4"] },
    dark: { ink: "#e6e9ed", grid: "#343a42", paper: "#14171b", line: ["#7fb0ff", "#ffa657", "#4fd1a5", "#c9a2ff"] },
  };
  const config = { responsive: true, displaylogo: false, scrollZoom: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d"], toImageButtonOptions: { format: "svg" } };
  const plots = new Map();

  const theme = () => (root.dataset.theme === "dark" ? "dark" : "light");

  /** The figure in the colours of the theme, and at the width of the screen. */
  function dressed(figure, narrow) {
    const c = colours[theme()];
    const made = structuredClone(figure);
    const layout = made.layout;
    Object.assign(layout, { paper_bgcolor: c.paper, plot_bgcolor: c.paper, colorway: c.line, height: figure.height,
      font: { color: c.ink, size: narrow ? 11 : 13, family: "system-ui, sans-serif" }, dragmode: narrow ? false : "zoom",
      hoverlabel: { bgcolor: c.paper, bordercolor: c.ink, font: { color: c.ink }, align: "left" } });
    for (const axis of [layout.xaxis, layout.yaxis]) {
      Object.assign(axis, { gridcolor: c.grid, linecolor: c.grid, zerolinecolor: c.grid });
    }
    for (const trace of made.data) {
      if (trace.type === "heatmap" && narrow) { trace.colorbar.title = { text: "" }; trace.colorbar.thickness = 8; }
      if (trace.mode === "markers+text" || trace.mode === "lines") {
        trace.marker = { ...trace.marker, color: c.line[0] };
        trace.line = { ...trace.line, color: c.line[0] };
      }
      if (trace.customdata && trace.mode && narrow) {
        trace.customdata = trace.customdata.map((text) => text.replaceAll(", ", "<br>"));
      }
    }
    return made;
  }

  function draw(key) {
    const plot = plots.get(key);
    const figure = plot.figures[plot.select ? plot.select.value : Object.keys(plot.figures)[0]];
    const made = dressed(figure, plot.element.clientWidth < 600);
    Plotly.react(plot.element, made.data, made.layout, config);
  }

  function setTheme(name) {
    root.dataset.theme = name;
    document.getElementById("theme").textContent = name === "dark" ? "light" : "dark";
    for (const key of plots.keys()) draw(key);
  }

  for (const element of document.querySelectorAll(".plot")) {
    const key = element.id.slice("plot-".length);
    const select = document.querySelector(`select[data-plot="${key}"]`);
    plots.set(key, { element, select, figures: JSON.parse(document.getElementById(`data-${key}`).textContent) });
    if (select) select.addEventListener("change", () => draw(key));
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
  setTheme(dark.matches ? "dark" : "light");
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; for (const key of plots.keys()) draw(key); }
  });

  /** Sort keys: numbers where a cell has them, empty cells last in either direction. */
  function sortTable(table, column, direction) {
    const value = (row) => {
      const cell = row.cells[column];
      if (cell.dataset.sort === undefined) return cell.textContent;
      return cell.dataset.sort === "" ? null : Number(cell.dataset.sort);
    };
    const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
      return direction * order;
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sortTable(table, column, down ? -1 : 1);
    }));
  }
  for (const input of document.querySelectorAll("input[data-table]")) {
    const key = input.dataset.table;
    const rows = [...document.getElementById(`table-${key}`).tBodies[0].rows];
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        if (!row.hidden) shown += 1;
      }
      document.getElementById(`count-${key}`).textContent = `${shown} of ${rows.length} rows`;
    });
  }
})();
