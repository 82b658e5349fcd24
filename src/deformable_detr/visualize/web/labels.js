// Labels of boxes. Boxes, areas and places are [left, top, right, bottom] in pixels of the screen.
const FONT = "12px system-ui, sans-serif", BOLD = `600 ${FONT}`, LINE = 16, PAD = 4;
const ruler = document.createElement("canvas").getContext("2d");

function textWidth(text, font = FONT) {
  ruler.font = font;
  return ruler.measureText(text).width;
}

// Returns the text, shortened with "…" to fit `room` pixels.
function fitted(text, room, font = FONT) {
  if (textWidth(text, font) <= room) return text;
  const letters = [...text];
  while (letters.length && textWidth(letters.join("") + "…", font) > room) letters.pop();
  return letters.join("") + "…";
}

// The text of a label and its place at the box, inside the area and on none of the taken places; null without room.
function placeLabel(name, score, box, area, taken) {
  const [left, top, right, bottom] = area, [x1, y1, x2, y2] = box;
  const text = fitted(name, right - left - 2 * PAD - textWidth(score, BOLD), BOLD) + score;
  const width = Math.min(right - left, textWidth(text, BOLD) + 2 * PAD);
  const places = [y1 - LINE, y1, y2 - LINE, y2].flatMap((y) => [x1, x2 - width].map((x) => {
    const [a, b] = [Math.max(left, Math.min(x, right - width)), Math.max(top, Math.min(y, bottom - LINE))];
    return [a, b, a + width, b + LINE];
  }));
  const place = places.find(([a, b, c, d]) => taken.every(([e, f, g, h]) => a >= g || c <= e || b >= h || d <= f));
  return { text, place: place ?? null };
}

// scale: units of the SVG per pixel of the screen.
function labelElement({ text, place: [x1, y1, x2, y2] }, ground, ink, scale) {
  return svg("g", { class: "label", "pointer-events": "none" },
    svg("rect", { x: x1 * scale, y: y1 * scale, width: (x2 - x1) * scale, height: (y2 - y1) * scale, fill: ground, "fill-opacity": 0.88 }),
    svg("text", { x: (x1 + PAD) * scale, y: (y1 + 12) * scale, "font-size": 12 * scale, "font-weight": 600, fill: ink }, text));
}
