// The ranks of a world: where they are, what they do and hold, and what they are doing this moment.
import { useState } from 'preact/hooks';

import type { World, WorldRank, WorldVariables } from '../../api/types';
import { formatBytes, formatDuration } from '../../format';
import type { Client } from '../../stores/client';
import { useValue } from '../../stores/observable';
import { useTrans } from '../../translation';
import type { Openers } from '../clusters/cluster-panel';
import { ListNote, Problem, StateWord, useAction, useNow } from '../parts';

interface Props {
  client: Client;
  worldId?: string;
  openers?: Openers;
}

/** The world with this id; all worlds of the server without one. */
export function WorldPanel({ client, worldId, openers = {} }: Props) {
  const trans = useTrans();
  const state = useValue(client.worlds);
  const shown = worldId ? state.items.filter(world => world.world_id === worldId) : state.items;
  const isGone = !!worldId && state.isLoaded && !state.problem && shown.length === 0;
  return (
    <section class="llmc-card llmc-panel" aria-label={trans.__('Ranks')} data-stale={state.isStale}>
      {isGone ? (
        <p class="llmc-note">{trans.__('This world has ended. The next %1 cell starts another one.', '%%distribute')}</p>
      ) : (
        <ListNote
          state={state}
          retry={() => client.events.retry()}
          empty={trans.__('There are no ranks. The first %1 cell starts them, or %2.', '%%distribute', '%world start')}
        />
      )}
      {shown.map(world => (
        <WorldCard key={world.world_id} client={client} world={world} openers={openers} />
      ))}
    </section>
  );
}

function WorldCard({ client, world, openers }: { client: Client; world: World; openers: Openers }) {
  const trans = useTrans();
  const now = useNow();
  const ranks = world.ranks ?? [];
  return (
    <article class="llmc-item" aria-label={trans.__('World of %1', world.holder)}>
      <header class="llmc-item-head">
        <strong>{trans._n('%1 rank', '%1 ranks', world.num_ranks)}</strong>
        <span class="llmc-soft">{world.holder}</span>
        <StateWord state={world.run_id ? trans.__('running') : world.state} title={world.state} />
      </header>
      <p class="llmc-soft">
        {trans.__('on %1', world.cluster)}
        {world.started ? ` · ${trans.__('for %1', formatDuration(Math.max(0, now - world.started)))}` : ''}
        {world.run_id && openers.openRun ? ' · ' : ''}
        {world.run_id && openers.openRun && (
          <button type="button" class="llmc-link" onClick={() => openers.openRun?.(world.run_id ?? '', world.run_id ?? '')}>
            {trans.__('its run')}
          </button>
        )}
      </p>
      {ranks.length > 0 && <RankTable ranks={ranks} />}
      <Variables client={client} world={world} />
      <StacksOfWorld client={client} world={world} />
    </article>
  );
}

function RankTable({ ranks }: { ranks: readonly WorldRank[] }) {
  const trans = useTrans();
  return (
    <div class="llmc-scroll" tabIndex={0} role="region" aria-label={trans.__('Ranks')}>
      <table class="llmc-table">
        <thead>
          <tr>
            <th scope="col" class="llmc-number">{trans.__('Rank')}</th>
            <th scope="col">{trans.__('State')}</th>
            <th scope="col">{trans.__('Host')}</th>
            <th scope="col">{trans.__('Device')}</th>
            <th scope="col" class="llmc-number">{trans.__('Memory')}</th>
            <th scope="col">{trans.__('What it does')}</th>
          </tr>
        </thead>
        <tbody>
          {ranks.map(rank => (
            <tr key={rank.rank}>
              <td class="llmc-number">{rank.rank}</td>
              <td><StateWord state={rank.state ?? ''} /></td>
              <td>{rank.host}</td>
              <td>{rank.device}</td>
              <td class="llmc-number">
                {formatBytes(rank.memory_bytes)}
                {rank.gpu_memory_bytes ? trans.__(' + %1 GPU', formatBytes(rank.gpu_memory_bytes)) : ''}
              </td>
              <td>{rank.detail}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Variables({ client, world }: { client: Client; world: World }) {
  const trans = useTrans();
  const [found, setFound] = useState<WorldVariables | null>(null);
  const [rank, setRank] = useState(0);
  const path = `worlds/${encodeURIComponent(world.world_id)}/variables`;
  const look = useAction(async () => setFound(await client.rest.get<WorldVariables>(path)));
  const shown = found?.ranks.find(row => row.rank === rank) ?? found?.ranks[0];
  return (
    <div class="llmc-part">
      <div class="llmc-row">
        <button type="button" class="llmc-button" disabled={look.isBusy} onClick={() => void look.run()}>
          {found ? trans.__('Look again') : trans.__('Variables')}
        </button>
        {found && found.ranks.length > 1 && (
          <label>
            {trans.__('of rank')}{' '}
            <select value={String(shown?.rank ?? 0)} onChange={event => setRank(Number(event.currentTarget.value))}>
              {found.ranks.map(row => (
                <option key={row.rank} value={String(row.rank)}>{row.rank}</option>
              ))}
            </select>
          </label>
        )}
      </div>
      <Problem text={look.problem || shown?.problem || ''} />
      {shown && !shown.problem && !(shown.variables ?? []).length && <p class="llmc-note">{trans.__('It has none yet.')}</p>}
      {shown && (shown.variables ?? []).length > 0 && (
        <div class="llmc-scroll" tabIndex={0} role="region" aria-label={trans.__('Variables of rank %1', shown.rank)}>
          <table class="llmc-table">
            <thead>
              <tr>
                <th scope="col">{trans.__('Name')}</th>
                <th scope="col">{trans.__('Type')}</th>
                <th scope="col" class="llmc-number">{trans.__('Size')}</th>
                <th scope="col">{trans.__('Value')}</th>
              </tr>
            </thead>
            <tbody>
              {(shown.variables ?? []).map(variable => (
                <tr key={variable.name}>
                  <td><code>{variable.name}</code></td>
                  <td>{variable.type}</td>
                  <td class="llmc-number">{formatBytes(variable.num_bytes)}</td>
                  <td class="llmc-long">{variable.text}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </div>
  );
}

function StacksOfWorld({ client, world }: { client: Client; world: World }) {
  const trans = useTrans();
  const [lines, setLines] = useState<string[] | null>(null);
  const path = `worlds/${encodeURIComponent(world.world_id)}/stacks`;
  const look = useAction(async () => setLines((await client.rest.get<{ lines: string[] }>(path)).lines));
  return (
    <div class="llmc-part">
      <button type="button" class="llmc-button" disabled={look.isBusy} onClick={() => void look.run()}>
        {look.isBusy ? trans.__('Looking …') : trans.__('What are they doing now?')}
      </button>
      <Problem text={look.problem} />
      {lines && (
        <pre class="llmc-logtext" tabIndex={0} aria-label={trans.__('Stacks')}>{lines.join('\n')}</pre>
      )}
    </div>
  );
}
