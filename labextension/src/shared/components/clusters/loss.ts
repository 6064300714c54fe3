// What ends with a cluster, and where its dashboard is. Values in, values out.
import type { Cluster, Endpoint, Run, World } from '../../api/types';
import { isActive } from '../../format';

export interface Loss {
  runs: Run[];
  worlds: World[];
  endpoints: Endpoint[];
}

/** Everything on a cluster that ends with it. An endpoint that named none was put on the one that was the newest then. */
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
      endpoint => ['starting', 'ready'].includes(endpoint.state) && placesOf(endpoint, newest).includes(cluster.name)
    )
  };
}

/** The clusters that its replicas are on; before it has any, the one on which they will be. */
function placesOf(endpoint: Endpoint, newest: string): string[] {
  const placed = (endpoint.replicas ?? []).flatMap(replica => replica.cluster || []);
  return placed.length ? placed : [endpoint.cluster ?? newest];
}

/** Where a browser reaches Dask's dashboard through jupyter-server-proxy; null for a URL that is none. */
export function proxiedDashboard(baseUrl: string, dashboard: string): string | null {
  let url: URL;
  try {
    url = new URL(dashboard);
  } catch {
    return null;
  }
  if (!['http:', 'https:'].includes(url.protocol)) {
    return null; // what a scheduler tells shall not run in this page
  }
  const port = url.port || (url.protocol === 'https:' ? '443' : '80');
  const isHere = ['127.0.0.1', 'localhost', '[::1]'].includes(url.hostname);
  return `${baseUrl}proxy/${isHere ? port : `${url.hostname}:${port}`}${url.pathname}`;
}
