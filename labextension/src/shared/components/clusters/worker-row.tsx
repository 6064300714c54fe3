// One worker: its host, how much of it is used, its devices, the processes it holds.
import type { Device, Worker } from '../../api/types';
import { formatBytes, formatDuration } from '../../format';
import { useTrans } from '../../translation';
import { Meter, StateWord } from '../parts';

const SILENT_S = 30;

export function WorkerRow({ worker, now }: { worker: Worker; now: number }) {
  const trans = useTrans();
  const silent = worker.last_seen ? now - worker.last_seen : 0;
  const processes = worker.processes ?? [];
  const used = (worker.num_slots ?? 0) - (worker.free_slots ?? 0);
  return (
    <li class="llmc-worker" data-warning={!!worker.warning}>
      <div class="llmc-worker-head">
        <span class="llmc-worker-name" title={worker.address}>{worker.host || worker.name}</span>
        <span class="llmc-soft">{trans.__('%1 of %2 slots held', used, worker.num_slots ?? 0)}</span>
        {worker.state && worker.state !== 'running' && <StateWord state={worker.state} />}
      </div>
      {worker.warning && <p class="llmc-problem">{worker.warning}</p>}
      {silent > SILENT_S && <p class="llmc-problem">{trans.__('Last seen %1 ago.', formatDuration(silent))}</p>}
      <div class="llmc-meters">
        {typeof worker.cpu === 'number' && (
          <Meter
            label={trans.__('CPU')}
            value={worker.cpu}
            max={1}
            text={trans.__('%1 % of %2 cores', Math.round(100 * worker.cpu), worker.num_cores ?? '?')}
          />
        )}
        {typeof worker.memory_bytes === 'number' && (
          <Meter
            label={trans.__('Memory')}
            value={worker.memory_bytes}
            max={worker.total_memory_bytes ?? 0}
            runsOut
            text={`${formatBytes(worker.memory_bytes)} / ${formatBytes(worker.total_memory_bytes)}`}
          />
        )}
        {(worker.devices ?? []).map(device => (
          <DeviceMeters key={device.uuid || device.index} device={device} />
        ))}
      </div>
      {processes.length > 0 && (
        <table class="llmc-table">
          <caption class="llmc-hidden-text">{trans.__('Processes on %1', worker.host || worker.name)}</caption>
          <thead>
            <tr>
              <th scope="col">{trans.__('Process')}</th>
              <th scope="col" class="llmc-number">{trans.__('Memory')}</th>
              <th scope="col" class="llmc-number">{trans.__('CPU')}</th>
            </tr>
          </thead>
          <tbody>
            {processes.map(process => (
              <tr key={process.pid} title={trans.__('process %1', process.pid)}>
                <td>{process.text}{typeof process.device === 'number' ? trans.__(' on GPU %1', process.device) : ''}</td>
                <td class="llmc-number">
                  {formatBytes(process.memory_bytes)}
                  {process.gpu_memory_bytes ? trans.__(' + %1 GPU', formatBytes(process.gpu_memory_bytes)) : ''}
                </td>
                <td class="llmc-number">{typeof process.cpu === 'number' ? process.cpu.toFixed(1) : ''}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </li>
  );
}

function DeviceMeters({ device }: { device: Device }) {
  const trans = useTrans();
  const label = trans.__('GPU %1', device.index);
  return (
    <>
      {typeof device.utilization === 'number' && (
        <Meter label={label} value={device.utilization} max={1} text={`${Math.round(100 * device.utilization)} % ${device.name ?? ''}`} />
      )}
      {typeof device.memory_bytes === 'number' && (
        <Meter
          label={trans.__('%1 memory', label)}
          value={device.memory_bytes}
          max={device.total_memory_bytes ?? 0}
          runsOut
          text={`${formatBytes(device.memory_bytes)} / ${formatBytes(device.total_memory_bytes)}`}
        />
      )}
    </>
  );
}
