import type { ProgressBar } from '../../api/types';
import { formatCount, formatDuration, formatNumber } from '../../format';
import { useTrans } from '../../translation';

/** The progress bars of a run, the outer one first. */
export function Progress({ bars }: { bars: readonly ProgressBar[] }) {
  return (
    <div class="llmc-progress">
      {bars.map((bar, at) => (
        <Bar key={at} bar={bar} />
      ))}
    </div>
  );
}

function Bar({ bar }: { bar: ProgressBar }) {
  const trans = useTrans();
  const share = bar.fraction === null ? null : bar.fraction * 100;
  return (
    <div class="llmc-bar-row">
      <div class="llmc-bar-words">
        {share !== null && <span class="llmc-percent">{Math.floor(share)} %</span>}
        <span class="llmc-desc">{bar.desc}</span>
        <span class="llmc-facts">{facts(bar)}</span>
      </div>
      <div
        class={`llmc-track${share === null ? ' llmc-unknown' : ''}`}
        role="progressbar"
        aria-label={bar.desc || trans.__('progress')}
        aria-valuemin={0}
        aria-valuemax={100}
        aria-valuenow={share === null ? undefined : Number(share.toFixed(0))}
      >
        <div class="llmc-fill" style={share === null ? {} : { width: `${share}%` }} />
      </div>
    </div>
  );
}

/** "6 of 10 · 2.1 per s · 2 s left". */
export function facts(bar: ProgressBar): string {
  const done = formatCount(bar.done);
  const words = [bar.total ? `${done} of ${formatCount(bar.total)}` : done];
  if (bar.waits) return [...words, bar.waits].join(' · ');
  if (bar.rate) {
    words.push(bar.rate >= 1 ? `${formatNumber(bar.rate, 3)} per s` : `${formatNumber(1 / bar.rate, 3)} s each`);
  }
  if (bar.eta !== null && (bar.fraction ?? 0) < 1) words.push(`${wholeSeconds(bar.eta)} left${interval(bar)}`);
  return words.join(' · ');
}

/** " (10 to 15 min)" by its ends, where they differ as they are written. */
function interval(bar: ProgressBar): string {
  const [low, high] = (bar.eta_range ?? [0, 0]).map(wholeSeconds);
  return low === high ? '' : ` (${low} to ${high})`;
}

function wholeSeconds(seconds: number): string {
  return formatDuration(Math.round(seconds)).replace(/\.0 s$/, ' s');
}
