// The front end of jupyter-llmcloud in JupyterLab: each plugin can be turned off by its id.
import { cellsPlugin } from './panels/plugin-cells';
import { mimeRenderer } from './panels/mime-renderer';
import { notificationsPlugin } from './panels/plugin-notifications';
import { panelsPlugin } from './panels/plugin-panels';
import { sidebarPlugin } from './panels/plugin-sidebar';
import { statusBarPlugin } from './panels/plugin-status-bar';
import { tabsPlugin } from './panels/plugin-tabs';

export default [
  panelsPlugin,
  tabsPlugin,
  sidebarPlugin,
  statusBarPlugin,
  notificationsPlugin,
  cellsPlugin,
  mimeRenderer
];
