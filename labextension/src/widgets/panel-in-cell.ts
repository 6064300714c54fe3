// A panel of the server in a cell: the component where the page's server can be asked, else the text of the kernel.
import { type ComponentChild, h } from 'preact';
import { useEffect, useState } from 'preact/hooks';

import type { Client } from '../shared/stores/client';
import { type Model, pageClient, widget } from './host';

type Show = (client: Client, id: string) => ComponentChild;

function PanelInCell({ model, show }: { model: Model; show: Show }) {
  const [client, setClient] = useState<Client | null>(null);
  useEffect(() => {
    const page = pageClient();
    page?.rest.get('status').then(
      () => setClient(page),
      () => undefined // no server extension there: the kernel has told what there is
    );
  }, []);
  return client ? show(client, String(model.get('ident'))) : h('pre', { class: 'llmc-card llmc-static' }, String(model.get('text')));
}

/** An anywidget that shows a panel of the server. */
export const panelWidget = (show: Show) => widget(model => h(PanelInCell, { model, show }));
