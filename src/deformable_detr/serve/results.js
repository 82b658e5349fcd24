"use strict";
// What the page shows of the results of an image, and what it saves of them.
const DASHES = [null, "7 4", "2 3", "10 3 2 3"], MAX_MASK_SIDE = 2400; // pixels of the canvas

const threshold = () => Number(byId("score").value);
const detections = () => state.image?.result?.detections ?? [];
const visible = () => [...detections().entries()].filter(([, { score, label }]) => score >= threshold() && !state.hidden.has(label));
const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);

/** Color and dashes of a class: with at most as many classes as colors, those of drawings; else in order of appearance. */
function styleOf(label) {
  const { styles, model } = state, count = PALETTE.length;
  if (!styles.has(label)) styles.set(label, model.classes.length > count ? styles.size : label);
  const number = styles.get(label);
  return { color: PALETTE[number % count], dash: DASHES[Math.floor(number / count) % DASHES.length] };
}

function swatch(label) {
  const { color, dash } = styleOf(label), box = { x: 2, y: 2, width: 22, height: 12, fill: color, "fill-opacity": 0.35 };
  return svg("svg", { viewBox: "0 0 26 16", class: "swatch", "aria-hidden": "true" },
    svg("rect", { ...box, stroke: DARK, "stroke-width": 4 }), svg("rect", { ...box, stroke: color, "stroke-width": 3, "stroke-dasharray": dash }));
}

/** Black or white, whichever has more contrast to the color (relative luminance as in WCAG 2). */
function ink(color) {
  const [red, green, blue] = rgb(color).map((value) => value / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}

function draw() {
  const { image } = state;
  if (image?.result) viewer.setArea(0, 0, image.result.width, image.result.height);
  if (!visible().some(([index]) => index === state.active)) state.active = state.pinned = -1;
  viewer.setBoxes(visible().map(([index, { box, label }]) => ({ index, box, ...styleOf(label) })));
  update();
}

/** Updates what depends on the selection and the zoom. The boxes stay, because replacing them would end the hover. */
function update() {
  viewer.setActive(state.active);
  drawMasks();
  if (!state.image?.result) { viewer.drawSampling(null); labels.replaceChildren(); return; }
  drawExplanation(explanationOf(state.active));
  drawClasses();
  drawList();
  byId("score-now").textContent = threshold().toFixed(2);
  showSummary(drawLabels());
}

function showSummary(unlabeled) {
  if (byId("error").textContent) return;
  const count = visible().length, rest = detections().length - count;
  const parts = [`${count || "No"} ${count === 1 ? "object" : "objects"} found in ${state.image.seconds.toFixed(2)} s.`];
  if (rest) parts.push(`${rest} more with lower scores or of hidden classes.`);
  if (unlabeled) parts.push("Zoom in to see all labels.");
  if (count && state.model.explains) parts.push(`${HAS_MOUSE ? "Hover over a box or select it" : "Tap a box"} to see the points that the model sampled.`);
  showStatus(parts.join(" "));
}

/** The masks of the visible detections, or of the selected one, so that its sampling points stay visible. */
function shownMasks(active) {
  const items = visible().filter(([, { mask }]) => mask).map(([index, { mask, box, label }]) => ({ index, mask, box, color: styleOf(label).color }));
  const shades = shade(items), isOn = byId("show-masks").getAttribute("aria-pressed") === "true";
  return items.filter(({ index }) => isOn && (active < 0 || index === active))
    .map((item) => ({ mask: item.mask, color: shades.get(item), opacity: OPACITY }));
}

function drawMasks() {
  const canvas = byId("masks"), { clientWidth, clientHeight } = viewer.view, masks = shownMasks(state.active);
  const ratio = Math.min(devicePixelRatio, MAX_MASK_SIDE / Math.max(clientWidth, clientHeight));
  Object.assign(canvas, { width: clientWidth * ratio, height: clientHeight * ratio });
  paintMasks(canvas, masks, Math.ceil(1.5 * ratio));
  viewer.view.classList.toggle("masked", masks.length > 0);
  byId("overlay").hidden = !detections().some(({ mask }) => mask);
}

function drawExplanation(explanation) {
  byId("layers").hidden = !explanation;
  if (!explanation) { viewer.drawSampling(null); return; }
  const { layers } = explanation, index = state.layer < 0 ? layers.length - 1 : state.layer, layer = layers[index];
  const maxWeight = Math.max(...layers.flatMap(({ points }) => points.map(([, , weight]) => weight)));
  viewer.drawSampling(layer, maxWeight);
  drawLegend(byId("legend"), layers.at(-1), maxWeight);
  byId("layer").max = layers.length;
  byId("layer").value = index + 1;
  byId("layer-now").textContent = `${index + 1} of ${layers.length}`;
  byId("share").textContent = `${Math.round(layer.share_inside_box * 100)}% of the attention is inside the box.`;
}

/** Labels inside a part of the picture, the selected and the best first. unit: image pixels per pixel of the label. */
function placeLabels(unit, part) {
  const placed = [], [left, top, right, bottom] = part;
  let unlabeled = 0;
  for (const [index, { name, score, label, box }] of visible().sort(([a], [b]) => (b === state.active) - (a === state.active))) {
    const [x1, y1, x2, y2] = box.map((side) => side / unit), inside = [Math.max(x1, left), Math.max(y1, top), Math.min(x2, right), Math.min(y2, bottom)];
    if (inside[0] >= inside[2] || inside[1] >= inside[3]) continue;
    const one = placeLabel(name, ` ${score.toFixed(2)}`, inside, part, placed.map(({ place }) => place));
    if (one.place) placed.push({ ...one, index, color: styleOf(label).color });
    else unlabeled++;
  }
  return { placed, unlabeled };
}

/** Draws labels on the part of the picture that the frame shows; returns how many have no room. */
function drawLabels() {
  const frame = byId("frame").getBoundingClientRect(), picture = viewer.view.getBoundingClientRect();
  const part = [Math.max(frame.left - picture.left, 0), Math.max(frame.top - picture.top, 0),
    Math.min(frame.right - picture.left, picture.width), Math.min(frame.bottom - picture.top, picture.height)];
  const { placed, unlabeled } = placeLabels(viewer.unit, part);
  labels.replaceChildren(...placed.map((one) => {
    const label = labelElement(one, one.color, ink(one.color), viewer.unit);
    label.classList.toggle("active", one.index === state.active);
    return label;
  }));
  return unlabeled;
}

/** Calls build() when the key of the list has changed, so that focus and hover survive other updates. */
function rebuild(list, key, build) {
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...build());
}

function drawList() {
  const list = byId("found"), focused = document.activeElement?.closest("#found button")?.dataset.item;
  rebuild(list, [state.image.url, ...visible().map(([index]) => index)].join(), () => visible().map(([index, { name, label, score }]) => {
    const entry = selectable(button({ "data-item": index }, swatch(label), `${name} ${score.toFixed(2)}`), index, selection);
    entry.addEventListener("focus", () => { if (entry.matches(":focus-visible")) selection.preview(index); });
    entry.addEventListener("blur", () => selection.preview(null));
    return entry;
  }));
  if (focused !== undefined && !list.contains(document.activeElement)) list.querySelector(`[data-item="${focused}"]`)?.focus();
  for (const entry of list.children) entry.setAttribute("aria-pressed", Number(entry.dataset.item) === state.pinned);
}

/** Chips of the classes with a score over the minimum. */
function drawClasses() {
  const counts = new Map(), change = (action) => () => { action(); draw(); };
  for (const { label, score } of detections()) if (score >= threshold()) counts.set(label, (counts.get(label) ?? 0) + 1);
  const classes = [...counts.keys()].sort((a, b) => a - b);
  rebuild(byId("classes"), classes.join(), () => [
    ...classes.map((label) => button({ "data-label": label,
      onclick: change(() => state.hidden.has(label) ? state.hidden.delete(label) : state.hidden.add(label)) },
    swatch(label), state.model.classes[label].name, " ", el("b"))),
    ...(classes.length > 1 ? [button({ class: "link", onclick: change(() => state.hidden.clear()) }, "all"),
      button({ class: "link", onclick: change(() => { state.hidden = new Set(classes); }) }, "none")] : []),
  ]);
  for (const chip of byId("classes").querySelectorAll("[data-label]")) {
    const label = Number(chip.dataset.label);
    chip.setAttribute("aria-pressed", !state.hidden.has(label));
    chip.querySelector("b").textContent = counts.get(label);
  }
}

/** The visible detections in pixels of the chosen image. */
function results() {
  const { name, result, scale } = state.image, convert = (values) => values.map((value, i) => Number((value * scale[i % 2]).toFixed(2)));
  const [width, height] = convert([result.width, result.height]).map(Math.round);
  const shown = visible().map(([, detection]) => ({ ...detection, box: convert(detection.box) }));
  return { image: name, model: state.model.name, threshold: threshold(), height, width, detections: shown };
}

/** The picture with the visible masks, boxes and labels, at the size of the sent image. */
function annotated() {
  const { width, height } = state.image.result, unit = Math.max(1, Math.sqrt(width * height) / 450), masks = shownMasks(-1);
  const [canvas, layer] = [0, 1].map(() => el("canvas", { width, height })), pen = canvas.getContext("2d"), line = masks.length ? 1 : 2;
  paintMasks(layer, masks, Math.ceil(1.5 * unit));
  for (const one of [byId("image"), layer]) pen.drawImage(one, 0, 0, width, height);
  for (const [, { box, label }] of visible().sort(([, a], [, b]) => area(b.box) - area(a.box))) {
    const { color, dash } = styleOf(label), [x1, y1, x2, y2] = box;
    for (const [strokeStyle, thickness, dashes] of [[DARK, line + 2, ""], [color, line, dash ?? ""]]) {
      Object.assign(pen, { strokeStyle, lineWidth: thickness * unit });
      pen.setLineDash(dashes.split(" ").map((length) => length * unit).filter(Boolean));
      pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
  }
  pen.scale(unit, unit);
  pen.font = BOLD;
  for (const { text, color, place: [x1, y1, x2, y2] } of placeLabels(unit, [0, 0, width / unit, height / unit]).placed) {
    pen.fillStyle = color;
    pen.fillRect(x1, y1, x2 - x1, y2 - y1);
    pen.fillStyle = ink(color);
    pen.fillText(text, x1 + PAD, y1 + 12);
  }
  return canvas;
}

function save(blob, ending) {
  const href = URL.createObjectURL(blob);
  el("a", { href, download: state.image.name.replace(/\.[^.]*$/, "") + ending }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

const saveJson = () => save(new Blob([JSON.stringify(results(), null, 2) + "\n"], { type: "application/json" }), ".json");

async function savePicture() {
  const isPng = state.image.file.type === "image/png";
  save(await toBlob(annotated(), isPng ? "image/png" : "image/jpeg"), `-detections.${isPng ? "png" : "jpg"}`);
}
