// One metric: its curve over all ranks, what it is now, and what a cursor points at.
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from 'preact/hooks';

import type { Columns, LatestValue, Mark, Window } from '../../api/types';
import { formatCount, formatNumber } from '../../format';
import { useTrans } from '../../translation';
import { Name } from '../name';
import { type Drawing, Plot, scaled } from './plot';
import {
  clockLabel,
  fetchedFor,
  nearestRow,
  numNotFinite,
  type Range,
  shows,
  stepsOf,
  type Table,
  tableOf,
  valueRange,
  withWindow,
  type XAxis,
  xRange
} from './plot-data';

const HEIGHT = 140;
const WINDOW_POINTS = 2400; // of a stretch and as much on either side: one for each pixel of a wide chart
const MAX_POINTS = 2000; // that the server gives at once
const MAX_NARROWED = 3; // times that it is asked for a shorter stretch, each a thousandth of the one before
const FETCH_AFTER_MS = 120; // without a move of the mouse
const MAX_RANKS = 8; // whose values are told one by one

/** A run's curve in a chart; the first is that of the run itself, the others are compared with it. */
export interface ChartCurve {
  runId: string;
  label: string;
  columns: Columns;
  start: number;
  color: string;
  dash: number[];
}

/** Gives a stretch of a metric; null where there is no server to ask. */
export type FetchSeries =
  | ((
      runId: string,
      metric: string,
      window: { from?: number; to?: number; points: number; by: 'mean' | 'rank' }
    ) => Promise<Record<string, Window>>)
  | null;

export interface ChartProps {
  name: string;
  curves: ChartCurve[];
  latest: LatestValue | undefined;
  marks: readonly Mark[];
  axis: XAxis;
  smoothing: number;
  isLog: boolean;
  zoom: Range | null;
  syncKey: string;
  fetchSeries: FetchSeries;
  onZoom(range: Range | null): void;
  onLog(isLog: boolean): void;
}

export function Chart(props: ChartProps) {
  const { name, curves, latest, axis, smoothing, zoom } = props;
  const trans = useTrans();
  const [showAll, setShowAll] = useState(false);
  const [pointed, setPointed] = useState<{ x: number; isOwn: boolean } | null>(null);
  const windows = useWindows(props);
  const isNear = zoom !== null;
  const data = useMemo(() => {
    const columns = curves.map((curve, at) => withWindow(curve.columns, isNear ? (windows[at] ?? null) : null));
    const linear = columns.map((one, at) => tableOf(one, axis, curves[at]?.start ?? 0, smoothing));
    const { canLog } = valueRange(linear, [-Infinity, Infinity], false, true);
    const isLog = props.isLog && canLog;
    const tables = isLog ? columns.map((one, at) => tableOf(one, axis, curves[at]?.start ?? 0, smoothing, true)) : linear;
    const drawnCurves = tables.map((table, at) => ({
      table,
      columns: columns[at] as Columns,
      color: curves[at]?.color ?? '',
      dash: curves[at]?.dash ?? []
    }));
    return { columns, tables, canLog, isLog, whole: xRange(linear), curves: drawnCurves };
  }, [curves, windows, isNear, axis, smoothing, props.isLog]);
  // Moving the stretch that is shown makes nothing of the data anew.
  const drawn = useMemo(() => {
    const x = zoom ?? data.whole;
    const { range, outside } = valueRange(data.tables, x, data.isLog, showAll);
    const drawing: Drawing = {
      curves: data.curves,
      axis,
      start: curves[0]?.start ?? 0,
      isLog: data.isLog,
      isSmoothed: smoothing > 0,
      x,
      y: range,
      marks: props.marks
    };
    return { ...data, x, outside, drawing };
  }, [data, zoom, showAll, props.marks.length, props.marks.at(-1)?.t]); // of very many marks the oldest are let go
  const place = useRef<HTMLDivElement>(null);
  const plot = usePlot(place, drawn.drawing, props, setPointed);
  const table = drawn.tables[0];
  const row = pointed && table?.x.length ? nearestRow(table.x, pointed.x) : null;
  const exact = useExact(props, drawn.columns[0], row === null ? null : (table?.row[row] ?? null), pointed?.isOwn ?? false);
  const at = row === null ? null : (table?.row[row] ?? null);
  const shown = drawn.columns[0];
  const readout = at === null || !shown ? '' : readoutOf(shown, at, axis, curves[0]?.start ?? 0);
  const isWide = at !== null && shown && formatNumber(shown.low[at], 3) !== formatNumber(shown.high[at], 3);
  const spread = isWide && shown.mean[at] !== null ? `${formatNumber(shown.low[at], 3)} to ${formatNumber(shown.high[at], 3)}` : '';
  const value = at === null || !shown ? (latest?.text ?? '') : formatNumber(shown.mean[at]);
  const numBad = curves[0] ? numNotFinite(curves[0].columns) : 0;
  const bad = numBad ? trans._n('%1 value is NaN or infinite', '%1 values are NaN or infinite', numBad) : '';
  const note = [latest?.note, drawn.outside, latest?.alarm ? '' : bad].filter(Boolean).join(' · ');
  const move = (by: number) => {
    if (!table?.x.length) return;
    const from = row ?? table.x.length - 1;
    const next = Math.max(0, Math.min(table.x.length - 1, from + by));
    plot.current?.pointAt(table.x[next] as number);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    const [low, high] = drawn.x;
    const around = pointed?.x ?? (low + high) / 2;
    const width = high - low;
    const actions: Record<string, () => void> = {
      ArrowLeft: () => (event.shiftKey ? props.onZoom([low - width / 10, high - width / 10]) : move(-1)),
      ArrowRight: () => (event.shiftKey ? props.onZoom([low + width / 10, high + width / 10]) : move(1)),
      PageUp: () => move(-Math.ceil((table?.x.length ?? 0) / 10)),
      PageDown: () => move(Math.ceil((table?.x.length ?? 0) / 10)),
      Home: () => move(-Infinity),
      End: () => move(Infinity),
      '+': () => props.onZoom(scaled(drawn.x, around, 0.5)),
      '=': () => props.onZoom(scaled(drawn.x, around, 0.5)),
      '-': () => props.onZoom(scaled(drawn.x, around, 2)),
      '0': () => props.onZoom(null)
    };
    const action = actions[event.key];
    if (action) {
      event.preventDefault();
      event.stopPropagation(); // no key of the notebook
      action();
    }
  };
  const spoken = pointed?.isOwn && readout ? `${name}, ${readout}: ${value}${spread ? `, ${spread}` : ''}` : '';
  return (
    <figure class="llmc-chart" data-metric={name}>
      <figcaption class="llmc-chart-head">
        <Name class="llmc-chart-name" text={name} />
        {latest?.alarm && <span class="llmc-warning">⚠ {latest.alarm}</span>}
        <span class="llmc-readout">{readout && [readout, spread].filter(Boolean).join(' · ')}</span>
        <span class="llmc-value">{value}</span>
      </figcaption>
      <div class="llmc-chart-line">
        <span class="llmc-chart-note" title={note}>{note}</span>
        {(drawn.outside || showAll) && (
          <button type="button" class="llmc-mini" aria-pressed={showAll ? 'true' : 'false'} onClick={() => setShowAll(!showAll)}>
            {trans.__('show all')}
          </button>
        )}
        {zoom && (
          <button type="button" class="llmc-mini" aria-label={trans.__('show the whole of %1', name)} onClick={() => props.onZoom(null)}>
            {trans.__('reset zoom')}
          </button>
        )}
        <button
          type="button"
          class="llmc-mini llmc-log"
          disabled={!drawn.canLog}
          aria-pressed={drawn.isLog ? 'true' : 'false'}
          aria-label={trans.__('logarithmic scale for %1', name)}
          onClick={() => props.onLog(!props.isLog)}
        >
          log
        </button>
      </div>
      <div
        ref={place}
        class="llmc-plot"
        style={{ height: `${HEIGHT}px` }}
        tabIndex={0}
        role="img"
        aria-label={words(name, curves[0]?.columns, latest)}
        aria-description={trans.__('Arrow keys move the cursor, plus and minus zoom, 0 shows all.')}
        data-points={curves[0]?.columns.step.length ?? 0}
        data-window={windows[0]?.step.length ?? 0}
        data-from={drawn.x[0]}
        data-to={drawn.x[1]}
        onKeyDown={onKeyDown}
        onBlur={() => plot.current?.hideCursor()}
      />
      <div class="llmc-rank-values">{exact || latest?.ranks || ''}</div>
      <span class="llmc-hidden-text" role="status">
        {spoken}
      </span>
    </figure>
  );
}

function readoutOf(columns: Columns, at: number, axis: XAxis, start: number): string {
  const step = columns.step[at] ?? 0;
  const whole = Number.isInteger(columns.step[0]) ? Math.round(step) : step;
  if (axis === 'time') return `${clockLabel((columns.time[at] ?? start) - start)} · step ${formatCount(whole)}`;
  if (axis === 'epoch') return `epoch ${formatNumber(columns.epoch[at])} · step ${formatCount(whole)}`;
  return `step ${formatCount(whole)}`;
}

/** What the chart shows, for whoever does not see it. */
function words(name: string, columns: Columns | undefined, latest: LatestValue | undefined): string {
  const means = columns?.mean.filter(mean => mean !== null) ?? [];
  if (!means.length || !latest) return name;
  const low = formatNumber(means.reduce((one, other) => Math.min(one, other)));
  const high = formatNumber(means.reduce((one, other) => Math.max(one, other)));
  const facts = [`${name}: ${latest.text} at step ${formatCount(latest.step)}, from ${low} to ${high}`, latest.note, latest.ranks];
  return facts.filter(Boolean).join('; ');
}

/** The plot in the place: made when first drawn or for another kind of scale, told what is new else. */
function usePlot(
  place: { current: HTMLDivElement | null },
  drawing: Drawing,
  props: ChartProps,
  setPointed: (pointed: { x: number; isOwn: boolean } | null) => void
): { current: Plot | null } {
  const plot = useRef<Plot | null>(null);
  const latest = useRef(props);
  latest.current = props;
  const signature = Plot.signature(drawing);
  const made = useRef('');
  useLayoutEffect(() => {
    if (!place.current) return;
    if (plot.current && made.current === signature) {
      if (plot.current.drawing !== drawing) plot.current.update(drawing);
      return;
    }
    plot.current?.destroy();
    made.current = signature;
    const listener = {
      point: (x: number | null, isOwn: boolean) => setPointed(x === null ? null : { x, isOwn }),
      zoom: (range: Range | null) => latest.current.onZoom(range)
    };
    plot.current = new Plot(place.current, drawing, listener, props.syncKey, HEIGHT);
  });
  useEffect(() => () => plot.current?.destroy(), []);
  return plot;
}

/**
 * What is zoomed into, of each curve, as fine as it can be shown, and as much on either side; the overview until it is
 * there. Kept as long as it shows what is looked at: moving along costs no request.
 */
function useWindows({ name, curves, axis, zoom, fetchSeries }: ChartProps): (Window | null)[] {
  const [windows, setWindows] = useState<(Window | null)[]>([]);
  const latest = useRef(curves);
  latest.current = curves;
  const known = useRef<{ key: string; stretch: Range; isExact: boolean } | null>(null);
  const wanted = useRef<{ key: string; zoom: Range } | null>(null);
  const ids = curves.map(curve => curve.runId).join();
  const key = `${axis} ${ids} ${name}`;
  useEffect(() => {
    wanted.current = zoom && { key, zoom };
    if (!zoom || !fetchSeries) {
      known.current = null;
      setWindows([]);
      return;
    }
    if (known.current && known.current.key !== key) {
      known.current = null;
      setWindows([]);
    }
    const timer = window.setTimeout(() => {
      const tables = latest.current.map(curve => tableOf(curve.columns, axis, curve.start, 0));
      if (known.current && shows(known.current.stretch, zoom, xRange(tables), known.current.isExact)) return;
      const stretch = fetchedFor(zoom);
      const asked = latest.current.map(async (curve, at) => {
        const [from, to] = stepsOf(curve.columns, tables[at] as Table, stretch);
        const answer = await fetchSeries(curve.runId, name, { from, to, points: WINDOW_POINTS, by: 'mean' });
        return answer['mean'] ?? null;
      });
      // A stretch that cannot be had is shown as the overview has it.
      void Promise.all(asked.map(one => one.catch(() => null))).then(found => {
        const now = wanted.current; // it may have moved on meanwhile
        if (now?.key !== key || now.zoom[0] < stretch[0] || now.zoom[1] > stretch[1]) return;
        known.current = { key, stretch, isExact: found.every(one => one?.is_exact) };
        setWindows(found);
      });
    }, FETCH_AFTER_MS);
    return () => window.clearTimeout(timer);
  }, [key, zoom?.[0], zoom?.[1], fetchSeries]);
  useEffect(() => () => void (wanted.current = null), []);
  return windows;
}

/** Each rank's exact value at the row that is pointed at, in words; empty until the server has told. */
function useExact(
  { name, curves, fetchSeries }: ChartProps,
  columns: Columns | undefined,
  row: number | null,
  isOwn: boolean
): string {
  const [told, setTold] = useState<{ key: string; text: string }>({ key: '', text: '' });
  const cache = useRef(new Map<string, string>());
  const runId = curves[0]?.runId ?? '';
  const step = row === null || !columns ? null : (columns.step[row] ?? null);
  const before = row === null || !columns ? null : (columns.step[row - 1] ?? null);
  const after = row === null || !columns ? null : (columns.step[row + 1] ?? null);
  const key = step === null ? '' : `${step} ${before} ${after}`;
  useEffect(() => {
    if (step === null || !fetchSeries || !isOwn) return;
    const known = cache.current.get(key);
    if (known !== undefined) {
      setTold({ key, text: known });
      return;
    }
    let isOld = false;
    const timer = window.setTimeout(() => {
      const from = before === null ? step : (before + step) / 2;
      const to = after === null ? step : (after + step) / 2;
      const within = (first: number, last: number) => fetchSeries(runId, name, { from: first, to: last, points: MAX_POINTS, by: 'rank' });
      exactNear(within, step, from, to).then(
        ranks => {
          const text = rankWords(ranks, step);
          cache.current.set(key, text);
          if (!isOld) setTold({ key, text });
        },
        () => undefined // what the ranks had last stays
      );
    }, FETCH_AFTER_MS);
    return () => {
      isOld = true;
      window.clearTimeout(timer);
    };
  }, [key, isOwn, fetchSeries, runId, name]);
  return key && told.key === key ? told.text : '';
}

/** What ranks had about a step: of a stretch with more steps than are told at once, those of an ever shorter one. */
export async function exactNear(
  within: (from: number, to: number) => Promise<Record<string, Window>>,
  step: number,
  from: number,
  to: number
): Promise<Record<string, Window>> {
  for (let left = MAX_NARROWED; ; left -= 1) {
    const ranks = await within(from, to);
    const rows = Object.values(ranks).filter(columns => columns.step.length);
    if (left === 0 || rows.every(columns => columns.is_exact)) return ranks;
    const places = rows.map(columns => [columns.step, nearestRow(columns.step, step)] as const);
    const [first, last] = [from, to];
    from = Math.min(...places.map(([steps, at]) => steps[at - 1] ?? first));
    to = Math.max(...places.map(([steps, at]) => steps[at + 1] ?? last));
  }
}

/** "rank 0: 1.23 · rank 1: 1.25", of many ranks the lowest and the highest; at the step nearest to `step`. */
export function rankWords(ranks: Record<string, Window>, step: number): string {
  const found = Object.entries(ranks).flatMap(([rank, columns]) => {
    if (!columns.step.length) return [];
    const at = nearestRow(columns.step, step);
    return [{ rank: Number(rank), step: columns.step[at] as number, value: columns.mean[at] ?? null }];
  });
  if (found.length < 2) return '';
  const isExact = Object.values(ranks).every(columns => columns.is_exact || !columns.step.length);
  const at = isExact ? `at step ${formatCount(found[0]?.step)}` : `means about step ${formatCount(Math.round(found[0]?.step ?? step))}`;
  const say = (one: { rank: number; value: number | null }) => `rank ${one.rank}: ${formatNumber(one.value, 5)}`;
  if (found.length <= MAX_RANKS) return `${at} · ${found.map(say).join(' · ')}`;
  const finite = found.filter(one => one.value !== null).sort((one, other) => (one.value as number) - (other.value as number));
  const [lowest, highest] = [finite[0], finite[finite.length - 1]];
  return lowest && highest ? `${at} · lowest ${say(lowest)} · highest ${say(highest)}` : `${at} · not finite`;
}
