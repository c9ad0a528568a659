/** The images of this session, the newest first. */

import { byId, icon, make } from "./dom.js";

const MOST = 100; // images that are kept, of some hundred kB each

/**
 * @typedef {object} Made an image that was drawn
 * @property {string} url
 * @property {Blob} blob its file, with its settings
 * @property {string} prompt
 * @property {Record<string, any>} settings
 * @property {string} parameters
 * @property {number} seed
 * @property {number} width
 * @property {number} height
 */

export class History {
  /**
   * @param {{show: (image: Made) => void, reuse: (image: Made) => void}} hands
   */
  constructor(hands) {
    this.hands = hands;
    this.list = byId("history");
    /** @type {Made[]} */
    this.images = [];
    /** @type {Made | null} */
    this.shown = null;
  }

  /** The image before the one that is shown. */
  get before() {
    return this.images[this.images.findIndex((image) => image === this.shown) + 1] ?? null;
  }

  /** @param {Made} image */
  add(image) {
    this.images.unshift(image);
    this.list.prepend(this.entry(image));
    for (const old of this.images.splice(MOST)) {
      this.list.lastElementChild.remove();
      URL.revokeObjectURL(old.url);
    }
    byId("history-part").hidden = false;
    this.list.scrollLeft = 0;
    this.mark(image);
  }

  /** @param {Made | null} image that is shown */
  mark(image) {
    this.shown = image;
    [...this.list.children].forEach((entry, k) => {
      const isShown = this.images[k] === image;
      entry.classList.toggle("is-shown", isShown);
      entry.firstElementChild.setAttribute("aria-pressed", String(isShown));
    });
  }

  /** @param {Made} image */
  entry(image) {
    const told = `${image.prompt}, seed ${image.seed}`;
    const show = make("button", {
      type: "button",
      className: "show",
      title: `${image.prompt}\n${image.width} × ${image.height}, seed ${image.seed}`,
      "aria-label": `Show ${told}`,
      onclick: () => this.hands.show(image),
    }, make("img", { src: image.url, alt: "", loading: "lazy" }));
    const reuse = make("button", {
      type: "button",
      className: "reuse",
      title: "Use as reference",
      "aria-label": `Use as reference: ${told}`,
      onclick: () => this.hands.reuse(image),
    });
    reuse.append(icon("add"));
    return make("li", {}, show, reuse);
  }
}
