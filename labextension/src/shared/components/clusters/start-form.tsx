// A new cluster: a kind with the form of its options, or the address of one that runs elsewhere.
import { useEffect, useState } from 'preact/hooks';

import type { Cluster, ClusterKind, ClusterKinds, ClusterOption } from '../../api/types';
import type { Client } from '../../stores/client';
import { useTrans } from '../../translation';
import { Problem, useAction } from '../parts';
import { changedOptions } from './options';
import { StartProgress } from './start-progress';

const CONNECT = ':connect';

/** Where a cluster is started from; `onStarted` is told its name. */
export function StartForm({ client, onStarted }: { client: Client; onStarted: (name: string) => void }) {
  const trans = useTrans();
  const [kinds, setKinds] = useState<readonly ClusterKind[]>([]);
  const [kind, setKind] = useState('local');
  const [name, setName] = useState('');
  const [workers, setWorkers] = useState('1');
  const [address, setAddress] = useState('');
  const [texts, setTexts] = useState<Record<string, string>>({});
  const load = useAction(async () => setKinds((await client.rest.get<ClusterKinds>('cluster-kinds')).kinds));
  useEffect(() => void load.run(), [client]);
  const chosen = kinds.find(known => known.kind === kind);
  const start = useAction(async () => {
    const known = name ? { name } : {};
    const body =
      kind === CONNECT
        ? { address: address.trim(), ...known }
        : { kind, workers: Number(workers), options: changedOptions(chosen?.options ?? [], texts), ...known };
    const cluster = await client.rest.post<Cluster>('clusters', body);
    setName('');
    onStarted(cluster.name);
  });
  const submit = (event: Event) => {
    event.preventDefault();
    void start.run();
  };
  return (
    <form class="llmc-form" aria-label={trans.__('New cluster')} onSubmit={submit}>
      <label class="llmc-option">
        <span>{trans.__('Kind')}</span>
        <select value={kind} disabled={start.isBusy} onChange={event => setKind(event.currentTarget.value)}>
          {kinds.length === 0 && <option value="local">local</option>}
          {kinds.map(known => (
            <option key={known.kind} value={known.kind}>
              {known.title}
              {known.problem ? trans.__(' (not installed)') : ''}
            </option>
          ))}
          <option value={CONNECT}>{trans.__('one that runs already …')}</option>
        </select>
      </label>
      {kind === CONNECT ? (
        <label class="llmc-option">
          <span>{trans.__('Address of its scheduler')}</span>
          <input required placeholder="tls://host:8786" value={address} onInput={event => setAddress(event.currentTarget.value)} />
        </label>
      ) : (
        <label class="llmc-option">
          <span>{trans.__('Workers')}</span>
          <input type="number" min="1" max="10000" required value={workers} onInput={event => setWorkers(event.currentTarget.value)} />
        </label>
      )}
      <label class="llmc-option">
        <span>{trans.__('Name')}</span>
        <input placeholder={trans.__('made from its kind')} value={name} onInput={event => setName(event.currentTarget.value)} />
      </label>
      {chosen && chosen.help && kind !== CONNECT && <p class="llmc-note">{chosen.help}</p>}
      {chosen && kind !== CONNECT && (chosen.options ?? []).length > 0 && (
        <details class="llmc-details">
          <summary>{trans._n('%1 option', '%1 options', (chosen.options ?? []).length)}</summary>
          {(chosen.options ?? []).map(option => (
            <OptionField
              key={`${kind}/${option.name}`}
              option={option}
              text={texts[option.name] ?? ''}
              onText={text => setTexts({ ...texts, [option.name]: text })}
            />
          ))}
        </details>
      )}
      {kind !== CONNECT && <Problem text={chosen?.problem ?? ''} />}
      <Problem text={load.problem} again={() => void load.run()} />
      <Problem text={start.problem} />
      <div class="llmc-row">
        <button class="llmc-button llmc-primary" disabled={start.isBusy || (kind !== CONNECT && !!chosen?.problem)}>
          {kind === CONNECT ? trans.__('Connect') : trans.__('Start cluster')}
        </button>
      </div>
      {start.isBusy && <StartProgress client={client} name={name} />}
    </form>
  );
}

function OptionField({ option, text, onText }: { option: ClusterOption; text: string; onText: (text: string) => void }) {
  const trans = useTrans();
  const byDefault = option.default === null || option.default === undefined ? '' : String(option.default);
  const choices = option.type === 'boolean' ? ['true', 'false'] : (option.choices ?? []).map(String);
  return (
    <label class="llmc-option" title={option.help}>
      <span>{option.name}</span>
      {choices.length ? (
        <select value={text || byDefault} onChange={event => onText(event.currentTarget.value)}>
          {!byDefault && <option value="">{trans.__('as usual')}</option>}
          {choices.map(choice => (
            <option key={choice} value={choice}>
              {choice}
            </option>
          ))}
        </select>
      ) : (
        <input
          inputMode={option.type === 'integer' || option.type === 'number' ? 'decimal' : 'text'}
          placeholder={byDefault || option.type}
          value={text}
          onInput={event => onText(event.currentTarget.value)}
        />
      )}
    </label>
  );
}
