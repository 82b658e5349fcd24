"use strict";
const byId = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const LOWEST = 0.05, MOST = 100, EXPLAINED = 50;
// Okabe and Ito's colors, which differ for any color vision; classes beyond them start again.
const COLORS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

const state = {
  facts: null, file: null, name: "", result: null, looks: null, hidden: new Set(), active: -1, pinned: -1, layer: -1,
  request: null, camera: null, address: "", grown: [1, 1], // pixels of the chosen image in one of the image that is sent
};

const color = (label) => COLORS[label % COLORS.length];
const threshold = () => Number(byId("score").value);
const all = () => (state.result ? state.result.detections : []);
const shown = () => [...all().entries()].filter(([, one]) => one.score >= threshold() && !state.hidden.has(one.label));

function make(name, attributes, parent) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function button(parent, act, ...content) {
  const element = document.createElement("button");
  element.type = "button";
  element.append(...content);
  element.addEventListener("click", act);
  parent.append(element);
  return element;
}

function swatch(label) {
  const sign = document.createElement("i");
  sign.style.background = color(label);
  return sign;
}

function say(text, wrong = false) {
  byId("status").textContent = wrong ? "" : text;
  byId("error").textContent = wrong ? text : "";
}

class Refusal extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** JSON of the server's; Refusal with its one line where it says no. */
async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer.");
  }
  if (response.status === 401) byId("access").hidden = false;
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    const detail = response.status === 401 ? "This server needs its token." : problem.detail;
    throw new Refusal(response.status, detail || `The server answered ${response.status}.`);
  }
  return response.json();
}

async function meet() {
  try {
    state.facts = await ask("v1/model");
  } catch (error) {
    say(error.message, true);
    return;
  }
  const count = state.facts.classes.length;
  byId("model").textContent = `${state.facts.name}, ${count} ${count === 1 ? "class" : "classes"}`;
  byId("file").accept = state.facts.formats.join(",") + ",image/*";
  byId("access").hidden = true;
  say("");
}

/** The file's content, or where the server would not take it a JPEG of it; and `grown`. */
async function ready(file) {
  const { formats, limits } = state.facts;
  // Its bytes as they are now: a file that is written to later cannot be sent a second time.
  if (formats.includes(file.type) && file.size <= limits.body_bytes) {
    return { content: new Blob([await file.arrayBuffer()], { type: file.type }), grown: [1, 1] };
  }
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, Math.sqrt(12e6 / (bitmap.width * bitmap.height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const grown = [bitmap.width / canvas.width, bitmap.height / canvas.height];
  bitmap.close();
  return { content: await new Promise((keep) => canvas.toBlob(keep, "image/jpeg", 0.92)), grown };
}

/** An answer of the server's in pixels of the image that was chosen, where a smaller one was sent. */
function enlarged(answer) {
  const [wide, high] = state.grown;
  if (wide === 1 && high === 1) return answer;
  const place = (values) => values && values.map((value, i) => Number((value * (i % 2 ? high : wide)).toFixed(2)));
  const layer = (one) => ({
    ...one, reference_point: place(one.reference_point), reference_box: place(one.reference_box), box: place(one.box),
    points: one.points.map(([x, y, ...rest]) => [...place([x, y]), ...rest]),
  });
  const detection = (one) => ({ ...one, box: place(one.box), ...(one.layers && { layers: one.layers.map(layer) }) });
  return {
    ...answer, width: Math.round(answer.width * wide), height: Math.round(answer.height * high),
    detections: answer.detections.map(detection),
  };
}

const send = (path, signal) =>
  ask(path, { method: "POST", body: state.file, headers: { "Content-Type": state.file.type }, signal });

async function detect(file, name) {
  if (!state.facts) await meet();
  if (!state.facts) return;
  state.request?.abort();
  const request = (state.request = new AbortController());
  stopCamera();
  Object.assign(state, { result: null, looks: null, active: -1, pinned: -1, layer: -1, name: name || file.name || "image" });
  state.hidden.clear();
  byId("side").hidden = true;
  byId("download").disabled = true;
  byId("boxes").replaceChildren();
  byId("busy").hidden = false;
  say("Looking for objects…");
  try {
    let made;
    try {
      made = await ready(file);
    } catch {
      throw new Refusal(0, "This is no image that the browser can read.");
    }
    if (state.request !== request) return;  // another image was chosen meanwhile
    Object.assign(state, { file: made.content, grown: made.grown });
    show(state.file);
    const answer = await send(`v1/detect?threshold=${LOWEST}&top_k=${MOST}`, request.signal);
    state.result = enlarged(answer.images[0]);
    byId("image").alt = `${state.name}, ${state.result.width} × ${state.result.height} pixels`;
    byId("side").hidden = false;
    byId("download").disabled = false;
    draw();
  } catch (error) {
    if (error.name !== "AbortError" && state.request === request) say(error.message, true);
  } finally {
    if (state.request === request) byId("busy").hidden = true;
  }
}

function show(file) {
  if (state.address) URL.revokeObjectURL(state.address);
  state.address = URL.createObjectURL(file);
  const image = byId("image");
  image.onload = () => byId("picture").style.setProperty("--aspect", image.naturalWidth / image.naturalHeight);
  image.src = state.address;
  byId("empty").hidden = true;
  byId("picture").hidden = false;
}

/** Asks once an image where the model looked; hovering waits for it. */
async function look() {
  if (state.looks || !state.facts.explains) return;
  const result = state.result;
  state.looks = { detections: [] };
  try {
    const looks = await send(`v1/explain?threshold=${LOWEST}&top_k=${EXPLAINED}`, state.request.signal);
    if (state.result !== result) return;
    state.looks = enlarged(looks);
    highlight();
  } catch (error) {
    if (state.result === result && error.name !== "AbortError") {
      state.looks = null; // the next hover asks again
      say(error.message, true);
    }
  }
}

/** The explanation of a detection: the same class in the same place. */
function explained(index) {
  const one = all()[index];
  if (!one || !state.looks) return null;
  const near = (other) => Math.max(...other.box.map((side, i) => Math.abs(side - one.box[i])));
  const same = state.looks.detections.filter((other) => other.label === one.label);
  const best = same.sort((a, b) => near(a) - near(b))[0];
  return best && near(best) < 1 ? best : null;
}

function draw() {
  if (!state.result) return;
  const { width, height } = state.result, svg = byId("boxes");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const unit = width / Math.max(svg.clientWidth, 1); // image pixels a screen pixel
  svg.replaceChildren();
  const visible = shown();
  if (!visible.some(([index]) => index === state.active)) state.active = state.pinned = -1;
  // Small boxes on top, so that each can be reached.
  const area = ([, { box }]) => (box[2] - box[0]) * (box[3] - box[1]);
  for (const [index, one] of [...visible].sort((a, b) => area(b) - area(a))) {
    const [x1, y1, x2, y2] = one.box, active = index === state.active;
    const place = { x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0) };
    const group = make("g", { class: "hit", "data-item": index, opacity: state.active >= 0 && !active ? 0.35 : 1 }, svg);
    make("rect", { ...place, fill: "transparent", "pointer-events": "all" }, group);
    make("rect", { ...place, fill: "none", stroke: "#111111", "stroke-width": (active ? 5 : 4) * unit }, group);
    make("rect", { ...place, fill: "none", stroke: color(one.label), "stroke-width": (active ? 3 : 2) * unit }, group);
    group.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") choose(index, false); });
    group.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") choose(state.pinned, false); });
    group.addEventListener("click", () => choose(index === state.pinned ? -1 : index, true));
  }
  const chosen = explained(state.active);
  if (chosen) drawPoints(chosen, unit);
  drawNames(visible, unit, width, height);
  report(visible, chosen);
}

/** Names where there is room, the best first; that of the active box always. */
function drawNames(visible, unit, width, height) {
  const taken = [];
  const order = [...visible].sort(([a], [b]) => (b === state.active) - (a === state.active) || a - b);
  for (const [index, one] of order) {
    if (state.active >= 0 && index !== state.active) continue;
    const [x1, y1, , y2] = one.box, size = 13 * unit;
    const text = make("text", {
      x: 0, y: 0, "font-size": size, fill: "#ffffff", stroke: "#111111", "stroke-width": 3.5 * unit, "stroke-linejoin": "round",
    }, byId("boxes"));
    text.textContent = `${one.name} ${one.score.toFixed(2)}`;
    const full = text.getBBox().width, long = Math.min(full, width - 5 * unit), high = size * 1.25;
    if (long < full) text.setAttribute("font-size", (size * long) / full);
    const left = Math.max(2 * unit, Math.min(x1, width - long - 3 * unit));
    const above = y1 - 4 * unit, below = y2 + size, inside = y1 + size + 3 * unit;
    const bottom = above - size >= 0 ? above : below + 4 * unit <= height ? below : inside;
    const box = [left, bottom - size, left + long, bottom - size + high];
    const free = taken.every((other) => box[0] > other[2] || other[0] > box[2] || box[1] > other[3] || other[1] > box[3]);
    if (!free && index !== state.active) { text.remove(); continue; }
    taken.push(box);
    text.setAttribute("x", left);
    text.setAttribute("y", bottom);
  }
}

function drawPoints(chosen, unit) {
  const layer = layerOf(chosen), svg = byId("boxes"), heaviest = heaviestOf(chosen);
  const group = make("g", { id: "points", "pointer-events": "none" }, svg);
  for (const [x, y, weight] of [...layer.points].sort((a, b) => a[2] - b[2])) {
    const part = weight / heaviest, tone = Math.sqrt(part);
    make("circle", {
      cx: x, cy: y, r: (1.5 + 5 * tone) * unit, fill: viridis(tone), stroke: tone > 0.5 ? "#111111" : "#f2f2f2",
      "stroke-width": 0.8 * unit, class: "point",
    }, group);
  }
  const [x, y] = layer.reference_point, arm = 7 * unit;
  const cross = `M${x - arm},${y}h${2 * arm}M${x},${y - arm}v${2 * arm}`;
  make("path", { d: cross, stroke: "#111111", "stroke-width": 5 * unit, fill: "none" }, group);
  make("path", { d: cross, stroke: "#ffffff", "stroke-width": 2.5 * unit, fill: "none" }, group);
}

const layerOf = (chosen) => chosen.layers[state.layer < 0 ? chosen.layers.length - 1 : state.layer];
const heaviestOf = (chosen) => Math.max(...chosen.layers.flatMap((layer) => layer.points.map((point) => point[2])));

function viridis(part) {
  const at = Math.min(Math.max(part, 0), 1) * (VIRIDIS.length - 1), low = Math.floor(at), rest = at - low;
  const a = VIRIDIS[low], b = VIRIDIS[Math.min(low + 1, VIRIDIS.length - 1)];
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * rest)).join(",")})`;
}

function report(visible, chosen) {
  byId("score-now").textContent = threshold().toFixed(2);
  drawClasses();
  const list = byId("found"), focused = document.activeElement?.closest("#found button")?.dataset.item;
  const wanted = visible.map(([index]) => String(index)).join();
  if (list.dataset.items !== wanted || list.dataset.of !== state.address) {
    list.dataset.items = wanted;
    list.dataset.of = state.address;
    list.replaceChildren();
    for (const [index, one] of visible) {
      const entry = button(list, () => choose(index === state.pinned ? -1 : index, true), swatch(one.label), `${one.name} ${one.score.toFixed(2)}`);
      entry.dataset.item = index;
      entry.addEventListener("focus", () => { if (entry.matches(":focus-visible")) choose(index, false); });
      entry.addEventListener("blur", () => choose(state.pinned, false));
      entry.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") choose(index, false); });
      entry.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") choose(state.pinned, false); });
    }
    if (focused !== undefined) list.querySelector(`button[data-item="${focused}"]`)?.focus();
  }
  for (const entry of list.children) entry.setAttribute("aria-pressed", String(Number(entry.dataset.item) === state.pinned));
  byId("layers").hidden = !chosen;
  if (chosen) {
    const count = chosen.layers.length, layer = layerOf(chosen);
    byId("layer").max = count;
    byId("layer").value = chosen.layers.indexOf(layer) + 1;
    byId("layer-now").textContent = `${chosen.layers.indexOf(layer) + 1} of ${count}`;
    byId("heaviest").textContent = heaviestOf(chosen).toFixed(2);
    byId("share").textContent = `${Math.round(layer.share_inside_box * 100)}% of the attention lies inside the box.`;
  }
  const count = visible.length, rest = all().length - count;
  const hint = count && state.facts.explains ? " Hover or choose one to see where the model looked." : "";
  const hiddenOnes = rest ? ` ${rest} more with lower scores or of hidden classes.` : "";
  if (!byId("error").textContent) say(`${count || "No"} ${count === 1 ? "object" : "objects"} found.${hiddenOnes}${hint}`);
}

function drawClasses() {
  const counts = new Map();
  for (const one of all()) counts.set(one.label, (counts.get(one.label) || 0) + (one.score >= threshold() ? 1 : 0));
  const labels = [...counts.keys()].sort((a, b) => a - b), parent = byId("classes");
  if (parent.dataset.labels !== labels.join() || parent.dataset.of !== state.address) {
    parent.dataset.labels = labels.join();
    parent.dataset.of = state.address;
    parent.replaceChildren();
    for (const label of labels) {
      const name = all().find((one) => one.label === label).name;
      const chip = button(parent, () => {
        if (state.hidden.has(label)) state.hidden.delete(label); else state.hidden.add(label);
        draw();
      }, swatch(label), name, " ", document.createElement("b"));
      chip.dataset.label = label;
    }
    if (labels.length > 1) {
      button(parent, () => { state.hidden.clear(); draw(); }, "all");
      button(parent, () => { state.hidden = new Set(labels); draw(); }, "none");
    }
  }
  for (const chip of parent.querySelectorAll("button[data-label]")) {
    const label = Number(chip.dataset.label);
    chip.setAttribute("aria-pressed", String(!state.hidden.has(label)));
    chip.querySelector("b").textContent = counts.get(label);
  }
}

function choose(index, pin) {
  if (pin) state.pinned = index;
  if (state.active === index && !pin) return;
  state.active = index;
  if (index >= 0) look();
  highlight();
}

/** Redrawing the boxes would end the hover that asked for it, so they stay and what is above them changes. */
function highlight() {
  const svg = byId("boxes"), unit = state.result.width / Math.max(svg.clientWidth, 1);
  for (const old of svg.querySelectorAll("#points, text")) old.remove();
  for (const group of svg.querySelectorAll(".hit")) {
    const active = Number(group.dataset.item) === state.active;
    group.setAttribute("opacity", state.active >= 0 && !active ? 0.35 : 1);
    const [, dark, line] = group.children;
    dark.setAttribute("stroke-width", (active ? 5 : 4) * unit);
    line.setAttribute("stroke-width", (active ? 3 : 2) * unit);
  }
  const visible = shown(), chosen = explained(state.active);
  if (chosen) drawPoints(chosen, unit);
  drawNames(visible, unit, state.result.width, state.result.height);
  report(visible, chosen);
}

function download() {
  const { height, width } = state.result;
  const content = {
    image: state.name, model: state.facts.name, threshold: threshold(), height, width,
    detections: shown().map(([, one]) => one),
  };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2) + "\n"], { type: "application/json" }));
  link.download = `${state.name.replace(/\.[^.]*$/, "")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function startCamera() {
  if (!navigator.mediaDevices?.getUserMedia) { byId("snap").click(); return; }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    stopCamera();  // of a second click while the first was being answered
    state.camera = stream;
  } catch (error) {
    say(error.name === "NotAllowedError" ? "The browser may not use the camera." : "There is no camera.", true);
    return;
  }
  const video = byId("video");
  video.srcObject = state.camera;
  await video.play();
  filming(true);
  say("");
}

function filming(on) {
  for (const id of ["shoot", "cancel", "video"]) byId(id).hidden = !on;
  for (const id of ["choose", "camera"]) byId(id).hidden = on;
  byId("empty").hidden = on || Boolean(state.address);
  byId("picture").hidden = on || !state.address;
  byId(on ? "shoot" : "camera").focus();
}

function stopCamera() {
  if (!state.camera) return;
  for (const track of state.camera.getTracks()) track.stop();
  state.camera = null;
  byId("video").srcObject = null;
  filming(false);
}

function shoot() {
  const video = byId("video"), canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => detect(blob, "camera.jpg"), "image/jpeg", 0.92);
}

/** The first image of a drop or a paste. */
function take(transfer) {
  const file = [...(transfer?.files || [])].find((one) => one.type.startsWith("image/"));
  if (file) detect(file);
  else say("That was no image file.", true);
}

function start() {
  byId("choose").addEventListener("click", () => byId("file").click());
  for (const id of ["file", "snap"]) byId(id).addEventListener("change", (event) => {
    if (event.target.files.length) detect(event.target.files[0]);
    event.target.value = "";
  });
  byId("camera").addEventListener("click", startCamera);
  byId("shoot").addEventListener("click", shoot);
  byId("cancel").addEventListener("click", stopCamera);
  byId("download").addEventListener("click", download);
  byId("score").addEventListener("input", draw);
  byId("layer").addEventListener("input", (event) => { state.layer = Number(event.target.value) - 1; highlight(); });
  byId("access").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("token", byId("token").value.trim());
    meet();
  });
  document.addEventListener("paste", (event) => { if (event.clipboardData?.files.length) take(event.clipboardData); });
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("frame").classList.add("over");
  });
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" || !event.relatedTarget) byId("frame").classList.remove("over");
  });
  document.addEventListener("drop", (event) => take(event.dataTransfer));
  new ResizeObserver(() => { if (state.result) draw(); }).observe(byId("boxes"));
  meet();
}

start();
