// The form of the scheduler block. Each change is an edit of the text, which the server computes.
import { element, formatText } from "./api.js";
import { formatNumber } from "./charts.js";

const POSITIONS = 1000; // of a slider

// Convert a position of a slider to a value of its range.
function toValue(range, position) {
  const fraction = position / POSITIONS;
  let value;
  if (range.scale === "linear") value = range.min + fraction * (range.max - range.min);
  else if (range.hasZero && position === 0) return 0;
  else value = range.min * (range.max / range.min) ** fraction;
  return range.isInteger ? Math.round(value) : Number(value.toPrecision(3));
}

function toPosition(range, value) {
  if (value === null || value === undefined) return 0;
  const fraction =
    range.scale === "linear"
      ? (value - range.min) / (range.max - range.min)
      : Math.log(Math.max(value, range.min) / range.min) / Math.log(range.max / range.min);
  return Math.round(POSITIONS * Math.min(1, Math.max(0, fraction)));
}

// Convert the text of an input field: JSON, or else a string such as 10ep.
function parseValue(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text.trim();
  }
}

function formatValue(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

// The form in an element. `onEdit` receives `{param, value}`, or `{param}` to remove the param.
export class SchedulerForm {
  constructor(container, onEdit) {
    this.container = container;
    this.onEdit = onEdit;
    this.rows = new Map();
    this.signature = "";
  }

  show(form) {
    const fields = form?.fields ?? [];
    const set = fields.filter((field) => field.isSet || field.isRequired);
    const rest = fields.filter((field) => !field.isSet && !field.isRequired);
    const signature = JSON.stringify([form?.type, set.map(({ name }) => name)]);
    if (signature !== this.signature) this.build(set, rest, signature);
    for (const field of fields) this.rows.get(field.name)?.show(field);
  }

  build(set, rest, signature) {
    const active = document.activeElement?.dataset?.param;
    const kind = document.activeElement?.type;
    this.signature = signature;
    this.rows = new Map([...set, ...rest].map((field) => [field.name, new Row(field, this.onEdit)]));
    const roots = (fields) => fields.map(({ name }) => this.rows.get(name).root);
    const isOpen = this.container.querySelector("details")?.open ?? false;
    const defaults = element(
      "details",
      { className: "defaults", open: isOpen },
      element("summary", { textContent: `Defaults (${rest.length})` }),
      element("div", { className: "fields" }, ...roots(rest)),
    );
    this.container.replaceChildren(
      element("div", { className: "fields" }, ...roots(set)),
      ...(rest.length ? [defaults] : []),
    );
    // A param that has just been set moves out of the defaults, with the focus.
    if (active) this.container.querySelector(`[data-param="${active}"][type="${kind}"]`)?.focus();
  }
}

class Row {
  constructor(field, onEdit) {
    this.field = field;
    const { name } = field;
    const set = (value) => onEdit({ param: name, value });
    const id = `param-${name}`;
    this.input = this.buildInput(field, id, set);
    this.slider = element("input", {
      type: "range",
      min: 0,
      max: POSITIONS,
      dataset: { param: name },
      "aria-label": `${name}, slider`,
    });
    this.slider.addEventListener("input", () => {
      const value = toValue(this.range, Number(this.slider.value));
      this.writeInput(value);
      set(value);
    });
    // While the slider has the focus, its range stays, so that it can be dragged.
    this.slider.addEventListener("blur", () => this.show(this.field));
    this.reset = element("button", { type: "button", className: "quiet", textContent: "Reset", title: `Remove ${name}, so that its default applies` });
    this.reset.addEventListener("click", () => onEdit({ param: name }));
    const help = `${field.description} Value: ${field.valid}.`;
    this.root = element(
      "div",
      { className: "field", title: help },
      element("label", { htmlFor: id, textContent: name }),
      this.input,
      this.slider,
      this.reset,
      element("p", { className: "muted" }, ...formatText(field.description)),
    );
  }

  buildInput(field, id, set) {
    if (field.isBoolean) {
      const box = element("input", { type: "checkbox", id, dataset: { param: field.name } });
      box.addEventListener("change", () => set(box.checked));
      return box;
    }
    if (field.choices) {
      const options = field.choices.map((choice) => element("option", { value: JSON.stringify(choice), textContent: formatValue(choice) }));
      const select = element("select", { id, dataset: { param: field.name } }, ...options);
      select.addEventListener("change", () => set(JSON.parse(select.value)));
      return select;
    }
    const input = element("input", { type: "text", id, spellcheck: false, dataset: { param: field.name } });
    input.addEventListener("change", () => input.value.trim() && set(parseValue(input.value)));
    return input;
  }

  show(field) {
    this.field = field;
    const isDragged = document.activeElement === this.slider;
    if (!isDragged) this.range = field.slider;
    this.slider.hidden = !this.range;
    this.reset.hidden = !field.isSet || field.isRequired;
    this.root.classList.toggle("is-default", !field.isSet);
    if (this.range && !isDragged) this.slider.value = toPosition(this.range, field.value);
    if (this.range) this.slider.setAttribute("aria-valuetext", formatNumber(field.value));
    if (document.activeElement !== this.input && !isDragged) this.writeInput(field.value);
  }

  writeInput(value) {
    if (this.field.isBoolean) this.input.checked = value === true;
    else if (this.field.choices) this.input.value = JSON.stringify(value);
    else this.input.value = value === null || value === undefined ? "" : formatValue(value);
  }
}
