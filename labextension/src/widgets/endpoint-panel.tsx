// An endpoint with its playground in a cell.
import { EndpointPanel } from '../shared/components/endpoints/endpoint-panel';
import { panelWidget } from './panel-in-cell';

export default panelWidget((client, name) => <EndpointPanel client={client} name={name} />);
