// Which runs a list shows, and what it says of each. Values in, values out.
import type { Run } from '../../api/types';
import { formatNumber, isActive } from '../../format';

export type StateFilter = 'all' | 'active' | 'finished' | 'failed';

/** Runs in a group of states whose name, id, cluster or holder holds each word of `search`; newest first. */
export function filterRuns(runs: readonly Run[], search: string, state: StateFilter): Run[] {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  return runs
    .filter(run => isInGroup(run.state, state) && words.every(word => textOf(run).includes(word)))
    .sort((one, other) => other.created - one.created || one.run_id.localeCompare(other.run_id));
}

function textOf(run: Run): string {
  return `${run.name} ${run.run_id} ${run.state} ${run.cluster} ${run.holder ?? ''}`.toLowerCase();
}

function isInGroup(state: string, group: StateFilter): boolean {
  switch (group) {
    case 'active':
      return isActive(state);
    case 'finished':
      return state === 'finished';
    case 'failed':
      return ['failed', 'lost', 'stopped'].includes(state);
    default:
      return true;
  }
}

/**
 * The number a person looks at first: the training loss, else any loss, else the first metric there is.
 * JSON has no NaN and no infinity: such a value is null.
 */
export function headline(metrics: Readonly<Record<string, number | null>>): string {
  const names = Object.keys(metrics);
  const name =
    ['loss', 'train_loss', 'train/loss'].find(known => names.includes(known)) ??
    names.find(other => other.includes('loss')) ??
    names[0];
  return name === undefined ? '' : `${name} ${formatNumber(metrics[name])}`;
}

/** What a list has a row for: a run, or a sweep with those of its trials that are in the list. */
export type Entry = { run: Run } | { sweep: string; trials: Run[] };

/** The trials of a sweep become one entry, in the place of the newest of them. */
export function entriesOf(runs: readonly Run[]): Entry[] {
  const entries: Entry[] = [];
  const sweeps = new Map<string, Run[]>();
  for (const run of runs) {
    const known = run.sweep ? sweeps.get(run.sweep) : undefined;
    if (known) {
      known.push(run);
    } else if (run.sweep) {
      const trials = [run];
      sweeps.set(run.sweep, trials);
      entries.push({ sweep: run.sweep, trials });
    } else {
      entries.push({ run });
    }
  }
  return entries;
}

/** How many runs there are in each state, the most frequent first: `12 finished, 2 running`. */
export function stateCounts(runs: readonly Run[]): string {
  const counts = new Map<string, number>();
  runs.forEach(run => counts.set(run.state, (counts.get(run.state) ?? 0) + 1));
  return [...counts]
    .sort(([, one], [, other]) => other - one)
    .map(([state, count]) => `${count} ${state}`)
    .join(', ');
}
