// Which runs have ended since they were looked at last. Values in, values out.
import type { Run } from '../shared/api/types';
import { isActive } from '../shared/format';

/** Compares what is told now with what was told before. */
export class EndedRuns {
  /** Runs that were alive the last time and are not any more; none at the first look. */
  look(runs: readonly Run[]): Run[] {
    const ended = runs.filter(run => this._active.has(run.run_id) && !isActive(run.state));
    this._active = new Set(runs.filter(run => isActive(run.state)).map(run => run.run_id));
    return ended;
  }

  private _active = new Set<string>();
}

/** Whether a notebook at `path`, from the root of the server, is the one that holds a run. */
export function isHolder(holder: string, path: string): boolean {
  const slashed = (text: string) => `/${text.replace(/^\/+/, '')}`;
  return holder !== '' && (slashed(path).endsWith(slashed(holder)) || slashed(holder).endsWith(slashed(path)));
}
