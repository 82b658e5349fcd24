// Masks over an image, from COCO's compressed RLE: a translucent fill, an outline of the same color and a dark rim.
const { PALETTE, HALO, OPACITY, SHADES } = __DRAWING__; // inserted by html.py

const rgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));

// Different shades of equal colors for neighbors from left to right. items: [{ box: [x1, y1, x2, y2], color: "#rrggbb" }].
function shade(items) {
  const counts = {}, center = ({ box }) => box[0] + box[2], shades = new Map();
  for (const item of [...items].sort((a, b) => center(a) - center(b))) {
    const number = (counts[item.color] = (counts[item.color] ?? -1) + 1), [target, part] = SHADES[number % SHADES.length];
    shades.set(item, rgb(item.color).map((value) => Math.round(value + part * (target - value))));
  }
  return shades;
}

// Lengths of the runs outside and inside of a mask, alternating, column by column.
function decodeRle(counts) {
  const lengths = [];
  for (let i = 0; i < counts.length;) {
    let value = 0, shift = 0, code;
    do {
      code = counts.charCodeAt(i++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value |= -1 << shift;
    lengths.push(lengths.length > 2 ? value + lengths.at(-2) : value);
  }
  return lengths;
}

// A mask on a w × h canvas with a margin around it, column by column: 1 where a cell touches the mask, so that no object
// is too small to see. left to bottom: the region that has all of them.
function resizeMask({ size: [height, width], counts }, w, h, margin) {
  const H = h + 2 * margin, cells = new Uint8Array((w + 2 * margin) * H), region = { left: w, right: 0, top: h, bottom: 0 };
  let start = 0, area = 0;
  decodeRle(counts).forEach((length, number) => {
    const end = start + length;
    for (let x = Math.floor(start / height); number % 2 && x * height < end; x++) {
      const left = Math.floor((x * w) / width), right = Math.ceil(((x + 1) * w) / width);
      const top = Math.floor((Math.max(start - x * height, 0) * h) / height);
      const bottom = Math.ceil((Math.min(end - x * height, height) * h) / height);
      for (let column = left; column < right; column++)
        cells.fill(1, (column + margin) * H + margin + top, (column + margin) * H + margin + bottom);
      region.left = Math.min(region.left, left);
      region.right = Math.max(region.right, right);
      region.top = Math.min(region.top, top);
      region.bottom = Math.max(region.bottom, bottom);
      area += (right - left) * (bottom - top);
    }
    start = end;
  });
  return { cells, area, ...region };
}

// Paints masks over a canvas, the smallest on top, so that colors never mix; those without a fill come last.
// items: [{ mask: RLE, color: [r, g, b], opacity: of the fill, 0 to 255 }]. line: width of the outline in pixels.
function paintMasks(canvas, items, line = 2) {
  const { width: w, height: h } = canvas, context = canvas.getContext("2d"), H = h + 2 * line;
  context.clearRect(0, 0, w, h);
  if (!items.length || !w || !h) return;
  const picture = context.createImageData(w, h), pixels = new Uint32Array(picture.data.buffer);
  const pixel = (color, alpha) => new Uint32Array(Uint8Array.of(...color, alpha).buffer)[0], rim = pixel(rgb(HALO), 255);
  const masks = items.map((item) => ({ ...item, ...resizeMask(item.mask, w, h, line) }));
  masks.sort((a, b) => !a.opacity - !b.opacity || b.area - a.area);
  for (const { cells, left, right, top, bottom, color, opacity } of masks) {
    const edge = pixel(color, 255), fill = pixel(color, opacity);
    for (let x = Math.max(left - 1, 0); x < Math.min(right + 1, w); x++)
      for (let y = Math.max(top - 1, 0); y < Math.min(bottom + 1, h); y++) {
        const at = (x + line) * H + y + line;
        if (cells[at]) {
          let inside = 1;
          for (let d = 1; d <= line; d++) inside &= cells[at - d] & cells[at + d] & cells[at - d * H] & cells[at + d * H];
          if (!inside || opacity) pixels[y * w + x] = inside ? fill : edge;
        } else if (cells[at - 1] | cells[at + 1] | cells[at - H] | cells[at + H]) pixels[y * w + x] = rim;
      }
  }
  context.putImageData(picture, 0, 0);
}
