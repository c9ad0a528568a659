/** What is to be drawn: the body of a request, of what the page says. */

import { blackAndWhite } from "./brush.js";
import { byId } from "./dom.js";
import { scaled } from "./ladder.js";

/**
 * @typedef {object} Order
 * @property {string} key what it depends on; equal orders draw equal images
 * @property {Record<string, any>} body of the request, without a size
 * @property {import("./ladder.js").Size} size
 * @property {boolean} isOfPicture the server takes the size from the picture
 * @property {boolean} isLive with drafts
 * @property {string} kind on which its time depends, beside its size
 */

/**
 * What the page says now; null where it says nothing.
 * @param {import("./settings.js").Settings} settings
 * @param {import("./references.js").References} references
 * @param {number} blur of the mask, in the picture's pixels
 * @returns {Order | null}
 */
export function orderOf(settings, references, blur) {
  const values = settings.values();
  if (!values.prompt) return null;
  const { start, others } = references;
  /** @type {Record<string, any>} */
  const body = { ...values };
  if (others.length) {
    body.image = others.map((picture) => picture.uri);
    if (others.some((picture) => picture.strength !== 1)) body.reference_strength = others.map((picture) => picture.strength);
    if (!references.inpaints) Object.assign(body, settings.edit);
  }
  let size = settings.size;
  if (start) {
    body.init_image = start.uri;
    const added = Object.fromEntries(Object.entries(start.expand).filter(([, pixels]) => pixels));
    if (start.mask) body.mask = blackAndWhite(start.mask);
    if (Object.keys(added).length) body.expand = added;
    if ((body.mask || body.expand) && blur) body.mask_blur = blur;
    if (settings.strength !== null) body.strength = settings.strength;
  }
  if (settings.isOfPicture) size = sizeOfPicture(start ?? others[0]);
  const isLive = byId("live").checked;
  const seen = others.filter((picture) => picture.strength > 0).length;
  const kind = `${values.model} ${settings.steps} ${seen} ${start !== null}`;
  const { isOfPicture } = settings;
  return { key: JSON.stringify([body, size, isLive]), body, size, isOfPicture, isLive, kind };
}

/**
 * The size at which the server draws anew what was made of this.
 * @param {import("./references.js").Picture} picture
 */
function sizeOfPicture({ width, height, expand }) {
  const size = { width: width + expand.left + expand.right, height: height + expand.top + expand.bottom };
  return scaled(size, Math.min(1024, Math.sqrt(size.width * size.height)));
}
