// The item in the status bar: how many runs are alive, and the way to their list.
import type { Popup} from '@jupyterlab/statusbar';
import { showPopup } from '@jupyterlab/statusbar';
import { Widget } from '@lumino/widgets';

import { element, setText } from './dom';
import { countText } from './format';
import { RunList } from './list';
import type { RunsModel } from './runs';

export class RunsStatus extends Widget {
  constructor(private readonly _model: RunsModel) {
    super({ node: element('button', '') });
    this.addClass('llmc-RunsStatus');
    this.node.append(element('span', 'llmc-RunsStatus-dot'), this._text);
    this.node.addEventListener('click', () => this.toggleList());
    this._model.changed.connect(this._show, this);
    this._show();
  }

  dispose(): void {
    this._model.changed.disconnect(this._show, this);
    this._popup?.dispose();
    super.dispose();
  }

  /** Open the list of runs, or close it. */
  toggleList(): void {
    if (this._popup && !this._popup.isDisposed) {
      this._popup.dispose();
      return;
    }
    const body = new RunList(this._model);
    this._popup = showPopup({ body, anchor: this, align: 'left', hasDynamicSize: true });
  }

  private _show(): void {
    const problem = this._model.problem;
    const numActive = this._model.numActive;
    const isMissing = problem?.kind === 'missing';
    this.node.dataset.state = problem ? 'problem' : numActive ? 'live' : 'calm';
    const count = numActive === null ? 'runs' : countText(numActive);
    setText(this._text, isMissing ? 'runs: not enabled' : problem ? 'runs: no answer' : count);
    this.node.title = problem?.message ?? 'Runs of jupyter-llmcloud: show the list';
  }

  private _popup: Popup | null = null;
  private readonly _text = element('span', 'llmc-RunsStatus-text');
}
