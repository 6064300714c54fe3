// What a run does before its first step: which stage it is in, and how long each took.
import { useEffect, useState } from 'preact/hooks';

import type { RunInfo } from '../../api/types';
import { serverNow } from '../../clock';
import { formatDuration, formatElapsed } from '../../format';
import { useTrans } from '../../translation';

export function Phases({ info }: { info: RunInfo }) {
  const trans = useTrans();
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = window.setInterval(() => tick(count => count + 1), 1000);
    return () => window.clearInterval(timer);
  }, []);
  const phases = info.phases.filter(phase => phase.name !== 'ended');
  if (!phases.length) return null;
  return (
    <ol class="llmc-phases" aria-label={trans.__('phases')}>
      {phases.map(phase => {
        const isNow = phase.ended === null;
        const took = isNow ? formatElapsed(serverNow() - phase.began) : formatDuration((phase.ended as number) - phase.began);
        return (
          <li key={`${phase.name} ${phase.began}`} data-now={isNow} aria-current={isNow ? 'step' : undefined}>
            <span aria-hidden="true">{isNow ? '●' : '✓'}</span> {phase.name} <span class="llmc-soft">{took}</span>
          </li>
        );
      })}
    </ol>
  );
}
