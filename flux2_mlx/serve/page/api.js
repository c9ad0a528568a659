/** The server's native API, whose contract is the docstring of flux2_mlx/serve/native.py. */

const STORED = "flux2-mlx-key"; // for this tab alone, so that a reload does not ask for the API key again

/** What the server refused, or could not do, in its own words. */
export class Refusal extends Error {
  /**
   * @param {string} message
   * @param {number} status HTTP's; 0 where no answer came, so that nothing was begun
   * @param {number | null} retryAfter seconds
   */
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** @param {string} key of the server's owner */
export function useKey(key) {
  sessionStorage.setItem(STORED, key);
}

/**
 * @param {string} path
 * @param {RequestInit} [init]
 * @returns {Promise<Response>} of success
 * @throws {Refusal}
 */
async function request(path, init = {}) {
  const headers = new Headers(init.headers);
  const key = sessionStorage.getItem(STORED);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Refusal("The server does not answer. Is flux2-serve still running?", 0);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const retry = Number.parseInt(answer.headers.get("Retry-After") ?? "", 10);
  const message = told?.error?.message ?? `The server answers ${answer.status} ${answer.statusText}`;
  throw new Refusal(message, answer.status, Number.isNaN(retry) ? null : retry);
}

/** @returns {Promise<any>} models, LoRAs, options and limits */
export async function getInfo() {
  return (await request("/api/info")).json();
}

/**
 * The settings that an image's file carries.
 * @param {Blob} file
 * @returns {Promise<{settings: Record<string, any>, parameters: string, inputs: string[]}>}
 */
export async function readSettings(file) {
  return (await request("/api/settings", { method: "POST", body: file })).json();
}

/**
 * Draw; hanging up (the signal) has the server stop at its next step.
 * @param {Record<string, any>} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<{name: string, data: any}>} queued, step and image
 * @throws {Refusal}
 */
export async function* draw(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await request("/api/images", { method: "POST", body: JSON.stringify(body), headers, signal });
  let isDone = false;
  for await (const event of readEvents(/** @type {ReadableStream} */ (answer.body), signal)) {
    if (event.name === "error") throw new Refusal(event.data.message, event.data.status);
    isDone ||= event.name === "image";
    yield event;
  }
  if (!isDone) throw new Refusal("The server hung up before the image was done.", 502);
}

/**
 * Server-sent events of a stream.
 * @param {ReadableStream} stream
 * @param {AbortSignal} signal
 */
async function* readEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isOpen = true;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      isOpen = !done;
      if (done) return;
      rest += value;
      for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
        const event = parseEvent(rest.slice(0, end));
        rest = rest.slice(end + 2);
        if (event) yield event;
      }
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Refusal("The connection to the server broke.", 502);
  } finally {
    if (isOpen) reader.cancel().catch(() => {}); // an aborted one
  }
}

/** @param {string} text */
function parseEvent(text) {
  let name = "";
  let data = "";
  for (const line of text.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  return name ? { name, data: JSON.parse(data) } : null;
}
