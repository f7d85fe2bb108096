// The page that edits a config.
import { coalesce, download, element, formatText, request, requestNumbers } from "./api.js";
import { ChartStack, formatNumber } from "./charts.js";
import { createEditor } from "./editor.js";
import { SchedulerForm } from "./form.js";
import { Gallery } from "./gallery.js";

const SETTINGS = ["world_size", "dataset_size", "steps_per_epoch", "steps", "parameters"];
const CHECK_FILE_EVERY = 2000; // milliseconds
const HEIGHTS = { lr: 210, momentum: 120, weight_decay: 120 };

const find = (id) => document.getElementById(id);
const state = {
  savedText: "",
  version: "",
  isLog: false,
  isByEpoch: false,
  compared: [],
  window: null,
  conflict: null,
  reply: null,
  changedAt: null,
};

const editor = createEditor(find("editor"), {
  onChange,
  onSave: save,
  complete: (text, offset) => request("complete", { text, offset }),
  describe: (text, offset) => request("describe", { text, offset }),
});
const charts = new ChartStack(find("charts"), {
  describePosition(x) {
    const { stepsPerEpoch } = state.reply.header;
    const step = state.isByEpoch ? Math.round(x * stepsPerEpoch) : x;
    const epoch = stepsPerEpoch ? `, epoch ${(step / stepsPerEpoch).toFixed(2)}` : "";
    return `step ${step.toLocaleString("en-US")}${epoch}`;
  },
  onZoom(range) {
    // Only a part of a long run is drawn step by step.
    if (!state.reply?.header.curves.isSampled && !state.window) return;
    const ratio = state.isByEpoch ? state.reply.header.stepsPerEpoch : 1;
    state.window = range && range.map((value) => Math.round(value * ratio));
    analyze();
  },
});
const form = new SchedulerForm(find("form"), edit);
const gallery = new Gallery(find("gallery"), changeType);

function onChange() {
  state.changedAt ??= performance.now();
  state.window = null;
  charts.range = null;
  showDirty();
  analyze();
}

function showDirty() {
  const isDirty = editor.getText() !== state.savedText || state.version === "";
  find("dirty").hidden = !isDirty;
  find("save").disabled = !isDirty;
}

// The settings of the run. An invalid number is marked and left out.
function readSettings() {
  const settings = {};
  for (const name of SETTINGS) {
    const input = find(name);
    const text = input.value.replaceAll(/[,_\s]/g, "");
    const number = Number(text); // also reads 7e9
    const isValid = Number.isInteger(number) && number >= 1 && number <= 1e15;
    input.setAttribute("aria-invalid", String(Boolean(text) && !isValid));
    settings[name] = isValid ? number : null;
  }
  return settings;
}

function describeState() {
  return { text: editor.getText(), settings: readSettings(), compared: state.compared };
}

const analyze = coalesce(async () => {
  const changedAt = state.changedAt;
  state.changedAt = null;
  const sent = describeState();
  let reply;
  try {
    reply = await requestNumbers("analyze", { ...sent, window: state.window });
  } catch (error) {
    showNotice(error.message);
    return;
  }
  // The positions of the problems belong to the text that was sent.
  if (editor.getText() !== sent.text) return;
  show(reply);
  if (changedAt !== null) {
    // The timeout runs after the browser has painted the frame.
    requestAnimationFrame(() => setTimeout(() => performance.measure("redraw", { start: changedAt })));
  }
});

function show({ header, arrays }) {
  const previous = state.reply;
  state.reply = header.curves ? { header, arrays } : previous && { ...previous, header: { ...header, curves: previous.header.curves } };
  editor.showProblems(header.problems);
  showSummary(header);
  showProblems(header.problems);
  showFacts(header);
  find("charts").classList.toggle("is-stale", !header.curves);
  find("charts").dataset.message = header.curves ? "" : header.curvesError;
  find("by-epoch").disabled = !header.stepsPerEpoch;
  if (!header.stepsPerEpoch && state.isByEpoch) setAxis(false);
  find("steps").placeholder = header.curves ? header.curves.steps.toLocaleString("en-US") : "steps";
  const derived = header.stepsPerEpoch;
  find("steps_per_epoch").placeholder = derived ? derived.toLocaleString("en-US") : "steps";
  drawCharts();
  find("form").classList.toggle("is-stale", header.form === null);
  if (header.form) showForm(header.form);
  showMemory(header.memory);
}

function showMemory(memory) {
  find("memory-summary").textContent = memory?.summary ?? "";
  const tables = (memory?.tables ?? []).map(({ title, columns, rows, emphasized }) => {
    const toRow = (tag, cells) => element("tr", {}, ...cells.map((textContent) => element(tag, { textContent })));
    const body = rows.map((row) => toRow("td", row));
    for (const index of emphasized) body[index].className = "total";
    const head = element("thead", {}, toRow("th", columns));
    const caption = element("caption", { textContent: title });
    return element("table", { className: "memory" }, caption, head, element("tbody", {}, ...body));
  });
  const notes = (memory?.notes ?? []).map((textContent) => element("p", { className: "muted", textContent }));
  find("memory").replaceChildren(element("div", { className: "memory-tables" }, ...tables), ...notes);
}

function showSummary({ summary, problems }) {
  const worst = ["error", "warning"].find((severity) => problems.some((each) => each.severity === severity));
  find("summary").textContent = summary;
  find("summary").dataset.severity = worst ?? "valid";
}

function showProblems(problems) {
  const rows = problems.map((problem) => {
    const place = problem.line ? `line ${problem.line}` : "";
    const message = element(
      "button",
      { type: "button", className: "problem-text" },
      element("span", { className: "place", textContent: place }),
      " ",
      element("span", {}, ...formatText(problem.message)),
      problem.hint ? element("span", { className: "muted" }, " ", ...formatText(problem.hint)) : "",
    );
    message.addEventListener("click", () => editor.goTo(problem.from));
    const row = element("div", { className: "problem", dataset: { severity: problem.severity } }, message);
    if (problem.fix) {
      const fix = element("button", { type: "button", className: "fix", textContent: "Fix", title: problem.fix.label });
      fix.addEventListener("click", () => {
        editor.edit(problem.fix);
        editor.view.focus();
      });
      row.append(fix);
    }
    return row;
  });
  find("problems").replaceChildren(...rows);
}

function showFacts({ facts, curves }) {
  const constants = (curves?.constants ?? []).map(({ label, values }) => ({
    label,
    value: values.map((value) => formatNumber(value)).join(", "),
    detail: "The schedule does not change it.",
  }));
  const rows = [...facts, ...constants].map(({ label, value, detail }) =>
    element("div", { title: detail }, element("dt", { textContent: label }), element("dd", { textContent: value })),
  );
  find("facts").replaceChildren(...rows);
}

function drawCharts() {
  if (!state.reply) return;
  const { header, arrays } = state.reply;
  const { curves, stepsPerEpoch } = header;
  const ratio = state.isByEpoch && stepsPerEpoch ? stepsPerEpoch : 1;
  // A range of consecutive steps is described by its first step and its length.
  const [steps, columns] = curves.isSampled ? [arrays[0], arrays.slice(1)] : [countSteps(curves), arrays];
  const x = ratio === 1 ? steps : steps.map((step) => step / ratio);
  let next = 0;
  const panels = curves.panels.map(({ name, label, columns: legend }) => ({
    name,
    label,
    height: HEIGHTS[name] ?? 120,
    isLog: state.isLog && name === "lr",
    columns: legend.map((column) => ({ ...column, values: columns[next++] })),
  }));
  if (panels.length) panels.at(-1).height += 32;
  charts.draw(x, panels, {
    xLabel: ratio === 1 ? "step" : "epoch",
    bounds: [0, Math.max(1, curves.steps - 1) / ratio],
    marks: curves.phases.map(({ step, name }) => ({ position: step / ratio, name })),
  });
}

function countSteps({ first, count }) {
  return Float64Array.from({ length: count }, (_, index) => first + index);
}

function showForm(value) {
  form.show(value);
  const select = find("type");
  if (document.activeElement !== select) select.value = value.type ?? "";
  find("type-summary").replaceChildren(...formatText(value.summary));
}

// Change the scheduler block. The last one of several fast edits of the same param counts.
const edits = new Map();
function edit(change) {
  edits.set(change.param ?? "type", change);
  sendEdits();
}

// The durations of the new schedule fit the length of the current one.
function changeType(type) {
  edit({ type, steps: state.reply?.header.curves?.steps ?? null });
}

const sendEdits = coalesce(async () => {
  while (edits.size) {
    const [[key, change]] = edits;
    const text = editor.getText();
    try {
      const reply = await request("edit", { text, ...change });
      // The user may have typed meanwhile: then apply the edit to the new text.
      if (editor.getText() !== text) continue;
      if (edits.get(key) === change) edits.delete(key);
      editor.update(reply.text);
    } catch (error) {
      edits.delete(key);
      showNotice(error.message);
    }
  }
});

async function openFile() {
  const file = await request("open");
  state.savedText = file.text;
  state.version = file.version;
  find("name").textContent = file.name;
  find("name").title = file.path;
  document.title = `${file.name} · onecycle`;
  editor.open(file.text);
  hideNotice();
  onChange();
}

async function save() {
  const text = editor.getText();
  try {
    const { version, found } = await request("save", { text, version: state.version });
    if (version === null) {
      showConflict(found);
      return;
    }
    state.version = version;
    state.savedText = text;
    hideNotice();
    showDirty();
    if (state.compared.some((each) => each.saved)) analyze();
  } catch (error) {
    showNotice(error.message);
  }
}

// Notice changes of the file by another program.
async function checkFile() {
  if (document.hidden || state.conflict !== null) return;
  let version;
  try {
    ({ version } = await request("version"));
  } catch (error) {
    showNotice(error.message);
    return;
  }
  if (version === state.version) return;
  if (editor.getText() === state.savedText && version) {
    await openFile();
    return;
  }
  showConflict(version);
}

function showConflict(version) {
  if (state.conflict === version) return;
  state.conflict = version;
  const reload = element("button", { type: "button", textContent: "Reload the file" });
  const keep = element("button", { type: "button", textContent: "Keep this text" });
  reload.addEventListener("click", () => openFile());
  keep.addEventListener("click", () => {
    state.version = version;
    state.savedText = null;
    hideNotice();
    showDirty();
  });
  const what = version ? "changed" : "deleted";
  showNotice(`Another program has ${what} the file.`, version ? reload : "", keep);
}

function showNotice(message, ...buttons) {
  const notice = find("notice");
  notice.replaceChildren(element("span", { textContent: message }), ...buttons);
  notice.hidden = false;
}

function hideNotice() {
  state.conflict = null;
  find("notice").hidden = true;
}

function setAxis(isByEpoch) {
  state.isByEpoch = isByEpoch;
  charts.range = null;
  press("by-epoch", isByEpoch);
  press("by-step", !isByEpoch);
}

function press(id, isPressed) {
  find(id).setAttribute("aria-pressed", String(isPressed));
}

function showCompared() {
  const chips = state.compared.map((each) => {
    const chip = element("button", { type: "button", className: "chip", title: "Stop comparing", textContent: `${each.label} ×` });
    chip.addEventListener("click", () => {
      state.compared = state.compared.filter((other) => other !== each);
      find("compare-saved").checked = state.compared.some((other) => other.saved);
      showCompared();
      analyze();
    });
    return chip;
  });
  find("compared").replaceChildren(...chips);
}

function compare(each) {
  state.compared = [...state.compared.filter(({ label }) => label !== each.label), each];
  showCompared();
  analyze();
}

function connectMenus() {
  find("compare-saved").addEventListener("change", (event) => {
    if (event.target.checked) compare({ label: "saved file", saved: true });
    else {
      state.compared = state.compared.filter((each) => !each.saved);
      showCompared();
      analyze();
    }
  });
  find("compare-type").addEventListener("change", (event) => {
    if (event.target.value) compare({ label: event.target.value, type: event.target.value });
    event.target.value = "";
  });
  find("compare-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) compare({ label: file.name, text: await file.text() });
    event.target.value = "";
  });
  for (const button of document.querySelectorAll("[data-format]")) {
    button.addEventListener("click", async () => {
      find("export-menu").open = false;
      try {
        await download("export", { ...describeState(), format: button.dataset.format, log: state.isLog });
      } catch (error) {
        showNotice(error.message);
      }
    });
  }
  // A menu closes when the user presses Escape or clicks elsewhere.
  const menus = [...document.querySelectorAll("details.menu")];
  document.addEventListener("click", (event) => {
    for (const menu of menus) if (!menu.contains(event.target)) menu.open = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const menu of menus.filter(({ open }) => open)) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  });
}

function connectToolbar() {
  for (const name of SETTINGS) find(name).addEventListener("input", analyze);
  for (const [id, isLog] of [["log", true], ["linear", false]]) {
    find(id).addEventListener("click", () => {
      state.isLog = isLog;
      press("log", isLog);
      press("linear", !isLog);
      drawCharts();
    });
  }
  find("by-epoch").addEventListener("click", () => (setAxis(true), drawCharts()));
  find("by-step").addEventListener("click", () => (setAxis(false), drawCharts()));
  find("save").addEventListener("click", save);
  find("theme").addEventListener("click", (event) => {
    event.target.textContent = `Theme: ${switchTheme()}`;
  });
  find("type").addEventListener("change", (event) => changeType(event.target.value));
  find("open-gallery").addEventListener("click", () => gallery.open());
}

async function start() {
  connectMenus();
  connectToolbar();
  await openFile();
  const names = await gallery.load();
  find("type").append(element("option", { value: "", textContent: "Choose a type", disabled: true }));
  for (const id of ["type", "compare-type"]) {
    find(id).append(...names.map((name) => element("option", { value: name, textContent: name })));
  }
  if (state.reply?.header.form) showForm(state.reply.header.form);
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "s") {
      event.preventDefault();
      if (!event.defaultPrevented || !find("editor").contains(event.target)) save();
    }
  });
  addEventListener("beforeunload", (event) => {
    if (!find("dirty").hidden && state.version) event.preventDefault();
  });
  setInterval(checkFile, CHECK_FILE_EVERY);
}

start().catch((error) => showNotice(error.message));
