// The plugin on which the others stand: the client of this page, texts, settings, and what opens what.
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { clientOf } from '../shared/stores/client';
import { serverConnection } from './connection';
import { ServerCheck } from './server-check';
import { COMMANDS, IPanels, type Panels, type PanelSettings } from './tokens';

const ID = 'jupyter-llmcloud:panels';
const DEFAULTS: PanelSettings = { notifications: 'all', distributeLine: '%%distribute' };

export const panelsPlugin: JupyterFrontEndPlugin<Panels> = {
  id: ID,
  description: 'The client, texts and settings that the panels of jupyter-llmcloud share.',
  autoStart: true,
  provides: IPanels,
  optional: [ISettingRegistry, ITranslator],
  activate: (app: JupyterFrontEnd, registry: ISettingRegistry | null, translator: ITranslator | null): Panels => {
    const client = clientOf(serverConnection(app.serviceManager.serverSettings));
    const trans = (translator ?? nullTranslator).load('jupyter_llmcloud');
    const check = new ServerCheck(client, trans);
    const { commands } = app;
    let settings = DEFAULTS;
    registry
      ?.load(ID)
      .then(found => {
        const read = () => {
          settings = { ...DEFAULTS, ...(found.composite as Partial<PanelSettings>) };
        };
        found.changed.connect(read);
        read();
      })
      .catch((error: unknown) => console.error('The settings of jupyter-llmcloud could not be read.', error));
    return {
      client,
      trans,
      openers: {
        openRun: (runId, name) => void commands.execute(COMMANDS.openRun, { id: runId, name }),
        openEndpoint: name => void commands.execute(COMMANDS.openEndpoint, { id: name, name }),
        openCluster: name => void commands.execute(COMMANDS.openCluster, { id: name, name }),
        openWorld: (worldId, holder) =>
          void commands.execute(COMMANDS.openWorld, { id: worldId, name: trans.__('Ranks of %1', holder) })
      },
      get serverProblem() {
        return check.problem;
      },
      serverProblemChanged: check.changed,
      get settings() {
        return settings;
      }
    };
  }
};
