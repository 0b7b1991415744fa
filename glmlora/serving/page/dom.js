// Elements, built without markup: what a model or a table says is only ever text.

export const $ = (id) => document.getElementById(id);

/** An element with properties (class, text, label; on: listeners; others as attributes) and children. */
export function el(tag, how = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(how)) {
    if (name === "text") node.textContent = value;
    else if (name === "label") node.setAttribute("aria-label", value);
    else if (name === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null));
  return node;
}

/** Saves text as a file of the user's. */
export function download(name, text, type) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

let closed = Promise.resolve(); // the dialog before: its event comes after it is out of sight

/** Opens a dialog; what its pressed button's value is, "" where it was closed otherwise. */
export async function ask(dialog) {
  await closed;
  dialog.returnValue = "";
  dialog.showModal();
  closed = new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  await closed;
  return dialog.returnValue;
}

/** A value kept in this browser; `otherwise` where there is none, or nothing may be kept. */
export function kept(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`glmlora.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps a value in this browser; false where it is full or forbids it. */
export function keep(name, value) {
  try {
    if (value === undefined) localStorage.removeItem(`glmlora.${name}`);
    else localStorage.setItem(`glmlora.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
