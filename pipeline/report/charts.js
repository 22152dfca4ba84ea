// Draws the charts of a report with uPlot: hover values, and a zoom that all charts share.
// Texts of a run are in the data block and reach the page as textContent, never as HTML.
"use strict";
(() => {
  const block = document.getElementById("curves");
  if (!block) return;
  const page = JSON.parse(block.textContent);
  const root = document.documentElement;
  const plots = []; // uPlot objects, one for each chart
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const halfTransparent = (hex) => hex + "77";
  const MAX_DOTS_ON_LINE = 12; // a line of at most so many points has dots too, because it may be too short to see
  const MAX_DOTS = 200; // of a series in the style "dots"; with more points only its line is drawn

  // Formats of values; pipeline/report/curves.py names one for each chart.
  const formats = {
    plain: (v) => (Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4))),
    scientific: (v) => (v === 0 ? "0" : v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e")),
    percent: (v) => +(100 * v).toPrecision(3) + " %",
    amount: (v) => (Math.abs(v) >= 1e9 ? +(v / 1e9).toPrecision(3) + " G" : Math.abs(v) >= 1e6 ? +(v / 1e6).toPrecision(3) + " M" : Math.abs(v) >= 1e4 ? +(v / 1e3).toPrecision(3) + " k" : String(+v.toPrecision(4))),
  };
  const stepText = (x) => x.toLocaleString("en-US", { maximumFractionDigits: 0 });

  // Index of the step with a value that is nearest to `index`, because the series of a chart have
  // different steps. plot.data has the steps at 0, and the values of series i at i.
  function nearestIndex(plot, series, index) {
    if (series === 0) return index;
    const steps = plot.data[0], values = plot.data[series];
    let before = index, after = index;
    while (before >= 0 && values[before] == null) before--;
    while (after < values.length && values[after] == null) after++;
    if (before < 0) return after < values.length ? after : null;
    if (after >= values.length) return before;
    return steps[index] - steps[before] <= steps[after] - steps[index] ? before : after;
  }

  function strokeOf(series) {
    return () => (series.style === "thin" ? halfTransparent(colour("--c" + series.colour)) : colour("--c" + series.colour));
  }

  function seriesOptions(series) {
    const isDots = series.style === "dots";
    const dash = series.style === "dashed" || series.is_dashed ? [6, 4] : isDots ? [2, 3] : undefined;
    return {
      label: "",
      stroke: strokeOf(series),
      width: series.style === "thin" ? 1 : isDots || dash ? 1.2 : 1.8,
      dash,
      spanGaps: true,
      points: { show: series.x.length <= (isDots ? MAX_DOTS : MAX_DOTS_ON_LINE), size: 6, fill: strokeOf(series) },
    };
  }

  // Vertical lines at the steps from which a start resumed, and bars under steps without an update.
  function drawMarks(plot) {
    const { ctx, bbox } = plot, ratio = devicePixelRatio, barHeight = 7 * ratio;
    const isVisible = (step) => step >= plot.scales.x.min && step <= plot.scales.x.max;
    ctx.save();
    ctx.lineCap = "butt"; // uPlot may have set another one
    ctx.strokeStyle = colour("--wait");
    ctx.lineWidth = ratio;
    ctx.setLineDash([4 * ratio, 4 * ratio]);
    for (const step of page.resumed.filter(isVisible)) {
      const x = Math.round(plot.valToPos(step, "x", true)) + 0.5; // the middle of a pixel, so that the line is sharp
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.fillStyle = colour("--bad");
    for (const [first, last] of page.skipped) {
      if (last < plot.scales.x.min || first > plot.scales.x.max) continue;
      const from = Math.max(bbox.left, plot.valToPos(first, "x", true) - ratio);
      const to = Math.min(bbox.left + bbox.width, plot.valToPos(last, "x", true) + ratio);
      ctx.fillRect(from, bbox.top + bbox.height - barHeight, Math.max(2 * ratio, to - from), barHeight);
    }
    ctx.restore();
  }

  function isZoomed() {
    return plots.some((plot) => plot.scales.x.min > page.x[0] || plot.scales.x.max < page.x[1] || plot.isZoomedInY);
  }

  // Show these steps in all charts; `source` is the chart that shows them already. setScale calls this
  // function again through the hook setScale.
  let isInShowSteps = false;
  function showSteps(min, max, source) {
    if (isInShowSteps) return;
    isInShowSteps = true;
    for (const plot of plots) if (plot !== source) { plot.setScale("x", { min, max }); plot.isZoomedInY = false; }
    isInShowSteps = false;
    for (const button of document.querySelectorAll(".reset")) button.hidden = !isZoomed();
  }

  // `size`: width or height of the axis in pixels. Only the y axis has grid lines.
  function axis(format, size, hasGrid) {
    return {
      stroke: () => colour("--text"), font: "11px system-ui, sans-serif", size, gap: 6,
      grid: { show: hasGrid, stroke: () => colour("--line"), width: 1 },
      ticks: { show: false },
      values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : format(tick))),
    };
  }

  // Draw a chart in its element, which is in a figure whose caption shows the values at the cursor.
  function draw(chart, element) {
    const format = formats[chart.form];
    const outputs = [...element.closest("figure").querySelectorAll(".key output")]; // one for each series
    const stepOutput = element.closest("figure").querySelector(".at");
    const showValues = (plot) => {
      const index = plot.cursor.idx;
      stepOutput.textContent = index == null ? "" : "step " + stepText(plot.data[0][index]);
      chart.series.forEach((_, i) => {
        const nearest = index == null ? null : plot.cursor.idxs[i + 1];
        const value = nearest == null ? null : plot.data[i + 1][nearest];
        const step = nearest == null ? null : plot.data[0][nearest];
        const isOtherStep = nearest != null && step !== plot.data[0][index];
        outputs[i].textContent = value == null ? "" : format(value) + (isOtherStep ? " at " + stepText(step) : "");
      });
    };
    const plot = new uPlot({
      width: element.clientWidth,
      height: element.clientHeight,
      legend: { show: false },
      padding: [10, 10, 0, 0],
      cursor: {
        sync: { key: "steps", setSeries: false, scales: ["x", null] },
        drag: { x: true, y: true, uni: 40 }, // zooms in both directions if both are longer than 40 pixels
        dataIdx: nearestIndex,
        points: { size: 7 },
        bind: { dblclick: () => () => { showSteps(page.x[0], page.x[1]); return null; } },
      },
      scales: {
        x: { time: false, range: (_, min, max) => (min < max ? [min, max] : [min - 1, max + 1]) },
        y: { range: (_, min, max) => range(min, max, chart.is_from_zero) },
      },
      axes: [axis(stepText, 28, false), axis(format, 62, true)],
      series: [{}, ...chart.series.map(seriesOptions)],
      hooks: {
        setCursor: [showValues],
        drawAxes: [drawMarks],
        setSelect: [(p) => { p.isZoomedInY = p.select.height > 0 && p.select.height < p.over.clientHeight; }],
        setScale: [(p, key) => { if (key === "x") showSteps(p.scales.x.min, p.scales.x.max, p); }],
      },
    }, uPlot.join(chart.series.map((series) => [series.x, series.y])), element);
    plots.push(plot);
    addTouch(plot);
    new ResizeObserver(() => fitToElement(plot, element)).observe(element);
  }

  // Range of the y axis for values from min to max, with a margin.
  function range(min, max, isFromZero) {
    if (min == null) return [0, 1];
    if (isFromZero && min >= 0) return [0, max > 0 ? 1.1 * max : 1];
    const margin = max > min ? 0.08 * (max - min) : Math.abs(max) || 1;
    return [min - margin, max + margin];
  }

  function fitToElement(plot, element) {
    const width = element.clientWidth;
    if (width && width !== plot.width) plot.setSize({ width, height: element.clientHeight });
  }

  // One finger reads values off, two fingers zoom.
  function addTouch(plot) {
    let fingerSteps = null; // the steps under two fingers, which stay under them while they move
    const left = (touch) => touch.clientX - plot.over.getBoundingClientRect().left;
    const top = (touch) => touch.clientY - plot.over.getBoundingClientRect().top;
    plot.over.addEventListener("touchstart", ({ touches }) => {
      fingerSteps = touches.length === 2 ? [...touches].map((touch) => plot.posToVal(left(touch), "x")) : null;
    }, { passive: true });
    plot.over.addEventListener("touchmove", ({ touches }) => {
      if (touches.length === 1) plot.setCursor({ left: left(touches[0]), top: top(touches[0]) }, true, true);
      if (touches.length !== 2 || !fingerSteps) return;
      const [first, second] = [...touches].map(left), width = plot.over.clientWidth;
      const stepsPerPixel = (fingerSteps[1] - fingerSteps[0]) / (second - first);
      if (!(stepsPerPixel > 0)) return; // the fingers have crossed
      const min = Math.max(page.x[0], fingerSteps[0] - first * stepsPerPixel);
      const max = Math.min(page.x[1], fingerSteps[0] + (width - first) * stepsPerPixel);
      if (max > min) showSteps(min, max);
    }, { passive: true });
  }

  for (const chart of page.charts) draw(chart, document.getElementById("plot-" + chart.name));
  showSteps(page.x[0], page.x[1]);
  for (const button of document.querySelectorAll(".reset")) {
    button.addEventListener("click", () => showSteps(page.x[0], page.x[1]));
  }
  const redraw = () => plots.forEach((plot) => plot.redraw(false, true)); // in the colours of the new theme
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", () => {
    for (const plot of plots) fitToElement(plot, plot.root.parentElement);
    redraw();
  });
  const refreshSeconds = Number(root.dataset.refresh);
  if (refreshSeconds) setInterval(() => { if (!isZoomed() && !document.hidden) location.reload(); }, 1000 * refreshSeconds);
})();
