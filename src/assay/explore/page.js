"use strict";
const $ = (id) => document.getElementById(id);
const token = location.pathname.split("/")[1];
const number = (x) => (x === null || x === undefined ? "-" : Math.abs(x) >= 0.01 || x === 0 ? +x.toPrecision(4) : Math.abs(x) >= 1e-4 ? +x.toPrecision(3) : x.toExponential(2));
const bytes = (n) => { for (const [u, s] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= s) return `${(n / s).toPrecision(4)} ${u}`; return `${n} B`; };
const span = (f) => `${number(f.predicted)} (${number(f.low)} to ${number(f.high)})`;
const OUTSIDE = "outside";

// The whole state of a window is in its address, so that windows don't share one and a reload keeps it.
let facts, state, wished, setting, settingKey = "", plan = null, other = null, cells = [], open = null;
let saved = null;  // the plan that was saved last: its file and the state that it holds
const noted = () => history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(
  { state, saved, other: other ? other.path : null, model: $("model").value, out: $("out").value })));
// browsers refuse an address that changes with every step of a drag
let noting = 0;
const remember = () => { clearTimeout(noting); noting = setTimeout(noted, 100); };
addEventListener("pagehide", () => state && noted());
const recall = () => { try { return JSON.parse(decodeURIComponent(location.hash.slice(1))); } catch { return null; } };

async function read(address, how) {
  let response;
  try { response = await fetch(address, how); } catch { throw new Error("assay explore has ended; start it again and open the address that it prints"); }
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}
const get = (name, query = {}) => read(`${name}?${new URLSearchParams(query)}`);
const post = (name, value) => read(name, { method: "POST", headers: { "Content-Type": "application/json", "X-Assay-Token": token }, body: JSON.stringify(value) });
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
      offer();
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
  // pins move the reach; when they go again, so does the budget that was wished for
  state.bits = Math.min(+$("slide").max, Math.max(+$("slide").min, wished));
  $("slide").value = $("bits").value = state.bits;
  remember();
  const pinned = new Set(setting.pinned);
  cells.forEach((td, i) => td.classList.toggle("pinned", pinned.has(i)));
}

// ---- showing --------------------------------------------------------------------------------
function show() {
  $("f-bits").textContent = plan.bits.toFixed(3);
  $("f-size").textContent = `${bytes(plan.nbytes)} of ${bytes(facts.source_bytes)}`;
  $("f-kl").textContent = span(plan);
  $("brief").textContent = `${bytes(plan.nbytes)}, KL ${number(plan.predicted)}`;
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
// A map can have ten thousand cells: while a budget is dragged only those in sight are repainted, the rest when it rests.
let look = null, version = 0, filling = 0;
function shade() {
  const kind = document.querySelector("input[name=shade]:checked").value;
  const scale = kind === "damage" ? (x) => Math.log(Math.max(x, 1e-12)) : (x) => x;
  let low = Infinity, high = -Infinity, inside = 0;
  // what lies outside the blocks mostly stays, and would take the whole scale
  for (const [i, cell] of facts.cells.entries()) {
    if (cell[0] === OUTSIDE) continue;
    const x = value(kind, i);
    inside++;
    if (x < low) low = x;
    if (x > high) high = x;
  }
  if (!inside) { low = Math.min(...cells.map((_, i) => value(kind, i))); high = Math.max(...cells.map((_, i) => value(kind, i))); }
  const [from, to] = [scale(low), scale(high)];
  look = { kind, part: (x) => (to > from ? Math.min(1, Math.max(0, (scale(x) - from) / (to - from))) : 0.5) };
  version++;
  inSight();
  clearTimeout(filling);
  filling = setTimeout(fill, 250);
  $("least").textContent = text[kind](low);
  $("most").textContent = text[kind](high);
}
function paint(row) {
  if (row.version === version) return;
  row.version = version;
  for (const td of row.cells) {
    if (!td.dataset.cell) continue;
    const i = +td.dataset.cell, x = value(look.kind, i);
    const colour = `rgba(var(--shade), ${(0.06 + 0.56 * look.part(x)).toFixed(2)})`, words = String(text[look.kind](x));
    if (td.colour !== colour) { td.style.backgroundColor = colour; td.colour = colour; }
    if (td.firstChild.data !== words) td.firstChild.data = words;
    const apart = differs(i);
    if (td.differs !== apart) { td.classList.toggle("differs", apart); td.differs = apart; }
  }
}
const rows = () => $("map").tBodies[0].rows;
function inSight() {
  const all = rows(), box = $("map").parentElement, tall = Math.max(1, all[0].offsetHeight);
  const first = Math.max(0, Math.floor(box.scrollTop / tall) - 3), last = Math.min(all.length, first + Math.ceil(box.clientHeight / tall) + 6);
  for (let r = first; r < last; r++) paint(all[r]);
}
function fill(start = 0) {
  const all = rows(), end = Math.min(all.length, start + 25);
  for (let r = start; r < end; r++) paint(all[r]);
  if (end < all.length) filling = setTimeout(fill, 15, end);
}
$("map").parentElement.addEventListener("scroll", () => look && inSight());
const differs = (i) => other !== null && level(other.levels, other.cells, i) !== level(setting.levels, plan.cells, i);
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
  // columns of a fixed width: else a cell that changes makes the browser measure all of them again
  $("map").style.width = `${4.5 + roles.reduce((sum, name) => sum + columnOf(name), 0)}rem`;
  [...head.cells].forEach((th, k) => { th.style.width = `${k ? columnOf(roles[k - 1]) : 4.5}rem`; });
}
const columnOf = (role) => Math.max(4.8, 1.6 + 0.58 * role.length);
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
  cells.forEach((td, k) => td.classList.toggle("open", k === i));
  tell(i);
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
bind("slide", (x) => { state.bits = wished = +x; $("bits").value = x; }, "input");
bind("bits", (x) => { if (+x > 0) { state.bits = wished = +x; $("slide").value = x; } });
bind("engine", (x) => { state.engine = x; caches(); });
bind("method", (x) => { state.method = x; });
bind("context", (x) => { state.context = x.trim() === "" ? null : x.trim(); });
bind("batch", (x) => { state.batch = Math.max(1, Math.round(+x) || 1); });
bind("cache", (x) => { state.cache = x; });
$("controls").addEventListener("submit", (event) => event.preventDefault());

// ---- save and compare -----------------------------------------------------------------------
$("save").addEventListener("submit", async (event) => {
  event.preventDefault();
  const held = structuredClone(state);
  try {
    const answer = await post("save", { state: held, path: $("path").value });
    saved = { path: answer.saved, state: held };
    $("saved").textContent = `Saved ${answer.saved}. To carry it out, start it below, or: ${answer.command}`;
    remember();
    offer();
  } catch (error) { $("saved").textContent = error.message; }
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
  const differ = cells.filter((_, i) => differs(i)).length, memory = (s) => (s && !s.error ? `${bytes(s.total)} at ${s.context} tokens` : "-");
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

// ---- compress -------------------------------------------------------------------------------
let job = { state: "idle" };
const runs = () => job.state === "running" || job.state === "cancelling";
function offer() {
  const changed = saved && JSON.stringify(saved.state) !== JSON.stringify(state);
  $("by").textContent = !saved ? "Save the plan first." : `By the plan ${saved.path}${changed ? "; what this page shows has changed since it was saved." : "."}`;
  $("start").disabled = !saved || runs();
}
const seconds = (n) => (n < 90 ? `${Math.ceil(n)} s` : n < 5400 ? `${Math.round(n / 60)} min` : `${(n / 3600).toFixed(1)} h`);
function tellJob() {
  const words = {
    idle: () => "", running: () => `Compressing into ${job.out}; ${seconds(job.seconds)} so far.`, cancelling: () => "Cancelling ...",
    done: () => `Done in ${seconds(job.seconds)}: ${job.out}, ${bytes(job.result.bytes)} of ${bytes(job.result.source_bytes)}, ${number(job.result.bits)} bits per weight in the blocks.`,
    cancelled: () => "Cancelled. The same start continues from the blocks that are finished.", failed: () => `Failed: ${job.error}`,
  };
  const said = words[job.state]();
  if ($("job-state").textContent !== said) $("job-state").textContent = said;
  $("job-state").className = job.state === "failed" ? "bad" : "";
  $("cancel").hidden = !runs();
  $("job-report").hidden = !job.report;
  $("job-tasks").replaceChildren(...(job.tasks || []).map((task) => {
    const p = document.createElement("p"), bar = document.createElement("progress"), left = task.left === null ? "" : `, about ${seconds(task.left)} left`;
    bar.max = task.total; bar.value = task.done;
    bar.setAttribute("aria-label", task.what);
    p.append(bar, ` ${task.what}: ${task.done} of ${task.total}${left}`);
    return p;
  }));
  const lines = (job.lines || []).join("\n"), pre = $("job-lines");
  pre.hidden = lines === "";
  if (pre.textContent !== lines) { pre.textContent = lines; pre.scrollTop = pre.scrollHeight; }
  offer();
}
async function poll() {
  try { job = await get("job"); tellJob(); } catch (error) { $("job-state").textContent = error.message; }
  setTimeout(poll, runs() ? 500 : 3000);  // now and then even when nothing runs: another window may start something
}
async function order(name, value) {
  try { job = (await post(name, value)) || job; tellJob(); } catch (error) { $("job-state").textContent = error.message; $("job-state").className = "bad"; }
}
$("job").addEventListener("submit", (event) => {
  event.preventDefault();
  remember();
  if (saved) order("start", { plan: saved.path, model: $("model").value, out: $("out").value });
});
$("cancel").addEventListener("click", () => order("cancel", {}));
for (const id of ["model", "out"]) $(id).addEventListener("change", remember);

// ---- frontier -------------------------------------------------------------------------------
const scheme = matchMedia("(prefers-color-scheme: dark)");
let drawing = false;
function draw() {
  if (drawing) return;  // plotly is slower than a drag: when there is time, with what is newest then
  drawing = true;
  requestIdleCallback(() => { drawing = false; plot(); }, { timeout: 200 });
}
function plot() {
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zeroline: false };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink") }, margin: { t: 10, r: 10, b: 45, l: 65 },
    xaxis: { ...axis, ticksuffix: "B", title: { text: "bytes of all tensors" } },
    yaxis: { ...axis, type: "log", exponentformat: "power", title: { text: "KL, nats per token" } },
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
  Plotly.react("plot", traces, layout, { responsive: true, displayModeBar: false });
}
scheme.addEventListener("change", () => plan && draw());

(async () => {
  facts = await get("facts");
  $("title").textContent = document.title = `${facts.profile.split(/[\\/]/).pop()}: ${facts.family}`;
  $("where").textContent = facts.profile;
  const kept = recall();
  saved = (kept && kept.saved) || null;
  $("model").value = kept && kept.model !== undefined ? kept.model : facts.model;
  $("out").value = (kept && kept.out) || "";
  state = { ...facts.start, ...(kept && kept.state) };
  wished = state.bits;
  build();
  fillControls();
  await ask();
  if (kept && kept.other) { $("other").value = kept.other; await compare(kept.other); }
  poll();
  document.body.dataset.ready = "yes";
})().catch((error) => { $("error").textContent = error.message; });
