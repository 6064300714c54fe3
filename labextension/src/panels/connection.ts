import type { ServerConnection } from '@jupyterlab/services';

import { type Connection, makeConnection } from '../shared/api/connection';

/** The server of a JupyterLab, as the shared package asks it. */
export function serverConnection(settings: ServerConnection.ISettings): Connection {
  const slash = (url: string) => (url.endsWith('/') ? url : `${url}/`);
  return { ...makeConnection(slash(settings.baseUrl), settings.token), wsUrl: slash(settings.wsUrl) };
}
