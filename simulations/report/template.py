"""The page of a report, as Python: of an app's files Flower bundles no HTML."""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title><!--TITLE--></title>
<style>
:root { --ink: #1d2430; --soft: #5d6778; --paper: #fff; --card: #f5f7fa; --line: #d8dee8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf1; --soft: #9aa5b8; --paper: #14181f; --card: #1c222c; --line: #333c4a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 1rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.35rem; line-height: 1.25; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { color: var(--soft); margin: .2rem 0 .8rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem; margin: 0 0 1rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 0 1rem; }
.two > section { min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
select { font: inherit; max-width: 100%; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; padding: .3rem .5rem; }
.bar { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 1rem; align-items: center; }
.bar[hidden] { display: none; }
.bar label { color: var(--soft); }
.plot { width: 100%; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1><!--TITLE--></h1>
<p><!--ABOUT--></p>
<!--TABLE-->
<section><h2>Accuracy</h2><p id="seeds">Mean over the seeds; the band spans all of them.</p>
<div id="accuracy" class="plot"></div></section>
<div class="bar"><label for="run">Run</label><select id="run"></select><span id="left"></span></div>
<p id="status"></p>
<section><h2>Clients by round</h2>
<div class="bar"><label for="what">Color</label>
<select id="what"><option value="weight">weight</option><option value="norm">update norm (log)</option>
<option value="distance">distance from the aggregate (log)</option></select></div>
<p>A square is a rejected reply, its color the reason. A cross is a client that the adversary
played in that round.</p>
<div id="map" class="plot"></div></section>
<div class="two">
<section><h2>Rejected, by reason</h2><div id="reasons" class="plot"></div></section>
<section><h2>Accuracy by class</h2><div id="classes" class="plot"></div></section>
<section><h2>Seconds by phase</h2><div id="seconds" class="plot"></div></section>
<section><h2>Megabytes by round</h2><div id="bytes" class="plot"></div></section>
</div>
<section><details><summary>Configuration and versions</summary>
<div class="wide"><table id="config"></table></div></details></section>
<script><!--PLOTLY--></script>
<script type="application/json" id="data"><!--DATA--></script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 600px)");
const COLORS = ["#3b7dd8", "#e8833a", "#2fa37c", "#c8507d", "#8a6fd1", "#b59a2b", "#4fb3c9", "#8b8f98"];
const BAD = {"non-finite": "#e0523f", "error": "#9b59d0", "no-reply": "#8b8f98", "benched": "#4f5866"};
const REST = ["#d08a1d", "#c8507d", "#2fa37c", "#4fb3c9", "#b59a2b"];
const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw(id, traces, layout) {
  const axis = {gridcolor: ink("--line"), zerolinecolor: ink("--line"), automargin: true};
  const found = Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: ink("--ink"), size: 12},
    margin: {l: 45, r: 10, t: 24, b: 40}, height: 260, colorway: COLORS,
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", font: {size: 11}},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: ink("--soft"), activecolor: ink("--ink")},
  }, layout);
  found.xaxis = Object.assign({}, axis, layout.xaxis);
  found.yaxis = Object.assign({}, axis, layout.yaxis);
  // Its buttons would lie over the legends of the small ones.
  const bar = (id === "accuracy" || id === "map") && !narrow.matches && "hover";
  return Plotly.react(id, traces, found, {responsive: true, displaylogo: false, displayModeBar: bar});
}
const byRound = rounds => ({title: {text: "round"}, tickformat: "d", ...(rounds.length < 12 ? {dtick: 1} : {nticks: 12})});
function show(id, isThere) {
  at(id).closest("section").hidden = !isThere;
  return isThere;
}
function accuracy() {
  if (!show("accuracy", data.curves.some(curve => curve.x.length))) return;
  const cells = new Map();
  for (const curve of data.curves) {
    if (!cells.has(curve.cell)) cells.set(curve.cell, []);
    cells.get(curve.cell).push(curve);
  }
  const traces = [];
  [...cells].forEach(([cell, curves], i) => {
    const x = curves[0].x, color = COLORS[i % COLORS.length], dash = ["solid", "dash", "dot", "dashdot"][(i + Math.floor(i / COLORS.length)) % 4];
    const of = x.map(r => curves.map(c => c.y[c.x.indexOf(r)]).filter(v => v != null));
    const group = {legendgroup: cell, mode: "lines", hoverinfo: "skip", showlegend: false, line: {width: 0, color}};
    if (curves.length > 1) {
      traces.push({...group, x, y: of.map(v => Math.max(...v))});
      traces.push({...group, x, y: of.map(v => Math.min(...v)), fill: "tonexty", fillcolor: color + (cells.size > 6 ? "14" : "2e")});
    }
    const mean = of.map(v => v.reduce((a, b) => a + b, 0) / v.length);
    traces.push({x, y: mean, name: cell, legendgroup: cell, mode: x.length < 40 ? "lines+markers" : "lines", line: {color, dash, width: 2}, marker: {size: 4},
      hovertemplate: "%{y:.1f} % in round %{x}"});
  });
  at("seeds").hidden = cells.size === data.curves.length;
  const rows = Math.ceil(cells.size / (narrow.matches ? 1 : 3));
  const height = 350 + 19 * rows;
  draw("accuracy", traces, {height, margin: {l: 45, r: 10, t: 30, b: 60 + 19 * rows}, legend: {orientation: "h", y: -0.2, font: {size: 11}}, xaxis: byRound(data.curves[0].x), yaxis: {title: {text: "%"}, rangemode: "tozero"}});
}
const reasonColor = reason => BAD[reason] || REST[[...reason].reduce((a, c) => a + c.charCodeAt(0), 0) % REST.length];
function map(run) {
  const {labels, rounds, cells, hostile, nodes} = run.map, place = {weight: 1, norm: 2, distance: 3}[at("what").value];
  const log = place > 1, shown = v => v == null ? null : log ? Math.log10(Math.max(v, 1e-300)) : v;
  const z = cells.map(row => row.map(c => c ? shown(c[place]) : null));
  const say = v => v == null ? "-" : Number(v).toPrecision(3);
  const text = cells.map((row, i) => row.map(c => c ? `node ${nodes[i]}<br>${c[0]}<br>weight ${say(c[1])}, norm ${say(c[2])}<br>distance ${say(c[3])}` : "not asked"));
  const traces = [{type: "heatmap", x: rounds, y: labels, z, text, xgap: rounds.length < 80 ? 1 : 0, ygap: labels.length < 60 ? 1 : 0,
    colorscale: dark.matches ? [[0, "#1f2d44"], [1, "#4a7fcb"]] : [[0, "#e6eefb"], [1, "#5b8fd9"]],
    // Equal weights have a scale too.
    ...(place === 1 ? {zmin: 0, zmax: Math.max(...z.flat()) || 1} : {}),
    hovertemplate: "%{y}, round %{x}<br>%{text}<extra></extra>", colorbar: {thickness: 10, outlinewidth: 0, tickprefix: log ? "10^" : ""}}];
  const bad = {};
  cells.forEach((row, i) => row.forEach((c, j) => { if (c && c[0] !== "accepted") (bad[c[0]] = bad[c[0]] || []).push([i, j]); }));
  const room = Math.min((at("map").clientWidth - 160) / rounds.length, 17), size = Math.max(2, room * .8);
  for (const [reason, found] of Object.entries(bad))
    traces.push({type: "scatter", mode: "markers", name: reason, x: found.map(p => rounds[p[1]]), y: found.map(p => labels[p[0]]),
      marker: {symbol: "square", size, color: reasonColor(reason)}, hoverinfo: "skip"});
  if (hostile.length)
    traces.push({type: "scatter", mode: "markers", name: "hostile", x: hostile.map(p => rounds[p[1]]), y: hostile.map(p => labels[p[0]]),
      marker: {symbol: "x-thin", size: size * .6, line: {width: 1.5, color: dark.matches ? "#fff" : "#111"}}, hoverinfo: "skip"});
  draw("map", traces, {height: Math.min(1400, 130 + 22 * labels.length), showlegend: true, xaxis: {...byRound(rounds), showgrid: false},
    yaxis: {autorange: "reversed", type: "category", showgrid: false}, margin: {l: 60, r: 10, t: 30, b: 45}});
}
function showRun() {
  const run = data.runs[+at("run").value || 0];
  if (!run) return;
  const rejected = Object.keys(run.reasons).length ? "" : ", no reply was rejected";
  at("status").textContent = run.status + (run.error ? ": " + run.error : rejected);
  map(run);
  const names = Object.keys(run.reasons).sort((a, b) => run.reasons[a] - run.reasons[b]);
  if (show("reasons", names.length)) draw("reasons", [{type: "bar", orientation: "h", y: names, x: names.map(n => run.reasons[n]), marker: {color: names.map(reasonColor)}}],
    {height: 90 + 40 * Math.max(2, names.length), xaxis: {title: {text: "replies"}}, yaxis: {type: "category"}});
  if (show("classes", run.classes.length)) draw("classes", [{type: "bar", x: run.classes.map((_, i) => i), y: run.classes, marker: {color: COLORS[0]}}],
    {xaxis: {title: {text: "class"}, tickformat: "d"}, yaxis: {range: [0, 100], title: {text: "%"}}});
  draw("seconds", Object.entries(run.seconds).map(([name, y]) => ({x: run.rounds, y, name, stackgroup: "one", mode: "lines", line: {width: 1}})),
    {xaxis: byRound(run.rounds), yaxis: {rangemode: "tozero"}});
  draw("bytes", Object.entries(run.bytes).map(([name, y]) => ({x: run.rounds, y: y.map(v => v == null ? null : v / 1e6), name, mode: "lines"})),
    {xaxis: byRound(run.rounds), yaxis: {rangemode: "tozero"}});
  at("config").replaceChildren(...Object.entries({...run.versions, ...run.config}).map(pair => {
    const row = document.createElement("tr");
    for (const text of pair) row.appendChild(document.createElement("td")).textContent = text;
    return row;
  }));
}
data.runs.forEach((run, i) => at("run").add(new Option(run.name, i)));
at("run").parentElement.hidden = data.runs.length < 2;
at("run").value = Math.max(0, data.runs.findIndex(run => Object.keys(run.reasons).length));
if (data.left) at("left").textContent = `and ${data.left} more, which the folder holds`;
at("run").onchange = at("what").onchange = showRun;
const all = () => { accuracy(); showRun(); };
dark.addEventListener("change", all);
narrow.addEventListener("change", all);
all();
</script>
</body>
</html>
"""
