// A run as its kernel tells it through the traits of a widget: for front ends whose page has no Jupyter server that
// could be asked.
import type { RunInfo, SeriesTail } from '../shared/api/types';
import { isActive } from '../shared/format';
import { Observable } from '../shared/stores/observable';
import { NOTHING, type RunState, withTails } from '../shared/stores/watched-run';
import type { Model } from './host';

const GONE = 'The kernel of this cell has gone; the run goes on without it. %runs attach NAME shows all of it.';

/** What the model tells. */
export class KernelRun extends Observable<RunState> {
  constructor(private readonly _model: Model) {
    super(NOTHING);
    this._take();
  }

  protected wake(): void {
    for (const trait of ['info', 'series']) {
      this._model.on(`change:${trait}`, this._take);
    }
    this._model.on('comm_live_update', this._lose); // the front end has lost its kernel
  }

  protected rest(): void {
    for (const trait of ['info', 'series']) {
      this._model.off(`change:${trait}`, this._take);
    }
    this._model.off('comm_live_update', this._lose);
  }

  private readonly _take = (): void => {
    const info = this._model.get('info') as RunInfo;
    if (!info.run_id) return; // the run has ended, and its widget is emptied: what is shown stays
    this.set({ ...this.value, info, series: withTails(new Map(), this._model.get('series') as SeriesTail[]) });
  };

  private readonly _lose = (): void => {
    const info = this.value.info;
    if (info && isActive(info.state)) {
      this.set({ ...this.value, problem: GONE.replace('NAME', info.name) });
    }
  };
}
