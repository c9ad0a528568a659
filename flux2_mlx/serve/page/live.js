/**
 * What is drawn when: one request in flight, the newest wins.
 *
 * Where a draft is quick, changes are throttled: the first is drawn at once, the next one not before a draft's time has
 * passed, so that a steady typist sees drafts all the while. Elsewhere a change ends what runs, and is drawn after a
 * pause. The last rung of a ladder waits until nothing has changed for a while.
 */

const PAUSE = 200; // ms without a change
const REST = 1000; // ms without a change, before the chosen size is drawn
const SHORTEST = 128; // ms between two requests

/**
 * @template Order, Result
 * @typedef {object} Hands what Live is given to work with
 * @property {(order: Order) => import("./ladder.js").Rung[]} rungs
 * @property {(order: Order, rung: import("./ladder.js").Rung, before: Result | null, signal: AbortSignal)
 *   => Promise<Result>} draw
 * @property {() => number | null} quick ms that a draft takes, where it is quick
 * @property {(error: any) => number | null} fail ms after which to try again
 * @property {(isBusy: boolean) => void} [busy]
 * @property {() => number} [now]
 * @property {(run: () => void, ms: number) => any} [later]
 * @property {(timer: any) => void} [forget]
 */

/** @template Order, Result */
export class Live {
  /** @param {Hands<Order, Result>} hands */
  constructor(hands) {
    this.hands = {
      now: () => performance.now(),
      later: (/** @type {() => void} */ run, /** @type {number} */ ms) => setTimeout(run, ms),
      forget: (/** @type {any} */ timer) => clearTimeout(timer),
      busy: () => {},
      ...hands,
    };
    /** @type {Order | null} */
    this.wanted = null;
    /** @type {AbortController | null} */
    this.running = null;
    this.timer = null;
    this.started = -Infinity;
    this.changed = -Infinity;
    /** @type {() => void} ends a wait for rest */
    this.wake = () => {};
  }

  get isBusy() {
    return this.running !== null || this.timer !== null;
  }

  /**
   * Draw this instead of what was wanted before.
   * @param {Order} order
   * @param {boolean} isNow without a pause, and without waiting for rest
   */
  want(order, isNow = false) {
    const { now, quick } = this.hands;
    this.wanted = order;
    this.changed = isNow ? -Infinity : now();
    if (isNow) return this.begin();
    const draft = quick();
    if (draft === null) {
      this.hangUp();
      return this.beginIn(PAUSE);
    }
    return this.beginIn(Math.max(0, this.started + Math.max(SHORTEST, 1.2 * draft) - now()));
  }

  /** Draw what is wanted up to its chosen size, without waiting for rest. */
  hurry() {
    this.changed = -Infinity;
    this.wake();
  }

  /** Draw nothing any more. */
  stop() {
    this.wanted = null;
    this.hands.forget(this.timer);
    this.timer = null;
    this.hangUp();
    this.hands.busy(false);
  }

  hangUp() {
    this.running?.abort();
    this.running = null;
  }

  /** @param {number} ms */
  beginIn(ms) {
    this.hands.forget(this.timer);
    this.timer = this.hands.later(() => this.begin(), ms);
    this.hands.busy(true);
  }

  begin() {
    this.hands.forget(this.timer);
    this.hangUp();
    this.timer = null;
    const order = this.wanted;
    if (order === null) return;
    this.started = this.hands.now();
    this.running = new AbortController();
    this.hands.busy(true);
    void this.climb(order, this.running);
  }

  /**
   * @param {Order} order
   * @param {AbortController} own
   */
  async climb(order, own) {
    /** @type {Result | null} */
    let result = null;
    try {
      for (const rung of this.hands.rungs(order)) {
        if (rung.waits) await this.rest(own.signal);
        result = await this.hands.draw(order, rung, result, own.signal);
        if (own.signal.aborted) return;
      }
    } catch (error) {
      if (own.signal.aborted) return;
      const again = this.hands.fail(error);
      this.running = null;
      if (again !== null) return void this.beginIn(again);
    }
    this.running = null;
    this.hands.busy(this.timer !== null);
  }

  /**
   * Until typing rests, or the signal.
   * @param {AbortSignal} signal
   * @returns {Promise<void>}
   */
  rest(signal) {
    const ms = this.changed + REST - this.hands.now();
    if (ms <= 0) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const timer = this.hands.later(resolve, ms);
      this.wake = resolve;
      signal.addEventListener("abort", () => {
        this.hands.forget(timer);
        reject(signal.reason);
      });
    });
  }
}
