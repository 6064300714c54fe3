// A cluster that is starting: for how long, and what it prints.
import { useEffect, useRef, useState } from 'preact/hooks';

import { serverNow } from '../../clock';
import { formatElapsed } from '../../format';
import type { Client } from '../../stores/client';
import { useValue } from '../../stores/observable';
import { useTrans } from '../../translation';
import { useNow } from '../parts';

const LOG_EVERY_MS = 1000;

/** Follows the cluster of this name; without one, the newest that is starting. */
export function StartProgress({ client, name }: { client: Client; name: string }) {
  const trans = useTrans();
  const [began] = useState(serverNow);
  const now = useNow(1000);
  const { items } = useValue(client.clusters);
  const starting = items.filter(cluster => cluster.state === 'starting' && (!name || cluster.name === name));
  const cluster = starting.sort((one, other) => (other.created ?? 0) - (one.created ?? 0))[0];
  const text = useLog(client, cluster?.name ?? name);
  return (
    <div class="llmc-starting" role="status">
      <progress aria-label={trans.__('The cluster is starting')} />
      <span>{trans.__('Starting for %1', formatElapsed(now - began))}</span>
      {text && <Log text={text} />}
    </div>
  );
}

/** A text that grows at its end and is followed there, unless somebody has scrolled up. */
export function Log({ text }: { text: string }) {
  const trans = useTrans();
  const node = useRef<HTMLPreElement>(null);
  const isAtEnd = useRef(true);
  useEffect(() => {
    if (node.current && isAtEnd.current) {
      node.current.scrollTop = node.current.scrollHeight;
    }
  }, [text]);
  const onScroll = (event: { currentTarget: HTMLPreElement }) => {
    const { scrollTop, clientHeight, scrollHeight } = event.currentTarget;
    isAtEnd.current = scrollTop + clientHeight > scrollHeight - 8;
  };
  return (
    <pre class="llmc-logtext" tabIndex={0} role="log" aria-label={trans.__('Log')} ref={node} onScroll={onScroll}>
      {text}
    </pre>
  );
}

/** What a cluster has printed, asked again while it is shown. */
export function useLog(client: Client, name: string): string {
  const [text, setText] = useState('');
  useEffect(() => {
    let isOver = false;
    let timer = 0;
    const ask = async () => {
      if (name && document.visibilityState !== 'hidden') {
        const path = `clusters/${encodeURIComponent(name)}/log`;
        const answer = await client.rest.get<{ text: string }>(path).catch(() => null);
        if (!isOver && answer) {
          setText(answer.text);
        }
      }
      if (!isOver) {
        timer = window.setTimeout(() => void ask(), LOG_EVERY_MS);
      }
    };
    void ask();
    return () => {
      isOver = true;
      window.clearTimeout(timer);
    };
  }, [client, name]);
  return text;
}
