/** Pictures that a request brings: references, and the one that it starts from. */

import { Refusal } from "./api.js";
import { byId, icon, make, uriOf } from "./dom.js";

export const MOST = 4; // references
const MAX_BYTES = 8 * 1024 * 1024; // of a file that is sent as it is
const MAX_SIDE = 2048; // of a larger one, which is scaled down here
const MAX_PIXELS = 13_000_000; // the same: five such pictures are within what the server takes of a request
/** @type {Record<string, string | null>} the types that the server reads, and what moving pictures have in their head */
const TYPES = { "image/png": "acTL", "image/webp": "ANIM", "image/jpeg": null };
const HEAD = 65_536; // bytes, in which an animation says that it is one

/**
 * @typedef {object} Picture
 * @property {string} name
 * @property {string} uri its file as a data URI
 * @property {string} url for the page
 * @property {number} width
 * @property {number} height
 * @property {HTMLCanvasElement | null} mask
 * @property {Record<"left" | "top" | "right" | "bottom", number>} expand
 * @property {number} strength of a reference
 */

/**
 * Whether a file can be sent as it is: not too large, and of one picture that the server reads.
 * @param {Blob} file
 * @param {import("./ladder.js").Size} size
 */
async function isPlain(file, { width, height }) {
  if (!(file.type in TYPES) || file.size > MAX_BYTES || width * height > MAX_PIXELS) return false;
  const mark = TYPES[file.type];
  return !mark || !(await file.slice(0, HEAD).text()).includes(mark);
}

/**
 * A file as a picture; one that is large, moves, or is of a type of few programs, is written anew as it is seen.
 * @param {Blob} file
 * @param {string} name
 * @returns {Promise<Picture>}
 */
export async function readPicture(file, name) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Refusal(`${name} is no picture that this browser can open.`, 400);
  });
  let { width, height } = bitmap;
  let content = file;
  if (!(await isPlain(file, bitmap))) {
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
    [width, height] = [Math.round(width * scale), Math.round(height * scale)];
    const canvas = make("canvas", { width, height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    content = await new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.95));
  }
  bitmap.close();
  const expand = { left: 0, top: 0, right: 0, bottom: 0 };
  return { name, uri: await uriOf(content), url: URL.createObjectURL(content), width, height, mask: null, expand, strength: 1 };
}

/** The row of pictures under the prompt. */
export class References {
  /** @param {() => void} changed */
  constructor(changed) {
    this.changed = changed;
    this.row = byId("references");
    /** @type {Picture[]} */
    this.pictures = [];
    /** @type {Picture | null} one of them */
    this.start = null;
    /** @type {number[]} strengths of references that are still to come, of restored settings */
    this.coming = [];
  }

  /** Those that are references alone. */
  get others() {
    return this.pictures.filter((picture) => picture !== this.start);
  }

  /** Whether a part of the start image alone is drawn, or what is added to it. */
  get inpaints() {
    return this.start !== null && (this.start.mask !== null || Object.values(this.start.expand).some(Boolean));
  }

  /**
   * @param {Iterable<Blob>} files
   * @param {{isStart?: boolean, name?: string}} [how]
   */
  async add(files, { isStart = false, name = "" } = {}) {
    for (const file of files) {
      if (this.others.length >= MOST && !isStart) throw new Refusal(`At most ${MOST} references; remove one first.`, 400);
      const own = file instanceof File ? file.name : "";
      const picture = await readPicture(file, name || own || "picture");
      this.pictures.push(picture);
      if (isStart) this.start = picture;
      else picture.strength = this.coming.shift() ?? 1;
    }
    this.show();
    this.changed();
  }

  /** @param {Picture} picture */
  remove(picture) {
    this.pictures = this.pictures.filter((one) => one !== picture);
    if (this.start === picture) this.start = null;
    URL.revokeObjectURL(picture.url);
    this.show();
    this.changed();
  }

  clear() {
    for (const picture of this.pictures) URL.revokeObjectURL(picture.url);
    this.pictures = [];
    this.start = null;
    this.show();
  }

  /**
   * Have an image's strengths of references again, in turn.
   * @param {number[]} strengths
   */
  restore(strengths) {
    const { others } = this;
    for (const [k, picture] of others.entries()) picture.strength = strengths[k] ?? 1;
    this.coming = strengths.slice(others.length);
    this.show();
  }

  /** @param {Picture | null} picture */
  startFrom(picture) {
    if (picture === null && this.others.length >= MOST) throw new Refusal(`At most ${MOST} references; remove one first.`, 400);
    this.start = picture;
    this.show();
    this.changed();
  }

  show() {
    byId("pictures").hidden = this.pictures.length === 0;
    this.row.replaceChildren(...this.pictures.map((picture, k) => this.tile(picture, k + 1)));
  }

  /**
   * @param {Picture} picture
   * @param {number} number
   */
  tile(picture, number) {
    const isStart = picture === this.start;
    const name = `${isStart ? "start image" : "reference"} ${number}, ${picture.name}`;
    const start = make("button", {
      type: "button",
      className: "start",
      textContent: isStart && picture.mask ? "Masked" : "Start",
      title: "Start from this picture (img2img, mask, outpainting) instead of from noise",
      "aria-pressed": String(isStart),
      "aria-label": `Start from ${picture.name}`,
      onclick: () => this.startFrom(isStart ? null : picture),
    });
    const remove = make("button", {
      type: "button",
      className: "remove",
      title: "Remove",
      "aria-label": `Remove ${name}`,
      onclick: () => this.remove(picture),
    });
    remove.append(icon("close"));
    const seen = make("div", { className: "seen" }, make("img", { src: picture.url, alt: name }), start, remove);
    const tile = make("li", { className: isStart ? "tile is-start" : "tile" }, seen);
    if (!isStart) tile.append(this.strengthOf(picture, name));
    return tile;
  }

  /**
   * The slider of a reference's strength.
   * @param {Picture} picture
   * @param {string} name
   */
  strengthOf(picture, name) {
    const told = make("span", { className: "value", textContent: picture.strength.toFixed(2) });
    const slider = make("input", {
      type: "range",
      min: "0",
      max: "2",
      step: "0.05",
      value: String(picture.strength),
      title: "How much this reference counts; 0 leaves it out",
      "aria-label": `Strength of ${name}`,
      oninput: () => {
        picture.strength = slider.valueAsNumber;
        told.textContent = picture.strength.toFixed(2);
        this.changed();
      },
    });
    return make("div", { className: "strength" }, slider, told);
  }
}
