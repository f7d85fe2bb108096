// The text editor: CodeMirror with completion, hover help and problems from the server.
import {
  autocompletion,
  bracketMatching,
  closeBrackets,
  closeBracketsKeymap,
  completionKeymap,
  config,
  defaultKeymap,
  drawSelection,
  EditorState,
  EditorView,
  foldGutter,
  foldKeymap,
  forEachDiagnostic,
  highlightActiveLine,
  highlightActiveLineGutter,
  highlightSelectionMatches,
  HighlightStyle,
  history,
  historyKeymap,
  hoverTooltip,
  indentOnInput,
  indentUnit,
  keymap,
  lineNumbers,
  lintGutter,
  lintKeymap,
  search,
  searchKeymap,
  setDiagnostics,
  syntaxHighlighting,
  tags,
} from "./codemirror.js";
import { element, formatText } from "./api.js";

const SEVERITIES = { error: "error", warning: "warning", note: "info" };

// The colors are variables of style.css, so that the theme can change without a new editor.
const highlighting = HighlightStyle.define([
  { tag: tags.propertyName, color: "var(--code-key)" },
  { tag: tags.string, color: "var(--code-string)" },
  { tag: tags.number, color: "var(--code-number)" },
  { tag: [tags.bool, tags.null], color: "var(--code-word)" },
  { tag: [tags.lineComment, tags.blockComment], color: "var(--muted)", fontStyle: "italic" },
]);

const appearance = EditorView.theme({
  "&": { height: "100%", fontSize: "13px", backgroundColor: "var(--background)", color: "var(--text)" },
  "&.cm-focused": { outline: "none" },
  ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.55" },
  ".cm-gutters": { backgroundColor: "var(--background)", color: "var(--faint)", border: "none" },
  ".cm-activeLine, .cm-activeLineGutter": { backgroundColor: "var(--active-line)" },
  ".cm-cursor": { borderLeftColor: "var(--text)" },
  "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground": {
    backgroundColor: "var(--selection)",
  },
  ".cm-tooltip": {
    backgroundColor: "var(--raised)",
    color: "var(--text)",
    border: "1px solid var(--border)",
    borderRadius: "6px",
    boxShadow: "var(--shadow)",
  },
  ".cm-tooltip.cm-tooltip-autocomplete > ul": { fontFamily: "var(--mono)", maxHeight: "16em" },
  ".cm-tooltip-autocomplete ul li[aria-selected]": {
    backgroundColor: "var(--accent)",
    color: "var(--on-accent)",
  },
  ".cm-completionDetail": { fontStyle: "normal", opacity: "0.65" },
  ".cm-tooltip.cm-completionInfo": { padding: "8px 10px", maxWidth: "320px", fontFamily: "var(--sans)" },
  ".cm-panels": { backgroundColor: "var(--panel)", color: "var(--text)", borderColor: "var(--border)" },
  ".cm-panel.cm-search label": { fontSize: "12px" },
  ".cm-searchMatch": { backgroundColor: "var(--match)" },
  ".cm-foldPlaceholder": { background: "var(--panel)", border: "1px solid var(--border)", color: "var(--muted)" },
  ".cm-diagnostic": { fontFamily: "var(--sans)", padding: "6px 10px" },
  ".cm-diagnosticAction": {
    backgroundColor: "var(--accent)",
    color: "var(--on-accent)",
    borderRadius: "4px",
    padding: "2px 8px",
  },
});

// Create the editor in an element.
//
// `onChange` is called after each change of the text, `onSave` when the user presses Ctrl+S.
// `complete` and `describe` ask the server about the position of the cursor or the mouse.
export function createEditor(parent, { onChange, onSave, complete, describe }) {
  const view = new EditorView({ parent });
  const extensions = [
    lineNumbers(),
    foldGutter(),
    lintGutter(),
    history(),
    drawSelection(),
    indentOnInput(),
    bracketMatching(),
    closeBrackets(),
    highlightActiveLine(),
    highlightActiveLineGutter(),
    highlightSelectionMatches(),
    search({ top: true }),
    indentUnit.of("  "),
    config(),
    appearance,
    syntaxHighlighting(highlighting),
    EditorView.contentAttributes.of({ "aria-label": "Text of the config" }),
    autocompletion({ override: [(context) => suggest(context, complete)], icons: false }),
    hoverTooltip((_, position) => explain(view, position, describe)),
    keymap.of([
      { key: "Mod-s", run: () => (onSave(), true), preventDefault: true },
      { key: "Mod-.", run: applyFixAtCursor, preventDefault: true },
      ...closeBracketsKeymap,
      ...completionKeymap,
      ...foldKeymap,
      ...historyKeymap,
      ...lintKeymap,
      ...searchKeymap,
      ...defaultKeymap,
    ]),
    EditorView.updateListener.of((update) => update.docChanged && onChange()),
  ];

  return {
    view,
    getText: () => view.state.doc.toString(),
    // Replace the whole text and forget the history.
    open(text) {
      view.setState(EditorState.create({ doc: text, extensions }));
    },
    // Change the text to `text`, as one edit of the part that differs.
    update(text) {
      const old = view.state.doc.toString();
      if (old === text) return;
      let start = 0;
      while (start < old.length && start < text.length && old[start] === text[start]) start += 1;
      let end = 0;
      const most = Math.min(old.length, text.length) - start;
      while (end < most && old[old.length - 1 - end] === text[text.length - 1 - end]) end += 1;
      view.dispatch({
        changes: { from: start, to: old.length - end, insert: text.slice(start, text.length - end) },
        userEvent: "input",
      });
    },
    edit({ from, to, insert }) {
      view.dispatch({ changes: { from, to, insert }, userEvent: "input" });
    },
    goTo(position) {
      const at = Math.min(position, view.state.doc.length);
      view.dispatch({ selection: { anchor: at }, effects: EditorView.scrollIntoView(at, { y: "center" }) });
      view.focus();
    },
    showProblems(problems) {
      const length = view.state.doc.length;
      const diagnostics = problems.map((problem) => ({
        from: Math.min(problem.from, length),
        to: Math.min(Math.max(problem.to, problem.from), length),
        severity: SEVERITIES[problem.severity],
        message: [problem.message, problem.hint].filter(Boolean).join(" "),
        source: problem.rule,
        actions: problem.fix
          ? [{ name: problem.fix.label, apply: (target) => target.dispatch({ changes: problem.fix, userEvent: "input" }) }]
          : [],
      }));
      view.dispatch(setDiagnostics(view.state, diagnostics));
    },
  };
}

async function suggest(context, complete) {
  const word = context.matchBefore(/[\w"$.-]+/);
  if (!context.explicit && !word) return null;
  const found = await complete(context.state.doc.toString(), context.pos);
  if (context.aborted || !found.options.length) return null;
  return {
    from: found.from,
    to: found.to,
    filter: false,
    options: rank(found.options, context.state.sliceDoc(found.from, context.pos)),
  };
}

// Return the options that contain the typed text, best matches first.
function rank(options, typed) {
  const wanted = typed.replaceAll('"', "").toLowerCase();
  const score = (label) => {
    const at = label.toLowerCase().indexOf(wanted);
    return at < 0 ? Infinity : at;
  };
  return options
    .map((option) => ({ option, at: score(option.label) }))
    .filter(({ at }) => at < Infinity)
    .sort((a, b) => a.at - b.at)
    .map(({ option }) => ({
      label: option.label,
      detail: option.detail,
      info: option.info || undefined,
      apply: (view, _, from, to) => insert(view, option.insert, from, to),
    }));
}

function insert(view, text, from, to) {
  const inside = /\{\}$/.test(text) ? -1 : 0;
  // The editor has added the closing quote.
  const after = view.state.sliceDoc(to, to + 1) === '"' && !view.state.sliceDoc(from, to).endsWith('"') ? 1 : 0;
  view.dispatch({
    changes: { from, to: to + after, insert: text },
    selection: { anchor: from + text.length + inside },
    userEvent: "input.complete",
  });
}

async function explain(view, position, describe) {
  const found = await describe(view.state.doc.toString(), position);
  if (!found.lines.length) return null;
  return {
    pos: found.from,
    end: found.to,
    above: true,
    create: () => ({
      dom: element(
        "div",
        { className: "help" },
        element("code", { textContent: found.title }),
        ...found.lines.map((line) => element("p", {}, ...formatText(line))),
      ),
    }),
  };
}

function applyFixAtCursor(view) {
  const line = view.state.doc.lineAt(view.state.selection.main.head);
  let fix = null;
  forEachDiagnostic(view.state, (diagnostic, from) => {
    if (!fix && diagnostic.actions.length && from >= line.from && from <= line.to) fix = { diagnostic, from };
  });
  if (fix) fix.diagnostic.actions[0].apply(view, fix.from, fix.diagnostic.to);
  return Boolean(fix);
}
