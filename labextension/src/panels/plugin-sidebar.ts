// The sidebar: clusters, runs, endpoints.
import { ILayoutRestorer, type JupyterFrontEnd, type JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { IMainMenu } from '@jupyterlab/mainmenu';
import { SidePanel } from '@jupyterlab/ui-components';
import { type ComponentChild, h } from 'preact';

import { ClusterPanel } from '../shared/components/clusters/cluster-panel';
import { EndpointPanel } from '../shared/components/endpoints/endpoint-panel';
import { RunsList } from '../shared/components/runs/runs-list';
import { ComponentWidget } from './component-widget';
import { cloudIcon } from './icons';
import { ServerProblem } from './server-problem';
import { COMMANDS, IPanels, type Panels } from './tokens';

const SIDEBAR_ID = 'llmcloud-sidebar';

export const sidebarPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-llmcloud:sidebar',
  description: 'The sidebar with clusters, runs and endpoints.',
  autoStart: true,
  requires: [IPanels],
  optional: [ILayoutRestorer, ICommandPalette, IMainMenu, ILauncher],
  activate: (
    app: JupyterFrontEnd,
    panels: Panels,
    restorer: ILayoutRestorer | null,
    palette: ICommandPalette | null,
    menu: IMainMenu | null,
    launcher: ILauncher | null
  ) => {
    const { trans } = panels;
    const sidebar = makeSidebar(panels);
    app.shell.add(sidebar, 'left', { rank: 350, type: 'LLMCloud' });
    restorer?.add(sidebar, SIDEBAR_ID);
    const category = 'LLMCloud';
    app.commands.addCommand(COMMANDS.openPanel, {
      label: args => (args['isLauncher'] ? trans.__('Clusters and Runs') : trans.__('Clusters, Runs and Endpoints')),
      caption: trans.__('Show the clusters, runs and endpoints of this Jupyter server'),
      icon: cloudIcon,
      describedBy: { args: { type: 'object', properties: { isLauncher: { type: 'boolean' } } } },
      execute: () => app.shell.activateById(SIDEBAR_ID)
    });
    palette?.addItem({ command: COMMANDS.openPanel, category });
    menu?.viewMenu.addGroup([{ command: COMMANDS.openPanel }], 20);
    launcher?.add({ command: COMMANDS.openPanel, args: { isLauncher: true }, category: trans.__('Other'), rank: 20 });
  }
};

function makeSidebar(panels: Panels): SidePanel {
  const { trans, client, openers } = panels;
  const sidebar = new SidePanel();
  sidebar.id = SIDEBAR_ID;
  sidebar.addClass('llmc-Sidebar');
  sidebar.title.icon = cloudIcon;
  sidebar.title.caption = trans.__('Clusters, runs and endpoints');
  sidebar.header.addWidget(new ComponentWidget(h(ServerProblem, { panels }), trans));
  const sections: [string, ComponentChild][] = [
    [trans.__('Clusters'), h(ClusterPanel, { client, openers })],
    [trans.__('Runs'), h(RunsList, { client, openers })],
    [trans.__('Endpoints'), h(EndpointPanel, { client, openers })]
  ];
  for (const [title, component] of sections) {
    const section = new ComponentWidget(component, trans);
    section.title.label = title;
    sidebar.addWidget(section);
  }
  return sidebar;
}
