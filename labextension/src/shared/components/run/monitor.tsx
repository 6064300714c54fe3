// The monitor of a run: everything about one run in one card, in a cell and in a tab.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';

import type { Mark, RunInfo } from '../../api/types';
import type { Rest } from '../../api/rest';
import { formatElapsed, isActive, plainText } from '../../format';
import { type Observable, useValue } from '../../stores/observable';
import type { Client } from '../../stores/client';
import type { RunState } from '../../stores/watched-run';
import { useTrans } from '../../translation';
import { type ChartLayout, Charts, PLAIN } from '../chart/charts';
import type { FetchSeries } from '../chart/chart';
import { Name } from '../name';
import { Actions } from './actions';
import { Comparison, CompareWith, useCompared } from './compare';
import { Output } from './output';
import { Phases } from './phases';
import { Progress } from './progress';
import { Ranks } from './ranks';

export interface RunMonitorProps {
  run: Observable<RunState>;
  runId: string;
  /** Known before anything else is. */
  name: string;
  /** null where the server of the page cannot be asked: what the kernel sends is shown. */
  client: Client | null;
  /** The server of the page, which may carry out what it cannot show. */
  rest?: Rest | null;
  /** Asks the kernel to stop the run, where the server cannot be reached. */
  stopByKernel?: () => void;
  /** The metrics in powers of ten have changed; told to the kernel, which saves them. */
  onLogScales?: (names: string[]) => void;
  /** Opens what serves the model of the run; without it the server is asked at once. */
  onServe?: (info: RunInfo) => void;
}

export function RunMonitor(props: RunMonitorProps) {
  const { run, runId, client } = props;
  const trans = useTrans();
  const state = useValue(run);
  const card = useRef<HTMLElement>(null);
  const [layout, setLayout, isPinned, pin] = useLayout(state.info, client?.rest ?? props.rest ?? null, runId, props.onLogScales);
  const [compared, setCompared] = useState<string[]>([]);
  const others = useCompared(client, compared);
  const fetchSeries = useMemo<FetchSeries>(() => client && ((id, metric, window) => client.rest.series(id, metric, window)), [client]);
  useReturningFocus(card);
  const info = state.info;
  const name = info?.name ?? props.name;
  return (
    <section class="llmc-card llmc-run" aria-label={trans.__('run %1', name)} ref={card}>
      <Header {...props} name={name} info={info} />
      {state.problem && (
        <div class="llmc-hint" role="status">
          {state.problem}
        </div>
      )}
      {info?.notice && (
        <div class="llmc-notice" role="alert">
          ⚠ {info.notice}
        </div>
      )}
      {info && <Errors info={info} />}
      {info && !state.series.size && isActive(info.state) && <Phases info={info} />}
      {info && isActive(info.state) && <Progress bars={info.progress} />}
      {state.isGone && (
        <div class="llmc-notice" role="alert">
          {trans.__('This run was deleted, or the server does not know it. What is shown is how it was last.')}
        </div>
      )}
      {!info && !state.isGone && (
        <div class="llmc-hint" role="status">
          {trans.__('Asking the server about this run …')}
        </div>
      )}
      <Charts
        runId={runId}
        runName={name}
        state={state}
        others={others}
        layout={layout}
        fetchSeries={fetchSeries}
        onLayout={setLayout}
      >
        {client && <CompareWith client={client} runId={runId} chosen={compared} onChoose={setCompared} />}
        {client && (
          <button
            type="button"
            class="llmc-mini"
            aria-pressed={isPinned ? 'true' : 'false'}
            title={trans.__('Keep axis, smoothing, scales and folded groups for this and the next runs named %1', name)}
            onClick={pin}
          >
            {isPinned ? trans.__('layout pinned') : trans.__('pin layout')}
          </button>
        )}
      </Charts>
      {info && info.num_left_out > 0 && (
        <p class="llmc-soft">{trans.__('More metrics were logged than are drawn here: %1 tells of all.', `%runs show ${runId}`)}</p>
      )}
      {client && others.length > 0 && (
        <Comparison client={client} runId={runId} name={name} state={info?.state ?? ''} others={others} />
      )}
      {info && <Ranks ranks={info.ranks} />}
      {info && <Story marks={info.marks} notes={info.notes} created={info.created} />}
      {state.output.length > 0 && <Output records={state.output} skipped={state.skipped} logUrl={client?.rest.logUrl(runId)} />}
    </section>
  );
}

function Header(props: RunMonitorProps & { info: RunInfo | null }) {
  const { info, name } = props;
  const [hint, setHint] = useState({ text: '', isProblem: false });
  const state = info?.state ?? '';
  return (
    <>
      <div class="llmc-header">
        <span class="llmc-dot" data-state={state} />
        <Name class="llmc-name" text={name} />
        <span class="llmc-state" role="status">
          {state}
        </span>
        <Clock info={info} />
        {info && <Actions {...props} info={info} onHint={(text, isProblem = false) => setHint({ text, isProblem })} />}
      </div>
      {hint.text && (
        <div class={hint.isProblem ? 'llmc-hint' : 'llmc-soft'} role="status">
          {hint.text}
        </div>
      )}
    </>
  );
}

/** Counts on by itself between two messages. */
function Clock({ info }: { info: RunInfo | null }) {
  const [, tick] = useState(0);
  const heard = useRef({ elapsed: 0, at: 0 });
  const goesOn = info !== null && isActive(info.state);
  useMemo(() => {
    heard.current = { elapsed: info?.elapsed_s ?? 0, at: performance.now() };
  }, [info]);
  useEffect(() => {
    if (!goesOn) return;
    const timer = window.setInterval(() => tick(count => count + 1), 1000);
    return () => window.clearInterval(timer);
  }, [goesOn]);
  if (!info) return null;
  const since = goesOn ? (performance.now() - heard.current.at) / 1000 : 0;
  return <span class="llmc-clock">{formatElapsed(heard.current.elapsed + since)}</span>;
}

const NUM_ERRORS = 8;

function Errors({ info }: { info: RunInfo }) {
  const trans = useTrans();
  if (!info.errors.length) return null;
  return (
    <ul class="llmc-errors" aria-label={trans.__('errors')}>
      {info.errors.slice(0, NUM_ERRORS).map(error => (
        <li key={error.rank}>
          <details>
            <summary>
              {error.rank >= 0 && trans.__('rank %1: ', error.rank)}
              {error.ename || trans.__('error')}
              {error.evalue && `: ${error.evalue.trim().split('\n')[0]}`}
            </summary>
            <pre>{plainText(error.traceback || error.evalue)}</pre>
          </details>
        </li>
      ))}
      {info.errors.length > NUM_ERRORS && <li>{trans.__('… and %1 more errors', info.errors.length - NUM_ERRORS)}</li>}
    </ul>
  );
}

/** What happened on the way: marks and notes, folded. */
function Story({ marks, notes, created }: { marks: readonly Mark[]; notes: readonly string[]; created: number }) {
  const trans = useTrans();
  if (!marks.length && !notes.length) return null;
  const count = marks.length + notes.length;
  return (
    <details class="llmc-fold">
      <summary>
        {trans.__('Events')} <span class="llmc-count">{count}</span>
      </summary>
      <ul class="llmc-story">
        {notes.map(note => (
          <li key={note}>{note}</li>
        ))}
        {marks.map((mark, at) => (
          <li key={at}>
            <span class="llmc-when">
              {formatElapsed(mark.t - created)}
              {mark.step !== null && ` · ${trans.__('step %1', mark.step)}`}
            </span>{' '}
            <b>{mark.kind}</b> {mark.text}
          </li>
        ))}
      </ul>
    </details>
  );
}

/** The layout of the charts: the pinned one until the user changes it. */
function useLayout(
  info: RunInfo | null,
  rest: Rest | null,
  runId: string,
  onLogScales?: (names: string[]) => void
): [ChartLayout, (layout: ChartLayout) => void, boolean, () => void] {
  const kept = (info?.layout ?? null) as Partial<ChartLayout> | null;
  const [own, setOwn] = useState<ChartLayout | null>(null);
  const [pinned, setPinned] = useState<ChartLayout | null>(null);
  const log = info?.log_scales ?? [];
  const given: ChartLayout = { ...PLAIN, ...kept, log: log.length ? log : (kept?.log ?? []) };
  const layout = own ?? given;
  const change = (next: ChartLayout) => {
    setOwn(next);
    if (next.log !== layout.log) {
      onLogScales?.(next.log);
      void rest?.keepView(runId, { log: next.log }).catch(() => undefined); // seen here all the same
    }
  };
  const isPinned = same(layout, pinned ?? (kept ? given : null));
  const pin = () => {
    const next = isPinned ? null : layout;
    setPinned(next);
    void rest?.keepView(runId, { log: layout.log, layout: { ...next } }).catch(() => setPinned(pinned));
  };
  return [layout, change, isPinned, pin];
}

function same(one: ChartLayout, other: ChartLayout | null): boolean {
  return other !== null && JSON.stringify(one) === JSON.stringify(other);
}

/** Escape gives the focus back to where it was before it came here: the cell, usually. */
function useReturningFocus(card: { current: HTMLElement | null }): void {
  useEffect(() => {
    const element = card.current;
    if (!element) return;
    let before: HTMLElement | null = null;
    const remember = (event: FocusEvent) => {
      if (!element.contains(event.relatedTarget as Node | null)) before = event.relatedTarget as HTMLElement | null;
    };
    const leave = (event: KeyboardEvent) => {
      if (event.key !== 'Escape' || event.defaultPrevented) return;
      event.stopPropagation();
      const back = before?.isConnected ? before : element.closest<HTMLElement>('.jp-Notebook, [tabindex]');
      if (back) back.focus({ preventScroll: true });
      else (document.activeElement as HTMLElement | null)?.blur();
    };
    element.addEventListener('focusin', remember);
    element.addEventListener('keydown', leave);
    return () => {
      element.removeEventListener('focusin', remember);
      element.removeEventListener('keydown', leave);
    };
  }, []);
}
