// One run, followed whole: what it is doing, its series, its output.
import type { Events } from '../api/events';
import type { Columns, OutputRecord, RunInfo, SeriesTail } from '../api/types';
import { Observable } from './observable';

/** A metric as it is known now. */
export interface Series extends Columns {
  readonly name: string;
  readonly ranks: number[];
  readonly unit: string;
  readonly isPartial: boolean;
}

/** `problem` says why this may be old; `isGone` that the server knows no such run. */
export interface RunState {
  readonly info: RunInfo | null;
  readonly series: ReadonlyMap<string, Series>;
  readonly output: readonly OutputRecord[];
  readonly skipped: number;
  readonly isGone: boolean;
  readonly problem: string;
}

export const NOTHING: RunState = {
  info: null,
  series: new Map(),
  output: [],
  skipped: 0,
  isGone: false,
  problem: ''
};

export const GAP = 'gap'; // the kind of a record that stands for those that are missing
export const POINTS = 800; // of a metric: what a wide chart can show
const MAX_RECORDS = 20_000; // of output that a page keeps
const CUT = 'The connection to the Jupyter server is cut. The run goes on; this view does when the connection is back.';
const TOO_MANY =
  'So many runs are shown on this page that this one waits for its turn: it comes when a tab is closed or the output of another cell is cleared.';
const COLUMNS = ['step', 'time', 'epoch', 'mean', 'low', 'high', 'n', 'not_finite'] as const;

/** A run that is followed; the server is asked only while somebody does. */
export class WatchedRun extends Observable<RunState> {
  constructor(
    private readonly _events: Events,
    readonly runId: string
  ) {
    super(NOTHING);
  }

  protected wake(): void {
    const ends = [
      this._events.watch(this.runId, POINTS, message => {
        switch (message.type) {
          case 'run_info':
            this.set({ ...this.value, info: message.info, isGone: false, problem: '' });
            break;
          case 'run_series':
            this.set({ ...this.value, series: withTails(this.value.series, message.series), problem: '' });
            break;
          case 'run_output':
            this._take(message.records, message.skipped);
            break;
          case 'run_gone':
            this.set({ ...this.value, isGone: true, problem: '' });
            break;
          case 'refused':
            this.set({ ...this.value, problem: TOO_MANY });
        }
      }),
      this._events.onState(state => {
        if (state === 'cut') {
          this.set({ ...this.value, problem: CUT });
        }
      })
    ];
    this._leave = () => ends.forEach(end => end());
  }

  protected rest(): void {
    this._leave();
  }

  // A run that is watched again, after a cut, is told from its start: what is known is left out.
  private _take(records: readonly OutputRecord[], skipped: number): void {
    const isFirst = !this.value.output.length;
    const fresh = records.filter(record => record.seq > (this._seen.get(record.rank) ?? 0));
    if (!fresh.length && skipped === this.value.skipped) {
      return;
    }
    const gaps = isFirst ? [] : gapsBefore(fresh, this._seen, this.value.skipped > 0);
    fresh.forEach(record => this._seen.set(record.rank, Math.max(record.seq, this._seen.get(record.rank) ?? 0)));
    const all = [...this.value.output, ...gaps, ...fresh];
    const lost = Math.max(0, all.length - MAX_RECORDS);
    this.set({
      ...this.value,
      output: lost ? all.slice(lost) : all,
      skipped: (isFirst ? (skipped ?? 0) : this.value.skipped) + lost
    });
  }

  private _leave: () => void = () => undefined;
  private readonly _seen = new Map<number, number>();
}

/**
 * A record for each rank of which records are missing between those that are known and these: the page was away, or too
 * slow, for longer than the server keeps them. The records of a rank are numbered one by one.
 */
function gapsBefore(fresh: readonly OutputRecord[], seen: ReadonlyMap<number, number>, isTold: boolean): OutputRecord[] {
  const counts = new Map<number, { first: OutputRecord; count: number; last: number }>();
  for (const record of fresh) {
    const known = counts.get(record.rank) ?? { first: record, count: 0, last: 0 };
    counts.set(record.rank, { ...known, count: known.count + 1, last: Math.max(known.last, record.seq) });
  }
  return [...counts].flatMap(([rank, { first, count, last }]) => {
    const missing = last - (seen.get(rank) ?? 0) - count;
    const text = `… ${missing} pieces of output are not shown here; the log has them …\n`;
    const isNew = missing > 0 && (seen.has(rank) || !isTold); // what is missing at the start is told above the output
    return isNew ? [{ ...first, kind: GAP, stream: '', text, html: '', image: '' }] : [];
  });
}

/** Each tail replaces what is known from its `from` on. */
export function withTails(known: ReadonlyMap<string, Series>, tails: readonly SeriesTail[]): Map<string, Series> {
  const series = new Map(known);
  for (const tail of tails) {
    const before = series.get(tail.name);
    const columns = Object.fromEntries(
      COLUMNS.map(name => [name, before && tail.from > 0 ? [...before[name].slice(0, tail.from), ...tail[name]] : tail[name]])
    ) as unknown as Columns;
    const { name, ranks, unit, is_partial: isPartial } = tail;
    series.set(name, { ...columns, name, ranks, unit, isPartial });
  }
  return series;
}
