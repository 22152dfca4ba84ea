// Draws the charts of a report with uPlot: hover values, and a zoom that all charts share.
// Texts of a run are in the data block and reach the page as textContent, never as HTML.
"use strict";
(() => {
  const block = document.getElementById("curves");
  if (!block) return;
  const page = JSON.parse(block.textContent);
  const root = document.documentElement;
  const plots = [];
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const alpha = (hex) => hex + "77";
  const NONE = "";
  const FEW = 12; // points of a line that are drawn as dots too, because the line may be too short to see

  const forms = {
    plain: (v) => (Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4))),
    scientific: (v) => (v === 0 ? "0" : v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e")),
    percent: (v) => +(100 * v).toPrecision(3) + " %",
    amount: (v) => (Math.abs(v) >= 1e9 ? +(v / 1e9).toPrecision(3) + " G" : Math.abs(v) >= 1e6 ? +(v / 1e6).toPrecision(3) + " M" : Math.abs(v) >= 1e4 ? +(v / 1e3).toPrecision(3) + " k" : String(+v.toPrecision(4))),
  };
  const stepText = (x) => x.toLocaleString("en-US", { maximumFractionDigits: 0 });

  // The nearest step with a value, because the series of a chart have different steps.
  function nearestIndex(u, series, index) {
    if (series === 0) return index;
    const xs = u.data[0], ys = u.data[series];
    let low = index, high = index;
    while (low >= 0 && ys[low] == null) low--;
    while (high < ys.length && ys[high] == null) high++;
    if (low < 0) return high < ys.length ? high : null;
    if (high >= ys.length) return low;
    return xs[index] - xs[low] <= xs[high] - xs[index] ? low : high;
  }

  function strokeOf(series) {
    return () => (series.style === "thin" ? alpha(colour("--c" + series.colour)) : colour("--c" + series.colour));
  }

  function seriesOptions(series) {
    const isDots = series.style === "dots";
    const dash = series.style === "dashed" || series.is_dashed ? [6, 4] : isDots ? [2, 3] : undefined;
    return {
      label: NONE,
      stroke: strokeOf(series),
      width: series.style === "thin" ? 1 : isDots || dash ? 1.2 : 1.8,
      dash,
      spanGaps: true,
      points: { show: series.x.length <= (isDots ? 200 : FEW), size: 6, fill: strokeOf(series) },
    };
  }

  function drawMarks(u) {
    const { ctx, bbox } = u, ratio = devicePixelRatio;
    const inside = (x) => x >= u.scales.x.min && x <= u.scales.x.max;
    ctx.save();
    ctx.lineCap = "butt"; // not what uPlot set last
    ctx.strokeStyle = colour("--wait");
    ctx.lineWidth = ratio;
    ctx.setLineDash([4 * ratio, 4 * ratio]);
    for (const step of page.resumed.filter(inside)) {
      const x = Math.round(u.valToPos(step, "x", true)) + 0.5; // sharp at any zoom
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.fillStyle = colour("--bad");
    for (const [first, last] of page.skipped) {
      if (last < u.scales.x.min || first > u.scales.x.max) continue;
      const from = Math.max(bbox.left, u.valToPos(first, "x", true) - ratio);
      const to = Math.min(bbox.left + bbox.width, u.valToPos(last, "x", true) + ratio);
      ctx.fillRect(from, bbox.top + bbox.height - 7 * ratio, Math.max(2 * ratio, to - from), 7 * ratio);
    }
    ctx.restore();
  }

  function isZoomed() {
    return plots.some((u) => u.scales.x.min > page.x[0] || u.scales.x.max < page.x[1] || u.isZoomedInY);
  }

  let isSharing = false;
  function showSteps(min, max, source) {
    if (isSharing) return;
    isSharing = true;
    for (const u of plots) if (u !== source) { u.setScale("x", { min, max }); u.isZoomedInY = false; }
    isSharing = false;
    for (const button of document.querySelectorAll(".reset")) button.hidden = !isZoomed();
  }

  function axis(form, size) {
    return {
      stroke: () => colour("--text"), font: "11px system-ui, sans-serif", size, gap: 6,
      grid: { show: size > 30, stroke: () => colour("--line"), width: 1 },
      ticks: { show: false },
      values: (u, ticks) => ticks.map((v) => (v == null ? NONE : form(v))),
    };
  }

  function draw(chart, holder) {
    const form = forms[chart.form];
    const keys = [...holder.closest("figure").querySelectorAll(".key output")];
    const at = holder.closest("figure").querySelector(".at");
    const show = (u) => {
      const index = u.cursor.idx;
      at.textContent = index == null ? NONE : "step " + stepText(u.data[0][index]);
      chart.series.forEach((_, i) => {
        const found = index == null ? null : u.cursor.idxs[i + 1];
        const value = found == null ? null : u.data[i + 1][found];
        const x = found == null ? null : u.data[0][found];
        const isElsewhere = found != null && x !== u.data[0][index];
        keys[i].textContent = value == null ? NONE : form(value) + (isElsewhere ? " at " + stepText(x) : NONE);
      });
    };
    const u = new uPlot({
      width: holder.clientWidth,
      height: holder.clientHeight,
      legend: { show: false },
      padding: [10, 10, 0, 0],
      cursor: {
        sync: { key: "steps", setSeries: false, scales: ["x", null] },
        drag: { x: true, y: true, uni: 40 },
        dataIdx: nearestIndex,
        points: { size: 7 },
        bind: { dblclick: () => () => { showSteps(page.x[0], page.x[1]); return null; } },
      },
      scales: {
        x: { time: false, range: (_, min, max) => (min < max ? [min, max] : [min - 1, max + 1]) },
        y: { range: (_, min, max) => range(min, max, chart.is_from_zero) },
      },
      axes: [axis(stepText, 28), axis(form, 62)],
      series: [{}, ...chart.series.map(seriesOptions)],
      hooks: {
        setCursor: [show],
        drawAxes: [drawMarks],
        setSelect: [(u) => { u.isZoomedInY = u.select.height > 0 && u.select.height < u.over.clientHeight; }],
        setScale: [(u, key) => { if (key === "x") showSteps(u.scales.x.min, u.scales.x.max, u); }],
      },
    }, uPlot.join(chart.series.map((series) => [series.x, series.y])), holder);
    plots.push(u);
    addTouch(u);
    new ResizeObserver(() => fit(u, holder)).observe(holder);
  }

  function range(min, max, isFromZero) {
    if (min == null) return [0, 1];
    if (isFromZero && min >= 0) return [0, max > 0 ? 1.1 * max : 1];
    const margin = max > min ? 0.08 * (max - min) : Math.abs(max) || 1;
    return [min - margin, max + margin];
  }

  function fit(u, holder) {
    const width = holder.clientWidth;
    if (width && width !== u.width) u.setSize({ width, height: holder.clientHeight });
  }

  // One finger reads values off, two fingers zoom.
  function addTouch(u) {
    let anchors = null;
    const left = (touch) => touch.clientX - u.over.getBoundingClientRect().left;
    const top = (touch) => touch.clientY - u.over.getBoundingClientRect().top;
    u.over.addEventListener("touchstart", ({ touches }) => {
      anchors = touches.length === 2 ? [...touches].map((t) => u.posToVal(left(t), "x")) : null;
    }, { passive: true });
    u.over.addEventListener("touchmove", ({ touches }) => {
      if (touches.length === 1) u.setCursor({ left: left(touches[0]), top: top(touches[0]) }, true, true);
      if (touches.length !== 2 || !anchors) return;
      const [a, b] = [...touches].map(left), width = u.over.clientWidth;
      const perPixel = (anchors[1] - anchors[0]) / (b - a);
      if (!(perPixel > 0)) return;
      const min = Math.max(page.x[0], anchors[0] - a * perPixel);
      const max = Math.min(page.x[1], anchors[0] + (width - a) * perPixel);
      if (max > min) showSteps(min, max);
    }, { passive: true });
  }

  for (const chart of page.charts) draw(chart, document.getElementById("plot-" + chart.name));
  showSteps(page.x[0], page.x[1]);
  for (const button of document.querySelectorAll(".reset")) {
    button.addEventListener("click", () => showSteps(page.x[0], page.x[1]));
  }
  const redraw = () => plots.forEach((u) => u.redraw(false, true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", () => {
    for (const u of plots) fit(u, u.root.parentElement);
    redraw();
  });
  const seconds = Number(root.dataset.refresh);
  if (seconds) setInterval(() => { if (!isZoomed() && !document.hidden) location.reload(); }, 1000 * seconds);
})();
