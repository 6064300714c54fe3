// Who holds the slots of a cluster, with a button that gives them back.
import { useState } from 'preact/hooks';

import type { Run, World } from '../../api/types';
import type { Client } from '../../stores/client';
import { useTrans } from '../../translation';
import { Confirm, Problem, useAction } from '../parts';
import type { Openers } from './cluster-panel';

interface Props {
  client: Client;
  worlds: readonly World[];
  runs: readonly Run[];
  openers: Openers;
}

export function Holders({ client, worlds, runs, openers }: Props) {
  const trans = useTrans();
  if (!worlds.length) {
    return null;
  }
  return (
    <ul class="llmc-holders" aria-label={trans.__('Who holds its slots')}>
      {worlds.map(world => (
        <Holder key={world.world_id} client={client} world={world} run={runs.find(run => run.run_id === world.run_id)} openers={openers} />
      ))}
    </ul>
  );
}

function Holder({ client, world, run, openers }: { client: Client; world: World; run: Run | undefined; openers: Openers }) {
  const trans = useTrans();
  const [isAsking, setAsking] = useState(false);
  const release = useAction(() => client.rest.delete(`worlds/${encodeURIComponent(world.world_id)}`));
  const held = trans._n('%1 slot', '%1 slots', world.num_ranks);
  const loss = run
    ? trans.__('Its ranks end, their variables are lost, and the run %1 is stopped.', run.name)
    : trans.__('Its ranks end, and their variables are lost.');
  return (
    <li class="llmc-holder">
      <span class="llmc-holder-who">
        <strong>{held}</strong> {world.holder}
        <span class="llmc-soft">
          {' · '}
          {run && openers.openRun ? (
            <button type="button" class="llmc-link" onClick={() => openers.openRun?.(run.run_id, run.name)}>
              {trans.__('executes %1', run.name)}
            </button>
          ) : (
            world.state
          )}
        </span>
      </span>
      {openers.openWorld && (
        <button type="button" class="llmc-button" aria-label={trans.__('Ranks of %1', world.holder)}
          onClick={() => openers.openWorld?.(world.world_id, world.holder)}>
          {trans.__('Ranks')}
        </button>
      )}
      <button type="button" class="llmc-button" disabled={isAsking} aria-label={trans.__('Release the slots of %1', world.holder)}
        onClick={() => setAsking(true)}>
        {trans.__('Release')}
      </button>
      {isAsking && (
        <Confirm
          question={<p>{trans.__('Release %1 of %2?', held, world.holder)} {loss}</p>}
          doIt={trans.__('Release')}
          isBusy={release.isBusy}
          onNo={() => setAsking(false)}
          onYes={() => void release.run().then(() => setAsking(false))}
        />
      )}
      <Problem text={release.problem} />
    </li>
  );
}
