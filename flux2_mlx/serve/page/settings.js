/** The options of an image, as the form has them. */

import { byId, make } from "./dom.js";
import { scaled, toMultiple } from "./ladder.js";

const ASPECTS = { "1:1": 1, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "3:4": 3 / 4, "2:3": 2 / 3, "9:16": 9 / 16 };
const SHARES = [0.5, 0.75, 1, 1.25, 1.5]; // of the side that a model was made for
const SEEDS = 1_000_000; // few digits, to read and to say
/** @typedef {import("./ladder.js").Size} Size */

export class Settings {
  /** @param {() => void} changed */
  constructor(changed) {
    this.changed = changed;
    /** @type {any} */
    this.info = null;
    this.native = 1024;
    /** @type {Record<string, any>} what the page has no control for, of a restored image */
    this.others = {};
    this.prompt = byId("prompt");
    this.seed = byId("seed");
    this.newSeed();
    for (const name of Object.keys(ASPECTS)) byId("aspect").append(make("option", { value: name, textContent: name }));
    byId("aspect").append(make("option", { value: "custom", textContent: "Other", hidden: true }));
    byId("aspect").append(make("option", { value: "picture", textContent: "As the picture", hidden: true }));
    for (const name of ["aspect", "side"]) byId(name).addEventListener("change", () => this.resize());
    for (const name of ["width", "height"]) {
      byId(name).addEventListener("change", (/** @type {any} */ event) => {
        event.target.value = toMultiple(event.target.valueAsNumber || this.native);
        this.setSize(this.size, false);
        changed();
      });
    }
    byId("strength").addEventListener("input", () => (byId("strength").dataset.isSet = "yes"));
    for (const name of ["strength", "steps"]) byId(name).addEventListener("input", () => this.showStrength());
    for (const name of ["prompt", "seed", "steps", "guidance", "negative", "strength"]) {
      byId(name).addEventListener("input", changed);
    }
    for (const name of ["color-match", "edit-composite", "threshold"]) byId(name).addEventListener("input", changed);
    for (const name of ["model", "soft-edge", "regions"]) byId(name).addEventListener("change", changed);
    byId("new-seed").addEventListener("click", () => {
      this.newSeed();
      changed();
    });
  }

  newSeed() {
    this.seed.value = Math.floor(Math.random() * SEEDS);
  }

  /** @returns {Size} */
  get size() {
    return { width: byId("width").valueAsNumber || this.native, height: byId("height").valueAsNumber || this.native };
  }

  /** Whether the size is that of the picture that is edited. */
  get isOfPicture() {
    return byId("aspect").value === "picture";
  }

  get isDistilled() {
    return this.info?.model.is_distilled !== false;
  }

  /**
   * What the server offers.
   * @param {any} info
   */
  learn(info) {
    const isNew = this.info?.model.side !== info.model.side;
    this.info = info;
    this.native = info.model.side ?? this.native;
    if (isNew) this.offerSizes();
    byId("steps").placeholder = info.model.steps ?? "";
    byId("guidance").placeholder = info.model.guidance ?? "";
    byId("base-only").hidden = this.isDistilled;
    const models = info.models.map((/** @type {string} */ name) => make("option", { value: name, textContent: name }));
    if (byId("model").options.length !== models.length) byId("model").replaceChildren(...models);
    byId("model-part").hidden = models.length < 2;
    if (byId("loras").childElementCount !== info.loras.length) this.offerLoras(info.loras, info.lora);
    this.showStrength();
  }

  offerSizes() {
    const sides = SHARES.map((share) => toMultiple(this.native * share));
    byId("side").replaceChildren(
      ...sides.map((side) => make("option", { value: String(side), textContent: `${side}`, selected: side === this.native })),
      make("option", { value: "custom", textContent: "Other", hidden: true }),
    );
    this.setSize({ width: this.native, height: this.native });
  }

  /**
   * @param {string[]} names
   * @param {Record<string, number>} own strengths of those that the server has without being asked
   */
  offerLoras(names, own) {
    byId("loras-part").hidden = names.length === 0;
    byId("loras").replaceChildren(...names.map((name, k) => {
      const told = make("span", { className: "value" });
      const slider = make("input", { type: "range", id: `lora-${k}`, name, min: "-1", max: "2", step: "0.05" });
      setStrength(slider, told, own[name] ?? 0);
      slider.addEventListener("input", () => {
        setStrength(slider, told, slider.valueAsNumber);
        this.changed();
      });
      return make("div", { className: "field" }, make("label", { for: slider.id, textContent: name, title: name }), slider, told);
    }));
  }

  /** The size that aspect and side say. */
  resize() {
    const aspect = /** @type {Record<string, number>} */ (ASPECTS)[byId("aspect").value];
    if (aspect) {
      const side = Number(byId("side").value) || this.native;
      this.setSize(scaled({ width: 1000 * aspect, height: 1000 }, side), false);
    }
    byId("size-part").hidden = this.isOfPicture;
    this.changed();
  }

  /**
   * @param {Size} size
   * @param {boolean} tellsAspect whether aspect and side are to follow, where they have such
   */
  setSize({ width, height }, tellsAspect = true) {
    byId("width").value = width;
    byId("height").value = height;
    if (!tellsAspect && byId("aspect").value !== "custom" && this.matches(byId("aspect").value, width, height)) return;
    const aspect = Object.keys(ASPECTS).find((name) => this.matches(name, width, height)) ?? "custom";
    byId("aspect").value = aspect;
    byId("side").value = String(Math.round(Math.sqrt(width * height) / 16) * 16);
    if (byId("side").selectedIndex < 0) byId("side").value = "custom";
    byId("size-part").hidden = false;
  }

  /**
   * Whether this is the size of an aspect at one of the sides on offer.
   * @param {string} name
   * @param {number} width
   * @param {number} height
   */
  matches(name, width, height) {
    const aspect = /** @type {Record<string, number>} */ (ASPECTS)[name];
    if (!aspect) return false;
    const own = scaled({ width: 1000 * aspect, height: 1000 }, Math.sqrt(width * height));
    return own.width === width && own.height === height;
  }

  /**
   * Follow the picture that is edited, or not.
   * @param {boolean} hasPicture
   */
  offerPicture(hasPicture) {
    const option = byId("aspect").querySelector("[value=picture]");
    if (hasPicture === !option.hidden) return;
    option.hidden = !hasPicture;
    if (hasPicture) byId("aspect").value = "picture";
    else if (this.isOfPicture) this.setSize(this.size);
    byId("size-part").hidden = this.isOfPicture;
  }

  get steps() {
    return byId("steps").valueAsNumber || this.info?.model.steps || 4;
  }

  /** The strength as the slider has it, null for the model's own. */
  get strength() {
    return byId("strength").dataset.isSet ? byId("strength").valueAsNumber : null;
  }

  /** How an edit is brought back to its first reference, by options' names. */
  get edit() {
    /** @type {Record<string, any>} */
    const edit = {};
    if (byId("color-match").checked) edit.color_match = true;
    if (byId("edit-composite").checked) edit.edit_composite = byId("threshold").valueAsNumber || true;
    return edit;
  }

  showStrength() {
    const slider = byId("strength");
    // Of few steps only whole ones can be left out.
    slider.step = slider.min = this.steps <= 10 ? 1 / this.steps : 0.05;
    byId("strength-told").textContent = slider.dataset.isSet ? slider.valueAsNumber.toFixed(2) : "auto";
  }

  /** What is sent: options by their names, without size and seed where they are the server's to choose. */
  values() {
    const number = (/** @type {string} */ id) => byId(id).valueAsNumber;
    /** @type {Record<string, any>} */
    const values = { ...this.others, prompt: this.prompt.value.trim(), seed: number("seed") || 0 };
    if (number("steps")) values.num_steps = number("steps");
    const regions = byId("regions").value.split("\n").filter((/** @type {string} */ line) => line.trim());
    if (regions.length) values.region = regions;
    if (!this.isDistilled) {
      if (!Number.isNaN(number("guidance"))) values.guidance = number("guidance");
      if (byId("negative").value) values.negative_prompt = byId("negative").value;
    }
    if (byId("model").value) values.model = byId("model").value;
    const own = this.info?.lora ?? {};
    const loras = [...byId("loras").querySelectorAll("input")].filter((slider) => slider.valueAsNumber || slider.name in own);
    if (loras.length) values.lora = Object.fromEntries(loras.map((slider) => [slider.name, slider.valueAsNumber]));
    return values;
  }

  /**
   * Take an image's settings.
   * @param {Record<string, any>} settings
   */
  restore(settings) {
    const own = ["prompt", "seed", "width", "height", "num_steps", "guidance", "negative_prompt", "region", "model", "lora",
      "strength", "mask_blur", "mask_padding", "expand", "num_images", "batch_size", "inputs",
      "color_match", "edit_composite", "reference_strength"];
    const known = Object.keys(this.info?.options ?? {});
    this.others = Object.fromEntries(
      Object.entries(settings).filter(([name, value]) => known.includes(name) && !own.includes(name) && value !== null),
    );
    this.prompt.value = settings.prompt ?? "";
    if (settings.seed != null) this.seed.value = settings.seed;
    byId("steps").value = settings.num_steps === this.info?.model.steps ? "" : (settings.num_steps ?? "");
    byId("guidance").value = settings.guidance ?? "";
    byId("negative").value = settings.negative_prompt ?? "";
    byId("color-match").checked = settings.color_match === true;
    byId("edit-composite").checked = settings.edit_composite != null;
    byId("threshold").value = settings.edit_composite ?? "";
    byId("regions").value = (settings.region ?? []).join("\n");
    if ([...byId("model").options].some((option) => option.value === settings.model)) byId("model").value = settings.model;
    if (settings.width && settings.height) this.setSize(settings);
    const pairs = (settings.lora ?? []).map((/** @type {string} */ text) => /^(.*?)(?::(-?[\d.]+))?$/.exec(text) ?? []);
    const loras = new Map(pairs.map((/** @type {any} */ [, name, scale]) => [name, Number(scale ?? 1)]));
    for (const slider of byId("loras").querySelectorAll("input")) {
      setStrength(slider, slider.nextElementSibling, loras.get(slider.name) ?? 0);
    }
  }
}

/**
 * Set a LoRA's slider and what is told of it.
 * @param {HTMLInputElement} slider
 * @param {Element} told
 * @param {number} strength
 */
function setStrength(slider, told, strength) {
  slider.value = String(strength);
  told.textContent = strength ? strength.toFixed(2) : "off";
}
