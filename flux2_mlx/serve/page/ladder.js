/**
 * From a small draft to the chosen size.
 *
 * A draft has the largest size that this machine draws in about half a second, as far as its times so far tell; then
 * comes 512 x 512's number of pixels, then the chosen size. Each begins from the smaller image's latents, so that the
 * composition stays.
 */

export const QUICK = 0.5; // seconds that a draft may take
const MIDDLE = 512;
const SMALLEST = 256; // models draw badly below; one that was made for less, as nano, has no smaller draft than its own
const WORTH = 0.7; // sides of a rung, in shares of the next one's; what is hardly smaller is left out
export const STRENGTH = 0.5; // that a rung begins from the smaller image's latents with
const MEMORY = 3; // times of a size that are kept

/** @typedef {{width: number, height: number}} Size */
/** @typedef {Size & {isDraft: boolean, waits: boolean}} Rung waits: for typing to rest */

/** @param {number} side */
export function toMultiple(side) {
  return Math.max(64, Math.round(side / 16) * 16);
}

/**
 * A size of this aspect with about side x side pixels.
 * @param {Size} size
 * @param {number} side
 * @returns {Size}
 */
export function scaled({ width, height }, side) {
  const scale = side / Math.sqrt(width * height);
  return { width: toMultiple(width * scale), height: toMultiple(height * scale) };
}

/** The times that images took, by what they depend on and by pixels; the least of the last ones counts. */
export class Times {
  constructor() {
    /** @type {Map<string, Map<number, number[]>>} */
    this.known = new Map();
  }

  /**
   * @param {string} kind model, steps and the like
   * @param {number} pixels
   * @param {number} seconds
   */
  learn(kind, pixels, seconds) {
    const sizes = this.known.get(kind) ?? new Map();
    sizes.set(pixels, [...(sizes.get(pixels) ?? []), seconds].slice(-MEMORY));
    this.known.set(kind, sizes);
  }

  /**
   * Seconds that so many pixels will take: those of the nearest size, in proportion; NaN before the first image.
   * @param {string} kind
   * @param {number} pixels
   */
  foresee(kind, pixels) {
    let nearest = NaN;
    let distance = Infinity;
    for (const [known, seconds] of this.known.get(kind) ?? []) {
      const ratio = Math.abs(Math.log(pixels / known));
      if (ratio < distance) {
        distance = ratio;
        nearest = (Math.min(...seconds) * pixels) / known;
      }
    }
    return nearest;
  }

  /**
   * The side of the largest square that is drawn quickly, by 64 from SMALLEST on.
   * @param {string} kind
   */
  quickSide(kind) {
    let side = SMALLEST;
    while (side < 1024 && this.foresee(kind, (side + 64) ** 2) <= QUICK) side += 64;
    return side;
  }
}

/**
 * The sizes to draw, the chosen one last.
 * @param {Size} chosen
 * @param {number} quick side of a draft
 * @param {number} native side that the model was made for
 * @returns {Rung[]}
 */
export function rungsTo(chosen, quick, native) {
  const last = Math.sqrt(chosen.width * chosen.height);
  const draft = Math.max(quick, Math.min(native, SMALLEST));
  /** @type {Rung[]} */
  const rungs = [{ ...chosen, isDraft: false, waits: false }];
  let next = last;
  for (const side of draft < MIDDLE ? [MIDDLE, draft] : [draft]) {
    if (side > WORTH * next) continue;
    rungs.unshift({ ...scaled(chosen, side), isDraft: true, waits: false });
    next = side;
  }
  rungs[rungs.length - 1].waits = rungs.length > 1;
  return rungs;
}
