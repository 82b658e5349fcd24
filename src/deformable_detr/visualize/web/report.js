const masks = data.masks && new URLSearchParams(location.search).has("masks");
const { models, worst } = masks ? data.masks : data, { names } = data, [first, second] = models, shape = masks ? "mask" : "box";
byId("views").hidden = !data.masks;
byId("views").querySelectorAll("a")[masks ? 1 : 0].setAttribute("aria-current", "page");
const DASH = [null, "6 4"];
const NAMES = { AP: "IoU 0.50 to 0.95", AP50: "IoU 0.50", AP75: "IoU 0.75", AP_small: "small objects", AP_medium: "medium objects", AP_large: "large objects",
  AR1: "1 detection per image", AR10: "10 per image", AR100: "100 per image", AR_small: "small objects", AR_medium: "medium objects", AR_large: "large objects" };
const title = (key) => key.replace("_", " ");
const label = (k) => "AB"[k];

function difference(a, b) {
  if (a === null || b === null || a === undefined || b === undefined) return "—";
  const value = b - a, shown = value.toFixed(3);
  if (Math.abs(value) < 5e-4) return "0.000";
  return el("span", { class: value > 0 ? "better" : "worse" }, `${value > 0 ? "▲ +" : "▼ −"}${shown.replace("-", "")}`);
}

function table(host, heads, rows) {
  host.replaceChildren(el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, cell))))));
}

// --- header, metrics, speed ---
{
  const facts = `${whole(data.images)} ${data.images === 1 ? "image" : "images"} of “${data.split}”, ${whole(first.objects)} ${first.objects === 1 ? "object" : "objects"} of ${names.length} ${names.length === 1 ? "class" : "classes"}`;
  byId("facts").textContent = second ? `${facts}. A: ${first.name}, B: ${second.name}; differences are B − A.` : `${facts}.`;
  for (const key of ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]) {
    const values = models.map((model) => figure(model.metrics[key])).join(" / ");
    byId("tiles").append(el("div", { class: "tile" }, el("b", {}, values), el("span", {}, title(key))));
  }
  byId("tiles").append(el("div", { class: "tile" }, el("b", {}, models.map((m) => (m.best ? m.best.threshold.toFixed(2) : "—")).join(" / ")), el("span", {}, "best threshold (F1)")));
  const rows = Object.keys(NAMES).map((key) => [title(key), ...models.map((model) => figure(model.metrics[key])),
    ...(second ? [difference(first.metrics[key], second.metrics[key])] : []), NAMES[key]]);
  const atBest = (model, name) => model.best && model.best[name.toLowerCase()];
  const f1 = (name, meaning) => [name, ...models.map((model) => figure(atBest(model, name))), ...(second ? [difference(atBest(first, name), atBest(second, name))] : []), meaning];
  rows.push(f1("F1", "maximum, at IoU 0.50"), f1("Precision", "at the best F1"), f1("Recall", "at the best F1"), f1("Threshold", "of the best F1"));
  if (second) rows[rows.length - 1][3] = "";
  table(byId("metrics-table"), ["Metric", ...(second ? ["A", "B", "B − A"] : ["Value"]), "Meaning"], rows);
  const speeds = models.map((model) => model.speed);
  const model = speeds.map((speed) => (speed.model_milliseconds === null ? "—" : `${speed.model_milliseconds.toFixed(1)} ms`));
  table(byId("speed-table"), ["", ...(second ? ["A", "B"] : [""])], [
    ["Images per second", ...speeds.map((speed) => figure(speed.images_per_second, 1))],
    ["Model, per image", ...model], ["Device", ...speeds.map((speed) => speed.device)]]);
}

// --- classes ---
{
  const best = (row, key) => (row.best ? row.best[key] : null);
  const keys = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"];
  const plain = [{ name: "Class" }, { name: "Objects", text: whole }];
  let columns, rows;
  if (!second) {
    columns = [...plain, ...keys.map((key) => ({ name: title(key) })), { name: "Threshold" }, { name: "F1" }, { name: "Precision" }, { name: "Recall" }];
    rows = first.classes.map((row) => [row.name, row.objects, ...keys.map((key) => row[key]), ...["threshold", "f1", "precision", "recall"].map((key) => best(row, key))]);
  } else {
    const pairs = [...keys.slice(0, 2).map((key) => [title(key), (row) => row[key]]), ["F1", (row) => best(row, "f1")]];
    columns = [...plain, ...pairs.flatMap(([name]) => [{ name: `${name} A` }, { name: `${name} B` },
      { name: "B − A", text: (value) => difference(0, value) }]), { name: "Threshold A" }, { name: "Threshold B" }];
    rows = first.classes.map((row, k) => {
      const other = second.classes[k];
      const values = pairs.flatMap(([, of]) => [of(row), of(other), of(row) === null || of(other) === null ? null : of(other) - of(row)]);
      return [row.name, row.objects, ...values, best(row, "threshold"), best(other, "threshold")];
    });
  }
  const shown = sortableTable(byId("classes-table"), columns, rows);
  const find = byId("find");
  find.parentNode.parentNode.hidden = names.length < 12;
  const filter = () => {
    const count = shown.filter((row) => row[0].toLowerCase().includes(find.value.trim().toLowerCase()));
    byId("find-count").textContent = `${count} of ${names.length} classes`;
  };
  find.addEventListener("input", filter);
  filter();
}

// --- precision and recall ---
{
  const choice = byId("curve-class");
  choice.append(el("option", { value: 0 }, "all classes"), ...names.map((name, k) => el("option", { value: k + 1 }, name)));
  const kinds = [["50", "IoU 0.50"], ["75", "IoU 0.75"], ["mean", "mean of IoU 0.50 to 0.95"]];
  const render = () => {
    const series = [];
    models.forEach((model, m) => kinds.forEach(([key, name], k) => {
      const line = model.curves[+choice.value][key];
      if (line) series.push({ name: second ? `${label(m)}, ${name}` : name, color: color(k), dash: DASH[m], points: line.map((value, r) => [r / 100, value / 1000]) });
    }));
    byId("f1").replaceChildren();
    if (!series.length) { byId("curve").replaceChildren(el("p", {}, "This class has no objects.")); return; }
    lineChart(byId("curve"), { series, x: { low: 0, high: 1, label: "recall" }, y: { low: 0, high: 1, label: "precision" } });
    const f1 = models.map((model, m) => ({ name: second ? label(m) : "F1", color: color(m), dash: DASH[m], points: model.f1[+choice.value].map((value, k) => [k / 100, value / 1000]) }));
    lineChart(byId("f1"), { series: f1, x: { low: 0, high: 1, label: "minimum score" }, y: { low: 0, high: 1, label: "F1 at IoU 0.50" } });
  };
  choice.addEventListener("change", render);
  render();
}

// --- error types ---
{
  const words = { Cls: ["Classification", `wrong class, correct ${shape}`], Loc: ["Localization", `correct class, inaccurate ${shape} (IoU 0.1 to 0.5)`],
    Both: ["Both", `wrong class, inaccurate ${shape}`], Dupe: ["Duplicate", "second detection of an object"], Bkg: ["Background", "detection without an object"], Miss: ["Missed", "object without a detection"] };
  const perModel = (key) => models.map((model, m) => `${second ? label(m) + ": " : ""}${figure(model.errors[key])}`).join(", ");
  const entries = first.errors.types.map((one, k) => [...words[one.type], ...models.map((model) => model.errors.types[k])]);
  const largest = Math.max(0.01, ...entries.flatMap((entry) => entry.slice(2).map((one) => one.gain || 0)));
  for (const [name, meaning, ...values] of entries) {
    const bars = values.map((one, m) => el("div", { class: "bar", style: `width:${(100 * Math.max(0, one.gain || 0)) / largest}%;background:${color(m)}` }));
    const texts = values.map((one, m) => el("div", {}, `${second ? label(m) + " " : ""}${figure(one.gain)}`));
    byId("errors-bars").append(el("div", {}, name), el("div", { title: meaning }, ...bars), el("div", { class: "value" }, ...texts));
  }
  byId("errors-note").textContent = `Each bar shows the possible gain in AP50. AP50 now: ${perModel("AP50")}. Gain without false positives: ${perModel("false_positives")}; `
    + `without missed objects: ${perModel("false_negatives")}. `
    + Object.values(words).map(([name, meaning]) => `${name}: ${meaning}`).join("; ") + ".";
  const rows = models.flatMap((model, m) => entries.map(([name], k) =>
    [second ? `${label(m)}: ${name}` : name, ...model.error_counts.map(({ counts }) => whole(counts[k]))]));
  const heads = first.error_counts.map(({ threshold }, k) => (k ? threshold : first.best || second?.best ? "best F1" : "all"));
  table(byId("errors-table"), ["", ...heads], rows);
}

// --- calibration ---
models.forEach((model, m) => {
  const { bins, ece } = model.calibration, host = el("div"), counts = el("div");
  byId("calibration-charts").append(el("div", {}, el("h3", {}, `${second ? label(m) + ": " : ""}ECE ${figure(ece)}`), host, counts));
  host.className = counts.className = "chart";
  const points = bins.map((bin) => [(bin.low + bin.high) / 2, bin.count ? bin.accuracy : null]);
  const words = (x) => {
    const bin = bins.find((one) => x >= one.low && x <= one.high);
    return bin ? `score ${bin.low.toFixed(1)} to ${bin.high.toFixed(1)}: ${whole(bin.count)} detections, ${(100 * bin.accuracy).toFixed(1)}% correct, mean score ${bin.score.toFixed(3)}` : "";
  };
  lineChart(host, { series: [{ name: "accuracy", color: "none", points }], x: { low: 0, high: 1, label: "score" }, y: { low: 0, high: 1, label: "share of correct detections" }, height: 250, wording: words,
    extra: (chart, px, py) => {
      for (const bin of bins) if (bin.count)
        chart.append(svg("rect", { x: px(bin.low) + 1, width: px(bin.high) - px(bin.low) - 2, y: py(bin.accuracy), height: Math.max(py(0) - py(bin.accuracy), 1), fill: color(m) }));
      chart.append(svg("line", { x1: px(0), y1: py(0), x2: px(1), y2: py(1), stroke: "var(--ink)", "stroke-dasharray": "4 4" }));
    } });
  const power = (bin) => Math.log10(Math.max(bin.count, 1)), most = Math.max(1, ...bins.map(power));
  lineChart(counts, { series: [{ name: "count", color: "none", points: bins.map((bin) => [(bin.low + bin.high) / 2, power(bin)]) }], height: 150, wording: words,
    x: { low: 0, high: 1, label: "score" }, y: { low: 0, high: Math.max(1, Math.ceil(most)), label: "detections", ticks: [...Array(Math.max(1, Math.ceil(most)) + 1).keys()], format: (value) => short(10 ** value) },
    extra: (chart, px, py) => { for (const bin of bins) if (bin.count)
      chart.append(svg("rect", { x: px(bin.low) + 1, width: px(bin.high) - px(bin.low) - 2, y: py(power(bin)), height: Math.max(2, py(0) - py(power(bin))), fill: "var(--c6)" })); } });
});

// --- confusion ---
{
  const choice = byId("confusion-model"), count = names.length + 1;
  choice.append(...models.map((model, m) => el("option", { value: m }, `${label(m)}: ${model.name}`)));
  byId("confusion-choice").hidden = !second;
  const called = (k, background) => (k === count - 1 ? background : names[k]);
  const render = (width) => {
    const { matrix, threshold } = models[+choice.value].confusion;
    byId("confusion-note").textContent = `Rows: ground truth; columns: detections with ${threshold ? `scores of ${threshold.toFixed(3)} (best F1) or more` : "any score"}, matched at IoU 0.5 regardless of class. `
      + "Last row: detections on background. Last column: missed objects. Color: share of the row.";
    const totals = matrix.map((row) => row.reduce((sum, value) => sum + value, 0));
    const words = (r, c) => {
      const share = `${whole(matrix[r][c])} of ${whole(totals[r])}`;
      if (r === count - 1) return `${share} detections on background were labeled “${names[c]}”`;
      return c === count - 1 ? `${share} “${names[r]}” were missed` : `${share} “${names[r]}” were detected as “${names[c]}”`;
    };
    const side = Math.min(width, 620), labeled = (side - 70) / count >= 13;
    const left = labeled ? Math.min(96, side * 0.24) : 18, top = left, cell = (side - left - 2) / count;
    const chart = svg("svg", { width: side, height: side, role: "img", "aria-label": "Confusion matrix" });
    if (labeled) for (let k = 0; k < count; k++) {
      const middle = (k + 0.5) * cell;
      chart.append(svg("text", { x: left - 5, y: top + middle + 4, "text-anchor": "end" }, fitted(called(k, "background"), left - 8), svg("title", {}, called(k, "background"))),
        svg("text", { transform: `translate(${left + middle + 4} ${top - 5}) rotate(-90)` }, fitted(called(k, "missed"), top - 8), svg("title", {}, called(k, "missed"))));
    } else chart.append(svg("text", { x: left, y: 13 }, "detected"), svg("text", { transform: `translate(13 ${top + 34}) rotate(-90)` }, "truth"));
    chart.append(svg("rect", { x: left, y: top, width: cell * count, height: cell * count, fill: "var(--soft)", stroke: "var(--line)" }));
    matrix.forEach((row, r) => row.forEach((value, c) => {
      if (!value) return;
      const share = value / totals[r], place = { x: left + c * cell, y: top + r * cell };
      chart.append(svg("rect", { ...place, width: cell, height: cell, fill: r === c ? "var(--c0)" : "var(--c1)", "fill-opacity": 0.12 + 0.88 * share, "data-cell": `${r},${c}` }));
      if (cell >= 11 + 7 * String(value).length && cell >= 18) chart.append(svg("text", { x: place.x + cell / 2, y: place.y + cell / 2 + 4, "text-anchor": "middle", "pointer-events": "none",
        style: `fill:${share > 0.5 ? "var(--paper)" : "var(--ink)"}` }, String(value)));
    }));
    const show = (event) => {
      const c = Math.floor((event.offsetX - left) / cell), r = Math.floor((event.offsetY - top) / cell);
      byId("matrix-readout").textContent = r >= 0 && c >= 0 && r < count && c < count ? words(r, c) : "";
    };
    chart.addEventListener("pointermove", show);
    chart.addEventListener("pointerdown", show);
    byId("matrix").replaceChildren(chart);
    const pairs = [];
    matrix.forEach((row, r) => row.forEach((value, c) => { if (value && r !== c && r < count - 1 && c < count - 1) pairs.push([r, c, value]); }));
    pairs.sort((a, b) => b[2] - a[2]);
    if (pairs.length) table(byId("mix-ups"), ["Class", "Detected as", "Count", "Objects"], pairs.slice(0, 10).map(([r, c, value]) => [names[r], names[c], whole(value), whole(totals[r])]));
    else byId("mix-ups").replaceChildren(el("caption", {}, "No classes were confused."));
  };
  choice.addEventListener("change", onWidth(byId("matrix"), render));
}

// --- worst images ---
{
  const GROUND = { right: "#00664b", wrong: "#a84300", truth: "#005a8c" };
  const RIGHT = { color: "#2cc79a", ground: GROUND.right, dash: null }, WRONG = { color: "#ff8a3d", ground: GROUND.wrong, dash: "6 3" };
  const TRUTH = { color: "#56b4e9", ground: GROUND.truth, dash: null }, CROWD = { color: "#bbbbbb", ground: "#444444", dash: "2 3" };
  const MISSED = { color: "#f0e442", ground: "#6b6300", dash: "6 3" };
  const thresholds = models.map((model) => (model.best ? model.best.threshold : 0.5).toFixed(3));
  byId("images-note").textContent = worst.length
    ? `The ${worst.length} images with the most wrong detections and missed objects${second ? " of A" : ""}: ground truth beside detections with scores of at least ${thresholds.join(" and ")}. Hover over a box, or tap it, to see its name.`
    : "No image has an error at the best threshold.";
  byId("gallery").classList.toggle("three", Boolean(second));
  if (worst.length) byId("images-legend").append(legendEntry("ground truth, detected", TRUTH), legendEntry("ground truth, missed", MISSED),
    legendEntry("correct detection", RIGHT), legendEntry("wrong detection", WRONG), legendEntry("crowd", CROWD));
  for (const image of worst) {
    const [one] = image.models;
    const objects = image.objects.map(([x, y, w, h, k, crowd, mask], place) => ({ x, y, w, h, label: names[k], mask, opacity: 0, ...(crowd ? CROWD : one.found[place] ? TRUTH : MISSED),
      title: names[k] + (crowd ? ", crowd" : one.found[place] ? "" : ", missed") }));
    const panels = [el("figure", {}, boxedImage(image, objects), el("figcaption", {}, "ground truth"))];
    image.models.forEach((model, m) => {
      const boxes = model.detections.map(([x, y, w, h, k, score, right, mask]) => ({ x, y, w, h, label: names[k], mask, score: score.toFixed(2), ...(right ? RIGHT : WRONG), title: `${names[k]} ${score}${right ? "" : ", wrong"}` }));
      panels.push(el("figure", {}, boxedImage(image, boxes), el("figcaption", {}, `${second ? label(m) + ": " : ""}${model.wrong} wrong, ${model.missed} missed`)));
    });
    byId("gallery").append(el("div", {}, el("h3", {}, image.name), el("div", { class: "panels" }, ...panels)));
  }
}
