// Bundle the libraries of `onecycle ui` and of the HTML reports. The output is committed, so that
// installing onecycle needs no Node.js. Run it with `make ui-bundle`.
import { buildParserFile } from "@lezer/generator";
import { build } from "esbuild";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";

// The reports are drawn by `engine/display`, which is below `engine/ui`.
const CHARTS = "../../display/static";
const EDITOR = "../static";

const shared = {
  bundle: true,
  minify: true,
  legalComments: "none",
  logLevel: "warning",
  metafile: true,
  target: "es2020",
};

// A global `uPlot`: a report is one file, and a module cannot import from its own page.
const charts = await build({
  ...shared,
  entryPoints: ["uplot/dist/uPlot.esm.js"],
  format: "iife",
  globalName: "uPlot",
  footer: { js: "uPlot = uPlot.default;" },
  outfile: `${CHARTS}/uplot.js`,
});
await build({
  ...shared,
  entryPoints: ["uplot/dist/uPlot.min.css"],
  outfile: `${CHARTS}/uplot.css`,
});
const grammar = readFileSync("config.grammar", "utf8");
mkdirSync("build", { recursive: true });
writeFileSync("build/parser.js", buildParserFile(grammar, { fileName: "config.grammar" }).parser);
const editor = await build({
  ...shared,
  entryPoints: ["codemirror.js"],
  format: "esm",
  outfile: `${EDITOR}/codemirror.js`,
});

writeFileSync(`${CHARTS}/uplot.LICENSE.txt`, collectLicenses(charts.metafile));
writeFileSync(`${EDITOR}/codemirror.LICENSE.txt`, collectLicenses(editor.metafile));

// Return the name, version and license text of each package in a bundle.
function collectLicenses(metafile) {
  const packages = Object.keys(metafile.inputs)
    .map((path) => path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1])
    .filter(Boolean);
  return [...new Set(packages)].sort().map((name) => {
    const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
    return `${name} ${version}\n\n${readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim()}\n`;
  }).join(`\n${"-".repeat(80)}\n\n`);
}
