// The ES modules that the widgets in a cell consist of: everything in one file each, nothing loaded from outside.
// `node esbuild.config.mjs` writes them into the Python package.
import { readdirSync } from 'node:fs';
import { build } from 'esbuild';

const SOURCES = 'src/widgets';
const entryPoints = readdirSync(SOURCES)
  .filter(name => /\.(tsx|css)$/.test(name)) // .ts files hold what they share
  .map(name => `${SOURCES}/${name}`);

await build({
  entryPoints,
  outdir: '../jupyter_llmcloud/widgets/static',
  bundle: true,
  charset: 'utf8',
  format: 'esm',
  jsx: 'automatic',
  jsxImportSource: 'preact',
  legalComments: 'inline',
  logLevel: 'warning',
  minify: true,
  target: 'es2022'
});
