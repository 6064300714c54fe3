/** Colours of curves, in order; text is written in them too, and a test computes their contrast (widgets/chart.py). */
export const PALETTE = ['#3a73d9', '#17836b', '#8f5bd0', '#a5670f', '#c2437f', '#137f9f'];

/** Curves that are compared differ by their dashes, too: not everybody sees all colours. */
export const DASHES: number[][] = [[], [8, 4], [2, 3], [10, 3, 2, 3]];

/** The colour as a theme shows it: lighter where the page is dark. */
export function shownColor(number: number): string {
  return `color-mix(in srgb, ${PALETTE[number % PALETTE.length]}, white var(--llmc-lift))`;
}
