// Where the Jupyter server is, and what shows it who asks. JupyterLab makes one of its own settings; a widget in a cell
// finds it in the page.

/** A Jupyter server. Both URLs end in a slash; `token` is empty where cookies do. */
export interface Connection {
  readonly baseUrl: string;
  readonly wsUrl: string;
  readonly token: string;
  /** Headers for a request, made anew for each: cookies change. */
  headers(): Record<string, string>;
}

/** The server behind this page; null where the page is of no Jupyter server (VS Code, Colab, a saved page). */
export function pageConnection(page: Document = document): Connection | null {
  const config = pageConfig(page);
  if (!config) {
    return null;
  }
  const path = config.baseUrl || '/';
  const baseUrl = new URL(path.endsWith('/') ? path : `${path}/`, page.location.href).href;
  return makeConnection(baseUrl, config.token ?? '', page);
}

/** A connection to the server at `baseUrl`, as this page would ask it. */
export function makeConnection(baseUrl: string, token: string, page: Document = document): Connection {
  return {
    baseUrl,
    wsUrl: baseUrl.replace(/^http/, 'ws'),
    token,
    headers: () => {
      const xsrf = cookie(page, '_xsrf');
      return {
        ...(xsrf ? { 'X-XSRFToken': xsrf } : {}),
        ...(token ? { Authorization: `token ${token}` } : {})
      };
    }
  };
}

/** The address of a route of the API. `path` is encoded already. */
export function apiUrl(base: string, path: string): string {
  return `${base}llmcloud/api/${path}`;
}

function pageConfig(page: Document): { baseUrl?: string; token?: string } | null {
  try {
    return JSON.parse(page.getElementById('jupyter-config-data')?.textContent ?? 'null');
  } catch {
    return null;
  }
}

function cookie(page: Document, name: string): string {
  const found = page.cookie.split('; ').find(part => part.startsWith(`${name}=`));
  return found ? decodeURIComponent(found.slice(name.length + 1)) : '';
}
