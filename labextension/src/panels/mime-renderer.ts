// What shows a panel in the output of a cell: by the id in the output, from the server. So it is there again after a
// reload, in a second browser, after a restart of the kernel, and lives on without one. Where the server does not know
// the id, the other forms in the same output are shown: the widget while its kernel has it, else the static HTML.
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { ServerConnection } from '@jupyterlab/services';
import { PanelLayout, Widget } from '@lumino/widgets';

import { type Client, clientOf } from '../shared/stores/client';
import { serverConnection } from './connection';
import { PANELS, type PanelKind } from './panels-by-kind';
import { ComponentWidget } from './component-widget';

export const PANEL_MIME = 'application/vnd.jupyter-llmcloud.panel+json';
const WIDGET_MIME = 'application/vnd.jupyter.widget-view+json';
const RANK = -20; // before the widgets, which have -10
const PATIENCE_MS = 2500; // a widget that is there is shown by then

interface PanelData {
  kind: PanelKind;
  id: string;
  name: string;
  version: number;
}

/** The renderer of one output. */
class PanelRenderer extends Widget implements IRenderMime.IRenderer {
  constructor(
    private readonly _client: Client,
    private readonly _registry: IRenderMimeRegistry,
    private readonly _trans: IRenderMime.TranslationBundle
  ) {
    super();
    this.addClass('llmc-PanelOutput');
    this.addClass('llmc-in-cell');
    this.layout = new PanelLayout();
  }

  async renderModel(model: IRenderMime.IMimeModel): Promise<void> {
    const data = model.data[PANEL_MIME] as unknown as PanelData;
    const key = `${data.kind} ${data.id}`;
    if (this._shown === key) {
      return; // the panel follows by itself
    }
    const turn = ++this._turn;
    const panel = PANELS[data.kind];
    const isKnown = panel && data.version === 1 && (await panel.isKnown(this._client, data.id));
    if (turn !== this._turn || this.isDisposed) {
      return;
    }
    if (isKnown) {
      this._shown = key;
      this._put(new ComponentWidget(panel.show(this._client, data.id, data.name), this._trans));
    } else {
      await this._showOtherForm(model);
    }
  }

  private async _showOtherForm(model: IRenderMime.IMimeModel): Promise<void> {
    this._shown = '';
    const turn = this._turn;
    if (WIDGET_MIME in model.data && this._registry.mimeTypes.includes(WIDGET_MIME)) {
      const widget = this._registry.createRenderer(WIDGET_MIME);
      this._put(widget);
      void widget.renderModel(model).catch(() => undefined);
      await new Promise(resolve => window.setTimeout(resolve, PATIENCE_MS));
      if (turn !== this._turn || this.isDisposed || widget.node.querySelector('.llmc-card')) {
        return;
      }
    }
    const form = ['text/html', 'text/plain'].find(type => type in model.data);
    if (form) {
      const renderer = this._registry.createRenderer(form);
      this._put(renderer);
      await renderer.renderModel(model);
    }
  }

  private _put(widget: Widget): void {
    const layout = this.layout as PanelLayout;
    for (const before of [...layout.widgets]) {
      before.dispose();
    }
    layout.addWidget(widget);
  }

  private _shown = '';
  private _turn = 0;
}

/** Shows panels in outputs. */
export const mimeRenderer: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-llmcloud:panel-outputs',
  description: 'Shows the panels of runs, clusters, worlds and endpoints in the outputs of cells.',
  autoStart: true,
  requires: [IRenderMimeRegistry],
  optional: [INotebookTracker, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    rendermime: IRenderMimeRegistry,
    notebooks: INotebookTracker | null,
    translator: ITranslator | null
  ) => {
    const settings: ServerConnection.ISettings = app.serviceManager.serverSettings;
    const trans = (translator ?? nullTranslator).load('jupyter_llmcloud');
    // Each notebook has a registry of its own, and the widgets of its kernel are known to that one only.
    const add = (registry: IRenderMimeRegistry) =>
      registry.addFactory(
        {
          safe: true,
          mimeTypes: [PANEL_MIME],
          defaultRank: RANK,
          createRenderer: () => new PanelRenderer(clientOf(serverConnection(settings)), registry, trans)
        },
        RANK
      );
    add(rendermime);
    notebooks?.forEach(panel => add(panel.content.rendermime));
    notebooks?.widgetAdded.connect((_, panel) => add(panel.content.rendermime));
  }
};
