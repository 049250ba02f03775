"use strict";
// Draws a layer's dataflow: one box per point, coloured by its verdict, one edge per value that it is made from. reports/flow.py lays it out.
function drawFlow(flow, inks, words, go) {
  const place = document.getElementById("flow"), choice = document.getElementById("flow-layer");
  if (!place || !flow.layers.length) return;
  const [W, H, GAP, ROW, SIDE] = [116, 36, 18, 66, 40], NS = "http://www.w3.org/2000/svg";
  const make = (name, facts, ...inside) => {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(facts)) made.setAttribute(key, value);
    made.append(...inside);
    return made;
  };
  const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  function draw(number) {
    const { label, nodes, edges } = flow.layers[number];
    const low = Math.min(...nodes.map((n) => n.column)), high = Math.max(...nodes.map((n) => n.column));
    const width = (high - low + 1) * (W + GAP) + GAP + 2 * SIDE, height = (Math.max(...nodes.map((n) => n.row)) + 1) * ROW + 8;
    const x = (n) => (n.column - low) * (W + GAP) + GAP + SIDE, y = (n) => n.row * ROW + 12;
    const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Dataflow of ${label}` });
    // How far an edge has to swing out to pass what stands between its ends, on the side that takes less.
    const around = (a, b, middle) => {
      const between = nodes.filter((n) => n.row > a.row && n.row < b.row);
      const right = Math.max(0, ...between.map((n) => x(n) + W + 8 - middle)), left = Math.max(0, ...between.map((n) => middle - x(n) + 8));
      const hit = between.some((n) => Math.abs(x(n) + W / 2 - middle) < W / 2 + 4);
      return hit ? (right < left ? right : -left) / 0.75 : 0; // a cubic curve reaches three quarters of its control points
    };
    for (const [from, to] of edges) {
      const [a, b] = [nodes[from], nodes[to]];
      const [x1, y1, x2, y2] = [x(a) + W / 2, y(a) + H, x(b) + W / 2, y(b)];
      const bend = b.row - a.row > 1 ? around(a, b, (x1 + x2) / 2) : 0;
      svg.append(make("path", {
        d: `M${x1},${y1} C${x1 + bend},${y1 + 24} ${x2 + bend},${y2 - 24} ${x2},${y2}`,
        fill: "none", stroke: "currentColor", "stroke-opacity": 0.35,
      }));
    }
    for (const node of nodes) {
      const known = node.point !== null, ink = inks[node.status] || "currentColor";
      const told = known ? words[node.status] || node.status : "not recorded on both sides";
      const box = make("g", { transform: `translate(${x(node)},${y(node)})`, class: known ? "node known" : "node", "data-point": node.name },
        make("title", {}, `${node.name} · ${node.op} · ${told}`),
        make("rect", { width: W, height: H, rx: 5, fill: known ? ink : "none", "fill-opacity": 0.16, stroke: known ? ink : "currentColor",
          "stroke-width": known && node.status !== "agrees" ? 3 : 1.5, "stroke-dasharray": known ? "none" : "4 3", "stroke-opacity": known ? 1 : 0.5 }),
        make("text", { x: W / 2, y: 15, "text-anchor": "middle", fill: "currentColor", "font-weight": 600 }, short(node.label, 17)),
        make("text", { x: W / 2, y: 29, "text-anchor": "middle", fill: "currentColor", "fill-opacity": 0.75, "font-size": 10.5 }, short(node.op, 19)));
      if (known) {
        for (const [key, value] of [["tabindex", 0], ["role", "button"], ["aria-label", `${node.name}: ${told}, show its figures`]]) box.setAttribute(key, value);
        box.addEventListener("click", () => go(node.point));
        box.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          go(node.point);
        });
      }
      svg.append(box);
    }
    place.replaceChildren(svg);
  }
  choice.replaceChildren(...flow.layers.map((layer, number) => new Option(layer.label, number, false, number === flow.first)));
  choice.addEventListener("change", () => draw(+choice.value));
  draw(flow.first);
}
