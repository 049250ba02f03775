"use strict";
// What the report's and the history's pictures share.
const decade = (x) => d3.format(".0e")(x).replace("+", "");
// A picture is one image to a screen reader, named by its label; its figures stand in a table beside it.
function picture(plot, label) {
  const plots = plot.tagName === "svg" ? [plot] : [...plot.querySelectorAll("svg")];
  for (const svg of plots) {
    for (const part of svg.querySelectorAll("[aria-label], [aria-description]")) {
      part.removeAttribute("aria-label");
      part.removeAttribute("aria-description");
    }
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", label);
  }
  return plot;
}
// Pictures are drawn for a width: again where the window gets another one.
function onNewWidth(draw) {
  let drawn = document.body.clientWidth;
  addEventListener("resize", () => requestAnimationFrame(() => {
    if (document.body.clientWidth === drawn) return;
    drawn = document.body.clientWidth;
    draw();
  }));
}
