// The page: language, colours, tabs, and what stands at the sides. The tabs themselves are chat.js and table.js.

import { askKey } from "./api.js";
import { showChat, startChat, stopAnswer } from "./chat.js";
import { $, el, keep, kept } from "./dom.js";
import { loadModels, startSettings } from "./settings.js";
import { showTable, startTable } from "./table.js";
import { language, setLanguage, t } from "./texts.js";

const TABS = ["chat", "table"];
const THEMES = ["auto", "light", "dark"];

/** A sentence on top of the page; with what its button does. */
export function notice(text, button, act) {
  $("notice").replaceChildren(text);
  if (button) $("notice").append(el("button", { text: button, on: { click: act } }));
  $("notice").hidden = !text;
}

function showTab(name, focus) {
  for (const tab of TABS) {
    const chosen = tab === name;
    $(tab).hidden = !chosen;
    $(`tab-${tab}`).setAttribute("aria-selected", chosen);
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    document.body.classList.toggle(tab, chosen);
  }
  if (focus) $(`tab-${name}`).focus();
  history.replaceState(null, "", `#${name}`);
}

function startTabs() {
  for (const [i, name] of TABS.entries()) {
    $(`tab-${name}`).addEventListener("click", () => showTab(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const end = { Home: 0, End: TABS.length - 1 }[event.key];
      const to = end ?? (step && (i + step + TABS.length) % TABS.length);
      if (to !== undefined) showTab(TABS[to], true);
    });
  }
  showTab(TABS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
}

function closeSides() {
  for (const [button, side] of [["show-chats", "chats"], ["show-settings", "settings"]]) {
    $(side).classList.remove("open");
    $(button).setAttribute("aria-expanded", "false");
  }
}

function startSides() {
  for (const [button, side] of [["show-chats", "chats"], ["show-settings", "settings"]]) {
    $(button).addEventListener("click", () => {
      const open = !$(side).classList.contains("open");
      closeSides();
      $(side).classList.toggle("open", open);
      $(button).setAttribute("aria-expanded", open);
      if (open) $(side).querySelector("button, select").focus();
    });
  }
  document.querySelector("main").addEventListener("pointerdown", closeSides);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    const open = document.querySelector("nav.open, aside.open");
    if (open) {
      closeSides();
      $(`show-${open.id}`).focus();
    } else if (!$("chat").hidden) {
      stopAnswer();
    }
  });
}

function startTheme() {
  let theme = kept("theme", "auto");
  const show = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const names = { auto: t("Colours: as the system"), light: t("Colours: light"), dark: t("Colours: dark") };
    $("theme").setAttribute("aria-label", names[theme]);
    $("theme").title = names[theme];
  };
  $("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    keep("theme", theme);
    show();
  });
  return show;
}

/** Writes all texts of the page in the language chosen. English stands in index.html and is the key of each. */
function showTexts() {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) {
    node.dataset.text ||= node.textContent;
    node.textContent = t(node.dataset.text);
  }
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", t(node.dataset.label));
    if (node.matches(".icon")) node.title = t(node.dataset.label);
  }
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
  $("language").textContent = language() === "zh" ? "English" : "中文";
  $("language").lang = language() === "zh" ? "en" : "zh";
}

async function connect() {
  try {
    await loadModels();
    notice("");
  } catch (error) {
    $("server").textContent = "";
    notice(error.message, t("Try again"), connect);
  }
}

const showTheme = startTheme();

function showAll() {
  showTexts();
  showTheme();
  showChat();
  showTable();
}

$("language").addEventListener("click", () => {
  setLanguage(language() === "zh" ? "en" : "zh");
  showAll();
  connect();
});
$("key").addEventListener("click", async () => (await askKey()) && connect());
startSettings();
startTabs();
startSides();
startChat({ notice, closeSides });
startTable();
showAll();
connect();
