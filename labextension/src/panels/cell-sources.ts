// Cells that a panel writes into the notebook. Values in, text out.
import { snippets } from '../shared/components/endpoints/snippets';

const quoted = (word: string) => (/^[\w.:/@-]+$/.test(word) ? word : `"${word.replace(/"/g, '')}"`);

export const CELL_SOURCES = {
  /** The ranks of the notebook start on this cluster. */
  connect: (cluster: string) => `%load_ext jupyter_llmcloud\n%world start --cluster ${quoted(cluster)}`,
  /** Another notebook shows the run live. */
  attach: (run: string) => `%load_ext jupyter_llmcloud\n%runs attach ${quoted(run)}`,
  /** Goes on from the last checkpoint of a run, with its own text. */
  resume: (run: string, source: string) => `%%distribute --resume ${quoted(run)}\n${source.replace(/^\s*%%distribute[^\n]*\n/, '')}`,
  /** Asks an endpoint; the key comes from the environment. */
  client: (url: string, endpoint: string) => snippets(url, endpoint).find(({ title }) => title === 'Python')?.text ?? ''
};
