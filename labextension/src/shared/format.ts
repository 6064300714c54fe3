// Numbers and durations as people read them: the same rules as core/output/numerals.py. Values in, text out.

/** A number with `digits` digits that count. */
export function formatNumber(value: number | null | undefined, digits = 4): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return 'not finite';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-4) {
    const [mantissa = '', exponent] = value.toExponential(digits - 2).split('e');
    const short = mantissa.includes('.') ? mantissa.replace(/\.?0+$/, '') : mantissa;
    return `${short}e${Number(exponent)}`;
  }
  const decimals = Number.isInteger(value) ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return numerals(decimals).format(value);
}

// Making one takes longer than drawing a curve of a thousand points.
const made = new Map<number, Intl.NumberFormat>();

function numerals(decimals: number): Intl.NumberFormat {
  const known = made.get(decimals) ?? new Intl.NumberFormat('en-US', { maximumFractionDigits: decimals });
  made.set(decimals, known);
  return known;
}

/** A number of steps, or of what is counted: whole ones with all of their digits, by which they are looked for. */
export function formatCount(count: number | null | undefined): string {
  const isLarge = typeof count === 'number' && Math.abs(count) >= 1e7 && Math.abs(count) <= Number.MAX_SAFE_INTEGER;
  return isLarge ? numerals(0).format(count) : formatNumber(count);
}

const UNITS: [number, string, number, string][] = [
  [86400, 'd', 3600, 'h'],
  [3600, 'h', 60, 'min'],
  [60, 'min', 1, 's']
];

/** Seconds as "4.2 s", "3 min 5 s", "2 h 7 min". */
export function formatDuration(seconds: number): string {
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  const whole = Math.round(seconds);
  for (const [size, unit, smaller, name] of UNITS) {
    if (whole >= size) {
      const rest = Math.floor((whole % size) / smaller);
      return `${Math.floor(whole / size)} ${unit}${rest ? ` ${rest} ${name}` : ''}`;
    }
  }
  return `${whole} s`;
}

/** How long somebody waits for an answer: below a second as "24 ms". */
export function formatLatency(seconds: number): string {
  const milliseconds = Math.round(1000 * Math.max(0, seconds));
  if (milliseconds >= 1000) return formatDuration(seconds);
  return milliseconds ? `${milliseconds} ms` : '< 1 ms';
}

/** A duration that is still growing: whole seconds. */
export function formatElapsed(seconds: number): string {
  return seconds < 9.95 ? `${Math.floor(Math.max(0, seconds))} s` : formatDuration(seconds);
}

/** Bytes as "1.5 GB", in powers of 1000. */
export function formatBytes(bytes: number | null | undefined): string {
  if (bytes === null || bytes === undefined) return '';
  for (const [size, unit] of [[1e12, 'TB'], [1e9, 'GB'], [1e6, 'MB'], [1e3, 'kB']] as const) {
    if (bytes >= size) return `${formatNumber(bytes / size, 3)} ${unit}`;
  }
  return `${bytes} B`;
}

const TAIL_CHARS = 10;

/** A name in two parts: the first may be shortened where it does not fit; a name is told from others by its end. */
export function splitName(name: string): [string, string] {
  const tail = name.length > TAIL_CHARS ? Math.min(TAIL_CHARS, name.length >> 1) : 0;
  return [name.slice(0, name.length - tail), tail ? name.slice(-tail) : ''];
}

const ACTIVE = ['queued', 'starting', 'running', 'stopping'];

/** Whether a run in this state goes on. */
export function isActive(state: string): boolean {
  return ACTIVE.includes(state);
}

/** Text without the colours of a terminal. */
export function plainText(text: string): string {
  // eslint-disable-next-line no-control-regex
  return text.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, '');
}

/** So many a second; of what is rarer, so many a minute. */
export function formatRate(perS: number): string {
  return perS === 0 || perS >= 1 ? `${formatNumber(perS, 3)}/s` : `${formatNumber(60 * perS, 2)}/min`;
}
