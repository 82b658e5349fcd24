"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const svg = byId("view");
const ORANGE = "#e69f00", DARK = "#111111", WHITE = "#ffffff";
// Positions come in tenths of a pixel, weights in ten-thousandths.
const PLACES = 10, WEIGHTS = 10000;

const state = {
  item: 0, pinned: 0, layer: 0, zoom: false, others: true, timer: 0,
  levels: new Set(data.levels.keys()), heads: new Set(Array(data.heads).keys()), tokens: new Set(data.levels.keys()),
};

function make(name, attributes, parent) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

/** Outline of level l's marker around (x, y), about r wide each way. */
function marker(level, x, y, r) {
  const polygon = (corners) => "M" + corners.map(([a, b]) => `${x + r * a},${y + r * b}`).join("L") + "Z";
  switch (level % 6) {
    case 0: return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
    case 1: return polygon([[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]);
    case 2: return polygon([[0, -1.1], [1.1, 0.9], [-1.1, 0.9]]);
    case 3: return polygon([[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]]);
    case 4: return polygon([[0, 1.1], [1.1, -0.9], [-1.1, -0.9]]);
    default: return cross(x, y, r);
  }
}

function cross(x, y, r) {
  const a = r * 0.36;
  const way = [[-a, -r], [a, -r], [a, -a], [r, -a], [r, a], [a, a], [a, r], [-a, r], [-a, a], [-r, a], [-r, -a], [-a, -a]];
  return "M" + way.map(([dx, dy]) => `${x + dx},${y + dy}`).join("L") + "Z";
}

function color(part) {
  const at = Math.min(Math.max(part, 0), 1) * (data.colors.length - 1), low = Math.floor(at), rest = at - low;
  const a = data.colors[low], b = data.colors[Math.min(low + 1, data.colors.length - 1)];
  return `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * rest)).join(",")})`;
}

const item = () => data.items[state.item];
const look = () => item().layers[state.layer];
const percent = (part) => `${Math.round(part * 100)}%`;

/** The part of the image that is shown: [x, y, width, height]. */
function part() {
  if (state.zoom) return item().view;
  const border = 0.02;
  return [-data.width * border, -data.height * border, data.width * (1 + 2 * border), data.height * (1 + 2 * border)];
}

function rectangle([x1, y1, x2, y2], stroke, width, unit, dash, parent) {
  const place = { x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0), fill: "none" };
  make("rect", { ...place, stroke: DARK, "stroke-width": (width + 2) * unit }, parent);
  const line = { ...place, stroke, "stroke-width": width * unit, class: "line" };
  return make("rect", dash ? { ...line, "stroke-dasharray": `${6 * unit} ${4 * unit}` } : line, parent);
}

function draw() {
  const [x, y, width, height] = part();
  svg.setAttribute("viewBox", `${x} ${y} ${width} ${height}`);
  svg.style.aspectRatio = `${width} / ${height}`;
  const unit = width / Math.max(svg.clientWidth, 1) < height / Math.max(svg.clientHeight, 1)
    ? height / Math.max(svg.clientHeight, 1) : width / Math.max(svg.clientWidth, 1); // image pixels a screen pixel
  const scene = byId("scene");
  scene.replaceChildren();
  const chosen = item();
  const boxes = byId("boxes");
  for (const group of boxes.children) {
    const mine = Number(group.dataset.item) === state.item;
    const quiet = !mine && state.others;
    for (const [index, line] of [...group.querySelectorAll("rect.edge")].entries()) {
      line.setAttribute("stroke-width", (index ? 1.6 : 3.6) * unit);
      line.style.display = quiet ? "" : "none";
    }
    group.setAttribute("aria-pressed", String(mine));
  }
  const now = look();
  if (chosen.kind === "detection") {
    if (now.referenceBox) rectangle(now.referenceBox, WHITE, 1.6, unit, true, scene);
    rectangle(now.box, ORANGE, 2.6, unit, false, scene);
  }
  drawPoints(scene, now, unit, [x, y, width, height]);
  const spot = chosen.kind === "detection" ? now.reference : chosen.point;
  make("path", {
    d: cross(spot[0], spot[1], 9 * unit), fill: WHITE, stroke: DARK, "stroke-width": 1.4 * unit, id: "reference",
  }, scene);
  report();
}

function drawPoints(scene, now, unit, [left, top, width, height]) {
  const points = [];
  const { heads, points: P } = data, L = data.levels.length, values = now.points;
  const T = values.length / (heads * L * P * 3);
  for (let token = 0; token < T; token++) {
    if (T > 1 && !state.tokens.has(token)) continue;
    for (const head of state.heads) for (const level of state.levels) for (let p = 0; p < P; p++) {
      const at = (((token * heads + head) * L + level) * P + p) * 3;
      points.push([values[at + 2] / WEIGHTS, values[at] / PLACES, values[at + 1] / PLACES, level, head, token]);
    }
  }
  points.sort((a, b) => a[0] - b[0]); // the heaviest on top
  const inset = 6 * unit;
  let beyond = 0;
  for (const [weight, px, py, level, head, token] of points) {
    const outside = px < left || py < top || px > left + width || py > top + height;
    beyond += outside;
    const x = outside ? Math.min(Math.max(px, left + inset), left + width - inset) : px;
    const y = outside ? Math.min(Math.max(py, top + inset), top + height - inset) : py;
    const part = weight / data.heaviest, tone = Math.sqrt(part);
    const r = (1.9 + 6.6 * Math.sqrt(part)) * unit;
    const dot = make("path", {
      d: marker(level, x, y, r), fill: color(tone), stroke: tone > 0.5 ? DARK : "#f2f2f2", "stroke-width": 0.9 * unit,
      class: "point", "pointer-events": "none", "data-x": px, "data-y": py, "data-weight": weight,
      "data-level": level, "data-head": head, "data-token": token,
    }, scene);
    if (outside) dot.setAttribute("opacity", "0.55");
  }
  byId("beyond").textContent = beyond ? `${beyond} of ${points.length} points lie beyond the edge, where they are drawn pale` : "";
}

function report() {
  const chosen = item();
  byId("chosen").textContent = chosen.kind === "detection"
    ? `${chosen.name} ${chosen.score.toFixed(2)}`
    : `Encoder at x ${chosen.point[0]}, y ${chosen.point[1]}`;
  byId("layer").value = state.layer + 1;
  byId("layer").max = chosen.layers.length;
  byId("layer-now").textContent = `${state.layer + 1} of ${chosen.layers.length}`;
  byId("from").hidden = chosen.kind === "detection";
  for (const [kind, set] of [["levels", state.levels], ["heads", state.heads], ["tokens", state.tokens]])
    for (const [index, chip] of [...byId(kind).querySelectorAll("button[data-index]")].entries())
      chip.setAttribute("aria-pressed", String(set.has(index)));
  for (const chip of byId("detections").children)
    chip.setAttribute("aria-pressed", String(Number(chip.dataset.item) === state.item));
  byId("zoom").setAttribute("aria-pressed", String(state.zoom));
  byId("others").setAttribute("aria-pressed", String(state.others));
  table(chosen);
}

function table(chosen) {
  const detection = chosen.kind === "detection";
  const heads = detection ? ["Layer", "Score", "Attention inside the box"] : ["Layer", "Mean distance of the attention"];
  const cells = chosen.layers.map((layer, index) => detection
    ? [index + 1, layer.score.toFixed(2), percent(layer.share)]
    : [index + 1, `${layer.distance.toFixed(0)} pixels`]);
  const target = byId("layers");
  target.replaceChildren();
  const row = (parent, values, tag) => {
    const line = document.createElement("tr");
    for (const value of values) {
      const cell = document.createElement(tag);
      cell.textContent = value;
      if (tag === "th") cell.scope = "col";
      line.append(cell);
    }
    parent.append(line);
    return line;
  };
  row(target.createTHead(), heads, "th");
  const body = target.createTBody();
  for (const [index, values] of cells.entries()) {
    const line = row(body, values, "td");
    line.classList.toggle("now", index === state.layer);
    line.addEventListener("click", () => setLayer(index));
  }
}

function choose(index, pin) {
  if (pin) state.pinned = index;
  if (state.item === index) return;
  state.item = index;
  state.layer = Math.min(state.layer, item().layers.length - 1);
  draw();
}

function setLayer(index) {
  state.layer = index;
  draw();
}

function play(on) {
  clearInterval(state.timer);
  state.timer = on ? setInterval(() => setLayer((state.layer + 1) % item().layers.length), 900) : 0;
  byId("play").setAttribute("aria-pressed", String(on));
  byId("play").textContent = on ? "Stop" : "Play";
}

function button(text, parent, act) {
  const element = document.createElement("button");
  element.type = "button";
  element.append(text);
  element.addEventListener("click", act);
  parent.append(element);
  return element;
}

/** Chips that show or hide the members of a set, and two for all and none of them. */
function toggles(id, set, labels, icon) {
  const parent = byId(id);
  for (const [index, label] of labels.entries()) {
    const chip = button(label, parent, () => {
      if (set.has(index)) set.delete(index); else set.add(index);
      draw();
    });
    chip.dataset.index = index;
    if (icon) {
      const sign = make("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" });
      make("path", { d: marker(index, 0, 0, 5.6), fill: "currentColor" }, sign);
      chip.prepend(sign);
    }
  }
  button("all", parent, () => { for (const index of labels.keys()) set.add(index); draw(); });
  button("none", parent, () => { set.clear(); draw(); });
}

function legend() {
  const parent = byId("legend");
  const entry = (text, paint) => {
    const span = document.createElement("span");
    const sign = make("svg", { viewBox: "0 0 22 16", "aria-hidden": "true" });
    paint(sign);
    span.append(sign, text);
    parent.append(span);
  };
  const line = (stroke, dash) => (sign) => {
    make("line", { x1: 1, x2: 21, y1: 8, y2: 8, stroke: DARK, "stroke-width": 5 }, sign);
    make("line", { x1: 1, x2: 21, y1: 8, y2: 8, stroke, "stroke-width": 2.4, "stroke-dasharray": dash }, sign);
  };
  const detections = data.items.some((one) => one.kind === "detection");
  entry(detections ? "reference point" : "the point", (sign) =>
    make("path", { d: cross(11, 8, 7), fill: WHITE, stroke: DARK, "stroke-width": 1.3 }, sign));
  if (detections) {
    if (data.items.some((one) => one.layers.some((layer) => layer.referenceBox)))
      entry("box the layer starts from", line(WHITE, "5 3"));
    entry("box the layer gives", line(ORANGE, "none"));
  }
  const scale = document.createElement("span");
  const bar = document.createElement("span");
  bar.className = "bar";
  const stops = Array.from({ length: 11 }, (_, i) => `${color(Math.sqrt(i / 10))} ${i * 10}%`);
  bar.style.background = `linear-gradient(to right, ${stops.join(",")})`;
  scale.append("weight 0", bar, data.heaviest.toFixed(2));
  parent.append(scale);
  const beyond = document.createElement("span");
  beyond.id = "beyond";
  beyond.style.whiteSpace = "normal";
  parent.append(beyond);
}

function start() {
  byId("title").textContent = data.title;
  byId("how").textContent = data.items[0].kind === "detection"
    ? "Hover or tap a box to see where its query looked; a click or Enter keeps it."
    : "Where the encoder looked from one point of the image.";
  make("image", { href: data.image, x: 0, y: 0, width: data.width, height: data.height, preserveAspectRatio: "none" }, svg);
  const boxes = make("g", { id: "boxes" }, svg);
  make("g", { id: "scene", "pointer-events": "none" }, svg);
  // Small boxes on top, so that each can be reached.
  const area = ({ box }) => (box[2] - box[0]) * (box[3] - box[1]);
  const order = [...data.items.keys()].filter((i) => data.items[i].kind === "detection");
  for (const index of order.sort((a, b) => area(data.items[b]) - area(data.items[a]))) {
    const { box: [x1, y1, x2, y2], name, score } = data.items[index];
    const group = make("g", {
      class: "hit", tabindex: 0, role: "button", "aria-label": `${name} ${score.toFixed(2)}`, "data-item": index,
    }, boxes);
    const place = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
    make("rect", { ...place, fill: "transparent", "pointer-events": "all" }, group);
    make("rect", { ...place, fill: "none", stroke: DARK, class: "edge" }, group);
    make("rect", { ...place, fill: "none", stroke: "#56b4e9", class: "edge line" }, group);
    group.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") choose(index, false); });
    group.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") choose(state.pinned, false); });
    group.addEventListener("click", () => choose(index, true));
    group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(index, true); }
    });
  }
  for (const [index, one] of data.items.entries()) {
    if (one.kind !== "detection") continue;
    button(`${one.name} ${one.score.toFixed(2)}`, byId("detections"), () => choose(index, true)).dataset.item = index;
  }
  byId("found").hidden = byId("others").hidden = !order.length;
  const names = data.levels.map(([h, w], index) => `${index + 1} (${w} × ${h})`);
  toggles("levels", state.levels, names, true);
  toggles("heads", state.heads, Array.from({ length: data.heads }, (_, i) => String(i + 1)), false);
  toggles("tokens", state.tokens, names.map((name) => `level ${name}`), false);
  legend();
  byId("layer").addEventListener("input", (event) => { play(false); setLayer(Number(event.target.value) - 1); });
  byId("play").addEventListener("click", () => play(!state.timer));
  byId("zoom").addEventListener("click", () => { state.zoom = !state.zoom; draw(); });
  byId("others").addEventListener("click", () => { state.others = !state.others; draw(); });
  state.item = state.pinned = data.first;
  state.layer = data.layer ?? item().layers.length - 1;
  draw();
  new ResizeObserver(() => draw()).observe(svg);
}

start();
