// The conversations, kept in this browser, an entry each: two tabs do not overwrite each other's.

import { keep, kept } from "./dom.js";

const PREFIX = "glmlora.chat.";

/** All conversations, the newest first. */
export function allChats() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  } catch {
    // nothing may be kept here
  }
  const found = names.map((name) => kept(name.slice("glmlora.".length)));
  const chats = found.filter((chat) => Array.isArray(chat?.messages));
  return chats.sort((a, b) => b.changed - a.changed);
}

/** A conversation without messages, which is kept when it has one. */
export function newChat() {
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", changed: Date.now(), messages: [] };
}

/** Keeps a conversation; false where the browser does not. */
export function keepChat(chat) {
  chat.changed = Date.now();
  const first = chat.messages.find((message) => message.role === "user")?.content ?? "";
  chat.title ||= first.replace(/\s+/g, " ").trim().slice(0, 80);
  return keep(`chat.${chat.id}`, chat);
}

export function forgetChat(chat) {
  keep(`chat.${chat.id}`, undefined);
}
