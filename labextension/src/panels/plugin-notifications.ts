// A notification when a run has ended, or hangs, while its notebook is not in view.
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import { INotebookTracker } from '@jupyterlab/notebook';

import type { Run } from '../shared/api/types';
import { formatDuration } from '../shared/format';
import { EndedRuns, HangingRuns, isHolder } from './ended-runs';
import { IPanels, type Panels, tabId } from './tokens';

const GOOD_FOR_MS = 8000; // a run that has gone well; of others the message stays

export const notificationsPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-llmcloud:notifications',
  description: 'Tells when a run has ended, or hangs, while its notebook is not in view.',
  autoStart: true,
  requires: [IPanels],
  optional: [INotebookTracker],
  activate: (app: JupyterFrontEnd, panels: Panels, notebooks: INotebookTracker | null) => {
    const { client, trans, openers } = panels;
    const ended = new EndedRuns();
    const hanging = new HangingRuns();
    const isInView = (run: Run) =>
      [...app.shell.widgets('main')].some(tab => tab.isVisible && tab.id === tabId('run', run.run_id)) ||
      notebooks?.find(panel => panel.isVisible && isHolder(run.holder ?? '', panel.context.path)) !== undefined;
    const tell = (run: Run, text: string, kind: 'success' | 'info' | 'error' | 'warning') => {
      const wanted = panels.settings.notifications;
      if (wanted === 'none' || (wanted === 'problems' && (kind === 'success' || kind === 'info')) || isInView(run)) {
        return;
      }
      Notification.emit(text, kind, {
        autoClose: kind === 'success' || kind === 'info' ? GOOD_FOR_MS : false,
        actions: [{ label: trans.__('Show it'), callback: () => openers.openRun?.(run.run_id, run.name) }]
      });
    };
    client.runs.follow(({ items }) => {
      for (const run of ended.look(items)) {
        const duration = formatDuration(Math.max(0, (run.ended ?? run.created) - run.created));
        const kind = { finished: 'success', stopped: 'info' }[run.state] as 'success' | 'info' | undefined;
        tell(run, trans.__('The run %1 has %2 after %3.', run.name, wordOf(run.state), duration), kind ?? 'error');
      }
      for (const run of hanging.look(items)) {
        tell(run, trans.__('The run %1 does not go on: %2', run.name, run.hang?.text.trim().split('\n')[0] ?? ''), 'warning');
      }
    });
    panels.serverProblemChanged.connect((_sender, problem) => {
      if (problem) {
        Notification.warning(problem, { autoClose: false });
      }
    });
  }
};

function wordOf(state: string): string {
  return { stopped: 'been stopped', lost: 'been lost' }[state] ?? state;
}
