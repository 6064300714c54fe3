/** Colours of curves, in order; text is written in them too, and a test computes their contrast (widgets/chart.py). */
export const PALETTE = ['#3a73d9', '#17836b', '#8f5bd0', '#a5670f', '#c2437f', '#137f9f'];

/** Colours of the runs in one chart: told apart also by those who see fewer colours (tests/widgets/test_color_vision.py). */
export const COMPARED = ['#3a73d9', '#c08020', '#e02060', '#7000f0'];

/** Curves that are compared differ by their dashes, too: not everybody sees all colours. */
const DASHES: number[][] = [[], [8, 4], [2, 3], [10, 3, 2, 3]];

/** The colour as a theme shows it: lighter where the page is dark. */
export function shownColor(number: number): string {
  return lifted(PALETTE, number);
}

/** The same of a run that is compared with others. */
export function comparedColor(number: number): string {
  return lifted(COMPARED, number);
}

const lifted = (palette: readonly string[], number: number) =>
  `color-mix(in srgb, ${palette[number % palette.length]}, white var(--llmc-lift))`;

/** How the curve of a run is dashed, as lengths in pixels; not at all for the first. */
export function dashOf(number: number): number[] {
  return DASHES[number % DASHES.length] ?? [];
}
