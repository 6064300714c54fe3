// A plot on a canvas, by uPlot: curves with their bands, gaps, marks, a cursor. It draws what it is given.
import uPlot from 'uplot';

import type { Columns, Mark } from '../../api/types';
import {
  clockLabel,
  logTicks,
  markPosition,
  niceTicks,
  numNotFinite,
  type Range,
  type Table,
  tickLabels,
  timeTicks,
  type XAxis
} from './plot-data';

export interface Curve {
  table: Table;
  columns: Columns;
  /** A custom property that holds the colour. */
  color: string;
  dash: number[];
}

export interface Drawing {
  curves: Curve[];
  axis: XAxis;
  start: number;
  isLog: boolean;
  isSmoothed: boolean;
  x: Range;
  y: Range;
  marks: readonly Mark[];
}

export interface PlotListener {
  /** The cursor is at this x; null when it has left. `isOwn` when it is in this plot, not one beside it. */
  point(x: number | null, isOwn: boolean): void;
  zoom(range: Range | null): void;
}

const PER_CURVE = 4; // series of uPlot: low, high, mean, smoothed mean
const LABEL_CHAR = 6.3; // pixels of a character beside an axis
/** Whole pixels: uPlot multiplies the digits before "px" for screens with more of them. */
export const FONT = '11px system-ui, sans-serif';

/** One plot, in an element. It is made anew for another kind of scale (`signature`), and else told what is new. */
export class Plot {
  constructor(
    private readonly _place: HTMLElement,
    private _drawing: Drawing,
    private readonly _listener: PlotListener,
    syncKey: string,
    readonly height: number
  ) {
    this._colors = this._readColors();
    this._plot = new uPlot(this._options(syncKey), this._data(), _place);
    this._resizing = new ResizeObserver(() => this._fit());
    this._resizing.observe(_place);
    // Themes change by an attribute or a class of the body.
    this._theming = new MutationObserver(() => this.recolor());
    for (const element of [document.body, document.documentElement]) {
      this._theming.observe(element, { attributes: true, attributeFilter: ['class', 'data-jp-theme-name', 'data-jp-theme-light', 'style'] });
    }
    const over = this._plot.over;
    over.addEventListener('pointerenter', () => (this._isHovered = true));
    over.addEventListener('pointerleave', () => (this._isHovered = false));
    over.addEventListener('dblclick', () => this._listener.zoom(null));
    over.addEventListener('pointerdown', this._beginPan, { capture: true });
    over.addEventListener('wheel', this._zoomByWheel, { passive: false });
  }

  /** What a plot has to be made anew for. */
  static signature({ curves, axis, isLog, isSmoothed }: Drawing): string {
    return `${curves.map(curve => curve.color).join()} ${axis} ${isLog} ${isSmoothed}`;
  }

  get drawing(): Drawing {
    return this._drawing;
  }

  update(drawing: Drawing): void {
    const isMoved = drawing.curves === this._drawing.curves;
    this._drawing = drawing;
    if (isMoved) {
      this._plot.setScale('x', { min: drawing.x[0], max: drawing.x[1] }); // draws both axes and the curves anew
    } else {
      this._plot.setData(this._data(), true);
    }
  }

  /** Take the colours of the theme that is on now. */
  recolor(): void {
    requestAnimationFrame(() => {
      this._colors = this._readColors();
      this._plot.redraw(false);
    });
  }

  /** Put the cursor at an x. */
  pointAt(x: number): void {
    this._plot.setCursor({ left: this._plot.valToPos(x, 'x'), top: this._plot.over.clientHeight / 2 });
  }

  hideCursor(): void {
    this._plot.setCursor({ left: -10, top: -10 });
  }

  destroy(): void {
    this._resizing.disconnect();
    this._theming.disconnect();
    this._plot.destroy();
  }

  private _fit(): void {
    const width = this._place.clientWidth;
    if (width > 0 && width !== this._plot.width) {
      this._plot.setSize({ width, height: this.height });
    }
  }

  private _readColors(): Record<string, string> {
    const probe = document.createElement('span');
    this._place.append(probe);
    const read = (value: string) => {
      probe.style.color = value;
      return getComputedStyle(probe).color;
    };
    const colors: Record<string, string> = {};
    for (const name of ['--llmc-ink', '--llmc-soft', '--llmc-bad', '--llmc-warn', '--llmc-good', '--llmc-accent', '--llmc-paper']) {
      colors[name] = read(`var(${name})`);
    }
    for (const { color } of this._drawing.curves) {
      colors[color] = read(color);
    }
    probe.remove();
    return colors;
  }

  private _color(name: string, share = 1): string {
    const color = this._colors[name] ?? '#888';
    return share === 1 ? color : `color-mix(in srgb, ${color} ${share * 100}%, transparent)`;
  }

  private _data(): uPlot.AlignedData {
    const tables = this._drawing.curves.map(({ table }) => {
      const { x, low, high, mean, smooth } = table;
      return [x, low, high, mean, smooth] as uPlot.AlignedData;
    });
    const first = tables[0] ?? ([[]] as unknown as uPlot.AlignedData);
    return tables.length > 1 ? uPlot.join(tables) : first;
  }

  private _options(syncKey: string): uPlot.Options {
    const { curves, axis, isLog, isSmoothed } = this._drawing;
    const series: uPlot.Series[] = [{}];
    const bands: uPlot.Band[] = [];
    for (const { color, dash } of curves) {
      const first = series.length;
      const edge: uPlot.Series = { scale: 'y', auto: false, width: 0, points: { show: false }, paths: uPlot.paths.linear?.() };
      series.push({ ...edge }, { ...edge });
      const width = isSmoothed ? 1 : 1.8;
      const lone = (u: uPlot, at: number) => lonePoints(u.data[at] ?? []);
      series.push({
        scale: 'y',
        auto: false, // the range of the axis is given
        width,
        dash,
        stroke: () => this._color(color, isSmoothed ? 0.3 : 1),
        points: { show: true, size: 5, filter: lone, fill: () => this._color(color), width: 0 }
      });
      series.push({ scale: 'y', auto: false, width: 1.8, dash, show: isSmoothed, stroke: () => this._color(color), points: { show: false } });
      bands.push({ series: [first + 1, first], fill: () => this._color(color, 0.16) });
    }
    const grid = { stroke: () => this._color('--llmc-ink', 0.09), width: 1 };
    const soft = () => this._color('--llmc-soft');
    const base = { stroke: soft, font: FONT, ticks: { show: false } };
    const isWhole = () => axis === 'step' && this._drawing.curves.every(({ table }) => hasWholeSteps(table.x));
    return {
      width: Math.max(60, this._place.clientWidth),
      height: this.height,
      padding: [6, 12, 0, 0],
      legend: { show: false },
      series,
      bands,
      scales: {
        x: { time: false, range: () => [...this._drawing.x] as [number, number] },
        y: { distr: isLog ? 3 : 1, range: () => [...this._drawing.y] as [number, number] }
      },
      axes: [
        {
          ...base,
          grid: { show: false },
          size: 20,
          gap: 4,
          splits: (u, _axis, low, high) => {
            const count = Math.max(2, Math.floor(u.width / 90));
            return axis === 'time' ? timeTicks(low, high, count) : niceTicks(low, high, count, isWhole());
          },
          values: (_u, splits) => (axis === 'time' ? splits.map(clockLabel) : tickLabels(splits))
        },
        {
          ...base,
          scale: 'y',
          grid,
          gap: 4,
          size: (_u, labels) => 10 + LABEL_CHAR * Math.max(2, ...(labels ?? []).map(label => String(label).length)),
          splits: (_u, _axis, low, high) => (isLog ? logTicks(low, high) : niceTicks(low, high, 4)),
          filter: (_u, splits) => splits,
          values: (_u, splits) => tickLabels(splits)
        }
      ],
      cursor: {
        y: false,
        sync: { key: syncKey, scales: ['x', null] },
        drag: { x: true, y: false, setScale: false, dist: 4 },
        points: { size: 7, width: 1.5, show: (u, at) => this._cursorPoint(u, at), fill: (_u, at) => this._color(curves[Math.floor((at - 1) / PER_CURVE)]?.color ?? '') }
      },
      hooks: {
        setCursor: [u => this._tellCursor(u)],
        setSelect: [u => this._select(u)],
        drawClear: [u => this._drawMarks(u)],
        draw: [u => this._drawGaps(u)]
      }
    };
  }

  // Only the curves have a point under the cursor, not the edges of their bands.
  private _cursorPoint(_u: uPlot, at: number): HTMLElement {
    const point = document.createElement('div');
    const kind = (at - 1) % PER_CURVE;
    if (kind !== (this._drawing.isSmoothed ? 3 : 2)) {
      point.style.display = 'none';
    }
    return point;
  }

  private _tellCursor(u: uPlot): void {
    if (this._isPanning) return; // nothing is read meanwhile
    const { left } = u.cursor;
    const isOut = left === undefined || left < 0;
    const isOwn = this._isHovered || this._place.contains(document.activeElement) || this._place === document.activeElement;
    this._listener.point(isOut ? null : u.posToVal(left, 'x'), isOwn);
  }

  private _select(u: uPlot): void {
    const { left, width } = u.select;
    if (width < 4) return;
    const range: Range = [u.posToVal(left, 'x'), u.posToVal(left + width, 'x')];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this._listener.zoom(range);
  }

  // Dragging with Shift, or with the middle button, moves the stretch that is shown.
  private readonly _beginPan = (event: PointerEvent): void => {
    if (!event.shiftKey && event.button !== 1) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    const [low, high] = this._drawing.x;
    const perPixel = (high - low) / Math.max(1, this._plot.over.clientWidth);
    const move = (moved: PointerEvent) => {
      const by = (event.clientX - moved.clientX) * perPixel;
      this._listener.zoom([low + by, high + by]);
    };
    const end = () => {
      window.removeEventListener('pointermove', move);
      window.removeEventListener('pointerup', end);
      this._isPanning = false;
      this._place.classList.remove('llmc-panning');
    };
    this._isPanning = true;
    this._listener.point(null, true);
    this._place.classList.add('llmc-panning');
    window.addEventListener('pointermove', move);
    window.addEventListener('pointerup', end);
  };

  // Without Ctrl or Cmd the wheel scrolls the notebook.
  private readonly _zoomByWheel = (event: WheelEvent): void => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const around = this._plot.posToVal(event.clientX - this._plot.over.getBoundingClientRect().left, 'x');
    this._listener.zoom(scaled(this._drawing.x, around, event.deltaY < 0 ? 0.8 : 1.25));
  };

  private _drawGaps(u: uPlot): void {
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.fillStyle = this._color('--llmc-bad');
    for (const { table, columns } of this._drawing.curves) {
      if (!hasGaps(columns)) continue;
      table.x.forEach((x, at) => {
        if (!columns.not_finite[table.row[at] as number] || x < this._drawing.x[0] || x > this._drawing.x[1]) return;
        ctx.fillRect(u.valToPos(x, 'x', true) - ratio, bbox.top + bbox.height - 6 * ratio, 2 * ratio, 6 * ratio);
      });
    }
    ctx.restore();
  }

  private _drawMarks(u: uPlot): void {
    const { axis, start, marks, curves } = this._drawing;
    const columns = curves[0]?.columns;
    if (!columns) return;
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.font = `${10 * ratio}px system-ui, sans-serif`;
    ctx.lineWidth = ratio;
    let freeFrom = -Infinity;
    for (const mark of marks) {
      const x = markPosition(mark, columns, axis, start);
      if (x === null || x < this._drawing.x[0] || x > this._drawing.x[1]) continue;
      const left = Math.round(u.valToPos(x, 'x', true)) + 0.5;
      const isBad = mark.kind === 'alert' || mark.kind === 'hang' || mark.kind === 'restart';
      ctx.strokeStyle = this._color(isBad ? '--llmc-warn' : '--llmc-good', 0.8);
      ctx.setLineDash([3 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
      const width = ctx.measureText(mark.kind).width;
      if (left > freeFrom) {
        const fits = left + width + 4 * ratio < bbox.left + bbox.width;
        ctx.fillStyle = this._color('--llmc-soft');
        ctx.textAlign = fits ? 'left' : 'right';
        ctx.fillText(mark.kind, left + (fits ? 3 : -3) * ratio, bbox.top + 9 * ratio);
        freeFrom = left + width + 8 * ratio;
      }
    }
    ctx.restore();
  }

  private _isHovered = false;
  private _isPanning = false;
  private _colors: Record<string, string>;
  private readonly _plot: uPlot;
  private readonly _resizing: ResizeObserver;
  private readonly _theming: MutationObserver;
}

/** A range made smaller or larger around a point. */
export function scaled([low, high]: Range, around: number, factor: number): Range {
  return [around - (around - low) * factor, around + (high - around) * factor];
}

/** A function that remembers what it found of an array or object that does not change. */
function remembered<K extends object, V>(find: (key: K) => V): (key: K) => V {
  const known = new WeakMap<K, V>();
  return key => {
    if (!known.has(key)) known.set(key, find(key));
    return known.get(key) as V;
  };
}

const hasWholeSteps = remembered((x: readonly number[]) => x.every(Number.isInteger));
const hasGaps = remembered((columns: Columns) => numNotFinite(columns) > 0);

/** Values between gaps, which no line shows. */
const lonePoints = remembered((values: ArrayLike<number | null | undefined>): number[] => {
  const found: number[] = [];
  const isGap = (at: number) => at < 0 || at >= values.length || values[at] === null || values[at] === undefined;
  for (let at = 0; at < values.length; at += 1) {
    if (!isGap(at) && isGap(at - 1) && isGap(at + 1)) found.push(at);
  }
  return found;
});
