// Cells that a panel writes into the notebook. Values in, text out.
import type { Rest } from '../shared/api/rest';
import type { Endpoint } from '../shared/api/types';
import type { Client } from '../shared/stores/client';
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
  client: (url: string, endpoint: string, kind = 'generator', inputs = '') =>
    snippets(url, endpoint, kind, inputs).find(({ title }) => title === 'Python')?.text ?? ''
};

/** What a cell is about: a run by its id, anything else by its name. */
interface Asked {
  readonly cell: string;
  readonly id: string;
  readonly name: string;
}

async function wordFor(rest: Pick<Rest, 'run'>, id: string, name: string): Promise<string> {
  const found = name === id ? null : await rest.run(name).catch(() => null); // a name that is none of a run
  return found?.run_id === id ? name : id;
}

/** The text of a cell. Several runs may have the name of one: the newest has it, the others are named by their ids. */
export async function cellSource({ rest }: Pick<Client, 'rest'>, { cell, id, name }: Asked): Promise<string> {
  switch (cell) {
    case 'connect':
      return CELL_SOURCES.connect(name);
    case 'attach':
      return CELL_SOURCES.attach(await wordFor(rest, id, name));
    case 'resume':
      return CELL_SOURCES.resume(await wordFor(rest, id, name), (await rest.run(id)).source ?? '');
    default: {
      const { kind, inputs } = await rest.get<Endpoint>(`endpoints/${encodeURIComponent(name)}`);
      return CELL_SOURCES.client(`${rest.connection.baseUrl}llmcloud/v1`, name, kind, inputs);
    }
  }
}
