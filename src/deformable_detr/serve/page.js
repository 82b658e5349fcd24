"use strict";
const MIN_SCORE = 0.05, MAX_DETECTIONS = 100, MAX_EXPLAINED = 50, MAX_SENT_PIXELS = 12e6;
// Okabe and Ito's colors, readable with any color vision; further classes reuse them.
const COLORS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];

const state = {
  model: null, file: null, name: "", result: null, explanations: null, hidden: new Set(), active: -1, pinned: -1, layer: -1,
  request: null, camera: null, imageUrl: "", scale: [1, 1], // pixels of the chosen image per pixel of the sent one, which all positions refer to
};
const selection = {
  preview: (index) => select(index ?? state.pinned),
  pin: (index) => select(index === state.pinned ? -1 : index, true),
};
const viewer = new Viewer(byId("view"), selection);
viewer.names = svg("g", { id: "names" });
viewer.view.append(viewer.names);

const color = (label) => COLORS[label % COLORS.length];
const threshold = () => Number(byId("score").value);
const detections = () => state.result?.detections ?? [];
const visible = () => [...detections().entries()].filter(([, { score, label }]) => score >= threshold() && !state.hidden.has(label));

function swatch(label) {
  const icon = el("i");
  icon.style.background = color(label);
  return icon;
}

function showStatus(text, isError = false) {
  byId("status").textContent = isError ? "" : text;
  byId("error").textContent = isError ? text : "";
}

/** JSON from the server; throws an Error with its message. */
async function request(path, options = {}) {
  const token = sessionStorage.getItem("token"), headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not respond.");
  }
  if (response.ok) return response.json();
  if (response.status === 401) {
    byId("access").hidden = false;
    throw new Error("This server needs an access token.");
  }
  const { detail } = await response.json().catch(() => ({}));
  throw new Error(detail || `The server responded with status ${response.status}.`);
}

async function connect() {
  try {
    state.model = await request("v1/model");
  } catch (error) {
    showStatus(error.message, true);
    return;
  }
  const { name, classes, formats } = state.model;
  byId("model").textContent = `${name}, ${classes.length} ${classes.length === 1 ? "class" : "classes"}`;
  byId("file").accept = formats.join(",") + ",image/*";
  byId("access").hidden = true;
  showStatus("");
}

/** The content of the file, or a JPEG of it if the server would refuse it, and `scale`. */
async function prepare(file) {
  const { formats, limits } = state.model;
  // A copy of the bytes: a file that changes later could not be sent again.
  if (formats.includes(file.type) && file.size <= limits.body_bytes)
    return { file: new Blob([await file.arrayBuffer()], { type: file.type }), scale: [1, 1] };
  const bitmap = await createImageBitmap(file), { width, height } = bitmap;
  const shrink = Math.min(1, Math.sqrt(MAX_SENT_PIXELS / (width * height)));
  const size = [width, height].map((side) => Math.max(1, Math.round(side * shrink)));
  const jpeg = await toJpeg(bitmap, ...size);
  bitmap.close();
  return { file: jpeg, scale: [width / size[0], height / size[1]] };
}

function toJpeg(source, width, height) {
  const canvas = el("canvas", { width, height });
  canvas.getContext("2d").drawImage(source, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

const send = (path, signal) =>
  request(path, { method: "POST", body: state.file, headers: { "Content-Type": state.file.type }, signal });

async function detect(file, name) {
  if (!state.model) await connect();
  if (!state.model) return;
  state.request?.abort();
  const controller = (state.request = new AbortController());
  stopCamera();
  Object.assign(state, { result: null, explanations: null, active: -1, pinned: -1, layer: -1, name: name || file.name || "image" });
  state.hidden.clear();
  byId("side").hidden = true;
  byId("download").disabled = true;
  byId("busy").hidden = false;
  drawBoxes();
  drawMasks();
  showStatus("Detecting objects…");
  try {
    const prepared = await prepare(file).catch(() => { throw new Error("The browser cannot read this file as an image."); });
    if (state.request !== controller) return; // another image was chosen meanwhile
    Object.assign(state, prepared);
    showImage(state.file);
    const response = await send(`v1/detect?threshold=${MIN_SCORE}&top_k=${MAX_DETECTIONS}`, controller.signal);
    state.result = response.images[0];
    byId("image").alt = state.name;
    byId("side").hidden = false;
    byId("download").disabled = false;
    draw();
  } catch (error) {
    if (error.name !== "AbortError" && state.request === controller) showStatus(error.message, true);
  } finally {
    if (state.request === controller) byId("busy").hidden = true;
  }
}

function showImage(file) {
  if (state.imageUrl) URL.revokeObjectURL(state.imageUrl);
  state.imageUrl = URL.createObjectURL(file);
  const image = byId("image");
  image.onload = () => byId("picture").style.setProperty("--aspect", image.naturalWidth / image.naturalHeight);
  image.src = state.imageUrl;
  byId("empty").hidden = true;
  byId("picture").hidden = false;
}

/** Requests the explanations of an image once, on the first selection. */
async function explain() {
  if (state.explanations || !state.model.explains) return;
  const result = state.result;
  state.explanations = { detections: [] };
  try {
    const response = await send(`v1/explain?threshold=${MIN_SCORE}&top_k=${MAX_EXPLAINED}`, state.request.signal);
    if (state.result !== result) return;
    state.explanations = response;
    update();
  } catch (error) {
    if (state.result === result && error.name !== "AbortError") {
      state.explanations = null; // the next selection tries again
      showStatus(error.message, true);
    }
  }
}

/** The explanation of a detection: the one with the same class and box. */
function explanationOf(index) {
  const detection = detections()[index];
  if (!detection || !state.explanations) return null;
  const distance = ({ box }) => Math.max(...box.map((side, i) => Math.abs(side - detection.box[i])));
  const [best] = state.explanations.detections.filter(({ label }) => label === detection.label).sort((a, b) => distance(a) - distance(b));
  return best && distance(best) < 1 ? best : null;
}

function select(index, pin = false) {
  if (pin) state.pinned = index;
  if (state.active === index && !pin) return;
  state.active = index;
  if (index >= 0) explain();
  update();
}

function drawBoxes() {
  viewer.setBoxes(visible().map(([index, { box, label }]) => ({ index, box, color: color(label) })));
  viewer.names.replaceChildren();
  viewer.drawSampling(null);
}

/** The masks of the visible detections, or of the selected one, so that its sampling points stay visible. */
function drawMasks() {
  const canvas = byId("masks"), { clientWidth, clientHeight } = viewer.view, ratio = devicePixelRatio;
  const items = visible().filter(([, { mask }]) => mask).map(([index, { mask, box, label }]) => ({ index, mask, box, color: color(label) }));
  const shades = shade(items), isOn = byId("show-masks").getAttribute("aria-pressed") === "true";
  const shown = items.filter(({ index }) => isOn && (state.active < 0 || index === state.active));
  Object.assign(canvas, { width: clientWidth * ratio, height: clientHeight * ratio });
  paintMasks(canvas, shown.map((item) => ({ mask: item.mask, color: shades.get(item), opacity: FILL })), Math.ceil(1.5 * ratio));
  viewer.view.classList.toggle("masked", shown.length > 0);
  byId("overlay").hidden = !detections().some(({ mask }) => mask);
}

function draw() {
  if (!state.result) return;
  viewer.setArea(0, 0, state.result.width, state.result.height);
  if (!visible().some(([index]) => index === state.active)) state.active = state.pinned = -1;
  drawBoxes();
  update();
}

/** Updates what depends on the selection. The boxes stay, because replacing them would end the hover. */
function update() {
  const explanation = explanationOf(state.active);
  viewer.setActive(state.active);
  drawMasks();
  drawExplanation(explanation);
  drawNames();
  drawClasses();
  drawList();
  byId("score-now").textContent = threshold().toFixed(2);
  const count = visible().length, rest = detections().length - count;
  const hint = count && state.model.explains ? " Hover over one or select it to see the points that the model sampled." : "";
  const others = rest ? ` ${rest} more with lower scores or of hidden classes.` : "";
  if (!byId("error").textContent) showStatus(`${count || "No"} ${count === 1 ? "object" : "objects"} found.${others}${hint}`);
}

function drawExplanation(explanation) {
  byId("layers").hidden = !explanation;
  if (!explanation) {
    viewer.drawSampling(null);
    return;
  }
  const { layers } = explanation, index = state.layer < 0 ? layers.length - 1 : state.layer, layer = layers[index];
  const maxWeight = Math.max(...layers.flatMap(({ points }) => points.map(([, , weight]) => weight)));
  viewer.drawSampling(layer, maxWeight);
  drawLegend(byId("legend"), layers.at(-1), maxWeight);
  byId("layer").max = layers.length;
  byId("layer").value = index + 1;
  byId("layer-now").textContent = `${index + 1} of ${layers.length}`;
  byId("share").textContent = `${Math.round(layer.share_inside_box * 100)}% of the attention is inside the box.`;
}

/** Names where there is room, the best first; that of the active box always. */
function drawNames() {
  const { width, height } = state.result, unit = viewer.unit, size = 13 * unit, taken = [];
  viewer.names.replaceChildren();
  for (const [index, { name, score, box: [x1, y1, , y2] }] of visible()) {
    if (state.active >= 0 && index !== state.active) continue;
    const text = svg("text", { "font-size": size, fill: WHITE, stroke: DARK, "stroke-width": 3.5 * unit, "stroke-linejoin": "round" },
      `${name} ${score.toFixed(2)}`);
    viewer.names.append(text);
    const fullLength = text.getBBox().width, length = Math.min(fullLength, width - 5 * unit);
    if (length < fullLength) text.setAttribute("font-size", (size * length) / fullLength);
    const left = Math.max(2 * unit, Math.min(x1, width - length - 3 * unit));
    const above = y1 - 4 * unit, below = y2 + size, inside = y1 + size + 3 * unit;
    const bottom = above - size >= 0 ? above : below + 4 * unit <= height ? below : inside;
    const place = [left, bottom - size, left + length, bottom + 0.25 * size];
    const isFree = taken.every((other) => place[0] > other[2] || other[0] > place[2] || place[1] > other[3] || other[1] > place[3]);
    if (!isFree) { text.remove(); continue; }
    taken.push(place);
    text.setAttribute("x", left);
    text.setAttribute("y", bottom);
  }
}

/** Calls build() when the key of the list has changed, so that focus and hover survive other updates. */
function rebuild(list, key, build) {
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...build());
}

function drawList() {
  const list = byId("found"), focused = document.activeElement?.closest("#found button")?.dataset.item;
  rebuild(list, [state.imageUrl, ...visible().map(([index]) => index)].join(), () => visible().map(([index, { name, label, score }]) => {
    const entry = selectable(button({ "data-item": index }, swatch(label), `${name} ${score.toFixed(2)}`), index, selection);
    entry.addEventListener("focus", () => { if (entry.matches(":focus-visible")) selection.preview(index); });
    entry.addEventListener("blur", () => selection.preview(null));
    return entry;
  }));
  if (focused !== undefined && !list.contains(document.activeElement)) list.querySelector(`[data-item="${focused}"]`)?.focus();
  for (const entry of list.children) entry.setAttribute("aria-pressed", Number(entry.dataset.item) === state.pinned);
}

function drawClasses() {
  const names = new Map(detections().map(({ label, name }) => [label, name])), labels = [...names.keys()].sort((a, b) => a - b);
  const change = (action) => () => { action(); draw(); };
  rebuild(byId("classes"), [state.imageUrl, ...labels].join(), () => [
    ...labels.map((label) => button({ "data-label": label,
      onclick: change(() => state.hidden.has(label) ? state.hidden.delete(label) : state.hidden.add(label)) },
    swatch(label), names.get(label), " ", el("b"))),
    ...(labels.length > 1 ? [button({ onclick: change(() => state.hidden.clear()) }, "all"),
      button({ onclick: change(() => { state.hidden = new Set(labels); }) }, "none")] : []),
  ]);
  for (const chip of byId("classes").querySelectorAll("[data-label]")) {
    const label = Number(chip.dataset.label);
    chip.setAttribute("aria-pressed", !state.hidden.has(label));
    chip.querySelector("b").textContent = detections().filter((one) => one.label === label && one.score >= threshold()).length;
  }
}

/** The visible detections in pixels of the chosen image. */
function results() {
  const convert = (values) => values.map((value, i) => Number((value * state.scale[i % 2]).toFixed(2)));
  const [width, height] = convert([state.result.width, state.result.height]).map(Math.round);
  const shown = visible().map(([, detection]) => ({ ...detection, box: convert(detection.box) }));
  return { image: state.name, model: state.model.name, threshold: threshold(), height, width, detections: shown };
}

function download() {
  const href = URL.createObjectURL(new Blob([JSON.stringify(results(), null, 2) + "\n"], { type: "application/json" }));
  el("a", { href, download: `${state.name.replace(/\.[^.]*$/, "")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

async function startCamera() {
  if (!navigator.mediaDevices?.getUserMedia) { byId("snap").click(); return; }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    stopCamera(); // of a second click during the permission prompt
    state.camera = stream;
  } catch (error) {
    showStatus(error.name === "NotAllowedError" ? "The browser does not allow access to the camera." : "No camera found.", true);
    return;
  }
  byId("video").srcObject = state.camera;
  await byId("video").play();
  showCamera(true);
  showStatus("");
}

function showCamera(on) {
  for (const id of ["shoot", "cancel", "video"]) byId(id).hidden = !on;
  for (const id of ["choose", "camera"]) byId(id).hidden = on;
  byId("empty").hidden = on || Boolean(state.imageUrl);
  byId("picture").hidden = on || !state.imageUrl;
  byId(on ? "shoot" : "camera").focus();
}

function stopCamera() {
  if (!state.camera) return;
  for (const track of state.camera.getTracks()) track.stop();
  state.camera = null;
  byId("video").srcObject = null;
  showCamera(false);
}

async function takePhoto() {
  const video = byId("video");
  detect(await toJpeg(video, video.videoWidth, video.videoHeight), "camera.jpg");
}

/** Detects in the first image of a drop or a paste. */
function take(transfer) {
  const file = [...(transfer?.files || [])].find(({ type }) => type.startsWith("image/"));
  if (file) detect(file);
  else showStatus("This is not an image file.", true);
}

byId("choose").addEventListener("click", () => byId("file").click());
for (const id of ["file", "snap"]) byId(id).addEventListener("change", ({ target }) => {
  if (target.files.length) detect(target.files[0]);
  target.value = "";
});
byId("camera").addEventListener("click", startCamera);
byId("shoot").addEventListener("click", takePhoto);
byId("cancel").addEventListener("click", stopCamera);
byId("download").addEventListener("click", download);
byId("score").addEventListener("input", draw);
byId("show-masks").addEventListener("click", ({ target }) => {
  target.setAttribute("aria-pressed", target.getAttribute("aria-pressed") !== "true");
  drawMasks();
});
byId("layer").addEventListener("input", ({ target }) => { state.layer = Number(target.value) - 1; update(); });
byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  connect();
});
document.addEventListener("paste", (event) => { if (event.clipboardData?.files.length) take(event.clipboardData); });
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  const isOver = kind === "dragenter" || kind === "dragover" || (kind === "dragleave" && event.relatedTarget);
  byId("frame").classList.toggle("over", Boolean(isOver));
  if (kind === "drop") take(event.dataTransfer);
});
new ResizeObserver(draw).observe(viewer.view);
connect();
