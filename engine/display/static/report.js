// A page in a single file: the charts of schedules, or the report of a run.
import { ChartStack, formatNumber } from "./charts.js";
import { element } from "./element.js";

const HEIGHT = 200;
const FIRST_HEIGHT = 270;

const find = (id) => document.getElementById(id);
const page = JSON.parse(find("data").textContent);
const describeStep = (x) => `step ${Math.round(x).toLocaleString("en-US")}`;
const stack = new ChartStack(find("charts"), { describePosition: describeStep });

function toPanel({ name, label, steps, lines, isLog }, index, isLogChosen) {
  return {
    name,
    label,
    x: steps,
    height: index ? HEIGHT : FIRST_HEIGHT,
    isLog: isLogChosen && isLog,
    columns: lines.map((line) => ({ ...line, hasPoints: steps.length === 1 })),
  };
}

function draw(isLogChosen) {
  const panels = page.panels.map((panel, index) => toPanel(panel, index, isLogChosen));
  find("empty").hidden = panels.length > 0;
  if (!panels.length) return;
  const starts = panels.map(({ x }) => x[0]);
  const ends = panels.map(({ x }) => x.at(-1));
  stack.draw(panels[0].x, panels, {
    xLabel: "step",
    hasAllAxes: page.isGrid,
    bounds: [Math.min(...starts), Math.max(...ends)],
    marks: page.marks,
  });
}

function drawDecision({ text, panels, marks }) {
  const chart = element("div", { className: "charts" });
  const section = element("section", {}, element("h2", { textContent: "AutoWU" }));
  section.append(element("p", { className: "muted", textContent: text }), chart);
  find("decision").append(section);
  const own = panels.map((panel, index) => toPanel(panel, index, false));
  new ChartStack(chart, { describePosition: describeStep }).draw(own[0].x, own, { xLabel: "step", marks });
}

function addTable({ title, head, rows }) {
  const toRow = (tag, cells) => element("tr", {}, ...cells.map((cell) => element(tag, { textContent: cell })));
  const table = element("table", {}, element("thead", {}, toRow("th", head)));
  table.append(element("tbody", {}, ...rows.map((row) => toRow("td", row))));
  find("tables").append(element("section", {}, element("h2", { textContent: title }), table));
}

function showFacts() {
  for (const [name, value] of page.facts) {
    const text = typeof value === "number" ? formatNumber(value) : value;
    find("facts").append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: text })));
  }
}

function choose(isLogChosen) {
  find("log").setAttribute("aria-pressed", String(isLogChosen));
  find("linear").setAttribute("aria-pressed", String(!isLogChosen));
  draw(isLogChosen);
}

document.title = `${page.title} · onecycle`;
find("title").textContent = page.title;
find("status").textContent = page.status;
find("charts").classList.toggle("grid", page.isGrid);
find("log").addEventListener("click", () => choose(true));
find("linear").addEventListener("click", () => choose(false));
find("theme").addEventListener("click", (event) => {
  event.target.textContent = `Theme: ${switchTheme()}`;
});
showFacts();
choose(page.isLog);
page.tables.forEach(addTable);
if (page.decision) drawDecision(page.decision);
if (page.config) {
  find("config").hidden = false;
  find("config").querySelector("pre").textContent = page.config;
}
