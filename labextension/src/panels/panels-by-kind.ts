// Which component shows what an output or a tab names.
import { type ComponentChild, h } from 'preact';

import { Unavailable } from '../shared/api/rest';
import { ClusterPanel, type Openers } from '../shared/components/clusters/cluster-panel';
import { EndpointPanel } from '../shared/components/endpoints/endpoint-panel';
import { RunMonitor } from '../shared/components/run/monitor';
import { WorldPanel } from '../shared/components/worlds/world-panel';
import type { Client } from '../shared/stores/client';

export type PanelKind = 'run' | 'cluster' | 'world' | 'endpoint';

interface PanelOfKind {
  /** Whether the server knows this id; an empty one stands for all there are. */
  isKnown(client: Client, id: string): Promise<boolean>;
  show(client: Client, id: string, name: string, openers?: Openers): ComponentChild;
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

/** Whether a list at `path` has an item of this id, or is asked for whole. */
async function isListed(client: Client, path: string, field: string, id: string): Promise<boolean> {
  try {
    const answer = await client.rest.get<Record<string, Record<string, unknown>[]>>(path);
    return !id || (answer[path] ?? []).some(item => item[field] === id);
  } catch (error) {
    return error instanceof Unavailable && error.kind === 'unreachable';
  }
}

export const PANELS: Record<PanelKind, PanelOfKind> = {
  run: {
    isKnown: (client, id) => isThere(client, `runs/${encodeURIComponent(id)}`),
    show: (client, id, name) => h(RunMonitor, { run: client.run(id), runId: id, name, client })
  },
  cluster: {
    isKnown: (client, id) => isListed(client, 'clusters', 'name', id),
    show: (client, id, _, openers) => h(ClusterPanel, { client, name: id, openers: withoutSelf(openers) })
  },
  world: {
    isKnown: (client, id) => isListed(client, 'worlds', 'world_id', id),
    show: (client, id, _, openers) => h(WorldPanel, { client, worldId: id, openers })
  },
  endpoint: {
    isKnown: (client, id) => isListed(client, 'endpoints', 'name', id),
    show: (client, id, _, openers) => h(EndpointPanel, { client, name: id, openers })
  }
};

/** A panel of one cluster needs no way to itself. */
function withoutSelf(openers?: Openers): Openers {
  return { ...openers, openCluster: undefined };
}
