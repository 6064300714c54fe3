// Which runs have ended, or hang, since they were looked at last. Values in, values out.
import type { Run } from '../shared/api/types';
import { isActive } from '../shared/format';

/** Compares what is told now with what was told before. */
export class EndedRuns {
  /** Runs that were alive the last time and are not any more; none at the first look, and no trials: a sweep has many. */
  look(runs: readonly Run[]): Run[] {
    const ended = runs.filter(run => this._active.has(run.run_id) && !isActive(run.state) && !run.sweep);
    this._active = new Set(runs.filter(run => isActive(run.state)).map(run => run.run_id));
    return ended;
  }

  private _active = new Set<string>();
}

/** Compares which runs hang now with which did before. */
export class HangingRuns {
  /** Runs that go on and hang, and were not known to. */
  look(runs: readonly Run[]): Run[] {
    const hanging = runs.filter(run => run.hang && isActive(run.state));
    const fresh = hanging.filter(run => !this._known.has(run.run_id));
    this._known = new Set(hanging.map(run => run.run_id));
    return fresh;
  }

  private _known = new Set<string>();
}

/** Whether a notebook at `path`, from the root of the server, is the one that holds a run. */
export function isHolder(holder: string, path: string): boolean {
  const slashed = (text: string) => `/${text.replace(/^\/+/, '')}`;
  return holder !== '' && (slashed(path).endsWith(slashed(holder)) || slashed(holder).endsWith(slashed(path)));
}
