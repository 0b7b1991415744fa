// The chat: messages, the answer that streams, and the conversations at the side.

import { stream } from "./api.js";
import { allChats, forgetChat, keepChat, newChat } from "./chats.js";
import { $, ask, el } from "./dom.js";
import { markdown } from "./markdown.js";
import * as settings from "./settings.js";
import { t } from "./texts.js";

const SHOWN = "glmlora.shown";

let page; // what main.js lends: notice, closeSides
let chats = [];
let now = newChat();
let answering = null; // { chat, message, stop }: the answer that streams
let parts = null; // the elements of the answer that streams, while its conversation is shown
let drawn = 0; // the frame in which they are drawn next

// Messages as elements

const toolsAsked = (message) => Object.values(message.calls ?? {});

/** A message's element; `update` of an answer draws what has come since. */
function article(message, isLast) {
  if (message.role === "user") {
    const body = el("div", { class: "body", text: message.content });
    return el("article", { class: "user", label: t("You") }, body);
  }
  if (message.role === "tool") {
    const shown = el("pre", { tabindex: "0", role: "region", label: t("Result"), text: message.content });
    const who = el("span", { class: "who", text: t("Result") });
    return el("article", { label: t("Result") }, who, shown);
  }
  const node = el("article", { class: "assistant", label: t("Answer of {name}", { name: message.model }) });
  const thought = el("details", { class: "thought" }, el("summary"), el("div", { class: "text" }));
  const body = el("div", { class: "body text" });
  const calls = el("div");
  const foot = el("div", { class: "foot" });
  node.append(el("span", { class: "who", text: message.model }), thought, body, calls, foot);
  const update = () => {
    const busy = answering?.message === message;
    node.classList.toggle("busy", busy);
    thought.hidden = !message.thought;
    if (message.thought) {
      thought.firstChild.textContent = busy && !message.content ? t("Thinking ..") : t("Thoughts");
      thought.lastChild.replaceChildren(...markdown(message.thought.trim()));
    }
    body.replaceChildren(...markdown(message.content));
    calls.replaceChildren(...toolsAsked(message).map((call) => callBox(message, call, isLast && !busy)));
    foot.replaceChildren(...(busy ? [] : footer(message, isLast)));
  };
  update();
  return Object.assign(node, { update });
}

/** A call of a tool; where the model waits for its result, a field for it. */
function callBox(message, call, open) {
  const title = el("summary", { text: t("Calls {name}", { name: call.name }) });
  const box = el("details", { class: "call", open: true }, title);
  let told = call.arguments;
  try {
    told = JSON.stringify(JSON.parse(told), null, 2);
  } catch {
    // shown as it came
  }
  const shown = el("pre", { tabindex: "0", role: "region", label: t("Arguments"), text: told });
  const inner = el("div", {}, shown);
  if (open) {
    const field = el("textarea", { rows: "2" });
    const submit = (event) => {
      event.preventDefault();
      call.result = field.value;
      if (!toolsAsked(message).every((other) => other.result !== undefined)) {
        field.disabled = true; // the others' results are waited for
        return;
      }
      for (const { id, result } of toolsAsked(message)) {
        now.messages.push({ role: "tool", tool_call_id: id, content: result });
      }
      answer();
    };
    const label = el("label", {}, t("Result of {name}", { name: call.name }), field);
    inner.append(el("form", { on: { submit } }, label, el("button", { text: t("Send") })));
  }
  box.append(inner);
  return box;
}

function footer(message, isLast) {
  const nodes = [];
  if (message.error) nodes.push(el("span", { class: "wrong", text: message.error }));
  if (message.stopped) nodes.push(el("span", { text: t("Stopped.") }));
  if (message.finish === "length") nodes.push(el("span", { text: t("Cut: the longest answer was reached.") }));
  if (message.tokens) {
    const { tokens: n, speed } = message;
    const told = speed ? t("{n} tokens, {speed} a second", { n, speed }) : t("{n} tokens", { n });
    nodes.push(el("span", { text: told }));
  }
  if (message.content && navigator.clipboard) {
    const click = () => navigator.clipboard.writeText(message.content).then(() => speak(t("Copied.")));
    nodes.unshift(el("button", { class: "quiet", text: t("Copy"), on: { click } }));
  }
  if (isLast && !answering) {
    const click = () => {
      now.messages.pop();
      answer();
    };
    nodes.unshift(el("button", { class: "quiet", text: t("Answer again"), on: { click } }));
  }
  return nodes;
}

/** What screen readers say: not each word of an answer as it comes, but the answer when it is whole. */
function speak(text) {
  $("spoken").textContent = text;
}

// The conversation that is shown

/** Draws the conversation and the list of all. */
export function showChat() {
  sessionStorage.setItem(SHOWN, now.id); // a page that is loaded again shows it again
  const last = now.messages.at(-1);
  const nodes = now.messages.map((message) => article(message, message === last));
  parts = answering?.chat === now ? nodes.at(-1) : null;
  if (!nodes.length) {
    const title = el("strong", { text: t("What would you like to know?") });
    nodes.push(el("div", { class: "welcome" }, title, t("Conversations stay in this browser.")));
  }
  $("messages").replaceChildren(...nodes);
  $("messages").scrollTop = $("messages").scrollHeight;
  $("send").hidden = Boolean(answering);
  $("stop").hidden = !answering;
  showList();
}

function showList() {
  const items = chats.map((chat) => {
    const title = el("button", { class: "title", text: chat.title, on: { click: () => open(chat) } });
    if (chat === now) title.setAttribute("aria-current", "true");
    const label = t("Delete {name}", { name: chat.title });
    const click = () => removeChats([chat], chat.title);
    const remove = el("button", { class: "remove", text: "×", label, on: { click } });
    return el("li", { class: chat === now && "now" }, title, remove);
  });
  $("chat-list").replaceChildren(...items);
  $("delete-all").hidden = !chats.length;
}

function open(chat) {
  now = chat;
  page.closeSides();
  showChat();
  $("question").focus();
}

async function removeChats(gone, name) {
  const one = t("Delete the conversation “{name}”?", { name });
  $("sure-title").textContent = name ? one : t("Delete all conversations?");
  if ((await ask($("sure-dialog"))) !== "ok") return;
  for (const chat of gone) {
    if (answering?.chat === chat) stopAnswer();
    chat.gone = true;
    forgetChat(chat);
  }
  chats = chats.filter((chat) => !chat.gone);
  if (now.gone) now = newChat();
  showChat();
  $("question").focus();
}

function store(chat) {
  if (chat.gone) return;
  if (!keepChat(chat)) page.notice(t("This browser has no room left for conversations: delete some at the side."));
  chats = [chat, ...chats.filter((other) => other !== chat)];
}

// Asking

/** The messages as the server takes them. What was thought before an answer is not sent again. */
function sent(chat) {
  const messages = settings.system() ? [{ role: "system", content: settings.system() }] : [];
  for (const message of chat.messages) {
    const { role, content } = message;
    const calls = toolsAsked(message).map(({ id, name, arguments: given }) => {
      return { id, type: "function", function: { name, arguments: given } };
    });
    if (role === "tool") messages.push({ role, tool_call_id: message.tool_call_id, content });
    else if (calls.length) messages.push({ role, content: content || null, tool_calls: calls });
    else if (content || role === "user") messages.push({ role, content });
  }
  return messages;
}

/** What a chunk of the stream adds to a message. */
function add(message, chunk) {
  if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content, tool_calls } = choice.delta ?? {};
  message.content += content ?? "";
  message.thought += reasoning_content ?? "";
  for (const part of tool_calls ?? []) {
    message.calls ??= {};
    const call = (message.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (choice.finish_reason) message.finish = choice.finish_reason;
}

function draw() {
  drawn ||= requestAnimationFrame(() => {
    drawn = 0;
    const box = $("messages");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    parts?.update();
    if (atEnd) box.scrollTop = box.scrollHeight;
  });
}

/** The model's answer to the conversation that is shown. */
async function answer() {
  const tools = settings.tools();
  if (answering || tools === null || !settings.valid()) return;
  const chat = now;
  const message = { role: "assistant", model: settings.model(), content: "", thought: "" };
  const body = { model: message.model, messages: sent(chat), ...settings.sampling(), ...(tools && { tools }) };
  const stop = new AbortController();
  answering = { chat, message, stop };
  chat.messages.push(message);
  store(chat);
  showChat();
  speak(t("The model is answering."));
  let begun;
  try {
    for await (const chunk of stream(body, stop.signal)) {
      add(message, chunk);
      if (message.content || message.thought) begun ??= performance.now();
      draw();
    }
    const seconds = (performance.now() - begun) / 1000;
    // What came in one piece, or nearly, has no speed that means anything.
    if (message.tokens > 1 && seconds >= 0.5) message.speed = ((message.tokens - 1) / seconds).toFixed(1);
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else message.error = error.message;
  }
  answering = null;
  message.content = message.content.trim();
  store(chat);
  const shown = chat === now;
  if (shown && document.activeElement === $("stop")) $("question").focus();
  showChat();
  speak(message.error ?? (message.stopped ? t("Stopped.") : message.content || t("The model calls a tool.")));
}

export function stopAnswer() {
  answering?.stop.abort();
}

function send() {
  const text = $("question").value.trim();
  if (!text || answering) return;
  if (settings.tools() === null || !settings.valid()) return;
  now.messages.push({ role: "user", content: text });
  $("question").value = "";
  answer();
}

export function startChat(lent) {
  page = lent;
  chats = allChats();
  now = chats.find((chat) => chat.id === sessionStorage.getItem(SHOWN)) ?? now;
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: a Chinese word is chosen
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", stopAnswer);
  $("new-chat").addEventListener("click", () => open(newChat()));
  $("delete-all").addEventListener("click", () => removeChats(chats));
  window.addEventListener("pagehide", () => answering && store(answering.chat));
}
