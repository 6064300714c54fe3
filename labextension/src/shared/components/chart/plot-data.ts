// What a chart draws, decided by values: columns, ranges, what lies outside. The rules are those of
// core/metrics/axes.py, by which the saved form is drawn. Pure.
import type { Columns, Mark } from '../../api/types';
import { formatNumber } from '../../format';

export type XAxis = 'step' | 'time' | 'epoch';
export type Range = readonly [number, number];

/** x, and for each x: the lowest and the highest of the ranks, the mean, the smoothed mean. null is a gap. */
export interface Table {
  x: number[];
  low: (number | null)[];
  high: (number | null)[];
  mean: (number | null)[];
  smooth: (number | null)[];
  /** The index of each row in the columns it comes from. */
  row: number[];
}

const LARGEST = 1e300; // beyond it the arithmetic of axes overflows
const SMALLEST = 1e-300;
const FEWEST = 8; // points of which some may be outliers
const OUTLIERS = 0.05; // of the points at each end
const FLATTENED = 5; // a range so many times that of the other points makes a line of them
const MARGIN = 0.06;
const FLAT = 1e-9;

/** What axes can work with. */
function bounded(value: number): number {
  return Math.abs(value) > SMALLEST ? Math.max(-LARGEST, Math.min(LARGEST, value)) : 0;
}

/** The columns as a table over one axis; time counts from `start`. On a log scale what is not positive is a gap. */
export function tableOf(columns: Columns, axis: XAxis, start: number, smoothing: number, isLog = false): Table {
  const table: Table = { x: [], low: [], high: [], mean: [], smooth: [], row: [] };
  const drawn = (value: number | null | undefined) =>
    value === null || value === undefined || (isLog && value <= 0) ? null : bounded(value);
  columns.step.forEach((step, at) => {
    const x = axis === 'step' ? step : axis === 'time' ? (columns.time[at] ?? start) - start : columns.epoch[at];
    if (x === null || x === undefined) return;
    table.x.push(x);
    table.row.push(at);
    table.mean.push(drawn(columns.mean[at]));
    table.low.push(drawn(columns.low[at]));
    table.high.push(drawn(columns.high[at]));
  });
  // Ranks write at their own pace: the time of a later step may be earlier.
  if (axis !== 'step') {
    for (let at = 1; at < table.x.length; at += 1) {
      table.x[at] = Math.max(table.x[at] as number, table.x[at - 1] as number);
    }
  }
  table.smooth = smoothed(table.mean, smoothing);
  return table;
}

/** An exponential moving average without the pull of its first value; `weight` 0 (none) to below 1. Gaps stay. */
export function smoothed(values: readonly (number | null)[], weight: number): (number | null)[] {
  if (weight <= 0) return [...values];
  let average = 0;
  let total = 0;
  return values.map(value => {
    if (value === null) return null;
    average = average * weight + value * (1 - weight);
    total = total * weight + (1 - weight);
    return average / total;
  });
}

/** The columns inside a window in place of those of the whole run there: the overview around, the window in it. */
export function withWindow(overview: Columns, window: Columns | null): Columns {
  if (!window?.step.length) return overview;
  const first = window.step[0] as number;
  const last = window.step[window.step.length - 1] as number;
  const before = overview.step.findIndex(step => step >= first);
  const after = overview.step.findIndex(step => step > last);
  const head = before < 0 ? overview.step.length : before;
  const tail = after < 0 ? overview.step.length : after;
  const joined = <T>(name: keyof Columns) =>
    [...overview[name].slice(0, head), ...window[name], ...overview[name].slice(tail)] as T[];
  return {
    step: joined('step'),
    time: joined('time'),
    epoch: joined('epoch'),
    mean: joined('mean'),
    low: joined('low'),
    high: joined('high'),
    n: joined('n'),
    not_finite: joined('not_finite')
  };
}

/** The steps between which the columns have x in a range. */
export function stepsOf(columns: Columns, table: Table, [low, high]: Range): Range {
  const from = firstFrom(table.x, low);
  const to = firstBeyond(table.x, high) - 1;
  const isEmpty = to < from;
  const first = Math.max(0, (isEmpty ? 0 : (table.row[from] as number)) - 1);
  const last = Math.min(columns.step.length - 1, isEmpty ? columns.step.length - 1 : (table.row[to] as number) + 1);
  return [columns.step[first] ?? 0, columns.step[last] ?? 0];
}

/** Where a horizontal axis begins and ends. */
export function xRange(tables: readonly Table[]): Range {
  const low = Math.min(...tables.map(table => table.x[0] ?? Infinity));
  const high = Math.max(...tables.map(table => table.x[table.x.length - 1] ?? -Infinity));
  if (!(low <= high)) return [0, 1];
  if (low === high) return low >= 1 ? [low - 1, high + 1] : [low, low + 1];
  return [low, high];
}

/** How much of a value axis is shown, and what is said of the rest. */
export interface ValueRange {
  range: Range;
  outside: string;
  /** Whether powers of ten can show all values. */
  canLog: boolean;
}

/**
 * The range that shows the curves in a stretch: not all of it where rare values would make a line of the others,
 * unless `showAll`.
 */
export function valueRange(tables: readonly Table[], within: Range, isLog: boolean, showAll: boolean): ValueRange {
  const stretches = tables.map(({ x }) => [firstFrom(x, within[0]), firstBeyond(x, within[1])] as const);
  const most = stretches.reduce((sum, [from, to]) => sum + Math.max(0, to - from), 0);
  const lows = new Float64Array(most);
  const highs = new Float64Array(most);
  let count = 0;
  let low = Infinity;
  let high = -Infinity;
  tables.forEach((table, at) => {
    const [from, to] = stretches[at] as readonly [number, number];
    for (let row = from; row < to; row += 1) {
      const mean = table.mean[row];
      if (mean === null || mean === undefined) continue;
      const lowest = table.low[row] ?? mean;
      const highest = table.high[row] ?? mean;
      lows[count] = lowest;
      highs[count] = highest;
      count += 1;
      if (lowest < low) low = lowest;
      if (highest > high) high = highest;
    }
  });
  if (!count) return { range: isLog ? [0.1, 10] : [0, 1], outside: '', canLog: false };
  const canLog = low > SMALLEST;
  if (isLog) {
    const [first, last] = [Math.log10(Math.max(low, 1e-307)), Math.log10(Math.max(high, 1e-307))];
    const margin = (last - first) * MARGIN || 0.1;
    return { range: [10 ** Math.max(-307, first - margin), 10 ** Math.min(300, last + margin)], outside: '', canLog };
  }
  const [from, to] = showAll ? [low, high] : robust(lows.subarray(0, count), highs.subarray(0, count), low, high);
  const isFlat = to - from <= FLAT * Math.abs(to);
  const margin = isFlat ? Math.abs(to) * 0.1 || 1 : (to - from) * MARGIN;
  const outside = [
    high > to ? `up to ${formatNumber(high)} above` : '',
    low < from ? `down to ${formatNumber(low)} below` : ''
  ];
  return { range: [bounded(from - margin), bounded(to + margin)], outside: outside.filter(Boolean).join(', '), canLog };
}

// Sorts its arguments.
function robust(lows: Float64Array, highs: Float64Array, low: number, high: number): Range {
  if (lows.length < FEWEST) return [low, high];
  const trimmed = Math.max(1, Math.floor(OUTLIERS * lows.length));
  const innerLow = lows.sort()[trimmed] as number;
  const innerHigh = highs.sort()[highs.length - 1 - trimmed] as number;
  const span = innerHigh - innerLow;
  if (span <= 0 || high - low <= FLATTENED * span) return [low, high];
  return [Math.max(low, innerLow - span / 2), Math.min(high, innerHigh + span / 2)];
}

/** The first row whose x is at least so large; x grows, or stays. */
export function firstFrom(x: readonly number[], wanted: number): number {
  return bisect(x, value => value >= wanted);
}

/** The first row whose x is larger. */
function firstBeyond(x: readonly number[], wanted: number): number {
  return bisect(x, value => value > wanted);
}

function bisect(x: readonly number[], isThere: (value: number) => boolean): number {
  let low = 0;
  let high = x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (isThere(x[middle] as number)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** A stretch that was fetched, with what is beside it, so that it can be moved without another one. */
export function fetchedFor([low, high]: Range): Range {
  return [low - (high - low), high + (high - low)];
}

/**
 * Whether what was fetched for `fetched` shows `zoom` as well as another one would, with something on either side of it
 * where there is any: the data reach from `whole[0]` to `whole[1]`. One that is `isExact` cannot be finer.
 */
export function shows(fetched: Range, [low, high]: Range, whole: Range, isExact: boolean): boolean {
  const beside = 0.3 * (high - low);
  const reaches = fetched[0] <= Math.max(low - beside, whole[0]) && fetched[1] >= Math.min(high + beside, whole[1]);
  return reaches && (isExact || fetched[1] - fetched[0] <= 1.5 * 3 * (high - low));
}

/** Round numbers between two values, `count` of them or a few more; whole ones only, if so wanted. */
export function niceTicks(low: number, high: number, count: number, isWhole = false): number[] {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0) || !Number.isFinite(rough)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = power * ([1, 2, 5, 10].find(factor => factor * power >= rough * 0.999) ?? 10);
  if (isWhole) step = Math.max(1, Math.round(step));
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.min(50, last - first + 1) }, (_, at) => Number(((first + at) * step).toPrecision(12)));
}

const CLOCK = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

/** Round times between two, in seconds. */
export function timeTicks(low: number, high: number, count: number): number[] {
  const rough = (high - low) / Math.max(1, count);
  if (rough < 1) return niceTicks(low, high, count);
  const step = CLOCK.find(size => size >= rough) ?? Math.ceil(rough / 86400) * 86400;
  const ticks: number[] = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) ticks.push(at);
  return ticks;
}

/** Powers of ten between two values; 1, 2 and 5 of them where there are few. */
export function logTicks(low: number, high: number): number[] {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first) / 4));
  const powers: number[] = [];
  for (let power = first; power <= last; power += stride) powers.push(Number(`1e${power}`));
  if (powers.length >= 2) return powers;
  const between = [1, 2, 5, 10, 20, 50].map(factor => factor * 10 ** (first - 1)).filter(tick => tick >= low && tick <= high);
  return between.length >= 2 ? between : niceTicks(low, high, 4).filter(tick => tick > 0);
}

/** Labels with as many digits as it takes to say where the ticks are, and so to tell them apart. */
export function tickLabels(ticks: readonly number[]): string[] {
  const gaps = ticks.slice(1).map((tick, at) => Math.abs(tick - (ticks[at] as number)));
  const near = (gaps.length ? Math.min(...gaps) : 1e-4 * Math.abs(ticks[0] ?? 0)) / 100;
  for (let digits = 4; digits < 12; digits += 1) {
    const texts = ticks.map(tick => formatNumber(tick, digits));
    if (texts.every((text, at) => Math.abs(Number(text.replaceAll(',', '')) - (ticks[at] as number)) <= near)) return texts;
  }
  return ticks.map(tick => formatNumber(tick, 12));
}

/** Seconds as "45", "1:30", "2:05:00". */
export function clockLabel(seconds: number): string {
  if (seconds < 60) return `${Number(seconds.toFixed(2))} s`;
  const pad = (value: number) => String(Math.floor(value)).padStart(2, '0');
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.floor((seconds % 3600) / 60);
  return hours ? `${hours}:${pad(minutes)}:${pad(seconds % 60)}` : `${minutes}:${pad(seconds % 60)}`;
}

/** Where a mark stands on an axis; null where that is not known. */
export function markPosition(mark: Mark, columns: Columns, axis: XAxis, start: number): number | null {
  if (axis === 'time') return mark.t - start;
  let at = -1;
  if (mark.step !== null) {
    if (axis === 'step') return mark.step;
    at = columns.step.findIndex(step => step >= (mark.step as number));
  } else {
    at = columns.time.findIndex(time => time >= mark.t);
  }
  if (at < 0) at = columns.step.length - 1;
  return (axis === 'step' ? columns.step[at] : columns.epoch[at]) ?? null;
}

/** How many values of a stretch were NaN or infinite. */
export function numNotFinite(columns: Columns): number {
  return columns.not_finite.reduce((sum, count) => sum + count, 0);
}

/** The row whose x is nearest. */
export function nearestRow(x: readonly number[], wanted: number): number {
  let low = 0;
  let high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if ((x[middle] as number) <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs((x[low] ?? 0) - wanted) <= Math.abs((x[high] ?? 0) - wanted) ? low : high;
}
