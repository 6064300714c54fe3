// What ends with a cluster, and where its dashboard is. Values in, values out.
import type { Cluster, Endpoint, Run, World } from '../../api/types';
import { isActive } from '../../format';

export interface Loss {
  runs: Run[];
  worlds: World[];
  endpoints: Endpoint[];
}

/** Everything on a cluster that ends with it. An endpoint that named none is on the newest. */
export function lossOf(
  cluster: Pick<Cluster, 'name'>,
  runs: readonly Run[],
  worlds: readonly World[],
  endpoints: readonly Endpoint[],
  newest: string
): Loss {
  return {
    runs: runs.filter(run => run.cluster === cluster.name && isActive(run.state)),
    worlds: worlds.filter(world => world.cluster === cluster.name),
    endpoints: endpoints.filter(
      endpoint => (endpoint.cluster ?? newest) === cluster.name && ['starting', 'ready'].includes(endpoint.state)
    )
  };
}

/** Where a browser reaches Dask's dashboard through jupyter-server-proxy; null for a URL that is none. */
export function proxiedDashboard(baseUrl: string, dashboard: string): string | null {
  let url: URL;
  try {
    url = new URL(dashboard);
  } catch {
    return null;
  }
  const port = url.port || (url.protocol === 'https:' ? '443' : '80');
  const isHere = ['127.0.0.1', 'localhost', '[::1]'].includes(url.hostname);
  return `${baseUrl}proxy/${isHere ? port : `${url.hostname}:${port}`}${url.pathname}`;
}
