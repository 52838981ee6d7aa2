"use strict";
(() => {
  const root = document.documentElement, plots = [], live = document.getElementById("live");
  const { charts } = JSON.parse(document.getElementById("content").textContent);
  root.classList.remove("plain");

  const color = name => getComputedStyle(root).getPropertyValue(name).trim();
  const shade = series => color("--c" + series.color) + (series.kind === "faint" ? "66" : "");

  function short(value) {
    if (value == null) return "\u2013";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e9)) return (+value.toPrecision(4)).toExponential();
    return size >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 1 }) : String(+value.toPrecision(5));
  }
  const steps = value => value.toLocaleString("en");

  // What the cursor is at: each series' value there, or at its nearest point, whose step is then told.
  function told(plot, chart, at) {
    const xs = plot.data[0];
    return chart.series.map((series, i) => {
      const place = plot.cursor.idxs[i + 1];
      if (at == null || place == null || plot.data[i + 1][place] == null) return { series, words: "" };
      const where = xs[place] === xs[at] ? "" : " at step " + steps(xs[place]);
      return { series, words: short(plot.data[i + 1][place]) + where };
    });
  }

  function show(plot, chart, legend) {
    const at = plot.cursor.idx, rows = told(plot, chart, at);
    rows.forEach(({ words }, i) => { legend.children[i].lastChild.textContent = words && " " + words; });
    legend.lastChild.textContent = at == null ? "" : "step " + steps(plot.data[0][at]);
  }

  function legendOf(chart) {
    const legend = document.createElement("ul");
    legend.className = "legend";
    for (const series of chart.series) {
      const item = document.createElement("li"), line = document.createElement("i");
      line.style.background = `var(--c${series.color})`;
      line.style.opacity = series.kind === "faint" ? 0.4 : 1;
      if (series.kind === "points" || series.kind === "mark") line.className = "point";
      item.append(line, series.name, document.createElement("span"));
      legend.append(item);
    }
    legend.append(document.createElement("li"));
    return legend;
  }

  function look(series) {
    const stroke = () => shade(series), mark = series.kind === "mark";
    const points = mark || series.kind === "points" || series.x.length === 1;
    return {
      label: series.name, stroke, width: series.kind === "faint" ? 1 : 2, ...(mark ? { paths: () => null } : {}),
      points: { show: points, size: mark ? 13 : 7, width: mark ? 3 : 1, stroke, fill: mark ? "transparent" : stroke },
    };
  }

  function draw(chart, box, legend, logarithmic) {
    const data = uPlot.join(chart.series.map(series => [series.x, series.y]));
    const axis = { stroke: () => color("--muted"), grid: { stroke: () => color("--line"), width: 1 }, font: "12px system-ui, sans-serif",
      ticks: { stroke: () => color("--line"), width: 1, size: 4 } };
    const height = () => Math.max(parseFloat(getComputedStyle(box).minHeight) || 200, 160);
    const plot = new uPlot({
      width: box.clientWidth || 320, height: height(), legend: { show: false },
      cursor: { sync: { key: "steps", scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 7 } },
      scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : {} },
      axes: [{ ...axis, size: 30, values: (u, ticks) => ticks.map(tick => Number.isInteger(tick) ? steps(tick) : "") },
        { ...axis, size: 62, values: (u, ticks) => ticks.map(tick => tick == null ? "" : short(tick)) }],
      series: [{}, ...chart.series.map(look)],
      hooks: { setCursor: [u => show(u, chart, legend)] },
    }, data, box);
    plots.push(plot);
    return plot;
  }

  function keys(state, chart) {
    return event => {
      const plot = state.plot, xs = plot.data[0], { min, max } = plot.scales.x;
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      let low = xs.findIndex(x => x >= min), high = xs.length - 1;
      while (high > low && xs[high] > max) high--;
      const now = plot.cursor.idx == null ? null : Math.min(Math.max(plot.cursor.idx, low), high);
      const page = Math.max(Math.round((high - low) / 10), 1);
      const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageUp: -page, PageDown: page };
      let to = now;
      if (event.key in moves) to = now == null ? (moves[event.key] > 0 ? low : high) : now + moves[event.key];
      else if (event.key === "Home") to = low;
      else if (event.key === "End") to = high;
      else if ("+=-0".includes(event.key)) {
        const width = event.key === "0" ? Infinity : (max - min) * (event.key === "-" ? 2 : 0.5);
        const middle = now == null ? (min + max) / 2 : xs[now], first = xs[0], last = xs[xs.length - 1];
        const begin = Math.max(Math.min(middle - width / 2, last - width), first);
        const end = Math.min(begin + width, last);
        if (end > begin) plot.setScale("x", width >= last - first ? { min: first, max: last } : { min: begin, max: end });
        event.preventDefault();
        return;
      } else return;
      event.preventDefault();
      to = Math.min(Math.max(to, low), high);
      // Half a height down: a cursor outside of the drawing is none.
      plot.setCursor({ left: plot.valToPos(xs[to], "x"), top: plot.over.clientHeight / 2 }, true, true);
      const said = told(plot, chart, plot.cursor.idx).filter(({ words }) => words);
      live.textContent = `step ${steps(xs[plot.cursor.idx])}: ` + said.map(({ series, words }) => `${series.name} ${words}`).join(", ");
    };
  }

  for (const chart of charts) {
    const box = document.getElementById("chart-" + chart.id), legend = legendOf(chart), state = {};
    box.after(legend);
    state.plot = draw(chart, box, legend, false);
    box.tabIndex = 0;
    box.setAttribute("role", "application");
    box.setAttribute("aria-roledescription", "curve");
    box.setAttribute("aria-label", `${chart.title}, ${chart.unit}: arrow keys move along the steps`);
    box.addEventListener("keydown", keys(state, chart));
    new ResizeObserver(() => {
      if (box.clientWidth && box.clientWidth !== state.plot.width) state.plot.setSize({ width: box.clientWidth, height: state.plot.height });
    }).observe(box);
    if (chart.log && chart.series.every(series => series.y.every(y => y == null || y > 0))) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "logarithmic";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        const pressed = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", pressed);
        plots.splice(plots.indexOf(state.plot), 1);
        state.plot.destroy();
        state.plot = draw(chart, box, legend, pressed);
      });
      box.closest("figure").querySelector("figcaption").append(button);
    }
  }

  // The points of what was learnt against what was forgotten, by arrow keys, pointer or finger.
  for (const plane of document.querySelectorAll(".plane")) {
    const points = [...plane.querySelectorAll("circle")], words = document.createElement("p");
    let at = -1;
    const pick = to => {
      at = Math.min(Math.max(to, 0), points.length - 1);
      points.forEach((point, i) => point.classList.toggle("on", i === at));
      words.textContent = points[at].querySelector("title").textContent;
    };
    words.className = "muted point-words";
    plane.after(words);
    plane.setAttribute("tabindex", "0");
    plane.setAttribute("role", "application");
    points.forEach((point, i) => point.addEventListener("pointerenter", () => pick(i)));
    plane.addEventListener("keydown", event => {
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: points.length - 1 }[event.key];
      if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      pick(to);
      live.textContent = words.textContent;
    });
  }

  const dark = matchMedia("(prefers-color-scheme: dark)"), button = document.getElementById("theme");
  const redraw = () => plots.forEach(plot => plot.redraw(false, true));
  // A page from the disk may have no storage: the choice then lasts as long as the page.
  const stored = action => { try { return action(localStorage); } catch { return null; } };
  const theme = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  function name() { button.textContent = theme() === "dark" ? "Light" : "Dark"; button.setAttribute("aria-label", button.textContent + " colours"); }
  const kept = stored(storage => storage.getItem("rwkv-bone-theme"));
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    stored(storage => storage.setItem("rwkv-bone-theme", root.dataset.theme));
    name();
    redraw();
  });
  dark.addEventListener("change", () => { name(); redraw(); });
  name();
  redraw();

  for (const element of document.querySelectorAll("time[datetime]")) {
    const minutes = Math.round((Date.now() - Date.parse(element.dateTime)) / 60000);
    const age = minutes < 1 ? "" : minutes < 120 ? `${minutes} min ago` : minutes < 2880 ? `${Math.round(minutes / 60)} h ago` : `${Math.round(minutes / 1440)} days ago`;
    if (age) element.after(` (${age})`);
  }
})();
