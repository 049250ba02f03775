"use strict";
// Draws the margins of a ledger. All figures are in the document; reports/history_html.py says what they are.
(() => {
  const parts = JSON.parse(document.getElementById("figures").textContent);
  function draw() {
    for (const place of document.querySelectorAll(".margins")) {
      const part = parts[Number(place.dataset.part)];
      const known = part.of_limit.flatMap((row, p) => row.map((y, i) => ({ i, y, point: part.points[p] })).filter((d) => d.y !== null));
      const least = Math.min(d3.min(known, (d) => d.y || undefined) || 1e-6, 1e-4) / 2;
      const y = (d) => d.y || least;
      place.replaceChildren(picture(Plot.plot({
        width: place.clientWidth, height: 320, marginLeft: 56,
        x: { label: "check", domain: [-0.5, part.times.length - 0.5], tickFormat: (i) => (Number.isInteger(i) ? `${i + 1}` : "") },
        y: { type: "log", label: "error ÷ limit", tickFormat: decade, ticks: 6, grid: true },
        color: { legend: part.points.length <= 12, scheme: part.points.length <= 10 ? "Observable10" : "Turbo", type: "categorical", domain: part.points },
        marks: [
          Plot.ruleY([1], { stroke: "currentColor", strokeDasharray: "4 3" }),
          Plot.line(known, { x: "i", y, stroke: "point", z: "point", strokeWidth: 1.5 }),
          part.times.length <= 60 ? Plot.dot(known, { x: "i", y, fill: "point", z: "point", r: 3 }) : null,
          Plot.tip(known, Plot.pointer({ x: "i", y, z: null, title: (d) => `${d.point}\n${decade(d.y)} of its limit\n${part.times[d.i]} ${part.commits[d.i]}`, fill: "var(--paper)" })),
        ],
      }), `Margins of ${part.label}`));
    }
  }
  draw();
  onNewWidth(draw);
})();
