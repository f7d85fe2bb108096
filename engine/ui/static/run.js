// The page that shows runs, and follows those that are being trained.
import { coalesce, element, request, requestNumbers } from "./api.js";
import { ChartStack, formatNumber } from "./charts.js";

const METRICS_EVERY = 2000; // milliseconds
const SUMMARY_EVERY = 8000;
const GROWING_FOR = 15_000; // time without new values after which a run is not live
const HEIGHT = 190;
const LOSS_HEIGHT = 270;
const LOG_PANELS = new Set(["train_loss"]);

const find = (id) => document.getElementById(id);
const state = {
  isLog: false,
  isBySample: false,
  window: null,
  version: "",
  reply: null,
  summary: null,
  hidden: new Set(),
  grewAt: 0,
  decisions: new Map(),
};

const charts = new ChartStack(find("charts"), {
  describePosition: (x) => `${state.isBySample ? "sample" : "step"} ${Math.round(x).toLocaleString("en-US")}`,
  onZoom(range) {
    state.window = range;
    state.version = "";
    readMetrics();
  },
});
const rangeTestChart = new ChartStack(find("range-test"), { describePosition: (x) => `lr ${formatNumber(x, 3)}` });
const decisionChart = new ChartStack(find("decision"), { describePosition: (x) => `step ${Math.round(x)}` });

const readMetrics = coalesce(async () => {
  let reply;
  try {
    reply = await requestNumbers("metrics", {
      axis: state.isBySample ? "samples" : "steps",
      window: state.window,
      smoothing: Number(find("smoothing").value) / 200,
      version: state.version,
    });
  } catch (error) {
    showNotice(error.message);
    return;
  }
  find("notice").hidden = true;
  const { header } = reply;
  if (!header.isUnchanged) {
    // The first reply does not tell whether a run is being trained.
    if (state.reply && state.version) state.grewAt = performance.now();
    state.version = header.version;
    state.reply = reply;
    drawMetrics();
  }
  showStatus(header.progress);
  if (header.progress < 1) setTimeout(readMetrics, 50);
});

function showStatus(progress) {
  const isLive = state.grewAt && performance.now() - state.grewAt < GROWING_FOR;
  const text = progress < 1 ? `Reading, ${Math.floor(100 * progress)} %` : isLive ? "Live" : "";
  find("status").textContent = text;
}

function getRuns() {
  return state.summary?.runs ?? [];
}

function drawMetrics() {
  const { header, arrays } = state.reply;
  let next = 0;
  const panels = [];
  for (const { name, label, columns } of header.panels) {
    const tables = [];
    const shown = [];
    for (const column of columns) {
      const [x, y] = [arrays[next++], arrays[next++]];
      if (state.hidden.has(column.run) || !x.length) continue;
      tables.push([x, toGaps(y)]);
      shown.push(column);
    }
    if (!shown.length) continue;
    const [x, ...values] = tables.length > 1 ? uPlot.join(tables) : tables[0];
    panels.push({
      name,
      label,
      x,
      height: name === "train_loss" ? LOSS_HEIGHT : HEIGHT,
      isLog: state.isLog && LOG_PANELS.has(name),
      columns: shown.map((column, index) => ({
        ...column,
        label: [getRuns().length > 1 ? column.run : "", column.group].filter(Boolean).join(" · ") || column.run,
        color: chooseColor(column, columns),
        values: values[index],
        hasGaps: tables.length > 1,
        hasPoints: x.length === 1,
      })),
    });
  }
  find("empty").hidden = panels.length > 0;
  find("by-step").disabled = !header.hasSteps;
  charts.draw(panels[0]?.x, panels, {
    xLabel: state.isBySample || !header.hasSteps ? "sample" : "step",
    hasAllAxes: true,
    bounds: header.bounds,
    marks: state.isBySample || !header.hasSteps ? [] : listMarks(),
  });
}

// The runs have different colors; the param groups of a single run too.
function chooseColor(column, columns) {
  const runs = getRuns();
  if (runs.length > 1) return runs.indexOf(column.run);
  return [...new Set(columns.map(({ group }) => group))].indexOf(column.group);
}

function listMarks() {
  const marks = (state.summary?.checkpoints ?? [])
    .filter(({ run }) => !state.hidden.has(run))
    .map(({ step }) => ({ position: step, isTick: true }));
  for (const [run, decision] of state.decisions) {
    if (decision && !state.hidden.has(run)) marks.push({ position: decision.step, name: "end of warmup" });
  }
  return marks.sort((a, b) => a.position - b.position);
}

// uPlot draws a gap for null, but not for NaN.
function toGaps(values) {
  return values.some(Number.isNaN) ? Array.from(values, (value) => (Number.isNaN(value) ? null : value)) : values;
}

const readSummary = coalesce(async () => {
  try {
    state.summary = await request("summary");
  } catch (error) {
    showNotice(error.message);
    return;
  }
  const { title, path, runs } = state.summary;
  find("name").textContent = title;
  find("name").title = path;
  document.title = `${title} · onecycle`;
  showRuns(runs);
  showCheckpoints();
  showSettings();
  drawRangeTests();
  await Promise.all([showPlots(), readDecisions()]);
  if (state.reply) drawMetrics();
});

function showRuns(runs) {
  const chips = runs.length < 2 ? [] : runs.map((run, index) => {
    const line = element("i", { className: "swatch" });
    line.style.borderColor = `var(--series-${(index % 6) + 1})`;
    const chip = element("button", { type: "button", className: "chip" }, line, run);
    chip.setAttribute("aria-pressed", String(!state.hidden.has(run)));
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(run)) state.hidden.add(run);
      chip.setAttribute("aria-pressed", String(!state.hidden.has(run)));
      drawMetrics();
    });
    return chip;
  });
  // Chips keep the focus while the runs stay the same.
  if (find("runs").dataset.runs !== JSON.stringify(runs)) {
    find("runs").replaceChildren(...chips);
    find("runs").dataset.runs = JSON.stringify(runs);
  }
}

function showCheckpoints() {
  const { checkpoints, runs } = state.summary;
  find("checkpoints-section").hidden = !checkpoints.length;
  const hasRuns = runs.length > 1;
  const titles = [...(hasRuns ? ["Run"] : []), "Tag", "Step", "Size", "Ranks", "Created"];
  fillTable("checkpoints", titles, checkpoints.map((each) => [
    ...(hasRuns ? [each.run] : []),
    each.tag,
    each.step.toLocaleString("en-US"),
    formatSize(each.size),
    String(each.ranks),
    new Date(each.created).toLocaleString(),
  ]));
}

function showSettings() {
  const { settings, settingsOf } = state.summary;
  const isComparison = settingsOf.length > 1;
  find("settings-section").hidden = !settingsOf.length;
  find("settings-title").textContent = isComparison
    ? settings.length ? "Settings that differ" : "All settings are equal"
    : "Settings";
  fillTable("settings", settings.length ? ["Setting", ...(isComparison ? settingsOf : ["Value"])] : [], settings.map(({ key, values }) => [key, ...values]));
}

function fillTable(id, titles, rows) {
  const toRow = (tag, cells) => element("tr", {}, ...cells.map((cell) => element(tag, { textContent: cell })));
  find(`${id}-head`).replaceChildren(...(titles.length ? [toRow("th", titles)] : []));
  find(id).replaceChildren(...rows.map((row) => toRow("td", row)));
}

function formatSize(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  for (; bytes >= 1024 && index < units.length - 1; index += 1) bytes /= 1024;
  return `${bytes.toFixed(index ? 1 : 0)} ${units[index]}`;
}

function drawRangeTests() {
  const { rangeTests } = state.summary;
  find("range-test-section").hidden = !rangeTests.length;
  if (!rangeTests.length) return;
  const [test] = rangeTests;
  const rules = Object.entries(test.rules).map(([rule, lr]) => `${rule}: ${formatNumber(lr, 2)}`).join(", ");
  find("range-test-text").textContent = test.maxLr
    ? `Suggested range: ${formatNumber(test.minLr, 2)} to ${formatNumber(test.maxLr, 2)}. ${rules}.`
    : `No suggestion: ${test.reason}.`;
  const tables = rangeTests.flatMap(({ sweeps }) => sweeps).filter(({ lr }) => lr.length).map(({ lr, loss }) => sortTable(lr, loss));
  if (!tables.length) return;
  const [x, ...values] = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const marks = [["minimum", test.minLr], ["maximum", test.maxLr]];
  rangeTestChart.draw(x, [{
    name: "loss",
    label: "loss",
    height: 260,
    range: chooseLossRange(values),
    columns: values.map((column, index) => ({ label: `sweep ${index + 1}`, values: column, hasGaps: tables.length > 1 })),
  }], { xLabel: "learning rate", isLogX: true, marks: marks.filter(([, lr]) => lr).map(([name, position]) => ({ position, name })) });
}

// Return the range of the losses without the divergence at the end, which would hide the rest.
function chooseLossRange(columns) {
  const losses = columns.flat().filter((loss) => Number.isFinite(loss));
  const low = Math.min(...losses);
  const starts = columns.map((column) => column.find((loss) => Number.isFinite(loss)) ?? low);
  const high = Math.min(Math.max(...losses), low + 2 * (Math.max(...starts) - low || Infinity));
  const margin = (high - low) / 20 || 1;
  return [low - margin, high + margin];
}

function sortTable(x, y) {
  const order = x.map((_, index) => index).sort((a, b) => x[a] - x[b]);
  return [order.map((index) => x[index]), order.map((index) => y[index])];
}

async function showPlots() {
  const { plots } = state.summary;
  find("plots-section").hidden = !plots.length;
  if (find("plots").children.length === plots.length) return;
  const images = plots.map(async (title, index) => {
    const response = await fetch("api/plot", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ index }),
    });
    const source = URL.createObjectURL(await response.blob());
    return element("figure", {}, element("img", { src: source, alt: title }), element("figcaption", { textContent: title, className: "muted" }));
  });
  find("plots").replaceChildren(...(await Promise.all(images)));
}

async function readDecisions() {
  for (const run of state.summary.hasDecision) {
    if (state.decisions.get(run)) continue;
    const { decision } = await request("decision", { run });
    state.decisions.set(run, decision);
    if (decision) drawDecision(decision);
  }
}

function drawDecision({ step, lr, reason, probability, losses, band }) {
  find("decision-section").hidden = false;
  const sure = probability === null ? "" : ` Probability that the loss has passed its minimum: ${formatNumber(probability, 3)}.`;
  find("decision-text").textContent = `The warmup ended after step ${step}, at a learning rate of ${formatNumber(lr, 3)}: ${reason}.${sure}`;
  const x = losses.map((_, index) => index);
  const tables = [[x, losses]];
  const columns = [{ label: "loss", isFaint: Boolean(band), color: 0 }];
  if (band) {
    const at = band.positions.map((position) => position * (losses.length - 1));
    tables.push([at, band.mean, band.low, band.high]);
    columns.push({ label: "mean", color: 1 }, { label: "lower bound", color: 1, isCompared: true }, { label: "upper bound", color: 1, isCompared: true });
  }
  const [positions, ...values] = uPlot.join(tables);
  decisionChart.draw(positions, [{
    name: "loss",
    label: "loss",
    height: 240,
    columns: columns.map((column, index) => ({ ...column, values: values[index], hasGaps: true })),
  }], { xLabel: "step", bounds: [0, step], marks: [{ position: step, name: "end of warmup" }] });
}

function showNotice(message) {
  find("notice").textContent = message;
  find("notice").hidden = false;
}

function press(id, isPressed) {
  find(id).setAttribute("aria-pressed", String(isPressed));
}

function connect() {
  for (const [id, isLog] of [["log", true], ["linear", false]]) {
    find(id).addEventListener("click", () => {
      state.isLog = isLog;
      press("log", isLog);
      press("linear", !isLog);
      drawMetrics();
    });
  }
  for (const [id, isBySample] of [["by-sample", true], ["by-step", false]]) {
    find(id).addEventListener("click", () => {
      Object.assign(state, { isBySample, version: "", window: null });
      charts.range = null;
      press("by-sample", isBySample);
      press("by-step", !isBySample);
      readMetrics();
    });
  }
  find("smoothing").addEventListener("input", () => {
    state.version = "";
    readMetrics();
  });
  find("theme").addEventListener("click", (event) => {
    event.target.textContent = `Theme: ${switchTheme()}`;
  });
}

async function start() {
  connect();
  await readSummary();
  await readMetrics();
  await readDecisions();
  if (state.reply) drawMetrics();
  setInterval(() => document.hidden || readMetrics(), METRICS_EVERY);
  setInterval(() => document.hidden || readSummary(), SUMMARY_EVERY);
}

start().catch((error) => showNotice(error.message));
