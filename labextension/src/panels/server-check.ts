// Whether the server extension is there, and of this version: looked at when the page opens, and whenever the
// connection to the server has been made again or is lost.
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import { type ISignal, Signal } from '@lumino/signaling';

import { Unavailable } from '../shared/api/rest';
import type { Client } from '../shared/stores/client';
import { VERSION } from '../version';

export class ServerCheck {
  constructor(
    private readonly _client: Client,
    private readonly _trans: IRenderMime.TranslationBundle
  ) {
    _client.events.onState(state => {
      if (state === 'open' || state === 'cut') {
        void this.look();
      }
    });
    void this.look();
  }

  get problem(): string {
    return this._problem;
  }

  get changed(): ISignal<this, string> {
    return this._changed;
  }

  /** Ask the server what it is. One that does not answer now keeps what was known of it. */
  async look(): Promise<void> {
    try {
      const { version } = await this._client.rest.get<{ version: string }>('status');
      this._set(version === VERSION ? '' : this._mismatch(version));
    } catch (error) {
      if (error instanceof Unavailable && error.kind !== 'unreachable') {
        this._set(error.message);
      }
    }
  }

  private _mismatch(version: string): string {
    return this._trans.__(
      'The server extension jupyter_llmcloud is version %1, and this page is of version %2. Restart the Jupyter server, then load this page again.',
      version,
      VERSION
    );
  }

  private _set(problem: string): void {
    if (problem !== this._problem) {
      this._problem = problem;
      this._changed.emit(problem);
    }
  }

  private _problem = '';
  private readonly _changed = new Signal<this, string>(this);
}
