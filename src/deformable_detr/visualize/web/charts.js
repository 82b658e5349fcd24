// Line charts, tables and images with boxes for the report pages. Charts are redrawn when their width changes, so that
// text keeps its size.
const MAX_MARKERS = 15; // a shorter curve shows its points
const color = (number) => `var(--c${number % 7})`;
const whole = (value) => value.toLocaleString("en"); // 34,197
const figure = (value, digits = 3) => (value === null || value === undefined ? "—" : value.toFixed(digits));

function onWidth(host, render) {
  let last = 0;
  const redraw = () => {
    const width = Math.floor(host.clientWidth);
    if (width > 0 && width !== last) { last = width; render(width); }
  };
  new ResizeObserver(redraw).observe(host);
  redraw();
  return () => { last = 0; redraw(); };
}

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= rough * 0.999) || power;
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) values.push(k * step);
  return values;
}
const short = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e4) return (size >= 1e6 ? +(value / 1e6).toPrecision(3) + "M" : +(value / 1e3).toPrecision(3) + "k");
  return size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(3));
};

const legendEntry = (name, { color, dash }) => el("span", {},
  svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" },
    svg("line", { x1: 0, y1: 5, x2: 26, y2: 5, stroke: color, "stroke-width": 3, "stroke-dasharray": dash })), name);

// series: [{name, color, dash, points: [[x, y or null], …]}]; x, y: {low, high, label}. The values under the pointer show below.
function lineChart(host, { series, x, y, height = 280, extra = null, wording = null }) {
  host.replaceChildren();
  if (series.length > 1) host.append(el("div", { class: "legend" }, ...series.map((one) => legendEntry(one.name, one))));
  const place = el("div"), readout = el("div", { class: "readout" });
  host.append(place, readout);
  return onWidth(host, (width) => {
    const left = 56, right = 12, top = 10, bottom = 38, w = width - left - right, h = height - top - bottom;
    const px = (v) => left + ((v - x.low) / (x.high - x.low || 1)) * w;
    const py = (v) => top + (1 - (v - y.low) / (y.high - y.low || 1)) * h;
    const chart = svg("svg", { width, height, role: "img", "aria-label": `${y.label} by ${x.label}` });
    for (const v of y.ticks || ticks(y.low, y.high, 5))
      chart.append(svg("line", { class: "grid", x1: left, x2: left + w, y1: py(v), y2: py(v) }),
        svg("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, (y.format || short)(v)));
    for (const v of ticks(x.low, x.high, w / 75))
      chart.append(svg("line", { class: "grid", x1: px(v), x2: px(v), y1: top, y2: top + h }),
        svg("text", { x: px(v), y: top + h + 16, "text-anchor": "middle" }, short(v)));
    chart.append(svg("text", { x: left + w / 2, y: height - 4, "text-anchor": "middle" }, x.label));
    chart.append(svg("text", { x: -(top + h / 2), y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, y.label));
    if (extra) extra(chart, px, py);
    for (const one of series) {
      let path = "", pen = false;
      for (const [a, b] of one.points) {
        if (b === null || b === undefined) { pen = false; continue; }
        path += `${pen ? "L" : "M"}${px(a).toFixed(1)} ${py(Math.min(Math.max(b, y.low), y.high)).toFixed(1)}`;
        pen = true;
      }
      chart.append(svg("path", { d: path, fill: "none", stroke: one.color, "stroke-width": 2, "stroke-dasharray": one.dash, "stroke-linejoin": "round" }));
      const points = one.points.filter((point) => point[1] !== null && point[1] !== undefined);
      if (points.length <= MAX_MARKERS && one.color !== "none") chart.append(...points.map(([a, b]) =>
        svg("circle", { class: "marker", cx: px(a), cy: py(Math.min(Math.max(b, y.low), y.high)), r: 3.5, fill: one.color })));
    }
    const mark = svg("line", { class: "mark", y1: top, y2: top + h, visibility: "hidden" });
    chart.append(mark);
    const show = (event) => {
      const at = x.low + ((event.offsetX - left) / w) * (x.high - x.low);
      const near = series.map((one) => one.points.reduce((best, point) =>
        point[1] !== null && (!best || Math.abs(point[0] - at) < Math.abs(best[0] - at)) ? point : best, null));
      const nearest = near.find((point) => point);
      if (!nearest) return;
      mark.setAttribute("x1", px(nearest[0])); mark.setAttribute("x2", px(nearest[0])); mark.setAttribute("visibility", "visible");
      const values = series.map((one, k) => (near[k] ? `${one.name} ${short(near[k][1])}` : null)).filter((text) => text);
      readout.textContent = wording ? wording(nearest[0], near) : `${x.label} ${short(nearest[0])}: ${values.join(", ")}`;
    };
    chart.addEventListener("pointermove", show);
    chart.addEventListener("pointerdown", show);
    chart.addEventListener("pointerleave", () => { mark.setAttribute("visibility", "hidden"); readout.textContent = ""; });
    place.replaceChildren(chart);
  });
}

// rows: arrays of values; columns: [{name, text(value, row) → string or node}]. Clicking a heading sorts.
function sortableTable(table, columns, rows) {
  let by = -1, down = true;
  const body = el("tbody"), heads = columns.map((column, k) => el("th", { scope: "col" },
    el("button", { type: "button", onclick: () => { down = by === k ? !down : k > 0; by = k; render(); } }, column.name)));
  const order = (a, b) => {
    const [p, q] = [a[by], b[by]];
    if (p === null || q === null) return (p === null) - (q === null);
    return (typeof p === "string" ? p.localeCompare(q) : p - q) * (down ? -1 : 1);
  };
  let matches = () => true, count = rows.length;
  function render() {
    heads.forEach((head, k) => k === by ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
    const shown = (by < 0 ? rows : [...rows].sort(order)).filter(matches);
    count = shown.length;
    body.replaceChildren(...shown.map((row) => el("tr", {}, ...columns.map((column, k) =>
      el("td", k ? {} : { title: row[0] }, column.text ? column.text(row[k], row) : k && row[k] !== null && typeof row[k] === "number" ? figure(row[k]) : row[k] ?? "—")))));
  }
  table.replaceChildren(el("thead", {}, el("tr", {}, ...heads)), body);
  render();
  return { filter: (test) => { matches = test; render(); return count; } };
}

// An image with boxes [{x, y, w, h, color, dash, ground, label, score, title, quiet, mask, opacity}], the most important
// last. Labels keep their size on the screen; a label without room shows while its box is hovered. A mask has a fill of
// `opacity`, 0 to 255, and a thin box.
function boxedImage(image, boxes) {
  const { width, height } = image, area = (box) => box.w * box.h;
  const view = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "xMidYMid meet" });
  if (image.image) view.append(svg("image", { href: image.image, width, height }));
  else view.append(svg("rect", { width, height, fill: "var(--soft)" }));
  const masks = boxes.filter((box) => box.mask);
  if (masks.length) {
    const [h, w] = masks[0].mask.size, canvas = el("canvas", { width: w, height: h });
    paintMasks(canvas, masks.map(({ mask, color, opacity = OPACITY }) => ({ mask, color: rgb(color), opacity })));
    view.append(svg("image", { href: canvas.toDataURL(), width, height, "pointer-events": "none" }));
  }
  const labels = svg("g"), hovered = svg("g");
  let scale = 1; // image pixels per screen pixel
  const place = ({ x, y, w, h, label, score, ground }, taken) => {
    const sides = [x, y, x + w, y + h].map((side) => side / scale), area = [0, 0, width / scale, height / scale];
    return { ...placeLabel(label, score === undefined ? "" : ` ${score}`, sides, area, taken), ground };
  };
  const draw = (label) => labelElement(label, label.ground, "#fff", scale);
  const redraw = () => {
    if (!view.clientWidth) return;
    scale = Math.max(width / view.clientWidth, height / view.clientHeight);
    const placed = [];
    let room = (0.3 * width * height) / scale ** 2; // labels cover at most this area
    for (const box of [...boxes].reverse().filter((one) => !one.quiet)) {
      const label = place(box, placed.map((one) => one.place)), used = label.place ? LINE * (label.place[2] - label.place[0]) : Infinity;
      if (used <= room) { room -= used; placed.push(label); }
    }
    labels.replaceChildren(...placed.map(draw));
  };
  for (const box of [...boxes].sort((a, b) => area(b) - area(a))) { // small boxes on top, so that they can be hovered inside large ones
    const sides = { x: box.x, y: box.y, width: Math.max(box.w, 0.5), height: Math.max(box.h, 0.5), class: "box" };
    view.append(svg("rect", { ...sides, stroke: "#111", "stroke-width": box.mask ? 2 : 3.6, "stroke-opacity": 0.75, "pointer-events": "none" }));
    view.append(svg("rect", { ...sides, stroke: box.color, "stroke-width": box.mask ? 1 : 2, "stroke-dasharray": box.dash,
      onpointerenter: () => hovered.replaceChildren(draw(place(box, []))), onpointerleave: () => hovered.replaceChildren() }, svg("title", {}, box.title || box.label)));
  }
  view.append(labels, hovered);
  new ResizeObserver(redraw).observe(view);
  return view;
}
