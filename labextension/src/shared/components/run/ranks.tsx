// The ranks of a run: a chip each, of many a strip of cells; the slow and the dead stand out. One chosen is told in full.
import { useRef, useState } from 'preact/hooks';

import type { RankInfo } from '../../api/types';
import { serverNow } from '../../clock';
import { formatBytes, formatElapsed, formatNumber } from '../../format';
import { useTrans } from '../../translation';

const MAX_CHIPS = 8;
const PARTS = ['compute', 'communication', 'data', 'waiting', 'checkpoint'] as const;

export function Ranks({ ranks }: { ranks: readonly RankInfo[] }) {
  const trans = useTrans();
  const [chosen, setChosen] = useState<number | null>(null);
  const [focused, setFocused] = useState(0);
  const strip = useRef<HTMLUListElement>(null);
  if (!ranks.length) return null;
  const areMany = ranks.length > MAX_CHIPS;
  const told = ranks.find(rank => rank.rank === chosen);
  const move = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 16, ArrowUp: -16 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.max(0, Math.min(ranks.length - 1, focused + by));
    setFocused(next);
    strip.current?.querySelectorAll('button')[next]?.focus();
  };
  return (
    <div class="llmc-rank-area">
      {areMany && <div class="llmc-rank-summary">{summary(ranks)}</div>}
      <ul class={areMany ? 'llmc-strip' : 'llmc-ranks'} aria-label={trans.__('ranks')} ref={strip} onKeyDown={move}>
        {ranks.map((rank, at) => (
          <li class={areMany ? 'llmc-cell' : 'llmc-chip'} key={rank.rank} data-state={rank.state}>
            <button
              type="button"
              tabIndex={at === focused ? 0 : -1}
              aria-pressed={rank.rank === chosen ? 'true' : 'false'}
              aria-label={areMany ? `rank ${rank.rank}: ${rank.state}` : undefined}
              title={[`rank ${rank.rank}: ${rank.state}`, rank.detail].filter(Boolean).join(' · ')}
              onFocus={() => setFocused(at)}
              onClick={() => setChosen(rank.rank === chosen ? null : rank.rank)}
            >
              {areMany ? (
                rank.rank
              ) : (
                <>
                  <span class="llmc-chip-dot" />
                  <span>rank {rank.rank}</span>
                  <span class="llmc-chip-state">{rank.state}</span>
                </>
              )}
            </button>
            {rank.split && <Split rank={rank} isSmall />}
          </li>
        ))}
      </ul>
      {told && <RankDetails rank={told} />}
    </div>
  );
}

/** "62 running · 1 waiting · 1 late", the most frequent first. */
export function summary(ranks: readonly RankInfo[]): string {
  const counts = new Map<string, number>();
  ranks.forEach(rank => counts.set(rank.state, (counts.get(rank.state) ?? 0) + 1));
  const ordered = [...counts].sort((one, other) => other[1] - one[1]);
  return `${ranks.length} ranks: ${ordered.map(([state, count]) => `${count} ${state}`).join(' · ')}`;
}

function RankDetails({ rank }: { rank: RankInfo }) {
  const trans = useTrans();
  const seen = rank.last_seen === null ? '' : trans.__('%1 ago', formatElapsed(serverNow() - rank.last_seen));
  const facts: [string, string][] = [
    [trans.__('state'), [rank.state, rank.detail].filter(Boolean).join(': ')],
    [trans.__('host'), rank.host],
    [trans.__('device'), rank.device],
    [trans.__('process'), rank.pid ? String(rank.pid) : ''],
    [trans.__('memory'), formatBytes(rank.memory_bytes)],
    [trans.__('GPU memory'), formatBytes(rank.gpu_memory_bytes)],
    [trans.__('GPU use'), rank.utilization === null ? '' : `${Math.round(100 * rank.utilization)} %`],
    [trans.__('processor'), rank.cpu === null ? '' : trans.__('%1 cores', formatNumber(rank.cpu, 2))],
    [trans.__('looked at'), seen]
  ];
  return (
    <div class="llmc-rank-details" role="status">
      <b>{trans.__('rank %1', rank.rank)}</b>
      <dl>
        {facts.map(
          ([name, value]) =>
            value && (
              <div key={name}>
                <dt>{name}</dt>
                <dd>{value}</dd>
              </div>
            )
        )}
      </dl>
      {rank.split && <Split rank={rank} />}
    </div>
  );
}

/** Where a rank's time goes, as shares of a bar; in words where there is room. */
function Split({ rank, isSmall = false }: { rank: RankInfo; isSmall?: boolean }) {
  if (!rank.split) return null;
  const split = rank.split;
  const parts = PARTS.filter(part => split[part] > 0.005);
  const words = parts.map(part => `${part} ${Math.round(100 * split[part])} %`).join(', ');
  return (
    <div class={isSmall ? 'llmc-split llmc-small' : 'llmc-split'} title={words}>
      <div class="llmc-split-bar" role="img" aria-label={`rank ${rank.rank}: ${words}`}>
        {parts.map(part => (
          <span key={part} data-part={part} style={{ width: `${100 * split[part]}%` }} />
        ))}
      </div>
      {!isSmall && (
        <ul class="llmc-split-words">
          {parts.map(part => (
            <li key={part}>
              <span class="llmc-split-key" data-part={part} /> {part} {Math.round(100 * split[part])} %
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}
