/** A mask that is brushed over a picture: by mouse, touch and pen, and by the arrow keys. */

const COLOUR = "#ff2d78"; // of what is drawn anew, shown half transparent
const MAX_SIDE = 1024; // of a mask, which the server scales to its picture
const UNDO = 20;

/** The mask's canvas, and how it is drawn on. */
export class Brush {
  /**
   * @param {HTMLCanvasElement} canvas which lies over the picture and has its aspect
   * @param {HTMLElement} ring which shows where and how large the brush is
   * @param {() => void} changed
   */
  constructor(canvas, ring, changed) {
    this.canvas = canvas;
    this.ring = ring;
    this.changed = changed;
    this.share = 0.14; // of the picture's shorter side
    this.erases = false;
    this.isDown = false;
    this.at = { x: 0, y: 0 };
    /** @type {ImageData[]} */
    this.before = [];
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.release());
    canvas.addEventListener("pointerleave", () => this.hideRing());
    canvas.addEventListener("blur", () => this.release());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  get context() {
    return /** @type {CanvasRenderingContext2D} */ (this.canvas.getContext("2d", { willReadFrequently: true }));
  }

  get size() {
    return Math.max(2, this.share * Math.min(this.canvas.width, this.canvas.height));
  }

  /**
   * Begin with a picture's mask.
   * @param {import("./ladder.js").Size} picture
   * @param {HTMLCanvasElement | null} mask of the last time
   */
  load(picture, mask) {
    const scale = Math.min(1, MAX_SIDE / Math.max(picture.width, picture.height));
    this.canvas.width = Math.round(picture.width * scale);
    this.canvas.height = Math.round(picture.height * scale);
    this.before = [];
    this.at = { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    if (mask) this.context.drawImage(mask, 0, 0);
  }

  /** A copy of the mask, or null where nothing is marked. */
  copy() {
    const { width, height } = this.canvas;
    const { data } = this.context.getImageData(0, 0, width, height);
    if (!data.some((value, k) => k % 4 === 3 && value > 0)) return null;
    const copy = document.createElement("canvas");
    Object.assign(copy, { width, height });
    copy.getContext("2d")?.drawImage(this.canvas, 0, 0);
    return copy;
  }

  remember() {
    this.before = [...this.before, this.context.getImageData(0, 0, this.canvas.width, this.canvas.height)].slice(-UNDO);
  }

  undo() {
    const last = this.before.pop();
    if (last) this.context.putImageData(last, 0, 0);
    this.changed();
  }

  clear() {
    this.remember();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.changed();
  }

  invert() {
    this.remember();
    this.fill("source-out");
    this.changed();
  }

  /** @param {GlobalCompositeOperation} operation */
  fill(operation) {
    const { context } = this;
    context.save();
    context.globalCompositeOperation = operation;
    context.fillStyle = COLOUR;
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.restore();
  }

  /** @param {PointerEvent} event */
  press(event) {
    if (event.button > 2 && event.button !== 5) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.remember();
    this.isDown = true;
    // The other button, and a pen's other end, erase.
    this.erasesNow = this.erases || event.button === 2 || event.button === 5 || event.altKey;
    this.at = this.place(event);
    this.stroke(this.at, event.pointerType === "pen" ? event.pressure : 1);
  }

  /** @param {PointerEvent} event */
  move(event) {
    this.showRing(this.place(event));
    if (!this.isDown) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) {
      this.stroke(this.place(one), one.pointerType === "pen" ? one.pressure : 1);
    }
  }

  release() {
    if (!this.isDown) return;
    this.isDown = false;
    this.changed();
  }

  /**
   * Where an event is, in the mask's pixels.
   * @param {PointerEvent} event
   */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  /**
   * @param {{x: number, y: number}} to
   * @param {number} pressure
   */
  stroke(to, pressure) {
    const { context } = this;
    context.save();
    context.globalCompositeOperation = this.erasesNow ? "destination-out" : "source-over";
    context.strokeStyle = COLOUR;
    context.lineWidth = this.size * (0.3 + 0.7 * pressure);
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(this.at.x, this.at.y);
    context.lineTo(to.x + 0.01, to.y); // a line of no length is not drawn
    context.stroke();
    context.restore();
    this.at = to;
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const far = event.shiftKey ? 0.25 : 1;
    /** @type {Record<string, [number, number]>} */
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const way = ways[event.key];
    if (way) {
      const step = (this.size / 2) * far;
      const clamp = (/** @type {number} */ value, /** @type {number} */ most) => Math.min(Math.max(value, 0), most);
      const to = {
        x: clamp(this.at.x + way[0] * step, this.canvas.width),
        y: clamp(this.at.y + way[1] * step, this.canvas.height),
      };
      if (this.isDown) this.stroke(to, 1);
      this.at = to;
    } else if (event.key === " ") {
      if (this.isDown) this.release();
      else {
        this.remember();
        this.isDown = true;
        this.erasesNow = this.erases;
        this.stroke(this.at, 1);
      }
    } else return;
    event.preventDefault();
    this.showRing(this.at);
  }

  /** @param {{x: number, y: number}} at */
  showRing(at) {
    const scale = this.canvas.clientWidth / this.canvas.width;
    const size = this.size * scale;
    this.ring.hidden = false;
    this.ring.style.width = this.ring.style.height = `${size}px`;
    this.ring.style.translate = `${at.x * scale - size / 2}px ${at.y * scale - size / 2}px`;
    this.ring.classList.toggle("down", this.isDown);
  }

  hideRing() {
    this.ring.hidden = true;
  }
}

/**
 * A mask as the server wants it: white is drawn anew, black is kept.
 * @param {HTMLCanvasElement} mask
 */
export function blackAndWhite(mask) {
  const [white, whole] = [0, 1].map(() => {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: mask.width, height: mask.height });
    return canvas;
  });
  const one = /** @type {CanvasRenderingContext2D} */ (white.getContext("2d"));
  one.drawImage(mask, 0, 0);
  one.globalCompositeOperation = "source-in";
  one.fillStyle = "#fff";
  one.fillRect(0, 0, mask.width, mask.height);
  const other = /** @type {CanvasRenderingContext2D} */ (whole.getContext("2d"));
  other.fillStyle = "#000";
  other.fillRect(0, 0, mask.width, mask.height);
  other.drawImage(white, 0, 0);
  return whole.toDataURL("image/png");
}
