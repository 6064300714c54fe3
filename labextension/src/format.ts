// Numbers and states as a person reads them. Values in, text out.
import type { Run } from './api';

const ACTIVE = ['queued', 'running', 'stopping'];

/** Whether a run is still alive. */
export function isActive(run: Pick<Run, 'state'>): boolean {
  return ACTIVE.includes(run.state);
}

/** "no runs", "1 run", "2 runs". */
export function countText(count: number): string {
  return count === 0 ? 'no runs' : count === 1 ? '1 run' : `${count} runs`;
}

/** "42 s", "3 min 05 s", "2 h 07 min". */
export function durationText(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const pad = (value: number) => String(value).padStart(2, '0');
  if (whole < 60) {
    return `${whole} s`;
  }
  if (whole < 3600) {
    return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
  }
  return `${Math.floor(whole / 3600)} h ${pad(Math.floor((whole % 3600) / 60))} min`;
}

/** How long a run has taken, or took. */
export function runDuration(run: Run, now: number): string {
  return durationText((run.ended ?? now) - run.created);
}

/**
 * The number a person looks at first: the training loss, else any loss, else the first metric there is.
 * JSON has no NaN and no infinity: such a value is null.
 */
export function headline(metrics: Record<string, number | null>): string {
  const names = Object.keys(metrics);
  const name =
    ['loss', 'train_loss', 'train/loss'].find(known => names.includes(known)) ??
    names.find(other => other.includes('loss')) ??
    names[0];
  if (name === undefined) {
    return '';
  }
  const value = metrics[name];
  return `${name} ${typeof value === 'number' ? Number(value.toPrecision(4)) : 'is not finite'}`;
}
