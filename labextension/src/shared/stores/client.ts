// Everything a panel asks the server through: one per server and page, so all panels share one websocket.
import type { Connection } from '../api/connection';
import { Events } from '../api/events';
import { Rest } from '../api/rest';
import { TopicStore } from './topic-store';
import { WatchedRun } from './watched-run';

export class Client {
  constructor(readonly connection: Connection) {
    this.rest = new Rest(connection);
    this.events = new Events(connection);
    this.clusters = new TopicStore(this.events, 'clusters');
    this.endpoints = new TopicStore(this.events, 'endpoints');
    this.keys = new TopicStore(this.events, 'keys');
    this.runs = new TopicStore(this.events, 'runs');
    this.worlds = new TopicStore(this.events, 'worlds');
  }

  /** The run with this id; views of the same run share it. */
  run(runId: string): WatchedRun {
    const known = this._runs.get(runId)?.deref();
    if (known) {
      return known;
    }
    const run = new WatchedRun(this.events, runId);
    this._runs.set(runId, new WeakRef(run));
    return run;
  }

  readonly rest: Rest;
  readonly events: Events;
  readonly clusters: TopicStore<'clusters'>;
  readonly endpoints: TopicStore<'endpoints'>;
  readonly keys: TopicStore<'keys'>;
  readonly runs: TopicStore<'runs'>;
  readonly worlds: TopicStore<'worlds'>;
  private readonly _runs = new Map<string, WeakRef<WatchedRun>>();
}

const clients = new Map<string, Client>();

/** The client for a server. */
export function clientOf(connection: Connection): Client {
  const known = clients.get(connection.baseUrl);
  if (known) {
    return known;
  }
  const client = new Client(connection);
  clients.set(connection.baseUrl, client);
  return client;
}
