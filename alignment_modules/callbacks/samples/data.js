"use strict";
// Text of the data goes into the document by textContent alone, so that markup in it stays text.
const byId = (name) => document.getElementById(name);
const about = JSON.parse(byId("about").textContent);
const rows = JSON.parse(byId("rows").textContent);
const lines = byId("lists").textContent.split("\n");
const lineOf = new Map(rows.map((row, at) => [row, at]));
const read = new Map();
function listsOf(row) {
  if (!read.has(row)) read.set(row, JSON.parse(lines[lineOf.get(row)]));
  return read.get(row);
}
const PAGE = 60;
const KNOWN = new Set(["id", "step", "prompt", "messages", "completion", "expected", "truncated", "tokens", "episode", "stop_reason"]);
const CALL = /<tool_call>[\s\S]*?(?:<\/tool_call>|$)|<function=[\s\S]*?(?:<\/function>|$)|<\|python_tag\|>[\s\S]*/g;
const SPAN = new RegExp(CALL.source + /|<tool_response>[\s\S]*?(?:<\/tool_response>|$)/.source, "g");
// Controls, and what turns the direction of a line: they would vanish, or move what stands beside them.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const written = (letter) => "\\u" + letter.charCodeAt(0).toString(16).padStart(4, "0");

function make(tag, className, text, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined && text !== null) element.textContent = String(text).replace(UNSEEN, written);
  element.append(...children);
  return element;
}
const shown = (number) => typeof number !== "number" ? "–" : Number.isInteger(number) ? String(number)
  : Math.abs(number) >= 1000 ? number.toFixed(0) : String(Number(number.toPrecision(3)));
const mean = (values) => values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
const said = (content) => content === null || content === undefined ? ""
  : typeof content === "string" ? content
  : Array.isArray(content) ? content.map((part) => typeof part?.text === "string" ? part.text : JSON.stringify(part)).join("")
  : JSON.stringify(content, null, 2);

// Rows, their columns and their groups: a prompt's samples at one step.
const numeric = new Set(["step", "length"]), worded = new Set();
const lengthOf = (row) => row.tokens ?? (row.completion ?? "").length;
const numberOf = (row, name) => name === "length" && !("length" in row) ? lengthOf(row) : row[name];
for (const row of rows) {
  for (const name of Object.keys(row)) {
    if (typeof row[name] === "number" && !KNOWN.has(name)) numeric.add(name);
    if (typeof row[name] === "string" && (name === "stop_reason" || !KNOWN.has(name))) worded.add(name);
  }
}
const rewards = [...numeric].filter((name) => !["step", "reward", "advantage"].includes(name) && rows.some((row) => name in row));
const groups = [];
const same = new Map();
{
  const found = new Map();
  for (const row of rows) {
    const turns = Array.isArray(row.messages) ? row.messages : null;
    const parts = row.id.split("/");
    const prompt = row.prompt || (turns ? JSON.stringify(turns) : "");
    const key = row.step + "/" + (parts.length === 3 ? parts[0] + "/" + parts[1] : prompt);
    let group = found.get(key);
    if (!group) {
      const last = turns ? said(turns[turns.length - 1]?.content) : prompt;
      group = {name: parts.length === 3 ? row.step + "/" + parts[1] : row.id, step: row.step, turns, prompt, rows: []};
      group.what = last.trim().replace(/\s+/g, " ").slice(0, 160) || "(no prompt)";
      group.searched = (prompt + "\n" + (turns ? turns.map((turn) => said(turn?.content)).join("\n") : "")).toLowerCase();
      found.set(key, group);
      groups.push(group);
      if (!same.has(prompt)) same.set(prompt, []);
      same.get(prompt).push(group);
    }
    group.rows.push(row);
  }
}
const steps = [...new Set(rows.map((row) => row.step))].sort((a, b) => a - b);
let lowest = Infinity, highest = -Infinity;
for (const row of rows) {
  if (typeof row.reward !== "number") continue;
  lowest = Math.min(lowest, row.reward);
  highest = Math.max(highest, row.reward);
}
const level = (reward) => highest > lowest ? (reward - lowest) / (highest - lowest) : reward > 0 ? 1 : 0;

// The turns of an episode: what each called, and what it was answered with.
function turnsIn(episode) {
  const turns = [];
  for (const message of Array.isArray(episode) ? episode : []) {
    if (message?.role === "assistant") turns.push({calls: message.tool_calls ?? [], results: []});
    else if (turns.length) turns[turns.length - 1].results.push(message ?? {});
  }
  return turns;
}
const resultOf = (turn) => ({
  label: turn.results.length > 1 ? "results" : "result",
  failed: turn.results.some((one) => one.failed),
  about: turn.results.map((one) => (one.name ?? "call") + (one.failed ? ` failed (${one.failed})` : "")).join(", "),
});
// Where blocks stand in the text of a sample: calls in what the policy wrote, and what others wrote.
function blocksOf(row, lists, text) {
  const cut = (found, from) => ({
    start: from + found.index, end: from + found.index + found[0].length, label: found[0].startsWith("<tool_response") ? "result" : "tool call",
  });
  if (!lists.tokens?.length || !(lists.own || row.episode)) return [...text.matchAll(SPAN)].map((found) => cut(found, 0));
  const turns = turnsIn(row.episode), blocks = [];
  let from = 0, turn = 0;
  for (let at = 0; at < lists.tokens.length;) {
    const start = from, own = Boolean(lists.own?.[at] ?? 1);
    while (at < lists.tokens.length && Boolean(lists.own?.[at] ?? 1) === own) from += lists.tokens[at++].length;
    if (!own) {
      const before = turns[turn - 1];
      blocks.push({start, end: from, other: true, ...(before?.results.length ? resultOf(before) : {label: "not the policy's"})});
      continue;
    }
    const said = text.slice(start, from), asked = turns[turn++];
    // of an episode it is known what was a call; a form without marks is the whole turn
    const found = !row.episode ? [...said.matchAll(SPAN)] : asked?.calls.length || asked?.results.length ? [...said.matchAll(CALL)] : [];
    if (!found.length && asked?.calls.length) blocks.push({start, end: from, label: "tool call"});
    blocks.push(...found.map((one) => cut(one, start)));
  }
  return blocks;
}

// What tokens can be shaded by: a value a token, null where there is none.
const minus = (a, b) => a.map((value, at) => typeof value === "number" && typeof b[at] === "number" ? value - b[at] : null);
const SHADES = {
  advantage: {label: "advantage", words: ["worse", "better"], of: (row, lists) => lists.advantages ?? (typeof row.advantage === "number" ? (lists.tokens ?? []).map(() => row.advantage) : null)},
  surprise: {label: "surprise (−log p)", one: true, words: ["expected", "surprising"], of: (row, lists) => lists.sampled_logps?.map((value) => typeof value === "number" ? -value : null)},
  reference: {label: "log-ratio to the reference", words: ["less likely", "likelier than the reference"], of: (row, lists) => lists.sampled_logps && lists.reference_logps && minus(lists.sampled_logps, lists.reference_logps)},
  old: {label: "log-ratio old policy / sampler", words: ["less likely", "likelier when scored"], of: (row, lists) => lists.sampled_logps && lists.old_logps && minus(lists.old_logps, lists.sampled_logps)},
};
const valuesOf = (row, name) => SHADES[name].of(row, listsOf(row)) ?? [];
const has = (name) => about.lists.includes(name);
const shades = !has("tokens") ? [] : [
  (has("advantages") || numeric.has("advantage")) && "advantage", has("sampled_logps") && "surprise",
  has("sampled_logps") && has("reference_logps") && "reference", has("sampled_logps") && has("old_logps") && "old",
].filter(Boolean);
const bounds = {};
function bound(name) {
  if (!(name in bounds)) {
    const sizes = [];
    for (let at = 0; at < rows.length; at += Math.ceil(rows.length / 100)) {
      for (const value of valuesOf(rows[at], name)) if (value !== null) sizes.push(Math.abs(value));
    }
    sizes.sort((a, b) => a - b);
    bounds[name] = sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
  }
  return bounds[name];
}
const strength = (value, name) => Math.min(Math.abs(value) / bound(name), 1) * (name === "advantage" ? 0.35 : 0.55);
const tint = (value, name) => `rgba(var(--${value < 0 || SHADES[name].one ? "bad" : "good"}), ${strength(value, name).toFixed(3)})`;

// State, kept in the address so that a view can be shared: #reward>0.5&step=40&sort=reward&shade=surprise&open=40/3
const state = {query: "", step: "", sort: "", shade: "", open: "", view: ""};
const ORDERS = {"": "newest first", oldest: "oldest first", reward: "highest reward", "-reward": "lowest reward", spread: "widest spread", length: "longest", prompt: "prompt"};
let matching = new Set(), visible = [], listed = 0, current = null;

function readAddress() {
  Object.assign(state, {query: "", step: "", sort: "", shade: "", open: "", view: ""});
  const terms = [];
  for (const part of location.hash.slice(1).split("&")) {
    let text = part;
    try { text = decodeURIComponent(part); } catch { /* a lone % stands for itself */ }
    const control = /^(sort|shade|open|view|step)=([\s\S]*)$/.exec(text);
    if (control && (control[1] !== "step" || steps.includes(Number(control[2])))) state[control[1]] = control[2];
    else if (text) terms.push(text);
  }
  state.query = terms.join(" ");
  if (!(state.sort in ORDERS)) state.sort = "";
  if (!shades.includes(state.shade) && state.shade !== "none") state.shade = "";
}
const encode = (text) => encodeURIComponent(text).replace(/%(3E|3C|3D|2F|20|22|3A|2C)/g, (code) => ({"%20": "%20", "%22": "%22"})[code] ?? decodeURIComponent(code));
const termsOf = (query) => query.match(/"[^"]*"?|\S+/g) ?? [];
function writeAddress() {
  const parts = termsOf(state.query).map(encode);
  for (const name of ["step", "sort", "shade", "view", "open"]) if (state[name] !== "") parts.push(name + "=" + encode(state[name]));
  history.replaceState(null, "", "#" + parts.join("&"));
}

const TESTS = {
  ">": (a, b) => a > b, ">=": (a, b) => a >= b, "<": (a, b) => a < b, "<=": (a, b) => a <= b,
  "=": (a, b) => a === b, "!=": (a, b) => a !== b,
};
function conditions(query) {
  const found = [];
  let mistake = "";
  for (const term of termsOf(query)) {
    const match = /^([^\s"<>=!]+)(>=|<=|!=|>|<|=)(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)$/i.exec(term);
    const told = /^([^\s"<>=!]+)(!=|=)(\S+)$/.exec(term);
    if (match && numeric.has(match[1])) {
      const [, name, sign, number] = match;
      found.push((row) => typeof numberOf(row, name) === "number" && TESTS[sign](numberOf(row, name), Number(number)));
    } else if (told && worded.has(told[1])) {
      found.push((row) => TESTS[told[2]](row[told[1]], told[3]));
    } else if (match) {
      mistake = `no column ${match[1]}: there are ${[...numeric].join(", ")}`;
    } else if (term === "truncated" || term === "-truncated") {
      found.push((row) => Boolean(row.truncated) === (term === "truncated"));
    } else {
      const text = term.replaceAll('"', "").toLowerCase();
      if (text) found.push((row, group) => group.searched.includes(text) || (row.completion ?? "").toLowerCase().includes(text));
    }
  }
  return [found, mistake];
}

function filter() {
  const [tests, mistake] = conditions(state.query);
  if (state.step !== "") tests.push((row) => row.step === Number(state.step));
  matching = new Set();
  visible = [];
  for (const group of groups) {
    const before = matching.size;
    for (const row of group.rows) if (tests.every((test) => test(row, group))) matching.add(row);
    if (matching.size > before) visible.push(group);
  }
  const numbers = (group) => group.rows.map((row) => row.reward).filter((value) => typeof value === "number");
  const keys = {
    oldest: (group) => group.step,
    reward: (group) => -(mean(numbers(group)) ?? -Infinity),
    "-reward": (group) => mean(numbers(group)) ?? Infinity,
    spread: (group) => Math.min(...numbers(group)) - Math.max(...numbers(group)),
    length: (group) => -Math.max(...group.rows.map(lengthOf)),
  };
  if (state.sort === "prompt") visible.sort((a, b) => a.what < b.what ? -1 : a.what > b.what ? 1 : a.step - b.step);
  else {
    const key = keys[state.sort] ?? ((group) => -group.step);
    const values = new Map(visible.map((group) => [group, key(group)]));
    visible.sort((a, b) => values.get(a) - values.get(b) || 0);
  }
  const kept = [...matching].filter((row) => typeof row.reward === "number").map((row) => row.reward);
  byId("status").textContent = `${matching.size} of ${rows.length} samples`
    + (kept.length ? `, mean reward ${shown(mean(kept))}` : "") + (about.thinned ? "; of the steps some are left out, all are in the JSONL file" : "");
  byId("mistake").textContent = mistake;
  document.documentElement.dataset.matching = matching.size;
}
