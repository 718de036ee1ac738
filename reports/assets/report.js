"use strict";
// Draws the page from the JSON in #data. Text reaches the page as text nodes and attributes only, never as markup.

window.addEventListener("error", (event) => { document.documentElement.dataset.error = String(event.message); });
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const ZERO = 1e-4; // a coefficient below it is shown as inactive

// ---------------------------------------------------------------- elements

function put(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);

let serial = 0;
function card(title, note, ...children) {
  const id = `c${++serial}`;
  return el("section", { class: "card", "aria-labelledby": id }, el("h3", { id }, title), note && el("p", { class: "note" }, note), ...children);
}
function section(title, note) {
  return [el("h2", {}, title), note && el("p", { class: "note" }, note)];
}

// ---------------------------------------------------------------- numbers

const known = (x) => typeof x === "number" && Number.isFinite(x);
const minus = (text) => text.replace("-", "−");
function fmt(x, digits = 4) {
  if (!known(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (Number.isInteger(x) && size < 1e7) return minus(x.toLocaleString("en-US").replaceAll(",", " "));
  if (size < 1e-3 || size >= 1e7) {
    const [head, tail] = x.toExponential(digits - 2).split("e");
    return minus(head) + "e" + minus(tail.replace("+", ""));
  }
  if (size >= 10 ** digits) return minus(Math.round(x).toLocaleString("en-US").replaceAll(",", " "));
  return minus(String(Number(x.toPrecision(digits))));
}
const percent = (x) => `${known(x) ? (100 * x >= 9.95 || x === 0 ? (100 * x).toFixed(0) : (100 * x).toFixed(1)) : "–"} %`;
function bytes(x) {
  if (!known(x)) return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (x < 1000) return `${unit === "B" ? x.toFixed(0) : x.toFixed(1)} ${unit}`;
    x /= 1000;
  }
  return `${x.toFixed(1)} TB`;
}
const seconds = (x) => (!known(x) ? "–" : x < 120 ? `${fmt(x, 3)} s` : x < 7200 ? `${(x / 60).toFixed(1)} min` : `${(x / 3600).toFixed(1)} h`);
const shorten = (name, length) => {
  if (name.length <= length) return name;
  const head = Math.ceil((length - 1) / 2);
  return `${name.slice(0, head)}…${name.slice(name.length - (length - 1 - head))}`;
};
const words = (text) => String(text).replaceAll("_", " ");
const plural = (count, word) => `${fmt(count)} ${word}${count === 1 ? "" : "s"}`;

const pen = document.createElement("canvas").getContext("2d");
pen.font = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const textWidth = (texts) => texts.reduce((most, text) => Math.max(most, pen.measureText(text).width), 0);

function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}
function logTicks(low, high) {
  const found = [];
  const spans = Math.log10(high / low);
  const heads = spans < 1.2 ? [1, 2, 3, 5, 7] : spans < 2.5 ? [1, 3] : [1];
  const stride = Math.max(1, Math.round(spans / 7));
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    if (heads.length === 1 && e % stride) continue;
    for (const head of heads) {
      const value = Number(`${head}e${e}`);
      if (value >= low * 0.9999 && value <= high * 1.0001) found.push(value);
    }
  }
  return found;
}

// ---------------------------------------------------------------- colours

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const expertColour = (name) => (name === "base" || name === "start" ? "var(--faint)" : `var(--e${INDEX.get(name)}, var(--hatch))`);
const INDEX = new Map(DATA.names.map((name, k) => [name, k]));
const seriesColour = (k) => `var(--s${k % DATA.series})`;
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

const mix = (a, b, t) => a.map((v, k) => Math.round(v + (b[k] - v) * t));
const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
const RAMPS = {
  light: { up: ["#f3f2ee", "#d6d1ea", "#958ac9", "#4b3a9b", "#211a55"], down: ["#f3f2ee", "#f0d3c4", "#dd9277", "#b5533c", "#6d2415"] },
  dark: { up: ["#22262d", "#3a3569", "#6556b3", "#9c8ee6", "#ece8ff"], down: ["#22262d", "#57332a", "#9a5240", "#dd8469", "#ffe3d8"] },
};
function ramp(x) { // −1 … 1
  const stops = RAMPS[dark.matches ? "dark" : "light"][x < 0 ? "down" : "up"];
  const place = Math.min(1, Math.abs(x)) * (stops.length - 1);
  const k = Math.min(stops.length - 2, Math.floor(place));
  return `rgb(${mix(rgb(stops[k]), rgb(stops[k + 1]), place - k).join(",")})`;
}

// ---------------------------------------------------------------- tooltip

const tip = document.getElementById("tip");
function showTip(event, title, rows) {
  tip.replaceChildren(
    el("b", {}, title),
    ...rows.map(([colour, name, value]) => el("div", {}, colour && el("i", { class: "swatch", style: { background: colour } }), el("span", {}, name), el("em", {}, value))),
  );
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  let x = event.clientX + 14, y = event.clientY + 14;
  if (x + box.width > innerWidth - 6) x = event.clientX - box.width - 14;
  if (y + box.height > innerHeight - 6) y = event.clientY - box.height - 14;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${Math.max(4, y)}px`;
}
const hideTip = () => { tip.hidden = true; };

// ---------------------------------------------------------------- drawing that follows the width

const drawings = new Set();
function drawn(host, draw) {
  const entry = { host, draw, width: 0 };
  const update = (force) => {
    const width = Math.floor(host.clientWidth);
    if (!width || (!force && width === entry.width)) return;
    entry.width = width;
    draw(width);
  };
  entry.update = update;
  drawings.add(entry);
  new ResizeObserver(() => requestAnimationFrame(() => update(false))).observe(host);
  return entry;
}
function redraw() {
  for (const entry of drawings) {
    if (!entry.host.isConnected) drawings.delete(entry);
    else entry.update(true);
  }
}
function reframe() { // only what depends on the slider
  for (const entry of drawings) if (entry.frame && entry.host.isConnected) entry.frame();
}
dark.addEventListener("change", redraw);

// ---------------------------------------------------------------- tables

function dataTable(head, rows, caption) {
  const numeric = head.map((_, k) => rows.some((row) => typeof row[k] === "number"));
  const cell = (value) => (typeof value === "number" || value === null ? fmt(value, 6) : value);
  return el("table", {},
    caption && el("caption", {}, caption),
    el("thead", {}, el("tr", {}, head.map((name, k) => el("th", { scope: "col", class: numeric[k] && "n" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, k) => el(k ? "td" : "th", { class: numeric[k] && "n", scope: k ? null : "row" }, cell(value)))))));
}
const pairsTable = (rows) => el("table", { class: "pairs" }, el("tbody", {}, rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))));
const ROWS = 300;
function details(head, make) {
  const node = el("details", {}, el("summary", {}, "Data"));
  node.addEventListener("toggle", () => {
    if (!node.open || node.children.length > 1) return;
    let rows = make();
    const all = rows.length;
    if (all > ROWS) rows = rows.filter((_, k) => k % Math.ceil(all / ROWS) === 0 || k === all - 1);
    if (all > rows.length) node.append(el("p", { class: "note" }, `${rows.length} of ${all} rows.`));
    node.append(el("div", { class: "scroll" }, dataTable(head, rows)));
  });
  return node;
}
const seriesDetails = (name, series) =>
  details([name, ...series.map((s) => s.name)], () => series[0].xs.map((x, k) => [x, ...series.map((s) => (s.value ? s.value[k] : s.ys[k]) ?? null)]));

// ---------------------------------------------------------------- lines and stacked areas

// series: {name, colour, xs, ys, width, dash, marks: bool, shapes: [text], low: [] (an area from low to ys), value: []}
// spec: {label, height, log, x, whole, series() -> [...], names: bool, range: [low, high], zero: bool, rows: number, title(x)}
function chart(spec) {
  const host = el("div", { class: "plot" });
  const entry = drawn(host, (width) => {
    entry.frame = null;
    const all = spec.series();
    const flat = (key) => all.flatMap((s) => (s[key] || []).filter(known));
    const xs = flat("xs");
    let values = [...flat("ys"), ...flat("low")].filter((v) => !spec.log || v > 0);
    if (!xs.length || !values.length) {
      host.replaceChildren(el("p", { class: "empty" }, spec.nothing || "nothing was recorded"));
      return;
    }
    const least = (list) => list.reduce((a, b) => Math.min(a, b), Infinity), most = (list) => list.reduce((a, b) => Math.max(a, b), -Infinity);
    let x0 = least(xs), x1 = most(xs);
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    let [y0, y1] = spec.range || [least(values), most(values)];
    if (spec.zero) { y0 = Math.min(0, y0); y1 = Math.max(0, y1); }
    if (spec.log) { y0 /= 1.15; y1 *= 1.15; } else if (!spec.range) {
      const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
      if (!(spec.zero && y0 === 0)) y0 -= room;
      if (!(spec.zero && y1 === 0)) y1 += room;
    }
    const narrow = width < 520, height = spec.height || 250;
    const marksY = spec.log ? logTicks(y0, y1) : ticks(y0, y1, height / 44);
    const labels = marksY.map((v) => fmt(v, 3));
    const left = 12 + textWidth([...labels, "00"]);
    const named = spec.names && !narrow ? all.filter((s) => s.named !== false) : [];
    const right = named.length ? 22 + textWidth(named.map((s) => shorten(s.name, 20))) : 14;
    const top = 8, bottom = 34;
    const X = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
    const Y = spec.log
      ? (v) => top + (Math.log(y1 / v) / Math.log(y1 / y0)) * (height - top - bottom)
      : (v) => top + ((y1 - v) / (y1 - y0)) * (height - top - bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.label });
    for (const [k, v] of marksY.entries()) {
      root.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: Y(v), y2: Y(v) }), svg("text", { class: "axis", x: left - 7, y: Y(v) + 4, "text-anchor": "end" }, labels[k]));
    }
    let marksX = ticks(x0, x1, (width - left - right) / 75);
    if (spec.whole) marksX = marksX.filter(Number.isInteger);
    for (const v of marksX) root.append(svg("text", { class: "axis", x: X(v), y: height - bottom + 16, "text-anchor": "middle" }, fmt(v, 3)));
    root.append(svg("text", { class: "axis", x: width - right, y: height - 4, "text-anchor": "end" }, spec.x || "iteration"));
    const plot = svg("g", {});
    root.append(plot);
    if (spec.hatch) plot.append(...spec.hatch(X, Y));
    for (const s of all) {
      if (s.low) plot.append(svg("path", { d: band(s, X, Y), style: { fill: s.colour, stroke: "var(--card)", strokeWidth: s.seam ?? 0.6 } }));
      else plot.append(svg("path", { d: line(s, X, Y, spec.log), fill: "none", "stroke-dasharray": s.dash, "stroke-linejoin": "round", "stroke-linecap": "round", style: { stroke: s.colour, strokeWidth: s.width || 1.8, opacity: s.faint ? 0.55 : 1 } }));
      if (s.marks) s.xs.forEach((x, k) => known(s.ys[k]) && (!spec.log || s.ys[k] > 0) && plot.append(mark(s.shapes ? s.shapes[k] : "", X(x), Y(s.ys[k]), s.colour, s.xs.length > 150 ? 0.55 : 1)));
    }
    if (y0 < 0 && y1 > 0 && !spec.log) plot.append(svg("line", { class: "baseline", x1: left, x2: width - right, y1: Y(0), y2: Y(0) }));
    for (const [s, y] of placeNames(named, Y, [top, height - bottom])) {
      root.append(svg("rect", { x: width - right + 6, y: y - 3.5, width: 7, height: 7, rx: 2, style: { fill: s.colour } }), svg("text", { x: width - right + 17, y: y + 4 }, shorten(s.name, 20)));
    }
    if (spec.cursor) {
      const now = svg("line", { class: "cursor", y1: top, y2: height - bottom });
      root.append(now);
      entry.frame = () => {
        const at = spec.cursor();
        now.setAttribute("visibility", known(at) ? "visible" : "hidden");
        if (known(at)) { now.setAttribute("x1", r1(X(at))); now.setAttribute("x2", r1(X(at))); }
      };
      entry.frame();
    }
    const hover = svg("line", { class: "hover", y1: top, y2: height - bottom, visibility: "hidden" });
    root.append(hover);
    const inside = (event) => {
      const box = root.getBoundingClientRect();
      return x0 + ((((event.clientX - box.left) * width) / box.width - left) / (width - left - right)) * (x1 - x0);
    };
    root.addEventListener("pointermove", (event) => {
      const x = Math.min(x1, Math.max(x0, inside(event)));
      const rows = all.filter((s) => s.named !== false || !spec.names || s.low).map((s) => {
        const k = nearest(s.xs, x);
        return { s, x: s.xs[k], y: (s.value || s.ys)[k], shape: s.shapes && s.shapes[k] };
      }).filter((row) => known(row.y));
      if (!rows.length) return;
      const place = rows.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a)).x;
      hover.setAttribute("x1", X(place)); hover.setAttribute("x2", X(place)); hover.setAttribute("visibility", "visible");
      rows.sort((a, b) => Math.abs(b.y) - Math.abs(a.y));
      const shown = rows.filter((row) => !spec.nonzero || Math.abs(row.y) > ZERO).slice(0, spec.rows || 12);
      const rest = rows.length - shown.length;
      showTip(event, `${spec.x || "iteration"} ${fmt(place)}`, [
        ...shown.map(({ s, y, shape }) => [s.colour, s.name + (shape ? ` (${shape})` : ""), fmt(y)]),
        ...(rest > 0 ? [[null, spec.nonzero ? `${rest} more, smaller or 0` : `${rest} more`, ""]] : []),
      ]);
    });
    root.addEventListener("pointerleave", () => { hover.setAttribute("visibility", "hidden"); hideTip(); });
    if (spec.pick) root.addEventListener("click", (event) => spec.pick(inside(event)));
    host.replaceChildren(root);
  });
  return host;
}
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle; else high = middle; }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}
const r1 = (v) => Math.round(v * 10) / 10;
function line(s, X, Y, log) {
  let path = "", pen = false;
  s.xs.forEach((x, k) => {
    const y = s.ys[k];
    if (!known(y) || (log && y <= 0)) { pen = false; return; }
    path += `${pen ? "L" : "M"}${r1(X(x))} ${r1(Y(y))}`;
    pen = true;
  });
  return path;
}
function band(s, X, Y) {
  const single = s.xs.length === 1;
  const xs = single ? [s.xs[0] - 0.5, s.xs[0] + 0.5] : s.xs;
  const up = (k) => s.ys[single ? 0 : k], down = (k) => s.low[single ? 0 : k];
  return "M" + xs.map((x, k) => `${r1(X(x))} ${r1(Y(up(k)))}`).join("L") + "L" + xs.map((x, k) => `${r1(X(x))} ${r1(Y(down(k)))}`).reverse().join("L") + "Z";
}
function mark(shape, x, y, colour, scale) {
  const style = { fill: colour, stroke: "var(--card)", strokeWidth: scale < 1 ? 0 : 1 };
  const path = {
    away: "M-4 3.5L4 3.5L0 -4Z", pairwise: "M-3.4 -3.4H3.4V3.4H-3.4Z", drop: "M0 -4.8L4.8 0L0 4.8L-4.8 0Z", swap: "M0 -4.8L4.8 0L0 4.8L-4.8 0Z", corrective: "M-3.4 -3.4H3.4V3.4H-3.4Z", lazy: "M-4 -3.5L4 -3.5L0 4Z",
  }[shape];
  return path ? svg("path", { d: path, transform: `translate(${r1(x)} ${r1(y)}) scale(${scale})`, style }) : svg("circle", { cx: r1(x), cy: r1(y), r: 3.2 * scale, style });
}
function placeNames(series, Y, [top, bottom]) {
  const placed = series.map((s) => {
    const last = s.ys.findLastIndex(known);
    const at = last < 0 ? bottom : s.low ? (Y(s.ys[last]) + Y(s.low[last])) / 2 : Y(s.ys[last]);
    return [s, Math.min(bottom, Math.max(top, at))];
  }).sort((a, b) => a[1] - b[1]);
  for (let round = 0; round < 60; round++) {
    let moved = false;
    for (let k = 1; k < placed.length; k++) {
      const lack = 13.5 - (placed[k][1] - placed[k - 1][1]);
      if (lack > 0.01) { placed[k][1] += lack / 2; placed[k - 1][1] -= lack / 2; moved = true; }
    }
    if (placed.length) {
      const high = top - placed[0][1], low = placed.at(-1)[1] - bottom;
      if (high > 0) placed.forEach((p) => { p[1] += high; });
      else if (low > 0) placed.forEach((p) => { p[1] -= low; });
    }
    if (!moved) break;
  }
  return placed;
}

function legend(items, hidden, changed) {
  const list = el("ul", { class: "legend" });
  const buttons = items.map(({ name, colour, dash, label }) =>
    el("button", {
      type: "button", "aria-pressed": !hidden.has(name), title: name,
      onclick: (event) => {
        if (hidden.has(name)) hidden.delete(name); else hidden.add(name);
        event.currentTarget.setAttribute("aria-pressed", !hidden.has(name));
        changed();
      },
    }, el("i", dash === undefined ? { class: "swatch", style: { background: colour } } : { class: "dash", style: { borderColor: colour, borderTopStyle: dash ? "dashed" : "solid" } }), el("span", {}, label || name)));
  const setAll = (on) => {
    for (const { name } of items) if (on) hidden.delete(name); else hidden.add(name);
    buttons.forEach((button) => button.setAttribute("aria-pressed", on));
    changed();
  };
  list.append(...buttons.map((button) => el("li", {}, button)));
  if (items.length > 3) list.append(el("li", {}, el("button", { type: "button", class: "text", onclick: () => setAll(true) }, "all")), el("li", {}, el("button", { type: "button", class: "text", onclick: () => setAll(false) }, "none")));
  return list;
}

// ---------------------------------------------------------------- one run's data

function unpack(packed) { // Uint16, little endian, in base64; 65535 stands for null
  if (!packed) return null;
  const text = atob(packed.data), raw = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) raw[k] = text.charCodeAt(k);
  const view = new DataView(raw.buffer), out = new Float64Array(raw.length / 2);
  const scale = (packed.high - packed.low) / 65534;
  for (let k = 0; k < out.length; k++) {
    const level = view.getUint16(2 * k, true);
    out[k] = level === 65535 ? NaN : packed.low + level * scale;
  }
  return out;
}
class Frames {
  constructor(run) {
    this.run = run;
    this.at = run.frames.iterations;
    this.layers = run.frames.layers.length;
    this.experts = run.frames.experts.length;
    this.coefficients = unpack(run.frames.coefficients);
    this.scores = unpack(run.frames.scores);
    this.means = unpack(run.frames.means); // of more iterations than the frames, where those are thinned
    this.ranges = {};
  }
  get count() { return this.at.length; }
  value(kind, frame, layer, expert) { return this[kind][(frame * this.layers + layer) * this.experts + expert]; }
  places(layer) { return layer < 0 && this.means ? this.run.frames.mean_iterations : this.at; }
  series(expert, layer) { // over its places; layer −1: mean
    if (layer < 0 && this.means) return this.places(layer).map((_, k) => this.means[k * this.experts + expert]);
    return this.at.map((_, f) => (layer >= 0 ? this.value("coefficients", f, layer, expert) : this.mean("coefficients", f, expert)));
  }
  mean(kind, frame, expert) {
    let sum = 0;
    for (let l = 0; l < this.layers; l++) sum += this.value(kind, frame, l, expert);
    return sum / this.layers;
  }
  range(kind) { // [least, largest], with 0 between them
    if (!this.ranges[kind]) this.ranges[kind] = this[kind].reduce(([low, high], v) => (known(v) ? [Math.min(low, v), Math.max(high, v)] : [low, high]), [0, 0]);
    return this.ranges[kind];
  }
  bound(kind) { return Math.max(...this.range(kind).map(Math.abs)) || 1; }
  negative(kind) { return this.range(kind)[0] < -1e-6; }
  order(frame) { // experts by |mean| at a frame, heaviest first
    return [...Array(this.experts).keys()].sort((a, b) => Math.abs(this.mean("coefficients", frame, b)) - Math.abs(this.mean("coefficients", frame, a)));
  }
  chosen(frame, layer) { // expert of the smallest score in a layer, −1: the base
    if (!this.scores) return null;
    let best = this.run.has_base ? -1 : null, least = this.run.has_base ? 0 : Infinity;
    for (let e = 0; e < this.experts; e++) {
      const s = this.value("scores", frame, layer, e);
      if (s < least) { least = s; best = e; }
    }
    return best;
  }
}

// ---------------------------------------------------------------- sections of a run

const state = { run: 0, frame: 0, layer: -1, kind: "coefficients", hidden: new Set() };
let frames = null, stop = () => {};

function overview(run) {
  const c = run.cost, first = run.trace.value.find(known);
  const tile = (name, value, small) => el("div", { class: "tile" }, el("dt", {}, name), el("dd", {}, value, small && el("small", {}, small)));
  const change = known(first) && known(run.objective) && first !== 0 && run.trace.value.length > 1 ? `from ${fmt(first)}` : null;
  const note = run.estimate ? "recomputed on all data" : null;
  return [
    el("p", { class: "lead" }, el("span", { class: `status ${run.status}` }, words(run.status)), " ", run.message ? `${run.message[0].toUpperCase()}${run.message.slice(1)}. ` : "", run.sentence),
    ...run.warnings.map(([head, text]) => el("p", { class: "warning", role: "note" }, el("b", {}, `${head} `), text)),
    el("dl", { class: "tiles" },
      tile("Objective", fmt(run.objective), change),
      run.free ? null : tile("Gap", fmt(run.gap), note),
      tile("Stationarity", fmt(run.stationarity)),
      tile("Iterations", fmt(c.iterations), known(run.best_iteration) && run.best_iteration !== c.iterations ? `best: ${run.best_iteration}` : null),
      tile("Gradients", fmt(c.gradients), c.evaluations > 0 ? `${fmt(c.evaluations)} values` : null),
      tile("Samples", fmt(c.samples)),
      tile("Time", seconds(c.seconds)),
      tile("Peak memory", bytes(c.peak_memory))),
  ];
}

const cursor = () => (frames && frames.count > 1 ? frames.at[state.frame] : null);
const pick = (x) => setFrame(nearest(frames.at, x));

function stack() {
  const visible = frames.run.frames.experts.map((name, e) => ({ name, e })).filter(({ name }) => !state.hidden.has(name));
  visible.sort((a, b) => INDEX.get(a.name) - INDEX.get(b.name));
  const xs = frames.places(state.layer), upper = xs.map(() => 0), lower = xs.map(() => 0), found = [];
  const last = xs.length - 1;
  for (const { name, e } of visible) {
    const value = frames.series(e, state.layer);
    if (!value.some((v) => Math.abs(v) > 1e-6)) continue;
    for (const sign of [1, -1]) {
      const part = value.map((v) => Math.max(0, sign * v));
      if (!part.some((v) => v > 1e-9)) continue;
      const base = sign > 0 ? upper : lower, low = [...base];
      part.forEach((v, f) => { base[f] += sign * v; });
      found.push({ name, colour: expertColour(name), xs, low, ys: [...base], value, named: false, size: part[last], seam: visible.length > 40 || part[last] < 0.004 ? 0.15 : 0.6 });
    }
  }
  const largest = [...found].sort((a, b) => b.size - a.size).slice(0, 8);
  largest.forEach((s) => { s.named = s.size > 0.025; });
  found.inside = lower.every((v) => v > -1e-6) && upper.every((v) => v <= 1 + 1e-3);
  Object.assign(found, { upper, xs });
  return found;
}

function coefficients(run) {
  const select = el("select", { onchange: (event) => { state.layer = Number(event.target.value); redraw(); } },
    el("option", { value: -1 }, `mean over ${plural(frames.layers, "layer")}`), run.frames.layers.map((name, k) => el("option", { value: k, selected: k === state.layer }, name)));
  const items = [...run.frames.experts].sort((a, b) => INDEX.get(a) - INDEX.get(b)).map((name) => ({ name, colour: expertColour(name) }));
  const many = items.length > 60;
  const pattern = svg("svg", { width: 0, height: 0, "aria-hidden": true, style: { position: "absolute" } },
    svg("defs", {}, svg("pattern", { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("line", { x1: 0, y1: 0, x2: 0, y2: 7, style: { stroke: "var(--hatch)", strokeWidth: 1.4 } }))));
  const stacked = chart({
    label: `Stacked coefficients of ${run.name} over the iterations, ${plural(frames.experts, "expert")}`, height: 310, whole: true, names: true, nonzero: true, rows: 10, cursor, pick,
    series: stack, get range() { const s = stack(); return s.inside ? [0, 1] : null; }, zero: true,
    hatch: (X, Y) => {
      const s = stack();
      if (!s.inside || !run.has_base || state.hidden.size || frames.count < 2) return [];
      return [svg("path", { d: band({ xs: s.xs, low: s.upper, ys: s.upper.map(() => 1) }, X, Y), fill: "url(#hatch)" })];
    },
  });
  const lines = chart({
    label: `Coefficient of each expert of ${run.name} over the iterations`, height: 280, whole: true, names: true, nonzero: true, rows: 10, cursor, pick, zero: true,
    series: () => {
      const order = frames.order(frames.count - 1), prominent = new Set(order.slice(0, 6));
      return order.slice(0, 60).reverse().filter((e) => !state.hidden.has(run.frames.experts[e])).map((e) => {
        const ys = frames.series(e, state.layer);
        return { name: run.frames.experts[e], colour: expertColour(run.frames.experts[e]), xs: frames.places(state.layer), ys, named: prominent.has(e) && Math.abs(ys.at(-1)) > 0.01, width: prominent.has(e) ? 2 : 1.3, marks: frames.count === 1 };
      });
    },
  });
  const table = details(["iteration", ...run.frames.experts], () => frames.at.map((at, f) => [at, ...run.frames.experts.map((_, e) => Number((state.layer >= 0 ? frames.value("coefficients", f, state.layer, e) : frames.mean("coefficients", f, e)).toFixed(4)))]));
  return [
    ...section("Coefficients", `How much of each task vector the merge holds.${run.has_base ? " What is missing to 1, hatched, is the base's share." : ""} An expert has one colour in all charts; click a name to hide it.${frames.count < run.records ? ` Of single layers ${frames.count} of ${run.records} iterations are drawn${frames.means && frames.places(-1).length < run.records ? `, of the mean ${frames.places(-1).length}` : ""}.` : ""}`),
    el("div", { class: "controls" }, el("label", {}, "Layer ", select)),
    pattern,
    many ? el("details", {}, el("summary", {}, `Legend of ${items.length} experts`), legend(items, state.hidden, redraw)) : legend(items, state.hidden, redraw),
    el("div", { class: "grid two" }, card("Stacked", null, stacked), card("Each by itself", null, lines, table)),
  ];
}

function activeSet(run) {
  const t = run.trace, choices = run.choices;
  const rows = run.frames.experts.map((name, e) => ({ name, e, ever: frames.at.some((_, f) => share(f, e) > 0) })).filter((row) => row.ever || choices.some((c) => c.some(([n]) => DATA.names[n] === row.name)));
  rows.sort((a, b) => INDEX.get(a.name) - INDEX.get(b.name));
  if (run.has_base && choices.some((c) => c.some(([n]) => n === -1))) rows.push({ name: "base", e: -1 });
  const shown = rows.slice(0, 40);
  const means = run.frames.experts.map((_, e) => frames.at.map((_, f) => Math.abs(frames.mean("coefficients", f, e))));
  const heaviest = Math.max(1e-9, ...means.map((m) => m.reduce((a, b) => Math.max(a, b), 0)));
  function share(f, e) {
    if (e < 0) return 0;
    let count = 0;
    for (let l = 0; l < frames.layers; l++) if (Math.abs(frames.value("coefficients", f, l, e)) > ZERO) count++;
    return count / frames.layers;
  }
  const host = el("div", { class: "plot" });
  drawn(host, (width) => {
    const left = 14 + textWidth(shown.map((row) => shorten(row.name, width < 520 ? 12 : 20))), right = 14, size = shown.length > 26 ? 13 : 17, top = 4;
    const height = top + size * shown.length + 34;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Active experts of ${run.name} over the iterations` });
    const x0 = frames.at[0] - 0.5, x1 = frames.at.at(-1) + 0.5;
    const X = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
    const largest = Math.min(size / 2 - 2, Math.max(1.6, (X(1) - X(0)) / 2.2));
    shown.forEach((row, k) => {
      const y = top + k * size, colour = expertColour(row.name);
      root.append(svg("text", { x: left - 8, y: y + size / 2 + 4, "text-anchor": "end" }, shorten(row.name, width < 520 ? 12 : 20)));
      root.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: y + size - 0.5, y2: y + size - 0.5 }));
      frames.at.forEach((at, f) => {
        const held = share(f, row.e);
        const next = f + 1 < frames.count ? frames.at[f + 1] : at + 1;
        if (held > 0) root.append(svg("rect", { x: r1(X(at - 0.5)), width: r1(Math.max(0.5, X(next - 0.5) - X(at - 0.5) - (X(1) - X(0) > 6 ? 1 : 0))), y: y + 2, height: size - 4, rx: X(1) - X(0) > 6 ? 2 : 0, style: { fill: colour, opacity: 0.08 + 0.62 * Math.sqrt(means[row.e][f] / heaviest) } }));
      });
      t.iteration.forEach((at, k2) => {
        for (const [n, s] of choices[k2] || []) {
          if ((n === -1 ? "base" : DATA.names[n]) === row.name) root.append(svg("circle", { cx: r1(X(at)), cy: y + size / 2, r: r1(Math.max(1.3, largest * Math.sqrt(s))), style: { fill: row.e < 0 ? "var(--soft)" : colour, stroke: "var(--card)", strokeWidth: largest > 3 ? 0.8 : 0 } }));
        }
      });
    });
    for (const v of ticks(frames.at[0], frames.at.at(-1), (width - left - right) / 75).filter(Number.isInteger)) root.append(svg("text", { class: "axis", x: X(v), y: height - 18, "text-anchor": "middle" }, fmt(v)));
    root.append(svg("text", { class: "axis", x: width - right, y: height - 4, "text-anchor": "end" }, "iteration"));
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect(), k = Math.floor(((event.clientY - box.top) * height) / box.height / size - top / size);
      const at = x0 + ((((event.clientX - box.left) * width) / box.width - left) / (width - left - right)) * (x1 - x0);
      if (!shown[k] || at < x0 || at > x1) { hideTip(); return; }
      const f = nearest(frames.at, at), chosen = (choices[nearest(t.iteration, at)] || []).find(([n]) => (n === -1 ? "base" : DATA.names[n]) === shown[k].name);
      showTip(event, shown[k].name, [[null, "iteration", fmt(frames.at[f])], ...(shown[k].e >= 0 ? [[null, "mean coefficient", fmt(frames.mean("coefficients", f, shown[k].e))], [null, "weight in", `${percent(share(f, shown[k].e))} of the layers`]] : []), [null, "chosen", chosen ? `${percent(chosen[1])} of the choices` : "no"]]);
    });
    root.addEventListener("pointerleave", hideTip);
    if (shown.length) host.replaceChildren(root); else host.replaceChildren(el("p", { class: "empty" }, "no expert has a weight"));
  });
  const counts = frames.at.map((_, f) => run.frames.experts.reduce((sum, _, e) => sum + (share(f, e) > 0), 0));
  const effective = frames.at.map((_, f) => {
    let total = 0, layers = 0;
    for (let l = 0; l < frames.layers; l++) {
      let sum = 0, squares = 0;
      for (let e = 0; e < frames.experts; e++) { const v = Math.abs(frames.value("coefficients", f, l, e)); sum += v; squares += v * v; }
      if (squares > 1e-12) { total += (sum * sum) / squares; layers++; }
    }
    return layers ? total / layers : 0;
  });
  const series = [
    { name: "experts with a weight", colour: "var(--accent)", xs: frames.at, ys: counts, marks: frames.count <= 40 },
    { name: "effective number a layer", colour: "var(--step)", xs: frames.at, ys: effective, marks: frames.count <= 40 },
  ];
  if (t.active) series.push({ name: "vertices that the solver holds", colour: "var(--gap)", dash: "6 3", xs: t.iteration.map((k) => k + 1), ys: t.active, marks: t.iteration.length <= 40 }); // after the step
  if (t.active && series[2].ys.at(-1) === null) series[2] = { ...series[2], xs: series[2].xs.slice(0, -1), ys: t.active.slice(0, -1) };
  const hiddenHere = new Set();
  const size = chart({ label: `Size of the active set of ${run.name} over the iterations`, height: 210, whole: true, zero: true, cursor, pick, series: () => series.filter((s) => !hiddenHere.has(s.name)) });
  const clipped = rows.length > shown.length ? ` ${shown.length} of ${rows.length} experts are shown, the heaviest.` : "";
  return [
    ...section("Active set", `Bars: the iterations at which an expert has a weight in some layer, the darker the larger its mean coefficient. Dots: the vertices that the oracle chose, by the share of its choices.${clipped}`),
    card("Experts over the iterations", run.choices_note, host, details(["iteration", "vertices chosen"], () => t.iteration.map((at, k) => [at, (choices[k] || []).map(([n, s]) => `${n === -1 ? "base" : n === -2 ? "start" : DATA.names[n]} ${percent(s)}`).join(", ") || "–"]))),
    el("div", { class: "grid two" },
      card("Size of the active set", `Experts with a weight above ${ZERO} in any layer; (Σλ)² / Σλ² of a layer, on average.`, size, legend(series.map((s) => ({ name: s.name, colour: s.colour, dash: s.dash || "" })), hiddenHere, redraw), seriesDetails("iteration", series.slice(0, 2))),
      vertices(run)),
  ];
}

function vertices(run) {
  if (!run.chosen.length) return card("Selected vertices", null, el("p", { class: "empty" }, "this solver chooses no vertices"));
  const top = run.chosen.slice(0, 12), most = top[0].share;
  const host = el("div", { class: "plot" });
  drawn(host, (width) => {
    const left = 14 + textWidth(top.map((v) => shorten(v.name, width < 420 ? 14 : 20))), size = 20, height = size * top.length + 6;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Vertices that the oracle of ${run.name} chose, by their share of all choices` });
    top.forEach((v, k) => {
      const y = 3 + k * size, length = Math.max(2, (v.share / most) * (width - left - 56));
      root.append(svg("text", { x: left - 8, y: y + 14, "text-anchor": "end" }, shorten(v.name, width < 420 ? 14 : 20)), svg("rect", { x: left, y: y + 3, width: r1(length), height: size - 6, rx: 3, style: { fill: expertColour(v.name) } }), svg("text", { x: left + length + 6, y: y + 14 }, percent(v.share)));
      });
    host.replaceChildren(root);
  });
  return card("Selected vertices", `Share of all choices of the oracle${run.chosen.length > top.length ? `, the first ${top.length} of ${run.chosen.length}` : ""}.`, host,
    details(["vertex", "share", "iterations", "first", "last"], () => run.chosen.map((v) => [v.name, v.share, v.iterations, v.first, v.last])));
}

// ---------------------------------------------------------------- layers × experts, linked to one slider

let slider, shownAt;
function setFrame(frame) {
  state.frame = Math.max(0, Math.min(frames.count - 1, frame));
  if (slider) { slider.value = state.frame; slider.setAttribute("aria-valuetext", `iteration ${frames.at[state.frame]}`); }
  if (shownAt) shownAt.textContent = `iteration ${fmt(frames.at[state.frame])}`;
  reframe();
}

function matrix(run) {
  const clip = { experts: Math.min(frames.experts, 80), layers: Math.min(frames.layers, 120) };
  const experts = [...Array(frames.experts).keys()].sort((a, b) => INDEX.get(run.frames.experts[a]) - INDEX.get(run.frames.experts[b])).slice(0, clip.experts);
  const host = el("div", { class: "plot" });
  let cells = null;
  const paint = () => {
    const bound = frames.bound(state.kind);
    for (const { rect, dot, l, e } of cells) {
      const v = frames.value(state.kind, state.frame, l, e);
      rect.style.fill = known(v) ? ramp(v / bound) : "var(--track)";
      if (dot) {
        dot.setAttribute("visibility", frames.chosen(state.frame, l) === e ? "visible" : "hidden");
        dot.style.fill = Math.abs(v / bound) > 0.5 ? "var(--card)" : "var(--ink)";
      }
    }
  };
  let key = "";
  drawn(host, (width) => {
    const now = `${width} ${state.run}`;
    if (key === now) { paint(); bar(); return; }
    key = now;
    const narrow = width < 520, letters = narrow ? 14 : 24;
    const left = 12 + textWidth(run.frames.layers.map((name) => shorten(name, letters)));
    const top = 12 + textWidth(experts.map((e) => shorten(run.frames.experts[e], 14)));
    const step = Math.min(72, (width - left - 4) / experts.length);
    const size = Math.max(9, Math.min(36, step * 1.6, 420 / clip.layers));
    const full = step >= 8 ? width : left + 4 + 8 * experts.length, w = step >= 8 ? step : 8;
    const height = top + size * clip.layers + 4;
    const root = svg("svg", { viewBox: `0 0 ${full} ${height}`, height, role: "img", "aria-label": `Layers × experts of ${run.name} at the chosen iteration`, style: full > width ? { width: `${full}px` } : {} });
    const everyColumn = Math.ceil(11 / w), everyRow = Math.ceil(11 / size); // of the names, where they would overlap
    experts.forEach((e, k) => {
      if (k % everyColumn) return;
      const x = left + k * w + w / 2 + 4;
      root.append(svg("text", { x, y: top - 6, transform: `rotate(-90 ${x} ${top - 6})`, style: { fill: "var(--soft)" } }, shorten(run.frames.experts[e], 14)));
    });
    cells = [];
    for (let l = 0; l < clip.layers; l++) {
      if (l % everyRow === 0) root.append(svg("text", { x: left - 7, y: top + l * size + size / 2 + 4, "text-anchor": "end" }, shorten(run.frames.layers[l], letters)));
      experts.forEach((e, k) => {
        const rect = svg("rect", { x: r1(left + k * w), y: r1(top + l * size), width: r1(w - 1), height: r1(size - 1), rx: 1.5 });
        const dot = frames.scores ? svg("circle", { cx: r1(left + k * w + (w - 1) / 2), cy: r1(top + l * size + (size - 1) / 2), r: Math.min(2.6, w / 4), "pointer-events": "none" }) : null;
        root.append(rect, dot || "");
        cells.push({ rect, dot, l, e });
      });
    }
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect();
      const k = Math.floor((((event.clientX - box.left) * full) / box.width - left) / w), l = Math.floor((((event.clientY - box.top) * height) / box.height - top) / size);
      if (!(k in experts) || l < 0 || l >= clip.layers) { hideTip(); return; }
      const e = experts[k];
      showTip(event, run.frames.experts[e], [[null, run.frames.layers[l], ""], [null, "coefficient", fmt(frames.value("coefficients", state.frame, l, e))], ...(frames.scores ? [[null, "score", fmt(frames.value("scores", state.frame, l, e))]] : [])]);
    });
    root.addEventListener("pointerleave", hideTip);
    host.style.overflowX = full > width ? "auto" : "";
    host.replaceChildren(root);
    paint();
    bar();
  }).frame = () => { if (cells) paint(); };
  const scale = el("div", { class: "keys" });
  const bar = () => {
    const bound = frames.bound(state.kind), signed = frames.negative(state.kind);
    const steps = [...Array(21).keys()].map((k) => (signed ? -1 + k / 10 : k / 20));
    scale.replaceChildren(
      el("span", {}, fmt(signed ? -bound : 0, 3)),
      svg("svg", { width: 126, height: 12, viewBox: "0 0 126 12", "aria-hidden": true }, steps.map((x, k) => svg("rect", { x: 6 * k, width: 6.2, height: 12, style: { fill: ramp(x) } }))),
      el("span", {}, fmt(bound, 3)), el("span", {}, frames.scores ? "dot: smallest score of the layer" : ""));
  };
  const rest = [clip.experts < frames.experts && `${clip.experts} of ${frames.experts} experts, the heaviest`, clip.layers < frames.layers && `${clip.layers} of ${frames.layers} layers, the first`].filter(Boolean).join("; ");
  const kinds = frames.scores ? el("label", {}, "Show ", el("select", { onchange: (event) => { state.kind = event.target.value; redraw(); } }, el("option", { value: "coefficients" }, "coefficients"), el("option", { value: "scores" }, "scores"))) : null;
  slider = el("input", { type: "range", min: 0, max: Math.max(0, frames.count - 1), value: state.frame, step: 1, "aria-label": "iteration", oninput: (event) => { stop(); setFrame(Number(event.target.value)); } });
  shownAt = el("output", {}, "");
  const play = el("button", { type: "button", class: "play", onclick: () => (play.dataset.on ? stop() : start()) }, "▶ Play");
  let timer = 0;
  stop = () => { clearInterval(timer); delete play.dataset.on; play.textContent = "▶ Play"; };
  const start = () => {
    play.dataset.on = "1"; play.textContent = "❚❚ Pause";
    if (state.frame >= frames.count - 1) setFrame(0);
    timer = setInterval(() => { if (!play.isConnected || state.frame >= frames.count - 1) stop(); else setFrame(state.frame + 1); }, Math.max(40, Math.min(450, 9000 / frames.count)));
  };
  const thin = run.frames.iterations.length < run.records ? `The slider has ${run.frames.iterations.length} of ${run.records} iterations, evenly spaced.` : null;
  return [
    ...section("Layers × experts", "One iterate at a time: move the slider, or click into a chart above. The scores are the oracle's input: the derivative of the objective by each coefficient."),
    frames.count > 1 ? el("div", { class: "controls" }, play, el("label", { class: "slider" }, slider, shownAt), kinds) : el("div", { class: "controls" }, kinds),
    el("div", { class: "grid wide" }, card("Layers × experts", [thin, rest && `${rest}.`].filter(Boolean).join(" ") || null, host, scale), scoreTable(run)),
  ];
}

function scoreTable(run) {
  const host = el("div", { class: "scroll" });
  if (!frames.scores) return card("Scores", null, el("p", { class: "empty" }, "the trace holds no scores"));
  const fill = () => {
    const rows = run.frames.experts.map((name, e) => {
      let wins = 0, excess = 0;
      for (let l = 0; l < frames.layers; l++) {
        if (frames.chosen(state.frame, l) === e) wins++;
        let least = run.has_base ? 0 : Infinity;
        for (let k = 0; k < frames.experts; k++) least = Math.min(least, frames.value("scores", state.frame, l, k));
        excess += frames.value("scores", state.frame, l, e) - least;
      }
      return { name, coefficient: frames.mean("coefficients", state.frame, e), score: frames.mean("scores", state.frame, e), excess: excess / frames.layers, wins };
    });
    if (run.has_base) {
      let wins = 0, excess = 0;
      for (let l = 0; l < frames.layers; l++) {
        let least = 0;
        for (let k = 0; k < frames.experts; k++) least = Math.min(least, frames.value("scores", state.frame, l, k));
        excess -= least;
        if (frames.chosen(state.frame, l) === -1) wins++;
      }
      rows.push({ name: "base", coefficient: 1 - rows.reduce((sum, row) => sum + row.coefficient, 0), score: 0, excess: excess / frames.layers, wins });
    }
    rows.sort((a, b) => a.score - b.score);
    const scroll = host.scrollTop;
    host.replaceChildren(el("table", {},
      el("thead", {}, el("tr", {}, ["expert", "λ", "score", "excess", "best in"].map((name, k) => el("th", { scope: "col", class: k && "n", title: ["", "mean coefficient", "mean score over the layers", "mean over the layers of its score minus the layer's smallest", "layers in which its score is the smallest"][k] }, name)))),
      el("tbody", {}, rows.slice(0, 100).map((row) => el("tr", {}, el("th", { scope: "row", class: "name", title: row.name }, el("i", { class: "swatch", style: { background: expertColour(row.name), marginRight: "7px" } }), row.name), el("td", { class: "n" }, Math.abs(row.coefficient) < 5e-4 ? "0" : minus(row.coefficient.toFixed(3))), el("td", { class: "n" }, fmt(row.score, 3)), el("td", { class: "n" }, fmt(row.excess, 3)), el("td", { class: "n" }, row.wins ? String(row.wins) : "·"))))));
    host.scrollTop = scroll;
  };
  drawn(host, fill).frame = fill;
  return card("Scores of the oracle", "Smallest first: where the oracle would move. λ and score are means over the layers; excess: above the smallest of the layer; best in: layers in which it is the smallest.", host);
}

// ---------------------------------------------------------------- convergence, tasks, steps

function convergence(run) {
  const t = run.trace, dots = t.iteration.length <= 60;
  const kept = t.iteration.length < run.records ? ` ${t.iteration.length} of ${run.records} records are drawn.` : "";
  const objective = [{ name: "objective", colour: "var(--accent)", xs: t.iteration, ys: t.value, marks: dots }];
  const certificate = [];
  if (t.gap.some(known)) certificate.push({ name: "gap", colour: "var(--gap)", xs: t.iteration, ys: t.gap, marks: dots });
  certificate.push({ name: "stationarity", colour: "var(--faint)", dash: certificate.length ? "5 3" : "", xs: t.iteration, ys: t.stationarity, marks: dots && !certificate.length, width: certificate.length ? 1.4 : 1.8 });
  if (t.strong_gap) certificate.push({ name: "strong gap", colour: "var(--accent)", dash: "2 3", xs: t.iteration, ys: t.strong_gap, width: 1.4 });
  const off = new Set(), estimate = run.estimate ? "Estimated on minibatches. " : "";
  const tasks = Object.keys(t.tasks), coloured = new Map(tasks.map((name, k) => [name, INDEX.has(name) ? expertColour(name) : seriesColour(k)]));
  const taskSeries = tasks.map((name, k) => ({ name, colour: coloured.get(name), dash: INDEX.has(name) ? "" : DASHES[Math.floor(k / DATA.series) % 4], xs: t.iteration, ys: t.tasks[name], marks: dots, named: tasks.length <= 10 }));
  const offTasks = new Set(), weighed = Object.keys(t.task_weights), offWeights = new Set();
  const weightSeries = weighed.map((name, k) => ({ name, colour: coloured.get(name) || seriesColour(k), dash: taskSeries.find((s) => s.name === name)?.dash || "", xs: t.iteration, ys: t.task_weights[name], marks: dots, named: weighed.length <= 10 }));
  const kinds = t.kind ? [...new Set(t.kind.filter(Boolean))] : [];
  const stepValues = t.step.filter((v) => v > 0);
  const logStep = stepValues.length > 0 && Math.max(...stepValues) > 100 * Math.min(...stepValues);
  const offKinds = new Set();
  const kindColour = (kind) => (kind ? seriesColour(kinds.indexOf(kind)) : "var(--step)");
  const stepSeries = () => [
    { name: "step size", colour: "var(--step)", xs: t.iteration, ys: t.step, width: kinds.length ? 1 : 1.6, faint: kinds.length > 0, marks: dots && !kinds.length },
    ...kinds.filter((kind) => !offKinds.has(kind)).map((kind) => ({ name: kind, colour: kindColour(kind), xs: t.iteration, ys: t.step.map((v, k) => (t.kind[k] === kind ? v : null)), shapes: t.kind, width: 0.01, marks: true })),
  ];
  return [
    ...section("Convergence", `${estimate}${kept}`.trim() || null),
    el("div", { class: "grid two" },
      card("Objective", null, chart({ label: `Objective of ${run.name}: from ${fmt(t.value[0])} to ${fmt(t.value.at(-1))}`, height: 240, whole: true, series: () => objective, cursor, pick }), seriesDetails("iteration", objective)),
      card(certificate.length > 1 ? "Gap and stationarity" : "Stationarity", null, chart({ label: `Certificates of ${run.name} over the iterations, logarithmic`, height: certificate.length > 1 ? 205 : 240, log: true, whole: true, series: () => certificate.filter((s) => !off.has(s.name)), cursor, pick }), certificate.length > 1 && legend(certificate.map((s) => ({ name: s.name, colour: s.colour, dash: s.dash || "" })), off, redraw), seriesDetails("iteration", certificate)),
      tasks.length > 0 && card("Loss by task", null, chart({ label: `Loss of each task of ${run.name} over the iterations`, height: 240, whole: true, names: true, rows: 14, series: () => taskSeries.filter((s) => !offTasks.has(s.name)), cursor, pick }), legend(taskSeries.map((s) => ({ name: s.name, colour: s.colour, dash: s.dash })), offTasks, redraw), seriesDetails("iteration", taskSeries)),
      weighed.length > 0 && card("Weights of the tasks", "In the direction of each step.", chart({ label: `Weight of each task of ${run.name} over the iterations`, height: 240, zero: true, whole: true, names: true, rows: 14, series: () => weightSeries.filter((s) => !offWeights.has(s.name)), cursor, pick }), legend(weightSeries.map((s) => ({ name: s.name, colour: s.colour, dash: s.dash })), offWeights, redraw), seriesDetails("iteration", weightSeries)),
      card("Step size", kinds.length ? "By the kind of the step." : null, chart({ label: `Step sizes of ${run.name} over the iterations`, height: 240, log: logStep, zero: !logStep, whole: true, series: stepSeries, cursor, pick, nothing: "no step was taken" }), kinds.length > 0 && legend(kinds.map((kind) => ({ name: kind, label: `${kind} ${t.kind.filter((k) => k === kind).length}`, colour: kindColour(kind) })), offKinds, redraw), details(["iteration", "step", ...(kinds.length ? ["kind"] : [])], () => t.iteration.map((at, k) => [at, t.step[k], ...(kinds.length ? [t.kind[k] || "–"] : [])])))),
  ];
}

function ternary(run) {
  if (frames.experts !== 3) return null;
  const host = el("div", { class: "plot" });
  const place = (f, layer) => {
    const w = [0, 1, 2].map((e) => (layer >= 0 ? frames.value("coefficients", f, layer, e) : frames.mean("coefficients", f, e)));
    const sum = w[0] + w[1] + w[2];
    return sum > 1e-9 && w.every((v) => v > -1e-6) ? w.map((v) => Math.max(0, v) / sum) : null;
  };
  const path = frames.at.map((_, f) => place(f, -1));
  if (!path.some(Boolean)) return card("Simplex", null, el("p", { class: "empty" }, "the coefficients leave the simplex of the three experts"));
  const entry = drawn(host, (width) => {
    const side = Math.min(width - 40, 420), tall = (side * Math.sqrt(3)) / 2, ox = (width - side) / 2, oy = 24, height = tall + 52;
    const at = (w) => [ox + side * (w[1] + w[2] / 2), oy + tall * (1 - w[2])];
    const corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]].map(at);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Path of ${run.name} in the triangle of its three experts` });
    for (let k = 1; k < 5; k++) {
      for (const [a, b] of [[[k / 5, 1 - k / 5, 0], [k / 5, 0, 1 - k / 5]], [[1 - k / 5, k / 5, 0], [0, k / 5, 1 - k / 5]], [[1 - k / 5, 0, k / 5], [0, 1 - k / 5, k / 5]]]) {
        const [p, q] = [at(a), at(b)];
        root.append(svg("line", { class: "gridline", x1: p[0], y1: p[1], x2: q[0], y2: q[1] }));
      }
    }
    root.append(svg("path", { d: `M${corners.map((c) => c.map(r1).join(" ")).join("L")}Z`, fill: "none", style: { stroke: "var(--faint)" } }));
    run.frames.experts.forEach((name, e) => {
      root.append(svg("text", { class: "strong", x: Math.min(width - 4, Math.max(4, corners[e][0])), y: e === 2 ? corners[e][1] - 8 : corners[e][1] + 18, "text-anchor": e === 0 ? "start" : e === 1 ? "end" : "middle", style: { fill: expertColour(name) } }, shorten(name, width < 420 ? 16 : 26)));
    });
    const draw = (points, style) => root.append(svg("path", { d: points.filter(Boolean).map((w, k) => `${k ? "L" : "M"}${at(w).map(r1).join(" ")}`).join(""), fill: "none", "stroke-linejoin": "round", style }));
    for (let l = 0; l < Math.min(30, frames.layers) && frames.layers > 1; l++) draw(frames.at.map((_, f) => place(f, l)), { stroke: "var(--faint)", strokeWidth: 0.8, opacity: 0.45 });
    draw(path, { stroke: "var(--accent)", strokeWidth: 2 });
    path.forEach((w, f) => { if (w && frames.count <= 60) root.append(svg("circle", { cx: r1(at(w)[0]), cy: r1(at(w)[1]), r: 2.6, style: { fill: "var(--accent)" } })); });
    const start = path.find(Boolean), now = path[state.frame];
    if (start) root.append(svg("circle", { cx: at(start)[0], cy: at(start)[1], r: 4.5, style: { fill: "var(--card)", stroke: "var(--accent)", strokeWidth: 2 } }));
    if (now) root.append(svg("circle", { cx: at(now)[0], cy: at(now)[1], r: 6, style: { fill: "var(--gap)", stroke: "var(--card)", strokeWidth: 1.5 } }));
    host.replaceChildren(root);
  });
  entry.frame = () => entry.draw(entry.width);
  const capped = run.has_base ? " Shares among the experts: the base's share is left out." : "";
  return card("Path in the simplex", `Mean over the layers, bold; each layer, thin. Hollow: the start; red: the slider's iteration.${capped}`, host,
    details(["iteration", ...run.frames.experts], () => frames.at.map((i, f) => [i, ...(path[f] || [null, null, null])])));
}

// ---------------------------------------------------------------- cost, data, recipe

function cost(run) {
  const c = run.cost, parts = Object.entries(c.parts || {}), spent = parts.reduce((sum, [, s]) => sum + s, 0);
  const total = Math.max(c.seconds || 0, spent);
  if (total - spent > 0.001 * total && parts.length) parts.push(["everything else", total - spent]);
  const meaning = { combine: "coefficients to weights", objective: "forward and backward passes", correlate: "gradient to scores" };
  return card("What it took", null,
    parts.length > 0 && total > 0 && el("div", { class: "bar", role: "img", "aria-label": "seconds by part" }, parts.map(([, s], k) => el("span", { style: { flex: `${s / total} 0 0`, background: k < 3 ? seriesColour(k) : "var(--hatch)" } }))),
    parts.length > 0 && total > 0 && el("ul", { class: "keys" }, parts.map(([name, s], k) => el("li", { title: meaning[name] || "" }, el("i", { class: "swatch", style: { background: k < 3 ? seriesColour(k) : "var(--hatch)" } }), `${name} `, el("b", {}, seconds(s)), ` ${percent(s / total)}`))),
    pairsTable([
      ["wall clock", seconds(c.seconds)], ["gradients (forward and backward)", fmt(c.gradients)], ["values (forward only)", fmt(c.evaluations)],
      ["samples through the model", `${fmt(c.samples)}${!known(c.gradient_samples) ? "" : c.gradient_samples === c.samples ? ", all with a gradient" : `, ${fmt(c.gradient_samples)} of them with a gradient`}`],
      ["combines and correlates", `${fmt(c.combines)} and ${fmt(c.correlates)}`], ["read from the pool", bytes(c.bytes_read)], ["peak memory of the process", bytes(c.peak_memory)],
    ]));
}
function dataUsed(run) {
  const d = run.data;
  return card("The data that was used", null,
    d.test_inputs && el("p", { class: "warning", role: "note" }, el("b", {}, "Test inputs. "), "Some examples are from a test split: accuracies on that split are transductive."),
    el("p", { class: "note" }, d.known ? `${plural(d.labelled ?? 0, "labelled example")}, ${plural(d.unlabelled ?? 0, "unlabelled example")}.${d.test_inputs ? "" : " No test inputs."}` : "Known when the run has ended."),
    run.task_data.length > 0 && dataTable(["task", "split", "samples", "labels"], run.task_data.map((t) => [t.name, t.split ?? "–", t.samples ?? "–", typeof t.labels_used !== "boolean" ? "–" : t.labels_used ? "used" : "not used"])),
    run.about.length > 0 && el("div", { style: { marginTop: "14px" } }, el("h3", {}, "The problem"), pairsTable(run.about)));
}

// ---------------------------------------------------------------- several runs

const AXES = { iteration: "iteration", seconds: "seconds", gradients: "gradients", evaluations: "values", samples: "samples" };
function several() {
  let by = "iteration";
  const hidden = new Set();
  const place = (run) => (by === "iteration" ? run.trace.iteration : [0, ...run.trace[by].slice(0, -1)]);
  const over = (key) => () => DATA.runs.filter((run) => !hidden.has(run.name)).map((run) => ({ run, key: key === "gap" && run.free ? "stationarity" : key })).map(({ run, key: k }) => ({
    name: run.name, colour: seriesColour(DATA.runs.indexOf(run)), dash: k !== key ? "2 3" : DASHES[Math.floor(DATA.runs.indexOf(run) / DATA.series) % 4], xs: place(run), ys: run.trace[k], marks: run.trace.iteration.length <= 60, width: 2,
  })).filter((s) => s.xs.every(known));
  const spec = (label, key, log) => ({ label, height: 260, log, series: over(key), rows: 14, get x() { return AXES[by]; }, get whole() { return by !== "seconds"; } });
  const values = DATA.runs.flatMap((run) => run.trace.value.filter(known));
  const log = values.length > 0 && Math.min(...values) > 0 && Math.max(...values) > 10 * Math.min(...values);
  const rows = DATA.runs.map((run) => [run.name, words(run.status), run.solver, run.domain, fmt(run.objective), fmt(run.gap), fmt(run.cost.iterations), fmt(run.cost.gradients), fmt(run.cost.samples), seconds(run.cost.seconds)]);
  const table = el("table", {},
    el("thead", {}, el("tr", {}, ["run", "status", "solver", "domain", "objective", "gap", "iterations", "gradients", "samples", "time"].map((name, k) => el("th", { scope: "col", class: k > 3 && "n" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, k) => el(k ? "td" : "th", { class: k > 3 && "n", scope: k ? null : "row" }, value ?? "–"))))));
  return [
    ...section("Side by side", "Every start costs nothing; an iterate is drawn at what it took to reach it."),
    ...DATA.differences.map((text) => el("p", { class: "warning", role: "note" }, `${text[0].toUpperCase()}${text.slice(1)}`)),
    el("div", { class: "controls" }, el("label", {}, "Over ", el("select", { onchange: (event) => { by = event.target.value; redraw(); } }, Object.entries(AXES).filter(([key]) => key === "iteration" || DATA.runs.every((run) => run.trace[key].every(known))).map(([key, name]) => el("option", { value: key }, name))))),
    legend(DATA.runs.map((run, k) => ({ name: run.name, colour: seriesColour(k), dash: DASHES[Math.floor(k / DATA.series) % 4] })), hidden, redraw),
    el("div", { class: "grid two" }, card("Objective", null, chart(spec("Objective of all runs", "value", log))), card("Gap", DATA.runs.some((run) => run.free) ? "Dotted: stationarity, on the free domain." : null, chart(spec("Gap of all runs, logarithmic", "gap", true)))),
    el("div", { class: "grid" }, card("How they ended", null, el("div", { class: "scroll" }, table))),
  ].filter(Boolean);
}

// ---------------------------------------------------------------- the page

function show(index) {
  stop();
  const run = DATA.runs[index];
  Object.assign(state, { run: index, layer: -1, kind: "coefficients" });
  frames = run.frames.iterations.length ? new Frames(run) : null;
  slider = shownAt = null;
  const parts = DATA.runs.length > 1 ? [el("h2", {}, run.name)] : [];
  parts.push(...overview(run));
  if (frames) {
    state.frame = frames.count - 1;
    parts.push(...coefficients(run), ...activeSet(run), ...matrix(run));
    const triangle = ternary(run);
    if (triangle) parts.push(el("div", { class: "grid" }, triangle));
  }
  if (run.trace.iteration.length) parts.push(...convergence(run));
  parts.push(...section("Cost and data"), el("div", { class: "grid two" }, cost(run), dataUsed(run)));
  if (run.recipe) parts.push(...section("Recipe", "What ran, every default filled in."), card("recipe.yaml", null, el("pre", { tabindex: 0, "aria-label": "recipe" }, run.recipe)));
  body.replaceChildren(...parts.flat().filter(Boolean));
  drawings.forEach((entry) => { if (!entry.host.isConnected) drawings.delete(entry); });
  if (frames) setFrame(state.frame);
  redraw();
}

const main = document.getElementById("main"), body = el("div", {});
main.replaceChildren();
if (DATA.runs.length > 1) {
  main.append(...several());
  main.append(el("fieldset", { class: "runs" }, el("legend", {}, "Details of"), DATA.runs.map((run, k) => el("label", {}, el("input", { type: "radio", name: "run", value: k, checked: k === 0, onchange: () => show(k) }), run.name))));
}
main.append(body);
show(0);
document.documentElement.dataset.ready = "1";
