// The charts of a run: grouped by what their names begin with, filtered, drawn only where they can be seen.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';
import type { ComponentChildren } from 'preact';

import type { LatestValue, Mark } from '../../api/types';
import type { RunState } from '../../stores/watched-run';
import { useTrans } from '../../translation';
import { Chart, type FetchSeries } from './chart';
import { comparedColor, dashOf, shownColor } from './palette';
import type { Range, XAxis } from './plot-data';

/** How charts are shown; kept with the run when it is pinned. */
export interface ChartLayout {
  axis: XAxis;
  smoothing: number;
  log: string[];
  folded: string[];
}

export const PLAIN: ChartLayout = { axis: 'step', smoothing: 0, log: [], folded: [] };

/** Another run whose curves are drawn, too. */
export interface Compared {
  runId: string;
  name: string;
  state: RunState;
}

export interface ChartsProps {
  runId: string;
  runName: string;
  state: RunState;
  others: readonly Compared[];
  layout: ChartLayout;
  fetchSeries: FetchSeries;
  children?: ComponentChildren;
  onLayout(layout: ChartLayout): void;
}

const FEW = 6; // metrics that need no filter and no groups
const NO_MARKS: readonly Mark[] = [];

export function Charts({ runId, runName, state, others, layout, fetchSeries, onLayout, children }: ChartsProps) {
  const trans = useTrans();
  const [filter, setFilter] = useState('');
  const [zoom, setZoom] = useState<Range | null>(null);
  const names = [...state.series.keys()];
  const listed = names.join('\n');
  const groups = useMemo(() => grouped(names.filter(name => matches(name, filter))), [listed, filter]);
  const hasEpochs = [...state.series.values()].some(series => series.epoch.some(epoch => epoch !== null));
  const set = (change: Partial<ChartLayout>) => onLayout({ ...layout, ...change });
  useEffect(() => setZoom(null), [layout.axis]); // a stretch of steps is none of seconds
  if (!names.length) return null;
  const chart = (name: string) => (
    <Lazy key={name}>
      <RunChart
        name={name}
        color={names.indexOf(name)}
        runId={runId}
        runName={runName}
        state={state}
        others={others}
        layout={layout}
        zoom={zoom}
        fetchSeries={fetchSeries}
        onZoom={setZoom}
        onLog={isLog => set({ log: isLog ? [...layout.log, name] : layout.log.filter(other => other !== name) })}
      />
    </Lazy>
  );
  return (
    <div class="llmc-chart-area">
      <div class="llmc-toolbar" role="toolbar" aria-label={trans.__('charts')}>
        {names.length > FEW && (
          <input
            type="search"
            class="llmc-field"
            placeholder={trans.__('Filter %1 metrics', names.length)}
            aria-label={trans.__('Filter metrics')}
            value={filter}
            onInput={event => setFilter(event.currentTarget.value)}
          />
        )}
        <label class="llmc-choice">
          {trans.__('over')}
          <select class="llmc-field" value={layout.axis} onChange={event => set({ axis: event.currentTarget.value as XAxis })}>
            <option value="step">{trans.__('steps')}</option>
            <option value="time">{trans.__('time')}</option>
            {(hasEpochs || layout.axis === 'epoch') && <option value="epoch">{trans.__('epochs')}</option>}
          </select>
        </label>
        <label class="llmc-choice">
          {trans.__('smoothing')}
          <input
            type="range"
            min="0"
            max="0.99"
            step="0.01"
            value={layout.smoothing}
            onInput={event => set({ smoothing: Number(event.currentTarget.value) })}
          />
        </label>
        {children}
      </div>
      {groups.map(([group, members]) =>
        group === null ? (
          <div class="llmc-charts" key="">
            {members.map(chart)}
          </div>
        ) : (
          <details
            class="llmc-group"
            key={group}
            open={!layout.folded.includes(group)}
            onToggle={event => {
              const isOpen = event.currentTarget.open;
              if (isOpen === layout.folded.includes(group)) {
                set({ folded: isOpen ? layout.folded.filter(other => other !== group) : [...layout.folded, group] });
              }
            }}
          >
            <summary>
              {group} <span class="llmc-count">{members.length}</span>
            </summary>
            <div class="llmc-charts">{members.map(chart)}</div>
          </details>
        )
      )}
      {!groups.length && <p class="llmc-empty">{trans.__('No metric has “%1” in its name.', filter)}</p>}
    </div>
  );
}

interface RunChartProps {
  name: string;
  color: number;
  runId: string;
  runName: string;
  state: RunState;
  others: readonly Compared[];
  layout: ChartLayout;
  zoom: Range | null;
  fetchSeries: FetchSeries;
  onZoom(range: Range | null): void;
  onLog(isLog: boolean): void;
}

function RunChart(props: RunChartProps) {
  const { name, runId, runName, state, others, layout } = props;
  const own = state.series.get(name);
  const beside = others.map(other => other.state.series.get(name));
  const start = state.info?.created ?? own?.time[0] ?? 0;
  const curves = useMemo(() => {
    if (!own) return [];
    const compared = others.flatMap((other, at) => {
      const columns = other.state.series.get(name);
      const began = other.state.info?.created ?? columns?.time[0] ?? 0;
      const look = { color: comparedColor(at + 1), dash: dashOf(at + 1) };
      return columns ? [{ runId: other.runId, label: other.name, columns, start: began, ...look }] : [];
    });
    const color = others.length ? comparedColor(0) : shownColor(props.color);
    return [{ runId, label: runName, columns: own, start, color, dash: dashOf(0) }, ...compared];
  }, [own, ...beside, runId, start, others.length, props.color]);
  const latest: LatestValue | undefined = state.info?.latest[name];
  return (
    <Chart
      name={name}
      curves={curves}
      latest={latest}
      marks={state.info?.marks ?? NO_MARKS}
      axis={layout.axis}
      smoothing={layout.smoothing}
      isLog={layout.log.includes(name)}
      zoom={props.zoom}
      syncKey={`llmc-${runId}`}
      fetchSeries={props.fetchSeries}
      onZoom={props.onZoom}
      onLog={props.onLog}
    />
  );
}

/** Its children, once the place where they stand is about to be seen, and while it is. */
function Lazy({ children }: { children: ComponentChildren }) {
  const place = useRef<HTMLDivElement>(null);
  const [isNear, setNear] = useState(false);
  useEffect(() => {
    const element = place.current;
    if (!element) return;
    const observer = new IntersectionObserver(entries => setNear(entries.some(entry => entry.isIntersecting)), {
      rootMargin: '200px'
    });
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  return (
    <div class="llmc-chart-place" ref={place}>
      {isNear && children}
    </div>
  );
}

/** Whether each word of the filter is in the name. */
export function matches(name: string, filter: string): boolean {
  const text = name.toLowerCase();
  return filter.toLowerCase().split(/\s+/).every(word => text.includes(word));
}

/** Metrics by what stands before the first slash; null where few metrics need no groups. */
export function grouped(names: readonly string[]): [string | null, string[]][] {
  const groups = new Map<string, string[]>();
  for (const name of names) {
    const prefix = name.includes('/') ? name.slice(0, name.indexOf('/')) : '';
    groups.set(prefix, [...(groups.get(prefix) ?? []), name]);
  }
  if (names.length <= FEW || groups.size < 2) return names.length ? [[null, [...names]]] : [];
  return [...groups].map(([prefix, members]) => [prefix || null, members]);
}
