"use strict";
// Draws the report's pictures with Observable Plot. All figures are in the document; reports/charts.py says what they are.
(() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const { grid, mark, points, spreads } = data;
  const UNKNOWN = 0, ZERO = 1, INFINITE = 65535;
  const rows = grid.points.length, columns = grid.positions.length;

  const read = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const { first, steps, decades } = data.code;
    return Float64Array.from({ length: bytes.length / 2 }, (_, i) => {
      const code = view.getUint16(2 * i, true);
      if (code === UNKNOWN) return NaN;
      if (code === ZERO) return 0;
      return code === INFINITE ? Infinity : 10 ** ((code - first) / steps - decades);
    });
  };
  const nmse = read(grid.nmse), maxAbs = read(grid.max_abs);
  const ofLimit = nmse.map((x, i) => (x === 0 ? 0 : x / grid.limits[Math.floor(i / columns)]));
  for (const [i, value] of grid.of_limit) ofLimit[i] = value === null ? Infinity : value;

  const power = (x) => (x === 0 ? "0" : x === Infinity ? "∞" : Number.isNaN(x) ? "unknown" : x.toExponential(1));
  const proportion = (x) =>
    !(x > 0) ? "0" : x === Infinity ? "∞" : x <= 1 ? `${(100 * x).toPrecision(2)} %` : `${x < 1e6 ? Math.round(x * 10) / 10 : power(x)} ×`;
  const where = (c) => `position ${grid.positions[c]} ${grid.tokens[c]}`.trim() + (grid.sequences ? ` of sequence ${grid.sequences[c]}` : "");
  const width = (id) => document.getElementById(id).clientWidth;
  const show = (id, plot, label) => document.getElementById(id).replaceChildren(picture(plot, label));

  // ---- the two distributions
  function drawSpreads() {
    if (!spreads.length) return;
    const ticks = spreads.flatMap((s) => s.values.map((x) => ({ side: s.side, x })));
    const known = spreads.filter((s) => s.low !== null && s.high !== null);
    const around = spreads.filter((s) => s.deviation !== null).map((s) => ({ side: s.side, x1: s.mean - s.deviation, x2: s.mean + s.deviation, mean: s.mean }));
    show("spreads", Plot.plot({
      width: width("spreads"), height: 66 + 32 * spreads.length, marginLeft: 70, marginTop: 10, marginBottom: 38,
      x: { label: "value", nice: true }, y: { type: "band", label: null, domain: spreads.map((s) => s.side) },
      marks: [
        Plot.ruleY(known, { y: "side", x1: "low", x2: "high", stroke: "currentColor", strokeOpacity: 0.5 }),
        Plot.barX(around, { y: "side", x1: "x1", x2: "x2", fill: "steelblue", fillOpacity: 0.3, insetTop: 8, insetBottom: 8 }),
        Plot.tickX(ticks, { x: "x", y: "side", stroke: "currentColor", insetTop: 4, insetBottom: 4 }),
        Plot.tickX(around, { x: "mean", y: "side", stroke: "steelblue", strokeWidth: 3 }),
      ],
    }), "Distribution of the row's values, side by side");
  }

  // ---- the heat map
  const inks = { agrees: "#3a78b5", fresh: "#d62718", inherited: "#e07b1f", grown: "#a98600", "recorded otherwise": "#7a7a7a", "cannot be judged": "#7a7a7a" };
  const extent = d3.extent(ofLimit.filter((x) => x > 0 && x < Infinity));
  const reach = Math.max(10, extent[1] || 0, 1 / (extent[0] || 1)); // decades to both sides of the limit
  const span = Math.min(reach, 1e12);
  const colour = { type: "diverging-log", pivot: 1, domain: [1 / span, span], scheme: "BuRd", reverse: false, clamp: true, label: "error ÷ limit", tickFormat: decade };
  const smallest = Math.max(extent[0] || 1e-3, 1 / span); // no error at all is drawn as the smallest there is
  // What was recorded otherwise, or what no limit can judge, is neither blue nor red.
  const otherwise = (row) => ["recorded otherwise", "cannot be judged"].includes(points[row].status);
  const cells = ofLimit.map((x, i) => (Number.isNaN(x) || otherwise(Math.floor(i / columns)) ? NaN : Math.min(Math.max(x, smallest), span)));
  const named = rows <= 40;
  let map = null, at = mark || [0, 0];

  function drawMap() {
    if (!rows) return;
    const total = width("map");
    const left = named ? Math.min(130, total * 0.34) : 88;
    const unit = named ? 18 : Math.max(1.5, Math.min(6, 700 / rows));
    const ticks = named ? d3.range(rows).map((r) => [r, grid.points[r]]) : spread(grid.layers, unit);
    const plot = Plot.plot({
      width: total, height: Math.round(rows * unit) + 50, marginLeft: left, marginTop: 8, marginRight: 12, marginBottom: 42,
      color: colour,
      x: { domain: [0, columns], label: "position", ticks: [], labelAnchor: "center" },
      y: { domain: [rows, 0], label: null, ticks: [] },
      marks: [
        Plot.raster(cells, { width: columns, height: rows, imageRendering: "pixelated" }),
        Plot.rect(d3.range(rows).filter(otherwise), { x1: 0, x2: columns, y1: (r) => r, y2: (r) => r + 1, fill: inks["recorded otherwise"], inset: 0, className: "otherwise" }),
        Plot.axisY(ticks.map(([r]) => r + 0.5), { text: ticks.map(([, name]) => name), tickSize: 3, label: null, textOverflow: "ellipsis", lineWidth: left / 12 }),
        Plot.axisX(places(total - left).map((c) => c + 0.5), { text: places(total - left).map((c) => `${grid.positions[c]}`), tickSize: 3, label: "position", labelAnchor: "center" }),
        Plot.frame({ strokeOpacity: 0.3 }),
      ],
    });
    show("map", plot, "Errors of all records, points by positions");
    show("legend", Plot.legend({ color: { ...colour, ticks: 5 }, width: Math.min(320, total), marginLeft: 20, marginRight: 20 }), "Colours: error divided by its limit");
    const svg = plot.tagName === "svg" ? plot : plot.querySelector("svg");
    map = { svg, x: plot.scale("x").apply, y: plot.scale("y").apply };
    if (mark) box("first-divergence", mark, "var(--mark)").setAttribute("data-place", `${grid.points[mark[0]]}@${grid.positions[mark[1]]}`);
  }
  // As many of the layers' names as have room.
  function spread(layers, unit) {
    let last = -Infinity;
    return layers.filter(([row]) => { const fits = (row - last) * unit >= 13; if (fits) last = row; return fits; });
  }
  function places(room) {
    const each = Math.max(1, Math.ceil((columns * 34) / room));
    const round = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((n) => n >= each) || each;
    return d3.range(0, columns, round);
  }
  function box(id, [r, c], stroke) {
    map.svg.querySelector(`#${id}`)?.remove();
    const [x1, x2, y1, y2] = [map.x(c), map.x(c + 1), map.y(r), map.y(r + 1)];
    const [w, h] = [Math.max(x2 - x1, 9), Math.max(y2 - y1, 9)]; // a cell may be smaller than a pixel: the frame is not
    const outline = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const shape = { id, x: (x1 + x2 - w) / 2, y: (y1 + y2 - h) / 2, width: w, height: h, fill: "none", stroke, "stroke-width": 2.5, rx: 2 };
    for (const [name, value] of Object.entries(shape)) outline.setAttribute(name, value);
    map.svg.append(outline);
    return outline;
  }
  function tell([r, c]) {
    at = [r, c];
    box("here", at, "currentColor");
    const i = r * columns + c;
    const figures = Number.isNaN(nmse[i]) ? "not compared" : otherwise(r) ? `NMSE ${power(nmse[i])} · ${points[r].status}` : `NMSE ${power(nmse[i])} · ${proportion(ofLimit[i])} of the limit ${decade(grid.limits[r])} · largest |Δ| ${power(maxAbs[i])}`;
    const first = mark && mark[0] === r && mark[1] === c ? " · first divergence" : "";
    document.getElementById("readout").textContent = `${grid.points[r]}, ${where(c)}: ${figures}${first}`;
  }
  function move(rowsBy, columnsBy) {
    tell([Math.min(Math.max(at[0] + rowsBy, 0), rows - 1), Math.min(Math.max(at[1] + columnsBy, 0), columns - 1)]);
  }
  function nextLayer(by) {
    const starts = grid.layers.map(([row]) => row);
    const wanted = by > 0 ? starts.find((row) => row > at[0]) : starts.findLast((row) => row < at[0]);
    if (wanted !== undefined) tell([wanted, at[1]]);
  }
  function listen() {
    const place = document.getElementById("map");
    if (!place) return;
    place.addEventListener("pointermove", (event) => {
      const frame = map.svg.getBoundingClientRect();
      const scale = map.svg.viewBox.baseVal.width / frame.width; // a printed or narrow picture is scaled
      const c = Math.floor(((event.clientX - frame.left) * scale - map.x(0)) / (map.x(1) - map.x(0)));
      const r = Math.floor(((event.clientY - frame.top) * scale - map.y(0)) / (map.y(1) - map.y(0)));
      if (r >= 0 && r < rows && c >= 0 && c < columns && (r !== at[0] || c !== at[1] || !map.svg.querySelector("#here"))) tell([r, c]);
    });
    const keys = {
      ArrowUp: () => move(-1, 0), ArrowDown: () => move(1, 0), ArrowLeft: () => move(0, -1), ArrowRight: () => move(0, 1),
      Home: () => move(0, -columns), End: () => move(0, columns), PageUp: () => nextLayer(-1), PageDown: () => nextLayer(1),
    };
    place.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    document.getElementById("to-mark")?.addEventListener("click", () => { tell(mark); place.focus(); });
  }

  // ---- the error along the model
  const known = points.map((p, i) => ({ ...p, i, name: grid.points[i] })).filter((p) => p.nmse !== null);
  const least = d3.min(known.flatMap((p) => [p.nmse, ...(p.truth || [])]), (x) => x || undefined) || 1e-16;
  const words = { fresh: "jumps", grown: "grown slowly" };
  const symbols = { agrees: "circle", fresh: "star", inherited: "triangle", grown: "square", "recorded otherwise": "diamond", "cannot be judged": "cross" };
  function drawAlong() {
    if (!known.length) return;
    const statuses = Object.keys(symbols).filter((status) => known.some((p) => p.status === status));
    const column = (width("along") - 72) / rows; // names stand aslant: one needs the height of its letters, numbers of layers more
    const ticks = named ? spread(known.map((p) => [p.i, p.name]), column) : spread(grid.layers, column / 3.4);
    const steps = points.map((p, i) => ({ i, limit: p.limit || null }));
    const truth = ["ours – float64", "reference – float64"].map((name, side) => ({
      name, ink: ["#2b8a3e", "#7048b6"][side],
      at: points.flatMap((p, i) => (p.truth && p.truth[side] !== null ? [{ i, far: p.truth[side] || least / 10 }] : [])),
    })).filter((s) => s.at.length);
    show("along", Plot.plot({
      width: width("along"), height: 320, marginLeft: 56, marginRight: 16, marginBottom: 80,
      x: { domain: [-0.5, rows - 0.5], label: null, ticks: [] },
      y: { type: "log", label: "NMSE", tickFormat: decade, ticks: 6, grid: true },
      color: { domain: statuses, range: statuses.map((s) => inks[s]), legend: false },
      symbol: { domain: statuses, range: statuses.map((s) => symbols[s]), legend: true, tickFormat: (s) => words[s] || s },
      marks: [
        Plot.axisX(ticks.map(([i]) => i), { text: ticks.map(([, name]) => name), tickRotate: -40, tickSize: 3, label: null }),
        Plot.line(steps, { x: "i", y: "limit", curve: "step", stroke: "currentColor", strokeDasharray: "4 3" }),
        Plot.text(steps.slice(0, 1), { x: "i", y: "limit", text: () => "limit", dy: -8, textAnchor: "start" }),
        ...truth.flatMap((s) => [
          Plot.line(s.at, { x: "i", y: "far", stroke: s.ink, strokeWidth: 1.5 }),
          Plot.dot(s.at, { x: "i", y: "far", stroke: s.ink, r: 2 }),
        ]),
        Plot.line(known, { x: "i", y: (p) => p.nmse || least / 10, stroke: "currentColor", strokeOpacity: 0.25 }),
        Plot.dot(known, { x: "i", y: (p) => p.nmse || least / 10, fill: "status", stroke: "status", symbol: "status", r: rows > 100 ? 2.5 : 4.5 }),
        ...truth.map((s) =>
          Plot.text(s.at.slice(-1), { x: "i", y: "far", text: () => s.name, fill: s.ink, stroke: "var(--paper)", strokeWidth: 4, dx: -6, dy: s === truth[1] ? 14 : -8, textAnchor: "end" })),
        Plot.tip(known, Plot.pointerX({ x: "i", y: (p) => p.nmse || least / 10, title: (p) => `${p.name}\nNMSE ${power(p.nmse)} at position ${p.token_idx}\n${words[p.status] || p.status}${p.truth ? `\nfrom float64: ours ${power(p.truth[0] ?? NaN)}, reference ${power(p.truth[1] ?? NaN)}` : ""}`, fill: "var(--paper)" })),
      ],
    }), "Worst NMSE of each point against its limit");
  }

  function draw() { drawSpreads(); drawMap(); drawAlong(); }
  draw();
  // A point of the graph leads to its figures: its worst record in the map, and its row in the table.
  drawFlow(data.flow, inks, words, (row) => {
    const worst = d3.maxIndex(d3.range(columns), (c) => ofLimit[row * columns + c]);
    tell([row, Math.max(worst, 0)]);
    document.getElementById("map").focus();
    document.getElementById("map-title").scrollIntoView();
    document.querySelectorAll(".points tbody tr").forEach((tr, i) => tr.classList.toggle("chosen", i === row));
    document.querySelectorAll(".points tbody tr")[row]?.scrollIntoView({ block: "nearest" });
  });
  listen();
  onNewWidth(draw);
})();
