// The REST routes of the server extension, and what their failures mean to a user.
import { apiUrl, type Connection } from './connection';
import type { RunDetail, Window } from './types';

/** Why an answer could not be had: `kind` decides how it is shown, `message` says what to do. */
export class Unavailable extends Error {
  constructor(
    readonly kind: 'missing' | 'forbidden' | 'failed' | 'unreachable',
    message: string,
    readonly status = 0
  ) {
    super(message);
  }
}

export type Query = Record<string, string | number | null | undefined>;

/** How the front end remembers to show a run; kept by the server, and inherited by the next run of that name. */
export interface ViewSettings {
  log?: string[];
  /** An empty one unpins it. */
  layout?: Record<string, unknown>;
}

export class Rest {
  constructor(readonly connection: Connection) {}

  get<T>(path: string, query: Query = {}): Promise<T> {
    const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
    const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
    return this.request('GET', text ? `${path}?${text}` : path);
  }

  post<T>(path: string, body: unknown = {}): Promise<T> {
    return this.request('POST', path, body);
  }

  put<T>(path: string, body: unknown): Promise<T> {
    return this.request('PUT', path, body);
  }

  delete<T>(path: string): Promise<T> {
    return this.request('DELETE', path);
  }

  run(runId: string): Promise<RunDetail> {
    return this.get(runPath(runId));
  }

  stopRun(runId: string): Promise<{ state: string }> {
    return this.post(`${runPath(runId)}/stop`);
  }

  stopSweep(name: string): Promise<{ state: string }> {
    return this.post(`sweeps/${encodeURIComponent(name)}/stop`);
  }

  checkpointRun(runId: string): Promise<{ step: number }> {
    return this.post(`${runPath(runId)}/checkpoint`);
  }

  keepView(runId: string, view: ViewSettings): Promise<unknown> {
    return this.put(`${runPath(runId)}/view`, view);
  }

  /** Where the whole log of a run can be read, as text. */
  logUrl(runId: string): string {
    return apiUrl(this.connection.baseUrl, `${runPath(runId)}/log`);
  }

  /** A stretch of a metric: the mean over the ranks under "mean", or the columns of each rank under its number. */
  async series(
    runId: string,
    metric: string,
    window: { from?: number | null; to?: number | null; points: number; by: 'mean' | 'rank' }
  ): Promise<Record<string, Window>> {
    const answer = await this.get<{ columns: Record<string, Window> }>(`${runPath(runId)}/series`, {
      metric,
      ...window
    });
    return answer.columns;
  }

  private async request<T>(method: string, path: string, body?: unknown): Promise<T> {
    const headers: Record<string, string> = { ...this.connection.headers() };
    const init: RequestInit = { method, headers, credentials: 'same-origin', cache: 'no-store' };
    if (body !== undefined) {
      headers['Content-Type'] = 'application/json';
      init.body = JSON.stringify(body);
    }
    let response: Response;
    try {
      response = await fetch(apiUrl(this.connection.baseUrl, path), init);
    } catch {
      throw new Unavailable('unreachable', 'The Jupyter server does not answer. What is shown comes back when it does.');
    }
    const answer: unknown = await response.json().catch(() => null);
    if (!response.ok) {
      throw refusal(response.status, answer);
    }
    return answer as T;
  }
}

/** The path of a run below the API. */
export function runPath(runId: string): string {
  return `runs/${encodeURIComponent(runId)}`;
}

function refusal(status: number, answer: unknown): Unavailable {
  const own = answer as { error?: string; message?: string } | null;
  if (status === 404 && !own?.error) {
    return new Unavailable(
      'missing',
      'This Jupyter server runs without the server extension jupyter_llmcloud. ' +
        'Install jupyter-llmcloud into the environment of the Jupyter server and restart it; ' +
        '"jupyter server extension list" must then name jupyter_llmcloud as enabled.',
      status
    );
  }
  if (status === 401 || status === 403) {
    const message = 'This Jupyter server does not let you do that. Log in again, or ask who runs the server.';
    return new Unavailable('forbidden', message, status);
  }
  return new Unavailable('failed', own?.message ?? `The Jupyter server answered with status ${status}.`, status);
}
