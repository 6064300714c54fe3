// One cluster: how large it is, what is on it, and the ways to change or end it.
import { useState } from 'preact/hooks';

import type { Cluster } from '../../api/types';
import { formatDuration } from '../../format';
import type { Client } from '../../stores/client';
import { useTrans } from '../../translation';
import { Confirm, Problem, StateWord, useAction, useNow } from '../parts';
import type { Openers } from './cluster-panel';
import { Holders } from './holders';
import { lossOf, proxiedDashboard, type Loss } from './loss';
import { ScaleControls } from './scale-controls';
import { Log, useLog } from './start-progress';
import { WorkerRow } from './worker-row';

interface Props {
  client: Client;
  cluster: Cluster;
  hasProxy: boolean;
  openers: Openers;
}

export function ClusterCard({ client, cluster, hasProxy, openers }: Props) {
  const trans = useTrans();
  const now = useNow();
  const [isAsking, setAsking] = useState(false);
  const [isLogOpen, setLogOpen] = useState(false);
  const stop = useAction(() => client.rest.delete(`clusters/${encodeURIComponent(cluster.name)}`));
  const isOurs = (cluster.pid ?? 0) > 0;
  const workers = cluster.workers ?? [];
  const newest = [...client.clusters.value.items].sort((one, other) => (other.created ?? 0) - (one.created ?? 0))[0];
  const loss = lossOf(
    cluster,
    client.runs.value.items,
    client.worlds.value.items,
    client.endpoints.value.items,
    newest?.name ?? ''
  );
  const size = [
    trans._n('%1 worker', '%1 workers', cluster.num_workers ?? 0),
    trans._n('%1 slot', '%1 slots', cluster.num_slots ?? 0),
    cluster.created ? trans.__('for %1', formatDuration(Math.max(0, now - cluster.created))) : ''
  ];
  return (
    <article class="llmc-item" aria-label={trans.__('Cluster %1', cluster.name)} data-name={cluster.name}>
      <header class="llmc-item-head">
        {openers.openCluster ? (
          <button type="button" class="llmc-link" onClick={() => openers.openCluster?.(cluster.name)}>
            {cluster.name}
          </button>
        ) : (
          <strong>{cluster.name}</strong>
        )}
        <span class="llmc-soft">{cluster.kind === cluster.name ? '' : cluster.kind}</span>
        <StateWord state={cluster.state ?? 'starting'} />
      </header>
      <p class="llmc-soft">{size.filter(Boolean).join(' · ')}</p>
      <Problem text={cluster.reason ?? ''} />
      {isOurs && cluster.state === 'running' && <ScaleControls client={client} cluster={cluster} />}
      {!isOurs && (
        <p class="llmc-note">{trans.__('It was started elsewhere: it is scaled and ended there.')}</p>
      )}
      <Holders client={client} worlds={loss.worlds} runs={loss.runs} openers={openers} />
      {workers.length > 0 && (
        <ul class="llmc-workers" aria-label={trans.__('Workers')}>
          {workers.map(worker => (
            <WorkerRow key={worker.name} worker={worker} now={now} />
          ))}
        </ul>
      )}
      <footer class="llmc-row">
        <Dashboard client={client} cluster={cluster} hasProxy={hasProxy} />
        {isOurs && (
          <button type="button" class="llmc-button" aria-expanded={isLogOpen} onClick={() => setLogOpen(!isLogOpen)}>
            {isLogOpen ? trans.__('Hide log') : trans.__('Log')}
          </button>
        )}
        <button type="button" class="llmc-button llmc-danger" disabled={isAsking || stop.isBusy} onClick={() => setAsking(true)}>
          {isOurs ? trans.__('Stop') : trans.__('Leave')}
        </button>
      </footer>
      {isLogOpen && <HostLog client={client} name={cluster.name} />}
      {isAsking && (
        <Confirm
          question={<LossText name={cluster.name} isOurs={isOurs} loss={loss} />}
          doIt={isOurs ? trans.__('Stop %1', cluster.name) : trans.__('Leave %1', cluster.name)}
          isBusy={stop.isBusy}
          onNo={() => setAsking(false)}
          onYes={() => void stop.run().then(() => setAsking(false))}
        />
      )}
      <Problem text={stop.problem} />
    </article>
  );
}

function HostLog({ client, name }: { client: Client; name: string }) {
  const trans = useTrans();
  return <Log text={useLog(client, name) || trans.__('It has printed nothing.')} />;
}

function Dashboard({ client, cluster, hasProxy }: Omit<Props, 'openers'>) {
  const trans = useTrans();
  const address = cluster.dashboard ?? '';
  const proxied = proxiedDashboard(client.connection.baseUrl, address);
  if (!address || !proxied) {
    return null;
  }
  const hint = trans.__(
    'At %1 on the host of the Jupyter server. With jupyter-server-proxy installed there, it opens from everywhere.',
    address
  );
  return (
    <a class="llmc-button" href={hasProxy ? proxied : address} target="_blank" rel="noreferrer" title={hasProxy ? address : hint}>
      {hasProxy ? trans.__('Dask dashboard') : trans.__('Dask dashboard (only on the server’s host)')}
    </a>
  );
}

/** What ends with a cluster, said before it does. */
function LossText({ name, isOurs, loss }: { name: string; isOurs: boolean; loss: Loss }) {
  const trans = useTrans();
  const lines = [
    ...loss.runs.map(run => trans.__('run %1 is stopped', run.name)),
    ...loss.worlds.map(world =>
      trans._n('%1 rank of %2 ends with its variables', '%1 ranks of %2 end with their variables', world.num_ranks, world.holder)
    ),
    ...loss.endpoints.map(endpoint => trans.__('endpoint %1 answers no more', endpoint.name))
  ];
  return (
    <>
      <p>
        {isOurs ? trans.__('Stop the cluster %1?', name) : trans.__('Leave the cluster %1? It runs on.', name)}{' '}
        {lines.length ? trans.__('This is lost:') : trans.__('Nothing runs on it.')}
      </p>
      {lines.length > 0 && (
        <ul>
          {lines.map(line => (
            <li key={line}>{line}</li>
          ))}
        </ul>
      )}
    </>
  );
}
