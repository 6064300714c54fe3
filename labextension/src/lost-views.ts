// After a page was loaded again, the live views of running cells cannot be had any more: their kernels are busy and do
// not answer. In their place: the static form of the run, as the server has it now, and how to follow it.
import type { JupyterFrontEnd } from '@jupyterlab/application';
import { Sanitizer } from '@jupyterlab/apputils';
import type { ServerConnection } from '@jupyterlab/services';

import { fetchView, type View } from './api';
import { element } from './dom';
import { isActive } from './format';

const RUN_MIME = 'application/vnd.jupyter-llmcloud.run+json';
const LOST = /^(Loading widget|Error displaying widget)/; // what the widget manager writes where it has no widget
const PATIENCE_MS = 2500; // a widget that is there is shown by then
const LOOK_AGAIN_MS = 500;
const REFRESH_MS = 5000;

// What is used of a notebook; of whatever else has cells and outputs, too.
interface OutputArea {
  node: HTMLElement;
  widgets: readonly { node: HTMLElement }[];
  model: { get(index: number): { data: Record<string, unknown> } };
}
interface Panel {
  content?: { widgets?: readonly { outputArea?: OutputArea }[] };
}

/** Watches the outputs of all notebooks of a JupyterLab. */
export class LostViews {
  constructor(
    private readonly _app: JupyterFrontEnd,
    private readonly _settings: ServerConnection.ISettings
  ) {
    const observer = new MutationObserver(() => this._lookSoon());
    observer.observe(_app.shell.node, { childList: true, subtree: true });
    this._lookSoon();
  }

  private _lookSoon(): void {
    if (this._timer === null) {
      this._timer = window.setTimeout(() => {
        this._timer = null;
        this._look();
      }, LOOK_AGAIN_MS);
    }
  }

  private _look(): void {
    const lost = [...this._app.shell.node.querySelectorAll<HTMLElement>('.jp-OutputArea-output')];
    for (const node of lost.filter(isLost)) {
      const since = this._since.get(node) ?? Date.now();
      this._since.set(node, since);
      if (Date.now() - since < PATIENCE_MS) {
        this._lookSoon();
      } else if (!this._replaced.has(node)) {
        this._replaced.add(node);
        void this._replace(node);
      }
    }
  }

  private async _replace(node: HTMLElement): Promise<void> {
    const run = this._runOf(node);
    if (!run) {
      return;
    }
    const place = element('div', 'llmc-LostView jp-RenderedHTMLCommon');
    while (node.isConnected && isLost(node)) {
      const view = await fetchView(this._settings, run.run_id).catch(() => null);
      if (view) {
        show(place, view);
        node.classList.add('llmc-mod-lost');
        node.after(place);
      }
      if (view && !isActive(view)) {
        return;
      }
      await new Promise(resolve => window.setTimeout(resolve, REFRESH_MS));
    }
    node.classList.remove('llmc-mod-lost'); // the widget has come after all, or another output
    place.remove();
    this._replaced.delete(node);
  }

  private _runOf(node: HTMLElement): { run_id: string } | null {
    for (const panel of this._app.shell.widgets('main')) {
      for (const cell of (panel as Panel).content?.widgets ?? []) {
        const area = cell.outputArea;
        const index = area?.widgets.findIndex(output => output.node.contains(node)) ?? -1;
        if (area && index >= 0) {
          return (area.model.get(index).data[RUN_MIME] as { run_id: string } | undefined) ?? null;
        }
      }
    }
    return null;
  }

  private _timer: number | null = null;
  private readonly _since = new WeakMap<HTMLElement, number>();
  private readonly _replaced = new WeakSet<HTMLElement>();
}

function isLost(node: HTMLElement): boolean {
  return node.childElementCount === 0 && LOST.test(node.textContent ?? '');
}

function show(place: HTMLElement, view: View): void {
  const hint = isActive(view)
    ? 'This page was loaded again while the run goes on: '
    : 'This page was loaded again while the run went on. Its output: ';
  const command = element('code', '', `%runs attach ${view.name}`);
  const line = element('p', 'llmc-LostView-hint', hint);
  line.append(command, isActive(view) ? ' in another notebook shows it live.' : '');
  const form = element('div', '');
  // eslint-disable-next-line no-restricted-properties
  form.innerHTML = new Sanitizer().sanitize(view.html); // escaped by the server, too
  place.replaceChildren(line, form);
}
