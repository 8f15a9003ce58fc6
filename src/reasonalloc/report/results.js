const percent = (share) => `${(100 * share).toFixed(1)} %`;
const name = (cell) => (cell.budget === null ? (cell.arm === "full" ? "full cache" : cell.arm) : `${cell.arm}, budget ${cell.budget}`);
const each = (cell) => (cell.per_problem[0] === cell.per_problem[1] ? `${cell.per_problem[0]}` : cell.per_problem.join(" to "));
const size = (bytes) => {
  const steps = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (bytes >= 1024 && power < steps.length - 1) { bytes /= 1024; power += 1; }
  return `${bytes.toFixed(bytes < 10 && power ? 1 : 0)} ${steps[power]}`;
};
const tell = (cell) => `<b>${name(cell)}</b>`
  + (cell.budget === null ? "" : `<br>${cell.budget_tokens.toFixed(0)} tokens per layer and KV head`)
  + (cell.kv_share === null ? "" : `<br>${percent(cell.kv_share)} of the 16-bit full cache`)
  + `<br>${percent(cell.accuracy)}`
  + ` (${percent(cell.interval95[0])} to ${percent(cell.interval95[1])})<br>`
  + `${cell.problems} problems × ${each(cell)}, ${size(cell.kv_bytes_per_sequence)} per sequence`
  + (cell.tokens_per_second === null ? "" : `<br>${cell.tokens_per_second.toFixed(1)} tokens/s at batch ${cell.batches.join(" to ")}`);

const bars = (cells) => ({
  type: "data", symmetric: false, thickness: 1, width: 3,
  array: cells.map((c) => 100 * (c.interval95[1] - c.accuracy)),
  arrayminus: cells.map((c) => 100 * (c.accuracy - c.interval95[0])),
});

// Points of one budget stand side by side, over less than half of the way to the next budget.
function dodge(places, count) {
  const sorted = [...new Set(places)].sort((a, b) => a - b);
  const gaps = sorted.slice(1).map((x, i) => Math.log(x / sorted[i]));
  const gap = gaps.length ? Math.min(...gaps) : 0.3;
  return (index) => Math.exp((0.4 * gap * (index - (count - 1) / 2)) / count);
}

function accuracyAxis(plan, cells, more = []) {
  const tops = cells.map((c) => 100 * c.interval95[1]).concat(more);
  const bottoms = cells.map((c) => 100 * c.interval95[0]).concat(more);
  plan.yaxis.range = [Math.max(-3, Math.min(...bottoms) - 5), Math.min(103, Math.max(...tops) + 5)];
}

// A logarithmic axis with ticks at measured values, as many as there is room for.
function logTicks(axis, values, text) {
  const sorted = [...new Set(values)].sort((a, b) => a - b);
  const [low, high] = [sorted[0], sorted[sorted.length - 1]];
  const pad = Math.max(0.06 * Math.log10(high / low), 0.01);
  const gap = (Math.log10(high / low) + 2 * pad) / (narrow() ? 4 : 7);
  const at = [];
  for (const value of sorted) {
    if (!at.length || Math.log10(value / at[at.length - 1]) >= gap) at.push(value);
  }
  Object.assign(axis, { type: "log", tickvals: at, ticktext: at.map(text),
    range: [Math.log10(low) - pad, Math.log10(high) + pad] });
}

const armsWithBudget = (group) => group.arms.filter((arm) => group.cells.some((c) => c.arm === arm && c.budget !== null));

function armTrace(group, arm, index, cells, x) {
  const { color, symbol } = look(arm, index);
  return {
    name: arm, type: "scatter", mode: "lines+markers", x,
    y: cells.map((c) => 100 * c.accuracy), error_y: { ...bars(cells), color: `${color}99` },
    text: cells.map(tell), hovertemplate: "%{text}<extra></extra>", line: { color, width: 1.5 },
    marker: { color, symbol, size: arm === "reasonalloc" ? 11 : 8 },
  };
}

function fullTrace(cell, x) {
  return { name: "full cache", type: "scatter", mode: "markers", x: [x], y: [100 * cell.accuracy],
    error_y: { ...bars([cell]), color: css("--soft") }, text: [tell(cell)], hovertemplate: "%{text}<extra></extra>",
    marker: { color: css("--soft"), size: 11, symbol: "hexagon" } };
}

function drawBudget(group) {
  if (!group.budgets.length) return;
  const arms = armsWithBudget(group);
  const printed = data.paper && group.paper ? group.paper : null;
  const budgets = [...new Set(group.cells.filter((c) => c.budget !== null).map((c) => c.budget_tokens).concat(
    printed ? Object.values(printed.arms).flatMap((a) => Object.keys(a).map(Number)) : []))].sort((a, b) => a - b);
  const shift = dodge(budgets, arms.length);
  const traces = arms.map((arm, index) => {
    const cells = group.cells.filter((c) => c.arm === arm && c.budget !== null).sort((a, b) => a.budget_tokens - b.budget_tokens);
    return armTrace(group, arm, index, cells, cells.map((c) => c.budget_tokens * shift(index)));
  });
  const plan = layout(narrow() ? "budget (tokens per KV head)" : "budget (tokens per layer and KV head)", "right answers (%)", { shapes: [] });
  const full = group.cells.find((c) => c.budget === null);
  if (full) {
    const edge = { xref: "paper", x0: 0, x1: 1 };
    plan.shapes.push({ ...edge, type: "rect", y0: 100 * full.interval95[0], y1: 100 * full.interval95[1],
      fillcolor: css("--soft"), opacity: 0.12, line: { width: 0 } });
    plan.shapes.push({ ...edge, type: "line", y0: 100 * full.accuracy, y1: 100 * full.accuracy,
      line: { color: css("--soft"), width: 1.5, dash: "dash" } });
  }
  const extra = [];
  if (printed) {
    Object.entries(printed.arms).forEach(([arm, numbers], index) => {
      const color = look(arm, index).color;
      const x = Object.keys(numbers).map(Number);
      const y = x.map((budget) => numbers[budget]);
      extra.push(...y);
      traces.push({ name: `${arm} (paper)`, type: "scatter", mode: "lines+markers", x, y,
        line: { color, width: 1, dash: "dot" }, marker: { color, symbol: "circle-open", size: 8 }, opacity: 0.75,
        hovertemplate: `<b>${arm}, budget %{x}: %{y}</b><br>the paper's, another protocol<extra></extra>` });
    });
  }
  const shown = budgets.length > 5 && narrow() ? budgets.filter((_, i) => i % 2 === 0) : budgets;
  // Points that stand side by side around one budget must not fill the axis.
  const pad = Math.max(0.08 * Math.log10(budgets[budgets.length - 1] / budgets[0]), budgets.length > 1 ? 0.1 : 0.3);
  Object.assign(plan.xaxis, { type: "log", tickvals: shown, ticktext: shown.map((b) => b.toFixed(0)),
    range: [Math.log10(budgets[0]) - pad, Math.log10(budgets[budgets.length - 1]) + pad] });
  accuracyAxis(plan, group.cells, extra);
  draw(`by-budget-${group.id}`, traces, plan);
}

function drawFront(group, id, xOf, onFront, xTitle, text) {
  const cells = group.cells.filter((c) => xOf(c) > 0);
  if (!cells.length) {
    byId(id).textContent = "Nothing was measured.";
    return;
  }
  const traces = [];
  const front = cells.filter(onFront).sort((a, b) => xOf(a) - xOf(b));
  traces.push({ name: "Pareto front", type: "scatter", mode: "lines+markers", x: front.map(xOf), y: front.map((c) => 100 * c.accuracy),
    line: { color: css("--accent"), width: 6 }, marker: { color: css("--accent"), size: 18 }, opacity: 0.35, hoverinfo: "skip" });
  armsWithBudget(group).forEach((arm, index) => {
    const own = cells.filter((c) => c.arm === arm && c.budget !== null).sort((a, b) => xOf(a) - xOf(b));
    if (own.length) traces.push(armTrace(group, arm, index, own, own.map(xOf)));
  });
  cells.filter((c) => c.budget === null).forEach((c) => traces.push(fullTrace(c, xOf(c))));
  const plan = layout(xTitle, "right answers (%)");
  logTicks(plan.xaxis, cells.map(xOf), text);
  accuracyAxis(plan, cells);
  draw(id, traces, plan);
}

function drawWave(group) {
  const profile = group.profile;
  if (!profile) return;
  const layers = profile.mean.map((_, index) => `${index}`);
  const most = look("snapkv").color;
  const plan = layout("layer", "demand (tokens)");
  plan.xaxis.type = "category";
  plan.yaxis.rangemode = "tozero";
  draw(`wave-${group.id}`, [
    { name: "mean over heads", type: "bar", x: layers, y: profile.mean, marker: { color: look("rkv").color, opacity: 0.75 },
      error_y: { type: "data", symmetric: false, color: css("--ink"), thickness: 1.5, width: 4,
        array: profile.high.map((v, i) => v - profile.mean[i]), arrayminus: profile.low.map((v, i) => profile.mean[i] - v) },
      hovertemplate: "layer %{x}: %{y:.1f} tokens<extra></extra>" },
    { name: "most demanding head", type: "scatter", mode: "lines+markers", x: layers, y: profile.max,
      line: { color: most, dash: "dot" }, marker: { color: most, symbol: "square" },
      hovertemplate: "layer %{x}: %{y:.1f} tokens<extra></extra>" },
  ], plan);
}

function drawHeads(group) {
  if (!group.heads) return;
  const run = group.heads.runs[Number(byId(`run-${group.id}`).value)];
  const heads = Math.max(...run.budgets.flat().map((h) => (h ? h.length : 0)));
  const rows = run.layers.flatMap((layer, l) => Array.from({ length: heads }, (_, head) => [layer, l, head]));
  const z = rows.map(([, l, head]) => run.budgets.map((step) => (step[l] ? step[l][head] : null)));
  const every = Math.ceil(run.layers.length / 16);
  const plan = layout("tokens", "layer", { margin: { l: 44, r: 8, t: 8, b: 44 } });
  plan.xaxis.type = "category";
  plan.xaxis.nticks = narrow() ? 5 : 12;
  const ticks = run.layers.map((layer, l) => [layer, l * heads + (heads - 1) / 2]).filter((_, l) => l % every === 0);
  Object.assign(plan.yaxis, { autorange: "reversed", showgrid: false, tickvals: ticks.map((t) => t[1]), ticktext: ticks.map((t) => `${t[0]}`) });
  draw(`heads-${group.id}`, [{
    type: "heatmap", x: run.tokens.map(String), y: rows.map((_, i) => i), z, colorscale: "Viridis",
    zmin: 0, zmax: Math.max(...run.budgets.flat(2)),
    colorbar: { title: { text: "kept", side: "right" }, thickness: 12, outlinewidth: 0 },
    text: rows.map(([layer, , head]) => run.tokens.map(() => `layer ${layer}, KV head ${head}`)),
    hovertemplate: "%{text}<br>at %{x} tokens: %{z} kept<extra></extra>",
  }], plan);
  const part = run.tokens.length < run.boundaries ? ` ${run.tokens.length} of ${run.boundaries} compressions are shown, evenly spaced.` : "";
  byId(`heads-note-${group.id}`).textContent = `Problem ${run.problem}, sample ${run.sample}.${part}`;
}

function drawProblems(group) {
  const { problems } = group.drilldown;
  const cells = group.cells;
  const short = (cell) => (cell.budget === null ? "full" : `${cell.arm} ${cell.budget}`);
  const labels = cells.map((c) => (narrow() && short(c).length > 12 ? `${short(c).slice(0, 11)}…` : short(c)));
  const z = cells.map((_, i) => problems.map((p) => (p.counts[i][1] ? p.counts[i][0] / p.counts[i][1] : null)));
  const text = cells.map((cell, i) => problems.map((p) => `${name(cell)}<br>problem ${p.id}: ${p.counts[i][0]} of ${p.counts[i][1]} right`));
  const plan = layout("problems", "", { margin: { l: 44, r: 8, t: 8, b: 44 } });
  Object.assign(plan.xaxis, { showticklabels: false, ticks: "", showgrid: false });
  Object.assign(plan.yaxis, { autorange: "reversed", showgrid: false, tickvals: cells.map((_, i) => i), ticktext: labels });
  // A gap as wide as a cell would leave nothing of it.
  const gap = byId(`problems-${group.id}`).clientWidth > 170 + 5 * problems.length ? 1 : 0;
  draw(`problems-${group.id}`, [{
    type: "heatmap", z, text, hovertemplate: "%{text}<extra></extra>", zmin: 0, zmax: 1, xgap: gap, ygap: 1,
    colorscale: [[0, dark.matches ? "#3a2b2b" : "#f2d9d5"], [1, dark.matches ? "#3fa55f" : "#1d6f3a"]],
    colorbar: { tickformat: ".0%", thickness: 12, outlinewidth: 0 },
  }], plan);
}

function element(kind, text, className) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showChain(box, title, cell, chain, same) {
  box.replaceChildren();
  title.textContent = name(cell);
  if (!chain) {
    box.textContent = "not run";
    return;
  }
  const end = chain.finish === "length" ? "cut by the cap" : "ended by itself";
  title.textContent += `: ${chain.correct ? "right" : "wrong"}, answer ${chain.answer === null ? "none" : chain.answer}, ${chain.tokens} tokens, ${end}`;
  box.append(element("span", chain.head.slice(0, same), "same"));
  if (same < chain.head.length) {
    const step = Math.max(1, chain.head.slice(same).search(/\s|$/));
    box.append(element("mark", chain.head.slice(same, same + step)), chain.head.slice(same + step));
  }
  const parting = box.querySelector("mark");
  box.scrollTop = parting ? parting.offsetTop - 60 : 0;
  if (chain.cut) box.append(element("span", `\n… ${chain.cut.toLocaleString("en")} characters left out …\n`, "cut"), chain.tail);
}

function showProblem(group) {
  const at = (what) => byId(`${what}-${group.id}`);
  const problem = group.drilldown.problems[Number(at("problem").value)];
  at("counts").replaceChildren(...group.cells.map((cell, i) => {
    const [right, all] = problem.counts[i];
    return element("span", all ? `${name(cell)}: ${right} of ${all} right` : `${name(cell)}: not run`, all && right === all ? "all" : "");
  }));
  at("prompt").textContent = problem.chains ? `${problem.prompt}\n\nRight answer: ${problem.gold}` : "Not on this page; see samples.jsonl.";
  const pick = ["left", "right"].map((side) => Number(at(side).value));
  if (!problem.chains) {
    at("parting").textContent = "The chains of this problem are not on this page; see samples.jsonl.";
    for (const side of ["left", "right"]) { at(`${side}-title`).textContent = ""; at(`${side}-text`).textContent = ""; }
    return;
  }
  const [left, right] = pick.map((i) => problem.chains[i]);
  let same = 0;
  if (left && right) {
    const most = Math.min(left.head.length, right.head.length);
    while (same < most && left.head[same] === right.head[same]) same += 1;
    const done = same === left.head.length && same === right.head.length;
    if (done && (left.cut || right.cut)) at("parting").textContent = `The first ${same.toLocaleString("en")} characters are the same; whether and where they part later is in the part left out.`;
    else if (done) at("parting").textContent = "Both chains are the same.";
    else at("parting").textContent = `They part after ${same.toLocaleString("en")} characters (${same ? "grey: what they share; " : ""}red: where they part).`;
  } else at("parting").textContent = "One of the two did not run on this problem.";
  ["left", "right"].forEach((side, i) => showChain(at(`${side}-text`), at(`${side}-title`), group.cells[pick[i]], problem.chains[pick[i]], same));
}

function setUp(group) {
  const at = (what) => byId(`${what}-${group.id}`);
  const options = () => group.cells.map((cell, i) => new Option(name(cell), `${i}`));
  at("left").replaceChildren(...options());
  at("right").replaceChildren(...options());
  // The full cache, or else the base arm, against the last other run.
  const base = group.cells.findIndex((c) => c.arm === group.base);
  at("left").value = `${group.cells[0].budget === null ? 0 : Math.max(base, 0)}`;
  const other = group.cells.findLastIndex((c, i) => `${i}` !== at("left").value);
  at("right").value = `${Math.max(other, 0)}`;
  for (const what of ["problem", "left", "right"]) at(what).addEventListener("change", () => showProblem(group));
  if (group.heads) {
    // Equal budgets make a dull picture: start with a run that divides them among heads, or else among layers.
    const { runs } = group.heads;
    const last = (run) => run.budgets[run.budgets.length - 1];
    const heads = runs.findIndex((run) => last(run).some((layer) => layer && Math.max(...layer) > Math.min(...layer) + 1));
    const layers = runs.findIndex((run) => new Set(last(run).flat()).size > 2);
    at("run").value = `${[heads, layers, 0].find((index) => index >= 0)}`;
    at("run").addEventListener("change", () => drawHeads(group));
  }
  showProblem(group);
}

function drawBytes(group) {
  const id = `by-bytes-${group.id}`;
  if (!group.cells.every((c) => c.kv_share !== null)) { // samples of older versions
    drawFront(group, id, (c) => c.kv_bytes_per_sequence, (c) => c.front_bytes, "KV bytes per sequence", size);
    return;
  }
  const title = narrow() ? "KV bytes (% of 16-bit full cache)" : `KV bytes, % of the 16-bit full cache at ${group.reference.tokens} tokens`;
  drawFront(group, id, (c) => 100 * c.kv_share, (c) => c.front_bytes, title, (v) => v.toFixed(v < 10 ? 1 : 0));
}

function drawGroup(group) {
  drawBytes(group);
  drawBudget(group);
  drawFront(group, `by-speed-${group.id}`, (c) => c.tokens_per_second || 0, (c) => c.front_speed, "generated tokens per second", (v) => v.toFixed(v < 10 ? 1 : 0));
  drawWave(group);
  drawHeads(group);
  drawProblems(group);
}

const drawAll = () => data.groups.forEach(drawGroup);
data.groups.forEach(setUp);
drawAll();
data.groups.forEach((group) => byId(`problems-${group.id}`).on("plotly_click", (event) => {
  byId(`problem-${group.id}`).value = `${event.points[0].pointNumber[1]}`;
  showProblem(group);
}));
dark.addEventListener("change", drawAll);
