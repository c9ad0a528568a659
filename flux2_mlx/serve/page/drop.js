/** Files that are dropped or pasted. */

import { byId } from "./dom.js";

/**
 * @param {DataTransfer | null} data
 * @returns {File[]} pictures
 */
function picturesIn(data) {
  return [...(data?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

/**
 * Take pictures from wherever they come: while files are dragged over the page, it offers what can be done with them.
 * @param {{reference: (files: File[]) => void, restore: (file: File) => void}} hands
 */
export function takeFiles(hands) {
  const zones = byId("drop");
  let depth = 0; // of elements that were entered and not left
  const hide = () => {
    depth = 0;
    zones.hidden = true;
  };
  document.addEventListener("dragenter", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    depth += 1;
    zones.hidden = false;
  });
  document.addEventListener("dragleave", () => {
    depth -= 1;
    if (depth <= 0) hide();
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    hide();
    const files = picturesIn(event.dataTransfer);
    if (files.length === 0) return;
    const isRestored = event.target instanceof Element && event.target.closest("#drop-settings") !== null;
    if (isRestored) hands.restore(files[0]);
    else hands.reference(files);
  });
  document.addEventListener("paste", (event) => {
    const files = picturesIn(event.clipboardData);
    if (files.length === 0) return;
    event.preventDefault();
    hands.reference(files);
  });
  for (const [button, input, take] of /** @type {[string, string, (files: File[]) => void][]} */ ([
    ["add-reference", "reference-file", hands.reference],
    ["restore", "settings-file", (files) => hands.restore(files[0])],
  ])) {
    byId(button).addEventListener("click", () => byId(input).click());
    byId(input).addEventListener("change", () => {
      const files = [...byId(input).files];
      byId(input).value = ""; // the same file can be picked again
      if (files.length) take(files);
    });
  }
}
