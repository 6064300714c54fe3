// What is served: where, by which replicas, how fast; with its keys and a playground.
import { useState } from 'preact/hooks';

import type { Endpoint, Replica } from '../../api/types';
import { formatBytes, formatDuration, formatLatency, formatRate } from '../../format';
import type { Client } from '../../stores/client';
import { useValue } from '../../stores/observable';
import { useTrans } from '../../translation';
import type { Openers } from '../clusters/cluster-panel';
import { Confirm, CopyButton, ListNote, Problem, StateWord, useAction, useNow } from '../parts';
import { Changes } from './changes';
import { Keys } from './keys';
import { Playground } from './playground';
import { SnippetTabs } from './snippet-tabs';
import { snippets } from './snippets';

interface Props {
  client: Client;
  name?: string;
  openers?: Openers;
}

/** The endpoint with this name and its playground; a list of all without one. */
export function EndpointPanel({ client, name, openers = {} }: Props) {
  const trans = useTrans();
  const state = useValue(client.endpoints);
  const shown = name ? state.items.filter(endpoint => endpoint.name === name) : state.items;
  const isGone = !!name && state.isLoaded && !state.problem && shown.length === 0;
  return (
    <section class="llmc-card llmc-panel" aria-label={trans.__('Endpoints')} data-stale={state.isStale}>
      <header class="llmc-panel-head">
        <h2>{name ? trans.__('Endpoint %1', name) : trans.__('Endpoints')}</h2>
      </header>
      {isGone ? (
        <p class="llmc-note">{trans.__('There is no endpoint %1 any more.', name)}</p>
      ) : (
        <ListNote
          state={state}
          retry={() => client.events.retry()}
          empty={trans.__('Nothing is served yet. %1 serves the model of a run.', '%serve RUN')}
        />
      )}
      {shown.map(endpoint => (
        <EndpointCard key={endpoint.name} client={client} endpoint={endpoint} isWhole={!!name} openers={openers} />
      ))}
      {!name && <Keys client={client} />}
    </section>
  );
}

function EndpointCard(props: { client: Client; endpoint: Endpoint; isWhole: boolean; openers: Openers }) {
  const { client, endpoint, isWhole, openers } = props;
  const trans = useTrans();
  const now = useNow();
  const [isAsking, setAsking] = useState(false);
  const stop = useAction(() => client.rest.delete(`endpoints/${encodeURIComponent(endpoint.name)}`));
  const isActive = ['starting', 'ready'].includes(endpoint.state);
  const url = `${client.connection.baseUrl}llmcloud/v1`;
  return (
    <article class="llmc-item" aria-label={trans.__('Endpoint %1', endpoint.name)} data-name={endpoint.name}>
      <header class="llmc-item-head">
        {openers.openEndpoint && !isWhole ? (
          <button type="button" class="llmc-link" onClick={() => openers.openEndpoint?.(endpoint.name)}>{endpoint.name}</button>
        ) : (
          <strong>{endpoint.name}</strong>
        )}
        <span class="llmc-soft">{endpoint.created ? trans.__('for %1', formatDuration(Math.max(0, now - endpoint.created))) : ''}</span>
        <StateWord state={endpoint.state} />
      </header>
      {endpoint.state === 'failed' ? <Problem text={endpoint.reason} /> : endpoint.reason && <p class="llmc-note">{endpoint.reason}</p>}
      <div class="llmc-row llmc-url">
        <code title={url}>{url}</code>
        <CopyButton text={url} name={trans.__('Copy the URL of %1', endpoint.name)} />
      </div>
      <Rates endpoint={endpoint} />
      <Replicas replicas={endpoint.replicas} asked={endpoint.num_replicas} />
      {isWhole && isActive && endpoint.kind === 'generator' && <Playground client={client} name={endpoint.name} isReady={endpoint.state === 'ready'} />}
      {isWhole && isActive && <Changes client={client} endpoint={endpoint} />}
      {isWhole && <SnippetTabs all={snippets(url, endpoint.name, endpoint.kind, endpoint.inputs)} />}
      {isWhole && <Keys client={client} endpoint={endpoint.name} />}
      <footer class="llmc-row">
        {openers.openEndpoint && !isWhole && (
          <button type="button" class="llmc-button" aria-label={trans.__('Playground of %1', endpoint.name)}
            onClick={() => openers.openEndpoint?.(endpoint.name)}>
            {trans.__('Playground')}
          </button>
        )}
        <button type="button" class="llmc-button llmc-danger" disabled={isAsking || stop.isBusy}
          aria-label={isActive ? trans.__('Stop the endpoint %1', endpoint.name) : trans.__('Forget the endpoint %1', endpoint.name)}
          onClick={() => (isActive ? setAsking(true) : void stop.run())}>
          {isActive ? trans.__('Stop') : trans.__('Forget')}
        </button>
      </footer>
      {isAsking && (
        <Confirm
          question={<p>{trans.__('Stop the endpoint %1? Whoever asks it is refused from then on; its keys stay.', endpoint.name)}</p>}
          doIt={trans.__('Stop %1', endpoint.name)}
          isBusy={stop.isBusy}
          onNo={() => setAsking(false)}
          onYes={() => void stop.run().then(() => setAsking(false))}
        />
      )}
      <Problem text={stop.problem} />
    </article>
  );
}

function Rates({ endpoint }: { endpoint: Endpoint }) {
  const trans = useTrans();
  const rates = endpoint.rates;
  if (!rates) {
    return null;
  }
  const first = rates.first_token_s;
  const rows: [string, string][] = [
    [trans.__('requests'), formatRate(rates.requests_per_s ?? 0)],
    [trans.__('tokens'), formatRate(rates.tokens_per_s ?? 0)],
    [trans.__('first token'), typeof first === 'number' ? formatLatency(first) : '–'],
    [trans.__('waiting'), String(rates.num_queued ?? 0)],
    [trans.__('answering'), String(rates.num_in_flight ?? 0)],
    [trans.__('errors'), formatRate(rates.errors_per_s ?? 0)]
  ];
  return (
    <dl class="llmc-figures" title={trans.__('Over the last %1 s', rates.window_s)}>
      {rows.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

function Replicas({ replicas, asked }: { replicas: readonly Replica[]; asked: number }) {
  const trans = useTrans();
  const numReady = replicas.filter(replica => replica.state === 'ready').length;
  return (
    <div class="llmc-part">
      <p class="llmc-soft">{trans.__('%1 of %2 replicas ready', numReady, asked)}</p>
      {replicas.length > 0 && (
        <ul class="llmc-list">
          {replicas.map(replica => (
            <li key={replica.id}>
              <StateWord state={replica.state || trans.__('starting')} />{' '}
              <span class="llmc-soft">{replicaText(replica)}</span>
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}

function replicaText(replica: Replica): string {
  const memory = replica.memory;
  const cache = memory?.max_cache_bytes ? ` (cache ${formatBytes(memory.cache_bytes ?? 0)} of ${formatBytes(memory.max_cache_bytes)})` : '';
  return [
    replica.host ?? '',
    replica.device ?? '',
    memory ? `${formatBytes(memory.process_bytes)}${cache}` : '',
    replica.num_threads ? `${replica.num_threads} ${replica.num_threads === 1 ? 'thread' : 'threads'}` : '',
    replica.num_parallel ? `${replica.num_parallel} at once` : '',
    replica.context_length ? `${replica.context_length} tokens` : '',
    `${replica.in_flight} answering`
  ]
    .filter(Boolean)
    .join(' · ');
}
