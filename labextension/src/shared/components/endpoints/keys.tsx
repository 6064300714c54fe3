// Keys by which programs ask endpoints: made, shown once, revoked.
import { useState } from 'preact/hooks';

import type { Key, NewKey } from '../../api/types';
import { formatDuration } from '../../format';
import type { Client } from '../../stores/client';
import { useValue } from '../../stores/observable';
import { useTrans } from '../../translation';
import { Confirm, CopyButton, ListNote, Problem, StateWord, useAction, useNow } from '../parts';
import { LIMITS, limitsOf, type Limit } from './wanted';

const DAY_S = 86_400;
const EXPIRIES = [1, 7, 30, 365];
const LIMIT_NAMES: Record<Limit, string> = {
  requests_per_minute: 'requests per minute',
  tokens_per_minute: 'tokens per minute',
  parallel_requests: 'requests at once'
};

/** All keys of this user; only those that open `endpoint` where one is named, and new ones are for it. */
export function Keys({ client, endpoint }: { client: Client; endpoint?: string }) {
  const trans = useTrans();
  const state = useValue(client.keys);
  const [label, setLabel] = useState('');
  const [days, setDays] = useState('30');
  const [limits, setLimits] = useState<Partial<Record<Limit, string>>>({});
  const [made, setMade] = useState<NewKey | null>(null);
  const create = useAction(async () => {
    const scopes = [`infer:${endpoint ?? '*'}`, 'models:read'];
    setMade(await client.rest.post<NewKey>('keys', { scopes, label, expires_s: Number(days) * DAY_S, ...limitsOf(limits) }));
    setLabel('');
    setLimits({});
  });
  const shown = state.items.filter(key => key.state === 'valid' && (!endpoint || opens(key, endpoint)));
  return (
    <div class="llmc-part llmc-keys">
      <h3>{trans.__('Keys')}</h3>
      <form
        class="llmc-row"
        aria-label={trans.__('New key')}
        onSubmit={event => {
          event.preventDefault();
          void create.run();
        }}
      >
        <input placeholder={trans.__('what it is for')} maxLength={200} value={label} aria-label={trans.__('What the key is for')}
          onInput={event => setLabel(event.currentTarget.value)} />
        <select value={days} aria-label={trans.__('How long it is valid')} onChange={event => setDays(event.currentTarget.value)}>
          {EXPIRIES.map(number => (
            <option key={number} value={String(number)}>{trans._n('%1 day', '%1 days', number)}</option>
          ))}
        </select>
        <details class="llmc-limits">
          <summary>{trans.__('Limits')}</summary>
          {LIMITS.map(name => (
            <label key={name}>
              {trans.__(LIMIT_NAMES[name])}{' '}
              <input type="number" min="1" placeholder={trans.__('none')} value={limits[name] ?? ''}
                onInput={event => setLimits({ ...limits, [name]: event.currentTarget.value })} />
            </label>
          ))}
        </details>
        <button class="llmc-button" disabled={create.isBusy}>{trans.__('Create key')}</button>
      </form>
      <Problem text={create.problem} />
      {made && (
        <div class="llmc-secret" role="status">
          <p>{trans.__('This is shown once. Copy it now:')}</p>
          <div class="llmc-row">
            <code>{made.key}</code>
            <CopyButton text={made.key} name={trans.__('Copy the key')} />
            <button type="button" class="llmc-button" onClick={() => setMade(null)}>{trans.__('Done')}</button>
          </div>
        </div>
      )}
      <ListNote state={{ ...state, items: shown }} retry={() => client.events.retry()} empty={trans.__('There is no valid key.')} />
      {shown.length > 0 && (
        <ul class="llmc-list" aria-label={trans.__('Valid keys')}>
          {shown.map(key => (
            <KeyRow key={key.id} client={client} known={key} onRevoked={() => made?.id === key.id && setMade(null)} />
          ))}
        </ul>
      )}
    </div>
  );
}

function KeyRow({ client, known, onRevoked }: { client: Client; known: Key; onRevoked: () => void }) {
  const trans = useTrans();
  const now = useNow();
  const [isAsking, setAsking] = useState(false);
  const revoke = useAction(async () => {
    await client.rest.delete(`keys/${encodeURIComponent(known.id)}`);
    onRevoked();
  });
  const ends = known.expires ? trans.__('ends in %1', formatDuration(Math.max(0, known.expires - now))) : trans.__('never ends');
  return (
    <li class="llmc-key" data-id={known.id}>
      <div class="llmc-row">
        <StateWord state={known.state} />
        <code>{known.id}</code>
        <span class="llmc-grow">{known.label}</span>
        <button type="button" class="llmc-button" disabled={isAsking} aria-label={trans.__('Revoke the key %1', known.id)}
          onClick={() => setAsking(true)}>
          {trans.__('Revoke')}
        </button>
      </div>
      <p class="llmc-soft">{[known.scopes.join(', '), ends, ...limitTexts(known)].join(' · ')}</p>
      {isAsking && (
        <Confirm
          question={<p>{trans.__('Revoke the key %1? Whoever uses it is refused at once, also in the middle of an answer.', known.id)}</p>}
          doIt={trans.__('Revoke')}
          isBusy={revoke.isBusy}
          onNo={() => setAsking(false)}
          onYes={() => void revoke.run().then(() => setAsking(false))}
        />
      )}
      <Problem text={revoke.problem} />
    </li>
  );
}

function limitTexts(key: Key): string[] {
  return LIMITS.filter(name => key[name]).map(name => `${key[name]} ${LIMIT_NAMES[name]}`);
}

/** Whether a key may ask an endpoint: its scopes may hold * and ?. */
export function opens(key: Pick<Key, 'scopes'>, endpoint: string): boolean {
  return key.scopes.some(scope => {
    const [kind, pattern = ''] = scope.split(/:(.*)/s);
    const escaped = pattern.replace(/[.+^${}()|[\]\\]/g, '\\$&').replace(/\*/g, '.*').replace(/\?/g, '.');
    return kind === 'infer' && new RegExp(`^${escaped}$`).test(endpoint);
  });
}
