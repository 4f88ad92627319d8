"""Style and script of the page: kept apart from what fills it. Nothing here asks the network for anything."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f7f7f5; --card: #ffffff; --ink: #1c1f24; --soft: #5d6570; --line: #e3e4e1; --accent: #3d63b3;
  --loss: 194 98 45; --delta: 61 99 179; --norm: 36 122 108;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --card: #1b1e24; --ink: #e4e6ea; --soft: #98a1ad; --line: #2c313a; --accent: #8fb0f0;
    --loss: 226 138 84; --delta: 110 150 232; --norm: 78 178 158;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; padding-bottom: 8px; }
header .mark { color: var(--soft); font: 600 13px/1 var(--mono); letter-spacing: .04em; }
h1 {
  font-size: 27px; line-height: 1.25; font-weight: 640; margin: 10px 0 6px; letter-spacing: -.01em;
  overflow-wrap: anywhere;
}
h2 { font-size: 17px; font-weight: 640; margin: 0 0 2px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 78ch; }
dl.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 14px 24px; margin: 22px 0 8px;
}
dl.facts dt { color: var(--soft); font-size: 12.5px; }
dl.facts dd {
  margin: 0; font-size: 19px;
  font-weight: 560; font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
.notice {
  border-left: 3px solid var(--accent); padding: 8px 14px; margin: 16px 0 0; background: var(--card);
}
section {
  background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 20px 22px; margin: 18px 0;
}
.plot { margin: 4px -8px 0; min-height: 200px; }
.scroll { max-height: 340px; overflow: auto; }
#text { font: 15px/1.95 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 6px; }
#text span {
  border-radius: 3px; padding: 2px 0; cursor: default;
  background: rgb(var(--hue) / calc(var(--v, 0) * .62));
}
#text span:hover { outline: 1.5px solid var(--accent); outline-offset: 1px; }
#text i { color: var(--soft); font-style: normal; opacity: .6; }
.bar { display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: center; margin: 6px 0 14px; }
.choice { display: inline-flex; border: 1px solid var(--line); border-radius: 7px; overflow: hidden; }
.choice button {
  font: inherit; font-size: 13.5px; padding: 5px 13px; border: 0; background: none; color: var(--soft); cursor: pointer;
}
.choice button + button { border-left: 1px solid var(--line); }
.choice button[aria-pressed=true] { background: rgb(var(--delta) / .14); color: var(--ink); font-weight: 560; }
.choice button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
#about { color: var(--soft); font-size: 13.5px; min-height: 1.5em; font-variant-numeric: tabular-nums; }
#about b { color: var(--ink); font-family: var(--mono); font-weight: 560; white-space: pre; }
ol.sources { list-style: none; margin: 6px 0 0; padding: 0; columns: 2 320px; column-gap: 40px; }
ol.sources li {
  display: grid; grid-template-columns: 9.5em 1fr 4em; gap: 10px; align-items: center;
  break-inside: avoid; padding: 2px 0;
}
ol.sources code { overflow: hidden; text-overflow: ellipsis; white-space: pre; }
ol.sources small { color: var(--soft); }
.meter { height: 8px; border-radius: 2px; background: var(--line); }
.meter i { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.table { max-height: 560px; overflow: auto; margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th {
  position: sticky; top: 0; z-index: 1; background: var(--card); color: var(--soft); font-weight: 560;
  text-align: left;
}
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.number { text-align: right; }
td.number { min-width: 5em; }
td.wide { white-space: normal; width: 46%; }
code { font-family: var(--mono); font-size: .94em; }
td .guess { margin-right: 14px; white-space: nowrap; }
td .guess small { color: var(--soft); font-variant-numeric: tabular-nums; }
footer { color: var(--soft); font-size: 12.5px; padding-top: 6px; padding-bottom: 44px; }
.modebar { opacity: 0; transition: opacity .15s; }
.plot:hover .modebar { opacity: 1; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  section { padding: 16px 14px; }
}
@media print { section { break-inside: avoid; } .table, .scroll { max-height: none; } }
"""

SCRIPT = """
(() => {
"use strict";
const read = id => JSON.parse(document.getElementById(id).textContent);
const data = read("data"), figures = read("figures");
const dark = matchMedia("(prefers-color-scheme: dark)");
const scales = {
  delta: [
    ["#f4f6fb", "#c3d2ee", "#7c9bd8", "#3d63b3", "#16306b"],
    ["#1f2531", "#2b4478", "#4169b8", "#7ba1ee", "#dbe6ff"],
  ],
  norm: [
    ["#f1f7f5", "#bcdcd4", "#6fb3a4", "#2a8373", "#0c453b"],
    ["#1d2928", "#1f4f48", "#2f7f72", "#66bdab", "#d3f3ea"],
  ],
  lens: [
    ["#f8f4f9", "#ddc8e3", "#b48ac2", "#82529a", "#4a2260"],
    ["#262130", "#4a3562", "#78549c", "#b38fd4", "#f0e0fb"],
  ],
  sources: [
    ["#fbf6ef", "#f0d5b4", "#dba061", "#b56a24", "#6a3808"],
    ["#292420", "#5a3d1f", "#97632b", "#dd9c55", "#fce6cb"],
  ],
  relevance: [
    ["#a33a2a", "#e0a596", "#f6f5f3", "#94b3dd", "#1f4f9e"],
    ["#f08a76", "#8a4438", "#23252c", "#3b5f97", "#8fb8f5"],
  ],
};
const spread = colours => colours.map((c, i) => [i / (colours.length - 1), c]);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shown = [];

function theme() {
  const ink = css("--ink"), soft = css("--soft"), line = css("--line"), card = css("--card");
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": soft,
    "xaxis.linecolor": line, "yaxis.linecolor": line, "xaxis.tickfont.color": soft, "yaxis.tickfont.color": ink,
    "hoverlabel.bgcolor": card, "hoverlabel.bordercolor": line, "hoverlabel.font.color": ink,
  };
}

// A tick for every token where they fit side by side, else some, each with its position.
function ticks(range, width) {
  const first = Math.max(data.start, Math.ceil(range[0]));
  const last = Math.min(data.start + data.ticks.length - 1, Math.floor(range[1]));
  const count = Math.max(1, last - first + 1), room = Math.max(1, Math.floor(width / 15));
  const step = count <= room ? 1 : Math.ceil(count / Math.max(1, Math.floor(width / 62)));
  const at = [];
  for (let t = first; t <= last; t += step) at.push(t);
  const name = t => step === 1 ? data.ticks[t - data.start] : t.toLocaleString("en") + " " + data.ticks[t - data.start];
  return {at, text: at.map(name), count};
}

const margin = {l: 62, r: 100, t: 12, b: 78};
const across = div => Math.max(240, div.clientWidth - margin.l - margin.r);

function axis(div, range) {
  const t = ticks(range || div._fullLayout.xaxis.range, across(div));
  return {"xaxis.tickvals": t.at, "xaxis.ticktext": t.text};
}

function cells(div) {
  const trace = div.data[0];
  if (!trace.text) return;
  const range = div._fullLayout.xaxis.range, wide = across(div) / (range[1] - range[0]) >= 46;
  const template = wide ? "%{text}" : "";
  if (trace.texttemplate !== template) Plotly.restyle(div, {texttemplate: template}, [0]);
}

let linked = false;
async function draw(figure) {
  const div = document.getElementById("plot-" + figure.name);
  const layout = Object.assign({}, figure.layout, {
    margin, title: {text: ""}, hoverlabel: {align: "left"}, dragmode: "zoom", autosize: true,
  });
  div.style.height = `${layout.height - 60}px`;  // the container rules, so that resizing changes the width alone
  delete layout.height;
  layout.yaxis = Object.assign({}, layout.yaxis, {fixedrange: true, automargin: false});
  layout.xaxis = Object.assign({}, layout.xaxis, {automargin: false});
  figure.data[0].colorscale = spread(scales[figure.name][dark.matches ? 1 : 0]);
  figure.data[0].colorbar = Object.assign({thickness: 10, outlinewidth: 0, len: 1, xpad: 8}, figure.data[0].colorbar);
  await Plotly.newPlot(div, figure.data, layout, {
    displaylogo: false, responsive: true,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "toImage"]],
  });
  await Plotly.relayout(div, Object.assign(theme(), axis(div)));
  cells(div);
  shown.push(div);
  div.on("plotly_relayout", async change => {
    if (linked || !Object.keys(change).some(k => k.startsWith("xaxis.range") || k === "xaxis.autorange")) return;
    linked = true;  // the maps share their token axis: one is zoomed, all are
    const range = div._fullLayout.xaxis.range.slice(), whole = change["xaxis.autorange"] === true;
    for (const other of shown) {
      const place = other === div ? {} : whole ? {"xaxis.autorange": true} : {"xaxis.range": range.slice()};
      await Plotly.relayout(other, Object.assign(place, axis(other, range)));
      cells(other);
    }
    linked = false;
  });
}

const text = document.getElementById("text"), about = document.getElementById("about");
const tokens = [...text.querySelectorAll("span")], buttons = [...document.querySelectorAll(".choice button")];
const number = v => v === null ? "–" : Math.abs(v) >= 1000 ? v.toFixed(0) : v.toPrecision(3);
function paint(name) {
  const metric = data.metrics[name];
  text.style.setProperty("--hue", `var(--${name})`);
  tokens.forEach((span, i) => span.style.setProperty("--v", metric.shade[i]));
  for (const button of buttons) button.setAttribute("aria-pressed", button.value === name);
}
text.addEventListener("pointerover", event => {
  const span = event.target.closest("span");
  if (!span) return;
  const i = tokens.indexOf(span), word = document.createElement("b");
  word.textContent = data.names[i];
  const numbers = Object.values(data.metrics).map(m => `${m.title.toLowerCase()} ${number(m.values[i])}`);
  about.replaceChildren(word, `  at ${(data.start + i).toLocaleString("en")}:  ${numbers.join(",  ")}`);
});
for (const button of buttons) button.addEventListener("click", () => paint(button.value));
paint("loss");

(async () => {
  for (const figure of figures) await draw(figure);
  let settle = 0;
  addEventListener("resize", () => {
    clearTimeout(settle);  // after plotly's own resizing
    settle = setTimeout(() => shown.forEach(div => Plotly.relayout(div, axis(div)).then(() => cells(div))), 300);
  });
  dark.addEventListener("change", () => shown.forEach((div, i) => {
    Plotly.relayout(div, theme());
    Plotly.restyle(div, {colorscale: [spread(scales[figures[i].name][dark.matches ? 1 : 0])]}, [0]);
  }));
  document.documentElement.dataset.ready = "true";
})();
})();
"""
