// What the pages share: elements, and numbers as text.
const SVG = document.querySelector("svg").namespaceURI;
// Text goes in as text only: children that are strings become text nodes.
function el(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) e.setAttribute(key, value);
  }
  e.append(...children.filter(c => c !== null && c !== undefined));
  return e;
}
function shape(d, name) {
  const e = document.createElementNS(SVG, "path");
  e.setAttribute("d", d);
  if (name) e.setAttribute("class", name);
  return e;
}
const $ = id => document.getElementById(id);
const known = x => x !== null && x !== undefined;
const whole = x => known(x) ? x.toLocaleString("en-US") : "";
const small = x => !known(x) ? "" : x === 0 ? "0" : Math.abs(x) >= 1e-3 ? x.toPrecision(3) : x.toExponential(1);
const share = x => known(x) ? x.toFixed(3) : "";
function bytes(x) {
  if (!known(x)) return "";
  const unit = x < 1e3 ? 0 : x < 1e6 ? 1 : x < 1e9 ? 2 : 3;
  return `${unit ? (x / 1000 ** unit).toFixed(x / 1000 ** unit < 100 ? 1 : 0) : x} ${["B", "kB", "MB", "GB"][unit]}`;
}
const change = (before, after, show) => before === after || !known(before) ? show(after) : `${show(before)} → ${show(after)}`;
function asText(value) {
  if (value === null) return "none";
  if (Array.isArray(value)) return value.map(asText).join(", ") || "none";
  if (typeof value === "object") return Object.entries(value).map(([k, v]) => `${k} ${asText(v)}`).join(", ") || "none";
  return String(value);
}
function order2(a, b) {
  if (!known(a) || !known(b)) return Number(known(a)) - Number(known(b));
  return typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
}
