// Cells: inserted from a panel, and turned into distributed ones and back.
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette, Notification } from '@jupyterlab/apputils';
import { INotebookTracker, NotebookActions } from '@jupyterlab/notebook';

import { cellSource } from './cell-sources';
import { canDistribute, distributeLine, isDistributed, toggled } from './distribute-cell';
import { distributeIcon } from './icons';
import { COMMANDS, IPanels, type Panels } from './tokens';

export const cellsPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-llmcloud:cells',
  description: 'Inserts cells that use a cluster, run or endpoint, and distributes cells.',
  autoStart: true,
  requires: [IPanels, INotebookTracker],
  optional: [ICommandPalette],
  activate: (app: JupyterFrontEnd, panels: Panels, notebooks: INotebookTracker, palette: ICommandPalette | null) => {
    addInsertCell(app, panels, notebooks);
    addDistributeCell(app, panels, notebooks);
    palette?.addItem({ command: COMMANDS.distributeCell, category: 'LLMCloud' });
  }
};

function addInsertCell(app: JupyterFrontEnd, panels: Panels, notebooks: INotebookTracker): void {
  const { trans } = panels;
  const labels: Record<string, string> = {
    connect: trans.__('Insert Cell: use this cluster'),
    attach: trans.__('Insert Cell: attach'),
    resume: trans.__('Insert Cell: resume'),
    client: trans.__('Insert Cell: Python client')
  };
  app.commands.addCommand(COMMANDS.insertCell, {
    label: args => labels[String(args['cell'])] ?? trans.__('Insert Cell'),
    caption: trans.__('Insert a cell below the active one of the notebook used last'),
    describedBy: {
      args: { type: 'object', properties: { cell: { type: 'string' }, id: { type: 'string' }, name: { type: 'string' } } }
    },
    isEnabled: () => notebooks.currentWidget !== null,
    execute: async args => {
      const panel = notebooks.currentWidget;
      if (!panel) {
        Notification.info(trans.__('Open a notebook first: the cell is inserted into the one used last.'));
        return;
      }
      const id = String(args['id'] ?? '');
      const asked = { cell: String(args['cell'] ?? ''), id, name: String(args['name'] ?? '') || id };
      let source: string;
      try {
        source = await cellSource(panels.client, asked);
      } catch (error) {
        Notification.error(error instanceof Error ? error.message : String(error));
        return;
      }
      NotebookActions.insertBelow(panel.content);
      panel.content.activeCell?.model.sharedModel.setSource(source);
      app.shell.activateById(panel.id);
    }
  });
  notebooks.currentChanged.connect(() => app.commands.notifyCommandChanged(COMMANDS.insertCell));
}

function addDistributeCell(app: JupyterFrontEnd, panels: Panels, notebooks: INotebookTracker): void {
  const { trans } = panels;
  const lines = new WeakMap<object, string>(); // the options that a cell had when it was distributed before
  const cell = () => notebooks.activeCell;
  const source = () => cell()?.model.sharedModel.getSource() ?? '';
  app.commands.addCommand(COMMANDS.distributeCell, {
    label: () => (isDistributed(source()) ? trans.__('Run This Cell Here') : trans.__('Distribute This Cell')),
    caption: trans.__('Turn the cell into a %1 cell, which runs on all ranks, and back', '%%distribute'),
    icon: distributeIcon,
    describedBy: { args: { type: 'object', properties: {} } },
    isVisible: () => cell()?.model.type === 'code',
    isToggled: () => isDistributed(source()),
    isEnabled: () => cell()?.model.type === 'code' && canDistribute(source()),
    execute: () => {
      const model = cell()?.model;
      if (model?.type !== 'code') {
        return;
      }
      const text = model.sharedModel.getSource();
      if (isDistributed(text)) {
        lines.set(model, distributeLine(text));
      }
      model.sharedModel.setSource(toggled(text, lines.get(model) ?? panels.settings.distributeLine));
      app.commands.notifyCommandChanged(COMMANDS.distributeCell);
    }
  });
  notebooks.activeCellChanged.connect(() => app.commands.notifyCommandChanged(COMMANDS.distributeCell));
}
