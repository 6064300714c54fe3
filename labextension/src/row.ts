// One run in the list. The elements stay and only their contents change, so a click never lands on a replaced button.
import type { Run } from './api';
import { element, setText } from './dom';
import { headline, isActive, runDuration } from './format';

export class RunRow {
  readonly node = element('li', 'llmc-Run');

  constructor(runId: string, stop: (runId: string) => Promise<void>) {
    this.node.dataset.runId = runId;
    this._stop.type = 'button';
    this._stop.addEventListener('click', () => void this._ask(runId, stop));
    const first = element('div', 'llmc-Run-line');
    first.append(this._name, this._state, this._stop);
    const second = element('div', 'llmc-Run-line');
    second.append(this._progress, this._steps, this._metric, this._duration);
    this.node.append(first, second, this._error);
  }

  update(run: Run, now: number): void {
    this.node.dataset.state = run.state;
    setText(this._name, run.name || run.run_id);
    this._name.title = `${run.run_id}, ${run.world_size} ${run.world_size === 1 ? 'rank' : 'ranks'}`;
    setText(this._state, run.state);
    setText(this._metric, headline(run.metrics ?? {}));
    setText(this._duration, runDuration(run, now));
    this._updateProgress(run);
    this._stop.hidden = !isActive(run);
    this._stop.disabled = this._asked || run.state === 'stopping';
  }

  private _updateProgress(run: Run): void {
    const [done, total] = run.progress ?? [0, 0];
    this._progress.hidden = !(total > 0);
    this._progress.max = total > 0 ? total : 1;
    this._progress.value = Math.min(done, this._progress.max);
    this._progress.setAttribute('aria-label', `progress of ${run.name}`);
    setText(this._steps, total > 0 ? `${done}/${total}` : done > 0 ? `${done}` : '');
  }

  private async _ask(runId: string, stop: (runId: string) => Promise<void>): Promise<void> {
    this._asked = true;
    this._stop.disabled = true;
    setText(this._error, '');
    try {
      await stop(runId);
    } catch (error) {
      setText(this._error, `Not stopped: ${error instanceof Error ? error.message : String(error)}`);
      this._stop.disabled = false;
    } finally {
      this._asked = false;
    }
  }

  private _asked = false;
  private readonly _name = element('span', 'llmc-Run-name');
  private readonly _state = element('span', 'llmc-Run-state');
  private readonly _stop = element('button', 'llmc-Run-stop', 'Stop');
  private readonly _progress = element('progress', 'llmc-Run-progress');
  private readonly _steps = element('span', 'llmc-Run-steps');
  private readonly _metric = element('span', 'llmc-Run-metric');
  private readonly _duration = element('span', 'llmc-Run-duration');
  private readonly _error = element('div', 'llmc-Run-error');
}
