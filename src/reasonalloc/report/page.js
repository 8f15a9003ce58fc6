const full = data.rows.find((row) => row.budget === null);

const bars = (rows) => ({
  type: "data", symmetric: false, thickness: 1, width: 3,
  array: rows.map((r) => 100 * (r.interval95[1] - r.accuracy)),
  arrayminus: rows.map((r) => 100 * (r.accuracy - r.interval95[0])),
});
const tell = (row) => `<b>${row.budget === null ? "full cache" : `${row.arm}, budget ${row.budget}`}</b><br>`
  + `${row.correct} of ${row.n} right: ${(100 * row.accuracy).toFixed(0)} %`
  + ` (${(100 * row.interval95[0]).toFixed(0)} to ${(100 * row.interval95[1]).toFixed(0)} %)<br>`
  + `${(row.kv_bytes_per_sequence / 1024).toFixed(0)} KiB per sequence`;

// Points of one budget stand side by side, over less than half of the way to the next budget.
function dodge(xOf) {
  const places = [...new Set(data.rows.filter((r) => r.budget !== null).map(xOf))].sort((a, b) => a - b);
  const gaps = places.slice(1).map((x, i) => Math.log(x / places[i]));
  const gap = gaps.length ? Math.min(...gaps) : 0.3;
  const count = data.arms.length;
  return (index) => Math.exp((0.45 * gap * (index - (count - 1) / 2)) / count);
}

function curves(xOf) {
  const shift = dodge(xOf);
  return data.arms.map((arm, index) => {
    const rows = data.rows.filter((r) => r.arm === arm && r.budget !== null)
      .sort((a, b) => a.budget - b.budget);
    const { color, symbol } = look(arm);
    return {
      name: arm, type: "scatter", mode: "lines+markers",
      x: rows.map((r) => xOf(r) * shift(index)),
      y: rows.map((r) => 100 * r.accuracy), error_y: { ...bars(rows), color: `${color}99` },
      text: rows.map(tell), hovertemplate: "%{text}<extra></extra>",
      line: { color, width: arm === "reasonalloc" ? 3 : 1.5, dash: arm === "random" ? "dot" : "solid" },
      marker: { color, symbol, size: arm === "reasonalloc" ? 11 : 7 },
    };
  });
}

function fullBand() {
  if (!full) return [];
  const line = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 100 * full.accuracy, y1: 100 * full.accuracy,
    line: { color: css("--soft"), width: 1.5, dash: "dash" } };
  const band = { type: "rect", xref: "paper", x0: 0, x1: 1, y0: 100 * full.interval95[0],
    y1: 100 * full.interval95[1], fillcolor: css("--soft"), opacity: 0.12, line: { width: 0 } };
  return [band, line];
}

function drawCurves() {
  if (!data.budgets.length) return;
  const budget = layout("budget (tokens per layer and KV head)", "right answers (%)", { shapes: fullBand() });
  Object.assign(budget.xaxis, { type: "log", tickvals: data.budgets, ticktext: data.budgets.map(String) });
  budget.yaxis.range = [-3, 103];
  draw("by-budget", curves((r) => r.budget), budget);
  const bytes = layout("KV bytes per sequence (KiB)", "right answers (%)", { shapes: fullBand() });
  let sizes = [...new Set(data.rows.map((r) => r.kv_bytes_per_sequence / 1024))].sort((a, b) => a - b);
  if (narrow()) sizes = sizes.filter((_, i) => [0, sizes.length - 2, sizes.length - 1].includes(i));
  Object.assign(bytes.xaxis, { type: "log", tickvals: sizes, ticktext: sizes.map((s) => s.toFixed(0)) });
  bytes.yaxis.range = [-3, 103];
  const traces = curves((r) => r.kv_bytes_per_sequence / 1024);
  if (full) {
    traces.unshift({
      name: "full cache", type: "scatter", mode: "markers", x: [full.kv_bytes_per_sequence / 1024],
      y: [100 * full.accuracy], error_y: { ...bars([full]), color: css("--soft") }, text: [tell(full)],
      hovertemplate: "%{text}<extra></extra>", marker: { color: css("--soft"), size: 10, symbol: "hexagon" },
    });
  }
  draw("by-bytes", traces, bytes);
}

function drawWave() {
  const profile = data.profile;
  if (!profile) return;
  const layers = profile.mean.map((_, index) => `${index}`);
  const color = look("rkv").color;
  const most = look("snapkv").color;
  const plan = layout("layer", "demand (tokens)");
  plan.xaxis.type = "category";
  plan.yaxis.rangemode = "tozero";
  draw("wave", [
    { name: "mean over heads", type: "bar", x: layers, y: profile.mean, marker: { color, opacity: 0.75 },
      error_y: { type: "data", symmetric: false, color: css("--ink"), thickness: 1.5, width: 5,
        array: profile.high.map((v, i) => v - profile.mean[i]),
        arrayminus: profile.low.map((v, i) => profile.mean[i] - v) },
      hovertemplate: "layer %{x}: %{y:.1f} tokens<extra></extra>" },
    { name: "most demanding head", type: "scatter", mode: "lines+markers", x: layers, y: profile.max,
      line: { color: most, dash: "dot" }, marker: { color: most, symbol: "square" },
      hovertemplate: "layer %{x}: %{y:.1f} tokens<extra></extra>" },
  ], plan);
}

function drawHeads() {
  const run = chosen();
  const layers = run.budgets[0].length;
  const heads = run.budgets[0][0].length;
  const rows = [];
  for (let layer = 0; layer < layers; layer += 1) {
    for (let head = 0; head < heads; head += 1) rows.push([layer, head]);
  }
  const z = rows.map(([l, h]) => run.budgets.map((boundary) => boundary[l][h]));
  const most = Math.max(...data.chain.arms.map((a) => Math.max(...a.budgets.flat(2))));
  const plan = layout("tokens read", "layer", { margin: { l: 44, r: 8, t: 8, b: 44 } });
  plan.xaxis.type = "category";
  Object.assign(plan.yaxis, { autorange: "reversed", showgrid: false, tickvals: [], ticktext: [] });
  for (let layer = 0; layer < layers; layer += 1) {
    plan.yaxis.tickvals.push(layer * heads + (heads - 1) / 2);
    plan.yaxis.ticktext.push(`${layer}`);
  }
  plan.shapes = [];
  for (let layer = 1; layer < layers; layer += 1) {
    plan.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: layer * heads - 0.5,
      y1: layer * heads - 0.5, line: { color: css("--back"), width: 3 } });
  }
  draw("heads", [{
    type: "heatmap", x: run.boundaries.map(String), y: rows.map((_, i) => i), z, zmin: 0, zmax: most,
    colorscale: "Viridis", xgap: 1, ygap: 1, colorbar: { title: { text: "kept", side: "right" }, thickness: 12, outlinewidth: 0 },
    text: rows.map(([l, h]) => run.boundaries.map(() => `layer ${l}, KV head ${h}`)),
    hovertemplate: "%{text}<br>after %{x} tokens: %{z} kept<extra></extra>",
  }], plan);
}

const chosen = () => data.chain.arms[Number(byId("arm").value)];
let spans = [];

function fill(select, count) {
  const before = Number(select.value) || 0;
  select.replaceChildren(...Array.from({ length: count }, (_, i) => new Option(`${i}`, `${i}`)));
  select.value = `${Math.min(before, count - 1)}`;
}

function part(title) {
  const heading = document.createElement("h3");
  heading.textContent = title;
  const box = document.createElement("div");
  box.className = "part";
  byId("text").append(heading, box);
  return box;
}

function showRun() {
  const run = chosen();
  byId("outcome").textContent = run.correct ? "answers it right" : "answers it wrong";
  fill(byId("layer"), run.gone.length);
  fill(byId("head"), run.gone[0].length);
  byId("text").replaceChildren();
  let box = part("Prompt");
  spans = run.words.map((word, index) => {
    if (index === run.prompt) box = part("Chain of thought");
    const span = document.createElement("span");
    span.textContent = word;
    box.append(span, " ");
    if (index >= run.prompt && word === ";") box.append(document.createElement("br"));
    return span;
  });
  const slider = byId("step");
  const old = Number(slider.value);
  slider.min = run.prompt;
  slider.max = run.words.length;
  slider.value = old > 1 ? Math.min(old, run.words.length) : run.words.length;
  drawHeads();
  showStep();
}

function showStep() {
  const run = chosen();
  const layer = Number(byId("layer").value);
  const head = Number(byId("head").value);
  const read = Number(byId("step").value);
  const gone = run.gone[layer][head];
  const last = run.boundaries.filter((step) => step <= read).length - 1;
  let kept = 0;
  spans.forEach((span, index) => {
    const evicted = gone[index] >= 0 && gone[index] <= last;
    let state = "later";
    if (index < read) state = evicted ? "gone" : "kept";
    if (state === "kept") kept += 1;
    span.className = `t ${state}${index === read - 1 ? " now" : ""}${index === run.wrong_from ? " off" : ""}`;
  });
  const since = last < 0 ? "never compressed so far" : `last compressed at ${run.boundaries[last]}`;
  byId("state").textContent = `After ${read} tokens, head ${head} of layer ${layer} still holds ${kept} of them; ${since}.`;
}

let timer = 0;
function play() {
  const slider = byId("step");
  const stop = () => { clearInterval(timer); timer = 0; byId("play").textContent = "Play"; };
  if (timer) { stop(); return; }
  if (Number(slider.value) >= Number(slider.max)) slider.value = slider.min;
  byId("play").textContent = "Pause";
  timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    showStep();
    if (Number(slider.value) >= Number(slider.max)) stop();
  }, 60);
}

function drawAll() {
  drawCurves();
  drawWave();
  if (data.chain) drawHeads();
}

if (data.chain) {
  const [first, second] = [byId("arm"), byId("arm2")];
  const preferred = data.chain.arms.findIndex((a) => a.arm === "reasonalloc");
  first.value = second.value = `${Math.max(preferred, 0)}`;
  first.addEventListener("change", () => { second.value = first.value; showRun(); });
  second.addEventListener("change", () => { first.value = second.value; showRun(); });
  for (const id of ["layer", "head"]) byId(id).addEventListener("change", showStep);
  byId("step").addEventListener("input", showStep);
  byId("play").addEventListener("click", play);
  showRun();
}
drawAll();
dark.addEventListener("change", drawAll);
