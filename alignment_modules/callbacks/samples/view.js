// The list of groups, the group that is open, and the controls.
function entry(group) {
  const button = make("button", "group");
  const own = group.rows.map((row) => row.reward).filter((value) => typeof value === "number");
  const top = make("div", "top", null, make("span", "", `step ${group.step}`), make("span", "grow"));
  if (own.length) top.append(make("span", "", (own.length > 1 ? "mean reward " : "reward ") + shown(mean(own))));
  button.append(top, make("div", "what", group.what));
  if (own.length > 1) {
    const strip = make("div", "strip");
    for (const row of group.rows) {
      const dot = make("div", "dot" + (row.truncated ? " cut" : "") + (matching.has(row) ? "" : " out"));
      if (typeof row.reward === "number") dot.style.background = `rgba(var(--good), ${(0.06 + 0.84 * level(row.reward)).toFixed(2)})`;
      dot.title = `reward ${shown(row.reward)}${row.truncated ? ", truncated" : ""}`;
      strip.append(dot);
    }
    button.append(strip);
  }
  button.addEventListener("click", () => open(group));
  group.entry = button;
  return button;
}
function list(more) {
  const place = byId("list");
  if (!more) { place.replaceChildren(); listed = 0; }
  place.querySelector(".more")?.remove();
  const part = document.createDocumentFragment();
  for (const group of visible.slice(listed, listed + PAGE)) part.append(entry(group));
  listed = Math.min(listed + PAGE, visible.length);
  if (listed < visible.length) {
    const button = make("button", "more", `${visible.length - listed} more`);
    button.addEventListener("click", () => { list(true); mark(); });
    part.append(button);
  }
  place.append(part);
}
function mark() {
  byId("list").querySelector(".group.on")?.classList.remove("on");
  if (current?.entry) current.entry.classList.add("on");
}
function open(group) {
  current = group;
  state.open = group ? group.name : "";
  writeAddress();
  mark();
  detail();
}

// One group: its prompt, and its samples side by side or over the steps.
function block(name, className, ...children) {
  return make("span", "block " + className, null, make("span", "role", name), ...children);
}
function blockOf(cut) {
  const other = cut.other || cut.label === "result";
  const box = block(cut.label, (other ? "other" : "") + (cut.failed ? " failed" : ""));
  if (cut.about) box.firstChild.append(make("span", "about", cut.about));
  return box;
}
function turnsOf(turns) {
  return turns.map((turn) => {
    const body = make("div", "text", said(turn?.content));
    const tool = turn?.role === "tool";
    if (Array.isArray(turn?.tool_calls)) {
      for (const call of turn.tool_calls) body.append(block("tool call", "", make("span", "code", said(call?.function ?? call))));
    }
    return make("div", "turn", null, make("div", "role " + (turn?.role === "user" ? "user" : ""), String(turn?.role ?? "?")), tool ? make("div", "", null, block("result", "other", body)) : body);
  });
}
function prompt(group) {
  const box = make("section", "prompt");
  if (group.turns) {
    box.append(make("div", "", null, ...turnsOf(group.turns)));
    if (group.rows[0].prompt) box.append(make("details", "", null, make("summary", "", "as the policy saw it"), make("div", "code", group.rows[0].prompt)));
  } else {
    box.append(make("div", "turn", null, make("div", "role user", "prompt"), make("div", "code", group.prompt || "(no prompt)")));
  }
  const expected = group.rows[0].expected;
  if (expected !== undefined && expected !== null) box.append(make("div", "turn", null, make("div", "role", "expected"), make("div", "text", said(expected))));
  return box;
}
function tip(lists, at) {
  const lines = [];
  const put = (label, list) => { if (typeof list?.[at] === "number") lines.push(`${label} ${shown(list[at])}`); };
  put("log p", lists.sampled_logps);
  put("log p, old policy", lists.old_logps);
  put("log p, reference", lists.reference_logps);
  put("advantage", lists.advantages);
  return lines.join("\n");
}
function tokens(row) {
  const place = make("div", "tokens");
  const lists = listsOf(row), own = lists.own, real = lists.tokens?.length > 0;
  const text = real ? lists.tokens.join("") : row.completion ?? "";
  const cuts = blocksOf(row, lists, text);
  const pieces = real ? lists.tokens : splitAt(text, cuts);
  const values = real && state.shade !== "none" ? valuesOf(row, state.shade) : [];
  let from = 0, last = null, target = place;
  pieces.forEach((piece, at) => {
    const middle = from + piece.length / 2;
    const cut = cuts.find(({start, end}) => middle >= start && middle < end) ?? null;
    if (cut !== last) {
      last = cut;
      target = cut ? blockOf(cut) : place;
      if (cut) place.append(target);
    }
    const span = make("span", "", piece);
    const value = values[at];
    if (typeof value === "number" && !(own && !own[at])) span.style.background = tint(value, state.shade);
    const title = real ? tip(lists, at) : "";
    if (title) span.title = title;
    target.append(span);
    from += piece.length;
  });
  if (!text) place.append(make("span", "faint", "(empty)"));
  return place;
}
function splitAt(text, cuts) {
  const parts = [];
  let from = 0;
  for (const {start, end} of cuts) { parts.push(text.slice(from, start), text.slice(start, end)); from = end; }
  parts.push(text.slice(from));
  return parts.filter((part) => part);
}
function card(row, name) {
  const head = make("div", "head", null, make("span", "name", name ?? (row.id.split("/").length === 3 ? "#" + row.id.split("/")[2] : row.id)));
  head.firstChild.title = row.id;
  if (row.stop_reason) head.append(make("span", "chip" + (row.stop_reason === "answer" ? "" : " warn"), row.stop_reason));
  else if (row.truncated) head.append(make("span", "chip warn", "truncated"));
  head.append(make("span", "grow"));
  if ("reward" in row) {
    const chip = make("span", "chip", "reward " + shown(row.reward));
    if (typeof row.reward === "number") chip.style.background = `rgba(var(--good), ${(0.08 + 0.32 * level(row.reward)).toFixed(2)})`;
    head.append(chip);
  }
  if ("advantage" in row) head.append(make("span", "chip", "advantage " + (row.advantage > 0 ? "+" : "") + shown(row.advantage)));
  for (const name of rewards) if (name in row && !(rewards.length === 1 && row[name] === row.reward)) head.append(make("span", "chip", `${name} ${shown(row[name])}`));
  head.append(make("span", "faint", `${lengthOf(row)} ${row.tokens ? "tokens" : "characters"}`));
  const box = make("article", "card" + (matching.has(row) ? "" : " out"), null, head, make("div", "body", null, tokens(row)));
  const others = Object.keys(row).filter((name) => !KNOWN.has(name) && !numeric.has(name) && row[name] !== null);
  if (others.length) {
    const fields = make("dl", "fields");
    for (const name of others) fields.append(make("dt", "", name), make("dd", "", said(row[name])));
    box.append(fields);
  }
  return box;
}
function legend() {
  const shade = SHADES[state.shade];
  if (!shade) return "";
  const ramp = make("i");
  const most = "rgba(var(--good), .55)", least = "rgba(var(--bad), .55)";
  ramp.style.background = `linear-gradient(90deg, ${shade.one ? "transparent" : least}, ${shade.one ? least : "transparent, " + most})`;
  return make("span", "legend", null, make("span", "", shade.words[0]), ramp, make("span", "", shade.words[1]));
}
function trend(history) {
  const points = history.map((group) => [group.step, mean(group.rows.map((row) => row.reward).filter((value) => typeof value === "number"))]).filter((point) => point[1] !== null);
  if (points.length < 2 || !(highest > lowest)) return "";
  const [wide, high] = [260, 46], last = points.length - 1;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const at = ([step, value]) => [(step - points[0][0]) / (points[last][0] - points[0][0]) * wide, high - level(value) * high];
  const add = (tag, attributes) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
    svg.append(shape);
    return shape;
  };
  svg.setAttribute("width", wide);
  svg.setAttribute("height", high);
  add("polyline", {points: points.map((point) => at(point).join(",")).join(" "), fill: "none", "stroke-width": 1.5}).style.stroke = "rgb(var(--good))";
  for (const point of points) {
    const [cx, cy] = at(point);
    const dot = add("circle", {cx, cy, r: 3});
    dot.style.fill = "rgb(var(--good))";
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `step ${point[0]}: mean reward ${shown(point[1])}`;
    dot.append(title);
  }
  const box = make("div", "bar", null, svg, make("span", "faint small", `mean reward ${shown(points[0][1])} at step ${points[0][0]}, ${shown(points[last][1])} at step ${points[last][0]}`));
  return box;
}
function detail() {
  const place = byId("detail");
  if (!current) {
    place.replaceChildren(make("div", "empty", rows.length ? "No sample fits the filter." : "No samples yet."));
    return;
  }
  const history = same.get(current.prompt) ?? [current];
  const over = state.view === "steps" && history.length > 1;
  const tabs = make("span", "tabs");
  for (const [view, label] of [["", `step ${current.step}`], ["steps", `all ${history.length} steps`]]) {
    const button = make("button", (view === "steps") === over ? "on" : "", label);
    button.addEventListener("click", () => { state.view = view; writeAddress(); detail(); });
    if (history.length > 1) tabs.append(button);
  }
  const matched = current.rows.filter((row) => matching.has(row)).length;
  const bar = make("div", "bar", null, make("h2", "", `Step ${current.step}, prompt ${current.name.split("/").pop()}`), tabs, make("span", "grow"));
  if (matched < current.rows.length && !over) bar.append(make("span", "faint small", `${matched} of ${current.rows.length} fit the filter`));
  bar.append(legend());
  const parts = [bar, prompt(current)];
  if (over) {
    parts.push(trend(history));
    const ordered = [...history].sort((a, b) => a.step - b.step);
    const alone = ordered.every((group) => group.rows.length === 1);
    if (alone) parts.push(make("div", "cards", null, ...ordered.map((group) => card(group.rows[0], `step ${group.step}`))));
    for (const group of alone ? [] : ordered) {
      const own = mean(group.rows.map((row) => row.reward).filter((value) => typeof value === "number"));
      const said = own === null || group.rows.length < 2 ? "" : `, mean reward ${shown(own)}`;
      parts.push(make("div", "step", null, `Step ${group.step}`, make("span", "faint", said)), make("div", "cards", null, ...group.rows.map((row) => card(row))));
    }
  } else {
    parts.push(make("div", "cards", null, ...current.rows.map((row) => card(row))));
  }
  place.replaceChildren(...parts);
  place.scrollTop = 0;
}

function refresh() {
  filter();
  list(false);
  current = visible.find((group) => group.name === state.open) ?? visible[0] ?? null;
  mark();
  detail();
}
function controls() {
  byId("query").value = state.query;
  byId("step").value = state.step;
  byId("sort").value = state.sort;
  byId("shade").value = state.shade;
}
function begin() {
  document.title = about.title + " – samples";
  byId("title").textContent = about.title;
  byId("query").placeholder = numeric.has("reward") ? "words, reward>0.5, truncated" : "words, length>100, truncated";
  byId("query").title = `Words of prompt or completion, "several words", truncated, -truncated, or a column compared with a number: ${[...numeric].join(", ")}` + (worded.size ? `; or with a word (= and !=): ${[...worded].join(", ")}` : "");
  const fill = (name, choices) => byId(name).append(...choices.map(([value, label]) => Object.assign(make("option", "", label), {value})));
  fill("step", [["", "all"], ...[...steps].reverse().map((step) => [String(step), String(step)])]);
  fill("sort", Object.entries(ORDERS).filter(([name]) => numeric.has("reward") || !/reward|spread/.test(name)));
  fill("shade", [...shades.map((name) => [name, SHADES[name].label]), ["none", "nothing"]]);
  const start = () => {
    readAddress();
    if (!state.shade) state.shade = shades[0] ?? "none";
    controls();
    refresh();
  };
  start();
  addEventListener("hashchange", start);
  byId("query").addEventListener("input", () => { state.query = byId("query").value; state.open = ""; writeAddress(); refresh(); });
  for (const name of ["step", "sort", "shade"]) {
    byId(name).addEventListener("change", () => { state[name] = byId(name).value; writeAddress(); refresh(); });
  }
  addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = {j: 1, k: -1}[event.key];
    if (!by) return;
    const next = visible[visible.indexOf(current) + by];
    if (!next) return;
    if (!next.entry?.isConnected) list(true);
    open(next);
    next.entry?.scrollIntoView({block: "nearest"});
  });
}
begin();
document.documentElement.dataset.samples = rows.length;
requestAnimationFrame(() => { document.documentElement.dataset.milliseconds = Math.round(performance.now()); });
