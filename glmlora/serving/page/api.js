// The server's endpoints, OpenAI's and /v1/classify. Addresses are relative, so that a proxy may place
// all below a path.

import { $, ask } from "./dom.js";
import { t } from "./texts.js";

/** status: HTTP's, 0 where the server was not reached. wait: seconds after which it wants to be asked again. */
export class ApiError extends Error {
  constructor(message, status, wait) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

const KEY = "glmlora.key";
let asking = null;

/** Asks for the key, once for all requests that wait for it; false where none was given. */
export function askKey() {
  asking ??= (async () => {
    $("key-input").value = sessionStorage.getItem(KEY) ?? "";
    const answer = await ask($("key-dialog"));
    asking = null;
    if (answer === "ok") sessionStorage.setItem(KEY, $("key-input").value.trim());
    return answer === "ok";
  })();
  return asking;
}

async function request(path, body, signal) {
  for (;;) {
    const headers = body ? { "Content-Type": "application/json" } : {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      const method = body ? "POST" : "GET";
      response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(t("The server cannot be reached."), 0);
    }
    if (response.ok) return response;
    if (response.status === 401 && (await askKey())) continue;
    let told;
    try {
      const found = await response.json();
      told = found.error?.message ?? (typeof found.detail === "string" ? found.detail : undefined);
    } catch {
      // not the server's own words: a proxy's page
    }
    const wait = response.headers.has("Retry-After") ? Number(response.headers.get("Retry-After")) : undefined;
    throw new ApiError(told ?? t("The server answered with error {n}.", { n: response.status }), response.status, wait);
  }
}

/** The models and adapters: their objects of /v1/models. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** A whole chat completion. */
export async function complete(body, signal) {
  return (await request("v1/chat/completions", body, signal)).json();
}

/** Of each input its label and the labels' probabilities. */
export async function classify(body, signal) {
  return (await request("v1/classify", body, signal)).json();
}

/** The chunks of a chat completion as they come (server-sent events). */
export async function* stream(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", asked, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split(/\r?\n/);
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // a comment that keeps the line open, or an empty line
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message ?? String(chunk.error), 500);
        yield chunk;
      }
      if (done) throw new ApiError(t("The server ended the answer before it was whole."), 0);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(t("The connection to the server broke."), 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
