// The monitor of a run in a cell, where no panel of JupyterLab shows it.
import { useEffect, useState } from 'preact/hooks';

import type { RunInfo } from '../shared/api/types';
import { RunMonitor } from '../shared/components/run/monitor';
import type { Client } from '../shared/stores/client';
import { type Model, pageClient, widget } from './host';
import { KernelRun } from './kernel-run';

function RunInCell({ model }: { model: Model }) {
  const [kernelRun] = useState(() => new KernelRun(model));
  const [client, setClient] = useState<Client | null>(null);
  const [page] = useState(pageClient);
  const { run_id: runId, name } = model.get('info') as RunInfo;
  useEffect(() => {
    page?.rest.run(runId).then(
      () => setClient(page),
      () => undefined // the server does not know the run: the kernel tells of it
    );
  }, [page, runId]);
  return (
    <RunMonitor
      run={client ? client.run(runId) : kernelRun}
      runId={runId}
      name={name}
      client={client}
      rest={page?.rest}
      stopByKernel={() => model.send({ type: 'stop' })}
      onLogScales={names => {
        model.set('log_scales', names);
        model.save_changes();
      }}
    />
  );
}

export default widget(model => <RunInCell model={model} />);

// A test holds them against those of the saved form.
export { formatDuration, formatNumber } from '../shared/format';
