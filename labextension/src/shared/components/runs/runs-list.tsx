// The runs of a server: searched, filtered by state, the newest first.
import { useState } from 'preact/hooks';

import type { Run } from '../../api/types';
import { formatDuration, isActive } from '../../format';
import type { Client } from '../../stores/client';
import { useValue } from '../../stores/observable';
import { useTrans } from '../../translation';
import type { Openers } from '../clusters/cluster-panel';
import { Name } from '../name';
import { ListNote, Problem, StateWord, useAction, useNow } from '../parts';
import { entriesOf, filterRuns, headline, stateCounts, type StateFilter } from './filter';

const SHOWN_AT_FIRST = 50;

/** `hasFilters`: with a search field and a choice of states. */
export function RunsList({ client, openers = {}, hasFilters = true }: { client: Client; openers?: Openers; hasFilters?: boolean }) {
  const trans = useTrans();
  const state = useValue(client.runs);
  const [search, setSearch] = useState('');
  const [group, setGroup] = useState<StateFilter>('all');
  const [limit, setLimit] = useState(SHOWN_AT_FIRST);
  const groups: [StateFilter, string][] = [
    ['all', trans.__('All')],
    ['active', trans.__('Active')],
    ['finished', trans.__('Finished')],
    ['failed', trans.__('Failed or stopped')]
  ];
  const found = filterRuns(state.items, search, group);
  const entries = entriesOf(found);
  return (
    <section class="llmc-card llmc-panel" aria-label={trans.__('Runs')} data-stale={state.isStale}>
      <header class="llmc-panel-head">
        <h2>{trans.__('Runs')}</h2>
      </header>
      {hasFilters && (
        <div class="llmc-row">
          <input type="search" class="llmc-grow" placeholder={trans.__('Search')} aria-label={trans.__('Search runs')} value={search}
            onInput={event => setSearch(event.currentTarget.value)} />
          <select value={group} aria-label={trans.__('Filter by state')} onChange={event => setGroup(event.currentTarget.value as StateFilter)}>
            {groups.map(([value, text]) => (
              <option key={value} value={value}>{text}</option>
            ))}
          </select>
        </div>
      )}
      <ListNote state={state} retry={() => client.events.retry()} empty={trans.__('There are no runs yet. A %1 cell starts one.', '%%distribute')} />
      {state.items.length > 0 && found.length === 0 && <p class="llmc-note" role="status">{trans.__('No run is like that.')}</p>}
      <ul class="llmc-runs">
        {entries.slice(0, limit).map(entry =>
          'run' in entry ? (
            <RunRow key={entry.run.run_id} client={client} run={entry.run} openers={openers} />
          ) : (
            <SweepRow key={`sweep ${entry.sweep}`} client={client} sweep={entry.sweep} trials={entry.trials} openers={openers}
              isSearched={search.trim() !== ''} />
          )
        )}
      </ul>
      {entries.length > limit && (
        <button type="button" class="llmc-button" onClick={() => setLimit(limit + SHOWN_AT_FIRST)}>
          {trans.__('Show more (%1 left)', entries.length - limit)}
        </button>
      )}
    </section>
  );
}

type SweepRowProps = { client: Client; sweep: string; trials: Run[]; openers: Openers; isSearched: boolean };

/** A sweep: one row, which opens to its trials, and is open where some of them are searched for. */
function SweepRow({ client, sweep, trials, openers, isSearched }: SweepRowProps) {
  const trans = useTrans();
  const [wished, setOpen] = useState<boolean | null>(null);
  const isOpen = wished ?? isSearched;
  const [limit, setLimit] = useState(SHOWN_AT_FIRST);
  const stop = useAction(() => client.rest.stopSweep(sweep));
  const goesOn = trials.some(run => isActive(run.state));
  return (
    <li class="llmc-runrow" data-sweep={sweep}>
      <div class="llmc-row">
        <button type="button" class="llmc-link llmc-opens llmc-grow" aria-expanded={isOpen} onClick={() => setOpen(!isOpen)}>
          <Name class="llmc-run-name" text={sweep} />
        </button>
        <span class="llmc-soft">{trans._n('%1 trial', '%1 trials', trials.length)}</span>
        {goesOn && (
          <button type="button" class="llmc-button" aria-label={trans.__('Stop the sweep %1', sweep)} disabled={stop.isBusy} onClick={() => void stop.run()}>
            {trans.__('Stop')}
          </button>
        )}
      </div>
      <div class="llmc-row llmc-soft">
        <span class="llmc-grow llmc-run-figure">{stateCounts(trials)}</span>
      </div>
      <Problem text={stop.problem} />
      {isOpen && (
        <ul class="llmc-runs llmc-trials" aria-label={trans.__('Trials of %1', sweep)}>
          {trials.slice(0, limit).map(run => (
            <RunRow key={run.run_id} client={client} run={run} openers={openers} />
          ))}
        </ul>
      )}
      {isOpen && trials.length > limit && (
        <button type="button" class="llmc-button" onClick={() => setLimit(limit + SHOWN_AT_FIRST)}>
          {trans.__('Show more (%1 left)', trials.length - limit)}
        </button>
      )}
    </li>
  );
}

function RunRow({ client, run, openers }: { client: Client; run: Run; openers: Openers }) {
  const trans = useTrans();
  const now = useNow(isActive(run.state) ? 1000 : 60_000);
  const stop = useAction(() => client.rest.stopRun(run.run_id));
  const [done, total] = run.progress ?? [null, null];
  const name = run.name || run.run_id;
  return (
    <li class="llmc-runrow" data-run-id={run.run_id} data-state={run.state}>
      <div class="llmc-row">
        {openers.openRun ? (
          <button type="button" class="llmc-link llmc-grow" onClick={() => openers.openRun?.(run.run_id, run.name)}>
            <Name class="llmc-run-name" text={name} />
          </button>
        ) : (
          <Name class="llmc-run-name llmc-grow" text={name} />
        )}
        <StateWord state={run.hang ? trans.__('hangs') : run.state} title={run.hang?.text} />
        {isActive(run.state) && (
          <button type="button" class="llmc-button" aria-label={trans.__('Stop the run %1', name)}
            disabled={stop.isBusy || run.state === 'stopping'} onClick={() => void stop.run()}>
            {run.state === 'stopping' ? trans.__('Stopping …') : trans.__('Stop')}
          </button>
        )}
      </div>
      <div class="llmc-row llmc-soft">
        {isActive(run.state) && typeof done === 'number' && typeof total === 'number' && total > 0 && (
          <progress max={total} value={Math.min(done, total)} aria-label={trans.__('Progress of %1', name)} />
        )}
        {typeof done === 'number' && typeof total === 'number' && total > 0 && <span>{`${done}/${total}`}</span>}
        <span class="llmc-grow llmc-run-figure">{headline(run.metrics ?? {}) || run.phase}</span>
        <span class="llmc-run-took">{formatDuration(Math.max(0, (run.ended ?? now) - run.created))}</span>
      </div>
      <Problem text={stop.problem} />
    </li>
  );
}
