/** The page: what its parts say to one another. */

import { draw, getInfo, readSettings, Refusal, useKey } from "./api.js";
import { blobOf, byId, inSeconds, isWriting } from "./dom.js";
import { takeFiles } from "./drop.js";
import { Editor } from "./editor.js";
import { History } from "./history.js";
import { QUICK, rungsTo, STRENGTH, Times } from "./ladder.js";
import { Live } from "./live.js";
import { orderOf } from "./order.js";
import { References } from "./references.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { Status } from "./status.js";

const DRAFT_STEPS = 12; // at most; base models take 50
const GONE = 410; // status where the server does not keep an image's latents any more
const PATIENCE = 3; // seconds after which a full queue is asked again, where it does not say
const AWAY = 1; // seconds after which a server is asked again that does not answer: it may be restarted

const status = new Status();
const stage = new Stage();
const times = new Times();
const settings = new Settings(changed);
const references = new References(changed);
const editor = new Editor(stage, () => {
  references.show();
  changed();
});
const history = new History({ show: goBack, reuse: (image) => reuse(image, false) });
/** @type {import("./history.js").Made | null} what is seen, as far as it is no preview */
let shown = null;
let doneKey = "";
let wasAway = false;

/** @type {Live<import("./order.js").Order, string>} */
const live = new Live({
  rungs: (order) => (order.isLive ? rungsTo(order.size, times.quickSide(order.kind), settings.native) : [{ ...order.size, isDraft: false, waits: false }]),
  draw: drawRung,
  quick: quickDraft,
  fail,
  busy: (isBusy) => status.busy(isBusy),
});

/** Milliseconds that a draft takes, where they are few. */
function quickDraft() {
  const order = live.wanted;
  if (!order) return null;
  const [first] = live.hands.rungs(order);
  const seconds = times.foresee(order.kind, first.width * first.height);
  return seconds <= QUICK ? 1000 * seconds : null;
}

/** Something of the form changed. */
function changed() {
  const hasPictures = references.pictures.length > 0;
  settings.offerPicture(hasPictures);
  byId("start-tools").hidden = references.start === null;
  byId("edit-tools").hidden = references.others.length === 0 || references.inpaints;
  byId("draw-mask").disabled = !hasPictures && shown === null;
  if (editor.isOpen && document.activeElement === settings.prompt) return editor.close(); // which comes back here
  if (byId("live").checked && !editor.isOpen) want();
}

/** Draw what the page says, if it is not drawn yet. */
function want(isNow = false) {
  const wanted = orderOf(settings, references, editor.blur);
  if (wanted === null || wanted.key === doneKey) {
    live.stop();
    stage.undim();
    return;
  }
  if (live.isBusy && live.wanted?.key === wanted.key) {
    if (isNow) live.hurry();
    return;
  }
  doneKey = "";
  stage.dim();
  live.want(wanted, isNow);
}

/**
 * Draw one size; what comes back is the id of its latents, for the next size to begin from, "" where there are none.
 * @param {import("./order.js").Order} wanted
 * @param {import("./ladder.js").Rung} rung
 * @param {string | null} before
 * @param {AbortSignal} signal
 */
async function drawRung(wanted, rung, before, signal) {
  const { prompt } = wanted.body;
  const begins = Boolean(before) && !wanted.body.init_image;
  // A draft is better to look at than the noisy previews of what follows it.
  const body = { ...wanted.body, preview: before === null ? "webp" : "none" };
  if (rung.isDraft || !wanted.isOfPicture) Object.assign(body, { width: rung.width, height: rung.height });
  if (begins) Object.assign(body, { init_latents: before, strength: STRENGTH });
  if (rung.isDraft && settings.steps > DRAFT_STEPS) body.num_steps = DRAFT_STEPS;
  let id = "";
  try {
    for await (const { name, data } of draw(body, signal)) {
      if (wasAway) void learn(); // it may have another model now
      wasAway = false;
      if (name === "queued") status.queued(data.position);
      if (name === "step") {
        status.step(data, rung);
        if (data.preview) {
          shown = null;
          stage.show(data.preview, prompt, "preview", wanted.size);
        }
      }
      if (name === "image") {
        id = data.id ?? "";
        if (!begins) times.learn(wanted.kind, rung.width * rung.height, data.seconds);
        finish(wanted, rung, data);
      }
    }
  } catch (error) {
    if (begins && error instanceof Refusal && error.status === GONE) return drawRung(wanted, rung, "", signal);
    throw error;
  }
  return id;
}

/**
 * @param {import("./order.js").Order} wanted
 * @param {import("./ladder.js").Rung} rung
 * @param {any} data of the image event
 */
function finish(wanted, rung, data) {
  const { prompt } = wanted.body;
  const blob = blobOf(data.data);
  const { seed, width, height } = data;
  const url = rung.isDraft ? data.data : URL.createObjectURL(blob);
  shown = { url, blob, prompt, seed, width, height, settings: data.settings, parameters: data.parameters };
  stage.show(url, prompt, rung.isDraft ? "draft" : "image", rung.isDraft ? wanted.size : { width, height });
  if (!rung.isDraft) {
    doneKey = wanted.key;
    history.add(shown);
    status.say([`Done in ${inSeconds(data.seconds)}: ${width} × ${height}, seed ${seed}`, ...data.warnings].join(". "));
  }
  if (wanted.body.model && wanted.body.model !== settings.info?.model.name) void learn(); // another one is loaded
  offerTools();
}

function offerTools() {
  for (const name of ["use-reference", "use-start", "download", "draw-mask"]) byId(name).disabled = false;
  byId("compare").disabled = history.images.length < 2;
}

/**
 * Tell a fault; where the queue was full or nobody answers, try again.
 * @param {any} error
 * @returns {number | null} ms after which to try again
 */
function fail(error) {
  stage.undim();
  if (error instanceof Refusal && error.status === 401) askKey();
  if (error instanceof Refusal && error.status === 429) {
    const seconds = error.retryAfter ?? PATIENCE;
    status.say(`${error.message}. Trying again in ${seconds} s.`, true);
    return 1000 * seconds;
  }
  status.say(error.message, true);
  if (error instanceof Refusal && error.status === 0) {
    wasAway = true;
    return 1000 * AWAY;
  }
  if (!(error instanceof Refusal)) console.error(error);
  return null;
}

/**
 * Do what may fail, and tell it.
 * @param {() => Promise<any> | any} action
 */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    fail(error);
  }
}

/**
 * Show an image of before, and have its settings again.
 * @param {import("./history.js").Made} image
 */
function goBack(image) {
  live.stop();
  editor.close();
  live.stop();
  shown = image;
  settings.restore(image.settings);
  references.restore(image.settings.reference_strength ?? []);
  stage.show(image.url, image.prompt, "image", image);
  history.mark(image);
  const { width, height, seed } = image;
  status.say(`${width} × ${height}, seed ${seed}, ${image.settings.num_steps} steps`);
  doneKey = orderOf(settings, references, editor.blur)?.key ?? "";
}

/**
 * @param {import("./history.js").Made} image
 * @param {boolean} isStart
 */
function reuse(image, isStart) {
  return attempt(() => references.add([image.blob], { isStart, name: image.prompt.slice(0, 40) }));
}

/** @param {(image: import("./history.js").Made) => void} use */
function withShown(use) {
  if (shown) use(shown);
  else status.say("It is not drawn yet.");
}

async function editMask() {
  if (!references.start) {
    if (references.pictures.length) references.startFrom(references.pictures[0]);
    else if (shown) await references.add([shown.blob], { isStart: true, name: shown.prompt.slice(0, 40) });
  }
  if (!references.start) return withShown(() => {});
  live.stop();
  stage.undim();
  editor.open(references.start);
  status.say("Brush over what is to be drawn anew, or drag an edge outward. Then say what it should show.");
}

/** @param {File} file */
async function restore(file) {
  const { settings: found, inputs } = await readSettings(file);
  references.clear();
  settings.restore(found);
  references.restore(found.reference_strength ?? []);
  changed();
  const more = inputs.join(" and ").replaceAll("_", " ");
  const told = more ? ` It was made with more than its file holds: ${more}.` : "";
  status.say(`These are the settings of ${file.name}.${told}`);
}

/** @param {import("./history.js").Made} image */
function download(image) {
  const name = image.prompt.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "");
  const link = document.createElement("a");
  link.href = image.url;
  link.download = `${name || "image"}-${image.seed}.png`;
  link.click();
}

/** Ask the server what it has, until its model is open. */
async function learn() {
  await attempt(async () => {
    const info = await getInfo();
    settings.learn(info);
    byId("model-name").textContent = `${info.model.name} · flux2_mlx ${info.version}`;
    if (info.status === "failed") status.say(info.fault, true);
    if (info.status === "opening") {
      if (!live.isBusy) status.say(`Opening ${info.model.name}`);
      setTimeout(learn, 700);
    } else if (status.line.textContent.startsWith("Opening ")) status.say("Ready");
  });
}

function askKey() {
  const dialog = byId("key-dialog");
  if (!dialog.open) dialog.showModal();
}

byId("key-dialog").addEventListener("close", () => {
  if (!byId("key").value) return;
  useKey(byId("key").value);
  byId("key").value = "";
  status.say("");
  void learn().then(changed);
});

byId("composer").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  editor.close();
  want(true);
});
settings.prompt.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
if (!CSS.supports("field-sizing", "content")) {
  settings.prompt.addEventListener("input", () => {
    settings.prompt.style.height = "auto";
    settings.prompt.style.height = `${settings.prompt.scrollHeight}px`;
  });
}
byId("live").addEventListener("change", () => {
  byId("draw").hidden = byId("live").checked;
  if (byId("live").checked) changed();
  else live.stop();
});
byId("more-button").addEventListener("click", () => {
  const isOpen = byId("more").hidden;
  byId("more").hidden = !isOpen;
  byId("more-button").setAttribute("aria-expanded", String(isOpen));
});

byId("draw-mask").addEventListener("click", () => attempt(editMask));
byId("use-reference").addEventListener("click", () => withShown((image) => reuse(image, false)));
byId("use-start").addEventListener("click", () => withShown((image) => reuse(image, true)));
byId("download").addEventListener("click", () => withShown(download));
byId("stop").addEventListener("click", halt);

function halt() {
  live.stop();
  stage.undim();
  status.say("Stopped");
}

const hold = () => stage.compare(history.images.length > 1 ? (history.before ?? history.images[0]) : null);
const letGo = () => stage.compare(null);
byId("compare").addEventListener("pointerdown", hold);
for (const name of ["pointerup", "pointerleave", "pointercancel", "blur"]) byId("compare").addEventListener(name, letGo);
document.addEventListener("keydown", (event) => {
  const isHeld = document.activeElement === byId("compare") && (event.key === " " || event.key === "Enter");
  if (isHeld || (event.key === "c" && !isWriting() && !event.ctrlKey && !event.metaKey)) hold();
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  if (editor.isOpen) {
    editor.close();
    byId("draw-mask").focus();
  } else if (live.isBusy) halt();
});
document.addEventListener("keyup", letGo);

takeFiles({
  reference: (files) => attempt(() => references.add(files)),
  restore: (file) => attempt(() => restore(file)),
});
void learn();
