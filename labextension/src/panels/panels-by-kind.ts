// Which component shows what an output names.
import { type ComponentChild, h } from 'preact';

import { Unavailable } from '../shared/api/rest';
import { RunMonitor } from '../shared/components/run/monitor';
import type { Client } from '../shared/stores/client';

export type PanelKind = 'run' | 'cluster' | 'world' | 'endpoint';

interface PanelOfKind {
  /** Whether the server knows this id. */
  isKnown(client: Client, id: string): Promise<boolean>;
  show(client: Client, id: string, name: string): ComponentChild;
}

/** Whether there is something at the path; a server that does not answer now may know it. */
export async function isThere(client: Client, path: string): Promise<boolean> {
  try {
    await client.rest.get(path);
    return true;
  } catch (error) {
    return error instanceof Unavailable && error.kind === 'unreachable';
  }
}

export const PANELS: Partial<Record<PanelKind, PanelOfKind>> = {
  run: {
    isKnown: (client, id) => isThere(client, `runs/${encodeURIComponent(id)}`),
    show: (client, id, name) => h(RunMonitor, { run: client.run(id), runId: id, name, client })
  }
};
