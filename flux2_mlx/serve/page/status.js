/** What happens, in words: one line that assistive technology reads, and a bar. */

import { byId, inSeconds } from "./dom.js";

const SHORT = 400; // ms of waiting that are not told: the request before this one is at its last step
const SELDOM = 1000; // ms between two lines about steps, so that a reader is not flooded

export class Status {
  constructor() {
    this.line = byId("status");
    this.bar = byId("progress");
    this.told = -Infinity;
    this.timer = 0;
  }

  /**
   * @param {string} text
   * @param {boolean} isFault
   */
  say(text, isFault = false) {
    clearTimeout(this.timer);
    if (this.line.textContent !== text) this.line.textContent = text;
    this.line.classList.toggle("is-fault", isFault);
    this.told = isFault ? -Infinity : performance.now();
  }

  /** @param {number} position */
  queued(position) {
    const before = position === 1 ? "1 image comes" : `${position} images come`;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.say(position ? `Waiting: ${before} before this one` : "Starting"), SHORT);
  }

  /**
   * @param {{index: number, steps: number, seconds_left: number}} step
   * @param {import("./ladder.js").Rung} rung
   */
  step({ index, steps, seconds_left: left }, rung) {
    clearTimeout(this.timer);
    this.bar.hidden = false;
    this.bar.max = steps;
    this.bar.value = index;
    const kind = rung.isDraft ? "Draft" : "Image";
    const text = `${kind}: step ${index} of ${steps}, ${inSeconds(left)} left`;
    this.bar.textContent = text;
    if (performance.now() - this.told >= SELDOM) this.say(text);
  }

  /** @param {boolean} isBusy */
  busy(isBusy) {
    if (!isBusy) {
      this.bar.hidden = true;
      clearTimeout(this.timer);
    }
    byId("stage").setAttribute("aria-busy", String(isBusy));
    byId("stop").hidden = !isBusy;
  }
}
