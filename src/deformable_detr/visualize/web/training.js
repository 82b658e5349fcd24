{
  const minutes = Math.floor(data.seconds / 60), duration = minutes >= 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes} min`;
  byId("facts").textContent = `Step ${data.step}, epoch ${data.epoch}, ${duration} of training. Updated ${data.written}.`;
  const follow = byId("follow"), KEY = "deformable-detr-follow";
  let timer = null;
  const start = () => {
    clearTimeout(timer);
    if (follow.checked) timer = setTimeout(() => location.reload(), 30000);
    sessionStorage.setItem(KEY, follow.checked ? "yes" : "");
  };
  follow.checked = sessionStorage.getItem(KEY) === "yes";
  follow.addEventListener("change", start);
  start();

  const curve = (id, group, lines, fromZero = true) => {
    const series = lines.map(([key, name, number]) => ({ name, color: color(number), points: data[group][key] || [] }))
      .filter((one) => one.points.some((point) => point[1] !== null));
    const values = series.flatMap((one) => one.points.map((point) => point[1])).filter((value) => value !== null);
    if (!values.length) { byId(id).replaceChildren(el("p", {}, "No data yet.")); return; }
    const high = Math.max(...values), low = fromZero ? 0 : Math.min(...values);
    lineChart(byId(id), { series, height: 240, x: { low: 0, high: Math.max(1, data.step), label: "step" },
      y: { low, high: high > low ? high + (high - low) * 0.04 : low + 1, label: lines.length > 1 ? lines[0][3] || "" : lines[0][1] } });
  };
  curve("ap", "evaluation", [["AP", "AP", 0, "AP"], ["AP50", "AP50", 1], ["AP75", "AP75", 2], ["mask_AP", "mask AP", 3]]);
  curve("sizes", "evaluation", [["AP_small", "small", 0, "AP"], ["AP_medium", "medium", 1], ["AP_large", "large", 2]]);
  curve("loss", "train", [["loss", "loss", 0]]);
  curve("parts", "train", [["loss_class", "class", 0, "loss"], ["loss_bbox", "boxes (L1)", 1], ["loss_giou", "boxes (GIoU)", 2],
    ["loss_mask", "masks (cross-entropy)", 3], ["loss_dice", "masks (dice)", 4]]);
  curve("lr", "train", [["lr", "learning rate", 0]]);
  curve("speed", "train", [["images_per_second", "images per second", 0]]);
}
{
  const gallery = data.gallery, slider = byId("evaluation"), score = byId("score");
  if (!gallery || !gallery.evaluations.length) byId("gallery-section").hidden = true;
  else {
    const DETECTED = { color: "#ff8a3d", ground: "#a84300", dash: null }, TRUTH = { color: "#56b4e9", ground: "#005a8c", dash: "5 4" };
    byId("legend").append(legendEntry("ground truth", TRUTH), legendEntry("detection", DETECTED));
    slider.max = gallery.evaluations.length - 1;
    slider.value = slider.max;
    const render = () => {
      const now = gallery.evaluations[+slider.value];
      byId("evaluation-now").textContent = `${+slider.value + 1} of ${gallery.evaluations.length}: step ${now.step}`;
      byId("score-now").textContent = (+score.value).toFixed(2);
      byId("gallery").replaceChildren(...gallery.images.map((image, k) => {
        const detections = now.images[k].filter((one) => one[5] >= +score.value - 1e-9);
        const boxes = [...image.objects.map(([x, y, w, h, label, mask]) => ({ x, y, w, h, label: gallery.names[label], mask, opacity: 0, quiet: true, ...TRUTH })),
          ...[...detections].reverse().map(([x, y, w, h, label, value, mask]) => ({ x, y, w, h, label: gallery.names[label], mask, score: value.toFixed(2), ...DETECTED }))];
        return el("figure", {}, boxedImage(image, boxes), el("figcaption", {}, `${image.name}: ${detections.length} detected, ${image.objects.length} in the ground truth`));
      }));
    };
    slider.addEventListener("input", render);
    score.addEventListener("input", render);
    render();
  }
}
