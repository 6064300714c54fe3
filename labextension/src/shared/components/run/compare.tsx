// A run beside others: their curves in the same charts, and how they differ.
import { useEffect, useState } from 'preact/hooks';

import type { Run, RunDetail } from '../../api/types';
import type { Client } from '../../stores/client';
import { useValue } from '../../stores/observable';
import { NOTHING, type RunState } from '../../stores/watched-run';
import { useTrans } from '../../translation';
import { comparedColor, dashOf } from '../chart/palette';
import type { Compared } from '../chart/charts';
import { differingRows, lineDifference } from './difference';

const MOST = 3; // that one can tell apart

/** The runs with these ids, followed. */
export function useCompared(client: Client | null, ids: readonly string[]): Compared[] {
  const [states, setStates] = useState<Record<string, RunState>>({});
  useEffect(() => {
    if (!client) return;
    const ends = ids.map(id => {
      const run = client.run(id);
      const take = (state: RunState) => setStates(known => ({ ...known, [id]: state }));
      take(run.value);
      return run.follow(take);
    });
    return () => ends.forEach(end => end());
  }, [client, ids.join()]);
  return ids.map(id => {
    const state = states[id] ?? NOTHING;
    return { runId: id, name: state.info?.name ?? id, state };
  });
}

interface CompareWithProps {
  client: Client;
  runId: string;
  chosen: readonly string[];
  onChoose(ids: string[]): void;
}

/** Where one chooses what to compare with. */
export function CompareWith(props: CompareWithProps) {
  const [isOpen, setOpen] = useState(false);
  const trans = useTrans();
  return isOpen ? (
    <Choice {...props} onClose={() => setOpen(false)} />
  ) : (
    <button type="button" class="llmc-mini" onClick={() => setOpen(true)}>
      {trans.__('compare')}
    </button>
  );
}

// The list of runs is asked for only once somebody wants it.
function Choice({ client, runId, chosen, onChoose, onClose }: CompareWithProps & { onClose(): void }) {
  const trans = useTrans();
  const runs = useValue(client.runs);
  const others = runs.items.filter(run => run.run_id !== runId && !chosen.includes(run.run_id));
  const label = (run: Run) => `${run.name} · ${run.state} · ${new Date(run.created * 1000).toLocaleString()}`;
  return (
    <span class="llmc-choice">
      <select
        class="llmc-field llmc-runs"
        aria-label={trans.__('compare with')}
        disabled={chosen.length >= MOST}
        value=""
        onChange={event => onChoose([...chosen, event.currentTarget.value])}
      >
        <option value="">{runs.isLoaded ? trans.__('compare with …') : trans.__('loading …')}</option>
        {others.map(run => (
          <option key={run.run_id} value={run.run_id}>
            {label(run)}
          </option>
        ))}
      </select>
      <button
        type="button"
        class="llmc-mini"
        onClick={() => {
          onChoose([]);
          onClose();
        }}
      >
        {trans.__('end comparison')}
      </button>
    </span>
  );
}

interface ComparisonProps {
  client: Client;
  runId: string;
  name: string;
  state: string;
  others: readonly Compared[];
}

/** The legend of the curves, and in what the runs differ. */
export function Comparison({ client, runId, name, state, others }: ComparisonProps) {
  const trans = useTrans();
  const ids = [runId, ...others.map(other => other.runId)];
  const states = [state, ...others.map(other => other.state.info?.state ?? '')];
  const [details, setDetails] = useState<Record<string, RunDetail>>({});
  const [problem, setProblem] = useState('');
  useEffect(() => {
    let isOld = false;
    setProblem('');
    Promise.all(ids.map(id => client.rest.run(id))).then(
      found => isOld || setDetails(Object.fromEntries(found.map(one => [one.run_id, one]))),
      (error: unknown) => isOld || setProblem(String(error))
    );
    return () => {
      isOld = true;
    };
  }, [ids.join(), states.join()]); // a run that has ended tells more, and another state
  const known = ids.flatMap(id => details[id] ?? []);
  const isKnown = known.length === ids.length;
  const rows = isKnown
    ? [
        ...differingRows(known.map(one => ({ ranks: one.world_size, cluster: one.cluster, state: one.state }))),
        ...differingRows(known.map(one => one.spec ?? {})),
        ...differingRows(known.map(one => one.versions ?? {}))
      ]
    : [];
  const names = [name, ...others.map(other => other.name)];
  return (
    <div class="llmc-comparison">
      <ul class="llmc-legend" aria-label={trans.__('curves')}>
        {names.map((one, at) => (
          <li key={ids[at]}>
            <svg width="28" height="8" aria-hidden="true">
              <line x1="0" x2="28" y1="4" y2="4" style={{ stroke: comparedColor(at), strokeWidth: 2 }} stroke-dasharray={dashOf(at).join(' ')} />
            </svg>{' '}
            {one}
          </li>
        ))}
      </ul>
      <details class="llmc-fold">
        <summary>{trans.__('Differences')}</summary>
        {problem && <p class="llmc-hint">{problem}</p>}
        {isKnown && rows.length === 0 && <p class="llmc-soft">{trans.__('Same settings and same versions.')}</p>}
        {rows.length > 0 && (
          <table class="llmc-table">
            <thead>
              <tr>
                <th scope="col">{trans.__('setting')}</th>
                {names.map((one, at) => (
                  <th scope="col" key={ids[at]}>
                    {one}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {rows.map(row => (
                <tr key={row.name}>
                  <th scope="row">{row.name}</th>
                  {row.values.map((value, at) => (
                    <td key={at}>{value || '–'}</td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        )}
        {isKnown && known.slice(1).map(other => <SourceDifference key={other.run_id} run={known[0] as RunDetail} other={other} />)}
      </details>
    </div>
  );
}

function SourceDifference({ run, other }: { run: RunDetail; other: RunDetail }) {
  const trans = useTrans();
  if ((run.source ?? '') === (other.source ?? '')) {
    return <p class="llmc-soft">{trans.__('%1 has the same source.', other.name)}</p>;
  }
  const signs = { same: ' ', added: '+', removed: '−' };
  return (
    <>
      <p class="llmc-soft">{trans.__('From the source of %1 (−) to that of %2 (+):', other.name, run.name)}</p>
      <pre class="llmc-diff">
        {lineDifference(other.source ?? '', run.source ?? '').map((line, at) => (
          <div key={at} data-kind={line.kind}>
            {signs[line.kind]} {line.text}
          </div>
        ))}
      </pre>
    </>
  );
}
