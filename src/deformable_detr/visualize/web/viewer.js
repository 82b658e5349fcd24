// Boxes and sampling points over an image, for the page of an explanation and the page of the server.
const DARK = "#111111", LIGHT = "#f2f2f2", WHITE = "#ffffff", ORANGE = "#e69f00";
const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"].map(
  (hex) => [0, 2, 4].map((start) => parseInt(hex.slice(start, start + 2), 16)));

// Color of a weight relative to the largest one; the square root spreads the many small weights.
function weightColor(part) {
  const position = Math.sqrt(part) * (VIRIDIS.length - 1), low = Math.min(Math.floor(position), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[low].map((v, i) => Math.round(v + (VIRIDIS[low + 1][i] - v) * (position - low))).join(",")})`;
}

const polygon = (corners, x, y, r) => "M" + corners.map(([a, b]) => `${x + r * a},${y + r * b}`).join("L") + "Z";

function cross(x, y, r) {
  const a = 0.36;
  const corners = [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]];
  return polygon(corners, x, y, r);
}

// Outline of the marker of a level around (x, y), about r wide to each side.
function marker(level, x, y, r) {
  switch (level % 6) {
    case 0: return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
    case 1: return polygon([[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]], x, y, r);
    case 2: return polygon([[0, -1.1], [1.1, 0.9], [-1.1, 0.9]], x, y, r);
    case 3: return polygon([[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]], x, y, r);
    case 4: return polygon([[0, 1.1], [1.1, -0.9], [-1.1, -0.9]], x, y, r);
    default: return cross(x, y, r);
  }
}

// Calls preview(index) while a mouse is over the element, preview(null) after that, and pin(index) on a click.
function selectable(element, index, { preview, pin }) {
  element.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") preview(index); });
  element.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") preview(null); });
  element.addEventListener("click", () => pin(index));
  return element;
}

function rectangle([x1, y1, x2, y2], attributes) {
  return svg("rect", { x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0), ...attributes });
}

const outline = (box, stroke, width, dash) => [
  rectangle(box, { class: "edge", stroke: DARK, "stroke-width": width + 2 }),
  rectangle(box, { class: "edge", stroke, "stroke-width": width, "stroke-dasharray": dash }),
];

class Viewer {
  // view: an <svg> whose coordinates become pixels of the image. actions: { preview, pin }, see `selectable`.
  constructor(view, actions) {
    this.view = view;
    this.actions = actions;
    this.boxes = svg("g", { id: "boxes" });
    this.scene = svg("g", { id: "points", "pointer-events": "none" });
    view.append(this.boxes, this.scene);
  }

  // Shows this part of the image.
  setArea(x, y, width, height) {
    this.area = { x, y, width, height };
    this.view.setAttribute("viewBox", `${x} ${y} ${width} ${height}`);
  }

  // Image pixels per screen pixel.
  get unit() {
    const { clientWidth, clientHeight } = this.view;
    return Math.max(this.area.width / Math.max(clientWidth, 1), this.area.height / Math.max(clientHeight, 1));
  }

  // items: [{ index, box: [x1, y1, x2, y2], color, dash }]. Small boxes are on top, so that each can be reached.
  setBoxes(items) {
    const size = ({ box: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
    this.boxes.replaceChildren(...[...items].sort((a, b) => size(b) - size(a)).map(({ index, box, color, dash }) =>
      selectable(svg("g", { class: "hit", "data-item": index }, rectangle(box, { fill: "transparent" }), ...outline(box, color, 2, dash)),
        index, this.actions)));
  }

  setActive(index) {
    for (const group of this.boxes.children) group.classList.toggle("active", Number(group.dataset.item) === index);
    this.boxes.classList.toggle("selected", index >= 0);
  }

  // sampling: null, or { points: [[x, y, weight, level, head, token], …], reference_point, reference_box, box }.
  // Points outside the area are drawn pale at its edge; returns how many.
  drawSampling(sampling, maxWeight) {
    this.scene.replaceChildren();
    if (!sampling) return 0;
    const unit = this.unit, { x: left, y: top, width, height } = this.area, inset = 6 * unit;
    if (sampling.reference_box) this.scene.append(...outline(sampling.reference_box, WHITE, 1.6, "6 4"));
    if (sampling.box) this.scene.append(...outline(sampling.box, ORANGE, 2.6));
    let outside = 0;
    for (const [x, y, weight, level, head, token] of [...sampling.points].sort((a, b) => a[2] - b[2])) {
      const isOutside = x < left || y < top || x > left + width || y > top + height, part = weight / maxWeight;
      const cx = isOutside ? Math.min(Math.max(x, left + inset), left + width - inset) : x;
      const cy = isOutside ? Math.min(Math.max(y, top + inset), top + height - inset) : y;
      outside += isOutside;
      this.scene.append(svg("path", {
        d: marker(level, cx, cy, (1.9 + 6.6 * Math.sqrt(part)) * unit), fill: weightColor(part),
        stroke: part > 0.25 ? DARK : LIGHT, "stroke-width": 0.9 * unit, class: "point", opacity: isOutside ? 0.55 : null,
        "data-x": x, "data-y": y, "data-weight": weight, "data-level": level, "data-head": head, "data-token": token,
      }));
    }
    const [x, y] = sampling.reference_point;
    this.scene.append(svg("path", { d: cross(x, y, 9 * unit), fill: WHITE, stroke: DARK, "stroke-width": 1.4 * unit, id: "reference" }));
    return outside;
  }
}

// Entries for what `drawSampling` draws.
function drawLegend(parent, { reference_box, box }, maxWeight) {
  const entry = (text, ...shapes) => el("span", {}, svg("svg", { viewBox: "0 0 22 16", "aria-hidden": "true" }, ...shapes), text);
  const line = (color, dash) => [[DARK, 5], [color, 2.4, dash]].map(([stroke, width, dashes]) =>
    svg("line", { x1: 1, x2: 21, y1: 8, y2: 8, stroke, "stroke-width": width, "stroke-dasharray": dashes }));
  const bar = el("span", { class: "bar" });
  const stops = Array.from({ length: 11 }, (_, i) => `${weightColor(i / 10)} ${i * 10}%`);
  bar.style.background = `linear-gradient(to right, ${stops.join(",")})`;
  parent.replaceChildren(
    entry("reference point", svg("path", { d: cross(11, 8, 7), fill: WHITE, stroke: DARK, "stroke-width": 1.3 })),
    ...(reference_box ? [entry("reference box", ...line(WHITE, "5 3"))] : []),
    ...(box ? [entry("predicted box", ...line(ORANGE))] : []),
    el("span", {}, "weight 0", bar, maxWeight.toFixed(2)));
}
