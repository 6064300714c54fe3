// What can be done with a run: stop it (and harder when asked again), save a checkpoint, serve its model, read its log.
import { useEffect, useState } from 'preact/hooks';

import type { RunInfo } from '../../api/types';
import { isActive } from '../../format';
import { useTrans } from '../../translation';
import type { RunMonitorProps } from './monitor';

interface ActionsProps extends RunMonitorProps {
  info: RunInfo;
  onHint(text: string, isProblem?: boolean): void;
}

const reason = (error: unknown) => (error instanceof Error ? error.message : String(error));

export function Actions(props: ActionsProps) {
  const { info, client, runId } = props;
  const trans = useTrans();
  const actions = info.actions;
  return (
    <span class="llmc-actions">
      {client && actions.checkpoint && <Checkpoint {...props} />}
      {client && actions.serve && <Serve {...props} />}
      {client && (
        <a class="llmc-button" href={client.rest.logUrl(runId)} target="_blank" rel="noreferrer">
          {trans.__('Log')}
        </a>
      )}
      {isActive(info.state) && <Stop {...props} />}
    </span>
  );
}

function Checkpoint({ client, runId, onHint }: ActionsProps) {
  const trans = useTrans();
  const [isAsked, setAsked] = useState(false);
  const save = async () => {
    setAsked(true);
    onHint(trans.__('A checkpoint is saved at the next step that all ranks share …'));
    try {
      const saved = await client?.rest.checkpointRun(runId);
      onHint(saved ? trans.__('A checkpoint of step %1 is saved.', saved.step) : '');
    } catch (error) {
      onHint(reason(error), true);
    } finally {
      setAsked(false);
    }
  };
  return (
    <button type="button" class="llmc-button" disabled={isAsked} onClick={() => void save()}>
      {trans.__('Checkpoint')}
    </button>
  );
}

function Serve({ info, client, onServe, onHint }: ActionsProps) {
  const trans = useTrans();
  const [isAsked, setAsked] = useState(false);
  const serve = async () => {
    if (onServe) {
      onServe(info);
      return;
    }
    setAsked(true);
    onHint(trans.__('Starting an endpoint named %1 …', info.name));
    try {
      await client?.rest.post('endpoints', { target: info.run_id });
      onHint(trans.__('The endpoint %1 is starting: %endpoints shows it.', info.name));
    } catch (error) {
      onHint(reason(error), true);
    } finally {
      setAsked(false);
    }
  };
  return (
    <button type="button" class="llmc-button" disabled={isAsked} onClick={() => void serve()}>
      {trans.__('Serve')}
    </button>
  );
}

function Stop({ info, client, rest = client?.rest, runId, stopByKernel, onHint }: ActionsProps) {
  const trans = useTrans();
  const [presses, setPresses] = useState(0);
  useEffect(() => setPresses(0), [runId]);
  const isStopping = presses > 0 || info.state === 'stopping';
  const label = isStopping ? trans.__('Stopping %1; press again to force it', info.name) : trans.__('Stop %1', info.name);
  const stop = async () => {
    setPresses(presses + 1);
    try {
      if (!rest) throw new Error(trans.__('The Jupyter server cannot be asked from this page.'));
      await rest.stopRun(runId);
      onHint('');
    } catch (error) {
      if (!stopByKernel) {
        onHint(trans.__('Not stopped: %1', reason(error)), true);
        setPresses(0);
        return;
      }
      stopByKernel();
      onHint(trans.__('Asked the kernel to stop. If nothing happens, use the notebook’s own Stop button.'));
    }
  };
  return (
    <button
      type="button"
      class={`llmc-button llmc-stop${isStopping ? ' llmc-stopping' : ''}`}
      title={label}
      aria-label={label}
      onClick={() => void stop()}
    >
      {isStopping ? (presses > 1 ? trans.__('Forcing…') : trans.__('Stopping…')) : trans.__('Stop')}
    </button>
  );
}
