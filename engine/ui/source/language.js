// The language of configs: highlighting, folding and indentation.
import {
  continuedIndent,
  foldInside,
  foldNodeProp,
  indentNodeProp,
  LanguageSupport,
  LRLanguage,
} from "@codemirror/language";
import { styleTags, tags } from "@lezer/highlight";
import { parser } from "./build/parser.js";

const language = LRLanguage.define({
  name: "config",
  parser: parser.configure({
    props: [
      styleTags({
        String: tags.string,
        Number: tags.number,
        "True False": tags.bool,
        Null: tags.null,
        PropertyName: tags.propertyName,
        LineComment: tags.lineComment,
        BlockComment: tags.blockComment,
        "{ }": tags.brace,
        "[ ]": tags.squareBracket,
        ", :": tags.separator,
      }),
      indentNodeProp.add({
        Object: continuedIndent({ except: /^\s*\}/ }),
        Array: continuedIndent({ except: /^\s*\]/ }),
      }),
      foldNodeProp.add({ "Object Array": foldInside }),
    ],
  }),
  languageData: {
    closeBrackets: { brackets: ["[", "{", '"'] },
    commentTokens: { line: "//", block: { open: "/*", close: "*/" } },
    indentOnInput: /^\s*[}\]]$/,
  },
});

export function config() {
  return new LanguageSupport(language);
}
