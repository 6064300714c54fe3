// The item in the status bar: how many runs are alive, and the way to their list.
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { IStatusBar, type Popup, showPopup } from '@jupyterlab/statusbar';
import { Widget } from '@lumino/widgets';
import { h } from 'preact';

import { RunsList } from '../shared/components/runs/runs-list';
import { isActive } from '../shared/format';
import { ComponentWidget } from './component-widget';
import { COMMANDS, IPanels, type Panels } from './tokens';

export const statusBarPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-llmcloud:runs-status',
  description: 'Shows the running runs in the status bar and opens their list.',
  autoStart: true,
  requires: [IPanels, IStatusBar],
  optional: [ICommandPalette],
  activate: (app: JupyterFrontEnd, panels: Panels, statusBar: IStatusBar, palette: ICommandPalette | null) => {
    const { trans } = panels;
    const status = new RunsStatus(panels);
    statusBar.registerStatusItem(statusBarPlugin.id, { item: status, align: 'left', rank: 100 });
    app.commands.addCommand(COMMANDS.showRuns, {
      label: trans.__('Show Runs'),
      caption: trans.__('Open the list of runs over the status bar'),
      describedBy: { args: { type: 'object', properties: {} } },
      // Once the click on a menu is over: the popup closes on clicks that are not its own.
      execute: () => void requestAnimationFrame(() => status.toggleList())
    });
    palette?.addItem({ command: COMMANDS.showRuns, category: 'LLMCloud' });
  }
};

class RunsStatus extends Widget {
  constructor(private readonly _panels: Panels) {
    super({ node: document.createElement('button') });
    this.addClass('llmc-RunsStatus');
    const dot = document.createElement('span');
    dot.className = 'llmc-RunsStatus-dot';
    this.node.append(dot, this._text);
    this.node.addEventListener('click', () => this.toggleList());
    this._leave = _panels.client.runs.follow(() => this._show());
    _panels.serverProblemChanged.connect(this._show, this);
    this._show();
  }

  dispose(): void {
    this._leave();
    this._panels.serverProblemChanged.disconnect(this._show, this);
    this._popup?.dispose();
    super.dispose();
  }

  /** Open the list of runs, or close it. */
  toggleList(): void {
    if (this._popup && !this._popup.isDisposed) {
      this._popup.dispose();
      return;
    }
    const { client, openers, trans } = this._panels;
    const openRun = (runId: string, name: string) => {
      this._popup?.dispose();
      openers.openRun?.(runId, name);
    };
    const body = new ComponentWidget(h(RunsList, { client, openers: { openRun }, hasFilters: false }), trans);
    body.addClass('llmc-RunList');
    body.node.tabIndex = -1;
    body.node.setAttribute('role', 'dialog');
    body.node.setAttribute('aria-label', trans.__('Runs'));
    this._popup = showPopup({ body, anchor: this, align: 'left', hasDynamicSize: true });
    body.node.focus();
    // Wherever the focus is: the list cannot take it before the popup has found its place.
    const closeOnEscape = (event: KeyboardEvent) => {
      if (event.key === 'Escape') {
        this._popup?.dispose();
      }
    };
    document.addEventListener('keydown', closeOnEscape);
    body.disposed.connect(() => document.removeEventListener('keydown', closeOnEscape));
  }

  private _show(): void {
    const { client, trans, serverProblem } = this._panels;
    const { items, isLoaded, problem } = client.runs.value;
    const numActive = items.filter(run => isActive(run.state)).length;
    const count = numActive === 0 ? trans.__('no runs') : trans._n('%1 run', '%1 runs', numActive, numActive);
    this.node.dataset.state = serverProblem || problem ? 'problem' : numActive ? 'live' : 'calm';
    this._text.textContent = serverProblem
      ? trans.__('runs: not enabled')
      : problem
        ? trans.__('runs: no answer')
        : isLoaded
          ? count
          : trans.__('runs');
    this.node.title = serverProblem || problem || trans.__('Runs of jupyter-llmcloud: show the list');
  }

  private _popup: Popup | null = null;
  private readonly _text = document.createElement('span');
  private readonly _leave: () => void;
}
