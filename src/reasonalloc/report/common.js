"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const byId = (id) => document.getElementById(id);

// Colours that stay apart for colour-blind readers; every method has its own marker as well.
const LOOKS = {
  "rkv": ["#0072b2", "#4db2ec", "circle"], "snapkv": ["#c85200", "#ff9d5c", "square"],
  "h2o": ["#00785a", "#3fd0a4", "diamond"], "streaming_llm": ["#8a6d00", "#d9bd4a", "triangle-up"],
  "pyramid-rkv": ["#5b4bc4", "#a99cff", "triangle-down"], "adakv": ["#b03a80", "#f08ac4", "cross"],
  "reasonalloc": ["#111111", "#ffffff", "star"], "random": ["#80868e", "#8d96a1", "x"],
};
const SPARE = [
  ["#0072b2", "#4db2ec", "circle-open"], ["#c85200", "#ff9d5c", "square-open"],
  ["#00785a", "#3fd0a4", "diamond-open"], ["#b03a80", "#f08ac4", "cross-open"],
  ["#5b4bc4", "#a99cff", "triangle-down-open"], ["#8a6d00", "#d9bd4a", "triangle-up-open"],
];
const look = (arm, index = 0) => {
  const [light, night, symbol] = LOOKS[arm] || SPARE[index % SPARE.length];
  return { color: dark.matches ? night : light, symbol };
};
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => document.documentElement.clientWidth < 600;

function layout(xTitle, yTitle, more) {
  const grid = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true };
  return Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--ink"), family: "system-ui, sans-serif", size: narrow() ? 12 : 13 },
    margin: { l: 50, r: 12, t: 8, b: 44 },
    xaxis: { ...grid, title: { text: xTitle }, fixedrange: true },
    yaxis: { ...grid, title: { text: yTitle }, fixedrange: true },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" },
    hoverlabel: { bgcolor: css("--panel"), font: { color: css("--ink") }, bordercolor: css("--line") },
  }, more);
}

function draw(id, traces, plan) {
  Plotly.react(byId(id), traces, plan, { responsive: true, displayModeBar: false });
}
