// What is known of the runs, kept fresh by a poll that backs off on failures and sleeps while the page is hidden.
import type { ServerConnection } from '@jupyterlab/services';
import { Poll } from '@lumino/polling';
import type { ISignal} from '@lumino/signaling';
import { Signal } from '@lumino/signaling';

import type { Run} from './api';
import { fetchRuns, stopRun, Unavailable } from './api';
import { isActive } from './format';

const CALM_MS = 5_000;
const CLOSE_MS = 1_000;
const LONGEST_MS = 5 * 60_000;
const NUM_LISTED = 20;

/** The runs of this Jupyter server. `changed` fires after each answer, good or bad. */
export class RunsModel {
  constructor(private readonly _settings: ServerConnection.ISettings) {
    this._poll = new Poll({
      name: 'jupyter-llmcloud:runs',
      factory: () => this._fetch(),
      frequency: { interval: CALM_MS, backoff: true, max: LONGEST_MS },
      standby: 'when-hidden'
    });
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** Newest first; only the active ones while nobody watches closely. */
  get runs(): readonly Run[] {
    return this._runs;
  }

  /** How many runs are alive; null before the first answer. */
  get numActive(): number | null {
    return this._loaded ? this._runs.filter(isActive).length : null;
  }

  /** Why the list could not be fetched the last time. */
  get problem(): Unavailable | null {
    return this._problem;
  }

  /** Ask now, whatever the back-off says. */
  refresh(): void {
    void this._poll.refresh();
  }

  /** Poll every second, ended runs included, while a list is open. */
  watchClosely(on: boolean): void {
    this._limit = on ? NUM_LISTED : null;
    const interval = on ? CLOSE_MS : CALM_MS;
    this._poll.frequency = { ...this._poll.frequency, interval };
    this.refresh();
  }

  /** Ask a run to stop; rejects with the reason when it cannot. */
  async stop(runId: string): Promise<void> {
    await stopRun(this._settings, runId);
    this.refresh();
  }

  private async _fetch(): Promise<void> {
    try {
      this._runs = await fetchRuns(this._settings, this._limit);
      this._loaded = true;
      this._problem = null;
    } catch (error) {
      this._problem = error instanceof Unavailable ? error : new Unavailable('failed', String(error));
      throw error;
    } finally {
      this._changed.emit();
    }
  }

  private _runs: Run[] = [];
  private _loaded = false;
  private _problem: Unavailable | null = null;
  private _limit: number | null = null;
  private readonly _poll: Poll;
  private readonly _changed = new Signal<this, void>(this);
}
