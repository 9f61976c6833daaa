// Keeps the console up to date. It asks for /stats each second, and for the newest messages when their number
// has changed, and only while the page is visible. Text from the services is only ever set as textContent.

"use strict";

const PERIOD_MS = 1000;
const TIMEOUT_MS = 3000;
const NEWEST = 20;
// A search looks at 100,000 messages, which may be large.
const SEARCH_TIMEOUT_MS = 60000;
// The most matches that are shown at a time; console.rs shows as many.
const MATCHES = 20;
const MAX_SHOWN = 300;
const MAX_EVENTS = 100;
const CHART_MS = 5 * 60 * 1000;
// A longer pause between two samples is a gap in the charts.
const GAP_MS = 5000;

const byId = (id) => document.getElementById(id);

const page = {
  // The last answer of /stats, and when it came.
  stats: null,
  statsAt: 0,
  // What failed at the last request, in words.
  failure: null,
  isPaused: false,
  // Whether the newest messages are being read.
  isReading: false,
  // The entries when the newest messages were read, and the UUIDs that are shown.
  entriesRead: null,
  shownUuids: null,
  // The UUID of a message of which is not known whether it is stored, and the message.
  unknown: null,
};

// How values are shown; console.rs shows the same numbers in the same way.

function at(object, pointer) {
  return pointer.split("/").slice(1).reduce((value, name) => value?.[name], object) ?? null;
}

const grouped = (number) => number.toLocaleString("en-US", { maximumFractionDigits: 0 });

const seconds = (time) => time.slice(0, 19).replace("T", " ");

const clock = (date) => date.toISOString().slice(11, 19);

function bytes(count) {
  if (count < 1024) return `${count} B`;
  const exponent = Math.floor(Math.log(count) / Math.log(1024));
  return `${(count / 1024 ** exponent).toFixed(1)} ${"KMGTPE"[exponent - 1]}iB`;
}

function shown(object, { key, kind }) {
  const value = at(object, key);
  if (kind === "state") return state(object);
  if (value === null) return "–";
  if (kind === "number") return grouped(value);
  if (kind === "bytes") return bytes(value);
  if (kind === "share") return `${(100 * value).toFixed(1)} %`;
  if (kind === "ms") return value.toFixed(1);
  if (kind === "time") return seconds(value);
  if (kind === "counts") {
    const counts = Object.entries(value).map(([name, count]) => `${name}: ${count}`);
    return counts.length === 0 ? "none" : counts.join(", ");
  }
  return String(value);
}

function state(row) {
  if (row.up === false) return "down";
  return row.version === null ? "no answer" : "up";
}

function shownTotal(total, column) {
  if (column.kind === "name") return "TOTAL";
  if (column.kind === "state") return total?.complete === false ? "incomplete" : "";
  return at(total, column.key) === null ? "" : shown(total, column);
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(name, text, className) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (className !== undefined) element.className = className;
  return element;
}

// Tables: the rows of the server are kept up to date in place, so that a selection in them survives.

class Table {
  constructor(id, rowsOf, totalOf) {
    this.table = byId(id);
    this.empty = byId(`${id}-empty`);
    this.rowsOf = rowsOf;
    this.totalOf = totalOf;
    this.sorted = null;
    const headers = [...this.table.tHead.rows[0].cells];
    this.columns = headers.map((header) => ({ ...header.dataset, header }));
    this.name = this.columns.find((column) => column.kind === "name");
    for (const column of this.columns) this.addSortButton(column);
  }

  addSortButton(column) {
    const button = make("button", column.header.textContent);
    button.type = "button";
    button.addEventListener("click", () => this.sort(column));
    column.header.replaceChildren(button);
  }

  // The first click sorts numbers from the largest, names from the first; the next one turns it around.
  sort(column) {
    const isText = ["name", "text", "state"].includes(column.kind);
    const first = isText ? "ascending" : "descending";
    const second = isText ? "descending" : "ascending";
    const isTurned = this.sorted?.column === column && this.sorted.direction === first;
    this.sorted = { column, direction: isTurned ? second : first };
    for (const { header } of this.columns) header.removeAttribute("aria-sort");
    column.header.setAttribute("aria-sort", this.sorted.direction);
    if (page.stats !== null) this.show(page.stats);
  }

  inOrder(rows) {
    if (this.sorted === null) return rows;
    const { column, direction } = this.sorted;
    const sign = direction === "ascending" ? 1 : -1;
    const value = (row) => (column.kind === "state" ? state(row) : at(row, column.key));
    return [...rows].sort((one, other) => {
      const [left, right] = [value(one), value(other)];
      // A row without a number is last in either direction.
      if (left === null || right === null) return (left === null) - (right === null);
      if (typeof left === "string") return sign * left.localeCompare(right, "en", { numeric: true });
      return sign * (left - right);
    });
  }

  show(stats) {
    const rows = this.inOrder(this.rowsOf(stats));
    const body = this.table.tBodies[0];
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach((row, index) => {
      const line = body.rows[index] ?? this.addLine(body);
      line.dataset.state = state(row);
      this.columns.forEach((column, cell) => setText(line.cells[cell], shown(row, column)));
    });
    this.empty.hidden = rows.length > 0;
    if (this.totalOf !== undefined) {
      const line = this.table.tFoot.rows[0];
      const total = this.totalOf(stats);
      this.columns.forEach((column, cell) => setText(line.cells[cell], shownTotal(total, column)));
    }
  }

  addLine(body) {
    const line = body.insertRow();
    for (const column of this.columns) {
      const cell = make(column === this.name ? "th" : "td", "", column.kind);
      if (column === this.name) cell.scope = "row";
      line.append(cell);
    }
    return line;
  }
}

const membersOf = (stats) => stats.map?.members ?? [];
const tables = [
  new Table("members", membersOf, (stats) => stats.map?.total),
  new Table("instances", (stats) => stats.instances),
];

function showFields(stats) {
  for (const field of document.querySelectorAll("[data-field]")) {
    const { field: key, kind } = field.dataset;
    setText(field, shown(stats, { key, kind }));
  }
}

function showProblems(problems) {
  const list = byId("problems");
  const texts = [...list.querySelectorAll("strong")].map((problem) => problem.textContent);
  const isShown = list.childElementCount > 0 && texts.join("\n") === problems.join("\n");
  if (isShown) return;
  const advices = [...byId("advice").children];
  const lines = problems.map((problem) => {
    const line = make("li");
    const advice = advices.find((one) => problem.startsWith(one.dataset.beginning));
    line.append(make("strong", problem), " ", make("span", advice.textContent));
    return line;
  });
  list.replaceChildren(...(lines.length > 0 ? lines : [make("li", "No problems.", "none")]));
}

// The timeline: what differs between two answers of /stats.

function events(before, after) {
  const found = [];
  for (const [kind, key, rowsOf] of [
    ["logging", "instance", (stats) => stats.instances],
    ["member", "member", membersOf],
  ]) {
    // While no instance answers, nothing is known about the members.
    if (kind === "member" && (before.map === null || after.map === null)) continue;
    const known = new Map(rowsOf(before).map((row) => [row[key], row]));
    for (const row of rowsOf(after)) {
      const name = `${kind} ${row[key]}`;
      const old = known.get(row[key]);
      known.delete(row[key]);
      if (old === undefined) found.push(["up", `${name} is new`]);
      else found.push(...changes(name, old, row));
    }
    for (const name of known.keys()) found.push(["down", `${kind} ${name} is gone`]);
  }
  if (before.facade.since !== after.facade.since) found.push(["up", "this facade was restarted"]);
  return found;
}

function changes(name, old, row) {
  const found = [];
  const now = state(row);
  if (state(old) !== now) {
    if (now === "up") found.push(["up", `${name} is back`]);
    else found.push(["down", now === "down" ? `${name} is down` : `${name} does not answer`]);
  }
  if (old.role !== row.role) found.push(["changed", `${name} is now ${row.role}, was ${old.role}`]);
  const wasRestarted = old.counts_since && row.counts_since && old.counts_since !== row.counts_since;
  if (wasRestarted && state(old) === now) found.push(["up", `${name} was restarted`]);
  return found;
}

function note(kind, text) {
  const timeline = byId("timeline");
  const line = make("li", undefined, kind);
  const now = new Date();
  const time = make("time", clock(now));
  time.dateTime = now.toISOString();
  line.append(time, " ", make("span", text));
  timeline.prepend(line);
  while (timeline.childElementCount > MAX_EVENTS) timeline.lastElementChild.remove();
}

// Charts.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 60;

class Chart {
  // Each series has a label and a function from two answers of /stats and the seconds between them; `floor`
  // gives the lower end of the scale from all values.
  constructor(title, series, format, floor) {
    this.floor = floor;
    this.series = series.map((one) => ({ ...one, samples: [] }));
    this.format = format;
    const figure = make("figure");
    const caption = make("figcaption", title);
    caption.id = `chart-${byId("charts").childElementCount}`;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("aria-labelledby", `${caption.id} ${caption.id}-text`);
    this.top = make("span", "", "top");
    this.bottom = make("span", "", "bottom");
    const plot = make("div", undefined, "plot");
    plot.append(this.svg, this.top, this.bottom);
    this.text = make("p");
    this.text.id = `${caption.id}-text`;
    this.series.forEach((one, index) => {
      one.path = document.createElementNS(SVG, "path");
      one.path.setAttribute("class", `line line-${index}`);
      this.svg.append(one.path);
      one.text = make("span", `${one.label}: –`, `series series-${index}`);
      this.text.append(one.text, " ");
    });
    figure.append(caption, plot, this.text);
    byId("charts").append(figure);
  }

  add(before, after, elapsed, now) {
    for (const one of this.series) {
      const value = one.value(before, after, elapsed);
      if (value !== null && Number.isFinite(value)) one.samples.push({ now, value });
      while (one.samples.length > 0 && one.samples[0].now < now - CHART_MS) one.samples.shift();
    }
    const values = this.series.flatMap((one) => one.samples.map((sample) => sample.value));
    if (values.length === 0) return;
    const lowest = this.floor(...values);
    const highest = Math.max(...values);
    setText(this.top, this.format(highest));
    setText(this.bottom, this.format(lowest));
    for (const one of this.series) this.draw(one, lowest, highest - lowest || 1, now);
  }

  draw(one, lowest, span, now) {
    let last = -Infinity;
    const points = one.samples.map((sample) => {
      const x = WIDTH * (1 - (now - sample.now) / CHART_MS);
      const y = HEIGHT - 1 - (HEIGHT - 3) * ((sample.value - lowest) / span);
      const step = sample.now - last > GAP_MS ? "M" : "L";
      last = sample.now;
      return `${step}${x.toFixed(1)} ${y.toFixed(1)}`;
    });
    one.path.setAttribute("d", points.join(""));
    const values = one.samples.map((sample) => sample.value);
    if (values.length === 0) return;
    const [low, high] = [Math.min(...values), Math.max(...values)].map(this.format);
    setText(one.text, `${one.label}: ${this.format(values.at(-1))} now, ${low} to ${high}`);
  }
}

const rate = (key) => (before, after, elapsed) =>
  before.facade.since === after.facade.since ? (at(after, key) - at(before, key)) / elapsed : null;

const zero = () => 0;

const perSecond = (value) => `${value < 10 ? value.toFixed(1) : grouped(value)}/s`;

const charts = [
  new Chart(
    "Entries in the map",
    [{ label: "Entries", value: (_, after) => at(after, "/map/total/entries") }],
    grouped,
    Math.min,
  ),
  new Chart(
    "Requests to this facade",
    [
      { label: "POSTs", value: rate("/facade/posts") },
      { label: "GETs", value: rate("/facade/gets") },
    ],
    perSecond,
    zero,
  ),
  new Chart(
    "99th percentile of a put, slowest instance",
    [
      {
        label: "p99",
        value: (_, after) => {
          const known = after.instances.map((row) => row.put_p99_ms).filter((ms) => ms !== null);
          return known.length > 0 ? Math.max(...known) : null;
        },
      },
    ],
    (ms) => `${ms.toFixed(1)} ms`,
    zero,
  ),
];

// Polling.

// The answer as { value }, or why there is none as { failure }.
async function readJson(path, signal = AbortSignal.timeout(TIMEOUT_MS)) {
  const headers = { accept: "application/json" };
  try {
    const response = await fetch(path, { headers, signal });
    const value = await response.json();
    if (response.ok) return { value };
    return { failure: value.detail ?? `this facade answers ${response.status}` };
  } catch {
    return { failure: "this facade does not answer" };
  }
}

async function poll() {
  const { value: stats, failure = null } = await readJson("/stats");
  if (stats !== undefined) {
    showStats(stats);
    // Not awaited: while no instance can read, as in a failover, the numbers go on.
    updateNewest();
  }
  if (failure !== page.failure) {
    if (failure !== null) note("down", failure);
    else note("up", "this facade answers again");
  }
  page.failure = failure;
  showStatus();
}

function showStats(stats) {
  const now = performance.now();
  const before = page.stats;
  if (before !== null) {
    for (const [kind, text] of events(before, stats)) note(kind, text);
    const elapsed = (now - page.statsAt) / 1000;
    for (const chart of charts) chart.add(before, stats, elapsed, now);
  }
  page.stats = stats;
  page.statsAt = now;
  showFields(stats);
  showProblems(stats.problems);
  for (const table of tables) table.show(stats);
}

function showStatus() {
  const asOf = page.stats === null ? "no numbers yet" : `as of ${page.stats.at.slice(11, 19)} UTC`;
  const status = byId("status");
  document.body.classList.toggle("old", page.failure !== null || page.isPaused);
  // The time is not read out each second: only a change of the words before it is.
  const words = page.failure ?? (page.isPaused ? "Paused" : "Live");
  setText(byId("status-words"), words);
  setText(byId("status-time"), asOf);
  status.dataset.state = page.failure !== null ? "failed" : page.isPaused ? "paused" : "live";
}

const isActive = () => !document.hidden && !page.isPaused;

let isPolling = false;

// One loop at a time; it ends when the page is hidden or paused.
async function pollWhileActive() {
  if (isPolling) return;
  isPolling = true;
  while (isActive()) {
    const began = performance.now();
    await poll();
    const rest = Math.max(0, PERIOD_MS - (performance.now() - began));
    await new Promise((resolve) => setTimeout(resolve, rest));
  }
  isPolling = false;
}

// The newest messages are read once a second and not followed: thousands a second would cost the page more than it
// can show.
async function updateNewest() {
  if (page.isReading) return;
  const total = page.stats.map?.total;
  // Without an answer of any instance there is nobody to read from.
  if (total === undefined) return;
  if (total.complete !== false && total.entries === page.entriesRead) return;
  page.isReading = true;
  const { value: answer, failure } = await readJson(`/?order=desc&limit=${NEWEST}`);
  page.isReading = false;
  const title = "The newest, newest first";
  setText(byId("newest-title"), failure === undefined ? title : `${title}; now: ${failure}`);
  if (answer === undefined) return;
  page.entriesRead = total.entries;
  showNewest(answer.logging_service);
}

function showNewest(entries) {
  const uuids = entries.map((entry) => entry.uuid).join();
  if (uuids === page.shownUuids) return;
  page.shownUuids = uuids;
  const lines = entries.map(messageLine);
  byId("newest").replaceChildren(...(lines.length > 0 ? lines : [make("li", "No messages yet.", "none")]));
}

function messageLine({ uuid, msg }) {
  const line = make("li");
  const link = make("a");
  link.href = `/${uuid}`;
  link.title = uuid;
  // The first 48 bits of a version 7 UUID are its time.
  const posted = new Date(parseInt(uuid.replaceAll("-", "").slice(0, 12), 16));
  link.append(make("time", seconds(posted.toISOString())));
  const text = make("bdi", undefined, "msg");
  const characters = Array.from(msg);
  text.append(...pieces(characters.slice(0, MAX_SHOWN).join("")));
  line.append(link, " ", text);
  if (characters.length > MAX_SHOWN) {
    const length = new TextEncoder().encode(msg).length;
    line.append(make("em", ` … ${length} bytes in all`));
  }
  return line;
}

// Control characters, line ends, and marks that change the direction of text are shown as escapes.
const NEEDS_ESCAPE = /([\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069])/u;
const SHORT_ESCAPES = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };

function pieces(text) {
  return text.split(NEEDS_ESCAPE).map((piece, index) => {
    if (index % 2 === 0) return piece;
    return make("mark", SHORT_ESCAPES[piece] ?? `\\u{${piece.codePointAt(0).toString(16)}}`);
  });
}

// Posting.

async function post(event) {
  event.preventDefault();
  const form = byId("post");
  const field = byId("msg");
  const msg = field.value;
  const headers = { "content-type": "application/json" };
  // A message of which is not known whether it is stored is repeated under its UUID: that stores it once.
  if (page.unknown?.msg === msg) headers["idempotency-key"] = page.unknown.uuid;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const began = performance.now();
    const response = await fetch("/", { method: "POST", headers, body: JSON.stringify({ msg }) });
    const answer = await response.json();
    if (!response.ok) {
      if (answer.stored === "unknown") page.unknown = { uuid: answer.uuid, msg };
      // It was not stored and its UUID has become too old: the next try gets another one.
      if (response.status === 409) page.unknown = null;
      showAnswer("Not acknowledged:", answer.detail);
      return;
    }
    page.unknown = null;
    field.value = "";
    const link = make("a", answer.uuid);
    link.href = `/${answer.uuid}`;
    const instance = response.headers.get("x-logging-instance");
    const elapsed = Math.round(performance.now() - began);
    byId("answer").replaceChildren("Stored as ", link, ` by ${instance} in ${elapsed} ms.`);
  } catch {
    showAnswer("No answer:", "whether the message is stored is not known; see the newest messages.");
  } finally {
    button.disabled = false;
    field.focus();
  }
}

function showAnswer(heading, detail) {
  byId("answer").replaceChildren(make("strong", heading, "error"), ` ${detail}`);
}

// Searching: the form #search begins, #search-on continues with the query in its hidden fields.

let searching = new AbortController();

async function search(event) {
  event.preventDefault();
  const form = event.target;
  const query = new URLSearchParams(new FormData(form));
  // The latest search replaces one that is under way.
  searching.abort();
  const mine = new AbortController();
  searching = mine;
  const status = byId("found-status");
  if (form.id === "search") {
    history.replaceState(null, "", `/console?${query}`);
    byId("search-on").hidden = true;
    byId("found").replaceChildren();
    Object.assign(status.dataset, { matches: 0, scanned: 0 });
  }
  setText(status, "Searching…");
  const signal = AbortSignal.any([mine.signal, AbortSignal.timeout(SEARCH_TIMEOUT_MS)]);
  const { value: answer, failure } = await readJson(`/?${query}&limit=${MATCHES}`, signal);
  if (mine.signal.aborted) return;
  if (answer === undefined) {
    status.replaceChildren(make("strong", "Not searched:", "error"), ` ${failure}`);
    return;
  }
  byId("found").append(...answer.logging_service.map(messageLine));
  status.dataset.matches = Number(status.dataset.matches) + answer.count;
  status.dataset.scanned = Number(status.dataset.scanned) + answer.scanned;
  setText(status, summary(status.dataset, answer.next));
  offerToSearchOn(query, answer.next);
}

function summary({ matches, scanned }, next) {
  const rest = next === undefined ? "That is all." : "There are more to search.";
  return `Matches: ${grouped(Number(matches))}. Messages scanned: ${grouped(Number(scanned))}. ${rest}`;
}

function offerToSearchOn(query, next) {
  const form = byId("search-on");
  // A button that goes away must not take the keyboard's place in the page with it. (`form.contains` is a field.)
  const isFocused = document.activeElement === form.querySelector("button");
  if (next === undefined && isFocused) byId("found-list").focus();
  form.hidden = next === undefined;
  if (next === undefined) return;
  query.set(query.get("order") === "asc" ? "after" : "before", next);
  const fields = [...query].map(([name, value]) => {
    const field = make("input");
    Object.assign(field, { type: "hidden", name, value });
    return field;
  });
  // The button stays where it is, and keeps the focus.
  form.querySelectorAll("input").forEach((field) => field.remove());
  form.prepend(...fields);
}

byId("post").addEventListener("submit", post);
byId("search").addEventListener("submit", search);
byId("search-on").addEventListener("submit", search);

byId("pause").addEventListener("click", () => {
  page.isPaused = !page.isPaused;
  byId("pause").setAttribute("aria-pressed", String(page.isPaused));
  showStatus();
  pollWhileActive();
});

document.addEventListener("visibilitychange", pollWhileActive);

note("up", "This page was opened");
pollWhileActive();
