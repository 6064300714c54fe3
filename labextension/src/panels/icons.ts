// The icons of the panels: one family, strokes without fill, drawn with the same stroke on the same grid of 16 units.
import { LabIcon } from '@jupyterlab/ui-components';

function icon(name: string, drawing: string): LabIcon {
  const svgstr =
    '<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 16 16">' +
    `<g class="jp-icon3" style="fill:none" stroke="#616161" stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round">${drawing}</g></svg>`;
  return new LabIcon({ name: `jupyter-llmcloud:${name}`, svgstr });
}

export const cloudIcon = icon(
  'cloud',
  '<path d="M4.5 12.5a3 3 0 0 1-.4-6 4 4 0 0 1 7.6-.9 3.5 3.5 0 0 1 .3 6.9z"/><path d="M6 9.5 8 8l2 1.5M8 8v2.5"/>'
);
export const clusterIcon = icon(
  'cluster',
  '<rect x="2" y="2.5" width="5" height="4" rx="1"/><rect x="9" y="2.5" width="5" height="4" rx="1"/><rect x="5.5" y="9.5" width="5" height="4" rx="1"/><path d="M4.5 6.5v1.5h7V6.5M8 8v1.5"/>'
);
export const runIcon = icon('run', '<path d="M2.5 2.5v11h11"/><path d="M4.5 5c1 4 3 5.5 8.5 6"/>');
export const endpointIcon = icon(
  'endpoint',
  '<path d="M2.5 4.500a1 1 0 0 1 1-1h9a1 1 0 0 1 1 1v5a1 1 0 0 1-1 1H7l-3 2.500v-2.500h-.5a1 1 0 0 1-1-1z"/><path d="M5.5 6h5M5.5 8h3"/>'
);
export const ranksIcon = icon('ranks', '<path d="M2.5 4h11M2.5 8h11M2.5 12h11"/><path d="M5 3v2M10 7v2M7 11v2"/>');
export const distributeIcon = icon(
  'distribute',
  '<circle cx="3.5" cy="8" r="1.5"/><circle cx="12.5" cy="3" r="1.5"/><circle cx="12.5" cy="8" r="1.5"/><circle cx="12.5" cy="13" r="1.5"/><path d="M5 8h6M5 7.5 11 3.700M5 8.500l6 3.800"/>'
);
