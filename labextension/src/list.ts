// The list of runs that opens over the status bar.
import type { Message } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';

import { element, setText } from './dom';
import { RunRow } from './row';
import type { RunsModel } from './runs';

export class RunList extends Widget {
  constructor(private readonly _model: RunsModel) {
    super();
    this.addClass('llmc-RunList');
    this.node.tabIndex = -1;
    this.node.setAttribute('role', 'dialog');
    this.node.setAttribute('aria-label', 'Runs');
    this._again.type = 'button';
    this._again.addEventListener('click', () => this._model.refresh());
    this.node.append(element('div', 'llmc-RunList-title', 'Runs'), this._note, this._again, this._rowsNode);
  }

  protected onAfterAttach(message: Message): void {
    super.onAfterAttach(message);
    this._model.changed.connect(this._show, this);
    this._model.watchClosely(true);
    this._show();
    this.node.focus();
  }

  protected onBeforeDetach(message: Message): void {
    this._model.changed.disconnect(this._show, this);
    this._model.watchClosely(false);
    super.onBeforeDetach(message);
  }

  private _show(): void {
    const problem = this._model.problem;
    const isEmpty = this._model.numActive !== null && this._model.runs.length === 0;
    const hint = isEmpty ? 'There are no runs yet. A %%distribute cell starts one.' : '';
    setText(this._note, problem?.message ?? hint);
    this._note.classList.toggle('llmc-mod-problem', problem !== null);
    this._again.hidden = problem === null;
    this._showRows();
  }

  private _showRows(): void {
    const now = Date.now() / 1000;
    const ids = this._model.runs.map(run => run.run_id);
    for (const [id, row] of this._rows) {
      if (!ids.includes(id)) {
        row.node.remove();
        this._rows.delete(id);
      }
    }
    this._model.runs.forEach((run, index) => {
      const row = this._rows.get(run.run_id) ?? this._addRow(run.run_id);
      row.update(run, now);
      if (this._rowsNode.children[index] !== row.node) {
        this._rowsNode.insertBefore(row.node, this._rowsNode.children[index] ?? null);
      }
    });
  }

  private _addRow(runId: string): RunRow {
    const row = new RunRow(runId, id => this._model.stop(id));
    this._rows.set(runId, row);
    return row;
  }

  private readonly _rows = new Map<string, RunRow>();
  private readonly _note = element('p', 'llmc-RunList-note');
  private readonly _again = element('button', 'llmc-RunList-again', 'Try again');
  private readonly _rowsNode = element('ul', 'llmc-RunList-rows');
}
