// The table tab: a csv in, a question for each row, a csv out. Rows are sent in batches; what has been answered stays
// when a run is cancelled or fails, and Start goes on from there.

import { classify, complete } from "./api.js";
import * as csv from "./csv.js";
import { $, download, el } from "./dom.js";
import * as settings from "./settings.js";
import { t } from "./texts.js";

const BATCH = 16; // rows of a request to /v1/classify
const AT_ONCE = { labels: 2, text: 8 }; // requests that run at a time: the server's batch does not run dry
const TRIES = 5;
const SHOWN = 100; // rows in the table of answers

let table = null; // { name, columns, rows, separator, newline, mark, told }
let results = []; // of each row { answer, proba } or { error }, once it is there
let asked = ""; // the question, labels and settings that `results` answer, as JSON
let columns = []; // of the results: their names
let running = null; // { stop, begun, before }
const suggested = { template: "", labels: "" }; // what was put into the fields, and may be replaced

// The file

async function open(file) {
  let found;
  if (running || !file) return;
  try {
    const { text, encoding, mark } = csv.decode(new Uint8Array(await file.arrayBuffer()));
    found = { ...csv.parse(text), name: file.name, encoding, mark: mark || encoding !== "utf-8" };
  } catch (error) {
    $("file-told").textContent = `${file.name}: ${error.message}`;
    $("file-told").className = "wrong";
    return;
  }
  table = found;
  results = [];
  asked = "";
  $("file").value = "";
  $("progress").hidden = true;
  suggest();
  showTable();
}

/** Fills in the question and labels that the model was trained with, where the user has written none. */
function suggest() {
  const card = settings.card();
  let template = table ? table.columns.map((name) => `${name}: {${name}}`).join("\n") : "";
  try {
    if (table && card.template && csv.pieces(card.template, table.columns)) template = card.template;
  } catch {
    // it was trained with other columns
  }
  const labels = (card.labels ?? []).join(", ");
  for (const [id, value] of Object.entries({ template, labels })) {
    if ($(id).value && $(id).value !== suggested[id]) continue;
    $(id).value = value;
    suggested[id] = value;
  }
  showQuestion();
}

function showFile() {
  $("file-told").className = "";
  $("preview").hidden = !table;
  $("columns").replaceChildren();
  if (!table) return;
  const numbers = { name: table.name, n: table.rows.length, m: table.columns.length };
  let told = t("{name}: {n} rows, {m} columns.", numbers);
  if (table.encoding !== "utf-8") {
    told += t(" Read as {encoding}; the answers are written in UTF-8.", { encoding: table.encoding.toUpperCase() });
  }
  $("file-told").textContent = told;
  $("preview").replaceChildren(grid(table.columns, table.rows.slice(0, 3)));
  for (const name of table.columns) {
    const click = () => insert(`{${name}}`);
    $("columns").append(el("button", { type: "button", text: name, on: { click } }));
  }
}

/** Puts text into the question where the cursor is. */
function insert(text) {
  $("template").setRangeText(text, $("template").selectionStart, $("template").selectionEnd, "end");
  $("template").focus();
  showQuestion();
}

/** A table; the last `answers` columns are the model's. { wrong } in place of them says why there is none. */
function grid(names, rows, answers = 0) {
  const cell = (value, i) => {
    if (value.wrong) return el("td", { class: "wrong", colspan: answers, text: value.wrong });
    const wide = value.length > 16 ? "short wide" : "short";
    const inner = el("div", { class: wide, text: value, title: value.length > 200 && value });
    return el("td", { class: i >= names.length - answers && "answer" }, inner);
  };
  const head = el("tr", {}, ...names.map((name) => el("th", { scope: "col", text: name })));
  const body = rows.map((row) => el("tr", {}, ...row.map(cell)));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
}

// The question

const kind = () => document.querySelector("[name=kind]:checked").value;

/** What is asked: { pieces, labels }. An Error in words for what is missing. */
function question() {
  if (!table?.rows.length) throw new Error(t("There is no table with rows yet."));
  const pieces = csv.pieces($("template").value, table.columns);
  if (!pieces.some((piece) => typeof piece === "number")) {
    throw new Error(t("The question names no column: write one as {column}."));
  }
  const labels = $("labels").value.split(/[,，\n]/).map((label) => label.trim()).filter(Boolean);
  if (kind() === "text") return { pieces, labels: [] };
  if (labels.length < 2) throw new Error(t("Labels: expected at least two, separated by commas."));
  if (new Set(labels).size < labels.length) throw new Error(t("Labels: one stands there twice."));
  return { pieces, labels };
}

/** Shows the first question, or what is wrong with it, and what the model was trained with where that differs. */
function showQuestion() {
  $("labels-row").hidden = kind() === "text";
  let text = "";
  let wrong = "";
  try {
    if (table?.rows.length) text = csv.fill(csv.pieces($("template").value, table.columns), table.rows[0]);
  } catch (error) {
    wrong = error.message;
  }
  $("wrong").textContent = "";
  $("template-wrong").textContent = wrong;
  $("template").setAttribute("aria-invalid", Boolean(wrong));
  $("example").textContent = text;
  const { template } = settings.card();
  const differs = table && template && template !== $("template").value;
  $("trained").textContent = differs ? t("The model was trained with this question: {text}", { text: template }) : "";
}

// Answers

/** Calls f until it works, where the server is busy or away for a while. */
async function patiently(f, signal) {
  for (let i = 1; ; i++) {
    try {
      return await f();
    } catch (error) {
      if (i === TRIES || ![0, 429, 502, 503, 504].includes(error.status)) throw error;
      const seconds = error.wait ?? 2 ** (i - 1);
      await new Promise((resolve, reject) => {
        setTimeout(resolve, seconds * 1000);
        signal.addEventListener("abort", () => reject(signal.reason), { once: true });
      });
    }
  }
}

function messagesOf(text, system) {
  const user = { role: "user", content: text };
  return system ? [{ role: "system", content: system }, user] : [user];
}

/** Answers some rows by one request. */
async function answerRows(rows, how, signal) {
  const texts = rows.map((row) => csv.fill(how.pieces, table.rows[row]));
  if (!how.labels.length) {
    const messages = messagesOf(texts[0], how.system);
    const found = await complete({ model: how.model, messages, ...how.sampling }, signal);
    results[rows[0]] = { answer: found.choices[0].message.content ?? "" };
    return;
  }
  const input = how.system ? texts.map((text) => messagesOf(text, how.system)) : texts;
  const found = await classify({ model: how.model, input, labels: how.labels }, signal);
  for (const [i, row] of rows.entries()) {
    const { label, probabilities } = found.data[i];
    results[row] = { answer: label, proba: how.labels.map((name) => probabilities[name]) };
  }
}

/** As answerRows; where the server refuses the batch, row by row, and a refused row keeps the reason. */
async function answerEach(rows, how, signal) {
  try {
    await patiently(() => answerRows(rows, how, signal), signal);
  } catch (error) {
    if (![400, 408, 413].includes(error.status)) throw error;
    if (rows.length === 1) results[rows[0]] = { error: error.message };
    else for (const row of rows) await answerEach([row], how, signal);
  }
  showProgress();
}

async function run() {
  let how;
  $("wrong").textContent = "";
  if (!settings.valid()) return;
  try {
    how = { ...question(), model: settings.model(), system: settings.system(), sampling: settings.sampling() };
  } catch (error) {
    $("wrong").textContent = error.message;
    return;
  }
  if (JSON.stringify(how) !== asked) results = []; // another question: none of the answers holds
  asked = JSON.stringify(how);
  columns = how.labels.length ? ["label", ...how.labels.map((label) => `proba_${label}`)] : ["answer"];
  const left = table.rows.map((_, i) => i).filter((i) => !results[i] || results[i].error);
  const batches = [];
  const size = how.labels.length ? BATCH : 1;
  for (let i = 0; i < left.length; i += size) batches.push(left.slice(i, i + size));
  const stop = new AbortController();
  running = { stop, begun: performance.now(), before: table.rows.length - left.length };
  for (const i of left) delete results[i];
  showRun();
  let failed;
  const worker = async () => {
    while (batches.length && !stop.signal.aborted) await answerEach(batches.shift(), how, stop.signal);
  };
  await Promise.all(
    Array.from({ length: AT_ONCE[kind()] }, () =>
      worker().catch((error) => {
        if (!stop.signal.aborted) failed = error;
        stop.abort();
      }),
    ),
  );
  running = null;
  if (failed) $("wrong").textContent = t("{why} What is answered stays; Start goes on.", { why: failed.message });
  showRun();
  if (document.activeElement === document.body) $(done() === table.rows.length ? "download" : "run").focus();
}

const done = () => results.reduce((n, result) => n + (result ? 1 : 0), 0);

function minutes(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

function showProgress() {
  const n = done();
  const wrong = results.reduce((sum, result) => sum + (result?.error ? 1 : 0), 0);
  const all = table.rows.length;
  $("progress").max = all;
  $("progress").value = n;
  let told = t("{n} of {m} rows", { n, m: all });
  if (running && n > running.before) {
    const each = (performance.now() - running.begun) / 1000 / (n - running.before);
    if (n < all) told += t(", {time} left", { time: minutes(each * (all - n)) });
  } else if (!running && n < all) {
    told += t(", stopped");
  }
  if (wrong) told += t("; {n} could not be answered", { n: wrong });
  $("progress-told").textContent = told;
  $("download").disabled = !n;
  showCounts();
}

function showCounts() {
  const counts = new Map();
  for (const result of results) if (result?.proba) counts.set(result.answer, (counts.get(result.answer) ?? 0) + 1);
  $("counts").replaceChildren(...[...counts].map(([label, n]) => el("li", { text: `${label}: ${n}` })));
  const used = new Set(JSON.parse(asked).pieces.filter((piece) => typeof piece === "number"));
  const names = table.columns.filter((_, i) => used.has(i));
  const rows = [];
  for (let i = 0; i < table.rows.length && rows.length < SHOWN; i++) {
    if (!results[i]) continue;
    const answer = results[i].error ? [{ wrong: results[i].error }] : cells(results[i], 3);
    rows.push([...table.rows[i].filter((_, j) => used.has(j)), ...answer]);
  }
  $("results").hidden = !rows.length;
  $("results").replaceChildren(grid([...names, ...columns], rows, columns.length));
}

/** A result as cells. digits: of probabilities; all where it is not given. */
function cells(result, digits) {
  if (!result || result.error) return columns.map(() => "");
  const proba = (result.proba ?? []).map((p) => (digits ? p.toFixed(digits) : String(p)));
  return [result.answer, ...proba];
}

function save() {
  const rows = table.rows.map((row, i) => [...row, ...cells(results[i])]);
  const names = columns.map((name) => (table.columns.includes(name) ? `${name}_glmlora` : name));
  const text = csv.write([...table.columns, ...names], rows, table.separator, table.newline);
  download(`${table.name.replace(/\.[^.]*$/, "")}-answers.csv`, (table.mark ? "\ufeff" : "") + text, "text/csv");
}

function showRun() {
  $("run").hidden = Boolean(running);
  $("cancel").hidden = !running;
  for (const id of ["file", "template", "labels"]) $(id).disabled = Boolean(running);
  for (const node of document.querySelectorAll("[name=kind], #columns button")) node.disabled = Boolean(running);
  $("progress").hidden = false;
  showProgress();
}

/** Draws the tab, in the language of the page. */
export function showTable() {
  showFile();
  showQuestion();
  if (table && asked) showRun();
  else for (const id of ["progress-told", "counts", "results"]) $(id).replaceChildren();
  if (!asked) $("results").hidden = true;
  if (!asked) $("download").disabled = true;
}

export function startTable() {
  $("file").addEventListener("change", () => open($("file").files[0]));
  const drop = $("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      if ($("table").hidden) return;
      event.preventDefault(); // or the browser opens the file in place of the page
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") open(event.dataTransfer.files[0]);
    });
  }
  $("template").addEventListener("input", showQuestion);
  $("model").addEventListener("input", () => running || suggest());
  $("labels").addEventListener("input", () => ($("wrong").textContent = ""));
  for (const node of document.querySelectorAll("[name=kind]")) node.addEventListener("change", showQuestion);
  $("run").addEventListener("click", run);
  $("cancel").addEventListener("click", () => running?.stop.abort());
  $("download").addEventListener("click", save);
  window.addEventListener("beforeunload", (event) => running && event.preventDefault());
}
