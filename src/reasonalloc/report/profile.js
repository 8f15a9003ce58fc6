function line(name, y, { color, symbol }, more) {
  return { name, y, type: "scatter", mode: "lines+markers", line: { color, width: 2, ...more },
    marker: { color, symbol, size: 7 },
    hovertemplate: `layer %{x}: %{y:.4~g}<extra>${name}</extra>` };
}

// Ticks at whole layers, as many as there is room for.
function layers(count, yTitle, more) {
  const plan = layout("layer", yTitle, more);
  Object.assign(plan.xaxis, { tick0: 0, dtick: Math.ceil(count / (narrow() ? 8 : 20)) });
  return plan;
}

function drawDemand() {
  const plan = layers(data.mean.length, "tokens");
  plan.yaxis.rangemode = "tozero";
  const prompts = data.curves.map((curve, index) => ({
    name: "each prompt", y: curve, type: "scatter", mode: "lines", opacity: 0.5, hoverinfo: "skip",
    legendgroup: "prompts", showlegend: index === 0, line: { color: css("--soft"), width: 1 },
  }));
  draw("layers", [
    ...prompts,
    line("largest head", data.max, look("snapkv"), { dash: "dot" }),
    line("mean over heads", data.mean, look("rkv"), { width: 3 }),
  ], plan);
}

function drawCosts() {
  const plan = layers(data.layers[0].length, "1/1000 nat");
  plan.yaxis.rangemode = "tozero";
  draw("layers", data.budgets.map((budget, index) => line(`budget ${budget}`, data.layers[index],
    look("", index), { dash: index < SPARE.length ? "solid" : "dot" })), plan);
}

function drawHeads() {
  const z = data.heads[Number(byId("budget").value)];
  const plan = layers(z[0].length, "KV head", { margin: { l: 44, r: 8, t: 8, b: 44 } });
  Object.assign(plan.xaxis, { showgrid: false });
  Object.assign(plan.yaxis, { showgrid: false, type: "category" });
  draw("heads", [{
    type: "heatmap", y: z.map((_, head) => `${head}`), z, colorscale: "Viridis", xgap: 1, ygap: 1,
    colorbar: { thickness: 12, outlinewidth: 0 },
    hovertemplate: "layer %{x}, KV head %{y}: %{z:.4~g}<extra></extra>",
  }], plan);
}

function drawAll() {
  if (data.kind === "demand") { drawDemand(); return; }
  drawCosts();
  drawHeads();
}

if (data.kind === "costs") byId("budget").addEventListener("change", drawHeads);
drawAll();
dark.addEventListener("change", drawAll);
