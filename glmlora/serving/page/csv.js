// Tables: a file's bytes to text, text to rows and back, and the questions made of rows. As glmlora's own reader
// (files/rows.py, templates.py) does it, so that page and command line see the same table.

import { t } from "./texts.js";

const OTHERS = [
  ["PK\x03\x04", "a zip file or an Excel workbook"],
  ["\xd0\xcf\x11\xe0", "an old Excel workbook"],
  ["PAR1", "a parquet file"],
  ["\x1f\x8b", "a gzip file"],
];

/** The text of a file, and what it was written in: { text, encoding, mark }. An Error where it is no text. */
export function decode(bytes) {
  const start = String.fromCharCode(...bytes.subarray(0, 4));
  for (const [first, what] of OTHERS) {
    if (start.startsWith(first)) throw new Error(t("This is {what}: save it as csv in UTF-8.", { what: t(what) }));
  }
  const wide = { "\xff\xfe": "utf-16le", "\xfe\xff": "utf-16be" }[start.slice(0, 2)];
  const mark = Boolean(wide) || start.startsWith("\xef\xbb\xbf");
  for (const encoding of wide ? [wide] : mark ? ["utf-8"] : ["utf-8", "gb18030"]) {
    try {
      const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
      if (text.includes("\0")) break;
      return { text, encoding, mark };
    } catch {
      // not this one
    }
  }
  throw new Error(t("This is no text: save it as csv in UTF-8."));
}

/** The records of a text: [line, cells] each. RFC 4180, and text behind a closing quote belongs to its cell. */
function* records(text, separator) {
  let cells = [];
  let i = 0;
  let line = 1;
  let first = 1;
  let quoted = false; // a line of "" is a cell, one of nothing is none
  while (i < text.length) {
    let cell = "";
    if (text[i] === '"') {
      quoted = true;
      i++;
      for (;;) {
        const end = text.indexOf('"', i);
        if (end < 0) throw new Error(t("Line {n}: a quote is opened and never closed.", { n: first }));
        const part = text.slice(i, end);
        line += part.split(/\r\n|\r|\n/).length - 1;
        cell += part;
        i = end + 1;
        if (text[i] !== '"') break;
        cell += '"';
        i++;
      }
    }
    const from = i;
    while (i < text.length && text[i] !== separator && text[i] !== "\n" && text[i] !== "\r") i++;
    cells.push(cell + text.slice(from, i));
    if (text[i] === separator) {
      i++;
      if (i < text.length) continue;
      cells.push("");
    }
    if (text[i] === "\r" && text[i + 1] === "\n") i++;
    i++;
    line++;
    if (cells.length > 1 || cells[0] || quoted) yield [first, cells];
    cells = [];
    quoted = false;
    first = line;
  }
}

/** A table: { columns, rows (cells in their order), separator, newline }. An Error naming the line that is wrong. */
export function parse(text) {
  const header = /[^\r\n]*/.exec(text.replace(/^[\r\n]+/, ""))[0];
  const separator = header.includes(",") ? "," : (["\t", ";"].find((one) => header.includes(one)) ?? ",");
  const all = records(text, separator);
  const head = all.next().value;
  if (!head) throw new Error(t("The file is empty; expected a line with the names of the columns."));
  const columns = head[1].map((name, i) => (name.trim() ? name : `Unnamed: ${i}`));
  const twice = columns.find((name, i) => columns.indexOf(name) < i);
  if (twice !== undefined) throw new Error(t("Column “{name}” stands twice in the first line.", { name: twice }));
  const rows = [];
  for (const [line, cells] of all) {
    if (columns.length > 1 && cells.length === 1 && /^\s+$/.test(cells[0])) continue; // a line of spaces
    while (cells.length > columns.length && !cells.at(-1)) cells.pop(); // separators at the end of a line
    if (cells.length !== columns.length) {
      const numbers = { line, n: columns.length, m: cells.length };
      throw new Error(t("Line {line}: expected {n} cells as in the first line, found {m}.", numbers));
    }
    rows.push(cells);
  }
  return { columns, rows, separator, newline: text.includes("\r\n") ? "\r\n" : "\n" };
}

/** The text of a table. */
export function write(columns, rows, separator, newline) {
  const special = new RegExp(`["\r\n${separator}]|^\\s|\\s$`);
  const cell = (value) => (special.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const line = (cells) => (cells.length === 1 && !cells[0] ? '""' : cells.map(cell).join(separator));
  return [columns, ...rows].map((cells) => line(cells) + newline).join("");
}

/** A question's pieces: texts, and numbers of columns. An Error for a column that is none. {{ and }} are braces. */
export function pieces(template, columns) {
  const found = [];
  for (const [part] of template.matchAll(/\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+/g)) {
    if (part === "{{" || part === "}}") {
      found.push(part[0]);
    } else if (part === "{" || part === "}") {
      throw new Error(t("A brace stands alone; one of the text itself is written twice: {{ or }}."));
    } else if (part[0] === "{") {
      const name = part.slice(1, -1);
      const column = columns.indexOf(name);
      const all = columns.join(", ");
      if (column < 0) throw new Error(t("“{name}” is no column; there are: {columns}.", { name, columns: all }));
      found.push(column);
    } else {
      found.push(part);
    }
  }
  return found;
}

export const fill = (found, row) => found.map((piece) => (typeof piece === "number" ? row[piece] : piece)).join("");
