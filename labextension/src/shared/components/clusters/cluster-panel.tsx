// The clusters of a server: every one of them with its workers, who holds its slots, and where a new one is started.
import { useEffect, useState } from 'preact/hooks';

import type { Client } from '../../stores/client';
import { useValue } from '../../stores/observable';
import { useTrans } from '../../translation';
import { ListNote } from '../parts';
import { ClusterCard } from './cluster-card';
import { StartForm } from './start-form';

/** How one gets from here to what runs on a cluster; where there is no such way, names are texts. */
export interface Openers {
  openRun?: (runId: string, name: string) => void;
  openEndpoint?: (name: string) => void;
  openWorld?: (worldId: string, holder: string) => void;
  openCluster?: (name: string) => void;
}

/** All clusters of the server, or the one with this name. */
export function ClusterPanel({ client, name, openers = {} }: { client: Client; name?: string; openers?: Openers }) {
  const trans = useTrans();
  const state = useValue(client.clusters);
  useValue(client.worlds); // followed as long as the panel is there: its cards tell what would be lost
  useValue(client.runs);
  useValue(client.endpoints);
  const [isFormOpen, setFormOpen] = useState(false);
  const [hasProxy, setHasProxy] = useState(false);
  useEffect(() => {
    void client.rest
      .get<{ has_dashboard_proxy: boolean }>('cluster-kinds')
      .then(answer => setHasProxy(answer.has_dashboard_proxy))
      .catch(() => setHasProxy(false)); // the form says what is wrong
  }, [client]);
  const shown = name ? state.items.filter(cluster => cluster.name === name) : state.items;
  const isGone = !!name && state.isLoaded && !state.problem && shown.length === 0;
  return (
    <section class="llmc-card llmc-panel" aria-label={trans.__('Clusters')} data-stale={state.isStale}>
      <header class="llmc-panel-head">
        <h2>{name ? trans.__('Cluster %1', name) : trans.__('Clusters')}</h2>
        {!name && (
          <button
            type="button"
            class="llmc-button"
            aria-expanded={isFormOpen}
            onClick={() => setFormOpen(isOpen => !isOpen)}
          >
            {isFormOpen ? trans.__('Close') : trans.__('New cluster')}
          </button>
        )}
      </header>
      {isFormOpen && <StartForm client={client} onStarted={() => setFormOpen(false)} />}
      {isGone ? (
        <p class="llmc-note">{trans.__('There is no cluster %1 any more.', name)}</p>
      ) : (
        <ListNote
          state={state}
          retry={() => client.events.retry()}
          empty={trans.__('There is no cluster yet. The first %1 cell starts a local one, or start one here.', '%%distribute')}
        />
      )}
      {shown.map(cluster => (
        <ClusterCard key={cluster.name} client={client} cluster={cluster} hasProxy={hasProxy} openers={openers} />
      ))}
    </section>
  );
}
