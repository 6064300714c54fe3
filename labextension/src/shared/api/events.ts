// The events of the server: one websocket for all stores of a page. It goes on from where it was after a cut, waits
// longer after each failure, and rests while the page is hidden or nobody listens. Where no websocket comes through, as
// behind some proxies, the same messages are fetched; the websocket is tried again from time to time.
import { hearTime } from '../clock';
import { apiUrl, type Connection } from './connection';
import { PollingSocket } from './polling';
import type { ClientMessage, ServerMessage, Topic } from './types';

export type LinkState = 'idle' | 'connecting' | 'open' | 'cut';
type TopicMessage = Extract<ServerMessage, { topic: Topic }>;
type RunRefusal = Extract<ServerMessage, { type: 'refused' }>;
type RunMessage = Exclude<Extract<ServerMessage, { run_id: string }>, { type: 'refused' }> | RunRefusal;

const FIRST_RETRY_MS = 500;
const LONGEST_RETRY_MS = 30_000;
const REST_AFTER_MS = 5_000; // hidden, or without listeners, for so long
const HELLO_MS = 10_000; // a websocket that opens and says nothing is one that a proxy holds back
const SILENT_BEATS = 3; // heartbeats that may be missing
const UNHEARD = 2; // websockets in a row that never said hello: then the messages are fetched
const WEBSOCKET_AGAIN_MS = 300_000;

interface Watch {
  points: number;
  listeners: Set<(message: RunMessage) => void>;
}

/** What of a websocket is used. */
export interface EventSocket {
  onmessage: ((event: { data: unknown }) => void) | null;
  onclose: (() => void) | null;
  send(text: string): void;
  close(): void;
}

/** What of the browser is used; tests give their own. */
export interface Surroundings {
  openSocket(url: string): EventSocket;
  openPolling(connection: Connection): EventSocket;
  page: Document;
  nextFrame(callback: () => void): void;
}

const BROWSER: Surroundings = {
  openSocket: url => new WebSocket(url) as EventSocket,
  openPolling: connection => new PollingSocket(connection),
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
        this._refused.delete(runId);
        this._send({ type: 'unwatch', run_id: runId });
        this._watchRefused();
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
    this._drop();
    this._setState('idle');
  }

  private _open(): void {
    this._isPolling = this._numUnheard >= UNHEARD;
    this._isHeard = false;
    this._setState('connecting');
    const socket = this._isPolling ? this._around.openPolling(this._connection) : this._openWebsocket();
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
    this._loseAfter(HELLO_MS);
    if (this._isPolling) {
      this._againTimer = window.setTimeout(() => this._tryWebsocket(), WEBSOCKET_AGAIN_MS);
    }
  }

  private _openWebsocket(): EventSocket {
    const { wsUrl, token } = this._connection;
    const query = token ? `?token=${encodeURIComponent(token)}` : '';
    return this._around.openSocket(`${apiUrl(wsUrl, 'events')}${query}`);
  }

  private _tryWebsocket(): void {
    this._drop();
    this._numUnheard = UNHEARD - 1;
    this._open();
  }

  private _loseAfter(ms: number): void {
    window.clearTimeout(this._silenceTimer);
    this._silenceTimer = window.setTimeout(() => this._socket && this._lose(), ms);
  }

  private _drop(): void {
    window.clearTimeout(this._silenceTimer);
    window.clearTimeout(this._againTimer);
    const socket = this._socket;
    this._socket = null;
    socket?.close();
  }

  private _lose(): void {
    this._drop();
    if (!this._isHeard) {
      this._numUnheard = this._isPolling ? 0 : this._numUnheard + 1;
    } else {
      this._numUnheard = this._isPolling ? UNHEARD - 1 : 0;
    }
    if (!this._isWanted) {
      this._setState('idle');
      return;
    }
    if (this._numUnheard === UNHEARD && !this._isPolling) {
      this._open(); // at once: the server may be there all the same
      return;
    }
    this._setState('cut');
    const jitter = 0.75 + Math.random() / 2;
    this._retryTimer = window.setTimeout(() => this._isWanted && !this._socket && this._open(), this._retryMs * jitter);
    this._retryMs = Math.min(2 * this._retryMs, LONGEST_RETRY_MS);
  }

  private _hear(message: ServerMessage): void {
    if (message.type === 'hello') {
      this._heartbeatMs = 1000 * message.heartbeat_s;
      if (message.now) hearTime(message.now);
    }
    this._loseAfter(SILENT_BEATS * this._heartbeatMs);
    switch (message.type) {
      case 'hello':
        this._greet(message.epoch);
        return;
      case 'alive':
        return;
      case 'refused':
        if (message.run_id) {
          this._refused.add(message.run_id);
          this._watches.get(message.run_id)?.listeners.forEach(listener => listener(message as RunRefusal));
        }
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
    this._isHeard = true;
    this._retryMs = FIRST_RETRY_MS;
    if (epoch !== this._epoch) {
      this._cursors.clear();
    }
    this._epoch = epoch;
    this._refused.clear();
    this._setState('open');
    for (const topic of this._topics.keys()) {
      const cursor = this._cursors.get(topic) ?? 0;
      this._send({ type: 'subscribe', topics: [topic], epoch: cursor ? epoch : '', cursor });
    }
    for (const [runId, { points }] of this._watches) {
      this._send({ type: 'watch', run_id: runId, points });
    }
  }

  // There is room for one more.
  private _watchRefused(): void {
    const [runId] = this._refused;
    const watch = runId === undefined ? undefined : this._watches.get(runId);
    if (runId !== undefined && watch) {
      this._refused.delete(runId);
      this._send({ type: 'watch', run_id: runId, points: watch.points });
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
  private _socket: EventSocket | null = null;
  private _isPolling = false;
  private _isHeard = false;
  private _numUnheard = 0;
  private _heartbeatMs = HELLO_MS;
  private _silenceTimer = 0;
  private _againTimer = 0;
  private _epoch = '';
  private _unacked = 0;
  private _retryMs = FIRST_RETRY_MS;
  private _retryTimer = 0;
  private _restTimer = 0;
  private readonly _cursors = new Map<Topic, number>();
  private readonly _topics = new Map<Topic, Set<(message: TopicMessage) => void>>();
  private readonly _watches = new Map<string, Watch>();
  private readonly _refused = new Set<string>(); // of these: the server has no room for more
  private readonly _stateListeners = new Set<(state: LinkState) => void>();
}
