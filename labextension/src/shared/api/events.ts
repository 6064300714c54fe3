// The websocket of events: one for all stores of a page. It goes on from where it was after a cut, waits longer after
// each failure, and rests while the page is hidden or nobody listens.
import { apiUrl, type Connection } from './connection';
import type { ClientMessage, ServerMessage, Topic } from './types';

export type LinkState = 'idle' | 'connecting' | 'open' | 'cut';
type TopicMessage = Extract<ServerMessage, { topic: Topic }>;
type RunMessage = Extract<ServerMessage, { run_id: string }>;

const FIRST_RETRY_MS = 500;
const LONGEST_RETRY_MS = 30_000;
const REST_AFTER_MS = 5_000; // hidden, or without listeners, for so long

interface Watch {
  points: number;
  listeners: Set<(message: RunMessage) => void>;
}

/** What of the browser is used; tests give their own. */
export interface Surroundings {
  openSocket(url: string): WebSocket;
  page: Document;
  nextFrame(callback: () => void): void;
}

const BROWSER: Surroundings = {
  openSocket: url => new WebSocket(url),
  page: document,
  nextFrame: callback => void requestAnimationFrame(callback)
};

export class Events {
  constructor(
    private readonly _connection: Connection,
    private readonly _around: Surroundings = BROWSER
  ) {
    this._around.page.addEventListener('visibilitychange', () => this._consider());
  }

  get state(): LinkState {
    return this._state;
  }

  /** Be told of changes of `state`. */
  onState(listener: (state: LinkState) => void): () => void {
    this._stateListeners.add(listener);
    return () => this._stateListeners.delete(listener);
  }

  /** Follow a topic until the returned function is called. */
  subscribe(topic: Topic, listener: (message: TopicMessage) => void): () => void {
    const listeners = this._topics.get(topic) ?? new Set();
    this._topics.set(topic, listeners.add(listener));
    if (listeners.size === 1) {
      this._cursors.delete(topic);
      this._send({ type: 'subscribe', topics: [topic], epoch: '', cursor: 0 });
    }
    this._consider();
    return () => {
      listeners.delete(listener);
      if (!listeners.size && this._topics.get(topic) === listeners) {
        this._topics.delete(topic);
        this._send({ type: 'unsubscribe', topics: [topic] });
        this._consider();
      }
    };
  }

  /** Follow a run until the returned function is called. All listeners of a run see the same number of points. */
  watch(runId: string, points: number, listener: (message: RunMessage) => void): () => void {
    const watch = this._watches.get(runId) ?? { points, listeners: new Set() };
    this._watches.set(runId, watch);
    watch.listeners.add(listener);
    if (watch.listeners.size === 1) {
      this._send({ type: 'watch', run_id: runId, points: watch.points });
    }
    this._consider();
    return () => {
      watch.listeners.delete(listener);
      if (!watch.listeners.size && this._watches.get(runId) === watch) {
        this._watches.delete(runId);
        this._send({ type: 'unwatch', run_id: runId });
        this._consider();
      }
    };
  }

  /** Try now, whatever the back-off says. */
  retry(): void {
    if (this._state === 'cut') {
      this._retryMs = FIRST_RETRY_MS;
      window.clearTimeout(this._retryTimer);
      this._open();
    }
  }

  private get _isWanted(): boolean {
    return (this._topics.size > 0 || this._watches.size > 0) && this._around.page.visibilityState !== 'hidden';
  }

  private _consider(): void {
    window.clearTimeout(this._restTimer);
    if (this._isWanted) {
      if (!this._socket && (this._state === 'idle' || this._state === 'cut')) {
        window.clearTimeout(this._retryTimer);
        this._open();
      }
    } else if (this._state !== 'idle') {
      this._restTimer = window.setTimeout(() => this._rest(), REST_AFTER_MS);
    }
  }

  private _rest(): void {
    if (this._isWanted) {
      return;
    }
    window.clearTimeout(this._retryTimer);
    const socket = this._socket;
    this._socket = null;
    socket?.close();
    this._setState('idle');
  }

  private _open(): void {
    const { wsUrl, token } = this._connection;
    const query = token ? `?token=${encodeURIComponent(token)}` : '';
    this._setState('connecting');
    const socket = this._around.openSocket(`${apiUrl(wsUrl, 'events')}${query}`);
    this._socket = socket;
    socket.onmessage = event => {
      if (this._socket === socket) {
        this._hear(JSON.parse(String(event.data)) as ServerMessage);
      }
    };
    socket.onclose = () => {
      if (this._socket === socket) {
        this._lose();
      }
    };
  }

  private _lose(): void {
    this._socket = null;
    if (!this._isWanted) {
      this._setState('idle');
      return;
    }
    this._setState('cut');
    const jitter = 0.75 + Math.random() / 2;
    this._retryTimer = window.setTimeout(() => this._isWanted && !this._socket && this._open(), this._retryMs * jitter);
    this._retryMs = Math.min(2 * this._retryMs, LONGEST_RETRY_MS);
  }

  private _hear(message: ServerMessage): void {
    switch (message.type) {
      case 'hello':
        this._greet(message.epoch);
        return;
      case 'refused':
        console.warn(`The Jupyter server refused a message of the panels: ${message.message}`);
        return;
      case 'run_info':
      case 'run_series':
      case 'run_output':
        this._ackSoon(message.cursor);
        this._tellRun(message);
        return;
      case 'run_gone':
        this._tellRun(message);
        return;
      default:
        if ('cursor' in message) {
          this._cursors.set(message.topic, message.cursor);
        }
        this._topics.get(message.topic)?.forEach(listener => listener(message));
    }
  }

  private _greet(epoch: string): void {
    this._retryMs = FIRST_RETRY_MS;
    if (epoch !== this._epoch) {
      this._cursors.clear();
    }
    this._epoch = epoch;
    this._setState('open');
    for (const topic of this._topics.keys()) {
      const cursor = this._cursors.get(topic) ?? 0;
      this._send({ type: 'subscribe', topics: [topic], epoch: cursor ? epoch : '', cursor });
    }
    for (const [runId, { points }] of this._watches) {
      this._send({ type: 'watch', run_id: runId, points });
    }
  }

  private _tellRun(message: RunMessage): void {
    this._watches.get(message.run_id)?.listeners.forEach(listener => listener(message));
  }

  // Once what came is on the screen: a page that cannot keep up is sent less.
  private _ackSoon(cursor: number): void {
    const isWaiting = this._unacked > 0;
    this._unacked = Math.max(this._unacked, cursor);
    if (isWaiting) {
      return;
    }
    const socket = this._socket;
    const ack = () => {
      const upTo = this._unacked;
      this._unacked = 0;
      if (socket && socket === this._socket) {
        this._send({ type: 'ack', cursor: upTo });
      }
    };
    if (this._around.page.visibilityState === 'hidden') {
      window.setTimeout(ack, 100); // no frames are drawn there
    } else {
      this._around.nextFrame(ack);
    }
  }

  private _send(message: ClientMessage): void {
    if (this._state === 'open') {
      this._socket?.send(JSON.stringify(message));
    }
  }

  private _setState(state: LinkState): void {
    if (state !== this._state) {
      this._state = state;
      this._stateListeners.forEach(listener => listener(state));
    }
  }

  private _state: LinkState = 'idle';
  private _socket: WebSocket | null = null;
  private _epoch = '';
  private _unacked = 0;
  private _retryMs = FIRST_RETRY_MS;
  private _retryTimer = 0;
  private _restTimer = 0;
  private readonly _cursors = new Map<Topic, number>();
  private readonly _topics = new Map<Topic, Set<(message: TopicMessage) => void>>();
  private readonly _watches = new Map<string, Watch>();
  private readonly _stateListeners = new Set<(state: LinkState) => void>();
}
