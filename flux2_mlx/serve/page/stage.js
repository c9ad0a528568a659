/** The picture: the last image, dimmed until the first preview of the next, previews, the image. */

import { byId } from "./dom.js";

export class Stage {
  constructor() {
    this.stage = byId("stage");
    this.picture = byId("picture");
    this.compared = byId("compared");
    this.frame = byId("frame");
  }

  /** @param {import("./ladder.js").Size} size */
  setAspect({ width, height }) {
    this.frame.style.setProperty("--aspect", String(width / height));
  }

  /** What is seen belongs to an older prompt from now on. */
  dim() {
    this.stage.classList.add("is-old");
  }

  /** It stays. */
  undim() {
    this.stage.classList.remove("is-old");
  }

  /**
   * @param {string} url
   * @param {string} prompt
   * @param {"preview" | "draft" | "image"} kind
   * @param {import("./ladder.js").Size | null} size
   */
  show(url, prompt, kind, size) {
    this.picture.src = url;
    this.picture.alt = kind === "image" ? prompt : `${prompt} (${kind})`;
    this.picture.hidden = false;
    this.stage.dataset.shows = kind;
    if (size) this.setAspect(size);
    this.undim();
  }

  /**
   * Another image in this one's place, as long as it is held.
   * @param {{url: string, prompt: string} | null} image
   */
  compare(image) {
    this.compared.hidden = image === null;
    this.compared.src = image?.url ?? "";
    this.compared.alt = image ? `Before: ${image.prompt}` : "";
  }
}
