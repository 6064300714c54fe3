// What the plugins of the panels hand to each other.
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import { Token } from '@lumino/coreutils';
import type { ISignal } from '@lumino/signaling';

import type { Openers } from '../shared/components/clusters/cluster-panel';
import type { Client } from '../shared/stores/client';

/** The commands of the panels. */
export const COMMANDS = {
  openPanel: 'llmcloud:open-panel',
  openRun: 'llmcloud:open-run',
  openEndpoint: 'llmcloud:open-endpoint',
  openCluster: 'llmcloud:open-cluster',
  openWorld: 'llmcloud:open-world',
  showRuns: 'llmcloud:show-runs',
  newCluster: 'llmcloud:new-cluster',
  insertCell: 'llmcloud:insert-cell',
  distributeCell: 'llmcloud:distribute-cell'
} as const;

/** The id of the tab that shows something. */
export const tabId = (kind: string, id: string) => `llmcloud-${kind}-${encodeURIComponent(id)}`;

/** The settings of a user; see schema/panels.json. */
export interface PanelSettings {
  readonly notifications: 'all' | 'problems' | 'none';
  readonly distributeLine: string;
}

/** What all plugins of the panels share. */
export interface Panels {
  readonly client: Client;
  readonly trans: IRenderMime.TranslationBundle;
  /** What opens what the panels name, as tabs. */
  readonly openers: Openers;
  /** Why nothing can be shown: the server extension is missing, or of another version. Empty when all is well. */
  readonly serverProblem: string;
  readonly serverProblemChanged: ISignal<unknown, string>;
  readonly settings: PanelSettings;
}

export const IPanels = new Token<Panels>('jupyter-llmcloud:IPanels', 'What the panels of jupyter-llmcloud share.');
