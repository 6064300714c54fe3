// An endpoint as the value of a cell: its panel where the server of the page can be asked, else what the kernel knows.
// A key comes in a message after a click, goes to the clipboard, and is kept nowhere here.
import { useEffect, useRef, useState } from 'preact/hooks';

import { copyText } from '../shared/clipboard';
import { EndpointPanel } from '../shared/components/endpoints/endpoint-panel';
import { SnippetTabs } from '../shared/components/endpoints/snippet-tabs';
import { CopyButton } from '../shared/components/parts';
import type { Client } from '../shared/stores/client';
import { type Model, pageClient, widget } from './host';

interface KeyMessage {
  kind: 'key' | 'error';
  key?: string;
  message?: string;
}

function EndpointInCell({ model }: { model: Model }) {
  const [client, setClient] = useState<Client | null>(null);
  const name = String(model.get('name'));
  useEffect(() => {
    const page = pageClient();
    page?.rest.get(`endpoints/${encodeURIComponent(name)}`).then(
      () => setClient(page),
      () => undefined // the server of the page does not know it: the kernel does
    );
  }, [name]);
  return client ? <EndpointPanel client={client} name={name} /> : <KernelCard model={model} name={name} />;
}

function KernelCard({ model, name }: { model: Model; name: string }) {
  const url = String(model.get('url'));
  const texts = Object.entries(model.get('snippets') as Record<string, string>);
  return (
    <section class="llmc-card llmc-panel" aria-label={`Endpoint ${name}`}>
      <header class="llmc-panel-head">
        <h2>{name}</h2>
        <CopyKey model={model} />
      </header>
      <div class="llmc-row llmc-url">
        <code title={url}>{url}</code>
        <CopyButton text={url} name={`Copy the URL of ${name}`} />
      </div>
      <SnippetTabs all={texts.map(([title, text]) => ({ title, text }))} />
    </section>
  );
}

function CopyKey({ model }: { model: Model }) {
  const [said, setSaid] = useState('');
  const isAsked = useRef(false); // each view of the card hears the answers to all of them
  useEffect(() => {
    const answered = (message: unknown) => {
      const { kind, key = '', message: problem = '' } = message as KeyMessage;
      if (!isAsked.current) return;
      isAsked.current = false;
      if (kind === 'error') {
        setSaid(problem);
      } else if (kind === 'key') {
        copyText(key).then(
          () => setSaid('Copied'),
          () => setSaid('Not copied: the browser does not allow it')
        );
      }
    };
    model.on('msg:custom', answered);
    return () => model.off('msg:custom', answered);
  }, [model]);
  const ask = () => {
    setSaid('Asking for a key …');
    isAsked.current = true;
    model.send({ kind: 'key' });
  };
  return (
    <span class="llmc-row">
      <span class="llmc-soft" role="status">
        {said}
      </span>
      <button type="button" class="llmc-button llmcloud-copy-key" onClick={ask}>
        Copy key
      </button>
    </span>
  );
}

export default widget(model => <EndpointInCell model={model} />);
