// What the ranks wrote: folded, a tab for each rank, following, searched.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';

import type { OutputRecord } from '../../api/types';
import { plainText } from '../../format';
import { GAP } from '../../stores/watched-run';
import { useTrans } from '../../translation';

const MAX_TABS = 8; // of many ranks one is chosen from a list
const MAX_LINES = 2000; // shown at once

export interface Line {
  rank: number;
  stream: string;
  text: string;
}

interface OutputProps {
  records: readonly OutputRecord[];
  skipped: number;
  logUrl: string | undefined;
}

export function Output({ records, skipped, logUrl }: OutputProps) {
  const trans = useTrans();
  const [isOpen, setOpen] = useState(false);
  return (
    <details class="llmc-fold llmc-output" open={isOpen} onToggle={event => setOpen(event.currentTarget.open)}>
      <summary>{trans.__('Output of the ranks')}</summary>
      {isOpen && <Opened records={records} skipped={skipped} logUrl={logUrl} />}
    </details>
  );
}

function Opened({ records, skipped, logUrl }: OutputProps) {
  const trans = useTrans();
  const [rank, setRank] = useState<number | null>(null);
  const [search, setSearch] = useState('');
  const [isFollowing, setFollowing] = useState(true);
  const text = useRef<HTMLDivElement>(null);
  const ranks = useMemo(() => [...new Set(records.map(record => record.rank))].sort((one, other) => one - other), [records]);
  const lines = useMemo(() => linesOf(records, rank), [records, rank]);
  const wanted = search.toLowerCase();
  const found = wanted ? lines.filter(line => line.text.toLowerCase().includes(wanted)) : lines;
  const shown = found.slice(-MAX_LINES);
  const numHidden = found.length - shown.length;
  useEffect(() => {
    if (isFollowing && text.current) text.current.scrollTop = text.current.scrollHeight;
  });
  const choices = [null, ...ranks];
  const onKeyDown = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const next = choices[(choices.indexOf(rank) + by + choices.length) % choices.length] ?? null;
    setRank(next);
    const tabs = (event.currentTarget as HTMLElement).querySelectorAll<HTMLElement>('[role=tab]');
    tabs[choices.indexOf(next)]?.focus();
  };
  const label = (one: number | null) => (one === null ? trans.__('all ranks') : one < 0 ? trans.__('the run') : trans.__('rank %1', one));
  return (
    <>
      <div class="llmc-toolbar">
        {ranks.length <= MAX_TABS ? (
          <div class="llmc-tabs" role="tablist" aria-label={trans.__('output of')} onKeyDown={onKeyDown}>
            {choices.map(one => (
              <button
                type="button"
                role="tab"
                key={one}
                tabIndex={one === rank ? 0 : -1}
                aria-selected={one === rank ? 'true' : 'false'}
                onClick={() => setRank(one)}
              >
                {label(one)}
              </button>
            ))}
          </div>
        ) : (
          <select
            class="llmc-field"
            aria-label={trans.__('output of')}
            value={rank ?? ''}
            onChange={event => setRank(event.currentTarget.value === '' ? null : Number(event.currentTarget.value))}
          >
            {choices.map(one => (
              <option key={one} value={one ?? ''}>
                {label(one)}
              </option>
            ))}
          </select>
        )}
        <input
          type="search"
          class="llmc-field"
          placeholder={trans.__('Search')}
          aria-label={trans.__('Search the output')}
          value={search}
          onInput={event => setSearch(event.currentTarget.value)}
        />
        {wanted && <span class="llmc-soft">{trans._n('%1 line', '%1 lines', found.length)}</span>}
        {!isFollowing && (
          <button type="button" class="llmc-mini" onClick={() => setFollowing(true)}>
            {trans.__('follow')}
          </button>
        )}
      </div>
      {(skipped > 0 || numHidden > 0) && (
        <div class="llmc-soft">
          {trans.__('Older output is not shown here.')}{' '}
          {logUrl && (
            <a href={logUrl} target="_blank" rel="noreferrer">
              {trans.__('The log has all of it.')}
            </a>
          )}
        </div>
      )}
      <div
        class="llmc-text"
        ref={text}
        tabIndex={0}
        role="tabpanel"
        aria-label={label(rank)}
        onScroll={event => {
          const { scrollTop, scrollHeight, clientHeight } = event.currentTarget;
          setFollowing(scrollTop + clientHeight >= scrollHeight - 4);
        }}
      >
        {shown.map((line, at) => (
          <div key={numHidden + at} data-stream={line.stream}>
            {rank === null && line.rank >= 0 && <span class="llmc-who">[{line.rank}] </span>}
            {line.text}
          </div>
        ))}
      </div>
    </>
  );
}

/** The lines of one rank, or of all in order of time; a carriage return writes over its line. */
export function linesOf(records: readonly OutputRecord[], rank: number | null): Line[] {
  const lines: Line[] = [];
  const open = new Map<string, Line>(); // begun and not ended yet, of each stream of each rank
  for (const record of records) {
    if (rank !== null && record.rank !== rank) continue;
    if (record.kind === 'clear_output') continue;
    if (record.kind === GAP) [...open.keys()].filter(key => key.startsWith(`${record.rank} `)).forEach(key => open.delete(key));
    const stream = record.stream || record.kind;
    const key = `${record.rank} ${stream}`;
    const text = plainText(record.text || (record.image ? '(image)' : ''));
    const parts = text.split('\n');
    parts.forEach((part, at) => {
      let line = open.get(key);
      if (!line) {
        if (!part && at === parts.length - 1) return;
        line = { rank: record.rank, stream, text: '' };
        open.set(key, line);
        lines.push(line);
      }
      line.text = overwritten(line.text + part);
      if (at < parts.length - 1) open.delete(key);
    });
    if (!record.stream) open.delete(key);
  }
  return lines;
}

function overwritten(text: string): string {
  const kept = text.endsWith('\r') ? text.slice(0, -1) : text;
  const last = kept.slice(kept.lastIndexOf('\r') + 1);
  return text.endsWith('\r') ? `${last}\r` : last;
}
