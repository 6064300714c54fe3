// The events where no websocket can be opened: the same messages, fetched again and again. It looks like a websocket to
// its user. An answer that is lost on the way is fetched once more.
import { apiUrl, type Connection } from './connection';
import type { EventSocket } from './events';
import type { ClientMessage, Polled } from './types';

const WAIT_S = 10; // that an answer may take while nothing happens: no proxy gives up so soon
const PAUSE_MS = 250; // between two answers, so that a busy run costs few requests
const RETRY_MS = 1000;
const MOST_FAILURES = 3; // one after the other

export class PollingSocket implements EventSocket {
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onclose: (() => void) | null = null;

  constructor(
    private readonly _connection: Connection,
    private readonly _fetch: typeof fetch = (...asked) => fetch(...asked)
  ) {
    void this._run();
  }

  /** Said with the next request; what asks for something does not wait for the present one. */
  send(text: string): void {
    this._unsaid.push(JSON.parse(text) as ClientMessage);
    if (this._unsaid.some(message => message.type !== 'ack')) {
      this._hurry();
    }
  }

  close(): void {
    this._isClosed = true;
    this._hurry();
  }

  private async _run(): Promise<void> {
    let numFailures = 0;
    while (!this._isClosed) {
      try {
        await this._ask();
        numFailures = 0;
        await this._rest(PAUSE_MS);
      } catch (error) {
        if (this._isClosed) return;
        if (error instanceof DOMException && error.name === 'AbortError') continue;
        numFailures += 1;
        if (error instanceof Ended || numFailures >= MOST_FAILURES || !this._session) {
          this._isClosed = true;
          this.onclose?.();
          return;
        }
        await this._rest(RETRY_MS);
      }
    }
  }

  private async _ask(): Promise<void> {
    const said = this._unsaid.length;
    const query = new URLSearchParams({
      session: this._session,
      received: String(this._received),
      messages: JSON.stringify(this._unsaid),
      wait_s: String(WAIT_S)
    });
    this._abort = new AbortController();
    const response = await this._fetch(apiUrl(this._connection.baseUrl, `events/poll?${query}`), {
      headers: this._connection.headers(),
      credentials: 'same-origin',
      cache: 'no-store',
      signal: this._abort.signal
    });
    if (!response.ok) throw response.status >= 500 ? new Error(`status ${response.status}`) : new Ended();
    const { session, number, messages } = (await response.json()) as Polled;
    this._unsaid.splice(0, said);
    this._session = session;
    if (number === this._received) return;
    this._received = number;
    for (const message of messages) {
      if (this._isClosed) return;
      this.onmessage?.({ data: JSON.stringify(message) });
    }
  }

  private async _rest(ms: number): Promise<void> {
    await new Promise<void>(resolve => {
      const timer = window.setTimeout(resolve, ms);
      this._hurry = () => {
        window.clearTimeout(timer);
        resolve();
      };
    });
    this._hurry = () => this._abort.abort();
  }

  private _isClosed = false;
  private _session = '';
  private _received = 0;
  private _abort = new AbortController();
  private _hurry: () => void = () => this._abort.abort();
  private readonly _unsaid: ClientMessage[] = [];
}

/** The server does not know the session, or does not let the page ask. */
class Ended extends Error {}
