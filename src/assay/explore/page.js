"use strict";
const $ = (id) => document.getElementById(id);
const token = location.pathname.split("/")[1];
const number = (x) => (x === null || x === undefined ? "-" : Math.abs(x) >= 0.01 || x === 0 ? +x.toPrecision(4) : x.toExponential(2));
const bytes = (n) => { for (const [u, s] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= s) return `${(n / s).toPrecision(4)} ${u}`; return `${n} B`; };
const span = (f) => `${number(f.predicted)} (${number(f.low)} to ${number(f.high)})`;
const OUTSIDE = "outside";

// The whole state of a window is in its address, so that windows don't share one and a reload keeps it.
let facts, state, setting, settingKey = "", plan = null, other = null, cells = [], open = null;
const remember = () => history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify({ state, other: other ? other.path : null })));
const recall = () => { try { return JSON.parse(decodeURIComponent(location.hash.slice(1))); } catch { return null; } };

async function get(name, query = {}) {
  const response = await fetch(`${name}?${new URLSearchParams(query)}`);
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}
const stated = (more = {}) => ({ state: JSON.stringify(state), ...more });
const keyOf = () => JSON.stringify([state.engine, state.method, state.pins]);

// ---- asking: one request at a time, and of those that wait the newest only -----------------
let asking = false, again = false;
async function ask() {
  if (asking) { again = true; return; }
  asking = true;
  do {
    again = false;
    remember();
    const started = performance.now();
    try {
      if (keyOf() !== settingKey) await settle();
      plan = await get("plan", stated());
      show();
      $("error").textContent = "";
    } catch (error) {
      $("error").textContent = error.message;
    }
    window.latency = performance.now() - started;
  } while (again);
  asking = false;
  if (open !== null) detail(open);
}
async function settle() {
  const key = keyOf();
  setting = await get("setting", stated());
  settingKey = key;
  const [least, most] = setting.reach;
  $("slide").min = (Math.ceil(least * 100) / 100).toFixed(2);
  $("slide").max = (Math.ceil(most * 100) / 100).toFixed(2);
  $("slide").value = state.bits;
  if (state.bits < +$("slide").min || state.bits > +$("slide").max) { state.bits = +$("slide").value; $("bits").value = state.bits; remember(); }
  const pinned = new Set(setting.pinned);
  cells.forEach((td, i) => td.classList.toggle("pinned", pinned.has(i)));
}

// ---- showing --------------------------------------------------------------------------------
function show() {
  $("f-bits").textContent = plan.bits.toFixed(3);
  $("f-size").textContent = `${bytes(plan.nbytes)} of ${bytes(facts.source_bytes)}`;
  $("f-kl").textContent = span(plan);
  $("f-uniform").textContent = `${plan.uniform.level}: ${number(plan.uniform.predicted)}`;
  const serving = plan.serving;
  $("f-cache").textContent = !serving ? "give a context" : serving.error ? "-" : bytes(serving.bytes.cache);
  $("f-memory").textContent = !serving ? "give a context" : serving.error ? serving.error : bytes(serving.total);
  shade();
  versus();
  draw();
}
const value = (kind, i) => (kind === "bytes" ? plan.cells.nbytes[i] : kind === "damage" ? plan.cells.damage[i] : 8 * plan.cells.nbytes[i] / facts.weights[i]);
const text = { bits: (x) => number(x), damage: (x) => number(x), bytes: (x) => bytes(x) };
function shade() {
  const kind = document.querySelector("input[name=shade]:checked").value;
  const scale = kind === "damage" ? (x) => Math.log(Math.max(x, 1e-12)) : (x) => x;
  const values = cells.map((_, i) => value(kind, i));
  let low = Infinity, high = -Infinity;
  for (const x of values) { if (x < low) low = x; if (x > high) high = x; }
  cells.forEach((td, i) => {
    const part = high > low ? (scale(values[i]) - scale(low)) / (scale(high) - scale(low)) : 0.5;
    const colour = `rgba(var(--shade), ${(0.06 + 0.56 * part).toFixed(2)})`, words = String(text[kind](values[i]));
    // cells that stay are left alone: most do from one step of the slider to the next
    if (td.colour !== colour) { td.style.backgroundColor = colour; td.colour = colour; }
    if (td.firstChild.data !== words) td.firstChild.data = words;
    const differs = other !== null && level(other.levels, other.cells, i) !== level(setting.levels, plan.cells, i);
    if (td.differs !== differs) { td.classList.toggle("differs", differs); td.differs = differs; }
  });
  $("least").textContent = text[kind](low);
  $("most").textContent = text[kind](high);
}
const level = (names, columns, i) => (columns.level[i] < 0 ? "several levels" : names[columns.level[i]]);
const where = (i) => { const [block, role] = facts.cells[i]; return block === OUTSIDE ? `${role} outside the blocks` : `block ${block}, ${role}`; };
function tell(i) {
  if (!plan) return;
  const also = other ? ` ${other.path} has ${level(other.levels, other.cells, i)}.` : "";
  $("cell").textContent = `${where(i)}: ${level(setting.levels, plan.cells, i)}, ${number(value("bits", i))} bits per weight, ` +
    `${bytes(plan.cells.nbytes[i])} (${bytes(facts.before[i])} before), ${number(plan.cells.damage[i])} nats per token.${also}`;
}

// ---- map ------------------------------------------------------------------------------------
function build() {
  const blocks = [...new Set(facts.cells.map((c) => c[0]))], roles = [...new Set(facts.cells.map((c) => c[1]))];
  const at = new Map(facts.cells.map((c, i) => [JSON.stringify(c), i]));
  const head = $("map").createTHead().insertRow();
  for (const name of ["block", ...roles]) { const th = document.createElement("th"); th.scope = "col"; th.textContent = name; head.append(th); }
  const body = $("map").createTBody();
  for (const block of blocks) {
    const row = body.insertRow(), th = document.createElement("th");
    th.scope = "row"; th.textContent = block; row.append(th);
    for (const role of roles) {
      const td = row.insertCell(), i = at.get(JSON.stringify([block, role]));
      if (i === undefined) continue;
      td.dataset.cell = i; td.tabIndex = -1; td.textContent = "-";
      cells[i] = td;
    }
  }
  cells[0].tabIndex = 0;
}
const cellOf = (event) => { const td = event.target.closest("td[data-cell]"); return td ? +td.dataset.cell : null; };
$("map").addEventListener("focusin", (event) => {
  const i = cellOf(event);
  if (i === null) return;
  for (const td of $("map").querySelectorAll("td[tabindex='0']")) td.tabIndex = -1;
  cells[i].tabIndex = 0;
  tell(i);
});
$("map").addEventListener("mouseover", (event) => { const i = cellOf(event); if (i !== null) tell(i); });
$("map").addEventListener("click", (event) => { const i = cellOf(event); if (i !== null) detail(i); });
$("map").addEventListener("keydown", (event) => {
  const i = cellOf(event), step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (i === null) return;
  if (event.key === "Enter") { detail(i); event.preventDefault(); return; }
  if (!step) return;
  const row = cells[i].parentElement, rows = [...row.parentElement.children];
  let r = rows.indexOf(row), k = cells[i].cellIndex, next = null;
  do { r += step[0]; k += step[1]; next = rows[r] && rows[r].children[k]; } while (next && !next.dataset.cell);
  if (next && next.dataset.cell) next.focus();
  event.preventDefault();
});
for (const radio of document.querySelectorAll("input[name=shade]")) radio.addEventListener("change", () => plan && shade());

// ---- pins -----------------------------------------------------------------------------------
async function detail(i) {
  const [block, role] = facts.cells[i];
  let found;
  try { found = await get("cell", stated({ block, role })); } catch (error) { $("error").textContent = error.message; return; }
  open = i;
  $("detail").hidden = false;
  $("d-name").textContent = where(i);
  const several = found.sites.length > 1 ? `${found.sites.length} matrices` : found.sites[0];
  const shared = found.together.length > 1 ? ` ${found.together.join(", ")} share one level in this engine.` : "";
  $("d-what").textContent = `${several}: ${Object.entries(found.levels).map(([name, n]) => (n > 1 ? `${n} x ${name}` : name)).join(", ")}.${shared}`;
  const body = $("d-options").tBodies[0];
  body.replaceChildren(...found.options.map((o) => {
    const tr = document.createElement("tr");
    for (const words of [o.level, bytes(o.nbytes), number(o.damage)]) tr.insertCell().textContent = words;
    if (found.levels[o.level]) tr.className = "chosen";
    if (block !== OUTSIDE) {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = "Pin"; button.dataset.level = o.level;
      button.setAttribute("aria-label", `Pin ${o.level}`);
      button.addEventListener("click", () => pin(block, role, o.level));
      tr.insertCell().append(button);
    }
    return tr;
  }));
}
function pin(block, role, name) {
  const reach = $("d-reach").value;
  const [b, r] = [reach === "role" ? "*" : block, reach === "block" ? "*" : role];
  state.pins = [...state.pins.filter((p) => p[0] !== b || p[1] !== r), [b, r, name]];
  pins();
  ask();
}
function pins() {
  $("no-pins").hidden = state.pins.length > 0;
  $("pins").replaceChildren(...state.pins.map((p, i) => {
    const li = document.createElement("li"), button = document.createElement("button");
    const words = `${p[0] === "*" ? "every block" : `block ${p[0]}`}, ${p[1] === "*" ? "every role" : p[1]}: ${p[2]}`;
    button.type = "button"; button.textContent = "remove"; button.setAttribute("aria-label", `Remove the pin ${words}`);
    button.addEventListener("click", () => { state.pins = state.pins.filter((_, k) => k !== i); pins(); ask(); });
    li.append(`${words} `, button);
    return li;
  }));
}

// ---- controls -------------------------------------------------------------------------------
function options(id, names, chosen) {
  $(id).replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}
function caches() {
  const names = facts.caches[state.engine];
  if (!names.includes(state.cache)) state.cache = names[0];
  options("cache", names, state.cache);
}
function fillControls() {
  $("slide").value = $("bits").value = state.bits;
  options("engine", facts.engines, state.engine);
  options("method", facts.methods, state.method);
  $("context").value = state.context === null ? "" : state.context;
  $("batch").value = state.batch;
  caches();
  pins();
}
const bind = (id, change, event = "change") => $(id).addEventListener(event, () => { change($(id).value); ask(); });
bind("slide", (x) => { state.bits = +x; $("bits").value = x; }, "input");
bind("bits", (x) => { if (+x > 0) { state.bits = +x; $("slide").value = x; } });
bind("engine", (x) => { state.engine = x; caches(); });
bind("method", (x) => { state.method = x; });
bind("context", (x) => { state.context = x.trim() === "" ? null : x.trim(); });
bind("batch", (x) => { state.batch = Math.max(1, Math.round(+x) || 1); });
bind("cache", (x) => { state.cache = x; });
$("controls").addEventListener("submit", (event) => event.preventDefault());

// ---- save and compare -----------------------------------------------------------------------
$("save").addEventListener("submit", async (event) => {
  event.preventDefault();
  const response = await fetch("save", {
    method: "POST", headers: { "Content-Type": "application/json", "X-Assay-Token": token },
    body: JSON.stringify({ state, path: $("path").value }),
  });
  const answer = await response.json();
  $("saved").textContent = response.ok ? `Saved ${answer.saved}. To carry it out: ${answer.command}` : answer.error;
});
async function compare(path) {
  other = null;
  if (path) {
    try { other = await get("compare", { path }); $("compared").textContent = ""; } catch (error) { $("compared").textContent = error.message; }
  }
  remember();
  if (plan) show();
}
$("compare").addEventListener("submit", (event) => { event.preventDefault(); compare($("other").value.trim()); });
function versus() {
  $("versus").hidden = other === null;
  if (other === null) return;
  $("v-name").textContent = other.path;
  const differ = cells.filter((td) => td.differs).length, memory = (s) => (s && !s.error ? `${bytes(s.total)} at ${s.context} tokens` : "-");
  const rows = [
    ["engine, method", `${state.engine}, ${setting.method}`, `${other.engine}, ${other.method}`],
    ["bits in the blocks", plan.bits.toFixed(3), other.bits.toFixed(3)], ["bytes of all tensors", bytes(plan.nbytes), bytes(other.nbytes)],
    ["predicted KL, nats per token", span(plan), span(other)], ["memory while it is served", memory(plan.serving), memory(other.serving)],
    ["cells of the map that differ", "", `${differ} of ${cells.length}`],
  ];
  $("versus").querySelector("tbody").replaceChildren(...rows.map((row) => {
    const tr = document.createElement("tr");
    for (const words of row) tr.insertCell().textContent = words;
    return tr;
  }));
}

// ---- frontier -------------------------------------------------------------------------------
const scheme = matchMedia("(prefers-color-scheme: dark)");
let drawing = false;
function draw() {
  if (drawing) return;  // plotly is slower than a drag: once a frame, with what is newest then
  drawing = true;
  requestAnimationFrame(() => { drawing = false; plot(); });
}
function plot() {
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zeroline: false };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink") }, margin: { t: 10, r: 10 },
    xaxis: { ...axis, title: { text: "bytes of all tensors" } }, yaxis: { ...axis, type: "log", title: { text: "KL, nats per token" } },
    legend: { orientation: "h", y: 1.12 },
  };
  const line = (name, points, mode, symbol, shade, size) => ({
    name, type: "scatter", mode, x: points.map((p) => p.nbytes), y: points.map((p) => p.predicted), text: points.map((p) => p.level || ""),
    line: { color: shade }, marker: { symbol, color: shade, size },
  });
  const bar = (p) => ({ error_y: { type: "data", symmetric: false, array: [p.high - p.predicted], arrayminus: [p.predicted - p.low] } });
  const lossy = (points) => points.filter((p) => p.predicted > 0);
  const traces = [
    line("best mix", lossy(setting.frontier), "lines", "circle", colour("--accent"), 6),
    line("one level", lossy(setting.uniform), "markers", "square", colour("--quiet"), 7),
    { ...line("this plan", [plan], "markers", "diamond", colour("--accent"), 14), ...bar(plan) },
  ];
  if (other) traces.push({ ...line(other.path, [other], "markers", "star", colour("--bad"), 14), ...bar(other) });
  Plotly.react("plot", traces, layout, { responsive: true, displaylogo: false });
}
scheme.addEventListener("change", () => plan && draw());

(async () => {
  facts = await get("facts");
  $("title").textContent = `${facts.profile}: ${facts.family}`;
  const kept = recall();
  state = { ...facts.start, ...(kept && kept.state) };
  build();
  fillControls();
  await ask();
  if (kept && kept.other) { $("other").value = kept.other; await compare(kept.other); }
  document.body.dataset.ready = "yes";
})().catch((error) => { $("error").textContent = error.message; });
