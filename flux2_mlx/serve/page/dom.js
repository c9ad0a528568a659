/** Small helpers around the document. */

/**
 * The element of that id.
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, any>} [properties] of the element; "data-", "aria-" and "role" become attributes, "on" listeners
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/**
 * An icon of the page's sheet.
 * @param {string} name
 */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/**
 * A data URI's content; the page's policy keeps fetch from reading one.
 * @param {string} uri
 * @returns {Blob}
 */
export function blobOf(uri) {
  const [head, text] = uri.split(",", 2);
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}

/**
 * A blob as a data URI.
 * @param {Blob} blob
 * @returns {Promise<string>}
 */
export function uriOf(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(/** @type {string} */ (reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Whether a key pressed now would be written somewhere. */
export function isWriting() {
  const focused = document.activeElement;
  return focused instanceof HTMLTextAreaElement
    || focused instanceof HTMLSelectElement
    || (focused instanceof HTMLInputElement && !["range", "checkbox", "radio"].includes(focused.type));
}

/**
 * A number in few digits.
 * @param {number} seconds
 */
export function inSeconds(seconds) {
  if (seconds >= 90) return `${Math.round(seconds / 60)} min`;
  return `${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
}
