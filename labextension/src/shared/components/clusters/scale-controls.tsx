// How many workers a cluster has: by slider and number, or between bounds that the load decides within.
import { useState } from 'preact/hooks';

import type { Cluster } from '../../api/types';
import type { Client } from '../../stores/client';
import { useTrans } from '../../translation';
import { Problem, useAction } from '../parts';

const LEAST_OF_SLIDER = 8;

export function ScaleControls({ client, cluster }: { client: Client; cluster: Cluster }) {
  const trans = useTrans();
  const present = cluster.num_workers ?? 0;
  const [wanted, setWanted] = useState<number | null>(null);
  const [isAdaptive, setAdaptive] = useState(false);
  const [minimum, setMinimum] = useState('0');
  const [maximum, setMaximum] = useState(String(Math.max(2, present)));
  const path = `clusters/${encodeURIComponent(cluster.name)}/scale`;
  const scale = useAction(async () => {
    await client.rest.post(path, { workers: wanted });
    setWanted(null);
  });
  const adapt = useAction(() => client.rest.post(path, { minimum: Number(minimum), maximum: Number(maximum) }));
  const number = wanted ?? present;
  const most = Math.max(LEAST_OF_SLIDER, 2 * present, number);
  const take = (text: string) => {
    const value = Number(text);
    setWanted(text !== '' && Number.isInteger(value) && value >= 0 ? value : null);
  };
  if (isAdaptive) {
    return (
      <form
        class="llmc-scale"
        onSubmit={event => {
          event.preventDefault();
          void adapt.run();
        }}
      >
        <label>
          {trans.__('Between')}{' '}
          <input type="number" min="0" max="10000" value={minimum} aria-label={trans.__('Fewest workers')}
            onInput={event => setMinimum(event.currentTarget.value)} />
        </label>
        <label>
          {trans.__('and')}{' '}
          <input type="number" min="1" max="10000" value={maximum} aria-label={trans.__('Most workers')}
            onInput={event => setMaximum(event.currentTarget.value)} />{' '}
          {trans.__('workers')}
        </label>
        <button class="llmc-button" disabled={adapt.isBusy}>{adapt.isBusy ? trans.__('Setting …') : trans.__('Adapt')}</button>
        <button type="button" class="llmc-link" onClick={() => setAdaptive(false)}>{trans.__('fixed number')}</button>
        <Problem text={adapt.problem} />
      </form>
    );
  }
  return (
    <form
      class="llmc-scale"
      onSubmit={event => {
        event.preventDefault();
        void scale.run();
      }}
    >
      <input type="range" min="0" max={most} value={number} aria-label={trans.__('Workers of %1', cluster.name)}
        onInput={event => take(event.currentTarget.value)} />
      <input type="number" min="0" max="10000" value={number} aria-label={trans.__('Number of workers of %1', cluster.name)}
        onInput={event => take(event.currentTarget.value)} />
      <button class="llmc-button" disabled={scale.isBusy || wanted === null || wanted === present}>
        {scale.isBusy ? trans.__('Scaling …') : trans.__('Scale')}
      </button>
      <button type="button" class="llmc-link" onClick={() => setAdaptive(true)}>{trans.__('adapt …')}</button>
      <Problem text={scale.problem} />
    </form>
  );
}
