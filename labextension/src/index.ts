// The front end of jupyter-llmcloud in JupyterLab: the runs in the status bar, and the panels in the outputs of cells.
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { IStatusBar } from '@jupyterlab/statusbar';

import { mimeRenderer } from './panels/mime-renderer';
import { RunsModel } from './runs';
import { RunsStatus } from './status';

const SHOW_RUNS = 'llmcloud:show-runs';

const runsStatus: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-llmcloud:runs-status',
  description: 'Shows the running runs in the status bar and opens their list.',
  autoStart: true,
  requires: [IStatusBar],
  optional: [ICommandPalette],
  activate: (app: JupyterFrontEnd, statusBar: IStatusBar, palette: ICommandPalette | null) => {
    const status = new RunsStatus(new RunsModel(app.serviceManager.serverSettings));
    statusBar.registerStatusItem(runsStatus.id, { item: status, align: 'left', rank: 100 });
    app.commands.addCommand(SHOW_RUNS, {
      label: 'Show Runs',
      caption: 'Open the list of runs over the status bar',
      // Once the click on a menu is over: the popup closes on clicks that are not its own.
      execute: () => void requestAnimationFrame(() => status.toggleList())
    });
    palette?.addItem({ command: SHOW_RUNS, category: 'LLMCloud' });
  }
};

export default [runsStatus, mimeRenderer];
