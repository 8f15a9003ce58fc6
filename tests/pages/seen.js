// What a person sees of the page, as data.
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const words = (text) => text.replace(/\s+/g, " ").trim();
  const visible = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });

  // [red, green, blue, alpha]
  function parts(color) {
    const found = color.match(/[\d.]+/g).map(Number);
    return found.length === 3 ? [...found, 1] : found;
  }
  function over(above, below) {
    return [0, 1, 2].map((i) => above[i] * above[3] + below[i] * (1 - above[3])).concat(1);
  }
  function background(element) {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(parts(getComputedStyle(at).backgroundColor));
    let found = [255, 255, 255, 1];
    for (const layer of layers) found = over(layer, found);
    return found;
  }
  function luminance(color) {
    const [r, g, b] = color.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function contrast(first, second) {
    const [low, high] = [luminance(first), luminance(second)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }

  // Elements that hold text themselves.
  function texts() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = new Set();
    while (walker.nextNode()) {
      const parent = walker.currentNode.parentElement;
      if (walker.currentNode.data.trim() && !parent.closest("script, style, option, defs")) found.add(parent);
    }
    all("select").forEach((select) => found.add(select));
    return Array.from(found).filter(visible);
  }
  const said = (element) => words(element.selectedOptions ? element.selectedOptions[0].text : element.textContent);

  window.seen = {
    drawn() {
      const plots = all(".plot");
      return plots.length > 0 && plots.every((plot) => plot.querySelector(".main-svg .cartesianlayer .plot") || words(plot.textContent));
    },

    table(selector) {
      return all(`${selector} tr`).map((row) => all("th, td", row).map((cell) => words(cell.innerText)));
    },

    // Texts whose contrast with what is behind them is too low for reading.
    faint(least) {
      return texts().map((element) => {
        const style = getComputedStyle(element);
        const behind = background(element);
        const color = parts(element instanceof SVGElement ? style.fill : style.color);
        return [said(element).slice(0, 40), Number(contrast(over(color, behind), behind).toFixed(2))];
      }).filter(([, ratio]) => !(ratio >= least));
    },

    // How many texts there are, so that "none is faint" says something.
    readable: () => texts().length,

    brightness: () => luminance(background(document.body)),

    // What sticks out of the window and is not in a box that scrolls.
    outside() {
      const width = document.documentElement.clientWidth;
      return all("body *").filter((element) => {
        const box = element.getBoundingClientRect();
        return visible(element) && box.width > 0 && (box.right > width + 1 || box.left < -1)
          && !element.closest(".scroll, .text, svg, .js-plotly-plot");
      }).map((element) => `${element.tagName} ${element.id} ${words(element.textContent).slice(0, 40)}`);
    },

    // Plots: size, how many marks are drawn, the legend, texts that overlap or are cut off.
    plots() {
      return Object.fromEntries(all(".js-plotly-plot").map((plot) => {
        const own = plot.getBoundingClientRect();
        const labels = all("text", plot).filter((text) => visible(text) && words(text.textContent))
          .map((text) => [words(text.textContent), text.getBoundingClientRect()]);
        const cut = labels.filter(([, box]) => box.left < own.left - 1 || box.right > own.right + 1
          || box.top < own.top - 1 || box.bottom > own.bottom + 1).map(([text]) => text);
        const crossing = [];
        labels.forEach(([first, a], i) => labels.slice(i + 1).forEach(([second, b]) => {
          const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
          const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (wide > 2 && high > 2) crossing.push([first, second]);
        }));
        const drawn = all(".scatterlayer .trace path, .barlayer .point path, .heatmaplayer image", plot)
          .map((mark) => mark.getBoundingClientRect()).filter((box) => box.width > 0 && box.height >= 0);
        return [plot.id, {
          width: own.width, height: own.height, marks: drawn.length, cut, crossing,
          legend: all(".legendtext", plot).filter(visible).map((text) => words(text.textContent)),
          smallest: Math.min(...all("text", plot).filter(visible).map((t) => parseFloat(getComputedStyle(t).fontSize))),
        }];
      }));
    },

    label(plot) {
      return words(all(`#${plot} .hoverlayer .hovertext text`).map((text) => all("tspan.line", text)
        .map((line) => line.textContent).join(" ") || text.textContent).join(" "));
    },

    // Each word of the chain: kept, gone or later, as the legend's colours say.
    chain() {
      const paint = (element) => {
        const { color, backgroundColor } = getComputedStyle(element);
        return `${color} on ${backgroundColor}`;
      };
      const [kept, evicted] = all(".legend span").map(paint);
      return all("#text .part span").map((span) => {
        const state = { [kept]: "kept", [evicted]: "evicted" }[paint(span)] || paint(span);
        return [span.textContent, visible(span) ? state : "later"];
      });
    },

    // What has the focus, and whether that can be seen.
    focused() {
      const at = document.activeElement;
      const { outlineStyle, outlineWidth } = getComputedStyle(at);
      const name = at.id || at.getAttribute("aria-label") || at.getAttribute("aria-labelledby") || at.tagName;
      const box = at.getBoundingClientRect();
      const inside = box.bottom > 0 && box.top < innerHeight;
      return [name, inside && outlineStyle !== "none" && parseFloat(outlineWidth) >= 1];
    },
  };
})();
