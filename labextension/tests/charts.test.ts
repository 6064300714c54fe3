import { expect, test } from 'vitest';

import type { Columns } from '../src/shared/api/types';
import { grouped, matches } from '../src/shared/components/chart/charts';
import { exactNear, rankWords } from '../src/shared/components/chart/chart';
import { FONT } from '../src/shared/components/chart/plot';
import { comparedColor, dashOf } from '../src/shared/components/chart/palette';
import {
  clockLabel,
  fetchedFor,
  logTicks,
  niceTicks,
  type Range,
  shows,
  smoothed,
  stepsOf,
  tableOf,
  tickLabels,
  timeTicks,
  valueRange,
  withWindow
} from '../src/shared/components/chart/plot-data';
import { differingRows, lineDifference } from '../src/shared/components/run/difference';
import { linesOf } from '../src/shared/components/run/output';
import { facts } from '../src/shared/components/run/progress';
import { summary } from '../src/shared/components/run/ranks';

const columns = (mean: (number | null)[], steps = mean.map((_, at) => at)): Columns => ({
  step: steps,
  time: steps.map(step => 100 + 2 * step),
  epoch: steps.map(step => (step < 2 ? null : step / 10)),
  mean,
  low: mean,
  high: mean,
  n: mean.map(() => 1),
  not_finite: mean.map(value => (value === null ? 1 : 0))
});
const EVERYWHERE = [-Infinity, Infinity] as const;

test('a spike that flattens the rest is left outside and told, until all is asked for', () => {
  const table = tableOf(columns(Array.from({ length: 100 }, (_, at) => (at === 50 ? 900 : 1 + Math.sin(at)))), 'step', 0, 0);
  const robust = valueRange([table], EVERYWHERE, false, false);
  expect(robust.outside).toBe('up to 900 above');
  expect(robust.range[1]).toBeLessThan(5);
  const all = valueRange([table], EVERYWHERE, false, true);
  expect(all.outside).toBe('');
  expect(all.range[1]).toBeGreaterThan(900);
});

test('1e300 beside 1 is drawn with a range that can be counted with', () => {
  const { range } = valueRange([tableOf(columns([1, 1e308, -1e308, null]), 'step', 0, 0)], EVERYWHERE, false, false);
  expect(range.every(Number.isFinite)).toBe(true);
  expect(niceTicks(...range, 4).every(Number.isFinite)).toBe(true);
});

test('powers of ten are offered only where all values are positive', () => {
  expect(valueRange([tableOf(columns([1, 2]), 'step', 0, 0)], EVERYWHERE, false, true).canLog).toBe(true);
  expect(valueRange([tableOf(columns([0, 2]), 'step', 0, 0)], EVERYWHERE, false, true).canLog).toBe(false);
  expect(logTicks(0.01, 1000)).toEqual([0.01, 1, 100]);
});

test('smoothing has no pull towards its first value, and gaps stay gaps', () => {
  expect(smoothed([2, 2, null, 2], 0.9).map(value => value && Number(value.toFixed(6)))).toEqual([2, 2, null, 2]);
  expect(smoothed([1, null, 3], 0)).toEqual([1, null, 3]);
});

test('over time a chart counts from the start, over epochs it leaves out what has none', () => {
  expect(tableOf(columns([5, 6, 7]), 'time', 100, 0).x).toEqual([0, 2, 4]);
  expect(tableOf(columns([5, 6, 7, 8]), 'epoch', 0, 0)).toMatchObject({ x: [0.2, 0.3], mean: [7, 8], row: [2, 3] });
});

test('a window stands in the overview in place of its stretch', () => {
  const whole = withWindow(columns([0, 10, 20, 30], [0, 10, 20, 30]), columns([9, 15, 21], [9, 15, 21]));
  expect(whole.step).toEqual([0, 9, 15, 21, 30]);
  expect(whole.mean).toEqual([0, 9, 15, 21, 30]);
});

test('ticks of steps are whole, labels differ', () => {
  expect(niceTicks(0, 3, 8, true)).toEqual([0, 1, 2, 3]);
  expect(new Set(tickLabels([1.00001, 1.00002, 1.00003])).size).toBe(3);
  expect(timeTicks(0, 600, 5)).toEqual([0, 120, 240, 360, 480, 600]);
  expect([45, 90, 7500].map(clockLabel)).toEqual(['45 s', '1:30', '2:05:00']);
});

test('a label beside an axis is the number that it stands for', () => {
  expect(tickLabels([0.9995, 1, 1.0005])).toEqual(['0.9995', '1', '1.0005']);
  expect(tickLabels([12_340_000, 12_350_000])).toEqual(['1.234e7', '1.235e7']);
  expect(tickLabels([1000, 1000.5])).toEqual(['1,000', '1,000.5']);
  expect(tickLabels([1e-5, 1.5e-5])).toEqual(['1e-5', '1.5e-5']);
  expect(tickLabels([1 / 3])).toEqual(['0.333333']);
});

test('a step of many digits is told whole, in a progress bar too', () => {
  const window = { ...columns([1], [12_345_678]), is_exact: true };
  expect(rankWords({ 0: window, 1: window }, 12_345_678)).toContain('at step 12,345,678 ');
  const bar = { desc: '', done: 12_345_678, total: 12_400_000, fraction: 0.99, rate: null, eta: null, eta_range: null, waits: '' };
  expect(facts(bar)).toBe('12,345,678 of 12,400,000');
});

test('metrics are grouped by what stands before the slash once there are many', () => {
  const many = ['loss', 'train/a', 'train/b', 'eval/a', 'eval/b', 'eval/c', 'lr'];
  expect(grouped(many)).toEqual([
    [null, ['loss', 'lr']],
    ['train', ['train/a', 'train/b']],
    ['eval', ['eval/a', 'eval/b', 'eval/c']]
  ]);
  expect(grouped(['a/x', 'b/x'])).toEqual([[null, ['a/x', 'b/x']]]);
  expect(matches('eval/accuracy', 'acc EVAL')).toBe(true);
  expect(matches('eval/accuracy', 'loss')).toBe(false);
});

test('exact values are told of each rank, of many the lowest and the highest', () => {
  const window = (value: number | null) => ({ ...columns([value], [7]), is_exact: true });
  expect(rankWords({ 0: window(1), 1: window(null) }, 7)).toBe('at step 7 · rank 0: 1 · rank 1: not finite');
  const many = Object.fromEntries(Array.from({ length: 64 }, (_, rank) => [rank, window(rank)]));
  expect(rankWords(many, 7)).toBe('at step 7 · lowest rank 0: 0 · highest rank 63: 63');
});

test('of a stretch of very many steps the one that is pointed at is told, not a mean of many', async () => {
  const asked: number[] = [];
  const within = (from: number, to: number) => {
    const [first, last] = [Math.ceil(from), Math.floor(to)];
    asked.push(last - first + 1);
    const size = Math.ceil((last - first + 1) / 2000);
    const steps = Array.from({ length: Math.ceil((last - first + 1) / size) }, (_, at) => first + at * size + (size - 1) / 2);
    const window = (rank: number) => ({ ...columns(steps.map(step => (step % 7) + rank / 10), steps), is_exact: size === 1 });
    return Promise.resolve({ 0: window(0), 1: window(1) });
  };
  const told = rankWords(await exactNear(within, 700_003, 1, 3_000_000), 700_003);
  expect(told).toBe('at step 700,003 · rank 0: 3 · rank 1: 3.1');
  expect(asked.length).toBe(3);
  const means = { 0: { ...columns([1], [7.5]), is_exact: false }, 1: { ...columns([2], [7.5]), is_exact: false } };
  expect(rankWords(await exactNear(() => Promise.resolve(means), 7, 1, 9), 7)).toBe('means about step 8 · rank 0: 1 · rank 1: 2');
});

test('a carriage return writes over its line, each stream of each rank has its own', () => {
  const record = (rank: number, text: string, stream = 'stdout') =>
    ({ rank, seq: 1, t: 0, kind: stream, stream, text, html: '', image: '', is_warning: false });
  const records = [record(0, 'a 1%\r'), record(1, 'one'), record(0, 'a 2%\rdone\n'), record(1, ' line\nnext\n'), record(0, '\x1b[31mred\x1b[0m\n', 'stderr')];
  expect(linesOf(records, null).map(line => `${line.rank} ${line.text}`)).toEqual(['0 done', '1 one line', '1 next', '0 red']);
  expect(linesOf(records, 1).map(line => line.text)).toEqual(['one line', 'next']);
});

test('runs are compared by what differs', () => {
  expect(differingRows([{ lr: 1, n: 2 }, { lr: 1, n: 4, seed: 'x' }])).toEqual([
    { name: 'n', values: ['2', '4'] },
    { name: 'seed', values: ['', 'x'] }
  ]);
  expect(lineDifference('a\nb\nc', 'a\nx\nc').map(line => `${line.kind} ${line.text}`)).toEqual(['same a', 'removed b', 'added x', 'same c']);
});

test('many ranks are summed up by their states', () => {
  const rank = (state: string) => ({ state }) as Parameters<typeof summary>[0][number];
  expect(summary([rank('running'), rank('late'), rank('running')])).toBe('3 ranks: 2 running · 1 late');
});

test('the font of the axes has whole pixels, which uPlot can multiply', () => {
  expect(FONT).toMatch(/^\d+px /);
});

test('compared runs differ by colour and by dash', () => {
  expect(new Set([0, 1, 2, 3].map(comparedColor)).size).toBe(4);
  expect(new Set([0, 1, 2, 3].map(at => dashOf(at).join())).size).toBe(4);
});

test('a stretch that was fetched serves what is near it, and no wider view', () => {
  const whole: Range = [0, 1000];
  const fetched = fetchedFor([400, 500]);
  expect(fetched).toEqual([300, 600]);
  expect(shows(fetched, [400, 500], whole, false)).toBe(true);
  expect(shows(fetched, [460, 560], whole, false)).toBe(true); // moved along
  expect(shows(fetched, [480, 580], whole, false)).toBe(false); // near its end
  expect(shows(fetched, [430, 490], whole, false)).toBe(false); // nearer: finer ones are wanted
  expect(shows(fetched, [430, 490], whole, true)).toBe(true); // there are no finer ones
  expect(shows(fetchedFor([900, 1000]), [905, 1000], whole, false)).toBe(true); // there is nothing beyond
  expect(shows(fetchedFor([0, 100]), [0, 90], whole, false)).toBe(true);
});

test('the range of values is that of the stretch alone', () => {
  const table = tableOf(columns([5, 1, 2, 3, 9]), 'step', 0, 0);
  const { range } = valueRange([table], [1, 3], false, true);
  expect(range[0]).toBeCloseTo(1 - 0.12);
  expect(range[1]).toBeCloseTo(3 + 0.12);
  expect(stepsOf(columns([5, 1, 2, 3, 9]), table, [1.5, 2.5])).toEqual([1, 3]);
  expect(valueRange([table], [7, 8], false, true).range).toEqual([0, 1]);
});
