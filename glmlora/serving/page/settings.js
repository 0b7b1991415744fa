// What a request says beside its messages: the fields at the side, kept in this browser.

import { models } from "./api.js";
import { $, el, keep, kept } from "./dom.js";
import { t } from "./texts.js";

const FIELDS = ["system", "temperature", "top_p", "max_tokens", "tools"];

let cards = []; // the models' objects of /v1/models

export const model = () => $("model").value;

/** What the server says of the model chosen; its template and labels, where it was trained with some. */
export const card = () => cards.find((one) => one.id === model()) ?? {};
export const system = () => $("system").value.trim();

/** temperature, top_p and max_tokens, those that are filled in. */
export function sampling() {
  const fields = ["temperature", "top_p", "max_tokens"].filter((name) => $(name).value !== "");
  return Object.fromEntries(fields.map((name) => [name, Number($(name).value)]));
}

/** The tools as they are sent; null where what is written is none, which stands below the field then. */
export function tools() {
  const text = $("tools").value.trim();
  let found;
  $("tools-wrong").textContent = "";
  if (!text) return undefined;
  try {
    found = JSON.parse(text);
    if (!Array.isArray(found)) throw new Error(t("expected a list: [..]"));
    return found.length ? found : undefined;
  } catch (error) {
    $("tools-wrong").textContent = t("Tools: {why}", { why: error.message });
    $("tools").closest("details").open = true;
    return null;
  }
}

/** The first field whose value the server would refuse, shown by the browser; true where there is none. */
export function valid() {
  return ["temperature", "top_p", "max_tokens"].every((name) => {
    if ($(name).checkValidity()) return true;
    $("settings").classList.add("open");
    return $(name).reportValidity();
  });
}

/** Asks the server for its models; an ApiError where it does not answer. */
export async function loadModels() {
  $("server").textContent = t("Asking the server for its models ..");
  cards = await models();
  const names = cards.map((entry) => entry.id);
  const before = $("model").value || kept("model");
  $("model").replaceChildren(...names.map((name) => el("option", { value: name, text: name })));
  $("model").value = names.includes(before) ? before : names[0];
  $("model").dispatchEvent(new Event("input"));
  $("server").textContent = t("{n} models and adapters", { n: names.length });
}

export function startSettings() {
  for (const name of FIELDS) {
    $(name).value = kept(`setting.${name}`, "");
    $(name).addEventListener("change", () => keep(`setting.${name}`, $(name).value));
  }
  $("tools").addEventListener("change", tools);
  $("model").addEventListener("change", () => keep("model", $("model").value));
}
