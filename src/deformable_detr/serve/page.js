"use strict";
const MIN_SCORE = 0.05, MAX_DETECTIONS = 100, MAX_EXPLAINED = 50, MAX_SENT_PIXELS = 12e6;
const HAS_MOUSE = matchMedia("(any-hover: hover)").matches;

const state = {
  model: null, // as GET /v1/model describes it
  // { source: the chosen file, name; file: what is sent, url, scale: pixels of `source` per pixel of `file`, to which all
  //   positions refer; request: an AbortController while it is sent; result, seconds, explanations, error }
  images: [], image: null,
  hidden: new Set(), styles: new Map(), active: -1, pinned: -1, layer: -1,
  camera: null, back: null, // its stream, and the image to show after it
};
const selection = {
  preview: (index) => select(index ?? state.pinned),
  pin: (index) => select(index === state.pinned ? -1 : index, true),
};
const viewer = new Viewer(byId("view"), selection), labels = svg("g", { id: "labels" });
viewer.view.insertBefore(labels, viewer.scene);
const zoom = new Zoom(byId("frame"), byId("picture"), () => {
  byId("zoom-out").disabled = zoom.factor === 1;
  byId("zoom-in").disabled = zoom.factor === MAX_ZOOM;
});

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
    throw new Error(token ? "The access token is wrong." : "This server needs an access token.");
  }
  const { detail } = await response.json().catch(() => ({}));
  throw new Error(detail || `The server responded with status ${response.status}.`);
}

async function connect() {
  state.model = await request("v1/model");
  const { name, classes, formats } = state.model;
  byId("model").textContent = `${name}, ${classes.length} ${classes.length === 1 ? "class" : "classes"}`;
  byId("file").accept = formats.join(",") + ",image/*";
  byId("access").hidden = true;
  showStatus("");
}

/** Connects, then detects in the image that was chosen meanwhile. */
const start = () => connect().then(() => { if (state.image) show(state.image); }, (error) => showStatus(error.message, true));

/** The content of the file, or a JPEG of it if the server would refuse it, and `scale`. */
async function prepare(file) {
  const { formats, limits } = state.model;
  // A copy of the bytes: a file that changes later could not be sent again.
  if (formats.includes(file.type) && file.size <= limits.body_bytes)
    return { file: new Blob([await file.arrayBuffer()], { type: file.type }), scale: [1, 1] };
  const bitmap = await createImageBitmap(file), { width, height } = bitmap;
  const shrink = Math.min(1, Math.sqrt(MAX_SENT_PIXELS / (width * height)));
  const size = [width, height].map((side) => Math.max(1, Math.round(side * shrink)));
  const jpeg = await toBlob(resized(bitmap, ...size), "image/jpeg");
  bitmap.close();
  return { file: jpeg, scale: [width / size[0], height / size[1]] };
}

function resized(source, width, height) {
  const canvas = el("canvas", { width, height });
  canvas.getContext("2d").drawImage(source, 0, 0, width, height);
  return canvas;
}

const toBlob = (canvas, type) => new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));

const send = (path, { file }, signal) => request(path, { method: "POST", body: file, headers: { "Content-Type": file.type }, signal });

/** Replaces the images by these files and shows the first one. */
function openFiles(files) {
  if (!files.length) return;
  for (const { url } of state.images) if (url) URL.revokeObjectURL(url);
  state.images = [...files].map((source) => ({ source, name: source.name || "image" }));
  state.hidden.clear();
  show(state.images[0]);
}

/** Shows an image and its results, and requests them if there are none yet; null: no image. */
async function show(image) {
  if (state.image !== image && state.image?.request) {
    state.image.request.abort();
    state.image.request = null;
  }
  stopCamera();
  Object.assign(state, { image, active: -1, pinned: -1, layer: -1 });
  zoom.set(1);
  if (image?.result) await showPicture(image); // then it changes together with the boxes
  if (image !== state.image) return;
  if (image && !image.result) detect(image);
  render();
}

/** Updates everything; the previous picture stays, dimmed, until the browser has read the next one. */
function render() {
  const { image, images, camera } = state, result = image?.result, number = images.indexOf(image);
  byId("busy").hidden = !image?.request;
  byId("side").hidden = !result;
  for (const id of ["save-picture", "save-json"]) byId(id).hidden = !result;
  byId("steps").hidden = images.length < 2 || !image;
  byId("step-now").textContent = `${number + 1} of ${images.length}: ${image?.name}`;
  byId("previous").disabled = number < 1;
  byId("next").disabled = number === images.length - 1;
  for (const id of ["shoot", "cancel", "video"]) byId(id).hidden = !camera;
  for (const id of ["choose", "example", "camera"]) byId(id).hidden = Boolean(camera);
  if (!image || (image.error && !image.url)) hidePicture();
  byId("picture").classList.toggle("stale", byId("image").getAttribute("src") !== image?.url);
  if (image?.error) showStatus(`${image.name}: ${image.error}`, true);
  else showStatus(image?.request ? `Detecting objects in ${image.name}…` : "");
  draw();
}

async function detect(image) {
  if (!state.model) return start();
  if (image.request) return;
  const controller = (image.request = new AbortController());
  image.error = "";
  try {
    if (!image.file) Object.assign(image, await prepare(image.source).catch(() => { throw new Error("The browser cannot read this file as an image."); }));
    if (controller.signal.aborted) return; // another image was chosen meanwhile
    image.url ??= URL.createObjectURL(image.file);
    const isShown = showPicture(image), start = performance.now();
    const response = await send(`v1/detect?threshold=${MIN_SCORE}&top_k=${MAX_DETECTIONS}`, image, controller.signal);
    const seconds = (performance.now() - start) / 1000;
    if (!(await isShown)) throw new Error("The browser cannot show this image.");
    Object.assign(image, { result: response.images[0], seconds });
    for (const { label } of image.result.detections) styleOf(label); // the best first
  } catch (error) {
    if (image.request === controller) image.error = error.message.replace(/^the image: /, "");
  } finally {
    if (image.request === controller) image.request = null;
    if (image === state.image) render();
  }
}

/** Shows the file of an image if the browser can; returns whether it can. */
async function showPicture(image) {
  const picture = el("img", { src: image.url }), isGood = await picture.decode().then(() => true, () => false);
  if (image !== state.image) return isGood;
  if (!isGood) { hidePicture(); return false; }
  Object.assign(byId("image"), { src: image.url, alt: image.name });
  byId("picture").style.setProperty("--aspect", picture.naturalWidth / picture.naturalHeight);
  byId("picture").classList.remove("stale");
  byId("picture").hidden = byId("zoom").hidden = false;
  byId("empty").hidden = true;
  return true;
}

function hidePicture() {
  for (const name of ["src", "alt"]) byId("image").removeAttribute(name);
  byId("picture").hidden = byId("zoom").hidden = true;
  byId("empty").hidden = Boolean(state.camera);
}

/** Requests the explanations of an image once, on the first selection. */
async function explain() {
  const { image } = state;
  if (image.explanations || !state.model.explains) return;
  image.explanations = { detections: [] };
  try {
    image.explanations = await send(`v1/explain?threshold=${MIN_SCORE}&top_k=${MAX_EXPLAINED}`, image);
    if (image === state.image) update();
  } catch (error) {
    image.explanations = null; // the next selection tries again
    if (image === state.image) showStatus(error.message, true);
  }
}

/** The explanation of a detection: the one with the same class and box. */
function explanationOf(index) {
  const detection = detections()[index];
  if (!detection || !state.image.explanations) return null;
  const distance = ({ box }) => Math.max(...box.map((side, i) => Math.abs(side - detection.box[i])));
  const [best] = state.image.explanations.detections.filter(({ label }) => label === detection.label).sort((a, b) => distance(a) - distance(b));
  return best && distance(best) < 1 ? best : null;
}

function select(index, pin = false) {
  if (pin) state.pinned = index;
  if (state.active === index && !pin) return;
  state.active = index;
  if (index >= 0) explain();
  update();
}

async function startCamera() {
  if (!navigator.mediaDevices?.getUserMedia) { byId("snap").click(); return; }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    showStatus(error.name === "NotAllowedError" ? "The browser does not allow access to the camera." : "No camera found.", true);
    return;
  }
  state.back = state.image ?? state.back;
  await show(null); // also stops the stream of a second click during the permission prompt
  state.camera = stream;
  byId("video").srcObject = stream;
  render();
  byId("shoot").focus();
  await byId("video").play();
}

function stopCamera() {
  if (!state.camera) return;
  for (const track of state.camera.getTracks()) track.stop();
  state.camera = byId("video").srcObject = null;
}

async function takePhoto() {
  const video = byId("video"), photo = await toBlob(resized(video, video.videoWidth, video.videoHeight), "image/jpeg");
  openFiles([new File([photo], "camera.jpg", { type: photo.type })]);
}

async function openExample() {
  const photo = await (await fetch("example.jpg")).blob();
  openFiles([new File([photo], "example.jpg", { type: photo.type })]);
}

const step = (change) => show(state.images[state.images.indexOf(state.image) + change]);
const on = (id, kind, action) => byId(id).addEventListener(kind, action);
byId("invitation").textContent = HAS_MOUSE ? "Drop, paste or choose images." : "Choose images or take a photo.";
on("choose", "click", () => byId("file").click());
for (const id of ["file", "snap"]) on(id, "change", ({ target }) => { openFiles(target.files); target.value = ""; });
on("example", "click", openExample);
on("camera", "click", startCamera);
on("shoot", "click", takePhoto);
on("cancel", "click", () => show(state.back));
on("save-picture", "click", savePicture);
on("save-json", "click", saveJson);
on("previous", "click", () => step(-1));
on("next", "click", () => step(1));
on("zoom-in", "click", () => zoom.set(zoom.factor * 1.5));
on("zoom-out", "click", () => zoom.set(zoom.factor / 1.5));
on("frame", "scroll", () => { if (state.image?.result) drawLabels(); });
on("score", "input", draw);
on("show-masks", "click", ({ target }) => {
  target.setAttribute("aria-pressed", target.getAttribute("aria-pressed") !== "true");
  drawMasks();
});
on("layer", "input", ({ target }) => { state.layer = Number(target.value) - 1; update(); });
on("access", "submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  start().then(() => byId("token").select());
});
document.addEventListener("paste", ({ clipboardData }) => openFiles(clipboardData?.files ?? []));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  const isOver = kind === "dragenter" || kind === "dragover" || (kind === "dragleave" && event.relatedTarget);
  byId("frame").classList.toggle("over", Boolean(isOver));
  if (kind === "drop") openFiles(event.dataTransfer.files);
});
new ResizeObserver(update).observe(viewer.view);
start();
