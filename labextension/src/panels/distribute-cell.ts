// A cell becomes a %%distribute cell, and back. Values in, values out.

const MAGIC = /^\s*%%distribute\b[^\n]*(\n|$)/;
const OTHER_MAGIC = /^\s*%%\w/;

/** Whether the first line of a cell distributes it. */
export function isDistributed(source: string): boolean {
  return MAGIC.test(source);
}

/** Whether it can be: another magic of the whole cell has the first line already. */
export function canDistribute(source: string): boolean {
  return isDistributed(source) || !OTHER_MAGIC.test(source);
}

/** The other form of the cell; `line` is what distributes it, with the options of before where they are known. */
export function toggled(source: string, line = '%%distribute'): string {
  return isDistributed(source) ? source.replace(MAGIC, '') : `${line}\n${source}`;
}

/** The first line of a distributed cell; empty for another. */
export function distributeLine(source: string): string {
  return MAGIC.exec(source)?.[0].trim() ?? '';
}
