// The REST routes of the server extension that this front end uses, and what their failures mean to a user.
import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

/** One run, as the server tells it. */
export interface Run {
  run_id: string;
  name: string;
  state: string;
  created: number;
  ended: number | null;
  world_size: number;
  progress: [number, number] | null;
  metrics: Record<string, number | null>;
}

/** Why there is no list of runs: `kind` decides how it is shown, `message` says what to do. */
export class Unavailable extends Error {
  constructor(
    readonly kind: 'missing' | 'forbidden' | 'failed' | 'unreachable',
    message: string
  ) {
    super(message);
  }
}

/** The runs that are alive, or the newest `limit` runs of any state; newest first. */
export async function fetchRuns(
  settings: ServerConnection.ISettings,
  limit: number | null
): Promise<Run[]> {
  const query = limit === null ? '?state=active' : `?limit=${limit}`;
  const answer = await request(settings, `runs${query}`, 'GET');
  return (answer as { runs: Run[] }).runs;
}

/** Ask a run to stop; its variables stay on the ranks. */
export async function stopRun(
  settings: ServerConnection.ISettings,
  runId: string
): Promise<void> {
  await request(settings, `runs/${encodeURIComponent(runId)}/stop`, 'POST');
}

async function request(
  settings: ServerConnection.ISettings,
  path: string,
  method: string
): Promise<unknown> {
  const url = URLExt.join(settings.baseUrl, 'llmcloud/api', path);
  const init = method === 'GET' ? { method } : { method, body: '{}' };
  let response: Response;
  try {
    response = await ServerConnection.makeRequest(url, init, settings);
  } catch {
    throw new Unavailable(
      'unreachable',
      'The Jupyter server does not answer. The list comes back by itself when it does.'
    );
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) {
    throw refusal(response.status, answer);
  }
  return answer;
}

function refusal(status: number, answer: unknown): Unavailable {
  const own = answer as { error?: string; message?: string } | null;
  if (status === 404 && !own?.error) {
    return new Unavailable(
      'missing',
      'This Jupyter server runs without the server extension jupyter_llmcloud, so its runs cannot be shown. ' +
        'Install jupyter-llmcloud into the environment of the Jupyter server and restart it; ' +
        '"jupyter server extension list" must then name jupyter_llmcloud as enabled.'
    );
  }
  if (status === 401 || status === 403) {
    return new Unavailable(
      'forbidden',
      'This Jupyter server does not let you see runs. Log in again, or ask who runs the server.'
    );
  }
  return new Unavailable(
    'failed',
    own?.message ?? `The Jupyter server answered with status ${status}.`
  );
}
