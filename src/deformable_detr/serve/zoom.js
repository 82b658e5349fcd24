// Zooms a picture in a frame that scrolls: mouse wheel, two fingers, buttons. The mouse also moves it.
const MAX_ZOOM = 16;

class Zoom {
  constructor(frame, picture, onChange) {
    Object.assign(this, { frame, picture, onChange, factor: 1, drag: null, pinch: null });
    frame.addEventListener("wheel", (event) => {
      if (picture.hidden || (this.factor === 1 && event.deltaY > 0)) return; // scrolls the page
      event.preventDefault();
      this.set(this.factor * 2 ** (-event.deltaY / (event.ctrlKey ? 60 : 300)), event.clientX, event.clientY);
    }, { passive: false });
    for (const kind of ["touchstart", "touchmove"]) frame.addEventListener(kind, (event) => this.onTouch(event), { passive: false });
    frame.addEventListener("pointerdown", (event) => {
      const isMouse = event.pointerType === "mouse" && event.button === 0 && this.factor > 1;
      this.drag = isMouse ? { x: event.clientX + frame.scrollLeft, y: event.clientY + frame.scrollTop, hasMoved: false } : null;
    });
    frame.addEventListener("pointermove", (event) => {
      if (!this.drag || !event.buttons) return;
      const left = this.drag.x - event.clientX, top = this.drag.y - event.clientY;
      this.drag.hasMoved ||= Math.hypot(left - frame.scrollLeft, top - frame.scrollTop) > 3;
      if (this.drag.hasMoved) frame.scrollTo(left, top);
    });
    frame.addEventListener("click", (event) => { if (this.drag?.hasMoved) event.stopPropagation(); }, true);
  }

  onTouch(event) {
    if (event.touches.length !== 2 || this.picture.hidden) return;
    event.preventDefault(); // neither scroll nor zoom the page
    const [a, b] = event.touches, distance = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    if (event.type === "touchstart") this.pinch = this.factor / distance;
    this.set(this.pinch * distance, (a.clientX + b.clientX) / 2, (a.clientY + b.clientY) / 2);
  }

  /** Zooms; the point of the picture at (x, y) on the screen, by default the center of the frame, stays there. */
  set(factor, x, y) {
    const { frame, picture } = this, view = frame.getBoundingClientRect(), before = picture.getBoundingClientRect();
    [x, y] = [x ?? view.x + view.width / 2, y ?? view.y + view.height / 2];
    this.factor = Math.min(Math.max(factor, 1), MAX_ZOOM);
    picture.style.setProperty("--zoom", this.factor);
    frame.classList.toggle("zoomed", this.factor > 1);
    const after = picture.getBoundingClientRect();
    frame.scrollLeft += after.x + ((x - before.x) / before.width) * after.width - x;
    frame.scrollTop += after.y + ((y - before.y) / before.height) * after.height - y;
    this.onChange();
  }
}
