// Charts of several panels below each other, which share the horizontal axis and the cursor.
import { element } from "./element.js";

const COLORS = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6"];
const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
const MAX_LEGEND = 12;
const FAST = 10; // steps that a key moves the cursor while Shift is pressed
let stacks = 0;

// Return a number with as few digits as possible, such as 0.0004 or 1.2e-7.
export function formatNumber(value, digits = 5) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = Number(value.toPrecision(digits));
  if (size >= 1e-4 && size < 1e7) return text.toLocaleString("en-US", { maximumFractionDigits: 12 });
  return text.toExponential().replace("e+", "e");
}

function readColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A stack of charts.
//
// A panel has a `name`, a `label`, a `height`, whether its axis is logarithmic (`isLog`), optionally
// its own positions `x` and the `range` of its vertical axis, and `columns`. A column has a `label` and `values`, and optionally a `color`
// (an index), whether it is drawn with a dashed line (`isCompared`), as a thin line without a value in
// the legend (`isFaint`), or as points (`hasPoints`).
//
// `describePosition` returns the text for a position on the horizontal axis, and `onZoom` is called
// with the range that the user chooses, or null.
export class ChartStack {
  constructor(container, { describePosition, onZoom = () => {} }) {
    this.container = container;
    this.describePosition = describePosition;
    this.onZoom = onZoom;
    this.key = `stack-${(stacks += 1)}`;
    this.panels = new Map();
    this.range = null;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(container);
    document.addEventListener("themechange", () => this.draw(this.x, this.shown, this.options, true));
  }

  // Draw panels over the positions `x`. `options` has the `xLabel` and `marks` with a position and a name.
  draw(x, panels, options = {}, isNew = false) {
    if (!x) return;
    Object.assign(this, { x, shown: panels, options });
    const names = new Set(panels.map((panel) => panel.name));
    for (const [name, panel] of this.panels) {
      if (!names.has(name)) {
        panel.destroy();
        this.panels.delete(name);
      }
    }
    for (const each of panels) {
      if (!this.panels.has(each.name)) this.panels.set(each.name, new Panel(this, each));
    }
    if (panels.some(({ name }, index) => this.panels.get(name).root !== this.container.children[index])) {
      this.container.append(...panels.map(({ name }) => this.panels.get(name).root));
    }
    for (const each of panels) {
      const isLast = each === panels.at(-1);
      const hasAxis = isLast || Boolean(options.hasAllAxes);
      this.panels.get(each.name).draw(each.x ?? x, each, { ...options, hasAxis }, isNew);
    }
  }

  // Show a range of the horizontal axis in all panels; null for all of it.
  zoom(range) {
    this.range = range;
    for (const panel of this.panels.values()) panel.applyRange();
    this.onZoom(range);
  }

  resize() {
    for (const panel of this.panels.values()) panel.resize();
  }
}

class Panel {
  constructor(stack, { label }) {
    this.stack = stack;
    this.title = element("span", { className: "panel-title" });
    this.position = element("span", { className: "panel-position" });
    this.legend = element("span", { className: "legend" });
    this.plot = element("div", { className: "plot", tabIndex: 0, role: "img" });
    this.plot.setAttribute("aria-label", `${label}: arrow keys move the cursor, + and - zoom, 0 resets`);
    this.head = element("div", { className: "panel-head" }, this.title, this.legend, this.position);
    this.root = element("div", { className: "panel" }, this.head, this.plot);
    stack.container.append(this.root);
    this.plot.addEventListener("keydown", (event) => this.handleKey(event));
    this.chart = null;
    this.signature = "";
  }

  draw(x, panel, options, isNew) {
    this.panel = panel;
    this.options = options;
    this.title.textContent = panel.label;
    const signature = JSON.stringify([
      panel.columns.map(({ label, isCompared, isFaint }) => [label, isCompared, isFaint]),
      panel.isLog,
      panel.height,
      options.xLabel,
      options.hasAxis,
    ]);
    const columns = panel.columns.map(({ values }) => (panel.isLog ? keepPositive(values) : values));
    const data = [x, ...columns];
    if (this.chart && signature === this.signature && !isNew) {
      this.chart.setData(data, false);
      this.applyRange();
      this.showValues(this.chart.cursor.idx);
      return;
    }
    this.signature = signature;
    this.chart?.destroy();
    this.chart = new uPlot(this.buildOptions(panel, options), data, this.plot);
    this.buildLegend(panel);
    this.applyRange();
  }

  buildOptions(panel, options) {
    const grid = { stroke: readColor("--grid"), width: 1 };
    const axis = {
      stroke: readColor("--muted"),
      grid,
      ticks: { show: false },
      font: `11px ${readColor("--sans")}`,
    };
    return {
      width: this.plot.clientWidth || 600,
      height: panel.height,
      legend: { show: false },
      padding: [8, 22, 4, 0],
      cursor: {
        sync: { key: this.stack.key, scales: ["x", null] },
        points: { size: 7 },
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => this.stack.zoom(null) },
      },
      scales: { x: { time: false, distr: options.isLogX ? 3 : 1 }, y: { distr: panel.isLog ? 3 : 1, log: 10, range: panel.isLog ? undefined : (panel.range ?? chooseRange) } },
      axes: [
        {
          ...axis,
          size: options.hasAxis ? 24 : 6,
          label: options.hasAxis ? options.xLabel : undefined,
          labelSize: 16,
          labelFont: axis.font,
          labelGap: 0,
          values: (_, splits) => splits.map((value) => (options.hasAxis && value !== null ? formatNumber(value) : "")),
        },
        {
          ...axis,
          size: 64,
          values: (_, splits) => splits.map((value) => (value === null ? "" : formatNumber(value, 3))),
        },
      ],
      series: [{}, ...panel.columns.map((column, index) => this.buildSeries(column, index))],
      hooks: {
        setCursor: [(chart) => this.showValues(chart.cursor.idx)],
        setSelect: [(chart) => this.select(chart)],
        draw: [(chart) => this.drawMarks(chart)],
      },
    };
  }

  buildSeries(column, index) {
    const color = column.color ?? index;
    const stroke = readColor(COLORS[color % COLORS.length]);
    const dash = column.isCompared ? [6, 4] : DASHES[Math.floor(color / COLORS.length) % DASHES.length];
    return {
      label: column.label,
      stroke,
      width: column.isFaint ? 1 : 1.75,
      alpha: column.isFaint ? 0.35 : 1,
      dash,
      points: { show: column.hasPoints ?? false, size: 6, fill: stroke },
      paths: column.hasPoints ? () => null : undefined,
      spanGaps: column.hasGaps ?? false,
    };
  }

  buildLegend({ columns }) {
    const named = columns.flatMap((column, index) => (column.isFaint ? [] : [{ column, index }]));
    this.values = named.slice(0, MAX_LEGEND).map(({ column, index }) => {
      const value = element("b");
      if (named.length === 1) return { value, index, row: value };
      const line = element("i", { className: column.isCompared ? "swatch dashed" : "swatch" });
      line.style.borderColor = readColor(COLORS[(column.color ?? index) % COLORS.length]);
      return { value, index, row: element("span", {}, line, column.label, value) };
    });
    const more = named.length - this.values.length;
    this.legend.replaceChildren(
      ...this.values.map(({ row }) => row),
      ...(more > 0 ? [`and ${more} more`] : []),
    );
    this.showValues(null);
  }

  showValues(index) {
    const isKnown = index !== null && index !== undefined && index < this.chart.data[0].length;
    const x = isKnown ? this.chart.data[0][index] : null;
    const isFirst = this.panel === this.stack.shown[0];
    this.position.hidden = !isFirst;
    this.position.textContent = isKnown && isFirst ? this.stack.describePosition(x) : "";
    for (const { value, index: column } of this.values ?? []) {
      const { values, last } = this.panel.columns[column];
      // Several runs have values at different positions: show the closest one before the cursor.
      let at = index;
      while (isKnown && at > 0 && (values[at] === null || values[at] === undefined)) at -= 1;
      const shown = isKnown ? values[at] : last;
      value.textContent = shown === undefined ? "" : formatNumber(shown, 6);
    }
  }

  select(chart) {
    const { left, width } = chart.select;
    if (width < 4) return;
    const range = [chart.posToVal(left, "x"), chart.posToVal(left + width, "x")];
    chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.stack.zoom(range);
  }

  applyRange() {
    const x = this.chart.data[0];
    const [min, max] = this.stack.range ?? this.options.bounds ?? [x[0], x[x.length - 1]];
    this.chart.batch(() => {
      this.chart.setScale("x", { min, max: max > min ? max : min + 1 });
    });
  }

  drawMarks(chart) {
    const marks = this.options.marks ?? [];
    const { ctx, bbox } = chart;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.fillStyle = ctx.strokeStyle = readColor("--muted");
    ctx.font = `${11 * ratio}px ${readColor("--sans")}`;
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.globalAlpha = 0.8;
    let free = -Infinity;
    for (const { position, name, isTick } of marks) {
      const left = chart.valToPos(position, "x", true);
      if (left < bbox.left || left > bbox.left + bbox.width) continue;
      if (isTick) {
        const [bottom, half] = [bbox.top + bbox.height, 4 * ratio];
        ctx.fill(new Path2D(`M${left - half},${bottom} h${2 * half} l${-half},${-2 * half} z`));
        continue;
      }
      if (left > bbox.left) {
        ctx.beginPath();
        ctx.moveTo(left, bbox.top);
        ctx.lineTo(left, bbox.top + bbox.height);
        ctx.stroke();
      }
      if (!name || left < free || this.panel !== this.stack.shown[0]) continue;
      const width = ctx.measureText(name).width + 4 * ratio;
      const isAtEdge = left + width > bbox.left + bbox.width;
      ctx.fillText(name, isAtEdge ? left - width : left + 4 * ratio, bbox.top + 11 * ratio);
      free = left + width + 4 * ratio;
    }
    ctx.restore();
  }

  handleKey(event) {
    const { data, cursor } = this.chart;
    const last = data[0].length - 1;
    const index = cursor.idx ?? 0;
    const move = event.shiftKey ? FAST : 1;
    const targets = { ArrowLeft: index - move, ArrowRight: index + move, Home: 0, End: last };
    if (event.key in targets) {
      const at = Math.max(0, Math.min(last, targets[event.key]));
      const left = this.chart.valToPos(data[0][at], "x");
      this.chart.setCursor({ left, top: this.plot.clientHeight / 3 }, true, true);
    } else if (event.key === "+" || event.key === "-") {
      const { min, max } = this.chart.scales.x;
      const middle = cursor.idx === null || cursor.idx === undefined ? (min + max) / 2 : data[0][cursor.idx];
      const ratio = event.key === "+" ? 0.5 : 2;
      const range = [middle - (middle - min) * ratio, middle + (max - middle) * ratio];
      const bounds = this.options.bounds ?? [data[0][0], data[0][last]];
      const isAll = range[0] <= bounds[0] && range[1] >= bounds[1];
      this.stack.zoom(isAll ? null : [Math.max(range[0], bounds[0]), Math.min(range[1], bounds[1])]);
    } else if (event.key === "0") {
      this.stack.zoom(null);
    } else {
      return;
    }
    event.preventDefault();
  }

  resize() {
    const width = this.plot.clientWidth;
    if (this.chart && width) this.chart.setSize({ width, height: this.panel.height });
  }

  destroy() {
    this.chart?.destroy();
    this.root.remove();
  }
}

// Return the range of the vertical axis: a constant is drawn in the middle, and zero at the bottom.
function chooseRange(_, low, high) {
  if (low === null) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
  return uPlot.rangeNum(low, high, 0.1, true);
}

// A logarithmic axis cannot show zero and negative values.
function keepPositive(values) {
  return Array.from(values, (value) => (value > 0 ? value : null));
}
