// How two runs differ: in their settings, the versions of what they ran with, their source. Pure.

export interface Row {
  name: string;
  values: string[];
}

/** The names whose values are not the same in all records. */
export function differingRows(records: readonly Record<string, unknown>[]): Row[] {
  const names = [...new Set(records.flatMap(record => Object.keys(record)))].sort();
  return names
    .map(name => ({ name, values: records.map(record => (name in record ? said(record[name]) : '')) }))
    .filter(row => new Set(row.values).size > 1);
}

const said = (value: unknown) => (typeof value === 'string' ? value : (JSON.stringify(value) ?? ''));

export interface DiffLine {
  kind: 'same' | 'added' | 'removed';
  text: string;
}

const MAX_LINES = 2000; // of a source whose lines are compared one by one

/** From the lines of one text to those of another: the longest common lines stay. */
export function lineDifference(before: string, after: string): DiffLine[] {
  const [one, other] = [before.split('\n'), after.split('\n')];
  if (one.length > MAX_LINES || other.length > MAX_LINES) {
    return before === after ? [] : [...one.map(text => ({ kind: 'removed' as const, text })), ...other.map(text => ({ kind: 'added' as const, text }))];
  }
  const width = other.length + 1;
  const common = new Uint16Array((one.length + 1) * width);
  for (let i = one.length - 1; i >= 0; i -= 1) {
    for (let j = other.length - 1; j >= 0; j -= 1) {
      common[i * width + j] =
        one[i] === other[j]
          ? (common[(i + 1) * width + j + 1] as number) + 1
          : Math.max(common[(i + 1) * width + j] as number, common[i * width + j + 1] as number);
    }
  }
  const lines: DiffLine[] = [];
  let [i, j] = [0, 0];
  while (i < one.length || j < other.length) {
    if (i < one.length && j < other.length && one[i] === other[j]) {
      lines.push({ kind: 'same', text: one[i] as string });
      i += 1;
      j += 1;
    } else if (i < one.length && (j === other.length || (common[(i + 1) * width + j] as number) >= (common[i * width + j + 1] as number))) {
      lines.push({ kind: 'removed', text: one[i] as string });
      i += 1;
    } else {
      lines.push({ kind: 'added', text: other[j] as string });
      j += 1;
    }
  }
  return lines;
}
