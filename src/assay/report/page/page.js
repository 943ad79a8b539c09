"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const number = (x) => (x === null || x === undefined ? "-" : Math.abs(x) >= 0.01 || x === 0 ? +x.toPrecision(4) : x.toExponential(2));
const bytes = (n) => { for (const [u, s] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= s) return `${(n / s).toPrecision(3)} ${u}`; return `${n} B`; };

// ---- map ------------------------------------------------------------------------------------
const cells = [...document.querySelectorAll("#map td[data-cell]")];
const text = { bits: (c) => number(c.bits), damage: (c) => number(c.damage), bytes: (c) => bytes(c.bytes) };
function shade(kind) {
  // damage spans decades, so its colour follows the logarithm
  const scale = kind === "damage" ? (x) => Math.log(Math.max(x, 1e-12)) : (x) => x;
  const values = facts.cells.map((c) => c[kind]);
  const low = Math.min(...values), high = Math.max(...values);
  for (const td of cells) {
    const c = facts.cells[td.dataset.cell];
    const part = high > low ? (scale(c[kind]) - scale(low)) / (scale(high) - scale(low)) : 0.5;
    td.style.backgroundColor = `rgba(var(--shade), ${(0.06 + 0.56 * part).toFixed(3)})`;
    td.textContent = text[kind](c);
  }
  document.getElementById("least").textContent = text[kind]({ [kind]: low });
  document.getElementById("most").textContent = text[kind]({ [kind]: high });
}
function tell(td) {
  const c = facts.cells[td.dataset.cell];
  document.getElementById("cell").textContent =
    `${c.name}: ${c.levels}, ${number(c.bits)} bits per weight, ${bytes(c.bytes)} (${bytes(c.before)} before), ` +
    `${number(c.damage)} nats per token. ${c.why}`;
}
for (const radio of document.querySelectorAll("input[name=shade]")) radio.addEventListener("change", () => shade(radio.value));
for (const td of cells) {
  td.addEventListener("focus", () => tell(td));
  td.addEventListener("mouseenter", () => tell(td));
}
document.getElementById("map").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step || !event.target.dataset.cell) return;
  const row = event.target.parentElement, rows = [...row.parentElement.children];
  let r = rows.indexOf(row), k = [...row.children].indexOf(event.target), next = null;
  do { r += step[0]; k += step[1]; next = rows[r] && rows[r].children[k]; } while (next && !next.dataset.cell);
  if (next && next.dataset.cell) next.focus();
  event.preventDefault();
});
if (cells.length) shade("bits");

// ---- ledger ---------------------------------------------------------------------------------
const SHOWN = 300;
function search(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = facts.ledger.filter((row) => { const line = row.slice(0, 4).join(" ").toLowerCase(); return wanted.every((w) => line.includes(w)); });
  const body = document.querySelector("#ledger tbody");
  body.replaceChildren(...rows.slice(0, SHOWN).map((row) => {
    const tr = document.createElement("tr");
    row.forEach((value, i) => {
      const td = tr.insertCell();
      td.textContent = i < 4 ? value : value.toLocaleString("en");
      if (i >= 4) td.className = "number";
    });
    return tr;
  }));
  const more = rows.length > SHOWN ? `, the first ${SHOWN} shown` : "";
  document.getElementById("found").textContent = `${rows.length} of ${facts.ledger.length} tensors${more}`;
}
document.getElementById("find").addEventListener("input", (event) => search(event.target.value));
search("");

// ---- frontier -------------------------------------------------------------------------------
async function library() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}
function draw() {
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zeroline: false };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink") }, margin: { t: 10, r: 10 },
    xaxis: { ...axis, title: { text: "bytes of all weights" } }, yaxis: { ...axis, type: "log", title: { text: "KL, nats per token" } },
    legend: { orientation: "h", y: 1.12 },
  };
  const traces = facts.frontier.map((t, i) => ({
    ...t, type: "scatter", line: { color: [colour("--accent"), colour("--quiet")][i] },
    marker: { size: i > 1 ? 13 : 6, symbol: ["circle", "square", "diamond", "star"][i],
      color: [colour("--accent"), colour("--quiet"), colour("--accent"), colour("--good")][i] },
  }));
  Plotly.react("plot", traces, layout, { responsive: true, displayModeBar: false });
}
if (document.getElementById("plot")) library().then(() => {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
});
