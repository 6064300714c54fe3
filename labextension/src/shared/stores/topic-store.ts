// What is known of one topic: the clusters, worlds, runs, endpoints or keys of the server.
import type { Events } from '../api/events';
import type { Topic, Topics } from '../api/types';
import { Observable } from './observable';

/** `problem` says why the items may be old; `isLoaded` is false before the first answer. */
export interface TopicState<Item> {
  readonly items: readonly Item[];
  readonly isLoaded: boolean;
  readonly isStale: boolean;
  readonly problem: string;
}

interface Kind<Item> {
  id(item: Item): string;
  compare(one: Item, other: Item): number;
}

const byText = (one: string, other: string) => one.localeCompare(other, undefined, { numeric: true });

/** How items are told apart, and their order. */
export const KINDS: { [T in Topic]: Kind<Topics[T]> } = {
  clusters: { id: item => item.name, compare: (one, other) => byText(one.name, other.name) },
  endpoints: { id: item => item.name, compare: (one, other) => byText(one.name, other.name) },
  keys: { id: item => item.id, compare: (one, other) => other.created - one.created || byText(one.id, other.id) },
  runs: {
    id: item => item.run_id,
    compare: (one, other) => other.created - one.created || byText(one.run_id, other.run_id)
  },
  worlds: { id: item => item.world_id, compare: (one, other) => byText(one.world_id, other.world_id) }
};

const CUT = 'The connection to the Jupyter server is cut; this is how it was. It is tried again by itself.';

/** The items of a topic, in order; the server is asked only while somebody follows. */
export class TopicStore<T extends Topic> extends Observable<TopicState<Topics[T]>> {
  constructor(
    private readonly _events: Events,
    private readonly _topic: T
  ) {
    super({ items: [], isLoaded: false, isStale: false, problem: '' });
  }

  /** The item with this id, if it is known. */
  find(id: string): Topics[T] | undefined {
    return this._items.get(id);
  }

  protected wake(): void {
    const ends = [
      this._events.subscribe(this._topic, message => {
        switch (message.type) {
          case 'snapshot':
            this._items = new Map((message.items as Topics[T][]).map(item => [this._kind.id(item), item]));
            this._show('', true);
            break;
          case 'changed':
            this._items.set(this._kind.id(message.item as Topics[T]), message.item as Topics[T]);
            this._show('');
            break;
          case 'removed':
            this._items.delete(message.id);
            this._show('');
            break;
          case 'synced':
            this._show('', true);
            break;
          case 'problem':
            this._show(message.message);
        }
      }),
      this._events.onState(state => state === 'cut' && this._show(CUT))
    ];
    this._leave = () => ends.forEach(end => end());
  }

  protected rest(): void {
    this._leave();
    this.set({ ...this.value, isStale: this.value.isLoaded });
  }

  private _show(problem: string, isLoaded = this.value.isLoaded): void {
    const items = [...this._items.values()].sort((one, other) => this._kind.compare(one, other));
    this.set({ items, isLoaded, isStale: problem !== '', problem });
  }

  private get _kind(): Kind<Topics[T]> {
    return KINDS[this._topic] as Kind<Topics[T]>;
  }

  private _items = new Map<string, Topics[T]>();
  private _leave: () => void = () => undefined;
}
