/** The start image in the picture's place: its mask, and its edges, which are dragged outward (outpainting). */

import { Brush } from "./brush.js";
import { byId, make } from "./dom.js";

const GRID = 16; // pixels
/** @typedef {"left" | "top" | "right" | "bottom"} Side */
/** @type {Side[]} */
const SIDES = ["left", "top", "right", "bottom"];

export class Editor {
  /**
   * @param {import("./stage.js").Stage} stage
   * @param {() => void} closed the mask is done
   */
  constructor(stage, closed) {
    this.stage = stage;
    this.closed = closed;
    this.panel = byId("editor");
    this.tools = byId("mask-tools");
    this.base = byId("base");
    this.canvas = byId("mask");
    this.brush = new Brush(this.canvas, byId("ring"), () => {});
    /** @type {import("./references.js").Picture | null} */
    this.picture = null;
    this.edges = Object.fromEntries(SIDES.map((side) => [side, this.edge(side)]));
    this.panel.append(...Object.values(this.edges));
    byId("brush-size").addEventListener("input", (/** @type {any} */ event) => {
      this.brush.share = event.target.valueAsNumber / 100;
    });
    byId("soft-edge").addEventListener("input", () => this.soften());
    byId("erase").addEventListener("click", () => this.setErases(!this.brush.erases));
    byId("undo").addEventListener("click", () => this.brush.undo());
    byId("invert").addEventListener("click", () => this.brush.invert());
    byId("clear").addEventListener("click", () => this.brush.clear());
    byId("mask-done").addEventListener("click", () => this.close());
    this.panel.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) this.brush.undo();
    });
  }

  get isOpen() {
    return this.picture !== null;
  }

  /** The mask's blur in the picture's pixels. */
  get blur() {
    return byId("soft-edge").valueAsNumber;
  }

  /** @param {import("./references.js").Picture} picture */
  open(picture) {
    this.picture = picture;
    this.base.src = picture.url;
    this.base.alt = `${picture.name}, to brush over`;
    this.brush.load(picture, picture.mask);
    this.setErases(false);
    this.panel.hidden = this.tools.hidden = false;
    byId("result-tools").hidden = true;
    this.layOut();
    this.soften();
    this.canvas.focus({ preventScroll: true });
  }

  close() {
    if (!this.picture) return;
    this.brush.release();
    this.picture.mask = this.brush.copy();
    this.picture = null;
    this.panel.hidden = this.tools.hidden = true;
    byId("result-tools").hidden = false;
    this.closed();
  }

  /** @param {boolean} erases */
  setErases(erases) {
    this.brush.erases = erases;
    byId("erase").setAttribute("aria-pressed", String(erases));
  }

  soften() {
    const scale = this.base.clientWidth / (this.picture?.width ?? 1);
    this.canvas.style.filter = this.blur ? `blur(${this.blur * scale}px)` : "";
  }

  /** Place picture and edges in a frame that has what is added. */
  layOut() {
    if (!this.picture) return;
    const { width, height, expand } = this.picture;
    const whole = { width: width + expand.left + expand.right, height: height + expand.top + expand.bottom };
    this.stage.setAspect(whole);
    for (const element of [this.base, this.canvas]) {
      element.style.left = `${(100 * expand.left) / whole.width}%`;
      element.style.top = `${(100 * expand.top) / whole.height}%`;
      element.style.width = `${(100 * width) / whole.width}%`;
      element.style.height = `${(100 * height) / whole.height}%`;
    }
    for (const side of SIDES) {
      this.edges[side].setAttribute("aria-valuenow", String(expand[side]));
      this.edges[side].setAttribute("aria-valuetext", `${expand[side]} pixels added`);
      this.edges[side].dataset.added = expand[side] ? `+${expand[side]}` : "";
      this.edges[side].setAttribute("aria-valuemax", String(this.most(side)));
    }
  }

  /** @param {Side} side */
  most(side) {
    const { width, height } = this.picture ?? { width: 0, height: 0 };
    return side === "left" || side === "right" ? width : height;
  }

  /**
   * @param {Side} side
   * @param {number} pixels
   */
  extend(side, pixels) {
    if (!this.picture) return;
    const most = Math.floor(this.most(side) / GRID) * GRID;
    this.picture.expand[side] = Math.min(Math.max(Math.round(pixels / GRID) * GRID, 0), most);
    this.layOut();
  }

  /**
   * The handle of an edge.
   * @param {Side} side
   */
  edge(side) {
    const handle = make("div", {
      className: `edge ${side}`,
      tabIndex: 0,
      role: "slider",
      title: "Drag outward to extend the picture",
      "aria-label": `Extend ${side}`,
      "aria-orientation": side === "left" || side === "right" ? "horizontal" : "vertical",
      "aria-valuemin": "0",
    });
    const sign = side === "left" || side === "top" ? -1 : 1;
    const along = side === "left" || side === "right" ? "clientX" : "clientY";
    /** @type {{from: number, added: number, scale: number} | null} */
    let drag = null;
    handle.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => {
      if (!this.picture) return;
      handle.setPointerCapture(event.pointerId);
      const scale = this.picture.width / this.base.clientWidth;
      drag = { from: event[along], added: this.picture.expand[side], scale };
    });
    handle.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
      if (drag) this.extend(side, drag.added + sign * (event[along] - drag.from) * drag.scale);
    });
    for (const name of ["pointerup", "pointercancel"]) handle.addEventListener(name, () => (drag = null));
    handle.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const outward = { left: "ArrowLeft", right: "ArrowRight", top: "ArrowUp", bottom: "ArrowDown" }[side];
      const inward = { left: "ArrowRight", right: "ArrowLeft", top: "ArrowDown", bottom: "ArrowUp" }[side];
      if (event.key !== outward && event.key !== inward) return;
      event.preventDefault();
      const step = event.shiftKey ? 4 * GRID : GRID;
      this.extend(side, (this.picture?.expand[side] ?? 0) + (event.key === outward ? step : -step));
    });
    return handle;
  }
}
