// Changing an endpoint while it answers: how many replicas, which revision gets which share, and the way back.
import { useId, useState } from 'preact/hooks';

import type { Endpoint } from '../../api/types';
import type { Client } from '../../stores/client';
import { useTrans } from '../../translation';
import { Confirm, Problem, useAction } from '../parts';
import { comparisonText, replicasOf, rollbackTo, sharesOf, withRole } from './wanted';

interface Props {
  client: Client;
  endpoint: Endpoint;
}

/** The forms of one endpoint. */
export function Changes({ client, endpoint }: Props) {
  const trans = useTrans();
  return (
    <div class="llmc-part">
      <h3>{trans.__('Change')}</h3>
      <ScaleForm key={scaleKey(endpoint)} client={client} endpoint={endpoint} />
      <Revisions client={client} endpoint={endpoint} />
    </div>
  );
}

const path = (endpoint: Endpoint, verb: string) => `endpoints/${encodeURIComponent(endpoint.name)}/${verb}`;
// A form that shows what is there begins anew when that has changed.
const scaleKey = (endpoint: Endpoint) =>
  `${endpoint.min_replicas ?? ''}:${endpoint.max_replicas ?? ''}:${typeof endpoint.min_replicas === 'number' ? '' : endpoint.num_replicas}`;

function ScaleForm({ client, endpoint }: Props) {
  const trans = useTrans();
  const isBounded = typeof endpoint.min_replicas === 'number';
  const [follows, setFollows] = useState(isBounded);
  const [fewest, setFewest] = useState(String(endpoint.min_replicas ?? endpoint.num_replicas));
  const [most, setMost] = useState(String(endpoint.max_replicas ?? Math.max(2, endpoint.num_replicas)));
  const scale = useAction(async () => {
    await client.rest.post(path(endpoint, 'scale'), { replicas: replicasOf(fewest, most, follows) });
  });
  return (
    <form
      class="llmc-scale"
      aria-label={trans.__('Replicas of %1', endpoint.name)}
      onSubmit={event => {
        event.preventDefault();
        void scale.run();
      }}
    >
      <label>
        {follows ? trans.__('Between') : trans.__('Replicas')}{' '}
        <input type="number" min={follows ? '0' : '1'} max="1000" value={fewest}
          aria-label={follows ? trans.__('Fewest replicas') : trans.__('Number of replicas')}
          onInput={event => setFewest(event.currentTarget.value)} />
      </label>
      {follows && (
        <label>
          {trans.__('and')}{' '}
          <input type="number" min="1" max="1000" value={most} aria-label={trans.__('Most replicas')}
            onInput={event => setMost(event.currentTarget.value)} />
        </label>
      )}
      <label>
        <input type="checkbox" checked={follows} onChange={event => setFollows(event.currentTarget.checked)} />{' '}
        {trans.__('as the load needs')}
      </label>
      <button class="llmc-button" disabled={scale.isBusy}>{scale.isBusy ? trans.__('Scaling …') : trans.__('Scale')}</button>
      <Problem text={scale.problem} />
    </form>
  );
}

function Revisions({ client, endpoint }: Props) {
  const trans = useTrans();
  const shown = (endpoint.revisions ?? []).filter(revision => revision.role !== 'retired');
  const canary = withRole(endpoint, 'canary');
  return (
    <>
      {shown.length > 1 && (
        <ul class="llmc-list" aria-label={trans.__('Revisions of %1', endpoint.name)}>
          {shown.map(revision => (
            <li key={revision.number}>
              <strong>{revision.role}</strong>{' '}
              <span class="llmc-soft">
                {[
                  `${revision.number}: ${revision.target}`,
                  revision.role === 'shadow' ? comparisonText(revision) : `${revision.weight} %`,
                  trans.__('%1 requests, %2 failed', revision.num_requests ?? 0, revision.num_errors ?? 0)
                ].join(' · ')}
              </span>
            </li>
          ))}
        </ul>
      )}
      {canary && <SplitForm key={canary.number} client={client} endpoint={endpoint} weight={canary.weight} />}
      <Rollback client={client} endpoint={endpoint} />
    </>
  );
}

function SplitForm({ client, endpoint, weight }: Props & { weight: number }) {
  const trans = useTrans();
  const [share, setShare] = useState(weight);
  const title = useId();
  const split = useAction(() => client.rest.post(path(endpoint, 'split'), { shares: sharesOf(share) }));
  return (
    <form
      class="llmc-scale"
      aria-label={trans.__('Split the requests to %1', endpoint.name)}
      onSubmit={event => {
        event.preventDefault();
        void split.run();
      }}
    >
      <span id={title}>{trans.__('Canary')}</span>
      <input type="range" min="0" max="100" value={share} aria-labelledby={title} aria-valuetext={trans.__('%1 percent', share)}
        onInput={event => setShare(Number(event.currentTarget.value))} />
      <input type="number" min="0" max="100" value={share} aria-label={trans.__('Percent to the canary')}
        onInput={event => setShare(Number(event.currentTarget.value))} />
      <button class="llmc-button" disabled={split.isBusy || share === weight}>
        {share === 100 ? trans.__('Make it the stable one') : trans.__('Split')}
      </button>
      <Problem text={split.problem} />
    </form>
  );
}

function Rollback({ client, endpoint }: Props) {
  const trans = useTrans();
  const [isAsking, setAsking] = useState(false);
  const rollback = useAction(() => client.rest.post(path(endpoint, 'rollback')));
  const target = rollbackTo(endpoint);
  if (!target) {
    return null;
  }
  return (
    <>
      <button type="button" class="llmc-button" disabled={isAsking || rollback.isBusy}
        aria-label={trans.__('Roll back the endpoint %1', endpoint.name)} onClick={() => setAsking(true)}>
        {trans.__('Roll back')}
      </button>
      {isAsking && (
        <Confirm
          question={<p>{trans.__('Roll back to %1? All requests are answered by it from then on.', target)}</p>}
          doIt={trans.__('Roll back')}
          isBusy={rollback.isBusy}
          onNo={() => setAsking(false)}
          onYes={() => void rollback.run().then(() => setAsking(false))}
        />
      )}
      <Problem text={rollback.problem} />
    </>
  );
}
