// A small part of Markdown, as elements: paragraphs, headings, lists, quotes, tables, code, links, emphasis. Nothing
// that is not one of these becomes markup, so an answer cannot be more than text.

import { el } from "./dom.js";
import { t } from "./texts.js";

const DEEPEST = 8; // lists and quotes inside each other
const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^\s{0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = new RegExp(
  [
    /(`+)(?!`)([^]*?[^`])\1(?!`)/, // code
    /(?<!\w)\*\*(?=\S)([^]*?\S)\*\*/, // bold; 2**3**4 is none
    /(?<![\w*])\*(?=[^\s*])([^*]*[^\s*])\*/, // slanted
    /~~(?=\S)([^]*?\S)~~/, // struck
    /\[([^\]\n]*)\]\(\s*([^\s()]+)\s*\)/, // [label](address)
    /(https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}，。；：！？）】」])/, // an address alone
  ]
    .map((one) => one.source)
    .join("|"),
);

/** The nodes of a text. */
export function markdown(text) {
  return blocks(text.split(/\r?\n/), 0);
}

function blocks(lines, depth) {
  const nodes = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      i++;
    } else if (fence) {
      const code = [];
      const end = new RegExp(`^\\s{0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (i++; i < lines.length && !end.test(lines[i]); i++) code.push(lines[i]);
      i++;
      nodes.push(codeBlock(code.join("\n"), fence[2]));
    } else if (heading) {
      nodes.push(el(`h${Math.min(heading[1].length + 2, 5)}`, {}, ...inline(heading[2])));
      i++;
    } else if (RULE.test(line)) {
      nodes.push(el("hr"));
      i++;
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      const inner = [];
      for (; i < lines.length && QUOTE.test(lines[i]); i++) inner.push(lines[i].replace(QUOTE, ""));
      nodes.push(el("blockquote", {}, ...blocks(inner, depth + 1)));
    } else if (depth < DEEPEST && ITEM.test(line)) {
      let list;
      [list, i] = listAt(lines, i, depth);
      nodes.push(list);
    } else if (line.includes("|") && lines[i + 1]?.includes("|") && DIVIDER.test(lines[i + 1])) {
      let table;
      [table, i] = tableAt(lines, i);
      nodes.push(table);
    } else {
      const inner = [lines[i++]];
      const begins = (next) => [FENCE, HEADING, QUOTE, ITEM].some((start) => start.test(next));
      while (i < lines.length && lines[i].trim() && !begins(lines[i])) inner.push(lines[i++]);
      nodes.push(el("p", {}, ...inline(inner.join("\n").trim())));
    }
  }
  return nodes;
}

function codeBlock(text, language) {
  const code = el("code", { text });
  const click = () => navigator.clipboard.writeText(text);
  const copy = el("button", { type: "button", text: t("Copy"), on: { click } });
  const block = el("pre", { tabindex: "0", role: "region", label: language || t("Code") }, code);
  return el("div", { class: "code" }, block, navigator.clipboard ? copy : null);
}

const indent = (line) => /^\s*/.exec(line)[0].length;

function listAt(lines, i, depth) {
  const first = ITEM.exec(lines[i]);
  const numbered = /\d/.test(first[2]);
  const list = el(numbered ? "ol" : "ul", numbered ? { start: parseInt(first[2], 10) } : {});
  const margin = first[1].length;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length > margin + 1 || item[1].length < margin) break;
    if (/\d/.test(item[2]) !== numbered) break;
    const inner = [lines[i].slice(item[0].length)];
    for (i++; i < lines.length; i++) {
      const inside = lines[i].trim() ? lines[i] : (lines[i + 1] ?? "");
      if (indent(inside) <= margin + 1) break;
      inner.push(lines[i].slice(Math.min(item[0].length, indent(lines[i]))));
    }
    list.append(el("li", {}, ...blocks(inner, depth + 1)));
    if (i + 1 < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1])) i++; // items with a line between
  }
  return [list, i];
}

const cellsOf = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function tableAt(lines, i) {
  const row = (line, tag) => el("tr", {}, ...cellsOf(line).map((cell) => el(tag, {}, ...inline(cell))));
  const body = el("tbody");
  const table = el("table", {}, el("thead", {}, row(lines[i], "th")), body);
  for (i += 2; i < lines.length && lines[i].includes("|"); i++) body.append(row(lines[i], "td"));
  return [table, i];
}

function inline(text) {
  const nodes = [];
  while (text) {
    const found = INLINE.exec(text);
    if (!found) break;
    nodes.push(...withBreaks(text.slice(0, found.index)));
    text = text.slice(found.index + found[0].length);
    const [all, , code, bold, italic, struck, label, address, bare] = found;
    if (code !== undefined) nodes.push(el("code", { text: code.replace(/^ (.*) $/, "$1") }));
    else if (bold !== undefined) nodes.push(el("strong", {}, ...inline(bold)));
    else if (italic !== undefined) nodes.push(el("em", {}, ...inline(italic)));
    else if (struck !== undefined) nodes.push(el("s", {}, ...inline(struck)));
    else if (bare !== undefined) nodes.push(link(bare, [bare]));
    else if (/^https?:\/\//i.test(address)) nodes.push(link(address, inline(label)));
    else nodes.push(all);
  }
  nodes.push(...withBreaks(text));
  return nodes;
}

function link(address, children) {
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function withBreaks(text) {
  return text.split("\n").flatMap((line, i) => (i ? [el("br"), line] : line ? [line] : []));
}
