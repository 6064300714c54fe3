// Runs, endpoints, clusters and worlds as tabs of the main area; they are there again when the page is loaded again.
import { ILayoutRestorer, type JupyterFrontEnd, type JupyterFrontEndPlugin } from '@jupyterlab/application';
import { CommandToolbarButton, MainAreaWidget, WidgetTracker } from '@jupyterlab/apputils';
import type { LabIcon } from '@jupyterlab/ui-components';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';
import type { ComponentChild } from 'preact';

import { ComponentWidget } from './component-widget';
import { clusterIcon, endpointIcon, ranksIcon, runIcon } from './icons';
import { type PanelKind, PANELS } from './panels-by-kind';
import { COMMANDS, IPanels, type Panels, tabId } from './tokens';

interface Tab {
  kind: PanelKind;
  command: string;
  icon: LabIcon;
  label: string;
  /** Cells that its toolbar inserts. */
  cells: readonly string[];
}

/** A tab, with what it is opened by. */
class PanelTab extends MainAreaWidget<ComponentWidget> {
  constructor(content: ComponentWidget, readonly panelArgs: ReadonlyPartialJSONObject) {
    super({ content });
  }
}

export const tabsPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-llmcloud:tabs',
  description: 'Opens runs, endpoints, clusters and worlds as tabs.',
  autoStart: true,
  requires: [IPanels],
  optional: [ILayoutRestorer],
  activate: (app: JupyterFrontEnd, panels: Panels, restorer: ILayoutRestorer | null) => {
    const { trans } = panels;
    const tabs: Tab[] = [
      { kind: 'run', command: COMMANDS.openRun, icon: runIcon, label: trans.__('Open Run'), cells: ['attach', 'resume'] },
      { kind: 'endpoint', command: COMMANDS.openEndpoint, icon: endpointIcon, label: trans.__('Open Endpoint'), cells: ['client'] },
      { kind: 'cluster', command: COMMANDS.openCluster, icon: clusterIcon, label: trans.__('Open Cluster'), cells: ['connect'] },
      { kind: 'world', command: COMMANDS.openWorld, icon: ranksIcon, label: trans.__('Open Ranks'), cells: [] }
    ];
    tabs.forEach(tab => addTab(app, panels, restorer, tab));
  }
};

function addTab(app: JupyterFrontEnd, panels: Panels, restorer: ILayoutRestorer | null, tab: Tab): void {
  const { kind, command } = tab;
  const tracker = new WidgetTracker<PanelTab>({ namespace: `llmcloud-${kind}` });
  app.commands.addCommand(command, {
    label: args => (args['name'] ? String(args['name']) : tab.label),
    icon: tab.icon,
    describedBy: { args: { type: 'object', properties: { id: { type: 'string' }, name: { type: 'string' } } } },
    execute: async args => {
      const id = String(args['id'] ?? '');
      const name = String(args['name'] ?? '') || id;
      const widget = tracker.find(known => known.id === tabId(kind, id)) ?? makeTab(app, panels, tab, id, name);
      if (!tracker.has(widget)) {
        await tracker.add(widget);
      }
      if (!widget.isAttached) {
        app.shell.add(widget, 'main', { type: `llmcloud-${kind}` });
      }
      app.shell.activateById(widget.id);
      return widget;
    }
  });
  if (restorer) {
    void restorer.restore(tracker, {
      command,
      args: widget => widget.panelArgs,
      name: widget => widget.id
    });
  }
}

function makeTab(app: JupyterFrontEnd, panels: Panels, tab: Tab, id: string, name: string): PanelTab {
  const { trans, client, openers } = panels;
  const component: ComponentChild = PANELS[tab.kind].show(client, id, name, openers);
  const widget = new PanelTab(new ComponentWidget(component, trans), { id, name });
  widget.id = tabId(tab.kind, id);
  widget.title.label = name;
  widget.title.caption = `${tab.kind} ${name}`;
  widget.title.icon = tab.icon;
  widget.title.closable = true;
  widget.content.addClass('llmc-Tab');
  for (const cell of tab.cells) {
    const args = { cell, id, name };
    widget.toolbar.addItem(cell, new CommandToolbarButton({ commands: app.commands, id: COMMANDS.insertCell, args }));
  }
  return widget;
}
