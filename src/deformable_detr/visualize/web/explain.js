// The page of an explanation. `data` is written by explanation/html.py.
const state = {
  item: data.first, pinned: data.first, layer: 0, zoom: false, others: true, timer: 0,
  levels: new Set(data.levels.keys()), heads: new Set(Array(data.heads).keys()), tokens: new Set(data.levels.keys()),
};
const viewer = new Viewer(byId("view"), { preview: (index) => select(index ?? state.pinned), pin: (index) => select(index, true) });
const item = () => data.items[state.item];

// [[x, y, weight, level, head, token], …] of a layer: stored as integers in the order (T,) M, L, P.
function unpack({ points }) {
  const L = data.levels.length, P = points.length / 3 / data.heads / L / (item().kind === "point" ? L : 1);
  return Array.from({ length: points.length / 3 }, (_, i) => [
    points[3 * i] / 10, points[3 * i + 1] / 10, points[3 * i + 2] / 10000,
    Math.floor(i / P) % L, Math.floor(i / P / L) % data.heads, Math.floor(i / P / L / data.heads),
  ]);
}

function draw() {
  const { width, height } = data, margin = 0.02, { kind, view, point, layers } = item(), layer = layers[state.layer];
  const area = state.zoom ? view : [-width * margin, -height * margin, width * (1 + 2 * margin), height * (1 + 2 * margin)];
  viewer.setArea(...area);
  viewer.view.style.aspectRatio = `${area[2]} / ${area[3]}`;
  viewer.setActive(state.item);
  viewer.boxes.classList.toggle("alone", !state.others);
  const points = unpack(layer).filter(([, , weight, level, head, token]) =>
    weight >= 0 && state.levels.has(level) && state.heads.has(head) && (kind === "detection" || state.tokens.has(token)));
  const outside = viewer.drawSampling({ reference_point: point, ...layer, points }, maxWeight);
  byId("outside").textContent = outside ? `${outside} of ${points.length} points are outside the visible area; they are drawn pale at its edge.` : "";
  updateControls();
}

function updateControls() {
  const { kind, name, score, point, layers } = item();
  byId("selected").textContent = kind === "detection" ? `${name} ${score.toFixed(2)}` : `Encoder attention at x ${point[0]}, y ${point[1]}`;
  byId("layer").max = layers.length;
  byId("layer").value = state.layer + 1;
  byId("layer-now").textContent = `${state.layer + 1} of ${layers.length}`;
  for (const id of ["levels", "heads", "tokens"])
    for (const [index, chip] of [...byId(id).querySelectorAll("[data-index]")].entries())
      chip.setAttribute("aria-pressed", state[id].has(index));
  for (const chip of byId("detections").children) chip.setAttribute("aria-pressed", Number(chip.dataset.item) === state.item);
  for (const id of ["zoom", "others"]) byId(id).setAttribute("aria-pressed", state[id]);
  const heads = kind === "detection" ? ["Layer", "Score", "Attention inside the box"] : ["Layer", "Mean distance of the attention"];
  const cells = layers.map((layer, index) => kind === "detection"
    ? [index + 1, layer.score.toFixed(2), `${Math.round(layer.share_inside_box * 100)}%`] : [index + 1, `${layer.mean_distance.toFixed(0)} pixels`]);
  byId("layers").replaceChildren(
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...cells.map((values, index) => el("tr", { class: index === state.layer && "now", onclick: () => setLayer(index) },
      ...values.map((value) => el("td", {}, String(value)))))));
}

function select(index, pin = false) {
  if (pin) state.pinned = index;
  if (state.item === index) return;
  state.item = index;
  draw();
}

function setLayer(index) {
  state.layer = index;
  draw();
}

function play(on) {
  clearInterval(state.timer);
  state.timer = on ? setInterval(() => setLayer((state.layer + 1) % item().layers.length), 900) : 0;
  byId("play").setAttribute("aria-pressed", on);
  byId("play").textContent = on ? "Stop" : "Play";
}

// Chips that show or hide the members of state[id], and two for all and none of them.
function addToggles(id, labels, icon = () => null) {
  const members = state[id], change = (action) => () => { action(); draw(); };
  byId(id).append(
    ...labels.map((label, index) => button({ "data-index": index,
      onclick: change(() => members.has(index) ? members.delete(index) : members.add(index)) }, icon(index), label)),
    button({ class: "link", onclick: change(() => labels.forEach((_, index) => members.add(index))) }, "all"),
    button({ class: "link", onclick: change(() => members.clear()) }, "none"));
}

const isPoint = data.items[0].kind === "point";
const allLayers = data.items.flatMap(({ layers }) => layers);
const maxWeight = allLayers.reduce((most, { points }) => points.reduce((max, value, i) => i % 3 === 2 && value > max ? value : max, most), 1) / 10000;
byId("facts").textContent = isPoint ? "The points that the encoder sampled for one point of the image."
  : "Hover over a box to see the points that the decoder sampled for it. Click to keep it selected.";
viewer.view.prepend(svg("image", { href: data.image, width: data.width, height: data.height, preserveAspectRatio: "none" }));
const detections = isPoint ? [] : data.items.map((one, index) => ({ ...one, index, color: "#56b4e9" }));
viewer.setBoxes(detections);
byId("detections").append(...detections.map(({ name, score, index }) =>
  button({ "data-item": index, onclick: () => select(index, true) }, `${name} ${score.toFixed(2)}`)));
byId("found").hidden = byId("others").hidden = isPoint;
byId("from").hidden = !isPoint;
const levels = data.levels.map(([h, w], index) => `${index + 1} (${w} × ${h})`);
addToggles("levels", levels, (level) => svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" },
  svg("path", { d: marker(level, 0, 0, 5.6), fill: "currentColor" })));
addToggles("heads", Array.from({ length: data.heads }, (_, head) => String(head + 1)));
addToggles("tokens", levels.map((name) => `level ${name}`));
drawLegend(byId("legend"), allLayers.find((layer) => layer.reference_box) ?? allLayers[0], maxWeight);
byId("layer").addEventListener("input", (event) => { play(false); setLayer(Number(event.target.value) - 1); });
byId("play").addEventListener("click", () => play(!state.timer));
for (const id of ["zoom", "others"]) byId(id).addEventListener("click", () => { state[id] = !state[id]; draw(); });
setLayer(data.layer ?? item().layers.length - 1);
new ResizeObserver(draw).observe(viewer.view);
